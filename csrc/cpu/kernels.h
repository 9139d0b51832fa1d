// SPDX-License-Identifier: MIT
// The interface between csrc/cpu/module.cpp and the kernels of each instruction set: plain structs, no torch, no STL.
// Every field means the same as the argument of that name in convmixer_kernels/backends/reference.py.
// Every kernel returns 0, or 1 if there is no scratch memory. It runs on `threads` OpenMP threads and gives the same
// bits for any number of them: work is split by shape only, and partial sums are merged in order.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../types.h"

namespace convmixer {
namespace cpu {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// An output like a Param; data is null if the caller does not need it.
struct MutableParam {
  void* data;
  int dtype;
};

// y = (act(a) - mean) * (weight * rsqrt(var + eps)) + bias; present = false: y = act(a).
struct Norm {
  Param mean, var, weight, bias;
  double eps;
  bool present;
};

// The dtype of a pointwise weight that pack_weight has packed, which takes part in forwards only.
constexpr int kPacked = 3;

// The shape of an activation tensor, which is contiguous or channels_last and never empty.
struct Shape {
  int64_t n, c, h, w;
  int dtype;
  bool channels_last;
};

// The statistics of act(a), float32 (C); null in eval.
struct Statistics {
  float* mean;
  float* var;
};

// eval: y = norm(act(conv(x) + bias)) (+ x). training: y = a = conv(x) + bias, and statistics.
struct DepthwiseForward {
  Shape shape;
  int kh, kw;
  const void* x;
  Param weight, bias;
  int activation;
  Norm norm;
  bool residual;
  Statistics statistics;
  void* y;
  int threads;
  int dilation_h = 1, dilation_w = 1;
};

struct DepthwiseInputGrad {
  Shape shape;
  int kh, kw;
  const void* dy;
  const void* a;  // null where da = dy
  Param weight;
  int activation;
  Norm norm;
  Sums sums;
  bool residual;
  void* dx;
  int threads;
  int dilation_h = 1, dilation_w = 1;
};

struct DepthwiseWeightGrad {
  Shape shape;
  int kh, kw;
  const void* dy;
  const void* a;  // null where da = dy
  const void* x;
  int activation;
  Norm norm;
  Sums sums;
  MutableParam dw, db;  // db.data may be null
  int threads;
  int dilation_h = 1, dilation_w = 1;
};

struct Normalize {
  Shape shape;
  const void* a;
  int activation;
  Norm norm;
  const void* residual;  // may be null
  void* y;
  int threads;
};

struct NormBackward {
  Shape shape;
  const void* dy;
  const void* a;
  int activation;
  Norm norm;
  float* sum_dy;
  float* sum_dy_hhat;
  int threads;
};

// eval: y = norm(act(W x + bias)). training: y = a = W x + bias, and statistics. `shape` is y's.
struct PointwiseForward {
  Shape shape;
  int64_t c_in;
  const void* x;
  Param weight, bias;
  int activation;
  Norm norm;
  Statistics statistics;
  void* y;
  int threads;
};

// running = (1 - momentum) * running + momentum * new, with the unbiased variance, as in nn.BatchNorm2d. Cannot fail.
struct UpdateRunningStatistics {
  const float* mean;                       // of the batch, (C)
  const float* var;                        // biased
  int64_t c, count;                        // count = N * H * W
  MutableParam running_mean, running_var;  // data may be null
  double momentum;
};

// da = dh * act'(a), dx = W^T da, dw = da x^T, db = sum da. `shape` is dy's.
struct PointwiseBackward {
  Shape shape;
  int64_t c_in;
  const void* dy;
  const void* a;
  const void* x;
  Param weight;
  int activation;
  Norm norm;
  Sums sums;
  float* da;  // workspace of dy's layout; unused if pointwise_is_narrow
  void* dx;   // null if not needed, like dw and db
  MutableParam dw, db;
  int threads;
};

// A pointwise weight (c, c_in) as the forward's panels, which depend on the instruction set and on the layout. `packed`
// holds packed_floats(channels_last, c, c_in) floats and is 64-byte aligned. Cannot fail.
struct PackWeight {
  Param weight;
  int64_t c, c_in;
  bool channels_last;
  float* packed;
  int threads;
};

// Both blocks of a mixer layer in evaluation. Their shapes differ in the channels only. The tensor between them,
// depthwise.y and pointwise.x, is never stored.
struct MixerForward {
  DepthwiseForward depthwise;
  PointwiseForward pointwise;
};

// The kernels of one instruction set.
struct Kernels {
  const char* isa;
  int (*depthwise_forward)(const DepthwiseForward&);
  int (*depthwise_input_grad)(const DepthwiseInputGrad&);
  int (*depthwise_weight_grad)(const DepthwiseWeightGrad&);
  int (*normalize)(const Normalize&);
  int (*norm_backward)(const NormBackward&);
  int (*pointwise_forward)(const PointwiseForward&);
  void (*update_running_statistics)(const UpdateRunningStatistics&);
  int (*pointwise_backward)(const PointwiseBackward&);
  bool (*pointwise_is_narrow)(int64_t c, int64_t c_in);
  int64_t (*packed_floats)(bool channels_last, int64_t c, int64_t c_in);
  void (*pack_weight)(const PackWeight&);
  int (*mixer_forward)(const MixerForward* layers, int64_t count);  // count >= 1 layers, one after the other
  bool (*mixer_fits)(const Shape& widest, int threads);             // whether that is faster than a call for each block
  void (*activation)(const float* x, float* y, int64_t count, int activation, bool gradient);
};

extern const Kernels kAvx512, kAvx2, kBaseline;

// The kernels of the widest set that this CPU runs, or of the one that CONVMIXER_CPU_ISA names. On failure null, and
// *error is the reason (a static string).
const Kernels* select_kernels(const char** error);
// The names of the sets that this build has and this CPU runs, separated by commas.
const char* supported_isas();

// Asks for huge pages for a large output before its first write. Otherwise fresh memory costs a page fault for each
// 4 KB, which took half of an evaluation block's time on a virtual machine.
void advise_output(void* p, size_t bytes);

// Memory of the calling thread, 64-byte aligned, valid until the thread's next call with the same slot; null on
// failure. Slot 0 is for the caller's shared tables, slot 1 for each thread's planes.
void* scratch(int slot, size_t bytes);

}  // namespace cpu
}  // namespace convmixer

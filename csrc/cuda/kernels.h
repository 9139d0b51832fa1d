// SPDX-License-Identifier: MIT
// The launchers that csrc/cuda/*.cu define and csrc/cuda/module.cpp binds: plain C++, no CUDA header, no torch.
// Every argument means the same as in the primitive of that name in convmixer_kernels/backends/reference.py.
// A launcher enqueues on `stream`, never synchronises or allocates, and returns a cudaError_t as int (0 is success).
// The caller provides scratch memory; the *_workspace function beside the launcher gives its size in bytes.
#pragma once
#include <cstdint>

#include "../types.h"

namespace convmixer {

// y = (act(a) - mean) * (weight * rsqrt(var + eps)) + bias; present = false: y = act(a).
struct Norm {
  Param mean, var, weight, bias;
  float eps;
  bool present;
};

// The shape of an activation tensor, which is contiguous or channels_last and never empty. Contiguous 16-bit tensors of
// depthwise_forward and depthwise_input_grad start at multiples of 16 bytes.
struct Shape {
  int64_t n, c;
  int h, w;
  int dtype;
  bool channels_last;
};

// depthwise_forward.cu
//   partials == null (eval)   y = norm(act(conv(x) + bias)) (+ x)
//   partials != null (train)  y = a = conv(x) + bias rounded to the dtype, and for each channel
//                             partials[(c * P + p) * 3 + {0, 1, 2}] = count, mean, M2 of act(a) over the p-th part of
//                             the channel's N*H*W values, with P = depthwise_forward_partials(...);
//                             norm.present and residual are false
struct DepthwiseForward {
  Shape shape;
  int kh, kw;
  const void* x;
  Param weight;  // (C, 1, kH, kW)
  Param bias;    // (C)
  int activation;
  Norm norm;
  bool residual;
  void* y;
  float* partials;
};
int64_t depthwise_forward_partials(const Shape& shape, int kh, int kw);
int depthwise_forward(const DepthwiseForward& p, void* stream);

// depthwise_input_grad.cu
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
};
int depthwise_input_grad(const DepthwiseInputGrad& p, void* stream);

// depthwise_weight_grad.cu
// dw (C, 1, kH, kW) in dw_dtype, db (C) in db_dtype or null, in two launches: partials, then one ordered reduction.
struct DepthwiseWeightGrad {
  Shape shape;
  int kh, kw;
  const void* dy;
  const void* a;  // null where da = dy
  const void* x;
  int activation;
  Norm norm;
  Sums sums;
  void* dw;
  int dw_dtype;
  void* db;
  int db_dtype;
  void* workspace;
};
int64_t depthwise_weight_grad_workspace(const Shape& shape, int kh, int kw);
int depthwise_weight_grad(const DepthwiseWeightGrad& p, void* stream);

// depthwise_fma.cu, depthwise_fma_weight_grad.cu: float32 arithmetic on FMA units, for float32 tensors. The forward and
// the input gradient also take 16-bit tensors that no tensor-core kernel fits.
int64_t depthwise_forward_fma_partials(const Shape& shape, int kh, int kw);
int depthwise_forward_fma(const DepthwiseForward& p, void* stream);
int depthwise_input_grad_fma(const DepthwiseInputGrad& p, void* stream);
int64_t depthwise_weight_grad_fma_workspace(const Shape& shape, int kh, int kw);
int depthwise_weight_grad_fma(const DepthwiseWeightGrad& p, void* stream);

// batch_norm.cu
// Merges P partials a channel, in order, by Chan's formula; mean and biased var are (C) float32.
struct MergeStatistics {
  int64_t c, partials_per_channel, count;  // count = N * H * W
  const float* partials;
  float* mean;
  float* var;
};
int merge_statistics(const MergeStatistics& p, void* stream);

// running = (1 - momentum) * running + momentum * new, with the unbiased variance, as in nn.BatchNorm2d.
struct RunningUpdate {
  int64_t c, count;    // count = N * H * W; c = 0: nothing to do
  const float* mean;   // of the batch, (C)
  const float* var;    // biased
  void* running_mean;  // null: none
  int running_mean_dtype;
  void* running_var;
  int running_var_dtype;
  double momentum;
};

// y = norm(act(a)) (+ residual), and the running statistics of this block and of the one before it.
constexpr int kMostUpdates = 2;
struct Normalize {
  Shape shape;
  const void* a;
  int activation;
  Norm norm;
  const void* residual;  // null: none
  void* y;
  RunningUpdate updates[kMostUpdates];
};
int normalize(const Normalize& p, void* stream);

// sum dy and sum dy * hhat, in two launches: reduce and finish
struct NormBackward {
  Shape shape;
  const void* dy;
  const void* a;
  int activation;
  Norm norm;
  float* sum_dy;
  float* sum_dy_hhat;
  void* workspace;
};
int64_t norm_backward_workspace(const Shape& shape);
int norm_backward(const NormBackward& p, void* stream);

// pointwise_gemm.cu
// The whole pointwise block in one launch; eval and train as in DepthwiseForward, with
// P = pointwise_forward_partials(...), which depends on the device.
struct PointwiseForward {
  Shape shape;  // x's
  int64_t c_out;
  const void* x;
  const void* weight;  // (C_out, C_in, 1, 1), of x's dtype
  Param bias;          // (C_out)
  int activation;
  Norm norm;
  void* y;  // (N, C_out, H, W)
  float* partials;
  bool hopper;  // use wgmma and TMA if device, shape and alignment allow it
};
// Whether device, shape and alignment allow `hopper`.
bool pointwise_runs_hopper(const Shape& shape, int64_t c_out, const void* x, const void* weight);
int64_t pointwise_forward_partials(const Shape& shape, int64_t c_out, const void* x, const void* weight, bool hopper);
int pointwise_forward(const PointwiseForward& p, void* stream);

// pointwise_weight_grad.cu
// dw (C_out, C_in, 1, 1) in dw_dtype = sum over images and pixels of da x, by wgmma: products, then one ordered sum.
// It takes contiguous 16-bit tensors of the same dtype at multiples of 16 bytes, with H * W a multiple of 64, on a GPU
// for which this build has sm_90a's code; otherwise the size of the workspace is 0. The size depends on the device.
struct PointwiseWeightGrad {
  Shape shape;  // x's
  int64_t c_out;
  const void* da;  // (N, C_out, H, W)
  const void* x;
  void* dw;
  int dw_dtype;
  void* workspace;
};
int64_t pointwise_weight_grad_workspace(const Shape& shape, int64_t c_out);
int pointwise_weight_grad(const PointwiseWeightGrad& p, void* stream);

// mixer.cu
// depthwise_forward and pointwise_forward of an eval layer of a narrow network, in one launch. mixer_fits is false if
// it cannot run with this shape or on this device. A block computes one of mixer_tiles tiles of pixels.
struct MixerForward {
  Shape shape;  // x's
  int64_t c_out;
  int kh, kw;
  const void* x;
  Param depthwise_weight;  // (C, 1, kH, kW)
  Param depthwise_bias;    // (C)
  Norm depthwise_norm;
  const void* weight;  // (C_out, C, 1, 1), of x's dtype
  Param bias;          // (C_out)
  Norm norm;
  int activation;
  bool residual;
  void* y;  // (N, C_out, H, W)
};
bool mixer_fits(const Shape& shape, int64_t c_out, int kh, int kw);
int64_t mixer_tiles(const Shape& shape);
int mixer_forward(const MixerForward& p, void* stream);

// pointwise.cu
// Statistics of act(a), partials as in DepthwiseForward, over the result of a torch GEMM.
struct PointwiseStatistics {
  Shape shape;
  const void* a;
  int activation;
  float* partials;
};
int64_t pointwise_statistics_partials(const Shape& shape);
int pointwise_statistics(const PointwiseStatistics& p, void* stream);

// da = dh * act'(a), written once in the tensors' dtype for torch's GEMMs, and db = sum da unless db is null.
struct PointwiseGradPrologue {
  Shape shape;
  const void* dy;
  const void* a;
  int activation;
  Norm norm;
  Sums sums;
  void* da;
  void* db;
  int db_dtype;
  void* workspace;
};
int64_t pointwise_grad_prologue_workspace(const Shape& shape);
int pointwise_grad_prologue(const PointwiseGradPrologue& p, void* stream);

const char* error_string(int error);
int toolkit_version();  // CUDART_VERSION: 1000 * major + 10 * minor
int device_count(int* count);

}  // namespace convmixer

// SPDX-License-Identifier: MIT
// The passes before and after torch's GEMM in the pointwise block; elementwise.cuh says what a block and a thread own.
//   pointwise_statistics     count, mean, M2 of act(a), by part; it only reads
//   pointwise_grad_prologue  da = dh * act'(a), written once for the GEMMs, and db = sum da: by part, then a warp adds
//                            up the parts of a channel
//                              train  dh = gamma * rstd * (dy - sum_dy / M - hhat * sum_dy_hhat / M)
//                              eval   dh = gamma * rstd * dy
// Bound: HBM (two or three accesses an element).
#include "elementwise.cuh"

namespace convmixer {
namespace {

template <class T>
struct StatisticsOp {
  static constexpr int kInputs = 1, kStats = 1;
  static constexpr bool kMoments = true, kWrites = false, kUpdates = false;
  struct Channel {};

  const T* first;  // a
  const T* second;
  T* out;                                        // null
  elementwise::Partial<StatisticsOp>* partials;  // (C, parts): count, mean, M2
  int activation;

  __device__ __forceinline__ Channel channel(int64_t) const { return {}; }

  template <int ACT>
  __device__ __forceinline__ float element(const Channel&, float a, float, float (&stat)[2]) const {
    stat[0] = elementwise::activate<ACT, T>(a);
    return a;
  }
};

template <class T>
struct GradPrologueOp {
  static constexpr int kInputs = 2, kStats = 1;
  static constexpr bool kMoments = false, kWrites = true, kWide = sizeof(T) == 4, kUpdates = false;
  // dh = offset + scale * dy + slope * (h - mean). dy is scaled before the offset is added: the difference of dy and a
  // constant would round alike for all dy of a binade, an error that grows with their number in db (depthwise_fma.cuh).
  struct Channel {
    float mean, scale, offset, slope;
  };

  const T* first;                                  // dy
  const T* second;                                 // a
  T* out;                                          // da
  elementwise::Partial<GradPrologueOp>* partials;  // (C, parts): sum da
  int activation;
  Norm norm;
  Sums sums;
  float count;

  __device__ __forceinline__ Channel channel(int64_t c) const {
    Channel k{0.f, 1.f, 0.f, 0.f};
    if (!norm.present) return k;
    k.mean = load_param(norm.mean, c);
    k.scale = load_param(norm.weight, c, 1.f) * elementwise::rstd(norm, c);
    if (sums.dy != nullptr) {
      k.offset = -k.scale * (sums.dy[c] / count);
      k.slope = -k.scale * (sums.dy_hhat[c] / count * elementwise::rstd(norm, c));
    }
    return k;
  }

  template <int ACT>
  __device__ __forceinline__ float element(const Channel& k, float dy, float a, float (&stat)[2]) const {
    const ValueAndGrad h = elementwise::activate_and_grad<ACT, T>(a);
    float dh = fmaf(k.scale, dy, k.offset);
    // slope is 0 without sums, but h may be infinite
    if (sums.dy != nullptr) dh = fmaf(k.slope, h.value - k.mean, dh);
    stat[0] = times_grad<ACT>(dh, h.grad);
    return stat[0];
  }
};

template <class T>
__global__ void __launch_bounds__(128)
    bias_grad_finish_kernel(const elementwise::Partial<GradPrologueOp<T>>* __restrict__ partials, int64_t parts,
                            int64_t channels, void* __restrict__ db, int db_dtype) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  if (c >= channels) return;
  const auto total = elementwise::add_parts(partials + c * parts, parts);
  if (threadIdx.x % 32 == 0) store_param(db, db_dtype, c, static_cast<float>(total.v[0]));
}

}  // namespace

int64_t pointwise_statistics_partials(const Shape& shape) { return elementwise::parts_of(shape); }

int pointwise_statistics(const PointwiseStatistics& p, void* stream) {
  return elementwise::with_type(p.shape.dtype, [&](auto type) {
    using T = decltype(type);
    auto* partials = reinterpret_cast<elementwise::Partial<StatisticsOp<T>>*>(p.partials);
    const StatisticsOp<T> op{static_cast<const T*>(p.a), nullptr, nullptr, partials, p.activation};
    return elementwise::launch<T>(op, p.shape, {p.a}, stream);
  });
}

int64_t pointwise_grad_prologue_workspace(const Shape& shape) {
  return shape.c * elementwise::parts_of(shape) *
         static_cast<int64_t>(sizeof(elementwise::Partial<GradPrologueOp<float>>));
}

int pointwise_grad_prologue(const PointwiseGradPrologue& p, void* stream) {
  return elementwise::with_type(p.shape.dtype, [&](auto type) {
    using T = decltype(type);
    auto* partials = static_cast<elementwise::Partial<GradPrologueOp<T>>*>(p.workspace);
    const GradPrologueOp<T> op{static_cast<const T*>(p.dy),
                               static_cast<const T*>(p.a),
                               static_cast<T*>(p.da),
                               partials,
                               p.activation,
                               p.norm,
                               p.sums,
                               static_cast<float>(p.shape.n * p.shape.h * p.shape.w)};
    const int error = elementwise::launch<T>(op, p.shape, {p.dy, p.a, p.da}, stream);
    if (error != 0 || p.db == nullptr) return error;
    LAUNCH((bias_grad_finish_kernel<T>), dim3(static_cast<unsigned>((p.shape.c + 3) / 4)), dim3(128), 0,
           static_cast<cudaStream_t>(stream), partials, elementwise::parts_of(p.shape), p.shape.c, p.db, p.db_dtype);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace convmixer

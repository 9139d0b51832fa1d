// SPDX-License-Identifier: MIT
// Batch norm after the activation, with h = act(a): the passes around the convolutions, for contiguous and
// channels_last tensors of any size. elementwise.cuh says what a block and a thread own.
//   merge_statistics  a warp owns a channel and merges the convolution's partials in double, by Chan's formula
//   normalize         y = (h - mean) * gamma * rsqrt(var + eps) + beta (+ residual); blocks at the end of the grid
//                     update the running statistics. This is a forward's last launch: if an earlier one fails, the
//                     statistics have not moved
//   norm_backward     sum dy and sum dy * (h - mean) by part; then a warp owns a channel and adds up its parts
// Bound: HBM. merge_statistics reads a few percent of the bytes of the others.
#include "elementwise.cuh"

namespace convmixer {
namespace {

constexpr int kChannelsPerBlock = 4;  // one warp each

template <class T>
__device__ __forceinline__ void move_running(void* running, int64_t c, double value, double momentum) {
  T* at = static_cast<T*>(running) + c;
  *at = from_float<T>(static_cast<float>((1.0 - momentum) * static_cast<double>(to_float(*at)) + momentum * value));
}

__device__ __forceinline__ void move_running(void* running, int dtype, int64_t c, double value, double momentum) {
  if (running == nullptr) return;
  if (dtype == kFloat32) {
    move_running<float>(running, c, value, momentum);
  } else if (dtype == kFloat16) {
    move_running<__half>(running, c, value, momentum);
  } else {
    move_running<__nv_bfloat16>(running, c, value, momentum);
  }
}

// Updates channel c.
__device__ __forceinline__ void move_running(const RunningUpdate& p, int64_t c) {
  if (c >= p.c) return;
  const double count = static_cast<double>(p.count), unbiased = count / (count > 1.0 ? count - 1.0 : 1.0);
  move_running(p.running_mean, p.running_mean_dtype, c, p.mean[c], p.momentum);
  move_running(p.running_var, p.running_var_dtype, c, p.var[c] * unbiased, p.momentum);
}

__global__ void __launch_bounds__(32 * kChannelsPerBlock) merge_kernel(MergeStatistics p) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kChannelsPerBlock + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (c >= p.c) return;
  const float* partial = p.partials + c * p.partials_per_channel * 3;
  // the mean first, then each part's own M2 and its distance from that mean: Chan's formula, without a division per
  // part
  double mean = 0.0, m2 = 0.0;
  for (int64_t i = lane; i < p.partials_per_channel; i += 32) {
    const double count = partial[i * 3];
    if (count > 0.0) mean += count * partial[i * 3 + 1];
  }
  mean = elementwise::sum_over_warp(mean) / static_cast<double>(p.count);
  for (int64_t i = lane; i < p.partials_per_channel; i += 32) {
    const double count = partial[i * 3], distance = partial[i * 3 + 1] - mean;
    if (count > 0.0) m2 += partial[i * 3 + 2] + count * distance * distance;
  }
  m2 = elementwise::sum_over_warp(m2);
  if (lane != 0) return;
  const double var = m2 / static_cast<double>(p.count);
  p.mean[c] = static_cast<float>(mean);
  p.var[c] = static_cast<float>(var);
}

template <class T>
struct NormalizeOp {
  static constexpr int kInputs = 2, kStats = 0;
  static constexpr bool kMoments = false, kWrites = true, kWide = false, kUpdates = true;
  using Channel = elementwise::Affine;

  const T* first;   // a
  const T* second;  // residual or null
  T* out;           // y
  elementwise::Partial<NormalizeOp>* partials;
  int activation;
  Norm norm;
  RunningUpdate updates[kMostUpdates];

  int64_t channels_to_update() const { return std::max(updates[0].c, updates[1].c); }
  __device__ __forceinline__ void update(int64_t c) const {
#pragma unroll
    for (int i = 0; i < kMostUpdates; ++i) move_running(updates[i], c);
  }

  __device__ __forceinline__ Channel channel(int64_t c) const { return elementwise::affine(norm, c); }

  template <int ACT>
  __device__ __forceinline__ float element(const Channel& k, float a, float residual, float (&)[1]) const {
    const float h = elementwise::activate<ACT, T>(a);
    return fmaf(h - k.mean, k.scale, k.shift) + residual;
  }
};

template <class T>
struct NormBackwardOp {
  static constexpr int kInputs = 2, kStats = 2;
  static constexpr bool kMoments = false, kWrites = false, kWide = sizeof(T) == 4, kUpdates = false;
  struct Channel {
    float mean;
  };

  const T* first;   // dy
  const T* second;  // a
  T* out;
  elementwise::Partial<NormBackwardOp>* partials;  // (C, parts): sum dy, sum dy * (h - mean)
  int activation;
  Norm norm;

  __device__ __forceinline__ Channel channel(int64_t c) const { return {load_param(norm.mean, c)}; }

  template <int ACT>
  __device__ __forceinline__ float element(const Channel& k, float dy, float a, float (&stat)[3]) const {
    stat[0] = dy;
    stat[1] = dy * (elementwise::activate<ACT, T>(a) - k.mean);
    return 0.f;
  }
};

template <class T>
__global__ void __launch_bounds__(32 * kChannelsPerBlock)
    norm_backward_finish_kernel(NormBackward p, const elementwise::Partial<NormBackwardOp<T>>* __restrict__ partials,
                                int64_t parts) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kChannelsPerBlock + threadIdx.x / 32;
  if (c >= p.shape.c) return;
  const auto total = elementwise::add_parts(partials + c * parts, parts);
  if (threadIdx.x % 32 != 0) return;
  p.sum_dy[c] = static_cast<float>(total.v[0]);
  p.sum_dy_hhat[c] = static_cast<float>(total.v[1] * elementwise::rstd(p.norm, c));
}

unsigned warp_blocks(int64_t channels) {
  return static_cast<unsigned>((channels + kChannelsPerBlock - 1) / kChannelsPerBlock);
}

}  // namespace

int merge_statistics(const MergeStatistics& p, void* stream) {
  LAUNCH(merge_kernel, dim3(warp_blocks(p.c)), dim3(32 * kChannelsPerBlock), 0, static_cast<cudaStream_t>(stream), p);
  return static_cast<int>(cudaGetLastError());
}

int normalize(const Normalize& p, void* stream) {
  return elementwise::with_type(p.shape.dtype, [&](auto type) {
    using T = decltype(type);
    const NormalizeOp<T> op{static_cast<const T*>(p.a),
                            static_cast<const T*>(p.residual),
                            static_cast<T*>(p.y),
                            nullptr,
                            p.activation,
                            p.norm,
                            {p.updates[0], p.updates[1]}};
    return elementwise::launch<T>(op, p.shape, {p.a, p.residual, p.y}, stream);
  });
}

int64_t norm_backward_workspace(const Shape& shape) {
  return shape.c * elementwise::parts_of(shape) *
         static_cast<int64_t>(sizeof(elementwise::Partial<NormBackwardOp<float>>));
}

int norm_backward(const NormBackward& p, void* stream) {
  return elementwise::with_type(p.shape.dtype, [&](auto type) {
    using T = decltype(type);
    auto* partials = static_cast<elementwise::Partial<NormBackwardOp<T>>*>(p.workspace);
    const NormBackwardOp<T> op{
        static_cast<const T*>(p.dy), static_cast<const T*>(p.a), nullptr, partials, p.activation, p.norm};
    const int error = elementwise::launch<T>(op, p.shape, {p.dy, p.a}, stream);
    if (error != 0) return error;
    LAUNCH((norm_backward_finish_kernel<T>), dim3(warp_blocks(p.shape.c)), dim3(32 * kChannelsPerBlock), 0,
           static_cast<cudaStream_t>(stream), p, partials, elementwise::parts_of(p.shape));
    return static_cast<int>(cudaGetLastError());
  });
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int toolkit_version() { return CUDART_VERSION; }

int device_count(int* count) { return static_cast<int>(cudaGetDeviceCount(count)); }

}  // namespace convmixer

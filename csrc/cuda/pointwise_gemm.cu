// SPDX-License-Identifier: MIT
// Launcher of the kernels that compute the pointwise block's forward in one launch: pointwise_wgmma.cuh (16-bit on
// sm_90a), pointwise_mma.cuh (16-bit), pointwise_fma.cuh (float32).
#include "pointwise_fma.cuh"
#include "pointwise_mma.cuh"
#include "pointwise_wgmma.cuh"

namespace convmixer {
namespace {

using pointwise::Args;

// m16 and n8 tiles of a warp: a block computes 128 x 128 results, or 64 x 64 if those would leave multiprocessors idle,
// or if operands are not 16-byte aligned and are copied value by value.
struct Plan {
  bool last, aligned, hopper, large;
  int tile;
};

// If H = W = 1 the two formats agree, and pixels lie as rows.
bool lies_as_rows(const Shape& s) { return s.channels_last || static_cast<int64_t>(s.h) * s.w == 1; }

bool operands_aligned(const Shape& s, const void* x, const void* weight) {
  const auto whole = [](int64_t n) { return n % 8 == 0; };
  return (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(weight)) % 16 == 0 && whole(s.c) &&
         (lies_as_rows(s) || whole(static_cast<int64_t>(s.h) * s.w));
}

Plan plan_of(const Shape& s, int64_t c_out, const void* x, const void* weight, bool hopper) {
  const bool last = lies_as_rows(s), aligned = operands_aligned(s, x, weight);
  if (s.dtype == kFloat32) return {last, aligned, false, true, pointwise::kFmaTile};
  // a box is 64 pixels of one image; TMA's coordinates are 32-bit
  const int64_t pixels = s.n * s.h * s.w;
  hopper = hopper && aligned && (last || static_cast<int64_t>(s.h) * s.w % 64 == 0) &&
           std::max(pixels, c_out) < 0x7fffff00 && has_hopper_code(pointwise::wgmma_kernel<__half, true>);
  const auto tiles = [&](int tile) { return ceil_div(c_out, tile) * ceil_div(pixels, tile); };
  // two blocks run on a multiprocessor at a time
  const bool large = hopper || (aligned && tiles(128) >= 2 * multiprocessor_count());
  return {last, aligned, hopper, large, large ? 128 : 64};
}

template <class K>
int launch(K kernel, const Args& p, int threads, int shared_bytes, void* stream) {
  const int64_t tiles = p.pixel_tiles * p.channel_tiles;
  if (tiles > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const cudaError_t error = set_dynamic_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  LAUNCH(kernel, dim3(static_cast<unsigned>(tiles)), dim3(threads), shared_bytes, static_cast<cudaStream_t>(stream), p);
  return cudaGetLastError();
}

template <class T, int MT, int NT, bool ALIGNED>
int launch_mma(const Args& p, bool last, void* stream) {
  constexpr int kShared = pointwise::mma_shared_bytes<MT, NT>();
  return last ? launch(pointwise::mma_kernel<T, MT, NT, true, ALIGNED>, p, pointwise::kMmaThreads, kShared, stream)
              : launch(pointwise::mma_kernel<T, MT, NT, false, ALIGNED>, p, pointwise::kMmaThreads, kShared, stream);
}

template <class T, bool LAST>
int launch_wgmma(const Args& p, const Shape& s, void* stream) {
  const auto matrix = [](TensorMap& map, const void* data, int64_t rows, int64_t depth) {
    return make_tensor_map(map, DtypeOf<T>::value == kBFloat16, data, {depth, rows, 1}, {2 * depth, 2 * depth * rows},
                           pointwise::kHopperTile);
  };
  TensorMap x, weight;
  cudaError_t error = matrix(weight, p.weight, p.c_out, p.c_in);
  if (error != cudaSuccess) return error;
  error = LAST ? matrix(x, p.x, p.pixels, p.c_in)
               : make_tensor_map(x, DtypeOf<T>::value == kBFloat16, p.x, {p.plane, p.c_in, s.n},
                                 {2 * p.plane, 2 * p.plane * p.c_in}, pointwise::kHopperDepth);
  if (error != cudaSuccess) return error;
  constexpr auto kernel = pointwise::wgmma_kernel<T, LAST>;
  constexpr int kShared = pointwise::hopper_shared_bytes<pointwise::HopperShared<LAST>>();
  error = set_dynamic_shared(kernel, kShared);
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::min<int64_t>(p.pixel_tiles * p.channel_tiles, multiprocessor_count());
  LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(pointwise::kHopperThreads), kShared,
         static_cast<cudaStream_t>(stream), p, LAST ? x : weight, LAST ? weight : x);
  return cudaGetLastError();
}

template <class T>
int launch_16bit(const Args& p, const Plan& plan, const Shape& s, void* stream) {
  if (plan.hopper) return plan.last ? launch_wgmma<T, true>(p, s, stream) : launch_wgmma<T, false>(p, s, stream);
  if (plan.large) return launch_mma<T, 4, 8, true>(p, plan.last, stream);
  if (plan.aligned) return launch_mma<T, 2, 4, true>(p, plan.last, stream);
  return launch_mma<T, 2, 4, false>(p, plan.last, stream);
}

}  // namespace

bool pointwise_runs_hopper(const Shape& shape, int64_t c_out, const void* x, const void* weight) {
  return plan_of(shape, c_out, x, weight, true).hopper;
}

int64_t pointwise_forward_partials(const Shape& shape, int64_t c_out, const void* x, const void* weight, bool hopper) {
  return ceil_div(shape.n * shape.h * shape.w, plan_of(shape, c_out, x, weight, hopper).tile);
}

int pointwise_forward(const PointwiseForward& p, void* stream) {
  const Shape& s = p.shape;
  if (s.c > 0x7fffff00) return cudaErrorInvalidValue;
  const Plan plan = plan_of(s, p.c_out, p.x, p.weight, p.hopper);
  const int64_t pixels = s.n * s.h * s.w, plane = static_cast<int64_t>(s.h) * s.w;
  const int wide = s.dtype == kFloat32 ? 4 : 8;
  const Args args{p.x,
                  p.weight,
                  p.y,
                  p.bias,
                  p.norm,
                  p.partials,
                  p.c_out,
                  pixels,
                  plane,
                  ceil_div(pixels, plan.tile),
                  ceil_div(p.c_out, plan.tile),
                  static_cast<int>(s.c),
                  p.activation,
                  reinterpret_cast<uintptr_t>(p.y) % 16 == 0 && (plan.last ? p.c_out : plane) % wide == 0};
  if (s.dtype == kFloat16) return launch_16bit<__half>(args, plan, s, stream);
  if (s.dtype == kBFloat16) return launch_16bit<__nv_bfloat16>(args, plan, s, stream);
  constexpr int kShared = pointwise::kFmaStages * pointwise::kFmaStage * static_cast<int>(sizeof(float));
  return plan.last ? launch(pointwise::fma_kernel<true>, args, pointwise::kFmaThreads, kShared, stream)
                   : launch(pointwise::fma_kernel<false>, args, pointwise::kFmaThreads, kShared, stream);
}

}  // namespace convmixer

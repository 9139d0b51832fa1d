// SPDX-License-Identifier: MIT
// The pointwise block's weight gradient for contiguous 16-bit tensors, with sm_90a's wgmma and TMA as in
// pointwise_wgmma.cuh: dw[o, i] = sum over n, p of da[n, o, p] x[n, i, p]. Both operands are K-contiguous: a stage is
// a box of 128 channels x 64 pixels of one image, of each operand.
// An item is a 128 x 128 tile and a part of K: all of K for the tiles that fill whole waves of multiprocessors, one of
// `chunks` equal parts for the remaining tiles. Items are ordered by part, then by tile: blocks that run together read
// the same pixels of all channels, which come from memory once a wave. (Cutting all tiles evenly over the blocks would
// read everything C / 128 times.) Every item has a slot of 128 x 128 sums; a second launch adds up a tile's slots in
// order.
// Bound: the tensor core, 2 C_in C_out N H W operations. Expected at 64x1536x32x32, not yet measured: 309 GFLOP at the
// forward's rate, about 650 TFLOP/s, take 475 us, 17 MB of slots 10 us; torch's products take 800 us.
#include "pointwise_wgmma.cuh"

namespace convmixer {
namespace pointwise {

constexpr int kGradStages = 6;  // only stages need shared memory here
// Tiles of a group of output channels: then the remaining tiles lie together and read few channels.
constexpr int kGradGroup = 4;
constexpr int kSlot = kHopperTile * kHopperTile;
constexpr int kSumThreads = 256, kSumVector = 4;
constexpr int kSumBlocks = kSlot / (kSumThreads * kSumVector);  // a tile

struct GradArgs {
  float* slots;  // (items, 128, 128)
  int64_t c_out, c_in;
  int64_t out_tiles, in_tiles;
  int64_t whole, rest;  // tiles with all of K at once, and in `chunks` parts
  int chunks, steps;    // steps: stages of K in all
  int plane;

  __host__ __device__ int64_t items() const { return whole + rest * chunks; }
};

#if CONVMIXER_HOPPER
struct GradWork {
  const GradArgs& p;

  struct Boxes {
    int row, column, position, image, plane;

    __device__ __forceinline__ void copy(int, const TensorMap& map_a, const TensorMap& map_b, unsigned char* a,
                                         unsigned char* b, Barrier* full) {
      tma_load(a, map_a, full, position, row, image);
      tma_load(b, map_b, full, position, column, image);
      position += kHopperDepth;
      if (position == plane) position = 0, ++image;
    }
  };

  __device__ __forceinline__ int64_t items() const { return p.items(); }
  // the stage at which part `chunk` of K begins
  __device__ __forceinline__ int first_step(int64_t chunk) const {
    return static_cast<int>(chunk * p.steps / p.chunks);
  }
  __device__ __forceinline__ int steps(int64_t i) const {
    if (i < p.whole) return p.steps;
    const int64_t chunk = (i - p.whole) / p.rest;
    return first_step(chunk + 1) - first_step(chunk);
  }
  __device__ __forceinline__ Boxes boxes(int64_t i) const {
    const int64_t chunk = i < p.whole ? 0 : (i - p.whole) / p.rest;
    const Tile tile = locate_tile<kGradGroup>(p.out_tiles, p.in_tiles, i - chunk * p.rest);
    const int per_image = p.plane / kHopperDepth, step = first_step(chunk), image = step / per_image;
    return {static_cast<int>(tile.channel * kHopperTile), static_cast<int>(tile.pixel * kHopperTile),
            (step - image * per_image) * kHopperDepth, image, p.plane};
  }
};
#endif

template <class T>
__global__ void __launch_bounds__(kHopperThreads, 1)
    wgmma_weight_grad_kernel(const __grid_constant__ GradArgs p, const __grid_constant__ TensorMap map_da,
                             const __grid_constant__ TensorMap map_x) {
#if CONVMIXER_HOPPER
  DYN_SHARED(unsigned char, memory);
  auto& stages = hopper_shared<HopperStages<kGradStages>>(memory);
  using Results = WarpTile<HopperWarps<true>>;
  const auto finish = [&](int64_t i, const Results& acc, int) {
    float* slot = p.slots + i * kSlot + (acc.row + acc.g) * kHopperTile + acc.column + 2 * acc.t;
#pragma unroll
    for (int m = 0; m < Results::MT; ++m)
#pragma unroll
      for (int j = 0; j < Results::NT; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
          *reinterpret_cast<float2*>(slot + (64 * m + 4 * e) * kHopperTile + 8 * j) =
              make_float2(acc.v[m][j][e], acc.v[m][j][e + 1]);
  };
  run_items<T, false, Results>(GradWork{p}, map_da, map_x, stages, finish);
#elif defined(__CUDA_ARCH__)
  __trap();
#endif
}

// Adds up a tile's slots to dw, in the order of K: kSumBlocks blocks a tile, a thread four results of a row.
template <class O>
__global__ void __launch_bounds__(kSumThreads, 4) sum_slots_kernel(const __grid_constant__ GradArgs p, O* dw) {
  const int64_t index = blockIdx.x / kSumBlocks;
  const int at = static_cast<int>(blockIdx.x % kSumBlocks * kSumThreads + threadIdx.x) * kSumVector;
  const Tile tile = locate_tile<kGradGroup>(p.out_tiles, p.in_tiles, index);
  const int64_t row = tile.channel * kHopperTile + at / kHopperTile;
  const int64_t column = tile.pixel * kHopperTile + at % kHopperTile;
  if (row >= p.c_out || column >= p.c_in) return;
  const float* slot = p.slots + index * kSlot + at;
  const int parts = index < p.whole ? 1 : p.chunks;
  float4 sum = *reinterpret_cast<const float4*>(slot);
#pragma unroll 8
  for (int k = 1; k < parts; ++k) {
    const float4 v = *reinterpret_cast<const float4*>(slot + k * p.rest * kSlot);
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
  }
  O* target = dw + row * p.c_in + column;
  if (p.c_in % kSumVector == 0) {
    if constexpr (sizeof(O) == 4) {
      *reinterpret_cast<float4*>(target) = sum;
    } else {
      *reinterpret_cast<uint2*>(target) = make_uint2(pack2<O>(sum.x, sum.y), pack2<O>(sum.z, sum.w));
    }
    return;
  }
  const float v[kSumVector] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int e = 0; e < kSumVector; ++e)
    if (column + e < p.c_in) target[e] = from_float<O>(v[e]);
}

}  // namespace pointwise

namespace {

using pointwise::GradArgs;

// The number of parts of K that lets the last multiprocessor end soonest. It costs the waves that the parts fill, and
// about 1 / 20 of a step for each slot that is added up.
int chunks_of(int64_t rest, int64_t steps, int64_t processors) {
  int64_t best = 1, least = INT64_MAX;
  const int64_t most = std::min(steps, std::max<int64_t>(16, processors / std::max<int64_t>(rest, 1)));
  for (int64_t chunks = 1; chunks <= most; ++chunks) {
    const int64_t cost = 20 * ceil_div(rest * chunks, processors) * ceil_div(steps, chunks) + rest * chunks;
    if (cost < least) least = cost, best = chunks;
  }
  return static_cast<int>(best);
}

// items() is 0 if the kernel cannot run.
GradArgs plan_of(const Shape& s, int64_t c_out) {
  const int64_t plane = static_cast<int64_t>(s.h) * s.w, steps = s.n * (plane / pointwise::kHopperDepth);
  const int64_t out_tiles = ceil_div(c_out, pointwise::kHopperTile), in_tiles = ceil_div(s.c, pointwise::kHopperTile);
  GradArgs p{};
  // TMA's coordinates are 32-bit
  if (s.dtype == kFloat32 || s.channels_last || plane % pointwise::kHopperDepth != 0 ||
      std::max({plane, steps, c_out, s.c}) >= 0x7fffff00 || out_tiles * in_tiles > 0x7fffffff / pointwise::kSumBlocks ||
      !has_hopper_code(pointwise::wgmma_weight_grad_kernel<__half>))
    return p;
  const int64_t processors = multiprocessor_count(), tiles = out_tiles * in_tiles;
  p.c_out = c_out, p.c_in = s.c, p.out_tiles = out_tiles, p.in_tiles = in_tiles;
  p.whole = tiles / processors * processors, p.rest = tiles - p.whole;
  p.chunks = chunks_of(p.rest, steps, processors), p.steps = static_cast<int>(steps);
  p.plane = static_cast<int>(plane);
  return p;
}

template <class T>
cudaError_t launch_products(const GradArgs& p, const PointwiseWeightGrad& g, cudaStream_t stream) {
  const auto planes = [&](TensorMap& map, const void* data, int64_t channels) {
    return make_tensor_map(map, DtypeOf<T>::value == kBFloat16, data, {p.plane, channels, g.shape.n},
                           {2 * int64_t(p.plane), 2 * p.plane * channels}, pointwise::kHopperTile);
  };
  TensorMap da, x;
  cudaError_t error = planes(da, g.da, p.c_out);
  if (error == cudaSuccess) error = planes(x, g.x, p.c_in);
  constexpr auto kernel = pointwise::wgmma_weight_grad_kernel<T>;
  constexpr int kShared = pointwise::hopper_shared_bytes<pointwise::HopperStages<pointwise::kGradStages>>();
  if (error == cudaSuccess) error = set_dynamic_shared(kernel, kShared);
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::min<int64_t>(p.items(), multiprocessor_count());
  LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(pointwise::kHopperThreads), kShared, stream, p, da, x);
  return cudaGetLastError();
}

template <class O>
cudaError_t launch_sums(const GradArgs& p, void* dw, cudaStream_t stream) {
  LAUNCH(pointwise::sum_slots_kernel<O>, dim3(static_cast<unsigned>(p.out_tiles * p.in_tiles * pointwise::kSumBlocks)),
         dim3(pointwise::kSumThreads), 0, stream, p, static_cast<O*>(dw));
  return cudaGetLastError();
}

}  // namespace

int64_t pointwise_weight_grad_workspace(const Shape& shape, int64_t c_out) {
  return plan_of(shape, c_out).items() * pointwise::kSlot * static_cast<int64_t>(sizeof(float));
}

int pointwise_weight_grad(const PointwiseWeightGrad& g, void* stream) {
  GradArgs p = plan_of(g.shape, g.c_out);
  if (p.items() == 0) return cudaErrorNotSupported;
  p.slots = static_cast<float*>(g.workspace);
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error =
      g.shape.dtype == kFloat16 ? launch_products<__half>(p, g, on) : launch_products<__nv_bfloat16>(p, g, on);
  if (error != cudaSuccess) return error;
  if (g.dw_dtype == kFloat32) return launch_sums<float>(p, g.dw, on);
  return g.dw_dtype == kFloat16 ? launch_sums<__half>(p, g.dw, on) : launch_sums<__nv_bfloat16>(p, g.dw, on);
}

}  // namespace convmixer

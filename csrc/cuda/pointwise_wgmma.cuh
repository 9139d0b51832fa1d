// SPDX-License-Identifier: MIT
// The pointwise block for 16-bit tensors with sm_90a's wgmma and TMA. pointwise_tile.cuh has the formulas; epilogue,
// rows and columns are those of pointwise_mma.cuh's kernel. 494 us at 64x1536x32x32 in eval on an H100: 626 TFLOP/s.
// One persistent block runs on a multiprocessor. One thread copies: it keeps four stages of 128 x 64 values of each
// operand in flight. Two warp groups take the block's 128 x 128 tiles in turns, so that the epilogue of one overlaps
// the products of the other. A group's main loop waits for its turn: a stage's barrier tells phases apart by parity
// only, and without turns a group could take the other's stage for its own.
// A stage is K-contiguous, [row][64 values]. Only x of a contiguous tensor is two boxes of [64 values][64 pixels], each
// of one image (H * W % 64 == 0), which wgmma transposes.
// The weight gradient (pointwise_weight_grad.cu) is the same pipeline with other items.
// Bound: the tensor core, 64 cycles an m64n128k16; shared memory reads its 6 KB in 48. By the SASS a stage takes a warp
// 65 instructions, 8 of them HGMMA.64x128x16; 168 registers, after setmaxnreg 232 and 40, no spills, 217 KB.
#pragma once
#include "device_hopper.cuh"
#include "pointwise_epilogue.cuh"

namespace convmixer::pointwise {

constexpr int kHopperDepth = 64;  // values of K in a stage: 128 bytes, the swizzle's width
constexpr int kHopperTile = 128;
constexpr int kOperandBytes = kHopperTile * kHopperDepth * 2;
constexpr int kHopperGroups = 2;  // groups of 128 threads that multiply; one more copies
constexpr int kHopperThreads = 128 * (kHopperGroups + 1);

template <bool LAST>
using HopperWarps = Warps<2, 16, 4, 1, 64, LAST>;

// This struct must begin at a multiple of 1024 bytes.
template <int STAGES>
struct HopperStages {
  unsigned char a[STAGES][kOperandBytes], b[STAGES][kOperandBytes];
  Barrier full[STAGES], empty[STAGES], turn[kHopperGroups];
};

template <bool LAST>
struct HopperShared {
  HopperStages<4> stages;
  Epilogue<HopperWarps<LAST>> epilogue[kHopperGroups];
  static_assert(sizeof(stages) % 16 == 0 && sizeof(epilogue[0]) % 16 == 0, "results lie at multiples of 16 bytes");
};

// Swizzled operands need an alignment of 1024 bytes; the compiler aligns shared memory to less.
template <class SHARED>
constexpr int hopper_shared_bytes() {
  return static_cast<int>(sizeof(SHARED)) + 1024;
}

#if CONVMIXER_HOPPER
template <class SHARED>
__device__ __forceinline__ SHARED& hopper_shared(unsigned char* memory) {
  return *reinterpret_cast<SHARED*>(memory + (1024 - smem_u32(memory) % 1024) % 1024);
}

// Copies all stages of all items of the block, in order; one thread calls it.
template <class WORK, int STAGES>
__device__ __forceinline__ void copy_items(const WORK& work, const TensorMap& map_a, const TensorMap& map_b,
                                           HopperStages<STAGES>& shared) {
  uint32_t n = 0;
  for (int64_t i = blockIdx.x; i < work.items(); i += gridDim.x) {
    auto boxes = work.boxes(i);
    const int steps = work.steps(i);
    for (int step = 0; step < steps; ++step, ++n) {
      const uint32_t stage = n % STAGES;
      barrier_wait(&shared.empty[stage], n / STAGES - 1);
      barrier_arrive_expect(&shared.full[stage], 2 * kOperandBytes);
      boxes.copy(step, map_a, map_b, shared.a[stage], shared.b[stage], &shared.full[stage]);
    }
  }
}

// Multiplies one item of `steps` stages; the first is the block's stage number n. It is this group's item number
// `round`.
template <class T, bool TRANSPOSED_B, int STAGES, class ACC>
__device__ __forceinline__ void multiply_item(HopperStages<STAGES>& shared, ACC& acc, int group, uint32_t round,
                                              uint32_t n, int steps) {
  const bool signals = threadIdx.x % 32 == 0;
  // descriptors of the first stage; their addresses count 16 bytes
  const uint64_t rows = wgmma_operand(shared.a[0], 16, 1024);
  const uint64_t columns = wgmma_operand(shared.b[0], TRANSPOSED_B ? kOperandBytes / 2 : 16, 1024);
  acc.each([](float, int) { return 0.f; });
  // waits until all warps of the other group have seen all of their stages full; group 0's first turn does not wait
  barrier_wait(&shared.turn[group], group == 0 ? round - 1 : round);
#pragma unroll 1
  for (int step = 0; step < steps; ++step, ++n) {
    const uint32_t stage = n % STAGES;
    barrier_wait(&shared.full[stage], n / STAGES);
    __syncwarp();
    const uint64_t a = rows + stage * (kOperandBytes / 16), b = columns + stage * (kOperandBytes / 16);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kHopperDepth / 16; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        wgmma<TRANSPOSED_B>(acc.v[i], a + (i * 64 * 128 + k * 32) / 16, b + k * (TRANSPOSED_B ? 16 * 128 : 32) / 16,
                            T());
    wgmma_commit();
    // after this the products of the stage before have read it
    wgmma_wait<1>();
    if (signals && step > 0) barrier_arrive(&shared.empty[(n - 1) % STAGES]);
  }
  if (signals) barrier_arrive(&shared.turn[(group + 1) % kHopperGroups]);
  wgmma_wait<0>();
  if (signals) barrier_arrive(&shared.empty[(n - 1) % STAGES]);
#pragma unroll
  for (int i = 0; i < 2; ++i) wgmma_results(acc.v[i]);
}

// Runs all items of the block. `work` says how many there are, how many stages of K each has, and what to copy. The
// threads of the group that multiplied an item call finish(item, results, group).
template <class T, bool TRANSPOSED_B, class TILE, class WORK, int STAGES, class FINISH>
__device__ __forceinline__ void run_items(const WORK& work, const TensorMap& map_a, const TensorMap& map_b,
                                          HopperStages<STAGES>& shared, const FINISH& finish) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], 4);
    }
    for (int g = 0; g < kHopperGroups; ++g) barrier_init(&shared.turn[g], 4);
    barrier_init_fence();
  }
  __syncthreads();

  // the compiler overlaps products only if it knows that all threads of a warp group take the same path
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
  if (group == kHopperGroups) {
    fewer_registers<40>();
    if (threadIdx.x % 128 == 0) copy_items(work, map_a, map_b, shared);
    return;
  }
  more_registers<232>();
  TILE acc(threadIdx.x / 32 % 4);
  const auto steps_of = [&](int64_t i) { return i < work.items() ? work.steps(i) : 0; };
  // group 1 begins after group 0's first item
  uint32_t round = 0, n = group == 0 ? 0 : steps_of(blockIdx.x);
  static_assert(kHopperGroups == 2, "one item lies between two of a group");
  for (int64_t i = blockIdx.x + static_cast<int64_t>(group) * gridDim.x; i < work.items();
       i += int64_t(kHopperGroups) * gridDim.x, ++round) {
    const int steps = work.steps(i);
    multiply_item<T, TRANSPOSED_B>(shared, acc, group, round, n, steps);
    n += steps + steps_of(i + gridDim.x);
    finish(i, acc, group);
  }
}

// The items of the forward are tiles.
template <bool LAST>
struct TileWork {
  const Args& p;

  struct Boxes {
    int64_t plane, images[2];
    int row;
    int64_t column;

    __device__ __forceinline__ void copy(int step, const TensorMap& map_a, const TensorMap& map_b, unsigned char* a,
                                         unsigned char* b, Barrier* full) const {
      const int k = step * kHopperDepth;
      tma_load(a, map_a, full, k, row, 0);
      if constexpr (LAST) {
        tma_load(b, map_b, full, k, static_cast<int>(column), 0);
      } else {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int position = static_cast<int>(column + 64 * h - images[h] * plane);
          tma_load(b + h * kOperandBytes / 2, map_b, full, position, k, static_cast<int>(images[h]));
        }
      }
    }
  };

  __device__ __forceinline__ int64_t items() const { return p.pixel_tiles * p.channel_tiles; }
  __device__ __forceinline__ int steps(int64_t) const { return (p.c_in + kHopperDepth - 1) / kHopperDepth; }
  __device__ __forceinline__ Boxes boxes(int64_t i) const {
    const Tile tile = locate_tile(p, i);
    const int row = static_cast<int>((LAST ? tile.pixel : tile.channel) * kHopperTile);
    const int64_t column = (LAST ? tile.channel : tile.pixel) * kHopperTile;
    return {p.plane, {column / p.plane, (column + 64) / p.plane}, row, column};
  }
};
#endif

template <class T, bool LAST>
__global__ void __launch_bounds__(kHopperThreads, 1)
    wgmma_kernel(const __grid_constant__ Args p, const __grid_constant__ TensorMap map_a,
                 const __grid_constant__ TensorMap map_b) {
#if CONVMIXER_HOPPER
  DYN_SHARED(unsigned char, memory);
  auto& shared = hopper_shared<HopperShared<LAST>>(memory);
  using Results = WarpTile<HopperWarps<LAST>>;
  const auto finish = [&](int64_t i, Results& acc, int group) {
    const auto sync = [group] { named_barrier(1 + group, 128); };
    finish_tile<T>(p, locate_tile(p, i), acc, shared.epilogue[group], threadIdx.x % 128, sync);
  };
  run_items<T, !LAST, Results>(TileWork<LAST>{p}, map_a, map_b, shared.stages, finish);
#elif defined(__CUDA_ARCH__)
  __trap();
#endif
}

}  // namespace convmixer::pointwise

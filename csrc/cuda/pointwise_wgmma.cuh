// SPDX-License-Identifier: MIT
// The pointwise block for 16-bit tensors with sm_90a's wgmma and TMA; formulas in pointwise_tile.cuh, epilogue, rows
// and columns as in pointwise_mma.cuh's kernel. Off unless asked for (backends/pointwise_gemm.py): its arithmetic is
// emulated, the instructions have never run.
// A persistent block a multiprocessor: one thread keeps four stages of 128 x 64 values of either operand on their way;
// two warp groups take the block's 128 x 128 tiles in turns, so that the epilogue of one runs beside the other's
// products. A group's main loop waits for its turn: a stage's barrier tells phases apart by parity alone, and without
// turns a group could take the other's stage for its own. A stage is K-contiguous, [row][64 values], but for x of a
// contiguous tensor: two boxes of [64 values][64 pixels], each of one image (H * W % 64 == 0), which wgmma transposes.
// Bound: the tensor core, 64 cycles an m64n128k16, for which shared memory gives 6 KB in 48. By the SASS a stage is 65
// instructions of a warp, 8 of them HGMMA.64x128x16; 168 registers, after setmaxnreg 232 and 40, no spills, 217 KB.
#pragma once
#include "device_hopper.cuh"
#include "pointwise_epilogue.cuh"

namespace convmixer::pointwise {

constexpr int kHopperStages = 4;
constexpr int kHopperDepth = 64;  // values of K in a stage: 128 bytes, the swizzle's width
constexpr int kHopperTile = 128;
constexpr int kOperandBytes = kHopperTile * kHopperDepth * 2;
constexpr int kHopperGroups = 2;  // of 128 threads that multiply; one more copies
constexpr int kHopperThreads = 128 * (kHopperGroups + 1);

template <bool LAST>
using HopperWarps = Warps<2, 16, 4, 1, 64, LAST>;

template <bool LAST>
struct HopperShared {
  unsigned char a[kHopperStages][kOperandBytes], b[kHopperStages][kOperandBytes];
  Epilogue<HopperWarps<LAST>> epilogue[kHopperGroups];
  Barrier full[kHopperStages], empty[kHopperStages], turn[kHopperGroups];
};

// The compiler aligns shared memory to less than the 1024 bytes that swizzled operands need.
template <bool LAST>
constexpr int hopper_shared_bytes() {
  return static_cast<int>(sizeof(HopperShared<LAST>)) + 1024;
}

#if CONVMIXER_HOPPER
// One thread: all stages of all tiles of the block, in order.
template <bool LAST>
__device__ __forceinline__ void copy_tiles(const Args& p, const TensorMap& map_a, const TensorMap& map_b,
                                           HopperShared<LAST>& shared, int steps) {
  uint32_t n = 0;
  for (int64_t i = blockIdx.x; i < p.pixel_tiles * p.channel_tiles; i += gridDim.x) {
    const Tile tile = locate_tile(p, i);
    const int row = static_cast<int>((LAST ? tile.pixel : tile.channel) * kHopperTile);
    const int64_t column = (LAST ? tile.channel : tile.pixel) * kHopperTile;
    const int64_t images[2] = {column / p.plane, (column + 64) / p.plane};
    for (int step = 0; step < steps; ++step, ++n) {
      const uint32_t stage = n % kHopperStages;
      const int k = step * kHopperDepth;
      barrier_wait(&shared.empty[stage], n / kHopperStages - 1);
      barrier_arrive_expect(&shared.full[stage], 2 * kOperandBytes);
      tma_load(shared.a[stage], map_a, &shared.full[stage], k, row, 0);
      if constexpr (LAST) {
        tma_load(shared.b[stage], map_b, &shared.full[stage], k, static_cast<int>(column), 0);
      } else {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int position = static_cast<int>(column + 64 * h - images[h] * p.plane);
          tma_load(shared.b[stage] + h * kOperandBytes / 2, map_b, &shared.full[stage], position, k,
                   static_cast<int>(images[h]));
        }
      }
    }
  }
}

// The products of one tile, number `tile` of the block, in the order of tiles.
template <class T, bool LAST>
__device__ __forceinline__ void multiply_tile(HopperShared<LAST>& shared, WarpTile<HopperWarps<LAST>>& acc,
                                              uint32_t tile, int steps) {
  const bool signals = threadIdx.x % 32 == 0;
  uint32_t n = tile * steps;  // its first stage, of all of the block's
  // descriptions of the first stage; an address counts in 16 bytes
  const uint64_t rows = wgmma_operand(shared.a[0], 16, 1024);
  const uint64_t columns = wgmma_operand(shared.b[0], LAST ? 16 : kOperandBytes / 2, 1024);
  acc.each([](float, int) { return 0.f; });
  // the group before has seen all of its stages full; group 0's first turn needs nobody's leave
  const uint32_t group = tile % kHopperGroups, round = tile / kHopperGroups;
  barrier_wait(&shared.turn[group], group == 0 ? round - 1 : round);
#pragma unroll 1
  for (int step = 0; step < steps; ++step, ++n) {
    const uint32_t stage = n % kHopperStages;
    barrier_wait(&shared.full[stage], n / kHopperStages);
    __syncwarp();
    const uint64_t a = rows + stage * (kOperandBytes / 16), b = columns + stage * (kOperandBytes / 16);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kHopperDepth / 16; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        wgmma<!LAST>(acc.v[i], a + (i * 64 * 128 + k * 32) / 16, b + k * (LAST ? 32 : 16 * 128) / 16, T());
    wgmma_commit();
    // the stage before has been read
    wgmma_wait<1>();
    if (signals && step > 0) barrier_arrive(&shared.empty[(n - 1) % kHopperStages]);
  }
  if (threadIdx.x % 128 == 0) barrier_arrive(&shared.turn[(group + 1) % kHopperGroups]);
  wgmma_wait<0>();
  if (signals) barrier_arrive(&shared.empty[(n - 1) % kHopperStages]);
#pragma unroll
  for (int i = 0; i < 2; ++i) wgmma_results(acc.v[i]);
}
#endif

template <class T, bool LAST>
__global__ void __launch_bounds__(kHopperThreads, 1)
    wgmma_kernel(const __grid_constant__ Args p, const __grid_constant__ TensorMap map_a,
                 const __grid_constant__ TensorMap map_b) {
#if CONVMIXER_HOPPER
  DYN_SHARED(unsigned char, memory);
  using Shared = HopperShared<LAST>;
  Shared& shared = *reinterpret_cast<Shared*>(memory + (1024 - smem_u32(memory) % 1024) % 1024);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kHopperStages; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], 4);
    }
    for (int g = 0; g < kHopperGroups; ++g) barrier_init(&shared.turn[g], 1);
    barrier_init_fence();
  }
  __syncthreads();

  const int steps = (p.c_in + kHopperDepth - 1) / kHopperDepth;
  // the compiler overlaps products only where it knows that all threads of a warp group take the same path
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
  if (group == kHopperGroups) {
    fewer_registers<40>();
    if (threadIdx.x % 128 == 0) copy_tiles<LAST>(p, map_a, map_b, shared, steps);
    return;
  }
  more_registers<232>();
  WarpTile<HopperWarps<LAST>> acc(threadIdx.x / 32 % 4);
  uint32_t turn = group;
  for (int64_t i = blockIdx.x + static_cast<int64_t>(group) * gridDim.x; i < p.pixel_tiles * p.channel_tiles;
       i += int64_t(kHopperGroups) * gridDim.x, turn += kHopperGroups) {
    multiply_tile<T, LAST>(shared, acc, turn, steps);
    const auto sync = [group] { named_barrier(1 + group, 128); };
    finish_tile<T>(p, locate_tile(p, i), acc, shared.epilogue[group], threadIdx.x % 128, sync);
  }
#elif defined(__CUDA_ARCH__)
  __trap();
#endif
}

}  // namespace convmixer::pointwise

// SPDX-License-Identifier: MIT
// The pointwise block for 16-bit tensors on tensor cores (mma.sync m16n8k16, float32 accumulation); pointwise_tile.cuh
// has the formulas.
//   contiguous     rows are the weight's channels, columns pixels; x is [K][columns], and ldmatrix transposes it
//   channels_last  rows are pixels, columns channels; both operands are [.][K]
// A block of 2 x 2 warps owns a tile of 32 MT x 16 NT results, a warp 16 MT x 8 NT of them in registers. cp.async fills
// three stages of 32 values of K.
// Bound: the tensor core. By the SASS for sm_80 and sm_90a a warp of 128 x 128 tiles issues 142 to 149 instructions for
// 32 values of K, of them 64 HMMA, 16 LDSM.x4 and 8 LDGSTS.128. Meanwhile shared memory moves 48 KB a block: 384 cycles
// beside 512 of HMMA on sm_80. With 253 to 255 registers and no spills a multiprocessor runs two blocks: the epilogue
// of one overlaps the products of the other.
#pragma once
#include "pointwise_epilogue.cuh"

namespace convmixer::pointwise {

constexpr int kMmaThreads = 128;
constexpr int kStages = 3;
constexpr int kDepth = 32;  // values of K in a stage

// Copies to a stage write 16-byte pieces, swizzled so that the eight rows of an ldmatrix use all banks.

// Eight 16-bit values, of which the first `count` exist. They are consecutive in memory up to the end of a plane;
// `jump` leads to the next plane.
template <class T>
__device__ __forceinline__ uint4 gather(const T* at, int count, int64_t position, int64_t plane, int64_t jump) {
  T v[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    v[e] = e < count ? *at : from_float<T>(0.f);
    ++at;
    if (++position == plane) position = 0, at += jump;
  }
  uint4 r;
  memcpy(&r, v, sizeof r);
  return r;
}

// Copies (rows, K) with K contiguous: 64 bytes a row, piece (row, c) at c ^ (row / 2 % 4). A thread owns one piece of
// every 32nd row. Each call copies the next kDepth values of K; values beyond the matrix become zero without an access.
template <class T, int ROWS, bool ALIGNED>
struct RowsCopy {
  static constexpr int kBytes = ROWS * 2 * kDepth;
  const T* source;
  int64_t step;
  int passes, left, offset;

  __device__ __forceinline__ RowsCopy(const void* matrix, int64_t rows, int64_t row, int c_in) {
    const int mine = threadIdx.x / 4, piece = threadIdx.x % 4;
    source = static_cast<const T*>(matrix) + (row + mine) * c_in + 8 * piece;
    step = int64_t(32) * c_in;
    passes = clamp_count((rows - row - mine + 31) / 32, ROWS / 32);
    left = c_in - 8 * piece;
    offset = mine * 64 + (piece ^ (mine / 2 % 4)) * 16;
  }

  __device__ __forceinline__ void operator()(unsigned char* stage) {
    const T* row = source;
#pragma unroll
    for (int i = 0; i < ROWS / 32; ++i, row += step) {
      unsigned char* target = stage + offset + i * 32 * 64;
      if constexpr (ALIGNED) {
        cp_async<16>(target, row, i < passes && left > 0 ? 16 : 0);
      } else {
        store16(target, gather(row, i < passes ? left : 0, 0, -1, 0));
      }
    }
    source += kDepth;
    left -= kDepth;
  }
};

// Copies (K, columns) with columns contiguous: 2 COLUMNS bytes a row, piece (row, c) at c ^ (row % 8). A thread owns
// one column of pieces. Calls as above.
template <class T, int COLUMNS, bool ALIGNED>
struct PlanesCopy {
  static constexpr int kBytes = COLUMNS * 2 * kDepth;
  static constexpr int kPieces = COLUMNS / 8, kStep = kMmaThreads / kPieces;
  const T* source;
  int64_t step, plane, position, jump;
  int count, left, offset;

  __device__ __forceinline__ PlanesCopy(const Args& p, int64_t column) {
    const int piece = threadIdx.x % kPieces, k = threadIdx.x / kPieces;
    plane = p.plane;
    step = kStep * plane;
    const Pixel pixel = locate_pixel(column + 8 * piece, p.c_in, plane);
    source = static_cast<const T*>(p.x) + pixel.offset + k * plane;
    position = pixel.position;
    jump = (p.c_in - 1) * plane;
    count = clamp_count(p.pixels - column - 8 * piece, 8);
    left = count > 0 ? p.c_in - k : 0;
    offset = k * 2 * COLUMNS + (piece ^ (k % 8)) * 16;
  }

  __device__ __forceinline__ void operator()(unsigned char* stage) {
#pragma unroll
    for (int i = 0; i < kDepth / kStep; ++i, source += step) {
      unsigned char* target = stage + offset + i * kStep * 2 * COLUMNS;
      if constexpr (ALIGNED) {
        cp_async<16>(target, source, left > i * kStep ? 16 : 0);
      } else {
        store16(target, gather(source, left > i * kStep ? count : 0, position, plane, jump));
      }
    }
    left -= kDepth;
  }
};

// The fragments of half number `half` of a stage, 16 values of K.
template <int MT, int NT, bool LAST>
__device__ __forceinline__ void load_fragments(const unsigned char* a_stage, const unsigned char* b_stage, int half,
                                               int row, int column, uint32_t (&a)[MT][4], uint32_t (&b)[NT][2]) {
  const int lane = threadIdx.x % 32;
  {
    const int r = row + lane % 16, piece = 2 * half + lane / 16;
    const unsigned char* at = a_stage + r * 64 + (piece ^ (r / 2 % 4)) * 16;
#pragma unroll
    for (int i = 0; i < MT; ++i) ldmatrix_x4(a[i], at + i * 16 * 64);
  }
#pragma unroll
  for (int j = 0; j < NT; j += 2) {
    uint32_t both[4];
    if constexpr (LAST) {
      const int r = column + lane % 8 + lane / 16 * 8, piece = 2 * half + lane / 8 % 2;
      ldmatrix_x4(both, b_stage + (r + 8 * j) * 64 + (piece ^ (r / 2 % 4)) * 16);
    } else {
      const int k = 16 * half + lane % 16, piece = column / 8 + j + lane / 16;
      ldmatrix_x4_trans(both, b_stage + k * 32 * NT + (piece ^ (k % 8)) * 16);
    }
    b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
  }
}

template <int MT, int NT, bool LAST>
using MmaWarps = Warps<MT, NT, 2, 2, 16, LAST>;

template <int MT, int NT>
constexpr int mma_shared_bytes() {
  const size_t stages = kStages * 2 * kDepth * (32 * MT + 16 * NT);
  return static_cast<int>(
      std::max({stages, sizeof(Epilogue<MmaWarps<MT, NT, true>>), sizeof(Epilogue<MmaWarps<MT, NT, false>>)}));
}

// Blocks on a multiprocessor for which registers are limited; unaligned copies need more of them.
template <int MT, int NT, bool ALIGNED>
constexpr int kMmaBlocks = MT * NT > 16 ? 2
                           : ALIGNED    ? 4
                                        : 3;

template <class T, int MT, int NT, bool LAST, bool ALIGNED>
__global__ void __launch_bounds__(kMmaThreads, (kMmaBlocks<MT, NT, ALIGNED>)) mma_kernel(Args p) {
  using W = MmaWarps<MT, NT, LAST>;
  constexpr int kRows = W::kRows, kColumns = W::kColumns;
  using A = RowsCopy<T, kRows, ALIGNED>;
  using B = std::conditional_t<LAST, RowsCopy<T, kColumns, ALIGNED>, PlanesCopy<T, kColumns, ALIGNED>>;
  constexpr int kStageBytes = A::kBytes + B::kBytes;
  static_assert(kStages * kStageBytes <= mma_shared_bytes<MT, NT>(), "stages and epilogue share the memory");
  DYN_SHARED(unsigned char, shared);

  const Tile tile = locate_tile(p, blockIdx.x);
  const int64_t row = (LAST ? tile.pixel : tile.channel) * kRows;
  const int64_t column = (LAST ? tile.channel : tile.pixel) * kColumns;
  WarpTile<W> acc(threadIdx.x / 32);
  acc.each([](float, int) { return 0.f; });

  A copy_a(LAST ? p.x : p.weight, LAST ? p.pixels : p.c_out, row, p.c_in);
  B copy_b = [&] {
    if constexpr (LAST) {
      return B(p.weight, p.c_out, column, p.c_in);
    } else {
      return B(p, column);
    }
  }();
  const int steps = (p.c_in + kDepth - 1) / kDepth;
  // past the last step this writes zeros
  const auto copy = [&](int stage) {
    unsigned char* at = shared + stage * kStageBytes;
    copy_a(at);
    copy_b(at + A::kBytes);
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy(s);

  // the fragments of one half of a stage are loaded while the other's products run
  uint32_t a[2][MT][4], b[2][NT][2];
  int current = 0, free = kStages - 1;
  cp_async_wait<kStages - 2>();
  __syncthreads();
  load_fragments<MT, NT, LAST>(shared, shared + A::kBytes, 0, acc.row, acc.column, a[0], b[0]);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 0) {
        // all warps have read this stage: they did before the last barrier
        copy(free);
      } else {
        free = current;
        current = current + 1 == kStages ? 0 : current + 1;
        cp_async_wait<kStages - 2>();
        __syncthreads();
      }
      const unsigned char* stage = shared + current * kStageBytes;
      load_fragments<MT, NT, LAST>(stage, stage + A::kBytes, half ^ 1, acc.row, acc.column, a[half ^ 1], b[half ^ 1]);
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j) mma16816(acc.v[i][j], a[half][i], b[half][j], T());
    }
  }

  // the epilogue reuses the stages' memory; copies and loads past the last step may still be under way
  cp_async_wait<0>();
  const auto sync = [] { __syncthreads(); };
  finish_tile<T>(p, tile, acc, *reinterpret_cast<Epilogue<W>*>(shared), threadIdx.x, sync);
}

}  // namespace convmixer::pointwise

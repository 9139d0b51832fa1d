// SPDX-License-Identifier: MIT
// The pointwise block for float32 tensors on FMA units; pointwise_tile.cuh has the formulas. In both layouts rows are
// the weight's channels and columns are pixels. A block of 16 x 16 threads owns a tile of 128 x 128 results, a thread
// 8 x 8 of them in registers: rows 4 ty + {0..3} and 64 + that, columns likewise. Shared memory has four stages of 8
// values of K, as [K][row] and [K][column]: asynchronous copies of single values transpose on the way, at any size and
// alignment.
// Bound: FMA. By the SASS for sm_80 and sm_90a, 8 values of K take 603 to 605 instructions, of them 512 FFMA, 32
// LDS.128 and 8 LDGSTS.32: at most 85 % of the peak. 128 registers, two blocks a multiprocessor, no spills.
#pragma once
#include "pointwise_tile.cuh"

namespace convmixer::pointwise {

constexpr int kFmaThreads = 256;
constexpr int kFmaTile = 128;
constexpr int kFmaStages = 4;
constexpr int kFmaDepth = 8;
constexpr int kFmaPitch = kFmaTile + 4;  // floats: the copies of 8 values of K and 4 rows use 32 banks
constexpr int kFmaStage = 2 * kFmaDepth * kFmaPitch;

// Copies (rows, K) with K contiguous: a thread copies one value of K of every 32nd row. Each call copies the next
// kFmaDepth values of K; values beyond the matrix become zero without an access.
struct FmaRowsCopy {
  const float* source;
  int64_t step;
  int passes, left, offset;

  __device__ __forceinline__ FmaRowsCopy(const void* matrix, int64_t rows, int64_t row, int c_in) {
    const int mine = threadIdx.x / kFmaDepth, k = threadIdx.x % kFmaDepth;
    source = static_cast<const float*>(matrix) + (row + mine) * c_in + k;
    step = int64_t(32) * c_in;
    const int64_t rows_left = rows - row - mine;
    passes = rows_left <= 0 ? 0 : rows_left > 96 ? 4 : static_cast<int>((rows_left + 31) / 32);
    left = c_in - k;
    offset = k * kFmaPitch + mine;
  }
  __device__ __forceinline__ void operator()(float* stage) {
    const float* row = source;
#pragma unroll
    for (int i = 0; i < 4; ++i, row += step) cp_async<4>(stage + offset + i * 32, row, i < passes && left > 0 ? 4 : 0);
    source += kFmaDepth;
    left -= kFmaDepth;
  }
};

// Copies (K, pixels) of a contiguous tensor: a thread copies one pixel of every other value of K.
struct FmaPlanesCopy {
  const float* source;
  int64_t step;
  int left, offset;

  __device__ __forceinline__ FmaPlanesCopy(const Args& p, int64_t column) {
    const int mine = threadIdx.x % kFmaTile, k = threadIdx.x / kFmaTile;
    source = static_cast<const float*>(p.x) + locate_pixel(column + mine, p.c_in, p.plane).offset + k * p.plane;
    step = 2 * p.plane;
    left = column + mine < p.pixels ? p.c_in - k : 0;
    offset = k * kFmaPitch + mine;
  }
  __device__ __forceinline__ void operator()(float* stage) {
#pragma unroll
    for (int i = 0; i < kFmaDepth / 2; ++i, source += step)
      cp_async<4>(stage + offset + 2 * i * kFmaPitch, source, left > 2 * i ? 4 : 0);
    left -= kFmaDepth;
  }
};

__device__ __forceinline__ void load4(float* v, const float* p) {
  const float4 u = *reinterpret_cast<const float4*>(p);
  v[0] = u.x, v[1] = u.y, v[2] = u.z, v[3] = u.w;
}

template <bool LAST>
__global__ void __launch_bounds__(kFmaThreads, 2) fma_kernel(Args p) {
  using B = std::conditional_t<LAST, FmaRowsCopy, FmaPlanesCopy>;
  DYN_SHARED(float, shared);
  const Tile tile = locate_tile(p, blockIdx.x);
  const int64_t row = tile.channel * kFmaTile, column = tile.pixel * kFmaTile;
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;

  FmaRowsCopy copy_a(p.weight, p.c_out, row, p.c_in);
  B copy_b = [&] {
    if constexpr (LAST) {
      return B(p.x, p.pixels, column, p.c_in);
    } else {
      return B(p, column);
    }
  }();
  const int steps = (p.c_in + kFmaDepth - 1) / kFmaDepth;
  // past the last step this writes zeros
  const auto copy = [&](int stage) {
    float* at = shared + stage * kFmaStage;
    copy_a(at);
    copy_b(at + kFmaDepth * kFmaPitch);
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < kFmaStages - 1; ++s) copy(s);

  float acc[8][8] = {};
  int current = 0, free = kFmaStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kFmaStages - 2>();
    __syncthreads();
    copy(free);
    const float* a = shared + current * kFmaStage + 4 * ty;
    const float* b = shared + current * kFmaStage + kFmaDepth * kFmaPitch + 4 * tx;
#pragma unroll
    for (int k = 0; k < kFmaDepth; ++k) {
      float u[8], v[8];
      load4(u, a + k * kFmaPitch), load4(u + 4, a + k * kFmaPitch + 64);
      load4(v, b + k * kFmaPitch), load4(v + 4, b + k * kFmaPitch + 64);
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[i][j] = fmaf(u[i], v[j], acc[i][j]);
    }
    free = current;
    current = current + 1 == kFmaStages ? 0 : current + 1;
  }

  // a thread's rows and columns in the tile
  const auto row_of = [&](int i) { return i / 4 * 64 + 4 * ty + i % 4; };
  const auto column_of = [&](int j) { return j / 4 * 64 + 4 * tx + j % 4; };
  const bool train = p.partials != nullptr;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float bias = row + row_of(i) < p.c_out ? load_param(p.bias, row + row_of(i)) : 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) acc[i][j] += bias;
  }
  // first adds the bias; eval: activation and norm, then stores; train: stores, then activation and statistics
  const auto activate = [&] {
    dispatch_activation(p.activation, [&](auto code) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[i][j] = activation<decltype(code)::value>(acc[i][j]);
    });
  };
  if (!train) {
    activate();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const elementwise::Affine k = load_channel(p, row + row_of(i)).norm;
#pragma unroll
      for (int j = 0; j < 8; ++j) acc[i][j] = fmaf(acc[i][j] - k.mean, k.scale, k.shift);
    }
  }
  float* y = static_cast<float*>(p.y);
  const int64_t row_stride = LAST ? 1 : p.plane;
#pragma unroll
  for (int j = 0; j < 8; j += LAST ? 1 : 4) {
    const int64_t pixel = column + column_of(j);
    if (pixel >= p.pixels) continue;
    if (p.vectors_out) {
      // four pixels of a channel, or four channels of a pixel
      float* at = y + (LAST ? pixel * p.c_out : locate_pixel(pixel, p.c_out, p.plane).offset);
#pragma unroll
      for (int i = 0; i < 8; i += LAST ? 4 : 1) {
        const int64_t c = row + row_of(i);
        if (c >= p.c_out) continue;
        const float4 v = LAST ? make_float4(acc[i][j], acc[(i + 1) % 8][j], acc[(i + 2) % 8][j], acc[(i + 3) % 8][j])
                              : make_float4(acc[i][j], acc[i][(j + 1) % 8], acc[i][(j + 2) % 8], acc[i][(j + 3) % 8]);
        *reinterpret_cast<float4*>(at + c * row_stride) = v;
      }
    } else {
#pragma unroll
      for (int e = 0; e < (LAST ? 1 : 4); ++e) {
        if (pixel + e >= p.pixels) continue;
        float* at = y + (LAST ? pixel * p.c_out : locate_pixel(pixel + e, p.c_out, p.plane).offset);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (row + row_of(i) < p.c_out) at[(row + row_of(i)) * row_stride] = acc[i][(j + e) % 8];
      }
    }
  }
  if (!train) return;

  activate();
  float count = 0.f, mean[8], m2[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) count += column + column_of(j) < p.pixels ? 1.f : 0.f;
  const float inverse = count > 0.f ? 1.f / count : 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += column + column_of(j) < p.pixels ? acc[i][j] : 0.f;
    mean[i] = sum * inverse, m2[i] = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float d = column + column_of(j) < p.pixels ? acc[i][j] - mean[i] : 0.f;
      m2[i] = fmaf(d, d, m2[i]);
    }
  }
  // together the 16 lanes of a row of threads hold all pixels of their channels
  const int mine = merge_lanes<8, 1, 16>(mean, m2, count);
  if (tx < 8 && row + row_of(mine) < p.c_out) store_partial(p, row + row_of(mine), tile.pixel, {count, mean[0], m2[0]});
}

}  // namespace convmixer::pointwise

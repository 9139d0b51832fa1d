// SPDX-License-Identifier: MIT
// The epilogue of the pointwise block's tensor-core GEMMs: it turns accumulators into y, or into a and statistics;
// pointwise_tile.cuh has the formulas. Accumulators have the layout of mma.sync's and wgmma's results: a warp holds m16
// tiles x n8 tiles, a thread 4 values of each. contiguous: rows are channels, columns pixels. channels_last: rows are
// pixels, columns channels. An output takes 14 instructions in eval (GELU 10 of them), about 20 in training, by the
// SASS for sm_80 and sm_90a.
#pragma once
#include "pointwise_tile.cuh"

namespace convmixer::pointwise {

__device__ __forceinline__ int clamp_count(int64_t n, int most) {
  return n <= 0 ? 0 : n < most ? static_cast<int>(n) : most;
}

// How WM x WN warps share a tile: each owns M m16 tiles, STEP rows apart, by N n8 tiles.
template <int M, int N, int WM, int WN, int STEP, bool CHANNELS_LAST>
struct Warps {
  static constexpr int MT = M, NT = N, kStep = STEP;
  static constexpr bool LAST = CHANNELS_LAST;
  static constexpr int kThreads = 32 * WM * WN, kRows = 16 * MT * WM, kColumns = 8 * NT * WN;
  static constexpr int kChannels = LAST ? kColumns : kRows, kPixels = LAST ? kRows : kColumns;
  static constexpr int kParts = LAST ? WM : WN;  // warps that share a channel
  static constexpr int kPitch = 16 * NT + 16;    // bytes of a staged row: rows of a fragment fall on different banks
  static_assert(kChannels <= kThreads, "a thread for each channel");
  static __device__ __forceinline__ int row(int warp) { return warp / WN * (STEP == 16 ? 16 * MT : 16); }
  static __device__ __forceinline__ int column(int warp) { return warp % WN * 8 * NT; }
  static __device__ __forceinline__ int part(int warp) { return LAST ? warp / WN : warp % WN; }
};

// A tile's constants and sums for each of its channels, and each warp's results before they are stored.
template <class W>
struct Epilogue {
  unsigned char results[W::kThreads / 32][16 * W::MT * W::kPitch];
  float bias[W::kChannels], scale[W::kChannels], shift[W::kChannels];
  Moments moments[W::kParts][W::kChannels];
};

template <class W>
struct WarpTile {
  static constexpr int MT = W::MT, NT = W::NT;
  static constexpr bool LAST = W::LAST;
  float v[MT][NT][4];     // v[i][j][e]: row + kStep i + g + 8 (e / 2), column + 8 j + 2 t + e % 2 of the tile
  int row, column, g, t;  // g = lane / 4, t = lane % 4

  __device__ __forceinline__ explicit WarpTile(int warp)
      : row(W::row(warp)), column(W::column(warp)), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}

  __device__ __forceinline__ int channel(int i, int j, int e) const {
    return LAST ? column + 8 * j + 2 * t + e % 2 : row + W::kStep * i + g + 8 * (e / 2);
  }
  template <class F>
  __device__ __forceinline__ void each(F&& f) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) v[i][j][e] = f(v[i][j][e], channel(i, j, e));
  }
  template <class T>
  __device__ __forceinline__ void activate(int activation) {
    dispatch_activation(activation, [&](auto code) {
      each([](float a, int) { return elementwise::activate<decltype(code)::value, T>(a); });
    });
  }
  // Writes results, rounded, to the warp's own staging. KEEP: also writes the rounded values to v.
  template <class T, bool KEEP>
  __device__ __forceinline__ void stage(unsigned char* results) {
    unsigned char* at = results + g * W::kPitch + 4 * t;
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const uint32_t pair = pack2<T>(v[i][j][e], v[i][j][e + 1]);
          *reinterpret_cast<uint32_t*>(at + (16 * i + 4 * e) * W::kPitch + 16 * j) = pair;
          if constexpr (KEEP) {
            const float2 rounded = unpack2<T>(pair);
            v[i][j][e] = rounded.x, v[i][j][e + 1] = rounded.y;
          }
        }
    __syncwarp();
  }

  // Moments of the warp's channels over its pixels. FULL: all pixels exist, else the first `pixels` of the tile.
  template <bool FULL>
  __device__ __forceinline__ void statistics(Moments (&moments)[W::kChannels], int pixels) const {
    constexpr int R = LAST ? 2 * NT : 2 * MT, kValues = LAST ? 2 * MT : 2 * NT;  // channels, values a channel
    constexpr int kFirst = LAST ? 4 : 1, kEnd = LAST ? 32 : 4;
    const auto value = [&](int r, int k) {
      return LAST ? v[k / 2][r / 2][r % 2 + 2 * (k % 2)] : v[r / 2][k / 2][k % 2 + 2 * (r % 2)];
    };
    const auto exists = [&](int k) {
      return FULL || (LAST ? row + k / 2 * W::kStep + g + 8 * (k % 2) : column + k / 2 * 8 + 2 * t + k % 2) < pixels;
    };
    float count = kValues, mean[R], m2[R];
    if constexpr (!FULL) {
      count = 0.f;
#pragma unroll
      for (int k = 0; k < kValues; ++k) count += exists(k) ? 1.f : 0.f;
    }
    const float inverse = FULL ? 1.f / kValues : count > 0.f ? 1.f / count : 0.f;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float sum = 0.f;
#pragma unroll
      for (int k = 0; k < kValues; ++k) sum += exists(k) ? value(r, k) : 0.f;
      mean[r] = sum * inverse;
      m2[r] = 0.f;
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        const float d = exists(k) ? value(r, k) - mean[r] : 0.f;
        m2[r] = fmaf(d, d, m2[r]);
      }
    }
    const int first = merge_lanes<R, kFirst, kEnd>(mean, m2, count);
    constexpr int kLeft = R * kFirst / kEnd;
#pragma unroll
    for (int r = 0; r < kLeft; ++r) {
      const int k = first + r;
      const int c = LAST ? column + 8 * (k / 2) + 2 * t + k % 2 : row + W::kStep * (k / 2) + g + 8 * (k % 2);
      moments[c] = {count, mean[r], m2[r]};
    }
  }
};

// Stores a warp's staged results in y: 16 bytes a lane, or element by element, two columns a lane.
template <class T, class W>
__device__ __forceinline__ void store_results(const Args& p, const unsigned char* results, int64_t row,
                                              int64_t column) {
  constexpr int NT = W::NT, kRows = 16 * W::MT;
  const int lane = threadIdx.x % 32;
  const int64_t rows = W::LAST ? p.pixels : p.c_out, columns = W::LAST ? p.c_out : p.pixels;
  const int64_t stride = W::LAST ? p.c_out : p.plane;
  const auto at = [&](int64_t n) { return W::LAST ? n : locate_pixel(n, p.c_out, p.plane).offset; };
  // from the staged row to the row of the tile
  const auto below = [](int r) { return W::kStep == 16 ? r : r / 16 * W::kStep + r % 16; };
  T* y = static_cast<T*>(p.y) + row * stride;
  const int count = clamp_count(rows - row, W::kStep * W::MT);
  if (p.vectors_out) {
    const int64_t n = column + lane % NT * 8;
    if (n >= columns) return;
    T* target = y + at(n);
#pragma unroll 4
    for (int r = lane / NT; r < kRows && below(r) < count; r += 32 / NT)
      store16(target + below(r) * stride, load16(results + r * W::kPitch + lane % NT * 16));
    return;
  }
  for (int j = lane; j < 8 * NT && column + j < columns; j += 32) {
    T* target = y + at(column + j);
    for (int r = 0; r < kRows && below(r) < count; ++r)
      target[below(r) * stride] = reinterpret_cast<const T*>(results + r * W::kPitch)[j];
  }
}

// Ends a tile. The kThreads threads of its warps call it: `thread` is the caller's number among them, `sync` their
// barrier. It begins with a barrier; after that nothing else may use `shared`.
template <class T, class W, class Sync>
__device__ __forceinline__ void finish_tile(const Args& p, const Tile& tile, WarpTile<W>& acc, Epilogue<W>& shared,
                                            int thread, const Sync& sync) {
  const int64_t first_channel = tile.channel * W::kChannels, first_pixel = tile.pixel * W::kPixels;
  const int64_t row = W::LAST ? first_pixel : first_channel, column = W::LAST ? first_channel : first_pixel;
  const int64_t channel = first_channel + thread;
  sync();
  if (thread < W::kChannels) {
    const Channel k = load_channel(p, channel);
    shared.bias[thread] = k.bias;
    shared.scale[thread] = k.norm.scale;
    shared.shift[thread] = fmaf(-k.norm.mean, k.norm.scale, k.norm.shift);
  }
  sync();
  acc.each([&](float v, int c) { return v + shared.bias[c]; });
  unsigned char* results = shared.results[thread / 32];
  if (p.partials == nullptr) {
    acc.template activate<T>(p.activation);
    acc.each([&](float h, int c) { return fmaf(h, shared.scale[c], shared.shift[c]); });
    acc.template stage<T, false>(results);
    store_results<T, W>(p, results, row + acc.row, column + acc.column);
    return;
  }
  acc.template stage<T, true>(results);
  store_results<T, W>(p, results, row + acc.row, column + acc.column);
  acc.template activate<T>(p.activation);
  const int pixels = clamp_count(p.pixels - first_pixel, W::kPixels), part = W::part(thread / 32);
  if (pixels == W::kPixels) {
    acc.template statistics<true>(shared.moments[part], pixels);
  } else {
    acc.template statistics<false>(shared.moments[part], pixels);
  }
  sync();
  if (thread < W::kChannels && channel < p.c_out) {
    Moments m = shared.moments[0][thread];
    for (int i = 1; i < W::kParts; ++i) m = merge(m, shared.moments[i][thread]);
    store_partial(p, channel, tile.pixel, m);
  }
}

}  // namespace convmixer::pointwise

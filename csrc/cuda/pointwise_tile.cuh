// SPDX-License-Identifier: MIT
// Shared by the GEMM kernels of the pointwise block: the problem, the order of tiles, the epilogue's per-channel
// constants, and statistics over the lanes of a warp.
//   a[n, o, h, w] = sum over i of weight[o, i] * x[n, i, h, w] + bias[o]
//   eval   y = (act(a) - mean) * gamma * rsqrt(var + eps) + beta
//   train  y = a rounded to its dtype, and count, mean, M2 of act(a) by tile of pixels
// Pixel numbers are n * H * W + h * W + w: a tile may span several images, so that small planes fill it too.
#pragma once
#include <cstdint>

#include "../math.h"
#include "elementwise.cuh"

namespace convmixer::pointwise {

struct Args {
  const void* x;       // (N, C_in, H, W)
  const void* weight;  // (C_out, C_in)
  void* y;             // (N, C_out, H, W)
  Param bias;          // (C_out)
  Norm norm;
  float* partials;  // (C_out, pixel_tiles, 3), or null in eval
  int64_t c_out, pixels, plane, pixel_tiles, channel_tiles;
  int c_in, activation;
  bool vectors_out;  // 16-byte stores are aligned
};

// The order of tiles lets blocks that run together share operands in L2: the channel tiles of one tile of pixels follow
// each other, in groups of kGroup. A group's part of the weight (2048 channels of 2048 16-bit values: 8 MB) stays in
// L2.
constexpr int kGroup = 16;

struct Tile {
  int64_t channel, pixel;  // in tiles
};

template <int GROUP>
__device__ __forceinline__ Tile locate_tile(int64_t channel_tiles, int64_t pixel_tiles, int64_t index) {
  const int64_t per_group = GROUP * pixel_tiles, group = index / per_group;
  const int64_t rest = index - group * per_group, left = channel_tiles - group * GROUP;
  const int64_t width = left < GROUP ? left : GROUP, pixel = rest / width;
  return {group * GROUP + (rest - pixel * width), pixel};
}
__device__ __forceinline__ Tile locate_tile(const Args& p, int64_t index) {
  return locate_tile<kGroup>(p.channel_tiles, p.pixel_tiles, index);
}

// The place of a pixel in a contiguous tensor, in channel 0 of its image.
struct Pixel {
  int64_t offset, position;  // position: in its plane
};

__device__ __forceinline__ Pixel locate_pixel(int64_t pixel, int64_t channels, int64_t plane) {
  const int64_t image = pixel / plane, position = pixel - image * plane;
  return {image * channels * plane + position, position};
}

// A channel's constants for the epilogue: y = (act(acc + bias) - mean) * scale + shift.
struct Channel {
  float bias;
  elementwise::Affine norm;
};

__device__ __forceinline__ Channel load_channel(const Args& p, int64_t c) {
  if (c >= p.c_out) return {0.f, {0.f, 1.f, 0.f}};
  return {load_param(p.bias, c), elementwise::affine(p.norm, c)};
}

// Merges moments over lanes, by Chan's formula. A lane holds those of R channels over `count` values; lanes that differ
// only in the bits FIRST, 2 FIRST, ... below END hold the same channels. Each bit halves R while R > 1: at the end the
// lane holds mean[0 .. R') and m2[0 .. R') of the channels from the returned index on, and their common count.
template <int R, int FIRST, int END>
__device__ __forceinline__ int merge_lanes(float* mean, float* m2, float& count) {
  if constexpr (FIRST >= END) {
    return 0;
  } else {
    constexpr int kKeep = R > 1 ? R / 2 : 1;
    const bool upper = R > 1 && (threadIdx.x & FIRST) != 0;
    const float other = __shfl_xor_sync(0xffffffffu, count, FIRST), total = count + other;
    const float share = total > 0.f ? other / total : 0.f, weight = count * share;
#pragma unroll
    for (int i = 0; i < kKeep; ++i) {
      const float mine = upper ? mean[i + R - kKeep] : mean[i], mine2 = upper ? m2[i + R - kKeep] : m2[i];
      const float sent = upper ? mean[i] : mean[i + R - kKeep], sent2 = upper ? m2[i] : m2[i + R - kKeep];
      const float theirs = __shfl_xor_sync(0xffffffffu, sent, FIRST);
      const float theirs2 = __shfl_xor_sync(0xffffffffu, sent2, FIRST), delta = theirs - mine;
      mean[i] = fmaf(delta, share, mine);
      m2[i] = fmaf(delta * delta, weight, mine2 + theirs2);
    }
    count = total;
    return (upper ? kKeep : 0) + merge_lanes<kKeep, 2 * FIRST, END>(mean, m2, count);
  }
}

__device__ __forceinline__ void store_partial(const Args& p, int64_t channel, int64_t pixel_tile, const Moments& m) {
  float* partial = p.partials + (channel * p.pixel_tiles + pixel_tile) * 3;
  partial[0] = m.count, partial[1] = m.mean, partial[2] = m.m2;
}

}  // namespace convmixer::pointwise

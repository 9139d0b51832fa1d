// SPDX-License-Identifier: MIT
// The depthwise weight gradient's geometry and its tensor-core arithmetic, shared by its kernels.
//
// For kernel row i a warp accumulates G_i[16 m + 16][8] += X_i^T * dA, with K = 16 image rows y, M = a window of input
// columns and N = 8 output columns: G_i[p][q] = sum_y x[y + i - top][column of q + p - shift] * da[y][column of q], so
// that dw[i][j] = sum_q G_i[q + j + skew][q]: diagonal sums, taken once after all rows, column tiles and images.
// K rows may come from several images (small planes): each lane of ldmatrix names its own row, and rows above or below
// an image are read from one row of zeros. Columns outside the image are zeros beside each row in shared memory.
#pragma once
#include "../math.h"
#include "device.cuh"
#include "kernels.h"

namespace convmixer {
namespace weight_grad {

// Tiles of 8 output columns whose B fragments a warp holds while it walks the kernel rows.
constexpr int kColumnTiles = 4;

// M blocks of 16 window columns, kernel rows of one warp, zero columns left of the image, by kernel width.
constexpr int window_blocks(int kw) { return kw <= 9 ? 1 : kw <= 25 ? 2 : 3; }
constexpr int warp_kernel_rows(int blocks) { return blocks == 1 ? 9 : 6; }
constexpr int left_columns(int blocks) { return blocks == 1 ? 4 : blocks == 2 ? 12 : 16; }

inline __host__ __device__ int round_up(int v, int unit) { return (v + unit - 1) / unit * unit; }

enum class Kernel { kBlock, kWarpDirect, kWarpSpan };

// Elements from one image, channel, row and column to the next.
struct Strides {
  int64_t image, channel, row, column;
};

// Everything that follows from the shape and the kernel size.
struct Plan {
  Kernel kernel;
  int64_t n, c;
  int h, w, kh, kw, top;
  bool channels_last;
  Strides strides;
  int blocks;       // M blocks of the window
  int shift, skew;  // zero columns on the left; p - q of tap 0
  int pack;         // whole images of one unit, 1 if planes are tiled
  int tile_rows, tile_cols;
  FastDiv row_tiles, col_tiles;
  int units;              // packs * row_tiles * col_tiles
  int channels;           // of one block
  int channels_together;  // block kernel: that a thread loads, 1, 2 or 8; 0: asynchronous copies
  int groups;             // kernel-row groups, one warp each
  int slices;  // block kernel: warps that share a unit's K steps; warp kernel: warps that share a channel's units
  int x_rows, x_pitch, d_rows, d_pitch;  // a channel's tiles in shared memory, in elements
  int x_plane, d_plane;                  // block kernel: from one channel's tile to the next
  FastDiv x_pairs, d_pairs;              // by x_pitch / 2, d_pitch / 2
  FastDiv x_quads, x_octets, d_octets;   // by x_pitch / 4, x_pitch / 8, d_pitch / 8
  int d_swizzle_shift, d_swizzle_mask;
  int parts;  // blocks that share a channel's units
  // warp kernel: chunks of a row and lanes for them, see copy_rows; pitches of a span; a warp's shared memory
  int x_first, x_chunks, x_lanes_log2, d_chunks, d_lanes_log2;
  bool d_wide;
  int x_span, d_span, span_lanes_log2, warp_elements;
  // block kernel, W % 8 != 0: a unit's spans of x and of dy in shared memory (x_raw = 0: none); by pieces of a span
  int x_raw, d_raw;
  FastDiv x_pieces, d_pieces;
  uint32_t row_magic;  // row / tile_rows is (row * row_magic) >> 20 if pack > 1; else 0
};

// One block pass: `images` planes' rows y0 .. y0 + rows and columns c0 .. c0 + cols, and the input rows they need.
struct Unit {
  int64_t image;
  int images, y0, rows, x0, x_rows, c0, cols;
};

__device__ __forceinline__ Unit unit_at(const Plan& p, int index) {
  Unit u;
  uint32_t column, row;
  const uint32_t pack = p.row_tiles.divmod(p.col_tiles.divmod(index, column), row);
  u.image = int64_t(pack) * p.pack;
  u.images = int(min(int64_t(p.pack), p.n - u.image));
  u.y0 = int(row) * p.tile_rows;
  u.rows = min(p.tile_rows, p.h - u.y0);
  u.x0 = max(0, u.y0 - p.top);
  u.x_rows = min(p.h, u.y0 + u.rows + p.kh - 1 - p.top) - u.x0;
  u.c0 = int(column) * p.tile_cols;
  u.cols = min(p.tile_cols, p.w - u.c0);
  return u;
}

// The start of 8-column block `block` of a row of dy, a or da. Rows of tiles lie densely; exchanging blocks by row
// keeps the 8 rows of an ldmatrix matrix in different banks.
__device__ __forceinline__ int d_offset(const Plan& p, int row, int block) {
  return row * p.d_pitch + (block ^ ((row >> p.d_swizzle_shift) & p.d_swizzle_mask)) * 8;
}

// The image of a unit's row (0 if planes are tiled).
__device__ __forceinline__ int image_of(const Plan& p, int row) { return int(uint32_t(row) * p.row_magic >> 20); }

// The row of the K step whose address a lane gives to ldmatrix for x, as an element offset into the x tile. The
// matrices come in the order of mma's A operand: rows 0-7 of columns 0-7, rows 0-7 of columns 8-15, then rows 8-15.
struct LaneRow {
  int y, limit;  // kernel row i of the warp pairs with image row y + i, which is not zero if unsigned(y + i) < limit
  int offset;    // of row y, in the lane's column block of tile 0
};

__device__ __forceinline__ LaneRow lane_row(const Plan& p, const Unit& u, int k_step, int first_kernel_row,
                                            int kernel_rows, int lane) {
  const int row = k_step * 16 + (lane & 7) + (lane >> 4) * 8, image = image_of(p, row);
  LaneRow r;
  r.y = u.y0 + row - image * u.rows - p.top + first_kernel_row;
  r.limit = row < u.images * u.rows ? max(0, min(p.h, r.y + kernel_rows)) : 0;
  r.offset = (image * u.x_rows + r.y - u.x0) * p.x_pitch + (lane >> 3 & 1) * 8;
  return r;
}

// acc[i] += X_i^T * dA for the warp's kernel rows, over TILES neighbouring column tiles of one K step. Rows outside the
// image, and kernel rows that the warp does not have, come from the row of zeros.
template <class T, int TILES, int BLOCKS, int ROWS>
__device__ __forceinline__ void accumulate(float (&acc)[ROWS][BLOCKS][4], const uint32_t (&b)[TILES][2], const T* x,
                                           const T* zeros, LaneRow row, int pitch) {
  constexpr int kLast = TILES + 2 * BLOCKS - 3;  // pairs of 8-column blocks start at 0 .. kLast
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    // without this barrier ptxas keeps so many rows in flight that registers spill
    if (i == ROWS / 2) __syncwarp();
    const T* source = unsigned(row.y + i) < unsigned(row.limit) ? x + (row.offset + i * pitch) : zeros;
    uint32_t pair[kLast + 1][4];
#pragma unroll
    for (int s = 0; s <= kLast; ++s) {
      if (s % 2 == 0 || s == kLast) ldmatrix_x4_trans(pair[s], source + 8 * s);
    }
    // an odd pair comes from its neighbours' registers: shared memory is busier than the register file
#pragma unroll
    for (int s = 1; s < kLast; s += 2) {
      pair[s][0] = pair[s - 1][1], pair[s][1] = pair[s + 1][0];
      pair[s][2] = pair[s - 1][3], pair[s][3] = pair[s + 1][2];
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
      for (int m = 0; m < BLOCKS; ++m) mma16816(acc[i][m], pair[t + 2 * m], b[t], T());
    }
  }
}

// The row of the K step whose address a lane gives to ldmatrix for dy, a or da, as an element offset into their tiles.
struct LaneFragment {
  int offset, swizzle, half;  // half: the lanes 16 .. 31 read the second tile of a pair
};

__device__ __forceinline__ LaneFragment lane_fragment(const Plan& p, int row, bool padding, int lane) {
  // a padding row comes from a row of zeros
  return {padding ? 0 : row * p.d_pitch, padding ? 0 : (row >> p.d_swizzle_shift) & p.d_swizzle_mask, lane >> 4};
}

// B fragments of `tiles` neighbouring column tiles from `first_tile` on. The second tile of the last pair may lie
// behind the row: nothing uses the up to 16 bytes that are read there.
template <class T>
__device__ __forceinline__ void load_fragments(const T* tile, const LaneFragment& lane, int first_tile, int tiles,
                                               uint32_t (&b)[kColumnTiles][2]) {
#pragma unroll
  for (int t = 0; t < kColumnTiles; t += 2) {
    if (t < tiles) {
      uint32_t r[4];
      ldmatrix_x4_trans(r, tile + lane.offset + ((first_tile + t + lane.half) ^ lane.swizzle) * 8);
      b[t][0] = r[0], b[t][1] = r[1], b[t + 1][0] = r[2], b[t + 1][1] = r[3];
    }
  }
}

// accumulate() for a number of tiles known at run time, 1 .. kColumnTiles. Fewer than all are taken one by one: two
// tiles alone would share too little to pay for more code.
template <class T, int BLOCKS, int ROWS>
__device__ __forceinline__ void accumulate_tiles(int tiles, float (&acc)[ROWS][BLOCKS][4],
                                                 const uint32_t (&b)[kColumnTiles][2], const T* x, const T* zeros,
                                                 LaneRow row, int pitch) {
  if (tiles == kColumnTiles) {
    accumulate<T, kColumnTiles>(acc, b, x, zeros, row, pitch);
  } else {
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      uint32_t one[1][2] = {{b[0][0], b[0][1]}};
#pragma unroll
      for (int k = 1; k + 1 < kColumnTiles; ++k) {
        if (t == k) one[0][0] = b[k][0], one[0][1] = b[k][1];
      }
      accumulate<T, 1>(acc, one, x + 8 * t, zeros, row, pitch);
    }
  }
}

// Computes the warp's taps from its G: taps[i * kw + j] = sum_q G_i[q + j + skew][q]. scratch: BLOCKS * 128 floats of
// the warp.
template <int BLOCKS, int ROWS>
__device__ __forceinline__ void diagonal_sums(const float (&acc)[ROWS][BLOCKS][4], float* scratch, float* taps, int kw,
                                              int skew, int kernel_rows, int lane) {
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    if (i < kernel_rows) {
#pragma unroll
      for (int m = 0; m < BLOCKS; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          scratch[(16 * m + (lane >> 2) + 8 * (e >> 1)) * 8 + 2 * (lane & 3) + (e & 1)] = acc[i][m][e];
        }
      }
      __syncwarp();
      if (lane < kw) {
        float sum = 0.f;
        for (int q = 0; q < 8; ++q) sum += scratch[(q + lane + skew) * 8 + q];
        taps[i * kw + lane] = sum;
      }
      __syncwarp();
    }
  }
}

// da, the gradient of the convolution's output: da = (scale * dy + offset + slope * act(a)) * act'(a), with batch
// norm's backward folded into the constants of a channel.
struct GradCoefficients {
  float scale, offset, slope;
};

struct GradInput {
  int activation;
  bool has_a, has_sums;
  float inverse_count;  // 1 / (N * H * W)
  Norm norm;
  Sums sums;
};

template <class T>
struct Arguments {
  const T* x;   // (N, C, H, W)
  const T* dy;  // (N, C, H, W)
  const T* a;   // (N, C, H, W) or null: da = dy
  GradInput grad;
  float* partials;  // (parts, C, kH * kW + 1): dw, then db
};

__device__ __forceinline__ GradCoefficients grad_coefficients(const GradInput& g, int64_t channel) {
  GradCoefficients k = {1.f, 0.f, 0.f};
  if (g.norm.present) {
    const float rstd = rsqrtf(load_param(g.norm.var, channel) + g.norm.eps);
    k.scale = rstd * load_param(g.norm.weight, channel, 1.f);
    if (g.has_sums) {
      const float mean_dy = g.sums.dy[channel] * g.inverse_count;
      const float slope = rstd * (g.sums.dy_hhat[channel] * g.inverse_count);
      k.slope = -k.scale * slope;
      k.offset = -k.scale * (mean_dy - load_param(g.norm.mean, channel) * slope);
    }
  }
  return k;
}

// offset is k.offset, or 0 if dy and a are padding zeros (then da = 0).
template <int ACT>
__device__ __forceinline__ float grad_of(const GradInput& g, const GradCoefficients& k, float offset, float dy,
                                         float a) {
  const ValueAndGrad h = fast_activation_and_grad<ACT>(a);
  float dh = fmaf(k.scale, dy, offset);
  // slope is 0 without sums, but h may be infinite
  if (g.has_sums) dh = fmaf(k.slope, h.value, dh);
  return times_grad<ACT>(dh, h.grad);
}

}  // namespace weight_grad
}  // namespace convmixer

// SPDX-License-Identifier: MIT
// Depthwise convolution on tensor cores, the engine of depthwise_forward.cu and depthwise_input_grad.cu.
// For each kernel row i, 16 x 8 outputs are D += A_i T_i. A_i is 16 rows of the input tile, of any images: small images
// share a block. T_i is a band: T_i[p][q] = w[i][p - q - (8 S - 4 - left)]. Output columns [8 t - 4, 8 t + 3] need the
// blocks of 8 columns t - S .. t + S - 1 (S = 1 .. 5 for kw <= 9, 25, 41, 57, 73), which are aligned for 16-byte copies
// and need no column halo. SINGLE (W <= 32): one tile holds the half tiles of both edges; its left half takes the last
// blocks, its right half the first.
// Contiguous: a block of 4 warps owns a channel, a warp 16 rows x 8 NT columns at a time; 3 stages of asynchronous
// copies. channels_last: a warp owns 1 or 2 channels; 8x8 transposes in registers make per-channel planes and undo
// them. Bound: HBM, 305 cycles of an H100 SM for x and y of a 32x32 plane; one instruction an output takes 8 cycles. By
// the sm_90a SASS at 32x32, k = 9, GELU, eval takes 30 an output (convolution 7, GELU and affine 9, residual 2, pack
// and stage 2, store 4, copies and the rest 6), the input gradient 42 (da 24).
#pragma once
#include "../math.h"
#include "device.cuh"

namespace convmixer {
namespace mma {

constexpr int kStages = 3;

// The largest form of the contiguous kernel has no spills (ptxas) from sm_90 on if rare work is a call and the position
// of an item is kept; before sm_90, if rare work is inline, the position is computed again, and a thread has 128
// registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kFromSm90 = false;
#define CONVMIXER_RARELY __forceinline__
#else
constexpr bool kFromSm90 = true;
#define CONVMIXER_RARELY __noinline__
#endif

// How a launch cuts its tensor. make_plan (depthwise_mma_launch.cuh) makes it, every thread reads it.
struct Plan {
  int n, c, h, w, kh, kw, top, left;   // top, left: padding of this pass (exchanged in the input gradient)
  int rows, images;                    // an item's output rows per image, and images
  int bands, column_tiles;             // items along H and W
  int tiles, chunks;                   // an item's tiles of 8 output columns; blocks of 8 input columns in a tile row
  int tile_rows;                       // input rows per image: rows + kernel rows - 1
  int pitch, plane_bytes, tile_bytes;  // bytes: a row, an image and all images of a channel's input tile
  int row_lo, row_count, chunk_lo, chunk_count;  // the part of the tile that copies write; the rest stays zero
  int raw_chunk,
      raw_bytes;  // bytes of channels_last's 8 pixels x G channels, and of a raw stage (of spans: of a tensor)
  // contiguous, bytes: the tiles of stage 0, from one stage's to the next, from x's to a's (da's); the strips
  int tiles_at, tile_step, a_offset, strips_at;
  int spans, span_pieces;         // contiguous, odd W: spans of an item and pieces of one, else 0
  int64_t total;                  // values of the tensor
  int64_t item_step, plane_step;  // contiguous: bytes from an item's first plane to the next item's; of a plane
  int table_bytes;                // weights of one channel
  int pieces;                     // 16-byte pieces of an item if all items are laid out alike, else 0
  int items, splits;              // items per channel (group), and the most blocks that share them
  int64_t run;                    // contiguous: items of a block
  int strips, groups;             // 16-row strips and column groups of NT tiles of an item
  int shared_bytes;
  int granule;  // values in the widest aligned global access: 8, 4, 2 or 1
  FastDiv by_rows, by_tiles, by_groups, by_copy_rows, by_copy_chunks, by_bands, by_column_tiles, by_span_pieces;
};

struct Args {
  Plan plan;
  const void* x;  // (N, C, H, W) forward: x, input gradient: dy
  const void* a;  // (N, C, H, W) input gradient: a, or null if da = dy
  void* y;        // (N, C, H, W)
  Param weight;   // (C, 1, kH, kW)
  Param bias;     // (C)
  Norm norm;
  Sums sums;
  int activation;
  bool residual;
  float* partials;  // (C, splits, 3)
};

// The constants of a channel. Forward: y = act(v) * scale + shift. Input gradient:
// da = (scale * dy + shift + slope * act(a)) * act'(a).
struct Affine {
  float bias, scale, shift, slope;
};

template <class T, bool GRAD>
__device__ __forceinline__ Affine load_affine(const Args& p, int c) {
  Affine k = {0.f, 1.f, 0.f, 0.f};
  if (!GRAD) k.bias = load_param_as<T>(p.bias, c);
  if (!p.norm.present) return k;
  const float rstd = rsqrtf(load_param(p.norm.var, c) + p.norm.eps), mean = load_param(p.norm.mean, c);
  k.scale = load_param(p.norm.weight, c, 1.f) * rstd;
  if (!GRAD) {
    k.shift = load_param(p.norm.bias, c) - mean * k.scale;
  } else if (p.sums.dy != nullptr) {
    const float count = static_cast<float>(static_cast<int64_t>(p.plan.n) * p.plan.h * p.plan.w);
    k.slope = -k.scale * rstd * (p.sums.dy_hhat[c] / count);
    k.shift = -k.scale * (p.sums.dy[c] / count) - mean * k.slope;
  }
  return k;
}

// da of 8 values of one channel.
template <class T>
__device__ __forceinline__ uint4 grad_through_block(uint4 dy, uint4 a, const Affine& k, int act) {
  Vec16<T> g, v;
  g.unpack(dy);
  v.unpack(a);
  dispatch_activation(act, [&](auto code) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      constexpr int kAct = decltype(code)::value;
      const ValueAndGrad h = fast_activation_and_grad<kAct>(v.v[i]);
      g.v[i] = times_grad<kAct>(fmaf(k.scale, g.v[i], fmaf(k.slope, h.value, k.shift)), h.grad);
    }
  });
  return g.pack();
}

template <class T>
__device__ __forceinline__ uint32_t trace_finite16(uint32_t trace, uint4 v) {
  return trace_finite<T>(trace_finite<T>(trace_finite<T>(trace_finite<T>(trace, v.x), v.y), v.z), v.w);
}

// The position of an item: its first image, its first output row, the first column of its tile 0 plus 4.
struct Item {
  int image, row, column;
};
__device__ __forceinline__ Item locate(const Plan& plan, int item) {
  uint32_t band, column_tile;
  const uint32_t rest = plan.by_column_tiles.divmod(item, column_tile);
  const uint32_t group = plan.by_bands.divmod(rest, band);
  return {static_cast<int>(group) * plan.images, static_cast<int>(band) * plan.rows,
          static_cast<int>(column_tile) * plan.tiles * 8};
}

// One output, computed by the definition.
template <class T, bool GRAD, bool CL>
__device__ float recompute(const Args& p, const Affine& k, int n, int c, int y, int x) {
  const Plan& q = p.plan;
  const auto at = [&](const void* data, int row, int column) {
    const int64_t i = CL ? ((static_cast<int64_t>(n) * q.h + row) * q.w + column) * q.c + c
                         : ((static_cast<int64_t>(n) * q.c + c) * q.h + row) * q.w + column;
    return to_float(static_cast<const T*>(data)[i]);
  };
  float sum = k.bias;
  for (int i = 0; i < q.kh; ++i) {
    for (int j = 0; j < q.kw; ++j) {
      const int row = y + i - q.top, column = x + j - q.left;
      if (row < 0 || row >= q.h || column < 0 || column >= q.w) continue;
      const int tap = GRAD ? q.kh * q.kw - 1 - i * q.kw - j : i * q.kw + j;
      float v = at(p.x, row, column);
      if (GRAD && p.a != nullptr) {
        const float a = at(p.a, row, column);
        dispatch_activation(p.activation, [&](auto code) {
          constexpr int act = decltype(code)::value;
          // slope is 0 without sums, but act(a) may be infinite
          const float of_sums = p.sums.dy == nullptr ? 0.f : fmaf(k.slope, activation<act>(a), k.shift);
          v = times_grad<act>(fmaf(k.scale, v, of_sums), activation_grad<act>(a));
        });
        v = to_float(from_float<T>(v));
      }
      sum = fmaf(load_param_as<T>(p.weight, static_cast<int64_t>(c) * q.kh * q.kw + tap), v, sum);
    }
  }
  if (!GRAD && p.partials == nullptr) {
    dispatch_activation(p.activation, [&](auto code) { sum = activation<decltype(code)::value>(sum); });
    sum = fmaf(sum, k.scale, k.shift);
  }
  return p.residual ? sum + at(p.x, y, x) : sum;
}

// Recomputes by the definition each output of channel c that is NaN, in items first, first + step, ... below end.
// Called only if a thread saw an output that is not finite. An Inf or NaN in the input may spoil other outputs:
// Toeplitz matrices multiply it by zeros in up to 16 S columns, the fast activations turn Inf into NaN, and
// grad_through_block multiplies an infinite act(a) by a slope of 0.
template <class T, bool GRAD, bool CL>
__device__ CONVMIXER_RARELY void settle_nan(const Args& p, int c, int first, int end, int step, int lane, int lanes) {
  const Plan& q = p.plan;
  const Affine k = load_affine<T, GRAD>(p, c);
  const int width = q.column_tiles > 1 ? 8 * q.tiles : q.w;
  for (int current = first; current < end; current += step) {
    const Item item = locate(q, current);
    const int left = q.column_tiles > 1 ? item.column - 4 : 0, total = q.images * q.rows * width;
    for (int i = lane; i < total; i += lanes) {
      const int n = item.image + i / width / q.rows, y = item.row + i / width % q.rows, x = left + i % width;
      if (n >= q.n || y >= q.h || x < 0 || x >= q.w) continue;
      T* const out = static_cast<T*>(p.y) + (CL ? ((static_cast<int64_t>(n) * q.h + y) * q.w + x) * q.c + c
                                                : ((static_cast<int64_t>(n) * q.c + c) * q.h + y) * q.w + x);
      const float value = to_float(*out);
      if (value != value) *out = from_float<T>(recompute<T, GRAD, CL>(p, k, n, c, y, x));
    }
  }
}

// The weights of channel c as two tables of rows of 16 S + 8 values, the second shifted by one. The pair of T_i at
// (p, q), (p + 1, q) is one aligned word at index p - q + 7, of the table that has the right parity.
template <class T, bool GRAD, int S>
__device__ void build_table(T* table, const Args& p, int c, int rows, int lane, int lanes) {
  constexpr int length = 16 * S + 8;
  for (int i = lane; i < rows * 2 * length; i += lanes) {
    const int row = i / (2 * length), k = i % (2 * length), index = k < length ? k : k - length + 1;
    const int tap = index - 7 - (8 * S - 4 - p.plan.left);
    float v = 0.f;
    if (row < p.plan.kh && tap >= 0 && tap < p.plan.kw) {
      const int at = row * p.plan.kw + tap;
      v = load_param(p.weight,
                     static_cast<int64_t>(c) * p.plan.kh * p.plan.kw + (GRAD ? p.plan.kh * p.plan.kw - 1 - at : at));
    }
    table[i] = from_float<T>(v);
  }
}

template <class T, int S>
__device__ __forceinline__ void load_toeplitz(uint32_t (&b)[2 * S], const T* table, int row, int lane) {
  constexpr int length = 16 * S + 8;
  const int g = lane >> 2, t = lane & 3;
  const T* pair = table + row * 2 * length + (g & 1 ? 0 : length - 1) + 2 * t - g + 7;
#pragma unroll
  for (int f = 0; f < 2 * S; ++f) b[f] = *reinterpret_cast<const uint32_t*>(pair + 8 * f);
}

// The functions below compute a unit, which is 16 rows x NT tiles.

template <class T, int S, int NT, bool SINGLE>
struct Unit {
  static constexpr int blocks = SINGLE ? NT : NT + 2 * S - 1;
  uint32_t quad[(blocks + 1) / 2][4];

  // `address` is of this lane's row: row lane % 16 of the strip, block lane / 16.
  __device__ __forceinline__ void load(const unsigned char* address) {
#pragma unroll
    for (int b = 0; b < blocks; b += 2) {
      if (b + 1 < blocks) {
        ldmatrix_x4(quad[b / 2], address + 16 * b);
      } else {
        uint32_t pair[2];
        ldmatrix_x2(pair, address + 16 * b);
        quad[b / 2][0] = pair[0];
        quad[b / 2][1] = pair[1];
      }
    }
  }
  // d = c + sum over f in [from, to) of block (first + f) times fragment f. Blocks outside the tile are zero.
  template <int N>
  __device__ __forceinline__ void multiply(float (&d)[4], int first, int from, int to, const uint32_t (&b)[N],
                                           const float (&c)[4]) {
    bool fresh = true;
#pragma unroll
    for (int f = from; f < to; ++f) {
      const int k = first + f;
      if (k < 0 || k >= blocks) continue;
      if (k % 2 == 1 && f > from && k - 1 >= 0) continue;  // done with its left neighbour
      if (k % 2 == 0 && f + 1 < to && k + 1 < blocks) {
        const uint32_t pair[2] = {b[f], b[f + 1]};
        fresh ? mma16816(d, quad[k / 2], pair, c, T()) : mma16816(d, quad[k / 2], pair, d, T());
      } else {
        const uint32_t lo = quad[k / 2][2 * (k % 2)], hi = quad[k / 2][2 * (k % 2) + 1];
        fresh ? mma1688(d, lo, hi, b[f], c, T()) : mma1688(d, lo, hi, b[f], d, T());
      }
      fresh = false;
    }
  }
  // b holds the 2 S fragments of a kernel row. SINGLE: acc[0] is the left half of tile 0 (right edge of the image),
  // last is its right half (left edge).
  __device__ __forceinline__ void multiply_row(float (&acc)[NT][4], float (&last)[4], const uint32_t (&b)[2 * S]) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      if (!SINGLE) {
        multiply(acc[j], j, 0, 2 * S, b, acc[j]);
      } else if (j > 0) {
        multiply(acc[j], j - S, 0, 2 * S, b, acc[j]);
      } else {
        multiply(acc[0], NT - S, 0, S, b, acc[0]);
        multiply(last, -S, S, 2 * S, b, last);
      }
    }
  }
  // Like multiply_row, but the accumulators start at c.
  __device__ __forceinline__ void multiply_first_row(float (&acc)[NT][4], float (&last)[4], const uint32_t (&b)[2 * S],
                                                     const float (&c)[4]) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      if (!SINGLE) {
        multiply(acc[j], j, 0, 2 * S, b, c);
      } else if (j > 0) {
        multiply(acc[j], j - S, 0, 2 * S, b, c);
      } else {
        multiply(acc[0], NT - S, 0, S, b, c);
        multiply(last, -S, S, 2 * S, b, c);
      }
    }
  }
  // acc += the input at the positions of the outputs, by a product with the identity matrix.
  __device__ __forceinline__ void add_identity(float (&acc)[NT][4], int lane) {
    const int g = lane >> 2, t = lane & 3;
    const uint32_t lo = bit_cast<uint16_t>(from_float<T>(1.f)), hi = lo << 16;
    const uint32_t b[2] = {2 * t == g + 4 ? lo : (2 * t + 1 == g + 4 ? hi : 0u),
                           2 * t + 4 == g ? lo : (2 * t + 5 == g ? hi : 0u)};
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      if (!SINGLE) {
        multiply(acc[j], j + S - 1, 0, 2, b, acc[j]);
      } else if (j > 0) {
        multiply(acc[j], j - 1, 0, 2, b, acc[j]);
      } else {
        multiply(acc[0], NT - 1, 0, 1, b, acc[0]);
        multiply(acc[0], -1, 1, 2, b, acc[0]);
      }
    }
  }
};

// The convolution of a unit: kernel row i of this lane's input row is at address + i * pitch.
template <class T, int S, int KH, int NT, bool SINGLE, int ROWS>
__device__ __forceinline__ void convolve(float (&acc)[NT][4], const unsigned char* address, int pitch, int kh,
                                         const uint32_t (&fixed)[ROWS][2 * S], const T* table, float bias, int lane) {
  Unit<T, S, NT, SINGLE> inputs;
  float last[4];
  const float start[4] = {bias, bias, bias, bias};
  if constexpr (KH > 0) {
#pragma unroll
    for (int i = 0; i < KH; ++i) {
      inputs.load(address + i * pitch);
      if (i == 0) {
        inputs.multiply_first_row(acc, last, fixed[i], start);
      } else {
        inputs.multiply_row(acc, last, fixed[i]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      last[i] = bias;
#pragma unroll
      for (int j = 0; j < NT; ++j) acc[j][i] = bias;
    }
    for (int i = 0; i < kh; ++i) {
      uint32_t b[2 * S];
      load_toeplitz<T, S>(b, table, i, lane);
      inputs.load(address + i * pitch);
      inputs.multiply_row(acc, last, b);
    }
  }
  if (SINGLE) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[0][i] = (lane & 3) < 2 ? acc[0][i] : last[i];
  }
}

// Applies activation and affine map to one unit's values, in place.
template <int NT>
__device__ __forceinline__ void apply_block(float (&acc)[NT][4], const Affine& k, int act) {
  dispatch_activation(act, [&](auto code) {
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[j][i] = fmaf(fast_activation<decltype(code)::value>(acc[j][i]), k.scale, k.shift);
  });
}

// Adds a unit's values, rounded as they are stored, to the thread's moments: computes their own mean and M2, then
// merges by Chan's formula. words[j][i] holds the pair acc[j][2 i], acc[j][2 i + 1]; a value counts if bit 4 j + 2 i +
// e of `valid` is set.
template <class T, int NT>
__device__ __forceinline__ void add_moments(Moments& total, const uint32_t (&words)[NT][2], bool all, uint32_t valid,
                                            int act) {
  float v[NT][4];
  dispatch_activation(act, [&](auto code) {
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 pair = unpack2<T>(words[j][i]);
        v[j][2 * i] = fast_activation<decltype(code)::value>(pair.x);
        v[j][2 * i + 1] = fast_activation<decltype(code)::value>(pair.y);
      }
  });
  float sum = 0.f, m2 = 0.f, count = 4.f * NT, mean;
  if (all) {
#pragma unroll
    for (int j = 0; j < NT; ++j) sum += (v[j][0] + v[j][1]) + (v[j][2] + v[j][3]);
    mean = sum * (1.f / (4 * NT));
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) m2 = fmaf(v[j][i] - mean, v[j][i] - mean, m2);
  } else {
    count = static_cast<float>(__popc(valid));
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += valid >> (4 * j + i) & 1 ? v[j][i] : 0.f;
    mean = sum * fast_reciprocal(fmaxf(count, 1.f));
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float d = valid >> (4 * j + i) & 1 ? v[j][i] - mean : 0.f;
        m2 = fmaf(d, d, m2);
      }
  }
  const float together = total.count + count, share = count * fast_reciprocal(fmaxf(together, 1.f));
  const float delta = mean - total.mean;
  total.m2 += fmaf(delta * delta, total.count * share, m2);
  total.mean = fmaf(delta, share, total.mean);
  total.count = together;
}

__device__ __forceinline__ Moments warp_merge(Moments m) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    const Moments other = {__shfl_xor_sync(0xffffffffu, m.count, o), __shfl_xor_sync(0xffffffffu, m.mean, o),
                           __shfl_xor_sync(0xffffffffu, m.m2, o)};
    m = merge(m, other);
  }
  return m;
}

}  // namespace mma
}  // namespace convmixer

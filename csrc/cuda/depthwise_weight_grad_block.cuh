// SPDX-License-Identifier: MIT
// The depthwise weight gradient for every shape, kernel size and layout. A block owns `channels` channels and every
// parts-th unit of images and leaves one part of dw and db. It loads x and computes da on the way into shared memory;
// its warps share the kernel rows (groups), the channels, and the K steps and column tiles (slices).
// Contiguous tensors are copied asynchronously, one unit ahead: to their places if W % 8 == 0, else as spans
// (spans.cuh). channels_last tensors are read by 4 bytes of 2 channels or, for kernels up to 9x9, by 16 bytes of 8
// channels, which an 8x8 transpose in registers turns into columns.
#pragma once
#include "depthwise_weight_grad_tile.cuh"
#include "spans.cuh"

namespace convmixer {
namespace weight_grad {

constexpr int kMaxChannels = 8;
// Warps of a block: enough for all kernel rows of two channels. A multiprocessor runs two blocks, for wide kernels one.
constexpr int max_warps(int blocks) { return blocks == 1 ? 8 : 12; }

// A thread moves two columns of CHANNELS neighbouring channels (1, or 2 of a channels_last tensor) at a time, always
// the same channels. values[k] receives the two of channel k, the left column in the low half.
template <int CHANNELS, class T>
__device__ __forceinline__ void load_columns(const T* source, int64_t column_stride, bool left, bool right,
                                             uint32_t (&values)[CHANNELS]) {
  if constexpr (CHANNELS == 1) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(source);
    values[0] = uint32_t(left ? bits[0] : 0) | uint32_t(right ? bits[column_stride] : 0) << 16;
  } else {
    const uint32_t low = left ? *reinterpret_cast<const uint32_t*>(source) : 0;
    const uint32_t high = right ? *reinterpret_cast<const uint32_t*>(source + column_stride) : 0;
    values[0] = __byte_perm(low, high, 0x5410);
    values[1] = __byte_perm(low, high, 0x7632);
  }
}

// Pairs of columns of x, and of dy and a, that a thread loads before it uses the first.
constexpr int kBatchX = 4, kBatchD = 3;

// Loads x's rows of the unit, with `shift` columns left of its first and zeros outside the image.
template <int CHANNELS, class T>
__device__ __forceinline__ void load_x(const Plan& p, const Unit& u, const T* x, int first, int step, T* tile) {
  constexpr int BATCH = CHANNELS == 1 ? kBatchX : 3;  // 4 of two channels spill beside the accumulators (sm_80)
  const Strides& s = p.strides;
  const int pairs = p.x_pitch / 2, count = u.images * u.x_rows * pairs;
#pragma unroll 1
  for (int start = first; start < count; start += BATCH * step) {
    uint32_t values[BATCH][CHANNELS];
    int target[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      const int i = start + j * step;
      if (i < count) {
        const int row = int(p.x_pairs.div(i)), pair = i - row * pairs, image = image_of(p, row);
        const int y = u.x0 + row - image * u.x_rows, column = u.c0 - p.shift + 2 * pair;
        load_columns(x + (u.image + image) * s.image + y * s.row + column * s.column, s.column,
                     unsigned(column) < unsigned(p.w), unsigned(column + 1) < unsigned(p.w), values[j]);
        target[j] = row * p.x_pitch + 2 * pair;
      }
    }
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      if (start + j * step < count) {
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
          *reinterpret_cast<uint32_t*>(tile + k * p.x_plane + target[j]) = values[j][k];
        }
      }
    }
  }
}

// Computes da of the unit, with zeros in the padding rows and columns. Adds this thread's sums to db.
template <int CHANNELS, class T>
__device__ __forceinline__ void load_da(const Plan& p, const Unit& u, const GradInput& g,
                                        const GradCoefficients* coefficients, const T* dy, const T* a, int first,
                                        int step, T* tile, float (&db)[CHANNELS]) {
  const Strides& s = p.strides;
  const int pairs = p.d_pitch / 2, rows = u.images * u.rows, count = round_up(rows, 16) * pairs;
#pragma unroll 1
  for (int start = first; start < count; start += kBatchD * step) {
    uint32_t values[kBatchD][CHANNELS], pre[kBatchD][CHANNELS];
    int target[kBatchD], inside[kBatchD];  // inside: columns of the pair that are not padding
#pragma unroll
    for (int j = 0; j < kBatchD; ++j) {
      const int i = start + j * step;
      if (i < count) {
        const int row = int(p.d_pairs.div(i)), pair = i - row * pairs, image = image_of(p, row);
        const int y = u.y0 + row - image * u.rows;
        const int64_t at = (u.image + image) * s.image + y * s.row + (u.c0 + 2 * pair) * s.column;
        inside[j] = row < rows ? u.cols - 2 * pair : 0;
        load_columns(dy + at, s.column, inside[j] > 0, inside[j] > 1, values[j]);
        if (g.has_a) load_columns(a + at, s.column, inside[j] > 0, inside[j] > 1, pre[j]);
        target[j] = d_offset(p, row, pair / 4) + pair % 4 * 2;
      }
    }
    const auto finish = [&](const auto& gradient) {
#pragma unroll
      for (int j = 0; j < kBatchD; ++j) {
        if (start + j * step < count) {
#pragma unroll
          for (int k = 0; k < CHANNELS; ++k) {
            const float2 d = gradient(k, inside[j], unpack2<T>(values[j][k]), pre[j][k]);
            db[k] += d.x + d.y;
            *reinterpret_cast<uint32_t*>(tile + k * p.d_plane + target[j]) = pack2<T>(d.x, d.y);
          }
        }
      }
    };
    if (g.has_a) {
      dispatch_activation(g.activation, [&](auto act) {
        constexpr int kAct = decltype(act)::value;
        finish([&](int k, int columns, float2 d, uint32_t packed) {
          const GradCoefficients& c = coefficients[k];
          const float2 h = unpack2<T>(packed);
          return make_float2(grad_of<kAct>(g, c, columns > 0 ? c.offset : 0.f, d.x, h.x),
                             grad_of<kAct>(g, c, columns > 1 ? c.offset : 0.f, d.y, h.y));
        });
      });
    } else {
      finish([](int, int, float2 d, uint32_t) { return d; });
    }
  }
}

// Octets are 8 columns of 8 neighbouring channels of a channels_last tensor with 16-byte groups of channels.

// v[k]: the columns of channel k; those outside [from, to) are zero. `source` is the first channel of column 0.
template <class T>
__device__ __forceinline__ void load_octet(const T* source, int64_t column_stride, int from, int to, uint4 (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i >= from && i < to ? load16(source + i * column_stride) : make_uint4(0, 0, 0, 0);
  transpose8(v);
}

template <class T>
__device__ __forceinline__ void load_x_octets(const Plan& p, const Unit& u, const T* x, T* tile) {
  const int chunks = p.x_pitch / 8, count = u.images * u.x_rows * chunks;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int row = int(p.x_octets.div(i)), chunk = i - row * chunks, image = image_of(p, row);
    const int y = u.x0 + row - image * u.x_rows, column = u.c0 - p.shift + 8 * chunk;
    uint4 v[8];
    load_octet(x + (u.image + image) * p.strides.image + y * p.strides.row + column * p.strides.column,
               p.strides.column, -column, p.w - column, v);
#pragma unroll
    for (int k = 0; k < 8; ++k) store16_shared(tile + k * p.x_plane + row * p.x_pitch + 8 * chunk, v[k]);
  }
}

// Loads dy or a, with zeros in the padding rows and columns.
template <class T>
__device__ __forceinline__ void load_d_octets(const Plan& p, const Unit& u, const T* d, T* tile) {
  const int chunks = p.d_pitch / 8, rows = u.images * u.rows, count = round_up(rows, 16) * chunks;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int row = int(p.d_octets.div(i)), chunk = i - row * chunks, image = image_of(p, row);
    const int y = u.y0 + row - image * u.rows;
    uint4 v[8];
    load_octet(d + (u.image + image) * p.strides.image + y * p.strides.row + (u.c0 + 8 * chunk) * p.strides.column,
               p.strides.column, 0, row < rows ? u.cols - 8 * chunk : 0, v);
#pragma unroll
    for (int k = 0; k < 8; ++k) store16_shared(tile + k * p.d_plane + d_offset(p, row, chunk), v[k]);
  }
}

// Computes da of one channel in dy's place, 8 columns at a time: this thread takes `first`, first + step, ...
template <class T>
__device__ __forceinline__ void finish_da(const Plan& p, const Unit& u, const GradInput& g, GradCoefficients k,
                                          int first, int step, T* d_tile, const T* a_tile, float& db) {
  const int chunks = p.d_pitch / 8, rows = u.images * u.rows, count = round_up(rows, 16) * chunks;
#pragma unroll 1
  for (int i = first; i < count; i += step) {
    const int row = int(p.d_octets.div(i)), chunk = i - row * chunks, at = d_offset(p, row, chunk);
    const int columns = row < rows ? u.cols - 8 * chunk : 0;
    Vec16<T> d;
    d.unpack(load16(d_tile + at));
    if (g.has_a) {
      Vec16<T> pre;
      pre.unpack(load16(a_tile + at));
      dispatch_activation(g.activation, [&](auto act) {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          d.v[j] = grad_of<decltype(act)::value>(g, k, j < columns ? k.offset : 0.f, d.v[j], pre.v[j]);
      });
      store16(d_tile + at, d.pack());
    }
    db += ((d.v[0] + d.v[1]) + (d.v[2] + d.v[3])) + ((d.v[4] + d.v[5]) + (d.v[6] + d.v[7]));
  }
}

// Starts the copies of x, dy and a of a unit to their places, with zeros beside the image and in the padding rows: for
// contiguous tensors with W % 8 == 0, one channel a block.
template <class T>
__device__ __forceinline__ void copy_async(const Plan& p, const Unit& u, const T* x, const T* dy, const T* a, T* x_tile,
                                           T* d_tile, T* a_tile) {
  const int quads = p.x_pitch / 4, x_count = u.images * u.x_rows * quads;
#pragma unroll 1
  for (int i = threadIdx.x; i < x_count; i += blockDim.x) {
    const int row = int(p.x_quads.div(i)), quad = i - row * quads, image = image_of(p, row);
    const int y = u.x0 + row - image * u.x_rows, column = u.c0 - p.shift + 4 * quad;
    const bool inside = unsigned(column) < unsigned(p.w);
    const T* from = x + (u.image + image) * p.strides.image + y * p.strides.row;
    cp_async<8>(x_tile + row * p.x_pitch + 4 * quad, inside ? from + column : from, inside ? 8 : 0);
  }
  const int chunks = p.d_pitch / 8, rows = u.images * u.rows, d_count = round_up(rows, 16) * chunks;
#pragma unroll 1
  for (int i = threadIdx.x; i < d_count; i += blockDim.x) {
    const int row = int(p.d_octets.div(i)), chunk = i - row * chunks, image = image_of(p, row);
    const int y = u.y0 + row - image * u.rows, to = d_offset(p, row, chunk);
    const bool inside = row < rows && 8 * chunk < u.cols;
    const int64_t at =
        inside ? (u.image + image) * p.strides.image + y * p.strides.row + (u.c0 + 8 * chunk) : int64_t(0);
    cp_async<16>(d_tile + to, dy + at, inside ? 16 : 0);
    if (a != nullptr) cp_async<16>(a_tile + to, a + at, inside ? 16 : 0);
  }
}

// Spans are for contiguous tensors with W % 8 != 0, one channel a block. All spans of a unit are equally long: all rows
// of an image or, of a tile of columns, one row's part.
struct Spans {
  int64_t start;  // the first element of the first span
  int rows, columns;
};
__device__ __forceinline__ Spans x_spans(const Plan& p, const Unit& u, int64_t plane) {
  const int first = max(0, u.c0 - p.shift);
  return {plane + u.image * p.strides.image + int64_t(u.x0) * p.w + first, u.x_rows,
          min(p.w, u.c0 - p.shift + p.x_pitch) - first};
}
__device__ __forceinline__ Spans d_spans(const Plan& p, const Unit& u, int64_t plane) {
  return {plane + u.image * p.strides.image + int64_t(u.y0) * p.w + u.c0, u.rows, u.cols};
}
// The span that holds row `row` of image `image`: its number and its first element.
__device__ __forceinline__ int span_index(const Plan& p, int image, int row) {
  return p.col_tiles.divisor == 1 ? image : row;
}
__device__ __forceinline__ int64_t span_start(const Plan& p, const Spans& s, int index) {
  if (p.col_tiles.divisor == 1) return s.start + index * p.strides.image;
  const int image = image_of(p, index);
  return s.start + image * p.strides.image + int64_t(index - image * s.rows) * p.w;
}

template <class T>
__device__ __forceinline__ void copy_spans(const Plan& p, const Spans& s, int images, const FastDiv& by_pieces,
                                           const T* tensor, T* raw) {
  const bool whole = p.col_tiles.divisor == 1;
  const int count = (whole ? images : images * s.rows) * int(by_pieces.divisor);
  const int length = whole ? s.rows * p.w : s.columns;
  const T* const end = tensor + p.n * p.c * p.h * p.w;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    uint32_t piece;
    const int64_t start = span_start(p, s, by_pieces.divmod(i, piece));
    const int64_t at = (start & ~int64_t(7)) + 8 * int(piece);
    if (at < start + length) copy_span_piece(raw + 8 * i, tensor + at, end);
  }
}

// `count` <= 8 values of row `row` (counted over the images) from the span's column `column` on, then zeros.
template <class T>
__device__ __forceinline__ uint4 load_row(const Plan& p, const Spans& s, const T* raw, int pitch, int image, int row,
                                          int column, int count) {
  const int index = span_index(p, image, row);
  const int above = p.col_tiles.divisor == 1 ? (row - image * s.rows) * p.w : 0;
  return load_from_span(raw + index * pitch, (int(span_start(p, s, index)) & 7) + above + column, count);
}

// Moves values from the spans to the tiles, with zeros beside the image and in the padding rows.
template <class T>
__device__ __forceinline__ void place_spans(const Plan& p, const Unit& u, int64_t plane, bool has_a, const T* raw,
                                            T* x_tile, T* d_tile, T* a_tile) {
  const Spans x = x_spans(p, u, plane), d = d_spans(p, u, plane);
  const int quads = p.x_pitch / 4, x_count = u.images * u.x_rows * quads;
#pragma unroll 1
  for (int i = threadIdx.x; i < x_count; i += blockDim.x) {
    const int row = int(p.x_quads.div(i)), quad = i - row * quads, column = u.c0 - p.shift + 4 * quad;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (unsigned(column) < unsigned(p.w))
      v = load_row(p, x, raw, p.x_span, image_of(p, row), row, column - max(0, u.c0 - p.shift), min(4, p.w - column));
    *reinterpret_cast<uint2*>(x_tile + row * p.x_pitch + 4 * quad) = make_uint2(v.x, v.y);
  }
  raw += p.x_raw;
  const int chunks = p.d_pitch / 8, rows = u.images * u.rows, d_count = round_up(rows, 16) * chunks;
#pragma unroll 1
  for (int i = threadIdx.x; i < d_count; i += blockDim.x) {
    const int row = int(p.d_octets.div(i)), chunk = i - row * chunks, to = d_offset(p, row, chunk);
    const int count = row < rows ? min(8, u.cols - 8 * chunk) : 0;
    uint4 dy = make_uint4(0, 0, 0, 0), a = dy;
    if (count > 0) {
      dy = load_row(p, d, raw, p.d_span, image_of(p, row), row, 8 * chunk, count);
      if (has_a) a = load_row(p, d, raw + p.d_raw, p.d_span, image_of(p, row), row, 8 * chunk, count);
    }
    store16(d_tile + to, dy);
    if (has_a) store16(a_tile + to, a);
  }
}

// A warp's share of the arithmetic.
struct alignas(16) Role {
  int first_row, kernel_rows, channel, slice;
};

template <class T, int BLOCKS, int CHANNELS>
__global__ void __launch_bounds__(32 * max_warps(BLOCKS), BLOCKS == 1 ? 2 : 1)
    block_kernel(const Plan p, const Arguments<T> g) {
  constexpr int ROWS = warp_kernel_rows(BLOCKS);
  // channels for which a thread computes da
  constexpr int OWN = CHANNELS == kMaxChannels || CHANNELS == 0 ? 1 : CHANNELS;
  DYN_SHARED(T, shared);
  SHARED_ARRAY(GradCoefficients, coefficients, kMaxChannels);
  SHARED_ARRAY(float, db_parts, max_warps(BLOCKS) * kMaxChannels);
  T* zeros = shared;  // one x row
  T* x_tiles = zeros + p.x_pitch;
  T* d_tiles = x_tiles + p.channels * p.x_plane;

  const int lane = threadIdx.x & 31;
  const int warp = threadIdx.x >> 5;
  // read again for each unit: kept in registers, the roles would make other values spill
  SHARED_ARRAY(Role, roles, max_warps(BLOCKS));
  if (lane == 0) {
    const int first_row = warp % p.groups * ROWS, rest = warp / p.groups;
    roles[warp] = {first_row, min(ROWS, p.kh - first_row), rest % p.channels, rest / p.channels};
  }
  const int64_t first_channel = int64_t(blockIdx.x) * p.channels;
  const int channels = int(min(int64_t(p.channels), p.c - first_channel));

  for (int i = threadIdx.x; i < p.x_pitch; i += blockDim.x) zeros[i] = from_float<T>(0.f);
  if (int(threadIdx.x) < channels) coefficients[threadIdx.x] = grad_coefficients(g.grad, first_channel + threadIdx.x);

  // while da is computed, `sharers` threads work on the channels of an element
  const int sharers = p.channels / OWN, own = threadIdx.x % sharers * OWN;
  const int first = own < channels ? threadIdx.x / sharers : 1 << 28, step = blockDim.x / sharers;

  float acc[ROWS][BLOCKS][4] = {};
  float db[OWN] = {};
  // asynchronous copies: the next unit is copied to the other stage
  int stage = 0;
  const int64_t plane = int64_t(blockIdx.x) * p.strides.channel;
  const auto copy = [&](int index, int to) {
    if (index < p.units && p.x_raw > 0) {
      const Unit u = unit_at(p, index);
      const Spans d = d_spans(p, u, plane);
      T* raw = x_tiles + p.x_plane + 2 * p.d_plane + to * (p.x_raw + 2 * p.d_raw);
      copy_spans(p, x_spans(p, u, plane), u.images, p.x_pieces, g.x, raw);
      copy_spans(p, d, u.images, p.d_pieces, g.dy, raw + p.x_raw);
      if (g.grad.has_a) copy_spans(p, d, u.images, p.d_pieces, g.a, raw + p.x_raw + p.d_raw);
    } else if (index < p.units) {
      T* x_tile = zeros + p.x_pitch + to * (p.x_plane + 2 * p.d_plane);
      copy_async(p, unit_at(p, index), g.x + plane, g.dy + plane, g.grad.has_a ? g.a + plane : nullptr, x_tile,
                 x_tile + p.x_plane, x_tile + p.x_plane + p.d_plane);
    }
    cp_async_commit();
  };
  if constexpr (CHANNELS == 0) copy(blockIdx.y, 0);
#pragma unroll 1
  for (int index = blockIdx.y; index < p.units; index += gridDim.y) {
    const Unit u = unit_at(p, index);
    __syncthreads();
    if constexpr (CHANNELS == 0) {
      copy(index + gridDim.y, stage ^ 1);
      cp_async_wait<1>();
      if (p.x_raw > 0) {
        // the other threads' pieces
        __syncthreads();
        place_spans(p, u, plane, g.grad.has_a, d_tiles + 2 * p.d_plane + stage * (p.x_raw + 2 * p.d_raw), x_tiles,
                    d_tiles, d_tiles + p.d_plane);
      } else {
        x_tiles = zeros + p.x_pitch + stage * (p.x_plane + 2 * p.d_plane);
        d_tiles = x_tiles + p.x_plane;
      }
      stage ^= 1;
      // each thread computes da where it copied or placed dy and a itself
      finish_da(p, u, g.grad, coefficients[0], threadIdx.x, blockDim.x, d_tiles, d_tiles + p.d_plane, db[0]);
    } else if constexpr (CHANNELS == kMaxChannels) {
      const int64_t start = int64_t(blockIdx.x) * kMaxChannels;
      T* a_tiles = d_tiles + kMaxChannels * p.d_plane;
      load_x_octets(p, u, g.x + start, x_tiles);
      load_d_octets(p, u, g.dy + start, d_tiles);
      if (g.grad.has_a) load_d_octets(p, u, g.a + start, a_tiles);
      __syncthreads();
      finish_da(p, u, g.grad, coefficients[own], threadIdx.x / 8, blockDim.x / 8, d_tiles + own * p.d_plane,
                a_tiles + own * p.d_plane, db[0]);
    } else {
      const int64_t start = (int64_t(blockIdx.x) * p.channels + own) * p.strides.channel;
      load_x<CHANNELS>(p, u, g.x + start, first, step, x_tiles + own * p.x_plane);
      load_da<CHANNELS>(p, u, g.grad, coefficients + own, g.dy + start, g.a + (g.grad.has_a ? start : 0), first, step,
                        d_tiles + own * p.d_plane, db);
    }
    __syncthreads();
    const Role& role = roles[warp];
    if (role.channel >= channels) continue;
    const T* x = x_tiles + role.channel * p.x_plane;
    const T* d = d_tiles + role.channel * p.d_plane;
    const int tiles = (u.cols + 7) / 8, chunks = (tiles + kColumnTiles - 1) / kColumnTiles;
    const int items = (u.images * u.rows + 15) / 16 * chunks;
#pragma unroll 1
    for (int item = role.slice; item < items; item += p.slices) {
      const int k_step = item / chunks, first_tile = (item - k_step * chunks) * kColumnTiles;
      const int count = min(kColumnTiles, tiles - first_tile), d_row = k_step * 16 + (lane & 15);
      uint32_t b[kColumnTiles][2];
      load_fragments(d, lane_fragment(p, d_row, false, lane), first_tile, count, b);
      const LaneRow row = lane_row(p, u, k_step, role.first_row, role.kernel_rows, lane);
      accumulate_tiles<T>(count, acc, b, x + first_tile * 8, zeros, row, p.x_pitch);
    }
  }

  cp_async_wait<0>();
  __syncthreads();
  const int taps = p.kh * p.kw, warps = blockDim.x >> 5;
  float* scratch = reinterpret_cast<float*>(shared) + warp * BLOCKS * 128;
  float* sums = reinterpret_cast<float*>(shared) + warps * BLOCKS * 128;  // [slices][channels][taps]
  const Role role = roles[warp];
  diagonal_sums(acc, scratch, sums + (role.slice * p.channels + role.channel) * taps + role.first_row * p.kw, p.kw,
                p.skew, role.kernel_rows, lane);
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    // sums over the lanes with the same channels
    for (int o = 16; o >= sharers; o >>= 1) db[k] += __shfl_xor_sync(0xffffffffu, db[k], o);
    if (lane < sharers) db_parts[warp * kMaxChannels + own + k] = db[k];
  }
  __syncthreads();
  float* part = g.partials + (int64_t(blockIdx.y) * p.c + first_channel) * (taps + 1);
  for (int i = threadIdx.x; i < channels * (taps + 1); i += blockDim.x) {
    const int k = i / (taps + 1), tap = i - k * (taps + 1);
    float sum = 0.f;
    if (tap < taps) {
      for (int s = 0; s < p.slices; ++s) sum += sums[(s * p.channels + k) * taps + tap];
    } else {
      for (int w = 0; w < warps; ++w) sum += db_parts[w * kMaxChannels + k];
    }
    part[i] = sum;
  }
}

}  // namespace weight_grad
}  // namespace convmixer

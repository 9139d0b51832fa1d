// SPDX-License-Identifier: MIT
// The depthwise weight gradient of contiguous tensors for kernels up to 9x9. Each warp works alone on units of one
// channel, with two units in flight, so that it waits for its own asynchronous copies only. ldmatrix reads dy and a
// into B fragments; da is computed on them in registers, once an element, without a second trip through shared memory.
// If W % 4 == 0 (direct), rows are copied to their place in the tiles. Otherwise the aligned span that covers the
// unit's rows is copied, and its values move to their place inside shared memory. Direct takes 128 registers: four
// blocks (16 warps, 56 KB each for 32x32 planes) run on a multiprocessor of 228 KB.
#pragma once
#include "depthwise_weight_grad_tile.cuh"
#include "spans.cuh"

namespace convmixer {
namespace weight_grad {

constexpr int kWarpKernelWarps = 4;
constexpr int kQuad = 4;  // elements of 8 bytes

// A warp's tiles of one unit.
template <class T>
struct Tiles {
  T *x, *dy, *a;
};

template <class T>
__device__ __forceinline__ Tiles<T> tiles_at(const Plan& p, T* start) {
  return {start, start + p.x_rows * p.x_pitch, start + p.x_rows * p.x_pitch + p.d_rows * p.d_pitch};
}

// Direct copies, for W % 4 == 0: copies `rows` rows, each by 2^lanes_log2 lanes, in chunks of SIZE elements from image
// column `first` on, with zeros outside the image. place(row, column) is the place of the chunk that starts `column`
// columns behind the first.
template <int SIZE, class T, class Place>
__device__ __forceinline__ void copy_rows(const Plan& p, const T* source, int rows, int first, int chunks,
                                          int lanes_log2, int lane, const Place& place) {
  const int chunk = lane & ((1 << lanes_log2) - 1), column = first + chunk * SIZE;
  if (chunk >= chunks) return;
  const int bytes = unsigned(column) < unsigned(p.w) ? 2 * SIZE : 0;
  int row = lane >> lanes_log2;
  const int step = 32 >> lanes_log2;
  source += (bytes != 0 ? column : 0) + row * p.w;
  if (p.pack == 1) {
#pragma unroll 1
    for (; row < rows; row += step, source += step * p.w) cp_async<2 * SIZE>(place(row, chunk * SIZE), source, bytes);
  } else {
    const int64_t gap = (p.c - 1) * (int64_t(p.h) * p.w);  // between the planes of one channel in neighbouring images
    for (; row < rows; row += step, source += step * p.w) {
      cp_async<2 * SIZE>(place(row, chunk * SIZE), source + image_of(p, row) * gap, bytes);
    }
  }
}

template <int SIZE, class T>
__device__ __forceinline__ void copy_d_rows(const Plan& p, const T* source, const Unit& u, T* tile, int lane) {
  copy_rows<SIZE>(p, source, u.images * u.rows, u.c0, p.d_chunks, p.d_lanes_log2, lane,
                  [&](int row, int column) { return tile + d_offset(p, row, column / 8) + column % 8; });
}

template <class T>
__device__ __forceinline__ void copy_unit(const Plan& p, const Arguments<T>& g, const Unit& u, int channel,
                                          const Tiles<T>& to, int lane) {
  const int64_t plane = (u.image * p.c + channel) * (int64_t(p.h) * p.w);
  // if units are whole rows, the zeros left of x_first stay
  copy_rows<kQuad>(p, g.x + plane + int64_t(u.x0) * p.w, u.images * u.x_rows, u.c0 - p.shift + p.x_first, p.x_chunks,
                   p.x_lanes_log2, lane,
                   [&](int row, int column) { return to.x + row * p.x_pitch + p.x_first + column; });
  const int64_t d_start = plane + int64_t(u.y0) * p.w;
  if (p.d_wide) {
    copy_d_rows<2 * kQuad>(p, g.dy + d_start, u, to.dy, lane);
    if (g.a != nullptr) copy_d_rows<2 * kQuad>(p, g.a + d_start, u, to.a, lane);
  } else {
    copy_d_rows<kQuad>(p, g.dy + d_start, u, to.dy, lane);
    if (g.a != nullptr) copy_d_rows<kQuad>(p, g.a + d_start, u, to.a, lane);
  }
}

// Span copies, for any W and alignment and units of full width: copies each image's `rows` rows as the 16-byte chunks
// that cover them. Chunk 0 holds the first element. The tensor ends at `end`.
template <class T>
__device__ __forceinline__ void copy_spans(const Plan& p, const T* source, const T* end, int images, int rows,
                                           T* target, int pitch, int lane) {
  const int64_t image_stride = p.c * (int64_t(p.h) * p.w);
  const int first = lane & ((1 << p.span_lanes_log2) - 1);
  for (int image = lane >> p.span_lanes_log2; image < images; image += 32 >> p.span_lanes_log2) {
    const char* start = reinterpret_cast<const char*>(source + image * image_stride);
    const int skipped = int(reinterpret_cast<uintptr_t>(start) & 15), bytes = skipped + 2 * rows * p.w;
    char* to = reinterpret_cast<char*>(target + image * pitch);
    for (int chunk = first; 16 * chunk < bytes; chunk += 1 << p.span_lanes_log2) {
      copy_span_piece(to + 16 * chunk, reinterpret_cast<const T*>(start - skipped + 16 * chunk), end);
    }
  }
}

template <class T>
__device__ __forceinline__ void copy_unit_spans(const Plan& p, const Arguments<T>& g, const Unit& u, int channel,
                                                T* spans, int lane) {
  const int64_t plane = (u.image * p.c + channel) * (int64_t(p.h) * p.w);
  const int64_t d_start = plane + int64_t(u.y0) * p.w, total = p.n * p.c * p.h * p.w;
  copy_spans(p, g.x + plane + int64_t(u.x0) * p.w, g.x + total, u.images, u.x_rows, spans, p.x_span, lane);
  spans += p.pack * p.x_span;
  copy_spans(p, g.dy + d_start, g.dy + total, u.images, u.rows, spans, p.d_span, lane);
  if (g.a != nullptr) {
    copy_spans(p, g.a + d_start, g.a + total, u.images, u.rows, spans + p.pack * p.d_span, p.d_span, lane);
  }
}

// Moves rows from the spans to place(row, column), four elements a lane, with zeros behind the last column.
template <class T, class Place>
__device__ __forceinline__ void place_rows(const Plan& p, const T* source, const T* spans, int span, int rows,
                                           int image_rows, int lane, const Place& place) {
  const int column = (lane & ((1 << p.x_lanes_log2) - 1)) * kQuad, left = p.w - column;
  if (left <= 0) return;
  const uint32_t mask[2] = {left >= 2 ? 0xffffffffu : 0xffffu, left >= 4 ? 0xffffffffu : left == 3 ? 0xffffu : 0u};
  const int64_t image_stride = p.c * (int64_t(p.h) * p.w);
  for (int row = lane >> p.x_lanes_log2; row < rows; row += 32 >> p.x_lanes_log2) {
    const int image = image_of(p, row);
    const int skipped = int(reinterpret_cast<uintptr_t>(source + image * image_stride) & 15) / 2;
    const int element = skipped + (row - image * image_rows) * p.w + column;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(spans + image * span) + (element >> 1);
    const uint32_t w0 = words[0], w1 = words[1], w2 = words[2], select = element & 1 ? 0x5432u : 0x3210u;
    *reinterpret_cast<uint2*>(place(row, column)) =
        make_uint2(__byte_perm(w0, w1, select) & mask[0], __byte_perm(w1, w2, select) & mask[1]);
  }
}

template <class T>
__device__ __forceinline__ void place_d_rows(const Plan& p, const T* source, const T* spans, const Unit& u, T* tile,
                                             int lane) {
  place_rows(p, source, spans, p.d_span, u.images * u.rows, u.rows, lane,
             [&](int row, int column) { return tile + d_offset(p, row, column / 8) + column % 8; });
}

template <class T>
__device__ __forceinline__ void place_unit(const Plan& p, const Arguments<T>& g, const Unit& u, int channel,
                                           const T* spans, const Tiles<T>& to, int lane) {
  const int64_t plane = (u.image * p.c + channel) * (int64_t(p.h) * p.w), d_start = plane + int64_t(u.y0) * p.w;
  place_rows(p, g.x + plane + int64_t(u.x0) * p.w, spans, p.x_span, u.images * u.x_rows, u.x_rows, lane,
             [&](int row, int column) { return to.x + row * p.x_pitch + p.shift + column; });
  spans += p.pack * p.x_span;
  place_d_rows(p, g.dy + d_start, spans, u, to.dy, lane);
  if (g.a != nullptr) place_d_rows(p, g.a + d_start, spans + p.pack * p.d_span, u, to.a, lane);
}

// b = da from the fragments of dy and a, for `rows` of the K step and `columns` of the tiles, 0 in the padding: dy and
// a are 0 there, so that da is 0 too if the offset is left out.
template <int ACT, bool FULL, class T>
__device__ __forceinline__ void grad_fragments(const GradInput& g, const GradCoefficients& k, int rows, int columns,
                                               int tiles, uint32_t (&b)[kColumnTiles][2],
                                               const uint32_t (&a)[kColumnTiles][2], float& db, int lane) {
  const int rows_left = rows - 2 * (lane & 3), columns_left = columns - (lane >> 2);
#pragma unroll
  for (int t = 0; t < kColumnTiles; ++t) {
    if (FULL || t < tiles) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 dy = unpack2<T>(b[t][h]), pre = unpack2<T>(a[t][h]);
        const float offset_low = FULL || (8 * t < columns_left && 8 * h < rows_left) ? k.offset : 0.f;
        const float offset_high = FULL || (8 * t < columns_left && 8 * h + 1 < rows_left) ? k.offset : 0.f;
        const float low = grad_of<ACT>(g, k, offset_low, dy.x, pre.x);
        const float high = grad_of<ACT>(g, k, offset_high, dy.y, pre.y);
        db += low + high;
        b[t][h] = pack2<T>(low, high);
      }
    }
  }
}

// Computes da, G += x^T da and db += da of one unit in shared memory.
template <class T, int ROWS>
__device__ __forceinline__ void compute_unit(const Plan& p, const GradInput& g, const GradCoefficients& k,
                                             const Unit& u, const Tiles<T>& from, const T* zeros,
                                             float (&acc)[ROWS][1][4], float& db, int lane) {
  const int rows = u.images * u.rows, tiles = (u.cols + 7) / 8;
#pragma unroll 1
  for (int first_row = 0; first_row < rows; first_row += 16) {
    const LaneRow x_row = lane_row(p, u, first_row / 16, 0, p.kh, lane);
    const int d_row = first_row + (lane & 15);
    const bool padding = d_row >= rows;
    const LaneFragment d_lane = lane_fragment(p, d_row, padding, lane);
#pragma unroll 1
    for (int first_tile = 0; first_tile < tiles; first_tile += kColumnTiles) {
      const int count = min(kColumnTiles, tiles - first_tile), columns = u.cols - 8 * first_tile;
      uint32_t b[kColumnTiles][2], a[kColumnTiles][2];
      load_fragments(padding ? zeros : from.dy, d_lane, first_tile, count, b);
      if (g.has_a) {
        load_fragments(padding ? zeros : from.a, d_lane, first_tile, count, a);
        dispatch_activation(g.activation, [&](auto act) {
          if (count == kColumnTiles && columns >= 8 * kColumnTiles && rows - first_row >= 16) {
            grad_fragments<decltype(act)::value, true, T>(g, k, 0, 0, 0, b, a, db, lane);
          } else {
            grad_fragments<decltype(act)::value, false, T>(g, k, rows - first_row, columns, count, b, a, db, lane);
          }
        });
      } else {
        // da = dy: the padding is zero
#pragma unroll
        for (int t = 0; t < kColumnTiles; ++t) {
          if (t < count) {
            const float2 low = unpack2<T>(b[t][0]), high = unpack2<T>(b[t][1]);
            db += (low.x + low.y) + (high.x + high.y);
          }
        }
      }
      accumulate_tiles<T>(count, acc, b, from.x + 8 * first_tile, zeros, x_row, p.x_pitch);
    }
  }
}

// DIRECT: shared memory holds two units of tiles. Otherwise two units of spans, and one of tiles.
template <class T, bool DIRECT, int ROWS>
__global__ void __launch_bounds__(32 * kWarpKernelWarps, DIRECT ? 4 : 3)
    warp_kernel(const Plan p, const Arguments<T> g) {
  DYN_SHARED(T, shared);
  SHARED_ARRAY(float, db_parts, kWarpKernelWarps);
  const int lane = threadIdx.x & 31;
  // the broadcast tells the compiler that the value is the same in all lanes of a warp
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x >> 5), 0);
  // `slices` warps share a channel
  const int own_channel = blockIdx.x * p.channels + warp / p.slices;
  const int step = gridDim.y * p.slices;
  // a warp without a channel has no units
  const int first = own_channel < p.c ? blockIdx.y * p.slices + warp % p.slices : p.units;

  T* zeros = shared;  // one x row
  T* own = shared + p.x_pitch + warp * p.warp_elements;
  const int tile_elements = p.x_rows * p.x_pitch + 2 * p.d_rows * p.d_pitch;
  for (int i = threadIdx.x; i < p.x_pitch; i += blockDim.x) zeros[i] = from_float<T>(0.f);
  // the tiles' padding columns stay zero
  for (int i = lane * 8; i < (DIRECT ? 2 : 1) * tile_elements; i += 32 * 8) {
    *reinterpret_cast<uint4*>(own + i) = make_uint4(0, 0, 0, 0);
  }
  const GradCoefficients k = grad_coefficients(g.grad, min(own_channel, int(p.c) - 1));
  __syncthreads();

  float acc[ROWS][1][4] = {};
  float db = 0.f;
  T* spans = own + tile_elements;
  const int span_elements = p.pack * (p.x_span + 2 * p.d_span);
#pragma unroll 1
  for (int stage = 0; stage < 2; ++stage) {
    const int index = first + stage * step;
    if (index < p.units) {
      if constexpr (DIRECT) {
        copy_unit(p, g, unit_at(p, index), own_channel, tiles_at(p, own + stage * tile_elements), lane);
      } else {
        copy_unit_spans(p, g, unit_at(p, index), own_channel, spans + stage * span_elements, lane);
      }
    }
    cp_async_commit();
  }
  int stage = 0;
#pragma unroll 1
  for (int index = first; index < p.units; index += step) {
    const Unit u = unit_at(p, index);
    const int next = index + 2 * step;
    cp_async_wait<1>();
    __syncwarp();
    if constexpr (DIRECT) {
      const Tiles<T> tiles = tiles_at(p, own + stage * tile_elements);
      compute_unit(p, g.grad, k, u, tiles, zeros, acc, db, lane);
      __syncwarp();
      if (next < p.units) copy_unit(p, g, unit_at(p, next), own_channel, tiles, lane);
    } else {
      T* span = spans + stage * span_elements;
      place_unit(p, g, u, own_channel, span, tiles_at(p, own), lane);
      __syncwarp();
      if (next < p.units) copy_unit_spans(p, g, unit_at(p, next), own_channel, span, lane);
      compute_unit(p, g.grad, k, u, tiles_at(p, own), zeros, acc, db, lane);
      __syncwarp();
    }
    cp_async_commit();
    stage ^= 1;
  }
  cp_async_wait<0>();
  __syncthreads();

  const int taps = p.kh * p.kw;
  float* scratch = reinterpret_cast<float*>(shared) + warp * 128;
  float* sums = reinterpret_cast<float*>(shared) + kWarpKernelWarps * 128;  // [warps][taps]
  diagonal_sums(acc, scratch, sums + warp * taps, p.kw, p.skew, p.kh, lane);
  db = warp_sum(db);
  if (lane == 0) db_parts[warp] = db;
  __syncthreads();
  const int64_t first_channel = int64_t(blockIdx.x) * p.channels;
  const int channels = int(min(int64_t(p.channels), p.c - first_channel));
  float* part = g.partials + (int64_t(blockIdx.y) * p.c + first_channel) * (taps + 1);
  for (int i = threadIdx.x; i < channels * (taps + 1); i += blockDim.x) {
    const int local = i / (taps + 1), tap = i - local * (taps + 1);
    float sum = 0.f;
    for (int s = local * p.slices; s < (local + 1) * p.slices; ++s)
      sum += tap < taps ? sums[s * taps + tap] : db_parts[s];
    part[i] = sum;
  }
}

}  // namespace weight_grad
}  // namespace convmixer

// SPDX-License-Identifier: MIT
// The contiguous (N, C, H, W) kernel of depthwise_mma.cuh. An item is some images of a channel, or a band of rows and
// columns of one image. The grid has as many blocks of 4 warps as run at once. Each takes an equal run of the items of
// all channels, channel by channel: starting a block anew every 8 items costs a fifth of the time (H100).
// There are three stages of the input tile: two are being copied while one is computed, also across channels, with one
// barrier an item. In the input gradient each thread turns dy and a into da in place, in the 16-byte pieces that it
// copied. Outputs go through a strip of shared memory and are stored by 16 bytes.
// If W is even but no multiple of 8, copies and stores have 8 or 4 bytes: four copies of 4 bytes cost 16 instructions a
// piece, a span 35. If W is odd, spans (spans.cuh) are copied, in two stages, and then moved to one tile, which needs a
// second barrier an item; neighbouring lanes store neighbouring values.
#pragma once
#include "depthwise_mma.cuh"
#include "spans.cuh"

namespace convmixer {
namespace mma {

constexpr int kContiguousWarps = 4;
constexpr int kSpanStages = kStages - 1;

// Blocks on a multiprocessor for which registers are limited.
__host__ __device__ constexpr int contiguous_blocks(bool grad, int kernel_rows, bool from_sm_90) {
  return !grad && kernel_rows == 9 && from_sm_90 ? 5 : 4;
}

__host__ __device__ constexpr int round_up_to(int a, int b) { return (a + b - 1) / b * b; }

// A warp's output strip of 16 rows. Its pitch is an odd number of 16-byte pieces, which avoids bank conflicts.
template <int NT, bool SINGLE>
struct OutputStrip {
  static constexpr int pieces = SINGLE ? NT : NT + 1;  // 16-byte pieces at multiples of 8 columns
  static constexpr int pitch = 16 * (pieces | 1);
  static constexpr int bytes = 16 * pitch;
};

// 16 bytes of an item's input. `place`: its image (8 bits), how many of its 8 values lie in the image (8 bits), its
// place in the stage (16 bits). `distance`: bytes from the item's first plane. If plan.pieces > 0 they are the same for
// every item.
struct alignas(8) Piece {
  uint32_t place, distance;
};
// The pieces of the first `images` images have a place below this.
__device__ __forceinline__ uint32_t place_limit(int images) {
  return images > 255 ? 0xffffffffu : static_cast<uint32_t>(images) << 24;
}

template <bool SINGLE>
__device__ void list_pieces(const Plan& plan, Piece* pieces) {
  for (int q = threadIdx.x; q < plan.pieces; q += 32 * kContiguousWarps) {
    uint32_t chunk, row;
    const uint32_t image = plan.by_copy_rows.divmod(plan.by_copy_chunks.divmod(q, chunk), row);
    const uint32_t offset = image * plan.plane_bytes + (row + plan.row_lo) * plan.pitch + (chunk + plan.chunk_lo) * 16;
    const int x = 8 * chunk, count = min(8, plan.w - x);
    pieces[q] = {image << 24 | static_cast<uint32_t>(count) << 16 | offset,
                 2 * ((image * plan.c * plan.h + row) * plan.w + x)};
  }
}

// Calls f(offset, index, count) for each 16-byte piece of an item that this thread copies: `count` of the 8 values,
// from element `index` on, lie in the image.
template <int S, bool SINGLE, class F>
__device__ __forceinline__ void for_each_piece(const Plan& plan, const Piece* pieces, const Item& item, int c, F&& f) {
  if (plan.pieces > 0) {
    const int64_t base = (static_cast<int64_t>(item.image) * plan.c + c) * plan.h * plan.w;
    const uint32_t limit = place_limit(plan.n - item.image);
    for (int q = threadIdx.x; q < plan.pieces; q += 32 * kContiguousWarps) {
      const Piece piece = pieces[q];
      if (piece.place < limit) f(piece.place & 0xffff, base + piece.distance / 2, piece.place >> 16 & 0xff);
    }
    return;
  }
  const int total = plan.images * plan.row_count * plan.chunk_count;
  for (int q = threadIdx.x; q < total; q += 32 * kContiguousWarps) {
    uint32_t chunk, row;
    const uint32_t rest = plan.by_copy_chunks.divmod(q, chunk);
    const int image = plan.by_copy_rows.divmod(rest, row);
    chunk += plan.chunk_lo;
    row += plan.row_lo;
    const int n = item.image + image, y = item.row + static_cast<int>(row) - plan.top;
    const int x = SINGLE ? 8 * chunk : item.column + 8 * (static_cast<int>(chunk) - S);
    const bool inside = n < plan.n && y >= 0 && y < plan.h && x >= 0 && x < plan.w;
    const int64_t index = ((static_cast<int64_t>(n) * plan.c + c) * plan.h + y) * plan.w + x;
    f(image * plan.plane_bytes + static_cast<int>(row) * plan.pitch + static_cast<int>(chunk) * 16, index,
      inside ? min(8, plan.w - x) : 0);
  }
}

template <class T>
__device__ __forceinline__ void copy_piece(unsigned char* to, const T* from, int64_t index, int count, int granule) {
  if (granule == 8) {
    cp_async<16>(to, count > 0 ? from + index : from, count > 0 ? 16 : 0);
  } else if (granule == 4) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) cp_async<8>(to + 2 * i, i < count ? from + index + i : from, i < count ? 8 : 0);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i += 2) cp_async<4>(to + 2 * i, i < count ? from + index + i : from, i < count ? 4 : 0);
  }
}

// For odd W, a span of an item: all its rows of one image or, if it is a tile of columns, its part of one row.
struct Span {
  int64_t start;  // element
  int length;     // 0: outside the tensor
};
template <int S, bool SINGLE>
__device__ __forceinline__ Span span_of(const Plan& plan, const Item& item, int c, int index) {
  if (SINGLE || plan.column_tiles == 1) {
    const int n = item.image + index, first = max(0, item.row - plan.top);
    const int last = min(plan.h, item.row - plan.top + plan.tile_rows);
    return {((static_cast<int64_t>(n) * plan.c + c) * plan.h + first) * plan.w,
            n < plan.n ? (last - first) * plan.w : 0};
  }
  const int y = item.row - plan.top + index, first = max(0, item.column - 8 * S);
  const int last = min(plan.w, item.column + 8 * (plan.chunks - S));
  return {((static_cast<int64_t>(item.image) * plan.c + c) * plan.h + y) * plan.w + first,
          y >= 0 && y < plan.h ? last - first : 0};
}

template <class T, int S, bool SINGLE>
__device__ __forceinline__ void copy_spans(const Plan& plan, const Item& item, int c, const T* from,
                                           unsigned char* raw) {
  for (int q = threadIdx.x; q < plan.spans * plan.span_pieces; q += 32 * kContiguousWarps) {
    uint32_t piece;
    const Span span = span_of<S, SINGLE>(plan, item, c, plan.by_span_pieces.divmod(q, piece));
    const int64_t at = (span.start & ~int64_t(7)) + 8 * static_cast<int>(piece);
    if (span.length > 0 && at < span.start + span.length) copy_span_piece(raw + 16 * q, from + at, from + plan.total);
  }
}

// Moves values from the spans to the tiles: x (dy) and, in the input gradient, da behind it.
template <class T, int S, bool SINGLE>
__device__ __forceinline__ void place_spans(const Plan& plan, const Item& item, int c, const unsigned char* raw,
                                            const unsigned char* raw_a, unsigned char* x_tile, unsigned char* da_tile,
                                            const Affine& k, int activation) {
  const int total = plan.images * plan.row_count * plan.chunk_count;
  for (int q = threadIdx.x; q < total; q += 32 * kContiguousWarps) {
    uint32_t chunk, row;
    const int image = plan.by_copy_rows.divmod(plan.by_copy_chunks.divmod(q, chunk), row);
    chunk += plan.chunk_lo;
    row += plan.row_lo;
    const int y = item.row + static_cast<int>(row) - plan.top;
    const int x = SINGLE ? 8 * chunk : item.column + 8 * (static_cast<int>(chunk) - S);
    const bool inside = item.image + image < plan.n && y >= 0 && y < plan.h && x >= 0 && x < plan.w;
    const int offset = image * plan.plane_bytes + static_cast<int>(row) * plan.pitch + static_cast<int>(chunk) * 16;
    const int count = min(8, plan.w - x);
    uint4 v = make_uint4(0, 0, 0, 0), da = v;
    if (inside) {
      const bool whole = SINGLE || plan.column_tiles == 1;
      const int index = whole ? image : static_cast<int>(row);
      const Span span = span_of<S, SINGLE>(plan, item, c, index);
      const int first = (static_cast<int>(span.start) & 7) +
                        (whole ? (y - max(0, item.row - plan.top)) * plan.w + x : x - max(0, item.column - 8 * S));
      const int span_offset = 16 * plan.span_pieces * index;
      v = load_from_span(raw + span_offset, first, count);
      if (raw_a != nullptr) {
        da = grad_through_block<T>(v, load_from_span(raw_a + span_offset, first, count), k, activation);
        da = keep_first(da, count);
      }
    }
    store16(x_tile + offset, v);
    if (raw_a != nullptr) store16(da_tile + offset, da);
  }
}

// Stores values [from, to) of 8 staged outputs; both are multiples of the granule.
template <class T>
__device__ __forceinline__ void store_piece(T* to, uint4 v, int from, int end, int granule) {
  if (granule >= 4) {
    if (granule == 8 && from == 0 && end == 8) {
      store16(to, v);
    } else {
      if (from == 0 && end >= 4) *reinterpret_cast<uint2*>(to) = make_uint2(v.x, v.y);
      if (end == 8) *reinterpret_cast<uint2*>(to + 4) = make_uint2(v.z, v.w);
    }
  } else {
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; i += 2)
      if (i >= from && i < end) *reinterpret_cast<uint32_t*>(to + i) = w[i / 2];
  }
}

template <class T, bool GRAD, int S, int KH, int NT, bool SINGLE>
__global__ void __launch_bounds__(32 * kContiguousWarps, contiguous_blocks(GRAD, KH, kFromSm90))
    contiguous_kernel(const __grid_constant__ Args p) {
  using Strip = OutputStrip<NT, SINGLE>;
  DYN_SHARED(unsigned char, shared);
  const Plan& plan = p.plan;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const bool transforms = GRAD && p.a != nullptr;
  const T* x = static_cast<const T*>(p.x);
  const T* a = static_cast<const T*>(p.a);
  const bool spans = plan.spans > 0;
  // all items are alike and aligned: copies and stores follow the list of pieces
  const bool listed = plan.pieces > 0 && plan.granule == 8;
  unsigned char* const strips = shared + plan.strips_at;
  unsigned char* const strip_out = strips + warp * Strip::bytes;
  Piece* const pieces = reinterpret_cast<Piece*>(strips + kContiguousWarps * Strip::bytes);
  T* const table = reinterpret_cast<T*>(pieces + plan.pieces);
  // moments are in shared memory: registers are scarce
  const auto moments_of_thread = [&] {
    return reinterpret_cast<Moments*>(reinterpret_cast<unsigned char*>(table) + plan.table_bytes) + threadIdx.x;
  };

  const int to_clear = static_cast<int>(reinterpret_cast<unsigned char*>(pieces) - shared);
  for (int i = 16 * threadIdx.x; i < to_clear; i += 16 * 32 * kContiguousWarps)
    store16(shared + i, make_uint4(0, 0, 0, 0));
  list_pieces<SINGLE>(plan, pieces);
  // each use reads it from shared memory: kept, it would take registers from the main loop
  SHARED_ARRAY(Affine, affine_of_channel, 1);
  const Affine& affine = affine_of_channel[0];
  // the place of this lane's pairs of row g in the strip: tile j at 16 j, but tile 0 of SINGLE is split over both edges
  uint32_t* const strip_pair = reinterpret_cast<uint32_t*>(strip_out + g * Strip::pitch + 4 * t + (SINGLE ? -8 : 8));
  uint32_t* const strip_pair0 = strip_pair + (SINGLE && t < 2 ? 4 * NT : 0);
  // after this barrier the tiles are clear and copies may land
  __syncthreads();

  // the byte at which an item's first plane starts, if all items are alike
  const auto first_plane = [&](int c, int item) { return item * plan.item_step + c * plan.plane_step; };
  const int64_t a_distance = transforms ? reinterpret_cast<intptr_t>(p.a) - reinterpret_cast<intptr_t>(p.x) : 0;

  const auto copy = [&](int c, int item, int stage) {
    if (listed) {
      const uint32_t limit = place_limit(plan.n - item * plan.images);
      unsigned char* const to = shared + stage * plan.tile_bytes;
      const unsigned char* const from = static_cast<const unsigned char*>(p.x) + first_plane(c, item);
#pragma unroll 2
      for (int q = threadIdx.x; q < plan.pieces; q += 32 * kContiguousWarps) {
        const Piece piece = pieces[q];
        if (piece.place >= limit) continue;
        cp_async<16>(to + (piece.place & 0xffff), from + piece.distance);
        if (transforms) cp_async<16>(to + plan.a_offset + (piece.place & 0xffff), from + a_distance + piece.distance);
      }
    } else if (spans) {
      const Item at = locate(plan, item);
      copy_spans<T, S, SINGLE>(plan, at, c, x, shared + stage * plan.raw_bytes);
      if (transforms) copy_spans<T, S, SINGLE>(plan, at, c, a, shared + (kSpanStages + stage) * plan.raw_bytes);
    } else {
      unsigned char* const to = shared + stage * plan.tile_bytes;
      for_each_piece<S, SINGLE>(plan, pieces, locate(plan, item), c, [&](int offset, int64_t index, int count) {
        copy_piece(to + offset, x, index, count, plan.granule);
        if (transforms) copy_piece(to + plan.a_offset + offset, a, index, count, plan.granule);
      });
    }
  };

  // this block's run: the items from `current` to before `stop`, both counted from the first item of channel c
  int c, current, stop;
  {
    const int64_t first = blockIdx.x * plan.run, left = static_cast<int64_t>(plan.c) * plan.items - first;
    c = static_cast<int>(first / plan.items);
    current = static_cast<int>(first - static_cast<int64_t>(c) * plan.items);
    stop = current + static_cast<int>(min(plan.run, left));
  }
  // copies the item `ahead` of the current one, which may belong to a later channel
  const auto copy_ahead = [&](int ahead, int stage) {
    if (current + ahead < stop) {
      int channel = c, item = current + ahead;
      while (item >= plan.items) item -= plan.items, ++channel;
      copy(channel, item, stage);
    }
    cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) copy_ahead(s, s);

  uint32_t trace = 0;
  int stage = 0;
  for (; stop > 0; ++c, current = 0, stop -= plan.items) {
    // the first copies are under way; no warp reads the table of the channel before any more
    build_table<T, GRAD, S>(table, p, c, KH > 0 ? KH : plan.kh, threadIdx.x, 32 * kContiguousWarps);
    if (threadIdx.x == 0) affine_of_channel[0] = load_affine<T, GRAD>(p, c);
    __syncthreads();
    uint32_t fixed[KH > 0 ? KH : 1][2 * S];
    if constexpr (KH > 0) {
#pragma unroll
      for (int i = 0; i < KH; ++i) load_toeplitz<T, S>(fixed[i], table, i, lane);
    }
    if (!GRAD && p.partials != nullptr) *moments_of_thread() = {0.f, 0.f, 0.f};
    for (; current < min(plan.items, stop); ++current) {
      const Item kept = locate(plan, current);
      const uint32_t kept_limit = place_limit(plan.n - kept.image);
      const auto here = [&] { return kFromSm90 ? kept : locate(plan, current); };
      const auto last = [&] { return kFromSm90 ? kept_limit : place_limit(plan.n - here().image); };
      unsigned char* const x_tile = shared + plan.tiles_at + stage * plan.tile_step;
      unsigned char* const tile = x_tile + (transforms ? plan.a_offset : 0);
      cp_async_wait<kStages - 2>();
      if (spans) {
        // after this barrier all pieces are there, and every warp is done with the tiles
        __syncthreads();
        const unsigned char* const raw = shared + stage * plan.raw_bytes;
        place_spans<T, S, SINGLE>(plan, here(), c, raw, transforms ? raw + kSpanStages * plan.raw_bytes : nullptr,
                                  x_tile, tile, affine, p.activation);
      } else if (transforms) {
        const Affine k = affine;
        for_each_piece<S, SINGLE>(plan, pieces, here(), c, [&](int offset, int64_t, int count) {
          uint4 da = make_uint4(0, 0, 0, 0);
          if (count > 0) {
            da = grad_through_block<T>(load16(x_tile + offset), load16(tile + offset), k, p.activation);
            da = keep_first(da, count);
          }
          store16(tile + offset, da);
        });
      }
      // this barrier also tells that no warp reads the stage that the next copy fills
      __syncthreads();
      copy_ahead(kStages - 1, spans ? stage : stage == 0 ? kStages - 1 : stage - 1);

      for (int unit = warp; unit < plan.strips * plan.groups; unit += kContiguousWarps) {
        uint32_t group = 0;
        const int strip = SINGLE ? unit : static_cast<int>(plan.by_groups.divmod(unit, group));
        const int count = plan.images * plan.rows;
        uint32_t y;
        const int image = plan.by_rows.divmod(min(16 * strip + (lane & 15), count - 1), y);
        const int pitch = SINGLE ? 16 * (NT | 1) : plan.pitch;
        const int offset = image * plan.plane_bytes + static_cast<int>(y) * pitch + 16 * NT * static_cast<int>(group) +
                           16 * (lane >> 4);
        float acc[NT][4];
        convolve<T, S, KH, NT, SINGLE>(acc, tile + offset, pitch, plan.kh, fixed, table, affine.bias, lane);
        if (!GRAD && p.partials == nullptr) apply_block(acc, affine, p.activation);
        if (p.residual) {
          Unit<T, S, NT, SINGLE> inputs;
          inputs.load(x_tile + offset + plan.top * pitch);
          inputs.add_identity(acc, lane);
        }
        uint32_t words[NT][2];
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            words[j][i] = pack2<T>(acc[j][2 * i], acc[j][2 * i + 1]);
            (j == 0 ? strip_pair0 : strip_pair)[4 * j + 2 * i * Strip::pitch] = words[j][i];
          }
        if (!GRAD && p.partials != nullptr) {
          const Item item = here();
          const bool all = SINGLE && plan.w == 8 * NT && 16 * strip + 16 <= count &&
                           item.image + plan.images <= plan.n && item.row + plan.rows <= plan.h;
          uint32_t valid = 0;
#pragma unroll
          for (int i = 0; i < 2 && !all; ++i) {
            uint32_t row;
            const int v = 16 * strip + g + 8 * i, n = item.image + static_cast<int>(plan.by_rows.divmod(v, row));
            if (v >= count || n >= plan.n || item.row + static_cast<int>(row) >= plan.h) continue;
#pragma unroll
            for (int j = 0; j < NT; ++j) {
              const int column = !SINGLE ? item.column + 8 * (NT * static_cast<int>(group) + j) - 4 + 2 * t
                                         : (j > 0 || t >= 2 ? 8 * j - 4 + 2 * t : 8 * NT - 4 + 2 * t);
              if (column >= 0 && column < plan.w) valid |= 1u << (4 * j + 2 * i);
              if (column >= 0 && column + 1 < plan.w) valid |= 2u << (4 * j + 2 * i);
            }
          }
          add_moments<T, NT>(*moments_of_thread(), words, all, valid, p.activation);
        }
        __syncwarp();
        if (SINGLE && listed) {
          const uint32_t limit = last();
          unsigned char* const y_first = static_cast<unsigned char*>(p.y) + first_plane(c, current);
#pragma unroll
          for (int k = 0; k < (16 * NT + 31) / 32; ++k) {
            const int q = lane + 32 * k, row = q / NT, block = q % NT;
            const int entry = (16 * strip + row) * plan.chunk_count + block;
            if ((16 * NT < 32 && q >= 16 * NT) || block >= plan.chunk_count || entry >= plan.pieces) continue;
            const Piece piece = pieces[entry];
            if (piece.place >= limit) continue;
            const uint4 out = load16(strip_out + row * Strip::pitch + 16 * block);
            trace = trace_finite16<T>(trace, out);
            store16(y_first + piece.distance, out);
          }
          __syncwarp();
          continue;
        }
        if (spans) {
          const Item item = here();
          // the strip's columns, without the halves that belong to its neighbours
          constexpr int kColumns = 8 * NT, kRows = 32 / kColumns;
          const int x = lane % kColumns + (SINGLE ? 0 : item.column + kColumns * static_cast<int>(group) - 4);
#pragma unroll 4
          for (int r = lane / kColumns; r < 16; r += kRows) {
            uint32_t row;
            const int v = 16 * strip + r, n = item.image + static_cast<int>(plan.by_rows.divmod(v, row));
            row += item.row;
            if (v >= count || n >= plan.n || static_cast<int>(row) >= plan.h || static_cast<unsigned>(x) >= plan.w)
              continue;
            const uint16_t out =
                reinterpret_cast<const uint16_t*>(strip_out + r * Strip::pitch + (SINGLE ? 0 : 8))[lane % kColumns];
            trace = trace_finite<T>(trace, out);
            const int64_t plane = static_cast<int64_t>(n) * plan.c + c;
            static_cast<uint16_t*>(p.y)[(plane * plan.h + row) * plan.w + x] = out;
          }
          __syncwarp();
          continue;
        }
        const Item item = here();
        const uint32_t limit = last();
#pragma unroll
        for (int q = lane; q < round_up_to(16 * Strip::pieces, 32); q += 32) {
          const int r = q / Strip::pieces, piece = q % Strip::pieces, v = 16 * strip + r;
          const int block = SINGLE ? piece : NT * static_cast<int>(group) + piece - 1;
          const int from = !SINGLE && piece == 0 ? 4 : 0;
          int to = !SINGLE && piece == NT ? 4 : 8;
          int64_t index;
          if (q >= 16 * Strip::pieces || v >= count) continue;
          if (plan.pieces > 0) {
            if (block < 0 || block >= plan.chunk_count) continue;
            const Piece entry = pieces[v * plan.chunk_count + block];
            if (entry.place >= limit) continue;
            index = (static_cast<int64_t>(item.image) * plan.c + c) * plan.h * plan.w + entry.distance / 2;
            to = min(to, static_cast<int>(entry.place >> 16 & 0xff));
          } else {
            uint32_t row;
            const int n = item.image + static_cast<int>(plan.by_rows.divmod(v, row));
            const int out_y = item.row + static_cast<int>(row), first = item.column + 8 * block;
            if (n >= plan.n || out_y >= plan.h || first < 0) continue;
            index = ((static_cast<int64_t>(n) * plan.c + c) * plan.h + out_y) * plan.w + first;
            to = min(to, plan.w - first);
          }
          if (from >= to) continue;
          const uint4 out = load16(strip_out + r * Strip::pitch + 16 * piece);
          trace = trace_finite16<T>(trace, out);
          store_piece(static_cast<T*>(p.y) + index, out, from, to, plan.granule);
        }
        __syncwarp();
      }
      stage = stage == (spans ? kSpanStages : kStages) - 1 ? 0 : stage + 1;
    }

    // after this barrier no warp reads the table and the strips
    const int64_t before = static_cast<int64_t>(c) * plan.items;
    if (__syncthreads_or(!was_finite<T>(trace))) {
      const int first = static_cast<int>(max(int64_t(0), blockIdx.x * plan.run - before));
      settle_nan<T, GRAD, false>(p, c, first, current, 1, threadIdx.x, 32 * kContiguousWarps);
    }
    if (!GRAD && p.partials != nullptr) {
      Moments moments = warp_merge(*moments_of_thread());
      Moments* const of_warps = reinterpret_cast<Moments*>(strips);
      if (lane == 0) of_warps[warp] = moments;
      __syncthreads();
      if (threadIdx.x == 0) {
        for (int i = 1; i < kContiguousWarps; ++i) moments = merge(moments, of_warps[i]);
        // this block's place among those that share the channel; the one that ends the channel clears unused places
        const int place = static_cast<int>(blockIdx.x - before / plan.run);
        float* const out = p.partials + static_cast<int64_t>(c) * plan.splits * 3;
        for (int i = place; i < (current == plan.items ? plan.splits : place + 1); ++i, moments = {0.f, 0.f, 0.f}) {
          out[3 * i] = moments.count;
          out[3 * i + 1] = moments.mean;
          out[3 * i + 2] = moments.m2;
        }
      }
    }
    trace = 0;
  }
}

}  // namespace mma
}  // namespace convmixer

// SPDX-License-Identifier: MIT
// Host side of depthwise_mma.cuh: how a tensor is cut into items, and which instantiation runs it. The plan depends on
// the shape, so that the number of partials and the bits of the result do not depend on the GPU. There are two
// exceptions: channels_last takes 16 channels a block (32 bytes a pixel, a whole sector) if the shared memory of two
// blocks fits, else 8; and if a plan needs more shared memory than the GPU has, the FMA kernels run.
#pragma once
#include "depthwise_mma_channels_last.cuh"
#include "depthwise_mma_contiguous.cuh"

namespace convmixer {
namespace mma {

// The largest kernels. A tile of 16 rows has the rows of the kernel beside it, three times: of 63 x 63 94 KB. In
// channels_last every channel of a block has a tile; for larger kernels the caller makes the tensor contiguous, which
// takes a few percent of their time. By the products of a tile, S for each kernel row, 51 x 51 should take 2.2 times as
// long as 31 x 31 and 63 x 63 3.4 times, for 2.7 and 4.1 times as many taps.
constexpr int kLargestChannelsLast = 31, kLargestContiguous = 63;

// S: 16-column steps of the window. KH: kernel rows whose Toeplitz fragments are kept in registers; 0: any number of
// rows, with fragments read from shared memory. NT: tiles of 8 columns that a warp computes at a time.
struct Variant {
  int s, kh, nt, channels;
  bool single;
};

// False if no tensor-core kernel fits (float32, shared memory, grid).
inline bool make_plan(const Shape& s, int kh, int kw, bool grad, bool transforms, Plan& q, Variant& v) {
  const int largest = s.channels_last ? kLargestChannelsLast : kLargestContiguous;
  if (s.dtype == kFloat32 || kh > largest || kw > largest || s.n > 1 << 28 || s.c > 1 << 28) return false;
  q = Plan();
  q.n = static_cast<int>(s.n), q.c = static_cast<int>(s.c), q.h = s.h, q.w = s.w, q.kh = kh, q.kw = kw;
  q.total = s.n * s.c * s.h * s.w;
  q.top = grad ? kh / 2 : (kh - 1) / 2;
  q.left = grad ? kw / 2 : (kw - 1) / 2;
  v.s = kw <= 9 ? 1 : (kw + 22) / 16;
  const int blocks = (s.w + 7) / 8;
  v.kh = kw > 9 || kh > 9 ? 0 : kh <= 7 && blocks > 2 ? 7 : 9;
  const int kernel_rows = v.kh > 0 ? v.kh : kh;
  v.single = blocks <= 4 && (v.kh > 0 || v.s > 1);
  v.nt = v.single && v.kh > 0 ? (blocks <= 2 ? blocks : 4) : 4;
  const int tiles = v.single ? v.nt : round_up_to((s.w + 4 + 7) / 8, v.nt);
  q.tiles = v.single ? v.nt : std::min(tiles, s.channels_last ? v.nt : 16);
  q.column_tiles = (tiles + q.tiles - 1) / q.tiles;
  q.chunks = v.single ? q.tiles : q.tiles + 2 * v.s - 1;
  q.pitch = 16 * (q.chunks | 1);
  q.groups = q.tiles / v.nt;

  // rows of an item: the whole image if it is small, else a band of a multiple of 16 rows
  const int limit = s.channels_last ? 3328 : 12288;
  const int most = std::max(16, (limit / q.pitch - (kernel_rows - 1)) / 16 * 16);
  q.bands = (s.h + most - 1) / most;
  q.rows = q.bands == 1 ? s.h : round_up_to((s.h + q.bands - 1) / q.bands, 16);
  q.bands = (s.h + q.rows - 1) / q.rows;
  const bool whole = q.bands == 1 && q.column_tiles == 1;
  q.tile_rows = q.rows + kernel_rows - 1;
  q.plane_bytes = q.tile_rows * q.pitch;

  // images of an item: the fewest that keep the rows of its strips, and the warps, 90 % busy
  const int together = s.channels_last ? 2 : kContiguousWarps;
  q.images = 1;
  double best = 0;
  for (int images = 1; whole && images <= std::min(q.n, 64); ++images) {
    if (images > 1 && images * q.plane_bytes > limit + limit / 2) break;
    const int units = (images * q.rows + 15) / 16 * q.groups;
    const double busy = images * q.rows * q.groups / 16.0 / round_up_to(units, together);
    if (busy > best) best = busy, q.images = images;
    if (busy > 0.9) break;
  }
  q.strips = (q.images * q.rows + 15) / 16;
  q.tile_bytes = q.images * q.plane_bytes;
  q.row_lo = whole ? q.top : 0;
  q.row_count = whole ? q.rows : q.tile_rows;
  q.chunk_lo = whole && !v.single ? v.s : 0;
  q.chunk_count = whole ? blocks : q.chunks;
  // all items are alike: the 16-byte pieces are listed once
  const int64_t reach = int64_t(q.images) * s.c * s.h * s.w;
  q.pieces = whole && !s.channels_last && reach < int64_t(1) << 31 ? q.images * q.row_count * q.chunk_count : 0;
  const int64_t image_groups = (s.n + q.images - 1) / q.images, items = image_groups * q.bands * q.column_tiles;
  if (items > 1 << 30) return false;
  q.items = static_cast<int>(items);
  q.table_bytes = kernel_rows * 2 * (16 * v.s + 8) * 2;
  for (v.channels = v.kh > 0 ? 16 : 8;; v.channels = 8) {
    if (!s.channels_last) break;
    const int64_t owners = (s.c + v.channels - 1) / v.channels;
    int64_t per_block = std::max<int64_t>(1, std::min<int64_t>(8, items * owners / enough_blocks(264)));
    per_block = std::max(per_block, (items + 65534) / 65535);
    q.splits = static_cast<int>((items + per_block - 1) / per_block);
    q.raw_chunk = 16 * v.channels + (v.channels == 8 ? 16 : 32);
    q.raw_bytes = q.images * q.row_count * q.chunks * q.raw_chunk;
    const int moments = grad ? 0 : 32 * static_cast<int>(sizeof(Moments));
    q.shared_bytes =
        v.channels * (q.tile_bytes + q.table_bytes + static_cast<int>(sizeof(Affine)) + moments) + q.raw_bytes;
    if (v.channels == 8 || 2 * (q.shared_bytes + 1024) <= shared_of_multiprocessor()) break;
  }
  if (!s.channels_last) {
    const int strip = 16 * 16 * ((v.single ? v.nt : v.nt + 1) | 1), tensors = transforms ? 2 : 1;
    if (s.w % 2 != 0) {
      q.spans = q.column_tiles == 1 ? q.images : q.tile_rows;
      q.span_pieces = span_pieces(q.column_tiles == 1 ? std::min(q.h, q.tile_rows) * q.w : std::min(q.w, 8 * q.chunks));
      q.by_span_pieces = FastDiv(q.span_pieces);
      q.raw_bytes = 16 * q.spans * q.span_pieces;
      q.pieces = 0;
      q.tiles_at = kSpanStages * q.raw_bytes * tensors;
      q.a_offset = q.tile_bytes;
      q.strips_at = q.tiles_at + q.tile_bytes * tensors;
    } else {
      q.tile_step = q.tile_bytes;
      q.a_offset = kStages * q.tile_bytes;
      q.strips_at = kStages * q.tile_bytes * tensors;
    }
    q.plane_step = 2 * static_cast<int64_t>(s.h) * s.w;
    q.item_step = q.images * s.c * q.plane_step;
    const int moments = grad ? 0 : 32 * kContiguousWarps * static_cast<int>(sizeof(Moments));
    q.shared_bytes =
        q.strips_at + kContiguousWarps * strip + q.pieces * static_cast<int>(sizeof(Piece)) + q.table_bytes + moments;
    // as many blocks as run at once
    const int64_t memory = shared_of_multiprocessor(), by_memory = memory / (q.shared_bytes + kStaticShared);
    // with so much memory the GPU is sm_90 or sm_100; with less than sm_80 has, memory fits 4 blocks or fewer
    const int by_registers = contiguous_blocks(grad, v.kh, memory >= 200 * 1024);
    const int64_t resident = std::max<int64_t>(1, std::min<int64_t>(by_registers, by_memory));
    q.run = ceil_div(items * s.c, enough_blocks(multiprocessor_count() * resident));
    q.splits = static_cast<int>(std::min(items, (items + q.run - 2) / q.run + 1));
  }
  q.by_rows = FastDiv(q.rows), q.by_tiles = FastDiv(q.tiles), q.by_groups = FastDiv(q.groups);
  // channels_last transposes whole tiles, zeros included
  q.by_copy_rows = FastDiv(s.channels_last ? q.tile_rows : q.row_count);
  q.by_copy_chunks = FastDiv(s.channels_last ? q.chunks : q.chunk_count);
  q.by_bands = FastDiv(q.bands), q.by_column_tiles = FastDiv(q.column_tiles);
  return q.shared_bytes <= max_dynamic_shared();
}

inline uintptr_t address_bits(const Args& p) {
  return reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.a) | reinterpret_cast<uintptr_t>(p.y);
}
// The widest access that the tensors' innermost size and addresses allow.
inline int widest_access(const Args& p, bool channels_last) {
  const uintptr_t bits = address_bits(p) | 2 * static_cast<uintptr_t>(channels_last ? p.plan.c : p.plan.w);
  return bits % 16 == 0 ? 8 : bits % 8 == 0 ? 4 : bits % 4 == 0 ? 2 : 1;
}

template <class K>
inline int launch_kernel(K kernel, const Args& p, int64_t owners, int splits, int threads, cudaStream_t stream) {
  const cudaError_t error = set_dynamic_shared(kernel, p.plan.shared_bytes);
  if (error != cudaSuccess) return error;
  LAUNCH(kernel, dim3(static_cast<unsigned>(owners), splits), dim3(threads), p.plan.shared_bytes, stream, p);
  return cudaGetLastError();
}

template <class T, bool GRAD, int S, int KH, int NT, bool SINGLE>
int launch_layout(const Args& p, const Variant& v, bool channels_last, cudaStream_t stream) {
  if constexpr (KH > 0) {
    if (channels_last && v.channels == 16) {
      return launch_kernel(channels_last_kernel<T, GRAD, S, KH, NT, SINGLE, 16>, p, (p.plan.c + 15) / 16, p.plan.splits,
                           32 * kChannelsLastWarps, stream);
    }
  }
  if constexpr (S <= 3) {
    if (channels_last) {
      return launch_kernel(channels_last_kernel<T, GRAD, S, KH, NT, SINGLE, 8>, p, (p.plan.c + 7) / 8, p.plan.splits,
                           32 * kChannelsLastWarps, stream);
    }
  }
  const int64_t blocks = ceil_div(static_cast<int64_t>(p.plan.c) * p.plan.items, p.plan.run);
  return launch_kernel(contiguous_kernel<T, GRAD, S, KH, NT, SINGLE>, p, blocks, 1, 32 * kContiguousWarps, stream);
}

// Fragments in registers: kernels up to 9 x 9.
template <class T, bool GRAD, int KH>
int launch_small(const Args& p, const Variant& v, bool channels_last, cudaStream_t stream) {
  if (!v.single) return launch_layout<T, GRAD, 1, KH, 4, false>(p, v, channels_last, stream);
  if constexpr (KH == 9) {
    if (v.nt == 1) return launch_layout<T, GRAD, 1, KH, 1, true>(p, v, channels_last, stream);
    if (v.nt == 2) return launch_layout<T, GRAD, 1, KH, 2, true>(p, v, channels_last, stream);
  }
  return launch_layout<T, GRAD, 1, KH, 4, true>(p, v, channels_last, stream);
}

template <class T, bool GRAD, int S>
int launch_large(const Args& p, const Variant& v, bool channels_last, cudaStream_t stream) {
  if constexpr (S > 1) {
    if (v.single) return launch_layout<T, GRAD, S, 0, 4, true>(p, v, channels_last, stream);
  }
  return launch_layout<T, GRAD, S, 0, 4, false>(p, v, channels_last, stream);
}

template <class T, bool GRAD>
int launch(Args& p, const Variant& v, bool channels_last, cudaStream_t stream) {
  if (!channels_last && address_bits(p) % 16 != 0) return cudaErrorInvalidValue;
  p.plan.granule = widest_access(p, channels_last);
  if (v.kh == 9) return launch_small<T, GRAD, 9>(p, v, channels_last, stream);
  if (v.kh == 7) return launch_small<T, GRAD, 7>(p, v, channels_last, stream);
  if (v.s == 1) return launch_large<T, GRAD, 1>(p, v, channels_last, stream);
  if (v.s == 2) return launch_large<T, GRAD, 2>(p, v, channels_last, stream);
  if (v.s == 3) return launch_large<T, GRAD, 3>(p, v, channels_last, stream);
  if (v.s == 4) return launch_large<T, GRAD, 4>(p, v, channels_last, stream);
  return launch_large<T, GRAD, 5>(p, v, channels_last, stream);
}

}  // namespace mma
}  // namespace convmixer

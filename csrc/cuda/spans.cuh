// SPDX-License-Identifier: MIT
// Asynchronous copies of rows that are no multiples of 16 bytes. A span is contiguous in memory: a plane, some rows of
// it, or a part of one row. The aligned 16-byte pieces that cover it are copied; then its values move to their places
// inside shared memory. Tensors start at multiples of 16 bytes.
#pragma once
#include "device.cuh"

namespace convmixer {

// The most pieces of a span of `length` 16-bit values, which may start anywhere in a piece.
inline int span_pieces(int length) { return (length + 14) / 8; }

// Copies the 8 values at `from`, aligned to 16 bytes, of a tensor that ends at `end`. If it ends among them, copies
// value by value: a shortened cp.async touches all 16 bytes (compute-sanitizer).
template <class T>
__device__ __forceinline__ void copy_span_piece(void* to, const T* from, const T* end) {
  if (end - from >= 8) {
    cp_async<16>(to, from);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 8; ++i) static_cast<T*>(to)[i] = i < end - from ? from[i] : from_float<T>(0.f);
}

// Keeps the first `count` of 8 values; the others become zero.
__device__ __forceinline__ uint4 keep_first(uint4 v, int count) {
  if (count >= 8) return v;
  const auto keep = [count](uint32_t w, int i) { return count >= i + 2 ? w : (count == i + 1 ? w & 0xffffu : 0u); };
  return make_uint4(keep(v.x, 0), keep(v.y, 2), keep(v.z, 4), keep(v.w, 6));
}

// Reads `count` <= 8 values of a span in shared memory from `element` on, then zeros, by two 16-byte loads and 15
// selections: five 4-byte loads would take fewer instructions, but lanes 16 bytes apart would use the same banks.
__device__ __forceinline__ uint4 load_from_span(const void* span, int element, int count) {
  const uint4* const pieces = static_cast<const uint4*>(span) + (element >> 3);
  const uint4 low = pieces[0];
  // the piece behind the last one belongs to another span or to none
  const uint4 high = (element & 7) + count > 8 ? pieces[1] : low;
  uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  const bool pairs = (element & 4) != 0, pair = (element & 2) != 0;
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = pairs ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = pair ? w[i + 1] : w[i];
  const uint32_t select = element & 1 ? 0x5432u : 0x3210u;
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = __byte_perm(w[i], w[i + 1], select);
  return keep_first(make_uint4(w[0], w[1], w[2], w[3]), count);
}

}  // namespace convmixer

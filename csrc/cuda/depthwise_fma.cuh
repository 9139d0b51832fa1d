// SPDX-License-Identifier: MIT
// Tiles of float32 in shared memory for the depthwise FMA kernels: their geometry, how blocks fill them, how threads
// read rows.
//   contiguous     a tile is rows x columns of some planes. A lane is a position and reads by LDS.128. Of the groups of
//                  4 columns, the even ones lie first, then the odd ones: threads 8 columns apart read neighbouring 16
//                  bytes
//   channels_last  a tile is rows x columns x kLanes channels. A lane is a channel; nothing is transposed
// A thread owns a patch of kRows x kColumns outputs (forward, input gradient) or strips of kColumns columns (weight
// gradient).
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../math.h"
#include "device.cuh"
#include "kernels.h"

namespace convmixer::fma {

constexpr int kRows = 4;
constexpr int kColumns = 8;

// kTaps: the taps of a row that a thread applies at once. 4 takes rows of any length, in chunks of 4; other values take
// rows of up to kTaps taps, in one chunk.
template <bool kLast, int kTaps_>
struct Layout {
  static constexpr bool kChannelsLast = kLast;
  static constexpr int kTaps = kTaps_;
  static constexpr bool kChunked = kTaps == 4;
  static constexpr int kThreads = kLast ? 256 : 128;
  static constexpr int kLanes = !kLast ? 1 : kChunked ? 8 : 32;  // channels side by side
  static constexpr int kSlots = kThreads / kLanes;
  // Floats from an even group of 4 columns to the next even one. 72, not 64: a warp has positions 8 columns apart,
  // which would share a bank.
  static constexpr int kPair = !kLast ? 4 : kChunked ? 72 : 8 * kLanes;
  // Columns of the window before the first tap of the first output: with them the window starts at a multiple of 4.
  static constexpr int kShift = kLast || kChunked ? 0 : (4 - (kTaps - 1) / 2 % 4) % 4;
  static constexpr int kUsed = kColumns + kTaps - 1;
  static constexpr int kGroups = (kShift + kUsed + 3) / 4;
  static constexpr int kWindow = kLast ? kUsed : 4 * kGroups;
  static constexpr int kPaddedTaps = kLast ? kTaps : (kTaps + 3) / 4 * 4;
  static_assert(kTaps <= 9, "padding of one chunk is at most 4");
};

// Where the filter lies: padding above and left of the image, and zeros before the taps of each row in shared memory.
struct Filter {
  int kh, kw, top, pad, front, chunks;
};

template <class L>
Filter filter_of(int kh, int kw, bool flipped) {
  Filter f{};
  f.kh = kh, f.kw = kw;
  const int left = flipped ? kw - 1 - (kw - 1) / 2 : (kw - 1) / 2;
  f.top = flipped ? kh - 1 - (kh - 1) / 2 : (kh - 1) / 2;
  if (L::kChunked) {
    f.pad = L::kChannelsLast ? left : (left + 3) / 4 * 4;
    f.front = f.pad - left;
    f.chunks = (f.front + kw + 3) / 4;
  } else {
    f.pad = (L::kTaps - 1) / 2 + L::kShift;
    f.front = (L::kTaps - 1) / 2 - left;
    f.chunks = 1;
  }
  return f;
}

// Rows and columns of a tile and its layout in shared memory: rows are `pitch` floats apart, planes `plane` floats.
struct Box {
  int rows, columns, pitch, plane, odd;
};

// `neighbours`: the threads side by side in a row, each 8 columns further. The thread after them is in the next plane.
template <class L>
Box box_of(int rows, int columns, int neighbours) {
  const int groups = (columns + 3) / 4, pairs = (groups + 1) / 2;
  Box b{rows, columns, 0, 0, 4 * pairs};
  if (L::kChannelsLast) {
    b.odd = 4 * L::kLanes;
    b.pitch = pairs * L::kPair + (L::kChunked ? 4 : 0);
    b.plane = rows * b.pitch;
    if (L::kChunked) b.plane += ((8 * neighbours - b.plane) % 32 + 32) % 32;
  } else {
    // 4 rows further is 16 banks further
    b.pitch = 8 * pairs + 4;
    b.columns = 4 * groups;
    b.plane = rows * b.pitch;
    b.plane += ((4 * neighbours - b.plane) % 32 + 32) % 32;
  }
  return b;
}

template <class L>
int columns_of(const Filter& f, int patches) {
  if (L::kChannelsLast) return kColumns * patches + f.chunks * L::kTaps - 1;
  return 4 * (2 * patches - 2 + f.chunks - 1 + L::kGroups);
}

template <class L>
__device__ __forceinline__ int column_offset(const Box& box, int column) {
  if constexpr (L::kPair == 8 * L::kLanes && L::kChannelsLast) return column * L::kLanes;
  return (column >> 3) * L::kPair + (column & 4 ? box.odd : 0) + (column & 3) * L::kLanes;
}

// An address and the distance from its group of 4 columns to the next: together they reach every column of a window.
struct Cursor {
  const float* at;
  int odd;
};
// The cursor of patch `across` in a row, `group` groups further. The distance of odd groups is the same for all
// threads.
template <class L>
__device__ __forceinline__ Cursor cursor(const float* row, const Box& box, int across, int group) {
  const bool flipped = group & 1;
  return {row + (across + (group >> 1)) * L::kPair + (flipped ? box.odd : 0), flipped ? L::kPair - box.odd : box.odd};
}
// Reads columns [0, N) from the cursor; for contiguous tiles N is a multiple of 4.
template <class L, int N>
__device__ __forceinline__ void read_row(float (&row)[N], const Cursor& from) {
  if constexpr (L::kChannelsLast) {
#pragma unroll
    for (int i = 0; i < N; ++i) row[i] = from.at[(i / 4 % 2 ? from.odd : 0) + i / 8 * L::kPair + i % 4 * L::kLanes];
  } else {
    static_assert(N % 4 == 0, "whole groups");
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const float4 v = *reinterpret_cast<const float4*>(from.at + (i % 2 ? from.odd : 0) + i / 2 * L::kPair);
      row[4 * i] = v.x, row[4 * i + 1] = v.y, row[4 * i + 2] = v.z, row[4 * i + 3] = v.w;
    }
  }
}

// Access to global memory by 4 neighbours: columns (contiguous) or channels (channels_last).

struct Four {
  float v[4];
};

template <class T>
struct Raw;
template <>
struct Raw<float> {
  float4 bits;
  __device__ __forceinline__ Four wide() const { return {{bits.x, bits.y, bits.z, bits.w}}; }
  __device__ __forceinline__ void set(const Four& f) { bits = make_float4(f.v[0], f.v[1], f.v[2], f.v[3]); }
};
template <class T>
struct Raw {
  uint2 bits;
  __device__ __forceinline__ Four wide() const {
    const float2 a = unpack2<T>(bits.x), b = unpack2<T>(bits.y);
    return {{a.x, a.y, b.x, b.y}};
  }
  __device__ __forceinline__ void set(const Four& f) {
    bits = make_uint2(pack2<T>(f.v[0], f.v[1]), pack2<T>(f.v[2], f.v[3]));
  }
};

// The first `count` of 4 elements at p, zeros behind them; `vector`: p is aligned and count is 4.
template <class T>
__device__ __forceinline__ Raw<T> load4(const T* p, int count, bool vector) {
  Raw<T> raw;
  if (vector) {
    raw.bits = *reinterpret_cast<const decltype(raw.bits)*>(p);
  } else {
    Four f;
#pragma unroll
    for (int j = 0; j < 4; ++j) f.v[j] = j < count ? to_float(p[j]) : 0.f;
    raw.set(f);
  }
  return raw;
}
template <class T>
__device__ __forceinline__ void store4(T* p, const Four& f, int count, bool vector) {
  if (vector) {
    Raw<T> raw;
    raw.set(f);
    *reinterpret_cast<decltype(raw.bits)*>(p) = raw.bits;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < count) p[j] = from_float<T>(f.v[j]);
  }
}

// Whether load4 and store4 may use vectors on these tensors.
template <class T>
bool vectors(const Shape& s, std::initializer_list<const void*> tensors) {
  bool ok = (s.channels_last ? s.c : s.w) % 4 == 0;
  for (const void* t : tensors) ok = ok && reinterpret_cast<uintptr_t>(t) % (4 * sizeof(T)) == 0;
  return ok;
}

// x itself. float32 is copied asynchronously, by 16 bytes or, if rows are not aligned to that, by 4: a float is always
// aligned, and spans (spans.cuh) would need one more load and store to reach their places.
template <class T>
struct InputSource {
  static constexpr bool kAsync = sizeof(T) == 4;
  static constexpr int kBatch = kAsync ? 1 : 4;  // loads in flight
  using Loaded = Raw<T>;
  const T* x;
  bool vector;
  __device__ __forceinline__ Loaded load(int64_t at, int count) const { return load4(x + at, count, vector); }
  __device__ __forceinline__ Four value(const Loaded& raw, int, int) { return raw.wide(); }
  __device__ __forceinline__ void copy(float* to, int64_t at, int count) const {
    if (vector) {
      cp_async<16>(to, x + at);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) cp_async<4>(to + j, x + at + (j < count ? j : 0), j < count ? 4 : 0);
    }
  }
};

// Per-channel constants of da = (offset + scale * dy + slope * (act(a) - mean)) * act'(a), in this order: x offset, y
// mean, z slope, w scale. dy is scaled before the offset is added: the difference of dy and a constant would round
// alike for all dy of a binade, and in sums of da that error would grow with the number of elements. The square root is
// exact: rsqrtf's error of 2 ulp would be the same in every element.
__device__ __forceinline__ float4 gradient_constants(const Norm& norm, const Sums& sums, int64_t c, float count) {
  if (!norm.present) return make_float4(0.f, 0.f, 0.f, 1.f);
  const float rstd = 1.f / sqrtf(load_param(norm.var, c) + norm.eps);
  const float scale = rstd * load_param(norm.weight, c, 1.f);
  if (sums.dy == nullptr) return make_float4(0.f, 0.f, 0.f, scale);
  return make_float4(-scale * (sums.dy[c] / count), load_param(norm.mean, c), -scale * (sums.dy_hhat[c] / count * rstd),
                     scale);
}

template <class T, bool kChannelsLast>
struct GradientSource {
  static constexpr bool kAsync = false;
  static constexpr int kBatch = 4;
  struct Loaded {
    Raw<T> dy, a;
  };
  const T* dy;
  const T* a;
  const float4* constants;  // of each channel of the block
  int activation;
  bool centered;  // the statistics were the batch's
  bool vector;
  __device__ __forceinline__ Loaded load(int64_t at, int count) const {
    Loaded raw{};
    raw.dy = load4(dy + at, count, vector);
    if (a != nullptr) raw.a = load4(a + at, count, vector);
    return raw;
  }
  // zeros from `count` on
  __device__ __forceinline__ Four value(const Loaded& raw, int channel, int count) {
    Four d = raw.dy.wide();
    if (a == nullptr) {
#pragma unroll
      for (int j = 0; j < 4; ++j) d.v[j] *= constants[kChannelsLast ? channel + j : channel].w;
      return d;
    }
    const Four v = raw.a.wide();
    dispatch_activation(activation, [&](auto act) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4 k = constants[kChannelsLast ? channel + j : channel];
        float dh = fmaf(k.w, d.v[j], k.x);
        if (centered) dh = fmaf(k.z, convmixer::activation<decltype(act)::value>(v.v[j]) - k.y, dh);
        constexpr int kAct = decltype(act)::value;
        d.v[j] = j < count ? times_grad<kAct>(dh, activation_grad<kAct>(v.v[j])) : 0.f;
      }
    });
    return d;
  }
};

// A source that adds up the values that the thread copies. With 4 loads in flight the weight gradient spills on sm_80.
template <class Source>
struct Summed : Source {
  static constexpr int kBatch = 2;
  float sum[4] = {};
  __device__ __forceinline__ Four value(const typename Source::Loaded& raw, int channel, int count) {
    const Four f = Source::value(raw, channel, count);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] += f.v[j];
    return f;
  }
};

// Where a tile lies: column and row of its corner (outside the image in the padding), first image and channel, planes.
struct Place {
  int y, x;
  int n, c;
  int images, channels;  // planes of the tile: image fastest; channels_last: kLanes channels
};

// a = q * b + r, without a division if a < b, the common case
__device__ __forceinline__ void split(int a, int b, int& q, int& r) {
  q = 0, r = a;
  if (a >= b) q = a / b, r = a - q * b;
}

// Fills the tile, with zeros outside the image and in planes beyond the tensor. The caller must synchronise before it
// reads.
template <class L, class Source>
__device__ __forceinline__ void fill(float* tile, const Box& box, const Place& at, const Shape& shape, Source& source) {
  constexpr bool kLast = L::kChannelsLast;
  constexpr int kQuads = kLast ? L::kLanes / 4 : 1;
  const int tid = threadIdx.x, threads = blockDim.x;
  const int top = max(0, -at.y), height = min(box.rows, shape.h - at.y) - top;
  const int left = max(0, -at.x), right = min(box.columns, shape.w - at.x);
  const int images = static_cast<int>(min(static_cast<int64_t>(at.images), shape.n - at.n));
  const int channels = static_cast<int>(min(static_cast<int64_t>(at.channels), shape.c - at.c));
  const int planes = kLast ? 1 : channels;  // of one image
  if (height < box.rows || right - left < box.columns || images < at.images || channels < at.channels) {
    const int size = (kLast ? at.images : at.images * at.channels) * box.plane / 4;
    for (int i = tid; i < size; i += threads) reinterpret_cast<float4*>(tile)[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    __syncthreads();
  }
  // A line is a row of a plane inside the image; its elements are groups of 4 columns or, of each column, of 4
  // channels. The threads take `step` lines at once and then go on by as many: rows, images and channels carry.
  const int elements = kLast ? (right - left) * kQuads : (right - left + 3) / 4;
  const int span = min(elements, threads), step = threads / span, line = tid / span;
  if (line >= step) return;
  const int64_t row_stride = kLast ? shape.w * shape.c : shape.w;
  const int64_t image_stride = shape.c * shape.h * shape.w;
  const int64_t plane_stride = static_cast<int64_t>(shape.h) * shape.w;
  int row_step, image_step, channel_step, row0, image0, channel0, rest;
  split(step, height, rest, row_step);
  split(rest, images, channel_step, image_step);
  split(line, height, rest, row0);
  split(rest, images, channel0, image0);
  const int64_t from_step = row_step * row_stride + image_step * image_stride + channel_step * plane_stride;
  const int to_step = row_step * box.pitch + (channel_step * at.images + image_step) * box.plane;
  const int64_t from_image = image_stride - height * row_stride, from_channel = plane_stride - images * image_stride;
  const int to_image = box.plane - height * box.pitch, to_channel = (at.images - images) * box.plane;
  for (int e = tid - line * span; e < elements; e += span) {
    const int quad = e % kQuads, column = left + (kLast ? e / kQuads : 4 * e);
    const int64_t ends = kLast ? shape.c - at.c - 4 * quad : static_cast<int64_t>(shape.w - at.x - column);
    if (ends <= 0) continue;
    const int count = static_cast<int>(min(static_cast<int64_t>(4), ends));
    int row = row0, image = image0, channel = channel0;
    int64_t from =
        (at.n + image) * image_stride + (at.y + top + row) * row_stride +
        (kLast ? (at.x + column) * shape.c + at.c + 4 * quad : (at.c + channel) * plane_stride + at.x + column);
    int to =
        column_offset<L>(box, column) + 4 * quad + (top + row) * box.pitch + (channel * at.images + image) * box.plane;
    while (channel < planes) {
      typename Source::Loaded loaded[Source::kBatch];
      int places[Source::kBatch], owners[Source::kBatch];
#pragma unroll
      for (int u = 0; u < Source::kBatch; ++u) {
        places[u] = channel < planes ? to : -1;
        owners[u] = kLast ? 4 * quad : channel;
        if (channel < planes) {
          if constexpr (Source::kAsync) {
            source.copy(tile + to, from, count);
          } else {
            loaded[u] = source.load(from, count);
          }
        }
        row += row_step, image += image_step, channel += channel_step, from += from_step, to += to_step;
        if (row >= height) row -= height, ++image, from += from_image, to += to_image;
        if (image >= images) image -= images, ++channel, from += from_channel, to += to_channel;
      }
      if constexpr (!Source::kAsync) {
#pragma unroll
        for (int u = 0; u < Source::kBatch; ++u) {
          if (places[u] < 0) continue;
          const Four f = source.value(loaded[u], owners[u], count);
          *reinterpret_cast<float4*>(tile + places[u]) = make_float4(f.v[0], f.v[1], f.v[2], f.v[3]);
        }
      }
    }
  }
}

// On the host: calls f(T(), Layout()) for a shape and a filter. Tensor cores take the common 16-bit cases; the others
// use the layout with chunks.
template <class T, class F>
int dispatch_layout(const Shape& s, int kh, int kw, F&& f) {
  const auto layout = [&](auto last) {
    constexpr bool kLast = decltype(last)::value;
    if constexpr (sizeof(T) == 4) {
      // a tall filter's channels_last tile fits in shared memory only with few channels
      const bool fits = kw <= 9 && !(kLast && kh > 13);
      if (fits && kw <= 3) return f(T(), Layout<kLast, 3>());
      if (fits && kw <= 5) return f(T(), Layout<kLast, 5>());
      if (fits && kw <= 7) return f(T(), Layout<kLast, 7>());
      if (fits) return f(T(), Layout<kLast, 9>());
    }
    return f(T(), Layout<kLast, 4>());
  };
  return s.channels_last ? layout(std::true_type()) : layout(std::false_type());
}
template <class F>
int dispatch(const Shape& s, int kh, int kw, F&& f) {
  if (s.dtype == kFloat32) return dispatch_layout<float>(s, kh, kw, f);
  return s.dtype == kFloat16 ? dispatch_layout<__half>(s, kh, kw, f) : dispatch_layout<__nv_bfloat16>(s, kh, kw, f);
}

}  // namespace convmixer::fma

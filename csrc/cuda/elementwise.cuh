// SPDX-License-Identifier: MIT
// One pass over activation tensors with per-channel constants and per-channel sums: the skeleton of batch_norm.cu and
// pointwise.cu.
//   contiguous     a block owns one channel's images of one part; its threads walk the planes in aligned 16-byte
//   windows channels_last  a block owns up to 32 vectors of channels and one part of the rows (n, h, w); a thread owns
//                  one 16-byte vector of channels and walks the rows
// A thread has two windows of each tensor in flight. It takes elements one by one if a window crosses the edge of a
// plane, or if addresses or C allow no vectors. A block leaves one partial per channel and part: nothing depends on the
// order of blocks. Bound: bytes, at 3 to 45 instructions an element.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../math.h"
#include "device.cuh"
#include "kernels.h"

namespace convmixer::elementwise {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kAhead = 2;      // windows of each tensor that a thread has in flight while it computes one
constexpr int kMaxLanes = 32;  // vectors of channels across a channels_last block

template <class T>
struct Window {
  static constexpr int kSize = 16 / sizeof(T);
};

// The division of a tensor: `parts` partials a channel, whatever the alignment of the addresses.
struct Geometry {
  int64_t channels, parts, blocks;
  int64_t items, items_per_part;  // contiguous: windows of one channel's planes; channels_last: rows
  int64_t plane, windows;         // contiguous: H * W, windows of one plane
  int64_t images_step;            // contiguous: kThreads windows are images_step planes ...
  int windows_step;               // ... and windows_step windows
  int lanes;                      // channels_last: vectors of channels across a block, a power of two
  int64_t groups;                 // channels_last: blocks across the channels
  bool vectors;                   // 16-byte accesses are aligned
  int64_t total;                  // number of elements
};

constexpr int window_size(int dtype) { return dtype == kFloat32 ? 4 : 8; }

inline int lanes_of(const Shape& s) {
  const int64_t vectors = (s.c + window_size(s.dtype) - 1) / window_size(s.dtype);
  int lanes = 1;
  while (lanes < kMaxLanes && lanes < vectors) lanes *= 2;
  return lanes;
}

inline int64_t groups_of(const Shape& s) {
  const int64_t channels = static_cast<int64_t>(lanes_of(s)) * window_size(s.dtype);
  return (s.c + channels - 1) / channels;
}

// Makes enough parts to fill a large GPU several times, with enough elements in each to hide its reduction; and so many
// that a thread adds at most 8 windows (contiguous) or 64 rows (channels_last) in float32. Sums of parts are double, so
// that errors do not grow with N.
inline int64_t parts_of(const Shape& s) {
  const int64_t count = s.n * s.h * s.w;
  if (s.channels_last) {
    const int64_t rows_at_once = kThreads / lanes_of(s);
    const int64_t most = std::max<int64_t>(1, count / (rows_at_once * 4));
    return std::min(most, std::max(std::max<int64_t>(1, 1024 / groups_of(s)), count / (rows_at_once * 64)));
  }
  return std::max<int64_t>(1, count / 16384);
}

inline Geometry geometry(const Shape& s, std::initializer_list<const void*> tensors) {
  const int size = window_size(s.dtype);
  Geometry g{};
  g.channels = s.c;
  g.parts = parts_of(s);
  g.plane = static_cast<int64_t>(s.h) * s.w;
  g.total = s.n * s.c * g.plane;
  g.vectors = !s.channels_last || s.c % size == 0;
  for (const void* t : tensors) g.vectors = g.vectors && reinterpret_cast<uintptr_t>(t) % 16 == 0;
  if (s.channels_last) {
    g.items = s.n * g.plane;
    g.lanes = lanes_of(s);
    g.groups = groups_of(s);
  } else {
    // a plane that starts anywhere inside a window touches at most this many
    const bool aligned = !g.vectors || g.plane % size == 0;
    g.windows = (g.plane + (aligned ? size - 1 : 2 * size - 2)) / size;
    g.items = s.n * g.windows;
    g.images_step = kThreads / g.windows;
    g.windows_step = static_cast<int>(kThreads % g.windows);
  }
  g.items_per_part = (g.items + g.parts - 1) / g.parts;
  return g;
}

// A window is 16 bytes. This thread owns elements [first, last) of the window at element `base`, or none.
struct Place {
  int64_t base;
  int first, last;
};

template <class T>
struct Elements {
  T v[Window<T>::kSize];
};

template <class T>
__device__ __forceinline__ uint4 load(const T* tensor, const Place& at, bool vectors) {
  constexpr int kSize = Window<T>::kSize;
  if (vectors && at.first == 0 && at.last == kSize) return load16(tensor + at.base);
  Elements<T> e;
#pragma unroll
  for (int j = 0; j < kSize; ++j) e.v[j] = j >= at.first && j < at.last ? tensor[at.base + j] : from_float<T>(0.f);
  return bit_cast<uint4>(e);
}

template <class T>
__device__ __forceinline__ void store(T* tensor, const Place& at, bool vectors, uint4 window) {
  constexpr int kSize = Window<T>::kSize;
  if (vectors && at.first == 0 && at.last == kSize) {
    store16(tensor + at.base, window);
    return;
  }
  const Elements<T> e = bit_cast<Elements<T>>(window);
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    if (j >= at.first && j < at.last) tensor[at.base + j] = e.v[j];
}

__device__ __forceinline__ float rstd(const Norm& norm, int64_t c) {
  return norm.present ? 1.f / sqrtf(load_param(norm.var, c) + norm.eps) : 1.f;
}

// y = (h - mean) * scale + shift
struct Affine {
  float mean, scale, shift;
};

__device__ __forceinline__ Affine affine(const Norm& norm, int64_t c) {
  if (!norm.present) return {0.f, 1.f, 0.f};
  return {load_param(norm.mean, c), load_param(norm.weight, c, 1.f) * rstd(norm, c), load_param(norm.bias, c)};
}

// act(a), and below act'(a) too, at the accuracy that results of type T keep.
template <int ACT, class T>
__device__ __forceinline__ float activate(float a) {
  if constexpr (sizeof(T) == 4) {
    return activation<ACT>(a);
  } else {
    const float h = fast_activation<ACT>(a);
    // the fast form turns +inf into NaN
    return ACT == kGelu && a > 100.f ? a : h;
  }
}

template <int ACT, class T>
__device__ __forceinline__ ValueAndGrad activate_and_grad(float a) {
  if constexpr (sizeof(T) == 4) {
    return {activation<ACT>(a), activation_grad<ACT>(a)};
  } else {
    const ValueAndGrad r = fast_activation_and_grad<ACT>(a);
    return {ACT == kGelu && a > 100.f ? a : r.value, r.grad};
  }
}

// The partial statistics of one channel that a block leaves: moments (count, mean, M2) in float32, or totals in double.
template <class Op>
struct Partial {
  static constexpr int kSize = Op::kMoments ? 3 : Op::kStats;
  using Value = std::conditional_t<Op::kMoments, float, double>;
  Value v[kSize > 0 ? kSize : 1];

  __device__ __forceinline__ void merge(const Partial& other) {
    if constexpr (Op::kMoments) {
      const Moments m = convmixer::merge({v[0], v[1], v[2]}, {other.v[0], other.v[1], other.v[2]});
      v[0] = m.count, v[1] = m.mean, v[2] = m.m2;
    } else {
#pragma unroll
      for (int s = 0; s < kSize; ++s) v[s] += other.v[s];
    }
  }

  __device__ __forceinline__ Partial from_lane(int offset) const {
    Partial r;
#pragma unroll
    for (int s = 0; s < kSize; ++s) r.v[s] = __shfl_xor_sync(0xffffffffu, v[s], offset);
    return r;
  }
};

// The sums of one channel in a thread: Op::kStats values an element, as moments (then kStats is 1) or as plain totals.
template <class Op>
struct ChannelSums {
  static constexpr int kStats = Op::kStats;
  float total[kStats + 1] = {};
  double wide[kStats + 1] = {};
  Moments moments = {0.f, 0.f, 0.f};

  // float32 tensors: a thread's total is added to a double every few elements, which is as exact as a pairwise sum
  __device__ __forceinline__ void flush() {
    if constexpr (Op::kWide) {
#pragma unroll
      for (int s = 0; s < kStats; ++s) wide[s] += total[s], total[s] = 0.f;
    }
  }

  // value[stat][element] of one window (its last row is unused)
  template <int kSize>
  __device__ __forceinline__ void add(const float (&value)[kStats + 1][kSize], const Place& at) {
    if constexpr (Op::kMoments) {
      // computes the window's own moments in two passes, then merges: no cancellation, and one division a window
      const int count = at.last - at.first;
      if (count <= 0) return;
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum += j >= at.first && j < at.last ? value[0][j] : 0.f;
      Moments window{static_cast<float>(count), 0.f, 0.f};
      window.mean = count == kSize ? sum * (1.f / kSize) : sum / window.count;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float d = j >= at.first && j < at.last ? value[0][j] - window.mean : 0.f;
        window.m2 = fmaf(d, d, window.m2);
      }
      moments = convmixer::merge(moments, window);
    } else {
#pragma unroll
      for (int s = 0; s < kStats; ++s) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum += j >= at.first && j < at.last ? value[s][j] : 0.f;
        total[s] += sum;
      }
      flush();
    }
  }

  __device__ __forceinline__ Partial<Op> partial() const {
    Partial<Op> r;
    if constexpr (Op::kMoments) {
      r.v[0] = moments.count, r.v[1] = moments.mean, r.v[2] = moments.m2;
    } else {
#pragma unroll
      for (int s = 0; s < kStats; ++s) r.v[s] = wide[s] + total[s];
    }
    return r;
  }
};

// The output and statistics of one window; channel(j) is the channel of its j-th element. The activation is chosen once
// a window.
template <int ACT, class T, class Op, class ChannelOf>
__device__ __forceinline__ uint4 compute_as(const Op& op, const ChannelOf& channel, uint4 a, uint4 b,
                                            float (&stats)[Op::kStats + 1][Window<T>::kSize]) {
  Vec16<T> first, second, out;
  first.unpack(a);
  second.unpack(b);
#pragma unroll
  for (int j = 0; j < Window<T>::kSize; ++j) {
    float stat[Op::kStats + 1];
    out.v[j] = op.template element<ACT>(channel(j), first.v[j], second.v[j], stat);
#pragma unroll
    for (int s = 0; s < Op::kStats; ++s) stats[s][j] = stat[s];
  }
  return out.pack();
}

template <class T, class Op, class ChannelOf>
__device__ __forceinline__ uint4 compute(const Op& op, const ChannelOf& channel, uint4 a, uint4 b,
                                         float (&stats)[Op::kStats + 1][Window<T>::kSize]) {
  switch (op.activation) {
    case kIdentity:
      return compute_as<kIdentity, T>(op, channel, a, b, stats);
    case kRelu:
      return compute_as<kRelu, T>(op, channel, a, b, stats);
    case kGelu:
      return compute_as<kGelu, T>(op, channel, a, b, stats);
    default:
      return compute_as<kGeluTanh, T>(op, channel, a, b, stats);
  }
}

// The windows that a thread has in flight: pushed at the back, computed kAhead steps later.
template <class T, class Op>
struct Pipeline {
  Place at[kAhead + 1];
  uint4 a[kAhead + 1], b[kAhead + 1];

  __device__ __forceinline__ void push(const Op& op, const Place& place, bool vectors) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      at[i] = at[i + 1];
      a[i] = a[i + 1];
      if constexpr (Op::kInputs > 1) b[i] = b[i + 1];
    }
    at[kAhead] = place;
    a[kAhead] = load(op.first, place, vectors);
    const bool second = Op::kInputs > 1 && op.second != nullptr;
    b[kAhead] = load(op.second, {place.base, place.first, second ? place.last : 0}, vectors);
  }
};

// Blocks behind g.blocks do an operation's work outside the tensor, a thread a channel.
template <class Op>
__device__ __forceinline__ bool update(const Op& op, const Geometry& g) {
  if constexpr (Op::kUpdates) {
    if (blockIdx.x >= g.blocks) {
      op.update((blockIdx.x - g.blocks) * kThreads + threadIdx.x);
      return true;
    }
  }
  return false;
}

// The block of channel blockIdx.x % C and part blockIdx.x / C: blocks that run together read neighbouring planes.
template <class T, class Op>
__global__ void __launch_bounds__(kThreads) planes_kernel(Op op, Geometry g) {
  if (update(op, g)) return;
  constexpr int kSize = Window<T>::kSize;
  const int64_t c = blockIdx.x % g.channels, part = blockIdx.x / g.channels;
  const int64_t begin = part * g.items_per_part;
  const int64_t end = begin + g.items_per_part < g.items ? begin + g.items_per_part : g.items;
  const typename Op::Channel channel = op.channel(c);
  const auto channel_of = [&channel](int) { return channel; };
  ChannelSums<Op> sums;

  Pipeline<T, Op> line;
  int64_t item = begin + threadIdx.x, image = item / g.windows;
  int window = static_cast<int>(item - image * g.windows);
#pragma unroll 1
  for (int step = 0; item < end + kAhead * kThreads; ++step) {
    const int64_t start = (image * g.channels + c) * g.plane, stop = start + g.plane;
    const int64_t base = (g.vectors ? start - start % kSize : start) + static_cast<int64_t>(window) * kSize;
    Place place{base, base < start ? static_cast<int>(start - base) : 0, 0};
    if (item < end && base < stop) place.last = stop - base < kSize ? static_cast<int>(stop - base) : kSize;
    line.push(op, place, g.vectors);
    item += kThreads;
    image += g.images_step;
    window += g.windows_step;
    if (window >= g.windows) {
      window -= static_cast<int>(g.windows);
      ++image;
    }
    if (step < kAhead) continue;
    float stats[Op::kStats + 1][kSize];
    const uint4 out = compute<T>(op, channel_of, line.a[0], line.b[0], stats);
    if (Op::kWrites && op.out != nullptr) store(op.out, line.at[0], g.vectors, out);
    if constexpr (Op::kStats > 0) sums.add(stats, line.at[0]);
  }

  if constexpr (Op::kStats > 0) {
    SHARED_ARRAY(Partial<Op>, shared, kWarps);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Partial<Op> partial = sums.partial();
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const Partial<Op> other = partial.from_lane(offset);
      partial.merge(other);
    }
    if (lane == 0) shared[warp] = partial;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kWarps; ++w) partial.merge(shared[w]);
      op.partials[c * g.parts + part] = partial;
    }
  }
}

// The block of the channels from group * lanes * kSize on and part blockIdx.x / groups. A thread has vector tid % lanes
// and row tid / lanes.
template <class T, class Op>
__global__ void __launch_bounds__(kThreads) rows_kernel(Op op, Geometry g) {
  if (update(op, g)) return;
  constexpr int kSize = Window<T>::kSize;
  const int64_t group = blockIdx.x % g.groups, part = blockIdx.x / g.groups;
  const int64_t begin = part * g.items_per_part;
  const int64_t end = begin + g.items_per_part < g.items ? begin + g.items_per_part : g.items;
  const int lane = threadIdx.x % g.lanes, row = threadIdx.x / g.lanes, rows = kThreads / g.lanes;
  const int64_t c = (group * g.lanes + lane) * kSize;
  const int owned = g.channels - c < kSize ? static_cast<int>(g.channels - c) : kSize;  // <= 0: idle

  SHARED_ARRAY(typename Op::Channel, channels, kMaxLanes * kSize);
  for (int i = threadIdx.x; i < g.lanes * kSize; i += kThreads) {
    const int64_t mine = group * g.lanes * kSize + i;
    channels[i] = op.channel(mine < g.channels ? mine : 0);
  }
  __syncthreads();
  typename Op::Channel channel[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) channel[j] = channels[lane * kSize + j];
  const auto channel_of = [&channel](int j) { return channel[j]; };
  ChannelSums<Op> sums[kSize];
  float count = 0.f;

  Pipeline<T, Op> line;
  int64_t m = begin + row;
#pragma unroll 1
  for (int step = 0; owned > 0 && m < end + kAhead * rows; ++step, m += rows) {
    line.push(op, {m * g.channels + c, 0, m < end ? owned : 0}, g.vectors);
    if (step < kAhead) continue;
    float stats[Op::kStats + 1][kSize];
    const uint4 out = compute<T>(op, channel_of, line.a[0], line.b[0], stats);
    if (Op::kWrites && op.out != nullptr) store(op.out, line.at[0], g.vectors, out);
    count += 1.f;
    const float share = Op::kMoments ? 1.f / count : 0.f;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if constexpr (Op::kMoments) {
        // Welford's step: all channels of a thread share the count
        const float delta = stats[0][j] - sums[j].moments.mean;
        sums[j].moments.mean = fmaf(delta, share, sums[j].moments.mean);
        sums[j].moments.m2 = fmaf(delta, stats[0][j] - sums[j].moments.mean, sums[j].moments.m2);
      } else {
#pragma unroll
        for (int s = 0; s < Op::kStats; ++s) sums[j].total[s] += stats[s][j];
        if (step % 4 == 3) sums[j].flush();
      }
    }
  }

  if constexpr (Op::kStats > 0) {
    // shared is [row][value][j][lane]: neighbouring lanes write and read neighbouring words
    using P = Partial<Op>;
    SHARED_ARRAY(typename P::Value, shared, kThreads * kSize * P::kSize);
    const int stride = g.lanes * kSize;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      sums[j].moments.count = count;
      const P mine = sums[j].partial();
#pragma unroll
      for (int s = 0; s < P::kSize; ++s) shared[(row * P::kSize + s) * stride + j * g.lanes + lane] = mine.v[s];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < stride; i += kThreads) {
      const int64_t mine = (group * g.lanes + i % g.lanes) * kSize + i / g.lanes;
      if (mine >= g.channels) continue;
      P merged{};
      const auto value = [&](int r, int s) { return shared[(r * P::kSize + s) * stride + i]; };
      if constexpr (Op::kMoments) {
        // computes the common mean first: up to 256 merges, one after the other, would add up their rounding
        double n = 0.0, sum = 0.0, m2 = 0.0;
        for (int r = 0; r < rows; ++r) n += value(r, 0), sum += static_cast<double>(value(r, 0)) * value(r, 1);
        // one Newton step makes the quotient exact to double
        double inverse = 1.f / fmaxf(static_cast<float>(n), 1.f);
        inverse *= 2.0 - n * inverse;
        const double mean = sum * inverse;
        for (int r = 0; r < rows; ++r) {
          const double distance = value(r, 1) - mean;
          m2 += value(r, 2) + value(r, 0) * distance * distance;
        }
        merged.v[0] = static_cast<float>(n), merged.v[1] = static_cast<float>(mean),
        merged.v[2] = static_cast<float>(m2);
      } else {
        for (int r = 0; r < rows; ++r)
#pragma unroll
          for (int s = 0; s < P::kSize; ++s) merged.v[s] += value(r, s);
      }
      op.partials[mine * g.parts + part] = merged;
    }
  }
}

__device__ __forceinline__ double sum_over_warp(double v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// The sum of a channel's parts, by one warp in a fixed order; all lanes get it.
template <class Op>
__device__ __forceinline__ Partial<Op> add_parts(const Partial<Op>* partials, int64_t parts) {
  Partial<Op> total{};
  for (int64_t i = threadIdx.x % 32; i < parts; i += 32) total.merge(partials[i]);
#pragma unroll
  for (int s = 0; s < Partial<Op>::kSize; ++s) total.v[s] = sum_over_warp(total.v[s]);
  return total;
}

template <class T, class Op>
int launch(const Op& op, const Shape& shape, std::initializer_list<const void*> tensors, void* stream) {
  Geometry g = geometry(shape, tensors);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  g.blocks = g.parts * (shape.channels_last ? g.groups : g.channels);
  int64_t blocks = g.blocks;
  if constexpr (Op::kUpdates) blocks += (op.channels_to_update() + kThreads - 1) / kThreads;
  if (blocks > 0x7fffffff) return static_cast<int>(cudaErrorInvalidConfiguration);
  const dim3 grid(static_cast<unsigned>(blocks));
  if (shape.channels_last) {
    LAUNCH((rows_kernel<T, Op>), grid, dim3(kThreads), 0, s, op, g);
  } else {
    LAUNCH((planes_kernel<T, Op>), grid, dim3(kThreads), 0, s, op, g);
  }
  return static_cast<int>(cudaGetLastError());
}

// Calls f(T()) for the type that a Dtype names.
template <class F>
int with_type(int dtype, F&& f) {
  switch (dtype) {
    case kFloat32:
      return f(float());
    case kFloat16:
      return f(__half());
    default:
      return f(__nv_bfloat16());
  }
}

}  // namespace convmixer::elementwise

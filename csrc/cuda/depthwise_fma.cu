// SPDX-License-Identifier: MIT
// The depthwise convolution in float32 arithmetic, for contiguous and channels_last, float32 and 16-bit, any kernel:
//   eval  y = norm(act(conv(x) + bias)) (+ x)     train  a = conv(x) + bias, and partial statistics of act(a)
//   input gradient  dx = conv(da, flipped w) (+ dy)
// A block owns a tile of outputs of one or several planes. A thread owns 4 x 8 outputs of it, keeps a window of 4 input
// rows in registers and walks down the filter's rows: 32 kTaps FMAs for one new row and one row of weights.
// Bound: issue slots. By the sm_90a SASS for k = 9 at 32x32 an output takes 81 FMAs, 5 instructions to read rows and
// weights, 25 for erf-GELU and, by estimate, 35 to place, fill and store: FMAs are at most 55 % (GELU) or 65 % (ReLU)
// of the instructions. In float32 the 8 bytes of an output take about as long as its FMAs. At most 128 registers let 4
// blocks of 128 threads (channels_last: 2 of 256) share a multiprocessor: one fills its tile while others compute.
#include "depthwise_fma.cuh"

namespace convmixer {
namespace {

using namespace fma;

// If a block may use 227 KB, the tensor-core kernels' plans fit and take all 16-bit tensors: no 16-bit code is compiled
// here.
constexpr int64_t kAllPlansFit = 227 << 10;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1100
template <class T>
constexpr bool kCompiled = sizeof(T) == 4;
#else
template <class T>
constexpr bool kCompiled = true;
#endif
bool can_launch(const Shape& s) { return s.dtype == kFloat32 || most_shared_of_block() < kAllPlansFit; }

// Blocks on a multiprocessor for which registers are limited. GPUs with 100 KB of shared memory hold only 3 tiles of
// k = 9: there a thread may use 168 registers, and 128 would spill.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
template <class L>
constexpr int kBlocks = L::kTaps == 9 && !L::kChannelsLast ? 3 : 512 / L::kThreads;
#else
template <class L>
constexpr int kBlocks = 512 / L::kThreads;
#endif

struct Tiling {
  int across, down;      // patches of a tile
  int images, channels;  // planes of a block
  int tiles_x, tiles_y;
  int image_groups, channel_groups;
  Filter filter;
  Box box;
  FastDiv by_across, by_planes, by_images, by_tiles, by_tiles_x, by_channel_groups;
  FastDiv by_filter, by_row;  // padded taps of a channel, of a filter row
  int weights;                // floats
  int threads;
  size_t shared;
  __host__ __device__ int64_t parts() const { return static_cast<int64_t>(image_groups) * tiles_x * tiles_y; }
  int64_t blocks() const { return parts() * channel_groups; }
};

template <class L>
Tiling tiling_of(const Shape& s, int kh, int kw, bool flipped) {
  const Filter filter = filter_of<L>(kh, kw, flipped);
  const int row_taps = L::kChunked ? 4 * filter.chunks : L::kPaddedTaps, taps = kh * row_taps;
  const int patches_x = static_cast<int>(ceil_div(s.w, kColumns)), patches_y = static_cast<int>(ceil_div(s.h, kRows));
  const int64_t most = max_dynamic_shared(), wish = std::min<int64_t>(most, L::kChannelsLast ? 113 << 10 : 56 << 10);
  const int64_t processors = multiprocessor_count();
  Tiling best{};
  double best_cost = 0;
  for (int64_t limit : {wish, most}) {
    for (int across = std::min({patches_x, L::kSlots, 16}); across > 0; --across) {
      const int tiles_x = static_cast<int>(ceil_div(patches_x, across));
      // a narrower tile may cover the row with as many
      if (ceil_div(patches_x, tiles_x) != across) continue;
      const int tallest = L::kSlots / across;
      for (int tiles_y = static_cast<int>(ceil_div(patches_y, tallest)), tries = 0; tiles_y <= patches_y && tries < 4;
           ++tiles_y) {
        const int down = static_cast<int>(ceil_div(patches_y, tiles_y));
        if (ceil_div(patches_y, down) != tiles_y) continue;
        ++tries;
        Tiling t{};
        t.across = across, t.down = down, t.tiles_x = tiles_x, t.tiles_y = tiles_y, t.filter = filter;
        t.box = box_of<L>(down * kRows + kh - 1, columns_of<L>(filter, across), across);
        int planes = L::kSlots / (across * down);
        for (;; planes = (planes + 1) / 2) {
          t.images = static_cast<int>(std::min<int64_t>(s.n, planes));
          t.channels = L::kChannelsLast ? L::kLanes : static_cast<int>(std::min<int64_t>(s.c, planes / t.images));
          t.image_groups = static_cast<int>(ceil_div(s.n, t.images));
          t.channel_groups = static_cast<int>(ceil_div(s.c, t.channels));
          const int tile_planes = L::kChannelsLast ? t.images : t.images * t.channels;
          t.weights = L::kChannelsLast ? (taps * (L::kLanes + 1) + 3) / 4 * 4 : t.channels * taps;
          t.shared = sizeof(float) * (static_cast<size_t>(tile_planes) * t.box.plane + t.weights + 4 * t.channels);
          const int slots = across * down * tile_planes;
          t.threads = (slots * L::kLanes + 31) / 32 * 32;
          // room for the statistics' sums
          t.shared = std::max(t.shared, sizeof(float) * (t.threads + t.weights + 4 * t.channels));
          const bool fits = static_cast<int64_t>(t.shared) <= limit;
          const bool fills = t.blocks() >= 2 * processors || t.threads <= 64;
          if (planes == 1 || (fits && fills)) break;
        }
        if (static_cast<int64_t>(t.shared) > limit) continue;
        const int tile_planes = L::kChannelsLast ? t.images : t.images * t.channels;
        // the cost in FMAs: the output's own, 40 for its epilogue, and 25 for each element copied to shared memory
        const double cost =
            static_cast<double>(t.blocks()) * (static_cast<double>(t.threads) * kRows * kColumns * (taps + 40) +
                                               25. * tile_planes * L::kLanes * t.box.rows * t.box.columns);
        if (best.threads == 0 || cost < best_cost) best = t, best_cost = cost;
      }
    }
    if (best.threads != 0) break;
  }
  best.by_across = FastDiv(best.across);
  best.by_planes = FastDiv(L::kChannelsLast ? best.images : best.images * best.channels);
  best.by_images = FastDiv(best.images);
  best.by_tiles = FastDiv(best.tiles_x * best.tiles_y);
  best.by_tiles_x = FastDiv(best.tiles_x);
  best.by_channel_groups = FastDiv(best.channel_groups);
  best.by_filter = FastDiv(taps);
  best.by_row = FastDiv(row_taps);
  return best;
}

// The weights with zeros around each row: contiguous [channel][i][tap], channels_last [i][tap][channel] with an odd
// pitch.
template <class L, bool kFlipped>
__device__ __forceinline__ void fill_weights(float* to, const Param& weight, const Tiling& t, int c0,
                                             int64_t channels) {
  const int taps = t.by_filter.divisor, size = t.channels * taps;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    uint32_t tap, column;
    const int channel = t.by_filter.divmod(i, tap), row = t.by_row.divmod(tap, column), j = column - t.filter.front;
    float w = 0.f;
    if (j >= 0 && j < t.filter.kw && c0 + channel < channels) {
      const int r = kFlipped ? t.filter.kh - 1 - row : row, q = kFlipped ? t.filter.kw - 1 - j : j;
      w = load_param(weight, (static_cast<int64_t>(c0 + channel) * t.filter.kh + r) * t.filter.kw + q);
    }
    to[L::kChannelsLast ? tap * (L::kLanes + 1) + channel : i] = w;
  }
}

// acc[r][q] = sum over the taps. `row` is the first row of this thread's window, `weights` are those of its channel.
template <class L>
__device__ __forceinline__ void convolve(float (&acc)[kRows][kColumns], const float* row, int across,
                                         const float* weights, const Tiling& t) {
  constexpr int kTap = L::kChannelsLast ? L::kLanes + 1 : 1;
  const int row_taps = t.by_row.divisor;
  for (int chunk = 0; chunk < (L::kChunked ? t.filter.chunks : 1); ++chunk) {
    Cursor at = cursor<L>(row, t.box, across, chunk);
    const float* w_row = weights + chunk * 4 * kTap;
    float window[kRows][L::kWindow];
#pragma unroll
    for (int r = 0; r < kRows - 1; ++r) {
      read_row<L>(window[r], at);
      at.at += t.box.pitch;
    }
    for (int i = 0; i < t.filter.kh; i += kRows) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if (i + u >= t.filter.kh) break;
        read_row<L>(window[(u + kRows - 1) % kRows], at);
        at.at += t.box.pitch;
        float w[L::kPaddedTaps];
        if constexpr (L::kChannelsLast) {
#pragma unroll
          for (int b = 0; b < L::kTaps; ++b) w[b] = w_row[b * kTap];
        } else {
#pragma unroll
          for (int b = 0; b < L::kPaddedTaps; b += 4) {
            const float4 v = *reinterpret_cast<const float4*>(w_row + b);
            w[b] = v.x, w[b + 1] = v.y, w[b + 2] = v.z, w[b + 3] = v.w;
          }
        }
        w_row += row_taps * kTap;
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int b = 0; b < L::kTaps; ++b)
#pragma unroll
            for (int q = 0; q < kColumns; ++q)
              acc[r][q] = fmaf(w[b], window[(u + r) % kRows][L::kShift + q + b], acc[r][q]);
      }
    }
  }
}

// Sum of f(r, q) over a patch, added in pairs: a chain that adds small values to a large one would round alike 31
// times.
template <class F>
__device__ __forceinline__ float patch_sum(const F& f) {
  float rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    rows[r] = ((f(r, 0) + f(r, 1)) + (f(r, 2) + f(r, 3))) + ((f(r, 4) + f(r, 5)) + (f(r, 6) + f(r, 7)));
  static_assert(kRows == 4 && kColumns == 8, "the sums above are written out");
  return (rows[0] + rows[1]) + (rows[2] + rows[3]);
}

// Sum of v over the `count` threads of a channel, in a fixed order. This thread is number `index` and has its place at
// `at`; the places of the others are `stride` apart.
__device__ __forceinline__ float channel_sum(float v, float* scratch, int at, int stride, int index, int count) {
  int reach = 1;
  while (reach < count) reach *= 2;
  __syncthreads();
  if (index < count) scratch[at] = v;
  __syncthreads();
  for (reach /= 2; reach > 0; reach /= 2) {
    if (index < reach && index + reach < count) scratch[at] += scratch[at + reach * stride];
    __syncthreads();
  }
  return scratch[index < count ? at - index * stride : 0];
}

// The place of a thread's patch.
struct Patch {
  int across, down, image, channel;  // within the block
  int slot;                          // of the slots of its channel
  bool used;                         // the thread has a slot
};
template <class L>
__device__ __forceinline__ Patch patch_of(const Tiling& t) {
  Patch p;
  const int lane = threadIdx.x % L::kLanes;
  uint32_t across, plane;
  p.down = t.by_planes.divmod(t.by_across.divmod(threadIdx.x / L::kLanes, across), plane);
  p.across = across;
  p.channel = L::kChannelsLast ? lane : static_cast<int>(t.by_images.div(plane));
  p.image = plane - (L::kChannelsLast ? 0 : p.channel * t.images);
  p.slot = (p.down * t.images + p.image) * t.across + p.across;
  p.used = p.down < t.down;
  return p;
}

// The block's tile and the thread's patch in the tensor.
template <class L>
struct Position {
  Place place;
  Patch patch;
  int n, c, y, x;
  int part;
  bool active;
  __device__ __forceinline__ Position(const Tiling& t, const Shape& s) : patch(patch_of<L>(t)) {
    uint32_t channel_group, tile, column;
    part = t.by_channel_groups.divmod(blockIdx.x, channel_group);
    const int image_group = t.by_tiles.divmod(part, tile);
    const int y0 = t.by_tiles_x.divmod(tile, column) * t.down * kRows, x0 = column * t.across * kColumns;
    place = {y0 - t.filter.top, x0 - t.filter.pad, image_group * t.images, static_cast<int>(channel_group) * t.channels,
             t.images,          t.channels};
    n = place.n + patch.image, c = place.c + patch.channel;
    y = y0 + patch.down * kRows, x = x0 + patch.across * kColumns;
    active = patch.used && n < s.n && c < s.c && y < s.h && x < s.w;
  }
  __device__ __forceinline__ const float* row(const float* tile, const Box& box) const {
    const int plane = L::kChannelsLast ? patch.image : patch.channel * place.images + patch.image;
    return tile + plane * box.plane + patch.down * kRows * box.pitch + (L::kChannelsLast ? patch.channel : 0);
  }
  __device__ __forceinline__ int64_t offset(const Shape& s, int r) const {
    return L::kChannelsLast ? ((static_cast<int64_t>(n) * s.h + y + r) * s.w + x) * s.c + c
                            : ((n * s.c + c) * s.h + y + r) * s.w + x;
  }
  // this thread's columns of a row of a tensor
  template <class T>
  __device__ __forceinline__ void store(T* row, const float (&v)[kColumns], const Shape& s, bool vector) const {
    if constexpr (L::kChannelsLast) {
#pragma unroll
      for (int q = 0; q < kColumns; ++q)
        if (x + q < s.w) row[q * s.c] = from_float<T>(v[q]);
    } else {
#pragma unroll
      for (int q = 0; q < kColumns; q += 4)
        if (x + q < s.w) store4(row + q, Four{{v[q], v[q + 1], v[q + 2], v[q + 3]}}, s.w - x - q, vector);
    }
  }
  template <class T>
  __device__ __forceinline__ void add(float (&v)[kColumns], const T* row, const Shape& s, bool vector) const {
    if constexpr (L::kChannelsLast) {
#pragma unroll
      for (int q = 0; q < kColumns; ++q)
        if (x + q < s.w) v[q] += to_float(row[q * s.c]);
    } else {
#pragma unroll
      for (int q = 0; q < kColumns; q += 4) {
        if (x + q >= s.w) continue;
        const Four f = load4(row + q, s.w - x - q, vector).wide();
#pragma unroll
        for (int j = 0; j < 4; ++j) v[q + j] += f.v[j];
      }
    }
  }
};

// Inf and NaN: the zeros around a filter's rows multiply the neighbours of its taps, and 0 * Inf is NaN.
template <class L>
__device__ __forceinline__ bool has_zeros(const Tiling& t) {
  return t.filter.kw != (L::kChunked ? static_cast<int>(t.by_row.divisor) : L::kTaps);
}
// trace + 0 * v: becomes NaN, and stays NaN, once a value is not finite.
__device__ __forceinline__ float trace_finite(float trace, const float (&v)[kColumns]) {
#pragma unroll
  for (int q = 0; q < kColumns; ++q) trace = fmaf(0.f, v[q], trace);
  return trace;
}

// Computes the thread's stored values of `out` that are NaN again, by f(sum of the filter's own taps, row and column in
// the patch, place of the value). It recomputes every index: the kernels have no registers to keep them in.
template <class T, class L, class F>
__device__ __forceinline__ void settle_nan(T* out, const Shape& s, const Tiling& t, const float* weights, const F& f) {
  constexpr int kTap = L::kChannelsLast ? L::kLanes + 1 : 1;
  const Position<L> at(t, s);
  const float* const row = at.row(weights + t.weights + 4 * t.channels, t.box);
  weights += L::kChannelsLast ? at.patch.channel : at.patch.channel * static_cast<int>(t.by_filter.divisor);
  const int first = at.patch.across * kColumns + L::kShift + t.filter.front;
#pragma unroll 1
  for (int o = 0; o < kRows * kColumns; ++o) {
    const int r = o / kColumns, q = o % kColumns;
    if (at.y + r >= s.h || at.x + q >= s.w) continue;
    const int64_t place = at.offset(s, r) + q * (L::kChannelsLast ? s.c : 1);
    if (to_float(out[place]) == to_float(out[place])) continue;
    float sum = 0.f;
#pragma unroll 1
    for (int i = 0; i < t.filter.kh; ++i) {
      const float* const w = weights + (i * static_cast<int>(t.by_row.divisor) + t.filter.front) * kTap;
#pragma unroll 1
      for (int j = 0; j < t.filter.kw; ++j)
        sum = fmaf(w[j * kTap], row[(r + i) * t.box.pitch + column_offset<L>(t.box, first + q + j)], sum);
    }
    out[place] = from_float<T>(f(sum, at, place));
  }
}
template <class T, class L>
__device__ __noinline__ void settle_forward(const DepthwiseForward& p, const Tiling& t, const float* weights) {
  settle_nan<T, L>(static_cast<T*>(p.y), p.shape, t, weights, [&](float v, const Position<L>& at, int64_t place) {
    const float4 k = reinterpret_cast<const float4*>(weights + t.weights)[at.patch.channel];
    v += k.x;
    if (p.partials != nullptr) return v;
    dispatch_activation(p.activation, [&](auto act) { v = activation<decltype(act)::value>(v); });
    v = (v - k.y) * k.z + k.w;
    return p.residual ? v + to_float(static_cast<const T*>(p.x)[place]) : v;
  });
}
template <class T, class L>
__device__ __noinline__ void settle_input_grad(const DepthwiseInputGrad& p, const Tiling& t, const float* weights) {
  settle_nan<T, L>(static_cast<T*>(p.dx), p.shape, t, weights, [&](float v, const Position<L>&, int64_t place) {
    return p.residual ? v + to_float(static_cast<const T*>(p.dy)[place]) : v;
  });
}

template <class T, class L>
__global__ void __launch_bounds__(L::kThreads, kBlocks<L>)
    depthwise_forward_tile(const __grid_constant__ DepthwiseForward p, const __grid_constant__ Tiling t,
                           const bool vector) {
  if constexpr (!kCompiled<T>) return;
  DYN_SHARED(float, weights);
  float4* const constants = reinterpret_cast<float4*>(weights + t.weights);
  float* const tile = weights + t.weights + 4 * t.channels;
  const Shape& s = p.shape;
  const Position<L> at(t, s);

  fill_weights<L, false>(weights, p.weight, t, at.place.c, s.c);
  for (int i = threadIdx.x; i < t.channels; i += blockDim.x) {
    const int c = at.place.c + i;
    float4 k = make_float4(0.f, 0.f, 1.f, 0.f);  // bias, mean, scale, shift
    if (c < s.c) {
      k.x = load_param(p.bias, c);
      if (p.norm.present) {
        k.y = load_param(p.norm.mean, c);
        k.z = load_param(p.norm.weight, c, 1.f) / sqrtf(load_param(p.norm.var, c) + p.norm.eps);
        k.w = load_param(p.norm.bias, c);
      }
    }
    constants[i] = k;
  }
  InputSource<T> source{static_cast<const T*>(p.x), vector};
  fill<L>(tile, t.box, at.place, s, source);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  float acc[kRows][kColumns] = {};
  const float* const row = at.row(tile, t.box);
  float4 k = make_float4(0.f, 0.f, 0.f, 0.f);
  if (at.active) {
    convolve<L>(
        acc, row, at.patch.across,
        weights + (L::kChannelsLast ? at.patch.channel : at.patch.channel * static_cast<int>(t.by_filter.divisor)), t);
    k = constants[at.patch.channel];
  }
  T* const y = static_cast<T*>(p.y);
  const bool training = p.partials != nullptr;
  float trace = 0.f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int q = 0; q < kColumns; ++q) {
      acc[r][q] += k.x;
      if (training) acc[r][q] = to_float(from_float<T>(acc[r][q]));
    }
    if (training && at.active && at.y + r < s.h) {
      at.store(y + at.offset(s, r), acc[r], s, vector);
      trace = trace_finite(trace, acc[r]);
    }
  }
  // the statistics need no second look: if a product is NaN, the channel has a value that is NaN or infinite
  if (trace != trace && has_zeros<L>(t)) settle_forward<T, L>(p, t, weights);
  dispatch_activation(p.activation, [&](auto act) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int q = 0; q < kColumns; ++q) acc[r][q] = activation<decltype(act)::value>(acc[r][q]);
  });
  if (!training) {
    if (!at.active) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (at.y + r >= s.h) break;
#pragma unroll
      for (int q = 0; q < kColumns; ++q) acc[r][q] = (acc[r][q] - k.y) * k.z + k.w;
      if (p.residual) {
        const float* const center = row + (r + t.filter.top) * t.box.pitch;
        if constexpr (L::kChannelsLast) {
          const int column = at.patch.across * kColumns + t.filter.pad;
#pragma unroll
          for (int q = 0; q < kColumns; ++q) acc[r][q] += center[column_offset<L>(t.box, column + q)];
        } else {
          float x[kColumns];
          read_row<L>(x, cursor<L>(center, t.box, at.patch.across, t.filter.pad / 4));
#pragma unroll
          for (int q = 0; q < kColumns; ++q) acc[r][q] += x[q];
        }
      }
      at.store(y + at.offset(s, r), acc[r], s, vector);
      trace = trace_finite(trace, acc[r]);
    }
    if (trace != trace && has_zeros<L>(t)) settle_forward<T, L>(p, t, weights);
    return;
  }

  // the statistics of act(a) in two steps: the mean, then squared deviations from it
  const auto inside = [&](int r, int q) { return at.active && at.y + r < s.h && at.x + q < s.w; };
  const float sum = patch_sum([&](int r, int q) { return inside(r, q) ? acc[r][q] : 0.f; });
  const int slots = t.across * t.down * t.images, stride = L::kChannelsLast ? L::kLanes : 1;
  const int first = L::kChannelsLast ? at.patch.channel : at.patch.channel * slots;
  const int index = at.patch.used ? at.patch.slot : slots;
  const int rows = min(t.down * kRows, s.h - at.place.y - t.filter.top);
  const int columns = min(t.across * kColumns, s.w - at.place.x - t.filter.pad);
  const float count = static_cast<float>(min(static_cast<int64_t>(t.images), s.n - at.place.n) * rows * columns);
  const float mean = channel_sum(sum, tile, first + index * stride, stride, index, slots) / count;
  float square = patch_sum([&](int r, int q) {
    const float d = inside(r, q) ? acc[r][q] - mean : 0.f;
    return d * d;
  });
  square = channel_sum(square, tile, first + index * stride, stride, index, slots);
  if (index == 0 && at.c < s.c) {
    float* const out = p.partials + (static_cast<int64_t>(at.c) * t.parts() + at.part) * 3;
    out[0] = count, out[1] = mean, out[2] = square;
  }
}

template <class T, class L>
__global__ void __launch_bounds__(L::kThreads, kBlocks<L>)
    depthwise_input_grad_tile(const __grid_constant__ DepthwiseInputGrad p, const __grid_constant__ Tiling t,
                              const bool vector) {
  if constexpr (!kCompiled<T>) return;
  DYN_SHARED(float, weights);
  float4* const constants = reinterpret_cast<float4*>(weights + t.weights);
  float* const tile = weights + t.weights + 4 * t.channels;
  const Shape& s = p.shape;
  const Position<L> at(t, s);

  fill_weights<L, true>(weights, p.weight, t, at.place.c, s.c);
  const float count = static_cast<float>(s.n * s.h * s.w);
  for (int i = threadIdx.x; i < t.channels; i += blockDim.x)
    constants[i] = at.place.c + i < s.c ? gradient_constants(p.norm, p.sums, at.place.c + i, count)
                                        : make_float4(0.f, 0.f, 0.f, 0.f);
  __syncthreads();
  GradientSource<T, L::kChannelsLast> source{
      static_cast<const T*>(p.dy), static_cast<const T*>(p.a), constants, p.activation, p.sums.dy != nullptr, vector};
  fill<L>(tile, t.box, at.place, s, source);
  __syncthreads();
  if (!at.active) return;

  float acc[kRows][kColumns] = {};
  convolve<L>(
      acc, at.row(tile, t.box), at.patch.across,
      weights + (L::kChannelsLast ? at.patch.channel : at.patch.channel * static_cast<int>(t.by_filter.divisor)), t);
  float trace = 0.f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (at.y + r >= s.h) break;
    const int64_t offset = at.offset(s, r);
    if (p.residual) at.add(acc[r], static_cast<const T*>(p.dy) + offset, s, vector);
    at.store(static_cast<T*>(p.dx) + offset, acc[r], s, vector);
    trace = trace_finite(trace, acc[r]);
  }
  if (trace != trace && has_zeros<L>(t)) settle_input_grad<T, L>(p, t, weights);
}

template <class K, class P>
int launch(K kernel, const P& p, const Tiling& t, bool vector, void* stream) {
  if (t.threads == 0 || t.blocks() > 0x7fffffff) return static_cast<int>(cudaErrorInvalidConfiguration);
  if (const cudaError_t error = set_dynamic_shared(kernel, t.shared); error != cudaSuccess)
    return static_cast<int>(error);
  LAUNCH(kernel, dim3(static_cast<unsigned>(t.blocks())), dim3(t.threads), t.shared, static_cast<cudaStream_t>(stream),
         p, t, vector);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int64_t depthwise_forward_fma_partials(const Shape& shape, int kh, int kw) {
  int64_t parts = 0;
  dispatch(shape, kh, kw, [&](auto, auto layout) {
    parts = tiling_of<decltype(layout)>(shape, kh, kw, false).parts();
    return 0;
  });
  return parts;
}

int depthwise_forward_fma(const DepthwiseForward& p, void* stream) {
  if (!can_launch(p.shape)) return static_cast<int>(cudaErrorInvalidConfiguration);
  return dispatch(p.shape, p.kh, p.kw, [&](auto type, auto layout) {
    using T = decltype(type);
    using L = decltype(layout);
    return launch(depthwise_forward_tile<T, L>, p, tiling_of<L>(p.shape, p.kh, p.kw, false),
                  vectors<T>(p.shape, {p.x, p.y}), stream);
  });
}

int depthwise_input_grad_fma(const DepthwiseInputGrad& p, void* stream) {
  if (!can_launch(p.shape)) return static_cast<int>(cudaErrorInvalidConfiguration);
  return dispatch(p.shape, p.kh, p.kw, [&](auto type, auto layout) {
    using T = decltype(type);
    using L = decltype(layout);
    return launch(depthwise_input_grad_tile<T, L>, p, tiling_of<L>(p.shape, p.kh, p.kw, true),
                  vectors<T>(p.shape, {p.dy, p.a, p.dx}), stream);
  });
}

}  // namespace convmixer

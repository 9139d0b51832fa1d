// SPDX-License-Identifier: MIT
// The depthwise weight gradient in float32 arithmetic, for float32 tensors, contiguous and channels_last, any kernel:
//   dw[c, i, j] = sum over n, y, x of da[n, c, y, x] * x[n, c, y + i - top, x + j - left],  db[c] = sum of da
// A block walks tiles of the images of some channels: x with its halo and da lie in shared memory and are read from
// memory once. A thread owns a strip of 8 columns and holds kFilterRows x kTaps taps in registers. On its way down it
// keeps kFilterRows rows of da and reads one row of x: 8 and 16 floats for 8 kFilterRows kTaps FMAs (216 for k = 9). At
// the end the block adds up its threads in order and leaves one partial; a second launch adds up the partials in order.
// Bound: FMAs, 81 an element for k = 9. Shared memory takes half as long.
#include "depthwise_fma.cuh"

namespace convmixer {
namespace {

using namespace fma;

template <class L>
constexpr int kFilterRows = L::kTaps == 5                  ? 5
                            : L::kTaps == 7 || L::kChunked ? 4
                                                           : 3;
// With up to 168 registers a multiprocessor runs 3 blocks of 128 or 2 of 192 threads.
template <class L>
constexpr int kThreads = L::kChannelsLast ? 192 : 128;
template <class L>
constexpr int kSlots = kThreads<L> / L::kLanes;

// Most units of a part. A thread adds that many sums in float32, each of at most a few hundred values.
constexpr int64_t kLongest = 32;

struct Tiling {
  int across, strips, strip_rows, images;  // a tile: strips of 8 columns across and down, images
  int tiles_x, tiles_y, image_groups, channel_groups;
  int groups, jobs, splits;  // groups of filter rows; (group, chunk) pairs of a block; blocks that share them
  int parts;
  Filter filter;
  Box x, da;
  int threads;
  size_t shared;
  int64_t units() const { return static_cast<int64_t>(image_groups) * tiles_x * tiles_y; }
};

template <class L>
Tiling tiling_of(const Shape& s, int kh, int kw) {
  constexpr int kRowsOfFilter = kFilterRows<L>;
  Tiling common{};
  common.filter = filter_of<L>(kh, kw, false);
  common.groups = static_cast<int>(ceil_div(kh, kRowsOfFilter));
  const int all_jobs = common.groups * common.filter.chunks;
  common.splits = static_cast<int>(ceil_div(all_jobs, kSlots<L>));
  common.jobs = static_cast<int>(ceil_div(all_jobs, common.splits));
  common.channel_groups = static_cast<int>(ceil_div(s.c, L::kLanes));
  const int patches = static_cast<int>(ceil_div(s.w, kColumns));
  const int64_t most = max_dynamic_shared(), wish = std::min<int64_t>(most, L::kChannelsLast ? 113 << 10 : 75 << 10);
  Tiling best{};
  double best_cost = 0;
  for (int64_t limit : {wish, most}) {
    for (int across = std::min(patches, kSlots<L> / common.jobs), widths = 0; across > 0 && widths < 6; --across) {
      const int tiles_x = static_cast<int>(ceil_div(patches, across));
      if (ceil_div(patches, tiles_x) != across) continue;
      ++widths;
      const int room = kSlots<L> / (common.jobs * across);
      for (int tiles_y = 1, heights = 0; tiles_y <= s.h && heights < 4; ++tiles_y) {
        const int height = static_cast<int>(ceil_div(s.h, tiles_y));
        if (ceil_div(s.h, height) != tiles_y) continue;
        bool fits = false;
        for (int strips = 1; strips <= std::min(room, height); ++strips) {
          Tiling t = common;
          t.across = across, t.tiles_x = tiles_x, t.tiles_y = tiles_y, t.strips = strips;
          t.strip_rows = static_cast<int>(ceil_div(height, strips));
          const int rows = strips * t.strip_rows;
          t.x = box_of<L>(rows + common.groups * kRowsOfFilter - 1, columns_of<L>(common.filter, across), across);
          t.da = box_of<L>(rows, kColumns * across, across);
          for (t.images = static_cast<int>(std::min<int64_t>(s.n, room / strips));; t.images = (t.images + 1) / 2) {
            t.image_groups = static_cast<int>(ceil_div(s.n, t.images));
            t.threads = (common.jobs * across * strips * t.images * L::kLanes + 31) / 32 * 32;
            const size_t tiles = static_cast<size_t>(t.images) * (t.x.plane + t.da.plane);
            const size_t sums = static_cast<size_t>(kRowsOfFilter * L::kTaps + 4) * (t.threads + 1);
            t.shared = sizeof(float) * (4 * L::kLanes + tiles + sums);
            if (t.images == 1 || static_cast<int64_t>(t.shared) <= limit) break;
          }
          if (static_cast<int64_t>(t.shared) > limit) continue;
          fits = true;
          // the cost in FMAs: the taps, 12 for the reads of a row, 25 for each element copied to shared memory
          const double cost = static_cast<double>(t.units()) *
                              (static_cast<double>(t.threads) * t.strip_rows *
                                   (kColumns * kRowsOfFilter * L::kTaps + 12. * kRowsOfFilter) +
                               25. * t.images * L::kLanes * (t.x.rows * t.x.columns + t.da.rows * t.da.columns));
          if (best.threads == 0 || cost < best_cost) best = t, best_cost = cost;
        }
        heights += fits;
      }
    }
    if (best.threads != 0) break;
  }
  // sixteen blocks a multiprocessor make several rounds of those that run at once; and no part is so long that its
  // float32 sums lose what the double sum of the parts keeps
  const int64_t blocks = static_cast<int64_t>(best.channel_groups) * best.splits;
  const int64_t wanted = std::max(ceil_div(16 * multiprocessor_count(), blocks), ceil_div(best.units(), kLongest));
  best.parts = static_cast<int>(std::max<int64_t>(1, std::min(best.units(), wanted)));
  return best;
}

template <class T, class L>
__global__ void __launch_bounds__(kThreads<L>, 384 / kThreads<L>)
    depthwise_weight_grad_tiles(const DepthwiseWeightGrad p, const Tiling t, const bool vector) {
  constexpr int kFilter = kFilterRows<L>, kOwned = kFilter * L::kTaps;
  DYN_SHARED(float, shared);
  float4* const constants = reinterpret_cast<float4*>(shared);
  float* const x_tile = shared + 4 * L::kLanes;
  float* const da_tile = x_tile + t.images * t.x.plane;
  const Shape& s = p.shape;

  const int channel_group = blockIdx.x % t.channel_groups, rest = blockIdx.x / t.channel_groups;
  const int split = rest % t.splits, part = rest / t.splits, c0 = channel_group * L::kLanes;
  const int lane = threadIdx.x % L::kLanes, slot = threadIdx.x / L::kLanes;
  const int slots = t.across * t.images * t.strips;  // of one job
  const int across = slot % t.across, image = slot / t.across % t.images, strip = slot % slots / (t.across * t.images);
  const int job = split * t.jobs + slot / slots, group = job / t.filter.chunks, chunk = job % t.filter.chunks;
  const bool active = slot / slots < t.jobs && group < t.groups;

  const float count = static_cast<float>(s.n * s.h * s.w);
  for (int i = threadIdx.x; i < L::kLanes; i += blockDim.x)
    constants[i] = c0 + i < s.c ? gradient_constants(p.norm, p.sums, c0 + i, count) : make_float4(0.f, 0.f, 0.f, 0.f);

  InputSource<T> x{static_cast<const T*>(p.x), vector};
  Summed<GradientSource<T, L::kChannelsLast>> da{
      {static_cast<const T*>(p.dy), static_cast<const T*>(p.a), constants, p.activation, p.sums.dy != nullptr, vector}};
  // Row o holds each thread's sum for its tap o; 4 rows for the bias follow. The sums are in shared memory, so that
  // filling needs few registers, and each is of one unit at a time, so that no sum is long.
  float* const sums = da_tile + t.images * t.da.plane;
  const int pitch = blockDim.x + 1;
#pragma unroll
  for (int o = 0; o < kOwned + 4; ++o) sums[o * pitch + threadIdx.x] = 0.f;
  const int tiles = t.tiles_x * t.tiles_y;
  const int64_t units = t.image_groups * static_cast<int64_t>(tiles);
  const int last = static_cast<int>((part + 1) * units / t.parts);
  for (int unit = static_cast<int>(part * units / t.parts); unit < last; ++unit) {
    const int tile = unit % tiles, n0 = unit / tiles * t.images;
    const int y0 = tile / t.tiles_x * t.strips * t.strip_rows, x0 = tile % t.tiles_x * t.across * kColumns;
    __syncthreads();
    fill<L>(x_tile, t.x, Place{y0 - t.filter.top, x0 - t.filter.pad, n0, c0, t.images, L::kLanes}, s, x);
    cp_async_commit();
    fill<L>(da_tile, t.da, Place{y0, x0, n0, c0, t.images, L::kLanes}, s, da);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sums[(kOwned + j) * pitch + threadIdx.x] += da.sum[j];
      da.sum[j] = 0.f;
    }
    cp_async_wait<0>();
    __syncthreads();
    if (!active) continue;

    float acc[kOwned] = {}, window[kFilter][kColumns];
    const float* const x_row = x_tile + image * t.x.plane + (strip * t.strip_rows + group * kFilter) * t.x.pitch + lane;
    const float* const da_row = da_tile + image * t.da.plane + strip * t.strip_rows * t.da.pitch + lane;
    Cursor x_at = cursor<L>(x_row, t.x, across, chunk), da_at = cursor<L>(da_row, t.da, across, 0);
    for (int step = 0; step < t.strip_rows + kFilter - 1; step += kFilter) {
#pragma unroll
      for (int u = 0; u < kFilter; ++u) {
        if (step + u >= t.strip_rows + kFilter - 1) break;
        float row[L::kWindow];
        read_row<L>(row, x_at);
        x_at.at += t.x.pitch;
        if (step + u < t.strip_rows) {
          read_row<L>(window[u], da_at);
          da_at.at += t.da.pitch;
        }
#pragma unroll
        for (int i = 0; i < kFilter; ++i) {
          if (step + u < i || step + u - i >= t.strip_rows) continue;
#pragma unroll
          for (int q = 0; q < kColumns; ++q)
#pragma unroll
            for (int b = 0; b < L::kTaps; ++b)
              acc[i * L::kTaps + b] =
                  fmaf(window[(u - i + kFilter) % kFilter][q], row[L::kShift + q + b], acc[i * L::kTaps + b]);
        }
      }
    }
#pragma unroll
    for (int o = 0; o < kOwned; ++o) sums[o * pitch + threadIdx.x] += acc[o];
  }

  __syncthreads();
  const int taps = t.filter.kh * t.filter.kw;
  float* const out = static_cast<float*>(p.workspace) + static_cast<int64_t>(part) * s.c * (taps + 1);
  for (int o = threadIdx.x; o < t.jobs * kOwned * L::kLanes; o += blockDim.x) {
    const int channel = o % L::kLanes, owned = o / L::kLanes % kOwned, local = o / (L::kLanes * kOwned);
    const int index = split * t.jobs + local;
    const int i = index / t.filter.chunks * kFilter + owned / L::kTaps;
    const int j = index % t.filter.chunks * L::kTaps + owned % L::kTaps - t.filter.front;
    if (i >= t.filter.kh || j < 0 || j >= t.filter.kw || c0 + channel >= s.c) continue;
    double sum = 0.;
    for (int m = 0; m < slots; ++m) sum += sums[owned * pitch + (local * slots + m) * L::kLanes + channel];
    out[static_cast<int64_t>(c0 + channel) * (taps + 1) + i * t.filter.kw + j] = static_cast<float>(sum);
  }
  if (split != 0) return;
  for (int channel = threadIdx.x; channel < L::kLanes; channel += blockDim.x) {
    if (c0 + channel >= s.c) continue;
    double sum = 0.;
    if constexpr (L::kChannelsLast) {
      // a thread always fills the same 4 channels
      for (int m = channel / 4; m < static_cast<int>(blockDim.x); m += L::kLanes / 4)
        sum += sums[(kOwned + channel % 4) * pitch + m];
    } else {
      for (int j = 0; j < 4; ++j)
        for (int m = 0; m < static_cast<int>(blockDim.x); ++m) sum += sums[(kOwned + j) * pitch + m];
    }
    out[static_cast<int64_t>(c0 + channel) * (taps + 1) + taps] = static_cast<float>(sum);
  }
}

constexpr int kFinishThreads = 128;

__global__ void __launch_bounds__(kFinishThreads)
    depthwise_weight_grad_finish(const DepthwiseWeightGrad p, const int parts) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  const int taps = p.kh * p.kw;
  const int64_t size = p.shape.c * (taps + 1);
  if (at >= size) return;
  double sum = 0.;
  for (int part = 0; part < parts; ++part) sum += static_cast<const float*>(p.workspace)[part * size + at];
  const int64_t c = at / (taps + 1);
  const int tap = static_cast<int>(at % (taps + 1));
  if (tap < taps) {
    store_param(p.dw, p.dw_dtype, c * taps + tap, static_cast<float>(sum));
  } else if (p.db != nullptr) {
    store_param(p.db, p.db_dtype, c, static_cast<float>(sum));
  }
}

}  // namespace

int64_t depthwise_weight_grad_fma_workspace(const Shape& shape, int kh, int kw) {
  int64_t parts = 0;
  dispatch_layout<float>(shape, kh, kw, [&](auto, auto layout) {
    parts = tiling_of<decltype(layout)>(shape, kh, kw).parts;
    return 0;
  });
  return parts * shape.c * (kh * kw + 1) * static_cast<int64_t>(sizeof(float));
}

int depthwise_weight_grad_fma(const DepthwiseWeightGrad& p, void* stream) {
  return dispatch_layout<float>(p.shape, p.kh, p.kw, [&](auto type, auto layout) {
    using T = decltype(type);
    using L = decltype(layout);
    const Tiling t = tiling_of<L>(p.shape, p.kh, p.kw);
    const int64_t blocks = static_cast<int64_t>(t.channel_groups) * t.splits * t.parts;
    if (t.threads == 0 || blocks > 0x7fffffff) return static_cast<int>(cudaErrorInvalidConfiguration);
    const auto kernel = depthwise_weight_grad_tiles<T, L>;
    if (const cudaError_t error = set_dynamic_shared(kernel, t.shared); error != cudaSuccess)
      return static_cast<int>(error);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(t.threads), t.shared, queue, p, t,
           vectors<T>(p.shape, {p.dy, p.a, p.x}));
    const int64_t results = p.shape.c * (p.kh * p.kw + 1);
    LAUNCH(depthwise_weight_grad_finish, dim3(static_cast<unsigned>(ceil_div(results, kFinishThreads))),
           dim3(kFinishThreads), 0, queue, p, t.parts);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace convmixer

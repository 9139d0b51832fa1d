// SPDX-License-Identifier: MIT
// The channels_last (N, H, W, C) kernel of depthwise_mma.cuh. A block of 8 warps owns G channels, G / 8 a warp, and the
// items blockIdx.y, blockIdx.y + splits, ... A thread copies 8 pixels of 8 channels (16 bytes each) asynchronously to a
// raw stage, transposes them in registers and writes 16 bytes to each of 8 channel planes. The input gradient also
// reads a, which the copies have brought into L2, and computes da before it writes. The copies of the next item run
// while this one is computed. A warp writes its outputs over rows of its plane that it no longer needs; the inverse
// transpose makes 16-byte stores of them.
#pragma once
#include "depthwise_mma.cuh"

namespace convmixer {
namespace mma {

constexpr int kChannelsLastWarps = 8;

// Eight pixels x eight channels of the input tile of an item.
struct Octet {
  int plane, raw;  // byte offsets: in a channel's plane; of pixel 0 in the raw stage
  int64_t index;   // of pixel 0's first channel
  int channel;     // first channel within the block
  int from, to;    // pixels inside of the image; none if from >= to
};

template <int G, int S, bool SINGLE, class F>
__device__ __forceinline__ void for_each_octet(const Plan& plan, const Item& item, int c0, F&& f) {
  // rows outside [row_lo, row_lo + row_count) are outside the image
  const int total = plan.images * plan.tile_rows * plan.chunks * (G / 8);
  for (int q = threadIdx.x; q < total; q += 32 * kChannelsLastWarps) {
    uint32_t chunk, row;
    const int part = q % (G / 8), linear = q / (G / 8);
    const uint32_t rest = plan.by_copy_chunks.divmod(linear, chunk);
    const int image = plan.by_copy_rows.divmod(rest, row);
    const int n = item.image + image, y = item.row + static_cast<int>(row) - plan.top;
    const int x = SINGLE ? 8 * chunk : item.column + 8 * (static_cast<int>(chunk) - S);
    const bool inside = n < plan.n && y >= 0 && y < plan.h && c0 + 8 * part < plan.c;
    Octet o;
    o.plane = image * plan.plane_bytes + static_cast<int>(row) * plan.pitch + static_cast<int>(chunk) * 16;
    o.raw = ((image * plan.row_count + static_cast<int>(row) - plan.row_lo) * plan.chunks + static_cast<int>(chunk)) *
                plan.raw_chunk +
            part * 16;
    o.index = ((static_cast<int64_t>(n) * plan.h + y) * plan.w + x) * plan.c + c0 + 8 * part;
    o.channel = 8 * part;
    o.from = max(0, -x);
    o.to = inside ? min(8, plan.w - x) : 0;
    f(o);
  }
}

template <class T, int G>
__device__ __forceinline__ void copy_octet(unsigned char* raw, const T* from, const Octet& o, int channels, int pitch,
                                           bool vectors) {
  if (vectors) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool inside = i >= o.from && i < o.to;
      cp_async<16>(raw + o.raw + i * 2 * G, inside ? from + o.index + static_cast<int64_t>(i) * pitch : from,
                   inside ? 16 : 0);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 64; ++i) {
    const int pixel = i / 8, k = i % 8;
    const bool inside = pixel >= o.from && pixel < o.to && k < channels;
    reinterpret_cast<T*>(raw + o.raw + pixel * 2 * G)[k] =
        inside ? from[o.index + static_cast<int64_t>(pixel) * pitch + k] : from_float<T>(0.f);
  }
}

// Copies value by value from memory to the octet's place, as 8 pixels of each channel.
template <class T, int G>
__device__ __forceinline__ void copy_transposed(unsigned char* to, const T* from, const Octet& o, int channels,
                                                int pitch) {
#pragma unroll 1
  for (int i = 0; i < 64; ++i) {
    const int k = i / 8, pixel = i % 8;
    const bool inside = pixel >= o.from && pixel < o.to && k < channels;
    reinterpret_cast<T*>(to + k * 2 * G)[pixel] =
        inside ? from[o.index + static_cast<int64_t>(pixel) * pitch + k] : from_float<T>(0.f);
  }
}

template <int G>
__device__ __forceinline__ void load_octet(uint4 (&v)[8], const unsigned char* place) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = load16(place + i * 2 * G);
  transpose8(v);
}

// Keeps values [from, to) of 8; the others become zero.
__device__ __forceinline__ uint4 keep_range(uint4 v, int from, int to) {
  const auto keep = [from, to](uint32_t w, int i) {
    return (i >= from && i < to ? w & 0xffffu : 0u) | (i + 1 >= from && i + 1 < to ? w & 0xffff0000u : 0u);
  };
  if (from == 0 && to == 8) return v;
  return make_uint4(keep(v.x, 0), keep(v.y, 2), keep(v.z, 4), keep(v.w, 6));
}

template <class T, bool GRAD, int S, int KH, int NT, bool SINGLE, int G>
__global__ void __launch_bounds__(32 * kChannelsLastWarps, 2) channels_last_kernel(const __grid_constant__ Args p) {
  DYN_SHARED(unsigned char, shared);
  const Plan& plan = p.plan;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int c0 = blockIdx.x * G, split = blockIdx.y;
  const bool transforms = GRAD && p.a != nullptr;
  const T* x = static_cast<const T*>(p.x);
  const T* a = static_cast<const T*>(p.a);
  unsigned char* const planes = shared;
  unsigned char* const raw = planes + G * plan.tile_bytes;
  unsigned char* const tables = raw + plan.raw_bytes;
  Affine* const affines = reinterpret_cast<Affine*>(tables + G * plan.table_bytes);
  // training: each lane's moments of each channel
  Moments* const moments_of_lanes = reinterpret_cast<Moments*>(affines + G);
  const bool trains = !GRAD && p.partials != nullptr;

  for (int k = warp; k < G; k += kChannelsLastWarps) {
    Affine affine = {0.f, 1.f, 0.f, 0.f};
    if (c0 + k < plan.c) {
      build_table<T, GRAD, S>(reinterpret_cast<T*>(tables + k * plan.table_bytes), p, c0 + k, KH > 0 ? KH : plan.kh,
                              lane, 32);
      affine = load_affine<T, GRAD>(p, c0 + k);
    }
    if (lane == 0) affines[k] = affine;
    if (trains) moments_of_lanes[32 * k + lane] = {0.f, 0.f, 0.f};
  }
  __syncthreads();

  const auto copy = [&](int item) {
    if (item < plan.items) {
      for_each_octet<G, S, SINGLE>(plan, locate(plan, item), c0, [&](const Octet& o) {
        if (o.from >= o.to) return;
        const int channels = plan.c - c0 - o.channel;
        copy_octet<T, G>(raw, x, o, channels, plan.c, plan.granule == 8);
        if constexpr (GRAD) {
          if (!transforms) return;
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (i >= o.from && i < o.to) prefetch_l2(a + o.index + static_cast<int64_t>(i) * plan.c);
        }
      });
    }
    cp_async_commit();
  };

  copy(split);
  uint32_t trace = 0;
  for (int current = split; current < plan.items; current += plan.splits) {
    const Item item = locate(plan, current);
    cp_async_wait<0>();
    for_each_octet<G, S, SINGLE>(plan, item, c0, [&](const Octet& o) {
      uint4 v[8];
      unsigned char* const to = planes + o.channel * plan.tile_bytes + o.plane;
      unsigned char* const place = raw + o.raw;
      const bool inside = o.from < o.to;
      if (inside) {
        load_octet<G>(v, place);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) store16_shared(to + i * plan.tile_bytes, v[i]);
      if (transforms && inside) {
        // a takes the place of dy in the raw stage; not unrolled: the derivative is long
        if (plan.granule == 8) {
#pragma unroll
          for (int i = 0; i < 8; ++i)
            v[i] = i >= o.from && i < o.to ? load16(a + o.index + static_cast<int64_t>(i) * plan.c)
                                           : make_uint4(0, 0, 0, 0);
          transpose8(v);
#pragma unroll
          for (int i = 0; i < 8; ++i) store16_shared(place + i * 2 * G, v[i]);
        } else {
          copy_transposed<T, G>(place, a, o, plan.c - c0 - o.channel, plan.c);
        }
#pragma unroll 1
        for (int i = 0; i < 8; ++i) {
          unsigned char* const da = to + i * plan.tile_bytes;
          const uint4 value =
              grad_through_block<T>(load16(da), load16(place + i * 2 * G), affines[o.channel + i], p.activation);
          store16_shared(da, keep_range(value, o.from, o.to));
        }
      }
    });
    __syncthreads();
    copy(current + plan.splits);

    const int count = plan.images * plan.rows;
#pragma unroll 1
    for (int k = warp; k < min(G, plan.c - c0); k += kChannelsLastWarps) {
      unsigned char* const plane = planes + k * plan.tile_bytes;
      const T* const table = reinterpret_cast<const T*>(tables + k * plan.table_bytes);
      const Affine affine = affines[k];
      Moments moments = {0.f, 0.f, 0.f};
      if (trains) moments = moments_of_lanes[32 * k + lane];
      uint32_t fixed[KH > 0 ? KH : 1][2 * S];
      if constexpr (KH > 0) {
#pragma unroll
        for (int i = 0; i < KH; ++i) load_toeplitz<T, S>(fixed[i], table, i, lane);
      }
      for (int unit = 0; unit < plan.strips * plan.groups; ++unit) {
        uint32_t group = 0;
        const int strip = SINGLE ? unit : static_cast<int>(plan.by_groups.divmod(unit, group));
        uint32_t y;
        const int image = plan.by_rows.divmod(min(16 * strip + (lane & 15), count - 1), y);
        const int pitch = SINGLE ? 16 * (NT | 1) : plan.pitch;
        const unsigned char* const address = plane + image * plan.plane_bytes + static_cast<int>(y) * pitch +
                                             16 * NT * static_cast<int>(group) + 16 * (lane >> 4);
        float acc[NT][4];
        convolve<T, S, KH, NT, SINGLE>(acc, address, pitch, plan.kh, fixed, table, affine.bias, lane);
        if (!GRAD && !trains) apply_block(acc, affine, p.activation);
        if (!GRAD && p.residual) {
          Unit<T, S, NT, SINGLE> inputs;
          inputs.load(address + plan.top * pitch);
          inputs.add_identity(acc, lane);
        }
        // all lanes have read the rows that this unit's outputs replace
        __syncwarp();
        const bool all = SINGLE && plan.w == 8 * NT && 16 * strip + 16 <= count && item.image + plan.images <= plan.n &&
                         item.row + plan.rows <= plan.h;
        uint32_t valid = 0, words[NT][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t row;
          const int v = 16 * strip + g + 8 * i, of = plan.by_rows.divmod(v, row);
          const bool row_valid = v < count && item.image + of < plan.n && item.row + static_cast<int>(row) < plan.h;
          unsigned char* const out_row = plane + of * plan.plane_bytes + static_cast<int>(row) * pitch;
#pragma unroll
          for (int j = 0; j < NT; ++j) {
            const int local = !SINGLE ? 8 * (NT * static_cast<int>(group) + j) + 2 * t
                                      : (j > 0 || t >= 2 ? 8 * j - 4 + 2 * t : 8 * NT - 4 + 2 * t);
            words[j][i] = pack2<T>(acc[j][2 * i], acc[j][2 * i + 1]);
            if (v < count) *reinterpret_cast<uint32_t*>(out_row + 2 * local) = words[j][i];
            if (trains && !all) {
              const int column = SINGLE ? local : item.column - 4 + local;
              if (row_valid && column >= 0 && column < plan.w) valid |= 1u << (4 * j + 2 * i);
              if (row_valid && column >= 0 && column + 1 < plan.w) valid |= 2u << (4 * j + 2 * i);
            }
          }
        }
        if (trains) add_moments<T, NT>(moments, words, all, valid, p.activation);
        __syncwarp();
      }
      if (trains) moments_of_lanes[32 * k + lane] = moments;
    }
    __syncthreads();

    const int outputs = count * plan.tiles * (G / 8);
    for (int q = threadIdx.x; q < outputs; q += 32 * kChannelsLastWarps) {
      uint32_t piece, row;
      const int part = q % (G / 8);
      const uint32_t rest = plan.by_tiles.divmod(q / (G / 8), piece);
      const int image = plan.by_rows.divmod(rest, row);
      const int n = item.image + image, y = item.row + static_cast<int>(row);
      const int first = SINGLE ? 8 * piece : item.column - 4 + 8 * static_cast<int>(piece);
      const int from = max(0, -first), to = min(8, plan.w - first), channel = c0 + 8 * part;
      if (n >= plan.n || y >= plan.h || channel >= plan.c || from >= to) continue;
      const unsigned char* const source = planes + 8 * part * plan.tile_bytes + image * plan.plane_bytes +
                                          static_cast<int>(row) * plan.pitch + 16 * static_cast<int>(piece);
      const int channels = min(8, plan.c - channel);
      uint4 v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = load16(source + i * plan.tile_bytes);
        if (i < channels) trace = trace_finite16<T>(trace, v[i]);
      }
      const int64_t index = ((static_cast<int64_t>(n) * plan.h + y) * plan.w + first) * plan.c + channel;
      T* const out = static_cast<T*>(p.y) + index;
      const T* const dy = x + index;
      if (plan.granule < 8) {
#pragma unroll 1
        for (int i = 8 * from; i < 8 * to; ++i) {
          const int pixel = i / 8, k = i % 8;
          const int64_t at = static_cast<int64_t>(pixel) * plan.c + k;
          if (k >= channels) continue;
          const float value = to_float(reinterpret_cast<const T*>(source + k * plan.tile_bytes)[pixel]);
          out[at] = from_float<T>(GRAD && p.residual ? value + to_float(dy[at]) : value);
        }
        continue;
      }
      transpose8(v);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < from || i >= to) continue;
        const int64_t at = static_cast<int64_t>(i) * plan.c;
        if (GRAD && p.residual) {
          Vec16<T> sum, other;
          sum.unpack(v[i]);
          other.unpack(load16(dy + at));
#pragma unroll
          for (int k = 0; k < 8; ++k) sum.v[k] += other.v[k];
          v[i] = sum.pack();
        }
        store16_global(out + at, v[i]);
      }
    }
    __syncthreads();
  }

  const bool settle = __syncthreads_or(!was_finite<T>(trace));
  for (int k = warp; k < min(G, plan.c - c0); k += kChannelsLastWarps) {
    if (settle) settle_nan<T, GRAD, true>(p, c0 + k, split, plan.items, plan.splits, lane, 32);
    if (!trains) continue;
    const Moments moments = warp_merge(moments_of_lanes[32 * k + lane]);
    if (lane == 0) {
      float* const out = p.partials + (static_cast<int64_t>(c0 + k) * plan.splits + split) * 3;
      out[0] = moments.count;
      out[1] = moments.mean;
      out[2] = moments.m2;
    }
  }
}

}  // namespace mma
}  // namespace convmixer

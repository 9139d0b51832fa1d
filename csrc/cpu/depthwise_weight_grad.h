// SPDX-License-Identifier: MIT
// Weight gradient of the depthwise convolution:
//   dw[c, i, j] = sum over n, y, x of da[n, c, y, x] * x[n, c, y + i - top, x + j - left];  db = sum da
// A work item is V channels of a group of images. As in depthwise.h, x goes into a padded plane and da into a dense
// one. A strip of rows stays in L1; over it, up to 9 taps of a kernel row (or several rows of fewer taps) accumulate in
// registers. Each x vector meets kGradTile da vectors in registers: 24 + 16 loads for 144 FMAs.
// Contiguous 3x3 would do too little with each transposed value: there, lanes are columns, and a channel's rows of x
// and da are read as they lie in memory. The number of groups depends on the shape only; strips, images and groups are
// added in a fixed order.

// One row segment of T columns: acc[r][k] += da[o] * x[r][o + k]
template <int RY, int KX, int T>
__attribute__((always_inline)) inline void correlate(Vec (&acc)[RY][KX], const Vec* x, int64_t row, const Vec* da) {
  Vec g[T];
#pragma GCC unroll 16
  for (int o = 0; o < T; o++) g[o] = da[o];
#pragma GCC unroll 8
  for (int r = 0; r < RY; r++) {
#pragma GCC unroll 32
    for (int i = 0; i < T + KX - 1; i++) {
      const Vec v = x[r * row + i];
#pragma GCC unroll 16
      for (int k = 0; k < KX; k++) {
        if (i - k >= 0 && i - k < T) acc[r][k] = fma(v, g[i - k], acc[r][k]);
      }
    }
  }
}

// RY kernel rows of KX taps, over `rows` rows of w columns. `row` is x's stride in vectors, `taps` the length of a row
// of dw. Sums of more than kSumPositions products are added in parts: the equal products of a constant plane round
// alike, so that the error of their sum grows with its length. A part is some whole rows, or some tiles of a long row.
constexpr int64_t kSumPositions = 32;
static_assert(kSumPositions % kGradTile == 0, "a part of a row is whole tiles");
template <int RY, int KX>
void correlate_rows(const float* x, int64_t row, const float* da, int64_t rows, int64_t w, float* dw, int taps) {
  const int64_t part = larger(1, kSumPositions / w);
  const auto correlate_part = [&](int64_t y0, int64_t y1, int64_t c0, int64_t c1) {
    Vec acc[RY][KX];
#pragma GCC unroll 8
    for (int r = 0; r < RY; r++) {
#pragma GCC unroll 16
      for (int k = 0; k < KX; k++) acc[r][k] = splat(0.f);
    }
    for (int64_t y = y0; y < y1; y++) {
      const Vec* vx = reinterpret_cast<const Vec*>(x) + y * row;
      const Vec* vda = reinterpret_cast<const Vec*>(da) + y * w;
      int64_t c = c0;
      for (; c + kGradTile <= c1; c += kGradTile) correlate<RY, KX, kGradTile>(acc, vx + c, row, vda + c);
      const int64_t left = c1 - c;
      if constexpr (kGradTile > 8) {
        if ((left & 8) != 0) correlate<RY, KX, 8>(acc, vx + c, row, vda + c), c += 8;
      }
      if constexpr (kGradTile > 4) {
        if ((left & 4) != 0) correlate<RY, KX, 4>(acc, vx + c, row, vda + c), c += 4;
      }
      if ((left & 2) != 0) correlate<RY, KX, 2>(acc, vx + c, row, vda + c), c += 2;
      if ((left & 1) != 0) correlate<RY, KX, 1>(acc, vx + c, row, vda + c);
    }
#pragma GCC unroll 8
    for (int r = 0; r < RY; r++) {
      Vec* to = reinterpret_cast<Vec*>(dw) + r * taps;
#pragma GCC unroll 16
      for (int k = 0; k < KX; k++) to[k] += acc[r][k];
    }
  };
  for (int64_t y = 0; y < rows; y += part) {
    for (int64_t c = 0; c < w; c += kSumPositions) {
      correlate_part(y, smaller(y + part, rows), c, smaller(c + kSumPositions, w));
    }
  }
}
using CorrelateRows = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int);

// Kernel rows that share a pass: 6 to 10 independent accumulators hide the latency of FMA.
constexpr int kernel_rows(int kx) { return kx >= 6 ? 1 : kx >= 4 ? 2 : kx == 3 ? 3 : 4; }

template <int KX>
CorrelateRows correlate_with(bool several) {
  if (several) return correlate_rows<kernel_rows(KX), KX>;
  return correlate_rows<1, KX>;
}
inline CorrelateRows correlate_for(int kx, bool several) {
  switch (kx) {
    case 1:
      return correlate_with<1>(several);
    case 2:
      return correlate_with<2>(several);
    case 3:
      return correlate_with<3>(several);
    case 4:
      return correlate_with<4>(several);
    case 5:
      return correlate_with<5>(several);
    case 6:
      return correlate_with<6>(several);
    case 7:
      return correlate_with<7>(several);
    case 8:
      return correlate_with<8>(several);
    default:
      return correlate_with<9>(several);
  }
}

// All taps, over one strip of rows.
inline void correlate_strip(const float* x, int64_t row, const float* da, int64_t rows, int64_t w, int kh, int kw,
                            float* dw) {
  const int chunks = static_cast<int>(ceil_div(kw, 9));
  int kx0 = 0;
  for (int chunk = 0; chunk < chunks; chunk++) {
    const int kx = (kw - kx0) / (chunks - chunk), together = kernel_rows(kx);
    const CorrelateRows several = correlate_for(kx, true), single = correlate_for(kx, false);
    int ky = 0;
    for (; ky + together <= kh; ky += together) {
      several(x + (ky * row + kx0) * V, row, da, rows, w, dw + (ky * kw + kx0) * V, kw);
    }
    for (; ky < kh; ky++) single(x + (ky * row + kx0) * V, row, da, rows, w, dw + (ky * kw + kx0) * V, kw);
    kx0 += kx;
  }
}

// 3x3 along the rows of one channel of a contiguous tensor. A strip of da rows has two rows of zeros above and two
// below; zeros pad each row to whole vectors.
struct Rows3x3 {
  static constexpr int kTaps = 9;
  int64_t vectors, rows;  // of a row, and of a strip
  explicit Rows3x3(const Shape& s) : vectors(ceil_div(s.w, V)), rows(larger(1, smaller(s.h, 4096 / (vectors * V)))) {}
  // Whether padding rows to vectors costs less than transposing.
  static bool fits(const Shape& s, int kh, int kw) {
    return kh == 3 && kw == 3 && !s.channels_last && ceil_div(s.w, V) * V * 2 <= s.w * 3;
  }
  int64_t da_floats() const { return (rows + 4) * vectors * V; }
  int64_t floats() const { return da_floats() + kTaps * V * V; }
};

// acc += an x row of w values times the da rows of the strip below it, beside it (at `da`) and above it.
template <typename T>
VEC_INLINE void correlate_row(Vec (&acc)[Rows3x3::kTaps], const T* x, int64_t w, const float* da, int64_t row) {
  Vec left = splat(0.f), here = w >= V ? load(x) : load_n(x, static_cast<int>(w));
  for (int64_t c = 0; c < w; c += V) {
    const int64_t rest = w - c - V;
    const Vec right = rest >= V ? load(x + c + V) : rest > 0 ? load_n(x + c + V, static_cast<int>(rest)) : splat(0.f);
    const Vec values[3] = {last_and_first(left, here), here, second_and_on(here, right)};
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) {
      const Vec g = *reinterpret_cast<const Vec*>(da + c + (1 - i) * row);
#pragma GCC unroll 3
      for (int j = 0; j < 3; j++) acc[i * 3 + j] = fma(values[j], g, acc[i * 3 + j]);
    }
    left = here;
    here = right;
  }
}

// Adds one channel of one image to sums[tap * V]; returns its sum of da. The zeros in the buffer `da` stay zeros.
template <typename T, int A>
inline double correlate_channel(const DepthwiseWeightGrad& p, const Rows3x3& plan, const Affine& f, int64_t channel,
                                float* da, Vec* sums) {
  const Shape& s = p.shape;
  const int64_t hw = s.h * s.w, row = plan.vectors * V;
  const T *from_dy = static_cast<const T*>(p.dy) + channel * hw, *from_x = static_cast<const T*>(p.x) + channel * hw;
  const T* from_a = p.a == nullptr ? nullptr : static_cast<const T*>(p.a) + channel * hw;
  const bool centred = p.sums.dy != nullptr;
  LaneSums bias;
  bias.clear();
  Vec acc[Rows3x3::kTaps];
#pragma GCC unroll 9
  for (int t = 0; t < Rows3x3::kTaps; t++) acc[t] = splat(0.f);
  int64_t products = 0;
  const auto add_some = [&] {
#pragma GCC unroll 9
    for (int t = 0; t < Rows3x3::kTaps; t++) sums[t * V] += acc[t], acc[t] = splat(0.f);
    products = 0;
  };
  const auto da_of = [&](int64_t at, auto full, int count) {
    Vec g = load_some(from_dy + at, full, count);
    prefetch(from_dy + at, hw);
    if (from_a != nullptr) {
      g = gradient<A>(g, load_some(from_a + at, full, count), f, centred);
      prefetch(from_a + at, hw);
    }
    return g;
  };
  for (int64_t y0 = 0; y0 < s.h; y0 += plan.rows) {
    const int64_t y1 = smaller(y0 + plan.rows, s.h);
    for (int64_t y = y0; y < y1; y++) {
      float* to = da + (y - y0 + 2) * row;
      int64_t c = 0;
      for (; c + V <= s.w; c += V) {
        const Vec g = da_of(y * s.w + c, Int<V>{}, V);
        *reinterpret_cast<Vec*>(to + c) = g;
        bias.add(g);
      }
      if (c < s.w) {
        const int count = static_cast<int>(s.w - c);
        const Vec g = keep(da_of(y * s.w + c, Int<0>{}, count), count);
        *reinterpret_cast<Vec*>(to + c) = g;
        bias.add(g);
      }
    }
    if (y1 - y0 < plan.rows) zero(da + (y1 - y0 + 2) * row, 2 * row);
    for (int64_t y = larger(0, y0 - 1); y < smaller(y1 + 1, s.h); y++) {
      correlate_row(acc, from_x + y * s.w, s.w, da + (y - y0 + 2) * row, row);
      for (int64_t c = 0; c < s.w; c += V) prefetch(from_x + y * s.w + c, hw);
      if ((products += plan.vectors) >= kSumPositions) add_some();
    }
  }
  add_some();
  return bias.total();
}

// dw (9 vectors) and db of the V channels from c0 on over images [n0, n1); `memory` holds plan.floats().
inline void correlate_channels(const DepthwiseWeightGrad& p, int64_t c0, int64_t n0, int64_t n1, const float* table,
                               float* memory, float* dw, double* db) {
  const Shape& s = p.shape;
  const Rows3x3 plan(s);
  const int count = channels_of(s, c0);
  zero(memory, plan.floats());
  Vec* sums = reinterpret_cast<Vec*>(memory);  // [tap][channel]
  float* da = memory + Rows3x3::kTaps * V * V;
  for (int i = 0; i < V; i++) db[i] = 0;
  for (int64_t n = n0; n < n1; n++) {
    for (int i = 0; i < count; i++) {
      const Affine f = channel_affine(table, padded(s.c), c0 + i);
      with_dtype(s.dtype, [&](auto tag) {
        with_activation(p.activation, [&](auto act) {
          db[i] += correlate_channel<decltype(tag), decltype(act)::value>(p, plan, f, n * s.c + c0 + i, da, sums + i);
        });
      });
    }
  }
  for (int t = 0; t < Rows3x3::kTaps; t++) {
    Vec r[V], total = splat(0.f);
    for (int i = 0; i < V; i++) r[i] = sums[t * V + i];
    transpose(r);
    for (int i = 0; i < V; i++) total += r[i];
    reinterpret_cast<Vec*>(dw)[t] = total;
  }
}

int depthwise_weight_grad(const DepthwiseWeightGrad& p) {
  const Shape& s = p.shape;
  const Plan plan(s, p.kh, p.kw, false);
  const int taps = p.kh * p.kw;
  const bool sums = p.sums.dy != nullptr;
  const int64_t stride = padded(s.c);
  const int64_t per_group = ceil_div(s.n, smaller(s.n, ceil_div(64, plan.blocks)));
  const int64_t groups = ceil_div(s.n, per_group);
  char* memory = static_cast<char*>(scratch(
      0, static_cast<size_t>(float_bytes(kRows * stride) + float_bytes(groups * stride * taps) + groups * stride * 8)));
  if (memory == nullptr) return 1;
  float* table = aligned_floats(memory, kRows * stride);
  float* partials = aligned_floats(memory, groups * stride * taps);  // [group][block][tap][V]
  double* bias_partials = reinterpret_cast<double*>(memory);         // [group][channel]
  const int64_t plane_floats = plan.plane_floats(), da_floats = plan.rows * s.w * V;
  // With strips of this size da and k rows of x stay in L1. A few strips make one partial sum; dw is the sum of those.
  const int64_t strip_rows = larger(1, 256 / s.w), strips_of_sum = larger(1, 1024 / (strip_rows * s.w));
  const bool along_rows = Rows3x3::fits(s, p.kh, p.kw);
  const int64_t own_floats = along_rows ? Rows3x3(s).floats() : plane_floats + da_floats + kStripFloats + taps * V;
  int failed = 0;
  const int threads = depthwise_threads(s, taps, p.threads);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* plane = static_cast<float*>(scratch(1, static_cast<size_t>(own_floats) * 4));
    if (plane != nullptr && !along_rows) zero(plane, plane_floats);
    float* da = plane + plane_floats;
    float* strip = da + da_floats;
    float* some = strip + kStripFloats;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < plan.blocks; b++) fill_table(p.norm, p.sums, s, b * V, table);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < groups * plan.blocks; item++) {
      if (plane == nullptr) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      const int64_t b = item % plan.blocks, group = item / plan.blocks, c0 = b * V;
      const int count = static_cast<int>(smaller(V, s.c - c0));
      const Affine affine = affine_at(table, stride, c0);
      float* dw = partials + item * V * taps;
      const int64_t n0 = group * per_group, n1 = smaller(n0 + per_group, s.n);
      if (along_rows) {
        correlate_channels(p, c0, n0, n1, table, plane, dw, bias_partials + group * stride + c0);
        continue;
      }
      zero(dw, taps * V);
      LaneSums bias_sum;
      bias_sum.clear();
      int64_t strips = 0;
      zero(some, taps * V);
      const auto add_some = [&] {
        for (int t = 0; t < taps; t++) reinterpret_cast<Vec*>(dw)[t] += reinterpret_cast<Vec*>(some)[t];
        zero(some, taps * V);
      };
      for (int64_t n = n0; n < n1; n++) {
        for (int64_t y0 = 0; y0 < s.h; y0 += plan.rows) {
          const int64_t y1 = smaller(y0 + plan.rows, s.h);
          const Window window = open_window(plan, s, plane, y0, y1);
          with_dtype(s.dtype, [&](auto tag) {
            using T = decltype(tag);
            gather(s, static_cast<const T*>(p.x), n, c0, count, window.first * s.w, window.last * s.w,
                   window.row(plan, s, plane, y0, window.first));
            with_activation(p.activation, [&](auto act) {
              gather_gradient<T, decltype(act)::value>(s, static_cast<const T*>(p.dy), static_cast<const T*>(p.a),
                                                       affine, sums, n, c0, count, y0 * s.w, y1 * s.w, strip,
                                                       dense(da));
            });
          });
          for (int64_t y = 0; y < y1 - y0; y += strip_rows) {
            const int64_t rows = smaller(strip_rows, y1 - y0 - y);
            correlate_strip(plane + y * plan.columns * V, plan.columns, da + y * s.w * V, rows, s.w, p.kh, p.kw, some);
            if (++strips % strips_of_sum == 0) add_some();
            if (p.db.data == nullptr) continue;
            const Vec* g = reinterpret_cast<const Vec*>(da + y * s.w * V);
            for (int64_t i = 0; i < rows * s.w; i++) bias_sum.add(g[i]);
          }
        }
      }
      add_some();
      for (int l = 0; l < V; l++) bias_partials[group * stride + c0 + l] = bias_sum.lane(l);
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < plan.blocks; b++) {
      // Not this thread's memory decides: a thread without any may have had no item, and all partial sums are there.
      if (failed != 0) continue;
      Vec* total = reinterpret_cast<Vec*>(partials + b * V * taps);
      for (int64_t group = 1; group < groups; group++) {
        const Vec* more = reinterpret_cast<const Vec*>(partials + (group * plan.blocks + b) * V * taps);
        for (int t = 0; t < taps; t++) total[t] += more[t];
      }
      const Shape filter = {1, s.c, 1, taps, p.dw.dtype, false};
      const int count = static_cast<int>(smaller(V, s.c - b * V));
      with_dtype(p.dw.dtype, [&](auto tag) {
        using T = decltype(tag);
        scatter<T>(filter, reinterpret_cast<float*>(total), nullptr, static_cast<T*>(p.dw.data), 0, b * V, count, 0,
                   taps);
      });
      if (p.db.data == nullptr) continue;
      for (int64_t c = b * V; c < b * V + count; c++) {
        double sum = 0;
        for (int64_t group = 0; group < groups; group++) sum += bias_partials[group * stride + c];
        set_param(p.db, c, static_cast<float>(sum));
      }
    }
  }
  return failed;
}

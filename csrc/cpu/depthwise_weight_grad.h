// SPDX-License-Identifier: MIT
// Weight gradient of the depthwise convolution:
//   dw[c, i, j] = sum over n, y, x of da[n, c, y, x] * x[n, c, y + dh i - top, x + dw j - left];  db = sum da
// with the dilation (dh, dw).
// A work item is V channels of a group of images. As in depthwise.h, x goes into a padded plane and da into a dense
// one. A strip of rows stays in L1; over it, up to 9 taps of a kernel row (or several rows of fewer taps) accumulate in
// registers. Each x vector meets kGradTile da vectors in registers: 24 + 16 loads for 144 FMAs.
// Contiguous 3x3 would do too little with each transposed value: there, lanes are columns, and a channel's rows of x
// and da are read as they lie in memory. The number of groups depends on the shape only; strips, images and groups are
// added in a fixed order.

// One row segment of T columns, `step` apart: acc[r][k] += da[o] * x[r][o + k]. `row` is the distance of kernel rows in
// x in vectors.
template <int RY, int KX, int T, bool Dilated>
__attribute__((always_inline)) inline void correlate(Vec (&acc)[RY][KX], const Vec* x, int64_t row, const Vec* da,
                                                     int64_t step) {
  Vec g[T];
  PlaneColumns<Dilated> from{da, step};
#pragma GCC unroll 16
  for (int o = 0; o < T; o++) g[o] = from.next();
#pragma GCC unroll 8
  for (int r = 0; r < RY; r++) {
    PlaneColumns<Dilated> values{x + r * row, step};
#pragma GCC unroll 32
    for (int i = 0; i < T + KX - 1; i++) {
      const Vec v = values.next();
#pragma GCC unroll 16
      for (int k = 0; k < KX; k++) {
        if (i - k >= 0 && i - k < T) acc[r][k] = fma(v, g[i - k], acc[r][k]);
      }
    }
  }
}

// What correlate_rows walks over: `rows` rows of `w` columns of da, those of one phase of the dilation. Distances in
// vectors.
struct Walk {
  int64_t rows, w;
  int64_t x_row, da_row;  // of rows
  int64_t tap_row, step;  // of kernel rows, and of taps and columns
};

// RY kernel rows of KX taps. `taps` is the length of a row of dw. Sums of more than kSumPositions products are added in
// parts: the equal products of a constant plane round alike, so that the error of their sum grows with its length. A
// part is some whole rows, or some tiles of a long row.
constexpr int64_t kSumPositions = 32;
static_assert(kSumPositions % kGradTile == 0, "a part of a row is whole tiles");
template <int RY, int KX, bool Dilated>
void correlate_rows(const float* x, const float* da, const Walk& walk, float* dw, int taps) {
  const int64_t part = larger(1, kSumPositions / walk.w), step = Dilated ? walk.step : 1;
  const auto correlate_part = [&](int64_t y0, int64_t y1, int64_t c0, int64_t c1) {
    Vec acc[RY][KX];
#pragma GCC unroll 8
    for (int r = 0; r < RY; r++) {
#pragma GCC unroll 16
      for (int k = 0; k < KX; k++) acc[r][k] = splat(0.f);
    }
    for (int64_t y = y0; y < y1; y++) {
      const Vec* vx = reinterpret_cast<const Vec*>(x) + y * walk.x_row;
      const Vec* vda = reinterpret_cast<const Vec*>(da) + y * walk.da_row;
      int64_t c = c0;
      const auto some = [&](auto count) __attribute__((always_inline)) {
        constexpr int T = decltype(count)::value;
        correlate<RY, KX, T, Dilated>(acc, vx + c * step, walk.tap_row, vda + c * step, step);
        c += T;
      };
      while (c + kGradTile <= c1) some(Int<kGradTile>{});
      const int64_t left = c1 - c;
      if constexpr (kGradTile > 8) {
        if ((left & 8) != 0) some(Int<8>{});
      }
      if constexpr (kGradTile > 4) {
        if ((left & 4) != 0) some(Int<4>{});
      }
      if ((left & 2) != 0) some(Int<2>{});
      if ((left & 1) != 0) some(Int<1>{});
    }
#pragma GCC unroll 8
    for (int r = 0; r < RY; r++) {
      Vec* to = reinterpret_cast<Vec*>(dw) + r * taps;
#pragma GCC unroll 16
      for (int k = 0; k < KX; k++) to[k] += acc[r][k];
    }
  };
  for (int64_t y = 0; y < walk.rows; y += part) {
    for (int64_t c = 0; c < walk.w; c += kSumPositions) {
      correlate_part(y, smaller(y + part, walk.rows), c, smaller(c + kSumPositions, walk.w));
    }
  }
}
using CorrelateRows = void (*)(const float*, const float*, const Walk&, float*, int);

// Kernel rows that share a pass: 6 to 10 independent accumulators hide the latency of FMA.
constexpr int kernel_rows(int kx) { return kx >= 6 ? 1 : kx >= 4 ? 2 : kx == 3 ? 3 : 4; }
// Most taps of a kernel row that share a pass.
constexpr int kLineTaps = 9;
constexpr int smallest_line(int kw) { return kw / ((kw + kLineTaps - 1) / kLineTaps); }

template <int KX, bool Dilated>
CorrelateRows correlate_with(bool several) {
  if (several) return correlate_rows<kernel_rows(KX), KX, Dilated>;
  return correlate_rows<1, KX, Dilated>;
}
template <bool Dilated>
CorrelateRows correlate_for(int kx, bool several) {
  switch (kx) {
    case 1:
      return correlate_with<1, Dilated>(several);
    case 2:
      return correlate_with<2, Dilated>(several);
    case 3:
      return correlate_with<3, Dilated>(several);
    case 4:
      return correlate_with<4, Dilated>(several);
    case 5:
      return correlate_with<5, Dilated>(several);
    case 6:
      return correlate_with<6, Dilated>(several);
    case 7:
      return correlate_with<7, Dilated>(several);
    case 8:
      return correlate_with<8, Dilated>(several);
    default:
      return correlate_with<9, Dilated>(several);
  }
}

// All taps, over the strip of output rows [y0, y1), of which `da` is the first. Only what meets the image counts: for
// each group of taps the rows and columns of da for which one of them lies inside.
inline void correlate_strip(const Plan& plan, const Shape& s, const Window& window, const float* plane, const float* da,
                            int64_t y0, int64_t y1, float* dw) {
  const int chunks = static_cast<int>(ceil_div(plan.kw, kLineTaps));
  for (int chunk = 0, kx0 = 0, kx; chunk < chunks; chunk++, kx0 += kx) {
    kx = (plan.kw - kx0) / (chunks - chunk);
    const int64_t across = kx0 * plan.dw - plan.left;  // of the first tap
    const int64_t c0 = larger(0, -across - (kx - 1) * plan.dw), c1 = smaller(s.w, s.w - across);
    const int together = kernel_rows(kx);
    const bool dilated = plan.dw > 1;
    const CorrelateRows several = dilated ? correlate_for<true>(kx, true) : correlate_for<false>(kx, true),
                        single = dilated ? correlate_for<true>(kx, false) : correlate_for<false>(kx, false);
    for (int ky = 0, count; ky < plan.kh; ky += count) {
      count = ky + together <= plan.kh ? together : 1;
      const int64_t down = ky * plan.dh - plan.top;
      const int64_t r0 = larger(y0, -down - (count - 1) * plan.dh), r1 = smaller(y1, s.h - down);
      if (r0 >= r1) continue;
      for (int64_t c = c0; c < smaller(c1, c0 + plan.dw); c++) {
        const Walk walk = {r1 - r0, ceil_div(c1 - c, plan.dw), plan.columns, s.w, plan.columns * plan.dh, plan.dw};
        (count > 1 ? several : single)(plane + window.at(plan, r0 + down, c + across), da + ((r0 - y0) * s.w + c) * V,
                                       walk, dw + (ky * plan.kw + kx0) * V, plan.kw);
      }
    }
  }
}

// Whether all values of a strip of da are finite.
inline bool all_finite(const float* da, int64_t positions) {
  Vec zeros = splat(0.f);
  for (int64_t i = 0; i < positions; i++) zeros = fma(reinterpret_cast<const Vec*>(da)[i], splat(0.f), zeros);
  for (int l = 0; l < V; l++) {
    if (zeros[l] != 0.f) return false;  // NaN
  }
  return true;
}

// What correlate_strip leaves out, products with the padding: NaN if da is not finite, as in eager.
inline void correlate_padding(const Plan& plan, const Shape& s, const float* da, int64_t y0, int64_t y1, float* dw) {
  const auto outside = [](int64_t i, int64_t size) { return i < 0 || i >= size; };
  for (int tap = 0; tap < plan.count(); tap++) {
    const int64_t down = tap / plan.kw * plan.dh - plan.top, across = tap % plan.kw * plan.dw - plan.left;
    const Vec* g = reinterpret_cast<const Vec*>(da);
    Vec sum = splat(0.f);
    for (int64_t y = y0; y < y1; y++) {
      for (int64_t c = 0; c < s.w; c++, g++) {
        if (outside(y + down, s.h) || outside(c + across, s.w)) sum = fma(*g, splat(0.f), sum);
      }
    }
    reinterpret_cast<Vec*>(dw)[tap] += sum;
  }
}

// 3x3 along the rows of one channel of a contiguous tensor, which are whole vectors. A strip of da rows has two rows of
// zeros above and two below.
struct Rows3x3 {
  static constexpr int kTaps = 9;
  int64_t vectors, rows;  // of a row, and of a strip
  explicit Rows3x3(const Shape& s) : vectors(s.w / V), rows(larger(1, smaller(s.h, 4096 / (vectors * V)))) {}
  // Rows of any length would need padding: on a Xeon with AVX-512 that took 0.084 ms for 1x128x28x28, transposing 0.042;
  // for 32x32 whole vectors take 0.048 and transposing 0.071.
  static bool fits(const Shape& s, const Taps& taps) {
    return taps.kh == 3 && taps.kw == 3 && !taps.dilated() && !s.channels_last && s.w % V == 0;
  }
  int64_t da_floats() const { return (rows + 4) * vectors * V; }
  int64_t floats() const { return da_floats() + kTaps * V * V; }
};

// acc += an x row of w values times the da rows of the strip below it, beside it (at `da`) and above it.
template <typename T>
VEC_INLINE void correlate_row(Vec (&acc)[Rows3x3::kTaps], const T* x, int64_t w, const float* da, int64_t row) {
  Vec left = splat(0.f), here = load(x);
  for (int64_t c = 0; c < w; c += V) {
    const Vec right = c + V < w ? load(x + c + V) : splat(0.f);
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
  const auto da_of = [&](int64_t at) {
    Vec g = load(from_dy + at);
    prefetch(from_dy + at, hw);
    if (from_a != nullptr) {
      g = gradient<A>(g, load(from_a + at), f, centred);
      prefetch(from_a + at, hw);
    }
    return g;
  };
  for (int64_t y0 = 0; y0 < s.h; y0 += plan.rows) {
    const int64_t y1 = smaller(y0 + plan.rows, s.h);
    for (int64_t y = y0; y < y1; y++) {
      float* to = da + (y - y0 + 2) * row;
      for (int64_t c = 0; c < s.w; c += V) {
        const Vec g = da_of(y * s.w + c);
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
  const Plan plan(s, taps_of(p), false, true, kernel_rows(smallest_line(p.kw)), kLineTaps);
  const int taps = p.kh * p.kw;
  // of kernel rows that meet the image
  const TapRange used_rows = plan.used_rows(s);
  const int first_tap = used_rows.first * p.kw, last_tap = used_rows.last * p.kw;
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
  const bool along_rows = Rows3x3::fits(s, plan);
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
        for (int t = first_tap; t < last_tap; t++) reinterpret_cast<Vec*>(dw)[t] += reinterpret_cast<Vec*>(some)[t];
        zero(some + first_tap * V, (last_tap - first_tap) * V);
      };
      for (int64_t n = n0; n < n1; n++) {
        for (int64_t y0 = 0; y0 < s.h; y0 += plan.rows) {
          const int64_t y1 = smaller(y0 + plan.rows, s.h);
          const Window window(plan, s, y0, y1);
          if (plan.row_tiles > 1) {
            // below the image there may be rows of another tile
            zero(plane + window.at(plan, window.last, -plan.before), plan.margin * plan.columns * V);
          }
          with_dtype(s.dtype, [&](auto tag) {
            using T = decltype(tag);
            gather(s, static_cast<const T*>(p.x), n, c0, count, window.first * s.w, window.last * s.w,
                   window.row(plan, s, plane, window.first));
            with_activation(p.activation, [&](auto act) {
              gather_gradient<T, decltype(act)::value>(s, static_cast<const T*>(p.dy), static_cast<const T*>(p.a),
                                                       affine, sums, n, c0, count, y0 * s.w, y1 * s.w, strip,
                                                       dense(da));
            });
          });
          for (int64_t y = y0; y < y1; y += strip_rows) {
            const int64_t end = smaller(y + strip_rows, y1);
            const float* of_strip = da + (y - y0) * s.w * V;
            correlate_strip(plan, s, window, plane, of_strip, y, end, some);
            // not into `some`: its taps that meet no row of the image are never added
            if (!all_finite(of_strip, (end - y) * s.w)) correlate_padding(plan, s, of_strip, y, end, dw);
            if (++strips % strips_of_sum == 0) add_some();
            if (p.db.data == nullptr) continue;
            const Vec* g = reinterpret_cast<const Vec*>(of_strip);
            for (int64_t i = 0; i < (end - y) * s.w; i++) bias_sum.add(g[i]);
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

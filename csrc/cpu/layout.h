// SPDX-License-Identifier: MIT
// Planes and per-channel tables. The kernels compute on float planes [position][V channels] for both memory layouts;
// gather and scatter convert in registers (contiguous: V x V transposes), so that no tensor is ever permuted.

// A place in a padded plane: positions go on for `width` columns, then jump by `gap` floats.
struct Cursor {
  float* p;
  int64_t column, width, gap;
};
inline Cursor dense(float* p) { return {p, 0, int64_t{1} << 60, 0}; }

// Prefetch each channel this many elements ahead: V channels, a plane apart, are more streams than hardware follows.
constexpr int64_t kAhead = 64;
template <typename T>
VEC_INLINE void prefetch(const T* p, int64_t ahead) {
  __builtin_prefetch(
      reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + static_cast<size_t>(ahead) * sizeof(T)));
}

// Prefetches rows of memory, some lines at a time, while arithmetic leaves the memory idle.
class Ahead {
  const char* row_ = nullptr;
  int64_t rows_ = 0, at_ = 0, bytes_ = 0, stride_ = 0, lines_ = 0;

 public:
  Ahead() = default;
  // `rows` rows of `count` elements, `ld` elements apart, in `steps` steps.
  template <typename T>
  Ahead(const T* p, int64_t rows, int64_t count, int64_t ld, int64_t steps)
      : row_(reinterpret_cast<const char*>(p)),
        rows_(rows),
        bytes_(count * static_cast<int64_t>(sizeof(T))),
        stride_(ld * static_cast<int64_t>(sizeof(T))),
        lines_(ceil_div(rows * ceil_div(bytes_, 64), steps)) {}
  void step() {
    for (int64_t i = 0; i < lines_ && rows_ > 0; i++) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += 64;
      if (at_ >= bytes_) at_ = 0, row_ += stride_, rows_--;
    }
  }
};

// Reads positions [p0, p1) (y * W + x) of image n, channels [c0, c0 + cn) with cn <= V; lanes from cn on are 0. Returns
// the cursor behind them.
template <typename T>
inline Cursor gather(const Shape& s, const T* base, int64_t n, int64_t c0, int cn, int64_t p0, int64_t p1, Cursor to) {
  const int64_t hw = s.h * s.w;
  if (s.channels_last) {
    const T* from = base + (n * hw + p0) * s.c + c0;
    for (int64_t p = p0; p < p1;) {
      const int64_t run = smaller(to.width - to.column, p1 - p);
      if (cn == V) {
        for (int64_t i = 0; i < run; i++, from += s.c) *reinterpret_cast<Vec*>(to.p + i * V) = load(from);
      } else {
        for (int64_t i = 0; i < run; i++, from += s.c) *reinterpret_cast<Vec*>(to.p + i * V) = load_n(from, cn);
      }
      p += run;
      to.p += run * V + to.gap;
      to.column = 0;
    }
    return to;
  }
  const T* from = base + (n * s.c + c0) * hw;
  for (int64_t p = p0; p < p1; p += V) {
    const int count = static_cast<int>(smaller(V, p1 - p));
    Vec r[V];
    if (cn == V && count == V) {
#pragma GCC unroll 16
      for (int i = 0; i < V; i++) {
        r[i] = load(from + i * hw + p);
        prefetch(from + i * hw + p, kAhead);
      }
    } else {
      for (int i = 0; i < V; i++) r[i] = i < cn ? load_n(from + i * hw + p, count) : splat(0.f);
    }
    transpose(r);
    if (count == V && to.column + V <= to.width) {
#pragma GCC unroll 16
      for (int i = 0; i < V; i++) *reinterpret_cast<Vec*>(to.p + i * V) = r[i];
      to.p += V * V;
      to.column += V;
      if (to.column == to.width) to.column = 0, to.p += to.gap;
    } else {
      for (int i = 0; i < count; i++) {
        *reinterpret_cast<Vec*>(to.p) = r[i];
        to.p += V;
        if (++to.column == to.width) to.column = 0, to.p += to.gap;
      }
    }
  }
  return to;
}

// The inverse of gather, from a dense plane. Adds `residual`, a tensor of the same layout, unless it is null.
template <typename T>
inline void scatter(const Shape& s, const float* from, const T* residual, T* base, int64_t n, int64_t c0, int cn,
                    int64_t p0, int64_t p1) {
  const int64_t hw = s.h * s.w;
  if (s.channels_last) {
    const int64_t start = (n * hw + p0) * s.c + c0;
    for (int64_t i = 0; i < p1 - p0; i++) {
      Vec v = *reinterpret_cast<const Vec*>(from + i * V);
      const int64_t at = start + i * s.c;
      if (cn == V) {
        if (residual != nullptr) v += load(residual + at);
        store(base + at, v);
      } else {
        if (residual != nullptr) v += load_n(residual + at, cn);
        store_n(base + at, v, cn);
      }
    }
    return;
  }
  const int64_t start = (n * s.c + c0) * hw;
  for (int64_t p = p0; p < p1; p += V, from += V * V) {
    const int count = static_cast<int>(smaller(V, p1 - p));
    Vec r[V];
    if (count == V) {
#pragma GCC unroll 16
      for (int i = 0; i < V; i++) r[i] = *reinterpret_cast<const Vec*>(from + i * V);
    } else {
      for (int i = 0; i < V; i++) r[i] = i < count ? *reinterpret_cast<const Vec*>(from + i * V) : splat(0.f);
    }
    transpose(r);
    if (cn == V && count == V && residual == nullptr) {
#pragma GCC unroll 16
      for (int i = 0; i < V; i++) store(base + start + i * hw + p, r[i]);
    } else if (cn == V && count == V) {
#pragma GCC unroll 16
      for (int i = 0; i < V; i++) store(base + start + i * hw + p, r[i] + load(residual + start + i * hw + p));
    } else {
      for (int i = 0; i < cn; i++) {
        const int64_t at = start + i * hw + p;
        if (residual != nullptr) r[i] += load_n(residual + at, count);
        store_n(base + at, r[i], count);
      }
    }
  }
}

inline int64_t blocks_of(int64_t channels) { return ceil_div(channels, V); }
inline int64_t padded(int64_t channels) { return blocks_of(channels) * V; }

// y = (h - mean) * scale + shift and dh = scale * (dy - offset - (h - mean) * slope), with one value of each constant
// per channel. A table is kRows rows of padded(C) floats.
enum TableRow { kMean, kScale, kShift, kOffset, kSlope, kRows };
struct Affine {
  Vec row[kRows];
};

inline void fill_affine(const Norm& norm, const Sums& sums, double count, int64_t c, int64_t limit, float* to,
                        int64_t stride) {
  for (int i = 0; i < kRows; i++) to[i * stride] = i == kScale ? 1.f : 0.f;
  if (!norm.present || c >= limit) return;
  const double rstd = 1.0 / __builtin_sqrt(static_cast<double>(param_at(norm.var, c)) + norm.eps);
  to[kMean * stride] = param_at(norm.mean, c);
  to[kScale * stride] =
      static_cast<float>(norm.weight.data == nullptr ? rstd : rstd * static_cast<double>(param_at(norm.weight, c)));
  if (norm.bias.data != nullptr) to[kShift * stride] = param_at(norm.bias, c);
  if (sums.dy == nullptr) return;
  to[kOffset * stride] = static_cast<float>(static_cast<double>(sums.dy[c]) / count);
  to[kSlope * stride] = static_cast<float>(static_cast<double>(sums.dy_hhat[c]) / count * rstd);
}

inline double values_per_channel(const Shape& s) {
  return static_cast<double>(s.n) * static_cast<double>(s.h) * static_cast<double>(s.w);
}

// The V channels from c0 on.
inline void fill_table(const Norm& norm, const Sums& sums, const Shape& s, int64_t c0, float* table) {
  const int64_t stride = padded(s.c);
  for (int64_t c = c0; c < c0 + V; c++) {
    fill_affine(norm, sums, values_per_channel(s), c, s.c, table + c, stride);
  }
}
inline Affine affine_at(const float* table, int64_t stride, int64_t c0) {
  Affine f;
  for (int i = 0; i < kRows; i++) f.row[i] = load(table + i * stride + c0);
  return f;
}
// One channel's values in all lanes.
inline Affine channel_affine(const float* table, int64_t stride, int64_t c) {
  Affine f;
  for (int i = 0; i < kRows; i++) f.row[i] = splat(table[i * stride + c]);
  return f;
}

template <int A>
VEC_INLINE Vec normalized(Vec a, const Affine& f, bool norm) {
  const Vec h = activate<A>(a);
  return norm ? fma(h - f.row[kMean], f.row[kScale], f.row[kShift]) : h;
}

// da. Without `sums` the statistics were constants.
template <int A>
VEC_INLINE Vec gradient(Vec dy, Vec a, const Affine& f, bool sums) {
  Vec h, d;
  activate_with_grad<A>(a, h, d);
  const Vec centred = sums ? fma(f.row[kMean] - h, f.row[kSlope], dy - f.row[kOffset]) : dy;
  // 0 if relu is 0, for any dh, as in torch's threshold_backward.
  if constexpr (A == kRelu) return a <= splat(0.f) ? splat(0.f) : centred * f.row[kScale];
  return centred * f.row[kScale] * d;
}

// Sums of each lane in double. Terms may cancel, so that partial sums in float must stay very short.
struct LaneSums {
  DVec low, high;
  void clear() { low = high = DVec{}; }
  VEC_INLINE void add(Vec x) {
    low += low_half(x);
    high += high_half(x);
  }
  double lane(int i) const { return i < V / 2 ? low[i] : high[i - V / 2]; }
  double total() const {
    const DVec both = low + high;
    double t = 0;
    for (int i = 0; i < V / 2; i++) t += both[i];
    return t;
  }
};

// Sums of h and of (h - shift)^2 of each lane, in double throughout: if the mean is far from 0 or from the shift, the
// squares are large and their differences small.
struct LaneMoments {
  LaneSums sum, squares;
  Vec shift;
  void begin(Vec around) {
    sum.clear();
    squares.clear();
    shift = around;
  }
  VEC_INLINE void add(Vec h) {
    const DVec low = low_half(h), high = high_half(h);
    const DVec from_low = low - low_half(shift), from_high = high - high_half(shift);
    sum.low += low;
    sum.high += high;
    squares.low += from_low * from_low;
    squares.high += from_high * from_high;
  }
  // The first `count` lanes.
  void add_some(Vec h, int count) {
    LaneSums kept = sum;
    Vec others = h;
    for (int i = count; i < V; i++) h[i] = 0.f, others[i] = shift[i];
    kept.add(h);
    add(others);
    sum = kept;
  }
};

// Partial statistics of a channel: count, mean and M2 = sum (h - mean)^2 of its values.
struct Moments {
  double count, mean, m2;
};
// From the sums of h and of (h - shift)^2, both in double: the shift, a border's value, may be far from the mean.
inline Moments moments(double count, double shift, double sum, double squares) {
  const double mean = sum / count;
  return {count, mean, squares - (mean - shift) * (mean - shift) * count};
}
// Chan, Golub and LeVeque's merge. The mean is a weighted sum: it stays infinite if one is, a + delta would be NaN.
inline void merge(Moments& a, const Moments& b) {
  if (b.count == 0) return;
  const double total = a.count + b.count, delta = b.mean - a.mean;
  a.mean = a.mean * (a.count / total) + b.mean * (b.count / total);
  a.m2 += b.m2 + delta * delta * (a.count * b.count / total);
  a.count = total;
}

// Stores the mean and the biased variance of channel c.
inline void finish_statistics(const Statistics& s, int64_t c, const Moments& m) {
  s.mean[c] = static_cast<float>(m.mean);
  s.var[c] = static_cast<float>((m.m2 > 0 || m.m2 != m.m2) ? m.m2 / m.count : 0);
}

inline float* aligned_floats(char*& p, int64_t count) {
  float* at = reinterpret_cast<float*>(p);
  p += ceil_div(count, 16) * 64;
  return at;
}
inline int64_t float_bytes(int64_t count) { return ceil_div(count, 16) * 64; }

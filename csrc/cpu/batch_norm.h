// SPDX-License-Identifier: MIT
// Elementwise passes and per-channel reductions over an activation tensor; each element is read once:
//   normalize                y = norm(act(a)) (+ residual)
//   norm_backward            sum dy, sum dy * hhat
//   pointwise_grad_prologue  da in float32, and db = sum da
// A work item is one channel's plane of one image (contiguous) or all channels of a chunk of positions (channels_last).
// Reductions leave one partial sum per item and channel, in double, which are added in order. Memory bounds these
// passes, or GELU's 20 operations if the tensor is in cache.

// How a tensor is cut: the number of work items, the positions of an item (channels_last only), and the partial sums of
// a channel.
struct Split {
  int64_t items, rows, parts;
};
inline Split split_of(const Shape& s) {
  if (!s.channels_last) return {s.n * s.c, s.h * s.w, s.n};
  const int64_t total = s.n * s.h * s.w, rows = 64 * ceil_div(total, 64 * 128), items = ceil_div(total, rows);
  return {items, rows, items};
}

inline int useful_threads(const Shape& s, int64_t cost, int threads) {
  return s.n * s.c * s.h * s.w * cost < 40000 ? 1 : threads;
}

// Rows of channels_last memory that are taken together: they share cache lines and pages.
constexpr int64_t kRowsTogether = 16;
// How far ahead of a vector to prefetch. channels_last: the same channels of the next rows. Contiguous: further along.
inline int64_t rows_ahead(const Shape& s) { return s.channels_last ? kRowsTogether * s.c : 512; }

// Calls f(offset, full, count, affine) for each vector of an item; `full` is Int<V> if count is V.
// All vectors between begin() and end(c, first) belong to channel c (contiguous) or to the V channels from c on
// (channels_last). `first` is true in the item's first end for c.
template <typename Begin, typename F, typename End>
inline void for_each_vector(const Shape& s, const Split& split, int64_t item, const float* table, Begin begin, F f,
                            End end) {
  if (!s.channels_last) {
    const int64_t hw = s.h * s.w, c = item % s.c;
    const Affine affine = channel_affine(table, padded(s.c), c);
    begin();
    int64_t p = 0;
    for (; p + V <= hw; p += V) f(item * hw + p, Int<V>{}, V, affine);
    if (p < hw) f(item * hw + p, Int<0>{}, static_cast<int>(hw - p), affine);
    end(c, true);
    return;
  }
  const int64_t first = item * split.rows, last = smaller(first + split.rows, s.n * s.h * s.w);
  for (int64_t row = first; row < last; row += kRowsTogether) {
    const int64_t rows = smaller(kRowsTogether, last - row);
    for (int64_t c = 0; c < s.c; c += V) {
      const Affine affine = affine_at(table, padded(s.c), c);
      const int count = static_cast<int>(smaller(V, s.c - c));
      const int64_t start = row * s.c + c;
      begin();
      if (count == V) {
        for (int64_t r = 0; r < rows; r++) f(start + r * s.c, Int<V>{}, V, affine);
      } else {
        for (int64_t r = 0; r < rows; r++) f(start + r * s.c, Int<0>{}, count, affine);
      }
      end(c, row == first);
    }
  }
}

// Partial sums of several kinds, [kind][part][padded(C)]. One item writes each of them.
struct Partials {
  double* data;
  int64_t parts, stride, channels;
  bool channels_last;

  Partials(void* memory, const Shape& s, const Split& split)
      : data(static_cast<double*>(memory)),
        parts(split.parts),
        stride(padded(s.c)),
        channels(s.c),
        channels_last(s.channels_last) {}
  static int64_t bytes(const Shape& s, const Split& split, int kinds) {
    return kinds * split.parts * padded(s.c) * static_cast<int64_t>(sizeof(double));
  }
  void put(int kind, int64_t item, int64_t c, bool first, const LaneSums& sum) {
    if (!channels_last) {
      data[(kind * parts + item / channels) * stride + c] = sum.total();
      return;
    }
    DVec* to = reinterpret_cast<DVec*>(data + (kind * parts + item) * stride + c);
    to[0] = first ? sum.low : to[0] + sum.low;
    to[1] = first ? sum.high : to[1] + sum.high;
  }
  // Adds in the order of images or positions.
  double merged(int kind, int64_t c) const {
    double sum = 0;
    for (int64_t k = 0; k < parts; k++) sum += data[(kind * parts + k) * stride + c];
    return sum;
  }
};

template <typename T, int N>
inline Vec load_some(const T* p, Int<N>, int count) {
  return N == V ? load(p) : load_n(p, count);
}
template <typename T, int N>
inline void store_some(T* p, Vec x, Int<N>, int count) {
  if (N == V) {
    store(p, x);
  } else {
    store_n(p, x, count);
  }
}
// Sets the lanes from count on to 0, so that they add nothing to sums over lanes.
inline Vec keep(Vec x, int count) {
  for (int i = count; i < V; i++) x[i] = 0.f;
  return x;
}

// Fills the tables, then calls items(i) for each item, then finish(c) for each channel, all from several threads.
template <typename Items, typename Finish>
inline void run_items(const Shape& s, const Split& split, const Norm& norm, const Sums& sums, float* table, int threads,
                      bool finishes, Items items, Finish finish) {
  // A thread takes several small planes at a time: fetching work every few hundred values makes threads wait.
  const int64_t values = s.n * s.c * s.h * s.w / split.items;
  const int64_t grain = larger(1, smaller(16384 / values, split.items / (8 * int64_t{threads})));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks_of(s.c); b++) fill_table(norm, sums, s, b * V, table);
#pragma omp for schedule(dynamic, grain)
    for (int64_t i = 0; i < split.items; i++) items(i);
    if (finishes) {
#pragma omp for schedule(static)
      for (int64_t c = 0; c < s.c; c++) finish(c);
    }
  }
}
constexpr Sums kNoSums = {nullptr, nullptr};
constexpr Norm kNoNorm = {{nullptr, 0}, {nullptr, 0}, {nullptr, 0}, {nullptr, 0}, 0, false};

int normalize(const Normalize& p) {
  const Shape& s = p.shape;
  const Split split = split_of(s);
  const int64_t ahead = rows_ahead(s);
  float* table = static_cast<float*>(scratch(0, static_cast<size_t>(float_bytes(kRows * padded(s.c)))));
  if (table == nullptr) return 1;
  with_dtype(s.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* a = static_cast<const T*>(p.a);
    const T* residual = static_cast<const T*>(p.residual);
    T* y = static_cast<T*>(p.y);
    with_activation(p.activation, [&](auto act) {
      constexpr int A = decltype(act)::value;
      const auto item = [&](int64_t i) {
        for_each_vector(
            s, split, i, table, [] {},
            [&](int64_t at, auto full, int count, const Affine& f) {
              Vec v = normalized<A>(load_some(a + at, full, count), f, p.norm.present);
              if (residual != nullptr) v += load_some(residual + at, full, count);
              store_some(y + at, v, full, count);
              prefetch(a + at, ahead);
              if (residual != nullptr) prefetch(residual + at, ahead);
            },
            [](int64_t, bool) {});
      };
      run_items(s, split, p.norm, kNoSums, table, useful_threads(s, 4, p.threads), false, item, [](int64_t) {});
    });
  });
  return 0;
}

void update_running_statistics(const UpdateRunningStatistics& p) {
  const double count = static_cast<double>(p.count), unbiased = count / (count > 1 ? count - 1 : 1);
  const auto update = [&](const MutableParam& running, const float* values, double factor) {
    if (running.data == nullptr) return;
    for (int64_t c = 0; c < p.c; c++) {
      const double old = static_cast<double>(param_at({running.data, running.dtype}, c));
      set_param(running, c,
                static_cast<float>((1 - p.momentum) * old + p.momentum * (static_cast<double>(values[c]) * factor)));
    }
  };
  update(p.running_mean, p.mean, 1);
  update(p.running_var, p.var, unbiased);
}

int norm_backward(const NormBackward& p) {
  const Shape& s = p.shape;
  const Split split = split_of(s);
  const int64_t ahead = rows_ahead(s);
  char* memory = static_cast<char*>(
      scratch(0, static_cast<size_t>(float_bytes(kRows * padded(s.c)) + Partials::bytes(s, split, 2))));
  if (memory == nullptr) return 1;
  float* table = aligned_floats(memory, kRows * padded(s.c));
  Partials partials(memory, s, split);
  with_dtype(s.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* a = static_cast<const T*>(p.a);
    const T* dy = static_cast<const T*>(p.dy);
    with_activation(p.activation, [&](auto act) {
      constexpr int A = decltype(act)::value;
      const auto item = [&](int64_t i) {
        LaneSums sum, product;
        for_each_vector(
            s, split, i, table,
            [&] {
              sum.clear();
              product.clear();
            },
            [&](int64_t at, auto full, int count, const Affine& f) {
              // Lanes beyond the tensor hold g = 0 and a finite h.
              const Vec g = load_some(dy + at, full, count);
              prefetch(dy + at, ahead);
              prefetch(a + at, ahead);
              sum.add(g);
              product.add(g * (activate<A>(load_some(a + at, full, count)) - f.row[kMean]));
            },
            [&](int64_t c, bool first) {
              partials.put(0, i, c, first, sum);
              partials.put(1, i, c, first, product);
            });
      };
      const auto finish = [&](int64_t c) {
        const double rstd = 1.0 / __builtin_sqrt(static_cast<double>(param_at(p.norm.var, c)) + p.norm.eps);
        p.sum_dy[c] = static_cast<float>(partials.merged(0, c));
        p.sum_dy_hhat[c] = static_cast<float>(partials.merged(1, c) * rstd);
      };
      run_items(s, split, p.norm, kNoSums, table, useful_threads(s, 4, p.threads), true, item, finish);
    });
  });
  return 0;
}

inline int pointwise_grad_prologue(const PointwiseBackward& p) {
  const Shape& s = p.shape;
  const Split split = split_of(s);
  const int64_t ahead = rows_ahead(s);
  const bool sums = p.sums.dy != nullptr, wants_db = p.db.data != nullptr;
  char* memory = static_cast<char*>(
      scratch(0, static_cast<size_t>(float_bytes(kRows * padded(s.c)) + Partials::bytes(s, split, 1))));
  if (memory == nullptr) return 1;
  float* table = aligned_floats(memory, kRows * padded(s.c));
  Partials partials(memory, s, split);
  with_dtype(s.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* a = static_cast<const T*>(p.a);
    const T* dy = static_cast<const T*>(p.dy);
    float* da = p.da;
    with_activation(p.activation, [&](auto act) {
      constexpr int A = decltype(act)::value;
      const auto item = [&](int64_t i) {
        LaneSums sum;
        for_each_vector(
            s, split, i, table, [&] { sum.clear(); },
            [&](int64_t at, auto full, int count, const Affine& f) {
              Vec g = gradient<A>(load_some(dy + at, full, count), load_some(a + at, full, count), f, sums);
              prefetch(dy + at, ahead);
              prefetch(a + at, ahead);
              store_some(da + at, g, full, count);
              if (!s.channels_last && count < V) g = keep(g, count);
              sum.add(g);
            },
            [&](int64_t c, bool first) { partials.put(0, i, c, first, sum); });
      };
      const auto finish = [&](int64_t c) { set_param(p.db, c, static_cast<float>(partials.merged(0, c))); };
      run_items(s, split, p.norm, p.sums, table, useful_threads(s, 4, p.threads), wants_db, item, finish);
    });
  });
  return 0;
}

// The activation alone, for tests of its accuracy.
void activation_only(const float* x, float* y, int64_t count, int activation, bool wants_gradient) {
  with_activation(activation, [&](auto act) {
    constexpr int A = decltype(act)::value;
    for (int64_t i = 0; i < count; i += V) {
      const int n = static_cast<int>(smaller(V, count - i));
      Vec h, d;
      activate_with_grad<A>(load_n(x + i, n), h, d);
      store_n(y + i, wants_gradient ? d : activate<A>(load_n(x + i, n)), n);
    }
  });
}

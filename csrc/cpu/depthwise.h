// SPDX-License-Identifier: MIT
// Depthwise convolution, forward and input gradient:
//   y[c] = norm(act(sum_ij x[c, y + dh i - top, x + dw j - left] * w[c, i, j] + b[c])) (+ x)
//   dx   = correlate(da, flipped w)
// with the dilation (dh, dw). Taps that lie outside the image for a whole row or tile of outputs are left out.
// A work item is V channels of one image, or of a tile of its rows. Its input is copied once into a float plane
// [row][column][V] with columns of zeros on both sides, which stays in L2 and which the micro-kernels (convolve.h) read.
// Finished rows go to a dense strip in L1; the epilogue runs there and scatters them to memory. FMAs bound it: k * k
// for each output, beside 20 operations of GELU. If a kernel has few taps, the copies bound it: then channels_last
// tensors are read in place.

// Bytes of padded planes that stay in L2 beside the output strip.
constexpr int64_t kPlaneBytes = 512 * 1024;
// Blocks of V channels that a channels_last item takes together, with planes and without, at most.
constexpr int64_t kMostTogether = 4, kMostBlocks = 16;
// Without planes: most taps, and output rows of an item. On a Xeon with AVX-512, 1x128x56x56 took 0.17 ms instead of
// 0.38 (k = 3) and 0.53 instead of 0.76 (k = 9). Of more than 100 taps the sums would need their strip.
constexpr int kTensorTaps = 81;
constexpr int64_t kTensorRows = 16;

// The taps of a kernel: how many, and how far apart.
struct Taps {
  int kh, kw;
  int64_t dh, dw;
  int count() const { return kh * kw; }
  bool dilated() const { return dh > 1 || dw > 1; }
};
template <typename P>
inline Taps taps_of(const P& p) {
  return {p.kh, p.kw, p.dilation_h, p.dilation_w};
}
// plain: the sums are the result. Only then may neighbouring outputs of a tile lie apart.
inline bool takes_planes(const Shape& s, const Taps& taps, bool plain) {
  return !s.channels_last || taps.count() > kTensorTaps || s.w < kMaxTile * taps.dw || (taps.dilated() && !plain);
}

// The taps of a line of k, d apart, that lie in [0, size) for any of the outputs [y0, y1]. Tap 0 lies `before` positions
// ahead of its output.
struct TapRange {
  int first, last;
  TapRange(int k, int64_t d, int64_t before, int64_t size, int64_t y0, int64_t y1) {
    const auto ceil = [d](int64_t n) { return d == 1 ? n : ceil_div(n, d); };
    last = static_cast<int>(smaller(k, ceil(size + before - y0)));
    first = static_cast<int>(smaller(last, ceil(larger(0, before - y1))));
  }
};

// How the rows of an image and the taps of a kernel row are cut. It depends on the shape only.
struct Plan : Taps {
  int64_t top, left, bottom;  // padding of the correlation that runs: the input gradient's is flipped
  int64_t blocks, rows, row_tiles;
  int tile;                 // output columns of a micro-tile: dw apart
  int64_t columns, before;  // of the plane, and those before the image
  int64_t margin;           // rows of zeros above and below the image
  int64_t plane_rows;
  int64_t strip_rows;  // output rows that are finished together
  int kx;              // taps of a chunk of a kernel row: divides kw
  bool planes;         // whether items copy their input into planes
  Convolve kernel;

  Plan(const Shape& s, const Taps& taps, bool flipped, bool planes_ = true) : Plan(s, taps, flipped, planes_, 0, 0) {}

  // If line_taps is not 0: the weight gradient's, which reads line_rows x line_taps taps for the same outputs.
  Plan(const Shape& s, const Taps& taps, bool flipped, bool planes_, int line_rows, int line_taps)
      : Taps(taps), planes(planes_) {
    const int64_t reach = (kh - 1) * dh, across = (kw - 1) * dw;
    top = flipped ? reach - reach / 2 : reach / 2;
    left = flipped ? across - across / 2 : across / 2;
    bottom = reach - top;
    blocks = blocks_of(s.c);
    const int64_t outputs = ceil_div(s.w, dw), column_tiles = ceil_div(outputs, kMaxTile);
    const int64_t width = ceil_div(outputs, column_tiles);
    for (int candidate : kTiles) {
      tile = candidate;
      if (candidate >= width) break;
    }
    kx = 1;
    for (int k = 1; k <= kMaxTaps && k <= kw; k++) {
      if (kw % k == 0) kx = k;
    }
    // Reads go no further: convolve_row leaves out the chunks whose taps all lie outside the image.
    const int64_t further = line_taps != 0 ? (line_taps - 1) * dw : (tile + kx - 2) * dw;
    const int64_t overrun = line_taps != 0 ? 0 : smaller(column_tiles * tile * dw - s.w, (tile - 1) * dw);
    before = smaller(left, further);
    columns = before + s.w + smaller(across - left + overrun, further);
    margin = line_taps != 0 ? smaller(larger(top, bottom), (line_rows - 1) * dh) : 0;
    // in channels_last memory kMostTogether planes should fit
    const int64_t fit = (s.channels_last ? kPlaneBytes / kMostTogether : kPlaneBytes) / (columns * V * 4) - 2 * margin;
    const int64_t most = !planes ? kTensorRows : fit >= s.h ? s.h : larger(larger(fit - reach, reach + 1), 8);
    row_tiles = ceil_div(s.h, most);
    rows = ceil_div(s.h, row_tiles);
    row_tiles = ceil_div(s.h, rows);
    plane_rows = smaller(s.h, rows + reach) + 2 * margin;
    strip_rows = smaller(rows, larger(1, 128 / s.w));
    kernel = convolve_tile(tile, kx, dw > 1);
  }
  // The kernel rows that meet the image for any output.
  TapRange used_rows(const Shape& s) const { return {kh, dh, top, s.h, 0, s.h - 1}; }
  int64_t plane_floats() const { return planes ? plane_rows * columns * V : 0; }
  int64_t strip_floats(int64_t w) const { return (planes ? strip_rows * w + tile * dw : kMaxTile) * V; }
};

// The weights of V channels as [tap][V], in reverse order if flipped; only those of kernel rows that meet the image.
inline void pack_weights(const Param& weight, int64_t channels, const Taps& taps, const TapRange& rows, int64_t c0,
                         bool flipped, float* to) {
  const Shape s = {1, channels, 1, taps.count(), weight.dtype, false};
  const int count = static_cast<int>(smaller(V, channels - c0)), used = (rows.last - rows.first) * taps.kw;
  const int from = (flipped ? taps.kh - rows.last : rows.first) * taps.kw;
  Vec* w = reinterpret_cast<Vec*>(to) + rows.first * taps.kw;
  with_dtype(weight.dtype, [&](auto tag) {
    gather(s, static_cast<const decltype(tag)*>(weight.data), 0, c0, count, from, from + used,
           dense(reinterpret_cast<float*>(w)));
  });
  if (!flipped) return;
  for (int i = 0, j = used - 1; i < j; i++, j--) {
    const Vec t = w[i];
    w[i] = w[j];
    w[j] = t;
  }
}

inline void zero(float* to, int64_t floats) { __builtin_memset(to, 0, static_cast<size_t>(floats) * 4); }

// The input rows [first, last) that the plane of output rows [y0, y1) holds, between plan.margin rows of zeros.
struct Window {
  int64_t first, last;
  Window(const Plan& plan, const Shape& s, int64_t y0, int64_t y1)
      : first(larger(y0 - plan.top, 0)), last(smaller(y1 + plan.bottom, s.h)) {}
  // Where column x of input row y is in the plane, or would be.
  int64_t at(const Plan& plan, int64_t y, int64_t x) const {
    return ((y - first + plan.margin) * plan.columns + plan.before + x) * V;
  }
  // A cursor at the start of input row y.
  Cursor row(const Plan& plan, const Shape& s, float* plane, int64_t y) const {
    return {plane + at(plan, y, 0), 0, s.w, (plan.columns - s.w) * V};
  }
};

// Blocks of V channels that an item takes together. In channels_last memory these are neighbours: reading the rows of
// several blocks in turn uses whole pages and neighbouring cache lines, a single block would waste most of them.
inline int64_t blocks_together(const Plan& plan, const Shape& s, int64_t bytes, int threads) {
  int64_t together = s.channels_last ? (plan.planes ? kMostTogether : kMostBlocks) : 1;
  while (together > 1 && (together * bytes > kPlaneBytes ||
                          s.n * plan.row_tiles * ceil_div(plan.blocks, together) < 2 * int64_t{threads})) {
    together /= 2;
  }
  return smaller(together, plan.blocks);
}
struct Item {
  int64_t n, y0, y1, part;  // image, output rows, index of image and row tile
  int64_t c0;
  int blocks;  // of V channels, from c0 on
  Item(const Plan& plan, const Shape& s, int64_t item, int64_t together) {
    const int64_t groups = ceil_div(plan.blocks, together);
    part = item / groups;
    n = part / plan.row_tiles;
    y0 = part % plan.row_tiles * plan.rows;
    y1 = smaller(y0 + plan.rows, s.h);
    c0 = item % groups * together * V;
    blocks = static_cast<int>(smaller(together, plan.blocks - c0 / V));
  }
};
inline int channels_of(const Shape& s, int64_t c0) { return static_cast<int>(smaller(V, s.c - c0)); }

// Calls f(block, first row, last row) for all blocks of a few rows, then of the next rows.
template <typename F>
inline void for_rows_of_blocks(const Shape& s, int64_t y0, int64_t y1, int blocks, F f) {
  const int64_t step = blocks == 1 ? y1 - y0 : larger(1, 32 / s.w);
  for (int64_t y = y0; y < y1; y += step) {
    for (int g = 0; g < blocks; g++) f(g, y, smaller(y + step, y1));
  }
}

// Output row r. Taps above and below the image are left out (16x16, k = 9: a seventh of all), and chunks of taps beside
// it. A tile may overrun its row: the next rows, computed later, overwrite that part.
inline void convolve_row(const Plan& plan, const Shape& s, const Window& window, const float* plane, int64_t r,
                         const float* weights, Vec bias, float* to) {
  const int64_t row = plan.columns * V * plan.dh, w_row = int64_t{plan.kw} * V;
  const TapRange i(plan.kh, plan.dh, plan.top, s.h, r, r);
  weights += i.first * w_row;
  const float* from = plane + window.at(plan, r - plan.top + i.first * plan.dh, -plan.left);
  const int kh = i.last - i.first, chunks = plan.kw / plan.kx;
  const int64_t tile = plan.tile * plan.dw;
  for (int64_t phase = 0; phase < smaller(plan.dw, s.w); phase++) {
    for (int64_t x = phase; x < s.w; x += tile) {
      int first = 0, last = chunks;
      if (chunks > 1) {
        const TapRange j(plan.kw, plan.dw, plan.left, s.w, x, x + tile - plan.dw);
        first = j.first / plan.kx;
        last = static_cast<int>(ceil_div(j.last, plan.kx));
      }
      plan.kernel(from + (x + first * plan.kx * plan.dw) * V, row, plan.dw, weights + first * plan.kx * V, w_row, kh,
                  last - first, 0, bias, to + x * V);
    }
  }
}

// Loads an item's input, one row of one block a step.
template <typename T>
inline Ahead input_of(const Plan& plan, const Shape& s, const Item& item, const T* x) {
  const int64_t y0 = larger(0, item.y0 - plan.top), y1 = smaller(s.h, item.y1 + plan.bottom);
  const int64_t positions = (y1 - y0) * s.w, channels = smaller(item.blocks * V, s.c - item.c0);
  const int64_t steps = (item.y1 - item.y0) * item.blocks, hw = s.h * s.w;
  if (s.channels_last) return Ahead(x + (item.n * hw + y0 * s.w) * s.c + item.c0, positions, channels, s.c, steps);
  return Ahead(x + (item.n * s.c + item.c0) * hw + y0 * s.w, channels, positions, hw, steps);
}

// Runs the micro-kernels over the item's output rows, with a step of `ahead` for each row. Calls
// finish(block, p0, p1, strip) for each block, then emit(block, p0, p1, strip) for all blocks. The strip holds
// positions [p0, p1) of the image.
template <typename Finish, typename Emit>
inline void convolve_rows(const Plan& plan, const Shape& s, const Item& item, const Window& window, const float* planes,
                          const float* weights, const float* biases, float* strips, Ahead ahead, Finish finish,
                          Emit emit) {
  // This must depend on the shape alone, not on item.blocks: statistics are summed strip by strip.
  const int64_t strip_rows = s.channels_last ? larger(1, plan.strip_rows / kMostTogether) : plan.strip_rows;
  for (int64_t r0 = item.y0; r0 < item.y1; r0 += strip_rows) {
    const int64_t r1 = smaller(r0 + strip_rows, item.y1);
    for (int g = 0; g < item.blocks; g++) {
      const float* plane = planes + g * plan.plane_floats();
      const int64_t c0 = item.c0 + g * V;
      const Vec bias = biases == nullptr ? splat(0.f) : load(biases + c0);
      float* strip = strips + g * plan.strip_floats(s.w);
      for (int64_t r = r0; r < r1; r++) {
        ahead.step();
        convolve_row(plan, s, window, plane, r, weights + c0 * plan.count(), bias, strip + (r - r0) * s.w * V);
      }
      finish(g, r0 * s.w, r1 * s.w, strip);
    }
    for_rows_of_blocks(s, r0, r1, item.blocks, [&](int g, int64_t y0, int64_t y1) {
      emit(g, y0 * s.w, y1 * s.w, strips + g * plan.strip_floats(s.w) + (y0 - r0) * s.w * V);
    });
  }
}

// As convolve_rows, straight from x. Calls finish and emit for a tile of columns; the last tile of a row lies at the
// row's end and may overlap the one before. If y is not null, the sums are the result: they go there, and nothing is
// called. It is not null if the kernel is dilated in columns.
template <typename T, typename Finish, typename Emit>
inline void convolve_tensor_rows(const Plan& plan, const Shape& s, const Item& item, const T* x, const float* weights,
                                 const float* biases, float* strip, T* y, Finish finish, Emit emit) {
  const int taps = plan.kh * plan.kw, width = static_cast<int>(s.w), dw = static_cast<int>(plan.dw);
  const ConvolveTensor<T> kernels[] = {convolve_tensor_for<T, kInside>(plan.kw), convolve_tensor_for<T, kEdge>(plan.kw),
                                       convolve_tensor_for<T, kFewChannels>(plan.kw)};
  for (int64_t r = item.y0; r < item.y1; r++) {
    const TapRange i(plan.kh, plan.dh, plan.top, s.h, r, r);
    for (int phase = 0; phase < dw; phase++) {
      const int last = phase + (width - 1 - phase) / dw * dw - (kMaxTile - 1) * dw;
      for (int column = phase; column < width; column += kMaxTile * dw) {
        const int start = smaller_int(column, last), left = start - static_cast<int>(plan.left);
        const bool inside = left >= 0 && left + (kMaxTile + plan.kw - 2) * dw < width;
        const T* from = x + ((item.n * s.h + r - plan.top + i.first * plan.dh) * s.w + left) * s.c;
        T* out = y == nullptr ? nullptr : y + ((item.n * s.h + r) * s.w + start) * s.c;
        const int64_t p0 = r * s.w + column, p1 = r * s.w + start + kMaxTile;
        for (int g = 0; g < item.blocks; g++) {
          const int64_t c0 = item.c0 + g * V;
          const int channels = channels_of(s, c0);
          kernels[channels < V ? kFewChannels
                  : inside     ? kInside
                               : kEdge](
              s, from + c0, channels, left, weights + c0 * taps + i.first * plan.kw * V, i.last - i.first, plan.kw,
              plan.dh, dw, biases == nullptr ? splat(0.f) : load(biases + c0), strip, out == nullptr ? out : out + c0);
          if (y != nullptr) continue;
          float* const tile = strip + (column - start) * V;
          finish(g, p0, p1, tile);
          emit(g, p0, p1, tile);
        }
      }
    }
  }
}

// Writes da of positions [p0, p1) at the cursor. Contiguous tensors are read along their channels, a run of each in
// turn, with the next run prefetched; da then goes through a strip [channel][kStripRow] to the plane.
constexpr int64_t kGradStrip = 256, kStripRow = kGradStrip + V, kStripFloats = V * kStripRow;
template <typename T, int A>
inline void gather_gradient(const Shape& s, const T* dy, const T* a, const Affine& f, bool sums, int64_t n, int64_t c0,
                            int cn, int64_t p0, int64_t p1, float* strip, Cursor to) {
  if (a == nullptr) {
    gather(s, dy, n, c0, cn, p0, p1, to);
    return;
  }
  const int64_t hw = s.h * s.w;
  if (s.channels_last) {
    const int64_t start = n * hw * s.c + c0;
    for (int64_t p = p0; p < p1;) {
      const int64_t run = smaller(to.width - to.column, p1 - p);
      for (int64_t i = 0; i < run; i++) {
        const int64_t at = start + (p + i) * s.c;
        Vec* v = reinterpret_cast<Vec*>(to.p) + i;
        *v = cn == V ? gradient<A>(load(dy + at), load(a + at), f, sums)
                     : gradient<A>(load_n(dy + at, cn), load_n(a + at, cn), f, sums);
      }
      p += run;
      to.p += run * V + to.gap;
      to.column = 0;
    }
    return;
  }
  for (int64_t p = p0; p < p1; p += kGradStrip) {
    const int64_t positions = smaller(kGradStrip, p1 - p);
    for (int i = 0; i < cn; i++) {
      Affine channel;
      for (int k = 0; k < kRows; k++) channel.row[k] = splat(f.row[k][i]);
      const T* from_dy = dy + (n * s.c + c0 + i) * hw + p;
      const T* from_a = a + (n * s.c + c0 + i) * hw + p;
      float* row = strip + i * kStripRow;
      int64_t j = 0;
      for (; j + V <= positions; j += V) {
        store(row + j, gradient<A>(load(from_dy + j), load(from_a + j), channel, sums));
        prefetch(from_dy + j, hw);
        prefetch(from_a + j, hw);
      }
      if (j < positions) {
        const int count = static_cast<int>(positions - j);
        store(row + j, gradient<A>(load_n(from_dy + j, count), load_n(from_a + j, count), channel, sums));
      }
    }
    to = gather(Shape{1, V, 1, kStripRow, kFloat32, false}, strip, 0, 0, cn, 0, positions, to);
  }
}

inline int depthwise_threads(const Shape& s, int taps, int threads) { return useful_threads(s, taps + 4, threads); }

// The tables of a forward call: for each channel the affine map and the bias, for each block of channels the weights.
struct DepthwiseTables {
  int taps;
  int64_t stride;
  float *table, *biases, *weights;

  static int64_t bytes(const DepthwiseForward& p) {
    const int64_t stride = padded(p.shape.c);
    return float_bytes(kRows * stride) + float_bytes(stride) + float_bytes(stride * p.kh * p.kw);
  }
  DepthwiseTables(const DepthwiseForward& p, char*& memory) : taps(p.kh * p.kw), stride(padded(p.shape.c)) {
    table = aligned_floats(memory, kRows * stride);
    biases = aligned_floats(memory, stride);
    weights = aligned_floats(memory, stride * taps);
  }
  // The V channels of block b.
  void fill(const DepthwiseForward& p, const Plan& plan, int64_t b) const {
    pack_weights(p.weight, p.shape.c, plan, plan.used_rows(p.shape), b * V, false, weights + b * V * taps);
    fill_table(p.norm, kNoSums, p.shape, b * V, table);
    for (int64_t c = b * V; c < (b + 1) * V; c++) {
      biases[c] = p.bias.data != nullptr && c < p.shape.c ? param_at(p.bias, c) : 0.f;
    }
  }
};

inline bool is_plain(const DepthwiseForward& p) {
  return p.activation == kIdentity && !p.norm.present && !p.residual && p.statistics.mean == nullptr;
}

// One item of the forward. In training, partials is [image, row tile][channel]. The memory holds the item's planes,
// then its strips.
template <typename T>
inline void depthwise_item(const DepthwiseForward& p, const Plan& plan, const DepthwiseTables& tables, const Item& item,
                           const Ahead& ahead, int64_t together, float* planes, Moments* partials) {
  const Shape& s = p.shape;
  const int64_t plane_floats = plan.plane_floats();
  float* strips = planes + together * plane_floats;
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  const Window window(plan, s, item.y0, item.y1);
  if (plan.planes) {
    for_rows_of_blocks(s, window.first, window.last, item.blocks, [&](int g, int64_t y0, int64_t y1) {
      gather(s, x, item.n, item.c0 + g * V, channels_of(s, item.c0 + g * V), y0 * s.w, y1 * s.w,
             window.row(plan, s, planes + g * plane_floats, y0));
    });
  }
  const auto emit = [&](int g, int64_t p0, int64_t p1, const float* from) {
    const int64_t c0 = item.c0 + g * V;
    scatter(s, from, p.residual ? x : nullptr, y, item.n, c0, channels_of(s, c0), p0, p1);
  };
  const auto convolve_all = [&](auto finish) {
    if (plan.planes) {
      convolve_rows(plan, s, item, window, planes, tables.weights, tables.biases, strips, ahead, finish, emit);
    } else {
      T* const sums = is_plain(p) ? y : nullptr;
      convolve_tensor_rows(plan, s, item, x, tables.weights, tables.biases, strips, sums, finish, emit);
    }
  };
  with_activation(p.activation, [&](auto act) {
    constexpr int A = decltype(act)::value;
    if (partials == nullptr) {
      const auto finish = [&](int g, int64_t p0, int64_t p1, float* to) {
        if (A == kIdentity && !p.norm.present) return;
        const Affine affine = affine_at(tables.table, tables.stride, item.c0 + g * V);
        Vec* v = reinterpret_cast<Vec*>(to);
        for (int64_t j = 0; j < p1 - p0; j++) v[j] = normalized<A>(v[j], affine, p.norm.present);
      };
      convolve_all(finish);
      return;
    }
    LaneMoments sums[kMostBlocks];
    const auto finish = [&](int g, int64_t p0, int64_t p1, float* to) {
      Vec* v = reinterpret_cast<Vec*>(to);
      if (p0 == item.y0 * s.w) sums[g].begin(activate<A>(rounded(v[0], T{})));
      LaneMoments total = sums[g];
      for (int64_t j = 0; j < p1 - p0; j++) {
        v[j] = rounded(v[j], T{});
        total.add(activate<A>(v[j]));
      }
      sums[g] = total;
    };
    convolve_all(finish);
    for (int g = 0; g < item.blocks; g++) {
      for (int l = 0; l < channels_of(s, item.c0 + g * V); l++) {
        partials[item.part * s.c + item.c0 + g * V + l] =
            moments(static_cast<double>((item.y1 - item.y0) * s.w), static_cast<double>(sums[g].shift[l]),
                    sums[g].sum.lane(l), sums[g].squares.lane(l));
      }
    }
  });
}

int depthwise_forward(const DepthwiseForward& p) {
  const Shape& s = p.shape;
  const Plan plan(s, taps_of(p), false, takes_planes(s, taps_of(p), is_plain(p)));
  const bool training = p.statistics.mean != nullptr;
  const int64_t parts = s.n * plan.row_tiles;
  const int64_t moments_bytes = training ? parts * s.c * static_cast<int64_t>(sizeof(Moments)) : 0;
  char* memory = static_cast<char*>(scratch(0, static_cast<size_t>(DepthwiseTables::bytes(p) + moments_bytes)));
  if (memory == nullptr) return 1;
  const DepthwiseTables tables(p, memory);
  Moments* partials = training ? reinterpret_cast<Moments*>(memory) : nullptr;  // [image, row tile][channel]
  const int64_t plane_floats = plan.plane_floats();
  int failed = 0;
  const int threads = depthwise_threads(s, tables.taps, p.threads);
  const int64_t together = blocks_together(plan, s, plane_floats * 4, threads);
  const int64_t items = parts * ceil_div(plan.blocks, together);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* planes =
        static_cast<float*>(scratch(1, static_cast<size_t>(together * (plane_floats + plan.strip_floats(s.w))) * 4));
    if (planes != nullptr) zero(planes, together * plane_floats);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < plan.blocks; b++) tables.fill(p, plan, b);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < items; i++) {
      if (planes == nullptr) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      const Item item(plan, s, i, together);
      with_dtype(s.dtype, [&](auto tag) {
        using T = decltype(tag);
        // Threads take turns: this thread's next item is about so many items further.
        const Ahead ahead = plan.planes && i + threads < items
                                ? input_of(plan, s, Item(plan, s, i + threads, together), static_cast<const T*>(p.x))
                                : Ahead();
        depthwise_item<T>(p, plan, tables, item, ahead, together, planes, partials);
      });
    }
    if (training && failed == 0) {
#pragma omp for schedule(static)
      for (int64_t c = 0; c < s.c; c++) {
        Moments m = {0, 0, 0};
        for (int64_t k = 0; k < parts; k++) merge(m, partials[k * s.c + c]);
        finish_statistics(p.statistics, c, m);
      }
    }
  }
  return failed;
}

int depthwise_input_grad(const DepthwiseInputGrad& p) {
  const Shape& s = p.shape;
  const Plan plan(s, taps_of(p), true, p.a != nullptr || takes_planes(s, taps_of(p), !p.residual));
  const int taps = p.kh * p.kw;
  const bool sums = p.sums.dy != nullptr;
  const int64_t stride = padded(s.c), parts = s.n * plan.row_tiles;
  char* memory =
      static_cast<char*>(scratch(0, static_cast<size_t>(float_bytes(kRows * stride) + float_bytes(stride * taps))));
  if (memory == nullptr) return 1;
  float* table = aligned_floats(memory, kRows * stride);
  float* weights = aligned_floats(memory, stride * taps);
  const int64_t plane_floats = plan.plane_floats();
  int failed = 0;
  const int threads = depthwise_threads(s, taps, p.threads);

  const int64_t together = blocks_together(plan, s, plane_floats * 4, threads);
  const int64_t strip_floats = plan.strip_floats(s.w);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* planes = static_cast<float*>(
        scratch(1, static_cast<size_t>(together * (plane_floats + strip_floats) + kStripFloats) * 4));
    if (planes != nullptr) zero(planes, together * plane_floats);
    float* strips = planes + together * plane_floats;
    float* grad_strip = strips + together * strip_floats;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < plan.blocks; b++) {
      pack_weights(p.weight, s.c, plan, plan.used_rows(s), b * V, true, weights + b * V * taps);
      fill_table(p.norm, p.sums, s, b * V, table);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < parts * ceil_div(plan.blocks, together); i++) {
      if (planes == nullptr) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      const Item item(plan, s, i, together);
      with_dtype(s.dtype, [&](auto tag) {
        using T = decltype(tag);
        const T* dy = static_cast<const T*>(p.dy);
        const auto finish = [](int, int64_t, int64_t, float*) {};
        const auto emit = [&](int g, int64_t p0, int64_t p1, const float* from) {
          const int64_t c0 = item.c0 + g * V;
          scatter(s, from, p.residual ? dy : nullptr, static_cast<T*>(p.dx), item.n, c0, channels_of(s, c0), p0, p1);
        };
        if (plan.planes) {
          const Window window(plan, s, item.y0, item.y1);
          with_activation(p.activation, [&](auto act) {
            for_rows_of_blocks(s, window.first, window.last, item.blocks, [&](int g, int64_t y0, int64_t y1) {
              const int64_t c0 = item.c0 + g * V;
              gather_gradient<T, decltype(act)::value>(s, dy, static_cast<const T*>(p.a), affine_at(table, stride, c0),
                                                       sums, item.n, c0, channels_of(s, c0), y0 * s.w, y1 * s.w,
                                                       grad_strip, window.row(plan, s, planes + g * plane_floats, y0));
            });
          });
          convolve_rows(plan, s, item, window, planes, weights, nullptr, strips, Ahead(), finish, emit);
        } else {
          T* dx = p.residual ? nullptr : static_cast<T*>(p.dx);
          convolve_tensor_rows(plan, s, item, dy, weights, nullptr, strips, dx, finish, emit);
        }
      });
    }
  }
  return failed;
}

// SPDX-License-Identifier: MIT
// The 1x1 convolution as a product of packed panels (gemm.h), with the block's epilogue on each tile while it is in L1:
//   eval      y = norm(act(W x + b))
//   training  a = W x + b, and statistics of act(a)
// Contiguous: Y[C_out][HW] = W X[C_in][HW] for each image; channels are the rows of a tile. channels_last:
// Y[NHW][C_out] = X[NHW][C_in] W^T; channels are the columns. Each call packs the weights once. A work item is a group
// of positions whose input panels, up to kDepthChunk deep at a time, stay in L2 while the weights stream past. FMAs
// bound it: C_in for each output, beside 20 operations of GELU.

// The most depth and bytes of an item's packed input. Deeper products go in chunks and keep their sums in memory
// between them: without chunks an item would have so few positions that the weights' traffic, not FMAs, would bound it.
constexpr int64_t kDepthChunk = 512, kItemBytes = 256 * 1024;
static_assert(kDepthChunk % kGemmDepth == 0, "chunks must not change the order of sums");
constexpr int64_t kTileFloats = kGemmRows * kGemmColumns;

constexpr int64_t kLeastItems = 16;

// How positions are cut into items. It depends on the shape only.
struct Items {
  bool channels_last;
  int64_t images, positions;  // channels_last: one image of N*H*W positions
  int64_t size, per_image;

  Items(const Shape& s, int64_t depth) : channels_last(s.channels_last) {
    images = channels_last ? 1 : s.n;
    positions = channels_last ? s.n * s.h * s.w : s.h * s.w;
    const int64_t unit = channels_last ? kGemmRows : kGemmColumns;
    const int64_t fit = smaller(larger(1, kItemBytes / (4 * smaller(depth, kDepthChunk) * unit)), 16);
    // Items are equal, and enough for all threads even if there is a single image.
    const int64_t wanted =
        larger(ceil_div(positions, fit * unit), smaller(ceil_div(positions, unit), ceil_div(kLeastItems, images)));
    size = ceil_div(ceil_div(positions, wanted), unit) * unit;
    per_image = ceil_div(positions, size);
  }
  int64_t count() const { return images * per_image; }
};

// Floats of an item's packed input, and of all its memory, which also holds the sums of its tiles.
inline int64_t panel_floats(const Items& items, int64_t depth) {
  const int64_t floats = items.channels_last ? rows_floats(items.size, depth) : columns_floats(items.size, depth);
  return ceil_div(floats, 16) * 16;
}
inline int64_t item_floats(const Items& items, int64_t channels, int64_t depth) {
  const int64_t chunk = smaller(depth, kDepthChunk);
  const int64_t rows = items.channels_last ? items.size : channels,
                columns = items.channels_last ? channels : items.size;
  const int64_t tiles = chunk < depth ? RowPanels(rows).panels * column_panels(columns) : 1;
  return panel_floats(items, chunk) + tiles * kTileFloats;
}

// y[position][channel m] = sum over k of weight(m, k) * x(position, k) for all positions. For each group of channels it
// calls
//   begin(item, c0, count); tile(item, image, c0, count, p0, positions, floats, ld) for each tile; end(item, c0, count)
// The rows of a tile are channels (contiguous) or positions (channels_last). `packed` holds the packed weights.
template <typename T, typename Begin, typename Tile, typename End>
inline void product_item(const Items& items, int64_t item, int64_t channels, int64_t depth, const T* x,
                         const float* packed, float* panels, Begin begin, Tile tile, End end) {
  const int64_t image = item / items.per_image, p0 = item % items.per_image * items.size;
  const int64_t p1 = smaller(p0 + items.size, items.positions);
  const int64_t chunk = smaller(depth, kDepthChunk);
  float* const sums = panels + panel_floats(items, chunk);  // of all tiles, used if there are several chunks
  for (int64_t k0 = 0; k0 < depth; k0 += chunk) {
    const int64_t k1 = smaller(k0 + chunk, depth);
    const bool done = k1 == depth;
    const auto multiply = [&](int64_t i, const float* left, int rows, const float* right, int vectors) {
      float* c = sums + (chunk < depth ? i * kTileFloats : 0);
      multiply_panels(left, rows, right, vectors, k1 - k0, c, kGemmColumns, k0 > 0);
      return c;
    };
    if (items.channels_last) {
      pack_rows(Operand<T>{x, depth, true}, p0, p1, k0, k1, panels);
      const RowPanels rows(p1 - p0);
      for (int64_t n = 0; n < channels; n += kGemmColumns) {
        const int count = static_cast<int>(smaller(kGemmColumns, channels - n)), vectors = vectors_of(count);
        if (done) begin(item, n, count);
        for (int64_t i = 0; i < rows.panels; i++) {
          const float* c = multiply(n / kGemmColumns * rows.panels + i, panels + rows.start(i) * (k1 - k0),
                                    rows.height(i), packed + n * depth + k0 * vectors * V, vectors);
          if (done) tile(item, image, n, count, p0 + rows.start(i), rows.height(i), c);
        }
        if (done) end(item, n, count);
      }
      continue;
    }
    pack_columns(Operand<T>{x + image * depth * items.positions, items.positions, false}, p0, p1, k0, k1, panels);
    const RowPanels rows(channels);
    for (int64_t i = 0; i < rows.panels; i++) {
      const int64_t m = rows.start(i);
      if (done) begin(item, m, rows.height(i));
      for (int64_t p = p0; p < p1; p += kGemmColumns) {
        const int count = static_cast<int>(smaller(kGemmColumns, p1 - p));
        const float* c =
            multiply(i * column_panels(p1 - p0) + (p - p0) / kGemmColumns, packed + m * depth + k0 * rows.height(i),
                     rows.height(i), panels + (p - p0) * (k1 - k0), vectors_of(count));
        if (done) tile(item, image, m, rows.height(i), p, count, c);
      }
      if (done) end(item, m, rows.height(i));
    }
  }
}

inline int64_t packed_floats(bool channels_last, int64_t channels, int64_t depth) {
  return channels_last ? columns_floats(channels, depth) : rows_floats(channels, depth) + V;
}
// Packs panel `i` of the weights, of weight_panels. weight(m, k) has k or m contiguous.
inline int64_t weight_panels(bool channels_last, int64_t channels) {
  return channels_last ? column_panels(channels) : RowPanels(channels).panels;
}
inline void pack_weight_panel(const Param& weight, int64_t ld, bool k_contiguous, bool channels_last, int64_t channels,
                              int64_t depth, int64_t i, float* packed) {
  with_dtype(weight.dtype, [&](auto tag) {
    using W = decltype(tag);
    const Operand<W> from = {static_cast<const W*>(weight.data), ld, k_contiguous};
    if (channels_last) {
      const int64_t n = i * kGemmColumns;
      pack_column_panel(from, n, smaller(n + kGemmColumns, channels), 0, depth, packed + n * depth);
    } else {
      // The last store of a panel reaches into the next one, which another thread may have packed: use a buffer.
      const RowPanels rows(channels);
      const int64_t m = rows.start(i);
      const int height = rows.height(i);
      alignas(64) float buffer[(64 + 1) * V];
      for (int64_t k = 0; k < depth; k += 64) {
        const int64_t end = smaller(k + 64, depth);
        pack(from, m, height, k, end, buffer, height);
        __builtin_memcpy(packed + m * depth + k * height, buffer, static_cast<size_t>((end - k) * height) * 4);
      }
    }
  });
}

inline int pointwise_threads(const Shape& s, int64_t depth, int threads) { return useful_threads(s, depth, threads); }

// The tables of a forward call: for each output channel the affine map and the bias, and the packed weights, unless the
// caller's are packed.
struct PointwiseTables {
  int64_t stride, depth, panels;
  float *table, *biases, *filled;
  const float* packed;

  static int64_t bytes(const PointwiseForward& p) {
    const int64_t stride = padded(p.shape.c) + V;
    return float_bytes(kRows * stride) + float_bytes(stride) +
           (is_packed(p) ? 0 : float_bytes(packed_floats(p.shape.channels_last, p.shape.c, p.c_in)));
  }
  static bool is_packed(const PointwiseForward& p) { return p.weight.dtype == kPacked; }
  PointwiseTables(const PointwiseForward& p, char*& memory) : stride(padded(p.shape.c) + V), depth(p.c_in) {
    panels = is_packed(p) ? 0 : weight_panels(p.shape.channels_last, p.shape.c);
    table = aligned_floats(memory, kRows * stride);
    biases = aligned_floats(memory, stride);
    filled = is_packed(p) ? nullptr : aligned_floats(memory, packed_floats(p.shape.channels_last, p.shape.c, depth));
    packed = is_packed(p) ? static_cast<const float*>(p.weight.data) : filled;
  }
  void fill_channel(const PointwiseForward& p, int64_t c) const {  // c < stride
    fill_affine(p.norm, kNoSums, 1, c, p.shape.c, table + c, stride);
    biases[c] = p.bias.data != nullptr && c < p.shape.c ? param_at(p.bias, c) : 0.f;
  }
  void fill_panel(const PointwiseForward& p, int64_t i) const {  // i < panels
    pack_weight_panel(p.weight, depth, true, p.shape.channels_last, p.shape.c, depth, i, filled);
  }
};

inline void pack_weight(const PackWeight& p) {
  const int64_t panels = weight_panels(p.channels_last, p.c);
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t i = 0; i < panels; i++) {
    pack_weight_panel(p.weight, p.c_in, true, p.channels_last, p.c, p.c_in, i, p.packed);
  }
}

// One item of the forward. In training, partials is [item][channel].
template <typename T>
inline void pointwise_item(const PointwiseForward& p, const Items& items, int64_t item, const PointwiseTables& tables,
                           float* panels, Moments* partials) {
  const Shape& s = p.shape;
  const bool training = partials != nullptr, last = s.channels_last;
  const int64_t hw = s.h * s.w, stride = tables.stride;
  const float *table = tables.table, *biases = tables.biases;
  T* y = static_cast<T*>(p.y);
  with_activation(p.activation, [&](auto act) {
    constexpr int A = decltype(act)::value;
    // Statistics of each channel of the current rows (contiguous) or lanes (channels_last).
    LaneMoments sums[kGemmRows];
    double count = 0;
    const auto begin = [&](int64_t, int64_t, int) { count = 0; };
    const auto tile = [&](int64_t, int64_t image, int64_t c0, int channels, int64_t p0, int positions, const float* c) {
      if (!last) {
        for (int r = 0; r < channels; r++) {
          const float* channel = table + c0 + r;
          Affine f;
          for (int i = 0; i < kRows; i++) f.row[i] = splat(channel[i * stride]);
          const Vec bias = splat(biases[c0 + r]);
          T* to = y + (image * s.c + c0 + r) * hw + p0;
          for (int j = 0; j < positions; j += V) {
            const int n = positions - j < V ? positions - j : V;
            Vec v = *reinterpret_cast<const Vec*>(c + r * kGemmColumns + j) + bias;
            if (training) {
              v = rounded(v, T{});
              const Vec h = activate<A>(v);
              if (count == 0 && j == 0) sums[r].begin(splat(h[0]));
              if (n == V) {
                sums[r].add(h);
              } else {
                sums[r].add_some(h, n);
              }
            } else {
              v = normalized<A>(v, f, p.norm.present);
            }
            if (n == V) {
              store(to + j, v);
            } else {
              store_n(to + j, v, n);
            }
          }
        }
      } else {
        for (int j = 0; j < channels; j += V) {
          const int n = channels - j < V ? channels - j : V;
          const Affine f = affine_at(table, stride, c0 + j);
          const Vec bias = load(biases + c0 + j);
          T* to = y + p0 * s.c + c0 + j;
          if (training && count == 0) {
            sums[j / V].begin(activate<A>(rounded(*reinterpret_cast<const Vec*>(c + j) + bias, T{})));
          }
          for (int r = 0; r < positions; r++) {
            Vec v = *reinterpret_cast<const Vec*>(c + r * kGemmColumns + j) + bias;
            if (training) {
              v = rounded(v, T{});
              sums[j / V].add(activate<A>(v));
            } else {
              v = normalized<A>(v, f, p.norm.present);
            }
            if (n == V) {
              store(to + r * s.c, v);
            } else {
              store_n(to + r * s.c, v, n);
            }
          }
        }
      }
      count += positions;
    };
    const auto end = [&](int64_t, int64_t c0, int channels) {
      if (!training) return;
      for (int i = 0; i < channels; i++) {
        const LaneMoments& of = sums[last ? i / V : i];
        const double total = last ? of.sum.lane(i % V) : of.sum.total();
        const double square = last ? of.squares.lane(i % V) : of.squares.total();
        const double shift = static_cast<double>(of.shift[last ? i % V : 0]);
        partials[item * s.c + c0 + i] = moments(count, shift, total, square);
      }
    };
    product_item(items, item, s.c, tables.depth, static_cast<const T*>(p.x), tables.packed, panels, begin, tile, end);
  });
}

// `shape` is the output's.
int pointwise_forward(const PointwiseForward& p) {
  const Shape& s = p.shape;
  const Items items(s, p.c_in);
  const bool training = p.statistics.mean != nullptr;
  const int64_t moments_bytes = training ? items.count() * s.c * static_cast<int64_t>(sizeof(Moments)) : 0;
  char* memory = static_cast<char*>(scratch(0, static_cast<size_t>(PointwiseTables::bytes(p) + moments_bytes)));
  if (memory == nullptr) return 1;
  const PointwiseTables tables(p, memory);
  Moments* partials = training ? reinterpret_cast<Moments*>(memory) : nullptr;  // [item][channel]
  const int threads = pointwise_threads(s, p.c_in, p.threads);
  int failed = 0;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* panels = static_cast<float*>(scratch(1, static_cast<size_t>(item_floats(items, s.c, p.c_in)) * 4));
#pragma omp for schedule(static)
    for (int64_t c = 0; c < tables.stride; c++) tables.fill_channel(p, c);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tables.panels; i++) tables.fill_panel(p, i);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items.count(); item++) {
      if (panels == nullptr) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      with_dtype(s.dtype, [&](auto tag) { pointwise_item<decltype(tag)>(p, items, item, tables, panels, partials); });
    }
    if (training && failed == 0) {
#pragma omp for schedule(static)
      for (int64_t c = 0; c < s.c; c++) {
        Moments m = {0, 0, 0};
        for (int64_t k = 0; k < items.count(); k++) merge(m, partials[k * s.c + c]);
        finish_statistics(p.statistics, c, m);
      }
    }
  }
  return failed;
}

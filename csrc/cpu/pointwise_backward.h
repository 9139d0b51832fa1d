// SPDX-License-Identifier: MIT
// Backward of the 1x1 convolution, on panels as pointwise.h packs them:
//   da = dh * act'(a) in float32, dx = W^T da, dw = da x^T, db = sum da
// If channels are few (narrow), a work item is a group of chunks of positions: a chunk's da stays in L2 for both
// products and db, and dy, a and x are read once. Otherwise da is written once, and each product cuts the work in its
// own way. Each group leaves one partial sum of dw and db; they are added in order. FMAs bound it.

// Stores a tile of dx: channels [c0, c0 + count) at positions [p0, p0 + positions) of an image (contiguous) or of all
// images.
template <typename T>
inline void store_input_grad(const PointwiseBackward& p, T* dx, int64_t image, int64_t c0, int count, int64_t p0,
                             int positions, const float* c) {
  const bool last = p.shape.channels_last;
  const int64_t hw = p.shape.h * p.shape.w, ld = last ? p.c_in : hw;
  const int rows = last ? positions : count, columns = last ? count : positions;
  T* to = last ? dx + p0 * p.c_in + c0 : dx + (image * p.c_in + c0) * hw + p0;
  for (int r = 0; r < rows; r++) {
    for (int j = 0; j < columns; j += V) {
      const Vec v = *reinterpret_cast<const Vec*>(c + r * kGemmColumns + j);
      if (columns - j >= V) {
        store(to + r * ld + j, v);
      } else {
        store_n(to + r * ld + j, v, columns - j);
      }
    }
  }
}

// Row r of dw: adds up the groups' partial sums [group][C_out][ldc] in the first one of them.
inline void add_weight_grads(const PointwiseBackward& p, int64_t r, int64_t groups, float* partials, int64_t ldc) {
  float* sum = partials + r * ldc;
  for (int64_t g = 1; g < groups; g++) {
    const float* more = sum + g * p.shape.c * ldc;
    for (int64_t c = 0; c < ldc; c += V) {
      store(sum + c, load(sum + c) + load(more + c));
      prefetch(more + c, p.shape.c * ldc);
    }
  }
  with_dtype(p.dw.dtype, [&](auto tag) {
    auto* to = static_cast<decltype(tag)*>(p.dw.data) + r * p.c_in;
    for (int64_t c = 0; c < p.c_in; c += V) {
      const int count = static_cast<int>(smaller(V, p.c_in - c));
      if (count == V) {
        store(to + c, load(sum + c));
      } else {
        store_n(to + c, load(sum + c), count);
      }
    }
  });
}

// dx(position, k) = sum over m of da(position, m) * weight(m, k), with da in float32.
inline int pointwise_input_grad(const PointwiseBackward& p) {
  const Shape& s = p.shape;
  const Items items(s, s.c);
  const bool last = s.channels_last;
  const int64_t depth = s.c, channels = p.c_in;
  float* packed = static_cast<float*>(scratch(0, static_cast<size_t>(packed_floats(last, channels, depth)) * 4));
  if (packed == nullptr) return 1;
  const int64_t weight_count = weight_panels(last, channels);
  const int threads = pointwise_threads(s, channels, p.threads);
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* panels = static_cast<float*>(scratch(1, static_cast<size_t>(item_floats(items, channels, depth)) * 4));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < weight_count; i++) {
      pack_weight_panel(p.weight, channels, false, last, channels, depth, i, packed);
    }
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items.count(); item++) {
      if (panels == nullptr) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      with_dtype(s.dtype, [&](auto tag) {
        using T = decltype(tag);
        T* dx = static_cast<T*>(p.dx);
        const auto nothing = [](int64_t, int64_t, int) {};
        const auto tile = [&](int64_t, int64_t image, int64_t c0, int count, int64_t p0, int positions,
                              const float* c) { store_input_grad(p, dx, image, c0, count, p0, positions, c); };
        product_item(items, item, channels, depth, p.da, packed, panels, nothing, tile, nothing);
      });
    }
  }
  return failed;
}

// The longest sum of a weight gradient from n to m channels. Products of planes that are constant, as below a global
// pooling, all round in one direction. Torch's sums for few channels are short, and ours may not be worse.
inline int64_t longest_sum(int64_t m, int64_t n) { return smaller(m, n) <= 16 ? 16 : kGemmDepth; }

// dw(m, k) = sum over positions of da(position, m) * x(position, k). A work item is a block of dw and a group of chunks
// of positions; groups are added in order.
inline int pointwise_weight_grad(const PointwiseBackward& p) {
  const Shape& s = p.shape;
  const bool last = s.channels_last;
  const int64_t m = s.c, n = p.c_in, hw = s.h * s.w, positions = last ? s.n * hw : hw;
  constexpr int64_t kBlockRows = 19 * kGemmRows, kBlockColumns = 8 * kGemmColumns;
  const int64_t row_blocks = ceil_div(m, kBlockRows), column_blocks = ceil_div(n, kBlockColumns);
  const int64_t blocks = row_blocks * column_blocks;
  const int64_t per_image = ceil_div(positions, kGemmDepth);
  const int64_t chunks = (last ? 1 : s.n) * per_image;
  const int64_t per_group = ceil_div(chunks, smaller(chunks, ceil_div(16, blocks)));
  const int64_t groups = ceil_div(chunks, per_group);
  const int64_t ldc = ceil_div(n, V) * V;
  float* partials = static_cast<float*>(scratch(0, static_cast<size_t>(groups * m * ldc) * 4));  // [group][m][ldc]
  if (partials == nullptr) return 1;
  const int64_t left_floats = ceil_div(rows_floats(kBlockRows, kGemmDepth), 16) * 16;
  const int64_t right_floats = columns_floats(kBlockColumns, kGemmDepth);
  const int threads = pointwise_threads(s, n, p.threads);
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* left = static_cast<float*>(scratch(1, static_cast<size_t>(left_floats + right_floats) * 4));
    float* right = left + left_floats;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < groups * blocks; item++) {
      if (left == nullptr) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      const int64_t group = item / blocks, block = item % blocks;
      const int64_t m0 = block / column_blocks * kBlockRows, m1 = smaller(m0 + kBlockRows, m);
      const int64_t n0 = block % column_blocks * kBlockColumns, n1 = smaller(n0 + kBlockColumns, n);
      const RowPanels rows(m1 - m0);
      for (int64_t chunk = group * per_group; chunk < smaller((group + 1) * per_group, chunks); chunk++) {
        const int64_t image = chunk / per_image, k0 = chunk % per_image * kGemmDepth;
        const int64_t k1 = smaller(k0 + kGemmDepth, positions), depth = k1 - k0;
        pack_rows(Operand<float>{p.da + image * m * hw, last ? m : hw, !last}, m0, m1, k0, k1, left);
        with_dtype(s.dtype, [&](auto tag) {
          using T = decltype(tag);
          pack_columns(Operand<T>{static_cast<const T*>(p.x) + image * n * hw, last ? n : hw, !last}, n0, n1, k0, k1,
                       right);
        });
        for (int64_t c = n0; c < n1; c += kGemmColumns) {
          for (int64_t i = 0; i < rows.panels; i++) {
            multiply_panels(left + rows.start(i) * depth, rows.height(i), right + (c - n0) * depth, vectors_of(n1 - c),
                            depth, partials + (group * m + m0 + rows.start(i)) * ldc + c, ldc,
                            chunk > group * per_group, longest_sum(m, n));
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < m; r++) add_weight_grads(p, r, groups, partials, ldc);
  }
  return failed;
}

// The most channels for which a chunk's da and x, a group's dw and the weights fit in L2 together.
constexpr int64_t kNarrow = 288;
// Enough groups to share among threads, few enough that adding their dw is little work.
constexpr int64_t kGroups = 16;

// Positions [k0, k1) of an image (contiguous) or of all images (channels_last).
struct Chunk {
  int64_t image, k0, k1;
};

// Writes the chunk's da as [channel][ld] (contiguous) or [position][ld] (channels_last). Adds its sums to db (C_out)
// unless that is null.
template <typename T, int A>
inline void chunk_gradient(const PointwiseBackward& p, const float* table, const Chunk& chunk, int64_t ld, float* da,
                           double* db) {
  const Shape& s = p.shape;
  const T* dy = static_cast<const T*>(p.dy);
  const T* a = static_cast<const T*>(p.a);
  const bool sums = p.sums.dy != nullptr;
  const int64_t stride = padded(s.c), positions = chunk.k1 - chunk.k0;
  if (!s.channels_last) {
    const int64_t hw = s.h * s.w;
    for (int64_t m = 0; m < s.c; m++) {
      const Affine f = channel_affine(table, stride, m);
      const int64_t from = (chunk.image * s.c + m) * hw + chunk.k0;
      LaneSums sum;
      sum.clear();
      int64_t j = 0;
      for (; j + V <= positions; j += V) {
        const Vec g = gradient<A>(load(dy + from + j), load(a + from + j), f, sums);
        store(da + m * ld + j, g);
        sum.add(g);
        prefetch(dy + from + j, hw);
        prefetch(a + from + j, hw);
      }
      if (j < positions) {
        const int count = static_cast<int>(positions - j);
        const Vec g = gradient<A>(load_n(dy + from + j, count), load_n(a + from + j, count), f, sums);
        store(da + m * ld + j, g);
        sum.add(keep(g, count));
      }
      if (db != nullptr) db[m] += sum.total();
    }
    return;
  }
  for (int64_t k = 0; k < positions; k += kRowsTogether) {
    const int64_t rows = smaller(kRowsTogether, positions - k);
    for (int64_t c = 0; c < s.c; c += V) {
      const Affine f = affine_at(table, stride, c);
      const int count = static_cast<int>(smaller(V, s.c - c));
      LaneSums sum;
      sum.clear();
      for (int64_t r = k; r < k + rows; r++) {
        const int64_t from = (chunk.k0 + r) * s.c + c;
        const Vec g = count == V ? gradient<A>(load(dy + from), load(a + from), f, sums)
                                 : gradient<A>(load_n(dy + from, count), load_n(a + from, count), f, sums);
        store(da + r * ld + c, g);
        sum.add(g);
        prefetch(dy + from, rows_ahead(s));
        prefetch(a + from, rows_ahead(s));
      }
      if (db == nullptr) continue;
      for (int i = 0; i < count; i++) db[c + i] += sum.lane(i);
    }
  }
}

// Computes dx of a chunk.
template <typename T>
inline void chunk_input_grad(const PointwiseBackward& p, const Chunk& chunk, const float* da, int64_t ld,
                             const float* packed, float* panel, float* c) {
  const bool last = p.shape.channels_last;
  const int64_t depth = p.shape.c, channels = p.c_in, positions = chunk.k1 - chunk.k0;
  T* dx = static_cast<T*>(p.dx);
  if (last) {
    const RowPanels rows(positions);
    for (int64_t i = 0; i < rows.panels; i++) {
      const int height = rows.height(i);
      pack(Operand<float>{da, ld, true}, rows.start(i), height, 0, depth, panel, height);
      for (int64_t n = 0; n < channels; n += kGemmColumns) {
        multiply_panels(panel, height, packed + n * depth, vectors_of(channels - n), depth, c, kGemmColumns, false);
        store_input_grad(p, dx, 0, n, static_cast<int>(smaller(kGemmColumns, channels - n)), chunk.k0 + rows.start(i),
                         height, c);
      }
    }
    return;
  }
  const RowPanels rows(channels);
  for (int64_t n = 0; n < positions; n += kGemmColumns) {
    const int64_t end = smaller(n + kGemmColumns, positions);
    pack_column_panel(Operand<float>{da, ld, false}, n, end, 0, depth, panel);
    for (int64_t i = 0; i < rows.panels; i++) {
      const int height = rows.height(i);
      multiply_panels(packed + rows.start(i) * depth, height, panel, vectors_of(end - n), depth, c, kGemmColumns,
                      false);
      store_input_grad(p, dx, chunk.image, rows.start(i), height, chunk.k0 + n, static_cast<int>(end - n), c);
    }
  }
}

// Writes the chunk's da x^T to a group's dw [C_out][ldc], or adds it.
template <typename T>
inline void chunk_weight_grad(const PointwiseBackward& p, const Chunk& chunk, const float* da, int64_t ld, float* right,
                              float* panel, float* dw, int64_t ldc, bool add) {
  const Shape& s = p.shape;
  const bool last = s.channels_last;
  const int64_t n = p.c_in, hw = s.h * s.w, depth = chunk.k1 - chunk.k0;
  const T* x = static_cast<const T*>(p.x) + chunk.image * n * hw;
  pack_columns(Operand<T>{x, last ? n : hw, !last}, 0, n, chunk.k0, chunk.k1, right);
  const RowPanels rows(s.c);
  for (int64_t i = 0; i < rows.panels; i++) {
    const int height = rows.height(i);
    pack(Operand<float>{da, ld, !last}, rows.start(i), height, 0, depth, panel, height);
    for (int64_t c = 0; c < n; c += kGemmColumns) {
      multiply_panels(panel, height, right + c * depth, vectors_of(n - c), depth, dw + rows.start(i) * ldc + c, ldc,
                      add, longest_sum(s.c, n));
    }
  }
}

inline int pointwise_backward_narrow(const PointwiseBackward& p) {
  const Shape& s = p.shape;
  const bool last = s.channels_last, wants_dw = p.dw.data != nullptr, wants_db = p.db.data != nullptr;
  const int64_t m = s.c, n = p.c_in, positions = last ? s.n * s.h * s.w : s.h * s.w;
  const int64_t per_image = ceil_div(positions, kGemmDepth), chunks = (last ? 1 : s.n) * per_image;
  const int64_t length = ceil_div(positions, per_image);  // equal chunks
  const int64_t per_group = wants_dw ? ceil_div(chunks, smaller(chunks, kGroups)) : 1;
  const int64_t groups = ceil_div(chunks, per_group), ldc = ceil_div(n, V) * V, stride = padded(m);
  const int64_t packed_size = p.dx == nullptr ? 0 : packed_floats(last, n, m);
  const int64_t dw_size = wants_dw ? groups * m * ldc : 0;
  char* memory =
      static_cast<char*>(scratch(0, static_cast<size_t>(float_bytes(kRows * stride) + float_bytes(packed_size) +
                                                        float_bytes(dw_size) + groups * m * 8)));
  if (memory == nullptr) return 1;
  float* table = aligned_floats(memory, kRows * stride);
  float* packed = aligned_floats(memory, packed_size);
  float* dw = aligned_floats(memory, dw_size);     // [group][C_out][ldc]
  double* db = reinterpret_cast<double*>(memory);  // [group][C_out]
  const int64_t ld = last ? stride : length + V;   // of a chunk's da
  const int64_t da_floats = (last ? length : m) * ld + V, right_floats = columns_floats(n, length);
  const int64_t panel_floats = larger(m, length) * kGemmColumns + V;
  const int threads = pointwise_threads(s, n, p.threads);
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    char* own =
        static_cast<char*>(scratch(1, static_cast<size_t>(float_bytes(da_floats) + float_bytes(right_floats) +
                                                          float_bytes(panel_floats) + float_bytes(kTileFloats))));
    float *da = nullptr, *right = nullptr, *panel = nullptr, *tile = nullptr;
    if (own != nullptr) {
      da = aligned_floats(own, da_floats);
      right = aligned_floats(own, right_floats);
      panel = aligned_floats(own, panel_floats);
      tile = aligned_floats(own, kTileFloats);
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks_of(m); b++) fill_table(p.norm, p.sums, s, b * V, table);
    if (p.dx != nullptr) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < weight_panels(last, n); i++) pack_weight_panel(p.weight, n, false, last, n, m, i, packed);
    }
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < groups; group++) {
      if (da == nullptr) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      double* group_db = db + group * m;
      for (int64_t i = 0; i < m; i++) group_db[i] = 0;
      for (int64_t i = group * per_group; i < smaller((group + 1) * per_group, chunks); i++) {
        const int64_t k0 = i % per_image * length;
        const Chunk chunk = {i / per_image, k0, smaller(k0 + length, positions)};
        with_dtype(s.dtype, [&](auto tag) {
          using T = decltype(tag);
          with_activation(p.activation, [&](auto act) {
            chunk_gradient<T, decltype(act)::value>(p, table, chunk, ld, da, wants_db ? group_db : nullptr);
          });
          if (p.dx != nullptr) chunk_input_grad<T>(p, chunk, da, ld, packed, panel, tile);
          if (wants_dw) {
            chunk_weight_grad<T>(p, chunk, da, ld, right, panel, dw + group * m * ldc, ldc, i > group * per_group);
          }
        });
      }
    }
    if (wants_db) {
#pragma omp for schedule(static)
      for (int64_t c = 0; c < m; c++) {
        double sum = 0;
        for (int64_t group = 0; group < groups; group++) sum += db[group * m + c];
        set_param(p.db, c, static_cast<float>(sum));
      }
    }
    if (wants_dw) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < m; r++) add_weight_grads(p, r, groups, dw, ldc);
    }
  }
  return failed;
}

bool pointwise_is_narrow(int64_t c, int64_t c_in) { return c <= kNarrow && c_in <= kNarrow; }

int pointwise_backward(const PointwiseBackward& p) {
  if (pointwise_is_narrow(p.shape.c, p.c_in)) return pointwise_backward_narrow(p);
  int failed = pointwise_grad_prologue(p);
  if (failed == 0 && p.dx != nullptr) failed = pointwise_input_grad(p);
  if (failed == 0 && p.dw.data != nullptr) failed = pointwise_weight_grad(p);
  return failed;
}

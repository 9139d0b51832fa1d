// SPDX-License-Identifier: MIT
// The product of panels in float32: C[m][n] += sum over k of A[m][k] * B[k][n].
// Panels of A are [k][R] with R <= kGemmRows, panels of B [k][kGemmColumns]; the last one may be narrower. Packing
// reads either orientation of any dtype and transposes V x V tiles in registers. The micro-kernel holds R x 2 vectors
// of C.
// A sum runs over at most kGemmDepth products before it is added to C, which keeps float32 sums short.

constexpr int kGemmRows = V == 16 ? 14 : V == 8 ? 6 : 4;
constexpr int kGemmColumns = 2 * V;
constexpr int64_t kGemmDepth = 256;
static_assert(kGemmRows <= V, "a panel row of A is stored as one vector");

// The products of one k: `right` is a row of B, row r of A's column is at a[r * STEP].
template <int R, int NV, int STEP>
VEC_INLINE void multiply_step(const float* a, const float* b, Vec (&acc)[R][NV]) {
  Vec right[NV];
#pragma GCC unroll 2
  for (int v = 0; v < NV; v++) right[v] = *reinterpret_cast<const Vec*>(b + v * V);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const Vec left = splat(a[r * STEP]);
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) acc[r][v] = fma(left, right[v], acc[r][v]);
  }
}
template <int R, int NV>
VEC_INLINE void clear(Vec (&acc)[R][NV]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) acc[r][v] = splat(0.f);
  }
}
// Stores vector v of row r at c[r * row + v * vector], or adds it there.
template <int R, int NV>
VEC_INLINE void put(const Vec (&acc)[R][NV], float* c, int64_t row, int64_t vector, bool add) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) {
      Vec* to = reinterpret_cast<Vec*>(c + r * row + v * vector);
      *to = add ? *to + acc[r][v] : acc[r][v];
    }
  }
}

template <int R, int NV>
void multiply(const float* a, const float* b, int64_t depth, float* c, int64_t ldc, bool add) {
  Vec acc[R][NV];
  clear(acc);
  // Hardware fetches both panels from L2 too late.
  constexpr int64_t kAhead = 8;
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; k++, a += R, b += NV * V) {
    for (int v = 0; v < NV; v++) prefetch(b, NV * V * kAhead + v * V);
    prefetch(a, R * kAhead);
    multiply_step<R, NV, 1>(a, b, acc);
  }
  put(acc, c, ldc, V, add);
}
using Multiply = void (*)(const float*, const float*, int64_t, float*, int64_t, bool);

template <int R = kGemmRows>
inline Multiply multiply_for(int rows, int vectors) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    if (rows == R) return vectors == 1 ? multiply<R, 1> : multiply<R, 2>;
    return multiply_for<R - 1>(rows, vectors);
  }
}

// The whole depth, in sums of at most `longest` products.
inline void multiply_panels(const float* a, int rows, const float* b, int vectors, int64_t depth, float* c, int64_t ldc,
                            bool add, int64_t longest = kGemmDepth) {
  const Multiply kernel = multiply_for(rows, vectors);
  for (int64_t k = 0; k < depth; k += longest) {
    kernel(a + k * rows, b + k * vectors * V, smaller(longest, depth - k), c, ldc, add || k > 0);
  }
}

// The same product from planes of V channels to planes of V channels, without packing or copying: A(r, k) is at
// a[k / V * stride + r * V + k % V], vector v of row r of C at c[v * stride + r * V].
template <int R, int NV>
void multiply_planes(const float* a, int64_t stride, const float* b, int64_t depth, float* c, bool add) {
  Vec acc[R][NV];
  clear(acc);
  for (; depth > 0; depth -= V, a += stride) {
    const int lanes = static_cast<int>(smaller(V, depth));
    for (int k = 0; k < lanes; k++, b += NV * V) multiply_step<R, NV, V>(a + k, b, acc);
  }
  put(acc, c, V, stride, add);
}
using MultiplyPlanes = void (*)(const float*, int64_t, const float*, int64_t, float*, bool);

template <int R = kGemmRows>
inline MultiplyPlanes multiply_planes_for(int rows, int vectors) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    if (rows == R) return vectors == 1 ? multiply_planes<R, 1> : multiply_planes<R, 2>;
    return multiply_planes_for<R - 1>(rows, vectors);
  }
}

// M rows cut into panels of nearly equal height: panel i is rows [start(i), start(i + 1)).
struct RowPanels {
  int64_t m, panels;
  explicit RowPanels(int64_t rows) : m(rows), panels(ceil_div(rows, kGemmRows)) {}
  int64_t start(int64_t i) const { return i * m / panels; }
  int height(int64_t i) const { return static_cast<int>(start(i + 1) - start(i)); }
};
inline int vectors_of(int64_t columns) { return columns > V ? 2 : 1; }
inline int64_t column_panels(int64_t n) { return ceil_div(n, kGemmColumns); }

// One side of a product: element (i, k) is at data[i * ld + k] if k_contiguous, else at data[k * ld + i].
template <typename T>
struct Operand {
  const T* data;
  int64_t ld;
  bool k_contiguous;
};

// Packs elements (i0 + [0, count), k in [k0, k1)), count <= V, to [k - k0][stride]. Lanes from count on become 0. A
// store may reach beyond `stride`: the store of the next k overwrites that part, and the buffer ends V floats later.
template <typename T>
inline void pack(const Operand<T>& from, int64_t i0, int count, int64_t k0, int64_t k1, float* to, int64_t stride) {
  if (!from.k_contiguous) {
    const T* p = from.data + k0 * from.ld + i0;
    if (count == V) {
      for (int64_t k = k0; k < k1; k++, p += from.ld, to += stride) store(to, load(p));
    } else {
      for (int64_t k = k0; k < k1; k++, p += from.ld, to += stride) store(to, load_n(p, count));
    }
    return;
  }
  const T* p = from.data + i0 * from.ld;
  for (int64_t k = k0; k < k1; k += V) {
    const int depth = static_cast<int>(smaller(V, k1 - k));
    Vec r[V];
    if (count == V && depth == V) {
#pragma GCC unroll 16
      for (int i = 0; i < V; i++) r[i] = load(p + i * from.ld + k);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < V; i++) r[i] = i < count ? load_n(p + i * from.ld + k, depth) : splat(0.f);
    }
    // Prefetches the rows of the next panel: hardware does not foresee so many short runs.
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) {
      if (i < count) prefetch(p + (count + i) * from.ld, k);
    }
    transpose(r);
    if (depth == V) {
#pragma GCC unroll 16
      for (int i = 0; i < V; i++, to += stride) store(to, r[i]);
      continue;
    }
    for (int i = 0; i < depth; i++, to += stride) store(to, r[i]);
  }
}

// Packs rows [m0, m1) as the A panels of a RowPanels(m1 - m0); the panel of row m0 + s starts at to + s * depth.
template <typename T>
inline void pack_rows(const Operand<T>& from, int64_t m0, int64_t m1, int64_t k0, int64_t k1, float* to) {
  const RowPanels panels(m1 - m0);
  for (int64_t i = 0; i < panels.panels; i++) {
    pack(from, m0 + panels.start(i), panels.height(i), k0, k1, to + panels.start(i) * (k1 - k0), panels.height(i));
  }
}
// Packs columns [n0, n1) as one B panel.
template <typename T>
inline void pack_column_panel(const Operand<T>& from, int64_t n0, int64_t n1, int64_t k0, int64_t k1, float* to) {
  const int vectors = vectors_of(n1 - n0);
  for (int v = 0; v < vectors; v++) {
    const int count = static_cast<int>(smaller(V, n1 - n0 - v * V));
    pack(from, n0 + v * V, count, k0, k1, to + v * V, vectors * V);
  }
}
template <typename T>
inline void pack_columns(const Operand<T>& from, int64_t n0, int64_t n1, int64_t k0, int64_t k1, float* to) {
  int64_t n = n0;
  if (!from.k_contiguous) {
    // Packs all whole panels together, in the order of memory.
    const int64_t whole = (n1 - n0) / kGemmColumns, stride = (k1 - k0) * kGemmColumns;
    n += whole * kGemmColumns;
    for (int64_t k = k0; k < k1; k++) {
      const T* p = from.data + k * from.ld + n0;
      float* row = to + (k - k0) * kGemmColumns;
      for (int64_t i = 0; i < whole; i++, p += kGemmColumns, row += stride) {
        store(row, load(p));
        store(row + V, load(p + V));
      }
    }
  }
  for (; n < n1; n += kGemmColumns) {
    pack_column_panel(from, n, smaller(n + kGemmColumns, n1), k0, k1, to + (n - n0) * (k1 - k0));
  }
}
inline int64_t rows_floats(int64_t m, int64_t k) { return m * k + V; }
inline int64_t columns_floats(int64_t n, int64_t k) { return ceil_div(n, V) * V * k; }

// SPDX-License-Identifier: MIT
// The vector type on any CPU: 4 floats in the compiler's vector extensions (SSE2, NEON). Integer code converts 16-bit
// floats. isa_baseline.cpp includes it inside its anonymous namespace.

constexpr int V = 4;
// These tiles fill SSE2's 16 registers: 8 accumulators, up to 6 weights and one input.
constexpr int kMaxTile = 8, kMaxTaps = 6, kGradTile = 4;
constexpr int kTiles[] = {2, 4, 6, 7, 8};
typedef float Vec __attribute__((vector_size(16), aligned(16), may_alias));
typedef int32_t IVec __attribute__((vector_size(16), aligned(16), may_alias));

VEC_INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
#ifdef __ARM_NEON
VEC_INLINE Vec fma(Vec a, Vec b, Vec c) { return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
VEC_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
// Both return the second operand if either is NaN.
VEC_INLINE Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
VEC_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }

VEC_INLINE Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
VEC_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof x); }
VEC_INLINE Vec rounded(Vec x, float) { return x; }

template <typename T>
VEC_INLINE Vec load(const T* p) {
  return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <typename T>
VEC_INLINE void store(T* p, Vec x) {
  for (int i = 0; i < V; i++) narrow(x[i], p[i]);
}
template <typename T>
VEC_INLINE Vec rounded(Vec x, T) {
  T buffer[V];
  store(buffer, x);
  return load(buffer);
}
#include "vec_partial.h"

// The lanes in double.
typedef double DVec __attribute__((vector_size(16), aligned(16), may_alias));
VEC_INLINE DVec low_half(Vec x) { return DVec{x[0], x[1]}; }
VEC_INLINE DVec high_half(Vec x) { return DVec{x[2], x[3]}; }

// {a[V - 1], b[0], ..., b[V - 2]} and {a[1], ..., a[V - 1], b[0]}
VEC_INLINE Vec last_and_first(Vec a, Vec b) { return Vec{a[3], b[0], b[1], b[2]}; }
VEC_INLINE Vec second_and_on(Vec a, Vec b) { return Vec{a[1], a[2], a[3], b[0]}; }

// r[i][j] <-> r[j][i]
VEC_INLINE void transpose(Vec r[V]) {
  const Vec a = r[0], b = r[1], c = r[2], d = r[3];
  r[0] = Vec{a[0], b[0], c[0], d[0]};
  r[1] = Vec{a[1], b[1], c[1], d[1]};
  r[2] = Vec{a[2], b[2], c[2], d[2]};
  r[3] = Vec{a[3], b[3], c[3], d[3]};
}

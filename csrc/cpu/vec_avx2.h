// SPDX-License-Identifier: MIT
// The vector type on AVX2 with FMA and F16C: 8 floats. isa_avx2.cpp includes it inside its anonymous namespace.

constexpr int V = 8;
// These tiles fill the 16 registers: 8 accumulators, up to 6 weights and one input.
constexpr int kMaxTile = 8, kMaxTaps = 6, kGradTile = 4;
constexpr int kTiles[] = {2, 4, 6, 7, 8};
typedef float Vec __attribute__((vector_size(32), aligned(32), may_alias));
typedef int32_t IVec __attribute__((vector_size(32), aligned(32), may_alias));

VEC_INLINE Vec splat(float x) { return (Vec)_mm256_set1_ps(x); }
VEC_INLINE Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
// Both return the second operand if either is NaN.
VEC_INLINE Vec vmin(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
VEC_INLINE Vec vmax(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }

VEC_INLINE __m256i widen(__m128i x) { return _mm256_cvtepu16_epi32(x); }
VEC_INLINE __m128i to_bfloat(Vec x) {
  const __m256i bits = _mm256_castps_si256((__m256)x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
VEC_INLINE __m128i to_half(Vec x) { return _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC_INLINE Vec from_bits(__m128i x, BFloat) { return (Vec)_mm256_castsi256_ps(_mm256_slli_epi32(widen(x), 16)); }
VEC_INLINE Vec from_bits(__m128i x, Half) { return (Vec)_mm256_cvtph_ps(x); }
VEC_INLINE __m128i to_bits(Vec x, BFloat) { return to_bfloat(x); }
VEC_INLINE __m128i to_bits(Vec x, Half) { return to_half(x); }

VEC_INLINE Vec load(const float* p) { return (Vec)_mm256_loadu_ps(p); }
VEC_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, (__m256)x); }
VEC_INLINE Vec rounded(Vec x, float) { return x; }

template <typename T>
VEC_INLINE Vec load(const T* p) {
  return from_bits(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <typename T>
VEC_INLINE void store(T* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bits(x, T{}));
}
template <typename T>
VEC_INLINE Vec rounded(Vec x, T tag) {
  return from_bits(to_bits(x, tag), tag);
}
#include "vec_partial.h"

// The lanes in double.
typedef double DVec __attribute__((vector_size(32), aligned(32), may_alias));
VEC_INLINE DVec low_half(Vec x) { return (DVec)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)); }
VEC_INLINE DVec high_half(Vec x) { return (DVec)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1)); }

// {a[V - 1], b[0], ..., b[V - 2]} and {a[1], ..., a[V - 1], b[0]}
VEC_INLINE __m256i middle(Vec a, Vec b) { return _mm256_permute2x128_si256((__m256i)a, (__m256i)b, 0x21); }
VEC_INLINE Vec last_and_first(Vec a, Vec b) { return (Vec)_mm256_alignr_epi8((__m256i)b, middle(a, b), 12); }
VEC_INLINE Vec second_and_on(Vec a, Vec b) { return (Vec)_mm256_alignr_epi8(middle(a, b), (__m256i)a, 4); }

// r[i][j] <-> r[j][i]
VEC_INLINE void transpose(Vec r[V]) {
  __m256 t[8], s[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    s[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    s[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    s[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    s[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; i++) {
    r[i] = (Vec)_mm256_permute2f128_ps(s[i], s[4 + i], 0x20);
    r[4 + i] = (Vec)_mm256_permute2f128_ps(s[i], s[4 + i], 0x31);
  }
}

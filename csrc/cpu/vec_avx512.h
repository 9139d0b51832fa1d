// SPDX-License-Identifier: MIT
// The vector type on AVX-512: 16 floats. isa_avx512.cpp includes it inside its anonymous namespace.

constexpr int V = 16;
// These tiles fill the 32 registers: 16 accumulators, up to 9 weights and one input.
constexpr int kMaxTile = 16, kMaxTaps = 9, kGradTile = 16;
constexpr int kTiles[] = {4, 6, 8, 10, 12, 14, 16};
typedef float Vec __attribute__((vector_size(64), aligned(64), may_alias));
typedef int32_t IVec __attribute__((vector_size(64), aligned(64), may_alias));

VEC_INLINE Vec splat(float x) { return (Vec)_mm512_set1_ps(x); }
VEC_INLINE Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
// Both return the second operand if either is NaN.
VEC_INLINE Vec vmin(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
VEC_INLINE Vec vmax(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }

VEC_INLINE __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
VEC_INLINE __m512i widen(__m256i x) { return _mm512_cvtepu16_epi32(x); }
VEC_INLINE __m256i to_bfloat(Vec x) {
  const __m512i bits = _mm512_castps_si512((__m512)x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
VEC_INLINE __m256i to_half(Vec x) { return _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC_INLINE Vec from_bits(__m256i x, BFloat) { return (Vec)_mm512_castsi512_ps(_mm512_slli_epi32(widen(x), 16)); }
VEC_INLINE Vec from_bits(__m256i x, Half) { return (Vec)_mm512_cvtph_ps(x); }
VEC_INLINE __m256i to_bits(Vec x, BFloat) { return to_bfloat(x); }
VEC_INLINE __m256i to_bits(Vec x, Half) { return to_half(x); }

// table[lowest four bits of each lane of i]
VEC_INLINE Vec lookup(const float* table, Vec i) {
  return (Vec)_mm512_permutexvar_ps(_mm512_castps_si512((__m512)i), _mm512_load_ps(table));
}

VEC_INLINE Vec load(const float* p) { return (Vec)_mm512_loadu_ps(p); }
VEC_INLINE Vec load_n(const float* p, int count) { return (Vec)_mm512_maskz_loadu_ps(first(count), p); }
VEC_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, (__m512)x); }
VEC_INLINE void store_n(float* p, Vec x, int count) { _mm512_mask_storeu_ps(p, first(count), (__m512)x); }
VEC_INLINE Vec rounded(Vec x, float) { return x; }

template <typename T>
VEC_INLINE Vec load(const T* p) {
  return from_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <typename T>
VEC_INLINE Vec load_n(const T* p, int count) {
  return from_bits(_mm256_maskz_loadu_epi16(first(count), p), T{});
}
template <typename T>
VEC_INLINE void store(T* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bits(x, T{}));
}
template <typename T>
VEC_INLINE void store_n(T* p, Vec x, int count) {
  _mm256_mask_storeu_epi16(p, first(count), to_bits(x, T{}));
}
template <typename T>
VEC_INLINE Vec rounded(Vec x, T tag) {
  return from_bits(to_bits(x, tag), tag);
}

// The lanes in double.
typedef double DVec __attribute__((vector_size(64), aligned(64), may_alias));
VEC_INLINE DVec low_half(Vec x) { return (DVec)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)); }
VEC_INLINE DVec high_half(Vec x) { return (DVec)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1)); }

// {a[V - 1], b[0], ..., b[V - 2]} and {a[1], ..., a[V - 1], b[0]}
VEC_INLINE Vec last_and_first(Vec a, Vec b) { return (Vec)_mm512_alignr_epi32((__m512i)b, (__m512i)a, 15); }
VEC_INLINE Vec second_and_on(Vec a, Vec b) { return (Vec)_mm512_alignr_epi32((__m512i)b, (__m512i)a, 1); }

// r[i][j] <-> r[j][i]
VEC_INLINE void transpose(Vec r[V]) {
  __m512 t[16], s[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps((__m512)r[i], (__m512)r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps((__m512)r[i], (__m512)r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    s[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    s[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    s[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    s[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(s[i], s[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(s[i], s[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(s[8 + i], s[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(s[8 + i], s[12 + i], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; i++) {
    r[i] = (Vec)_mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = (Vec)_mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = (Vec)_mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = (Vec)_mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

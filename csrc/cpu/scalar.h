// SPDX-License-Identifier: MIT
// Scalar conversions between float and the 16-bit types, for parameters and for the baseline's vectors. They round to
// nearest even and keep NaN. Each instruction set includes this file inside its anonymous namespace.

// Vector code is always inlined: a call would spill the registers around it.
#define VEC_INLINE __attribute__((always_inline)) inline

inline float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }
inline float widen(BFloat x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // A power of two moves the exponent, and makes subnormals normal.
  return as_float(sign | as_bits(as_float(magnitude << 13) * 0x1p112f));
}

inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, BFloat& y) {
  const uint32_t bits = as_bits(x);
  y.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, Half& y) {
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 rounds at 2^-24, the last place of a half.
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  }
  y.bits = static_cast<uint16_t>(sign | half);
}

inline float param_at(const Param& p, int64_t i) {
  if (p.dtype == kFloat32) return static_cast<const float*>(p.data)[i];
  if (p.dtype == kFloat16) return widen(static_cast<const Half*>(p.data)[i]);
  return widen(static_cast<const BFloat*>(p.data)[i]);
}
inline void set_param(const MutableParam& p, int64_t i, float x) {
  if (p.dtype == kFloat32) {
    static_cast<float*>(p.data)[i] = x;
  } else if (p.dtype == kFloat16) {
    narrow(x, static_cast<Half*>(p.data)[i]);
  } else {
    narrow(x, static_cast<BFloat*>(p.data)[i]);
  }
}

constexpr int smaller_int(int a, int b) { return a < b ? a : b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A compile-time integer that a generic lambda takes as an argument.
template <int N>
struct Int {
  static constexpr int value = N;
};
template <typename F>
inline void with_activation(int activation, F f) {
  switch (activation) {
    case kIdentity:
      return f(Int<kIdentity>{});
    case kRelu:
      return f(Int<kRelu>{});
    case kGelu:
      return f(Int<kGelu>{});
    default:
      return f(Int<kGeluTanh>{});
  }
}
template <typename F>
inline void with_dtype(int dtype, F f) {
  switch (dtype) {
    case kFloat32:
      return f(float{});
    case kFloat16:
      return f(Half{});
    default:
      return f(BFloat{});
  }
}

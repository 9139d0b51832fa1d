// SPDX-License-Identifier: MIT
// Activations on vectors and their derivatives. NaN and infinities come out as the formulas give them in IEEE
// arithmetic.
//   gelu(x)      = x * Phi(x), |error| <= 3 * 2^-24 * |x|
//   gelu_tanh(x) = x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3))

// exp(x) with a relative error below 2^-23, of which the polynomial's is 2^-29; 0 if x < -87. x must not exceed 88.
VEC_INLINE Vec exponential(Vec x) {
  const Vec magic = splat(0x1.8p23f);
  const Vec z = vmax(splat(-87.f), x);
  const Vec shifted = fma(z, splat(0x1.715476p0f), magic);
  const Vec whole = shifted - magic;
  // log2(e) in two parts keeps the fraction exact for large arguments.
  const Vec f = fma(z, splat(0x1.4ae0cp-26f), fma(z, splat(0x1.715476p0f), -whole));
  Vec p = splat(0x1.41d334p-13f);
  p = fma(p, f, splat(0x1.5f456ap-10f));
  p = fma(p, f, splat(0x1.3b2dbcp-7f));
  p = fma(p, f, splat(0x1.c6aed4p-5f));
  p = fma(p, f, splat(0x1.ebfbdap-3f));
  p = fma(p, f, splat(0x1.62e43p-1f));
  p = fma(p, f, splat(1.f));
  const Vec scaled = (Vec)((IVec)p + ((IVec)shifted << 23));
  return x < splat(-87.f) ? splat(0.f) : scaled;
}

#ifdef __AVX512F__
// Phi(x) - 1/2 = sign(x) * Q(|x|). Q is a polynomial of degree 5 on each of 16 intervals of width 1 / 2.75 around
// k / 2.75 (interpolated at Chebyshev's points, error 0.98 * 2^-26). A register holds one coefficient of all intervals.
// This takes half the arithmetic of one polynomial for all x, and a third of its latency, which bounds short loops.
alignas(64) constexpr float kPhi[6][V] = {
    {0.f, 0x1.22aeeep-3f, 0x1.10dda8p-2f, 0x1.730a3p-2f, 0x1.b55a56p-2f, 0x1.dca744p-2f, 0x1.f116ccp-2f, 0x1.fa698ap-2f,
     0x1.fe24e4p-2f, 0x1.ff7464p-2f, 0x1.ffdbc2p-2f, 0x1.fff7b2p-2f, 0x1.fffe52p-2f, 0x1.ffffb4p-2f, 0x1.fffff4p-2f,
     0x1.fffffep-2f},
    {0x1.291a6cp-3f, 0x1.161866p-3f, 0x1.c81fa6p-4f, 0x1.47ba7cp-4f, 0x1.9c9e42p-5f, 0x1.c72692p-6f, 0x1.b7e164p-7f,
     0x1.747752p-8f, 0x1.1451c8p-9f, 0x1.6733bap-11f, 0x1.991bdap-13f, 0x1.983c78p-15f, 0x1.64e894p-17f,
     0x1.11629cp-19f, 0x1.6ef0dp-22f, 0x1.af823cp-25f},
    {0.f, -0x1.262d36p-7f, -0x1.e280b6p-7f, -0x1.040394p-6f, -0x1.b47d6ap-7f, -0x1.2cee02p-7f, -0x1.5d008p-8f,
     -0x1.58c442p-9f, -0x1.244dcep-10f, -0x1.ab76b8p-12f, -0x1.0e7564p-13f, -0x1.28d7b4p-15f, -0x1.1b137p-17f,
     -0x1.d5b728p-20f, -0x1.536562p-22f, -0x1.ab7e78p-25f},
    {-0x1.a30cd2p-9f, -0x1.545ff8p-9f, -0x1.2f1124p-10f, 0x1.5f700ep-12f, 0x1.44a7fcp-10f, 0x1.721052p-10f,
     0x1.23a212p-10f, 0x1.67d38ap-11f, 0x1.6b92aep-12f, 0x1.337e42p-13f, 0x1.b8d112p-15f, 0x1.0de542p-16f,
     0x1.1bca56p-18f, 0x1.01311ep-20f, 0x1.92e75cp-23f, 0x1.11534cp-25f},
    {0.f, 0x1.2725cap-12f, 0x1.a1a21cp-12f, 0x1.4a857ep-12f, 0x1.110dfcp-13f, -0x1.f33dbp-16f, -0x1.ad38d2p-14f,
     -0x1.a567ccp-14f, -0x1.19b196p-14f, -0x1.23f99cp-15f, -0x1.ec114cp-17f, -0x1.590eecp-18f, -0x1.982f2p-20f,
     -0x1.9ac8e2p-22f, -0x1.61c3dp-24f, -0x1.05cfa6p-26f},
    {0x1.0869fep-14f, 0x1.6f531ap-15f, 0x1.e6e1e4p-20f, -0x1.083cep-15f, -0x1.3f9d4ep-15f, -0x1.90a2bep-16f,
     -0x1.81e472p-18f, 0x1.4e0384p-18f, 0x1.e8ffaap-18f, 0x1.65ea92p-18f, 0x1.790aecp-19f, 0x1.386ce2p-20f,
     0x1.a6c84ap-22f, 0x1.dc8742p-24f, 0x1.c4c7f6p-26f, 0x1.6d9292p-28f}};

VEC_INLINE Vec normal_cdf_less_half(Vec x) {
  const Vec magic = splat(0x1.8p23f), scale = splat(2.75f);
  const Vec sign = (Vec)((IVec)x & (IVec)splat(-0.f));
  const Vec t = vmin(splat(5.63f), (Vec)((IVec)x ^ (IVec)sign));
  const Vec shifted = fma(t, scale, magic);
  const Vec f = fma(t, scale, magic - shifted);
  // The lookup reads the lowest four bits, which are the interval.
  Vec p = lookup(kPhi[5], shifted);
  p = fma(p, f, lookup(kPhi[4], shifted));
  p = fma(p, f, lookup(kPhi[3], shifted));
  p = fma(p, f, lookup(kPhi[2], shifted));
  p = fma(p, f, lookup(kPhi[1], shifted));
  p = fma(p, f, lookup(kPhi[0], shifted));
  return (Vec)((IVec)p | (IVec)sign);
}
#else
// Phi(x) - 1/2 = x * P(x^2) for |x| <= 5.5; beyond, it rounds to 1/2. P is a minimax polynomial of degree 15 in
// 2 x^2 / 5.5^2 - 1, error 0.14 * 2^-24.
VEC_INLINE Vec normal_cdf_less_half(Vec x) {
  const Vec c = vmin(splat(5.5f), vmax(splat(-5.5f), x));
  const Vec t = fma(c * c, splat(2.f / (5.5f * 5.5f)), splat(-1.f));
  Vec p = splat(-0x1.efcdf4p-13f);
  p = fma(p, t, splat(0x1.4b1e88p-11f));
  p = fma(p, t, splat(-0x1.156ac4p-11f));
  p = fma(p, t, splat(0x1.798ab2p-11f));
  p = fma(p, t, splat(-0x1.3d0476p-9f));
  p = fma(p, t, splat(0x1.2ee4acp-8f));
  p = fma(p, t, splat(-0x1.bef316p-8f));
  p = fma(p, t, splat(0x1.4f2538p-7f));
  p = fma(p, t, splat(-0x1.eb7d64p-7f));
  p = fma(p, t, splat(0x1.4da73p-6f));
  p = fma(p, t, splat(-0x1.aac652p-6f));
  p = fma(p, t, splat(0x1.06b836p-5f));
  p = fma(p, t, splat(-0x1.3dca5ep-5f));
  p = fma(p, t, splat(0x1.87111p-5f));
  p = fma(p, t, splat(-0x1.06d992p-4f));
  p = fma(p, t, splat(0x1.07463cp-3f));
  return vmin(splat(0.5f), vmax(splat(-0.5f), c * p));
}
#endif

constexpr float kKappa = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

// s = sigmoid(2 * kKappa * (x + kCubic * x^3)) and 1 - s, each without cancellation.
VEC_INLINE Vec gelu_tanh_sigmoid(Vec x, Vec& complement) {
  const Vec z = x * fma(x * x, splat(-2.f * kKappa * kCubic), splat(-2.f * kKappa));
  const Vec e = exponential(vmin(splat(87.f), z));
  const Vec s = splat(1.f) / (splat(1.f) + e);
  complement = e * s;
  return z > splat(87.f) ? splat(0.f) : s;
}

template <int A>
VEC_INLINE Vec activate(Vec x) {
  if constexpr (A == kRelu) return vmax(splat(0.f), x);
  if constexpr (A == kGelu) return fma(x, normal_cdf_less_half(x), splat(0.5f) * x);
  if constexpr (A == kGeluTanh) {
    Vec unused;
    return x * gelu_tanh_sigmoid(x, unused);
  }
  return x;
}

// h = act(x) and d = act'(x)
template <int A>
VEC_INLINE void activate_with_grad(Vec x, Vec& h, Vec& d) {
  h = x;
  d = splat(1.f);
  if constexpr (A == kRelu) {
    h = vmax(splat(0.f), x);
    // The gradient passes at a NaN, as in torch's threshold_backward.
    d = x <= splat(0.f) ? splat(0.f) : splat(1.f);
  } else if constexpr (A == kGelu) {
    const Vec cdf = normal_cdf_less_half(x);
    const Vec density = exponential(splat(-0.5f) * (x * x)) * splat(0.3989422804014327f);
    h = fma(x, cdf, splat(0.5f) * x);
    d = fma(x, density, splat(0.5f) + cdf);
  } else if constexpr (A == kGeluTanh) {
    Vec complement;
    const Vec s = gelu_tanh_sigmoid(x, complement);
    h = x * s;
    const Vec slope = fma(x * x, splat(6.f * kKappa * kCubic), splat(2.f * kKappa));
    d = fma(h * complement, slope, s);
  }
}

// SPDX-License-Identifier: MIT
// Activations on vectors and their derivatives; NaN and infinities as the formulas in IEEE arithmetic give them.
//   gelu(x) = x * Phi(x);  Phi(x) - 1/2 = x * P(x^2) on |x| <= 5.5 (beyond it rounds to 1/2): a minimax polynomial of
//   degree 15 in 2 x^2 / 5.5^2 - 1, error 0.14 * 2^-24; with rounding |error of gelu| <= 3 * 2^-24 * |x|. 22
//   operations. gelu_tanh(x) = x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3))

// exp(x), relative error below 2^-23 (the polynomial's 2^-29); 0 below -87; x must not exceed 88.
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

// Phi(x) - 1/2
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
    // NaN passes, as through torch's threshold_backward.
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

// SPDX-License-Identifier: MIT
// Activations, their derivatives and the merge of statistics: scalar code for host and device, for both native modules.
// ACT is the activation's code in types.h: 0 identity, 1 relu, 2 gelu (erf), 3 gelu_tanh. activation and
// activation_grad are exact to float32 rounding; fast_* are for results that are rounded to 16 bits.
// Include it as "../math.h": csrc must not be on the include path, this file would hide the system's math.h.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include "cuda/device.cuh"
#define CONVMIXER_HD __host__ __device__ __forceinline__
#define CONVMIXER_D __device__ __forceinline__
#else
#define CONVMIXER_HD inline
#define CONVMIXER_D inline
#endif

namespace convmixer {

#if !defined(__CUDACC__)
// The host's stand-ins for the approximations of device.cuh, with the same flush of subnormal results.
inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : y;
}
inline float fast_reciprocal(float x) { return 1.f / x; }
inline float max_nan(float x, float y) { return x != x || y != y ? NAN : (x > y ? x : y); }
#endif

struct ValueAndGrad {
  float value, grad;
};

// Exact to float32 rounding.

template <int ACT>
CONVMIXER_HD float activation(float x) {
  static_assert(ACT >= 0 && ACT <= 3, "unknown activation");
  if constexpr (ACT == 0) {
    return x;
  } else if constexpr (ACT == 1) {
    return x < 0.f ? 0.f : x;  // NaN stays
  } else if constexpr (ACT == 2) {
    return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
  } else {
    const float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.f + tanhf(inner));
  }
}

template <int ACT>
CONVMIXER_HD float activation_grad(float x) {
  static_assert(ACT >= 0 && ACT <= 3, "unknown activation");
  if constexpr (ACT == 0) {
    return 1.f;
  } else if constexpr (ACT == 1) {
    return x <= 0.f ? 0.f : 1.f;
  } else if constexpr (ACT == 2) {
    const float cdf = 0.5f * (1.f + erff(x * 0.70710678118654752f));
    return cdf + x * (expf(-0.5f * x * x) * 0.39894228040143268f);
  } else {
    const float x2 = x * x;
    const float t = tanhf(0.79788456080286536f * (x + 0.044715f * x2 * x));
    const float inner = 0.79788456080286536f * (1.f + 0.134145f * x2);
    return 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * inner;
  }
}

// dh * act'(a), of which `grad` is act'(a). relu selects, so that a NaN or infinite dh is 0 for a <= 0, as in torch.
template <int ACT>
CONVMIXER_HD float times_grad(float dh, float grad) {
  if constexpr (ACT == 1) {
    return grad == 0.f ? 0.f : dh;
  } else {
    return dh * grad;
  }
}

// For 16-bit results: Phi(-t) = erfc(t / sqrt 2) / 2 = exp2(P(t)) for t >= 0, with P of degree 5 by Lawson's iteration
// on [0, 7]; beyond, P goes on falling to -inf. |error of t Phi(-t)| <= 6e-7, |error of erf| <= 4e-6, 7 instructions
// with |x|. An infinite x gives NaN: the callers recompute every NaN with the exact functions.

CONVMIXER_D float fast_normal_tail(float t) {
  float p = -0.00048761125f;
  p = fmaf(p, t, 0.0071942755f);
  p = fmaf(p, t, -0.052131433f);
  p = fmaf(p, t, -0.4596203f);
  p = fmaf(p, t, -1.1509821f);
  p = fmaf(p, t, -1.0000051f);
  return fast_exp2(p);
}

template <int ACT>
CONVMIXER_D float fast_activation(float x) {
  static_assert(ACT >= 0 && ACT <= 3, "unknown activation");
  if constexpr (ACT == 0) {
    return x;
  } else if constexpr (ACT == 1) {
    return max_nan(x, 0.f);
  } else if constexpr (ACT == 2) {
    const float t = fabsf(x);
    return fmaf(-t, fast_normal_tail(t), max_nan(x, 0.f));
  } else {
    // x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)); the exponent is in units of log 2
    const float z = x * fmaf(x * x, -0.10294324f, -2.3022082f);
    return x * fast_reciprocal(1.f + fast_exp2(z));
  }
}

// act(x) and act'(x) from shared exponentials.
template <int ACT>
CONVMIXER_D ValueAndGrad fast_activation_and_grad(float x) {
  static_assert(ACT >= 0 && ACT <= 3, "unknown activation");
  if constexpr (ACT == 0) {
    return {x, 1.f};
  } else if constexpr (ACT == 1) {
    return {max_nan(x, 0.f), x <= 0.f ? 0.f : 1.f};
  } else if constexpr (ACT == 2) {
    // act' = Phi(x) + x phi(x) = 1/2 + sign(x) (1/2 - u) with u = Phi(-t) - t phi(t)
    const float t = fabsf(x), tail = fast_normal_tail(t);
    const float density = fast_exp2(fmaf(x * x, -0.72134752f, -1.3257481f));
    return {fmaf(-t, tail, max_nan(x, 0.f)), 0.5f + copysignf(0.5f - fmaf(-t, density, tail), x)};
  } else {
    const float x2 = x * x, z = x * fmaf(x2, -0.10294324f, -2.3022082f);
    const float s = fast_reciprocal(1.f + fast_exp2(z)), value = x * s;
    // d(inner)/dx of the sigmoid's argument
    const float slope = fmaf(x2, 0.21406445f, 1.5957691f);
    return {value, fmaf(value * (1.f - s), slope, s)};
  }
}

template <int ACT>
CONVMIXER_D float fast_activation_grad(float x) {
  return fast_activation_and_grad<ACT>(x).grad;
}

// Calls f(std::integral_constant<int, ACT>()).
template <class F>
CONVMIXER_HD void dispatch_activation(int act, F&& f) {
  if (act == 0) {
    f(std::integral_constant<int, 0>());
  } else if (act == 1) {
    f(std::integral_constant<int, 1>());
  } else if (act == 2) {
    f(std::integral_constant<int, 2>());
  } else {
    f(std::integral_constant<int, 3>());
  }
}

// Statistics of a sample: count, mean and M2 = sum (x - mean)^2.
struct Moments {
  float count, mean, m2;
};

// The union of two samples (Chan, Golub and LeVeque 1979); either may be empty.
CONVMIXER_HD Moments merge(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (b.count == 0.f) return a;
  if (a.count == 0.f) return b;
  const float delta = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.count * share)};
}

}  // namespace convmixer

# SPDX-License-Identifier: MIT
"""Device functions that the kernels share: activations, batch norm's pieces, rounding, addresses.

ACT is the activation's code, its index in primitives.py's ACTIVATIONS: 0 identity, 1 relu, 2 gelu (erf), 3 gelu_tanh.
FAST says that the result is rounded to 16 bits: then erf comes from csrc/math.h's fast_normal_tail, |error| <= 4e-6.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

#: Triton's interpreter (TRITON_INTERPRET=1, read when the kernels are decorated) has no bfloat16 arithmetic: it multiplies the
#: bits, and truncates instead of rounding. Under it the kernels widen operands before products, and round by hand.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """float32 v in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        rounded = tl.where(v != v, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        r = (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        r = v.to(dtype)
    return r


@triton.jit
def dot(left, right, acc, PRECISION: tl.constexpr):
    """acc + left @ right, in float32; PRECISION is of float32 operands."""
    if INTERPRETED:
        acc = tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
    elif left.dtype == tl.float32:
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def _normal_tail(t):
    """Phi(-t) for 0 <= t <= 16, as csrc/math.h: exp2 of a polynomial."""
    p = tl.fma(t, -0.00048761125, 0.0071942755)
    p = tl.fma(p, t, -0.052131433)
    p = tl.fma(p, t, -0.4596203)
    p = tl.fma(p, t, -1.1509821)
    return tl.exp2(tl.fma(p, t, -1.0000051))


@triton.jit
def activate(a, ACT: tl.constexpr, FAST: tl.constexpr):
    """act(a), float32; a NaN stays one."""
    if ACT == 0:
        h = a
    elif ACT == 1:
        h = tl.where(a < 0, 0.0, a)
    elif ACT == 3:
        # (1 + tanh z) / 2 = 1 / (1 + exp(-2 z)), z = sqrt(2 / pi) (a + 0.044715 a^3)
        h = a / (1.0 + tl.exp2(a * (-2.3022082 - 0.10294324 * a * a)))
    elif FAST:
        # beyond 16 the tail is 0 in float32, and an infinity stays out of the polynomial
        t = tl.minimum(tl.abs(a), 16.0)
        h = tl.where(a < 0, 0.0, a) - t * _normal_tail(t)
    else:
        h = 0.5 * a * (1.0 + tl.math.erf(a * 0.7071067811865476))
    return h


@triton.jit
def activate_with_grad(a, ACT: tl.constexpr, FAST: tl.constexpr):
    """act(a) and act'(a), float32; relu'(0) = 0, as in torch."""
    if ACT == 0:
        h = a
        slope = tl.full(a.shape, 1.0, tl.float32)
    elif ACT == 1:
        h = tl.where(a < 0, 0.0, a)
        # a NaN lets the gradient through, as in torch
        slope = tl.where(a <= 0, 0.0, 1.0)
    elif ACT == 3:
        # s = (1 + tanh z) / 2 and 1 - s, both from the exponential that is below 1: no difference loses digits
        e = tl.exp2(tl.abs(a) * (-2.3022082 - 0.10294324 * a * a))
        large = 1.0 / (1.0 + e)
        small = e * large
        h = a * tl.where(a < 0, small, large)
        slope = tl.where(a < 0, small, large) + a * small * large * (1.5957691 + 0.21406445 * a * a)
    else:
        # the density phi(a) = exp(-a^2 / 2) / sqrt(2 pi)
        density = tl.exp2(-0.72134752 * a * a) * 0.3989422804014327
        if FAST:
            t = tl.minimum(tl.abs(a), 16.0)
            tail = _normal_tail(t)
            h = tl.where(a < 0, 0.0, a) - t * tail
            slope = tl.where(a < 0, tail, 1.0 - tail) + a * density
        else:
            cdf = 0.5 * (1.0 + tl.math.erf(a * 0.7071067811865476))
            h = a * cdf
            slope = cdf + a * density
    return h, slope


@triton.jit
def channel_vector(ptr, c, c_ok, default: tl.constexpr):
    """ptr[c] in float32, (BLOCK_C,); `default` if ptr is None."""
    if ptr is not None:
        values = tl.load(ptr + c, mask=c_ok, other=default).to(tl.float32)
    else:
        values = tl.full(c.shape, default, tl.float32)
    return values


@triton.jit
def _wide(v, FAST: tl.constexpr):
    """float64 for results in float32: a channel's rounding errors do not average out, and there is one per program to pay for."""
    if not FAST:
        v = v.to(tl.float64)
    return v


@triton.jit
def total(v, AXIS: tl.constexpr, FAST: tl.constexpr):
    """The sum along AXIS, in float64 for results in float32."""
    return tl.sum(_wide(v, FAST), AXIS)


@triton.jit
def _rstd(var_ptr, eps, c, c_ok, FAST: tl.constexpr):
    var = channel_vector(var_ptr, c, c_ok, 1.0)
    if FAST:
        rstd = 1.0 / tl.sqrt_rn(var + eps)
    else:
        rstd = 1.0 / tl.sqrt(var.to(tl.float64) + eps)
    return rstd


@triton.jit
def affine(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, c, c_ok, FAST: tl.constexpr):
    """mean, scale and shift of the channels c: y = (h - mean) * scale + shift; all (BLOCK_C,)."""
    mean = channel_vector(mean_ptr, c, c_ok, 0.0)
    scale = _rstd(var_ptr, eps, c, c_ok, FAST) * channel_vector(gamma_ptr, c, c_ok, 1.0)
    return mean, scale.to(tl.float32), channel_vector(beta_ptr, c, c_ok, 0.0)


@triton.jit
def backward_vectors(
    mean_ptr, var_ptr, gamma_ptr, sum_dy_ptr, sum_dy_hhat_ptr, eps, count, c, c_ok, FAST: tl.constexpr
):
    """mean, scale, mean_dy and the factor of h - mean, all (BLOCK_C,); the last two are 0 if the statistics were constants."""
    mean = channel_vector(mean_ptr, c, c_ok, 0.0)
    rstd = _rstd(var_ptr, eps, c, c_ok, FAST)
    scale = rstd * channel_vector(gamma_ptr, c, c_ok, 1.0)
    mean_dy = _wide(channel_vector(sum_dy_ptr, c, c_ok, 0.0), FAST) / count
    factor = channel_vector(sum_dy_hhat_ptr, c, c_ok, 0.0) * rstd / count
    return mean, scale.to(tl.float32), mean_dy.to(tl.float32), factor.to(tl.float32)


@triton.jit
def backward_vectors_of(mean_ptr, var_ptr, gamma_ptr, sum_dy, sum_dy_hhat, eps, count, c, c_ok, FAST: tl.constexpr):
    """backward_vectors of sums in registers. (Loaded before the rest, the sums make sm_100's products spill.)"""
    mean = channel_vector(mean_ptr, c, c_ok, 0.0)
    rstd = _rstd(var_ptr, eps, c, c_ok, FAST)
    scale = rstd * channel_vector(gamma_ptr, c, c_ok, 1.0)
    mean_dy = _wide(sum_dy, FAST) / count
    factor = sum_dy_hhat * rstd / count
    return mean, scale.to(tl.float32), mean_dy.to(tl.float32), factor.to(tl.float32)


@triton.jit
def sum_of_parts(at, stride, parts, c_ok, BLOCK_PARTS: tl.constexpr):
    """The ordered sum of `parts` vectors, each `stride` after the last, that begin at the pointers `at` (BLOCK_C,); float32."""
    acc = tl.zeros((BLOCK_PARTS, at.shape[0]), at.dtype.element_ty)
    for first in range(0, parts, BLOCK_PARTS):
        part = (first + tl.arange(0, BLOCK_PARTS)).to(tl.int64)
        acc += tl.load(at[None, :] + (part * stride)[:, None], mask=(part < parts)[:, None] & c_ok[None, :], other=0.0)
    return tl.sum(acc, 0).to(tl.float32)


@triton.jit
def preactivation_grad(
    dy,
    a,
    mean,
    scale,
    mean_dy,
    factor,
    NORM: tl.constexpr,
    BATCH: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
):
    """da = dh * act'(a), dh = scale * (dy - mean_dy - (h - mean) * factor); all float32, of shapes that broadcast."""
    h, slope = activate_with_grad(a, ACT, FAST)
    dh = dy
    if NORM:
        if BATCH:
            dh = dh - mean_dy - (h - mean) * factor
        dh = dh * scale
    if ACT == 1:
        # a select, so that a NaN or infinite dh is 0 for a <= 0, as in torch
        dh = tl.where(slope == 0.0, 0.0, dh)
    elif ACT != 0:
        dh = dh * slope
    return dh


@triton.jit
def moments(h, ok, count, AXIS: tl.constexpr, FAST: tl.constexpr):
    """mean and M2 = sum (h - mean)^2 of the values of h that exist (ok), `count` of them along AXIS."""
    mean = (total(tl.where(ok, h, 0.0), AXIS, FAST) / count).to(tl.float32)
    deviation = tl.where(ok, h - tl.expand_dims(mean, AXIS), 0.0)
    return mean, total(deviation * deviation, AXIS, FAST).to(tl.float32)


@triton.jit
def store_moments(partials_ptr, c, c_ok, part, channels, count, mean, m2):
    """partials (parts, 3, C): count, mean, M2 of a part of each channel in c."""
    at = partials_ptr + part * 3 * channels + c
    tl.store(at, tl.zeros_like(mean) + count, mask=c_ok)
    tl.store(at + channels, mean, mask=c_ok)
    tl.store(at + 2 * channels, m2, mask=c_ok)


@triton.jit
def positions(first, plane, BLOCK: tl.constexpr):
    """Of a channel's values from number `first` (int64) on: the first one's image (int64), and, (BLOCK,) int32 each, how many
    images further on a value lies and its index within its plane."""
    image = first // plane
    index = (first - image * plane).to(tl.int32) + tl.arange(0, BLOCK)
    return image, index // plane, index % plane


@triton.jit
def tile_offsets(
    block,
    c,
    first_channel,
    images,
    channels,
    plane,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Where the block-th BLOCK_P values of the channels first_channel + c lie: a start (int64), offsets from it (BLOCK_P, BLOCK_C),
    and which values exist, (BLOCK_P,). Offsets are 64-bit if WIDE."""
    image, further, index = positions(block * BLOCK_P, plane, BLOCK_P)
    ok = image + further < images
    if WIDE:
        further, c = further.to(tl.int64), c.to(tl.int64)
    if CHANNELS_LAST:
        start = image * plane * channels + first_channel
        offsets = ((further * plane + index) * channels)[:, None] + c[None, :]
    else:
        start = (image * channels + first_channel) * plane
        offsets = (further * channels * plane + index)[:, None] + (c * plane)[None, :]
    return start, offsets, ok


@triton.jit
def channel_tile(pid, blocks, channels, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's block and first channel (int64), its lanes 0 to BLOCK_C - 1, their channels, and which of these exist.
    Programs that are neighbours in memory run side by side."""
    if CHANNELS_LAST:
        groups = tl.cdiv(channels, BLOCK_C)
        block, first_channel = pid // groups, pid % groups * BLOCK_C
    else:
        block, first_channel = pid % blocks, pid // blocks * BLOCK_C
    lane = tl.arange(0, BLOCK_C)
    c = first_channel + lane
    return block, first_channel, lane, c, c < channels

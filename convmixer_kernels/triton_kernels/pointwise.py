# SPDX-License-Identifier: MIT
"""1x1 convolution as a GEMM over M = N * H * W values of each channel; x, a, dy: (N, C, H, W), contiguous or channels_last, as they lie.

    forward       y = norm(act(x W^T + bias)), or a = x W^T + bias with (count, mean, M2) of act(a) from the epilogue
    input grad    the same kernel with W: dx = da W
    weight grad   dW = da^T x over a part of M; parts are summed in order
da comes from memory (grad_prologue wrote it), or from dy and a in the prologue of the products where one tile holds all their columns,
so that it is computed once an element: that saves a pass. A program owns BLOCK_M x BLOCK_N outputs; programs run in groups of
GROUP_M tiles of M, whose operands stay in L2. Bound: tensor cores; the epilogue is about 25 instructions an output.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives import ACTIVATIONS, Norm
from . import config as tables
from . import tuning
from .common import (
    activate,
    affine,
    backward_vectors,
    dot,
    moments,
    narrow,
    positions,
    preactivation_grad,
    store_moments,
)
from .launch import OPTIONS, Layout, ceil_div, layout_of, norm_arguments, power_of_2, unit

_SIZES = ["images", "k_units", "n_units", "plane_units", "blocks_per_part", "parts", "count"]


@triton.jit
def _start(image, channels, plane):
    """Where an image begins; int64."""
    return image * channels * plane


@triton.jit
def _offsets(further, index, channels, plane, CHANNELS_LAST: tl.constexpr):
    """Of channel 0 of each value, from the start of the first one's image; (BLOCK,)."""
    if CHANNELS_LAST:
        offsets = (further * plane + index) * channels
    else:
        offsets = further * channels * plane + index
    return offsets


@triton.jit
def _epilogue(
    acc,  # (BLOCK_M, columns)
    bias_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    y_at,  # (BLOCK_M, columns)
    partials_ptr,
    c,  # (columns,)
    channels,
    block_m,
    m_ok,  # (BLOCK_M,)
    eps,
    ACT: tl.constexpr,
    PLAIN: tl.constexpr,
    FAST: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Bias, then statistics, or activation and norm (nothing if PLAIN), and the store of some columns of a tile."""
    c_ok = c < channels
    ok = m_ok[:, None] & c_ok[None, :]
    # parameters come as 8 rows of which one counts: a mere vector would be loaded, and its root taken, by every thread for each of
    # its columns
    row = tl.arange(0, 8)[:, None]
    at, row_ok = row * 0 + c[None, :], (row == 0) & c_ok[None, :]
    if bias_ptr is not None:
        acc += tl.sum(tl.load(bias_ptr + at, mask=row_ok, other=0.0).to(tl.float32), 0)[None, :]
    if partials_ptr is not None:
        a = narrow(acc, DTYPE)
        tl.store(y_at, a, mask=ok)
        count = tl.sum(m_ok.to(tl.int32), 0).to(tl.float32)
        mean, m2 = moments(activate(a.to(tl.float32), ACT, FAST), ok, count, 0, FAST)
        store_moments(partials_ptr, c, c_ok, block_m, channels, count, mean, m2)
    elif PLAIN:
        tl.store(y_at, narrow(acc, DTYPE), mask=ok)
    else:
        h = activate(acc, ACT, FAST)
        if mean_ptr is not None:
            mean, scale, shift = affine(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, at, row_ok, FAST)
            scale = tl.sum(tl.where(row_ok, scale, 0.0), 0)
            if FAST:
                # one vector less in registers; the folded mean's rounding is far below 16 bits
                shift = tl.sum(tl.where(row_ok, shift, 0.0), 0) - tl.sum(tl.where(row_ok, mean, 0.0), 0) * scale
            else:
                h = h - tl.sum(tl.where(row_ok, mean, 0.0), 0)[None, :]
                shift = tl.sum(tl.where(row_ok, shift, 0.0), 0)
            h = h * scale[None, :] + shift[None, :]
        tl.store(y_at, narrow(h, DTYPE), mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def gemm_kernel(
    x_ptr,  # (N, K, H, W); with a prologue dy
    a_ptr,  # (N, K, H, W) or None: no prologue
    weight_ptr,  # (C_out, K), or (K, C_out) if WEIGHT_ROWS
    bias_ptr,  # (C_out,) or None
    mean_ptr,  # the norm's: (C_out,) of the epilogue, or with a prologue (K,); None: no norm
    var_ptr,
    gamma_ptr,
    beta_ptr,
    sum_dy_ptr,  # (K,) of the prologue or None
    sum_dy_hhat_ptr,
    y_ptr,  # (N, C_out, H, W)
    partials_ptr,  # (blocks of M, 3, C_out) or None: no statistics
    images,
    k_units,
    n_units,
    plane_units,
    count,  # N * H * W, as a float
    eps,
    K_UNIT: tl.constexpr,
    N_UNIT: tl.constexpr,
    PLANE_UNIT: tl.constexpr,
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    FAST: tl.constexpr = DTYPE != tl.float32
    PROLOGUE: tl.constexpr = a_ptr is not None
    NORM: tl.constexpr = mean_ptr is not None
    BATCH: tl.constexpr = sum_dy_ptr is not None
    k_size, n_size, plane = k_units * K_UNIT, n_units * N_UNIT, plane_units * PLANE_UNIT
    blocks_m = tl.cdiv(images.to(tl.int64) * plane, BLOCK_M)
    blocks_n = tl.cdiv(n_size, BLOCK_N)
    group = pid // (GROUP_M * blocks_n)
    group_rows = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    block_m = group * GROUP_M + pid % (GROUP_M * blocks_n) % group_rows
    block_n = pid % (GROUP_M * blocks_n) // group_rows
    image, further, index = positions(block_m * BLOCK_M, plane, BLOCK_M)
    m_ok = image + further < images
    lane, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    c_ok = block_n * BLOCK_N + lane < n_size
    if WIDE:
        further, plane = further.to(tl.int64), plane.to(tl.int64)
    x_pitch = 1 if X_LAST else plane
    y_pitch = 1 if Y_LAST else plane
    x_at = _offsets(further, index, k_size, plane, X_LAST)[:, None] + (k * x_pitch)[None, :]
    x_start = _start(image, k_size, plane)
    if WEIGHT_ROWS:
        weight_at = weight_ptr + block_n * BLOCK_N + (k * n_size)[:, None] + lane[None, :]
        weight_pitch = n_size.to(tl.int64)
    else:
        weight_at = weight_ptr + block_n * BLOCK_N * k_size + k[:, None] + (lane * k_size)[None, :]
        weight_pitch = 1
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, k_size, BLOCK_K):
        k_ok = first + k < k_size
        ok = m_ok[:, None] & k_ok[None, :]
        offset = x_start + first * x_pitch
        x = tl.load(x_ptr + offset + x_at, mask=ok, other=0.0)
        if PROLOGUE:
            mean, scale, mean_dy, factor = backward_vectors(
                mean_ptr, var_ptr, gamma_ptr, sum_dy_ptr, sum_dy_hhat_ptr, eps, count, first + k, k_ok, FAST
            )
            a = tl.load(a_ptr + offset + x_at, mask=ok, other=0.0).to(tl.float32)
            da = preactivation_grad(
                x.to(tl.float32),
                a,
                mean[None, :],
                scale[None, :],
                mean_dy[None, :],
                factor[None, :],
                NORM,
                BATCH,
                ACT,
                FAST,
            )
            x = narrow(tl.where(ok, da, 0.0), DTYPE)
        w = tl.load(weight_at + first * weight_pitch, mask=k_ok[:, None] & c_ok[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)
    # in two halves of its columns: a thread holds every fourth column, and with all of them the parameters would spill
    half: tl.constexpr = BLOCK_N // 2
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, half)), (0, 2, 1)))
    y_start = _offsets(further, index, n_size, plane, Y_LAST)
    for part in tl.static_range(2):
        first_c = block_n * BLOCK_N + part * half
        lane = tl.arange(0, half)
        if WIDE:
            lane = lane.to(tl.int64)
        y_at = y_ptr + _start(image, n_size, plane) + first_c * y_pitch + y_start[:, None] + (lane * y_pitch)[None, :]
        _epilogue(
            right if part == 1 else left,
            bias_ptr,
            mean_ptr,
            var_ptr,
            gamma_ptr,
            beta_ptr,
            y_at,
            partials_ptr,
            first_c + tl.arange(0, half),
            n_size,
            block_m,
            m_ok,
            eps,
            ACT,
            PROLOGUE,
            FAST,
            DTYPE,
        )


@triton.jit(do_not_specialize=_SIZES)
def weight_grad_kernel(
    dy_ptr,  # (N, C_out, H, W); without a prologue da
    a_ptr,  # (N, C_out, H, W) or None: no prologue
    x_ptr,  # (N, C_in, H, W)
    mean_ptr,  # (C_out,) or None: no norm
    var_ptr,
    gamma_ptr,
    sum_dy_ptr,  # (C_out,) or None: constant statistics
    sum_dy_hhat_ptr,
    partials_ptr,  # (parts, C_out * C_in): dW
    bias_partials_ptr,  # (parts, C_out) or None: db
    images,
    k_units,  # C_in
    n_units,  # C_out
    plane_units,
    blocks_per_part,
    count,  # N * H * W, as a float
    eps,
    K_UNIT: tl.constexpr,
    N_UNIT: tl.constexpr,
    PLANE_UNIT: tl.constexpr,
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    FAST: tl.constexpr = DTYPE != tl.float32
    PROLOGUE: tl.constexpr = a_ptr is not None
    NORM: tl.constexpr = mean_ptr is not None
    BATCH: tl.constexpr = sum_dy_ptr is not None
    k_size, n_size, plane = k_units * K_UNIT, n_units * N_UNIT, plane_units * PLANE_UNIT
    blocks_k, blocks_n = tl.cdiv(k_size, BLOCK_K), tl.cdiv(n_size, BLOCK_N)
    part, tile = pid // (blocks_k * blocks_n), pid % (blocks_k * blocks_n)
    first_c, first_k = tile // blocks_k * BLOCK_N, tile % blocks_k * BLOCK_K
    lane_c, lane_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    c, k = first_c + lane_c, first_k + lane_k
    if WIDE:
        lane_c, lane_k = lane_c.to(tl.int64), lane_k.to(tl.int64)
    x_pitch = 1 if X_LAST else plane
    y_pitch = 1 if Y_LAST else plane
    c_ok, k_ok = c < n_size, k < k_size
    if PROLOGUE:
        mean, scale, mean_dy, factor = backward_vectors(
            mean_ptr, var_ptr, gamma_ptr, sum_dy_ptr, sum_dy_hhat_ptr, eps, count, c, c_ok, FAST
        )
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sum_da = tl.zeros((BLOCK_N,), tl.float32)
    for b in range(blocks_per_part):
        image, further, index = positions((part * blocks_per_part + b) * BLOCK_M, plane, BLOCK_M)
        m_ok = image + further < images
        if WIDE:
            further = further.to(tl.int64)
        y_start = _start(image, n_size, plane) + first_c * y_pitch
        x_start = _start(image, k_size, plane) + first_k * x_pitch
        y_at = _offsets(further, index, n_size, plane, Y_LAST)[None, :] + (lane_c * y_pitch)[:, None]
        x_at = _offsets(further, index, k_size, plane, X_LAST)[:, None] + (lane_k * x_pitch)[None, :]
        ok = c_ok[:, None] & m_ok[None, :]
        da = tl.load(dy_ptr + y_start + y_at, mask=ok, other=0.0)
        if PROLOGUE:
            a = tl.load(a_ptr + y_start + y_at, mask=ok, other=0.0).to(tl.float32)
            wide = preactivation_grad(
                da.to(tl.float32),
                a,
                mean[:, None],
                scale[:, None],
                mean_dy[:, None],
                factor[:, None],
                NORM,
                BATCH,
                ACT,
                FAST,
            )
            wide = tl.where(ok, wide, 0.0)
            if bias_partials_ptr is not None:
                sum_da += tl.sum(wide, 1)
            da = narrow(wide, DTYPE)
        x = tl.load(x_ptr + x_start + x_at, mask=m_ok[:, None] & k_ok[None, :], other=0.0)
        acc = dot(da, x, acc, PRECISION)
    start = partials_ptr + part * n_size * k_size
    at = start + first_c * k_size + first_k + (lane_c * k_size)[:, None] + lane_k[None, :]
    tl.store(at, acc, mask=c_ok[:, None] & k_ok[None, :])
    # nested: a compile-time condition and one of run time
    if bias_partials_ptr is not None:
        if tile % blocks_k == 0:
            tl.store(bias_partials_ptr + part * n_size + c, sum_da, mask=c_ok)


def _arguments(x: Layout, y: Layout) -> tuple[tuple[int, ...], dict[str, object]]:
    """images, k_units, n_units, plane_units of a product from x's channels to y's, and the constants that belong to them."""
    k_unit, n_unit, plane_unit = unit(x.channels), unit(y.channels), unit(x.plane)
    sizes = (x.images, x.channels // k_unit, y.channels // n_unit, x.plane // plane_unit)
    constants = {
        "K_UNIT": k_unit,
        "N_UNIT": n_unit,
        "PLANE_UNIT": plane_unit,
        "X_LAST": x.channels_last,
        "Y_LAST": y.channels_last,
        "WIDE": x.wide or y.wide,
        "PRECISION": tables.input_precision(),
    }
    return sizes, constants


def _fit(config: tuning.Config, x: Layout, y: Layout) -> tuning.Config:
    """The configuration with blocks no larger than the channels (16 is the least that a product takes)."""
    return config | {
        "BLOCK_N": min(config["BLOCK_N"], max(16, power_of_2(y.channels))),
        "BLOCK_K": min(config["BLOCK_K"], max(16, power_of_2(x.channels))),
    }


def like(t: Tensor, channels: int) -> Tensor:
    """An empty tensor of t's format, dtype and images, with so many channels."""
    n, _, h, w = t.shape
    memory_format = torch.contiguous_format if t.is_contiguous() else torch.channels_last
    return torch.empty((n, channels, h, w), dtype=t.dtype, device=t.device, memory_format=memory_format)


def forward(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
    activation: str,
    norm: Norm | None,
    statistics: bool,
) -> tuple[Tensor, Tensor | None]:
    """norm(act(conv(x) + bias)); with `statistics` a and (parts, 3, C_out) of act(a). One launch."""
    y = like(x, weight.shape[0])
    return y, _gemm(x, None, weight.to(x.dtype), bias, activation, norm, None, y, statistics, False)


def input_grad(
    dy: Tensor,  # (N, C_out, H, W): da, if a is None
    a: Tensor | None,  # (N, C_out, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    dx: Tensor,  # (N, C_in, H, W): written
) -> None:
    """dx = da W, in one launch; da = dy if `a` is None."""
    if a is None:
        activation, norm, sums = "identity", None, None
    _gemm(dy, a, weight.to(dy.dtype), None, activation, norm, sums, dx, False, True)


def _gemm(x, a, weight, bias, activation, norm, sums, y, statistics, weight_rows) -> Tensor | None:
    x_layout, y_layout = layout_of(x), layout_of(y)
    sizes, constants = _arguments(x_layout, y_layout)
    mean, var, gamma, beta, eps = norm_arguments(norm)

    def call(config: tuning.Config) -> Tensor | None:
        config = _fit(config, x_layout, y_layout)
        blocks = ceil_div(x_layout.count, config["BLOCK_M"])
        partials = x.new_empty((blocks, 3, y_layout.channels), dtype=torch.float32) if statistics else None
        gemm_kernel[(blocks * ceil_div(y_layout.channels, config["BLOCK_N"]),)](
            x,
            a,
            weight,
            bias,
            mean,
            var,
            gamma,
            beta,
            *(sums or (None, None)),
            y,
            partials,
            *sizes,
            float(x_layout.count),
            eps,
            **constants,
            WEIGHT_ROWS=weight_rows,
            ACT=ACTIVATIONS.index(activation),
            **config,
            **OPTIONS,
        )
        return partials

    key = (x.dtype, y_layout.channels, *x_layout.key, activation, statistics, a is not None, weight_rows)
    key += (constants["PRECISION"], y_layout.channels_last)
    name = "pointwise_fused" if a is not None else "pointwise_float32" if x.dtype == torch.float32 else "pointwise"
    return tuning.run(name + x_layout.suffix, key, x_layout.device, call)


def weight_grad(
    dy: Tensor,  # (N, C_out, H, W): da, if a is None
    a: Tensor | None,  # (N, C_out, H, W)
    x: Tensor,  # (N, C_in, H, W)
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    want_bias: bool,
) -> tuple[Tensor, Tensor | None]:  # (parts, C_out * C_in), (parts, C_out), float32
    """Parts of dW, and with `want_bias` (only if `a` is given) of db = sum da, in one launch."""
    if a is None:
        activation, norm, sums = "identity", None, None
    x_layout, y_layout = layout_of(x), layout_of(dy)
    sizes, constants = _arguments(x_layout, y_layout)
    mean, var, gamma, _, eps = norm_arguments(norm)

    def call(config: tuning.Config) -> tuple[Tensor, Tensor | None]:
        config = _fit(config, x_layout, y_layout)
        tiles = ceil_div(x_layout.channels, config["BLOCK_K"]) * ceil_div(y_layout.channels, config["BLOCK_N"])
        # every part is C_out * C_in values to write and to read again
        parts, per_part = tuning.split(4 * tiles, ceil_div(x_layout.count, config["BLOCK_M"]), x_layout.device)
        partials = x.new_empty((parts, y_layout.channels * x_layout.channels), dtype=torch.float32)
        bias_partials = x.new_empty((parts, y_layout.channels), dtype=torch.float32) if want_bias else None
        weight_grad_kernel[(tiles * parts,)](
            dy,
            a,
            x,
            mean,
            var,
            gamma,
            *(sums or (None, None)),
            partials,
            bias_partials,
            *sizes,
            per_part,
            float(x_layout.count),
            eps,
            **constants,
            ACT=ACTIVATIONS.index(activation),
            **config,
            **OPTIONS,
        )
        return partials, bias_partials

    key = (x.dtype, y_layout.channels, *x_layout.key, activation, a is not None, constants["PRECISION"])
    return tuning.run("pointwise_weight_grad" + x_layout.suffix, key, x_layout.device, call)

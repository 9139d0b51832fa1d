# SPDX-License-Identifier: MIT
"""Depthwise convolution on tensor cores: banded Toeplitz matrices; x, dy, a, y: (N, C, H, W), any layout, meant for contiguous.

An output tile of BH x BW of a channel sees a window of U x BK inputs. For a block of BLOCK_M tiles (numbered over images and planes)
    D[BLOCK_M, BH * BW] += A[BLOCK_M, UR * BK] T[UR * BK, BH * BW],  T[(u, p), (y, q)] = w[u - y, p - q], zero off the filter,
over the window's rows, UR at a time (a dilated filter is a dense one with zeros between its taps); for k <= 9 and 8 x 8 tiles the
window is 16 x 16, one product, and T is built once a program.
weight grad: G[UR * BK, BH * BW] += A^T dA over the blocks, then dw[i, j] = sum of G[(y + i, q + j), (y, q)]: the sum over q in this kernel,
over y and parts in finish. A program owns one channel (weight grad: and UR rows of its windows) and a part of the blocks.
A non-finite input may reach its whole tile (0 * inf). Bound: memory for k <= 9. An output takes 28 instructions in eval with GELU, 14 as
input gradient, 41 in the weight gradient (sm_90 machine code, 32x32: 222 of the 305 cycles of a plane's traffic), 256 multiply-adds.
"""

from __future__ import annotations

from typing import NamedTuple

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
    narrow,
    positions,
    preactivation_grad,
    store_moments,
    sum_of_parts,
    total,
)
from .launch import OPTIONS, Layout, ceil_div, layout_of, norm_arguments, power_of_2

_SIZES = ["images", "channels", "blocks_per_part", "parts", "bias_parts", "count"]


class Tile(NamedTuple):
    """The output tile and how its window is walked; constants of both kernels."""

    BH: int
    BW: int
    BK: int  # columns of the window: a power of 2, at least SHIFT + BW + kW - 1
    UR: int  # rows of the window that one product takes
    STEPS: int  # products: STEPS * UR >= BH + kH - 1
    SHIFT: int  # columns before the filter's first one, so that the window begins at a multiple of 4


def span_of(kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the dense filter."""
    return dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1


def tile_of(kernel: tuple[int, int], left: int) -> Tile:
    """8 x 8 outputs while 32 columns hold the window, else 2 x 32. A product takes 256 window values, or 128 of a window that needs
    several, whose T is built in the loop and would spill."""
    shift = -left % 4
    wide = 8 + kernel[1] - 1 + shift > 32
    bh, bw = (2, 32) if wide else (8, 8)
    columns = bw + kernel[1] - 1
    if power_of_2(columns + shift) > power_of_2(columns):
        shift = 0
    bk = power_of_2(max(16, columns + shift))
    ur = 256 // bk
    if bh + kernel[0] - 1 > ur:
        ur //= 2
    return Tile(bh, bw, bk, ur, ceil_div(bh + kernel[0] - 1, ur), shift)


@triton.jit
def _toeplitz(
    weight_ptr,  # one channel's (KH, KW)
    first,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    FLIP: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
    UR: tl.constexpr,
    SHIFT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """T of the window rows `first` to first + UR - 1, (UR * BK, BH * BW)."""
    window, out = tl.arange(0, UR * BK), tl.arange(0, BH * BW)
    i = (first + window // BK)[:, None] - (out // BW)[None, :]
    j = (window % BK)[:, None] - (out % BW)[None, :] - SHIFT
    ok = (i >= 0) & (i <= (KH - 1) * DH) & (j >= 0) & (j <= (KW - 1) * DW)
    if DH > 1:
        ok = ok & (i % DH == 0)
        i = i // DH
    if DW > 1:
        ok = ok & (j % DW == 0)
        j = j // DW
    if FLIP:
        i = KH - 1 - i
        j = KW - 1 - j
    return narrow(tl.load(weight_ptr + i * KW + j, mask=ok, other=0.0).to(tl.float32), DTYPE)


@triton.jit
def _window(
    x_ptr,
    start,  # (BLOCK_M,): of the tiles' windows, as y and x
    y,
    x,
    tile_ok,
    first,
    pitch,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    UR: tl.constexpr,
):
    """The window rows `first` to first + UR - 1 of each tile whose window begins at (y, x): (BLOCK_M, UR * BK)."""
    window = tl.arange(0, UR * BK)
    u, p = first + window // BK, window % BK
    rows, columns = y[:, None] + u[None, :], x[:, None] + p[None, :]
    ok = tile_ok[:, None] & (u < ROWS)[None, :] & (rows >= 0) & (rows < HEIGHT) & (columns >= 0) & (columns < WIDTH)
    return tl.load(x_ptr + start[:, None] + ((u * WIDTH + p) * pitch)[None, :], mask=ok, other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    x_ptr,  # (N, C, H, W)
    weight_ptr,  # (C, 1, KH, KW)
    bias_ptr,  # (C,) or None
    mean_ptr,  # (C,) or None: no norm
    var_ptr,
    gamma_ptr,
    beta_ptr,
    residual_ptr,  # (N, C, H, W) or None
    y_ptr,  # (N, C, H, W)
    partials_ptr,  # (parts, 3, C) or None: no statistics
    images,
    channels,
    blocks_per_part,
    parts,
    eps,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    FLIP: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ACT: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
    UR: tl.constexpr,
    STEPS: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    FAST: tl.constexpr = DTYPE != tl.float32
    TOP: tl.constexpr = (DH * (KH - 1) + 1) // 2 if FLIP else DH * (KH - 1) // 2
    LEFT: tl.constexpr = ((DW * (KW - 1) + 1) // 2 if FLIP else DW * (KW - 1) // 2) + SHIFT
    ROWS: tl.constexpr = BH + DH * (KH - 1)
    c, part = pid // parts, pid % parts
    # constants: every thread divides by them for each of its rows of A
    PLANE: tl.constexpr = HEIGHT * WIDTH
    ACROSS: tl.constexpr = (WIDTH + BW - 1) // BW
    TILES: tl.constexpr = (HEIGHT + BH - 1) // BH * ACROSS
    pitch = channels if CHANNELS_LAST else 1
    if WIDE and CHANNELS_LAST:
        pitch = channels.to(tl.int64)
    first_value = c if CHANNELS_LAST else c * PLANE
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c).to(tl.float32)
    always = c >= 0
    if mean_ptr is not None:
        norm_mean, scale, shift = affine(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, c, always, FAST)
    weight_at = weight_ptr + c * (KH * KW)
    if STEPS == 1:
        toeplitz = _toeplitz(weight_at, 0, KH, KW, DH, DW, FLIP, BH, BW, BK, UR, SHIFT, DTYPE)
    out = tl.arange(0, BH * BW)
    counted, mean, m2 = 0.0, 0.0, 0.0
    for b in range(blocks_per_part):
        image, further, tile = positions((part * blocks_per_part + b) * BLOCK_M, TILES, BLOCK_M)
        n_ok = image + further < images
        y0, x0 = tile // ACROSS * BH, tile % ACROSS * BW
        corner = y0 * WIDTH + x0
        if WIDE:
            further, corner = further.to(tl.int64), corner.to(tl.int64)
        base = image * channels * PLANE + first_value
        start = further * channels * PLANE + corner * pitch
        window_start = start - (TOP * WIDTH + LEFT) * pitch
        acc = tl.zeros((BLOCK_M, BH * BW), tl.float32)
        if STEPS == 1:
            a = _window(x_ptr + base, window_start, y0 - TOP, x0 - LEFT, n_ok, 0, pitch, HEIGHT, WIDTH, ROWS, BK, UR)
            acc = dot(a, toeplitz, acc, PRECISION)
        else:
            for step in range(STEPS):
                first = step * UR
                a = _window(
                    x_ptr + base, window_start, y0 - TOP, x0 - LEFT, n_ok, first, pitch, HEIGHT, WIDTH, ROWS, BK, UR
                )
                toeplitz = _toeplitz(weight_at, first, KH, KW, DH, DW, FLIP, BH, BW, BK, UR, SHIFT, DTYPE)
                acc = dot(a, toeplitz, acc, PRECISION)
        acc += bias
        ok = n_ok[:, None] & (y0[:, None] + (out // BW)[None, :] < HEIGHT)
        ok = ok & (x0[:, None] + (out % BW)[None, :] < WIDTH)
        offsets = start[:, None] + ((out // BW * WIDTH + out % BW) * pitch)[None, :]
        if partials_ptr is not None:
            rounded = narrow(acc, DTYPE)
            tl.store(y_ptr + base + offsets, rounded, mask=ok)
            h = activate(rounded.to(tl.float32), ACT, FAST)
            count = tl.sum(tl.sum(ok.to(tl.int32), 1), 0).to(tl.float32)
            divisor = tl.maximum(count, 1.0)
            block_mean = (total(total(tl.where(ok, h, 0.0), 1, FAST), 0, FAST) / divisor).to(tl.float32)
            deviation = tl.where(ok, h - block_mean, 0.0)
            block_m2 = total(total(deviation * deviation, 1, FAST), 0, FAST).to(tl.float32)
            # Chan's merge; a block past the last tile has no values and changes nothing
            share = count / tl.maximum(counted + count, 1.0)
            distance = tl.where(count > 0, block_mean - mean, 0.0)
            m2 += block_m2 + distance * distance * counted * share
            mean += distance * share
            counted += count
        else:
            h = activate(acc, ACT, FAST)
            if mean_ptr is not None:
                h = (h - norm_mean) * scale + shift
            if residual_ptr is not None:
                h += tl.load(residual_ptr + base + offsets, mask=ok, other=0.0).to(tl.float32)
            tl.store(y_ptr + base + offsets, narrow(h, DTYPE), mask=ok)
    if partials_ptr is not None:
        store_moments(partials_ptr, c, always, part, channels, counted, mean, m2)


@triton.jit(do_not_specialize=_SIZES)
def weight_grad_kernel(
    dy_ptr,  # (N, C, H, W)
    a_ptr,  # (N, C, H, W) or None: da is dy
    x_ptr,  # (N, C, H, W)
    mean_ptr,  # (C,) or None: no norm
    var_ptr,
    gamma_ptr,
    sum_dy_ptr,  # (C,) or None: constant statistics
    sum_dy_hhat_ptr,
    partials_ptr,  # (parts, C, KW, STEPS * UR, BH)
    bias_partials_ptr,  # (parts, C) or None
    images,
    channels,
    blocks_per_part,
    parts,
    count,  # N * H * W, as a float
    eps,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ACT: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
    UR: tl.constexpr,
    STEPS: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    FAST: tl.constexpr = DTYPE != tl.float32
    NORM: tl.constexpr = mean_ptr is not None
    BATCH: tl.constexpr = sum_dy_ptr is not None
    TOP: tl.constexpr = DH * (KH - 1) // 2
    LEFT: tl.constexpr = DW * (KW - 1) // 2 + SHIFT
    ROWS: tl.constexpr = BH + DH * (KH - 1)
    # the steps of one part and channel run side by side: they read the same values
    step = (pid % STEPS).to(tl.int32)
    c, part = pid // STEPS // parts, pid // STEPS % parts
    # constants: every thread divides by them for each of its rows of A
    PLANE: tl.constexpr = HEIGHT * WIDTH
    ACROSS: tl.constexpr = (WIDTH + BW - 1) // BW
    TILES: tl.constexpr = (HEIGHT + BH - 1) // BH * ACROSS
    pitch = channels if CHANNELS_LAST else 1
    if WIDE and CHANNELS_LAST:
        pitch = channels.to(tl.int64)
    first_value = c if CHANNELS_LAST else c * PLANE
    always = c >= 0
    mean, scale, mean_dy, factor = backward_vectors(
        mean_ptr, var_ptr, gamma_ptr, sum_dy_ptr, sum_dy_hhat_ptr, eps, count, c, always, FAST
    )
    out = tl.arange(0, BH * BW)
    grad = tl.zeros((UR * BK, BH * BW), tl.float32)
    sum_da = tl.zeros((BLOCK_M,), tl.float32)
    for b in range(blocks_per_part):
        image, further, tile = positions((part * blocks_per_part + b) * BLOCK_M, TILES, BLOCK_M)
        n_ok = image + further < images
        y0, x0 = tile // ACROSS * BH, tile % ACROSS * BW
        corner = y0 * WIDTH + x0
        if WIDE:
            further, corner = further.to(tl.int64), corner.to(tl.int64)
        base = image * channels * PLANE + first_value
        start = further * channels * PLANE + corner * pitch
        window_start = start - (TOP * WIDTH + LEFT) * pitch
        x = _window(
            x_ptr + base, window_start, y0 - TOP, x0 - LEFT, n_ok, step * UR, pitch, HEIGHT, WIDTH, ROWS, BK, UR
        )
        ok = n_ok[:, None] & (y0[:, None] + (out // BW)[None, :] < HEIGHT)
        ok = ok & (x0[:, None] + (out % BW)[None, :] < WIDTH)
        offsets = start[:, None] + ((out // BW * WIDTH + out % BW) * pitch)[None, :]
        da = tl.load(dy_ptr + base + offsets, mask=ok, other=0.0).to(tl.float32)
        if a_ptr is not None:
            a = tl.load(a_ptr + base + offsets, mask=ok, other=0.0).to(tl.float32)
            da = preactivation_grad(da, a, mean, scale, mean_dy, factor, NORM, BATCH, ACT, FAST)
            da = tl.where(ok, da, 0.0)
        if bias_partials_ptr is not None:
            sum_da += tl.sum(da, 1)
        grad = dot(tl.trans(x), narrow(da, DTYPE), grad, PRECISION)
    if bias_partials_ptr is not None:
        tl.store(bias_partials_ptr + part * channels + c, tl.sum(sum_da, 0), mask=step == 0)
    grad = tl.reshape(grad, (UR, BK, BH, BW))
    # p - q of an element is the filter's column that it belongs to
    column = tl.arange(0, BK)[None, :, None, None] - tl.arange(0, BW)[None, None, None, :]
    rows = (step * UR + tl.arange(0, UR))[:, None] * BH + tl.arange(0, BH)[None, :]
    at = partials_ptr + (part * channels + c) * (KW * STEPS * UR * BH) + rows
    for j in range(KW):
        tl.store(at + j * (STEPS * UR * BH), tl.sum(tl.sum(tl.where(column == j * DW + SHIFT, grad, 0.0), 3), 1))


@triton.jit(do_not_specialize=_SIZES)
def finish_kernel(
    partials_ptr,  # (parts, C, KW, ROWS, BH)
    bias_partials_ptr,  # (bias_parts, C) or None
    dw_ptr,  # (C, 1, KH, KW)
    db_ptr,  # (C,) or None
    channels,
    parts,
    bias_parts,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    ROWS: tl.constexpr,
    BH: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    TAPS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    groups: tl.constexpr = (KH * KW + TAPS - 1) // TAPS
    c, tap = pid // groups, (pid % groups).to(tl.int32) * TAPS + tl.arange(0, TAPS)
    i, j = tap // KW, tap % KW
    tap_ok = tap < KH * KW
    acc = tl.zeros((BLOCK_PARTS, TAPS), tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        part = (first + tl.arange(0, BLOCK_PARTS)).to(tl.int64)
        part_ok = part < parts
        at = partials_ptr + ((part * channels + c) * (KW * ROWS * BH))[:, None] + ((j * ROWS + i * DH) * BH)[None, :]
        for y in range(BH):
            acc += tl.load(at + y * (BH + 1), mask=part_ok[:, None] & tap_ok[None, :], other=0.0)
    tl.store(dw_ptr + c * (KH * KW) + tap, narrow(tl.sum(acc, 0), dw_ptr.dtype.element_ty), mask=tap_ok)
    if bias_partials_ptr is not None:
        lane = tl.arange(0, 1)
        db = sum_of_parts(bias_partials_ptr + c + lane, channels, bias_parts, lane == 0, BLOCK_PARTS)
        tl.store(db_ptr + c + lane, narrow(db, db_ptr.dtype.element_ty), mask=lane < tl.where(pid % groups == 0, 1, 0))


def _arguments(
    layout: Layout, kernel: tuple[int, int], dilation: tuple[int, int], tile: Tile
) -> tuple[tuple[int, int], dict[str, object]]:
    """images and channels, and the constants of both kernels."""
    constants = {
        "KH": kernel[0],
        "KW": kernel[1],
        "DH": dilation[0],
        "DW": dilation[1],
        "HEIGHT": layout.height,
        "WIDTH": layout.width,
        "CHANNELS_LAST": layout.channels_last,
        "WIDE": layout.wide,
        "PRECISION": tables.input_precision(),
        **tile._asdict(),
    }
    return (layout.images, layout.channels), constants


def _parts(layout: Layout, tile: Tile, programs: int, block: int) -> tuple[int, int]:
    tiles = layout.images * ceil_div(layout.height, tile.BH) * ceil_div(layout.width, tile.BW)
    return tuning.split(programs, ceil_div(tiles, block), layout.device)


def forward(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    activation: str,
    norm: Norm | None,
    residual: Tensor | None,  # (N, C, H, W)
    statistics: bool,
    flip: bool = False,
    dilation: tuple[int, int] = (1, 1),
) -> tuple[Tensor, Tensor | None]:
    """As depthwise.forward."""
    layout, kernel = layout_of(x), tuple(weight.shape[2:])
    span = span_of(kernel, dilation)
    left = span[1] // 2 if flip else (span[1] - 1) // 2
    y, tile = torch.empty_like(x), tile_of(span, left)
    sizes, constants = _arguments(layout, kernel, dilation, tile)
    mean, var, gamma, beta, eps = norm_arguments(norm)

    def call(config: tuning.Config) -> Tensor | None:
        parts, per_part = _parts(layout, tile, layout.channels, config["BLOCK_M"])
        partials = x.new_empty((parts, 3, layout.channels), dtype=torch.float32) if statistics else None
        forward_kernel[(layout.channels * parts,)](
            x,
            weight,
            bias,
            mean,
            var,
            gamma,
            beta,
            residual,
            y,
            partials,
            *sizes,
            per_part,
            parts,
            eps,
            **constants,
            FLIP=flip,
            ACT=ACTIVATIONS.index(activation),
            **config,
            **OPTIONS,
        )
        return partials

    key = (x.dtype, *layout.key, *kernel, *dilation, activation, statistics)
    return y, tuning.run(
        "depthwise_toeplitz" if tile.STEPS == 1 else "depthwise_toeplitz_large", key, layout.device, call
    )


def weight_grad(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor | None,  # (N, C, H, W)
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW): for its shape and dtype
    bias: Tensor | None,  # (C,): for its presence and dtype
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    bias_parts: Tensor | None = None,  # (parts, C)
    dilation: tuple[int, int] = (1, 1),
) -> tuple[Tensor, Tensor | None]:
    """dw and db, in two launches; da is computed in the prologue, rounded to dy's dtype for the products.

    Where dy is da already (no norm, activation identity) the caller may have parts of its sum, db, from before the rounding.
    """
    layout, kernel = layout_of(dy), tuple(weight.shape[2:])
    span = span_of(kernel, dilation)
    tile = tile_of(span, (span[1] - 1) // 2)
    sizes, constants = _arguments(layout, kernel, dilation, tile)
    a = None if norm is None and activation == "identity" else a
    mean, var, gamma, _, eps = norm_arguments(norm)
    rows = tile.STEPS * tile.UR

    def call(config: tuning.Config) -> tuple[Tensor, Tensor | None]:
        programs = layout.channels * tile.STEPS
        parts, per_part = _parts(layout, tile, programs, config["BLOCK_M"])
        shape = (parts, layout.channels, kernel[1], rows, tile.BH)
        partials = dy.new_empty(shape, dtype=torch.float32)
        sums_here = bias is not None and bias_parts is None
        bias_partials = dy.new_empty(shape[:2], dtype=torch.float32) if sums_here else None
        weight_grad_kernel[(programs * parts,)](
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
            parts,
            float(layout.count),
            eps,
            **constants,
            ACT=ACTIVATIONS.index(activation),
            **config,
            **OPTIONS,
        )
        return partials, bias_partials

    key = (dy.dtype, *layout.key, *kernel, *dilation, activation)
    partials, summed_here = tuning.run("depthwise_toeplitz_weight_grad", key, layout.device, call)
    bias_partials = summed_here if bias_parts is None else bias_parts
    dw, db = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
    taps = min(128, power_of_2(kernel[0] * kernel[1]))
    finish_kernel[(layout.channels * ceil_div(kernel[0] * kernel[1], taps),)](
        partials,
        bias_partials,
        dw,
        db,
        layout.channels,
        partials.shape[0],
        0 if bias_partials is None else bias_partials.shape[0],
        KH=kernel[0],
        KW=kernel[1],
        DH=dilation[0],
        ROWS=rows,
        BH=tile.BH,
        BLOCK_PARTS=min(8, power_of_2(partials.shape[0])),
        TAPS=taps,
        num_warps=4,
        **OPTIONS,
    )
    return dw, db

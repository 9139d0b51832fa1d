# SPDX-License-Identifier: MIT
"""Depthwise convolution on FMA units: any kernel, dtype and layout; x, da, y: (N, C, H, W), contiguous or channels_last.

    forward       y = norm(act(conv(x) + bias)) (+ x), or a = conv(x) + bias with (count, mean, M2) of act(a)
    input grad    the same kernel over da with the flipped weight and exchanged paddings, + dy
    weight grad   dw[c,i,j] = sum da * shifted x, as parts
forward: a program owns ROWS x BLOCK_P outputs of BLOCK_C channels, BLOCK_P numbered over images, groups of ROWS rows, and columns; the
rows of a group lie the dilation apart, so that an input value, read once for each filter column, serves ROWS outputs. A non-finite
input may reach all rows of its group (0 * inf).
weight grad: a program owns TAPS columns of one filter row for BLOCK_C channels and a part of all positions.
Bound: issue slots. With ROWS = 4, 9 of 12 rows of FMAs count, and a tap takes a load and its mask beside them (config.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives import ACTIVATIONS, Norm
from . import tuning
from .batch_norm import partial_dtype
from .common import activate, affine, channel_tile, moments, narrow, positions, store_moments, tile_offsets, total
from .launch import OPTIONS, Layout, ceil_div, layout_of, norm_arguments, power_of_2, unit

_SIZES = ["images", "channel_units", "height", "width_units", "blocks_per_part", "parts"]


@triton.jit
def _tap(acc, x_at, w_at, offset, row_ok, column, i, i_ok, c_ok, width, KW: tl.constexpr):
    """acc (ROWS, BLOCK_P, BLOCK_C) + one tap of this filter row, with its input at column `column`."""
    ok = (row_ok & (column >= 0) & (column < width))[:, None] & c_ok[None, :]
    x = tl.load(x_at + offset, mask=ok, other=0.0).to(tl.float32)
    w = tl.load(w_at + (i * KW)[:, None], mask=i_ok, other=0.0).to(tl.float32)
    return acc + w[:, None, :] * x[None, :, :]


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
    partials_ptr,  # (blocks, 3, C) or None: no statistics
    images,
    channel_units,
    height,
    width_units,
    eps,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    FLIP: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    FAST: tl.constexpr = DTYPE != tl.float32
    # a flipped filter's paddings change sides
    TOP: tl.constexpr = (DH * (KH - 1) + 1) // 2 if FLIP else DH * (KH - 1) // 2
    LEFT: tl.constexpr = (DW * (KW - 1) + 1) // 2 if FLIP else DW * (KW - 1) // 2
    channels, width = channel_units * CHANNEL_UNIT, width_units * WIDTH_UNIT
    plane = height * width
    groups = tl.cdiv(height, ROWS * DH) * DH * width
    blocks = tl.cdiv(images.to(tl.int64) * groups, BLOCK_P)
    block, first_channel, lane, c, c_ok = channel_tile(pid, blocks, channels, CHANNELS_LAST, BLOCK_C)
    image, further, index = positions(block * BLOCK_P, groups, BLOCK_P)
    group, x0 = index // width, index % width
    y0 = group // DH * (ROWS * DH) + group % DH
    n_ok = image + further < images
    if WIDE:
        further, lane = further.to(tl.int64), lane.to(tl.int64)
    if CHANNELS_LAST:
        pitch = channels
        start = image * plane * channels + first_channel
        offsets = ((further * plane + y0 * width + x0) * channels)[:, None] + lane[None, :]
    else:
        pitch = 1
        start = (image * channels + first_channel) * plane
        offsets = (further * channels * plane + y0 * width + x0)[:, None] + (lane * plane)[None, :]
    if WIDE:
        row_pitch = width.to(tl.int64) * pitch
    else:
        row_pitch = width * pitch
    x_ptr += start
    y_ptr += start
    row = tl.arange(0, ROWS)
    weight_at = weight_ptr + c[None, :] * (KH * KW)
    acc = tl.zeros((ROWS, BLOCK_P, BLOCK_C), tl.float32)
    for u in range(ROWS + KH - 1):
        y = y0 + u * DH - TOP
        row_ok = n_ok & (y >= 0) & (y < height)
        i = u - row
        i_ok = ((i >= 0) & (i < KH))[:, None] & c_ok[None, :]
        if FLIP:
            i = KH - 1 - i
        x_at = x_ptr + offsets + (u * DH - TOP) * row_pitch
        if KW <= 9:
            for j in tl.static_range(KW):
                w_at = weight_at + (KW - 1 - j if FLIP else j)
                column = j * DW - LEFT
                acc = _tap(acc, x_at, w_at, column * pitch, row_ok, x0 + column, i, i_ok, c_ok, width, KW)
        else:
            for j in range(KW):
                w_at = weight_at + (KW - 1 - j if FLIP else j)
                column = j * DW - LEFT
                acc = _tap(acc, x_at, w_at, column * pitch, row_ok, x0 + column, i, i_ok, c_ok, width, KW)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, None, :]
    inside = n_ok[None, :] & (y0[None, :] + row[:, None] * DH < height)
    ok = inside[:, :, None] & c_ok[None, None, :]
    offsets = offsets[None, :, :] + (row * DH * row_pitch)[:, None, None]
    if partials_ptr is not None:
        a = narrow(acc, DTYPE)
        tl.store(y_ptr + offsets, a, mask=ok)
        h = tl.reshape(activate(a.to(tl.float32), ACT, FAST), (ROWS * BLOCK_P, BLOCK_C))
        counted = tl.reshape(tl.broadcast_to(ok, (ROWS, BLOCK_P, BLOCK_C)), (ROWS * BLOCK_P, BLOCK_C))
        count = tl.sum(tl.sum(inside.to(tl.int32), 0), 0)
        count = count.to(tl.float32)
        mean, m2 = moments(h, counted, count, 0, FAST)
        store_moments(partials_ptr, c, c_ok, block, channels, count, mean, m2)
    else:
        h = activate(acc, ACT, FAST)
        if mean_ptr is not None:
            mean, scale, shift = affine(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, c, c_ok, FAST)
            h = (h - mean[None, None, :]) * scale[None, None, :] + shift[None, None, :]
        if residual_ptr is not None:
            h += tl.load(residual_ptr + start + offsets, mask=ok, other=0.0).to(tl.float32)
        tl.store(y_ptr + offsets, narrow(h, DTYPE), mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def weight_grad_kernel(
    da_ptr,  # (N, C, H, W)
    x_ptr,  # (N, C, H, W)
    partials_ptr,  # (parts, C, KH * KW)
    images,
    channel_units,
    height,
    width_units,
    blocks_per_part,
    parts,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    FAST: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    TOP: tl.constexpr = DH * (KH - 1) // 2
    LEFT: tl.constexpr = DW * (KW - 1) // 2
    COLUMNS: tl.constexpr = (KW + TAPS - 1) // TAPS
    channels, width = channel_units * CHANNEL_UNIT, width_units * WIDTH_UNIT
    plane = height * width
    # the taps of one part and channel run side by side: they read the same values
    taps = pid % (KH * COLUMNS)
    i = (taps // COLUMNS).to(tl.int32)
    j = (taps % COLUMNS).to(tl.int32) * TAPS + tl.arange(0, TAPS)
    part, first_channel, lane, c, c_ok = channel_tile(pid // (KH * COLUMNS), parts, channels, CHANNELS_LAST, BLOCK_C)
    pitch = channels if CHANNELS_LAST else 1
    if WIDE:
        row_pitch = width.to(tl.int64) * pitch
    else:
        row_pitch = width * pitch
    acc = tl.zeros((TAPS, BLOCK_P, BLOCK_C), tl.float32)
    for k in range(blocks_per_part):
        block = part * blocks_per_part + k
        start, offsets, n_ok = tile_offsets(
            block, lane, first_channel, images, channels, plane, CHANNELS_LAST, WIDE, BLOCK_P
        )
        index = ((block * BLOCK_P) % plane).to(tl.int32) + tl.arange(0, BLOCK_P)
        y, x0 = index % plane // width, index % plane % width
        da = tl.load(da_ptr + start + offsets, mask=n_ok[:, None] & c_ok[None, :], other=0.0).to(tl.float32)
        y += i * DH - TOP
        row_ok = n_ok & (y >= 0) & (y < height)
        column = x0[None, :] + j[:, None] * DW - LEFT
        ok = row_ok[None, :] & (column >= 0) & (column < width) & (j < KW)[:, None]
        ok = ok[:, :, None] & c_ok[None, None, :]
        shift = (i * DH - TOP) * row_pitch + (j * DW - LEFT) * pitch
        x_at = x_ptr + start + offsets[None, :, :] + shift[:, None, None]
        x = tl.load(x_at, mask=ok, other=0.0).to(tl.float32)
        acc += da[None, :, :] * x
    at = partials_ptr + (part * channels + c)[None, :] * (KH * KW) + (i * KW + j)[:, None]
    tl.store(at, total(acc, 1, FAST), mask=(j < KW)[:, None] & c_ok[None, :])


def _arguments(
    layout: Layout, kernel: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, ...], dict[str, int | bool]]:
    """images, channel_units, height, width_units, and the constants that belong to them."""
    sizes = (layout.images, layout.channels // unit(layout.channels), layout.height, layout.width // unit(layout.width))
    constants = {
        "KH": kernel[0],
        "KW": kernel[1],
        "DH": dilation[0],
        "DW": dilation[1],
        "CHANNEL_UNIT": unit(layout.channels),
        "WIDTH_UNIT": unit(layout.width),
        "CHANNELS_LAST": layout.channels_last,
        "WIDE": layout.wide,
    }
    return sizes, constants


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
    """norm(act(conv(x) + bias)) (+ residual); with `statistics` a and (parts, 3, C) of act(a). One launch."""
    layout, kernel = layout_of(x), tuple(weight.shape[2:])
    y = torch.empty_like(x)
    sizes, constants = _arguments(layout, kernel, dilation)
    mean, var, gamma, beta, eps = norm_arguments(norm)

    def call(config: tuning.Config) -> Tensor | None:
        config = layout.fit(config)
        positions_ = layout.images * ceil_div(layout.height, config["ROWS"] * dilation[0]) * dilation[0] * layout.width
        blocks = ceil_div(positions_, config["BLOCK_P"])
        partials = x.new_empty((blocks, 3, layout.channels), dtype=torch.float32) if statistics else None
        forward_kernel[(blocks * ceil_div(layout.channels, config["BLOCK_C"]),)](
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
            eps,
            **constants,
            FLIP=flip,
            ACT=ACTIVATIONS.index(activation),
            **config,
            **OPTIONS,
        )
        return partials

    key = (x.dtype, *layout.key, *kernel, *dilation, activation, statistics)
    return y, tuning.run("depthwise_fma" + layout.suffix, key, layout.device, call)


def weight_grad(
    da: Tensor,  # (N, C, H, W)
    x: Tensor,  # (N, C, H, W)
    kernel: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:  # (parts, C * kH * kW)
    """Parts of dw, in one launch."""
    layout = layout_of(x)
    sizes, constants = _arguments(layout, kernel, dilation)

    def call(config: tuning.Config) -> Tensor:
        config = layout.fit(config | {"TAPS": min(config["TAPS"], power_of_2(kernel[1]))})
        groups = ceil_div(layout.channels, config["BLOCK_C"])
        programs = groups * kernel[0] * ceil_div(kernel[1], config["TAPS"])
        parts, per_part = tuning.split(programs, ceil_div(layout.count, config["BLOCK_P"]), layout.device)
        partials = x.new_empty((parts, layout.channels * kernel[0] * kernel[1]), dtype=partial_dtype(x.dtype))
        weight_grad_kernel[(programs * parts,)](
            da, x, partials, *sizes, per_part, parts, **constants, **config, **OPTIONS
        )
        return partials

    key = (x.dtype, *layout.key, *kernel, *dilation)
    return tuning.run("depthwise_fma_weight_grad" + layout.suffix, key, layout.device, call)

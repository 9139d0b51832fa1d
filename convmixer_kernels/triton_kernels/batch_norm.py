# SPDX-License-Identifier: MIT
"""Batch norm's passes, and the last launch of every sum over parts. x, a, dy: (N, C, H, W), contiguous or channels_last.

    normalize       y = (act(a) - mean) * scale + shift (+ residual), and running statistics
    norm_backward   sum dy and sum dy * hhat, hhat = (act(a) - mean) * rstd
    grad_prologue   da = dh * act'(a), dh = scale * (dy - mean_dy - hhat * mean_dy_hhat), and sum da; of the parts that norm_backward
                    left it makes the sums itself, the parameters' gradients
    merge           mean and variance from (count, mean, M2) of parts;  sum_parts: ordered sums over parts
A program owns BLOCK_P values of BLOCK_C channels, or a part of all blocks of such values; a channel's values are numbered over
N, H, W, so that small planes share a block. Bound: memory, every tensor is read or written once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives import ACTIVATIONS, Norm, Update
from . import tuning
from .common import (
    activate,
    affine,
    backward_vectors_of,
    channel_tile,
    channel_vector,
    narrow,
    preactivation_grad,
    sum_of_parts,
    tile_offsets,
    total,
)
from .launch import OPTIONS, Layout, ceil_div, layout_of, norm_arguments, power_of_2, unit

_SIZES = ["images", "channel_units", "plane_units", "blocks_per_part", "parts", "sum_parts", "count"]
_SIZES += ["size", "second_parts", "second_size", "batch_channels", "second_channels"]


@triton.jit
def _lerp(old, new, weight):
    """torch.lerp: exact at both ends."""
    return tl.where(weight < 0.5, old + weight * (new - old), new - (new - old) * (1.0 - weight))


@triton.jit
def _move(running_ptr, new, c, c_ok, momentum):
    """running_ptr[c] towards `new`, if the pointer is not None."""
    if running_ptr is not None:
        old = tl.load(running_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
        tl.store(running_ptr + c, narrow(_lerp(old, new, momentum), running_ptr.dtype.element_ty), mask=c_ok)


@triton.jit
def _update(pid, running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, channels, unbias, momentum, BLOCK: tl.constexpr):
    """BLOCK channels of a block's running statistics, (C,) each as the batch's, whose variance is biased."""
    c = pid * BLOCK + tl.arange(0, BLOCK)
    c_ok = c < channels
    _move(running_mean_ptr, tl.load(mean_ptr + c, mask=c_ok, other=0.0), c, c_ok, momentum)
    _move(running_var_ptr, tl.load(var_ptr + c, mask=c_ok, other=0.0) * unbias, c, c_ok, momentum)


@triton.jit(do_not_specialize=_SIZES)
def normalize_kernel(
    a_ptr,  # (N, C, H, W)
    mean_ptr,  # (C,), as the next three
    var_ptr,
    gamma_ptr,
    beta_ptr,
    residual_ptr,  # (N, C, H, W) or None
    y_ptr,  # (N, C, H, W)
    # _update's arguments, twice; a mean of None: no update
    running_mean_ptr,
    running_var_ptr,
    batch_mean_ptr,
    batch_var_ptr,
    batch_channels,
    unbias,
    momentum,
    second_running_mean_ptr,
    second_running_var_ptr,
    second_mean_ptr,
    second_var_ptr,
    second_channels,
    second_unbias,
    second_momentum,
    images,
    channel_units,
    plane_units,
    eps,
    CHANNEL_UNIT: tl.constexpr,
    PLANE_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_UPDATE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    FAST: tl.constexpr = a_ptr.dtype.element_ty != tl.float32
    channels, plane = channel_units * CHANNEL_UNIT, plane_units * PLANE_UNIT
    blocks = tl.cdiv(images.to(tl.int64) * plane, BLOCK_P)
    first = blocks * tl.cdiv(channels, BLOCK_C)
    if pid < first:
        block, first_channel, lane, c, c_ok = channel_tile(pid, blocks, channels, CHANNELS_LAST, BLOCK_C)
        start, offsets, ok = tile_offsets(
            block, lane, first_channel, images, channels, plane, CHANNELS_LAST, WIDE, BLOCK_P
        )
        ok = ok[:, None] & c_ok[None, :]
        mean, scale, shift = affine(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, c, c_ok, FAST)
        h = activate(tl.load(a_ptr + start + offsets, mask=ok, other=0.0).to(tl.float32), ACT, FAST)
        y = (h - mean[None, :]) * scale[None, :] + shift[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + start + offsets, mask=ok, other=0.0).to(tl.float32)
        tl.store(y_ptr + start + offsets, narrow(y, y_ptr.dtype.element_ty), mask=ok)
    else:
        # programs behind the tensor's; here, because this is a forward's last launch: one that fails earlier has moved nothing
        if batch_mean_ptr is not None:
            _update(
                pid - first,
                running_mean_ptr,
                running_var_ptr,
                batch_mean_ptr,
                batch_var_ptr,
                batch_channels,
                unbias,
                momentum,
                BLOCK_UPDATE,
            )
        if second_mean_ptr is not None:
            _update(
                pid - first,
                second_running_mean_ptr,
                second_running_var_ptr,
                second_mean_ptr,
                second_var_ptr,
                second_channels,
                second_unbias,
                second_momentum,
                BLOCK_UPDATE,
            )


@triton.jit(do_not_specialize=_SIZES)
def norm_backward_kernel(
    dy_ptr,  # (N, C, H, W)
    a_ptr,  # (N, C, H, W)
    mean_ptr,  # (C,)
    var_ptr,  # (C,)
    partials_ptr,  # (parts, 2, C): sum dy, sum dy * hhat
    images,
    channel_units,
    plane_units,
    blocks_per_part,
    parts,
    eps,
    CHANNEL_UNIT: tl.constexpr,
    PLANE_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    FAST: tl.constexpr = a_ptr.dtype.element_ty != tl.float32
    channels, plane = channel_units * CHANNEL_UNIT, plane_units * PLANE_UNIT
    part, first_channel, lane, c, c_ok = channel_tile(pid, parts, channels, CHANNELS_LAST, BLOCK_C)
    mean, rstd, _ = affine(mean_ptr, var_ptr, None, None, eps, c, c_ok, FAST)
    sum_dy = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_dy_hhat = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(blocks_per_part):
        block = part * blocks_per_part + i
        start, offsets, ok = tile_offsets(
            block, lane, first_channel, images, channels, plane, CHANNELS_LAST, WIDE, BLOCK_P
        )
        ok = ok[:, None] & c_ok[None, :]
        dy = tl.load(dy_ptr + start + offsets, mask=ok, other=0.0).to(tl.float32)
        h = activate(tl.load(a_ptr + start + offsets, mask=ok, other=0.0).to(tl.float32), ACT, FAST)
        sum_dy += dy
        sum_dy_hhat += dy * (h - mean[None, :])
    at = partials_ptr + part * 2 * channels + c
    tl.store(at, total(sum_dy, 0, FAST), mask=c_ok)
    tl.store(at + channels, total(sum_dy_hhat, 0, FAST) * rstd, mask=c_ok)


@triton.jit(do_not_specialize=_SIZES)
def grad_prologue_kernel(
    dy_ptr,  # (N, C, H, W)
    a_ptr,  # (N, C, H, W)
    mean_ptr,  # (C,) or None: no norm
    var_ptr,
    gamma_ptr,
    sum_dy_ptr,  # (C,) or None: constant statistics
    sum_dy_hhat_ptr,
    sum_partials_ptr,  # (sum_parts, 2, C): norm_backward's, to be finished here; or None
    dbeta_ptr,  # (C,) or None: receives sum dy, finished here
    dgamma_ptr,  # (C,) or None: and sum dy * hhat
    da_ptr,  # (N, C, H, W) or None: only the sums are wanted
    partials_ptr,  # (parts, C) or None: only da is wanted
    images,
    channel_units,
    plane_units,
    blocks_per_part,
    parts,
    sum_parts,
    count,  # N * H * W, as a float
    eps,
    CHANNEL_UNIT: tl.constexpr,
    PLANE_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    FAST: tl.constexpr = dy_ptr.dtype.element_ty != tl.float32
    NORM: tl.constexpr = mean_ptr is not None
    channels, plane = channel_units * CHANNEL_UNIT, plane_units * PLANE_UNIT
    part, first_channel, lane, c, c_ok = channel_tile(pid, parts, channels, CHANNELS_LAST, BLOCK_C)
    if sum_partials_ptr is not None:
        # a program finishes its channels' sums itself, and those of the first part store them: no launch between
        at = sum_partials_ptr + c
        sum_dy = sum_of_parts(at, 2 * channels, sum_parts, c_ok, BLOCK_SUMS)
        sum_dy_hhat = sum_of_parts(at + channels, 2 * channels, sum_parts, c_ok, BLOCK_SUMS)
        stores = c < tl.where(part == 0, channels, 0)
        if dbeta_ptr is not None:
            tl.store(dbeta_ptr + c, narrow(sum_dy, dbeta_ptr.dtype.element_ty), mask=stores)
        if dgamma_ptr is not None:
            tl.store(dgamma_ptr + c, narrow(sum_dy_hhat, dgamma_ptr.dtype.element_ty), mask=stores)
    else:
        sum_dy = channel_vector(sum_dy_ptr, c, c_ok, 0.0)
        sum_dy_hhat = channel_vector(sum_dy_hhat_ptr, c, c_ok, 0.0)
    mean, scale, mean_dy, factor = backward_vectors_of(
        mean_ptr, var_ptr, gamma_ptr, sum_dy, sum_dy_hhat, eps, count, c, c_ok, FAST
    )
    sum_da = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(blocks_per_part):
        block = part * blocks_per_part + i
        start, offsets, ok = tile_offsets(
            block, lane, first_channel, images, channels, plane, CHANNELS_LAST, WIDE, BLOCK_P
        )
        ok = ok[:, None] & c_ok[None, :]
        da = tl.load(dy_ptr + start + offsets, mask=ok, other=0.0).to(tl.float32)
        if a_ptr is not None:
            a = tl.load(a_ptr + start + offsets, mask=ok, other=0.0).to(tl.float32)
            da = preactivation_grad(
                da,
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
        if partials_ptr is not None:
            sum_da += tl.where(ok, da, 0.0)
        if da_ptr is not None:
            tl.store(da_ptr + start + offsets, narrow(da, da_ptr.dtype.element_ty), mask=ok)
    if partials_ptr is not None:
        tl.store(partials_ptr + part * channels + c, total(sum_da, 0, FAST), mask=c_ok)


@triton.jit
def _sum_block(block, partials_ptr, out_ptr, parts, size, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    e = block * BLOCK + tl.arange(0, BLOCK)
    sums = sum_of_parts(partials_ptr + e, size, parts, e < size, BLOCK_PARTS)
    tl.store(out_ptr + e, narrow(sums, out_ptr.dtype.element_ty), mask=e < size)


@triton.jit(do_not_specialize=_SIZES)
def sum_parts_kernel(
    partials_ptr,  # (parts, size)
    out_ptr,  # (size,)
    second_partials_ptr,  # (second_parts, second_size) or None
    second_ptr,  # (second_size,) or None
    parts,
    size,
    second_parts,
    second_size,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    if second_partials_ptr is None:
        _sum_block(pid, partials_ptr, out_ptr, parts, size, BLOCK_PARTS, BLOCK)
    else:
        # the second sum's programs come first: they are few
        blocks = tl.cdiv(second_size, BLOCK)
        if pid < blocks:
            _sum_block(pid, second_partials_ptr, second_ptr, second_parts, second_size, BLOCK_PARTS, BLOCK)
        else:
            _sum_block(pid - blocks, partials_ptr, out_ptr, parts, size, BLOCK_PARTS, BLOCK)


@triton.jit(do_not_specialize=_SIZES)
def merge_kernel(
    partials_ptr,  # (parts, 3, C): count, mean, M2 of parts
    mean_ptr,  # (C,)
    var_ptr,  # (C,) biased
    channel_units,
    parts,
    count,  # N * H * W, as a float
    CHANNEL_UNIT: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # the union of all parts at once: M2 = sum M2_p + count_p (mean_p - mean)^2 (Chan, Golub and LeVeque 1979); in float64, of
    # which there is little to do: a rounding error here would be every value's of the channel
    pid = tl.program_id(0).to(tl.int64)
    channels = channel_units * CHANNEL_UNIT
    c = pid * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < channels
    acc = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_PARTS):
        part = (start + tl.arange(0, BLOCK_PARTS)).to(tl.int64)
        ok = (part < parts)[:, None] & c_ok[None, :]
        at = partials_ptr + (part * 3 * channels)[:, None] + c[None, :]
        n = tl.load(at, mask=ok, other=0.0).to(tl.float64)
        acc += n * tl.load(at + channels, mask=ok, other=0.0)
    mean = tl.sum(acc, 0) / count
    acc = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float64)
    for start in range(0, parts, BLOCK_PARTS):
        part = (start + tl.arange(0, BLOCK_PARTS)).to(tl.int64)
        ok = (part < parts)[:, None] & c_ok[None, :]
        at = partials_ptr + (part * 3 * channels)[:, None] + c[None, :]
        n = tl.load(at, mask=ok, other=0.0)
        away = tl.where(ok, tl.load(at + channels, mask=ok, other=0.0) - mean[None, :], 0.0)
        acc += tl.load(at + 2 * channels, mask=ok, other=0.0) + n * away * away
    tl.store(mean_ptr + c, mean.to(tl.float32), mask=c_ok)
    tl.store(var_ptr + c, (tl.sum(acc, 0) / count).to(tl.float32), mask=c_ok)


#: Channels of a program that moves running statistics; _update's arguments if there is nothing to move.
_BLOCK_UPDATE = 256
_NO_UPDATE = (None, None, None, None, 0, 1.0, 0.0)
#: Parts of norm_backward's sums: every program of grad_prologue reads all of them, 16 or 32 KB of L2 at most.
_MOST_SUMS = 64


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial sums: float64 if the result is float32 (common.total)."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def normalize(
    a: Tensor,  # (N, C, H, W)
    activation: str,
    norm: Norm,
    residual: Tensor | None,  # (N, C, H, W)
    updates: Sequence[Update] = (),  # two at most
) -> Tensor:  # (N, C, H, W)
    """norm(act(a)) (+ residual), and the running statistics, in one launch."""
    y, layout = torch.empty_like(a), layout_of(a)

    def call(config: tuning.Config, updates: Sequence[Update] = ()) -> None:
        config = layout.fit(config)
        grid = ceil_div(layout.count, config["BLOCK_P"]) * ceil_div(layout.channels, config["BLOCK_C"])
        widest = max((len(u.mean) for u in updates), default=0)
        moves = [(*u[:4], len(u.mean), u.count / max(u.count - 1, 1), u.momentum) for u in updates]
        first, second = [*moves, _NO_UPDATE, _NO_UPDATE][:2]
        normalize_kernel[(grid + ceil_div(widest, _BLOCK_UPDATE),)](
            a,
            *norm[:4],
            residual,
            y,
            *first,
            *second,
            *layout.sizes,
            norm.eps,
            **layout.units,
            ACT=ACTIVATIONS.index(activation),
            BLOCK_UPDATE=_BLOCK_UPDATE,
            **config,
            **OPTIONS,
        )

    # measuring repeats the launch, and statistics move once
    last = functools.partial(call, updates=updates)
    tuning.run("normalize" + layout.suffix, (a.dtype, *layout.key, activation), layout.device, call, last)
    return y


def norm_backward_parts(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor,  # (N, C, H, W)
    activation: str,
    norm: Norm,
) -> Tensor:  # (parts, 2, C)
    """Parts of sum dy and sum dy * hhat over N, H, W, in one launch."""
    layout = layout_of(dy)

    def call(config: tuning.Config) -> Tensor:
        config = _fit_sums(layout, config)
        groups = ceil_div(layout.channels, config["BLOCK_C"])
        blocks = ceil_div(layout.count, config["BLOCK_P"])
        parts, per_part = tuning.split(groups, blocks, layout.device, _MOST_SUMS)
        partials = dy.new_empty((parts, 2, layout.channels), dtype=partial_dtype(dy.dtype))
        norm_backward_kernel[(groups * parts,)](
            dy,
            a,
            norm.mean,
            norm.var,
            partials,
            *layout.sizes,
            per_part,
            parts,
            norm.eps,
            **layout.units,
            ACT=ACTIVATIONS.index(activation),
            **config,
            **OPTIONS,
        )
        return partials

    return tuning.run("norm_backward" + layout.suffix, (dy.dtype, *layout.key, activation), layout.device, call)


def _fit_sums(layout: Layout, config: tuning.Config) -> tuning.Config:
    """The configuration with fewer channels a block, 32 at least (64 bytes of them lie side by side), until _MOST_SUMS parts
    of each are enough programs for the device."""
    config = layout.fit(config)
    wanted = 4 * tuning.processors(layout.device)
    while config["BLOCK_C"] > 32 and ceil_div(layout.channels, config["BLOCK_C"]) * _MOST_SUMS < wanted:
        config = config | {"BLOCK_C": config["BLOCK_C"] // 2, "BLOCK_P": config["BLOCK_P"] * 2}
    return config


def norm_backward(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor,  # (N, C, H, W)
    activation: str,
    norm: Norm,
) -> tuple[Tensor, Tensor]:
    """sum dy and sum dy * hhat over N, H, W, (C,) float32 each, in two launches."""
    partials = norm_backward_parts(dy, a, activation, norm)
    sums = sum_parts(partials, dy.new_empty(partials.shape[1:], dtype=torch.float32))
    return sums[0], sums[1]


class UnfinishedSums(NamedTuple):
    """norm_backward's parts, which grad_prologue finishes, and the parameters' gradients, which it stores."""

    partials: Tensor  # (parts, 2, C)
    dbeta: Tensor | None  # (C,)
    dgamma: Tensor | None  # (C,)


def grad_prologue(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor | None,  # (N, C, H, W)
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | UnfinishedSums | None,
    want_da: bool,
    want_sums: bool,
    constant_statistics: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """da in dy's dtype, and (parts, C) partial sums of the unrounded da; None if not wanted. One launch.

    With `constant_statistics` the sums, unfinished then, are the parameters' gradients and no part of da.
    """
    layout = layout_of(dy)
    da = torch.empty_like(dy) if want_da else None
    # identity without a norm: da is dy, and a may not be there
    a = None if norm is None and activation == "identity" else a
    mean, var, gamma, _, eps = norm_arguments(norm)
    unfinished = sums if isinstance(sums, UnfinishedSums) else None
    finished = sums if unfinished is None and sums is not None else (None, None)
    sum_parts_ = 0 if unfinished is None else unfinished.partials.shape[0]

    def call(config: tuning.Config) -> Tensor | None:
        config = layout.fit(config)
        groups = ceil_div(layout.channels, config["BLOCK_C"])
        parts, per_part = tuning.split(groups, ceil_div(layout.count, config["BLOCK_P"]), layout.device)
        dtype = partial_dtype(dy.dtype)
        partials = dy.new_empty((parts, layout.channels), dtype=dtype) if want_sums else None
        grad_prologue_kernel[(groups * parts,)](
            dy,
            a,
            mean,
            var,
            gamma,
            *finished,
            *(unfinished or (None, None, None)),
            da,
            partials,
            *layout.sizes,
            per_part,
            parts,
            sum_parts_,
            float(layout.count),
            eps,
            **layout.units,
            BATCH=sums is not None and not constant_statistics,
            BLOCK_SUMS=min(2048 // config["BLOCK_C"], _MOST_SUMS),
            ACT=ACTIVATIONS.index(activation),
            **config,
            **OPTIONS,
        )
        return partials

    key = (dy.dtype, *layout.key, activation, norm is not None, want_da, want_sums)
    return da, tuning.run("grad_prologue" + layout.suffix, key, layout.device, call)


def sum_parts(
    partials: Tensor,  # (parts, ...)
    out: Tensor,  # (...)
    second_partials: Tensor | None = None,  # (parts, ...), of any number
    second: Tensor | None = None,  # (...)
) -> Tensor:
    """The ordered sums of partials over their parts into `out` and `second`, in their dtypes, in one launch; gives `out`."""
    parts, size = partials.shape[0], out.numel()
    second_parts, second_size = 0, 0
    if second_partials is not None:
        second_parts, second_size = second_partials.shape[0], second.numel()
    block_parts = min(32, power_of_2(max(parts, second_parts)))
    block = min(1024 // block_parts, power_of_2(size))
    sum_parts_kernel[(ceil_div(size, block) + ceil_div(second_size, block),)](
        partials,
        out,
        second_partials,
        second,
        parts,
        size,
        second_parts,
        second_size,
        BLOCK_PARTS=block_parts,
        BLOCK=block,
        num_warps=4,
        **OPTIONS,
    )
    return out


def merge(
    partials: Tensor,  # (parts, 3, C)
    count: int,
) -> tuple[Tensor, Tensor]:
    """mean and biased variance, (C,) float32, in one launch."""
    parts, _, channels = partials.shape
    mean, var = partials.new_empty(channels), partials.new_empty(channels)
    block_c = min(16, power_of_2(channels))
    merge_kernel[(ceil_div(channels, block_c),)](
        partials,
        mean,
        var,
        channels // unit(channels),
        parts,
        float(count),
        CHANNEL_UNIT=unit(channels),
        BLOCK_PARTS=min(64, power_of_2(parts)),
        BLOCK_C=block_c,
        num_warps=4,
        **OPTIONS,
    )
    return mean, var

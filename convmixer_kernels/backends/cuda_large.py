# SPDX-License-Identifier: MIT
"""Depthwise convolutions whose kernel spans more than 31, and dilated ones, by the native kernels of backend `cuda`.

    dilation                a dense kernel with zeros between the taps; its gradient is read back at the taps. A value of x that is not
                            finite reaches the outputs between the taps too
    taps beside the image   left out: of a dense kernel k on an image of w columns at most 2 w - 1 taps count
    channels_last           over 31: the operands are made contiguous, and the result channels_last again
    16-bit                  to 63 on tensor cores; over 63 float32 copies on FMA units
    weight gradient         over 31 in 16 bits: tensor cores compute at most 31 x 31 taps at a time, for which x is moved

Against kernels of so many products the copies are cheap: one of a 32x768x32x32 tensor takes an H100 36 us, its 31x31 convolution 189.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..primitives import Norm

#: What the native kernels take in both layouts, and on tensor cores in contiguous memory.
DIRECT = 31
_TENSOR_CORES = 63
#: On FMA units: a block's tile and weights fit into the shared memory of every GPU (99 KB).
LARGEST = 101


def span(weight: Tensor, dilation: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the dense kernel."""
    rows, columns = (d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True))
    return rows, columns


def converts(x: Tensor, weight: Tensor, dilation: tuple[int, int] = (1, 1)) -> bool:
    """Whether a convolution needs this file: the native kernels take operands of another form. No operand that is made here does."""
    kernel, largest = weight.shape[2:], max(weight.shape[2:])
    if dilation != (1, 1) or largest <= DIRECT:
        return dilation != (1, 1)
    beyond = any(k > 2 * n - 1 for k, n in zip(kernel, x.shape[2:], strict=True))
    return beyond or not x.is_contiguous() or (largest > _TENSOR_CORES and x.dtype != torch.float32)


def converts_weight_grad(x: Tensor, weight: Tensor, dilation: tuple[int, int]) -> bool:
    """As converts, for the weight gradient."""
    return converts(x, weight, dilation) or (max(weight.shape[2:]) > DIRECT and x.dtype != torch.float32)


def _inside(size: int, image: int) -> slice:
    """The taps of a dense kernel's line that can meet the image. They keep the place of the middle tap."""
    before = (size - 1) // 2
    return slice(max(0, before - (image - 1)), min(size, before + image))


def _dense(weight: Tensor, dilation: tuple[int, int], image: torch.Size) -> Tensor:
    """The taps that count, (C, 1, rows, columns), zeros between them."""
    if dilation != (1, 1):
        dense = weight.new_zeros(weight.shape[0], 1, *span(weight, dilation))
        dense[:, :, :: dilation[0], :: dilation[1]] = weight
        weight = dense
    rows, columns = (_inside(k, n) for k, n in zip(weight.shape[2:], image, strict=True))
    return weight[:, :, rows, columns].contiguous()


def _operand(t: Tensor, kernel: tuple[int, int]) -> Tensor:
    """t as a native kernel takes it for a dense kernel of this size."""
    if max(kernel) > DIRECT:
        t = t.contiguous()
    return t.float() if max(kernel) > _TENSOR_CORES else t


def _result(y: Tensor, like: Tensor) -> Tensor:
    return y.to(like.dtype).contiguous(
        memory_format=torch.contiguous_format if like.is_contiguous() else torch.channels_last
    )


def forward(
    native: Callable[..., Tensor],  # cuda.depthwise_eval
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    activation: str,
    norm: Norm | None,
    residual: bool,
    dilation: tuple[int, int],
) -> Tensor:  # (N, C, H, W)
    """As cuda.depthwise_eval."""
    dense = _dense(weight, dilation, x.shape[2:])
    operand = _operand(x, dense.shape[2:])
    return _result(native(operand, dense, bias, activation, norm, residual), x)


def input_grad(
    native: Callable[..., Tensor],  # cuda.depthwise_input_grad
    dy: Tensor,  # (N, C, H, W)
    a: Tensor | None,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    residual: bool,
    dilation: tuple[int, int],
) -> Tensor:  # (N, C, H, W)
    """As cuda.depthwise_input_grad."""
    dense = _dense(weight, dilation, dy.shape[2:])
    kernel = dense.shape[2:]
    operand, a = _operand(dy, kernel), None if a is None else _operand(a, kernel)
    return _result(native(operand, a, dense, activation, norm, sums, residual), dy)


def weight_grad(
    native: Callable[..., tuple[Tensor, Tensor | None]],  # cuda.depthwise_weight_grad
    prologue: Callable[..., tuple[Tensor, Tensor | None]],  # cuda.grad_prologue
    dy: Tensor,  # (N, C, H, W)
    a: Tensor | None,  # (N, C, H, W)
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor | None]:
    """As cuda.depthwise_weight_grad."""
    rows, columns = (_inside(k, n) for k, n in zip(span(weight, dilation), x.shape[2:], strict=True))
    kernel = rows.stop - rows.start, columns.stop - columns.start
    dense = weight.new_zeros(weight.shape[0], 1, *span(weight, dilation))
    chain = activation, norm, sums
    if max(kernel) <= DIRECT or x.dtype == torch.float32:
        operands = [None if t is None else _operand(t, kernel) for t in (dy, a, x)]
        dw, db = native(*operands, dense.new_empty(weight.shape[0], 1, *kernel), bias, *chain)
        dense[:, :, rows, columns] = dw
    else:
        chain, db = ("identity", None, None), None
        if a is not None:
            dy, db = prologue(dy, a, bias, activation, norm, sums)
        elif bias is not None:
            _, db = native(dy, None, x, dense.new_empty(weight.shape[0], 1, 1, 1), bias, *chain)
        for i, j in ((i, j) for i in _parts(rows) for j in _parts(columns)):
            moves = [_move(part, k, n) for part, k, n in zip((i, j), dense.shape[2:], x.shape[2:], strict=True)]
            moved = _moved(x, moves, [shift for shift, _, _ in moves])
            like = dense.new_empty(weight.shape[0], 1, i.stop - i.start, j.stop - j.start)
            dw, _ = native(_moved(dy, moves, [0, 0]), None, moved, like, None, *chain)
            dense[:, :, i, j] = dw
    return dense[:, :, :: dilation[0], :: dilation[1]].contiguous(), db


def _parts(taps: slice) -> list[slice]:
    """The taps in parts of at most DIRECT, as even as can be."""
    count = taps.stop - taps.start
    parts = -(-count // DIRECT)
    edges = [taps.start + count * i // parts for i in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def _move(part: slice, size: int, image: int) -> tuple[int, int, int]:
    """How a line of x is moved so that a kernel of the taps `part` sees what these taps see: the shift, and how many positions before
    and behind the image its taps read that hold values then."""
    count = part.stop - part.start
    before = (count - 1) // 2
    shift = before + part.start - (size - 1) // 2
    return shift, min(before, max(0, shift)), min(count - 1 - before, max(0, -shift))


def _moved(t: Tensor, moves: list[tuple[int, int, int]], shifts: list[int]) -> Tensor:
    """t'[z] = t[z + shift] for all positions z of the image and those around it that `moves` names; 0 where t has no value."""
    (_, above, below), (_, left, right) = moves
    # t' begins at position -before: it lacks shift - before values at the start, and has so many zeros more at the end
    pads = (left - shifts[1], right + shifts[1], above - shifts[0], below + shifts[0])
    layout = torch.contiguous_format if t.is_contiguous() else torch.channels_last
    return F.pad(t, pads).contiguous(memory_format=layout)

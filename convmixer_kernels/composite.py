# SPDX-License-Identifier: MIT
"""The operators in torch's own differentiable operations, for calls that a kernel cannot serve: torch.func's transforms and
forward-mode differentiation; in the backward also a graph of it (create_graph) and a batch of gradients.

A backward here is the derivative of the operator's equivalent, from what the Functions save. Where that lacks x or the bias of
then, their `a` gives the convolution its value: derivatives ask no more of either than its place in the graph, and a `stand_in`
has x's without its memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import checks, gates
from .primitives import Block, Grads, Needs, Options, Statistics, activate, convolution


def transformed() -> bool:
    """Whether this file must replace the operators: a transform is active, and no compiler, which traces operators under it."""
    return not torch.compiler.is_compiling() and gates.transformed()


def replaces_backward(dy: Tensor) -> bool:
    """Whether a backward of dy is itself differentiated (create_graph) or batched (is_grads_batched)."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy) or gates.transformed()


def _without_autocast(t: Tensor) -> contextlib.AbstractContextManager:
    """No autocast: functional.py has cast already."""
    kind = t.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def block_forward(
    kind: str,  # "depthwise" or "pointwise"
    x: Tensor,  # (N, C, H, W)
    block: Block,
    running: Statistics,
    options: Options,
    a: Tensor | None = None,  # (N, C_out, H, W): the convolution's value, if it is known
) -> Tensor:  # (N, C_out, H, W)
    """The equivalent of the operators' docstrings, with the norm in float32 beside 16-bit tensors, as in the kernels."""
    convolved = convolution_forward(x, block.weight, block.bias, x.shape[1] if kind == "depthwise" else 1)
    if a is not None:
        _set_value(convolved, a)
    h = activate(_wide(convolved), options.activation)
    tensors = [None if t is None else _wide(t) for t in (*running, block.norm_weight, block.norm_bias)]
    y = F.batch_norm(h, *tensors, options.batch_statistics, options.momentum, options.eps)
    if options.batch_statistics:
        for t, updated in zip(running, tensors[:2], strict=True):
            if updated is not t:
                t.copy_(updated)
    return (y + x if options.residual else y).to(x.dtype)


def convolution_forward(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW), or (C_out, C, 1, 1) with one group
    bias: Tensor | None,  # (C_out,)
    groups: int,
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:  # (N, C_out, H, W)
    """The convolution of padding "same"."""
    with _without_autocast(x):
        return convolution(x, weight, bias, groups, dilation=dilation)


def _set_value(t: Tensor, value: Tensor) -> None:
    """Set t's value; its place in the graph, and so its derivative, stays."""
    with torch.no_grad():
        t.copy_(value)


class _StandIn(Function):
    @staticmethod
    def forward(ctx, x):
        return x.new_empty_strided(x.shape, (0, 0, 0, 0)).zero_()

    @staticmethod
    def backward(ctx, dx):
        return dx


def stand_in(x: Tensor) -> Tensor:
    """A tensor of x's shape and dtype whose gradient is x's, with a storage of one element."""
    with torch.enable_grad():
        return _StandIn.apply(x)


def with_value(t: Tensor, value: Tensor) -> Tensor:
    """`value` with t's place in the graph."""
    with torch.enable_grad():
        t = t.clone()
    _set_value(t, value)
    return t


def block_backward(
    dy: Tensor,  # (N, C_out, H, W)
    kind: str,
    x: Tensor | None,  # (N, C, H, W), or its stand_in; None if neither it nor the weight needs a gradient
    a: Tensor | None,  # (N, C_out, H, W), if x or the bias no longer has the forward's value
    block: Block,
    statistics: Statistics,
    options: Options,
    needs: Needs,  # x, weight, bias, norm_weight, norm_bias
) -> Grads:
    """As autograd.block_backward, differentiable in dy, x and the block's tensors if gradients are enabled."""
    running = _constants(statistics, options)
    _check_memory(x, a, *block, *running)

    def forward(x: Tensor, *tensors: Tensor | None) -> Tensor:
        return block_forward(kind, x, block._make(tensors), running, options, a)

    return _gradients(forward, (_or_zeros(x, dy, block.weight, kind), *block), needs, dy)


def mixer_backward(
    dy: Tensor,  # (N, C_out, H, W)
    x: Tensor | None,  # (N, C, H, W), or its stand_in; None if neither it nor a weight needs a gradient
    a: tuple[Tensor | None, Tensor | None],  # as block_backward's
    blocks: tuple[Block, Block],
    statistics: tuple[Statistics, Statistics],
    options: Options,
    needs: Needs,  # x, the depthwise block's four tensors, the pointwise block's four
) -> Grads:
    """As autograd.mixer_backward, differentiable as block_backward is."""
    running = tuple(_constants(s, options) for s in statistics)
    _check_memory(x, *a, *blocks[0], *blocks[1], *running[0], *running[1])

    def forward(x: Tensor, *tensors: Tensor | None) -> Tensor:
        z = block_forward("depthwise", x, blocks[0]._make(tensors[:4]), running[0], options, a[0])
        return block_forward(
            "pointwise", z, blocks[1]._make(tensors[4:]), running[1], options._replace(residual=False), a[1]
        )

    x = _or_zeros(x, dy, blocks[1].weight, "pointwise")
    return _gradients(forward, (x, *blocks[0], *blocks[1]), needs, dy)


def convolution_backward(
    dy: Tensor,  # (N, C, H, W)
    x: Tensor | None,  # (N, C, H, W), if the weight needs a gradient
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    needs: Needs,  # x, weight, bias
    dilation: tuple[int, int],
) -> Grads:
    """As autograd.convolution_backward, differentiable as block_backward is."""
    _check_memory(x, weight, bias)
    x = _or_zeros(x, dy, weight, "depthwise")

    def forward(x: Tensor, *tensors: Tensor | None) -> Tensor:
        return convolution_forward(x, *tensors, x.shape[1], dilation)

    return _gradients(forward, (x, weight, bias), needs, dy)


def _check_memory(*saved: Tensor | None) -> None:
    """torch's own operations read freed memory."""
    if torch.compiler.is_compiling():
        return
    for t in saved:
        if t is not None and not torch._C._functorch.is_functorch_wrapped_tensor(t):
            checks.check_reach("a backward of a backward", "a saved tensor", t)


def _constants(statistics: Statistics, options: Options) -> Statistics:
    """What the norm is given: statistics of the batch depend on x, and running ones have been updated already."""
    return statistics._make((None, None)) if options.batch_statistics else statistics


def _or_zeros(x: Tensor | None, like: Tensor, weight: Tensor, kind: str) -> Tensor:
    if x is not None:
        return x
    n, channels, height, width = like.shape
    return _zero(like).expand(n, channels if kind == "depthwise" else weight.shape[1], height, width)


def _gradients(function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], needs: Needs, dy: Tensor) -> Grads:
    """The gradients of function(*inputs) in the inputs that `needs` names, each by itself, and their graph if it is wanted."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), _without_autocast(dy):
        # one input may be computed from another, or be the same tensor: the graph of each begins here
        inputs = tuple(_begin(t, need) for t, need in zip(inputs, needs, strict=True))
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        grads = iter(
            torch.autograd.grad(function(*inputs), wanted, dy, create_graph=create_graph, materialize_grads=True)
        )
    return tuple(next(grads) if need else None for need in needs)


def _begin(t: Tensor | None, need: bool) -> Tensor | None:
    if t is None or not need:
        return None if t is None else t.detach()
    t = t.view_as(t)
    # a leaf may have been frozen since; requires_grad_() does not work under a transform
    return t if t.requires_grad else t + _zero(t)


def _zero(like: Tensor) -> Tensor:
    """A zero that requires a gradient. `like` itself may be batched."""
    return torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)

# SPDX-License-Identifier: MIT
"""The maths of the operators, once: forward and backward over a backend's primitives.

An operator is a pair of plain functions, `*_forward` and `*_backward`, that know no autograd. Two callers wrap them: the
torch.autograd.Functions at the end (eager mode: the least overhead) and the registered operators of ops.py (compile,
export, modes). The formulas are those of backends/base.py, with the activation before the batch norm:
a = conv(x) + b, y = (act(a) - mean) * rstd * gamma + beta.

Activation-sized tensors saved for the backward: depthwise_block x and a, pointwise_block x and a, mixer_layer x and
both a: its z is rebuilt from x and the depthwise a. What no gradient needs is not saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import checks
from .backends.base import MixerEval, Norm, Update

Sums = tuple[Tensor, Tensor]
Grads = tuple[Tensor | None, ...]
Needs = tuple[bool, ...]


class Block(NamedTuple):
    """The tensors of one block that gradients may be asked for."""

    weight: Tensor  # (C, 1, kH, kW) or (C_out, C_in, 1, 1)
    bias: Tensor | None  # (C,)
    norm_weight: Tensor | None  # (C,)
    norm_bias: Tensor | None  # (C,)


class Statistics(NamedTuple):
    """Batch norm's mean and biased variance, (C,) each: running ones, or a batch's."""

    mean: Tensor | None
    var: Tensor | None


#: Names of the tensors that a forward reads, and that a backward does.
_BLOCK_TENSORS = ("x", *Block._fields, "running_mean", "running_var")
_READ_BACKWARD = ("dy", "x", "a", "weight", "norm_weight", "mean", "var")
_READ_FOR_Z = ("x", "depthwise a", "depthwise_norm_weight", "depthwise_norm_bias", "depthwise mean", "depthwise var")
MIXER_TENSORS = ("x", *(f"{half}_{name}" for half in ("depthwise", "pointwise") for name in _BLOCK_TENSORS[1:]))


class Options(NamedTuple):
    """What an operator is told beside its tensors."""

    batch_statistics: bool  # normalise by the batch's statistics and update the running ones, else by the running ones
    momentum: float
    eps: float
    activation: str
    residual: bool  # of a depthwise block
    save: bool  # whether a backward may follow


def autocast_enabled(device_type: str) -> bool:
    """torch.is_autocast_enabled, False for a device that has no autocast (meta)."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """functional.py has cast already: in here a dtype means what it says (the reference backend calls torch)."""

    @functools.wraps(function)
    def wrapped(backend: ModuleType, tensor: Tensor, *args: Any) -> Any:
        kind = tensor.device.type
        if not autocast_enabled(kind):
            return function(backend, tensor, *args)
        with torch.autocast(kind, enabled=False):
            return function(backend, tensor, *args)

    return wrapped


def match_format(dy: Tensor, like: Tensor) -> Tensor:
    """dy in `like`'s memory format: itself where it has it. Gradients arrive in any layout, expanded ones too."""
    return _in_format(dy, like.is_contiguous())


def _in_format(dy: Tensor, contiguous: bool) -> Tensor:
    if dy._is_zerotensor():
        dy = dy.clone()  # it has no memory
    elif not dy.is_contiguous():
        checks.check_reach("the backward", "dy", dy)
    # a negative view's memory holds the opposite values
    return dy.resolve_neg().contiguous(memory_format=torch.contiguous_format if contiguous else torch.channels_last)


def _strided_like(dw: Tensor, weight: Tensor) -> Tensor:
    """dw with the weight's strides: a contiguous weight may have those of channels_last, and DDP wants them of a gradient."""
    if dw.stride() == weight.stride() or not dw.is_contiguous():
        return dw
    return dw.as_strided(weight.shape, weight.stride())


def _norm(block: Block, statistics: Statistics, options: Options) -> Norm:
    return Norm(statistics.mean, statistics.var, block.norm_weight, block.norm_bias, options.eps)


# ---- depthwise_block and pointwise_block --------------------------------------------------------------------------


def _preactivation(
    backend: ModuleType, x: Tensor, kind: str, block: Block, running: Statistics, options: Options
) -> tuple[Tensor, Statistics]:
    """a, and the statistics that act(a) is normalised by."""
    depthwise = kind == "depthwise"
    convolution = (x, block.weight, block.bias)
    if options.batch_statistics:
        train = backend.depthwise_train if depthwise else backend.pointwise_train
        a, mean, var = train(*convolution, options.activation)
        return a, Statistics(mean, var)
    evaluate = backend.depthwise_eval if depthwise else backend.pointwise_eval
    return evaluate(*convolution, "identity", None, *((False,) if depthwise else ())), running


def _update(a: Tensor, running: Statistics, batch: Statistics, options: Options) -> tuple[Update, ...]:
    """How `running` moves; nothing where it is not tracked or was itself used."""
    if running is batch or (running.mean is None and running.var is None):
        return ()
    return (Update(*running, *batch, a.numel() // a.shape[1], options.momentum),)


def _normalize(
    backend: ModuleType,
    a: Tensor,
    block: Block,
    statistics: Statistics,
    options: Options,
    residual: Tensor | None,
    updates: tuple[Update, ...],
) -> Tensor:
    """The forward's last pass. Running statistics move in it: a call that fails before has changed nothing."""
    y = backend.normalize(a, options.activation, _norm(block, statistics, options), residual, updates)
    for update in updates:
        for t in update[:2]:
            if t is not None:
                # a native kernel writes past the version counter, which guards what an earlier eval saved
                torch.autograd.graph.increment_version(t)
    return y


@_without_autocast
def block_forward(
    backend: ModuleType,
    x: Tensor,  # (N, C, H, W)
    kind: str,  # "depthwise" or "pointwise"
    block: Block,
    running: Statistics,
    options: Options,
) -> tuple[Tensor, Tensor | None, Statistics]:
    """y, a (None where no backward follows) and the statistics that y is normalised by."""
    checks.check_memory(f"{kind}_block", _BLOCK_TENSORS, x, *block, *running)
    if not options.batch_statistics and not options.save:
        residual = (options.residual,) if kind == "depthwise" else ()
        evaluate = backend.depthwise_eval if kind == "depthwise" else backend.pointwise_eval
        norm = _norm(block, running, options)
        return evaluate(x, block.weight, block.bias, options.activation, norm, *residual), None, running
    a, statistics = _preactivation(backend, x, kind, block, running, options)
    residual = x if kind == "depthwise" and options.residual else None
    updates = _update(a, running, statistics, options)
    return _normalize(backend, a, block, statistics, options, residual, updates), a, statistics


@_without_autocast
def block_backward(
    backend: ModuleType,
    dy: Tensor,  # (N, C, H, W)
    kind: str,
    x: Tensor | None,  # (N, C, H, W), where the weight needs a gradient
    a: Tensor,  # (N, C, H, W)
    block: Block,
    statistics: Statistics,
    options: Options,
    needs: Needs,  # x, weight, bias, norm_weight, norm_bias
) -> Grads:
    """The gradients of x, weight, bias, norm_weight and norm_bias; None where `needs` is False."""
    read = (block.weight if needs[0] else None, block.norm_weight, *statistics)
    checks.check_memory(f"{kind}_block's backward", _READ_BACKWARD, dy, x, a, *read)
    dy = match_format(dy, a)
    norm = _norm(block, statistics, options)
    whole = getattr(backend, f"{kind}_block_backward", None)
    if whole is not None:
        how = (options.activation, norm, options.batch_statistics, options.residual)
        grads = whole(dy, a, x, block.weight, block.bias, *how, tuple(needs))
        if grads is not None:
            return grads
    sums: Sums | None = None
    if any(needs[3:]) or (options.batch_statistics and any(needs)):
        sums = backend.norm_backward(dy, a, options.activation, norm)
    chain = (options.activation, norm, sums if options.batch_statistics else None)
    dx = dw = db = None
    if kind == "depthwise":
        if needs[0]:
            dx = backend.depthwise_input_grad(dy, a, block.weight, *chain, options.residual)
        if needs[1] or needs[2]:
            # for the bias alone any tensor of x's shape will do
            source = a if x is None else x
            dw, db = backend.depthwise_weight_grad(dy, a, source, block.weight, block.bias, *chain)
    elif any(needs[:3]):
        dx, dw, db = backend.pointwise_backward(dy, a, x, block.weight, block.bias, *chain, tuple(needs[:3]))
    dgamma = sums[1].to(block.norm_weight.dtype) if needs[3] else None
    dbeta = sums[0].to(block.norm_bias.dtype) if needs[4] else None
    return dx, _strided_like(dw, block.weight) if needs[1] else None, db if needs[2] else None, dgamma, dbeta


# ---- mixer_layer ------------------------------------------------------------------------------------------------------


@_without_autocast
def mixer_forward(
    backend: ModuleType,
    x: Tensor,  # (N, C, H, W)
    blocks: tuple[Block, Block],  # depthwise, pointwise
    running: tuple[Statistics, Statistics],
    options: Options,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None], tuple[Statistics, Statistics]]:
    """y, both a and both statistics, as block_forward of the one and then the other."""
    checks.check_memory("mixer_layer", MIXER_TENSORS, x, *blocks[0], *running[0], *blocks[1], *running[1])
    if not options.batch_statistics and not options.save:
        norms = [_norm(b, s, options) for b, s in zip(blocks, running, strict=True)]
        convolutions = [(b.weight, b.bias) for b in blocks]
        y = None
        if hasattr(backend, "mixer_eval"):
            layer = MixerEval(options.activation, (*convolutions[0], norms[0]), (*convolutions[1], norms[1]))
            y = backend.mixer_eval(x, (layer,), options.residual)
        if y is None:
            z = backend.depthwise_eval(x, *convolutions[0], options.activation, norms[0], options.residual)
            y = backend.pointwise_eval(z, *convolutions[1], options.activation, norms[1])
        return y, (None, None), running
    a, depthwise = _preactivation(backend, x, "depthwise", blocks[0], running[0], options)
    updates = _update(a, running[0], depthwise, options)
    z = _normalize(backend, a, blocks[0], depthwise, options, x if options.residual else None, ())
    a_pointwise, pointwise = _preactivation(backend, z, "pointwise", blocks[1], running[1], options)
    updates += _update(a_pointwise, running[1], pointwise, options)
    y = _normalize(backend, a_pointwise, blocks[1], pointwise, options, None, updates)
    return y, (a, a_pointwise), (depthwise, pointwise)


@_without_autocast
def mixer_backward(
    backend: ModuleType,
    dy: Tensor,  # (N, C_out, H, W)
    x: Tensor | None,  # (N, C, H, W), where either weight needs a gradient
    a: tuple[Tensor, Tensor],
    blocks: tuple[Block, Block],
    statistics: tuple[Statistics, Statistics],
    options: Options,
    needs: Needs,  # x, the depthwise block's four tensors, the pointwise block's four
) -> Grads:
    """The gradients in the order of `needs`; None where it is False."""
    below = any(needs[:5])
    z = None
    if needs[5]:
        read = (a[0], blocks[0].norm_weight, blocks[0].norm_bias, *statistics[0])
        checks.check_memory("mixer_layer's backward", _READ_FOR_Z, x, *read)
        norm = _norm(blocks[0], statistics[0], options)
        z = backend.normalize(a[0], options.activation, norm, x if options.residual else None)
    upper = block_backward(backend, dy, "pointwise", z, a[1], blocks[1], statistics[1], options, (below, *needs[5:]))
    lower: Grads = (None,) * 5
    if below:
        lower = block_backward(
            backend, upper[0], "depthwise", x, a[0], blocks[0], statistics[0], options, tuple(needs[:5])
        )
    return *lower, *upper[1:]


# ---- depthwise_conv2d -------------------------------------------------------------------------------------------------


@_without_autocast
def convolution_forward(backend: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The plain depthwise convolution: a block without activation and norm."""
    checks.check_memory("depthwise_conv2d", ("x", "weight", "bias"), x, weight, bias)
    return backend.depthwise_eval(x, weight, bias, "identity", None, False)


@_without_autocast
def convolution_backward(
    backend: ModuleType,
    dy: Tensor,  # (N, C, H, W)
    x: Tensor | None,  # (N, C, H, W), where the weight needs a gradient
    contiguous: bool,  # x's memory format
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    needs: Needs,  # x, weight, bias
) -> Grads:
    """The gradients of x, weight and bias; None where `needs` is False."""
    checks.check_memory("depthwise_conv2d's backward", ("dy", "x", "weight"), dy, x, weight if needs[0] else None)
    dy = _in_format(dy, contiguous)
    dx = dw = db = None
    if needs[0]:
        dx = backend.depthwise_input_grad(dy, None, weight, "identity", None, None, False)
    if needs[1] or needs[2]:
        source = dy if x is None else x
        dw, db = backend.depthwise_weight_grad(dy, None, source, weight, bias, "identity", None, None)
    return dx, _strided_like(dw, weight) if needs[1] else None, db if needs[2] else None


# ---- autograd Functions -----------------------------------------------------------------------------------------------


def _once_differentiable(backward: Callable[..., Grads]) -> Callable[..., Grads]:
    """torch's decorator of that name lets a second derivative pass as 0 where dy is a constant; this one always raises."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, dy: Tensor) -> Grads:
        with torch.no_grad():
            grads = backward(ctx, dy)
        if not torch.is_grad_enabled():
            return grads
        # create_graph=True
        error = torch._C._functions.DelayedError(
            b"convmixer_kernels: the operators are differentiable once; for second derivatives run the equivalent in torch's "
            b"operations (convmixer.reference)",
            len(grads),
        )
        return error(*(None if g is None else g.detach().requires_grad_() for g in grads))

    return wrapped


def _unsaved(bias: Tensor | None) -> Tensor | None:
    """A bias for its presence and dtype, which is all that a backward asks of it: it may change in between, as in eager."""
    return None if bias is None else bias.detach()


class BlockFunction(Function):
    """depthwise_block and pointwise_block in eager mode."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm_weight, norm_bias, running, kind, options, backend):
        block = Block(weight, bias, norm_weight, norm_bias)
        y, a, statistics = block_forward(backend, x, kind, block, running, options)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, a, weight, norm_weight, *statistics)
        ctx.biases = _unsaved(bias), _unsaved(norm_bias)
        ctx.kind, ctx.options, ctx.backend = kind, options, backend
        return y

    @staticmethod
    @_once_differentiable
    def backward(ctx, dy):
        x, a, weight, norm_weight, *statistics = ctx.saved_tensors
        block, statistics = Block(weight, ctx.biases[0], norm_weight, ctx.biases[1]), Statistics(*statistics)
        needs = ctx.needs_input_grad[:5]
        grads = block_backward(ctx.backend, dy, ctx.kind, x, a, block, statistics, ctx.options, needs)
        return (
            *grads,
            None,  # running
            None,  # kind
            None,  # options
            None,  # backend
        )


class MixerFunction(Function):
    """mixer_layer in eager mode."""

    @staticmethod
    def forward(ctx, x, w1, b1, g1, h1, w2, b2, g2, h2, running, options, backend):
        blocks = Block(w1, b1, g1, h1), Block(w2, b2, g2, h2)
        y, a, statistics = mixer_forward(backend, x, blocks, running, options)
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] or needs[5] else None, *a, w1, g1, w2, g2, *statistics[0], *statistics[1])
        # z is rebuilt with h1's values of now
        ctx.biases = _unsaved(b1), None if h1 is None else h1.detach().clone(), _unsaved(b2), _unsaved(h2)
        ctx.options, ctx.backend = options, backend
        return y

    @staticmethod
    @_once_differentiable
    def backward(ctx, dy):
        x, a1, a2, w1, g1, w2, g2, *rest = ctx.saved_tensors
        b1, h1, b2, h2 = ctx.biases
        blocks = Block(w1, b1, g1, h1), Block(w2, b2, g2, h2)
        statistics = Statistics(*rest[:2]), Statistics(*rest[2:])
        needs = ctx.needs_input_grad[:9]
        grads = mixer_backward(ctx.backend, dy, x, (a1, a2), blocks, statistics, ctx.options, needs)
        return (
            *grads,
            None,  # running
            None,  # options
            None,  # backend
        )


class ConvolutionFunction(Function):
    """depthwise_conv2d in eager mode."""

    @staticmethod
    def forward(ctx, x, weight, bias, backend):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.bias = _unsaved(bias)
        ctx.contiguous, ctx.backend = x.is_contiguous(), backend
        return convolution_forward(backend, x, weight, bias)

    @staticmethod
    @_once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = convolution_backward(ctx.backend, dy, x, ctx.contiguous, weight, ctx.bias, needs)
        return (
            *grads,
            None,  # backend
        )

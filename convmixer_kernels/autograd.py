# SPDX-License-Identifier: MIT
"""The maths of the operators, once: forward and backward over a backend's primitives.

An operator is a pair of plain functions, `*_forward` and `*_backward`, that know no autograd. Two callers wrap them: the
torch.autograd.Functions at the end (eager mode: the least overhead) and the registered operators of ops.py (compile,
export, modes). The formulas are those of primitives.py, with the activation before the batch norm:
a = conv(x) + b, y = (act(a) - mean) * rstd * gamma + beta.

Activation-sized tensors saved for the backward: depthwise_block x and a, pointwise_block x and a, mixer_layer x and
both a: its z is rebuilt from x and the depthwise a. What no gradient needs is not saved. Hooks for saved tensors may bring
one back in another layout: each is checked and brought to the format that a primitive is told.

Where a backward is differentiated or batched itself, composite.py takes its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import checks, composite, distributed, prepared
from .primitives import Block, Grads, MixerEval, Needs, Norm, Options, Statistics, Update, wide

Sums = tuple[Tensor, Tensor]


#: Names of the tensors that a forward reads, and that a backward does.
_BLOCK_TENSORS = ("x", *Block._fields, "running_mean", "running_var")
_READ_BACKWARD = ("dy", "x", "a", "weight", "norm_weight", "mean", "var")
MIXER_TENSORS = ("x", *(f"{half}_{name}" for half in ("depthwise", "pointwise") for name in _BLOCK_TENSORS[1:]))


def autocast_enabled(device_type: str) -> bool:
    """torch.is_autocast_enabled, False for a device that has no autocast (meta)."""
    return (
        torch._C._is_any_autocast_enabled()  # the quick answer
        and torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
    )


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast off: functional.py has cast already, and the reference backend calls torch."""

    @functools.wraps(function)
    def wrapped(backend: ModuleType, tensor: Tensor, *args: Any) -> Any:
        kind = tensor.device.type
        if not autocast_enabled(kind):
            return function(backend, tensor, *args)
        with torch.autocast(kind, enabled=False):
            return function(backend, tensor, *args)

    return wrapped


def in_format(t: Tensor, contiguous: bool) -> Tensor:
    """t contiguous, or channels_last: itself if it is already. Gradients arrive in any layout, expanded ones too."""
    if t._is_zerotensor():
        t = t.clone()  # it has no memory
    # a negative view's memory holds the opposite values
    return t.resolve_neg().contiguous(memory_format=torch.contiguous_format if contiguous else torch.channels_last)


def takes_contiguous(x: Tensor) -> bool:
    """The format of an operator's result: x's own, or the one that its strides resemble."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x.is_contiguous()
    return x.shape[1] == 1 or x.stride(1) != 1


def dense_input(x: Tensor) -> Tensor:
    """x contiguous or channels_last: itself if it is already."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return in_format(x, takes_contiguous(x))


def all_contiguous(*tensors: Tensor | None) -> bool:
    """Whether tensors of one format are contiguous: False if one of them is only channels_last (one channel or pixel is both)."""
    return all(t is None or t.is_contiguous() for t in tensors)


def dense_parameter(t: Tensor | None) -> Tensor | None:
    """t contiguous, and not a view of memory that holds the opposite values."""
    return t if t is None or (t.is_contiguous() and not t.is_neg()) else t.resolve_neg().contiguous()


def _check_strided(op: str, dy: Tensor | None) -> None:
    """What check_memory leaves out: gaps between the elements of an incoming gradient."""
    if dy is not None and not (dy.is_contiguous() or dy.is_contiguous(memory_format=torch.channels_last)):
        checks.check_reach(op, "dy", dy)


def _restored(
    kind: str,
    dy: Tensor | None,
    x: Tensor | None,
    a: Tensor,
    block: Block,
    statistics: Statistics,
    weight_read: bool,
    x_needed: bool,
    contiguous: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Block, Statistics]:
    """dy, x, a, the block and its statistics, checked and in the layout of the forward, whatever hooks made of them."""
    read = (block.weight if weight_read else None, block.norm_weight, *statistics)
    checks.check_memory(f"{kind}_block's backward", _READ_BACKWARD, dy, x, a, *read)
    _check_strided(f"{kind}_block's backward", dy)
    as_saved = _is_as_saved(kind, dy, x, a, (block.weight, block.norm_weight, *statistics), x_needed)
    if not as_saved:
        checks.check_block_backward(f"{kind}_block_backward", "", kind, dy, x, a, block, statistics, x_needed)
        block, statistics = Block(*map(dense_parameter, block)), Statistics(*map(dense_parameter, statistics))
    dy = None if dy is None else in_format(dy, contiguous)
    if not (as_saved and contiguous and all_contiguous(a, x)):
        x, a = None if x is None else in_format(x, contiguous), in_format(a, contiguous)
    return dy, x, a, block, statistics


def _is_as_saved(
    kind: str, dy: Tensor | None, x: Tensor | None, a: Tensor, parameters: Sequence[Tensor | None], x_needed: bool
) -> bool:
    """A quick look, which nearly always ends in True: right shapes, dtypes and devices, nothing strided or negative."""
    shape, dtype, device = a.shape, a.dtype, a.device
    channels, filters = shape[1], parameters[0].shape
    if kind == "depthwise":
        right, x_shape = len(filters) == 4 and filters[1] == 1, shape
    else:
        right, x_shape = filters[2:] == (1, 1), (shape[0], filters[1], *shape[2:])
    if not right or (x is None and x_needed) or a.is_neg():
        return False
    for t, expected in ((dy, shape), (x, x_shape)):
        if t is not None and (t.shape != expected or t.dtype != dtype or t.device != device or t.is_neg()):
            return False
    for t in parameters:
        if t is not None and (
            t.shape[0] != channels
            or (t.dtype != dtype and (t.dtype != torch.float32 or dtype == torch.float64))
            or t.device != device
            or not t.is_contiguous()
            or t.is_neg()
        ):
            return False
    return True


def _strided_like(dw: Tensor, weight: Tensor) -> Tensor:
    """dw with the weight's strides, which DDP requires: a contiguous weight can have the strides of channels_last."""
    if dw.stride() == weight.stride() or not dw.is_contiguous():
        return dw
    return dw.as_strided(weight.shape, weight.stride())


def _norm(block: Block, statistics: Statistics, options: Options) -> Norm:
    return Norm(statistics.mean, statistics.var, block.norm_weight, block.norm_bias, options.eps)


def _preactivation(
    backend: ModuleType, x: Tensor, kind: str, block: Block, running: Statistics, options: Options
) -> tuple[Tensor, Statistics, tuple[Update, ...]]:
    """a, the statistics that act(a) is normalised by, and how the running ones move."""
    depthwise = kind == "depthwise"
    convolution = (x, block.weight, block.bias)
    if not options.batch_statistics:
        evaluate = backend.depthwise_eval if depthwise else backend.pointwise_eval
        return evaluate(*convolution, "identity", None, *((False,) if depthwise else ())), running, ()
    if x.numel() == 0:
        # other ranks have images
        a = x.new_empty((x.shape[0], block.weight.shape[0], *x.shape[2:]))
        batch = Statistics(*(wide(x.new_zeros(a.shape[1])) for _ in range(2)))
    else:
        train = backend.depthwise_train if depthwise else backend.pointwise_train
        a, mean, var = train(*convolution, options.activation)
        batch = Statistics(mean, var)
    count = a.numel() // a.shape[1]
    if options.group is not None:
        return a, *distributed.merge_statistics(options.group, batch, running, count, options.momentum)
    if running.mean is None and running.var is None:
        return a, batch, ()
    return a, batch, (Update(*running, *batch, count, options.momentum),)


def _normalize(
    backend: ModuleType,
    a: Tensor,
    block: Block,
    statistics: Statistics,
    options: Options,
    residual: Tensor | None,
    updates: tuple[Update, ...] = (),
) -> Tensor:
    """The forward's last pass. Running statistics move in it: a call that fails before has changed nothing."""
    norm = _norm(block, statistics, options)
    if a.numel() == 0:
        # other ranks' batches move the statistics here too, by the same primitive, to the same bits
        if updates:
            backend.normalize(a.new_zeros(1, a.shape[1], 1, 1), options.activation, norm, None, updates)
        y = torch.empty_like(a)
    else:
        y = backend.normalize(a, options.activation, norm, residual, updates)
    _count_versions(*(t for update in updates for t in update[:2]))
    return y


def _count_versions(*running: Tensor | None) -> None:
    """Native kernels do not count versions of what they write; autograd must notice if an earlier eval saved a running statistic."""
    if moved := [t for t in running if t is not None]:
        torch.autograd.graph.increment_version(moved)


@_without_autocast
def block_forward(
    backend: ModuleType,
    x: Tensor,  # (N, C, H, W)
    kind: str,  # "depthwise" or "pointwise"
    block: Block,
    running: Statistics,
    options: Options,
) -> tuple[Tensor, Tensor | None, Statistics]:
    """y, a (None if no backward follows) and the statistics used for the norm."""
    checks.check_memory(f"{kind}_block", _BLOCK_TENSORS, x, *block, *running)
    if not options.batch_statistics and not options.save:
        residual = (options.residual,) if kind == "depthwise" else ()
        evaluate = backend.depthwise_eval if kind == "depthwise" else backend.pointwise_eval
        norm = _norm(block, running, options)
        return evaluate(x, block.weight, block.bias, options.activation, norm, *residual), None, running
    a, statistics, updates = _preactivation(backend, x, kind, block, running, options)
    residual = x if kind == "depthwise" and options.residual else None
    return _normalize(backend, a, block, statistics, options, residual, updates), a, statistics


@_without_autocast
def block_backward(
    backend: ModuleType,
    dy: Tensor,  # (N, C, H, W)
    kind: str,
    x: Tensor | None,  # (N, C, H, W), if the weight needs a gradient
    a: Tensor,  # (N, C, H, W)
    block: Block,
    statistics: Statistics,
    options: Options,
    needs: Needs,  # x, weight, bias, norm_weight, norm_bias
    contiguous: bool,  # x's memory format in the forward
) -> Grads:
    """The gradients of x, weight, bias, norm_weight and norm_bias; None if `needs` is False."""
    restored = _restored(kind, dy, x, a, block, statistics, needs[0], needs[1], contiguous)
    return _block_gradients(backend, kind, *restored, options, needs)


def _block_gradients(
    backend: ModuleType,
    kind: str,
    dy: Tensor,
    x: Tensor | None,
    a: Tensor,
    block: Block,
    statistics: Statistics,
    options: Options,
    needs: Needs,
) -> Grads:
    norm = _norm(block, statistics, options)
    whole = getattr(backend, f"{kind}_block_backward", None)
    if whole is not None and options.group is None:
        how = (options.activation, norm, options.batch_statistics, options.residual)
        grads = whole(dy, a, x, block.weight, block.bias, *how, tuple(needs))
        if grads is not None:
            return grads
    sums: Sums | None = None
    if any(needs[3:]) or (options.batch_statistics and any(needs)):
        sums = _sums(backend, dy, a, norm, options)
    of_batch = sums if options.batch_statistics else None
    if options.group is not None and any(needs[:3]):
        of_batch = distributed.merge_sums(options.group, sums, a.numel() // a.shape[1])
    if a.numel() == 0:
        return _empty_gradients(kind, dy, block, needs)
    chain = (options.activation, norm, of_batch)
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


def _sums(backend: ModuleType, dy: Tensor, a: Tensor, norm: Norm, options: Options) -> Sums:
    """norm_backward's sums over this rank's batch: what its parameters' gradients are, also if the statistics are of all ranks."""
    if a.numel() == 0:
        zeros = torch.zeros_like(norm.mean)
        return zeros, zeros
    return backend.norm_backward(dy, a, options.activation, norm)


def _empty_gradients(kind: str, dy: Tensor, block: Block, needs: Needs) -> Grads:
    """The gradients of a rank without images: zeros, and an empty dx."""
    channels = dy.shape[1] if kind == "depthwise" else block.weight.shape[1]
    dx = dy.new_empty((dy.shape[0], channels, *dy.shape[2:])) if needs[0] else None
    return dx, *(torch.zeros_like(t) if need else None for t, need in zip(block, needs[1:], strict=True))


@_without_autocast
def mixer_forward(
    backend: ModuleType,
    x: Tensor,  # (N, C, H, W)
    blocks: tuple[Block, Block],  # depthwise, pointwise
    running: tuple[Statistics, Statistics],
    options: Options,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None], tuple[Statistics, Statistics]]:
    """y, both a and both statistics, as block_forward of the one and then the other."""
    entry = options.entry
    if entry is None:
        checks.check_memory("mixer_layer", MIXER_TENSORS, x, *blocks[0], *running[0], *blocks[1], *running[1])
    elif entry.train is not None:
        result = entry.train.forward(x, blocks[1].weight)
        _count_versions(*running[0], *running[1])
        return result
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
    a, depthwise, first = _preactivation(backend, x, "depthwise", blocks[0], running[0], options)
    z = _normalize(backend, a, blocks[0], depthwise, options, x if options.residual else None)
    a_pointwise, pointwise, second = _preactivation(backend, z, "pointwise", blocks[1], running[1], options)
    y = _normalize(backend, a_pointwise, blocks[1], pointwise, options, None, (*first, *second))
    return y, (a, a_pointwise), (depthwise, pointwise)


@_without_autocast
def mixer_backward(
    backend: ModuleType,
    dy: Tensor,  # (N, C_out, H, W)
    x: Tensor | None,  # (N, C, H, W), if either weight needs a gradient
    a: tuple[Tensor, Tensor],
    blocks: tuple[Block, Block],
    statistics: tuple[Statistics, Statistics],
    options: Options,
    needs: Needs,  # x, the depthwise block's four tensors, the pointwise block's four
    contiguous: bool,  # x's memory format in the forward
) -> Grads:
    """The gradients in the order of `needs`; None if it is False."""
    x_needed = needs[1] or (needs[5] and options.residual)
    _, x, a1, block, used = _restored(
        "depthwise", None, x, a[0], blocks[0], statistics[0], needs[0], x_needed, contiguous
    )
    below = any(needs[:5])
    z = None
    if needs[5]:
        checks.check_memory("mixer_layer's backward", ("depthwise_norm_bias",), block.norm_bias)
        z = _normalize(backend, a1, block, used, options, x if options.residual else None)
    restored = _restored("pointwise", dy, z, a[1], blocks[1], statistics[1], below, False, contiguous)
    upper = _block_gradients(backend, "pointwise", *restored, options, (below, *needs[5:]))
    lower: Grads = (None,) * 5
    if below:
        dz = in_format(upper[0], contiguous)
        lower = _block_gradients(backend, "depthwise", dz, x, a1, block, used, options, needs[:5])
    return *lower, *upper[1:]


@_without_autocast
def convolution_forward(
    backend: ModuleType,
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    dilation: tuple[int, int],
) -> Tensor:  # (N, C, H, W)
    """The plain depthwise convolution: a block without activation and norm."""
    checks.check_memory("depthwise_conv2d", ("x", "weight", "bias"), x, weight, bias)
    return backend.depthwise_eval(x, weight, bias, "identity", None, False, dilation)


@_without_autocast
def convolution_backward(
    backend: ModuleType,
    dy: Tensor,  # (N, C, H, W)
    x: Tensor | None,  # (N, C, H, W), if the weight needs a gradient
    contiguous: bool,  # x's memory format in the forward
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    needs: Needs,  # x, weight, bias
    dilation: tuple[int, int],
) -> Grads:
    """The gradients of x, weight and bias; None if `needs` is False."""
    checks.check_memory("depthwise_conv2d's backward", ("dy", "x", "weight"), dy, x, weight if needs[0] else None)
    _check_strided("depthwise_conv2d's backward", dy)
    if not _is_as_saved("depthwise", x, None, dy, (weight,), False) or (x is None and needs[1]):
        checks.check_convolution_backward("depthwise_conv2d_backward", dy, x, weight, bias, needs[1])
        weight = dense_parameter(weight)
    dy, x = in_format(dy, contiguous), None if x is None else in_format(x, contiguous)
    dx = dw = db = None
    if needs[0]:
        dx = backend.depthwise_input_grad(dy, None, weight, "identity", None, None, False, dilation)
    if needs[1] or needs[2]:
        source = dy if x is None else x
        dw, db = backend.depthwise_weight_grad(dy, None, source, weight, bias, "identity", None, None, dilation)
    return dx, _strided_like(dw, weight) if needs[1] else None, db if needs[2] else None


class _Unsaved(NamedTuple):
    """A bias that a backward does not read: only its presence and dtype count, so it may change in between, as in eager.
    A backward that is itself differentiated also needs its place in the graph, and its value if that is still the forward's."""

    tensor: Tensor
    node: Any  # tensor.grad_fn in the forward
    version: int

    def in_graph(self) -> Tensor:
        if self.tensor.grad_fn is not self.node:
            raise RuntimeError(
                "convmixer_kernels: a backward with create_graph needs the bias's place in the graph, but between forward and "
                "backward an inplace operation gave it another; change the bias out of place, or after the backward"
            )
        return self.tensor


def _unsaved(bias: Tensor | None) -> _Unsaved | None:
    if bias is None:
        return None
    return _Unsaved(bias, bias.grad_fn, 0 if bias.is_inference() else bias._version)


def _tensor(bias: _Unsaved | None) -> Tensor | None:
    return None if bias is None else bias.tensor


def _in_graph(bias: _Unsaved | None) -> Tensor | None:
    return None if bias is None else bias.in_graph()


def _changed(bias: _Unsaved | None) -> bool:
    return bias is not None and not bias.tensor.is_inference() and bias.tensor._version != bias.version


class BlockFunction(Function):
    """depthwise_block and pointwise_block in eager mode."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm_weight, norm_bias, running, kind, options, backend):
        block = Block(weight, bias, norm_weight, norm_bias)
        y, a, statistics = block_forward(backend, x, kind, block, running, options)
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, a, weight, norm_weight, *statistics)
        ctx.stand_in = composite.stand_in(x) if needs[0] and not needs[1] else None
        ctx.biases = _unsaved(bias), _unsaved(norm_bias)
        ctx.kind, ctx.options, ctx.contiguous, ctx.backend = kind, options, x.is_contiguous(), backend
        return y

    @staticmethod
    def backward(ctx, dy):
        x, a, weight, norm_weight, *statistics = ctx.saved_tensors
        bias, norm_bias = ctx.biases
        rest = Statistics(*statistics), ctx.options, ctx.needs_input_grad[:5]
        if composite.replaces_backward(dy):
            distributed.check_differentiated_once(ctx.options.group)
            if x is not None and not _changed(bias):
                a = None
            block = Block(weight, _in_graph(bias), norm_weight, _in_graph(norm_bias))
            grads = composite.block_backward(dy, ctx.kind, ctx.stand_in if x is None else x, a, block, *rest)
        else:
            block = Block(weight, _tensor(bias), norm_weight, _tensor(norm_bias))
            grads = block_backward(ctx.backend, dy, ctx.kind, x, a, block, *rest, ctx.contiguous)
        return (
            *grads,
            None,  # running
            None,  # kind
            None,  # options
            None,  # backend
        )


def _states(x, a, w1, g1, w2, g2, statistics) -> tuple:
    """The states of what a layer saves: if they are those of the forward, no hook has changed them and they hold their memory."""
    tensors = (x, *a, w1, g1, w2, g2, *statistics[0], *statistics[1])
    return tuple(None if t is None else prepared.state_of(t) for t in tensors)


def _as_made(dy: Tensor, a: Tensor) -> bool:
    """Whether an incoming gradient is in a's format and in memory."""
    return (
        dy.stride() == a.stride()
        and dy.untyped_storage().nbytes() >= (dy.storage_offset() + dy.numel()) * dy.itemsize
        and not dy.is_neg()
        and not dy._is_zerotensor()
    )


class MixerFunction(Function):
    """mixer_layer in eager mode."""

    @staticmethod
    def forward(ctx, x, w1, b1, g1, h1, w2, b2, g2, h2, running, options, backend):
        blocks = Block(w1, b1, g1, h1), Block(w2, b2, g2, h2)
        y, a, statistics = mixer_forward(backend, x, blocks, running, options)
        needs = ctx.needs_input_grad
        saved_x = x if needs[1] or needs[5] else None
        ctx.save_for_backward(saved_x, *a, w1, g1, w2, g2, *statistics[0], *statistics[1])
        ctx.stand_in = composite.stand_in(x) if needs[0] and saved_x is None else None
        ctx.biases = tuple(map(_unsaved, (b1, h1, b2, h2)))
        # z is rebuilt with h1's values of now
        ctx.h1 = None if h1 is None else h1.detach().clone()
        ctx.states, entry, parameters = None, options.entry, (w1, b1, g1, h1, w2, b2, g2, h2)
        # entry.train.backward gives the gradients of all parameters
        all_needed = all(t is None or need for t, need in zip(parameters, needs[1:9], strict=True))
        if entry is not None and entry.train is not None and all_needed:
            ctx.states = _states(x, a, w1, g1, w2, g2, statistics)
        ctx.options, ctx.contiguous, ctx.backend = options, x.is_contiguous(), backend
        return y

    @staticmethod
    def backward(ctx, dy):
        x, a1, a2, w1, g1, w2, g2, *statistics = ctx.saved_tensors
        b1, h1, b2, h2 = ctx.biases
        rest = (Statistics(*statistics[:2]), Statistics(*statistics[2:])), ctx.options, ctx.needs_input_grad[:9]
        if composite.replaces_backward(dy):
            distributed.check_differentiated_once(ctx.options.group)
            if x is not None and not (_changed(b1) or _changed(b2)):
                a1 = a2 = None
            h1 = None if h1 is None else composite.with_value(h1.in_graph(), ctx.h1)
            blocks = Block(w1, _in_graph(b1), g1, h1), Block(w2, _in_graph(b2), g2, _in_graph(h2))
            grads = composite.mixer_backward(dy, ctx.stand_in if x is None else x, (a1, a2), blocks, *rest)
        elif (
            ctx.states is not None
            and not torch._C._is_any_autocast_enabled()
            and ctx.states == _states(x, (a1, a2), w1, g1, w2, g2, rest[0])
            and _as_made(dy, a2)
        ):
            grads = ctx.options.entry.train.backward(dy, x, (a1, a2), w2, rest[0], ctx.h1, ctx.needs_input_grad[0])
        else:
            blocks = Block(w1, _tensor(b1), g1, ctx.h1), Block(w2, _tensor(b2), g2, _tensor(h2))
            grads = mixer_backward(ctx.backend, dy, x, (a1, a2), blocks, *rest, ctx.contiguous)
        return (
            *grads,
            None,  # running
            None,  # options
            None,  # backend
        )


class ConvolutionFunction(Function):
    """depthwise_conv2d in eager mode."""

    @staticmethod
    def forward(ctx, x, weight, bias, dilation, backend):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.bias = _unsaved(bias)
        ctx.contiguous, ctx.dilation, ctx.backend = x.is_contiguous(), dilation, backend
        return convolution_forward(backend, x, weight, bias, dilation)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if composite.replaces_backward(dy):
            grads = composite.convolution_backward(dy, x, weight, _in_graph(ctx.bias), needs, ctx.dilation)
        else:
            rest = _tensor(ctx.bias), needs, ctx.dilation
            grads = convolution_backward(ctx.backend, dy, x, ctx.contiguous, weight, *rest)
        return (
            *grads,
            None,  # dilation
            None,  # backend
        )

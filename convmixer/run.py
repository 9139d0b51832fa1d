# SPDX-License-Identifier: MIT
"""Running a layer by its operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from convmixer_kernels import checks, dispatch, functional

from .recognize import Block, _recognize

# exact classes: a subclass of Tensor may give its operations another meaning
_PLAIN_TENSORS = frozenset({Tensor, nn.Parameter})
_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def _takes_input(x: object) -> bool:
    """Whether operators may run on this input, under the modes that are active now."""
    if type(x) not in _PLAIN_TENSORS or x.dtype not in _DTYPES or x.dim() != 4 or x.layout is not torch.strided:
        return False
    if x.is_meta or x.is_nested or x.numel() == 0 or _is_watched():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return not torch.compiler.is_exporting()  # a program that runs without this package


def _takes_tensors(x: Tensor, blocks: tuple[Block, Block]) -> bool:
    """Whether the operator gives the modules' result for an input that operators may run on, with their tensors and settings."""
    dtype, device = x.dtype, x.device.type
    # autocast casts float32 weights to its dtype; without it nn.Conv2d wants weights of x's dtype
    wide = dtype
    if torch.is_autocast_enabled(device):
        if torch.get_autocast_dtype(device) is not dtype:
            return False
        wide = torch.float32
    for conv, _, norm in blocks:
        # F.batch_norm refuses an eps of 0 in training, and a negative one in evaluation
        if not (_is_moderate(norm.eps) and norm.eps > 0):
            return False
        if not (norm.momentum is None or _is_moderate(norm.momentum)):
            return False
        for t in conv._parameters.values():
            if t is not None and (type(t) not in _PLAIN_TENSORS or (t.dtype is not dtype and t.dtype is not wide)):
                return False
        buffers = norm._buffers
        mean, var = buffers["running_mean"], buffers["running_var"]
        if (mean is None) is not (var is None):
            return False
        # nn.BatchNorm2d takes all its tensors of one dtype, which is x's or float32
        norm_dtype = None
        for t in (*norm._parameters.values(), mean, var):
            if t is None:
                continue
            if norm_dtype is None:
                norm_dtype = t.dtype
                if norm_dtype is not dtype and norm_dtype is not torch.float32:
                    return False
            if type(t) not in _PLAIN_TENSORS or t.dtype is not norm_dtype:
                return False
    return True


def _is_moderate(value: object) -> bool:
    """A number that float32 holds: about others (infinite, NaN, of another type) torch has ideas of its own."""
    kind = type(value)
    return (
        kind is float or kind is int or (isinstance(value, (float, int)) and kind is not bool)
    ) and -1e30 < value < 1e30


def _is_watched() -> bool:
    """Whether a mode sees torch's functions or operators; one that only sets the default device changes nothing here."""
    if torch.compiler.is_compiling():
        return False  # a compiled program has operators of its own
    if torch._C._len_torch_dispatch_stack():
        return True
    modes = torch._C._len_torch_function_stack()
    return modes > 0 and any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(modes))


class _NormCall(NamedTuple):
    """What nn.BatchNorm2d.forward hands to F.batch_norm, and the counter that it steps."""

    tensors: tuple[Tensor | None, ...]  # weight, bias, running_mean, running_var, each (C,)
    settings: tuple[bool, float, float]  # whether statistics are the batch's, momentum, eps
    counter: Tensor | None  # num_batches_tracked, stepped already


def _norm_call(norm: nn.BatchNorm2d) -> _NormCall:
    parameters, buffers = norm._parameters, norm._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    training, counter = bool(norm.training), None
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if training:
        if norm.track_running_stats:
            counter = buffers["num_batches_tracked"]
            if counter is not None:
                counter.add_(1)
                if norm.momentum is None:
                    momentum = 1.0 / float(counter)
        else:
            mean = var = None
    tensors = parameters["weight"], parameters["bias"], mean, var
    return _NormCall(tensors, (training or mean is None, momentum, norm.eps), counter)


def _run_layer(layer: nn.Sequential, x: Tensor) -> Tensor | None:
    """The layer's output by its operator, or None where its modules are to run. The caller has asked _changed_for_all."""
    blocks = _recognize(layer)
    if isinstance(blocks, str) or not _takes_input(x) or not _takes_tensors(x, blocks):
        return None
    return _run(layer, x, *blocks)


def _run(layer: nn.Sequential, x: Tensor, depthwise: Block, pointwise: Block) -> Tensor:
    norms = _norm_call(depthwise.norm), _norm_call(pointwise.norm)
    try:
        return _run_operators(x, depthwise, pointwise, *norms)
    except (TypeError, ValueError, RuntimeError) as error:
        # a refused call has counted nothing; activation checkpointing stops a forward by an exception of its own, and
        # there the reference has counted
        for norm in norms:
            if norm.counter is not None:
                norm.counter.sub_(1)
        if isinstance(error, RuntimeError):
            raise
        dispatch.requested_backend("mixer_layer", None)  # an unknown name is no reason to run something else
        if any(t.device != x.device for t in (*layer.parameters(), *layer.buffers())):
            raise  # torch's convolution takes a meta tensor beside a real one, and reads what is not there
        return _run_modules(layer, x, norms, error)


def _run_modules(layer: nn.Sequential, x: Tensor, norms: Sequence[_NormCall], refusal: Exception) -> Tensor:
    """What the modules make of a call that the operator refuses; if they raise, the refusal, and no state has moved."""
    state = [t for norm in norms for t in (*norm.tensors[2:], norm.counter) if t is not None]
    before = [t.clone() for t in state]
    try:
        return nn.Sequential.forward(layer, x)
    except Exception as error:
        for t, value in zip(state, before, strict=True):
            t.detach().copy_(value)
        raise refusal from error


def _run_operators(x: Tensor, depthwise: Block, pointwise: Block, first: _NormCall, second: _NormCall) -> Tensor:
    w1, w2 = depthwise.conv._parameters, pointwise.conv._parameters
    training, momentum, eps = first.settings
    if first.settings == second.settings and depthwise.activation == pointwise.activation:
        return functional.mixer_layer(
            x,
            w1["weight"],
            w1["bias"],
            *first.tensors,
            w2["weight"],
            w2["bias"],
            *second.tensors,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=depthwise.activation,
        )
    # two calls: what the second would refuse must be refused before the first has moved its statistics
    op, weight, bias = "pointwise_block", w2["weight"], w2["bias"]
    checks.check_pointwise_convolution(op, "", x, weight, bias)
    checks.check_norm(op, "", x, weight.shape[0], *second.tensors, second.settings[0])
    checks.check_options(op, pointwise.activation, *second.settings)
    z = functional.depthwise_block(
        x,
        w1["weight"],
        w1["bias"],
        *first.tensors,
        training=training,
        momentum=momentum,
        eps=eps,
        activation=depthwise.activation,
    )
    training, momentum, eps = second.settings
    return functional.pointwise_block(
        z, weight, bias, *second.tensors, training=training, momentum=momentum, eps=eps, activation=pointwise.activation
    )

# SPDX-License-Identifier: MIT
"""From blocks to operators: whether an operator gives the modules' result for this input, and the call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import dispatch, functional, gates
from .distributed import group_of
from .gates import PLAIN_TENSORS
from .recognize import BlockModules, changed_for_all, why_not_norm

_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def operator_accepts_input(x: object, empty: bool = False) -> bool:
    """Whether operators may run on this input now. `empty`: also without images, as one rank of those that share statistics."""
    if type(x) not in PLAIN_TENSORS or x.dtype not in _DTYPES or x.dim() != 4 or x.layout is not torch.strided:
        return False
    if x.is_meta or x.is_nested or gates.watched() or gates.transformed():
        return False
    if x.numel() == 0 and (not empty or 0 in x.shape[1:]):
        return False
    return not gates.exporting()


def operator_accepts_blocks(x: Tensor, blocks: Sequence[BlockModules]) -> bool:
    """Whether operators, for an input that they accept, give the modules' result with these tensors and settings."""
    dtype, device = x.dtype, x.device.type
    # autocast casts float32 weights to its dtype; without it nn.Conv2d requires weights of x's dtype
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
            if t is not None and (type(t) not in PLAIN_TENSORS or (t.dtype is not dtype and t.dtype is not wide)):
                return False
        buffers = norm._buffers
        mean, var = buffers["running_mean"], buffers["running_var"]
        if (mean is None) is not (var is None):
            return False
        # nn.BatchNorm2d requires one dtype for all its tensors, x's or float32
        norm_dtype = None
        for t in (*norm._parameters.values(), mean, var):
            if t is None:
                continue
            if norm_dtype is None:
                norm_dtype = t.dtype
                if norm_dtype is not dtype and norm_dtype is not torch.float32:
                    return False
            if type(t) not in PLAIN_TENSORS or t.dtype is not norm_dtype:
                return False
    return True


def _is_moderate(value: object) -> bool:
    """Whether it is a number that float32 holds. torch treats others (infinite, NaN, of another type) in ways of its own."""
    kind = type(value)
    return (
        kind is float or kind is int or (isinstance(value, (float, int)) and kind is not bool)
    ) and -1e30 < value < 1e30


class NormCall(NamedTuple):
    """What nn.BatchNorm2d.forward passes to F.batch_norm, and the counter that it steps."""

    tensors: tuple[Tensor | None, ...]  # weight, bias, running_mean, running_var, each (C,)
    settings: tuple[bool, float, float]  # whether to use the batch's statistics, momentum, eps
    counter: Tensor | None  # num_batches_tracked, stepped already
    group: Any = None  # of an nn.SyncBatchNorm that has other ranks to talk to


def begin_norm(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> NormCall:
    """The first half of the norm's forward: it steps the counter, and the momentum may depend on it."""
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
    return NormCall(tensors, (training or mean is None, momentum, norm.eps), counter, group_of(norm))


def run_block(operator: Callable[..., Tensor], x: Tensor, block: BlockModules, norm: NormCall) -> Tensor:
    training, momentum, eps = norm.settings
    tensors = (*weight_and_bias(block), *norm.tensors)
    shared = {"training": training, "momentum": momentum, "eps": eps, "process_group": norm.group}
    return operator(x, *tensors, activation=block.activation, **shared)


def run_norm(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor | None:  # (N, C, H, W) -> (N, C, H, W)
    """An nn.SyncBatchNorm by itself, in training on a CPU, which torch's own refuses. None if its module must run."""
    if not norm.training or type(x) not in PLAIN_TENSORS or x.device.type != "cpu" or x.dim() != 4:
        return None
    if gates.exporting() or gates.jit_tracing() or changed_for_all() is not None or why_not_norm("", norm) is not None:
        return None
    if group_of(norm) is None:
        return nn.modules.batchnorm._BatchNorm.forward(norm, x)
    call = begin_norm(norm)
    training, momentum, eps = call.settings
    shared = {"training": training, "momentum": momentum, "eps": eps, "process_group": call.group}
    # a convolution by 1, whose value is x
    ones = x.new_ones(x.shape[1], 1, 1, 1)
    with torch.autocast("cpu", enabled=False):
        return functional.depthwise_block(x, ones, None, *call.tensors, activation="identity", residual=False, **shared)


def weight_and_bias(block: BlockModules) -> tuple[Tensor, Tensor | None]:
    parameters = block.conv._parameters
    return parameters["weight"], parameters["bias"]


def after_refusal(
    op: str,
    error: Exception,
    x: Tensor,  # (N, C, H, W)
    norms: Sequence[NormCall],
    tensors: Iterable[Tensor],  # the modules' parameters and buffers
    forward: Callable[[Tensor], Tensor],  # runs the modules
) -> Tensor:
    """What follows an operator's error: the modules' result, or an error if they raise too. Then no state has moved.

    A refused call has counted nothing. The exception by which activation checkpointing ends a recomputation does not come here, and
    the reference has counted before it.
    """
    for norm in norms:
        if norm.counter is not None:
            norm.counter.sub_(1)
    if isinstance(error, RuntimeError):
        raise error
    dispatch.requested_backend(op, None)  # raises if it is an unknown name: that is no reason to run the modules
    if any(t.device != x.device for t in tensors):
        raise error  # torch's convolution accepts a meta tensor beside a real one, and reads memory that is not there
    state = [t for norm in norms for t in (*norm.tensors[2:], norm.counter) if t is not None]
    before = [t.clone() for t in state]
    try:
        return forward(x)
    except Exception as second:
        for t, value in zip(state, before, strict=True):
            t.detach().copy_(value)
        raise error from second

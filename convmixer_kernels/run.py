# SPDX-License-Identifier: MIT
"""From blocks and convolutions to operators: whether an operator gives the modules' result for this input, and the call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# the exception by which activation checkpointing ends a recomputation: modules have counted before it
from torch.utils.checkpoint import _StopRecomputationError as StopRecomputation

from . import dispatch, functional, gates
from .autograd import takes_contiguous
from .distributed import group_of
from .gates import PLAIN_TENSORS
from .patches import torch_is_itself
from .recognize import (
    CONVOLUTIONS,
    BlockModules,
    block_kind,
    changed_for_all,
    is_depthwise,
    recognize_block,
    why_not_norm,
)

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


def operator_accepts_blocks(x: Tensor, blocks: Sequence[BlockModules], cast: bool = False) -> bool:
    """Whether operators, for an input that they accept, give the modules' result with these tensors and settings.

    `cast` says whether autocast may have to cast x.
    """
    dtype, device = x.dtype, x.device.type
    # autocast casts float32 weights to its dtype; without it nn.Conv2d requires weights of x's dtype
    wide = dtype
    if torch.is_autocast_enabled(device):
        if torch.get_autocast_dtype(device) is not dtype and not cast:
            return False
        dtype, wide = torch.get_autocast_dtype(device), torch.float32
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
    counter: Tensor | None  # num_batches_tracked, to be stepped
    group: Any = None  # of an nn.SyncBatchNorm that has other ranks to talk to


def begin_norm(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> NormCall:
    """The first half of the norm's forward. The momentum may depend on the counter, which step_counters moves."""
    parameters, buffers = norm._parameters, norm._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    training, counter = bool(norm.training), None
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if training:
        if norm.track_running_stats:
            counter = buffers["num_batches_tracked"]
            if counter is not None and norm.momentum is None:
                momentum = 1.0 / float(counter + 1)
        else:
            mean = var = None
    tensors = parameters["weight"], parameters["bias"], mean, var
    return NormCall(tensors, (training or mean is None, momentum, norm.eps), counter, group_of(norm))


def step_counters(*norms: NormCall) -> None:
    """The state that an operator does not move. Call it when the operator has succeeded."""
    for norm in norms:
        if norm.counter is not None:
            norm.counter.add_(1)


def run_block(operator: Callable[..., Tensor], x: Tensor, block: BlockModules, norm: NormCall, **options) -> Tensor:
    """The block's operator, functional.depthwise_block or functional.pointwise_block."""
    training, momentum, eps = norm.settings
    tensors = (*weight_and_bias(block), *norm.tensors)
    shared = {"training": training, "momentum": momentum, "eps": eps, "process_group": norm.group}
    return operator(x, *tensors, activation=block.activation, **shared, **options)


def run_as_block(
    kind: str,  # "depthwise" or "pointwise"
    modules: Sequence[nn.Module],  # a convolution, an activation, a norm
    x: Tensor,  # (N, C, H, W)
    residual: bool = False,
) -> Tensor | None:  # (N, C_out, H, W)
    """norm(activation(conv(x))) (+ x) by its operator, or None if the modules must run."""
    op, options = f"{kind}_block", {"residual": residual} if kind == "depthwise" else {}
    # ranks that share statistics must all run the operator, whatever the size of their batches
    shared = group_of(modules[2]) is not None and not gates.jit_tracing()
    if not isinstance(modules[0], nn.Conv2d) or not (shared or _may_gain(op, modules[0], x)):
        return None
    if changed_for_all() is not None:
        return None
    block = recognize_block(kind, *modules)
    if isinstance(block, str) or not operator_accepts_input(x, empty=shared):
        return None
    if not operator_accepts_blocks(x, (block,), cast=True):
        return None
    conv, _, norm = block
    call = begin_norm(norm)
    try:
        y = run_block(getattr(functional, op), x, block, call, **options)
    except StopRecomputation:
        step_counters(call)
        raise
    except (TypeError, ValueError) as error:

        def forward(x: Tensor) -> Tensor:
            h = x
            for module in modules:
                h = module(h)
            return h + x if residual else h

        tensors = (*conv._parameters.values(), *norm._parameters.values(), *norm._buffers.values())
        return after_refusal(op, error, x, (call,), tensors, forward)
    step_counters(call)
    return y


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
    try:
        with torch.autocast("cpu", enabled=False):
            y = functional.depthwise_block(
                x, ones, None, *call.tensors, activation="identity", residual=False, **shared
            )
    except StopRecomputation:
        step_counters(call)
        raise
    step_counters(call)
    return y


def run_children(children: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What an nn.Sequential of these modules computes, with each conv, activation, norm among them by one operator."""
    at = 0
    while at < len(children):
        x, taken = run_next(children, at, x)
        at += taken
    return x


def run_next(children: Sequence[nn.Module], at: int, x: Tensor) -> tuple[Tensor, int]:
    """The output of the child at this place, or of the block that begins there, and the number of children that this took."""
    if type(children[at]) in CONVOLUTIONS and at + 3 <= len(children):
        kind = block_kind(children[at])
        y = None if kind is None else run_as_block(kind, children[at : at + 3], x)
        if y is not None:
            return y, 3
    y = run_norm(children[at], x) if type(children[at]) is nn.SyncBatchNorm else None
    return (children[at](x) if y is None else y), 1


def run_convolution(conv: nn.Conv2d, x: Tensor) -> Tensor | None:  # (N, C, H, W) -> (N, C, H, W)
    """conv(x) by depthwise_conv2d, or None if nn.Conv2d's forward must run. The weight may be a parametrization's."""
    if not _may_gain("depthwise_conv2d", conv, x) or not operator_accepts_input(x):
        return None
    if (
        not torch_is_itself()
        or type(conv)._conv_forward is not nn.Conv2d._conv_forward
        or "_conv_forward" in conv.__dict__
    ):
        return None
    # to read a weight may compute it and move a parametrization's state: once
    weight, bias = conv.weight, conv.bias
    dtypes = _DTYPES if torch.is_autocast_enabled(x.device.type) else (x.dtype,)
    if not is_depthwise(conv, weight.shape) or any(
        t is not None and (type(t) not in PLAIN_TENSORS or t.dtype not in dtypes) for t in (weight, bias)
    ):
        return conv._conv_forward(x, weight, bias)
    try:
        return functional.depthwise_conv2d(x, weight, bias, dilation=conv.dilation)
    except (TypeError, ValueError) as error:
        return after_refusal(
            "depthwise_conv2d", error, x, (), (weight, bias), lambda x: conv._conv_forward(x, weight, bias)
        )


def _may_gain(op: str, conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether this call can be an operator's, and then is expected to be no slower than the modules.

    The first question of each call, and a quick one: what it leaves to torch pays for it. It reads no weight. A backend that was asked
    for by name always runs.
    """
    if type(x) not in PLAIN_TENSORS or x.dim() != 4:
        return False
    compiling = torch.compiler.is_compiling()
    # where a program is recorded for later, sizes must not decide
    if gates.exporting() if compiling else gates.jit_tracing():
        return False
    kernel, dilation, device, dtype = conv.kernel_size, conv.dilation, x.device.type, x.dtype
    if device not in ("cpu", "cuda") or not (
        type(kernel) is type(dilation) is tuple and len(kernel) == len(dilation) == 2
    ):
        return False
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    contiguous = x.is_contiguous() or takes_contiguous(x)
    graph = compiling or (device == "cuda" and torch.cuda.is_current_stream_capturing())
    gains = dispatch.gains(op, device, dtype, contiguous, x.shape, kernel, torch.is_grad_enabled(), graph, dilation)
    if compiling:
        return gains
    return (gains and dispatch.has_kernels(device)) or dispatch.backend_is_named()


def weight_and_bias(block: BlockModules) -> tuple[Tensor, Tensor | None]:
    parameters = block.conv._parameters
    return parameters["weight"], parameters["bias"]


def after_refusal(
    op: str,
    error: Exception,
    x: Tensor,  # (N, C, H, W)
    norms: Sequence[NormCall],
    tensors: Iterable[Tensor | None],  # the modules' parameters and buffers
    forward: Callable[[Tensor], Tensor],  # runs the modules
) -> Tensor:
    """What follows an operator's error: the modules' result, or an error if they raise too. Then no state has moved.

    A refused call has moved nothing.
    """
    dispatch.requested_backend(op, None)  # raises if it is an unknown name: that is no reason to run the modules
    if any(t is not None and t.device != x.device for t in tensors):
        raise error  # torch's convolution accepts a meta tensor beside a real one, and reads memory that is not there
    state = [t for norm in norms for t in (*norm.tensors[2:], norm.counter) if t is not None]
    before = [t.clone() for t in state]
    try:
        return forward(x)
    except Exception as second:
        for t, value in zip(state, before, strict=True):
            t.detach().copy_(value)
        raise error from second

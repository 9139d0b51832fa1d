# SPDX-License-Identifier: MIT
"""From modules to blocks and convolutions that an operator computes, or the reason why not.

This looks at modules only, never at an input, and keeps nothing in them. It runs on every forward (about 6 microseconds a layer), so
that a hook, a parametrization or another module that appears later is never missed.
"""

from __future__ import annotations

import dis
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from .distributed import is_group
from .patches import replaced_in_torch, torch_is_itself

#: Classes that compute what torch's own do; those of modules.py join them.
CONVOLUTIONS: set[type[nn.Module]] = {nn.Conv2d}
SEQUENTIALS: set[type[nn.Module]] = {nn.Sequential}


class BlockModules(NamedTuple):
    """The modules of one block: a convolution, its activation by name, and its norm. (primitives.Block holds tensors.)"""

    conv: nn.Conv2d
    activation: str
    norm: nn.BatchNorm2d | nn.SyncBatchNorm


def changed_for_all() -> str | None:
    """The reason why no module at all may be replaced by an operator now, or None."""
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return "a hook is registered on all modules"
    return None if torch_is_itself() else f"{replaced_in_torch()} is not torch's own"


def is_altered(module: nn.Module) -> bool:
    """Whether a call of this module does more than its class's forward, or something else."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_call_impl" in state
        or module._compiled_call_impl is not None
    )


def block_kind(conv: nn.Conv2d) -> str | None:
    """The only kind of block that this convolution can begin, if any. A quick answer, before the modules are looked at."""
    if conv.groups != 1:
        return "depthwise"
    return "pointwise" if conv.kernel_size == (1, 1) else None


def recognize_block(kind: str, conv: nn.Module, activation: nn.Module, norm: nn.Module) -> BlockModules | str:
    """norm(activation(conv(x))) as a block of this kind, "depthwise" or "pointwise", or the reason why its modules must run."""
    reason = why_not_convolution(kind, conv)
    if reason is not None:
        return reason
    name = activation_name(activation)
    if name is None:
        return f"its {kind} activation is {activation!r}, not GELU, ReLU or Identity"
    if is_altered(activation):
        return f"its {kind} activation has a hook or its own forward"
    reason = why_not_norm(kind, norm)
    return BlockModules(conv, name, norm) if reason is None else reason


def why_not_norm(kind: str, norm: nn.Module) -> str | None:
    """The reason why this module is not a batch norm that an operator computes, or None."""
    if type(norm) is not nn.BatchNorm2d and type(norm) is not nn.SyncBatchNorm:
        return f"its {kind} norm is {class_name(norm)}, not nn.BatchNorm2d or nn.SyncBatchNorm"
    if is_altered(norm):
        return f"its {kind} norm has a hook or its own forward"
    if _hides_tensors_of_norm(norm):
        return f"a parameter, buffer or method of its {kind} norm was replaced"
    if type(norm) is nn.SyncBatchNorm and norm.process_group and not is_group(norm.process_group):
        return f"the process_group of its {kind} norm is {norm.process_group!r}, not a ProcessGroup"
    return None


def why_not_convolution(kind: str, conv: nn.Module) -> str | None:
    """The reason why this module is not a convolution of this kind ("depthwise" or "pointwise") that a block computes, or None."""
    if type(conv) not in CONVOLUTIONS:
        return f"its {kind} convolution is {class_name(conv)}, not nn.Conv2d"
    if is_altered(conv):
        return f"its {kind} convolution has a hook or its own forward"
    parameters, own = conv._parameters, conv.__dict__
    if (
        not ("weight" in parameters and "bias" in parameters)
        or "weight" in own
        or "bias" in own
        or "_conv_forward" in own
    ):
        return f"a parameter or method of its {kind} convolution was replaced"
    weight = parameters["weight"]
    shape = () if weight is None else weight.shape
    if not (
        is_depthwise(conv, shape) and _is_pair(conv.dilation, 1, 1) if kind == "depthwise" else _is_1x1(conv, shape)
    ):
        return f"its {kind} convolution is {described(conv, shape)}, not {_WANTED[kind]}"
    return None


_WANTED = {
    "depthwise": "depthwise with stride 1, dilation 1 and zero padding 'same'",
    "pointwise": "1x1 with stride 1, one group and no padding",
}


def is_depthwise(conv: nn.Conv2d, shape: Sequence[int]) -> bool:
    """Whether this is a depthwise convolution of stride 1, zero padding "same" and any dilation, for a weight of this shape.

    The weight's own sizes count: the attributes in_channels, out_channels and kernel_size take no part in a forward.
    """
    return (
        len(shape) == 4
        and type(conv.groups) is int
        and shape[1] == 1
        and conv.groups == shape[0]
        and _is_pair(conv.stride, 1, 1)
        and conv.padding_mode == "zeros"
        and _pads_same(conv.padding, conv.dilation, shape[2], shape[3])
    )


def _is_1x1(conv: nn.Conv2d, shape: Sequence[int]) -> bool:
    return (
        len(shape) == 4
        and type(conv.groups) is int
        and shape[2] == shape[3] == conv.groups == 1
        and _is_pair(conv.stride, 1, 1)
        and conv.padding_mode == "zeros"
        and _is_pair(conv.dilation, 1, 1)
        and _pads_same(conv.padding, conv.dilation, 1, 1)
    )


def _hides_tensors_of_norm(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> bool:
    """Whether one of its tensors (None included) is no parameter or buffer, or an attribute hides one or a method of the class."""
    parameters, buffers, own = norm._parameters, norm._buffers, norm.__dict__
    return (
        not ("weight" in parameters and "bias" in parameters and "num_batches_tracked" in buffers)
        or not ("running_mean" in buffers and "running_var" in buffers)
        or "_check_input_dim" in own
        or "_check_non_zero_input_channels" in own
        or "weight" in own
        or "bias" in own
        or "running_mean" in own
        or "running_var" in own
        or "num_batches_tracked" in own
    )


def _pads_same(padding: object, dilation: object, height: int, width: int) -> bool:
    """Whether a kernel of this size keeps the size of its input."""
    if type(dilation) is not tuple or len(dilation) != 2 or not (type(dilation[0]) is type(dilation[1]) is int):
        return False
    if type(padding) is str:
        return padding == "same" or (padding == "valid" and height == width == 1)
    return height & width & 1 == 1 and _is_pair(padding, dilation[0] * (height // 2), dilation[1] * (width // 2))


def _is_pair(value: object, first: int, second: int) -> bool:
    """Whether it is exactly these two ints: torch refuses floats that equal them."""
    return value == (first, second) and type(value) is tuple and type(value[0]) is int and type(value[1]) is int


def described(conv: nn.Conv2d, shape: Sequence[int]) -> str:
    """The convolution as nn.Conv2d prints it."""
    try:
        described = str(conv)
    except (TypeError, ValueError):  # nn.Conv2d's repr expects pairs
        return "an nn.Conv2d with attributes of other types than its class sets"
    return described if shape[2:] == conv.kernel_size else f"{described} with a weight of {tuple(shape)}"


def activation_name(module: nn.Module) -> str | None:
    """The activation that a call of this module computes, or None if that is not known."""
    kind = type(module)
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if kind is nn.ReLU:
        return "relu"
    return "identity" if kind is nn.Identity else _proven_activation(kind)


def class_name(module: nn.Module | None) -> str:
    """The name of its class, for a message."""
    return type(module).__name__


def instructions(function: object) -> tuple[object, ...] | None:
    """What a Python function does, apart from the names of its arguments, its annotations and its docstring."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    # the flags for *args, **kwargs, generators and coroutines
    kind = code.co_flags & (0x04 | 0x08 | 0x20 | 0x80 | 0x100 | 0x200)
    # a docstring moves the other constants: they count by value, what else an instruction refers to by its number
    body = tuple(
        (each.opname, repr(each.argval) if each.opcode in dis.hasconst else each.arg)
        for each in dis.get_instructions(code)
    )
    return body, code.co_names, code.co_argcount, code.co_kwonlyargcount, code.co_freevars, kind


class _Forwards:
    """How people write an activation's forward. Only the instructions of these count; nothing calls them."""

    def gelu(self, x):
        return F.gelu(x)

    def gelu_none(self, x):
        return F.gelu(x, approximate="none")

    def gelu_tanh(self, x):
        return F.gelu(x, approximate="tanh")

    def gelu_nn(self, x):
        return nn.functional.gelu(x)

    def gelu_torch(self, x):
        return torch.nn.functional.gelu(x)

    def relu(self, x):
        return F.relu(x)


_ACTIVATION_FORWARDS = {
    instructions(forward): ("gelu_tanh" if name == "gelu_tanh" else name.partition("_")[0])
    for name, forward in vars(_Forwards).items()
    if not name.startswith("__")
}
_ROOTS = {"F": F, "nn": nn, "torch": torch}


class _Proof(NamedTuple):
    forward: object
    activation: str | None  # None: not known
    root: str  # the module, by its name in forward's globals, that holds the function


#: class of an activation -> its forward when it was looked at
_proofs: dict[type, _Proof] = {}


def _proven_activation(kind: type) -> str | None:
    """The activation that each call of this class's forward computes, as timm's GELU does, or None.

    The proof is the bytecode of forward, and what its global names are bound to now. It runs nothing.
    """
    forward = getattr(kind, "forward", None)
    proof = _proofs.get(kind)
    if proof is None or proof.forward is not forward:
        body = instructions(forward)
        known = _ACTIVATION_FORWARDS.get(body) if issubclass(kind, nn.Module) else None
        proof = _proofs[kind] = _Proof(forward, known, "" if known is None else body[1][0])
    if proof.activation is None or kind.__call__ is not nn.Module.__call__:
        return None
    return proof.activation if forward.__globals__.get(proof.root) is _ROOTS[proof.root] else None

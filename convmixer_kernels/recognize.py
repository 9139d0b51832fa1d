# SPDX-License-Identifier: MIT
"""From modules to blocks and convolutions that an operator computes, or the reason why not.

This looks at modules only, never at an input, and keeps nothing in them. It runs on every forward (about 6 microseconds a layer), so
that a hook, a parametrization or another module that appears later is never missed.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from torch.nn.modules import module as torch_module

from .distributed import is_group
from .patches import replaced_in_torch, torch_is_itself


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


def recognize_block(kind: str, conv: nn.Module, activation: nn.Module, norm: nn.Module) -> BlockModules | str:
    """norm(activation(conv(x))) as a block of this kind, "depthwise" or "pointwise", or the reason why its modules must run."""
    reason = why_not_convolution(kind, conv)
    if reason is not None:
        return reason
    name = _activation_name(activation)
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
    """The reason why this module is not a convolution of this kind ("depthwise" or "pointwise") that an operator computes, or None."""
    if type(conv) is not nn.Conv2d:
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
    # the weight's own sizes: the attributes in_channels, out_channels and kernel_size take no part in a forward
    weight = parameters["weight"]
    shape = () if weight is None else weight.shape
    if not (
        len(shape) == 4
        and type(conv.groups) is int
        and (
            (shape[1] == 1 and conv.groups == shape[0])
            if kind == "depthwise"
            else (shape[2] == shape[3] == conv.groups == 1)
        )
        and _are_ones(conv.stride, conv.dilation)
        and conv.padding_mode == "zeros"
        and _pads_same(conv.padding, shape[2], shape[3])
    ):
        return f"its {kind} convolution is {_described(conv, shape)}, not {_WANTED[kind]}"
    return None


_WANTED = {
    "depthwise": "depthwise with stride 1, dilation 1 and zero padding 'same'",
    "pointwise": "1x1 with stride 1, one group and no padding",
}


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


def _pads_same(padding: object, height: int, width: int) -> bool:
    if type(padding) is str:
        return padding == "same" or (padding == "valid" and height == width == 1)
    return height & width & 1 == 1 and _is_pair(padding, height // 2, width // 2)


def _are_ones(stride: object, dilation: object) -> bool:
    return (
        stride == dilation == (1, 1)
        and type(stride) is type(dilation) is tuple
        and type(stride[0]) is type(stride[1]) is type(dilation[0]) is type(dilation[1]) is int
    )


def _is_pair(value: object, first: int, second: int) -> bool:
    """Whether it is exactly these two ints: torch refuses floats that equal them."""
    return value == (first, second) and type(value) is tuple and type(value[0]) is int and type(value[1]) is int


def _described(conv: nn.Conv2d, shape: tuple[int, ...]) -> str:
    try:
        described = str(conv)
    except (TypeError, ValueError):  # nn.Conv2d's repr expects pairs
        return "an nn.Conv2d with attributes of other types than its class sets"
    return described if shape[2:] == conv.kernel_size else f"{described} with a weight of {tuple(shape)}"


def _activation_name(module: nn.Module) -> str | None:
    kind = type(module)
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if kind is nn.ReLU:
        return "relu"
    return "identity" if kind is nn.Identity else None


def class_name(module: nn.Module | None) -> str:
    return type(module).__name__

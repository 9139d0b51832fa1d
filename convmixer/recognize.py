# SPDX-License-Identifier: MIT
"""From modules to blocks that an operator computes, or the reason why not.

This looks at modules only, never at an input, and keeps nothing in them. It runs on every forward (about 6 microseconds a layer), so
that a hook, a parametrization or another module that appears later is never missed.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from torch.nn.modules import module as torch_module

from ._patches import replaced_in_torch, torch_is_itself
from .reference import Residual


class BlockModules(NamedTuple):
    """The modules of one block: a convolution, its activation by name, and its norm. (primitives.Block holds tensors.)"""

    conv: nn.Conv2d
    activation: str
    norm: nn.BatchNorm2d


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


def recognize_layer(layer: nn.Sequential) -> tuple[BlockModules, BlockModules] | str:
    """The depthwise and the pointwise block of a mixer layer, or the reason why its modules must run.

    The caller asks changed_for_all, once for as many layers as it runs.
    """
    children = tuple(layer._modules.values())
    if len(children) != 4:
        return f"it has {len(children)} children, not the 4 of a mixer layer"
    residual, *pointwise = children
    if not _is_residual(residual):
        return f"its residual, {_name(residual)}, is not known to compute fn(x) + x"
    fn = residual._modules.get("fn")
    if type(fn) is not nn.Sequential or len(fn._modules) != 3:
        return f"its residual's fn, {_name(fn)}, is not an nn.Sequential of 3 modules"
    for module in (residual, fn):
        if is_altered(module):
            return f"its {_name(module)} has a hook or its own forward"
    first = recognize_block("depthwise", *fn._modules.values())
    if isinstance(first, str):
        return first
    second = recognize_block("pointwise", *pointwise)
    return second if isinstance(second, str) else (first, second)


def recognize_block(kind: str, conv: nn.Module, activation: nn.Module, norm: nn.Module) -> BlockModules | str:
    """norm(activation(conv(x))) as a block of this kind, "depthwise" or "pointwise", or the reason why its modules must run."""
    reason = why_not_convolution(kind, conv)
    if reason is not None:
        return reason
    name = _activation_name(activation)
    if name is None:
        return f"its {kind} activation is {activation!r}, not GELU, ReLU or Identity"
    if type(norm) is not nn.BatchNorm2d:
        return f"its {kind} norm is {_name(norm)}, not nn.BatchNorm2d"
    if is_altered(activation):
        return f"its {kind} activation has a hook or its own forward"
    if is_altered(norm):
        return f"its {kind} norm has a hook or its own forward"
    if _hides_tensors_of_norm(norm):
        return f"a parameter, buffer or method of its {kind} norm was replaced"
    return BlockModules(conv, name, norm)


def why_not_convolution(kind: str, conv: nn.Module) -> str | None:
    """The reason why this module is not a convolution of this kind ("depthwise" or "pointwise") that an operator computes, or None."""
    if type(conv) is not nn.Conv2d:
        return f"its {kind} convolution is {_name(conv)}, not nn.Conv2d"
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


def _hides_tensors_of_norm(norm: nn.BatchNorm2d) -> bool:
    """Whether one of its tensors (None included) is no parameter or buffer, or an attribute hides one or a method of the class."""
    parameters, buffers, own = norm._parameters, norm._buffers, norm.__dict__
    return (
        not ("weight" in parameters and "bias" in parameters and "num_batches_tracked" in buffers)
        or not ("running_mean" in buffers and "running_var" in buffers)
        or "_check_input_dim" in own
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


def _name(module: nn.Module | None) -> str:
    return type(module).__name__


def _fn_then_x(self, x):
    return self.fn(x) + x


def _x_then_fn(self, x):
    return x + self.fn(x)


def _instructions(function: object) -> tuple[object, ...] | None:
    """What a Python function does, apart from the names of its arguments, its annotations and its docstring."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    # the flags for *args, **kwargs, generators and coroutines
    kind = code.co_flags & (0x04 | 0x08 | 0x20 | 0x80 | 0x100 | 0x200)
    return code.co_code, code.co_names, code.co_argcount, code.co_kwonlyargcount, code.co_freevars, kind


_RESIDUAL_FORWARDS = frozenset({_instructions(_fn_then_x), _instructions(_x_then_fn)})
# class of a residual -> its forward when it was proven
_proven: dict[type, object] = {Residual: Residual.forward}


def _is_residual(module: nn.Module) -> bool:
    """Whether this module computes fn(x) + x.

    Its class is proven once, by accelerate or, in a model that another process saved, on the first forward. From then on a forward
    only compares identities. A class with another forward than the proven one must be proven again.
    """
    kind = type(module)
    # nothing is `_proven` itself: an unknown class never passes
    if _proven.get(kind, _proven) is not getattr(kind, "forward", None) and not _prove(kind):
        return False
    return kind.__call__ is nn.Module.__call__ and "fn" not in module.__dict__


def _prove(kind: type) -> bool:
    """Whether each call of this class's forward computes fn(x) + x; if so, it is remembered.

    The proof is the bytecode of forward, which must be that of ``return self.fn(x) + x`` or ``return x + self.fn(x)``. It runs
    nothing. A class's name says too little, a numeric test misses what depends on a mode, on the input or on chance, and
    source text may be absent.
    """
    forward = getattr(kind, "forward", None)
    proven = (
        issubclass(kind, nn.Module)
        and kind.__call__ is nn.Module.__call__
        and kind.__getattr__ is nn.Module.__getattr__
        and kind.__getattribute__ is nn.Module.__getattribute__
        and not hasattr(kind, "fn")
        and _instructions(forward) in _RESIDUAL_FORWARDS
    )
    if proven:
        _proven[kind] = forward
    return proven

# SPDX-License-Identifier: MIT
"""What a layer is made of: its modules as blocks, or the reason why not."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from torch.nn.modules import module as torch_module

from ._patches import replaced_in_torch, torch_is_itself
from .reference import Residual


class Block(NamedTuple):
    """A convolution, its activation by name, and its norm."""

    conv: nn.Conv2d
    activation: str
    norm: nn.BatchNorm2d


def recognize(layer: nn.Sequential) -> tuple[Block, Block] | str:
    """The layer's depthwise and pointwise block if its operator would do what its modules do, else the reason why not.

    Looks at modules only, not at an input. It runs on every forward, for about 6 microseconds.
    """
    return _changed_for_all() or _recognize(layer)


def _changed_for_all() -> str | None:
    """Why no layer at all may run by its operator now, or None."""
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return "a hook is registered on all modules"
    return None if torch_is_itself() else f"{replaced_in_torch()} is not torch's own"


def _recognize(layer: nn.Sequential) -> tuple[Block, Block] | str:
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
        if _is_altered(module):
            return f"its {_name(module)} has a hook or its own forward"
    first = _block("depthwise", *fn._modules.values())
    if isinstance(first, str):
        return first
    second = _block("pointwise", *pointwise)
    return second if isinstance(second, str) else (first, second)


def _block(kind: str, conv: nn.Module, activation: nn.Module, norm: nn.Module) -> Block | str:
    if type(conv) is not nn.Conv2d:
        return f"its {kind} convolution is {_name(conv)}, not nn.Conv2d"
    if type(norm) is not nn.BatchNorm2d:
        return f"its {kind} norm is {_name(norm)}, not nn.BatchNorm2d"
    name = _activation_name(activation)
    if name is None:
        return f"its {kind} activation is {activation!r}"
    if _is_altered(conv) or _is_altered(activation) or _is_altered(norm):
        return f"a module of its {kind} block has a hook or its own forward"
    if not _is_in_place(conv, norm):
        return f"a tensor or method of its {kind} block is not where its class has it"
    # the weight's own sizes: the convolution's attributes say what it was made for, and nothing reads them
    weight = conv._parameters["weight"]
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
        return f"its {kind} convolution is {_described(conv, shape)}"
    return Block(conv, name, norm)


def _is_in_place(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Whether their tensors, None included, are parameters and buffers, and no attribute hides one or a method of the class."""
    parameters, own = conv._parameters, conv.__dict__
    if not ("weight" in parameters and "bias" in parameters):
        return False
    if "weight" in own or "bias" in own or "_conv_forward" in own:
        return False
    parameters, buffers, own = norm._parameters, norm._buffers, norm.__dict__
    if not ("weight" in parameters and "bias" in parameters and "num_batches_tracked" in buffers):
        return False
    if not ("running_mean" in buffers and "running_var" in buffers) or "_check_input_dim" in own:
        return False
    return not (
        "weight" in own
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
    """Exactly these two ints: torch refuses floats that equal them."""
    return value == (first, second) and type(value) is tuple and type(value[0]) is int and type(value[1]) is int


def _described(conv: nn.Conv2d, shape: tuple[int, ...]) -> str:
    try:
        described = str(conv)
    except (TypeError, ValueError):  # it takes pairs for granted
        return "an nn.Conv2d with attributes of other types than the class gives them"
    return described if shape[2:] == conv.kernel_size else f"{described} with a weight of {tuple(shape)}"


def _activation_name(module: nn.Module) -> str | None:
    kind = type(module)
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if kind is nn.ReLU:
        return "relu"
    return "identity" if kind is nn.Identity else None


def _is_altered(module: nn.Module) -> bool:
    """Whether calling this module does more or other than its class's forward."""
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


def _name(module: nn.Module | None) -> str:
    return type(module).__name__


def _fn_then_x(self, x):
    return self.fn(x) + x


def _x_then_fn(self, x):
    return x + self.fn(x)


def _instructions(function: object) -> tuple[object, ...] | None:
    """What a Python function does, apart from its names for arguments, its annotations and its docstring."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    # varargs, varkeywords, generators and coroutines
    kind = code.co_flags & (0x04 | 0x08 | 0x20 | 0x80 | 0x100 | 0x200)
    return code.co_code, code.co_names, code.co_argcount, code.co_kwonlyargcount, code.co_freevars, kind


_RESIDUAL_FORWARDS = frozenset({_instructions(_fn_then_x), _instructions(_x_then_fn)})
# class -> the forward that was proven; a class whose forward is replaced later is proven anew
_proven_residuals: dict[type, object] = {Residual: Residual.forward}


def _is_residual(module: nn.Module) -> bool:
    """Whether this module computes fn(x) + x.

    A class of another library (the paper's script, timm) is known by its forward's bytecode, which must be that of
    ``return self.fn(x) + x`` or ``return x + self.fn(x)``. This is a proof, and runs nothing: a class's name says too
    little, a numeric probe cannot see what depends on a mode, on the input or on chance, and source text may be absent.
    """
    kind = type(module)
    forward = getattr(kind, "forward", None)
    if _proven_residuals.get(kind) is not forward or forward is None or kind.__call__ is not nn.Module.__call__:
        if not (
            isinstance(module, nn.Module)
            and kind.__call__ is nn.Module.__call__
            and kind.__getattr__ is nn.Module.__getattr__
            and kind.__getattribute__ is nn.Module.__getattribute__
            and not hasattr(kind, "fn")
            and _instructions(forward) in _RESIDUAL_FORWARDS
        ):
            return False
        _proven_residuals[kind] = forward
    return "fn" not in module.__dict__

# SPDX-License-Identifier: MIT
"""From modules to mixer layers that an operator computes, or the reason why not; on every forward, as convmixer_kernels.recognize."""

from __future__ import annotations

from torch import nn

from convmixer_kernels.recognize import BlockModules, class_name, is_altered, recognize_block

from .reference import Residual


def recognize_layer(layer: nn.Sequential) -> tuple[BlockModules, BlockModules] | str:
    """The depthwise and the pointwise block of a mixer layer, or the reason why its modules must run.

    The caller asks changed_for_all, once for as many layers as it runs.
    """
    children = tuple(layer._modules.values())
    if len(children) != 4:
        return f"it has {len(children)} children, not the 4 of a mixer layer"
    residual, *pointwise = children
    if not _is_residual(residual):
        return f"its residual, {class_name(residual)}, is not known to compute fn(x) + x"
    fn = residual._modules.get("fn")
    if type(fn) is not nn.Sequential or len(fn._modules) != 3:
        return f"its residual's fn, {class_name(fn)}, is not an nn.Sequential of 3 modules"
    for module in (residual, fn):
        if is_altered(module):
            return f"its {class_name(module)} has a hook or its own forward"
    first = recognize_block("depthwise", *fn._modules.values())
    if isinstance(first, str):
        return first
    second = recognize_block("pointwise", *pointwise)
    return second if isinstance(second, str) else (first, second)


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

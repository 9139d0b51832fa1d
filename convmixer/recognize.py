# SPDX-License-Identifier: MIT
"""From modules to mixer layers that an operator computes, or the reason why not; on every forward, as convmixer_kernels.recognize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from convmixer_kernels.recognize import SEQUENTIALS, BlockModules, class_name, instructions, is_altered, recognize_block

from .reference import Residual


def recognize_layer(layer: nn.Sequential) -> tuple[BlockModules, BlockModules] | str:
    """The depthwise and the pointwise block of a mixer layer, or the reason why its modules must run.

    A layer is Sequential(residual, conv, act, norm), as the paper's code and timm have it, or Sequential(residual, Sequential(conv,
    act, norm)), as the paper's short implementation. The caller asks changed_for_all, once for as many layers as it runs.
    """
    residual, *pointwise = children = tuple(layer._modules.values()) or (None,)
    if len(children) not in (2, 4):
        return f"it has {len(layer._modules)} children, not the 2 or 4 of a mixer layer"
    if len(children) == 2:
        inner = _three_modules("its second child", children[1])
        if isinstance(inner, str):
            return inner
        pointwise = inner
    depthwise = _residual_modules(residual)
    if isinstance(depthwise, str):
        return depthwise
    first = recognize_block("depthwise", *depthwise)
    if isinstance(first, str):
        return first
    second = recognize_block("pointwise", *pointwise)
    return second if isinstance(second, str) else (first, second)


def _three_modules(what: str, module: nn.Module | None) -> tuple[nn.Module, ...] | str:
    """The children of an nn.Sequential of 3 modules, or the reason why it is none."""
    if type(module) not in SEQUENTIALS or len(module._modules) != 3:
        return f"{what}, {class_name(module)}, is not an nn.Sequential of 3 modules"
    if is_altered(module):
        return f"its {class_name(module)} has a hook or its own forward"
    return tuple(module._modules.values())


class _Methods(nn.Module):
    def fn_then_x(self, x):
        return self.fn(x) + x

    def x_then_fn(self, x):
        return x + self.fn(x)


class _SequentialMethods(nn.Sequential):
    def first_then_x(self, x):
        return self[0](x) + x

    def x_then_first(self, x):
        return x + self[0](x)

    def super_then_x(self, x):
        return super().forward(x) + x

    def x_then_super(self, x):
        return x + super().forward(x)


def _nameless(body: tuple | None) -> tuple | None:
    """A function's instructions without the one name that it uses, which may be another."""
    return body if body is None or len(body[1]) != 1 else (body[0], "one name", *body[2:])


_BY_NAME = {_nameless(instructions(f)) for f in (_Methods.fn_then_x, _Methods.x_then_fn)}
_BY_INDEX = {instructions(f) for f in (_SequentialMethods.first_then_x, _SequentialMethods.x_then_first)}
_BY_SUPER = {instructions(f) for f in (_SequentialMethods.super_then_x, _SequentialMethods.x_then_super)}


class _Proof(NamedTuple):
    forward: object  # the class's, when it was proven
    fn: str | None  # the child's name; None: all children of an nn.Sequential


#: class of a residual -> its proof
_proven: dict[type, _Proof] = {Residual: _Proof(Residual.forward, "fn")}


def _residual_modules(module: nn.Module) -> tuple[nn.Module, ...] | str:
    """conv, act and norm of a module that computes norm(act(conv(x))) + x, or the reason why it is none.

    Its class is proven once, by accelerate or, in a model that another process saved, on the first forward. From then on a forward
    only compares identities. A class with another forward than the proven one must be proven again.
    """
    kind = type(module)
    proof = _proven.get(kind)
    if proof is None or proof.forward is not kind.forward:
        proof = _prove(kind)
    if proof is None or kind.__call__ is not nn.Module.__call__ or proof.fn in module.__dict__:
        return f"its residual, {class_name(module)}, is not known to compute fn(x) + x"
    if is_altered(module):
        return f"its {class_name(module)} has a hook or its own forward"
    if proof.fn is None:
        children: Sequence[nn.Module] = tuple(module._modules.values())
        return children if len(children) == 3 else f"its residual has {len(children)} children, not 3"
    if proof.fn == "0" and len(module._modules) != 1:
        return f"its residual, {class_name(module)}, has {len(module._modules)} children, not 1"
    return _three_modules("its residual's fn", module._modules.get(proof.fn))


def _prove(kind: type) -> _Proof | None:
    """What each call of this class's forward adds to x, if it computes fn(x) + x; then it is remembered.

    The proof is the bytecode of forward, which must be that of ``return self.fn(x) + x``, with any name for fn, or, in an
    nn.Sequential, of ``self[0](x) + x`` or ``super().forward(x) + x``; x may come first. It runs nothing. A class's name says too
    little, a numeric test misses what depends on a mode, on the input or on chance, and source text may be absent.
    """
    forward = getattr(kind, "forward", None)
    body = instructions(forward)
    if (
        body is None
        or not issubclass(kind, nn.Module)
        or kind.__call__ is not nn.Module.__call__
        or kind.__getattr__ is not nn.Module.__getattr__
        or kind.__getattribute__ is not nn.Module.__getattribute__
    ):
        return None
    proof = None
    if _nameless(body) in _BY_NAME and not hasattr(kind, body[1][0]):
        proof = _Proof(forward, body[1][0])
    elif issubclass(kind, nn.Sequential) and kind.__getitem__ is nn.Sequential.__getitem__:
        if body in _BY_INDEX:
            proof = _Proof(forward, "0")
        elif body in _BY_SUPER and kind.__bases__ == (nn.Sequential,) and _is_plain_super(forward, kind):
            proof = _Proof(forward, None)
    if proof is not None:
        _proven[kind] = proof
    return proof


def _is_plain_super(forward: object, kind: type) -> bool:
    """Whether super() in this function means nn.Sequential."""
    return "super" not in forward.__globals__ and forward.__closure__[0].cell_contents is kind

# SPDX-License-Identifier: MIT
"""Whether somebody replaced a function or class of torch's for all: then a layer runs its modules, which call it."""

from __future__ import annotations

import operator
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: What is run when a layer's modules are called. Who replaces one of these means every call of it.
_RUNS = [
    (owner, name)
    for owner, names in (
        (nn.Module, ("__call__", "_call_impl", "__getattr__")),
        (nn.Conv2d, ("__call__", "forward", "_conv_forward")),
        (nn.BatchNorm2d, ("__call__", "forward", "_check_input_dim")),
        *((module, ("__call__", "forward")) for module in (nn.GELU, nn.ReLU, nn.Identity)),
        (nn.Sequential, ("__call__", "__iter__", "forward")),
        (F, ("conv2d", "batch_norm", "gelu", "relu")),
        (torch, ("batch_norm", "relu", "relu_")),
        (Tensor, ("__add__",)),
    )
    for name in names
]
_OWNERS, _NAMES = zip(*_RUNS, strict=True)


def _is_torchs(function: object) -> bool:
    """Whether it is compiled, or written in one of torch's own files: then nobody had replaced it before this import."""
    if isinstance(function, types.FunctionType):
        return str(function.__globals__.get("__name__")).partition(".")[0] == "torch"
    return isinstance(function, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType))


# object() is nobody's: a function that was foreign at import never counts as torch's own
_ORIGINALS = [f if _is_torchs(f) else object() for f in map(getattr, _OWNERS, _NAMES)]


def torch_is_itself() -> bool:
    """Whether torch runs what it ran when it was written, in about a microsecond."""
    return all(map(operator.is_, map(getattr, _OWNERS, _NAMES), _ORIGINALS))


# what torch.compiler.assume_constant_result does, but for importing torch._dynamo, which takes a second
torch_is_itself._dynamo_marked_constant = True  # type: ignore[attr-defined]


def replaced_in_torch() -> str:
    """The first name of those that somebody replaced."""
    kept = map(operator.is_, map(getattr, _OWNERS, _NAMES), _ORIGINALS)
    owner, name = next(run for run, same in zip(_RUNS, kept, strict=True) if not same)
    return f"{owner.__name__}.{name}"

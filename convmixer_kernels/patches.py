# SPDX-License-Identifier: MIT
"""Whether a function or method of torch's was replaced for everyone (nn.GELU.forward = ...): a layer must then run its modules."""

from __future__ import annotations

import operator
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: What a layer's modules run. Somebody who replaces one of these expects every call of it to change.
_WATCHED = [
    (owner, name)
    for owner, names in (
        (nn.Module, ("__call__", "_call_impl", "__getattr__")),
        (nn.Conv2d, ("__call__", "forward", "_conv_forward")),
        (nn.BatchNorm2d, ("__call__", "forward", "_check_input_dim")),
        (nn.SyncBatchNorm, ("__call__", "forward", "_check_input_dim", "_check_non_zero_input_channels")),
        *((module, ("__call__", "forward")) for module in (nn.GELU, nn.ReLU, nn.Identity)),
        (nn.Sequential, ("__call__", "__getitem__", "__iter__", "forward")),
        (F, ("conv2d", "batch_norm", "gelu", "relu")),
        (torch, ("batch_norm", "relu", "relu_")),
        (Tensor, ("__add__",)),
    )
    for name in names
]
_OWNERS, _NAMES = zip(*_WATCHED, strict=True)


def _is_torchs(function: object) -> bool:
    """Whether it is compiled or comes from one of torch's own files. If not, it was replaced before this import."""
    if isinstance(function, types.FunctionType):
        return str(function.__globals__.get("__name__")).partition(".")[0] == "torch"
    return isinstance(function, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType))


# object() equals nothing: a function that was replaced before this import never counts as torch's own
_ORIGINALS = [f if _is_torchs(f) else object() for f in map(getattr, _OWNERS, _NAMES)]


def torch_is_itself() -> bool:
    """Whether none of them was replaced. Takes about a microsecond."""
    return all(map(operator.is_, map(getattr, _OWNERS, _NAMES), _ORIGINALS))


# as torch.compiler.assume_constant_result, which would import torch._dynamo and take a second
torch_is_itself._dynamo_marked_constant = True  # type: ignore[attr-defined]


def replaced_in_torch() -> str:
    """The name of the first one that was replaced."""
    owner, name = next(
        (owner, name)
        for (owner, name), original in zip(_WATCHED, _ORIGINALS, strict=True)
        if getattr(owner, name) is not original
    )
    return f"{owner.__name__}.{name}"

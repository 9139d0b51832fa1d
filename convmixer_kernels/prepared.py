# SPDX-License-Identifier: MIT
"""Calls that were checked before: the same tensors in the same state, an input of the same form, the same settings.

A layer of a network is called again and again with the parameters and statistics that it had the time before. Its first call checks
them, chooses a backend and makes the arguments of its native calls; `find` recognises a call that needs none of it again. An entry
holds addresses and weak references, no tensor, and nothing that depends on a tensor's values. Each tensor is compared by identity and by
all that an in-place operation, `.data =` or a resized storage can change: address, shape, dtype, strides, size of the storage, sign.
"""

from __future__ import annotations

import weakref
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch
from .primitives import EvaluateLayer, TrainLayer

#: More entries than any model has layers and shapes; then all are forgotten.
_MOST_ENTRIES = 4096


class Entry(NamedTuple):
    """A checked call."""

    references: tuple[weakref.ref | None, ...]  # to the tensors, None for None
    states: tuple[tuple | None, ...]
    settings: tuple
    requested: str | None  # the backend that was asked for by name
    as_modules: bool  # whether nn.Conv2d and nn.BatchNorm2d accept these dtypes together too
    backend: ModuleType
    revision: tuple | None
    evaluate: EvaluateLayer | None
    train: TrainLayer | None


_entries: dict[tuple, Entry] = {}


def state_of(t: Tensor) -> tuple:
    """All that may change about a plain tensor that stays the same object, but its values."""
    return t.data_ptr(), t.shape, t.dtype, t.stride(), t.untyped_storage().nbytes(), t.is_neg()


def _form_of(x: Tensor) -> tuple:
    """All of an input that a check or a native call depends on, but its address and values."""
    return x.shape, x.dtype, x.stride(), x.device


def _unusual() -> bool:
    """Whether something beside the tensors decides what a call does: then it is checked anew."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def find(op: str, x: Tensor, tensors: tuple[Tensor | None, ...], settings: tuple, backend: str | None) -> Entry | None:
    """The entry of a call that was checked before, or None. tensors[0] is a weight.

    torch.compile traces the checks themselves: the caller asks torch.compiler.is_compiling first.
    """
    if type(x) is not Tensor or x.layout is not torch.strided or _unusual():
        return None
    entry = _entries.get((op, id(tensors[0]), *_form_of(x)))
    if entry is None or entry.settings != settings:
        return None
    for reference, t in zip(entry.references, tensors, strict=True):
        if (None if reference is None else reference()) is not t:
            return None
    for state, t in zip(entry.states, tensors, strict=True):
        if t is not None and state != state_of(t):
            return None
    if entry.requested != dispatch.requested_backend(op, backend) or entry.revision != _revision(entry.backend):
        return None
    if x.is_neg() or x._is_zerotensor() or x.untyped_storage().nbytes() < (x.storage_offset() + x.numel()) * x.itemsize:
        return None
    return entry


def keep(
    op: str,
    x: Tensor,
    tensors: tuple[Tensor | None, ...],
    settings: tuple,
    requested: str | None,
    as_modules: bool,
    backend: ModuleType,
    evaluate: EvaluateLayer | None,
    train: TrainLayer | None,
) -> None:
    """Remember a call whose tensors are plain and contiguous, and whose x is plain and dense."""
    # a weight that is computed anew for each call never comes back
    if type(x) is not Tensor or _unusual() or not tensors[0].is_leaf:
        return
    if len(_entries) >= _MOST_ENTRIES:
        _entries.clear()
    references = tuple(None if t is None else weakref.ref(t) for t in tensors)
    states = tuple(None if t is None else state_of(t) for t in tensors)
    key = (op, id(tensors[0]), *_form_of(x))
    _entries[key] = Entry(
        references, states, settings, requested, as_modules, backend, _revision(backend), evaluate, train
    )


def _revision(backend: ModuleType) -> tuple | None:
    layers = dispatch.load_layers(backend.name)
    return None if layers is None else layers.revision()

# SPDX-License-Identifier: MIT
"""May a kernel replace torch's operations in this call? Each question that decides it is asked here, once.

A kernel reads memory by address and knows only plain tensors. It must not run if a transform, a mode, a tracer or a compiler gives
the call another meaning, or has to see torch's own operations.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

#: Exact classes: a subclass of Tensor may redefine every operation.
PLAIN_TENSORS = frozenset({Tensor, nn.Parameter})
_PLAIN_OR_NONE = PLAIN_TENSORS | {type(None)}


def all_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether each is None or exactly a Tensor or Parameter."""
    return _PLAIN_OR_NONE.issuperset(map(type, tensors))


def torch_func_active() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) is active: tensors may be wrapped, and then have no storage."""
    return torch._C._are_functorch_transforms_active()


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def jit_tracing() -> bool:
    """Whether torch.jit.trace records this call."""
    return torch._C._get_tracing_state() is not None


def recording() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace records this call."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def exporting() -> bool:
    """Whether torch.export records this call, for a program that must run without this package."""
    return torch.compiler.is_exporting()


def dispatch_mode_active() -> bool:
    """Whether a TorchDispatchMode sees the operators of this call."""
    return torch._C._len_torch_dispatch_stack() > 0


def watched() -> bool:
    """Whether a mode sees torch's functions or operators. torch.device as a mode only sets a default and does not count."""
    if torch.compiler.is_compiling():
        return False  # the compiler calls the modes itself
    if torch._C._len_torch_dispatch_stack():
        return True
    modes = torch._C._len_torch_function_stack()
    return modes > 0 and any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(modes))

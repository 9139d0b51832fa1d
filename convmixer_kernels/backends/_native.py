# SPDX-License-Identifier: MIT
"""What the native backends share: the limits of the native modules, and tensors as their flat arguments.

A native module takes addresses. Each tensor whose address is passed stays referenced by the calling function, and autograd.py has
checked that its storage holds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..primitives import ACTIVATIONS, Norm

#: By dtype and by activation name, as in csrc/types.h.
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATION_CODES = {activation: code for code, activation in enumerate(ACTIVATIONS)}

_NO_PARAM = (0, 0)
NO_NORM = (False, 0, 0, 0, 0, 0, 0, 0, 0, 0.0)


def unsupported(x: Tensor, weight: Tensor, largest_kernel: int) -> str | None:
    """Why a native module does not take tensors of this dtype and kernel size, or None."""
    if x.dtype not in CODES:
        return f"it takes float32, float16 and bfloat16, got x.dtype={x.dtype}"
    if max(weight.shape[2:]) > largest_kernel:
        return f"it takes kernels up to {largest_kernel}x{largest_kernel}, got weight.shape={tuple(weight.shape)}"
    return None


def shape_args(x: Tensor) -> tuple[int, int, int, int, int, bool]:
    """N, C, H, W, the dtype's code, and whether x is channels_last."""
    return *x.shape, CODES[x.dtype], not x.is_contiguous()


def address(t: Tensor | None) -> int:
    """The tensor's address, 0 for None."""
    return 0 if t is None else t.data_ptr()


def param_args(t: Tensor | None) -> tuple[int, int]:
    """A weight's or a vector's address and dtype code."""
    return _NO_PARAM if t is None else (t.data_ptr(), CODES[t.dtype])


def norm_args(norm: Norm | None) -> tuple:
    """Whether there is a norm, its four vectors, and eps."""
    if norm is None:
        return NO_NORM
    mean, var, weight, bias, eps = norm
    return True, *param_args(mean), *param_args(var), *param_args(weight), *param_args(bias), eps


def sums_args(sums: tuple[Tensor, Tensor] | None) -> tuple[int, int]:
    """The addresses of norm_backward's two sums; 0 if the statistics were constants."""
    return (0, 0) if sums is None else (sums[0].data_ptr(), sums[1].data_ptr())

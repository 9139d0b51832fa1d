# SPDX-License-Identifier: MIT
"""The rule that decides whether a result is right: "twice eager".

Truth is float64. A result passes if its relative L2 error is at most twice that of eager PyTorch, at the same dtype and on the
same inputs, plus one rounding step of that dtype. Tests and benchmarks both use it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .primitives import convolution

#: Half the distance from 1 to the next number: the relative error of rounding to nearest.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64 (L2 over all elements).

    It is 0 for two empty tensors. If `exact` is zero everywhere, it is 0 if `actual` is too, else inf. It is NaN if `actual` has
    a NaN or infinity that `exact` does not have in the same place; equal non-finite values are left out.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != exact.shape:
        raise ValueError(f"relative_error: shapes differ, got {tuple(actual.shape)} and {tuple(exact.shape)}")
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    finite = exact.isfinite()
    if not finite.all():
        same = torch.where(exact.isnan(), actual.isnan(), actual == exact)
        if not same[~finite].all():
            return float("nan")
        actual, exact = actual[finite], exact[finite]
    difference, norm = torch.linalg.vector_norm(actual - exact).item(), torch.linalg.vector_norm(exact).item()
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf") if difference == difference else float("nan")
    return difference / norm


def within_twice_eager(error: float, eager_error: float, dtype: torch.dtype) -> bool:
    """error <= 2 * eager_error + u(dtype). False if `error` is NaN, or if `eager_error` is NaN or infinite."""
    if not eager_error < float("inf"):
        return False
    return error <= 2.0 * eager_error + UNIT_ROUNDOFF[dtype]


#: A kernel side from which torch's own 16-bit depthwise convolution may never return on a CPU: oneDNN on processors with AVX-512 FP16
#: (torch 2.13; float16 in both layouts, bfloat16 in channels_last), forward only as far as is known.
_ENDLESS_FROM = 15


def never_returns(
    x: Tensor, weight: Tensor, dtype: torch.dtype | None = None, dilation: tuple[int, int] = (1, 1)
) -> bool:
    """Whether torch may not return from this depthwise convolution or its backward in `dtype` (x's unless given), on x's device.

    Every caller of torch's convolution asks this function, and computes in float32 if it returns True.
    """
    small = x.dtype if dtype is None else dtype
    span = max(d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True))
    return small in (torch.float16, torch.bfloat16) and span >= _ENDLESS_FROM and x.device.type == "cpu"


def eager_convolution(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C_out, C / groups, kH, kW)
    bias: Tensor | None,  # (C_out,)
    groups: int,
    padding: str | int | tuple[int, ...] = "same",
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """F.conv2d with these arguments, with autocast, which always returns."""
    autocast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if not never_returns(x, weight, dtype, dilation):
        return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=groups)
    with torch.autocast("cpu", enabled=False):
        return convolution(x.to(dtype), weight, bias, groups, padding, dilation)

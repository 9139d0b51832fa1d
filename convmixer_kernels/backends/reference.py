# SPDX-License-Identifier: MIT
"""The primitives in plain torch operations: the definition that the other backends are held against. Runs everywhere.

float64 stays float64. For 32- and 16-bit tensors what follows the convolution is float32 in the forward, float64 in the backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..primitives import Norm, Update, activate, convolution, update_running_statistics, wide

name = "reference"


def can_run(op: str, x: Tensor, weight: Tensor, dilation: tuple[int, int] = (1, 1)) -> str | None:
    """None if this backend can run `op` on these tensors, else the reason why not. This backend always can."""
    return None


def build_info() -> dict[str, object]:
    """What this backend is made of, for convmixer_kernels.build_info()."""
    return {"available": True, "detail": "torch operations"}


def _per_channel(t: Tensor) -> Tensor:
    return wide(t).view(1, -1, 1, 1)


def _activation_grad(a: Tensor, activation: str) -> Tensor:
    """act'(a) of a GELU or the identity, elementwise, in a's dtype."""
    if activation == "identity":
        return torch.ones_like(a)
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(a * math.sqrt(0.5)))
        return cdf + a * torch.exp(-0.5 * a * a) * (1 / math.sqrt(2 * math.pi))
    kappa, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(kappa * (a + cubic * a**3))
    return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * kappa * (1 + 3 * cubic * a * a)


def _scale(norm: Norm) -> Tensor:
    scale = torch.rsqrt(wide(norm.var) + norm.eps)
    return scale if norm.weight is None else scale * wide(norm.weight)


def _apply_norm(h: Tensor, norm: Norm | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    if norm is not None:
        h = (h - _per_channel(norm.mean)) * _per_channel(_scale(norm))
        if norm.bias is not None:
            h = h + _per_channel(norm.bias)
    if residual is not None:
        h = h + residual
    return h.to(dtype)


def _da(dy: Tensor, a: Tensor | None, activation: str, norm: Norm | None, sums: tuple[Tensor, Tensor] | None) -> Tensor:
    """The gradient of the convolution's output, in float64: eager batch norm's backward is wider than its tensors too."""
    da = dy.double()
    h = None if a is None else a.double()
    if norm is not None:
        rstd = torch.rsqrt(norm.var.double() + norm.eps)
        if sums is not None:
            count = dy.numel() // dy.shape[1]
            # the activation rounded as in the forward, because the statistics hold the mean of that
            hhat = (activate(wide(a), activation).double() - _per_channel(norm.mean)) * _per_channel(rstd)
            da = da - _per_channel(sums[0] / count) - hhat * _per_channel(sums[1] / count)
        da = da * _per_channel(rstd if norm.weight is None else rstd * norm.weight)
    if activation == "relu":
        # 0 for a <= 0, also if dh is NaN; dh if a is NaN: as torch's threshold_backward
        return da.masked_fill(h <= 0, 0.0)
    return da if activation == "identity" else da * _activation_grad(h, activation)


def _convolution(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C_out, C / groups, kH, kW)
    bias: Tensor | None,  # (C_out,)
    groups: int,
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    return _in_format_of(x, convolution(x, weight, bias, groups, dilation=dilation))


def _padding(weight: Tensor, dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """Padding "same" at the left, right, top and bottom."""
    rows, columns = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """y in x's memory format. (F.conv2d follows a channels_last weight.)"""
    return y.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)


def depthwise_eval(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    activation: str,
    norm: Norm | None,
    residual: bool,
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:  # (N, C, H, W)
    """norm(act(conv(x) + bias)) (+ x), in one pass."""
    h = activate(wide(_convolution(x, weight, bias, x.shape[1], dilation)), activation)
    return _apply_norm(h, norm, x if residual else None, x.dtype)


def depthwise_train(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """a = conv(x) + bias rounded to x's dtype, and mean and biased variance (float32) of act(a) over N, H, W."""
    a = _convolution(x, weight, bias, x.shape[1])
    return a, *_statistics(a, activation)


def pointwise_eval(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
    activation: str,
    norm: Norm | None,
) -> Tensor:  # (N, C_out, H, W)
    """norm(act(conv1x1(x) + bias)), in one pass."""
    return _apply_norm(activate(wide(_convolution(x, weight, bias, 1)), activation), norm, None, x.dtype)


def pointwise_train(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As depthwise_train, for the 1x1 convolution."""
    a = _convolution(x, weight, bias, 1)
    return a, *_statistics(a, activation)


def _statistics(a: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(activate(wide(a), activation), dim=(0, 2, 3), correction=0)
    return mean, var


def normalize(
    a: Tensor,  # (N, C, H, W)
    activation: str,
    norm: Norm,
    residual: Tensor | None,  # (N, C, H, W)
    updates: Sequence[Update] = (),
) -> Tensor:  # (N, C, H, W)
    """norm(act(a)) (+ residual): the second pass of the training forward, and z rebuilt in mixer_layer's backward."""
    y = _apply_norm(activate(wide(a), activation), norm, residual, a.dtype)
    for update in updates:
        update_running_statistics(update)
    return y


def norm_backward(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor,  # (N, C, H, W)
    activation: str,
    norm: Norm,
) -> tuple[Tensor, Tensor]:
    """sum dy and sum dy * hhat over N, H, W: the gradients of beta and gamma, (C,) each, here in float64."""
    rstd = torch.rsqrt(norm.var.double() + norm.eps)
    hhat = (activate(wide(a), activation).double() - _per_channel(norm.mean)) * _per_channel(rstd)
    dy = dy.double()
    return dy.sum((0, 2, 3)), (dy * hhat).sum((0, 2, 3))


def depthwise_input_grad(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor | None,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    residual: bool,
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """dx = correlate(da, flipped weight) (+ dy): for even k the paddings change sides."""
    da = _da(dy, a, activation, norm, sums).to(wide(dy).dtype)
    left, right, top, bottom = _padding(weight, dilation)
    padded = F.pad(da, (right, left, bottom, top))
    dx = F.conv2d(padded, weight.flip(2, 3).to(da.dtype), dilation=dilation, groups=dy.shape[1])
    return _in_format_of(dy, (dx + dy if residual else dx).to(dy.dtype))


def depthwise_weight_grad(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor | None,  # (N, C, H, W)
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW): for its shape and dtype
    bias: Tensor | None,  # (C,): for its presence and dtype
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    dilation: tuple[int, int] = (1, 1),
) -> tuple[Tensor, Tensor | None]:
    """dw[c, 0, i, j] = sum da * shifted x and db = sum da, in weight's and bias's dtypes; db is None if bias is."""
    # one convolution sums over all N * H * W values, in float64: float32 would lose digits that eager's sum over images keeps
    da = _da(dy, a, activation, norm, sums)
    n, channels, height, width = x.shape
    padded = F.pad(x.to(da.dtype), _padding(weight, dilation))
    # images become the channels that are summed over: (1, C * N, padded H, padded W) with filters (C * 1, N, H, W)
    images = padded.transpose(0, 1).reshape(1, channels * n, *padded.shape[2:])
    filters = da.transpose(0, 1).reshape(channels, n, height, width)
    dw = F.conv2d(images, filters, stride=dilation, groups=channels).view(weight.shape)
    db = None if bias is None else da.sum((0, 2, 3)).to(bias.dtype)
    return dw.to(weight.dtype), db


def pointwise_backward(
    dy: Tensor,  # (N, C_out, H, W)
    a: Tensor,  # (N, C_out, H, W)
    x: Tensor | None,  # (N, C_in, H, W); None if dw is not needed
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,): for its presence and dtype
    activation: str,
    norm: Norm,
    sums: tuple[Tensor, Tensor] | None,
    needs: tuple[bool, bool, bool],  # dx, dw, db
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx = weight^T da, dw = da x^T, db = sum da; None if not needed."""
    da = _da(dy, a, activation, norm, sums)
    dx = dw = db = None
    if needs[0]:
        dtype = wide(dy).dtype
        dx = _in_format_of(dy, F.conv2d(da.to(dtype), weight.to(dtype).transpose(0, 1)).to(dy.dtype))
    if needs[1]:
        rows, columns = da.transpose(0, 1).flatten(1), x.to(da.dtype).transpose(0, 1).flatten(1)
        dw = (rows @ columns.t()).view(weight.shape).to(weight.dtype)
    if needs[2] and bias is not None:
        db = da.sum((0, 2, 3)).to(bias.dtype)
    return dx, dw, db

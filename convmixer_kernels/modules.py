# SPDX-License-Identifier: MIT
"""The operators as nn.Modules, for your own networks; convmixer.ConvMixer keeps the reference's module tree instead."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import functional
from .primitives import ACTIVATIONS


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d(channels, channels, kernel_size, padding="same", groups=channels), run by depthwise_conv2d.

    Same parameters, state_dict and initialisation; (N, C, H, W) -> (N, C, H, W).

    Args:
        channels: C.
        kernel_size: k or (kH, kW).
        bias: whether to learn a bias (C,).
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            channels, channels, kernel_size, padding="same", groups=channels, bias=bias, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        return functional.depthwise_conv2d(x, self.weight, self.bias)


class _Block(nn.Module):
    """The parameters and buffers of one block, with nn.Conv2d's and nn.BatchNorm2d's initialisation and meaning."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            raise ValueError(f"{type(self).__name__}: activation must be one of {known}, got {activation!r}")
        self.activation, self.eps, self.momentum = activation, norm.eps, norm.momentum
        self.weight, self.bias = conv.weight, conv.bias
        self.norm_weight, self.norm_bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))

    def _run(self, operator: Callable[..., Tensor], x: Tensor, **options: bool) -> Tensor:
        batch_statistics = self.training or self.running_mean is None
        momentum = self.momentum
        if momentum is None:
            # nn.BatchNorm2d's cumulative average
            tracked = self.training and self.num_batches_tracked is not None
            momentum = 1.0 / float(self.num_batches_tracked + 1) if tracked else 0.0
        tensors = (self.weight, self.bias, self.norm_weight, self.norm_bias, self.running_mean, self.running_var)
        shared = {"training": batch_statistics, "momentum": momentum, "eps": self.eps, "activation": self.activation}
        y = operator(x, *tensors, **shared, **options)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return y

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, activation={self.activation!r}, eps={self.eps}"


class DepthwiseBlock(_Block):
    """norm(act(conv(x))) + x with a depthwise convolution of padding "same": (N, C, H, W) -> (N, C, H, W).

    Parameters weight (C, 1, kH, kW), bias, norm_weight, norm_bias (C,), buffers running_mean, running_var (C,),
    num_batches_tracked.

    Args:
        channels: C.
        kernel_size: k or (kH, kW).
        activation: "gelu", "gelu_tanh", "relu" or "identity".
        residual: add x.
        bias: whether the convolution has a bias.
        eps, momentum, affine, track_running_stats: as nn.BatchNorm2d's.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown activation. Those of functional.depthwise_block in forward.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 9,
        *,
        activation: str = "gelu",
        residual: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        conv = DepthwiseConv2d(channels, kernel_size, bias, device, dtype)
        norm = nn.BatchNorm2d(channels, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(conv, norm, activation)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        return self._run(functional.depthwise_block, x, residual=self.residual)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, residual={self.residual}"


class PointwiseBlock(_Block):
    """norm(act(conv1x1(x))): (N, C_in, H, W) -> (N, C_out, H, W).

    Parameters weight (C_out, C_in, 1, 1), bias, norm_weight, norm_bias (C_out,), and DepthwiseBlock's buffers.

    Args:
        in_channels: C_in.
        out_channels: C_out; None for C_in.
        The other arguments and errors are those of DepthwiseBlock.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        out_channels = in_channels if out_channels is None else out_channels
        conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)
        norm = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(conv, norm, activation)

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W)
        return self._run(functional.pointwise_block, x)

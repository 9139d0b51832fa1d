# SPDX-License-Identifier: MIT
"""The operators as nn.Modules, for your own networks; convmixer.ConvMixer keeps the reference's module tree instead.

Each decides on each forward, from its modules as they are then, whether its operator gives the same as running them. If it might not
(another norm, a hook, a parametrization of a block's child, torch.export, torch.jit, torch.fx, a tensor subclass), the modules run, and
so do they if eager PyTorch was measured to be faster (dispatch.gains).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .recognize import CONVOLUTIONS, SEQUENTIALS, changed_for_all
from .run import run_as_block, run_children, run_convolution

#: Name of an activation -> what makes its module.
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "identity": nn.Identity,
}


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d(channels, channels, kernel_size, padding="same", groups=channels), run by depthwise_conv2d.

    Same parameters, state_dict and initialisation; (N, C, H, W) -> (N, C, H, W). Changed attributes (stride, padding) count as nn.Conv2d's.

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

    def forward(self, input: Tensor) -> Tensor:  # (N, C, H, W)
        if not torch.jit.is_scripting():
            y = run_convolution(self, input)
            return super().forward(input) if y is None else y
        return self._conv_forward(input, self.weight, self.bias)


CONVOLUTIONS.add(DepthwiseConv2d)


class BlockSequential(nn.Sequential):
    """An nn.Sequential that runs each convolution, activation, norm among its children as one block, if an operator computes it.

    convmixer.accelerate makes it of an nn.Sequential. A depthwise convolution needs stride 1 and padding "same", any other is 1x1; the
    activation is GELU, ReLU or Identity, the norm an nn.BatchNorm2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if changed_for_all() is None:
                return run_children(tuple(self._modules.values()), input)
            return super().forward(input)
        for module in self:
            input = module(input)
        return input


SEQUENTIALS.add(BlockSequential)


class _Block(nn.Module):
    """A convolution, an activation and a norm."""

    def __init__(self, conv: nn.Conv2d, activation: str, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            known = ", ".join(sorted(_ACTIVATIONS))
            raise ValueError(f"{type(self).__name__}: activation must be one of {known}, got {activation!r}")
        self.conv, self.act, self.norm = conv, _ACTIVATIONS[activation](), norm


class DepthwiseBlock(_Block):
    """norm(act(conv(x))) + x with a depthwise convolution of padding "same": (N, C, H, W) -> (N, C, H, W).

    Children: conv (DepthwiseConv2d), act, norm (nn.BatchNorm2d).

    Args:
        channels: C.
        kernel_size: k or (kH, kW).
        activation: "gelu", "gelu_tanh", "relu" or "identity".
        residual: add x.
        bias: whether the convolution has a bias.
        eps, momentum, affine, track_running_stats: as nn.BatchNorm2d's.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown activation. forward raises what its modules raise.
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
        super().__init__(conv, activation, norm)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        if not torch.jit.is_scripting():
            y = run_as_block("depthwise", (self.conv, self.act, self.norm), x, self.residual)
            if y is not None:
                return y
        h = self.norm(self.act(self.conv(x)))
        return h + x if self.residual else h

    def extra_repr(self) -> str:
        return f"residual={self.residual}"


class PointwiseBlock(_Block):
    """norm(act(conv1x1(x))): (N, C_in, H, W) -> (N, C_out, H, W).

    Children: conv (nn.Conv2d), act, norm (nn.BatchNorm2d).

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
        super().__init__(conv, activation, norm)

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W)
        if not torch.jit.is_scripting():
            y = run_as_block("pointwise", (self.conv, self.act, self.norm), x)
            if y is not None:
                return y
        return self.norm(self.act(self.conv(x)))

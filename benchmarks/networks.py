# SPDX-License-Identifier: MIT
"""Networks with large depthwise kernels other than ConvMixer, in plain torch modules and of their published sizes.

They are written here to be measured before and after convmixer.accelerate: what is trained with them is no part of it. Sources: "A ConvNet
for the 2020s" (Liu et al. 2022), "Scaling Up Your Kernels to 31x31" (Ding et al. 2022), "More ConvNets in the 2020s" (Liu et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A network as cases.py lists it; see cases.Preset for the fields that both have."""

    label: str
    make: Callable[[], nn.Module]
    image_size: int = 224
    n_classes: int = 1000
    batch: int = 2
    quick_batch: int = 1
    quick_training: bool = False


def _conv(channels: int, kernel: int | tuple[int, int], **options: bool) -> nn.Conv2d:
    """Depthwise."""
    return nn.Conv2d(channels, channels, kernel, padding="same", groups=channels, **options)


def _conv_bn(
    inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    sizes = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = tuple(size // 2 for size in sizes)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class _ChannelNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:  # (N, C, H, W)
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Sum(nn.Module):
    """The sum of branches, as large kernels are trained: each a convolution and a norm."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int, depthwise: nn.Module) -> None:
        super().__init__()
        self.depthwise, self.norm = depthwise, nn.LayerNorm(channels, eps=1e-6)
        self.wide, self.act, self.narrow = (
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
        )
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.narrow(self.act(self.wide(h)))).permute(0, 3, 1, 2)


class _LargeKernelBlock(nn.Module):
    """RepLKNet's: norm, 1x1, large and small depthwise kernel, 1x1, residual; then the same without kernels, four times as wide."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        large = _Sum(*(_conv_bn(channels, channels, k, groups=channels) for k in (kernel, 5)))
        self.mix = nn.Sequential(
            nn.BatchNorm2d(channels),
            *_conv_bn(channels, channels),
            nn.ReLU(),
            large,
            nn.ReLU(),
            *_conv_bn(channels, channels),
        )
        self.feed = nn.Sequential(
            nn.BatchNorm2d(channels), *_conv_bn(channels, 4 * channels), nn.GELU(), *_conv_bn(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.feed(x)


def _stages(
    widths: Sequence[int],
    depths: Sequence[int],
    block: Callable[[int, int], nn.Module],  # of a stage's number and width
    between: Callable[[int, int], list[nn.Module]],  # of two widths
) -> Iterator[nn.Module]:
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            yield from between(widths[stage - 1], width)
        yield from (block(stage, width) for _ in range(depth))


def _patches(inputs: int, outputs: int) -> list[nn.Module]:
    return [_ChannelNorm(inputs, eps=1e-6), nn.Conv2d(inputs, outputs, 2, 2)]


def _convnext(widths: Sequence[int], depthwise: Callable[[int, int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, widths[0], 4, 4),
        _ChannelNorm(widths[0], eps=1e-6),
        *_stages(widths, (3, 3, 9, 3), lambda i, c: _ConvNeXtBlock(c, depthwise(i, c)), _patches),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(widths[-1], eps=1e-6),
        nn.Linear(widths[-1], 1000),
    )


def convnext_t() -> nn.Sequential:
    """ConvNeXt-T: 7x7."""
    return _convnext((96, 192, 384, 768), lambda stage, channels: _conv(channels, 7))


def slak_t() -> nn.Sequential:
    """SLaK-T without its sparsity: 51x5, 5x51 and 5x5 in the first stage."""

    def depthwise(stage: int, channels: int) -> nn.Module:
        long = (51, 49, 47, 13)[stage]
        return _Sum(*(_conv_bn(channels, channels, k, groups=channels) for k in ((long, 5), (5, long), 5)))

    return _convnext((124, 249, 499, 998), depthwise)


def replknet_31b() -> nn.Sequential:
    """RepLKNet-31B: 31x31 with 5x5 in the first stage."""
    widths = (128, 256, 512, 1024)
    stem = [
        *(*_conv_bn(3, 128, 3, 2), nn.ReLU(), *_conv_bn(128, 128, 3, groups=128), nn.ReLU()),
        *(*_conv_bn(128, 128), nn.ReLU(), *_conv_bn(128, 128, 3, 2, groups=128), nn.ReLU()),
    ]

    def between(inputs: int, outputs: int) -> list[nn.Module]:
        return [*_conv_bn(inputs, outputs), nn.ReLU(), *_conv_bn(outputs, outputs, 3, 2, groups=outputs), nn.ReLU()]

    return nn.Sequential(
        *stem,
        *_stages(widths, (2, 2, 18, 2), lambda i, c: _LargeKernelBlock(c, (31, 29, 27, 13)[i]), between),
        nn.BatchNorm2d(1024),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1024, 1000),
    )


NETWORKS = {
    "ConvNeXt-T": Network("ConvNeXt-T, 224x224", convnext_t, batch=4, quick_training=True),
    "RepLKNet-31B": Network("RepLKNet-31B, 224x224", replknet_31b),
    "SLaK-T": Network("SLaK-T, 224x224", slak_t),
}

# SPDX-License-Identifier: MIT
"""ConvMixer in plain torch modules: the definition that tests and benchmarks compare the fast model with.

Source: Trockman and Kolter, "Patches Are All You Need?", https://arxiv.org/abs/2201.09792.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Name of an activation -> what makes its module.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "identity": nn.Identity,
}


class Residual(nn.Module):
    """``fn(x) + x``."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def ConvMixer(
    dim: int,
    depth: int,
    kernel_size: int | tuple[int, int] = 9,
    patch_size: int | tuple[int, int] = 7,
    n_classes: int = 1000,
    *,
    in_chans: int = 3,
    activation: str = "gelu",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """The paper's ConvMixer: patch embedding, `depth` mixer layers, pooling and a classifier.

        layer(x) = BatchNorm(act(conv_1x1(z))) with z = BatchNorm(act(conv_depthwise_kxk(x))) + x

    Args, Returns, Raises: as :func:`convmixer.ConvMixer`.
    """
    for name, value in (("dim", dim), ("n_classes", n_classes), ("in_chans", in_chans)):
        _check_int(name, value, 1)
    _check_int("depth", depth, 0)
    _check_size("kernel_size", kernel_size)
    _check_size("patch_size", patch_size)
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"ConvMixer: activation must be one of {known}, got activation={activation!r}")
    act = ACTIVATIONS[activation]
    kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
    return nn.Sequential(
        nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **kwargs),
        act(),
        nn.BatchNorm2d(dim, **kwargs),
        *[
            nn.Sequential(
                Residual(
                    nn.Sequential(
                        nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same", **kwargs),
                        act(),
                        nn.BatchNorm2d(dim, **kwargs),
                    )
                ),
                nn.Conv2d(dim, dim, 1, **kwargs),
                act(),
                nn.BatchNorm2d(dim, **kwargs),
            )
            for _ in range(depth)
        ],
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(dim, n_classes, **kwargs),
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(name: str, value: object, least: int) -> None:
    if not _is_int(value):
        raise TypeError(f"ConvMixer: {name} must be an int, got {name}={value!r}")
    if value < least:
        raise ValueError(f"ConvMixer: {name} must be at least {least}, got {name}={value}")


def _check_size(name: str, value: object) -> None:
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or not all(map(_is_int, pair)):
        raise TypeError(f"ConvMixer: {name} must be an int or a pair (height, width), got {name}={value!r}")
    if min(pair) < 1:
        raise ValueError(f"ConvMixer: {name} must be at least 1, got {name}={value!r}")

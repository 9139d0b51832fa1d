# SPDX-License-Identifier: MIT
"""A tensor's layout as kernel arguments, for all launches. Sizes are passed as multiples of a constant unit, so that the
compiler knows the alignment without a new kernel for each size."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ..primitives import Norm
from .config import Config

#: Of every launch. a * b + c in one instruction: Triton's default until 3.9, and no longer from 3.10 on.
OPTIONS = {"enable_fp_fusion": True}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(a: int) -> int:
    """The least power of 2 that is not below a."""
    return 1 << max(0, a - 1).bit_length()


def unit(size: int) -> int:
    """The largest power of 2 up to 16 that divides `size`: 16 elements are a whole vector access of any dtype."""
    return math.gcd(size, 16)


def norm_arguments(norm: Norm | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]:
    """mean, var, gamma, beta and eps; a mean of None tells a kernel that there is no norm."""
    return (None, None, None, None, 0.0) if norm is None else norm


class Layout(NamedTuple):
    """A dense (N, C, H, W) tensor, contiguous or channels_last, as the elementwise kernels see it."""

    images: int
    channels: int
    height: int
    width: int
    channels_last: bool
    device: int

    @property
    def plane(self) -> int:
        return self.height * self.width

    @property
    def count(self) -> int:
        """Values of a channel."""
        return self.images * self.plane

    @property
    def wide(self) -> bool:
        """Whether a block's values may lie 2^31 elements apart: a block has at most 2^16 and ends in the image after its last whole one."""
        return self.channels * (2 * self.plane + 2**16) >= 2**31

    @property
    def suffix(self) -> str:
        """Of the names of configuration lists."""
        return "_channels_last" if self.channels_last else ""

    @property
    def key(self) -> tuple[int, ...]:
        """What a configuration may depend on: everything but the batch."""
        return self.channels, self.height, self.width

    @property
    def sizes(self) -> tuple[int, int, int]:
        """images, channel_units, plane_units"""
        return self.images, self.channels // unit(self.channels), self.plane // unit(self.plane)

    @property
    def units(self) -> dict[str, int | bool]:
        return {
            "CHANNEL_UNIT": unit(self.channels),
            "PLANE_UNIT": unit(self.plane),
            "CHANNELS_LAST": self.channels_last,
            "WIDE": self.wide,
        }

    def fit(self, config: Config) -> Config:
        """The configuration with no more channels a block than there are; the block's size stays."""
        block_c = min(config["BLOCK_C"], power_of_2(self.channels))
        block_p = config["BLOCK_P"] * config["BLOCK_C"] // block_c
        return config | {"BLOCK_C": block_c, "BLOCK_P": block_p}


def layout_of(t: Tensor) -> Layout:
    return Layout(*t.shape, not t.is_contiguous(), t.get_device())

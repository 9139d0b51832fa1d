# SPDX-License-Identifier: MIT
"""The published ConvMixers: their architectures, and how their images are resized, cropped and normalised.

Source: the table of weights and the training command of the paper's repository, https://github.com/locuslab/convmixer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from . import reference
from .model import ConvMixer

#: Of ImageNet, per channel (R, G, B).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preset:
    """An architecture, and what an image goes through before it.

    An image is resized (bicubic, antialiased) until its shorter side has `image_size / crop` pixels. The central square of
    `image_size` pixels is scaled to [0, 1], and then normalised: (x - mean) / std.
    """

    dim: int
    depth: int
    kernel_size: int | tuple[int, int] = 9
    patch_size: int | tuple[int, int] = 7
    n_classes: int = 1000
    in_chans: int = 3
    activation: str = "gelu"
    image_size: int = 224  # pixels, of both sides
    mean: tuple[float, ...] = IMAGENET_MEAN  # (in_chans,); empty if nobody knows
    std: tuple[float, ...] = IMAGENET_STD  # (in_chans,)
    crop: float = 0.96  # the share of the shorter side that is used, in (0, 1]
    classes: tuple[str, ...] = ()  # (n_classes,), their names; empty if nobody knows

    def build(
        self, *, reference: bool = False, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> nn.Sequential:
        """A new model with random weights: :func:`convmixer.ConvMixer`, or the paper's code if `reference` is True.

        Raises:
            TypeError, ValueError: as :func:`convmixer.ConvMixer`.
        """
        make = _reference_convmixer if reference else ConvMixer
        return make(
            self.dim,
            self.depth,
            self.kernel_size,
            self.patch_size,
            self.n_classes,
            in_chans=self.in_chans,
            activation=self.activation,
            device=device,
            dtype=dtype,
        )


_reference_convmixer = reference.ConvMixer

convmixer_768_32 = Preset(768, 32, kernel_size=7, patch_size=7, activation="relu")
convmixer_1536_20 = Preset(1536, 20, kernel_size=9, patch_size=7)
convmixer_1024_20_ks9_p14 = Preset(1024, 20, kernel_size=9, patch_size=14)

#: Name -> preset.
PRESETS = {
    "convmixer_768_32": convmixer_768_32,
    "convmixer_1536_20": convmixer_1536_20,
    "convmixer_1024_20_ks9_p14": convmixer_1024_20_ks9_p14,
}

#: How the published files are called, without their suffix -> preset.
PUBLISHED_FILES = {
    "convmixer_768_32_ks7_p7_relu": convmixer_768_32,
    "convmixer_1536_20_ks9_p7": convmixer_1536_20,
    "convmixer_1024_20_ks9_p14": convmixer_1024_20_ks9_p14,
}

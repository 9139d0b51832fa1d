# SPDX-License-Identifier: MIT
"""ConvMixer, faster: the same model on the kernels of convmixer_kernels."""

from __future__ import annotations

from convmixer_kernels import __version__

from . import presets, reference
from .accelerate import Report, accelerate
from .checkpoints import load, save
from .freeze import FrozenModel, freeze
from .model import ConvMixer, MixerLayer, MixerSequential

__all__ = [
    "ConvMixer",
    "FrozenModel",
    "MixerLayer",
    "MixerSequential",
    "Report",
    "__version__",
    "accelerate",
    "freeze",
    "load",
    "presets",
    "reference",
    "save",
]

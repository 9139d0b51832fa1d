# SPDX-License-Identifier: MIT
"""A real photo as a batch of different, normalised images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.optional import require

#: Of ImageNet, per channel (R, G, B), as every ConvMixer checkpoint expects.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
#: The share of the shorter side that a crop keeps at least. A photo has detail to lose, so crops differ clearly.
_SMALLEST_CROP = 0.5


def load_photo(path: Path | None = None) -> Tensor:
    """The photo as a uint8 tensor of shape (3, H, W).

    Args:
        path: an image file that Pillow reads; None takes the sample photo `china.jpg` that scikit-learn ships.

    Raises:
        MissingPackage: Pillow or scikit-learn is not installed.
        OSError: the file cannot be read as an image.
    """
    numpy = require("numpy")
    if path is None:
        require("PIL")
        pixels = require("sklearn.datasets").load_sample_image("china.jpg")
    else:
        with require("PIL.Image").open(path) as image:
            pixels = numpy.asarray(image.convert("RGB"))
    return torch.from_numpy(numpy.array(pixels)).permute(2, 0, 1).contiguous()


def image_batch(photo: Tensor, batch: int, size: int, seed: int = 0) -> Tensor:
    """`batch` crops of the photo, resized to `size` and normalised: float32, (batch, 3, size, size).

    The first is the central square; every other one is a random square crop, and half of them are mirrored, as
    training's augmentation does, so that no two images of the batch are equal. The same seed gives the same batch.

    Args:
        photo: (3, H, W), uint8
    """
    height, width = photo.shape[1:]
    short = min(height, width)
    generator = torch.Generator().manual_seed(seed)
    images = torch.empty(batch, 3, size, size)
    for index in range(batch):
        # The central square for image 0: the whole short side, in the middle of the room that is left, not mirrored.
        scale, vertical, horizontal, mirrored = (1.0, 0.5, 0.5, 0.0) if index == 0 else _draw(generator)
        side = max(1, round(short * scale))
        top, left = int((height - side) * vertical), int((width - side) * horizontal)
        crop = photo[:, top : top + side, left : left + side].float()[None] / 255
        image = torch.nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        images[index] = image.flip(2) if mirrored > 0.5 else image
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _draw(generator: torch.Generator) -> tuple[float, float, float, float]:
    scale, vertical, horizontal, mirrored = torch.rand(4, generator=generator).tolist()
    return _SMALLEST_CROP + (1 - _SMALLEST_CROP) * scale, vertical, horizontal, mirrored

# SPDX-License-Identifier: MIT
"""Classify images: python -m convmixer.predict CHECKPOINT IMAGE... prints the five likeliest classes of each, in percent."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .checkpoints import load_with_preset
from .data import DataError, message, prepare, read_image, require
from .engine import Parallel
from .presets import Preset
from .reference import ACTIVATIONS


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The arguments of the commands that read a checkpoint."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="of convmixer.train or convmixer.save, the paper's or timm's"
    )
    parser.add_argument("--activation", choices=ACTIVATIONS, help="if the checkpoint does not tell it")
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels, if the checkpoint does not tell it (224)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")


def open_checkpoint(options: argparse.Namespace, parallel: Parallel) -> tuple[nn.Sequential, Preset]:
    """
    Raises:
        DataError: as convmixer.load, with its message.
    """
    try:
        model, preset = load_with_preset(options.checkpoint, activation=options.activation)
    except (OSError, ValueError, ImportError) as error:
        hint = "activation=, one of", "--activation, one of"
        raise DataError(str(error).removeprefix("load: ").replace(*hint)) from error
    if options.image_size is not None:
        preset = Preset(**{**vars(preset), "image_size": options.image_size})
    if len(preset.mean) != preset.in_chans:
        raise DataError(
            f"{options.checkpoint} does not tell how its images of {preset.in_chans} channels are normalised"
        )
    return model.to(parallel.device), preset


def _names(preset: Preset) -> tuple[str, ...]:
    """The names of the classes; ImageNet's from torchvision, if it is installed; else their numbers."""
    if preset.classes:
        return preset.classes
    if preset.n_classes == 1000:
        try:
            names = require("torchvision.models", "names of classes").ResNet50_Weights.DEFAULT.meta["categories"]
            return tuple(f"{number} {name}" for number, name in enumerate(names))
        except DataError:
            pass
    return tuple(f"class {number}" for number in range(preset.n_classes))


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m convmixer.predict", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    try:
        with Parallel.start(options.device) as parallel:
            model, preset = open_checkpoint(options, parallel)
            names = _names(preset)
            for path in options.images:
                image = prepare(read_image(path, preset.in_chans), preset)[None]
                logits = model(image.to(parallel.device, next(model.parameters()).dtype))[0]
                shares, classes = logits.double().softmax(0).topk(min(5, preset.n_classes))
                print(path)
                for share, number in zip(shares.tolist(), classes.tolist(), strict=True):
                    print(f"  {100 * share:6.2f} %  {names[number]}")
    except DataError as error:
        print(f"error: {message(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: MIT
"""The models that are measured: their weights, their images, and their times in a process of their own."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import convmixer
import convmixer_kernels
from benchmarks import timing
from benchmarks.cases import Network, Preset

#: Of ImageNet, per channel (R, G, B), as every ConvMixer checkpoint expects.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
#: The share of the shorter side that a crop keeps at least. A photo has detail to lose, so crops differ clearly.
_SMALLEST_CROP = 0.5


def random_reference(
    preset: Preset | Network,
    images: Tensor,  # (N, 3, H, W), float32
    seed: int = 0,
) -> nn.Sequential:
    """The reference model with random weights and running statistics of `images`, float32, on the CPU.

    nn.BatchNorm2d starts as the identity, which would hide an error in its parameters and let activations die out with
    depth: so its weight and bias are random too, and the running statistics are those of one pass over the images.
    """
    torch.manual_seed(seed)
    model = preset.make()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def ours_like(reference: nn.Module) -> nn.Module:
    """A copy of `reference` on the kernels; of a ConvMixer it is what convmixer.ConvMixer makes."""
    model = copy.deepcopy(reference)
    convmixer.accelerate(model)
    return model


def load_photo(path: Path | None = None) -> Tensor:
    """The photo as a uint8 tensor of shape (3, H, W).

    Args:
        path: an image file that Pillow reads; None: the sample photo `china.jpg` that scikit-learn ships.

    Raises:
        ModuleNotFoundError: Pillow or scikit-learn is not installed.
        OSError: the file cannot be read as an image.
    """
    import numpy
    import PIL.Image

    if path is None:
        import sklearn.datasets

        pixels = sklearn.datasets.load_sample_image("china.jpg")
    else:
        with PIL.Image.open(path) as image:
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
    draws = torch.rand(batch, 4, generator=torch.Generator().manual_seed(seed))
    # share of the shorter side, place of the crop, mirrored
    draws[:, 0] = _SMALLEST_CROP + (1 - _SMALLEST_CROP) * draws[:, 0]
    draws[0] = torch.tensor([1.0, 0.5, 0.5, 0.0])
    images = torch.empty(batch, 3, size, size)
    for index, (share, vertical, horizontal, mirrored) in enumerate(draws.tolist()):
        side = max(1, round(min(height, width) * share))
        top, left = int((height - side) * vertical), int((width - side) * horizontal)
        crop = photo[:, top : top + side, left : left + side].float()[None] / 255
        image = torch.nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        images[index] = image.flip(2) if mirrored > 0.5 else image
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def call(
    model: nn.Module,
    images: Tensor,  # (N, 3, H, W)
    cotangent: Tensor,  # (N, n_classes), of the loss sum(output * cotangent)
    training: bool,
    runs: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed of a model: it returns the output and, in training, the gradients of all parameters.

    Args:
        training: a forward and a backward pass; else a forward pass without gradients.
        runs: the model, or what torch.compile made of it.
    """
    runs = model if runs is None else runs
    parameters = list(model.parameters())
    model.train(training)

    def evaluate() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (runs(images),)

    def step() -> tuple[Tensor, ...]:
        # as a user trains: the images need no gradient
        output = runs(images)
        return output, *torch.autograd.grad(output, parameters, cotangent)

    return step if training else evaluate


def time_in_new_process(
    models: Mapping[str, nn.Module],
    images: Tensor,
    cotangent: Tensor,
    training: bool,
    backend: str | None,  # of this package; None: its own choice
    repeats: int,
    warmup: int,
) -> dict[str, timing.Timing]:
    """Times of `models`, interleaved, in a process that does nothing else: as a program that serves, or that trains."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "computation.pt")
        torch.save((models, images, cotangent), path)
        return timing.in_new_process(_time, path, training, backend, repeats, warmup, torch.get_num_threads())


def _time(
    path: Path, training: bool, backend: str | None, repeats: int, warmup: int, threads: int
) -> dict[str, timing.Timing]:
    torch.set_num_threads(threads)
    models, images, cotangent = torch.load(path, weights_only=False)  # this program's own file, modules included
    calls = {name: call(model, images, cotangent, training) for name, model in models.items()}
    with contextlib.nullcontext() if backend is None else convmixer_kernels.use_backend(backend):
        return timing.interleaved(calls, repeats=repeats, warmup=warmup, device=images.device)

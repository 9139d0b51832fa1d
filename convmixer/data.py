# SPDX-License-Identifier: MIT
"""Images for training and evaluation: folders, or scikit-learn's digits; what changes an image; which images a step takes.

Everything random is a function of (seed, epoch, image) or (seed, step, rank), never of what ran before: so a resumed run and any
number of workers see the same images.
"""

from __future__ import annotations

import hashlib
import importlib
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .presets import Preset

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
#: Of one folder, the share of each class that is held out; the images are drawn with _SPLIT_SEED, whatever the seed of a run.
HELD_OUT = 0.2
_SPLIT_SEED = 0
#: DATA that is no folder: 1797 images of 8x8 pixels.
DIGITS = "digits"
#: Of all pixels of the digits, on a scale from 0 to 1.
DIGITS_MEAN, DIGITS_STD = (0.3053,), (0.3760,)
AUGMENTATIONS = ("rand", "crop", "shift", "none")
#: A sample: epoch and image. Epoch -1: an image that fills up a step of an evaluation and does not count.
Sample = tuple[int, int]


class Source(NamedTuple):
    """Labelled images: files, or a uint8 tensor."""

    images: list[Path] | Tensor  # (N, C, H, W)
    labels: list[int]


class Data(NamedTuple):
    classes: tuple[str, ...]
    train: Source
    held_out: Source


class DataError(ValueError):
    """DATA is not what was expected, an image cannot be read, or a package is missing: a command prints this and ends."""


def require(name: str, what: str) -> ModuleType:
    """The module `name`.

    Raises:
        DataError: it cannot be imported; the message has the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        package = name.partition(".")[0]
        raise DataError(f"{what} needs the package {package}: pip install '.[train]' ({first_line(error)})") from error


def message(error: DataError) -> str:
    """What a command prints; a worker process of a DataLoader puts its traceback before it."""
    return str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def seed_all(*numbers: int | str) -> None:
    """Seeds torch, Python's random and, if it is loaded, numpy with a hash of the numbers."""
    seed = int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")
    # torch.manual_seed writes down its caller for devices that are not there: 2 ms an image
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed & 0xFFFFFFFF)


def open_data(name: str) -> Data:
    """The images of DATA: the word "digits", a folder with train/ and val/, or one folder, which is split.

    Each of these folders has one folder of images for each class; the classes are sorted by name.

    Raises:
        DataError: it is not such a folder; the message says what was expected.
    """
    if name == DIGITS:
        return _digits()
    root = Path(name)
    if not root.is_dir():
        raise DataError(f"{name} is not a folder (or the word {DIGITS!r})")
    if (root / "train").is_dir():
        if not (root / "val").is_dir():
            raise DataError(f"{root} has train/ but no val/")
        classes, train = _scan(root / "train")
        return Data(classes, train, _scan(root / "val", classes)[1])
    classes, everything = _scan(root)
    return Data(classes, *_split(everything))


def open_held_out(name: str, classes: tuple[str, ...], n_classes: int) -> Source:
    """The images that a validation takes: val/ of DATA, the held-out part of `digits`, or all images of a folder without train/ and val/.

    Args:
        classes: of the checkpoint, in its order; empty: the folder's, sorted, which must be `n_classes`.
    """
    if name == DIGITS:
        return _digits().held_out
    root = Path(name)
    if not root.is_dir():
        raise DataError(f"{name} is not a folder (or the word {DIGITS!r})")
    found, source = _scan(root / "val" if (root / "val").is_dir() else root, classes)
    if not classes and len(found) != n_classes:
        raise DataError(
            f"{root} has {len(found)} classes, the checkpoint {n_classes}, and it does not tell their names"
        )
    return source


def _scan(root: Path, classes: tuple[str, ...] = ()) -> tuple[tuple[str, ...], Source]:
    """The images in the folders of `root`; all folders must be among `classes`, if they are given."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = tuple(path.name for path in folders)
    if not folders:
        raise DataError(f"{root} has no folders: expected one folder of images for each class, as in {root}/cat/1.jpg")
    unknown = [name for name in names if classes and name not in classes]
    if unknown:
        known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise DataError(f"{root}/{unknown[0]} is not one of the {len(classes)} classes: {known}")
    known_names = classes or names
    images: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not files:
            raise DataError(f"{folder} has no images ({', '.join(SUFFIXES)})")
        images += files
        labels += [known_names.index(folder.name)] * len(files)
    return known_names, Source(images, labels)


def _split(source: Source) -> tuple[Source, Source]:
    """HELD_OUT of each class, and at least one image, drawn with a fixed seed; the rest is for training."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    parts: tuple[list[int], list[int]] = ([], [])
    for label in sorted(set(source.labels)):
        of_class = [at for at, each in enumerate(source.labels) if each == label]
        order = torch.randperm(len(of_class), generator=generator).tolist()
        held_out = max(1, round(HELD_OUT * len(of_class)))
        for rank, at in enumerate(order):
            parts[rank < held_out].append(of_class[at])
    train, held_out_part = (_take(source, sorted(part)) for part in parts)
    return train, held_out_part


def _take(source: Source, rows: list[int]) -> Source:
    images = source.images[rows] if isinstance(source.images, Tensor) else [source.images[row] for row in rows]
    return Source(images, [source.labels[row] for row in rows])


def _digits() -> Data:
    found = require("sklearn.datasets", "the digits").load_digits()
    # 0 .. 16 to 0 .. 255, as in an image file
    images = (torch.from_numpy(found.images).float() * (255 / 16)).round().to(torch.uint8)[:, None]
    return Data(tuple("0123456789"), *_split(Source(images, found.target.tolist())))


def read_image(path: Path, channels: int) -> Tensor:
    """An image file as uint8, (channels, H, W).

    Raises:
        DataError: it cannot be read as an image, or Pillow is missing.
    """
    pil = require("PIL.Image", "reading images")
    if channels not in (1, 3):
        raise DataError(f"the model takes images of {channels} channels: image files have 1 or 3")
    try:
        with pil.open(path) as image:
            pixels = image.convert("L" if channels == 1 else "RGB")
            data = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise DataError(f"cannot read {path} as an image: {first_line(error)}") from error
    return data.view(pixels.height, pixels.width, channels).permute(2, 0, 1).contiguous()


def prepare(image: Tensor, preset: Preset) -> Tensor:
    """The central crop of an image, (C, H, W) of uint8, as :class:`convmixer.presets.Preset` says: (C, S, S), float32."""
    size = preset.image_size
    height, width = image.shape[1:]
    scale = round(size / preset.crop) / min(height, width)
    resized = _resize(image.float(), max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (resized.shape[1] - size) // 2, (resized.shape[2] - size) // 2
    return _normalise(resized[:, top : top + size, left : left + size], preset)


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 255)


def _normalise(image: Tensor, preset: Preset) -> Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preset.mean, preset.std))
    return (image.float() / 255 - mean) / std


def augmentation(kind: str, preset: Preset) -> Callable[[Tensor], Tensor]:
    """What training does to an image, (C, H, W) of uint8, with torch's global random numbers: (C, S, S), float32.

    Args:
        kind: "rand": a random crop of 8 % to 100 % of the area, mirroring, RandAugment and random erasing, by torchvision;
            "crop": the crop and mirroring, by torch alone; "shift": moved by up to an eighth of the size; "none": `prepare`.
    """
    size = preset.image_size
    if kind == "rand":
        v2: Any = require("torchvision.transforms.v2", "--augment rand")
        bicubic = v2.InterpolationMode.BICUBIC
        changes: Callable[[Tensor], Tensor] = v2.Compose(
            [
                v2.RandomResizedCrop(size, interpolation=bicubic, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandAugment(),
                v2.Lambda(partial(_normalise, preset=preset)),
                v2.RandomErasing(p=0.25, value="random"),
            ]
        )
        return changes
    # no lambda: worker processes unpickle it
    return partial({"crop": _crop_and_mirror, "shift": _shift, "none": prepare}[kind], preset=preset)


def _crop_and_mirror(image: Tensor, preset: Preset) -> Tensor:
    size = preset.image_size
    height, width = image.shape[1:]
    area, ratio, vertical, horizontal, mirrored = torch.rand(5).tolist()
    area = height * width * (0.08 + 0.92 * area)
    aspect = (3 / 4) ** (1 - 2 * ratio)
    h, w = min(height, max(1, round((area / aspect) ** 0.5))), min(width, max(1, round((area * aspect) ** 0.5)))
    top, left = int((height - h + 1) * vertical), int((width - w + 1) * horizontal)
    crop = _resize(image[:, top : top + h, left : left + w].float(), size, size)
    return _normalise(crop.flip(2) if mirrored > 0.5 else crop, preset)


def _shift(image: Tensor, preset: Preset) -> Tensor:
    size = preset.image_size
    most = max(1, size // 8)
    top, left = torch.randint(2 * most + 1, (2,)).tolist()
    # the border's own values: 0 would be the mean, a grey frame
    padded = F.pad(prepare(image, preset)[None], (most,) * 4, mode="replicate")[0]
    return padded[:, top : top + size, left : left + size]


def mixing(mixup: float, cutmix: float, n_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """(images, labels) -> mixed images and (N, n_classes) shares, by torchvision; None if both alphas are 0."""
    kinds = {name: alpha for name, alpha in (("MixUp", mixup), ("CutMix", cutmix)) if alpha > 0}
    if not kinds:
        return None
    v2: Any = require("torchvision.transforms.v2", " and ".join(f"--{name.lower()}" for name in kinds))
    choices = [getattr(v2, name)(alpha=alpha, num_classes=n_classes) for name, alpha in kinds.items()]
    mixed: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = v2.RandomChoice(choices)
    return mixed


class Images(Dataset[tuple[Tensor, int]]):
    """Images by sample; an image's random changes are those of (seed, epoch, image)."""

    def __init__(self, source: Source, change: Callable[[Tensor], Tensor], channels: int, seed: int) -> None:
        self.source, self.change, self.channels, self.seed = source, change, channels, seed

    def __getitem__(self, sample: Sample) -> tuple[Tensor, int]:
        epoch, at = sample
        image, label = self.source.images[at], self.source.labels[at]
        if not isinstance(image, Tensor):
            image = read_image(image, self.channels)
        seed_all(self.seed, "image", epoch, at)
        return self.change(image), label if epoch >= 0 else -1

    def __len__(self) -> int:
        return len(self.source.labels)


class TrainingSteps:
    """This rank's samples of each step of `epoch`, from step `first` on; images that do not fill a step wait for another epoch."""

    def __init__(self, count: int, batch: int, rank: int, world: int, seed: int) -> None:
        self.count, self.batch, self.rank, self.world, self.seed = count, batch, rank, world, seed
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.count // self.batch - self.first

    def __iter__(self) -> Iterator[list[Sample]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        for step in range(self.first, self.count // self.batch):
            images = order[step * self.batch : (step + 1) * self.batch]
            yield [(self.epoch, at) for at in images[self.rank :: self.world]]


class EvaluationSteps:
    """This rank's samples of all images. Every rank has as many steps, since FSDP's ranks wait for each other in each."""

    def __init__(self, count: int, batch: int, rank: int, world: int) -> None:
        self.count, self.batch, self.rank, self.world = count, batch, rank, world

    def __len__(self) -> int:
        return -(-self.count // self.batch)

    def __iter__(self) -> Iterator[list[Sample]]:
        for first in range(0, self.count, self.batch):
            images = range(first, min(self.count, first + self.batch))[self.rank :: self.world]
            yield [(0, at) for at in images] or [(-1, 0)]


def loader(images: Images, steps: Any, workers: int, pinned: bool) -> DataLoader[Any]:
    return DataLoader(
        images,
        batch_sampler=steps,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pinned,
        # a fork of a process that runs OpenMP or CUDA may hang
        multiprocessing_context="forkserver" if workers else None,
    )

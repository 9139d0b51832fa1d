# SPDX-License-Identifier: MIT
"""The models that are measured, their weights, and their times."""

from __future__ import annotations

import contextlib
import pickle
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import convmixer
import convmixer.reference
import convmixer_kernels
from benchmarks import timing


class CheckpointError(ValueError):
    """A file is not a checkpoint, or not of this model."""


@dataclass(frozen=True)
class Case:
    """One published ConvMixer at one image size."""

    dim: int
    depth: int
    kernel_size: int
    patch_size: int
    image_size: int
    activation: str
    n_classes: int
    batch: int  # of a full run; what a training step of it saves in float64 fits into 4 GB
    quick_batch: int
    quick_training: bool

    @property
    def label(self) -> str:
        return f"ConvMixer-{self.dim}/{self.depth}, {self.image_size}x{self.image_size}"

    def build(self, constructor: Callable[..., nn.Sequential]) -> nn.Sequential:
        """The model by `convmixer.ConvMixer` or `convmixer.reference.ConvMixer`, on the CPU in float32."""
        sizes = (self.dim, self.depth, self.kernel_size, self.patch_size, self.n_classes)
        return constructor(*sizes, activation=self.activation)


#: By the name that --models takes. Batches are small enough for a full run of ten minutes on two idle cores.
CASES = {
    "256/8@32": Case(256, 8, 9, 2, 32, "gelu", 10, batch=32, quick_batch=16, quick_training=True),
    "256/8@224": Case(256, 8, 9, 7, 224, "gelu", 1000, batch=8, quick_batch=2, quick_training=True),
    "768/32@224": Case(768, 32, 7, 7, 224, "relu", 1000, batch=4, quick_batch=1, quick_training=False),
    "1536/20@224": Case(1536, 20, 9, 7, 224, "gelu", 1000, batch=2, quick_batch=1, quick_training=False),
}


def random_reference(case: Case, images: Tensor, seed: int = 0) -> nn.Sequential:
    """The reference model with random weights and running statistics of `images`, float32, on the CPU.

    nn.BatchNorm2d starts as the identity, which would hide an error in its parameters and let activations die out with
    depth: so its weight and bias are random too, and the running statistics are those of one pass over the images.

    Args:
        images: (N, 3, H, W), float32
    """
    torch.manual_seed(seed)
    model = case.build(convmixer.reference.ConvMixer)
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


def checkpoint_reference(case: Case, path: Path) -> nn.Sequential:
    """The reference model with the weights of a file.

    Args:
        path: a state_dict, saved by torch.save, with the reference's keys (which are also this package's) or timm's.

    Raises:
        OSError: there is no such file.
        CheckpointError: it is not a state_dict, or not this model's.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # Training scripts put the weights beside the optimizer's state.
        for key in ("state_dict", "model"):
            state = state.get(key, state)
        model = case.build(convmixer.reference.ConvMixer)
        model.load_state_dict({reference_key(key, case.depth): tensor for key, tensor in state.items()}, strict=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a state_dict of {case.label}: {error}") from error
    return model


def reference_key(key: str, depth: int) -> str:
    """timm's name of a tensor (`stem.0.weight`, `blocks.4.1.bias`, `head.weight`) in the reference's words.

    Any other name is left as it is, without the "module." that nn.DataParallel puts before it.
    """
    key = key.removeprefix("module.")
    part, _, rest = key.partition(".")
    if part == "stem":
        return rest
    if part == "blocks":
        index, _, rest = rest.partition(".")
        return f"{3 + int(index)}.{rest}"
    # pooling and flattening come before the classifier
    return f"{3 + depth + 2}.{rest}" if part == "head" else key


def ours_like(case: Case, reference: nn.Sequential) -> nn.Sequential:
    """This package's model with the weights of `reference`, on its device and in its dtype."""
    parameter = next(reference.parameters())
    model = case.build(convmixer.ConvMixer).to(parameter.device, parameter.dtype)
    model.load_state_dict(reference.state_dict(), strict=True)
    return model


def time_in_new_process(
    models: Mapping[str, nn.Module],
    images: Tensor,  # (N, 3, H, W)
    cotangent: Tensor,  # (N, n_classes), of the loss sum(output * cotangent)
    *,
    training: bool,
    backend: str | None,
    repeats: int,
    warmup: int,
    on_call: Callable[[str], None],
) -> dict[str, timing.Timing]:
    """Times of `models`, interleaved, in a process that does nothing else: as a program that serves, or that trains.

    Args:
        training: a forward and a backward pass; else a forward pass without gradients.
        backend: of this package, or None: its own choice.
        repeats, warmup, on_call: as in `timing.interleaved`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "computation.pt")
        torch.save((models, images, cotangent), path)
        return timing.in_new_process(
            _time, path, training, backend, repeats, warmup, torch.get_num_threads(), on_call=on_call
        )


def _time(
    path: Path,
    training: bool,
    backend_name: str | None,
    repeats: int,
    warmup: int,
    threads: int,
    on_call: Callable[[str], None],
) -> dict[str, timing.Timing]:
    torch.set_num_threads(threads)
    models, images, cotangent = torch.load(path, weights_only=False)  # this program's own file, modules included
    calls = {name: _call(model, images, cotangent, training) for name, model in models.items()}
    with backend(backend_name):
        return timing.interleaved(calls, repeats=repeats, warmup=warmup, device=images.device, on_call=on_call)


def backend(name: str | None) -> contextlib.AbstractContextManager[None]:
    """A context in which this package computes on the backend `name`, or on its own choice."""
    return contextlib.nullcontext() if name is None else convmixer_kernels.use_backend(name)


def _call(model: nn.Module, images: Tensor, cotangent: Tensor, training: bool) -> Callable[[], None]:
    """What is timed: as a user runs it, so the images need no gradient."""

    def evaluate() -> None:
        with torch.no_grad():
            model(images)

    def training_step() -> None:
        model.zero_grad(set_to_none=True)
        model(images).backward(cotangent)

    model.train(training)
    return training_step if training else evaluate

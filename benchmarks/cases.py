# SPDX-License-Identifier: MIT
"""Which cases are measured, and why these.

The full grid (every operator, kernel size, shape, batch, dtype and layout) is days of work. So each axis is walked once while
the others stay at a point that shows its effect:

* kernel: every depthwise operator at one shape, k from 3 to 31;
* shape: inference and a training step of the block at the shapes of published networks, with their kernel sizes;
* batch: the smallest plane, because it shows the fixed cost of a call;
* dtype and layout: every operator at 256 channels on 16x16, the plane of ConvMixer-256/8.

`quick` marks a selection: on a CPU a few minutes, on a GPU what `python -m benchmarks.gpu` measures.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

import convmixer.reference
from benchmarks.networks import NETWORKS, Network

KERNELS = (3, 5, 7, 9, 13, 31)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

DEPTHWISE = (
    "depthwise_conv",
    "depthwise_eval",
    "depthwise_train",
    "depthwise_input_grad",
    "depthwise_weight_grad",
    "depthwise_step",
)
POINTWISE = (
    "pointwise_eval",
    "pointwise_train",
    "pointwise_input_grad",
    "pointwise_weight_grad",
    "pointwise_backward",
    "pointwise_step",
)
CONVOLUTION = ("depthwise_conv", "depthwise_conv_step")
NORM = ("normalize", "norm_backward")
LAYER = ("layer_eval", "layer_step")
#: Single kernels of ours that are only a part of what eager PyTorch computes in one call.
PARTS = ("depthwise_train_kernel", "depthwise_input_grad_kernel", "pointwise_train_kernel")
OPERATORS = (*DEPTHWISE, "depthwise_conv_step", *POINTWISE, *NORM, *LAYER, *PARTS)
MODEL_MODES = ("model_eval", "model_step")


@dataclass(frozen=True)
class Preset:
    """A published ConvMixer at one image size."""

    dim: int
    depth: int
    kernel_size: int
    patch_size: int
    image_size: int
    activation: str
    n_classes: int
    batch: int  # of python -m benchmarks; what a training step saves in float64 fits into 4 GB
    quick_batch: int
    quick_training: bool

    @property
    def label(self) -> str:
        return f"ConvMixer-{self.dim}/{self.depth}, {self.image_size}x{self.image_size}"

    def make(self) -> nn.Sequential:
        """The reference model in float32."""
        sizes = (self.dim, self.depth, self.kernel_size, self.patch_size, self.n_classes)
        return convmixer.reference.ConvMixer(*sizes, activation=self.activation)


#: By the name that --models takes.
PRESETS: dict[str, Preset | Network] = {
    "256/8@32": Preset(256, 8, 9, 2, 32, "gelu", 10, batch=32, quick_batch=16, quick_training=True),
    "256/8@224": Preset(256, 8, 9, 7, 224, "gelu", 1000, batch=8, quick_batch=2, quick_training=True),
    "768/32@224": Preset(768, 32, 7, 7, 224, "relu", 1000, batch=4, quick_batch=1, quick_training=False),
    "1024/20@224": Preset(1024, 20, 9, 14, 224, "gelu", 1000, batch=4, quick_batch=1, quick_training=False),
    "1536/20@224": Preset(1536, 20, 9, 7, 224, "gelu", 1000, batch=2, quick_batch=1, quick_training=False),
    **NETWORKS,
}
_TINY_PRESET = Preset(64, 2, 5, 2, 12, "gelu", 10, batch=2, quick_batch=2, quick_training=True)


@dataclass(frozen=True)
class OpCase:
    """One operator at one size."""

    op: str
    family: str  # the network that has this shape, or "sweep"
    shape: tuple[int, int, int, int]  # N, C, H, W
    kernel: int | tuple[int, int] = 9  # odd; a pair is (height, width)
    channels_out: int | None = None  # of a 1x1 convolution; None for C
    dtype: str = "float32"
    layout: str = "contiguous"
    quick: bool = False
    compiled: bool = False  # timed under torch.compile too, which takes a compiler 10 to 60 s a case
    dilation: int = 1  # of a convolution alone

    @property
    def name(self) -> str:
        """Unique, and what --filter sees."""
        size = "x".join(map(str, self.shape))
        kernel = f" k{self.kernel_name}" if self.has_depthwise else ""
        out = f"->{self.channels_out}" if self.channels_out is not None else ""
        return f"{self.op}{kernel} {size}{out} {self.dtype} {self.layout}"

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.kernel if isinstance(self.kernel, tuple) else (self.kernel, self.kernel)

    @property
    def kernel_name(self) -> int | str:
        """9, 51x5, or 7d3 with a dilation of 3."""
        plain = self.kernel if isinstance(self.kernel, int) else "x".join(map(str, self.kernel))
        return plain if self.dilation == 1 else f"{plain}d{self.dilation}"

    @property
    def has_depthwise(self) -> bool:
        return self.op.startswith(("depthwise", "layer"))

    @property
    def has_pointwise(self) -> bool:
        return self.op.startswith(("pointwise", "layer"))

    @property
    def out(self) -> int:
        return self.shape[1] if self.channels_out is None else self.channels_out

    def tiny(self) -> OpCase:
        """The same operator, kernel, dtype and layout on a plane that takes no time."""
        return replace(self, shape=(2, 32, 6, 7), channels_out=None if self.channels_out is None else 48)


@dataclass(frozen=True)
class ModelCase:
    """Inference or the training step of one published network."""

    op: str  # model_eval, model_step
    model: str  # of PRESETS
    batch: int
    dtype: str = "float32"
    layout: str = "contiguous"
    quick: bool = False
    compiled: bool = False
    family: str = "ConvMixer"

    @property
    def name(self) -> str:
        return f"{self.op} {self.model} batch {self.batch} {self.dtype} {self.layout}"

    @property
    def preset(self) -> Preset | Network:
        return PRESETS.get(self.model, _TINY_PRESET)

    @property
    def training(self) -> bool:
        return self.op == "model_step"

    def tiny(self) -> ModelCase:
        return replace(self, model="tiny", batch=2)


Case = OpCase | ModelCase


def to_json(case: Case) -> dict[str, object]:
    return dataclasses.asdict(case)


def from_json(fields: dict[str, object]) -> Case:
    """What to_json wrote, after a round trip through JSON."""
    if "model" in fields:
        return ModelCase(**fields)
    kernel = fields["kernel"]
    fields = {
        **fields,
        "shape": tuple(fields["shape"]),
        "kernel": tuple(kernel) if isinstance(kernel, list) else kernel,
    }
    return OpCase(**fields)


@dataclass(frozen=True)
class _Shape:
    """A depthwise convolution of a published network at 224 x 224 pixels (256/8 with patch 2: 32 x 32 pixels)."""

    family: str
    channels: int
    side: int
    kernel: int
    batches: dict[str, int]  # by device type: enough work to fill it, little enough for its memory and a minute
    channels_out: int | None = None  # of the 1x1 convolution that follows


_SHAPES = (
    _Shape("ConvMixer-256/8", 256, 16, 9, {"cpu": 32, "cuda": 256}),
    _Shape("ConvMixer-768/32", 768, 32, 7, {"cpu": 2, "cuda": 64}),
    _Shape("ConvMixer-1024/20", 1024, 16, 9, {"cpu": 4, "cuda": 64}),
    _Shape("ConvMixer-1536/20", 1536, 32, 9, {"cpu": 1, "cuda": 64}),
    # ConvNeXt-T's four stages, k = 7; its 1x1 convolutions widen by 4
    _Shape("ConvNeXt-T", 96, 56, 7, {"cpu": 4, "cuda": 128}, 384),
    _Shape("ConvNeXt-T", 192, 28, 7, {"cpu": 8, "cuda": 128}, 768),
    _Shape("ConvNeXt-T", 384, 14, 7, {"cpu": 16, "cuda": 128}, 1536),
    _Shape("ConvNeXt-T", 768, 7, 7, {"cpu": 32, "cuda": 128}, 3072),
    # RepLKNet-31B's four stages
    _Shape("RepLKNet-31B", 128, 56, 31, {"cpu": 1, "cuda": 64}),
    _Shape("RepLKNet-31B", 256, 28, 29, {"cpu": 2, "cuda": 64}),
    _Shape("RepLKNet-31B", 512, 14, 27, {"cpu": 4, "cuda": 64}),
    _Shape("RepLKNet-31B", 1024, 7, 13, {"cpu": 8, "cuda": 64}),
)
#: Convolutions of other networks at 224 x 224 pixels: family, channels, side, kernel, dilation.
_NETWORKS = (
    ("ConvNeXt-T", 96, 56, 7, 1),
    ("ConvNeXt-T", 384, 14, 7, 1),
    ("InceptionNeXt-T", 12, 56, (1, 11), 1),
    ("InceptionNeXt-T", 12, 56, (11, 1), 1),
    ("InceptionNeXt-T", 48, 14, (11, 1), 1),
    ("UniRepLKNet-T", 160, 28, 13, 1),
    ("RepLKNet-31B", 128, 56, 31, 1),
    ("RepLKNet-31B", 512, 14, 27, 1),
    ("SLaK-T", 124, 56, (51, 5), 1),
    ("SLaK-T", 124, 56, (5, 51), 1),
    ("SLaK-T", 499, 14, (47, 5), 1),
    # SLaK-T's kernel before its decomposition
    ("SLaK-T", 124, 56, 51, 1),
    ("VAN-B1", 64, 56, 7, 3),
    ("VAN-B1", 320, 14, 7, 3),
)
_NETWORK_BATCH = {"cpu": 4, "cuda": 64}
_SWEEP = {"cpu": (1, 768, 32, 32), "cuda": (64, 768, 32, 32)}
_BATCHES = {"cpu": (1, 8, 128), "cuda": (1, 32, 1024)}
_MODEL_BATCHES = {
    "cpu": {"256/8@32": 32, "256/8@224": 4, "768/32@224": 2, "1024/20@224": 2, "1536/20@224": 2}
    | {"ConvNeXt-T": 4, "RepLKNet-31B": 2, "SLaK-T": 2},
    "cuda": {"1536/20@224": 32, "256/8@32": 256, "768/32@224": 32, "256/8@224": 128, "1024/20@224": 64}
    | {"ConvNeXt-T": 64, "RepLKNet-31B": 32, "SLaK-T": 32},
}


def _operators(device_type: str) -> Iterator[OpCase]:
    sweep, base = _SWEEP[device_type], _SHAPES[0]
    for kernel in KERNELS:
        for op in DEPTHWISE:
            quick = op in ("depthwise_eval", "depthwise_input_grad", "depthwise_weight_grad")
            yield OpCase(op, "sweep", sweep, kernel, quick=quick)
        yield OpCase("depthwise_eval", "sweep", sweep, kernel, layout="channels_last", quick=kernel == 9)
    for shape in _SHAPES:
        size = (shape.batches[device_type], shape.channels, shape.side, shape.side)
        mixer, first = shape.family.startswith("ConvMixer"), shape is base
        block = OpCase("depthwise_eval", shape.family, size, shape.kernel, compiled=first, quick=True)
        yield block
        yield replace(block, layout="channels_last", compiled=False, quick=first)
        yield replace(block, op="depthwise_step", quick=first)
        pointwise = replace(block, op="pointwise_eval", channels_out=shape.channels_out, quick=first, compiled=first)
        if mixer or shape.channels_out is not None:
            yield pointwise
            yield replace(pointwise, op="pointwise_step")
        if mixer:
            for layout, op in itertools.product(LAYOUTS, LAYER):
                yield replace(block, op=op, layout=layout, quick=first, compiled=first and layout == "contiguous")
    for family, channels, side, kernel, dilation in _NETWORKS:
        shape = (_NETWORK_BATCH[device_type], channels, side, side)
        for op, layout in itertools.product(CONVOLUTION, LAYOUTS):
            compiled = side == 56 and layout == "contiguous"
            yield OpCase(op, family, shape, kernel, layout=layout, compiled=compiled, dilation=dilation)
    size = (base.batches[device_type], base.channels, base.side, base.side)
    # the kernels that no other axis has, and what a user runs in bfloat16
    quick = {"float32": (*POINTWISE, *NORM, *PARTS, *CONVOLUTION, "depthwise_train")}
    quick["bfloat16"] = ("depthwise_eval", *LAYER)
    for dtype, layout, op in itertools.product(DTYPES, LAYOUTS, OPERATORS):
        if not op.startswith("layer") or dtype != "float32":
            chosen = layout == "contiguous" and op in quick.get(dtype, ())
            yield OpCase(op, base.family, size, base.kernel, dtype=dtype, layout=layout, quick=chosen)
    for batch in _BATCHES[device_type]:
        for op in ("depthwise_eval", "depthwise_step", "layer_eval", "layer_step"):
            yield OpCase(op, base.family, (batch, *size[1:]), base.kernel, quick=batch == 1 and op == "layer_eval")


def _gpu_operators() -> Iterator[OpCase]:
    """What benchmarks.gpu measures, most important first: time runs out in this order."""

    def case(op: str, shape: tuple[int, ...], kernel: int = 9, dtype: str = "bfloat16", **more: str) -> OpCase:
        family = next((each.family for each in _SHAPES if shape[1:3] == (each.channels, each.side)), "sweep")
        compiled = op in ("depthwise_eval", "pointwise_eval") and shape == big and dtype == "bfloat16"
        return OpCase(op, family, shape, kernel, dtype=dtype, quick=True, compiled=compiled, **more)

    big, half = (64, 1536, 32, 32), (32, 1536, 32, 32)
    passes = ("depthwise_eval", "depthwise_input_grad", "depthwise_input_grad_kernel", "depthwise_weight_grad")
    every = (*DEPTHWISE[1:], *PARTS, *NORM, "pointwise_eval", "pointwise_train", "pointwise_backward", "pointwise_step")
    for layout in LAYOUTS:
        yield from (case(op, big, layout=layout) for op in (*every, *LAYER))
    # at these sizes a layer in one kernel is about as fast as two launches, and our GEMM as torch's
    narrow = [(64, c, 32, 32) for c in (256, 128, 64)]
    yield from (case("layer_eval", shape) for shape in (*narrow, (256, 256, 16, 16)))
    for shape in (*((64, c, 32, 32) for c in (128, 256, 384, 512, 768)), (256, 256, 16, 16)):
        yield from (case(op, shape) for op in ("pointwise_eval", "pointwise_train_kernel"))
    yield from (case("pointwise_eval", (64, c, 32, 32), layout="channels_last") for c in (256, 768))
    yield from (case("pointwise_backward", (64, c, 32, 32)) for c in (256, 768))
    for op in (*passes, "depthwise_train", "depthwise_train_kernel", "pointwise_eval"):
        yield case(op, half, dtype="float32")
    yield case("pointwise_eval", narrow[0], dtype="float32")
    yield case("depthwise_eval", half, dtype="float32", layout="channels_last")
    planes = ((64, 768, 32, 32), (128, 256, 16, 16), (256, 768, 7, 7), (64, 768, 17, 17))
    for shape in (*planes, (32, 256, 56, 56), (4, 128, 224, 224)):
        kernel = 7 if shape == planes[0] else 9
        yield from (case("depthwise_eval", shape, kernel, layout=layout) for layout in LAYOUTS)
    yield from (case(op, shape) for op in passes[1:] for shape in planes[1:])
    yield from (case(op, (32, 768, 32, 32), kernel) for kernel in (3, 7, 15, 31) for op in passes)
    yield case("depthwise_eval", big, dtype="float16")
    yield from (case(op, big) for op in (*CONVOLUTION, "pointwise_input_grad", "pointwise_weight_grad"))


def _models(device_type: str) -> Iterator[ModelCase]:
    batches = _MODEL_BATCHES[device_type]
    if device_type == "cuda":
        headline = ("1536/20@224", "256/8@32", "768/32@224")
        for layout, model, op in itertools.product(LAYOUTS, headline, MODEL_MODES):
            compiled = model != "768/32@224" and layout == "contiguous"
            yield ModelCase(op, model, batches[model], "bfloat16", layout, quick=True, compiled=compiled)
    for (model, batch), op in itertools.product(batches.items(), MODEL_MODES):
        first = model == "256/8@32"
        family = model if model in NETWORKS else "ConvMixer"
        yield ModelCase(op, model, batch, quick=first and device_type == "cpu", compiled=first, family=family)


def cases(device_type: str = "cpu") -> list[Case]:
    """Every case of a device type ("cpu", "cuda"), each once; one that two axes share keeps all its marks."""
    operators = list(_operators(device_type))
    if device_type == "cuda":
        operators = [*_gpu_operators(), *(replace(case, quick=False) for case in operators)]
    found: dict[str, Case] = {}
    for case in (*operators, *_models(device_type)):
        known = found.get(case.name, case)
        marks = {"quick": known.quick or case.quick, "compiled": known.compiled or case.compiled}
        found[case.name] = replace(known, **marks)
    return list(found.values())


def networks(device_type: str = "cpu") -> list[Case]:
    """The convolutions and models of networks other than ConvMixer."""
    families = {family for family, *_ in _NETWORKS}
    found = [case for case in cases(device_type) if case.family in families]
    return [case for case in found if case.op in (*CONVOLUTION, *MODEL_MODES)]


def select(all_cases: list[Case], quick: bool, patterns: list[str]) -> list[Case]:
    """The cases that the options of a run name.

    Args:
        quick: only cases with that mark.
        patterns: a case stays if each of its words' patterns fits: "depthwise_eval k9", "*step float32", "RepLKNet*".
    """

    def fits(case: Case, pattern: str) -> bool:
        words = [*case.name.split(), case.family]
        return all(fnmatch.filter(words, part) for part in pattern.split())

    chosen = [case for case in all_cases if case.quick or not quick]
    return [case for case in chosen if not patterns or any(fits(case, pattern) for pattern in patterns)]

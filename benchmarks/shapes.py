# SPDX-License-Identifier: MIT
"""What the operator suite measures: the table of cases, and why these.

The full grid (15 operators x 6 kernels x 13 shapes x batches x 3 dtypes x 2 layouts) is days of work and says little more
than its axes. So every axis is walked once while the others stay at a point where its effect is seen best:

* kernel: every depthwise operator at one shape, k from 3 to 31 (the cost curve over k);
* shape: the block in eval and a training step at each paper's shapes, the kernels as in the paper;
* batch: the smallest plane, where a call's fixed cost is seen, and the largest model;
* dtype and layout: every operator at 256 channels on 16x16, ConvMixer-256/8's plane, and eval at every depthwise case.

`quick` marks a selection of one run of a few minutes: every operator, every kernel size and every family once.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks import models

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
POINTWISE = ("pointwise_eval", "pointwise_train", "pointwise_input_grad", "pointwise_weight_grad", "pointwise_step")
NORM = ("normalize", "norm_backward")
LAYER = ("layer_eval", "layer_step")
OPERATORS = (*DEPTHWISE, *POINTWISE, *NORM, *LAYER)
MODEL_MODES = ("model_eval", "model_step")

#: The published models: those of python -m benchmarks, and the third ImageNet model of the paper.
PRESETS = models.CASES | {
    "1024/20@224": models.Case(1024, 20, 9, 14, 224, "gelu", 1000, batch=4, quick_batch=1, quick_training=False)
}


@dataclass(frozen=True)
class OpCase:
    """One operator at one size."""

    op: str
    family: str  # the network that has this shape, or "sweep"
    shape: tuple[int, int, int, int]  # N, C, H, W
    kernel: int = 9
    channels_out: int | None = None  # of a 1x1 convolution; None for C
    dtype: str = "float32"
    layout: str = "contiguous"
    quick: bool = False
    compiled: bool = False  # timed under torch.compile too, which takes a compiler 10 to 60 s a case

    @property
    def name(self) -> str:
        """Unique, and what --filter sees."""
        size = "x".join(map(str, self.shape))
        kernel = f" k{self.kernel}" if self.has_depthwise else ""
        out = f"->{self.channels_out}" if self.channels_out is not None else ""
        return f"{self.op}{kernel} {size}{out} {self.dtype} {self.layout}"

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
        channels_out = None if self.channels_out is None else 48
        return replace(self, shape=(2, 32, 6, 7), channels_out=channels_out)


@dataclass(frozen=True)
class ModelCase:
    """Inference or the training step of one published ConvMixer."""

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
    def preset(self) -> models.Case:
        return _TINY_MODEL if self.model == "tiny" else PRESETS[self.model]

    def tiny(self) -> ModelCase:
        return replace(self, model="tiny", batch=2)


_TINY_MODEL = models.Case(64, 2, 5, 2, 12, "gelu", 10, batch=2, quick_batch=2, quick_training=True)

Case = OpCase | ModelCase


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
_SWEEP = {"cpu": (1, 768, 32, 32), "cuda": (64, 768, 32, 32)}
_BATCHES = {"cpu": (1, 8, 128), "cuda": (1, 32, 1024)}
_MODEL_BATCHES = {
    "cpu": {"256/8@32": 32, "256/8@224": 4, "768/32@224": 2, "1024/20@224": 2, "1536/20@224": 2},
    "cuda": {"256/8@32": 512, "256/8@224": 128, "768/32@224": 32, "1024/20@224": 64, "1536/20@224": 32},
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
            layer = replace(block, op="layer_eval", quick=first, compiled=first)
            for layout in LAYOUTS:
                yield replace(layer, layout=layout, compiled=first and layout == "contiguous")
                yield replace(layer, op="layer_step", layout=layout, compiled=first and layout == "contiguous")
    size = (base.batches[device_type], base.channels, base.side, base.side)
    for dtype in DTYPES:
        for layout in LAYOUTS:
            for op in OPERATORS:
                if not op.startswith("layer") or dtype != "float32":
                    # the kernels that no other axis has, and every operator in bfloat16 as a user would train
                    quick = (op in (*POINTWISE, *NORM, "depthwise_conv", "depthwise_train")) and layout == "contiguous"
                    sixteen = dtype == "bfloat16" and op in ("depthwise_eval", "layer_eval", "layer_step")
                    quick = (quick and dtype == "float32") or (sixteen and layout == "contiguous")
                    yield OpCase(op, base.family, size, base.kernel, dtype=dtype, layout=layout, quick=quick)
    for batch in _BATCHES[device_type]:
        for op in ("depthwise_eval", "depthwise_step", "layer_eval", "layer_step"):
            yield OpCase(op, base.family, (batch, *size[1:]), base.kernel, quick=batch == 1 and op == "layer_eval")


def _models(device_type: str) -> Iterator[ModelCase]:
    for model, batch in _MODEL_BATCHES[device_type].items():
        for op in MODEL_MODES:
            first = model == "256/8@32"
            yield ModelCase(op, model, batch, quick=first, compiled=first)
    if device_type == "cuda":
        for model in ("256/8@32", "768/32@224", "1536/20@224"):
            for op in MODEL_MODES:
                for layout in LAYOUTS:
                    yield ModelCase(op, model, _MODEL_BATCHES["cuda"][model], "bfloat16", layout, quick=True)


def cases(device_type: str = "cpu") -> list[Case]:
    """Every case for a device type, each once; one that two axes share keeps all its marks."""
    found: dict[str, Case] = {}
    for case in (*_operators(device_type), *_models(device_type)):
        known = found.get(case.name, case)
        marks = {"quick": known.quick or case.quick, "compiled": known.compiled or case.compiled}
        found[case.name] = replace(known, **marks)
    return list(found.values())


def select(some: list[Case], quick: bool, patterns: list[str]) -> list[Case]:
    """Those of `some` that a run was asked for.

    Args:
        quick: only the cases with that mark.
        patterns: a case stays if each of its words' patterns fits: "depthwise_eval k9", "*step float32", "RepLKNet*".
    """
    return [
        case
        for case in some
        if (case.quick or not quick) and (not patterns or any(_fits(case, pattern) for pattern in patterns))
    ]


def _fits(case: Case, pattern: str) -> bool:
    words = [*case.name.split(), case.family]
    return all(any(fnmatch.fnmatchcase(word, part) for word in words) for part in pattern.split())

# SPDX-License-Identifier: MIT
"""The FLOPs and bytes that no implementation can avoid, and the least time that this machine needs for them: a row's floor.

FLOPs are nominal: 2 per multiply-add, padding taps included. A floor leaves those taps out and, on a CPU, adds the time of 18
multiply-adds per exact GELU (what a vector erf costs). A model's training step does every convolution three times (forward,
input gradient, weight gradient; the images need no gradient) and computes GELU and its derivative once each. Its bytes are
the activation passes that no fusion within one block saves: 4 a layer in inference; in training 9 forward, 16 backward and 1
to rebuild what the second block read. ops.py lists the passes of an operator.
"""

from __future__ import annotations

import math

from benchmarks.cases import DTYPES, Case, ModelCase, Network, OpCase, Preset
from benchmarks.machine import Peaks
from benchmarks.ops import OPERATORS

_GELU_MULTIPLY_ADDS = 18
#: Of a layer: in inference, in training.
MODEL_PASSES = (4, 26)


def floor(case: Case, device_type: str, peaks: Peaks) -> dict[str, object]:
    """A row's bytes, flops, floor_ms and bound: the bytes at the copy's pace or the arithmetic at its peak, whichever takes longer.

    On a CPU depthwise convolutions and erfs run at the multiply-add peak, and so do matrix products, or at the measured product's
    pace if a 16-bit one is faster. On a GPU erfs run beside the rest, and 16-bit depthwise convolutions on tensor cores: neither counts.
    Networks other than ConvMixer have no floor: the row is empty.
    """
    if isinstance(case, ModelCase) and isinstance(case.preset, Network):
        return {}
    if isinstance(case, ModelCase):
        size = model_bytes(case.preset, case.batch, case.training, DTYPES[case.dtype].itemsize)
        flops = 2 * multiply_adds(case.preset, case.batch, case.training)
        arithmetic = _model_arithmetic(case, device_type, peaks)
    else:
        size, flops = operator_bytes(case), sum(operator_flops(case))
        arithmetic = _operator_arithmetic(case, device_type, peaks)
    seconds, bound = max((size / peaks.copy, "bytes"), (arithmetic, "arithmetic"))
    return {"bytes": size, "flops": flops, "floor_ms": 1e3 * seconds, "bound": bound}


def _matrix_peak(dtype: str, device_type: str, peaks: Peaks) -> float:
    return max(peaks.gemm[dtype], peaks.fma) if device_type == "cpu" else peaks.gemm[dtype]


def taps_inside(size: tuple[int, int], kernel: tuple[int, int], dilation: int = 1) -> float:
    """The share of a depthwise convolution's taps that meet the image and not its padding; kernels are odd."""

    def inside(side: int, taps: int) -> int:
        reach = taps // 2
        return sum(min(i // dilation, reach) + 1 + min((side - 1 - i) // dilation, reach) for i in range(side))

    return math.prod(map(inside, size, kernel)) / (math.prod(size) * math.prod(kernel))


def operator_bytes(case: OpCase) -> int:
    """Of the activations that the operator must read and write; parameters left out."""
    n, c, h, w = case.shape
    narrow, wide = OPERATORS[case.op].passes
    return n * h * w * (narrow * c + wide * case.out) * DTYPES[case.dtype].itemsize


def operator_flops(case: OpCase) -> tuple[int, int]:
    """Of the depthwise and of the pointwise convolutions."""
    n, c, h, w = case.shape
    pixels, convolutions = n * h * w, OPERATORS[case.op].convolutions
    depthwise = 2 * convolutions * pixels * c * math.prod(case.kernel_size) if case.has_depthwise else 0
    return depthwise, 2 * convolutions * pixels * c * case.out if case.has_pointwise else 0


def _operator_arithmetic(case: OpCase, device_type: str, peaks: Peaks) -> float:
    n, c, h, w = case.shape
    on_cpu = device_type == "cpu"
    depthwise, pointwise = operator_flops(case)
    seconds = pointwise / _matrix_peak(case.dtype, device_type, peaks)
    if on_cpu:
        channels = (c if case.has_depthwise else 0) + (case.out if case.has_pointwise else 0) or c
        seconds += 2 * _GELU_MULTIPLY_ADDS * OPERATORS[case.op].activations * n * h * w * channels / peaks.fma
    if on_cpu or case.dtype == "float32":
        seconds += depthwise * taps_inside((h, w), case.kernel_size, case.dilation) / peaks.fma
    return seconds


def _pixels(preset: Preset, batch: int) -> int:
    return batch * (preset.image_size // preset.patch_size) ** 2


def multiply_adds(preset: Preset, batch: int, training: bool) -> int:
    """Of all convolutions and the classifier, for `batch` images."""
    pixels = _pixels(preset, batch)
    stem = pixels * preset.dim * 3 * preset.patch_size**2
    layer = pixels * preset.dim * (preset.kernel_size**2 + preset.dim)
    forward = stem + preset.depth * layer + batch * preset.dim * preset.n_classes
    return 3 * forward - stem if training else forward


def activations(preset: Preset, batch: int) -> int:
    """How many activation values are computed, for `batch` images."""
    return _pixels(preset, batch) * preset.dim * (1 + 2 * preset.depth)


def model_bytes(preset: Preset, batch: int, training: bool, itemsize: int) -> int:
    """Read and written by the layers (stem, pooling and classifier left out), for `batch` images."""
    return _pixels(preset, batch) * preset.dim * preset.depth * itemsize * MODEL_PASSES[training]


def _model_arithmetic(case: ModelCase, device_type: str, peaks: Peaks) -> float:
    """Everything at the best matrix product; on a GPU a 16-bit depthwise convolution counts too: tensor cores have to do it."""
    preset, size = case.preset, case.preset.image_size // case.preset.patch_size
    depthwise = _pixels(preset, case.batch) * preset.dim * preset.depth * preset.kernel_size**2
    outside = (3 if case.training else 1) * depthwise * (1 - taps_inside((size, size), (preset.kernel_size,) * 2))
    slots = multiply_adds(preset, case.batch, case.training) - outside
    if preset.activation == "gelu" and device_type == "cpu":
        slots += _GELU_MULTIPLY_ADDS * activations(preset, case.batch) * (2 if case.training else 1)
    return 2 * slots / _matrix_peak(case.dtype, device_type, peaks)

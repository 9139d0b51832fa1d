# SPDX-License-Identifier: MIT
"""FLOPs and bytes that a ConvMixer cannot avoid, and the time that this machine needs for them at least.

FLOPs are nominal: 2 per multiply-add, padding taps included. A floor leaves those taps out and adds, on a CPU, the
time of 18 multiply-adds per exact GELU (what a vector erf costs). A training step does every convolution three times
(forward, input gradient, weight gradient), except that the images need no gradient, and GELU and its derivative once
each. Bytes are the activation passes that no fusion within one block saves: eval reads and writes once a block;
training has 9 passes forward, 16 backward and 1 to rebuild what the second block read. An operator's passes stand in ops.py.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from benchmarks.machine import MachinePeaks
from benchmarks.models import Case
from benchmarks.ops import OPERATORS
from benchmarks.shapes import DTYPES, ModelCase, OpCase

_GELU_MULTIPLY_ADDS = 18
_EVAL_PASSES = 4
_TRAINING_PASSES = 26


class Peaks(NamedTuple):
    """What the machine reached in this run."""

    flops: float  # of a GEMM, per second
    bandwidth: float  # of a copy, bytes read and written per second


def taps_inside(height: int, width: int, kernel: int) -> float:
    """The share of a depthwise convolution's taps that meet the image and not its padding."""

    def inside(size: int) -> int:
        before = (kernel - 1) // 2
        return sum(min(i, before) + 1 + min(size - 1 - i, kernel - 1 - before) for i in range(size))

    return inside(height) * inside(width) / (height * width * kernel**2)


def multiply_adds(case: Case, batch: int, training: bool) -> int:
    """Of all convolutions and the classifier, for `batch` images."""
    pixels = batch * (case.image_size // case.patch_size) ** 2
    stem = pixels * case.dim * 3 * case.patch_size**2
    layer = pixels * case.dim * (case.kernel_size**2 + case.dim)
    forward = stem + case.depth * layer + batch * case.dim * case.n_classes
    return 3 * forward - stem if training else forward


def activations(case: Case, batch: int) -> int:
    """How many activation values are computed, for `batch` images."""
    pixels = batch * (case.image_size // case.patch_size) ** 2
    return pixels * case.dim * (1 + 2 * case.depth)


def activation_bytes(case: Case, batch: int, training: bool, itemsize: int) -> int:
    """Read and written by the layers (stem, pooling and classifier left out), for `batch` images."""
    pixels = batch * (case.image_size // case.patch_size) ** 2
    return pixels * case.dim * case.depth * itemsize * (_TRAINING_PASSES if training else _EVAL_PASSES)


def floor_seconds(
    case: Case, batch: int, training: bool, dtype: torch.dtype, device: torch.device, peaks: Peaks
) -> float:
    """The least time that the arithmetic or the bytes take, whichever is longer."""
    size = case.image_size // case.patch_size
    depthwise = batch * size**2 * case.dim * case.depth * case.kernel_size**2 * (3 if training else 1)
    slots = multiply_adds(case, batch, training) - depthwise * (1 - taps_inside(size, size, case.kernel_size))
    if case.activation == "gelu" and device.type == "cpu":
        slots += _GELU_MULTIPLY_ADDS * activations(case, batch) * (2 if training else 1)
    return max(2 * slots / peaks.flops, activation_bytes(case, batch, training, dtype.itemsize) / peaks.bandwidth)


class Floor(NamedTuple):
    """What a case cannot avoid, and the time of that."""

    bytes: int
    flops: int
    seconds: float
    bound: str  # "bytes" or "arithmetic", whichever takes longer


def operator_bytes(case: OpCase) -> int:
    """Of the activations that the operator must read and write; parameters left out."""
    n, c, h, w = case.shape
    narrow, wide = OPERATORS[case.op].passes
    return n * h * w * (narrow * c + wide * case.out) * DTYPES[case.dtype].itemsize


def operator_flops(case: OpCase) -> tuple[int, int]:
    """Of the depthwise and of the pointwise convolutions."""
    n, c, h, w = case.shape
    pixels, convolutions = n * h * w, OPERATORS[case.op].convolutions
    depthwise = 2 * convolutions * pixels * c * case.kernel**2 if case.has_depthwise else 0
    return depthwise, 2 * convolutions * pixels * c * case.out if case.has_pointwise else 0


def operator_floor(case: OpCase, device: torch.device, peaks: MachinePeaks) -> Floor:
    """Depthwise FLOPs and erfs at the FMA peak, pointwise ones at the matrix product's, or the bytes at the copy's.

    On a CPU a matrix product can be faster than the one that was measured, up to the FMA peak: that is its floor, or the
    measured one of a 16-bit dtype where that is faster. On a GPU erfs run beside the rest, and 16-bit depthwise
    convolutions on tensor cores: neither is counted there.
    """
    n, c, h, w = case.shape
    on_cpu, sixteen = device.type == "cpu", case.dtype != "float32"
    depthwise, pointwise = operator_flops(case)
    arithmetic = pointwise / _matrix_peak(case.dtype, device, peaks)
    if on_cpu:
        channels = (c if case.has_depthwise else 0) + (case.out if case.has_pointwise else 0) or c
        arithmetic += 2 * _GELU_MULTIPLY_ADDS * OPERATORS[case.op].activations * n * h * w * channels / peaks.fma
    if on_cpu or not sixteen:
        arithmetic += depthwise * taps_inside(h, w, case.kernel) / peaks.fma
    size = operator_bytes(case)
    bound = "bytes" if size / peaks.copy >= arithmetic else "arithmetic"
    return Floor(size, depthwise + pointwise, max(size / peaks.copy, arithmetic), bound)


def _matrix_peak(dtype: str, device: torch.device, peaks: MachinePeaks) -> float:
    return max(peaks.gemm[dtype], peaks.fma) if device.type == "cpu" else peaks.gemm[dtype]


def model_floor(case: ModelCase, device: torch.device, peaks: MachinePeaks) -> Floor:
    """A model's FLOPs at the best matrix product, or its bytes at the copy's pace."""
    training, dtype = case.op == "model_step", DTYPES[case.dtype]
    found = Peaks(_matrix_peak(case.dtype, device, peaks), peaks.copy)
    seconds = floor_seconds(case.preset, case.batch, training, dtype, device, found)
    size = activation_bytes(case.preset, case.batch, training, dtype.itemsize)
    bound = "bytes" if seconds <= size / peaks.copy else "arithmetic"
    return Floor(size, 2 * multiply_adds(case.preset, case.batch, training), seconds, bound)


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """The best of several GEMMs and copies through torch."""
    size, elements = (1024, 1 << 24) if device.type == "cpu" else (8192, 1 << 28)
    # A CPU without 16-bit arithmetic multiplies 16-bit matrices slower than float32: its peak is the faster of the two.
    dtypes = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    flops = 0.0
    for each in dtypes:
        matrix = torch.ones(size, size, device=device, dtype=each)
        product = torch.empty_like(matrix)
        flops = max(flops, 2 * size**3 / _best(lambda m=matrix, p=product: torch.mm(m, m, out=p), device))
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    return Peaks(flops, 2 * source.nbytes / _best(lambda: target.copy_(source), device))


def _best(function, device: torch.device, calls: int = 20) -> float:
    best = float("inf")
    for _ in range(calls):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best

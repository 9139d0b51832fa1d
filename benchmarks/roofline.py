# SPDX-License-Identifier: MIT
"""FLOPs and bytes that a ConvMixer cannot avoid, and the time that this machine needs for them at least.

FLOPs are nominal: 2 per multiply-add, padding taps included. A floor adds, on a CPU, the time of 18 multiply-adds per
exact GELU (what a vector erf costs). A training step does every convolution three times (forward, input gradient,
weight gradient), except that the images need no gradient, and GELU and its derivative once each. Bytes are the
activation passes that no fusion within one block saves: eval reads and writes once a block; training has 9 passes
forward, 16 backward and 1 to rebuild what the second block read.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from benchmarks.models import Case

_GELU_MULTIPLY_ADDS = 18
_EVAL_PASSES = 4
_TRAINING_PASSES = 26


class Peaks(NamedTuple):
    """What the machine reached in this run."""

    flops: float  # of a GEMM, per second
    bandwidth: float  # of a copy, bytes read and written per second


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
    slots = multiply_adds(case, batch, training)
    if case.activation == "gelu" and device.type == "cpu":
        slots += _GELU_MULTIPLY_ADDS * activations(case, batch) * (2 if training else 1)
    return max(2 * slots / peaks.flops, activation_bytes(case, batch, training, dtype.itemsize) / peaks.bandwidth)


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

# SPDX-License-Identifier: MIT
"""The twice-eager rule if rounding errors do not average out: values beside a large mean, and values that are all equal."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, assert_twice_eager, in_format, skip_unless_it_runs
from torch import Tensor

import convmixer_kernels as ck

#: Seeds that are pooled; Triton's interpreter takes seconds for each.
SEEDS = {"cpu": 24, "reference": 24, "cuda": 24, "triton": 4}
FORMATS = ("contiguous", "channels_last")
#: Emulated kernels are slow: they run a few of the cases.
SLOW = ("cuda", "triton")


@pytest.fixture(params=["cpu", "reference", "cuda", "triton"])
def backend(request, monkeypatch):
    skip_unless_it_runs(request.param, monkeypatch)
    return request.param


def _pooled(name: str, backend: str, case) -> None:
    """`case(dtype, ours)` gives results; the rule holds for those of all seeds together."""
    results = []
    for seed in range(SEEDS[backend]):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        row = []
        for dtype, chosen in ((torch.float32, backend), (torch.float32, None), (torch.float64, None)):
            torch.set_rng_state(state)
            row.append(case(dtype, chosen).flatten())
        results.append(row)
    ours, eager, exact = (torch.cat(column) for column in zip(*results, strict=True))
    assert_twice_eager(name, ours, eager, exact)


# with a border of two pixels beside a mean of 1e4, a shift by the first pixel failed
STATISTICS = [
    *itertools.product(["depthwise"], [((1, 8, 97, 1), 3), ((2, 32, 16, 16), 3), ((2, 8, 9, 11), 9)]),
    *itertools.product(["pointwise"], [((2, 8, 9, 7), 8), ((2, 32, 16, 16), 32), ((1, 24, 6, 5), 17)]),
]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("mean", [1e4, 100.0])
@pytest.mark.parametrize("activation", ["gelu", "identity"])
@pytest.mark.parametrize("kind, sizes", STATISTICS, ids=str)
def test_running_statistics_beside_a_mean(kind, sizes, activation, mean, memory_format, backend):
    shape, size = sizes
    slowest = backend == "triton" and (activation == "gelu" or size == 9)
    if backend in SLOW and (mean != 1e4 or shape[0] * shape[1] > 32 or slowest):
        pytest.skip("a slow emulation: the smaller cases beside the larger mean stand for all")
    c = shape[1]
    for at, name in enumerate(("running_mean", "running_var")):

        def case(dtype: torch.dtype, chosen: str | None, at=at) -> Tensor:
            x = in_format(torch.randn(shape) + mean, memory_format).to(dtype)
            weight = (
                torch.randn(c, 1, size, size) / size if kind == "depthwise" else torch.randn(size, c, 1, 1) / c**0.5
            )
            weight, bias = weight.to(dtype), torch.randn(len(weight)).to(dtype)
            running = torch.zeros(len(weight), dtype=dtype), torch.ones(len(weight), dtype=dtype)
            if chosen is None:
                a = F.conv2d(x, weight, bias, padding="same", groups=c if kind == "depthwise" else 1)
                F.batch_norm(ACTIVATIONS[activation](a), *running, training=True)
            else:
                operator = ck.depthwise_block if kind == "depthwise" else ck.pointwise_block
                options = {"training": True, "activation": activation, "backend": chosen}
                operator(x, weight, bias, None, None, *running, **options)
            return running[at]

        _pooled(f"{kind} {shape} {size}: {name}", backend, case)


# parts of rows, of columns and of images; the contiguous 3x3 has a kernel of its own
WEIGHT_GRADIENTS = [
    ((1, 24, 33, 3), (9, 9)),
    ((4, 8, 16, 16), (9, 9)),
    ((1, 8, 7, 100), (7, 7)),
    ((2, 8, 48, 50), (15, 15)),
    ((2, 16, 56, 56), (3, 3)),
    ((3, 8, 40, 33), (3, 3)),
]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape, kernel", WEIGHT_GRADIENTS, ids=str)
def test_depthwise_weight_gradient_of_constants(shape, kernel, memory_format, backend):
    """With planes of one value each and an expanded gradient all products of a sum are equal, and their roundings add up."""
    if backend in SLOW and (shape != (1, 24, 33, 3) or (backend, memory_format) == ("triton", "contiguous")):
        pytest.skip("a slow emulation: the case that failed stands for all")

    def case(dtype: torch.dtype, chosen: str | None) -> Tensor:
        x = in_format(torch.randn(*shape[:2], 1, 1).expand(shape).contiguous(), memory_format).to(dtype)
        weight = torch.randn(shape[1], 1, *kernel).to(dtype).requires_grad_()
        dy = torch.randn(1, 1, 1, 1).to(dtype).expand(shape)
        eager = {"padding": "same", "groups": shape[1]}
        y = F.conv2d(x, weight, **eager) if chosen is None else ck.depthwise_conv2d(x, weight, backend=chosen)
        return torch.autograd.grad(y, weight, dy)[0]

    _pooled(f"{shape} {kernel}: dweight", backend, case)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape", [(1, 24, 33, 3), (4, 8, 16, 16), (2, 300, 12, 12), (1, 3, 12, 28), (1, 8, 24, 24)], ids=str
)
def test_pointwise_weight_gradient_of_constants(shape, memory_format, backend):
    """As above, in evaluation: batch statistics would leave nothing of a constant."""
    if backend in SLOW and shape != (1, 24, 33, 3):
        pytest.skip("a slow emulation: the smallest case stands for all")
    c = shape[1]

    def case(dtype: torch.dtype, chosen: str | None) -> Tensor:
        x = in_format(torch.randn(*shape[:2], 1, 1).expand(shape).contiguous(), memory_format).to(dtype)
        weight = (torch.randn(c, c, 1, 1) / c**0.5).to(dtype).requires_grad_()
        norm = [torch.randn(c).to(dtype), torch.randn(c).to(dtype), torch.zeros(c).to(dtype), torch.ones(c).to(dtype)]
        dy = torch.randn(1, 1, 1, 1).to(dtype).expand(shape)
        if chosen is None:
            y = F.batch_norm(F.conv2d(x, weight), *norm[2:], *norm[:2])
        else:
            y = ck.pointwise_block(x, weight, None, *norm, activation="identity", backend=chosen)
        return torch.autograd.grad(y, weight, dy)[0]

    _pooled(f"{shape}: dweight", backend, case)

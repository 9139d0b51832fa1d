# SPDX-License-Identifier: MIT
"""Whether an implementation computes a case: every result against float64, by the twice-eager rule."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import accuracy
from benchmarks.ops import OPERATORS
from benchmarks.peers import Inputs, Prepared, Results, model_calls
from benchmarks.shapes import DTYPES, ModelCase, OpCase

#: Two rounding errors over a handful of numbers compare by luck: vectors over the channels are pooled to so many.
POOL = 128
#: float64 convolves slowly. Above so many multiply-adds, channels that depend on no other are sampled.
_LARGEST_EXACT = 300_000_000


class Truth(NamedTuple):
    """The results in float64 of one set, and the channels that they were computed for (None: all)."""

    results: list[dict[str, Tensor]]
    kept: Tensor | None


def pooled_sets(case: OpCase | ModelCase) -> int:
    """How many sets a check needs."""
    return 1 if isinstance(case, ModelCase) else -(-POOL // min(case.shape[1], case.out))


def exact(inputs: Inputs) -> Truth:
    case = inputs.case
    if isinstance(case, ModelCase):
        wide = Inputs(case, inputs.device, [], copy.deepcopy(inputs.reference).double())
        wide.images, wide.cotangent = inputs.images.double(), inputs.cotangent.double()
        return Truth([_named(inputs, model_calls(wide, wide.reference, "contiguous")[0](), None)], None)
    operator, n, (_, c, h, w) = OPERATORS[case.op], case.shape[0], case.shape
    kept, work = None, n * c * h * w * case.kernel**2 * operator.convolutions
    if not case.has_pointwise and operator.convolutions and work > _LARGEST_EXACT and c > POOL:
        kept = torch.arange(0, c, max(1, min(c // POOL, work // _LARGEST_EXACT)), device=inputs.device)
    sets = inputs.sets[: pooled_sets(case)]
    wide = [(s if kept is None else s.channels(kept)).double() for s in sets]
    return Truth([_named(inputs, operator.call(s)(), None) for s in wide], kept)


def results(inputs: Inputs, prepared: Prepared, truth: Truth) -> list[dict[str, Tensor]]:
    """What an implementation makes of the sets of `truth`, kept for a comparison."""
    found = []
    with prepared.setting():
        for call, _ in zip(prepared.calls, truth.results, strict=False):
            found.append({name: t.detach().clone() for name, t in _named(inputs, call(), truth.kept).items()})
    return found


def compare(
    inputs: Inputs, truth: Truth, eager: list[dict[str, Tensor]], found: list[dict[str, Tensor]]
) -> list[accuracy.Comparison]:
    """Every result, the one that is nearest to its limit first."""
    pooled = [{name: _pool(some, name) for name in truth.results[0]} for some in (truth.results, eager, found)]
    return accuracy.compare(*pooled, DTYPES[inputs.case.dtype])


def _pool(sets: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.cat([some[name].flatten() for some in sets])


def _named(inputs: Inputs, values: Results, kept: Tensor | None) -> dict[str, Tensor]:
    case = inputs.case
    if isinstance(case, ModelCase):
        parameters = [f"gradient of {name}" for name, _ in inputs.reference.named_parameters()]
        return dict(zip(["output", *parameters], values, strict=False))
    named = dict(zip(OPERATORS[case.op].outputs, values, strict=True))
    if kept is None:
        return named
    # activations have their channels second, all else first
    return {name: t[:, kept] if name in ("y", "dx") else t[kept] for name, t in named.items()}

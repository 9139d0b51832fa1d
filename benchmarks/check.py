# SPDX-License-Identifier: MIT
"""Whether a result is right: every tensor against float64, by the package's rule ("twice eager", convmixer_kernels.testing)."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.cases import DTYPES, Case, ModelCase, OpCase
from benchmarks.ops import OPERATORS
from benchmarks.peers import Prepared, Workload
from convmixer_kernels.testing import UNIT_ROUNDOFF, relative_error, within_twice_eager

Results = dict[str, Tensor]

#: The errors of a few numbers compare by luck, so vectors over the channels are pooled over several inputs to so many.
POOL = 128
#: float64 convolves slowly, and large tensors take long to compare: above so many multiply-adds (of convolutions whose channels depend
#: on no other) and so many values, a sample of the channels is checked.
_LARGEST_EXACT = 300_000_000
_LARGEST_COMPARED = 1 << 24
#: A GPU's time is short, and float64 slow there: a model is checked by its inference on so many images.
_GPU_IMAGES = 4


class Comparison(NamedTuple):
    """One tensor of ours and of eager PyTorch against float64."""

    tensor: str
    error: float  # ours: relative L2
    eager_error: float
    allowed: float
    passed: bool


def compare(
    exact: Mapping[str, Tensor], eager: Mapping[str, Tensor], ours: Mapping[str, Tensor], dtype: torch.dtype
) -> list[Comparison]:
    """Every tensor of `exact` compared, the one that is nearest to its limit first. One that ours lacks is wrong."""
    comparisons = []
    for name, truth in exact.items():
        eager_error = relative_error(eager[name], truth)
        wrong = name not in ours or ours[name].shape != truth.shape
        error = float("nan") if wrong else relative_error(ours[name], truth)
        passed = within_twice_eager(error, eager_error, dtype)
        comparisons.append(Comparison(name, error, eager_error, 2 * eager_error + UNIT_ROUNDOFF[dtype], passed))
    # a NaN compares as neither less nor more
    return sorted(comparisons, key=lambda each: (each.passed, each.error == each.error, -each.error / each.allowed))


def evaluate(
    model: nn.Module,
    images: Tensor,  # (N, 3, H, W)
) -> Results:
    """The output in eval mode."""
    model.eval()
    with torch.no_grad():
        return {"output": model(images)}


def training_step(
    model: nn.Module,
    images: Tensor,  # (N, 3, H, W)
    cotangent: Tensor,  # (N, n_classes)
) -> Results:
    """The output of one training step, the gradients of the images and of every parameter, and every buffer after it.

    The loss is sum(output * cotangent): its gradients neither vanish nor overflow in a 16-bit type, whatever the batch.
    """
    model.train()
    model.zero_grad(set_to_none=True)
    images = images.detach().requires_grad_()
    output = model(images)
    output.backward(cotangent)
    results = {"output": output.detach(), "gradient of the images": images.grad}
    results |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    results |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    return {name: tensor for name, tensor in results.items() if tensor is not None}


class Expected(NamedTuple):
    """What a case's results must be: in float64, and eager PyTorch's in the case's dtype and layout."""

    exact: list[Results]  # of each set of inputs
    eager: list[Results]
    kept: Tensor | None  # the channels that are compared; None: all


def pooled_inputs(case: Case) -> int:
    """How many sets of inputs a check needs."""
    return 1 if isinstance(case, ModelCase) else -(-POOL // min(case.shape[1], case.out))


def expect(workload: Workload) -> Expected:
    case = workload.case
    baseline = peers.eager(workload, case.layout)
    if isinstance(case, ModelCase):
        checked = _checked(workload)
        wide = dataclasses.replace(checked, images=checked.images.double(), cotangent=checked.cotangent.double())
        exact = _model_results(wide, copy.deepcopy(workload.reference).double())
        return Expected([exact], results(workload, baseline, 1, None), None)
    kept, exact = _sampled_channels(case, workload.device), []
    sets = workload.inputs[: pooled_inputs(case)]
    for inputs in sets:
        alone = kept is not None and not case.has_pointwise
        wide = (inputs.channels(kept) if alone else inputs).double()
        exact.append(_named(workload, OPERATORS[case.op].call(wide)(), None if alone else kept))
    return Expected(exact, results(workload, baseline, len(sets), kept), kept)


def _sampled_channels(case: OpCase, device: torch.device) -> Tensor | None:
    n, c, h, w = case.shape
    work = n * c * h * w * math.prod(case.kernel_size) * OPERATORS[case.op].convolutions
    fewer = n * max(c, case.out) * h * w // _LARGEST_COMPARED
    if not case.has_pointwise:
        fewer = max(fewer, work // _LARGEST_EXACT)
    narrow = min(c, case.out)
    step = min(narrow // POOL, fewer)
    return torch.arange(0, narrow, step, device=device) if step > 0 else None


def results(workload: Workload, prepared: Prepared, count: int, kept: Tensor | None) -> list[Results]:
    """What an implementation makes of the first `count` sets of inputs, kept for a comparison."""
    with prepared.setting():
        if prepared.model is not None:
            return [_model_results(_checked(workload), prepared.model)]
        found = []
        for call in prepared.calls[:count]:
            found.append({name: t.detach().clone() for name, t in _named(workload, call(), kept).items()})
        return found


def judge(workload: Workload, expected: Expected, found: list[Results], complete: bool) -> list[Comparison]:
    """Every result, the one that is nearest to its limit first.

    Args:
        complete: whether a tensor that `found` lacks is wrong. Only ours must have all: compiled models and engines return fewer.
    """
    names = [name for name in expected.exact[0] if complete or name in found[0]]

    def pooled(sets: list[Results]) -> Results:
        return {name: torch.cat([some[name].flatten() for some in sets]) for name in names if name in sets[0]}

    return compare(pooled(expected.exact), pooled(expected.eager), pooled(found), DTYPES[workload.case.dtype])


def _checked(workload: Workload) -> Workload:
    """The part of a model's workload that is checked."""
    if workload.device.type != "cuda":
        return workload
    case = dataclasses.replace(workload.case, op="model_eval")
    images, cotangent = workload.images[:_GPU_IMAGES], workload.cotangent[:_GPU_IMAGES]
    return dataclasses.replace(workload, case=case, images=images, cotangent=cotangent)


def _model_results(workload: Workload, model: nn.Module) -> Results:
    mode = model.training
    try:
        if workload.case.training:
            return training_step(model, workload.images, workload.cotangent)
        return evaluate(model, workload.images)
    finally:
        # the mode of the timed calls may be the other one
        model.train(mode)


def _named(workload: Workload, values: tuple[Tensor, ...], kept: Tensor | None) -> Results:
    case = workload.case
    if isinstance(case, ModelCase):
        if workload.device.type == "cuda":
            # of the images that are checked; a training step has no result that is comparable with their inference
            return {} if case.training else {"output": values[0][:_GPU_IMAGES]}
        parameters = [f"gradient of {name}" for name, _ in workload.reference.named_parameters()]
        return dict(zip(["output", *parameters], values, strict=False))
    named = dict(zip(OPERATORS[case.op].outputs, values, strict=True))
    if kept is None:
        return named
    # activations have their channels second, all else first
    return {name: t[:, kept] if name in ("y", "dx", "a") else t[kept] for name, t in named.items()}

# SPDX-License-Identifier: MIT
"""What a model computes, tensor by tensor, and whether it is right by the package's rule ("twice eager")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from convmixer_kernels.testing import UNIT_ROUNDOFF, relative_error, within_twice_eager


class Comparison(NamedTuple):
    """One tensor of ours and of eager PyTorch against float64."""

    tensor: str
    error: float  # ours: relative L2
    eager_error: float
    allowed: float
    passed: bool

    @property
    def share(self) -> float:
        """The share of the allowed error that ours takes; infinite for a wrong NaN."""
        return self.error / self.allowed if self.error == self.error else float("inf")


def evaluate(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The output in eval mode.

    Args:
        images: (N, 3, H, W)
    """
    model.eval()
    with torch.no_grad():
        return {"output": model(images)}


def training_step(model: nn.Module, images: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """The output of one training step, the gradients of the images and of every parameter, and every buffer after it.

    The loss is sum(output * cotangent): its gradients neither vanish nor overflow in a 16-bit type, whatever the batch.

    Args:
        images: (N, 3, H, W)
        cotangent: (N, n_classes)
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
    return sorted(comparisons, key=lambda comparison: (comparison.passed, -comparison.share))

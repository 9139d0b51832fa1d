# SPDX-License-Identifier: MIT
"""The contract of the backends: the primitives that convmixer_kernels.autograd composes, and the types that all sides share.

These conventions hold for every primitive of every backend:

* ``x``, ``a``, ``dy``, ``residual`` are (N, C, H, W), all of one dtype and one dense memory format, which is
  either contiguous or channels_last; outputs have the same dtype and format. The caller guarantees both, and never passes
  an empty tensor.
* ``weight`` is contiguous, (C, 1, kH, kW) or (C_out, C_in, 1, 1); ``weight``, ``bias`` and the tensors of a ``Norm``
  are contiguous, each float32 or x's dtype (float64 if x is).
* Padding is nn.Conv2d's "same": of d * (k - 1) the lower half at the top and left, the rest at the bottom and right.
* ``dilation`` is the distance (dH, dW) of the kernel's taps, (1, 1) unless it is given. The primitives of a convolution without
  activation and norm get it: ``depthwise_eval``, ``depthwise_input_grad``, ``depthwise_weight_grad``. A block's is (1, 1).
* ``activation`` is one of ``ACTIVATIONS``.
* Arithmetic, statistics and sums are float32 for 32- and 16-bit tensors (float64 on the reference backend for float64).
  Results are deterministic: the same bits on each run and for each number of threads (where a product is torch's, as far as torch's are).
* ``norm`` is None (no normalisation: scale 1, shift 0) or a :class:`Norm`; then
  ``y = (act(a) - mean) * (weight * rsqrt(var + eps)) + bias``.
* ``sums`` is None if the statistics were constants (eval); then ``dh = weight * rstd * dy``. Otherwise it is the result of
  ``norm_backward``, and with M = N * H * W, rstd = rsqrt(var + eps), hhat = (act(a) - mean) * rstd
  ``dh = weight * rstd * (dy - sum_dy / M - hhat * sum_dy_hhat / M)``.
  In both cases ``da = dh * act'(a)``. With ``norm`` None ``da = dy * act'(a)``; then ``a`` may be None if the activation is identity.
* ``normalize`` is the last pass of a forward. With ``updates`` it also updates running statistics, after everything that can fail.
  No other primitive changes a tensor that it was given.
* Optional ``mixer_eval(x, layers, residual)``: runs several eval layers, a non-empty sequence of :class:`MixerEval`, in one call
  without storing tensors between them. It returns None if it cannot run or if separate calls are faster. The bits are those of
  separate calls; only a GPU's tensor cores may add the products of one instruction in another order. A backend with mixer_eval also
  has ``mixer_may_fit(x)``, which is fast and returns False if mixer_eval would return None for all layers of x's width.
* Optional ``depthwise_block_backward`` and ``pointwise_block_backward(dy, a, x, weight, bias, activation, norm,
  batch_statistics, residual, needs)``: the gradients of x, weight, bias and the norm's weight and bias in their dtypes, in fewer
  launches than the primitives take. A gradient is None if `needs` (a bool for each) is False. They return None instead of a tuple if
  separate calls are as good.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: The activations, in the order of their codes in the native modules (csrc/math.h).
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh")


#: Gradients in the order of an operator's tensors, None for those that were not needed; and which are needed.
Grads = tuple[Tensor | None, ...]
Needs = tuple[bool, ...]


class Block(NamedTuple):
    """The tensors of one block that can need a gradient."""

    weight: Tensor  # (C, 1, kH, kW) or (C_out, C_in, 1, 1)
    bias: Tensor | None  # (C,)
    norm_weight: Tensor | None  # (C,)
    norm_bias: Tensor | None  # (C,)


class Statistics(NamedTuple):
    """Batch norm's mean and biased variance, (C,) each: running ones, or a batch's."""

    mean: Tensor | None
    var: Tensor | None


class Options(NamedTuple):
    """What an operator is told beside its tensors."""

    batch_statistics: bool  # normalise by the batch's statistics and update the running ones, else by the running ones
    momentum: float
    eps: float
    activation: str
    residual: bool  # of a depthwise block
    save: bool  # whether a backward may follow
    entry: Any = None  # of prepared.py, if this call was checked before
    group: str | None = (
        None  # name of the process group whose ranks' batches the statistics are of; None: this rank's batch
    )


class Norm(NamedTuple):
    """Batch norm as a per-channel affine map: statistics (of the batch or running), parameters, eps."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,) biased variance
    weight: Tensor | None  # (C,) gamma; None is 1
    bias: Tensor | None  # (C,) beta; None is 0
    eps: float


class Update(NamedTuple):
    """An update of running statistics: running = (1 - momentum) * running + momentum * new, with the unbiased variance."""

    running_mean: Tensor | None  # (C,) updated in place, float32 or x's dtype; None: not tracked
    running_var: Tensor | None  # (C,) as running_mean
    mean: Tensor  # (C,) of the batch, float32 (float64 if x is)
    var: Tensor  # (C,) biased
    count: int  # values of a channel, N * H * W; 1 if var is unbiased already
    momentum: float


class MixerEval(NamedTuple):
    """A mixer layer in evaluation; each block is its weight, bias and norm."""

    activation: str
    depthwise: tuple[Tensor, Tensor | None, Norm]  # weight (C, 1, kH, kW), bias (C,)
    pointwise: tuple[Tensor, Tensor | None, Norm]  # weight (C_out, C, 1, 1), bias (C_out,)


#: A layer that a backend has prepared (<name>_layer.py), in evaluation: x and the pointwise weight -> y.
EvaluateLayer = Callable[[Tensor, Tensor], Tensor]


class TrainLayer(NamedTuple):
    """A layer that a backend has prepared, in a training step."""

    #: x and the pointwise weight -> y, both a, and the batch's statistics of both blocks. Running statistics move.
    forward: Callable[[Tensor, Tensor], tuple[Tensor, tuple[Tensor, Tensor], tuple[Statistics, Statistics]]]
    #: dy, x, both a, the pointwise weight, both statistics, h1 as the forward had it, whether x needs a gradient -> the gradients of
    #: x and of all eight parameters. All tensors are as the forward left them.
    backward: Callable[..., Grads]


def wide(t: Tensor) -> Tensor:
    """t in the dtype of the arithmetic: float32, or float64 if it is float64."""
    return t if t.dtype == torch.float64 else t.float()


def activate(a: Tensor, activation: str) -> Tensor:
    """act(a), elementwise, in a's dtype."""
    if activation == "identity":
        return a
    if activation == "relu":
        return torch.relu(a)
    return F.gelu(a, approximate="tanh" if activation == "gelu_tanh" else "none")


def convolution(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C_out, C / groups, kH, kW)
    bias: Tensor | None,  # (C_out,)
    groups: int,
    padding: str | int | tuple[int, ...] = "same",
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """F.conv2d in x's dtype; differentiable as often as F.conv2d."""
    # on a CPU 16-bit operands are always widened: float32 is no slower there
    dtype = torch.float32 if x.device.type == "cpu" and x.dtype != torch.float64 else x.dtype
    bias = None if bias is None else bias.to(dtype)
    options = {"padding": padding, "dilation": dilation, "groups": groups}
    return F.conv2d(x.to(dtype), weight.to(x.dtype).to(dtype), bias, **options).to(x.dtype)


def update_running_statistics(update: Update) -> None:
    """Update in place: running = (1 - momentum) * running + momentum * new, with the variance times count / (count - 1)."""
    running_mean, running_var, mean, var, count, momentum = update
    if running_mean is not None:
        _move(running_mean, mean, momentum)
    if running_var is not None:
        _move(running_var, var * (count / max(count - 1, 1)), momentum)


def _move(running: Tensor, new: Tensor, momentum: float) -> None:
    if running.stride(0) != 0 or running.shape[0] == 1:
        running.copy_((1 - momentum) * wide(running) + momentum * new)
        return
    # all channels share one element and update it one after the other, as in torch's loop over channels
    for value in new:
        running[0].copy_((1 - momentum) * wide(running[0]) + momentum * value)

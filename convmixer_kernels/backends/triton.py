# SPDX-License-Identifier: MIT
"""The primitives in Triton (triton_kernels/), for any GPU that Triton reaches; needs no compiler but triton itself.

Kernels compile at their first call (triton keeps them on disk) and are tuned as triton_kernels/tuning.py says. With
TRITON_INTERPRET=1 in the environment before the first call, Triton's interpreter runs the same kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..primitives import Norm, Update

name = "triton"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: As backend "cpu": far beyond use.
_LARGEST_KERNEL = 1023
_LARGEST_DILATION = 64
_LARGEST_PLANE = 2**30
_LEAST_CAPABILITY = (8, 0)
_LEAST_VERSION = (3, 6)


class _Kernels(NamedTuple):
    batch_norm: ModuleType
    config: ModuleType
    depthwise: ModuleType
    pointwise: ModuleType
    toeplitz: ModuleType


@functools.cache
def _kernels() -> _Kernels:
    """The modules of kernels: here triton is imported, at the first call of a primitive."""
    from ..triton_kernels import batch_norm, config, depthwise, depthwise_toeplitz, pointwise

    return _Kernels(batch_norm, config, depthwise, pointwise, depthwise_toeplitz)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _missing() -> str | None:
    """Why Triton cannot be used here at all, found out without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install 'convmixer-kernels[triton]'"
    from importlib import metadata

    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        # torch's builds for other platforms install it under other names
        return None
    # a build of one's own may be named 3.6+git1234
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and tuple(map(int, found.groups())) < _LEAST_VERSION:
        return f"it needs triton {'.'.join(map(str, _LEAST_VERSION))} or newer, got {version}"
    return None


@functools.cache
def _capability_reason(device: int) -> str | None:
    if torch.version.hip is not None:
        return None
    found = torch.cuda.get_device_capability(device)
    if found >= _LEAST_CAPABILITY:
        return None
    return f"it needs a GPU of compute capability 8.0 or newer, got {found[0]}.{found[1]}"


def can_run(op: str, x: Tensor, weight: Tensor, dilation: tuple[int, int] = (1, 1)) -> str | None:
    """None if this backend can run `op` on these tensors, else the reason why not."""
    if (reason := _missing()) is not None:
        return reason
    if _interpreted():
        if x.device.type != "cpu":
            return f"TRITON_INTERPRET=1 takes CPU tensors, for tests, got x.device={x.device}"
    elif not x.is_cuda:
        return f"Triton compiles for GPUs: it needs tensors on a GPU, got x.device={x.device}"
    elif (reason := _capability_reason(x.get_device())) is not None:
        return reason
    if x.dtype not in _DTYPES:
        return f"it takes float32, float16 and bfloat16, got x.dtype={x.dtype}"
    if max(weight.shape[2:]) > _LARGEST_KERNEL:
        return f"it takes kernels up to {_LARGEST_KERNEL}x{_LARGEST_KERNEL}, got weight.shape={tuple(weight.shape)}"
    if max(dilation) > _LARGEST_DILATION:
        return f"it takes dilations up to {_LARGEST_DILATION}, got dilation={dilation}"
    if x.shape[2] * x.shape[3] > _LARGEST_PLANE:
        return f"it takes images of up to 2^30 values, got x.shape={tuple(x.shape)}"
    return None


def build_info() -> dict[str, object]:
    """What this backend is made of, for convmixer_kernels.build_info()."""
    if (reason := _missing()) is not None:
        return {"available": False, "detail": reason}
    if _interpreted():
        return {"available": True, "detail": "Triton's interpreter on the CPU (TRITON_INTERPRET=1), for tests only"}
    if not torch.cuda.is_available():
        return {"available": False, "detail": "Triton needs a GPU: torch.cuda.is_available() is False"}
    return {"available": True, "detail": "Triton kernels, verified by interpreter and compilation, not yet on hardware"}


class _On:
    """`with _On(x)`: x's device is the current one; Triton launches on its current stream."""

    __slots__ = ("guard",)

    def __init__(self, x: Tensor) -> None:
        here = not x.is_cuda or torch.cuda.current_device() == x.get_device()
        self.guard = None if here else torch.cuda.device(x.get_device())

    def __enter__(self) -> None:
        if self.guard is not None:
            self.guard.__enter__()

    def __exit__(self, *exception: object) -> None:
        if self.guard is not None:
            self.guard.__exit__(*exception)


def _depthwise_kernels(x: Tensor, weight: Tensor, dilation: tuple[int, int] = (1, 1)) -> tuple[ModuleType, bool]:
    """The module of the form that the table chooses, and whether it is the one on tensor cores."""
    kernels = _kernels()
    form = kernels.config.depthwise_form(x.dtype, not x.is_contiguous(), tuple(weight.shape[2:]), dilation)
    return (kernels.toeplitz, True) if form == "toeplitz" else (kernels.depthwise, False)


def depthwise_eval(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    activation: str,
    norm: Norm | None,
    residual: bool,
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:  # (N, C, H, W)
    """norm(act(conv(x) + bias)) (+ x), in one launch."""
    form, _ = _depthwise_kernels(x, weight, dilation)
    with _On(x):
        added = x if residual else None
        return form.forward(x, weight, bias, activation, norm, added, False, dilation=dilation)[0]


def depthwise_train(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """a = conv(x) + bias rounded to x's dtype, and mean and biased variance (float32) of act(a): two launches."""
    form, _ = _depthwise_kernels(x, weight)
    with _On(x):
        a, partials = form.forward(x, weight, bias, activation, None, None, True)
        count = x.numel() // x.shape[1]
        return a, *_kernels().batch_norm.merge(partials, count)


def _has_prologue(activation: str, norm: Norm | None) -> bool:
    """Whether da differs from dy."""
    return norm is not None or activation != "identity"


def depthwise_input_grad(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor | None,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    residual: bool,
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:  # (N, C, H, W)
    """dx = correlate(da, flipped weight) (+ dy): da in one launch, if it differs from dy, and dx in another.

    In a prologue da would be computed once for each window that a value lies in: 4 times at least.
    """
    with _On(dy):
        da = dy
        if _has_prologue(activation, norm):
            da, _ = _kernels().batch_norm.grad_prologue(dy, a, activation, norm, sums, True, False)
        return _depthwise_input_grad_of_da(da, dy if residual else None, weight, dilation)


def _depthwise_input_grad_of_da(
    da: Tensor,  # (N, C, H, W)
    residual: Tensor | None,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:  # (N, C, H, W)
    """dx in one launch."""
    form, _ = _depthwise_kernels(da, weight, dilation)
    return form.forward(da, weight, None, "identity", None, residual, False, flip=True, dilation=dilation)[0]


def depthwise_weight_grad(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor | None,  # (N, C, H, W)
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW): for its shape and dtype
    bias: Tensor | None,  # (C,): for its presence and dtype
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    dilation: tuple[int, int] = (1, 1),
) -> tuple[Tensor, Tensor | None]:
    """dw[c, 0, i, j] = sum da * shifted x and db = sum da; db is None if bias is.

    Two launches on tensor cores; on FMA units, whose programs of one filter row each would repeat it, da comes first: three.
    """
    form, on_tensor_cores = _depthwise_kernels(dy, weight, dilation)
    with _On(dy):
        if on_tensor_cores:
            return form.weight_grad(dy, a, x, weight, bias, activation, norm, sums, dilation=dilation)
        da, bias_parts = dy, None
        prologue = _has_prologue(activation, norm)
        if prologue or bias is not None:
            written, bias_parts = _kernels().batch_norm.grad_prologue(
                dy, a, activation, norm, sums, prologue, bias is not None
            )
            da = written if prologue else dy
        return _depthwise_weight_grad_of_da(da, x, weight, bias, bias_parts, dilation)


def _depthwise_weight_grad_of_da(
    da: Tensor,  # (N, C, H, W)
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    bias_parts: Tensor | None,  # (parts, C); given if bias is
    dilation: tuple[int, int] = (1, 1),
) -> tuple[Tensor, Tensor | None]:
    """dw and db from grad_prologue's da and parts, in two launches."""
    form, on_tensor_cores = _depthwise_kernels(da, weight, dilation)
    if on_tensor_cores:
        return form.weight_grad(da, None, x, weight, bias, "identity", None, None, bias_parts, dilation)
    parts = form.weight_grad(da, x, tuple(weight.shape[2:]), dilation)
    dw, db = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
    _kernels().batch_norm.sum_parts(parts, dw, bias_parts, db)
    return dw, db


def depthwise_block_backward(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor,  # (N, C, H, W)
    x: Tensor | None,  # (N, C, H, W); None if dw is not needed
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    activation: str,
    norm: Norm,
    batch_statistics: bool,
    residual: bool,
    needs: tuple[bool, bool, bool, bool, bool],  # dx, dw, db, dgamma, dbeta
) -> tuple[Tensor | None, ...] | None:
    """The five gradients in at most five launches: sums, da (which finishes them), dx, dw, finish.

    da is written once for dx and dw. For the weight alone, on tensor cores, it is not written at all: the primitives do that.
    """
    _, on_tensor_cores = _depthwise_kernels(dy, weight)
    if not any(needs[:3]) or (on_tensor_cores and not needs[0]):
        return None
    with _On(dy):
        da, bias_parts, dgamma, dbeta = _block_prologue(dy, a, bias, activation, norm, batch_statistics, needs)
        dx = dw = db = None
        if needs[0]:
            dx = _depthwise_input_grad_of_da(da, dy if residual else None, weight)
        if needs[1]:
            dw, db = _depthwise_weight_grad_of_da(da, x, weight, bias if needs[2] else None, bias_parts)
        elif needs[2]:
            db = _kernels().batch_norm.sum_parts(bias_parts, torch.empty_like(bias))
    return dx, dw, db, dgamma, dbeta


def _block_prologue(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor,  # (N, C, H, W)
    bias: Tensor | None,  # (C,)
    activation: str,
    norm: Norm,
    batch_statistics: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """da, parts of db, dgamma and dbeta, those that are needed: the sums over dy, and the pass that finishes and uses them."""
    batch_norm, sums, dgamma, dbeta = _kernels().batch_norm, None, None, None
    if batch_statistics or needs[3] or needs[4]:
        dgamma = torch.empty_like(norm.weight) if needs[3] else None
        dbeta = torch.empty_like(norm.bias) if needs[4] else None
        parts = batch_norm.norm_backward_parts(dy, a, activation, norm)
        sums = batch_norm.UnfinishedSums(parts, dbeta, dgamma)
    want_da, want_sums = needs[0] or needs[1], needs[2] and bias is not None
    da, bias_parts = batch_norm.grad_prologue(
        dy, a, activation, norm, sums, want_da, want_sums, constant_statistics=not batch_statistics
    )
    return da, bias_parts, dgamma, dbeta


def normalize(
    a: Tensor,  # (N, C, H, W)
    activation: str,
    norm: Norm,
    residual: Tensor | None,  # (N, C, H, W)
    updates: Sequence[Update] = (),
) -> Tensor:  # (N, C, H, W)
    """norm(act(a)) (+ residual), and running statistics, in one launch."""
    with _On(a):
        return _kernels().batch_norm.normalize(a, activation, norm, residual, updates)


def norm_backward(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor,  # (N, C, H, W)
    activation: str,
    norm: Norm,
) -> tuple[Tensor, Tensor]:
    """sum dy and sum dy * hhat over N, H, W, (C,) float32 each: two launches."""
    with _On(dy):
        return _kernels().batch_norm.norm_backward(dy, a, activation, norm)


def pointwise_eval(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
    activation: str,
    norm: Norm | None,
) -> Tensor:  # (N, C_out, H, W)
    """norm(act(conv1x1(x) + bias)), in one launch."""
    with _On(x):
        return _kernels().pointwise.forward(x, weight, bias, activation, norm, False)[0]


def pointwise_train(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As depthwise_train, for the 1x1 convolution: two launches."""
    with _On(x):
        a, partials = _kernels().pointwise.forward(x, weight, bias, activation, None, True)
        count = a.numel() // a.shape[1]
        return a, *_kernels().batch_norm.merge(partials, count)


def pointwise_backward(
    dy: Tensor,  # (N, C_out, H, W)
    a: Tensor,  # (N, C_out, H, W)
    x: Tensor | None,  # (N, C_in, H, W); None if dw is not needed
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,): for its presence and dtype
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    needs: tuple[bool, bool, bool],  # dx, dw, db
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx = weight^T da, dw = da x^T, db = sum da; None if not needed.

    da is written once for both products, or computed in their prologues where config.fuse_prologue says so.
    """
    batch_norm = _kernels().batch_norm
    want_bias = needs[2] and bias is not None
    channels_in = weight.shape[1]
    prologue = _has_prologue(activation, norm)
    fused = prologue and (needs[0] or needs[1]) and _kernels().config.fuse_prologue(dy.dtype, channels_in)
    bias_from_products = fused and needs[1] and want_bias
    with _On(dy):
        source, given = (dy, a) if fused else (dy, None)
        written = prologue and not fused and (needs[0] or needs[1])
        if written or (want_bias and not bias_from_products):
            da, parts = batch_norm.grad_prologue(
                dy, a, activation, norm, sums, written, want_bias and not bias_from_products
            )
            source = da if written else source
        else:
            parts = None
        return _pointwise_products(
            source, given, x, weight, bias, parts, activation, norm, sums, needs, bias_from_products
        )


def _pointwise_products(
    dy: Tensor,  # (N, C_out, H, W); da if `a` is None
    a: Tensor | None,  # (N, C_out, H, W)
    x: Tensor | None,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
    bias_parts: Tensor | None,  # (parts, C_out)
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    needs: tuple[bool, bool, bool],  # dx, dw, db
    bias_from_products: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, and dw with db, whose sums end in one launch."""
    batch_norm, pointwise = _kernels().batch_norm, _kernels().pointwise
    dx = dw = db = None
    if needs[0]:
        dx = pointwise.like(dy if x is None else x, weight.shape[1])
        pointwise.input_grad(dy, a, weight, activation, norm, sums, dx)
    if needs[1]:
        parts, from_products = pointwise.weight_grad(dy, a, x, activation, norm, sums, bias_from_products)
        bias_parts = from_products if bias_from_products else bias_parts
        dw = torch.empty_like(weight)
    if bias_parts is not None:
        db = torch.empty_like(bias)
    if dw is not None:
        batch_norm.sum_parts(parts, dw, bias_parts, db)
    elif db is not None:
        batch_norm.sum_parts(bias_parts, db)
    return dx, dw, db


def pointwise_block_backward(
    dy: Tensor,  # (N, C_out, H, W)
    a: Tensor,  # (N, C_out, H, W)
    x: Tensor | None,  # (N, C_in, H, W); None if dw is not needed
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
    activation: str,
    norm: Norm,
    batch_statistics: bool,
    residual: bool,
    needs: tuple[bool, bool, bool, bool, bool],  # dx, dw, db, dgamma, dbeta
) -> tuple[Tensor | None, ...] | None:
    """As depthwise_block_backward; None if the products compute da in their prologues, in five launches too."""
    if not any(needs[:3]) or _kernels().config.fuse_prologue(dy.dtype, weight.shape[1]):
        return None
    with _On(dy):
        da, bias_parts, dgamma, dbeta = _block_prologue(dy, a, bias, activation, norm, batch_statistics, needs)
        chain = ("identity", None, None)
        products = _pointwise_products(da, None, x, weight, bias, bias_parts, *chain, needs[:3], False)
    return *products, dgamma, dbeta

# SPDX-License-Identifier: MIT
"""A whole mixer layer of the `cpu` backend as one function of its input, with the arguments of its native calls made beforehand.

As cuda_layer.py: a layer of a small network takes fewer microseconds in its kernels than in checks and arguments. prepared.py decides
when such a function may be called again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..primitives import Block, EvaluateLayer, Grads, MixerEval, Statistics, TrainLayer
from . import cpu
from ._native import ACTIVATION_CODES, norm_args, param_args, shape_args


def revision() -> tuple:
    """What a prepared layer depends on beside its arguments: the native module."""
    return (cpu.native,)


class _Layer:
    """What evaluation and training have in common: the native module, shapes and outputs."""

    def __init__(self, x: Tensor, lower: Tensor, upper: Tensor) -> None:
        self.native, self.c_out, self.kernel = cpu.native, upper.shape[0], tuple(lower.shape[2:])
        self.shape = shape_args(x)
        n, c, height, width, code, channels_last = self.shape
        self.pointwise_shape = n, self.c_out, height, width, code, channels_last, c
        # a tensor of one channel is of both formats, and then counts as contiguous
        self.y_shape = n, self.c_out, height, width, code, channels_last and self.c_out > 1
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.options = {"dtype": x.dtype, "device": "cpu", "memory_format": layout}

    def empty_output(self) -> Tensor:
        return torch.empty(self.y_shape[:4], **self.options)


def _prepares(x: Tensor) -> bool:
    """False where torch may compute products: that depends on settings that can change."""
    return x.dtype != torch.bfloat16 or not torch.cpu._is_amx_tile_supported()


def prepare_mixer_eval(
    x: Tensor,  # (N, C, H, W)
    layer: MixerEval,
) -> EvaluateLayer | None:
    """The layer, with its residual, for inputs of x's form."""
    if not _prepares(x):
        return None
    (lower, lower_bias, lower_norm), (upper, upper_bias, upper_norm) = layer.depthwise, layer.pointwise
    made = _Layer(x, lower, upper)
    native, activation, shape = made.native, ACTIVATION_CODES[layer.activation], (*made.shape, *made.kernel)
    fits = made.shape[0], max(x.shape[1], made.c_out), *made.shape[2:]
    below, below_norm = (*param_args(lower), *param_args(lower_bias)), norm_args(lower_norm)
    above, above_norm = param_args(upper_bias), norm_args(upper_norm)
    channels_last = made.shape[5]

    def run(x: Tensor, upper: Tensor) -> Tensor:
        y, threads = made.empty_output(), torch.get_num_threads()
        if native.mixer_fits(*fits, threads):
            # between layers activations have channels in a vector's lanes, as channels_last has
            blocks = (*below, *below_norm), (*cpu._weight_args(upper, True), *above, *above_norm)
            one = (activation, made.c_out, *made.kernel, *blocks)
            native.mixer_forward(x.data_ptr(), y.data_ptr(), *made.shape, [one], True, threads)
            return y
        z = torch.empty_like(x)
        native.depthwise_forward(
            *(x.data_ptr(), z.data_ptr(), *shape, *below, activation, *below_norm, True, threads, 1, 1)
        )
        weight = cpu._weight_args(upper, channels_last)
        native.pointwise_forward(
            *(z.data_ptr(), y.data_ptr(), *made.pointwise_shape, *weight, *above, activation, *above_norm, threads)
        )
        return y

    return run


def prepare_mixer_train(
    x: Tensor,  # (N, C, H, W)
    blocks: Sequence[Block],
    running: Sequence[Statistics],
    momentum: float,
    eps: float,
    activation: str,
) -> TrainLayer | None:
    """A training step, with the layer's residual, for inputs of x's form."""
    if not _prepares(x):
        return None
    (w1, b1, g1, h1), (w2, b2, g2, h2) = blocks
    made = _Layer(x, w1, w2)
    native, code, channels, c_out, shape = made.native, ACTIVATION_CODES[activation], x.shape[1], made.c_out, made.shape
    count, y_shape, pointwise_shape = x.numel() // channels, made.y_shape, made.pointwise_shape
    lower, below, above = param_args(w1), (*param_args(w1), *param_args(b1), code), (*param_args(w2), *param_args(b2))
    affine1, affine2 = (*param_args(g1), *param_args(h1), eps), (*param_args(g2), *param_args(h2), eps)
    moves = [
        (which, (c, count), (*param_args(r.mean), *param_args(r.var), momentum))
        for which, (c, r) in enumerate(zip((channels, c_out), running, strict=True))
        if r.mean is not None
    ]
    floats = {"dtype": torch.float32, "device": "cpu"}

    def run(x: Tensor, upper: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Statistics, Statistics]]:
        threads, x_at = torch.get_num_threads(), x.data_ptr()
        a1, z, a2, y = torch.empty_like(x), torch.empty_like(x), made.empty_output(), made.empty_output()
        mean1, var1, mean2, var2 = (torch.empty(c, **floats) for c in (channels, channels, c_out, c_out))
        z_at, a1_at, a2_at = z.data_ptr(), a1.data_ptr(), a2.data_ptr()
        batch1, batch2 = (mean1.data_ptr(), var1.data_ptr()), (mean2.data_ptr(), var2.data_ptr())
        norm1, norm2 = (True, batch1[0], 0, batch1[1], 0, *affine1), (True, batch2[0], 0, batch2[1], 0, *affine2)
        native.depthwise_train(x_at, a1_at, *shape, *made.kernel, *below, *batch1, threads)
        native.normalize(a1_at, x_at, z_at, *shape, code, *norm1, threads)
        native.pointwise_train(z_at, a2_at, *pointwise_shape, *above, code, *batch2, threads)
        native.normalize(a2_at, 0, y.data_ptr(), *y_shape, code, *norm2, threads)
        # in one call, and last: what failed before has moved nothing
        native.update_running_statistics([(*(batch1, batch2)[which], *size, *rest) for which, size, rest in moves])
        return y, (a1, a2), (Statistics(mean1, var1), Statistics(mean2, var2))

    narrow = native.pointwise_is_narrow(c_out, channels)
    b1_dtype, b2_dtype = (None if b is None else b.dtype for b in (b1, b2))
    affine_dtypes = [None if t is None else t.dtype for t in (g1, h1, g2, h2)]
    # DDP requires a gradient's strides to be the weight's
    w1_form, w2_form = ((t.shape, t.stride(), {"dtype": t.dtype, "device": "cpu"}) for t in (w1, w2))

    def backward(
        dy: Tensor,
        x: Tensor,
        a: tuple[Tensor, Tensor],
        upper: Tensor,
        statistics: tuple[Statistics, Statistics],
        h1: Tensor | None,
        x_needed: bool,
    ) -> Grads:
        (mean1, var1), (mean2, var2) = statistics
        threads, dy_at, x_at = torch.get_num_threads(), dy.data_ptr(), x.data_ptr()
        a1_at, a2_at = a[0].data_ptr(), a[1].data_ptr()
        batch1, batch2 = (mean1.data_ptr(), 0, var1.data_ptr(), 0), (mean2.data_ptr(), 0, var2.data_ptr(), 0)
        # only z needs beta
        norm1, norm2 = (True, *batch1, *affine1[:2], 0, 0, eps), (True, *batch2, *affine2[:2], 0, 0, eps)
        dbeta1, dgamma1, dbeta2, dgamma2 = (torch.empty(c, **floats) for c in (channels, channels, c_out, c_out))
        sums1, sums2 = (dbeta1.data_ptr(), dgamma1.data_ptr()), (dbeta2.data_ptr(), dgamma2.data_ptr())
        z, dz = torch.empty_like(x), torch.empty_like(x)
        dw1, dw2 = (torch.empty_strided(shape, strides, **options) for shape, strides, options in (w1_form, w2_form))
        db1 = None if b1_dtype is None else torch.empty(channels, dtype=b1_dtype, device="cpu")
        db2 = None if b2_dtype is None else torch.empty(c_out, dtype=b2_dtype, device="cpu")
        da = None if narrow else torch.empty_like(dy, dtype=torch.float32)
        z_at, dz_at = z.data_ptr(), dz.data_ptr()
        rebuilt = (*norm1[:7], *param_args(h1), eps)
        native.normalize(a1_at, x_at, z_at, *shape, code, *rebuilt, threads)
        native.norm_backward(dy_at, a2_at, *y_shape, code, *batch2, eps, *sums2, threads)
        native.pointwise_backward(
            *(dy_at, a2_at, z_at, *pointwise_shape, *param_args(upper), code, *norm2, *sums2),
            *(0 if da is None else da.data_ptr(), dz_at, *param_args(dw2), *param_args(db2), threads),
        )
        del z, da
        native.norm_backward(dz_at, a1_at, *shape, code, *batch1, eps, *sums1, threads)
        dx = torch.empty_like(x) if x_needed else None
        if dx is not None:
            native.depthwise_input_grad(
                *(dz_at, a1_at, dx.data_ptr(), *shape, *made.kernel, *lower, code, *norm1, *sums1, True),
                *(threads, 1, 1),
            )
        native.depthwise_weight_grad(
            *(dz_at, a1_at, x_at, *shape, *made.kernel, code, *norm1, *sums1),
            *(*param_args(dw1), *param_args(db1), threads, 1, 1),
        )
        sums = zip(affine_dtypes, (dgamma1, dbeta1, dgamma2, dbeta2), strict=True)
        dg1, dh1, dg2, dh2 = (None if dtype is None else t.to(dtype) for dtype, t in sums)
        return dx, dw1, db1, dg1, dh1, dw2, db2, dg2, dh2

    return TrainLayer(run, backward)

# SPDX-License-Identifier: MIT
"""A whole mixer layer of the `cuda` backend as one function of its input, with the arguments of its native calls made beforehand.

A layer takes two launches in evaluation and six in training; on an H100 their arguments cost more time than the kernels of a small
network. prepared.py decides when such a function may be called again: it compares all tensors, whose addresses are in here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..primitives import Block, EvaluateLayer, Grads, MixerEval, Statistics, TrainLayer
from . import cuda, cuda_choice, cuda_large, torch_gemm
from ._native import ACTIVATION_CODES, NO_NORM, norm_args, param_args, shape_args


def revision() -> tuple:
    """What a prepared layer depends on beside its arguments: the native module, what it says of sizes, CONVMIXER_CUDA_GEMM."""
    return cuda._native(), cuda._size, cuda_choice.forced_gemm()


class _Layer:
    """What evaluation and training have in common: shapes, the kernel of the pointwise block, empty tensors."""

    def __init__(
        self, x: Tensor, lower: Tensor, upper: Tensor, upper_bias: Tensor | None, activation: str, passes: int
    ) -> None:
        self.native, self.shape, self.kernel = cuda._native().module, shape_args(x), tuple(lower.shape[2:])
        self.c_out, self.activation = upper.shape[0], ACTIVATION_CODES[activation]
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        self.form = (x.shape[0], self.c_out, *x.shape[2:])
        self.options = {"dtype": x.dtype, "device": x.device, "memory_format": layout}
        narrow = upper.to(x.dtype)
        passes += torch_gemm.bias_passes(x, upper_bias)
        with cuda._device_stream(x):
            self.choice = cuda_choice.choose_kernel(x, passes, lambda: cuda._runs_wgmma(x, narrow))
        # the choice holds for aligned tensors
        self.prepares = (
            self.choice != "torch"
            and x.dtype != torch.float32
            and narrow.data_ptr() % 16 == 0
            and max(self.kernel) <= cuda_large.DIRECT
        )

    def empty_output(self) -> Tensor:
        return torch.empty(self.form, **self.options)


def prepare_mixer_eval(
    x: Tensor,  # (N, C, H, W)
    layer: MixerEval,
) -> EvaluateLayer | None:
    """The layer, with its residual, for inputs of x's form. None if it needs more at each call: torch's GEMM, a tf32 setting."""
    (lower, lower_bias, lower_norm), (upper, upper_bias, upper_norm) = layer.depthwise, layer.pointwise
    made = _Layer(x, lower, upper, upper_bias, layer.activation, 2)
    native, activation = made.native, made.activation
    if x.dtype != torch.float32 and x.is_contiguous():
        with cuda._device_stream(x):
            fits = cuda._size("mixer_fits", x.get_device(), *made.shape, made.c_out, *made.kernel)
        if fits and cuda_choice.use_one_kernel(x, made.c_out, native.mixer_tiles(*made.shape)):
            first = (*made.shape, made.c_out, *made.kernel)
            below = param_args(lower), param_args(lower_bias), norm_args(lower_norm)
            above = param_args(upper_bias), norm_args(upper_norm), activation, True

            def run_one_kernel(x: Tensor, upper: Tensor) -> Tensor:
                y, narrow = made.empty_output(), upper.to(x.dtype)
                with cuda._device_stream(x) as stream:
                    native.mixer_forward(*first, x.data_ptr(), *below, narrow.data_ptr(), *above, y.data_ptr(), stream)
                return y

            return run_one_kernel
    if not made.prepares:
        return None
    shape, wgmma = (*made.shape, *made.kernel), made.choice == "wgmma"
    below = (*param_args(lower), *param_args(lower_bias), activation, *norm_args(lower_norm), True)
    above_shape, above = (*made.shape, made.c_out), (*param_args(upper_bias), activation, *norm_args(upper_norm))

    def run(x: Tensor, upper: Tensor) -> Tensor:
        x, narrow = cuda._aligned(x), upper.to(x.dtype)
        z, y = torch.empty_like(x), made.empty_output()
        with cuda._device_stream(x) as stream:
            native.depthwise_forward(*shape, x.data_ptr(), *below, z.data_ptr(), 0, stream)
            native.pointwise_forward(
                *above_shape, z.data_ptr(), narrow.data_ptr(), *above, y.data_ptr(), 0, wgmma, stream
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
    """A training step, with the layer's residual, for inputs of x's form. None as prepare_mixer_eval."""
    (w1, b1, g1, h1), (upper, b2, g2, h2) = blocks
    made = _Layer(x, w1, upper, b2, activation, 1)
    if not made.prepares:
        return None
    native, code, channels, c_out, wgmma = made.native, made.activation, x.shape[1], made.c_out, made.choice == "wgmma"
    count, index = x.numel() // channels, x.get_device()
    with cuda._device_stream(x):
        parts1 = cuda._size("depthwise_forward_partials", index, *made.shape, *made.kernel)
        narrow = upper.to(x.dtype)
        parts2 = native.pointwise_forward_partials(*made.shape, c_out, x.data_ptr(), narrow.data_ptr(), wgmma)
    y_shape = (x.shape[0], c_out, *made.shape[2:])
    below_shape, below = (*made.shape, *made.kernel), (*param_args(w1), *param_args(b1), code, *NO_NORM, False)
    above_shape, above = (*made.shape, c_out), (*param_args(b2), code, *NO_NORM)
    affine1, affine2 = (*param_args(g1), *param_args(h1), eps), (*param_args(g2), *param_args(h2), eps)
    moves = [
        (which, (c, count), (*param_args(r.mean), *param_args(r.var), momentum))
        for which, (c, r) in enumerate(zip((channels, c_out), running, strict=True))
        if r.mean is not None
    ]

    w1_shape, w1_dtype = w1.shape, w1.dtype
    b1_like, b2_like = (None if b is None else {"dtype": b.dtype} for b in (b1, b2))
    affine_dtypes = [None if t is None else t.dtype for t in (g1, h1, g2, h2)]

    def run(x: Tensor, upper: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Statistics, Statistics]]:
        source, narrow = cuda._aligned(x), upper.to(x.dtype)
        a1, z, a2, y = torch.empty_like(x), torch.empty_like(x), made.empty_output(), made.empty_output()
        partials = x.new_empty(3 * max(channels * parts1, c_out * parts2), dtype=torch.float32)
        mean1, var1, mean2, var2 = (x.new_empty(c, dtype=torch.float32) for c in (channels, channels, c_out, c_out))
        at, z_at, a1_at, a2_at = partials.data_ptr(), z.data_ptr(), a1.data_ptr(), a2.data_ptr()
        batch1, batch2 = (mean1.data_ptr(), var1.data_ptr()), (mean2.data_ptr(), var2.data_ptr())
        norm1, norm2 = (True, batch1[0], 0, batch1[1], 0, *affine1), (True, batch2[0], 0, batch2[1], 0, *affine2)
        updates = tuple((*size, *(batch1, batch2)[which], *rest) for which, size, rest in moves)
        with cuda._device_stream(x) as stream:
            native.depthwise_forward(*below_shape, source.data_ptr(), *below, a1_at, at, stream)
            native.merge_statistics(channels, parts1, count, at, *batch1, stream)
            native.normalize(*made.shape, a1_at, code, *norm1, x.data_ptr(), z_at, (), stream)
            native.pointwise_forward(*above_shape, z_at, narrow.data_ptr(), *above, a2_at, at, wgmma, stream)
            native.merge_statistics(c_out, parts2, count, at, *batch2, stream)
            native.normalize(*y_shape, a2_at, code, *norm2, 0, y.data_ptr(), updates, stream)
        return y, (a1, a2), (Statistics(mean1, var1), Statistics(mean2, var2))

    workspace = max(
        cuda._size("norm_backward_workspace", index, *made.shape),
        cuda._size("norm_backward_workspace", index, *y_shape),
        cuda._size("pointwise_grad_prologue_workspace", index, *y_shape),
        cuda._size("depthwise_weight_grad_workspace", index, *made.shape, *made.kernel),
    )
    weight_args = param_args(w1)

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
        dy_at, a1_at, a2_at, source = dy.data_ptr(), a[0].data_ptr(), a[1].data_ptr(), cuda._aligned(x)
        # only z needs beta
        norm1 = (True, mean1.data_ptr(), 0, var1.data_ptr(), 0, *affine1[:2], 0, 0, eps)
        norm2 = (True, mean2.data_ptr(), 0, var2.data_ptr(), 0, *affine2[:2], 0, 0, eps)
        rebuilt = (*norm1[:7], *param_args(h1), eps)
        scratch = x.new_empty(workspace, dtype=torch.uint8)
        at = scratch.data_ptr()
        dbeta1, dgamma1, dbeta2, dgamma2 = (
            x.new_empty(c, dtype=torch.float32) for c in (channels, channels, c_out, c_out)
        )
        sums1, sums2 = (dbeta1.data_ptr(), dgamma1.data_ptr()), (dbeta2.data_ptr(), dgamma2.data_ptr())
        z, da, db2 = (
            torch.empty_like(x),
            torch.empty_like(dy),
            None if b2_like is None else dy.new_empty(c_out, **b2_like),
        )
        with cuda._device_stream(x) as stream:
            native.normalize(*made.shape, a1_at, code, *rebuilt, x.data_ptr(), z.data_ptr(), (), stream)
            native.norm_backward(*y_shape, dy_at, a2_at, code, *norm2, *sums2, at, stream)
            native.pointwise_grad_prologue(
                *y_shape, dy_at, a2_at, code, *norm2, *sums2, da.data_ptr(), *param_args(db2), at, stream
            )
        rows = torch_gemm.is_rows(da, z)
        dz = torch_gemm.input_grad(da, upper, rows)
        dw2 = None if rows else cuda._pointwise_weight_grad(da, z, upper)
        if dw2 is None:
            dw2 = torch_gemm.weight_grad(da, z, rows).view(upper.shape).to(upper.dtype)
        del da, z
        dx, dw1 = torch.empty_like(x) if x_needed else None, dy.new_empty(w1_shape, dtype=w1_dtype)
        db1, dz_at = None if b1_like is None else dy.new_empty(channels, **b1_like), dz.data_ptr()
        with cuda._device_stream(x) as stream:
            native.norm_backward(*made.shape, dz_at, a1_at, code, *norm1, *sums1, at, stream)
            if dx is not None:
                native.depthwise_input_grad(
                    *below_shape, dz_at, a1_at, *weight_args, code, *norm1, *sums1, True, dx.data_ptr(), stream
                )
            native.depthwise_weight_grad(
                *(*below_shape, dz_at, a1_at, source.data_ptr(), code, *norm1, *sums1),
                *(*param_args(dw1), *param_args(db1), at, stream),
            )
        sums = zip(affine_dtypes, (dgamma1, dbeta1, dgamma2, dbeta2), strict=True)
        dg1, dh1, dg2, dh2 = (None if dtype is None else t.to(dtype) for dtype, t in sums)
        return dx, dw1, db1, dg1, dh1, dw2, db2, dg2, dh2

    return TrainLayer(run, backward)

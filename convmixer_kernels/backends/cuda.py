# SPDX-License-Identifier: MIT
"""The primitives in CUDA C++ (csrc/cuda), on the current stream; cuda_choice.py says which GEMMs are torch's.

Nothing here synchronises, and memory comes from torch's allocator alone: every primitive fits in a CUDA graph.
If CONVMIXER_CUDA_EMULATION names a module that tests/emulation/build.py made, the same kernels, compiled for the CPU, take
CPU tensors: for tests.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _load
from ..primitives import MixerEval, Norm, Update
from . import cuda_choice, cuda_large, torch_gemm
from ._native import ACTIVATION_CODES, NO_NORM, address, norm_args, param_args, shape_args, sums_args, unsupported

name = "cuda"

#: Of N and of C: the kernels count images and channels in 32 bits, elements in 64.
_LARGEST_SIZE = 1 << 30
_LEAST_CAPABILITY = (8, 0)


class _Native(NamedTuple):
    module: ModuleType | None
    reason: str | None  # why nothing can run here, with the fix
    emulated: bool


@functools.cache
def _native() -> _Native:
    """The native module and whether this machine can use it, found out once."""
    emulated = os.environ.get("CONVMIXER_CUDA_EMULATION")
    if emulated:
        warnings.warn(
            "CONVMIXER_CUDA_EMULATION: backend 'cuda' runs its kernels emulated on the CPU, for tests only",
            stacklevel=2,
        )
        try:
            return _Native(_load.from_file("_cuda_emulated", emulated), None, True)
        except ImportError as error:
            return _Native(None, f"CONVMIXER_CUDA_EMULATION={emulated}: {error}", True)
    module, reason = _load.native_module("_cuda")
    if module is None:
        fix = "build it: CONVMIXER_BUILD_CUDA=1 pip install --force-reinstall --no-deps ."
        return _Native(None, f"{reason}; {fix}", False)
    count, error = module.device_count()
    if count == 0:
        driver = 580 if module.toolkit >= 13000 else 525
        why = (
            f"no usable NVIDIA GPU: {error or 'none found'} (this build needs a driver of the {driver} series or newer)"
        )
        return _Native(module, why, False)
    return _Native(module, None, False)


@functools.cache
def _capability_reason(device: int) -> str | None:
    found = torch.cuda.get_device_capability(device)
    if found >= _LEAST_CAPABILITY:
        return None
    return f"it needs a GPU of compute capability 8.0 or newer, got {found[0]}.{found[1]}"


def can_run(op: str, x: Tensor, weight: Tensor, dilation: tuple[int, int] = (1, 1)) -> str | None:
    """None if this backend can run `op` on these tensors, else the reason why not."""
    native = _native()
    if native.reason is not None:
        return native.reason
    if native.emulated:
        if x.device.type != "cpu":
            return f"the emulation takes CPU tensors, got x.device={x.device}"
    elif not x.is_cuda:
        return f"it takes CUDA tensors, got x.device={x.device}"
    elif (reason := _capability_reason(x.get_device())) is not None:
        return reason
    if (reason := unsupported(x, weight, cuda_large.LARGEST)) is not None:
        return reason
    if max(spanned := cuda_large.span(weight, dilation)) > cuda_large.LARGEST:
        return f"it takes dilated kernels that span up to {cuda_large.LARGEST}, got {spanned[0]}x{spanned[1]}"
    if max(x.shape[0], x.shape[1], weight.shape[0]) > _LARGEST_SIZE:
        return f"it takes N and C up to 2^30, got x.shape={tuple(x.shape)}, weight.shape={tuple(weight.shape)}"
    return None


def build_info() -> dict[str, object]:
    """What this backend is made of, for convmixer_kernels.build_info()."""
    native = _native()
    if native.reason is not None:
        return {"available": False, "detail": native.reason}
    kind = "emulated on the CPU, for tests only" if native.emulated else "CUDA kernels"
    return {"available": True, "detail": f"{kind}, compiler {native.module.compiler}"}


class _device_stream:
    """`with _device_stream(x) as stream`: x's device is the current one, and stream is the address of its current stream."""

    __slots__ = ("guard", "index")

    def __init__(self, x: Tensor) -> None:
        self.index = x.get_device()
        self.guard = None

    def __enter__(self) -> int:
        if self.index < 0:
            return 0
        if torch._C._cuda_getDevice() != self.index:
            self.guard = torch.cuda.device(self.index)
            self.guard.__enter__()
        return torch._C._cuda_getCurrentRawStream(self.index)

    def __exit__(self, *exception: object) -> None:
        if self.guard is not None:
            self.guard.__exit__(*exception)


def _aligned(t: Tensor | None) -> Tensor | None:
    """t, or a copy if its address is no multiple of 16 (an odd slice of a batch), which the depthwise kernels need."""
    return t if t is None or t.data_ptr() % 16 == 0 else t.clone()


@functools.lru_cache(maxsize=1024)
def _size(function: str, device: int, *arguments: int) -> int:
    """What the native size function says: it may depend on the device."""
    return getattr(_native().module, function)(*arguments)


def _partials(function: str, x: Tensor, *arguments: int) -> Tensor:
    """Room for the statistics of act(a): (C, parts, 3) of count, mean, M2."""
    return x.new_empty((x.shape[1], _size(function, x.get_device(), *arguments), 3), dtype=torch.float32)


def _workspace(function: str, x: Tensor, *arguments: int) -> Tensor:
    return x.new_empty(_size(function, x.get_device(), *arguments), dtype=torch.uint8)


def _merged(
    native: ModuleType,
    partials: Tensor,  # (C, parts, 3)
    count: int,
    stream: int,
) -> tuple[Tensor, Tensor]:
    channels, parts, _ = partials.shape
    mean, var = partials.new_empty(channels), partials.new_empty(channels)
    native.merge_statistics(channels, parts, count, partials.data_ptr(), mean.data_ptr(), var.data_ptr(), stream)
    return mean, var


def _updates(updates: Sequence[Update]) -> tuple:
    return tuple(
        (len(u.mean), u.count, u.mean.data_ptr(), u.var.data_ptr(), *param_args(u[0]), *param_args(u[1]), u.momentum)
        for u in updates
    )


def depthwise_eval(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    activation: str,
    norm: Norm | None,
    residual: bool,
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:  # (N, C, H, W)
    """norm(act(conv(x) + bias)) (+ x), in one launch (see cuda_large.py for large and dilated kernels, as below)."""
    if cuda_large.converts(x, weight, dilation):
        return cuda_large.forward(depthwise_eval, x, weight, bias, activation, norm, residual, dilation)
    x = _aligned(x)
    y = torch.empty_like(x)
    with _device_stream(x) as stream:
        _native().module.depthwise_forward(
            *shape_args(x),
            *weight.shape[2:],
            x.data_ptr(),
            *param_args(weight),
            *param_args(bias),
            ACTIVATION_CODES[activation],
            *norm_args(norm),
            residual,
            y.data_ptr(),
            0,
            stream,
        )
    return y


def depthwise_train(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """a = conv(x) + bias rounded to x's dtype, and mean and biased variance (float32) of act(a): two launches."""
    if cuda_large.converts(x, weight):
        a = depthwise_eval(x, weight, bias, "identity", None, False)
        return a, *_statistics(a, activation)
    x = _aligned(x)
    native, a = _native().module, torch.empty_like(x)
    with _device_stream(x) as stream:
        shape, kernel = shape_args(x), tuple(weight.shape[2:])
        partials = _partials("depthwise_forward_partials", x, *shape, *kernel)
        native.depthwise_forward(
            *shape,
            *kernel,
            x.data_ptr(),
            *param_args(weight),
            *param_args(bias),
            ACTIVATION_CODES[activation],
            *NO_NORM,
            False,
            a.data_ptr(),
            partials.data_ptr(),
            stream,
        )
        count = x.numel() // x.shape[1]
        return a, *_merged(native, partials, count, stream)


def _statistics(a: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (float32) of act(a), in a pass over it and the merge."""
    native = _native().module
    with _device_stream(a) as stream:
        shape = shape_args(a)
        partials = _partials("pointwise_statistics_partials", a, *shape)
        native.pointwise_statistics(*shape, a.data_ptr(), ACTIVATION_CODES[activation], partials.data_ptr(), stream)
        return _merged(native, partials, a.numel() // a.shape[1], stream)


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
    """dx = correlate(da, flipped weight) (+ dy), in one launch."""
    if cuda_large.converts(dy, weight, dilation):
        chain = activation, norm, sums, residual
        return cuda_large.input_grad(depthwise_input_grad, dy, a, weight, *chain, dilation)
    dy, a = _aligned(dy), _aligned(a)
    dx = torch.empty_like(dy)
    with _device_stream(dy) as stream:
        _native().module.depthwise_input_grad(
            *shape_args(dy),
            *weight.shape[2:],
            dy.data_ptr(),
            address(a),
            *param_args(weight),
            ACTIVATION_CODES[activation],
            *norm_args(norm),
            *sums_args(sums),
            residual,
            dx.data_ptr(),
            stream,
        )
    return dx


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
    """dw[c, 0, i, j] = sum da * shifted x and db = sum da, in two launches; db is None if bias is."""
    if cuda_large.converts_weight_grad(x, weight, dilation):
        operands = dy, a, x, weight, bias, activation, norm, sums
        return cuda_large.weight_grad(depthwise_weight_grad, _grad_prologue, *operands, dilation)
    dy, a, x = _aligned(dy), _aligned(a), _aligned(x)
    dw, db = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
    with _device_stream(dy) as stream:
        shape, kernel = shape_args(dy), tuple(weight.shape[2:])
        workspace = _workspace("depthwise_weight_grad_workspace", dy, *shape, *kernel)
        _native().module.depthwise_weight_grad(
            *shape,
            *kernel,
            dy.data_ptr(),
            address(a),
            x.data_ptr(),
            ACTIVATION_CODES[activation],
            *norm_args(norm),
            *sums_args(sums),
            *param_args(dw),
            *param_args(db),
            workspace.data_ptr(),
            stream,
        )
    return dw, db


def normalize(
    a: Tensor,  # (N, C, H, W)
    activation: str,
    norm: Norm | None,
    residual: Tensor | None,  # (N, C, H, W)
    updates: Sequence[Update] = (),
) -> Tensor:  # (N, C, H, W)
    """norm(act(a)) (+ residual), and running statistics, in one launch."""
    y = torch.empty_like(a)
    with _device_stream(a) as stream:
        _normalize(a, activation, norm, residual, y, updates, stream)
    return y


def _normalize(
    a: Tensor,  # (N, C, H, W)
    activation: str,
    norm: Norm | None,
    residual: Tensor | None,  # (N, C, H, W)
    y: Tensor,  # (N, C, H, W), may be a
    updates: Sequence[Update],
    stream: int,
) -> None:
    _native().module.normalize(
        *shape_args(a),
        a.data_ptr(),
        ACTIVATION_CODES[activation],
        *norm_args(norm),
        address(residual),
        y.data_ptr(),
        _updates(updates),
        stream,
    )


def norm_backward(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor,  # (N, C, H, W)
    activation: str,
    norm: Norm,
) -> tuple[Tensor, Tensor]:
    """sum dy and sum dy * hhat over N, H, W, (C,) float32 each: two launches."""
    sums = tuple(dy.new_empty(dy.shape[1], dtype=torch.float32) for _ in range(2))
    with _device_stream(dy) as stream:
        shape = shape_args(dy)
        workspace = _workspace("norm_backward_workspace", dy, *shape)
        _native().module.norm_backward(
            *shape,
            dy.data_ptr(),
            a.data_ptr(),
            ACTIVATION_CODES[activation],
            *norm_args(norm),
            *sums_args(sums),
            workspace.data_ptr(),
            stream,
        )
    return sums


def _pointwise_forward(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
    activation: str,
    norm: Norm | None,
    kernel: str,  # "mma" or "wgmma"
    stream: int,
    partials: Tensor | None = None,  # (C_out, parts, 3)
) -> Tensor:  # (N, C_out, H, W)
    """The block in one launch of ours: y, or with `partials` a and the statistics of act(a)."""
    channels_last = not x.is_contiguous()
    y = torch.empty(
        (x.shape[0], weight.shape[0], *x.shape[2:]),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    _native().module.pointwise_forward(
        *shape_args(x),
        weight.shape[0],
        x.data_ptr(),
        weight.data_ptr(),
        *param_args(bias),
        ACTIVATION_CODES[activation],
        *norm_args(norm),
        y.data_ptr(),
        address(partials),
        kernel == "wgmma",
        stream,
    )
    return y


def _runs_wgmma(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1), of x's dtype
) -> bool:
    """Whether sm_90a's instructions compute this on x's device, which is the current one."""
    return _native().module.pointwise_runs_hopper(*shape_args(x), weight.shape[0], x.data_ptr(), weight.data_ptr())


def pointwise_eval(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
    activation: str,
    norm: Norm | None,
) -> Tensor:  # (N, C_out, H, W)
    """norm(act(conv1x1(x) + bias)): one launch, or torch's GEMM and one pass in place over its result."""
    bare = activation == "identity" and norm is None
    narrow = weight.to(x.dtype)
    with _device_stream(x) as stream:
        passes = torch_gemm.bias_passes(x, bias) + (0 if bare else 2)
        kernel = cuda_choice.choose_kernel(x, passes, lambda: _runs_wgmma(x, narrow))
        if kernel != "torch":
            return _pointwise_forward(x, narrow, bias, activation, norm, kernel, stream)
    y = torch_gemm.convolution(x, weight, bias)
    if not bare:
        with _device_stream(x) as stream:
            _normalize(y, activation, norm, None, y, (), stream)
    return y


def mixer_may_fit(x: Tensor) -> bool:
    """Whether mixer_eval is worth asking for layers of x's width."""
    native = _native()
    if native.module is None or x.dtype not in (torch.float16, torch.bfloat16) or not x.is_contiguous():
        return False
    return cuda_choice.use_one_kernel(x, x.shape[1], native.module.mixer_tiles(*shape_args(x)))


def mixer_eval(
    x: Tensor,  # (N, C, H, W)
    layers: Sequence[MixerEval],
    residual: bool,
) -> Tensor | None:  # (N, C_out of the last layer, H, W)
    """Each layer in one launch; None if one of them does not fit or two launches are faster."""
    native, shape = _native().module, shape_args(x)
    with _device_stream(x) as stream:
        for layer in layers:
            kernel, c_out = tuple(layer.depthwise[0].shape[2:]), layer.pointwise[0].shape[0]
            if len(layers) > 1 and c_out != x.shape[1]:
                return None  # the decisions below hold for x's channels
            if not _size("mixer_fits", x.get_device(), *shape, c_out, *kernel):
                return None
            if not cuda_choice.use_one_kernel(x, c_out, native.mixer_tiles(*shape)):
                return None
        for layer in layers:
            (lower, lower_bias, lower_norm), (upper, upper_bias, upper_norm) = layer.depthwise, layer.pointwise
            y = x.new_empty((x.shape[0], upper.shape[0], *x.shape[2:]))
            upper = upper.to(x.dtype)
            native.mixer_forward(
                *shape_args(x),
                upper.shape[0],
                *lower.shape[2:],
                x.data_ptr(),
                param_args(lower),
                param_args(lower_bias),
                norm_args(lower_norm),
                upper.data_ptr(),
                param_args(upper_bias),
                norm_args(upper_norm),
                ACTIVATION_CODES[layer.activation],
                residual,
                y.data_ptr(),
                stream,
            )
            x = y
    return x


def pointwise_train(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As depthwise_train: one launch and the merge.

    Or torch's GEMM, a pass that reads a for the statistics, and the merge.
    """
    native, count = _native().module, x.numel() // x.shape[1]
    narrow = weight.to(x.dtype)
    with _device_stream(x) as stream:
        passes = torch_gemm.bias_passes(x, bias) + 1
        kernel = cuda_choice.choose_kernel(x, passes, lambda: _runs_wgmma(x, narrow))
        if kernel != "torch":
            # another kernel, with another number of parts, runs if the operands are not aligned
            parts = native.pointwise_forward_partials(
                *shape_args(x), weight.shape[0], x.data_ptr(), narrow.data_ptr(), kernel == "wgmma"
            )
            partials = x.new_empty((weight.shape[0], parts, 3), dtype=torch.float32)
            a = _pointwise_forward(x, narrow, bias, activation, None, kernel, stream, partials)
            return a, *_merged(native, partials, count, stream)
    a = torch_gemm.convolution(x, weight, bias)
    return a, *_statistics(a, activation)


def _pointwise_weight_grad(
    da: Tensor,  # (N, C_out, H, W) contiguous
    x: Tensor,  # (N, C_in, H, W) contiguous
    weight: Tensor,  # (C_out, C_in, 1, 1): for its shape and dtype
) -> Tensor | None:  # as weight
    """dw by wgmma, in two launches; None if that cannot run."""
    if not cuda_choice.use_wgmma_weight_grad(x) or da.dtype != x.dtype or (da.data_ptr() | x.data_ptr()) % 16 != 0:
        return None
    with _device_stream(x) as stream:
        arguments = (*shape_args(x), da.shape[1])
        size = _size("pointwise_weight_grad_workspace", x.get_device(), *arguments)
        if size == 0:
            return None
        workspace = x.new_empty(size, dtype=torch.uint8)
        dw = weight.new_empty(weight.shape)
        _native().module.pointwise_weight_grad(
            *arguments, da.data_ptr(), x.data_ptr(), *param_args(dw), workspace.data_ptr(), stream
        )
    return dw


def _grad_prologue(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor,  # (N, C, H, W)
    bias: Tensor | None,  # (C,): for its presence and dtype
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """da in dy's dtype, and db = sum da; db is None if bias is."""
    da, db = torch.empty_like(dy), None if bias is None else torch.empty_like(bias)
    with _device_stream(dy) as stream:
        shape = shape_args(dy)
        workspace = _workspace("pointwise_grad_prologue_workspace", dy, *shape)
        _native().module.pointwise_grad_prologue(
            *shape,
            dy.data_ptr(),
            a.data_ptr(),
            ACTIVATION_CODES[activation],
            *norm_args(norm),
            *sums_args(sums),
            da.data_ptr(),
            *param_args(db),
            workspace.data_ptr(),
            stream,
        )
    return da, db


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
    """dx = weight^T da, dw = da x^T, db = sum da; None if not needed. da is written once, for the two products."""
    da, db = _grad_prologue(dy, a, bias if needs[2] else None, activation, norm, sums)
    # a tensor of one channel is contiguous in both formats: the others decide
    rows = torch_gemm.is_rows(da, x)
    dx = torch_gemm.input_grad(da, weight, rows) if needs[0] else None
    dw = None
    if needs[1]:
        dw = None if rows else _pointwise_weight_grad(da, x, weight)
        if dw is None:
            dw = torch_gemm.weight_grad(da, x, rows).view(weight.shape).to(weight.dtype)
    return dx, dw, db

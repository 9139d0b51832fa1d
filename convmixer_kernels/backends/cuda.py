# SPDX-License-Identifier: MIT
"""The primitives in CUDA C++ (csrc/cuda), on the current stream; pointwise_gemm.py says which GEMMs are torch's.

Nothing here synchronises, and memory comes from torch's allocator alone: every primitive fits in a CUDA graph.
The native module takes addresses; every tensor whose address is passed stays referenced by the calling function, and autograd.py has
checked that it has its memory.
With CONVMIXER_CUDA_EMULATION=1 the same kernels, compiled for the CPU, take CPU tensors, for tests (see _emulation.py).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native as _native_modules
from . import pointwise_gemm as gemm
from .base import ACTIVATIONS, MixerEval, Norm, Update
from .pointwise_gemm import convolution as _pointwise

name = "cuda"

_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ACTIVATION_CODES = {activation: code for code, activation in enumerate(ACTIVATIONS)}
_LARGEST_KERNEL = 31
#: Of N and of C: the kernels count images and channels in 32 bits, elements in 64.
_LARGEST_SIZE = 1 << 30
_LEAST_CAPABILITY = (8, 0)
_NO_PARAM = (0, 0)
_NO_NORM = (False, 0, 0, 0, 0, 0, 0, 0, 0, 0.0)


class _Native(NamedTuple):
    module: ModuleType | None
    reason: str | None  # why nothing can run here, with the fix
    emulated: bool


@functools.cache
def _native() -> _Native:
    """The native module and whether this machine can use it, found out once."""
    if os.environ.get("CONVMIXER_CUDA_EMULATION") == "1":
        from convmixer_kernels import _emulation

        try:
            return _Native(_emulation.load(), None, True)
        except RuntimeError as error:
            return _Native(None, str(error), True)
    module, reason = _native_modules.load("_cuda")
    if module is None:
        fix = "with a CUDA 13 toolkit (nvcc): CONVMIXER_BUILD_CUDA=1 pip install --force-reinstall --no-deps ."
        return _Native(None, f"{reason}; {fix}", False)
    count, error = module.device_count()
    if count == 0:
        why = f"no usable NVIDIA GPU: {error or 'none found'} (it needs a driver of the 580 series or newer)"
        return _Native(module, why, False)
    return _Native(module, None, False)


@functools.cache
def _capability_reason(device: int) -> str | None:
    found = torch.cuda.get_device_capability(device)
    if found >= _LEAST_CAPABILITY:
        return None
    return f"it needs a GPU of compute capability 8.0 or newer, got {found[0]}.{found[1]}"


def can_run(op: str, x: Tensor, weight: Tensor) -> str | None:
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
    if x.dtype not in _CODES:
        return f"it takes float32, float16 and bfloat16, got x.dtype={x.dtype}"
    if max(weight.shape[2:]) > _LARGEST_KERNEL:
        return f"it takes kernels up to {_LARGEST_KERNEL}x{_LARGEST_KERNEL}, got weight.shape={tuple(weight.shape)}"
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


# ---- arguments of native calls ----------------------------------------------------------------------------------


class _On:
    """`with _On(x) as stream`: x's device is the current one, and stream is the address of its current stream."""

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


def _shape(x: Tensor) -> tuple[int, int, int, int, int, bool]:
    return *x.shape, _CODES[x.dtype], not x.is_contiguous()


def _param(t: Tensor | None) -> tuple[int, int]:
    return _NO_PARAM if t is None else (t.data_ptr(), _CODES[t.dtype])


def _norm(norm: Norm | None) -> tuple:
    if norm is None:
        return _NO_NORM
    mean, var, weight, bias, eps = norm
    return True, *_param(mean), *_param(var), *_param(weight), *_param(bias), eps


def _sums(sums: tuple[Tensor, Tensor] | None) -> tuple[int, int]:
    return (0, 0) if sums is None else (sums[0].data_ptr(), sums[1].data_ptr())


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


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
        (len(u.mean), u.count, u.mean.data_ptr(), u.var.data_ptr(), *_param(u[0]), *_param(u[1]), u.momentum)
        for u in updates
    )


# ---- depthwise --------------------------------------------------------------------------------------------------


def depthwise_eval(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    activation: str,
    norm: Norm | None,
    residual: bool,
) -> Tensor:  # (N, C, H, W)
    """norm(act(conv(x) + bias)) (+ x), in one launch."""
    x = _aligned(x)
    y = torch.empty_like(x)
    with _On(x) as stream:
        _native().module.depthwise_forward(
            *_shape(x),
            *weight.shape[2:],
            x.data_ptr(),
            *_param(weight),
            *_param(bias),
            _ACTIVATION_CODES[activation],
            *_norm(norm),
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
    x = _aligned(x)
    native, a = _native().module, torch.empty_like(x)
    with _On(x) as stream:
        shape, kernel = _shape(x), tuple(weight.shape[2:])
        partials = _partials("depthwise_forward_partials", x, *shape, *kernel)
        native.depthwise_forward(
            *shape,
            *kernel,
            x.data_ptr(),
            *_param(weight),
            *_param(bias),
            _ACTIVATION_CODES[activation],
            *_NO_NORM,
            False,
            a.data_ptr(),
            partials.data_ptr(),
            stream,
        )
        count = x.numel() // x.shape[1]
        return a, *_merged(native, partials, count, stream)


def depthwise_input_grad(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor | None,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    residual: bool,
) -> Tensor:  # (N, C, H, W)
    """dx = correlate(da, flipped weight) (+ dy), in one launch."""
    dy, a = _aligned(dy), _aligned(a)
    dx = torch.empty_like(dy)
    with _On(dy) as stream:
        _native().module.depthwise_input_grad(
            *_shape(dy),
            *weight.shape[2:],
            dy.data_ptr(),
            _address(a),
            *_param(weight),
            _ACTIVATION_CODES[activation],
            *_norm(norm),
            *_sums(sums),
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
) -> tuple[Tensor, Tensor | None]:
    """dw[c, 0, i, j] = sum da * shifted x and db = sum da, in two launches; db is None where bias is."""
    dy, a, x = _aligned(dy), _aligned(a), _aligned(x)
    dw, db = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
    with _On(dy) as stream:
        shape, kernel = _shape(dy), tuple(weight.shape[2:])
        workspace = _workspace("depthwise_weight_grad_workspace", dy, *shape, *kernel)
        _native().module.depthwise_weight_grad(
            *shape,
            *kernel,
            dy.data_ptr(),
            _address(a),
            x.data_ptr(),
            _ACTIVATION_CODES[activation],
            *_norm(norm),
            *_sums(sums),
            *_param(dw),
            *_param(db),
            workspace.data_ptr(),
            stream,
        )
    return dw, db


# ---- batch norm -------------------------------------------------------------------------------------------------


def normalize(
    a: Tensor,  # (N, C, H, W)
    activation: str,
    norm: Norm | None,
    residual: Tensor | None,  # (N, C, H, W)
    updates: Sequence[Update] = (),
) -> Tensor:  # (N, C, H, W)
    """norm(act(a)) (+ residual), and running statistics, in one launch."""
    y = torch.empty_like(a)
    with _On(a) as stream:
        _native().module.normalize(
            *_shape(a),
            a.data_ptr(),
            _ACTIVATION_CODES[activation],
            *_norm(norm),
            _address(residual),
            y.data_ptr(),
            _updates(updates),
            stream,
        )
    return y


def norm_backward(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor,  # (N, C, H, W)
    activation: str,
    norm: Norm,
) -> tuple[Tensor, Tensor]:
    """sum dy and sum dy * hhat over N, H, W, (C,) float32 each: two launches."""
    sums = tuple(dy.new_empty(dy.shape[1], dtype=torch.float32) for _ in range(2))
    with _On(dy) as stream:
        shape = _shape(dy)
        workspace = _workspace("norm_backward_workspace", dy, *shape)
        _native().module.norm_backward(
            *shape,
            dy.data_ptr(),
            a.data_ptr(),
            _ACTIVATION_CODES[activation],
            *_norm(norm),
            *_sums(sums),
            workspace.data_ptr(),
            stream,
        )
    return sums


# ---- pointwise --------------------------------------------------------------------------------------------------


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
        *_shape(x),
        weight.shape[0],
        x.data_ptr(),
        weight.data_ptr(),
        *_param(bias),
        _ACTIVATION_CODES[activation],
        *_norm(norm),
        y.data_ptr(),
        _address(partials),
        kernel == "wgmma",
        stream,
    )
    return y


def _runs_wgmma(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1), of x's dtype
) -> bool:
    """Whether sm_90a's instructions compute this on x's device, which is the current one."""
    return _native().module.pointwise_runs_hopper(*_shape(x), weight.shape[0], x.data_ptr(), weight.data_ptr())


def pointwise_eval(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
    activation: str,
    norm: Norm | None,
) -> Tensor:  # (N, C_out, H, W)
    """norm(act(conv1x1(x) + bias)): one launch, or torch's GEMM and one pass in place over its result."""
    bare = bias is None and activation == "identity" and norm is None
    narrow = weight.to(x.dtype)
    with _On(x) as stream:
        kernel = gemm.choose_kernel(x, 0 if bare else 2, lambda: _runs_wgmma(x, narrow))
        if kernel != "torch":
            return _pointwise_forward(x, narrow, bias, activation, norm, kernel, stream)
    y = _pointwise(x, weight, None)
    if not bare:
        with _On(x) as stream:
            _native().module.pointwise_epilogue(
                *_shape(y), y.data_ptr(), *_param(bias), _ACTIVATION_CODES[activation], *_norm(norm), 0, stream
            )
    return y


def mixer_may_fit(x: Tensor) -> bool:
    """Whether mixer_eval is worth asking for layers of x's width."""
    native = _native()
    if native.module is None or x.dtype not in (torch.float16, torch.bfloat16) or not x.is_contiguous():
        return False
    return gemm.use_one_kernel(x, x.shape[1], native.module.mixer_tiles(*_shape(x)))


def mixer_eval(
    x: Tensor,  # (N, C, H, W)
    layers: Sequence[MixerEval],
    residual: bool,
) -> Tensor | None:  # (N, C_out of the last layer, H, W)
    """Each layer in one launch; None where one of them does not fit or two launches are faster."""
    native, shape = _native().module, _shape(x)
    with _On(x) as stream:
        for layer in layers:
            kernel, c_out = tuple(layer.depthwise[0].shape[2:]), layer.pointwise[0].shape[0]
            if len(layers) > 1 and c_out != x.shape[1]:
                return None  # what follows is decided for x
            if not _size("mixer_fits", x.get_device(), *shape, c_out, *kernel):
                return None
            if not gemm.use_one_kernel(x, c_out, native.mixer_tiles(*shape)):
                return None
        for layer in layers:
            (lower, lower_bias, lower_norm), (upper, upper_bias, upper_norm) = layer.depthwise, layer.pointwise
            y = x.new_empty((x.shape[0], upper.shape[0], *x.shape[2:]))
            upper = upper.to(x.dtype)
            native.mixer_forward(
                *_shape(x),
                upper.shape[0],
                *lower.shape[2:],
                x.data_ptr(),
                _param(lower),
                _param(lower_bias),
                _norm(lower_norm),
                upper.data_ptr(),
                _param(upper_bias),
                _norm(upper_norm),
                _ACTIVATION_CODES[layer.activation],
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

    Or torch's GEMM, a pass for bias and statistics (it only reads if the GEMM adds the bias), the merge.
    """
    native, count = _native().module, x.numel() // x.shape[1]
    adds_bias = gemm.adds_bias(x)
    narrow = weight.to(x.dtype)
    with _On(x) as stream:
        kernel = gemm.choose_kernel(x, 1 if adds_bias or bias is None else 2, lambda: _runs_wgmma(x, narrow))
        if kernel != "torch":
            # where operands are not aligned, another kernel makes other parts
            parts = native.pointwise_forward_partials(
                *_shape(x), weight.shape[0], x.data_ptr(), narrow.data_ptr(), kernel == "wgmma"
            )
            partials = x.new_empty((weight.shape[0], parts, 3), dtype=torch.float32)
            a = _pointwise_forward(x, narrow, bias, activation, None, kernel, stream, partials)
            return a, *_merged(native, partials, count, stream)
    a = _pointwise(x, weight, bias if adds_bias else None)
    with _On(x) as stream:
        shape = _shape(a)
        partials = _partials("pointwise_epilogue_partials", a, *shape)
        native.pointwise_epilogue(
            *shape,
            a.data_ptr(),
            *_param(None if adds_bias else bias),
            _ACTIVATION_CODES[activation],
            *_NO_NORM,
            partials.data_ptr(),
            stream,
        )
        return a, *_merged(native, partials, count, stream)


def _pointwise_weight_grad(
    da: Tensor,  # (N, C_out, H, W) contiguous
    x: Tensor,  # (N, C_in, H, W) contiguous
    weight: Tensor,  # (C_out, C_in, 1, 1): for its shape and dtype
) -> Tensor | None:  # as weight
    """dw by wgmma, in two launches; None where that cannot run."""
    if not gemm.use_wgmma_weight_grad(x) or da.dtype != x.dtype or (da.data_ptr() | x.data_ptr()) % 16 != 0:
        return None
    with _On(x) as stream:
        arguments = (*_shape(x), da.shape[1])
        size = _size("pointwise_weight_grad_workspace", x.get_device(), *arguments)
        if size == 0:
            return None
        workspace = x.new_empty(size, dtype=torch.uint8)
        dw = weight.new_empty(weight.shape)
        _native().module.pointwise_weight_grad(
            *arguments, da.data_ptr(), x.data_ptr(), *_param(dw), workspace.data_ptr(), stream
        )
    return dw


def pointwise_backward(
    dy: Tensor,  # (N, C_out, H, W)
    a: Tensor,  # (N, C_out, H, W)
    x: Tensor | None,  # (N, C_in, H, W); None where dw is not needed
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,): for its presence and dtype
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    needs: tuple[bool, bool, bool],  # dx, dw, db
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx = weight^T da, dw = da x^T, db = sum da; None where not needed. da is written once, for the two products."""
    da = torch.empty_like(dy)
    db = torch.empty_like(bias) if needs[2] and bias is not None else None
    with _On(dy) as stream:
        shape = _shape(dy)
        workspace = _workspace("pointwise_grad_prologue_workspace", dy, *shape)
        _native().module.pointwise_grad_prologue(
            *shape,
            dy.data_ptr(),
            a.data_ptr(),
            _ACTIVATION_CODES[activation],
            *_norm(norm),
            *_sums(sums),
            da.data_ptr(),
            *_param(db),
            workspace.data_ptr(),
            stream,
        )
    # a tensor of one channel is contiguous in both formats: the others decide
    rows = gemm.is_rows(da, x)
    dx = gemm.input_grad(da, weight, rows) if needs[0] else None
    dw = None
    if needs[1]:
        dw = None if rows else _pointwise_weight_grad(da, x, weight)
        if dw is None:
            dw = gemm.weight_grad(da, x, rows).view(weight.shape).to(weight.dtype)
    return dx, dw, db

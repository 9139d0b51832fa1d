# SPDX-License-Identifier: MIT
"""Every argument check of the public functions. A check reads, raises, and changes nothing.

TypeError: not a tensor, or a dtype that the rule excludes. ValueError: a shape, device or option that is wrong. RuntimeError: a
tensor without its memory, or one that autograd cannot take.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from . import gates
from .primitives import ACTIVATIONS

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def check_memory(op: str, names: Sequence[str], *tensors: Tensor | None) -> None:
    """Each tensor's storage must reach as far as the tensor does: kernels read addresses, and torch's own operations do not look.

    A storage is freed or shrunk by `t.untyped_storage().resize_(0)`, as FSDP and offloading do. For dense tensors that have
    storages: check_reach knows gaps between elements too.
    """
    for i, t in enumerate(tensors):
        if t is not None:
            room = t.untyped_storage().nbytes() - t.nbytes
            # also for an expanded tensor, whose nbytes count the same bytes several times
            if room < 0 or ((offset := t.storage_offset()) and room < offset * t.itemsize):
                check_reach(op, names[i], t)


def check_reach(op: str, name: str, t: Tensor) -> None:
    """check_memory for one tensor of any strides."""
    if t.numel() == 0 or t._is_zerotensor():
        return
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    needed, held = (t.storage_offset() + last + 1) * t.itemsize, t.untyped_storage().nbytes()
    if held < needed:
        raise RuntimeError(
            f"{op}: {name} has lost its memory: its storage holds {held} bytes, and the tensor reaches to byte {needed} "
            "(freed or shrunk by storage.resize_, as FSDP and offloading do)"
        )


def check_before_copy(op: str, name: str, t: Tensor) -> None:
    """check_reach for tensors that are copied before a kernel reads them. Traced and transformed tensors have no storage."""
    if not torch.compiler.is_compiling() and type(t) in gates.PLAIN_TENSORS and not gates.torch_func_active():
        check_reach(op, name, t)


def check_input(op: str, x: Tensor, name: str = "x") -> None:
    """x must be a dense floating (N, C, H, W) tensor with C, H, W > 0."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATING:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {name}.dtype={x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor, got {name}.layout={x.layout}")
    if x.is_nested:
        raise TypeError(f"{op}: {name} must be a dense tensor, got a nested one")
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must be (N, C, H, W), got {name}.shape={x.shape}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{op}: C, H and W of {name} must be positive, got {name}.shape={x.shape}")
    if not x.is_contiguous():
        check_before_copy(op, name, x)


def check_parameter(op: str, name: str, t: Tensor | None, x: Tensor) -> None:
    """A parameter or buffer must be a tensor on x's device, of x's dtype or, beside a 16-bit x, float32."""
    if t is None:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor or None, got {type(t).__name__}")
    if t.dtype != x.dtype and not (t.dtype == torch.float32 and x.dtype in _SIXTEEN_BIT):
        allowed = f"{x.dtype} or torch.float32" if x.dtype in _SIXTEEN_BIT else f"{x.dtype}"
        raise TypeError(f"{op}: {name} must be {allowed} where x is {x.dtype}, got {name}.dtype={t.dtype}")
    if t.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor, got {name}.layout={t.layout}")
    if t.is_nested:
        raise TypeError(f"{op}: {name} must be a dense tensor, got a nested one")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {name}.device={t.device}")
    if not t.is_contiguous():
        check_before_copy(op, name, t)


def _check_vector(op: str, name: str, t: Tensor | None, x: Tensor, channels: int, of: str) -> None:
    check_parameter(op, name, t, x)
    if t is not None and t.shape != (channels,):
        raise ValueError(f"{op}: {name} must be ({of},) = ({channels},), got {name}.shape={t.shape}")


def _check_weight_is_tensor(op: str, name: str, weight: Tensor, x: Tensor) -> None:
    if weight is None:
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got None")
    check_parameter(op, name, weight, x)


def check_depthwise_convolution(
    op: str, prefix: str, x: Tensor, weight: Tensor, bias: Tensor | None, x_name: str = "x"
) -> None:
    """weight must be (C, 1, kH, kW), bias (C,) or None."""
    name = f"{prefix}weight"
    _check_weight_is_tensor(op, name, weight, x)
    if weight.dim() != 4 or weight.shape[0] != x.shape[1] or weight.shape[1] != 1 or 0 in weight.shape:
        raise ValueError(
            f"{op}: {name} must be (C, 1, kH, kW) with C = {x_name}.shape[1] = {x.shape[1]}, "
            f"got {name}.shape={weight.shape}"
        )
    _check_vector(op, f"{prefix}bias", bias, x, x.shape[1], "C")


def check_pointwise_convolution(op: str, prefix: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """weight must be (C_out, C_in, 1, 1), bias (C_out,) or None."""
    name = f"{prefix}weight"
    _check_weight_is_tensor(op, name, weight, x)
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or weight.shape[2:] != (1, 1) or 0 in weight.shape:
        raise ValueError(
            f"{op}: {name} must be (C_out, C_in, 1, 1) with C_in = x.shape[1] = {x.shape[1]}, "
            f"got {name}.shape={weight.shape}"
        )
    _check_vector(op, f"{prefix}bias", bias, x, weight.shape[0], "C_out")


def check_norm(
    op: str,
    prefix: str,
    x: Tensor,
    channels: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    shared: bool = False,
) -> None:
    """Batch norm's tensors must be (C,) each; running statistics come together and are needed if training is False.

    `shared`: the batch's statistics are those of several processes, so that one value per channel may do here.
    """
    _check_vector(op, f"{prefix}norm_weight", norm_weight, x, channels, "C")
    _check_vector(op, f"{prefix}norm_bias", norm_bias, x, channels, "C")
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        _check_vector(op, f"{prefix}{name}", t, x, channels, "C")
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{op}: {prefix}{name} must not require a gradient, got {prefix}{name}.requires_grad=True"
            )
    if (running_mean is None) != (running_var is None):
        given, missing = ("running_mean", "running_var") if running_var is None else ("running_var", "running_mean")
        raise ValueError(
            f"{op}: {prefix}running_mean and {prefix}running_var must both be tensors or both be None, "
            f"got {prefix}{given} without {prefix}{missing}"
        )
    if not training and running_mean is None:
        raise ValueError(
            f"{op}: {prefix}running_mean and {prefix}running_var must be tensors where training=False, got None"
        )
    if training and not shared and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"{op}: training needs more than one value per channel (N * H * W > 1), got x.shape={x.shape}")


def check_layer(
    op: str,
    x: Tensor,
    blocks: Sequence[Sequence[Tensor | None]],
    running: Sequence[Sequence[Tensor | None]],
    training: bool,
    shared: bool = False,
) -> None:
    """Both blocks of a mixer layer: the depthwise one on x's channels, the pointwise one from x's channels."""
    depthwise, pointwise = blocks
    check_depthwise_convolution(op, "depthwise_", x, *depthwise[:2])
    check_norm(op, "depthwise_", x, x.shape[1], *depthwise[2:], *running[0], training, shared)
    check_pointwise_convolution(op, "pointwise_", x, *pointwise[:2])
    check_norm(op, "pointwise_", x, pointwise[0].shape[0], *pointwise[2:], *running[1], training, shared)


def _check_like(op: str, name: str, t: Tensor, shape: Sequence[int], like: Tensor, like_name: str) -> None:
    """An activation-sized tensor must have `shape`, and the other's dtype and device."""
    if t.shape != shape:
        raise ValueError(f"{op}: {name} must be {tuple(shape)} beside this {like_name}, got {name}.shape={t.shape}")
    if t.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor, got {name}.layout={t.layout}")
    if t.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must be {like.dtype} as {like_name}, got {name}.dtype={t.dtype}")
    if t.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like_name}'s device {like.device}, got {name}.device={t.device}")


def check_block_backward(
    op: str,
    prefix: str,
    kind: str,
    dy: Tensor | None,
    x: Tensor | None,
    a: Tensor,
    block: Sequence[Tensor | None],
    statistics: Sequence[Tensor],
    x_needed: bool,
    a_name: str = "a",
    x_name: str = "x",
) -> None:
    """dy must be like a, x (N, C_in, H, W) and not None if it is needed, the parameters and statistics as in the forward.

    They come from an operator's caller, or were saved and may have been through hooks.
    """
    check_input(op, a, a_name)
    weight, bias, norm_weight, norm_bias = block
    channels, shape = a.shape[1], a.shape
    if kind == "depthwise":
        check_depthwise_convolution(op, prefix, a, weight, bias, a_name)
    else:
        name = f"{prefix}weight"
        _check_weight_is_tensor(op, name, weight, a)
        if weight.dim() != 4 or weight.shape[0] != channels or weight.shape[2:] != (1, 1) or 0 in weight.shape:
            raise ValueError(
                f"{op}: {name} must be (C_out, C_in, 1, 1) with C_out = {a_name}.shape[1] = {channels}, "
                f"got {name}.shape={weight.shape}"
            )
        _check_vector(op, f"{prefix}bias", bias, a, channels, "C_out")
        shape = (shape[0], weight.shape[1], shape[2], shape[3])
    _check_vector(op, f"{prefix}norm_weight", norm_weight, a, channels, "C")
    _check_vector(op, f"{prefix}norm_bias", norm_bias, a, channels, "C")
    for name, t in zip(("mean", "var"), statistics, strict=True):
        _check_vector(op, f"{prefix}{name}", t, a, channels, "C")
    if dy is not None:
        _check_like(op, "dy", dy, a.shape, a, a_name)
    if x is not None:
        _check_like(op, x_name, x, shape, a, a_name)
    elif x_needed:
        raise ValueError(f"{op}: x must be a tensor where the weight's gradient is needed, got None")


def check_layer_backward(
    op: str,
    dy: Tensor,
    x: Tensor | None,
    a: tuple[Tensor, Tensor],
    blocks: Sequence[Sequence[Tensor | None]],
    statistics: Sequence[Sequence[Tensor]],
    x_needed: bool,
) -> None:
    """As check_block_backward, for both blocks: the pointwise one's x has the shape of the depthwise one's a."""
    names = ("a_depthwise", "a_pointwise")
    check_block_backward(op, "depthwise_", "depthwise", None, x, a[0], blocks[0], statistics[0], x_needed, names[0])
    check_block_backward(
        op, "pointwise_", "pointwise", dy, a[0], a[1], blocks[1], statistics[1], False, names[1], names[0]
    )


def check_convolution_backward(
    op: str, dy: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None, x_needed: bool
) -> None:
    """As check_block_backward, for depthwise_conv2d."""
    check_input(op, dy, "dy")
    check_depthwise_convolution(op, "", dy, weight, bias, "dy")
    if x is not None:
        _check_like(op, "x", x, dy.shape, dy, "dy")
    elif x_needed:
        raise ValueError(f"{op}: x must be a tensor where the weight's gradient is needed, got None")


def check_bool(op: str, name: str, value: bool) -> None:
    """A bool, not a number or a tensor that could pass for one."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {name}={value!r}")


def check_dilation(op: str, dilation: int | Sequence[int]) -> tuple[int, int]:
    """dilation must be an integer or two, each at least 1.

    Returns:
        (dH, dW).
    """
    pair = (dilation, dilation) if isinstance(dilation, Integral) else dilation
    if not isinstance(pair, Sequence) or any(not isinstance(d, Integral) or isinstance(d, bool) for d in pair):
        raise TypeError(f"{op}: dilation must be an int or two, (dH, dW), got dilation={dilation!r}")
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{op}: dilation must be one int of at least 1, or two, (dH, dW), got dilation={dilation!r}")
    return int(pair[0]), int(pair[1])


def check_options(op: str, activation: str, training: bool, momentum: float, eps: float) -> tuple[float, float]:
    """activation must be known, training a bool, momentum and eps finite numbers, eps not negative, in training positive.

    Returns:
        momentum and eps as floats, which is all that the kernels know.
    """
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(f"{op}: activation must be one of {known}, got activation={activation!r}")
    check_bool(op, "training", training)
    momentum, eps = _number(op, "momentum", momentum), _number(op, "eps", eps)
    if eps < 0:
        raise ValueError(f"{op}: eps must not be negative, got eps={eps!r}")
    if training and eps == 0:
        raise ValueError(f"{op}: eps must be positive in training, got eps={eps!r}")
    return momentum, eps


def _number(op: str, name: str, value: float) -> float:
    if type(value) is not float:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be a number, got {name}={value!r}")
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{op}: {name} must be finite, got an integer beyond the largest float") from None
    if not abs(value) < float("inf"):
        raise ValueError(f"{op}: {name} must be finite, got {name}={value!r}")
    return value

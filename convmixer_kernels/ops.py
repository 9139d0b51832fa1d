# SPDX-License-Identifier: MIT
"""The operators as torch.library knows them: what torch.compile, export, dispatch modes and opcheck see.

Registered as functions without side effects under `convmixer::`: functional.py updates running statistics from the
batch statistics that they return. What a call does not produce comes back as a tensor with no elements. Eager mode calls the
Functions of autograd.py instead wherever nothing needs these.

The arguments: x, then a block's weight, bias, norm_weight, norm_bias (mixer_layer: two blocks'), the running mean and
var (two pairs; None where batch_statistics), then the four options, `save` (whether a backward may follow) and the backend's name.
A backward takes dy, x (None where no weight gradient is wanted), a, the block's tensors, the statistics that the forward used,
the options, `needs` (one bool for x and each parameter) and the backend's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import autograd, dispatch
from .autograd import Block, Options, Statistics

_LIBRARY = torch.library.Library("convmixer", "DEF")
_OPTIONS = "bool batch_statistics, float eps, str activation, bool residual"


def _block_schema(prefix: str) -> str:
    return f"Tensor {prefix}weight, Tensor? {prefix}bias, Tensor? {prefix}norm_weight, Tensor? {prefix}norm_bias"


def _grads_schema(names: Sequence[str]) -> str:
    return ", ".join(f"Tensor d{name}" for name in names)


def _options(arguments: Sequence, save: bool) -> Options:
    batch_statistics, eps, activation, residual = arguments
    return Options(batch_statistics, 0.0, eps, activation, residual, save)


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t


def _like(x: Tensor, channels: int, wanted: bool = True) -> Tensor:
    """What a kernel allocates for an activation of x's batch, size, dtype and memory format."""
    if not wanted:
        return x.new_empty(0)
    memory_format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    size = (x.shape[0], channels, x.shape[2], x.shape[3])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _statistics_like(x: Tensor, channels: int, wanted: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = channels if wanted else 0
    return x.new_empty(size, dtype=dtype), x.new_empty(size, dtype=dtype)


def _parameter_grads_like(parameters: Sequence[Tensor | None], needs: Sequence[bool], dy: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(p) if need and p is not None else dy.new_empty(0)
        for p, need in zip(parameters, needs, strict=True)
    )


def _register(name: str, schema: str, implementation: Callable, fake: Callable) -> None:
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"convmixer::{name}", fake, lib=_LIBRARY)


def _register_autograd(name: str, parameters: int, statistics: int, weights: tuple[int, ...], fixed: int) -> None:
    """The forward `name` has x, `parameters` tensors, `statistics` running ones and `fixed` further arguments.

    `weights` are the arguments whose gradient needs x.
    """
    backward_operator = getattr(torch.ops.convmixer, f"{name}_backward").default
    first_option = 1 + parameters + statistics

    def setup_context(ctx, inputs, output):
        needs_x = any(ctx.needs_input_grad[i] for i in weights)
        options = inputs[first_option : first_option + 4]
        saved_a, batch = output[1 : 1 + statistics // 2], output[1 + statistics // 2 :]
        used = batch if options[0] else inputs[1 + parameters : first_option]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0] if needs_x else None, *saved_a, *inputs[1 : 1 + parameters], *used)
        ctx.options, ctx.backend = options, inputs[-1]

    def backward(ctx, dy, *_):
        needs = [bool(need) for need in ctx.needs_input_grad[: 1 + parameters]]
        grads = backward_operator(dy, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * (statistics + fixed)

    torch.library.register_autograd(f"convmixer::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


# ---- depthwise_block and pointwise_block --------------------------------------------------------------------------


def _register_block(kind: str) -> None:
    def forward(x, weight, bias, norm_weight, norm_bias, running_mean, running_var, *rest):
        *options, save, backend = rest
        block, running = Block(weight, bias, norm_weight, norm_bias), Statistics(running_mean, running_var)
        module = dispatch.resolve(f"{kind}_block", backend, kind, x, (weight,))
        y, a, used = autograd.block_forward(module, x, kind, block, running, _options(options, save))
        return y, _or_empty(a, x), *(used if options[0] else _statistics_like(x, 0, False))

    def forward_fake(x, weight, bias, norm_weight, norm_bias, running_mean, running_var, *rest):
        batch_statistics, *_, save, _ = rest
        channels = weight.shape[0]
        a = _like(x, channels, save or batch_statistics)
        return _like(x, channels), a, *_statistics_like(x, channels, batch_statistics)

    def backward(dy, x, a, weight, bias, norm_weight, norm_bias, mean, var, *rest):
        *options, needs, backend = rest
        block, used = Block(weight, bias, norm_weight, norm_bias), Statistics(mean, var)
        module = dispatch.resolve(f"{kind}_block", backend, kind, a, (weight,))
        grads = autograd.block_backward(module, dy, kind, x, a, block, used, _options(options, True), tuple(needs))
        return tuple(_or_empty(g, dy) for g in grads)

    def backward_fake(dy, x, a, weight, bias, norm_weight, norm_bias, mean, var, *rest):
        *_, needs, _ = rest
        dx = _like(a, a.shape[1] if kind == "depthwise" else weight.shape[1], needs[0])
        return dx, *_parameter_grads_like((weight, bias, norm_weight, norm_bias), needs[1:], dy)

    names = ("x", "weight", "bias", "norm_weight", "norm_bias")
    _register(
        f"{kind}_block",
        f"(Tensor x, {_block_schema('')}, Tensor? running_mean, Tensor? running_var, {_OPTIONS}, bool save, str backend)"
        " -> (Tensor y, Tensor a, Tensor mean, Tensor var)",
        forward,
        forward_fake,
    )
    _register(
        f"{kind}_block_backward",
        f"(Tensor dy, Tensor? x, Tensor a, {_block_schema('')}, Tensor mean, Tensor var, {_OPTIONS}, bool[] needs,"
        f" str backend) -> ({_grads_schema(names)})",
        backward,
        backward_fake,
    )
    _register_autograd(f"{kind}_block", parameters=4, statistics=2, weights=(1,), fixed=6)


_register_block("depthwise")
_register_block("pointwise")


# ---- mixer_layer --------------------------------------------------------------------------------------------------


def _mixer_layer(x, *arguments):
    blocks, running = (Block(*arguments[:4]), Block(*arguments[4:8])), arguments[8:12]
    *options, save, backend = arguments[12:]
    running = Statistics(*running[:2]), Statistics(*running[2:])
    module = dispatch.resolve("mixer_layer", backend, "mixer", x, (arguments[0], arguments[4]))
    y, a, used = autograd.mixer_forward(module, x, blocks, running, _options(options, save))
    flat = (*used[0], *used[1]) if options[0] else (*_statistics_like(x, 0, False), *_statistics_like(x, 0, False))
    return y, *(_or_empty(t, x) for t in a), *flat


def _mixer_layer_fake(x, *arguments):
    batch_statistics, *_, save, _ = arguments[12:]
    channels, channels_out = arguments[0].shape[0], arguments[4].shape[0]
    saved = save or batch_statistics
    return (
        _like(x, channels_out),
        _like(x, channels, saved),
        _like(x, channels_out, saved),
        *_statistics_like(x, channels, batch_statistics),
        *_statistics_like(x, channels_out, batch_statistics),
    )


def _mixer_layer_backward(dy, x, a_depthwise, a_pointwise, *arguments):
    blocks, used = (Block(*arguments[:4]), Block(*arguments[4:8])), arguments[8:12]
    *options, needs, backend = arguments[12:]
    used = Statistics(*used[:2]), Statistics(*used[2:])
    a = (a_depthwise, a_pointwise)
    module = dispatch.resolve("mixer_layer", backend, "mixer", a_depthwise, (arguments[0], arguments[4]))
    grads = autograd.mixer_backward(module, dy, x, a, blocks, used, _options(options, True), tuple(needs))
    return tuple(_or_empty(g, dy) for g in grads)


def _mixer_layer_backward_fake(dy, x, a_depthwise, a_pointwise, *arguments):
    *_, needs, _ = arguments[12:]
    dx = _like(a_depthwise, a_depthwise.shape[1], needs[0])
    return dx, *_parameter_grads_like(arguments[:8], needs[1:], dy)


_BLOCKS = f"{_block_schema('depthwise_')}, {_block_schema('pointwise_')}"
_PARAMETERS = [f"{block}_{name}" for block in ("depthwise", "pointwise") for name in Block._fields]
_register(
    "mixer_layer",
    f"(Tensor x, {_BLOCKS}, Tensor? depthwise_running_mean, Tensor? depthwise_running_var,"
    f" Tensor? pointwise_running_mean, Tensor? pointwise_running_var, {_OPTIONS}, bool save, str backend)"
    " -> (Tensor y, Tensor a_depthwise, Tensor a_pointwise, Tensor depthwise_mean, Tensor depthwise_var,"
    " Tensor pointwise_mean, Tensor pointwise_var)",
    _mixer_layer,
    _mixer_layer_fake,
)
_register(
    "mixer_layer_backward",
    f"(Tensor dy, Tensor? x, Tensor a_depthwise, Tensor a_pointwise, {_BLOCKS}, Tensor depthwise_mean,"
    f" Tensor depthwise_var, Tensor pointwise_mean, Tensor pointwise_var, {_OPTIONS}, bool[] needs, str backend)"
    f" -> ({_grads_schema(['x', *_PARAMETERS])})",
    _mixer_layer_backward,
    _mixer_layer_backward_fake,
)
_register_autograd("mixer_layer", parameters=8, statistics=4, weights=(1, 5), fixed=6)


# ---- depthwise_conv2d ---------------------------------------------------------------------------------------------


def _depthwise_conv2d(x, weight, bias, backend):
    module = dispatch.resolve("depthwise_conv2d", backend, "depthwise", x, (weight,))
    return autograd.convolution_forward(module, x, weight, bias)


def _depthwise_conv2d_backward(dy, x, contiguous, weight, bias, needs, backend):
    module = dispatch.resolve("depthwise_conv2d", backend, "depthwise", dy, (weight,))
    grads = autograd.convolution_backward(module, dy, x, contiguous, weight, bias, tuple(needs))
    return tuple(_or_empty(g, dy) for g in grads)


def _depthwise_conv2d_backward_fake(dy, x, contiguous, weight, bias, needs, backend):
    memory_format = torch.contiguous_format if contiguous else torch.channels_last
    dx = torch.empty_like(dy, memory_format=memory_format) if needs[0] else dy.new_empty(0)
    return dx, *_parameter_grads_like((weight, bias), needs[1:], dy)


_register(
    "depthwise_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    _depthwise_conv2d,
    lambda x, weight, bias, backend: _like(x, x.shape[1]),
)
_register(
    "depthwise_conv2d_backward",
    "(Tensor dy, Tensor? x, bool contiguous, Tensor weight, Tensor? bias, bool[] needs, str backend)"
    f" -> ({_grads_schema(['x', 'weight', 'bias'])})",
    _depthwise_conv2d_backward,
    _depthwise_conv2d_backward_fake,
)


def _conv2d_setup_context(ctx, inputs, output):
    x, weight, bias, ctx.backend = inputs
    ctx.contiguous = x.is_contiguous()
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, bias)


def _conv2d_autograd(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    grads = torch.ops.convmixer.depthwise_conv2d_backward(dy, x, ctx.contiguous, weight, bias, needs, ctx.backend)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


torch.library.register_autograd(
    "convmixer::depthwise_conv2d", _conv2d_autograd, setup_context=_conv2d_setup_context, lib=_LIBRARY
)

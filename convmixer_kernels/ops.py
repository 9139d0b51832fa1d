# SPDX-License-Identifier: MIT
"""The operators registered with torch.library, for torch.compile, export, dispatch modes and opcheck.

Registered as functions without side effects under `convmixer::`: functional.py updates running statistics from the
batch statistics that they return. What a call does not produce comes back as a tensor with no elements. Eager mode calls the
Functions of autograd.py instead wherever nothing needs these.

They check as the public functions do, on real tensors and on fake ones, and take the same layouts: strided tensors are copied.

The arguments: x, then a block's weight, bias, norm_weight, norm_bias (mixer_layer: two blocks'), the running mean and
var (two pairs; None where batch_statistics), then the four options, `save` (whether a backward may follow) and the backend's name.
A backward takes dy, x (None where no weight gradient is wanted), a, the block's tensors, the statistics that the forward used,
the options, `needs` (one bool for x and each parameter) and the backend's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import autograd, checks, composite, dispatch
from .autograd import all_contiguous, dense_input, dense_parameter, takes_contiguous
from .primitives import Block, Options, Statistics

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


def _like(x: Tensor, channels: int, contiguous: bool, wanted: bool = True) -> Tensor:
    """What a kernel allocates for an activation of x's batch, size and dtype."""
    if not wanted:
        return x.new_empty(0)
    memory_format = torch.contiguous_format if contiguous else torch.channels_last
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


def _present(needs: Sequence[bool], parameters: Sequence[Tensor | None]) -> tuple[bool, ...]:
    """`needs`, one for x and each parameter; False for None."""
    return needs[0], *(need and p is not None for need, p in zip(needs[1:], parameters, strict=True))


def _check_needs(op: str, needs: Sequence[bool], count: int) -> None:
    if len(needs) != count:
        raise ValueError(f"{op}: needs must hold {count} bools, one for x and each parameter, got needs={needs}")


def _check_running(op: str, batch_statistics: bool, running: Sequence[Tensor | None]) -> None:
    if batch_statistics and any(t is not None for t in running):
        raise ValueError(
            f"{op}: running statistics must be None where batch_statistics is True: the operator changes nothing, it returns the "
            "batch's statistics"
        )


def _register(name: str, schema: str, check: Callable, implementation: Callable, fake: Callable) -> None:
    def checked(*arguments):
        check(*arguments)
        if arguments[0].numel() == 0:
            # no kernel has anything to do
            results = fake(*arguments)
            return results.zero_() if isinstance(results, Tensor) else tuple(t.zero_() for t in results)
        return implementation(*arguments)

    def checked_fake(*arguments):
        check(*arguments)
        return fake(*arguments)

    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"convmixer::{name}", checked_fake, lib=_LIBRARY)


def _register_autograd(
    name: str, parameters: int, statistics: int, weights: tuple[int, ...], fixed: int, differentiable: Callable
) -> None:
    """The forward `name` has x, `parameters` tensors, `statistics` running ones and `fixed` further arguments.

    `weights` are the arguments whose gradient needs x; `differentiable` is the backward in torch's own operations, of dy, x, the
    parameters, the statistics, the four options and `needs`.
    """
    backward_operator = getattr(torch.ops.convmixer, f"{name}_backward").default
    first_option = 1 + parameters + statistics

    def setup_context(ctx, inputs, output):
        options = inputs[first_option : first_option + 4]
        saved_a, batch = output[1 : 1 + statistics // 2], output[1 + statistics // 2 :]
        used = batch if options[0] else inputs[1 + parameters : first_option]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], *saved_a, *inputs[1 : 1 + parameters], *used)
        ctx.options, ctx.backend = options, inputs[-1]

    def backward(ctx, dy, *_):
        needs = [bool(need) for need in ctx.needs_input_grad[: 1 + parameters]]
        x, *saved = ctx.saved_tensors
        if composite.replaces_backward(dy):
            grads = differentiable(dy, x, *saved[statistics // 2 :], *ctx.options, needs)
        else:
            x = x if any(needs[i] for i in weights) else None
            grads = backward_operator(dy, x, *saved, *ctx.options, needs, ctx.backend)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * (statistics + fixed)

    torch.library.register_autograd(f"convmixer::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def _register_block(kind: str) -> None:
    op = f"{kind}_block"

    def check(x, weight, bias, norm_weight, norm_bias, running_mean, running_var, *rest):
        batch_statistics, eps, activation, _, _, _ = rest
        checks.check_input(op, x)
        checks.check_options(op, activation, batch_statistics, 0.0, eps)
        of_kind = checks.check_depthwise_convolution if kind == "depthwise" else checks.check_pointwise_convolution
        of_kind(op, "", x, weight, bias)
        norm = (norm_weight, norm_bias, running_mean, running_var)
        checks.check_norm(op, "", x, weight.shape[0], *norm, batch_statistics)
        _check_running(op, batch_statistics, norm[2:])

    def forward(x, weight, bias, norm_weight, norm_bias, running_mean, running_var, *rest):
        *options, save, backend = rest
        module = dispatch.resolve(op, backend, kind, x, (weight,))
        block = Block(*map(dense_parameter, (weight, bias, norm_weight, norm_bias)))
        running = Statistics(*map(dense_parameter, (running_mean, running_var)))
        y, a, used = autograd.block_forward(module, dense_input(x), kind, block, running, _options(options, save))
        return y, _or_empty(a, x), *(used if options[0] else _statistics_like(x, 0, False))

    def forward_fake(x, weight, bias, norm_weight, norm_bias, running_mean, running_var, *rest):
        batch_statistics, *_, save, _ = rest
        channels, contiguous = weight.shape[0], takes_contiguous(x)
        a = _like(x, channels, contiguous, save or batch_statistics)
        return _like(x, channels, contiguous), a, *_statistics_like(x, channels, batch_statistics)

    def check_backward(dy, x, a, weight, bias, norm_weight, norm_bias, mean, var, *rest):
        batch_statistics, eps, activation, _, needs, _ = rest
        name = f"{op}_backward"
        checks.check_options(name, activation, batch_statistics, 0.0, eps)
        _check_needs(name, needs, 5)
        block = (weight, bias, norm_weight, norm_bias)
        checks.check_block_backward(name, "", kind, dy, x, a, block, (mean, var), needs[1])

    def backward(dy, x, a, weight, bias, norm_weight, norm_bias, mean, var, *rest):
        *options, needs, backend = rest
        block = Block(*map(dense_parameter, (weight, bias, norm_weight, norm_bias)))
        used = Statistics(*map(dense_parameter, (mean, var)))
        module = dispatch.resolve(f"{op}_backward", backend, kind, a, (weight,))
        needs = _present(needs, block)
        options, contiguous = _options(options, True), all_contiguous(a, x)
        grads = autograd.block_backward(module, dy, kind, x, a, block, used, options, needs, contiguous)
        return tuple(_or_empty(g, dy) for g in grads)

    def backward_fake(dy, x, a, weight, bias, norm_weight, norm_bias, mean, var, *rest):
        *_, needs, _ = rest
        channels = a.shape[1] if kind == "depthwise" else weight.shape[1]
        dx = _like(a, channels, all_contiguous(a, x), needs[0])
        return dx, *_parameter_grads_like((weight, bias, norm_weight, norm_bias), needs[1:], dy)

    def differentiable(dy, x, weight, bias, norm_weight, norm_bias, mean, var, *rest):
        *options, needs = rest
        block, used = Block(weight, bias, norm_weight, norm_bias), Statistics(mean, var)
        return composite.block_backward(dy, kind, x, None, block, used, _options(options, True), needs)

    names = ("x", "weight", "bias", "norm_weight", "norm_bias")
    _register(
        op,
        f"(Tensor x, {_block_schema('')}, Tensor? running_mean, Tensor? running_var, {_OPTIONS}, bool save, str backend)"
        " -> (Tensor y, Tensor a, Tensor mean, Tensor var)",
        check,
        forward,
        forward_fake,
    )
    _register(
        f"{op}_backward",
        f"(Tensor dy, Tensor? x, Tensor a, {_block_schema('')}, Tensor mean, Tensor var, {_OPTIONS}, bool[] needs,"
        f" str backend) -> ({_grads_schema(names)})",
        check_backward,
        backward,
        backward_fake,
    )
    _register_autograd(op, parameters=4, statistics=2, weights=(1,), fixed=6, differentiable=differentiable)


_register_block("depthwise")
_register_block("pointwise")


def _two(t: Sequence) -> tuple[tuple[Block, Block], tuple[Statistics, Statistics]]:
    """The two blocks' parameters and statistics out of the twelve tensors that follow x."""
    return (Block(*t[:4]), Block(*t[4:8])), (Statistics(*t[8:10]), Statistics(*t[10:12]))


def _check_mixer_layer(x, *arguments):
    blocks, running = _two(arguments)
    batch_statistics, eps, activation, _, _, _ = arguments[12:]
    checks.check_input("mixer_layer", x)
    checks.check_options("mixer_layer", activation, batch_statistics, 0.0, eps)
    checks.check_layer("mixer_layer", x, blocks, running, batch_statistics)
    _check_running("mixer_layer", batch_statistics, arguments[8:12])


def _mixer_layer(x, *arguments):
    *options, save, backend = arguments[12:]
    module = dispatch.resolve("mixer_layer", backend, "mixer", x, (arguments[0], arguments[4]))
    blocks, running = _two([dense_parameter(t) for t in arguments[:12]])
    y, a, used = autograd.mixer_forward(module, dense_input(x), blocks, running, _options(options, save))
    flat = (*used[0], *used[1]) if options[0] else (*_statistics_like(x, 0, False), *_statistics_like(x, 0, False))
    return y, *(_or_empty(t, x) for t in a), *flat


def _mixer_layer_fake(x, *arguments):
    batch_statistics, *_, save, _ = arguments[12:]
    channels, channels_out = arguments[0].shape[0], arguments[4].shape[0]
    saved, contiguous = save or batch_statistics, takes_contiguous(x)
    return (
        _like(x, channels_out, contiguous),
        _like(x, channels, contiguous, saved),
        _like(x, channels_out, contiguous, saved),
        *_statistics_like(x, channels, batch_statistics),
        *_statistics_like(x, channels_out, batch_statistics),
    )


def _check_mixer_layer_backward(dy, x, a_depthwise, a_pointwise, *arguments):
    op, (batch_statistics, eps, activation, residual, needs, _) = "mixer_layer_backward", arguments[12:]
    checks.check_options(op, activation, batch_statistics, 0.0, eps)
    _check_needs(op, needs, 9)
    x_needed = needs[1] or (needs[5] and residual)
    checks.check_layer_backward(op, dy, x, (a_depthwise, a_pointwise), *_two(arguments), x_needed)


def _mixer_layer_backward(dy, x, a_depthwise, a_pointwise, *arguments):
    blocks, used = _two([dense_parameter(t) for t in arguments[:12]])
    *options, needs, backend = arguments[12:]
    module = dispatch.resolve("mixer_layer_backward", backend, "mixer", a_depthwise, (arguments[0], arguments[4]))
    needs, a = _present(needs, arguments[:8]), (a_depthwise, a_pointwise)
    options, contiguous = _options(options, True), all_contiguous(a_depthwise, x)
    grads = autograd.mixer_backward(module, dy, x, a, blocks, used, options, needs, contiguous)
    return tuple(_or_empty(g, dy) for g in grads)


def _mixer_layer_backward_fake(dy, x, a_depthwise, a_pointwise, *arguments):
    *_, needs, _ = arguments[12:]
    dx = _like(a_depthwise, a_depthwise.shape[1], all_contiguous(a_depthwise, x), needs[0])
    return dx, *_parameter_grads_like(arguments[:8], needs[1:], dy)


def _mixer_layer_differentiable(dy, x, *arguments):
    *options, needs = arguments[12:]
    return composite.mixer_backward(dy, x, (None, None), *_two(arguments), _options(options, True), needs)


_BLOCKS = f"{_block_schema('depthwise_')}, {_block_schema('pointwise_')}"
_PARAMETERS = [f"{block}_{name}" for block in ("depthwise", "pointwise") for name in Block._fields]
_register(
    "mixer_layer",
    f"(Tensor x, {_BLOCKS}, Tensor? depthwise_running_mean, Tensor? depthwise_running_var,"
    f" Tensor? pointwise_running_mean, Tensor? pointwise_running_var, {_OPTIONS}, bool save, str backend)"
    " -> (Tensor y, Tensor a_depthwise, Tensor a_pointwise, Tensor depthwise_mean, Tensor depthwise_var,"
    " Tensor pointwise_mean, Tensor pointwise_var)",
    _check_mixer_layer,
    _mixer_layer,
    _mixer_layer_fake,
)
_register(
    "mixer_layer_backward",
    f"(Tensor dy, Tensor? x, Tensor a_depthwise, Tensor a_pointwise, {_BLOCKS}, Tensor depthwise_mean,"
    f" Tensor depthwise_var, Tensor pointwise_mean, Tensor pointwise_var, {_OPTIONS}, bool[] needs, str backend)"
    f" -> ({_grads_schema(['x', *_PARAMETERS])})",
    _check_mixer_layer_backward,
    _mixer_layer_backward,
    _mixer_layer_backward_fake,
)
_register_autograd(
    "mixer_layer", parameters=8, statistics=4, weights=(1, 5), fixed=6, differentiable=_mixer_layer_differentiable
)


def _check_depthwise_conv2d(x, weight, bias, dilation, backend):
    checks.check_input("depthwise_conv2d", x)
    checks.check_depthwise_convolution("depthwise_conv2d", "", x, weight, bias)
    checks.check_dilation("depthwise_conv2d", dilation)


def _depthwise_conv2d(x, weight, bias, dilation, backend):
    dilation = tuple(dilation)
    module = dispatch.resolve("depthwise_conv2d", backend, "depthwise", x, (weight,), dilation)
    tensors = dense_input(x), dense_parameter(weight), dense_parameter(bias)
    return autograd.convolution_forward(module, *tensors, dilation)


def _check_depthwise_conv2d_backward(dy, x, contiguous, weight, bias, needs, dilation, backend):
    _check_needs("depthwise_conv2d_backward", needs, 3)
    checks.check_dilation("depthwise_conv2d_backward", dilation)
    checks.check_convolution_backward("depthwise_conv2d_backward", dy, x, weight, bias, needs[1])


def _depthwise_conv2d_backward(dy, x, contiguous, weight, bias, needs, dilation, backend):
    dilation = tuple(dilation)
    module = dispatch.resolve("depthwise_conv2d_backward", backend, "depthwise", dy, (weight,), dilation)
    needs = _present(needs, (weight, bias))
    grads = autograd.convolution_backward(module, dy, x, contiguous, weight, bias, needs, dilation)
    return tuple(_or_empty(g, dy) for g in grads)


def _depthwise_conv2d_backward_fake(dy, x, contiguous, weight, bias, needs, dilation, backend):
    dx = _like(dy, dy.shape[1], contiguous, needs[0])
    return dx, *_parameter_grads_like((weight, bias), needs[1:], dy)


_register(
    "depthwise_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, int[] dilation, str backend) -> Tensor",
    _check_depthwise_conv2d,
    _depthwise_conv2d,
    lambda x, weight, bias, dilation, backend: _like(x, x.shape[1], takes_contiguous(x)),
)
_register(
    "depthwise_conv2d_backward",
    "(Tensor dy, Tensor? x, bool contiguous, Tensor weight, Tensor? bias, bool[] needs, int[] dilation,"
    f" str backend) -> ({_grads_schema(['x', 'weight', 'bias'])})",
    _check_depthwise_conv2d_backward,
    _depthwise_conv2d_backward,
    _depthwise_conv2d_backward_fake,
)


def _conv2d_setup_context(ctx, inputs, output):
    x, weight, bias, ctx.dilation, ctx.backend = inputs
    ctx.contiguous = takes_contiguous(x)
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, bias)


def _conv2d_autograd(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    if composite.replaces_backward(dy):
        grads = composite.convolution_backward(dy, x, weight, bias, needs, tuple(ctx.dilation))
    else:
        rest = bias, needs, ctx.dilation, ctx.backend
        grads = torch.ops.convmixer.depthwise_conv2d_backward(dy, x, ctx.contiguous, weight, *rest)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


torch.library.register_autograd(
    "convmixer::depthwise_conv2d", _conv2d_autograd, setup_context=_conv2d_setup_context, lib=_LIBRARY
)

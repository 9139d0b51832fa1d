# SPDX-License-Identifier: MIT
"""The public operators: documented, checked, aware of autocast, run by the best backend that can."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, composite, dispatch, distributed, gates, prepared
from . import ops as _registered_operators  # noqa: F401  defines torch.ops.convmixer
from .autograd import (
    MIXER_TENSORS,
    BlockFunction,
    ConvolutionFunction,
    MixerFunction,
    autocast_enabled,
    block_forward,
    convolution_forward,
    dense_input,
    mixer_forward,
)
from .primitives import Block, MixerEval, Norm, Options, Statistics, Update, update_running_statistics


def depthwise_block(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    norm_weight: Tensor | None,  # (C,)
    norm_bias: Tensor | None,  # (C,)
    running_mean: Tensor | None,  # (C,)
    running_var: Tensor | None,  # (C,)
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "gelu",
    residual: bool = True,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:  # (N, C, H, W)
    """ConvMixer's depthwise block: depthwise convolution, activation, batch norm, residual, fused.

    Equivalent to::

        h = gelu(F.conv2d(x, weight, bias, padding="same", groups=C))
        y = F.batch_norm(h, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps) + x

    Differentiable in x, weight, bias, norm_weight and norm_bias as often as the equivalent. Under create_graph and
    is_grads_batched the backward runs torch's own operations, under torch.func's transforms and forward-mode
    differentiation the forward does. Deterministic. An empty batch (N = 0) gives an empty result.
    Source: "Patches Are All You Need?" (Trockman and Kolter, 2022), equation 2.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16, or float64 (reference backend only); contiguous and channels_last
            are both native, other layouts are copied. The result has x's memory format. Under autocast x is cast as
            F.conv2d's input would be.
        weight: (C, 1, kH, kW), any kernel size, odd or even; padded as padding="same" does. This and the following tensors
            have x's dtype, or float32 beside a 16-bit x.
        bias: (C,) or None.
        norm_weight: gamma, (C,) or None (1).
        norm_bias: beta, (C,) or None (0).
        running_mean: (C,), updated in place in training; None: not tracked (then training must be True).
        running_var: (C,), biased in use, updated with the unbiased variance of the batch; None as running_mean.
        training: normalise by the statistics of the batch, as nn.BatchNorm2d in training.
        momentum: weight of the new value in the running statistics.
        eps: added to the variance.
        activation: "gelu" (exact, by erf), "gelu_tanh", "relu" or "identity".
        residual: add x.
        process_group: a torch.distributed.ProcessGroup: in training the statistics are those of the batches of all its ranks, as
            nn.SyncBatchNorm's. Each rank gets the gradients of its own batch's parameters; some ranks may have N = 0. Forward and
            backward send one message each, and all ranks must call both in the same order. Differentiable once. None, the default:
            this process's batch.
        backend: a name of available_backends(), or None for the fastest one that can run this.

    Returns:
        y, (N, C, H, W), of x's dtype (under autocast: of the dtype that the equivalent gives).

    Raises:
        TypeError: a dtype or an argument's type is wrong.
        ValueError: a shape, device, activation or backend name is wrong, or training with one value per channel.
        NotImplementedError: the backend asked for by name cannot run this, or process_group together with a second derivative, a
            transform, a dispatch mode or tensors that are not plain. RuntimeError: it is not available here.
    """
    op = "depthwise_block"
    checks.check_input(op, x)
    block, running = Block(weight, bias, norm_weight, norm_bias), Statistics(running_mean, running_var)
    x_given, (x, block) = x, _autocast(x, block)
    momentum, eps = checks.check_options(op, activation, training, momentum, eps)
    checks.check_bool(op, "residual", residual)
    group = distributed.group_in_use(op, process_group, training)
    checks.check_depthwise_convolution(op, "", x, block.weight, block.bias)
    checks.check_norm(op, "", x, x.shape[1], norm_weight, norm_bias, *running, training, group is not None)
    chosen = _choose(op, backend, "depthwise", x, (weight,))
    options = Options(training, momentum, eps, activation, residual, False, group=group)
    if x.dtype != x_given.dtype and residual:
        # autocast: eager adds its 16-bit norm's result to the wide x
        return _run_block("depthwise", x, block, running, options._replace(residual=False), chosen) + x_given
    return _run_block("depthwise", x, block, running, options, chosen)


def pointwise_block(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
    norm_weight: Tensor | None,  # (C_out,)
    norm_bias: Tensor | None,  # (C_out,)
    running_mean: Tensor | None,  # (C_out,)
    running_var: Tensor | None,  # (C_out,)
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "gelu",
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:  # (N, C_out, H, W)
    """ConvMixer's pointwise block: 1x1 convolution, activation, batch norm, fused.

    Equivalent to::

        h = gelu(F.conv2d(x, weight, bias))
        y = F.batch_norm(h, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps)

    Args, Raises: as :func:`depthwise_block`, with weight (C_out, C_in, 1, 1), x (N, C_in, H, W), all vectors (C_out,) and
    without a residual. Source: "Patches Are All You Need?", equation 3.

    Returns:
        y, (N, C_out, H, W), of x's dtype (under autocast: of autocast's) and memory format.
    """
    op = "pointwise_block"
    checks.check_input(op, x)
    block, running = Block(weight, bias, norm_weight, norm_bias), Statistics(running_mean, running_var)
    x, block = _autocast(x, block)
    momentum, eps = checks.check_options(op, activation, training, momentum, eps)
    group = distributed.group_in_use(op, process_group, training)
    checks.check_pointwise_convolution(op, "", x, block.weight, block.bias)
    checks.check_norm(op, "", x, weight.shape[0], norm_weight, norm_bias, *running, training, group is not None)
    chosen = _choose(op, backend, "pointwise", x, (weight,))
    options = Options(training, momentum, eps, activation, False, False, group=group)
    return _run_block("pointwise", x, block, running, options, chosen)


def mixer_layer(
    x: Tensor,  # (N, C, H, W)
    depthwise_weight: Tensor,  # (C, 1, kH, kW)
    depthwise_bias: Tensor | None,  # (C,)
    depthwise_norm_weight: Tensor | None,  # (C,)
    depthwise_norm_bias: Tensor | None,  # (C,)
    depthwise_running_mean: Tensor | None,  # (C,)
    depthwise_running_var: Tensor | None,  # (C,)
    pointwise_weight: Tensor,  # (C_out, C, 1, 1)
    pointwise_bias: Tensor | None,  # (C_out,)
    pointwise_norm_weight: Tensor | None,  # (C_out,)
    pointwise_norm_bias: Tensor | None,  # (C_out,)
    pointwise_running_mean: Tensor | None,  # (C_out,)
    pointwise_running_var: Tensor | None,  # (C_out,)
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "gelu",
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:  # (N, C_out, H, W)
    """A whole ConvMixer layer: depthwise_block, then pointwise_block, in one autograd Function.

    Equivalent to::

        z = depthwise_block(x, depthwise_weight, ..., depthwise_running_var, training=training, ...)
        y = pointwise_block(z, pointwise_weight, ..., pointwise_running_var, training=training, ...)

    and saves three activation-sized tensors for the backward instead of the four of the two calls (eager saves six with
    GELU): z is rebuilt in the backward.

    Args, Returns, Raises: as the two blocks'; training, momentum, eps, activation and process_group hold for both.
    """
    op = "mixer_layer"
    given = (
        Block(depthwise_weight, depthwise_bias, depthwise_norm_weight, depthwise_norm_bias),
        Block(pointwise_weight, pointwise_bias, pointwise_norm_weight, pointwise_norm_bias),
    )
    running = (
        Statistics(depthwise_running_mean, depthwise_running_var),
        Statistics(pointwise_running_mean, pointwise_running_var),
    )
    given_tensors = (*given[0], *given[1], *running[0], *running[1])
    group = distributed.group_in_use(op, process_group, training)
    entry = None if group is not None else known_layer(x, given_tensors, training, momentum, eps, activation, backend)
    if entry is not None:
        return run_known_layer(entry, x, given_tensors)
    checks.check_input(op, x)
    x_given, (x, *blocks) = x, _autocast(x, *given)
    momentum, eps = checks.check_options(op, activation, training, momentum, eps)
    checks.check_layer(op, x, blocks, running, training, group is not None)
    chosen = _choose(op, backend, "mixer", x, (depthwise_weight, pointwise_weight))
    if x.dtype != x_given.dtype:
        # a model's x is narrow under autocast; for a wide one the blocks handle the residual as eager does
        shared = {"training": training, "momentum": momentum, "eps": eps, "activation": activation, "backend": backend}
        shared |= {"process_group": process_group}
        # the first block's statistics move when the second has succeeded
        moving = tuple(t.clone() if training and t is not None else t for t in running[0])
        z = depthwise_block(x_given, *given[0], *moving, **shared)
        y = pointwise_block(z, *given[1], *running[1], **shared)
        with torch.no_grad():
            for t, moved in zip(running[0], moving, strict=True):
                if moved is not t:
                    t.copy_(moved)
        return y
    options = Options(training, momentum, eps, activation, True, False, group=group)
    if group is not None:
        return _call_synchronized(op, x, blocks, running, options, chosen)
    if x.numel() == 0 or composite.transformed():
        z = _run_block("depthwise", x, blocks[0], running[0], options, chosen)
        return _run_block("pointwise", z, blocks[1], running[1], options._replace(residual=False), chosen)
    x, *blocks = _dense(x, *blocks)
    running = running if training else tuple(Statistics(*map(_contiguous, r)) for r in running)
    options, tensors = _saving(options, x, *blocks), (x, *blocks[0], *blocks[1])
    if _direct(*tensors, *running[0], *running[1]):
        used = (*tensors[1:], *running[0], *running[1])
        if x is x_given and all(a is b for a, b in zip(used, given_tensors, strict=True)):
            _keep_layer(x, given_tensors, (training, momentum, eps, activation), backend, chosen)
        return _call(op, x, tuple(blocks), running, options, chosen)
    for prefix, pair in zip(("depthwise_", "pointwise_"), running, strict=True):
        _check_updated(op, prefix, pair, training)
    used = (None,) * 4 if training else (*running[0], *running[1])
    y, _, _, *batch = torch.ops.convmixer.mixer_layer(*tensors, *used, *_flat(options), _name(chosen))
    if training:
        _update(running[0], batch[0], batch[1], y, momentum)
        _update(running[1], batch[2], batch[3], y, momentum)
    return y


def known_layer(
    x: Tensor,  # (N, C, H, W)
    tensors: tuple[Tensor | None, ...],  # the depthwise block's four, the pointwise block's, running statistics of both
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    backend: str | None = None,
) -> prepared.Entry | None:
    """The entry of a call of mixer_layer that was checked before, or None."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return None
    if type(training) is not bool or type(momentum) is bool or type(eps) is bool:
        return None  # equal to a number that was accepted
    settings = (training, momentum, eps, activation, _autocast_dtype(x))
    return prepared.find("mixer_layer", x, tensors, settings, backend)


def run_known_layer(entry: prepared.Entry, x: Tensor, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """mixer_layer of a call that known_layer has found."""
    save = torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors[:8]))
    if entry.evaluate is not None and not save:
        return entry.evaluate(x, tensors[4])
    running = Statistics(*tensors[8:10]), Statistics(*tensors[10:])
    options = Options(*entry.settings[:4], True, save, entry)
    if save:
        return MixerFunction.apply(x, *tensors[:8], running, options, entry.backend)
    return mixer_forward(entry.backend, x, (Block(*tensors[:4]), Block(*tensors[4:8])), running, options)[0]


def _keep_layer(
    x: Tensor, tensors: tuple[Tensor | None, ...], settings: tuple, backend: str | None, chosen: ModuleType
) -> None:
    """Remember a call that has passed every check."""
    training, momentum, eps, activation = settings
    evaluate = train = None
    layers, (w1, b1, g1, h1, w2, b2, g2, h2, *running) = dispatch.load_layers(chosen.name), tensors
    if layers is not None and training:
        blocks = Block(w1, b1, g1, h1), Block(w2, b2, g2, h2)
        statistics = Statistics(*running[:2]), Statistics(*running[2:])
        train = layers.prepare_mixer_train(x, blocks, statistics, momentum, eps, activation)
    elif layers is not None:
        norms = Norm(*running[:2], g1, h1, eps), Norm(*running[2:], g2, h2, eps)
        evaluate = layers.prepare_mixer_eval(x, MixerEval(activation, (w1, b1, norms[0]), (w2, b2, norms[1])))
    requested, autocast = dispatch.requested_backend("mixer_layer", backend), _autocast_dtype(x)
    # autocast casts float32 convolutions, and a norm requires one dtype for all its tensors
    as_modules = {t.dtype for t in (w1, b1, w2, b2) if t is not None} <= {
        x.dtype,
        x.dtype if autocast is None else torch.float32,
    } and all(
        len({t.dtype for t in norm if t is not None}) <= 1 for norm in ((g1, h1, *running[:2]), (g2, h2, *running[2:]))
    )
    prepared.keep("mixer_layer", x, tensors, (*settings, autocast), requested, as_modules, chosen, evaluate, train)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if autocast_enabled(kind) else None


def can_fuse_layers(x: Tensor) -> bool:
    """Whether run_fused_layers can gain anything for layers of x's width. A quick answer, before the layers are looked at."""
    if gates.recording() or x.dim() != 4 or x.numel() == 0:
        return False
    backend = dispatch.load(
        dispatch.requested_backend("mixer_layer", None) or dispatch.automatic_order(x.device.type)[0]
    )
    return hasattr(backend, "mixer_eval") and backend.mixer_may_fit(x)


def run_fused_layers(x: Tensor, layers: Sequence[MixerEval]) -> Tensor | None:
    """Several mixer layers in evaluation without gradients, in one call of the backend, with the bits of calling each.

    Args:
        x: (N, C, H, W).
        layers: at least one, each from C channels to C.

    Returns:
        (N, C, H, W), or None if the layers must be called one by one: the backend finds that faster, or the call needs more
        care than this function takes (another number of channels, autocast, a tensor subclass, a transform).

    Raises:
        As :func:`mixer_layer`.
    """
    op = "mixer_layer"
    checks.check_input(op, x)
    if gates.recording() or gates.transformed() or x.numel() == 0 or autocast_enabled(x.device.type):
        return None
    if not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        return None  # mixer_layer makes the copy that the first layer needs
    dense, backend = [], None
    for activation, *blocks in layers:
        for *_, norm in blocks:
            checks.check_options(op, activation, False, 0.0, norm.eps)
        parameters = [Block(weight, bias, norm.weight, norm.bias) for weight, bias, norm in blocks]
        running = [Statistics(norm.mean, norm.var) for *_, norm in blocks]
        checks.check_layer(op, x, parameters, running, False)
        chosen = dispatch.choose(op, None, "mixer", x, (parameters[0].weight, parameters[1].weight))
        backend = backend or chosen
        if parameters[1].weight.shape[0] != x.shape[1] or chosen is not backend or not hasattr(backend, "mixer_eval"):
            return None
        blocks = [
            (_contiguous(weight), _contiguous(bias), Norm(*map(_contiguous, norm[:4]), float(norm.eps)))
            for weight, bias, norm in blocks
        ]
        tensors = (x, *(t for weight, bias, (mean, var, g, h, _) in blocks for t in (weight, bias, g, h, mean, var)))
        if not _direct(*tensors):
            return None
        checks.check_memory(op, MIXER_TENSORS, *tensors)
        dense.append(MixerEval(activation, *blocks))
    return _recorded("mixer_layers", backend.mixer_eval, x, dense, True)


def depthwise_conv2d(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None = None,  # (C,)
    *,
    dilation: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Tensor:  # (N, C, H, W)
    """Depthwise convolution of stride 1 and padding "same".

    Equivalent to ``F.conv2d(x, weight, bias, padding="same", dilation=dilation, groups=C)``. Differentiable in all three, as often as
    the equivalent. Another stride stays nn.Conv2d's: it computes a fraction of the outputs, which saves torch what it saves us.

    Args, Raises: as :func:`depthwise_block`, and
        dilation: the distance of the kernel's taps, one number or (dH, dW), each at least 1.

    Returns:
        (N, C, H, W), of x's dtype (under autocast: of autocast's) and memory format.
    """
    op = "depthwise_conv2d"
    checks.check_input(op, x)
    x, block = _autocast(x, Block(weight, bias, None, None))
    checks.check_depthwise_convolution(op, "", x, block.weight, block.bias)
    dilation = checks.check_dilation(op, dilation)
    chosen = _choose(op, backend, "depthwise", x, (weight,), dilation)
    if x.numel() == 0 or composite.transformed():
        return composite.convolution_forward(x, *block[:2], x.shape[1], dilation)
    x, block = _dense(x, block)
    if _direct(x, *block):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *block)):
            return ConvolutionFunction.apply(x, block.weight, block.bias, dilation, chosen)
        return _recorded(op, convolution_forward, chosen, x, block.weight, block.bias, dilation)
    return torch.ops.convmixer.depthwise_conv2d(x, block.weight, block.bias, dilation, _name(chosen))


def _run_block(
    kind: str, x: Tensor, block: Block, running: Statistics, options: Options, backend: ModuleType | str
) -> Tensor:
    op = "depthwise_block" if kind == "depthwise" else "pointwise_block"
    if options.group is not None:
        return _call_synchronized(op, x, (block,), (running,), options, backend)
    if x.numel() == 0:
        return _empty_block(kind, x, block, running, options)
    if composite.transformed():
        return composite.block_forward(kind, x, block, running, options)
    x, block = _dense(x, block)
    if not options.batch_statistics:
        running = Statistics(*map(_contiguous, running))
    options = _saving(options, x, block)
    if _direct(x, *block, *running):
        return _call(op, x, (block,), (running,), options, backend)
    _check_updated(op, "", running, options.batch_statistics)
    used = (None, None) if options.batch_statistics else running
    operator = torch.ops.convmixer.depthwise_block if kind == "depthwise" else torch.ops.convmixer.pointwise_block
    y, _, mean, var = operator(x, *block, *used, *_flat(options), _name(backend))
    if options.batch_statistics:
        _update(running, mean, var, y, options.momentum)
    return y


def _call(
    op: str,
    x: Tensor,
    blocks: tuple[Block, ...],
    running: tuple[Statistics, ...],
    options: Options,
    backend: ModuleType,
) -> Tensor:
    """The operator's autograd Function, or its forward alone if no backward may follow."""
    if op == "mixer_layer":
        if options.save:
            return MixerFunction.apply(x, *blocks[0], *blocks[1], running, options, backend)
        return _recorded(op, mixer_forward, backend, x, blocks, running, options)[0]
    kind = op.partition("_")[0]
    if options.save:
        return BlockFunction.apply(x, *blocks[0], running[0], kind, options, backend)
    return _recorded(op, block_forward, backend, x, kind, blocks[0], running[0], options)[0]


@torch._disable_dynamo
def _call_synchronized(
    op: str,
    x: Tensor,
    blocks: Sequence[Block],
    running: Sequence[Statistics],
    options: Options,
    backend: ModuleType | str,
) -> Tensor:
    """The operator with statistics of several processes: no registered operator sends messages, so torch.compile breaks its graph."""
    x, *blocks = _dense(x, *blocks)
    if not _direct(x, *itertools.chain(*blocks, *running)):
        raise NotImplementedError(
            f"{op}: process_group needs plain tensors in memory, contiguous running statistics and no dispatch mode"
        )
    if isinstance(backend, str):
        kind, weights = op.partition("_")[0], tuple(block.weight for block in blocks)
        backend = dispatch.resolve(op, backend, kind, x, weights)
    return _call(op, x, tuple(blocks), tuple(running), _saving(options, x, *blocks), backend)


def _saving(options: Options, x: Tensor, *blocks: Block) -> Options:
    """The options, with whether a backward may follow."""
    tensors = itertools.chain((x,), *blocks)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return options._replace(save=save)


def _empty_block(kind: str, x: Tensor, block: Block, running: Statistics, options: Options) -> Tensor:
    """No kernel has anything to do; torch's own operations give the shape and the (zero) gradients."""
    weight, bias, norm_weight, norm_bias = _of_dtype(block, x.dtype)
    groups = x.shape[1] if kind == "depthwise" else 1
    h = F.conv2d(x, weight, bias, padding="same", groups=groups)
    for t in (norm_weight, norm_bias):
        h = h if t is None else h + t.view(1, -1, 1, 1)
    return h + x if options.residual else h


def _of_dtype(block: Block, dtype: torch.dtype) -> Block:
    return Block(*(None if t is None else t.to(dtype) for t in block))


def _autocast(x: Tensor, *blocks: Block) -> tuple:
    """x and the blocks as F.conv2d gets them under autocast: x cast, and convolution parameters of a third dtype."""
    kind = x.device.type
    if not autocast_enabled(kind) or x.dtype == torch.float64:
        return x, *blocks
    dtype = torch.get_autocast_dtype(kind)

    def cast(name: str, t: Tensor | None) -> Tensor | None:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype in (dtype, torch.float32):
            return t
        checks.check_before_copy("autocast", name, t)
        return t.to(dtype)

    if x.dtype != dtype:
        checks.check_before_copy("autocast", "x", x)
    return x.to(dtype), *(
        Block(cast("weight", b.weight), cast("bias", b.bias), b.norm_weight, b.norm_bias) for b in blocks
    )


def _dense(x: Tensor, *blocks: Block) -> tuple:
    """x contiguous or channels_last, whichever it is already or its strides resemble, and the parameters contiguous."""
    if not torch.compiler.is_compiling() and x._is_zerotensor():
        x = x.clone()  # it has no memory
    return dense_input(x), *(Block(*map(_contiguous, b)) for b in blocks)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _direct(x: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels may be called by address: plain contiguous tensors in memory, and nothing that has to see operators.

    A registered operator takes the rest. Statistics that training updates may be strided: then the operator's caller updates them.
    A negative view's memory holds the opposite values: the dispatcher gives operators the right ones.
    """
    return (
        not gates.recording()
        and not gates.dispatch_mode_active()
        and gates.all_plain((x, *others))
        and all(t is None or (t.is_contiguous() and not t.is_neg()) for t in others)
        and not (x.is_meta or x.is_neg() or x._is_zerotensor())
    )


def _recorded(op: str, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), under the operator's name if a profiler records. Autograd and the dispatcher name the other calls; they do
    not see a direct one."""
    if not torch._C._autograd._profiler_enabled():
        return function(*args)
    with torch.autograd.profiler.record_function(f"convmixer::{op}"):
        return function(*args)


def _flat(options: Options) -> tuple:
    return (options.batch_statistics, float(options.eps), options.activation, options.residual, options.save)


def _choose(
    op: str,
    backend: str | None,
    kind: str,
    x: Tensor,
    weights: tuple[Tensor, ...],
    dilation: tuple[int, int] = (1, 1),
) -> ModuleType | str:
    """The backend's module; under compile, which cannot trace the choice, the name with which the operator chooses."""
    if torch.compiler.is_compiling():
        return backend or dispatch.AUTOMATIC
    return dispatch.choose(op, backend, kind, x, weights, dilation)


def _name(backend: ModuleType | str) -> str:
    return backend if isinstance(backend, str) else backend.name


def _check_updated(op: str, prefix: str, running: Statistics, training: bool) -> None:
    """Statistics that _update will move must have their memory; a registered operator does not see them."""
    for name, t in zip(("running_mean", "running_var"), running, strict=True):
        if training and t is not None:
            checks.check_before_copy(op, prefix + name, t)


def _update(running: Statistics, mean: Tensor, var: Tensor, y: Tensor, momentum: float) -> None:
    with torch.no_grad():
        update_running_statistics(Update(*running, mean, var, y.numel() // y.shape[1], momentum))

# SPDX-License-Identifier: MIT
"""ConvMixer on the kernels: the reference's modules, with layers that run as one operator where nobody can tell.

A layer decides anew on each forward, from its modules as they are then: a hook, a parametrization or another module
that appears later is never missed. Nothing about the decision is stored in the model: it copies and pickles as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from convmixer_kernels import checks, functional

from . import reference
from .reference import Residual

# exact classes: a subclass of Tensor may give its operations another meaning
_PLAIN_TENSORS = frozenset({Tensor, nn.Parameter})
_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
# what a convolution or norm holds in the place that its class gives it, None included
_PARAMETERS = frozenset({"weight", "bias"})
_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


class MixerLayer(nn.Sequential):
    """One layer of ConvMixer: an nn.Sequential of the reference's modules, run by one operator where that is the same.

        z = norm_1(act(depthwise_conv(x))) + x        children: 0 Residual(fn = Sequential(conv, act, norm)),
        y = norm_2(act(pointwise_conv(z)))                      1 conv, 2 act, 3 norm

    It runs its modules one by one, exactly as nn.Sequential, whenever that could be told apart: other children (a slice
    of a layer, a replaced norm, a parametrization), a hook on an inner module or on all modules, an input that the
    kernels do not take (float64, unbatched, a tensor subclass), tracing, torch.export, a torch.func transform,
    forward-mode differentiation.
    """

    def forward(self, input: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C_out, H, W)
        if not torch.jit.is_scripting():
            blocks = recognize(self)
            if not isinstance(blocks, str) and _takes(input, blocks):
                return _run(input, *blocks)
        for module in self:
            input = module(input)
        return input


class MixerSequential(nn.Sequential):
    """An nn.Sequential that evaluates consecutive mixer layers together, where nobody can tell.

    In evaluation without gradients a run of MixerLayers is one call, whose activations need not leave a core's cache
    between layers; the bits are those of calling the layers. A layer that would not run by its operator, or with a hook of
    its own, is called like every other child.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return _run_children(tuple(self._modules.values()), input)
        for module in self:
            input = module(input)
        return input


def ConvMixer(
    dim: int,
    depth: int,
    kernel_size: int | tuple[int, int] = 9,
    patch_size: int | tuple[int, int] = 7,
    n_classes: int = 1000,
    *,
    in_chans: int = 3,
    activation: str = "gelu",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """:func:`convmixer.reference.ConvMixer` with layers that run on the kernels.

    Equivalent to, with the same tree, state_dict and, for the same seed, parameters:

        model = convmixer.reference.ConvMixer(dim, depth, kernel_size, patch_size, n_classes)
        convmixer.accelerate(model)

    Args:
        dim: channels of every layer.
        depth: number of mixer layers; may be 0.
        kernel_size: of the depthwise convolutions, one number or (height, width); odd or even.
        patch_size: kernel and stride of the patch embedding, one number or (height, width).
        n_classes: outputs of the classifier.
        in_chans: channels of the images.
        activation: "gelu" (exact erf), "gelu_tanh", "relu" or "identity".
        device, dtype: of the parameters, as for every torch module.

    Returns:
        An nn.Sequential that takes (N, in_chans, H, W) and returns (N, n_classes).

    Raises:
        TypeError, ValueError: an argument of a wrong type or outside its range; the message names it.
    """
    options = {"in_chans": in_chans, "activation": activation, "device": device, "dtype": dtype}
    model = reference.ConvMixer(dim, depth, kernel_size, patch_size, n_classes, **options)
    for layer in model:
        if type(layer) is nn.Sequential:
            layer.__class__ = MixerLayer
    model.__class__ = MixerSequential
    return model


# ---- what a layer is made of ------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A convolution, its activation by name, and its norm."""

    conv: nn.Conv2d
    activation: str
    norm: nn.BatchNorm2d


def recognize(layer: nn.Sequential) -> tuple[Block, Block] | str:
    """The layer's depthwise and pointwise block if its operator would do what its modules do, else the reason why not.

    Looks at modules only, not at an input. It runs on every forward, for about 5 microseconds.
    """
    children = tuple(layer._modules.values())
    if len(children) != 4:
        return f"it has {len(children)} children, not the 4 of a mixer layer"
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return "a hook is registered on all modules"
    residual, *pointwise = children
    if not _is_residual(residual):
        return f"its residual, {_name(residual)}, is not known to compute fn(x) + x"
    fn = residual._modules.get("fn")
    if type(fn) is not nn.Sequential or len(fn._modules) != 3:
        return f"its residual's fn, {_name(fn)}, is not an nn.Sequential of 3 modules"
    for module in (residual, fn):
        if _is_altered(module):
            return f"its {_name(module)} has a hook or its own forward"
    first = _block("depthwise", *fn._modules.values())
    if isinstance(first, str):
        return first
    second = _block("pointwise", *pointwise)
    return second if isinstance(second, str) else (first, second)


def _block(kind: str, conv: nn.Module, activation: nn.Module, norm: nn.Module) -> Block | str:
    if type(conv) is not nn.Conv2d:
        return f"its {kind} convolution is {_name(conv)}, not nn.Conv2d"
    if type(norm) is not nn.BatchNorm2d:
        return f"its {kind} norm is {_name(norm)}, not nn.BatchNorm2d"
    name = _activation_name(activation)
    if name is None:
        return f"its {kind} activation is {activation!r}"
    if _is_altered(conv) or _is_altered(activation) or _is_altered(norm):
        return f"a module of its {kind} block has a hook or its own forward"
    if not (
        conv._parameters.keys() >= _PARAMETERS
        and norm._parameters.keys() >= _PARAMETERS
        and norm._buffers.keys() >= _STATISTICS
    ):
        return f"a tensor of its {kind} block is not a parameter or buffer of its module"
    channels = conv.in_channels
    if kind == "depthwise":
        shape_is_right = conv.groups == channels == conv.out_channels
    else:
        shape_is_right = conv.groups == 1 and conv.kernel_size == (1, 1)
    if not (
        shape_is_right
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and _pads_same(conv.padding, conv.kernel_size)
    ):
        return f"its {kind} convolution is {conv}"
    return Block(conv, name, norm)


def _pads_same(padding: str | tuple[int, int], kernel_size: tuple[int, int]) -> bool:
    if padding == "same":
        return True
    if padding == "valid":
        padding = (0, 0)
    return 2 * padding[0] == kernel_size[0] - 1 and 2 * padding[1] == kernel_size[1] - 1


def _activation_name(module: nn.Module) -> str | None:
    kind = type(module)
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if kind is nn.ReLU:
        return "relu"
    return "identity" if kind is nn.Identity else None


def _is_altered(module: nn.Module) -> bool:
    """Whether calling this module does more or other than its class's forward."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_call_impl" in state
        or module._compiled_call_impl is not None
    )


def _name(module: nn.Module | None) -> str:
    return type(module).__name__


# ---- which residual modules compute fn(x) + x -------------------------------------------------------------------


def _fn_then_x(self, x):
    return self.fn(x) + x


def _x_then_fn(self, x):
    return x + self.fn(x)


def _instructions(function: object) -> tuple[object, ...] | None:
    """What a Python function does, apart from its names for arguments, its annotations and its docstring."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    # varargs, varkeywords, generators and coroutines
    kind = code.co_flags & (0x04 | 0x08 | 0x20 | 0x80 | 0x100 | 0x200)
    return code.co_code, code.co_names, code.co_argcount, code.co_kwonlyargcount, code.co_freevars, kind


_RESIDUAL_FORWARDS = frozenset({_instructions(_fn_then_x), _instructions(_x_then_fn)})
# class -> the forward that was proven; a class whose forward is replaced later is proven anew
_proven_residuals: dict[type, object] = {Residual: Residual.forward}


def _is_residual(module: nn.Module) -> bool:
    """Whether this module computes fn(x) + x.

    A class of another library (the paper's script, timm) is known by its forward's bytecode, which must be that of
    ``return self.fn(x) + x`` or ``return x + self.fn(x)``. This is a proof, and runs nothing: a class's name says too
    little, a numeric probe cannot see what depends on a mode, on the input or on chance, and source text may be absent.
    """
    kind = type(module)
    forward = getattr(kind, "forward", None)
    if _proven_residuals.get(kind) is not forward or forward is None:
        if not (
            isinstance(module, nn.Module)
            and kind.__call__ is nn.Module.__call__
            and kind.__getattr__ is nn.Module.__getattr__
            and kind.__getattribute__ is nn.Module.__getattribute__
            and not hasattr(kind, "fn")
            and _instructions(forward) in _RESIDUAL_FORWARDS
        ):
            return False
        _proven_residuals[kind] = forward
    return "fn" not in module.__dict__


# ---- running a layer by its operator ----------------------------------------------------------------------------


def _takes(x: object, blocks: tuple[Block, Block]) -> bool:
    """Whether the operator gives the modules' result for this input, under the modes that are active now."""
    if type(x) not in _PLAIN_TENSORS or x.dtype not in _DTYPES or x.dim() != 4 or x.layout is not torch.strided:
        return False
    if x.is_meta or x.is_nested or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if torch.compiler.is_exporting():
        return False  # a program that runs without this package
    dtype, device = x.dtype, x.device.type
    # autocast casts float32 weights to its dtype; without it nn.Conv2d wants weights of x's dtype
    wide = dtype
    if torch.is_autocast_enabled(device):
        if torch.get_autocast_dtype(device) is not dtype:
            return False
        wide = torch.float32
    for conv, _, norm in blocks:
        if not norm.eps > 0:
            return False  # F.batch_norm refuses it in training, and if negative in evaluation
        for t in conv._parameters.values():
            if t is not None and (type(t) not in _PLAIN_TENSORS or (t.dtype is not dtype and t.dtype is not wide)):
                return False
        buffers = norm._buffers
        mean, var = buffers["running_mean"], buffers["running_var"]
        if (mean is None) is not (var is None):
            return False
        # nn.BatchNorm2d takes all its tensors of one dtype, which is x's or float32
        norm_dtype = None
        for t in (*norm._parameters.values(), mean, var):
            if t is None:
                continue
            if norm_dtype is None:
                norm_dtype = t.dtype
                if norm_dtype is not dtype and norm_dtype is not torch.float32:
                    return False
            if type(t) not in _PLAIN_TENSORS or t.dtype is not norm_dtype:
                return False
    return True


class _NormCall(NamedTuple):
    """What nn.BatchNorm2d.forward hands to F.batch_norm, and the counter that it steps."""

    tensors: tuple[Tensor | None, ...]  # weight, bias, running_mean, running_var, each (C,)
    settings: tuple[bool, float, float]  # whether statistics are the batch's, momentum, eps
    counter: Tensor | None  # num_batches_tracked, stepped already


def _norm_call(norm: nn.BatchNorm2d) -> _NormCall:
    parameters, buffers = norm._parameters, norm._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    training, counter = norm.training, None
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if training:
        if norm.track_running_stats:
            counter = buffers["num_batches_tracked"]
            if counter is not None:
                counter.add_(1)
                if norm.momentum is None:
                    momentum = 1.0 / float(counter)
        else:
            mean = var = None
    tensors = parameters["weight"], parameters["bias"], mean, var
    return _NormCall(tensors, (training or mean is None, momentum, norm.eps), counter)


def _run(x: Tensor, depthwise: Block, pointwise: Block) -> Tensor:
    norms = _norm_call(depthwise.norm), _norm_call(pointwise.norm)
    try:
        return _run_operators(x, depthwise, pointwise, *norms)
    except (TypeError, ValueError, RuntimeError):
        # a refused call has counted nothing; activation checkpointing stops a forward by an exception of its own, and
        # there the reference has counted
        for norm in norms:
            if norm.counter is not None:
                norm.counter.sub_(1)
        raise


def _run_operators(x: Tensor, depthwise: Block, pointwise: Block, first: _NormCall, second: _NormCall) -> Tensor:
    w1, w2 = depthwise.conv._parameters, pointwise.conv._parameters
    training, momentum, eps = first.settings
    if first.settings == second.settings and depthwise.activation == pointwise.activation:
        return functional.mixer_layer(
            x,
            w1["weight"],
            w1["bias"],
            *first.tensors,
            w2["weight"],
            w2["bias"],
            *second.tensors,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=depthwise.activation,
        )
    # two calls: what the second would refuse must be refused before the first has moved its statistics
    op, weight, bias = "pointwise_block", w2["weight"], w2["bias"]
    checks.check_pointwise_convolution(op, "", x, weight, bias)
    checks.check_norm(op, "", x, weight.shape[0], *second.tensors, second.settings[0])
    checks.check_options(op, pointwise.activation, *second.settings)
    z = functional.depthwise_block(
        x,
        w1["weight"],
        w1["bias"],
        *first.tensors,
        training=training,
        momentum=momentum,
        eps=eps,
        activation=depthwise.activation,
    )
    training, momentum, eps = second.settings
    return functional.pointwise_block(
        z, weight, bias, *second.tensors, training=training, momentum=momentum, eps=eps, activation=pointwise.activation
    )


# ---- running several layers together ----------------------------------------------------------------------------


def _run_children(children: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    evaluates = not torch.is_grad_enabled() and torch._C._get_tracing_state() is None
    at = 0
    while at < len(children):
        layers, y = [], None
        candidate = evaluates and type(children[at]) is MixerLayer and type(x) in _PLAIN_TENSORS
        if candidate and functional.may_evaluate_mixer_layers(x):
            layers = _evaluated_together(children[at:], x)
            y = functional.evaluate_mixer_layers(x, layers) if len(layers) > 1 else None
        taken = max(len(layers), 1)
        if y is None:
            y = x
            for module in children[at : at + taken]:
                y = module(y)
        x = y
        at += taken
    return x


def _evaluated_together(children: tuple[nn.Module, ...], x: object) -> list[functional.MixerArguments]:
    """What the first children are called with, as far as they are layers that their operator would evaluate."""
    layers: list[functional.MixerArguments] = []
    for layer in children:
        if type(layer) is not MixerLayer or _is_altered(layer):
            break
        blocks = recognize(layer)
        if isinstance(blocks, str) or not _takes(x, blocks):
            break
        if any(b.norm.training or b.norm._buffers["running_mean"] is None for b in blocks):
            break
        first, second = (_norm_call(b.norm) for b in blocks)
        if first.settings != second.settings or blocks[0].activation != blocks[1].activation:
            break
        tensors = []
        for block, norm in zip(blocks, (first, second), strict=True):
            weight, bias, mean, var = norm.tensors
            convolution = block.conv._parameters
            tensors += [
                functional.Block(convolution["weight"], convolution["bias"], weight, bias),
                functional.Statistics(mean, var),
            ]
        layers.append(functional.MixerArguments(*tensors, first.settings[2], blocks[0].activation))
    return layers

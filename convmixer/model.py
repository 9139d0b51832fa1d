# SPDX-License-Identifier: MIT
"""ConvMixer on the kernels: the reference's modules, with layers that run as one operator where nobody can tell.

A layer decides anew on each forward, from its modules as they are then: a hook, a parametrization or another module
that appears later is never missed. Nothing about the decision is stored in the model: it copies and pickles as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

from convmixer_kernels import checks, dispatch, functional

from . import reference
from ._patches import replaced_in_torch, torch_is_itself
from .reference import Residual

# exact classes: a subclass of Tensor may give its operations another meaning
_PLAIN_TENSORS = frozenset({Tensor, nn.Parameter})
_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


class MixerLayer(nn.Sequential):
    """One layer of ConvMixer: an nn.Sequential of the reference's modules, run by one operator where that is the same.

        z = norm_1(act(depthwise_conv(x))) + x        children: 0 Residual(fn = Sequential(conv, act, norm)),
        y = norm_2(act(pointwise_conv(z)))                      1 conv, 2 act, 3 norm

    It runs its modules one by one, exactly as nn.Sequential, whenever that could be told apart: other children (a slice
    of a layer, a replaced norm, a parametrization), a hook on an inner module or on all modules, a function or a class of
    torch's that was replaced for all (nn.GELU.forward, F.gelu), a mode that sees or changes torch's functions or operators
    (TorchFunctionMode, TorchDispatchMode), an input that the kernels do not take (float64, unbatched, empty, a tensor
    subclass), tracing, torch.export, a torch.func transform, forward-mode differentiation.
    """

    def forward(self, input: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C_out, H, W)
        if not torch.jit.is_scripting():
            # a tracer makes tensors of sizes, and records a program that runs without this package
            if torch._C._get_tracing_state() is None and _changed_for_all() is None:
                y = _run_layer(self, input)
                if y is not None:
                    return y
            return super().forward(input)
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
            if not torch_is_itself():
                return super().forward(input)
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

    Looks at modules only, not at an input. It runs on every forward, for about 6 microseconds.
    """
    return _changed_for_all() or _recognize(layer)


def _changed_for_all() -> str | None:
    """Why no layer at all may run by its operator now, or None."""
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return "a hook is registered on all modules"
    return None if torch_is_itself() else f"{replaced_in_torch()} is not torch's own"


def _recognize(layer: nn.Sequential) -> tuple[Block, Block] | str:
    children = tuple(layer._modules.values())
    if len(children) != 4:
        return f"it has {len(children)} children, not the 4 of a mixer layer"
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
    if not _is_in_place(conv, norm):
        return f"a tensor or method of its {kind} block is not where its class has it"
    # the weight's own sizes: the convolution's attributes say what it was made for, and nothing reads them
    weight = conv._parameters["weight"]
    shape = () if weight is None else weight.shape
    if not (
        len(shape) == 4
        and type(conv.groups) is int
        and (
            (shape[1] == 1 and conv.groups == shape[0])
            if kind == "depthwise"
            else (shape[2] == shape[3] == conv.groups == 1)
        )
        and _are_ones(conv.stride, conv.dilation)
        and conv.padding_mode == "zeros"
        and _pads_same(conv.padding, shape[2], shape[3])
    ):
        return f"its {kind} convolution is {_described(conv, shape)}"
    return Block(conv, name, norm)


def _is_in_place(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Whether their tensors, None included, are parameters and buffers, and no attribute hides one or a method of the class."""
    parameters, own = conv._parameters, conv.__dict__
    if not ("weight" in parameters and "bias" in parameters):
        return False
    if "weight" in own or "bias" in own or "_conv_forward" in own:
        return False
    parameters, buffers, own = norm._parameters, norm._buffers, norm.__dict__
    if not ("weight" in parameters and "bias" in parameters and "num_batches_tracked" in buffers):
        return False
    if not ("running_mean" in buffers and "running_var" in buffers) or "_check_input_dim" in own:
        return False
    return not (
        "weight" in own
        or "bias" in own
        or "running_mean" in own
        or "running_var" in own
        or "num_batches_tracked" in own
    )


def _pads_same(padding: object, height: int, width: int) -> bool:
    if type(padding) is str:
        return padding == "same" or (padding == "valid" and height == width == 1)
    return height & width & 1 == 1 and _is_pair(padding, height // 2, width // 2)


def _are_ones(stride: object, dilation: object) -> bool:
    return (
        stride == dilation == (1, 1)
        and type(stride) is type(dilation) is tuple
        and type(stride[0]) is type(stride[1]) is type(dilation[0]) is type(dilation[1]) is int
    )


def _is_pair(value: object, first: int, second: int) -> bool:
    """Exactly these two ints: torch refuses floats that equal them."""
    return value == (first, second) and type(value) is tuple and type(value[0]) is int and type(value[1]) is int


def _described(conv: nn.Conv2d, shape: tuple[int, ...]) -> str:
    try:
        described = str(conv)
    except (TypeError, ValueError):  # it takes pairs for granted
        return "an nn.Conv2d with attributes of other types than the class gives them"
    return described if shape[2:] == conv.kernel_size else f"{described} with a weight of {tuple(shape)}"


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
    if _proven_residuals.get(kind) is not forward or forward is None or kind.__call__ is not nn.Module.__call__:
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


def _takes_input(x: object) -> bool:
    """Whether operators may run on this input, under the modes that are active now."""
    if type(x) not in _PLAIN_TENSORS or x.dtype not in _DTYPES or x.dim() != 4 or x.layout is not torch.strided:
        return False
    if x.is_meta or x.is_nested or x.numel() == 0 or _is_watched():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return not torch.compiler.is_exporting()  # a program that runs without this package


def _takes_tensors(x: Tensor, blocks: tuple[Block, Block]) -> bool:
    """Whether the operator gives the modules' result for an input that operators may run on, with their tensors and settings."""
    dtype, device = x.dtype, x.device.type
    # autocast casts float32 weights to its dtype; without it nn.Conv2d wants weights of x's dtype
    wide = dtype
    if torch.is_autocast_enabled(device):
        if torch.get_autocast_dtype(device) is not dtype:
            return False
        wide = torch.float32
    for conv, _, norm in blocks:
        # F.batch_norm refuses an eps of 0 in training, and a negative one in evaluation
        if not (_is_moderate(norm.eps) and norm.eps > 0):
            return False
        if not (norm.momentum is None or _is_moderate(norm.momentum)):
            return False
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


def _is_moderate(value: object) -> bool:
    """A number that float32 holds: about others (infinite, NaN, of another type) torch has ideas of its own."""
    kind = type(value)
    return (
        kind is float or kind is int or (isinstance(value, (float, int)) and kind is not bool)
    ) and -1e30 < value < 1e30


def _is_watched() -> bool:
    """Whether a mode sees torch's functions or operators; one that only sets the default device changes nothing here."""
    if torch.compiler.is_compiling():
        return False  # a compiled program has operators of its own
    if torch._C._len_torch_dispatch_stack():
        return True
    modes = torch._C._len_torch_function_stack()
    return modes > 0 and any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(modes))


class _NormCall(NamedTuple):
    """What nn.BatchNorm2d.forward hands to F.batch_norm, and the counter that it steps."""

    tensors: tuple[Tensor | None, ...]  # weight, bias, running_mean, running_var, each (C,)
    settings: tuple[bool, float, float]  # whether statistics are the batch's, momentum, eps
    counter: Tensor | None  # num_batches_tracked, stepped already


def _norm_call(norm: nn.BatchNorm2d) -> _NormCall:
    parameters, buffers = norm._parameters, norm._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    training, counter = bool(norm.training), None
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


def _run_layer(layer: nn.Sequential, x: Tensor) -> Tensor | None:
    """The layer's output by its operator, or None where its modules are to run. The caller has asked _changed_for_all."""
    blocks = _recognize(layer)
    if isinstance(blocks, str) or not _takes_input(x) or not _takes_tensors(x, blocks):
        return None
    return _run(layer, x, *blocks)


def _run(layer: nn.Sequential, x: Tensor, depthwise: Block, pointwise: Block) -> Tensor:
    norms = _norm_call(depthwise.norm), _norm_call(pointwise.norm)
    try:
        return _run_operators(x, depthwise, pointwise, *norms)
    except (TypeError, ValueError, RuntimeError) as error:
        # a refused call has counted nothing; activation checkpointing stops a forward by an exception of its own, and
        # there the reference has counted
        for norm in norms:
            if norm.counter is not None:
                norm.counter.sub_(1)
        if isinstance(error, RuntimeError):
            raise
        dispatch.requested_backend("mixer_layer", None)  # an unknown name is no reason to run something else
        if any(t.device != x.device for t in (*layer.parameters(), *layer.buffers())):
            raise  # torch's convolution takes a meta tensor beside a real one, and reads what is not there
        return _run_modules(layer, x, norms, error)


def _run_modules(layer: nn.Sequential, x: Tensor, norms: Sequence[_NormCall], refusal: Exception) -> Tensor:
    """What the modules make of a call that the operator refuses; if they raise, the refusal, and no state has moved."""
    state = [t for norm in norms for t in (*norm.tensors[2:], norm.counter) if t is not None]
    before = [t.clone() for t in state]
    try:
        return nn.Sequential.forward(layer, x)
    except Exception as error:
        for t, value in zip(state, before, strict=True):
            t.detach().copy_(value)
        raise refusal from error


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
    traced = torch._C._get_tracing_state() is not None or torch.compiler.is_compiling()
    evaluates = not torch.is_grad_enabled() and not traced
    at = 0
    # whether a layer's call is its operator's and no more; between two such calls nobody can change that
    plain = False
    while at < len(children):
        layers, y = [], None
        is_layer = type(children[at]) is MixerLayer and not traced
        if is_layer and not plain:
            plain = _changed_for_all() is None and _calls_its_operator()
        if is_layer and plain and evaluates and type(x) in _PLAIN_TENSORS and functional.may_evaluate_mixer_layers(x):
            layers = _evaluated_together(children[at:], x)
            if len(layers) > 1:
                # of a refusal the first layer that gets it makes what it must
                with contextlib.suppress(TypeError, ValueError):
                    y = functional.evaluate_mixer_layers(x, layers)
        taken = max(len(layers), 1)
        if y is None:
            y = x
            for module in children[at : at + taken]:
                z = _run_layer(module, y) if is_layer and plain and not _is_altered(module) else None
                if z is None:
                    z, plain = module(y), False
                y = z
        x = y
        at += taken
    return x


def _calls_its_operator() -> bool:
    """Whether calling a MixerLayer without hooks is MixerLayer.forward as it stands above."""
    return MixerLayer.forward is _LAYER_FORWARD and MixerLayer.__call__ is nn.Module.__call__


_LAYER_FORWARD = MixerLayer.forward


def _evaluated_together(children: tuple[nn.Module, ...], x: object) -> list[functional.MixerArguments]:
    """What the first children are called with, as far as they are layers that their operator would evaluate."""
    layers: list[functional.MixerArguments] = []
    if not _takes_input(x):
        return layers
    for layer in children:
        if type(layer) is not MixerLayer or _is_altered(layer):
            break
        blocks = _recognize(layer)
        if isinstance(blocks, str) or not _takes_tensors(x, blocks):
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

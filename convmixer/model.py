# SPDX-License-Identifier: MIT
"""ConvMixer on the kernels: the reference's modules, with layers that run as one operator where nobody can tell.

A layer decides anew on each forward, from its modules as they are then: a hook, a parametrization or another module
that appears later is never missed. Nothing about the decision is stored in the model: it copies and pickles as it is.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from convmixer_kernels import functional

from . import reference
from ._patches import torch_is_itself
from .recognize import _changed_for_all, _is_altered, _recognize
from .run import _PLAIN_TENSORS, _norm_call, _run_layer, _takes_input, _takes_tensors


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

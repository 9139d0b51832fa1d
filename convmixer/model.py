# SPDX-License-Identifier: MIT
"""ConvMixer on the kernels: the reference's modules, with layers that run as one operator if the result is the same.

A layer decides on each forward, from its modules as they are then. Nothing about the decision is stored in the model, which
copies and pickles as it is.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from convmixer_kernels import functional, gates
from convmixer_kernels.modules import BlockSequential
from convmixer_kernels.patches import torch_is_itself
from convmixer_kernels.primitives import MixerEval
from convmixer_kernels.recognize import SEQUENTIALS, changed_for_all, is_altered
from convmixer_kernels.run import operator_accepts_input, run_children, run_next

from . import reference
from .run import fusible_layer, run_layer


class MixerLayer(nn.Sequential):
    """One layer of ConvMixer: an nn.Sequential of the reference's modules, run by one operator if that gives the same.

        z = norm_1(act(depthwise_conv(x))) + x        children: 0 Residual(fn = Sequential(conv, act, norm)),
        y = norm_2(act(pointwise_conv(z)))                      1 conv, 2 act, 3 norm, or 1 Sequential of these three

    It runs its modules one by one, exactly as nn.Sequential does, whenever the operator might do something else:

    - other children: a slice of a layer, a replaced norm, a parametrization;
    - a hook on an inner module or on all modules;
    - a function or class of torch's that was replaced for all (nn.GELU.forward, F.gelu);
    - a TorchFunctionMode or TorchDispatchMode;
    - an input that the kernels do not accept: float64, unbatched, empty, a tensor subclass;
    - torch.jit.trace, torch.export, a torch.func transform, forward-mode differentiation.

    Its norms may be nn.SyncBatchNorm (convert_sync_batchnorm): in training each sends one message forward and one backward, through
    gloo on a CPU too. There torch's own module raises, so that a layer which must run its modules does. torch.compile breaks its
    graph at such a layer.
    """

    def forward(self, input: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C_out, H, W)
        if not torch.jit.is_scripting():
            # a tracer turns sizes into tensors, and records a program that runs without this package
            if not gates.jit_tracing() and changed_for_all() is None:
                y = run_layer(self, input)
                if y is not None:
                    return y
            return super().forward(input)
        for module in self:
            input = module(input)
        return input


class MixerSequential(BlockSequential):
    """A BlockSequential that runs consecutive mixer layers in one call, in evaluation without gradients.

    The activations between those layers can then stay in a core's cache. The result has the bits of calling each layer. A layer
    that its operator cannot run, or that has a hook of its own, is called like every other child. An nn.SyncBatchNorm among the
    children, as a stem's, also trains on a CPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if torch_is_itself():
                return _run_children(tuple(self._modules.values()), input)
            return super().forward(input)
        for module in self:
            input = module(input)
        return input


SEQUENTIALS.add(MixerSequential)


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
    """ConvMixer with layers that run on the kernels.

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
    model = reference.ConvMixer(
        dim,
        depth,
        kernel_size,
        patch_size,
        n_classes,
        in_chans=in_chans,
        activation=activation,
        device=device,
        dtype=dtype,
    )
    for layer in model:
        if type(layer) is nn.Sequential:
            layer.__class__ = MixerLayer
    model.__class__ = MixerSequential
    return model


def _run_children(children: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    if gates.recording():
        return run_children(children, x)
    fuses = not torch.is_grad_enabled()
    # whether a call of a MixerLayer is its operator's call and no more: between two such calls nobody can change that
    direct = False
    at = unfused = 0  # children before `unfused` run alone, because their fused run was refused
    while at < len(children):
        module, taken, y = children[at], 1, None
        if type(module) is MixerLayer:
            direct = direct or (changed_for_all() is None and _calls_its_operator())
            if direct and fuses and at >= unfused and type(x) in gates.PLAIN_TENSORS and functional.can_fuse_layers(x):
                layers = _fusible_run(children[at:], x)
                if len(layers) > 1:
                    # if the run is refused with an error, the first layer that causes it decides what follows
                    with contextlib.suppress(TypeError, ValueError):
                        y = functional.run_fused_layers(x, layers)
                    if y is None:
                        unfused = at + len(layers)
                    else:
                        taken = len(layers)
            if y is None and direct and not is_altered(module):
                y = run_layer(module, x)
        if y is None:
            y, taken = run_next(children, at, x)
            direct = False
        x = y
        at += taken
    return x


def _calls_its_operator() -> bool:
    """Whether a call of a MixerLayer without hooks still is MixerLayer.forward as it stands above."""
    return MixerLayer.forward is _LAYER_FORWARD and MixerLayer.__call__ is nn.Module.__call__


_LAYER_FORWARD = MixerLayer.forward


def _fusible_run(children: tuple[nn.Module, ...], x: Tensor) -> list[MixerEval]:
    """The first children, as far as they are layers that one call can run."""
    run: list[MixerEval] = []
    if not operator_accepts_input(x):
        return run
    for module in children:
        layer = None if type(module) is not MixerLayer or is_altered(module) else fusible_layer(module, x)
        if layer is None:
            break
        run.append(layer)
    return run

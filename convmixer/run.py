# SPDX-License-Identifier: MIT
"""From mixer layers to operators: whether an operator gives the modules' result for this input, and the call."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from convmixer_kernels import checks, functional, prepared
from convmixer_kernels.distributed import group_of
from convmixer_kernels.primitives import MixerEval, Norm
from convmixer_kernels.recognize import BlockModules
from convmixer_kernels.run import (
    NormCall,
    StopRecomputation,
    after_refusal,
    begin_norm,
    operator_accepts_blocks,
    operator_accepts_input,
    run_block,
    step_counters,
    weight_and_bias,
)

from .recognize import recognize_layer


def run_layer(layer: nn.Sequential, x: Tensor) -> Tensor | None:  # (N, C, H, W) -> (N, C_out, H, W)
    """The layer's output by its operator, or None if its modules must run. The caller has asked changed_for_all."""
    blocks = recognize_layer(layer)
    if isinstance(blocks, str):
        return None
    shared = group_of(blocks[0].norm) is not None or group_of(blocks[1].norm) is not None
    if not operator_accepts_input(x, empty=shared):
        return None
    entry, tensors = (None, ()) if shared else _known(x, blocks)
    if entry is None and not operator_accepts_blocks(x, blocks):
        return None
    norms = begin_norm(blocks[0].norm), begin_norm(blocks[1].norm)
    try:
        y = functional.run_known_layer(entry, x, tensors) if entry is not None else _run_blocks(x, blocks, norms)
    except StopRecomputation:
        step_counters(*norms)
        raise
    except (TypeError, ValueError) as error:
        tensors = (*layer.parameters(), *layer.buffers())
        return after_refusal("mixer_layer", error, x, norms, tensors, partial(nn.Sequential.forward, layer))
    step_counters(*norms)
    return y


def _known(
    x: Tensor, blocks: tuple[BlockModules, BlockModules]
) -> tuple[prepared.Entry | None, tuple[Tensor | None, ...]]:
    """The call of the layer's operator, if it was made before with these tensors: its blocks were accepted then."""
    depthwise, pointwise = (block.norm for block in blocks)
    training, momentum, eps = depthwise.training, depthwise.momentum, depthwise.eps
    if (
        pointwise.training is not training
        or pointwise.momentum != momentum
        or pointwise.eps != eps
        or blocks[0].activation != blocks[1].activation
        or type(eps) is not float
        or type(momentum) is not float
    ):
        return None, ()
    parameters, statistics = [], []
    for conv, _, norm in blocks:
        convolution, affine, buffers = conv._parameters, norm._parameters, norm._buffers
        parameters += convolution["weight"], convolution["bias"], affine["weight"], affine["bias"]
        if training and not norm.track_running_stats:
            statistics += None, None
        else:
            statistics += buffers["running_mean"], buffers["running_var"]
    if not training and any(t is None for t in statistics):
        return None, ()  # the batch's statistics in evaluation
    tensors = (*parameters, *statistics)
    entry = functional.known_layer(x, tensors, training, momentum, eps, blocks[0].activation)
    return (entry if entry is not None and entry.as_modules else None), tensors


def fusible_layer(layer: nn.Sequential, x: Tensor) -> MixerEval | None:
    """The layer as functional.run_fused_layers takes it, or None if it must be called by itself. The caller has asked
    changed_for_all and operator_accepts_input, and gradients are disabled."""
    blocks = recognize_layer(layer)
    if isinstance(blocks, str) or not operator_accepts_blocks(x, blocks):
        return None
    depthwise, pointwise = blocks
    if depthwise.activation != pointwise.activation or depthwise.norm.eps != pointwise.norm.eps:
        return None
    halves = []
    for conv, _, norm in blocks:
        convolution, affine, buffers = conv._parameters, norm._parameters, norm._buffers
        mean, var = buffers["running_mean"], buffers["running_var"]
        if norm.training or mean is None:
            return None
        halves.append(
            (convolution["weight"], convolution["bias"], Norm(mean, var, affine["weight"], affine["bias"], norm.eps))
        )
    return MixerEval(depthwise.activation, *halves)


def _run_blocks(x: Tensor, blocks: tuple[BlockModules, BlockModules], norms: tuple[NormCall, NormCall]) -> Tensor:
    depthwise, pointwise = blocks
    alike = norms[0].settings == norms[1].settings and norms[0].group is norms[1].group
    if not alike or depthwise.activation != pointwise.activation:
        # two calls: what the second would refuse must be refused before the first has moved its statistics
        op, weight, bias = "pointwise_block", *weight_and_bias(pointwise)
        checks.check_pointwise_convolution(op, "", x, weight, bias)
        checks.check_norm(
            op, "", x, weight.shape[0], *norms[1].tensors, norms[1].settings[0], norms[1].group is not None
        )
        checks.check_options(op, pointwise.activation, *norms[1].settings)
        z = run_block(functional.depthwise_block, x, depthwise, norms[0])
        return run_block(functional.pointwise_block, z, pointwise, norms[1])
    training, momentum, eps = norms[0].settings
    return functional.mixer_layer(
        x,
        *weight_and_bias(depthwise),
        *norms[0].tensors,
        *weight_and_bias(pointwise),
        *norms[1].tensors,
        training=training,
        momentum=momentum,
        eps=eps,
        activation=depthwise.activation,
        process_group=norms[0].group,
    )

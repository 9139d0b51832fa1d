# SPDX-License-Identifier: MIT
"""Put the depthwise convolutions of an existing model, and what lies around them, on the kernels, in place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from convmixer_kernels import dispatch
from convmixer_kernels.modules import BlockSequential, DepthwiseBlock, DepthwiseConv2d, PointwiseBlock
from convmixer_kernels.recognize import (
    CONVOLUTIONS,
    SEQUENTIALS,
    activation_name,
    block_kind,
    changed_for_all,
    class_name,
    is_depthwise,
    recognize_block,
)

from .model import MixerLayer, MixerSequential
from .recognize import recognize_layer


@dataclass
class Report:
    """What :func:`accelerate` did. Each count includes what ran on the kernels before."""

    layers: int = 0  # mixer layers, each one operator
    blocks: int = 0  # convolution, activation, norm, each one operator
    convolutions: int = 0  # depthwise convolutions by themselves
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name in the model, reason)
    hints: list[str] = field(default_factory=list)  # what a change of the model would gain

    @property
    def accelerated(self) -> int:
        """The sum of the counts."""
        return self.layers + self.blocks + self.convolutions

    def __str__(self) -> str:
        counts = (
            (self.layers, "mixer layer"),
            (self.blocks, "conv-activation-norm block"),
            (self.convolutions, "depthwise convolution"),
        )
        parts = [f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts if count]
        lines = [f"accelerated {', '.join(parts) or 'nothing'}"]
        if not parts and not self.skipped:
            lines[0] += ": found no mixer layer, no conv-activation-norm block and no depthwise convolution"
        if self.skipped:
            lines[0] += f"; left {len(self.skipped)} unchanged:"
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped:
            reasons.setdefault(reason, []).append(name or "the model itself")
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  {', '.join(names[:3])}{more}: {reason}")
        return "\n".join([*lines, *self.hints])


def accelerate(model: nn.Module) -> Report:
    """Swap the classes of what the kernels can run, in place; parameters, keys and results stay.

    Equivalent to, at three depths, the largest first:

        layer.__class__ = MixerLayer             # an nn.Sequential that is a mixer layer, in the paper's forms or timm's
        sequence.__class__ = BlockSequential     # an nn.Sequential in which conv, activation, norm follow each other
        conv.__class__ = DepthwiseConv2d         # any other depthwise nn.Conv2d of stride 1 that keeps the size of its input

    and an nn.Sequential that contains mixer layers becomes a MixerSequential, which can run them in one call. A block's convolution is
    depthwise or 1x1, its activation GELU, ReLU or Identity (of torch, or of a class that computes the same), its norm nn.BatchNorm2d.
    On each forward, what was measured to be faster in eager PyTorch for that device, dtype and layout runs there.

    Call it before fully_shard, torch.jit and torch.export, and after torch.fx, weight parametrizations and convert_sync_batchnorm.

    Args:
        model: any module. Calling again is harmless.

    Returns:
        A :class:`Report`. Print it to read how much was accelerated, and for the rest the reason why not.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be an nn.Module, got {type(model).__name__}")
    visit = _Visit()
    visit.module("", model)
    return visit.finish(model)


class _Visit:
    """One walk through a model."""

    def __init__(self) -> None:
        self.report = Report()
        self.seen: set[int] = set()
        self.by_hand: dict[str, int] = {}  # class of a module that calls conv, activation, norm itself -> how many
        self.mixed = 0  # convolutions that run torch's own in some layout
        self.quiet = 0  # how many mixer layers around the module were left: their reason is enough

    def skip(self, name: str, reason: str) -> None:
        if not self.quiet:
            self.report.skipped.append((name, reason))

    def module(self, name: str, module: nn.Module) -> None:
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        left = False
        if _resembles_layer(module):
            reason = _why_not_layer(module)
            if reason is None:
                if type(module) is not MixerLayer:
                    module.__class__ = MixerLayer
                self.report.layers += 1
                return
            self.skip(name, reason)
            self.quiet += 1
            left = True
        elif isinstance(module, nn.Conv2d):
            self.convolution(name, module)
            return
        children = list(module._modules.items())
        taken = self.blocks(name, module, [child for _, child in children])
        for at, (key, child) in enumerate(children):
            if child is not None and at not in taken:
                self.module(f"{name}.{key}" if name else key, child)
        self.quiet -= left
        if type(module) in (nn.Sequential, BlockSequential) and any(type(child) is MixerLayer for _, child in children):
            module.__class__ = MixerSequential

    def blocks(self, name: str, module: nn.Module, children: list[nn.Module | None]) -> set[int]:
        """Counts the blocks that begin at a child of this module, and returns the places of their modules."""
        if isinstance(module, (DepthwiseBlock, PointwiseBlock)):
            found: Iterator[tuple[int, str]] = iter(
                [(0, "depthwise" if isinstance(module, DepthwiseBlock) else "pointwise")]
            )
        else:
            found = _resembling_blocks(children)
        taken: set[int] = set()
        for at, kind in found:
            if isinstance(module, (nn.Sequential, DepthwiseBlock, PointwiseBlock)):
                key = list(module._modules)[at]
                reason = _why_not_block(kind, module, children[at : at + 3])
                if reason is None:
                    taken |= {at, at + 1, at + 2}
                else:
                    self.skip(f"{name}.{key}" if name else key, reason)
            elif type(module) is not nn.Module:  # torch.fx makes such containers
                kind_name = class_name(module)
                self.by_hand[kind_name] = self.by_hand.get(kind_name, 0) + 1
        if taken and type(module) is nn.Sequential:
            module.__class__ = BlockSequential
        self.report.blocks += len(taken) // 3
        return taken

    def convolution(self, name: str, conv: nn.Conv2d) -> None:
        if not 1 < conv.groups == conv.in_channels == conv.out_channels and not isinstance(conv, DepthwiseConv2d):
            return
        reason = _why_not_convolution(conv)
        if reason is not None:
            self.skip(name, reason)
            return
        if type(conv) is nn.Conv2d:
            conv.__class__ = DepthwiseConv2d
        self.report.convolutions += 1
        self.mixed += not all(_gains("depthwise_conv2d", conv))

    def finish(self, model: nn.Module) -> Report:
        hints = self.report.hints
        if self.mixed:
            hints.append(
                f"of the convolutions, {self.mixed} run torch's own in cases where that was measured to be faster "
                "(small kernels in channels_last)"
            )
        for kind, count in self.by_hand.items():
            hints.append(
                f"{count} {kind}: it may call a convolution, an activation and a norm itself; in an nn.Sequential, or as a "
                "convmixer_kernels.DepthwiseBlock or PointwiseBlock, they would run as one block"
            )
        if _has_base(model, "GraphModule"):
            hints.append(
                "the model was traced by torch.fx, which leaves no nn.Sequential: only convolutions can be accelerated"
            )
        return self.report


def _has_base(module: nn.Module, name: str) -> bool:
    """Whether a class of this name is among its bases, without importing it."""
    return any(base.__name__ == name for base in type(module).__mro__)


def _not_itself(module: nn.Module, kind: str) -> str:
    """Why a module of a subclass of this torch class is left."""
    if _has_base(module, "FSDPModule"):
        return "fully_shard has wrapped it: call accelerate before"
    return f"its class, {class_name(module)}, is not {kind} itself"


def _resembles_layer(module: nn.Module) -> bool:
    """Whether the module looks enough like a mixer layer to deserve a line in the report.

    It does if it is a Sequential of a module around a Sequential(conv, ...) or around conv, activation, norm, then a conv or a
    Sequential(conv, ...).
    """
    if isinstance(module, MixerLayer):
        return True
    if not isinstance(module, nn.Sequential) or len(module) < 2 or module[0] is None:
        return False
    inner = list(module[0].children())
    residual = len(inner) == 1 and _begins_with_convolution(inner[0])
    residual = residual or (
        type(module[0]) not in SEQUENTIALS and len(inner) == 3 and _begins_with_convolution(module[0])
    )
    return residual and (isinstance(module[1], nn.Conv2d) or (len(module) == 2 and _begins_with_convolution(module[1])))


def _begins_with_convolution(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Sequential) and isinstance(next(iter(module), None), nn.Conv2d)


def _why_not_layer(module: nn.Sequential) -> str | None:
    if not isinstance(module, MixerLayer) and type(module) not in SEQUENTIALS:
        return _not_itself(module, "nn.Sequential")
    if "forward" in module.__dict__:
        return "it has its own forward"
    blocks = changed_for_all() or recognize_layer(module)
    return blocks if isinstance(blocks, str) else None


def _resembling_blocks(children: list[nn.Module | None]) -> Iterator[tuple[int, str]]:
    """The places where a depthwise or 1x1 convolution, a known activation and a batch norm follow each other."""
    at = 0
    while at + 3 <= len(children):
        conv, activation, norm = children[at : at + 3]
        depthwise = isinstance(conv, nn.Conv2d) and 1 < conv.groups == conv.in_channels == conv.out_channels
        pointwise = isinstance(conv, nn.Conv2d) and block_kind(conv) == "pointwise"
        # any other activation is an everyday case, which needs no line
        known = activation is not None and activation_name(activation) is not None
        if (depthwise or pointwise) and known and isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            yield at, "depthwise" if depthwise else "pointwise"
            at += 3
        else:
            at += 1


def _why_not_block(kind: str, module: nn.Module, modules: list[nn.Module]) -> str | None:
    if isinstance(module, nn.Sequential) and type(module) not in SEQUENTIALS:
        return _not_itself(module, "nn.Sequential")
    if "forward" in module.__dict__:
        return f"the {class_name(module)} around it has its own forward"
    block = changed_for_all() or recognize_block(kind, *modules)
    if isinstance(block, str):
        return block
    return None if any(_gains(f"{kind}_block", block.conv)) else _no_gain(block.conv)


def _why_not_convolution(conv: nn.Conv2d) -> str | None:
    if type(conv) not in CONVOLUTIONS:
        return _not_itself(conv, "nn.Conv2d")
    if "forward" in conv.__dict__ or "_conv_forward" in conv.__dict__:
        return "it has its own forward"
    weight = getattr(conv, "weight", None)
    shape = () if weight is None else weight.shape
    if conv.stride != (1, 1):
        return f"its stride is {conv.stride}, not 1"
    if conv.padding_mode != "zeros":
        return f"its padding_mode is {conv.padding_mode!r}, not 'zeros'"
    if not is_depthwise(conv, shape):
        return f"its padding, {conv.padding}, does not keep the size of its input"
    return None if any(_gains("depthwise_conv2d", conv)) else _no_gain(conv)


def _gains(op: str, conv: nn.Conv2d) -> list[bool]:
    """Whether the operator gains for large inputs in each layout, in inference and in training, where the weight is now."""
    weight = conv.weight
    device, kernel = weight.device.type, tuple(weight.shape[2:])
    if device == "meta":
        device = "cpu"  # the module is materialised later
    elif not dispatch.has_kernels(device):
        return [False]
    dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float32
    shape = (64, weight.shape[0], 56, 56)
    return [
        dispatch.gains(op, device, dtype, contiguous, shape, kernel, backward, dilation=conv.dilation)
        for contiguous, backward in itertools.product((True, False), repeat=2)
    ]


def _no_gain(conv: nn.Conv2d) -> str:
    height, width = conv.weight.shape[2:]
    device = conv.weight.device.type
    if device != "meta" and not dispatch.has_kernels(device):
        return f"no kernels for {device} tensors are installed here (python -m convmixer_kernels says why)"
    where = f"on {device} in {str(conv.weight.dtype).removeprefix('torch.')}"
    return f"no kernel was measured to be faster than torch's own for {height}x{width} {where}"

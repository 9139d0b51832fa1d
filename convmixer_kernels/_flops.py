# SPDX-License-Identifier: MIT
"""Formulas by which torch.utils.flop_counter.FlopCounterMode counts for a registered operator the same as for its equivalent.

Only convolutions count there. torch's rule for a weight gradient ignores groups and counts a depthwise one C times: these
formulas give the same number, not a better one.

torch.utils.flop_counter imports triton, which takes half a second, or warns that there is none. So the formulas are
registered only when somebody imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def register(counter: ModuleType) -> None:
    """Register every operator's formula with torch.utils.flop_counter."""

    def forward(x: Shape, weight: Shape) -> int:
        return counter.conv_flop_count(x, weight, [x[0], weight[0], *x[2:]])

    def backward(dy: Shape, weight: Shape, needs_x: bool, needs_weight: bool) -> int:
        flops = counter.conv_flop_count(dy, weight, dy, transposed=True) if needs_x else 0
        if needs_weight:
            channels_in, per_filter, *kernel = dy[1] if weight[1] == 1 else weight[1], weight[1], *weight[2:]
            x, transposed = [channels_in, dy[0], *dy[2:]], [per_filter, weight[0], *kernel]
            flops += counter.conv_flop_count(x, [dy[1], dy[0], *dy[2:]], transposed)
        return flops

    ops = torch.ops.convmixer
    registers = counter.register_flop_formula

    @registers([ops.depthwise_conv2d, ops.depthwise_block, ops.pointwise_block])
    def convolution(x: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
        return forward(x, weight)

    @registers(ops.mixer_layer)
    def layer(
        x: Shape, depthwise_weight: Shape, b: Any, g: Any, h: Any, pointwise_weight: Shape, *a: Any, **k: Any
    ) -> int:
        return forward(x, depthwise_weight) + forward(x, pointwise_weight)

    @registers(ops.depthwise_conv2d_backward)
    def convolution_backward(
        dy: Shape, x: Shape | None, contiguous: bool, weight: Shape, bias: Any, needs: Sequence[bool], *a: Any, **k: Any
    ) -> int:
        return backward(dy, weight, needs[0], needs[1])

    @registers([ops.depthwise_block_backward, ops.pointwise_block_backward])
    def block_backward(dy: Shape, x: Shape | None, a: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
        needs = args[-2]
        return backward(dy, weight, needs[0], needs[1])

    @registers(ops.mixer_layer_backward)
    def layer_backward(dy: Shape, x: Shape | None, *args: Any, **kwargs: Any) -> int:
        a_depthwise, depthwise_weight, pointwise_weight, needs = args[0], args[2], args[6], args[-2]
        below = any(needs[:5])
        upper = backward(dy, pointwise_weight, below, needs[5])
        return upper + backward(a_depthwise, depthwise_weight, needs[0], needs[1])


class _WhenImported(MetaPathFinder):
    """Registers the formulas after torch.utils.flop_counter has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Register the formulas now or, if torch.utils.flop_counter is not imported yet, after its import."""
    if _COUNTER in sys.modules:
        register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())

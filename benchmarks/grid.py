# SPDX-License-Identifier: MIT
"""python -m benchmarks grid: is an operator ever slower than eager? Over a grid of shapes, kernels, layouts and threads.

It times on a CPU, interleaved call by call: the convolution and the two blocks in evaluation (conv, eval, pointwise) and as a training
step (conv_step, step, pointwise_step), the depthwise block's training forward, and the convolution's input gradient. Each row has eager's
median over ours, and says if modules leave the call to torch (dispatch.gains). Exit status 1 if eager is faster in another row, beyond
the 20 % and 80 % quantiles of both.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch

import convmixer_kernels as ck
from benchmarks import machine, ops, timing
from benchmarks.cases import DTYPES, LAYOUTS, OpCase
from convmixer_kernels import dispatch

#: (N, C, H, W): a large plane, many channels on small ones, channels that fill no vector, batches, the smallest plane of a network.
SHAPES = [
    (1, 64, 200, 200),
    (1, 128, 56, 56),
    (1, 32, 112, 112),
    (1, 256, 28, 28),
    (1, 512, 14, 14),
    (8, 24, 56, 56),
    (32, 64, 28, 28),
    (1, 40, 28, 28),
    (16, 768, 7, 7),
]
#: Name -> the row of ops.py, and the operator whose gain dispatch.gains knows; None: a part of one.
OPERATORS = {
    "conv": ("depthwise_conv", "depthwise_conv2d"),
    "eval": ("depthwise_eval", "depthwise_block"),
    "train": ("depthwise_train", None),
    "input_grad": ("depthwise_conv", None),
    "conv_step": ("depthwise_conv_step", "depthwise_conv2d"),
    "step": ("depthwise_step", "depthwise_block"),
    "pointwise": ("pointwise_eval", "pointwise_block"),
    "pointwise_step": ("pointwise_step", "pointwise_block"),
}
_CPU = torch.device("cpu")


def _size(text: str) -> int | tuple[int, int]:
    """A kernel, "7" or "11x1" (height x width)."""
    sizes = tuple(map(int, text.split("x")))
    return sizes[0] if len(sizes) == 1 else sizes


def pair(op: str, case: OpCase) -> dict[str, Callable[[], object]]:
    """The operator in eager PyTorch, and in ours by the backend that the package chooses."""
    (inputs,) = ops.make_inputs(case, _CPU, 1)
    if op != "input_grad":
        operator = ops.OPERATORS[case.op]
        return {"eager": operator.call(inputs), "ours": operator.ours(inputs, None)}
    convolution, arguments = ops.OPERATORS["depthwise_conv"], inputs.parameters[:2]
    leaf = inputs.x.clone().requires_grad_()
    outputs = {"eager": convolution.function(leaf, *arguments), "ours": ck.depthwise_conv2d(leaf, *arguments)}
    return {name: lambda y=y: torch.autograd.grad(y, leaf, inputs.dy, retain_graph=True) for name, y in outputs.items()}


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 if eager is faster in a row that modules do not leave to it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks grid", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--kernels", type=_size, nargs="+", default=[3, 5, 7, 9], help="7 or 11x1, for example")
    parser.add_argument("--ops", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args(arguments)
    print(f"{machine.cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    slower = 0
    grid = itertools.product(options.threads, options.dtype, LAYOUTS, SHAPES, options.kernels, options.ops)
    for threads, dtype, layout, shape, kernel, op in grid:
        torch.set_num_threads(threads)
        row, public = OPERATORS[op]
        case = OpCase(row, "grid", shape, kernel, None, dtype, layout)
        found = timing.interleaved(pair(op, case), repeats=options.repeats, warmup=3, device=_CPU)
        eager, ours = found["eager"], found["ours"]
        taps, backward = case.kernel_size if case.has_depthwise else (1, 1), op.endswith("step")
        form = ("cpu", DTYPES[dtype], layout == "contiguous", shape, taps, backward)
        runs, lost = public is None or dispatch.gains(public, *form), ours.low > eager.high
        slower += lost and runs
        times = (
            f"eager {1e3 * eager.median:8.3f} ms  ours {1e3 * ours.median:8.3f} ms  {eager.median / ours.median:5.2f}"
        )
        size, k = "x".join(map(str, shape)), "x".join(map(str, taps))
        name = f"{op:<14} k{k:<5} {size:<14} {dtype} {layout:<13} {threads} threads"
        print(f"{name}  {times}{'  SLOWER' if lost else ''}{'' if runs else '  left to torch'}", flush=True)
    print(f"eager is faster in {slower} rows that modules do not leave to it")
    return 1 if slower else 0

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
import platform
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import convmixer_kernels as ck
from benchmarks import timing
from benchmarks.cases import DTYPES, LAYOUTS
from convmixer_kernels import dispatch
from convmixer_kernels.testing import eager_convolution

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
KERNELS = ((3, 3), (5, 5), (7, 7), (9, 9))
#: Name -> the operator whose gain dispatch.gains knows; None: a part of one.
OPERATORS = {
    "conv": "depthwise_conv2d",
    "eval": "depthwise_block",
    "train": None,
    "input_grad": None,
    "conv_step": "depthwise_conv2d",
    "step": "depthwise_block",
    "pointwise": "pointwise_block",
    "pointwise_step": "pointwise_block",
}
_CPU = torch.device("cpu")

Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def _size(text: str) -> tuple[int, int]:
    """A kernel, "7" or "11x1" (height x width)."""
    sizes = tuple(map(int, text.split("x")))
    return sizes * 2 if len(sizes) == 1 else sizes


def _step(forward: Callable[..., Tensor], x: Tensor, tensors: Sequence[Tensor]) -> Callable[[], object]:
    """Forward and backward of forward(x, *tensors)."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *tensors)]
    dy = torch.randn_like(forward(*leaves))
    return lambda: torch.autograd.grad(forward(*leaves), leaves, dy)


def pair(op: str, x: Tensor, kernel: tuple[int, int]) -> Pair:
    """The operator in eager PyTorch and in ours; the forwards without gradients."""
    channels = x.shape[1]
    if op.startswith("pointwise"):
        weight = torch.randn(channels, channels, 1, 1, dtype=x.dtype) / channels**0.5
    else:
        weight = torch.randn(channels, 1, *kernel, dtype=x.dtype) / (kernel[0] * kernel[1]) ** 0.5
    if op in ("conv", "input_grad", "conv_step"):
        convolutions = (
            (lambda t, w=weight: eager_convolution(t, w, None, groups=channels)),
            lambda t, w=weight: ck.depthwise_conv2d(t, w),
        )
        if op == "conv_step":
            return tuple(_step(f, x, (weight,)) for f in convolutions)
        if op == "conv":
            return tuple(lambda f=f: f(x) for f in convolutions)
        leaf, dy = x.clone().requires_grad_(), torch.randn_like(x)
        outputs = [f(leaf) for f in convolutions]
        return tuple(lambda y=y: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0] for y in outputs)
    norm = [torch.rand(channels, dtype=x.dtype) + 0.5 for _ in range(4)]
    training, groups = op.endswith(("train", "step")), 1 if op.startswith("pointwise") else channels

    def eager(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        h = F.gelu(eager_convolution(x, weight, None, groups=groups))
        h = F.batch_norm(h, norm[2], norm[3], gamma, beta, training)
        return h if groups == 1 else h + x

    def ours(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        operator = ck.pointwise_block if groups == 1 else ck.depthwise_block
        return operator(x, weight, None, gamma, beta, *norm[2:], training=training)

    tensors = weight, *norm[:2]
    if op.endswith("step"):
        return _step(eager, x, tensors), _step(ours, x, tensors)
    return lambda: eager(x, *tensors), lambda: ours(x, *tensors)


def measure(options: argparse.Namespace) -> Iterator[tuple[str, bool, timing.Timing, timing.Timing]]:
    """A name, whether modules run the operator, eager's time and ours, for each point of the grid."""
    grid = itertools.product(options.threads, options.dtype, LAYOUTS, SHAPES, options.kernels, options.ops)
    for threads, dtype, layout, shape, kernel, op in grid:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        x = torch.randn(shape).to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
        eager, ours = pair(op, x, kernel)
        backward = op.endswith(("grad", "step"))
        with torch.set_grad_enabled(backward):
            theirs, mine = timing.interleaved(
                {"eager": eager, "ours": ours}, repeats=options.repeats, warmup=3, device=_CPU
            ).values()
        size = "x".join(map(str, shape))
        kernel = (1, 1) if op.startswith("pointwise") else kernel
        form = "cpu", x.dtype, x.is_contiguous(), shape, kernel, backward
        runs = OPERATORS[op] is None or dispatch.gains(OPERATORS[op], *form)
        k = "x".join(map(str, kernel))
        yield f"{op:<14} k{k:<5} {size:<14} {dtype} {layout:<13} {threads} threads", runs, theirs, mine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks grid", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--kernels", type=_size, nargs="+", default=list(KERNELS), help="7 or 11x1, for example")
    parser.add_argument("--ops", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args(arguments)
    print(
        f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )
    slower = []
    for name, runs, theirs, mine in measure(options):
        lost = mine.low > theirs.high
        slower += [name] if lost and runs else []
        row = (
            f"eager {1e3 * theirs.median:8.3f} ms  ours {1e3 * mine.median:8.3f} ms  {theirs.median / mine.median:5.2f}"
        )
        print(f"{name}  {row}{'  SLOWER' if lost else ''}{'' if runs else '  left to torch'}", flush=True)
    print(f"eager is faster in {len(slower)} rows that modules do not leave to it")
    return 1 if slower else 0

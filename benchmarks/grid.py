# SPDX-License-Identifier: MIT
"""python -m benchmarks grid: is a depthwise operator ever slower than eager? Over a grid of shapes, kernels, layouts and threads.

It times on a CPU, interleaved call by call: the convolution, the block in evaluation and in a training forward, and the convolution's input
gradient. Each row has eager's median over ours. Exit status 1 if eager is faster somewhere, beyond the 20 % and 80 % quantiles of both.
"""

from __future__ import annotations

import argparse
import itertools
import platform
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import convmixer_kernels as ck
from benchmarks import timing
from benchmarks.shapes import DTYPES, LAYOUTS
from convmixer_kernels.testing import eager_convolution

#: (N, C, H, W): a large plane, many channels on small ones, channels that fill no vector, batches.
SHAPES = [
    (1, 64, 200, 200),
    (1, 128, 56, 56),
    (1, 32, 112, 112),
    (1, 256, 28, 28),
    (1, 512, 14, 14),
    (8, 24, 56, 56),
    (32, 64, 28, 28),
    (1, 40, 28, 28),
]
KERNELS = (3, 5, 7, 9)
OPERATORS = ("conv", "eval", "train", "input_grad")
_CPU = torch.device("cpu")

Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def pair(op: str, x: Tensor, kernel: int) -> Pair:
    """The operator in eager PyTorch and in ours; the forwards without gradients."""
    channels = x.shape[1]
    weight = torch.randn(channels, 1, kernel, kernel, dtype=x.dtype) / kernel
    if op in ("conv", "input_grad"):
        convolutions = (
            (lambda t: eager_convolution(t, weight, None, groups=channels)),
            lambda t: ck.depthwise_conv2d(t, weight),
        )
        if op == "conv":
            return tuple(lambda f=f: f(x) for f in convolutions)
        leaf, dy = x.clone().requires_grad_(), torch.randn_like(x)
        outputs = [f(leaf) for f in convolutions]
        return tuple(lambda y=y: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0] for y in outputs)
    norm = [torch.rand(channels, dtype=x.dtype) + 0.5 for _ in range(4)]
    training = op == "train"

    def eager() -> Tensor:
        h = F.gelu(eager_convolution(x, weight, None, groups=channels))
        return F.batch_norm(h, norm[2], norm[3], norm[0], norm[1], training) + x

    return eager, lambda: ck.depthwise_block(x, weight, None, *norm, training=training)


def measure(options: argparse.Namespace) -> Iterator[tuple[str, timing.Timing, timing.Timing]]:
    """A name, eager's time and ours, for each point of the grid."""
    grid = itertools.product(options.threads, options.dtype, LAYOUTS, SHAPES, options.kernels, options.ops)
    for threads, dtype, layout, shape, kernel, op in grid:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        x = torch.randn(shape).to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
        eager, ours = pair(op, x, kernel)
        with torch.set_grad_enabled(op == "input_grad"):
            theirs, mine = timing.interleaved(
                {"eager": eager, "ours": ours}, repeats=options.repeats, warmup=3, device=_CPU
            ).values()
        size = "x".join(map(str, shape))
        yield f"{op:<10} k{kernel} {size:<14} {dtype} {layout:<13} {threads} threads", theirs, mine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks grid", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--kernels", type=int, nargs="+", default=list(KERNELS))
    parser.add_argument("--ops", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args(arguments)
    print(
        f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )
    slower = []
    for name, theirs, mine in measure(options):
        lost = mine.low > theirs.high
        slower += [name] if lost else []
        row = (
            f"eager {1e3 * theirs.median:8.3f} ms  ours {1e3 * mine.median:8.3f} ms  {theirs.median / mine.median:5.2f}"
        )
        print(f"{name}  {row}{'  SLOWER' if lost else ''}", flush=True)
    print(f"eager is faster in {len(slower)} rows")
    return 1 if slower else 0

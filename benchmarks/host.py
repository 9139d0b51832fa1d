# SPDX-License-Identifier: MIT
"""python -m benchmarks host: what Python and the binding cost a mixer layer on a GPU, measured without one.

A stub that computes nothing stands in the place of the native CUDA module and of torch's two products of the backward. What is left is
the host's work: recognising the layer, checks, autograd, allocation, arguments of native calls. Eager PyTorch's layer of 8 channels on a
CPU, whose kernels take next to nothing, is timed in turn with it. The first call of a layer is checked and prepared; the later ones,
which are timed, find it again (convmixer_kernels/prepared.py).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn

import convmixer
import convmixer_kernels as ck
from convmixer_kernels.backends import cuda, cuda_choice, torch_gemm

_LAYERS = 8


class _Stub:
    """A native module whose functions return at once: sizes are small, and wgmma can run."""

    compiler = "none"

    def __getattr__(self, name: str) -> object:
        value = 4 if name.endswith(("_partials", "_workspace", "_tiles")) else name == "pointwise_runs_hopper"
        setattr(self, name, lambda *arguments: value)
        return getattr(self, name)


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Backend "cuda" on CPU tensors, without any arithmetic."""
    native = cuda._Native(_Stub(), None, True)

    def input_grad(da: Tensor, weight: Tensor, rows: bool) -> Tensor:
        return da.new_empty((da.shape[0], weight.shape[1], *da.shape[2:]))

    def weight_grad(da: Tensor, x: Tensor, rows: bool) -> Tensor:
        return da.new_empty((da.shape[1], x.shape[1]), dtype=torch.float32)

    with (
        mock.patch.object(cuda, "_native", lambda: native),  # noqa: PT008  a mock's own call takes microseconds
        mock.patch.object(cuda_choice, "forced_gemm", lambda: "fused"),  # noqa: PT008
        mock.patch.object(torch_gemm, "input_grad", input_grad),
        mock.patch.object(torch_gemm, "weight_grad", weight_grad),
        ck.use_backend("cuda"),
    ):
        cuda._size.cache_clear()
        try:
            yield
        finally:
            cuda._size.cache_clear()


def _layers(make: Callable[..., nn.Sequential], dtype: torch.dtype) -> nn.Sequential:
    return make(8, _LAYERS, 9, 2, 10).to(dtype)[3 : 3 + _LAYERS]


def _one(layers: nn.Sequential, x: Tensor, training: bool) -> dict[str, float]:
    """Seconds of a forward in inference, or of a forward and a backward in training."""
    begin = time.perf_counter()
    if not training:
        with torch.no_grad():
            layers(x)
        return {"eval": time.perf_counter() - begin}
    y = layers(x)
    middle = time.perf_counter()
    y.backward(y.detach())
    end = time.perf_counter()
    for parameter in layers.parameters():
        parameter.grad = None
    return {"train forward": middle - begin, "train backward": end - middle}


def measure(repeats: int) -> dict[str, dict[str, float]]:
    """Medians in microseconds a layer: "eval", "train forward" and "train backward", each of "ours" and of "eager"."""
    found: dict[str, dict[str, list[float]]] = {}
    x = torch.randn(2, 8, 2, 2)
    for training in (False, True):
        ours = _layers(convmixer.ConvMixer, torch.bfloat16).train(training)
        eager = _layers(convmixer.reference.ConvMixer, torch.float32).train(training)
        for _ in range(repeats + 3):
            for name, layers in (("ours", ours), ("eager", eager)):
                source = x.to(next(layers.parameters()).dtype).requires_grad_(training)
                for kind, seconds in _one(layers, source, training).items():
                    found.setdefault(kind, {}).setdefault(name, []).append(1e6 * seconds / _LAYERS)
    return {kind: {name: statistics.median(each[3:]) for name, each in times.items()} for kind, times in found.items()}


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__.partition(": ")[2])
    parser.add_argument("--repeats", type=int, default=300, help="timed calls (300)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("microseconds a layer      ours     eager")
    with stubbed():
        for kind, values in measure(options.repeats).items():
            print(f"{kind:20} {values['ours']:9.1f} {values['eager']:9.1f}")
    return 0

# SPDX-License-Identifier: MIT
"""Shared by the tests: cases, the eager equivalents, and the one comparison (tested in test_helpers.py)."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from emulation.build import build
from torch import Tensor

from convmixer_kernels import _load, dispatch
from convmixer_kernels.backends import cuda, cuda_choice
from convmixer_kernels.primitives import Norm
from convmixer_kernels.testing import eager_convolution, relative_error, within_twice_eager

ACTIVATIONS = {
    "identity": lambda a: a,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
}
BLOCK_TENSORS = ("weight", "bias", "norm_weight", "norm_bias", "running_mean", "running_var")


def assert_twice_eager(name: str, ours: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> None:
    """The twice-eager rule (design: truth is float64) for one tensor; `dtype` is ours.dtype unless given."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, eager has {eager.dtype}"
    error, eager_error = relative_error(ours, exact), relative_error(eager, exact)
    dtype = ours.dtype if dtype is None else dtype
    assert within_twice_eager(error, eager_error, dtype), (
        f"{name}: error {error:.3e}, eager's {eager_error:.3e} ({dtype})"
    )


@functools.cache
def emulated_module() -> ModuleType:
    """The CUDA kernels compiled for the CPU, built on first use."""
    return _load.from_file("_cuda_emulated", build())


def use_cuda(monkeypatch: pytest.MonkeyPatch, emulated: bool = True, gemm: str | None = None) -> str:
    """Sets up backend "cuda" for one test, emulated or on a GPU, with CONVMIXER_CUDA_GEMM=`gemm`. Returns the tensors' device."""
    if emulated:
        native = cuda._Native(emulated_module(), None, True)
        monkeypatch.setattr(cuda, "_native", lambda: native)
    elif (reason := cuda._native().reason) is not None:
        pytest.fail(reason)
    monkeypatch.setattr(cuda, "_size", functools.lru_cache(maxsize=1024)(cuda._size.__wrapped__))
    if gemm is not None:
        monkeypatch.setattr(cuda_choice, "forced_gemm", lambda: gemm)
    return "cpu" if emulated else "cuda"


def skip_unless_it_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the test if the backend cannot run on CPU tensors here; "cuda" is emulated."""
    if backend == "cuda":
        use_cuda(monkeypatch)
    reason = dispatch.load(backend).can_run("depthwise", torch.empty(1, 1, 1, 1), torch.empty(1, 1, 1, 1))
    if reason is not None:
        pytest.skip(reason)


def in_format(t: Tensor, memory_format: str) -> Tensor:
    """t's values as "contiguous", "channels_last", "sliced" (out of a larger buffer) or "expanded" (over N)."""
    if memory_format == "contiguous":
        return t.contiguous()
    if memory_format == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if memory_format == "sliced":
        larger = torch.full((t.shape[0], t.shape[1] + 2, t.shape[2] + 1, t.shape[3] + 3), float("nan"), dtype=t.dtype)
        view = larger[:, 1:-1, 1:, 2:-1]
        return view.copy_(t)
    assert memory_format == "expanded"
    return t[:1].expand(t.shape)


@dataclass(frozen=True)
class Case:
    """One call of an operator."""

    op: str  # depthwise_block, pointwise_block, mixer_layer, depthwise_conv2d
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int] = (9, 9)
    channels_out: int | None = None
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype | None = None
    memory_format: str = "contiguous"
    training: bool = True
    activation: str = "gelu"
    residual: bool = True
    absent: tuple[str, ...] = ()  # tensors that are None
    dilation: tuple[int, int] = (1, 1)  # of depthwise_conv2d

    def __str__(self) -> str:
        k, mode = "x".join(map(str, self.kernel)), "train" if self.training else "eval"
        parts = [
            self.op,
            "x".join(map(str, self.shape)),
            f"k{k}",
            str(self.dtype).split(".")[1],
            self.memory_format,
            mode,
        ]
        parts += [self.activation] if self.activation != "gelu" else []
        parts += [f"out{self.channels_out}"] if self.channels_out else []
        parts += ["d" + "x".join(map(str, self.dilation))] if self.dilation != (1, 1) else []
        parts += ["mixed"] if self.parameter_dtype else []
        parts += [f"no_{name}" for name in self.absent] + ([] if self.residual else ["no_residual"])
        return "-".join(parts)


def make_inputs(case: Case, seed: int = 0) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """x, the operator's further tensors in order, and dy, in the case's dtypes."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    n, c, h, w = case.shape
    c_out = case.channels_out or c
    dtype, parameter_dtype = case.dtype, case.parameter_dtype or case.dtype
    depthwise = [normal(c, 1, *case.kernel) / (case.kernel[0] * case.kernel[1]) ** 0.5, normal(c)]
    depthwise += [normal(c), normal(c), normal(c), normal(c).abs() + 0.5]
    pointwise = [normal(c_out, c, 1, 1) / c**0.5, normal(c_out)]
    pointwise += [normal(c_out), normal(c_out), normal(c_out), normal(c_out).abs() + 0.5]
    x, dy = normal(n, c, h, w), normal(n, c_out if case.op in ("pointwise_block", "mixer_layer") else c, h, w)
    blocks = {
        "depthwise_block": depthwise,
        "pointwise_block": pointwise,
        "mixer_layer": depthwise + pointwise,
        "depthwise_conv2d": depthwise[:2],
    }[case.op]
    tensors = [None if BLOCK_TENSORS[i % 6] in case.absent else t.to(parameter_dtype) for i, t in enumerate(blocks)]
    return in_format(x.to(dtype), case.memory_format), tensors, dy.to(dtype)


def eager(case: Case, x: Tensor, tensors: list[Tensor | None], momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    """The operator as torch users write it. Running statistics are updated in place."""

    def norm(h: Tensor, block: list[Tensor | None]) -> Tensor:
        return F.batch_norm(h, block[4], block[5], block[2], block[3], case.training, momentum, eps)

    act = ACTIVATIONS[case.activation]

    def depthwise(x: Tensor, block: list[Tensor | None]) -> Tensor:
        h = norm(act(eager_convolution(x, block[0], block[1], groups=x.shape[1])), block)
        return h + x if case.residual else h

    def pointwise(x: Tensor, block: list[Tensor | None]) -> Tensor:
        return norm(act(F.conv2d(x, block[0], block[1])), block)

    if case.op == "depthwise_conv2d":
        return eager_convolution(x, tensors[0], tensors[1], groups=x.shape[1], dilation=case.dilation)
    if case.op == "depthwise_block":
        return depthwise(x, tensors)
    if case.op == "pointwise_block":
        return pointwise(x, tensors)
    return pointwise(depthwise(x, tensors[:6]), tensors[6:])


def ours(case: Case, x: Tensor, tensors: list[Tensor | None], backend: str | None) -> Tensor:
    """The operator through the public function."""
    import convmixer_kernels as ck

    options = {"backend": backend}
    if case.op != "depthwise_conv2d":
        options |= {"training": case.training, "activation": case.activation}
    if case.op == "depthwise_block":
        options["residual"] = case.residual
    if case.dilation != (1, 1):
        options["dilation"] = case.dilation
    return getattr(ck, case.op)(x, *tensors, **options)


def run(
    call, x: Tensor, tensors: list[Tensor | None], dy: Tensor, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Forward and backward of `call(x, tensors)`: output, all gradients, running statistics, by name."""
    leaves = [None if t is None else t.clone() for t in tensors]
    for i, t in enumerate(leaves):
        if t is not None and i % 6 < 4:
            t.requires_grad_()
    x = x.detach().requires_grad_()
    context = torch.autocast(x.device.type, dtype=autocast) if autocast else contextlib.nullcontext()
    with context:
        y = call(x, leaves)
    y.backward(dy.to(y.dtype))
    results = {"y": y.detach(), "dx": x.grad}
    for i, t in enumerate(leaves):
        if t is not None:
            name = ("" if len(tensors) <= 6 else "depthwise_" if i < 6 else "pointwise_") + BLOCK_TENSORS[i % 6]
            results[name if i % 6 >= 4 else f"d{name}"] = t if i % 6 >= 4 else t.grad
    return results


def check_case(
    case: Case, backend: str | None, seed: int = 0, device: str = "cpu", pool: int = 128, context=None
) -> None:
    """Checks ours (within `context()`, if given) against float64 by the twice-eager rule: output, every gradient, running
    statistics; and the memory format.

    The rule compares two rounding errors. Over a few numbers their ratio is chance: a case with few channels therefore
    runs with several seeds, until its per-channel vectors have `pool` numbers together (24 seeds at most), and the rule
    is applied to the numbers of all seeds.
    """
    seeds = min(24, -(-pool // min(case.shape[1], case.channels_out or case.shape[1])))
    pooled: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for i in range(seeds):
        for name, triple in _run_case(case, backend, seed + i, device, context).items():
            pooled.setdefault(name, []).append(triple)
    for name, triples in pooled.items():
        results, baseline, exact = (torch.cat([t.flatten() for t in part]) for part in zip(*triples, strict=True))
        assert_twice_eager(f"{case}: {name}", results, baseline, exact, case.dtype)


def _run_case(
    case: Case, backend: str | None, seed: int, device: str, context
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    x, tensors, dy = make_inputs(case, seed)
    exact = run(
        lambda x, t: eager(case, x, t), x.double(), [None if t is None else t.double() for t in tensors], dy.double()
    )
    x, dy = x.to(device), dy.to(device)
    tensors = [None if t is None else t.to(device) for t in tensors]
    mixed = case.dtype if case.parameter_dtype not in (None, case.dtype) else None
    baseline = run(lambda x, t: eager(case, x, t), x, tensors, dy, mixed)
    with contextlib.nullcontext() if context is None else context():
        results = run(lambda x, t: ours(case, x, t, backend), x, tensors, dy)
    assert results.keys() == exact.keys()
    if case.memory_format in ("contiguous", "channels_last") and case.shape[1] > 1:
        expected = torch.channels_last if case.memory_format == "channels_last" else torch.contiguous_format
        assert results["y"].is_contiguous(memory_format=expected)
        assert results["dx"].is_contiguous(memory_format=expected)
    for name in results:
        assert results[name].shape == exact[name].shape, name
    if case.activation == "identity" and case.training:
        # batch norm removes a constant: the exact gradient of the bias is 0, every computed one is rounding
        results = {n: t for n, t in results.items() if not n.endswith("bias") or "norm" in n}
    return {name: (t, baseline[name], exact[name]) for name, t in results.items()}


def check_relu_stops_gradients(backend: ModuleType, dtype: torch.dtype, memory_format: str, device: str) -> None:
    """A gradient that is NaN or infinite where relu is 0 must not be seen: every result has the bits of a gradient of 0 there."""
    shape = (2, 16, 9, 16)
    a, x, dy = (in_format(torch.randn(shape), memory_format).to(device, dtype) for _ in range(3))
    a[0, 3, 4, 5], a[1, 9, 0, 0], a[1, 9, 8, 15] = -0.5, 0.0, -2.0
    clean = dy.clone()
    for at, special in (((0, 3, 4, 5), math.nan), ((1, 9, 0, 0), math.inf), ((1, 9, 8, 15), -math.inf)):
        dy[at], clean[at] = special, 0.0
    vectors = [torch.rand(16, device=device) + 0.5 for _ in range(4)]
    weight, matrix = torch.randn(16, 1, 9, 9, device=device), torch.randn(16, 16, 1, 1, device=device)
    bias, norm = torch.randn(16, device=device), Norm(*vectors, 1e-5)
    sums = tuple(torch.randn(16, device=device) for _ in range(2))
    for of_norm, of_batch in ((norm, sums), (norm, None), (None, None)):
        chain = "relu", of_norm, of_batch

        def gradients(dy: Tensor, chain=chain) -> list[Tensor]:
            dx = backend.depthwise_input_grad(dy, a, weight, *chain, False)
            dw = backend.depthwise_weight_grad(dy, a, x, weight, bias, *chain)
            return [dx, *dw, *backend.pointwise_backward(dy, a, x, matrix, bias, *chain, (True, True, True))]

        for mine, expected in zip(gradients(dy), gradients(clean), strict=True):
            assert expected.isfinite().all()
            assert torch.equal(mine, expected)

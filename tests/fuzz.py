# SPDX-License-Identifier: MIT
"""python -m tests.fuzz --cases 10000: random calls of every operator and of a small model, against float64.

Each backend that can run here takes a share of the cases: "cuda" emulated and "triton" interpreted without a GPU, with small
tensors. A case is drawn from (seed, number) alone, and each failure prints the line that repeats it. The twice-eager rule decides
(convmixer_kernels/testing.py). It compares two rounding errors, so a case that exceeds it is repeated with at least 24 other inputs, and
the rule is applied to all of them together; what exceeds it again is wrong if it does for 200 further inputs. Two kinds of inputs are
ill-conditioned, decide nothing, and are counted apart: if rounding the inputs and each convolution's result changes the exact result as
much, and if eager has no right digit (such as a gradient that is 0 but for rounding) and ours is not ten times worse.

With --wrong, random wrong arguments (fuzz_wrong.py).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from helpers import ACTIVATIONS, BLOCK_TENSORS, Case, in_format, use_cuda
from helpers import eager as eager_operator
from model_helpers import randomize
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import convmixer
import convmixer_kernels as ck
from convmixer_kernels import dispatch
from convmixer_kernels.testing import relative_error, within_twice_eager

OPERATORS = ("depthwise_block", "pointwise_block", "mixer_layer", "depthwise_conv2d", "model")
#: Products of a case's depthwise convolution, at most: the interpreters are thousands of times slower.
WORK = {"cpu": 2e6, "reference": 2e6, "cuda": 6e4, "triton": 2e3}
#: What a kernel may span: the backend's limit.
LARGEST = {"cpu": 1000, "reference": 1000, "cuda": 101, "triton": 101}
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 14, 15, 16, 17, 23, 24, 31, 32, 33, 37, 48, 56, 63, 64, 65, 97)
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 23, 24, 31, 32, 33, 40, 47, 48, 64, 65, 72, 100, 136)
KERNELS = (*range(1, 12), 3, 5, 7, 9, 9, 9, 13, 15, 16, 17, 20, 23, 25, 31, 33, 51, 63, 64, 101)
FORMATS = ("contiguous", "channels_last", "sliced", "expanded", "transposed", "strided", "offset", "planes", "negative")
VALUES = ("normal",) * 8 + ("mean", "tiny", "large", "constant", "zeros", "non-finite")
#: Inputs and numbers that are pooled at least where one input exceeds the rule; inputs at most; and inputs that decide.
POOL, NUMBERS, MOST, MOST_AGAIN = 24, 300, 100, 200


@dataclass(frozen=True)
class Call:
    """One drawn call, without its numbers."""

    op: str
    backend: str
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    dilation: tuple[int, int]
    channels_out: int
    dtype: torch.dtype
    wide: tuple[int, ...]  # the operator's tensors that are float32 beside a 16-bit x
    absent: tuple[int, ...]
    wanted: tuple[int, ...]  # what requires a gradient: 0 is x, i + 1 the operator's tensor i
    x_format: str
    dy_format: str
    formats: tuple[str, ...]  # of the operator's tensors
    values: str
    training: bool
    activation: str
    residual: bool
    momentum: float
    eps: float
    route: str  # "direct", "operator" (torch.ops.convmixer), "autocast"
    gemm: str | None  # CONVMIXER_CUDA_GEMM
    threads: int

    def __str__(self) -> str:
        return " ".join(f"{f.name}={str(getattr(self, f.name)).replace(' ', '')}" for f in fields(self))

    @property
    def tensors(self) -> int:
        """How many tensors the operator takes beside x."""
        return {"depthwise_conv2d": 2, "mixer_layer": 12, "model": 0}.get(self.op, 6)

    def case(self) -> Case:
        """What helpers.py knows of this call."""
        return Case(
            self.op,
            self.shape,
            self.kernel,
            None,
            self.dtype,
            None,
            "",
            self.training,
            self.activation,
            self.residual,
            dilation=self.dilation,
        )


def draw(seed: int, number: int, backend: str) -> Call:
    rng = random.Random(f"{seed} {number}")
    op = rng.choice(OPERATORS)
    training = rng.random() < 0.5
    activation = rng.choice(("gelu", "gelu", "gelu_tanh", "relu", "identity"))
    while True:
        n, c, h, w = rng.choice((0, 1, 1, 2, 2, 3, 5)), rng.choice(CHANNELS), rng.choice(SIZES), rng.choice(SIZES)
        k = rng.choice(KERNELS)
        kernel = (k, k) if rng.random() < 0.6 else (k, rng.choice(KERNELS))
        channels_out = c if rng.random() < 0.5 else rng.choice(CHANNELS)
        kernel = (1, 1) if op == "pointwise_block" else kernel
        dilated = op == "depthwise_conv2d" and rng.random() < 0.5
        dilation = (rng.choice((1, 1, 2, 3, 4, 7)), rng.choice((1, 1, 2, 3, 5))) if dilated else (1, 1)
        products = max(1, n) * c * h * w * (kernel[0] * kernel[1] + (0 if op.startswith("depthwise") else channels_out))
        # statistics of fewer values than these are all rounding
        span = max(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
        if span > LARGEST[backend]:
            continue
        if products <= WORK[backend] and (not training or op == "depthwise_conv2d" or n == 0 or n * h * w >= 4):
            break
    # triton's interpreter computes bfloat16 wrongly; of float64 there is no wider truth, test_operators.py has gradcheck
    dtypes = [torch.float32, torch.float32, torch.float16] + [torch.bfloat16] * (backend != "triton")
    dtype = rng.choice(dtypes)
    if op == "model":
        # torch's own convolutions run the reference's model and must return (testing.never_returns); two patches at least
        kernel = kernel if dtype in (torch.float32, torch.float64) else (min(kernel[0], 13), min(kernel[1], 13))
        n = max(2, n)
    # "cuda" puts zeros between the taps of a dilated kernel: what is not finite reaches the outputs between them too
    spreads = backend == "cuda" and dilation != (1, 1)
    count = {"depthwise_conv2d": 2, "mixer_layer": 12, "model": 0}.get(op, 6)
    narrow = dtype in (torch.float16, torch.bfloat16)
    wide_style = rng.choice(("none", "all", "some")) if narrow else "none"
    wide = tuple(i for i in range(count) if wide_style == "all" or (wide_style == "some" and rng.random() < 0.5))
    absent = {i for i in range(count) if i % 6 in (1, 2, 3) and rng.random() < 0.15}
    for statistics in range(4, count, 6):
        if training and rng.random() < 0.15:
            absent |= {statistics, statistics + 1}
    everything = [0, *(i + 1 for i in range(count) if i % 6 < 4 and i not in absent)]
    share = rng.choice((1.0, 1.0, 0.5, 0.0))
    route = "autocast" if dtype == torch.float32 and op != "model" and rng.random() < 0.08 else "direct"
    route = "operator" if route == "direct" and op != "model" and rng.random() < 0.2 else route
    return Call(
        op,
        backend,
        (n, c, h, w),
        kernel,
        dilation,
        channels_out if op in ("pointwise_block", "mixer_layer") else c,
        dtype,
        wide,
        tuple(sorted(absent)),
        tuple(i for i in everything if rng.random() < share),
        rng.choice(FORMATS[:2] * 3 + FORMATS),
        rng.choice(FORMATS[:2] * 2 + FORMATS[:-1] + ("everywhere",)),
        tuple(rng.choice(("contiguous",) * 4 + ("strided", "offset", "expanded", "transposed")) for _ in range(count)),
        rng.choice(VALUES[: -1 if spreads else None]),
        training,
        activation,
        op != "depthwise_block" or rng.random() < 0.7,
        rng.choice((0.1, 0.1, 0.0, 1.0, 0.37)),
        rng.choice((1e-5, 1e-5, 1e-3, 0.1, 1.0)),
        route,
        rng.choice((None, "fused", "wgmma", "torch", "layer")) if backend == "cuda" else None,
        rng.choice((1, 2, 2, 3)),
    )


def laid_out(t: Tensor, how: str) -> Tensor:
    """t's values (some repeated by "expanded", "planes" and "everywhere") with other strides or another offset."""
    if how == "contiguous":
        return t.contiguous()
    if how == "negative":
        return torch._neg_view(-t)
    if how == "offset":
        held = torch.full((t.numel() + 3,), math.nan, dtype=t.dtype, device=t.device)
        return held[3:].view(t.shape).copy_(t)
    if how == "strided":
        held = torch.full((*t.shape, 2), math.nan, dtype=t.dtype, device=t.device)
        return held[..., 1].copy_(t)
    if how == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else laid_out(t, "strided")
    if how == "planes":
        return t[..., :1, :1].expand(t.shape)
    if how == "everywhere":
        return t.flatten()[:1].view(1, 1, 1, 1).expand(t.shape) if t.numel() else t
    if how == "expanded" or t.dim() != 4:
        return t[:1].expand(t.shape)
    return in_format(t, how)


def _with_values(x: Tensor, call: Call, generator: torch.Generator) -> Tensor:
    half = call.dtype == torch.float16
    if call.values == "mean":
        return x + (100 if half else 1e4)
    if call.values == "tiny":
        return x * (1e-3 if half else 1e-20)
    if call.values == "large":
        return x * (30 if half else 1e4)
    if call.values == "constant":
        return x[:, :, :1, :1].expand(x.shape)
    if call.values == "zeros":
        return x * 0
    if call.values == "non-finite" and x.numel():
        x = x.clone()
        for value in (math.nan, math.inf, -math.inf)[: int(torch.randint(1, 4, (), generator=generator))]:
            x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = value
    return x


def make(call: Call, seed: int) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """x, the operator's tensors and dy, in the call's dtypes and layouts."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def block(channels: int, weight: Tensor) -> list[Tensor]:
        vectors = [normal(channels) for _ in range(5)]
        return [weight, *vectors[:4], vectors[4].abs() + 0.5]

    (n, c, h, w), c_out = call.shape, call.channels_out
    x = _with_values(normal(*call.shape), call, g)
    depthwise = block(c, normal(c, 1, *call.kernel) / math.prod(call.kernel) ** 0.5)
    pointwise = block(c_out, normal(c_out, c, 1, 1) / c**0.5)
    made = {"pointwise_block": pointwise, "mixer_layer": depthwise + pointwise}.get(call.op, depthwise)
    tensors: list[Tensor | None] = []
    for i, t in enumerate(made[: call.tensors]):
        how = call.formats[i]
        if i % 6 >= 4 and how == "expanded":
            # channels that update one element in turn: test_state.py
            how = "contiguous"
        dtype = torch.float32 if i in call.wide else call.dtype
        tensors.append(None if i in call.absent else laid_out(t.to(dtype), how))
    dy = laid_out(normal(n, c_out, h, w).to(call.dtype), call.dy_format)
    return laid_out(x.to(call.dtype), call.x_format), tensors, dy


class _Operators(TorchDispatchMode):
    """Does nothing, and makes functional.py call the registered operators."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _ours(call: Call, x: Tensor, tensors: list[Tensor | None]) -> Tensor:
    options: dict = {"backend": call.backend}
    if call.op != "depthwise_conv2d":
        options |= {"training": call.training, "activation": call.activation}
        options |= {"momentum": call.momentum, "eps": call.eps}
    else:
        options["dilation"] = call.dilation
    if call.op == "depthwise_block":
        options["residual"] = call.residual
    with _Operators() if call.route == "operator" else contextlib.nullcontext():
        return getattr(ck, call.op)(x, *tensors, **options)


def _eager(call: Call, x: Tensor, tensors: list[Tensor | None]) -> Tensor:
    """helpers.eager with this call's eps and momentum; mixed dtypes as autocast's: norms in float32, convolutions in x's."""

    def same(i: int, t: Tensor | None) -> Tensor | None:
        return (
            t
            if t is None
            else t.to(x.dtype)
            if i % 6 < 2
            else t.float()
            if call.wide and x.dtype != torch.float64
            else t
        )

    taken = [same(i, t) for i, t in enumerate(tensors)]
    y = eager_operator(call.case(), x, taken, call.momentum, call.eps)
    with torch.no_grad():
        for i, (t, used) in enumerate(zip(tensors, taken, strict=True)):
            if i % 6 >= 4 and t is not None and used is not t:
                t.copy_(used)
    return y


def _run(call: Call, function: Callable, x: Tensor, tensors: list[Tensor | None], dy: Tensor) -> dict[str, Tensor]:
    """Output, wanted gradients and statistics of function(call, x, tensors)."""
    leaves = [None if t is None else t.detach() for t in (x, *tensors)]
    for i in call.wanted:
        leaves[i].requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=call.route == "autocast" and x.dtype != torch.float64):
        y = function(call, leaves[0], leaves[1:])
    results = {"y": y.detach()}
    if call.wanted:
        y.backward(dy.to(y.dtype))
    for i, t in enumerate(leaves):
        name = "x" if i == 0 else ("p_" if i > 6 else "d_" if len(tensors) > 6 else "") + BLOCK_TENSORS[(i - 1) % 6]
        if i in call.wanted:
            results[f"gradient of {name}"] = t.grad
        elif i > 0 and (i - 1) % 6 >= 4 and t is not None:
            results[name] = t
    return results


def _model(call: Call, seed: int, dtype: torch.dtype, ours: bool, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    make_model = convmixer.ConvMixer if ours else convmixer.reference.ConvMixer
    patch = 2 if min(call.shape[2:]) > 1 else 1
    size = {
        "dim": call.shape[1],
        "depth": 1 + call.threads % 2,
        "kernel_size": call.kernel,
        "patch_size": patch,
        "n_classes": 24,
    }
    model = (
        randomize(make_model(**size, in_chans=3, activation=call.activation), seed).to(call.dtype).to(x.device, dtype)
    )
    model.train(call.training)
    x = x.detach().requires_grad_(bool(call.wanted) and 0 in call.wanted)
    backend = ck.use_backend(call.backend) if ours else contextlib.nullcontext()
    # on some CPUs oneDNN's 16-bit convolution of a patch is wrong (torch 2.13), in our model as in the reference
    mkldnn = torch.backends.mkldnn.flags(enabled=dtype in (torch.float32, torch.float64))
    with torch.set_grad_enabled(bool(call.wanted)), backend, mkldnn:
        y = model(x)
        results = {"y": y.detach()}
        if call.wanted:
            y.backward(dy.to(y))
            results |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
            results |= {"gradient of x": x.grad} if x.requires_grad else {}
    return results | {n: t for n, t in model.named_buffers() if t.is_floating_point()}


def _image(call: Call, seed: int) -> tuple[Tensor, Tensor]:
    n, _, h, w = call.shape
    g = torch.Generator().manual_seed(seed)
    x = _with_values(torch.randn(n, 3, h, w, generator=g, dtype=torch.float64), call, g).to(call.dtype)
    return laid_out(x, call.x_format), torch.randn(n, 24, generator=g, dtype=torch.float64)


def _rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t with each value moved by up to one rounding step of dtype."""
    step = torch.finfo(dtype).eps / 2
    return t.detach() * (1 + step * (2 * torch.rand(t.shape, dtype=torch.float64, device=t.device) - 1))


def _rounded_sums(a: Tensor, dtype: torch.dtype) -> Tensor:
    """a with each channel moved by up to a rounding step of its values' size: of a bias beside large values, all roundings are alike.
    And each value by one of float32, in which sums and means are kept: planes that are constant are so but for rounding."""
    size = a.detach().square().mean((0, 2, 3), keepdim=True).sqrt()
    channels, values = torch.finfo(dtype).eps / 2 * size, torch.finfo(torch.float32).eps / 2 * size
    return a + channels * (2 * torch.rand_like(size) - 1) + values * (2 * torch.rand_like(a) - 1)


@contextlib.contextmanager
def _rounding_convolutions(call: Call) -> Iterator[None]:
    """Inside, the equivalent rounds what its activations get, as every implementation does."""
    dtype = torch.bfloat16 if call.route == "autocast" else call.dtype
    with pytest.MonkeyPatch.context() as patch:
        act = ACTIVATIONS[call.activation]
        patch.setitem(ACTIVATIONS, call.activation, lambda a: act(_rounded_sums(a, dtype)))
        for kind in (torch.nn.GELU, torch.nn.ReLU, torch.nn.Identity):
            forward = kind.forward
            patch.setattr(kind, "forward", lambda self, a, forward=forward: forward(self, _rounded_sums(a, dtype)))
        yield


class Wrong(Exception):
    """A result breaks a rule that rounding does not explain."""


def _on(t: Tensor | None, device: str) -> Tensor | None:
    return t if t is None or device == "cpu" else t.to(device)


def _snapshot(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().resolve_neg().clone().cpu()


def _same_bits(t: Tensor | None, other: Tensor | None) -> bool:
    if t is None or other is None:
        return t is other
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize]
    return torch.equal(*(part.detach().resolve_neg().cpu().contiguous().view(integer) for part in (t, other)))


def results_of(call: Call, seed: int, device: str, perturbed: bool = False) -> tuple[dict[str, Tensor], ...]:
    """Ours, eager's and the exact results, by name; with `perturbed` the exact ones for rounded inputs too."""
    if call.op == "model":
        x, dy = _image(call, seed)
        ours = _model(call, seed, call.dtype, True, _on(x, device), dy)
        eager = _model(call, seed, call.dtype, False, _on(x, device), dy)
        exact = _model(call, seed, torch.float64, False, x.double(), dy)
        if not perturbed:
            return ours, eager, exact
        with _rounding_convolutions(call):
            return ours, eager, exact, _model(call, seed, torch.float64, False, _rounded(x.double(), call.dtype), dy)
    x, tensors, dy = (
        _on(x, device) if isinstance(x, Tensor) else [_on(t, device) for t in x] for x in make(call, seed)
    )
    statistics = {i for i in range(len(tensors)) if i % 6 >= 4 and call.training}
    before = [_snapshot(t) for t in (x, dy, *tensors)]
    doubles = [None if t is None else t.detach().double() for t in tensors]
    copies = [None if t is None else t.detach().clone() for t in tensors]
    exact = _run(call, _eager, x.double(), doubles, dy.double())
    eager = _run(call, _eager, x.detach().clone(), copies, dy)
    ours = _run(call, _ours, x, tensors, dy)
    for i, (t, old) in enumerate(zip((x, dy, *tensors), before, strict=True)):
        if i - 2 not in statistics and not _same_bits(t, old):
            raise Wrong(f"the call changed {'x' if i == 0 else 'dy' if i == 1 else BLOCK_TENSORS[(i - 2) % 6]}")
    if call.x_format in ("contiguous", "channels_last") and min(call.shape) > 1 and call.shape[2:] != (1, 1):
        layout = torch.channels_last if call.x_format == "channels_last" else torch.contiguous_format
        if not ours["y"].is_contiguous(memory_format=layout):
            raise Wrong(f"y is not {call.x_format}: strides {ours['y'].stride()}")
    if not perturbed:
        return ours, eager, exact
    x, tensors, dy = make(call, seed)
    dtype = torch.bfloat16 if call.route == "autocast" else call.dtype
    doubles = [None if t is None else _rounded(t.double(), dtype) for t in tensors]
    with _rounding_convolutions(call):
        moved = _run(call, _eager, _rounded(x.double(), dtype), doubles, _rounded(dy.double(), dtype))
    return ours, eager, exact, moved


def _comparable(name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The values that the rule compares, flat and in float64: where float64 and eager are finite. Elsewhere ours must be what one of
    them is."""
    if ours.shape != exact.shape:
        raise Wrong(f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}")
    dtype = ours.dtype
    ours, eager, exact = (t.detach().double().cpu().flatten() for t in (ours, eager, exact))
    finite = exact.isfinite() & eager.isfinite()
    if not finite.all():
        # an exact value beyond the dtype's largest is infinite in it
        narrow = exact.to(dtype).double()
        allowed = [(ours == t) | (ours.isnan() & t.isnan()) for t in (exact, narrow, eager)]
        # eager overflows and ours does not
        allowed.append(exact.isfinite() & ours.isfinite())
        if not (finite | torch.stack(allowed).any(0)).all():
            at = int((~(finite | torch.stack(allowed).any(0))).nonzero()[0])
            raise Wrong(f"{name}[{at}] = {ours[at]}, float64 has {exact[at]}, eager {eager[at]}")
    return ours[finite], eager[finite], exact[finite]


def _errors(ours: Tensor, eager: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative errors; absolute ones where every exact value is 0."""
    if exact.any() or not ours.isfinite().all():
        return relative_error(ours, exact), relative_error(eager, exact)
    return float(ours.norm()), float(eager.norm())


def check(call: Call, number: int, device: str) -> str | None:
    """Runs the call. Returns None, or "ill-conditioned" where no rule decides.

    Raises:
        Wrong: the results are wrong.
    """
    torch.set_num_threads(call.threads)
    dtype = torch.bfloat16 if call.route == "autocast" else call.dtype

    def exceeds(name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> bool:
        error, allowed = _errors(ours, eager, exact)
        return not within_twice_eager(error, allowed, dtype)

    ours, eager, exact = results_of(call, number, device)
    if ours.keys() != exact.keys():
        raise Wrong(f"results {sorted(ours)}, expected {sorted(exact)}")
    for name, t in ours.items():
        if t is None or t.dtype != eager[name].dtype:
            raise Wrong(f"{name}: {None if t is None else t.dtype}, eager has {eager[name].dtype}")
    found = [n for n in ours if exceeds(n, *_comparable(n, ours[n], eager[n], exact[n]))]
    if not found:
        return None
    fewest = min(max(1, exact[name].numel()) for name in found)
    inputs = min(MOST, max(POOL, -(-NUMBERS // fewest)))
    ill, first = False, number + 1_000_003
    # one of many results exceeds the rule by chance: what exceeds it is asked again, with other inputs
    for count in (inputs, MOST_AGAIN):
        pool = [results_of(call, first + 1_000_003 * i, device, perturbed=True) for i in range(count)]
        first += 1_000_003 * count
        wrong: dict[str, str] = {}
        for name in found:
            rows = [_comparable(name, *(part[name] for part in parts[:3])) for parts in pool]
            ours_all, eager_all, exact_all = (torch.cat(column) for column in zip(*rows, strict=True))
            if not exceeds(name, ours_all, eager_all, exact_all):
                continue
            moved = torch.cat([_comparable(name, parts[3][name], parts[1][name], parts[2][name])[0] for parts in pool])
            error, allowed = _errors(ours_all, eager_all, exact_all)
            if error <= 2 * _errors(moved, moved, exact_all)[0] or (allowed > 0.1 and error <= 10 * allowed):
                ill = True
                continue
            wrong[name] = f"{name}: error {error:.2e}, eager's {allowed:.2e} over {count} inputs"
        found = list(wrong)
    if wrong:
        raise Wrong("; ".join(wrong.values()))
    return "ill-conditioned" if ill else None


def device_of(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def prepared(backend: str, gemm: str | None = None) -> Iterator[None]:
    """Fills torch.empty* with NaN, emulates "cuda" if there is no GPU, and restores all of it."""
    from convmixer_kernels.backends import cuda_choice

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        if backend == "cuda":
            use_cuda(patch, emulated=device_of("cuda") == "cpu")
            patch.setattr(cuda_choice, "forced_gemm", lambda: gemm)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)


def run_case(seed: int, number: int, backend: str) -> str | None:
    """None, "ill-conditioned", or why the case failed."""
    call = draw(seed, number, backend)
    try:
        with prepared(backend, call.gemm):
            return check(call, number, device_of(backend))
    except Wrong as error:
        return f"{error} ({call})"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} at {Path(where.filename).name}:{where.lineno} ({call})"


def fuzz(seed: int, numbers: range, backend: str, one: Callable, flags: str = "") -> list[str]:
    """Runs one(seed, number, backend) for each number, prints failures and counts. Returns the failures."""
    counts: collections.Counter[str] = collections.Counter()
    failures, begin = [], time.monotonic()
    for number in numbers:
        result = one(seed, number, backend)
        kind = result if result in (None, "ill-conditioned") else "failed"
        counts[kind or "passed"] += 1
        if kind == "failed":
            failures.append(
                f"python -m tests.fuzz {flags}--seed {seed} --case {number} --backend {backend}  # {result}"
            )
            print(failures[-1], flush=True)
    told = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    print(f"{backend}: {len(numbers)} cases of seed {seed}: {told} in {time.monotonic() - begin:.0f} s", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="for each backend; cuda and triton get a hundredth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this case alone")
    parser.add_argument("--backend", choices=dispatch.BACKENDS, help="this backend alone, with all cases")
    parser.add_argument("--wrong", action="store_true", help="wrong arguments instead")
    options = parser.parse_args()
    if options.wrong:
        from fuzz_wrong import run_case as one
    else:
        one = run_case
    failures = []
    for backend in [options.backend] if options.backend else dispatch.BACKENDS:
        slow = options.backend is None and backend in ("cuda", "triton")
        count = -(-options.cases // 100) if slow else options.cases
        numbers = range(count) if options.case is None else range(options.case, options.case + 1)
        if backend != "cuda" and (reason := _missing(backend)) is not None:
            print(f"{backend}: no case, {reason}")
            continue
        failures += fuzz(options.seed, numbers, backend, one, "--wrong " if options.wrong else "")
    return 1 if failures else 0


def _missing(backend: str) -> str | None:
    """Why no case runs on this backend, or None."""
    one = torch.empty(1, 1, 1, 1, device=device_of(backend))
    return dispatch.load(backend).can_run("depthwise", one, one)


if __name__ == "__main__":
    sys.exit(main())

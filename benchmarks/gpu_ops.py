# SPDX-License-Identifier: MIT
"""What benchmarks.gpu measures of kernels: peaks of the device, and every kernel beside its floor and eager PyTorch.

Bytes: every activation-sized tensor read or written once. eval x + y; train (with statistics) x + a; input grad
dy + a + dx; weight grad x + dy + a; normalize a + x + y; norm backward dy + a; pointwise eval x + y; pointwise backward
2 (dy + a) + x + dx; mixer eval (both blocks) x + y. "ours" lets backends/cuda_choice.py choose the kernels of a pointwise forward and
of an eval layer; "ours fused", "ours torch", "ours wgmma" and "ours layer" force CONVMIXER_CUDA_GEMM's choices, so that one run
decides between them. FLOPs: 2 a multiply-add, nominal, padding taps included. floor = max(bytes / copy bandwidth,
FLOPs / matrix product of the dtype); for depthwise in float32 the matrix product without tf32 stands for the FMA peak;
in 16-bit its arithmetic is left out.
Eager's input gradient is its whole chain (batch norm's backward, activation's, convolution's, the residual's sum); its
weight gradient is the convolution's alone: the chain before it has been paid already.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from convmixer_kernels.backends import cuda, cuda_choice, reference, triton
from convmixer_kernels.primitives import MixerEval, Norm
from convmixer_kernels.testing import relative_error, within_twice_eager

if TYPE_CHECKING:
    from benchmarks.gpu import Run

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_SECONDS_PER_ROW = 0.2
_CHECKED_CHANNELS = 8
BACKENDS = {"cuda": cuda, "triton": triton}


# ---- timing -------------------------------------------------------------------------------------------------------


def _elapsed(call: Callable[[], object]) -> float:
    """Microseconds of one call by CUDA events."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return 1e3 * start.elapsed_time(stop)


def _graph_of(call: Callable[[int], object], times: int) -> tuple[Callable[[], object] | None, str | None]:
    """`times` calls as one CUDA graph, so that Python's pace is not measured; or None and why they cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    kept = []
    try:
        with torch.cuda.graph(graph):
            kept = [call(i) for i in range(times)]
    except RuntimeError as error:
        torch.cuda.synchronize()
        return None, str(error).splitlines()[0][:200]
    del kept
    return graph.replay, None


def _host_us(call: Callable[[int], object], calls: int = 10) -> float:
    """Microseconds of Python and launches for a call, while the GPU works through what was launched before."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(calls):
        call(i)
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * taken / calls


def measure(
    call: Callable[[int], object], seconds: float = _SECONDS_PER_ROW, capture: bool = True
) -> dict[str, object]:
    """Median, 20 % and 80 % quantiles in microseconds of call(i), i counting up for the buffers' rotation.

    The calls are timed as one CUDA graph: "calls" of them in one replay; 0 where they could not be captured, and
    "not_captured" says why. "host_us" is what the host needs to launch one call.
    """
    for i in range(3):
        call(i)
    torch.cuda.synchronize()
    estimate = min(_elapsed(lambda: call(0)) for _ in range(2))
    host = _host_us(call, max(1, min(10, round(1e6 * seconds / estimate / 4))))
    inner = max(1, min(50, round(400 / estimate)))
    replay, reason = _graph_of(call, inner) if capture else (None, None)
    if replay is not None:
        replay()
        torch.cuda.synchronize()
        estimate = min(_elapsed(replay) for _ in range(2)) / inner
    else:
        inner = 0
    repeats = int(max(5, min(200, 1e6 * seconds / (estimate * max(1, inner)))))
    count = iter(range(1, repeats + 1))
    times = [_elapsed(replay or (lambda: call(next(count)))) / max(1, inner) for _ in range(repeats)]
    low, _, _, high = statistics.quantiles(times, n=5, method="inclusive")
    found = {"median_us": statistics.median(times), "q20_us": low, "q80_us": high, "repeats": repeats, "calls": inner}
    found["host_us"] = host
    return found if reason is None else {**found, "not_captured": reason}


def peaks(run: Run) -> None:
    """Copy bandwidth (bytes read and written) and matrix products of this device, in this run."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    copy = min(measure(lambda i: target.copy_(source), 0.2, False)["q20_us"] for _ in range(2))
    found = {"copy_bytes_per_s": 2e6 * source.numel() / copy}
    for name, size in (("bfloat16", 8192), ("float16", 8192), ("float32", 4096)):
        dtype = getattr(torch, name)
        left, right = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        best = measure(lambda i, m=left, k=right: torch.mm(m, k), 0.2, False)["q20_us"]
        found[f"{name}_flops_per_s"] = 2e6 * size**3 / best
    run.note("peaks", found)


# ---- one case -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpCase:
    """One primitive at one size."""

    op: str
    shape: tuple[int, int, int, int]  # N, C, H, W
    kernel: int
    dtype: torch.dtype
    layout: str

    def to_json(self) -> list[object]:
        return [self.op, self.shape, self.kernel, str(self.dtype).removeprefix("torch."), self.layout]

    @staticmethod
    def from_json(op: str, shape: list[int], kernel: int, dtype: str, layout: str) -> OpCase:
        return OpCase(op, tuple(shape), kernel, getattr(torch, dtype), layout)

    @property
    def label(self) -> str:
        kernel = f" k{self.kernel}" if self.op.startswith(("depthwise", "mixer")) else ""
        return f"{self.op}{kernel} {'x'.join(map(str, self.shape))}"


class Tensors:
    """A case's inputs: several sets of activations, more than the L2 cache holds, and one set of parameters."""

    def __init__(self, case: OpCase, sets: int | None = None, device: str = "cuda") -> None:
        n, c, h, w = case.shape
        k = case.kernel
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        if sets is None:
            size = n * c * h * w * case.dtype.itemsize
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            sets = max(2, min(32, -(-2 * cache // (3 * size))))
        self.sets = [[normal(n, c, h, w).to(memory_format=LAYOUTS[case.layout]) for _ in range(3)] for _ in range(sets)]
        self.depthwise, self.pointwise = normal(c, 1, k, k) / k, normal(c, c, 1, 1) / c**0.5
        self.bias = normal(c)
        self.running = normal(c, dtype=torch.float32), torch.rand(c, device=device) + 0.5
        self.norm = Norm(normal(c, dtype=torch.float32), torch.rand(c, device=device) + 0.5, normal(c), normal(c), 1e-5)
        self.sums = normal(c, dtype=torch.float32), normal(c, dtype=torch.float32)
        # a layer's depthwise block, whose channels all count in each of its outputs
        self.lower = self.depthwise, self.bias, self.norm
        # as in a model of this dtype
        self.eager_norm = [t.to(case.dtype) for t in self.norm[:4]]
        self.rstd = torch.rsqrt(self.norm.var + self.norm.eps)

    def set(self, i: int) -> list[Tensor]:
        """x, a, dy"""
        return self.sets[i % len(self.sets)]

    def channels(self, kept: Tensor) -> Tensors:
        """The same with only these channels (N, kept, H, W); the pointwise weight keeps them as outputs."""
        part = object.__new__(Tensors)
        layout = torch.contiguous_format if self.sets[0][0].is_contiguous() else torch.channels_last
        part.sets = [[t[:, kept].contiguous(memory_format=layout) for t in self.sets[0]]]
        part.depthwise, part.pointwise, part.bias = self.depthwise[kept], self.pointwise[kept], self.bias[kept]
        part.running = tuple(t[kept] for t in self.running)
        part.norm = Norm(*(t[kept] for t in self.norm[:4]), self.norm.eps)
        part.sums = tuple(t[kept] for t in self.sums)
        part.lower = self.lower
        return part

    def double(self) -> Tensors:
        """The same in float64."""
        wide = object.__new__(Tensors)
        wide.sets = [[t.double() for t in some] for some in self.sets]
        for name in ("depthwise", "pointwise", "bias"):
            setattr(wide, name, getattr(self, name).double())
        wide.running = tuple(t.double() for t in self.running)
        wide.norm = Norm(*(t.double() for t in self.norm[:4]), self.norm.eps)
        wide.sums = tuple(t.double() for t in self.sums)
        weight, bias, norm = self.lower
        wide.lower = weight.double(), bias.double(), Norm(*(t.double() for t in norm[:4]), norm.eps)
        return wide


def ours(op: str, backend, t: Tensors, i: int = 0):
    """The primitive of `backend` that a case names."""
    x, a, dy = t.set(i)
    if op == "depthwise_eval":
        return backend.depthwise_eval(x, t.depthwise, t.bias, "gelu", t.norm, True)
    if op == "depthwise_train":
        return backend.depthwise_train(x, t.depthwise, t.bias, "gelu")
    if op == "depthwise_input_grad":
        return backend.depthwise_input_grad(dy, a, t.depthwise, "gelu", t.norm, t.sums, True)
    if op == "depthwise_weight_grad":
        return backend.depthwise_weight_grad(dy, a, x, t.depthwise, t.bias, "gelu", t.norm, t.sums)
    if op == "normalize":
        return backend.normalize(a, "gelu", t.norm, x)
    if op == "norm_backward":
        return backend.norm_backward(dy, a, "gelu", t.norm)
    if op == "pointwise_eval":
        return backend.pointwise_eval(x, t.pointwise, t.bias, "gelu", t.norm)
    if op == "pointwise_train":
        return backend.pointwise_train(x, t.pointwise, t.bias, "gelu")
    if op == "mixer_eval":
        layer = MixerEval("gelu", t.lower, (t.pointwise, t.bias, t.norm))
        y = backend.mixer_eval(x, (layer,), True) if hasattr(backend, "mixer_eval") else None
        if y is not None:
            return y
        (weight, bias, norm), upper = layer.depthwise, layer.pointwise
        z = backend.depthwise_eval(x, weight, bias, "gelu", norm, True)
        return backend.pointwise_eval(z, *upper[:2], "gelu", upper[2])
    assert op == "pointwise_backward"
    return backend.pointwise_backward(dy, a, x, t.pointwise, t.bias, "gelu", t.norm, t.sums, (True, True, True))


def eager(op: str, t: Tensors, i: int, layout: str) -> Callable[[], object]:
    """What eager PyTorch runs for the same result, on the i-th set in `layout`."""
    x, a, dy = t.set(i)
    depthwise = op.startswith("depthwise")
    weight, groups = (t.depthwise, x.shape[1]) if depthwise else (t.pointwise, 1)
    k = weight.shape[-1] // 2
    mean, var, gamma, beta = t.eager_norm
    eps = t.norm.eps

    def convolution_backward(da: Tensor, mask: list[bool]):
        # positional: bias sizes, stride, padding, dilation, transposed, output padding
        return torch.ops.aten.convolution_backward(
            da, x, weight, [x.shape[1]], [1, 1], [k, k], [1, 1], False, [0, 0], groups, mask
        )

    def activation_backward():
        h = F.gelu(a)
        dh, *_ = torch.ops.aten.native_batch_norm_backward(
            dy, h, gamma, None, None, t.norm.mean, t.rstd, True, eps, [True, True, True]
        )
        return torch.ops.aten.gelu_backward(dh, a)

    def evaluate():
        h = F.gelu(F.conv2d(x, weight, t.bias, padding=k, groups=groups))
        y = F.batch_norm(h, mean, var, gamma, beta, False, 0.1, eps)
        return y + x if depthwise else y

    def evaluate_layer():
        weight, bias, norm = t.lower
        h = F.gelu(F.conv2d(x, weight, bias, padding="same", groups=x.shape[1]))
        z = F.batch_norm(h, *(v.to(h.dtype) for v in norm[:4]), False, 0.1, eps) + x
        return F.batch_norm(F.gelu(F.conv2d(z, t.pointwise, t.bias)), mean, var, gamma, beta, False, 0.1, eps)

    def train():
        h = F.gelu(F.conv2d(x, weight, t.bias, padding=k, groups=groups))
        return torch.batch_norm_stats(h, eps)

    return {
        "depthwise_eval": evaluate,
        "depthwise_train": train,
        "depthwise_input_grad": lambda: convolution_backward(activation_backward(), [True, False, False])[0] + dy,
        "depthwise_weight_grad": lambda: convolution_backward(a, [False, True, True]),
        "normalize": lambda: F.batch_norm(F.gelu(a), mean, var, gamma, beta, False, 0.1, eps) + x,
        "norm_backward": lambda: torch.ops.aten.native_batch_norm_backward(
            dy, F.gelu(a), gamma, None, None, t.norm.mean, t.rstd, True, eps, [False, True, True]
        ),
        "pointwise_eval": evaluate,
        "mixer_eval": evaluate_layer,
        "pointwise_train": train,
        "pointwise_backward": lambda: convolution_backward(activation_backward(), [True, True, True]),
    }[op]


#: activation-sized tensors read or written, and convolutions done
_PASSES = {
    "depthwise_eval": (2, 1),
    "depthwise_train": (2, 1),
    "depthwise_input_grad": (3, 1),
    "depthwise_weight_grad": (3, 1),
    "normalize": (3, 0),
    "norm_backward": (2, 0),
    "pointwise_eval": (2, 1),
    "pointwise_train": (2, 1),
    "pointwise_backward": (6, 2),
    "mixer_eval": (2, 1),
}


def _floor(case: OpCase, found: dict[str, float]) -> dict[str, float]:
    n, c, h, w = case.shape
    passes, convolutions = _PASSES[case.op]
    taps = 0 if case.op.startswith("pointwise") else case.kernel**2
    taps += 0 if case.op.startswith("depthwise") else c
    size, flops = passes * n * c * h * w * case.dtype.itemsize, convolutions * 2 * n * c * h * w * taps
    floor = size / found["copy_bytes_per_s"]
    name = str(case.dtype).removeprefix("torch.")
    if case.dtype == torch.float32 or not case.op.startswith("depthwise"):
        floor = max(floor, flops / found[f"{name}_flops_per_s"])
    return {"bytes": size, "flops": flops, "floor_us": 1e6 * floor}


def eager_weight_grad(t: Tensors) -> tuple[Tensor, Tensor]:
    """dw and db as eager PyTorch computes them from da, which is rounded to the dtype there."""
    x, a, dy = t.set(0)
    da = reference._da(dy, a, "gelu", t.norm, t.sums).to(x.dtype)
    c, k = x.shape[1], t.depthwise.shape[-1] // 2
    _, dw, db = torch.ops.aten.convolution_backward(
        da, x, t.depthwise, [c], [1, 1], [k, k], [1, 1], False, [0, 0], c, [False, True, True]
    )
    return dw, db


def _baseline(op: str, t: Tensors):
    """What eager PyTorch makes of a case at its dtype; the reference backend's backward is wider than that."""
    x, a, dy = t.set(0)
    if op == "norm_backward":
        hhat = (F.gelu(a.float()) - t.norm.mean[:, None, None]) * torch.rsqrt(t.norm.var + t.norm.eps)[:, None, None]
        return dy.float().sum((0, 2, 3)), (dy.float() * hhat).sum((0, 2, 3))
    if op not in ("depthwise_input_grad", "depthwise_weight_grad", "pointwise_backward"):
        return ours(op, reference, t)
    weight, groups = (t.pointwise, 1) if op == "pointwise_backward" else (t.depthwise, x.shape[1])
    k = weight.shape[-1] // 2
    dh, pre = dy.float() - (t.sums[0] / (dy.numel() // dy.shape[1]))[:, None, None], a.float()
    rstd = torch.rsqrt(t.norm.var + t.norm.eps)
    hhat = (F.gelu(pre) - t.norm.mean[:, None, None]) * rstd[:, None, None]
    dh = dh - hhat * (t.sums[1] / (dy.numel() // dy.shape[1]))[:, None, None]
    dh = dh * (rstd * t.norm.weight.float())[:, None, None]
    da = torch.ops.aten.gelu_backward(dh, pre).to(dy.dtype)
    dx, dw, db = torch.ops.aten.convolution_backward(
        da, x, weight, [len(weight)], [1, 1], [k, k], [1, 1], False, [0, 0], groups, [True, True, True]
    )
    if op == "depthwise_input_grad":
        return dx + dy
    return (dw, db) if op == "depthwise_weight_grad" else (dx, dw, db)


def wrong(case: OpCase, t: Tensors, backend=cuda) -> str | None:
    """What breaks the twice-eager rule in a few channels of the first set, None if nothing does."""
    channels = case.shape[1]
    kept = torch.linspace(0, channels - 1, min(_CHECKED_CHANNELS, channels), device=t.bias.device).long()
    part = t.channels(kept)
    products = case.op.startswith(("pointwise", "mixer"))
    if products:
        # every output channel needs every input channel
        part.sets[0][0] = t.set(0)[0]
    with torch.backends.cudnn.flags(allow_tf32=False):
        whole = ours(case.op, backend, t)
        # the order of a product's sums depends on its size: eager's is that of the whole
        baseline, exact = _baseline(case.op, t if products else part), ours(case.op, reference, part.double())
        if case.op == "depthwise_weight_grad":
            # the reference backend sums this one in float64: the baseline is eager's own
            baseline = eager_weight_grad(part)
    if isinstance(whole, Tensor):
        whole, baseline, exact = (whole,), (baseline,), (exact,)

    def sampled(found: Tensor) -> Tensor:
        return found[:, kept] if found.shape == case.shape else found[kept]

    for index, (mine, theirs, truth) in enumerate(zip(whole, baseline, exact, strict=True)):
        if case.op == "pointwise_backward" and index == 0:
            # dx needs every channel of da: only dw and db are checked here, the tests check dx
            continue
        error, allowed = (
            relative_error(sampled(mine), truth),
            relative_error(sampled(theirs) if products else theirs, truth),
        )
        if not within_twice_eager(error, allowed, case.dtype):
            return f"output {index}: relative error {error:.2e}, eager's {allowed:.2e}"
    return None


def failures() -> tuple[type[Exception], ...]:
    """What a kernel that cannot run raises: Triton's errors are no RuntimeError."""
    if not triton.build_info()["available"]:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def forced_gemms(case: OpCase, capability: tuple[int, int]) -> tuple[str, ...]:
    """The choices of CONVMIXER_CUDA_GEMM that make a difference to a case on this device."""
    _, c, h, w = case.shape
    narrow, near = case.dtype != torch.float32, case.layout == "contiguous"
    if case.op == "mixer_eval":
        # mixer_eval declines for other reasons on small devices: then "layer" is "fused" once more
        both = ("fused", "torch", "wgmma") if narrow and capability == (9, 0) else ("fused", "torch")
        return (*both, "layer") if narrow and near and c <= 256 and case.kernel <= 9 else both
    if case.op == "pointwise_backward":
        # the weight gradient
        return ("wgmma",) if narrow and near and h * w % 64 == 0 and capability == (9, 0) else ()
    if case.op not in ("pointwise_eval", "pointwise_train"):
        return ()
    aligned = c % 8 == 0 and (not near or h * w % 64 == 0)
    return ("fused", "torch", "wgmma") if narrow and aligned and capability == (9, 0) else ("fused", "torch")


@contextlib.contextmanager
def forcing(gemm: str | None) -> Iterator[None]:
    """Calls of the backend inside `with` run as with CONVMIXER_CUDA_GEMM=gemm; None: as they are."""
    before = cuda_choice.forced_gemm
    if gemm is not None:
        cuda_choice.forced_gemm = lambda: gemm
        cuda._size.cache_clear()
    try:
        yield
    finally:
        cuda_choice.forced_gemm = before
        cuda._size.cache_clear()


def measure_case(
    run: Run, case: OpCase, backend: str, *, gemms: Sequence[str | None] = (None,), peers: bool, timed: bool = True
) -> None:
    """The rows of a case: "ours" (cuda) or "triton", and with `peers` eager PyTorch's and a copy's.

    Args:
        gemms: of CONVMIXER_CUDA_GEMM, each a row of its own; None is the choice of the table.
        timed: False says only whether the result is right.
    """
    expected = failures()
    shared = {
        "case": case.label,
        "op": case.op,
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
        **(_floor(case, run.document["peaks"]) if timed else {}),
    }

    def row(implementation: str, call: Callable[[int], object], **more: object) -> None:
        try:
            timing = measure(call)
        except expected as error:
            torch.cuda.synchronize()
            run.row({**shared, "implementation": implementation, "error": str(error).splitlines()[0][:200], **more})
            return
        percent = 100 * shared["floor_us"] / timing["median_us"]
        run.row({**shared, "implementation": implementation, **timing, "percent_of_floor": percent, **more})

    tensors = Tensors(case)
    name, module = implementation_name(backend), BACKENDS[backend]
    with torch.no_grad():
        for gemm in gemms:
            label = name if gemm is None else f"{name} {gemm}"
            with forcing(gemm):
                try:
                    problem = wrong(case, tensors, module)
                except expected as error:
                    problem = str(error).splitlines()[0][:300]
                    torch.cuda.synchronize()
                if problem is not None:
                    # a speed is never shown for a wrong result
                    run.row({**shared, "implementation": label, "ok": False, "error": problem})
                elif timed:
                    row(label, lambda i: ours(case.op, module, tensors, i), ok=True)
                else:
                    run.row({**shared, "implementation": label, "ok": True})
        if peers:
            row("eager " + case.layout, lambda i: eager(case.op, tensors, i, case.layout)())
            if case.op == "depthwise_eval":
                row("clone", lambda i: tensors.set(i)[0].clone())
    torch.cuda.empty_cache()


def compiled_case(run: Run, case: OpCase) -> None:
    """torch.compile's row of a case: what eager PyTorch runs, compiled with its default options."""
    tensors = Tensors(case)
    shared = {"case": case.label, "op": case.op, "dtype": str(case.dtype).removeprefix("torch."), "layout": case.layout}
    shared |= _floor(case, run.document["peaks"])
    with torch.no_grad():
        x, _, _ = tensors.set(0)
        depthwise = case.op.startswith("depthwise")
        weight, groups = (tensors.depthwise, x.shape[1]) if depthwise else (tensors.pointwise, 1)
        statistics_and_affine = tensors.eager_norm

        @torch.compile
        def block(x: Tensor) -> Tensor:
            h = F.gelu(F.conv2d(x, weight, tensors.bias, padding=weight.shape[-1] // 2, groups=groups))
            y = F.batch_norm(h, *statistics_and_affine, False, 0.1, tensors.norm.eps)
            return y + x if depthwise else y

        timing = measure(lambda i: block(tensors.set(i)[0]))
    percent = 100 * shared["floor_us"] / timing["median_us"]
    run.row({**shared, "implementation": "torch.compile", **timing, "percent_of_floor": percent})


def kernel_names(run: Run, cases: Sequence[OpCase]) -> None:
    """Which kernels a call of the cuda backend launches, by case, in order."""
    from torch.profiler import ProfilerActivity, profile

    for case in cases:
        tensors = Tensors(case, sets=1)
        with torch.no_grad():
            ours(case.op, cuda, tensors)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                ours(case.op, cuda, tensors)
                torch.cuda.synchronize()
        names = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        run.append("kernels", {"case": case.label, "dtype": case.to_json()[3], "layout": case.layout, "names": names})


def operator_cases() -> list[OpCase]:
    """Most important first: the order in which time runs out."""
    big, bf16, fp16, fp32 = (64, 1536, 32, 32), torch.bfloat16, torch.float16, torch.float32
    near, last = "contiguous", "channels_last"
    depthwise = ["depthwise_eval", "depthwise_train", "depthwise_input_grad", "depthwise_weight_grad"]
    others = ["normalize", "norm_backward", "pointwise_eval", "pointwise_train", "pointwise_backward"]
    cases = [OpCase(op, big, 9, bf16, f) for f in (near, last) for op in depthwise + others]
    # where a layer in one kernel, and our GEMM instead of torch's, are close calls
    cases += [OpCase("mixer_eval", (64, c, 32, 32), 9, bf16, near) for c in (256, 128, 64)]
    cases += [OpCase("mixer_eval", (256, 256, 16, 16), 9, bf16, near)]
    gemm_shapes = [(64, c, 32, 32) for c in (128, 256, 384, 512, 768)] + [(256, 256, 16, 16)]
    cases += [OpCase(op, shape, 9, bf16, near) for shape in gemm_shapes for op in others[2:4]]
    cases += [OpCase("pointwise_eval", (64, c, 32, 32), 9, bf16, last) for c in (256, 768)]
    cases += [OpCase("pointwise_backward", (64, c, 32, 32), 9, bf16, near) for c in (256, 768)]
    cases += [OpCase(op, (32, 1536, 32, 32), 9, fp32, near) for op in (*depthwise, "pointwise_eval")]
    cases += [OpCase("pointwise_eval", (64, 256, 32, 32), 9, fp32, near)]
    cases += [OpCase("depthwise_eval", (32, 1536, 32, 32), 9, fp32, last)]
    shapes = [(64, 768, 32, 32), (128, 256, 16, 16), (256, 768, 7, 7), (64, 768, 17, 17)]
    shapes += [(32, 256, 56, 56), (4, 128, 224, 224)]
    for shape in shapes:
        cases += [OpCase("depthwise_eval", shape, 7 if shape == shapes[0] else 9, bf16, f) for f in (near, last)]
    for op in depthwise[2:]:
        cases += [OpCase(op, shape, 9, bf16, near) for shape in shapes[1:4]]
    for k in (3, 7, 15, 31):
        cases += [OpCase(op, (32, 768, 32, 32), k, bf16, near) for op in (depthwise[0], *depthwise[2:])]
    cases += [OpCase("depthwise_eval", big, 9, fp16, near)]
    return cases


def implementation_name(backend: str) -> str:
    """Of a row: committed files call the cuda backend "ours"."""
    return "ours" if backend == "cuda" else backend


# ---- for compute-sanitizer ------------------------------------------------------------------------------------------


def sanitizer_workload() -> int:
    """Every kernel once at sizes with every kind of edge, without torch's GEMMs: the tools have complaints about those."""
    cuda._pointwise = lambda x, weight, bias: x.clone()
    for dtype in (torch.bfloat16, torch.float32):
        for layout in LAYOUTS:
            for shape, kernel in (((2, 8, 17, 16), 9), ((3, 5, 7, 7), 4), ((1, 8, 33, 40), 15)):
                tensors = Tensors(OpCase("depthwise_eval", shape, kernel, dtype, layout), sets=1)
                for op in sorted(_PASSES.keys() - {"pointwise_backward"}):
                    ours(op, cuda, tensors)
                for op in ("pointwise_eval", "pointwise_train", "mixer_eval"):
                    with forcing("layer"):
                        ours(op, cuda, tensors)
                (x, a, dy), t = tensors.set(0), tensors
                needs = (False, False, True)
                cuda.pointwise_backward(dy, a, x, t.pointwise, t.bias, "gelu", t.norm, t.sums, needs)
    torch.cuda.synchronize()
    return 0


# ---- for Nsight Compute ---------------------------------------------------------------------------------------------


def profile_workload() -> int:
    """One launch of each headline kernel between cudaProfilerStart and -Stop, at full size, after a warm one."""
    big, near, last = (64, 1536, 32, 32), "contiguous", "channels_last"
    depthwise = ("depthwise_eval", "depthwise_train", "depthwise_input_grad", "depthwise_weight_grad")
    cases = [OpCase(op, big, 9, torch.bfloat16, near) for op in depthwise]
    cases += [OpCase(op, big, 9, torch.bfloat16, last) for op in depthwise if op != "depthwise_train"]
    cases += [OpCase("depthwise_eval", (32, 1536, 32, 32), 9, torch.float32, near)]
    cases += [OpCase("depthwise_eval", (64, 768, 17, 17), 9, torch.bfloat16, near)]
    cases += [OpCase("pointwise_eval", big, 9, torch.bfloat16, near)]
    cases += [OpCase("pointwise_eval", (64, 256, 32, 32), 9, torch.bfloat16, near)]
    for case in cases:
        tensors = Tensors(case, sets=1)
        for gemm in ("fused", "wgmma") if case.op == "pointwise_eval" else (None,):
            with torch.no_grad(), forcing(gemm):
                ours(case.op, cuda, tensors)
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                ours(case.op, cuda, tensors)
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
        del tensors
        torch.cuda.empty_cache()
    return 0

# SPDX-License-Identifier: MIT
"""The Triton backend: in Triton's interpreter without a GPU (conftest.py then sets TRITON_INTERPRET=1), on a GPU if there is
one (marked gpu). test_triton_compiled.py compiles the kernels ahead of time for other GPUs.

The interpreter takes 0.1 to 1 ms for each operation of each program, so the grid is small: each size, kernel, layout and dtype
appears with each kernel, but not in every combination. Its bfloat16 arithmetic is wrong: there the kernels widen operands and
round by hand (common.py), so that the bfloat16 products of tensor cores are not tested.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ACTIVATIONS, Case, check_case, check_relu_stops_gradients, make_inputs, ours
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import convmixer_kernels as ck
from convmixer_kernels import dispatch
from convmixer_kernels.backends import reference
from convmixer_kernels.backends import triton as backend
from convmixer_kernels.primitives import Norm, Update, activate, update_running_statistics
from convmixer_kernels.testing import relative_error

pytest.importorskip("triton", reason="triton is not installed")

from convmixer_kernels.triton_kernels import batch_norm, config, depthwise_toeplitz, launch, tuning

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
FORMATS = ("contiguous", "channels_last")
ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = backend._interpreted()
_ON_GPU = "the same kernels run on this machine's GPU: pytest -m gpu; TRITON_INTERPRET=1 runs these"

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
interpreted = pytest.mark.skipif(not INTERPRETED, reason=_ON_GPU)


@pytest.fixture(autouse=True, scope="module")
def _faster_interpreter():
    """The interpreter patches triton.language at each call of a device function, which takes 2 ms; once a launch is enough."""
    from triton.runtime import interpreter

    patched: set[int] = set()
    launch_grid = interpreter.GridExecutor.__call__

    def call(self, *arguments, **keywords):
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*arguments, **keywords)

    def launch_all(self, *arguments, **keywords):
        patched.clear()
        return launch_grid(self, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_all)
        yield


#: Blocks of a few values, so that small tensors have several blocks, parts and groups, whole and cut off.
TINY = {
    "depthwise_fma": {"ROWS": 2, "BLOCK_P": 16, "BLOCK_C": 2},
    "depthwise_fma_weight_grad": {"TAPS": 2, "BLOCK_P": 32, "BLOCK_C": 2},
    "depthwise_toeplitz": {"BLOCK_M": 16},
    "pointwise": {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 2},
    "pointwise_weight_grad": {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16},
    "normalize": {"BLOCK_P": 16, "BLOCK_C": 2},
    "norm_backward": {"BLOCK_P": 16, "BLOCK_C": 2},
    "grad_prologue": {"BLOCK_P": 16, "BLOCK_C": 2},
}


@pytest.fixture
def tiny(monkeypatch):
    """Uses the configurations of TINY, and computes the prologue of products in memory for more than 16 columns."""

    def candidates(kernel: str, generation: str) -> list[config.Config]:
        stem = max((name for name in TINY if kernel.startswith(name)), key=len)
        return [TINY[stem]]

    monkeypatch.setattr(config, "candidates", candidates)
    monkeypatch.setattr(config, "fuse_prologue", lambda dtype, columns: dtype != FP32 and columns <= 16)


# Blocks, through the public functions.


def _depthwise(shape, kernel, **options) -> Case:
    return Case("depthwise_block", shape, (kernel, kernel) if isinstance(kernel, int) else kernel, **options)


def _pointwise(shape, channels_out=None, **options) -> Case:
    return Case("pointwise_block", shape, (1, 1), channels_out, **options)


LAST = {"memory_format": "channels_last"}
#: With the tables' own configurations: sizes around the Toeplitz tile of 8 x 8 and groups of 4 rows.
CASES = [
    *(_depthwise((2, 4, h, w), 9, dtype=d) for d, h, w in ((FP16, 8, 8), (BF16, 7, 9), (FP16, 9, 16))),
    *(_depthwise((1, 4, h, w), 9, dtype=d) for d, h, w in ((FP16, 17, 15), (BF16, 3, 20))),
    *(_depthwise((2, 4, 9, 8), k, dtype=FP16) for k in (4, 5, (3, 10), (10, 3))),
    *(_depthwise((2, 16, 8, 9), k, dtype=d, **LAST) for k, d in (((9, 9), FP16), ((2, 7), BF16))),
    *(_depthwise((2, 8, 6, 7), k) for k in (1, 2, 3)),
    _depthwise((2, 16, 5, 7), 9, **LAST),
    _depthwise((1, 2, 10, 35), 15, dtype=FP16, training=False),
    _depthwise((1, 2, 12, 33), 31, dtype=FP16),
    _depthwise((1, 16, 3, 5), 31, dtype=FP16, training=False, **LAST),
    _depthwise((2, 4, 9, 8), 9, dtype=BF16, training=False),
    _depthwise((2, 16, 9, 8), 5, training=False, **LAST),
    *(_depthwise((2, 4, 9, 8), 5, dtype=FP16, activation=a) for a in ("relu", "gelu_tanh", "identity")),
    *(_depthwise((2, 16, 9, 8), 3, activation=a, **LAST) for a in ("relu", "gelu_tanh", "identity")),
    _depthwise((2, 4, 9, 8), 5, dtype=FP16, residual=False, absent=("bias", "norm_weight", "norm_bias")),
    _depthwise((2, 16, 9, 8), 3, residual=False, absent=("bias", "norm_weight", "norm_bias"), **LAST),
    _depthwise((2, 4, 9, 8), 5, dtype=BF16, absent=("norm_bias", "running_mean", "running_var")),
    _depthwise((2, 4, 9, 8), 5, dtype=BF16, parameter_dtype=FP32),
    _depthwise((2, 4, 9, 8), 5, dtype=FP16, memory_format="sliced"),
    _depthwise((2, 8, 9, 8), 3, memory_format="expanded"),
    *(_pointwise((2, 16, 8, 8), dtype=d, memory_format=f) for d in (FP32, FP16, BF16) for f in FORMATS),
    *(_pointwise((1, 40, 5, 7), 20, memory_format=f, training=False) for f in FORMATS),
    # one more, and one less, than the 128 values and channels of a tile
    _pointwise((1, 129, 3, 43), 127, dtype=FP16),
    _pointwise((1, 127, 1, 127), 129, dtype=FP16, **LAST),
    _pointwise((4, 6, 1, 1), 64),
    _pointwise((3, 1, 7, 5), 16, **LAST),
    _pointwise((3, 16, 7, 5), 1, dtype=FP16, **LAST),
    *(_pointwise((2, 16, 5, 5), activation=a) for a in ("relu", "gelu_tanh", "identity")),
    _pointwise((2, 16, 5, 5), dtype=FP16, absent=("bias", "norm_weight", "norm_bias")),
    _pointwise((2, 16, 5, 5), 20, dtype=BF16, parameter_dtype=FP32),
    Case("mixer_layer", (2, 8, 8, 8), (9, 9), 20, dtype=FP16),
    Case("mixer_layer", (2, 16, 5, 6), (3, 3), **LAST),
    Case("depthwise_conv2d", (2, 4, 8, 9), (9, 9), dtype=FP16),
    Case("depthwise_conv2d", (2, 16, 8, 9), (4, 3), absent=("bias",), **LAST),
]

#: With blocks of a few values.
TINY_CASES = [
    *(_depthwise((3, 3, 17, 9), 9, dtype=FP16, training=t) for t in (True, False)),
    _depthwise((2, 2, 19, 12), (12, 11), dtype=BF16),
    *(_depthwise((3, 5, 7, 6), (3, 4), dtype=FP16, training=t, **LAST) for t in (True, False)),
    _depthwise((3, 3, 7, 6), 3),
    *(_pointwise((3, 40, 5, 7), 35, dtype=d, memory_format=f) for d, f in zip((FP32, FP16), FORMATS, strict=True)),
    *(_pointwise((3, 13, 5, 7), 35, dtype=FP16, memory_format=f) for f in FORMATS),
    _pointwise((2, 33, 3, 11), 18, training=False),
]


def _check(case: Case, **options) -> None:
    """Ours keeps in float32 the steps that eager rounds to 16 bits, so that 16-bit results are nearer to float64: few numbers suffice."""
    check_case(case, "triton", pool=32 if case.dtype == FP32 else 4, **options)


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_block(case):
    _check(case)


# Large and dilated kernels: both forms, every row group and phase, images smaller than the kernel.
LARGE_CASES = [
    Case("depthwise_conv2d", (1, 2, 5, 7), (33, 4), dtype=FP16),
    Case("depthwise_block", (1, 4, 4, 9), (5, 63), dtype=FP16),
    Case("depthwise_conv2d", (1, 4, 5, 6), (51, 3), dtype=FP16, memory_format="channels_last"),
    Case("depthwise_conv2d", (1, 4, 1, 4), (1, 101), dtype=FP16),
    Case("depthwise_conv2d", (2, 4, 11, 13), (7, 7), dtype=FP16, dilation=(3, 3)),
    Case("depthwise_conv2d", (1, 4, 9, 20), (4, 5), dtype=FP16, dilation=(1, 3)),
    Case("depthwise_conv2d", (2, 16, 11, 7), (3, 3), dilation=(3, 2)),
    Case("depthwise_conv2d", (1, 16, 9, 6), (2, 4), memory_format="channels_last", dilation=(3, 5)),
    Case("depthwise_conv2d", (1, 4, 10, 3), (11, 1), dtype=BF16, memory_format="channels_last", dilation=(2, 1)),
]


@interpreted
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large_and_dilated_kernels(case):
    _check(case)


@interpreted
@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_block_of_many_programs(case, tiny):
    _check(case)


@interpreted
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("form, dtype", [("toeplitz", FP32), ("toeplitz", FP16), ("fma", FP16)])
def test_the_form_that_the_table_does_not_choose(form, dtype, memory_format, monkeypatch):
    monkeypatch.setattr(config, "depthwise_form", lambda *a: form)
    _check(_depthwise((2, 6, 9, 7), 5, dtype=dtype, memory_format=memory_format))


@interpreted
@pytest.mark.parametrize("case", [CASES[1], CASES[10], CASES[34], CASES[35]], ids=str)
def test_64_bit_offsets_give_the_same_bits(case, monkeypatch):
    def results() -> list[Tensor]:
        x, tensors, dy = make_inputs(case)
        leaves = [x.requires_grad_(), *(t.requires_grad_() for t in tensors[:4])]
        y = ours(case, x, tensors, "triton")
        return [y, *torch.autograd.grad(y, leaves, dy), *tensors[4:]]

    narrow = results()
    monkeypatch.setattr(launch.Layout, "wide", True)
    for wide, expected in zip(results(), narrow, strict=True):
        assert torch.equal(wide, expected)


GPU_CASES = [
    _depthwise((3, 40, 17, 24), 9, dtype=BF16),
    _depthwise((2, 40, 9, 13), 9),
    _depthwise((2, 40, 9, 13), 9, dtype=BF16, memory_format="channels_last"),
    Case("mixer_layer", (3, 136, 9, 16), (5, 5), 144, dtype=BF16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_block_on_a_gpu(case):
    """A few cases: each compiles its own kernels, which takes seconds."""
    check_case(case, "triton", device="cuda")


# Primitives.


def _inputs(shape, dtype, memory_format, count=2, mean=0.0) -> tuple[list[Tensor], Norm]:
    g = torch.Generator().manual_seed(1)
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    tensors = [
        (torch.randn(shape, generator=g) + mean).to(dtype).contiguous(memory_format=layout) for _ in range(count)
    ]
    c = shape[1]
    vectors = [torch.randn(c, generator=g) for _ in range(3)]
    return tensors, Norm(vectors[0], torch.rand(c, generator=g) + 0.5, vectors[1], vectors[2], 1e-5)


@interpreted
@pytest.mark.parametrize("blocks", ["tables", "tiny"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("kernel", ["toeplitz", "fma", "pointwise"])
def test_statistics(kernel, dtype, memory_format, blocks, monkeypatch, request):
    """Mean, variance and running statistics are within 1e-6 of those that float64 computes from the stored values."""
    if blocks == "tiny":
        request.getfixturevalue("tiny")
    monkeypatch.setattr(config, "depthwise_form", lambda *a: kernel)
    (x,), _ = _inputs((3, 6, 9, 17), dtype, memory_format, count=1, mean=3.0)
    weight = torch.eye(6)[:, :, None, None] if kernel == "pointwise" else torch.ones(6, 1, 1, 1)
    running = torch.randn(6), torch.rand(6)
    expected = [t.double() for t in running]
    train = backend.pointwise_train if kernel == "pointwise" else backend.depthwise_train
    a, mean, var = train(x, weight.contiguous(), torch.full((6,), 0.25), "gelu")
    count = a.numel() // 6
    backend.normalize(a, "gelu", Norm(mean, var, None, None, 1e-5), None, (Update(*running, mean, var, count, 0.1),))
    h = torch.nn.functional.gelu(a.double())
    exact_var, exact_mean = torch.var_mean(h, dim=(0, 2, 3), correction=0)
    update_running_statistics(Update(*expected, exact_mean, exact_var, count, 0.1))
    tolerance = 1e-6 if dtype == FP32 else 2e-5  # the 16-bit gelu is good to 1e-6 absolute
    for mine, exact in zip((mean, var, *running), (exact_mean, exact_var, *expected), strict=True):
        assert relative_error(mine, exact) < tolerance


@interpreted
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "gelu_tanh"])
def test_non_finite_values_go_through(activation, dtype):
    (a, dy), norm = _inputs((1, 8, 4, 5), dtype, "contiguous")
    # torch's own gelu of an infinity depends on the memory format
    highest = 3e4 if activation.startswith("gelu") else float("inf")
    specials = torch.tensor([float("nan"), highest, -highest, 0.0, -0.0, 3e4, -3e4], dtype=dtype)
    a[0, 1, 0, :5], a[0, 2, 0, :2] = specials[:5], specials[5:]
    mine, expected = backend.normalize(a, activation, norm, None), reference.normalize(a, activation, norm, None)
    assert torch.equal(mine.isnan(), expected.isnan())
    assert torch.equal(mine.isinf(), expected.isinf())
    sums = torch.stack(backend.norm_backward(dy, a, activation, norm)).isfinite()
    assert torch.equal(sums, torch.stack(reference.norm_backward(dy, a, activation, norm)).isfinite())


@interpreted
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_relu_stops_gradients_that_are_not_finite(dtype, memory_format):
    check_relu_stops_gradients(backend, dtype, memory_format, "cpu")


@interpreted
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "gelu_tanh"])
def test_gradients_of_a_nan_are_torch_s(activation):
    """relu passes the gradient at a NaN, as torch's own backward does."""
    (a, dy), _ = _inputs((1, 4, 3, 5), FP32, "contiguous")
    a[0, 1, 1, 2:4] = float("nan")
    leaf = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation](leaf) * 1.0, leaf, dy)
    norm = Norm(torch.zeros(4), torch.ones(4), None, None, 0.0)
    written, _ = batch_norm.grad_prologue(dy, a, activation, norm, None, True, False)
    for mine in (written, reference._da(dy, a, activation, norm, None).float()):
        torch.testing.assert_close(mine, expected, equal_nan=True)


@interpreted
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_activation_of_every_float16_and_bfloat16(activation):
    """normalize without statistics gives act(a) rounded once; the polynomial erf is good to one step of the dtype or 4e-6."""
    for dtype in (FP16, BF16):
        a = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
        a = a[a.isfinite() & (a.abs() < 1e4)].reshape(1, 1, 1, -1)
        norm = Norm(torch.zeros(1), torch.ones(1), None, None, 0.0)
        mine = backend.normalize(a, activation, norm, None).double()
        exact = activate(a.double(), activation)
        step = torch.finfo(dtype).eps / 2 * exact.abs() + 4e-6
        assert ((mine - exact).abs() <= step).all()


_SHORT = ["norm_backward_kernel", "grad_prologue_kernel"]
_LAUNCHES = {
    "toeplitz": (
        _depthwise((2, 6, 9, 8), 9, dtype=FP16),
        ["forward_kernel"],
        [*_SHORT, "forward_kernel", "weight_grad_kernel", "finish_kernel"],
    ),
    "fma": (
        _depthwise((2, 6, 9, 8), 3),
        ["forward_kernel"],
        [*_SHORT, "forward_kernel", "weight_grad_kernel", "sum_parts_kernel"],
    ),
    "pointwise": (
        _pointwise((2, 136, 3, 4), 8, dtype=FP16),
        ["gemm_kernel"],
        [*_SHORT, "gemm_kernel", "weight_grad_kernel", "sum_parts_kernel"],
    ),
    "pointwise, da in the prologues": (
        _pointwise((2, 8, 3, 4), 12, dtype=FP16),
        ["gemm_kernel"],
        ["norm_backward_kernel", "sum_parts_kernel", "gemm_kernel", "weight_grad_kernel", "sum_parts_kernel"],
    ),
}


@interpreted
@pytest.mark.parametrize("batch_statistics", [True, False], ids=["batch", "running"])
@pytest.mark.parametrize("kernels", _LAUNCHES)
def test_launches_and_no_torch_arithmetic(kernels, batch_statistics, monkeypatch):
    """Eval takes 1 launch, a training forward 3, a backward with all gradients 5, with parameters in x's dtype."""
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []
    inside: list[str] = []
    run = InterpretedFunction.run

    def counted(self, *arguments, **keywords):
        names.append(self.__name__)
        inside.append(self.__name__)
        run(self, *arguments, **keywords)
        inside.clear()

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    training, forward, backward = _LAUNCHES[kernels]
    case, evaluation = (dataclasses.replace(training, training=t) for t in (batch_statistics, False))
    x, tensors, dy = make_inputs(case)
    with torch.no_grad():
        ours(evaluation, x, tensors, "triton")
    assert names == forward
    names.clear()
    for t in tensors[:4]:
        t.requires_grad_()
    y = ours(case, x.requires_grad_(), tensors, "triton")
    assert names == [*forward, *(["merge_kernel"] if batch_statistics else []), "normalize_kernel"]
    names.clear()
    size = min(x.numel(), dy.numel())

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            big = isinstance(out, Tensor) and out.numel() >= size
            harmless = ("empty", "detach", "view", "fill_")
            # inside a launch the interpreter copies every argument to the host and back
            assert inside or not big or any(name in str(function) for name in harmless), function
            return out

    with Watch():
        y.backward(dy)
    assert names == backward


@interpreted
@pytest.mark.parametrize(
    "form, dtype", [("toeplitz", FP16), ("fma", FP16), ("fma", FP32), ("pointwise", FP16), ("pointwise", FP32)]
)
@pytest.mark.parametrize("batch_statistics", [True, False], ids=["batch", "running"])
def test_each_gradient_alone_is_that_of_all(form, dtype, batch_statistics, tiny, monkeypatch):
    """The launches leave out gradients that are not needed; the others do not change."""
    monkeypatch.setattr(config, "depthwise_form", lambda *a: form)
    case = _pointwise((2, 20, 3, 5), 35) if form == "pointwise" else _depthwise((2, 5, 5, 7), 4)
    case = dataclasses.replace(case, dtype=dtype, training=batch_statistics, memory_format="channels_last")
    x, tensors, dy = make_inputs(case)

    def gradients(needed: tuple[int, ...]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate((x, *tensors[:4]))]
        y = ours(case, leaves[0], [*leaves[1:], *(t.clone() for t in tensors[4:])], "triton")
        return torch.autograd.grad(y, [leaves[i] for i in needed], dy)

    everything = gradients((0, 1, 2, 3, 4))
    for needed in ((0,), (1,), (2,), (3,), (0, 4), (1, 2)):
        for i, mine in zip(needed, gradients(needed), strict=True):
            assert relative_error(mine, everything[i].double()) <= torch.finfo(dtype).eps, (needed, i)


@interpreted
def test_the_batch_does_not_change_what_is_tuned(monkeypatch):
    keys: list[set] = []
    run = tuning.run
    monkeypatch.setattr(tuning, "run", lambda kernel, key, *a: keys[-1].add((kernel, key)) or run(kernel, key, *a))
    for n in (1, 3):
        keys.append(set())
        for case in (Case("mixer_layer", (n, 6, 5, 5), (5, 5), 18, dtype=FP16), _depthwise((n, 6, 5, 5), 3)):
            x, tensors, dy = make_inputs(case)
            tensors[0].requires_grad_()
            ours(case, x.requires_grad_(), tensors, "triton").backward(dy)
    assert keys[0] == keys[1]
    assert {kernel for kernel, _ in keys[0]} <= set(config.kernels())


# Choosing, limits and messages.


def test_cpu_tensors_need_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 1, 3, 3)
    with pytest.raises(
        (RuntimeError, NotImplementedError), match="Triton compiles for GPUs: it needs tensors on a GPU"
    ):
        ck.depthwise_conv2d(x, weight, backend="triton")
    if not torch.cuda.is_available():
        assert backend.build_info() == {
            "available": False,
            "detail": "Triton needs a GPU: torch.cuda.is_available() is False",
        }
        assert "triton" not in ck.available_backends()


def test_can_run_names_what_it_cannot(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    weight, x = torch.empty(2, 1, 9, 9), torch.empty(1, 2, 4, 4)
    assert backend.can_run("depthwise", x, weight) is None
    assert "float64" in backend.can_run("depthwise", x.double(), weight)
    assert "1023x1023" in backend.can_run("depthwise", x, torch.empty(2, 1, 1024, 3))
    assert "dilations up to 64" in backend.can_run("depthwise", x, weight, (1, 65))
    assert "x.device=meta" in backend.can_run("depthwise", torch.empty(1, 2, 4, 4, device="meta"), weight)
    assert "for tests only" in backend.build_info()["detail"]


@pytest.mark.parametrize(
    "version, enough", [("3.5.1", False), ("3.6+gitdeadbeef", True), ("3.10.0", True), ("4.0a1", True), ("main", True)]
)
def test_versions_of_triton(monkeypatch, version, enough):
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: version)
    reason = backend._missing.__wrapped__()
    assert reason is None if enough else f"3.6 or newer, got {version}" in reason


def test_without_triton_only_this_backend_is_missing():
    program = (
        "import sys; sys.modules['triton'] = None; import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else f(name, *a)\n"
        "import torch, convmixer_kernels as ck\n"
        "assert 'triton' not in ck.available_backends() and 'reference' in ck.available_backends()\n"
        "y = ck.depthwise_conv2d(torch.randn(1, 2, 4, 4), torch.randn(2, 1, 3, 3))\n"
        "try: ck.depthwise_conv2d(y, torch.randn(2, 1, 3, 3), backend='triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert "the package triton is not installed; pip install 'convmixer-kernels[triton]'" in done.stdout, done.stderr


def test_importing_the_package_imports_no_triton():
    program = (
        "import sys, torch, convmixer_kernels as ck; before = 'triton' in sys.modules\n"
        "import convmixer, convmixer_kernels.backends.triton, convmixer_kernels.triton_kernels\n"
        "ck.available_backends(); print('triton' in sys.modules, before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_automatic_order_has_one_home():
    assert dispatch.automatic_order("cuda") == ("cuda", "triton", "reference")
    assert dispatch.automatic_order("cpu") == ("cpu", "reference")


def test_generations_and_lists():
    devices = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
    assert [config.generation(*d) for d in devices] == ["sm_80", "small", "small", "sm_90", "sm_100", "small"]
    for kernel in config.kernels():
        for generation in config.GENERATIONS:
            found = config.candidates(kernel, generation)
            assert 1 <= len(found) <= 4
            assert all(found.count(candidate) == 1 for candidate in found)


def test_tf32_follows_torch():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, expected in ((True, "tf32"), (False, "ieee")):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert config.input_precision() == expected
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("kernel", [(k, k) for k in range(1, 32)] + [(1, 31), (31, 1), (3, 10), (12, 26)], ids=str)
def test_toeplitz_windows_hold_the_filter(kernel):
    for left in {(kernel[1] - 1) // 2, kernel[1] // 2}:
        t = depthwise_toeplitz.tile_of(kernel, left)
        assert t.BH * t.BW == 64
        columns, rows = t.BW + kernel[1] - 1, t.BH + kernel[0] - 1
        assert columns + t.SHIFT <= t.BK
        assert rows <= t.STEPS * t.UR
        assert (left + t.SHIFT) % 4 == 0 or columns + 3 > t.BK

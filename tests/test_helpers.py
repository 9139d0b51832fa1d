# SPDX-License-Identifier: MIT
"""The rule that decides every other test must be right, and must be able to fail."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import Case, assert_twice_eager, eager, in_format, make_inputs, ours, run
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import DEPTHWISE, OpCase
from benchmarks.ops import OPERATORS
from benchmarks.ops import make_inputs as make_case_inputs
from convmixer_kernels import testing
from convmixer_kernels.testing import UNIT_ROUNDOFF, relative_error, within_twice_eager


def test_relative_error_is_the_l2_ratio():
    assert relative_error(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])) == pytest.approx(5 / 4)
    assert relative_error(torch.ones(3), torch.ones(3, dtype=torch.float64)) == 0.0


def test_relative_error_of_nothing_and_of_zero():
    assert relative_error(torch.empty(0), torch.empty(0)) == 0.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.tensor([0.0, 1e-9]), torch.zeros(2)) == math.inf


def test_relative_error_sees_nan_and_infinity():
    nan, inf = float("nan"), float("inf")
    assert math.isnan(relative_error(torch.tensor([1.0, nan]), torch.ones(2)))
    assert math.isnan(relative_error(torch.tensor([nan, nan]), torch.zeros(2)))
    assert not within_twice_eager(relative_error(torch.tensor([1.0, inf]), torch.ones(2)), 0.1, torch.float32)
    exact = torch.tensor([nan, inf, -inf, 2.0])
    assert relative_error(exact.clone(), exact) == 0.0
    assert math.isnan(relative_error(torch.tensor([nan, -inf, -inf, 2.0]), exact))
    assert math.isnan(relative_error(torch.tensor([0.0, inf, -inf, 2.0]), exact))


def test_relative_error_refuses_other_shapes():
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(torch.ones(2, 1), torch.ones(2))


def test_unit_roundoff_is_half_of_eps():
    for dtype, u in UNIT_ROUNDOFF.items():
        assert u == torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("error,eager,passes", [(3.0e-7, 1e-7, False), (2.5e-7, 1e-7, True), (5e-8, 0.0, True)])
def test_within_twice_eager(error, eager, passes):
    assert within_twice_eager(error, eager, torch.float32) is passes


def test_within_twice_eager_accepts_no_nan():
    nan = float("nan")
    assert not within_twice_eager(nan, 1.0, torch.float32)
    assert not within_twice_eager(0.0, nan, torch.float32)
    assert not within_twice_eager(1.0, float("inf"), torch.float32)


def test_assert_twice_eager_says_what_is_wrong():
    exact = torch.ones(4, dtype=torch.float64)
    assert_twice_eager("y", torch.ones(4), torch.ones(4), exact)
    with pytest.raises(AssertionError, match="y: error"):
        assert_twice_eager("y", torch.tensor([1.0, 1, 1, 1.001]), torch.ones(4), exact)
    with pytest.raises(AssertionError, match="dtype"):
        assert_twice_eager("y", torch.ones(4).half(), torch.ones(4), exact)
    with pytest.raises(AssertionError, match="shape"):
        assert_twice_eager("y", torch.ones(4, 1), torch.ones(4), exact)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "sliced", "expanded"])
def test_in_format(memory_format):
    t = torch.randn(2, 3, 4, 5)
    out = in_format(t, memory_format)
    if memory_format != "expanded":
        assert torch.equal(out, t)
    assert out.is_contiguous() == (memory_format == "contiguous")
    assert out.is_contiguous(memory_format=torch.channels_last) == (memory_format == "channels_last")


# torch's own 16-bit depthwise convolution may never return: nothing here calls it.

ENDLESS = [(15, 15), (3, 15), (15, 3), (31, 31)]
SIXTEEN = [torch.float16, torch.bfloat16]


def _refuse_endless(x: torch.Tensor, weight: torch.Tensor) -> None:
    endless = x.dtype in SIXTEEN and max(weight.shape[2:]) >= 15
    assert not endless, f"torch gets a {x.dtype} convolution of {tuple(weight.shape)}"


class NoEndlessConvolution(TorchDispatchMode):
    """Raises in place of a call that might hang."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            _refuse_endless(*args[:2])
        if function is torch.ops.aten.convolution_backward.default:
            _refuse_endless(*args[1:3])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("kernel", ENDLESS, ids=str)
@pytest.mark.parametrize("op", ["depthwise_block", "mixer_layer", "depthwise_conv2d"])
def test_the_eager_equivalents_always_return(op, kernel, dtype, mixed):
    case = Case(op, (1, 2, 5, 7), kernel, dtype=dtype, parameter_dtype=torch.float32 if mixed else None)
    x, tensors, dy = make_inputs(case)
    with NoEndlessConvolution():
        results = run(lambda x, t: eager(case, x, t), x, tensors, dy, dtype if mixed else None)
        if mixed:
            # autocast casts a wide x too
            run(lambda x, t: eager(case, x, t), x.float(), tensors, dy, dtype)
    assert results["y"].dtype == dtype


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("op", ["depthwise_block", "mixer_layer", "depthwise_conv2d"])
def test_the_reference_backend_and_the_transforms_always_return(monkeypatch, op, dtype):
    case = Case(op, (1, 2, 5, 7), (15, 15), dtype=dtype, training=False)
    x, tensors, dy = make_inputs(case)
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, w, *a, **k: _refuse_endless(x, w) or conv2d(x, w, *a, **k))
    y = run(lambda x, t: ours(case, x, t, "reference"), x, tensors, dy)["y"]
    for transform in (
        lambda f: torch.func.vmap(f)(x[None])[0],
        lambda f: torch.func.jvp(f, (x,), (x,))[0],
        lambda f: torch.func.vjp(f, x)[0],
    ):
        torch.testing.assert_close(transform(lambda x: ours(case, x, tensors, None)), y, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("op", [op for op in DEPTHWISE if op != "depthwise_conv"])
def test_the_benchmarks_always_return(op):
    (inputs,) = make_case_inputs(OpCase(op, "", (1, 2, 5, 7), 15, dtype="bfloat16"), torch.device("cpu"), 1)
    with NoEndlessConvolution():
        assert all(t.dtype == torch.bfloat16 for t in OPERATORS[op].call(inputs)()[:1])


def test_what_is_widened_is_rounded_once():
    x, weight, bias = torch.randn(2, 3, 9, 8).bfloat16(), torch.randn(3, 1, 15, 2).bfloat16(), torch.randn(3).bfloat16()
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding="same", groups=3)
    y = testing.eager_convolution(x, weight, bias, 3)
    torch.testing.assert_close(y, exact.bfloat16(), rtol=2**-8, atol=1e-6)
    assert not testing.never_returns(x.float(), weight)
    assert not testing.never_returns(x, weight[:, :, :14])


# A test that hangs is named.

HANGS = """
import ctypes, pytest

# in place of those of conftest.py: a first setup takes its time
@pytest.fixture(autouse=True)
def _global_state(): ...

@pytest.fixture(autouse=True)
def _poisoned_allocations(): ...

@pytest.mark.parametrize("case", ["first", "second"])
def test_sleeps(case):
    # in C, where no signal handler of Python's runs
    ctypes.CDLL(None).sleep(200 if case == "second" else 0)
"""


def test_a_test_that_does_not_return_ends_and_is_named(pytestconfig, tmp_path):
    assert float(pytestconfig.getini("faulthandler_timeout")) > 0
    assert pytestconfig.getini("faulthandler_exit_on_timeout")
    folder = pytestconfig.rootpath / "tests"
    (tmp_path / "test_hangs.py").write_text(HANGS)
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(pytestconfig.inipath), "-p", "conftest"]
    command += ["-p", "no:cacheprovider", "-o", "faulthandler_timeout=8", "-o", f"pythonpath={folder}"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 1, done
    assert "test_hangs.py::test_sleeps[second] has run for 8 s" in done.stderr
    assert "in test_sleeps" in done.stderr

# SPDX-License-Identifier: MIT
"""The rule that decides every other test must itself be right, and must be able to say no."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_twice_eager, in_format

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

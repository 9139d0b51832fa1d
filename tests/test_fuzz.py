# SPDX-License-Identifier: MIT
"""A few hundred cases of both fuzzers (fuzz.py, fuzz_wrong.py), which run tens of thousands by hand; and that they notice faults."""

from __future__ import annotations

import dataclasses

import fuzz
import fuzz_wrong
import pytest
import torch
from helpers import skip_unless_it_runs

import convmixer_kernels as ck
from convmixer_kernels import dispatch

#: Cases of each backend; emulated kernels are slow. Triton's interpreter takes half a minute for one: by hand.
CASES = {"cpu": 200, "reference": 60, "cuda": 12}
WRONG = {"cpu": 200, "reference": 60, "cuda": 20, "triton": 20}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", CASES)
def test_right_arguments(backend, monkeypatch, capsys):
    skip_unless_it_runs(backend, monkeypatch)
    failures = fuzz.fuzz(2, range(CASES[backend]), backend, fuzz.run_case)
    assert not failures, capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", WRONG)
def test_wrong_arguments(backend, monkeypatch, capsys):
    skip_unless_it_runs(backend, monkeypatch)
    failures = fuzz.fuzz(2, range(WRONG[backend]), backend, fuzz_wrong.run_case)
    assert not failures, capsys.readouterr().out


def test_a_case_repeats():
    for number in range(20):
        call = fuzz.draw(5, number, "cpu")
        assert call == fuzz.draw(5, number, "cpu") != fuzz.draw(5, number + 1, "cpu")
    first, second = (fuzz.make(call, 3) for _ in range(2))
    assert torch.equal(first[2], second[2])


@pytest.mark.parametrize("planted", ["value", "gradient", "statistic", "input", "nan"])
def test_a_fault_is_found(planted, monkeypatch):
    """Each planted fault, as small as 2e-6 of a result, fails a case that passes without it."""
    call = dataclasses.replace(
        fuzz.draw(0, 0, "reference"),
        op="depthwise_block",
        shape=(2, 8, 9, 7),
        kernel=(3, 3),
        channels_out=8,
        dtype=torch.float32,
        wide=(),
        absent=(),
        wanted=(0, 1),
        x_format="contiguous",
        dy_format="contiguous",
        formats=("contiguous",) * 6,
        values="normal",
        training=True,
        route="direct",
    )
    with fuzz.prepared("reference"):
        assert fuzz.check(call, 0, "cpu") is None
        backend = dispatch.load("reference")
        normalize, weight_grad = backend.normalize, backend.depthwise_weight_grad

        def wrong_normalize(a, activation, norm, residual, updates=()):
            y = normalize(a, activation, norm, residual, updates)
            if planted == "value":
                y[1, 3] *= 1 + 2e-6 * y.norm() / y[1, 3].norm()
            if planted == "nan":
                y[1, 3, 4, 5] = float("nan")
            if planted == "input":
                residual[0, 0, 0, 0] += 1
            if planted == "statistic":
                updates[0].running_var.mul_(1 + 2e-6)
            return y

        def wrong_weight_grad(*arguments):
            dw, db = weight_grad(*arguments)
            return (dw * (1 + 2e-6) if planted == "gradient" else dw), db

        monkeypatch.setattr(backend, "normalize", wrong_normalize)
        monkeypatch.setattr(backend, "depthwise_weight_grad", wrong_weight_grad)
        with pytest.raises(fuzz.Wrong, match="changed x" if planted == "input" else None):
            fuzz.check(call, 0, "cpu")


def test_a_missing_check_is_found(monkeypatch):
    """Without the checks of the convolution's arguments the second fuzzer fails."""
    monkeypatch.setattr(ck.functional.checks, "check_depthwise_convolution", lambda *_: None)
    results = [fuzz_wrong.run_case(0, number, "reference") for number in range(100)]
    assert any(result is not None and "ran" in result for result in results)

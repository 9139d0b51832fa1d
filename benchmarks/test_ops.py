# SPDX-License-Identifier: MIT
"""The operator suite's cases under pytest-benchmark, for its tooling: pytest benchmarks --benchmark-only.

A group is a case, a test one implementation of it, checked before it is timed. Unlike python -m benchmarks ops it times one
implementation after the other: compare what is interleaved there.
"""

from __future__ import annotations

import argparse
import functools

import pytest
import torch

from benchmarks import peers, shapes, suite

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    which = metafunc.config.getoption("--cases")
    patterns = metafunc.config.getoption("--filter")
    chosen = shapes.select(shapes.cases(_DEVICE.type), which == "quick", patterns)
    if which == "tiny":
        chosen = list({case.tiny().name: case.tiny() for case in chosen}.values())
    names = peers.names(_DEVICE.type)
    pairs = [(case, name) for case in chosen for name in names]
    metafunc.parametrize("case, name", pairs, ids=[f"{case.name}-{name}" for case, name in pairs])


@functools.lru_cache(maxsize=1)
def _inputs(case: shapes.Case, rotate: bool) -> peers.Inputs:
    return suite.make_inputs(case, _DEVICE, rotate)


def test_operator(benchmark, request: pytest.FixtureRequest, case: shapes.Case, name: str) -> None:
    inputs = _inputs(case, request.config.getoption("--cases") != "tiny")
    options = argparse.Namespace(
        implementations=[name], compile_all=request.config.getoption("--compile-all"), tiny=False
    )
    ready, absent = suite.prepare(inputs, options)
    if name in absent:
        pytest.skip(absent[name])
    if name.startswith("ours"):
        wrong = [each for each in suite.verify(inputs, ready)[name] if not each.passed]
        assert not wrong
    elif name not in peers.EAGER.values():
        try:
            with ready[name].setting():
                ready[name].calls[0]()
        except RuntimeError as error:
            pytest.skip(f"failed: {peers.first_line(error)}")
    benchmark.group = case.name
    benchmark.extra_info.update({"implementation": name, "op": case.op})
    benchmark(suite.rotating(ready[name], _DEVICE))

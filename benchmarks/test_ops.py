# SPDX-License-Identifier: MIT
"""The same cases under pytest-benchmark, for its tooling: pytest benchmarks --benchmark-only.

A group is a case, a test one implementation of it, checked before it is timed. Unlike python -m benchmarks ops it times one
implementation after the other, so compare figures of that command.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import cases, check, engine, peers

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    which = metafunc.config.getoption("--cases")
    chosen = cases.select(cases.cases(_DEVICE.type), which == "quick", metafunc.config.getoption("--filter"))
    if which == "tiny":
        chosen = list({case.tiny().name: case.tiny() for case in chosen}.values())
    pairs = [(case, name) for case in chosen for name in peers.names(_DEVICE.type)]
    metafunc.parametrize("case, name", pairs, ids=[f"{case.name}-{name}" for case, name in pairs])


@functools.lru_cache(maxsize=1)
def _workload(case: cases.Case, rotate: bool) -> tuple[peers.Workload, check.Expected]:
    workload = engine.make_workload(case, _DEVICE, rotate)
    return workload, check.expect(workload)


def test_operator(benchmark, request: pytest.FixtureRequest, case: cases.Case, name: str) -> None:
    option = request.config.getoption
    workload, expected = _workload(case, option("--cases") != "tiny")
    ready, absent = engine.prepare(workload, [name], option("--compile-all"))
    verdicts = engine.verify(workload, expected, ready, absent)
    if name in absent:
        pytest.skip(absent[name])
    assert not name.startswith("ours") or all(each.passed for each in verdicts[name])
    benchmark.group = case.name
    benchmark.extra_info.update({"implementation": name, "op": case.op})
    benchmark(engine.rotating(ready[name], _DEVICE))

# SPDX-License-Identifier: MIT
"""The quick cases under pytest-benchmark, for its tooling: pytest benchmarks --benchmark-only -k 'depthwise_eval and k9'.

A group is a case, a test one implementation of it, checked before it is timed. Unlike python -m benchmarks ops it times one
implementation after the other, so compare figures of that command.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import cases, check, engine, peers

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_PAIRS = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for case in cases.select(cases.cases(_DEVICE.type), True, [])
    for name in peers.names(_DEVICE.type)
]


@functools.lru_cache(maxsize=1)
def _workload(case: cases.Case) -> tuple[peers.Workload, check.Expected]:
    workload = engine.make_workload(case, _DEVICE)
    return workload, check.expect(workload)


@pytest.mark.parametrize("case, name", _PAIRS)
def test_operator(benchmark, case: cases.Case, name: str) -> None:
    workload, expected = _workload(case)
    try:
        prepared, verdict = engine.verify(name, workload, expected)
    except peers.Absent as reason:
        pytest.skip(str(reason))
    assert not name.startswith("ours") or all(each.passed for each in verdict)
    benchmark.group = case.name
    benchmark.extra_info.update({"implementation": name, "op": case.op})
    benchmark(engine.rotating(prepared, _DEVICE))

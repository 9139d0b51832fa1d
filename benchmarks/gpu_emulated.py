# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu --device cpu: all its steps on emulated kernels at sizes that take seconds, with faults if they are wanted.

For tests. Backend "cuda" takes CPU tensors if CONVMIXER_CUDA_EMULATION names the module that tests/emulation/build.py prints, and
"triton" if TRITON_INTERPRET=1 is set. Times mean nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks import check, gpu_tools, peers
from benchmarks.cases import ModelCase, from_json, to_json
from benchmarks.gpu_run import Job, label

#: Of the GPU that the emulator imitates; it has two multiprocessors.
CAPABILITY = (9, 0)
CLOCK_HZ = 1e9
GPU = {"name": "emulated GPU", "capability": "9.0", "multiprocessors": 2}
ENVIRONMENT = {"device": "emulated GPU", "device_type": "cuda"}

#: The plane is one of those that the kernels' prediction knows and that wgmma takes.
_SHAPE = (1, 8, 32, 32)
#: An emulated call takes a second at most, but another program may have the cores.
_LIMIT, _HANG_LIMIT = 60, 3
FAULTS = ("hang", "crash", "wrong")
_plants: dict[str, str] = {}  # words of a job, and its fault


def use() -> None:
    gpu_tools.on_cpu()
    # not the pooled hundreds of channels, which an emulator takes minutes for
    check.POOL = 1


def plant(text: str | None) -> str | None:
    """Take over --plant hang=CASE,crash=CASE,wrong=CASE: CASE is a part of a job's name. Returns what is wrong with it, if anything."""
    for part in (text or "").split(",") if text else ():
        fault, _, job = part.partition("=")
        if fault not in FAULTS or not job:
            return f"--plant must be FAULT=CASE,... with the faults {', '.join(FAULTS)}, got {part}"
        _plants[job] = fault
    return None


def adapt(jobs: Sequence[Job], device: torch.device) -> Sequence[Job]:
    """On a CPU the first job of each operator, of checks also of each choice of ours, and one torch.compile: small, with its fault."""
    if device.type == "cuda":
        return jobs
    found: dict[Any, Job] = {}
    for job in jobs:
        if job["kind"] == "confirm":
            # these have sizes of their own; tests/test_gpu_confirm.py runs them
            continue
        small = {**job, "limit": _LIMIT}
        if "cases" in job:
            small["cases"] = [_small(case) for case in job["cases"][:1]]
        if "case" in job:
            small["case"] = _small(job["case"])
        names = job.get("names", ("",))
        key = "compile" if names[0].startswith("compile") else job.get("case", job).get("op")
        found.setdefault((key, *names) if job.get("timed") is False else key, small)
    for job in found.values():
        for words, fault in _plants.items():
            if words in label(job):
                job |= {"plant": fault, "limit": _HANG_LIMIT if fault == "hang" else _LIMIT}
    return list(found.values())


def _small(fields: dict[str, Any]) -> dict[str, Any]:
    case = from_json(fields)
    small = case.tiny() if isinstance(case, ModelCase) else dataclasses.replace(case, shape=_SHAPE, channels_out=None)
    return to_json(small)


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """A job inside `with` has this fault."""
    if fault == "hang":
        time.sleep(600)
    if fault == "crash":
        os.abort()
    honest = peers.prepare
    if fault == "wrong":
        peers.prepare = _wrong(honest)
    try:
        yield
    finally:
        peers.prepare = honest


def _wrong(honest: Callable[..., peers.Prepared]) -> Callable[..., peers.Prepared]:
    """Every first result of ours has one wrong value."""

    def prepare(name: str, *rest: Any) -> peers.Prepared:
        prepared = honest(name, *rest)
        if name.startswith("ours"):
            prepared.calls = [lambda call=call: _spoilt(call()) for call in prepared.calls]
        return prepared

    return prepare


def _spoilt(results: peers.Results) -> peers.Results:
    first = results[0].detach().clone()
    first.view(-1)[0] += first.abs().max() + 1
    return (first, *results[1:])

# SPDX-License-Identifier: MIT
"""The steps of benchmarks.gpu: which jobs they give to a worker, and the programs that they run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_confirm, machine, peers
from benchmarks.cases import ModelCase, OpCase, cases, from_json, select, to_json
from benchmarks.gpu_run import Job, Run, end, killed, label, run_jobs, summary
from convmixer_kernels import dispatch

SUMMARY = "summary.md"
#: A program that has less is not started.
_LEAST_SECONDS = 5
#: Beside the rows of which operator each bound is timed.
_BOUNDS = {peers.CLONE: "depthwise_eval", peers.MATMUL: "pointwise_eval"}


def _job(case: OpCase | ModelCase, names: Sequence[str], limit: float) -> Job:
    return {"kind": "measure", "case": to_json(case), "names": list(names), "limit": limit}


def _cases(kind: type) -> list[Any]:
    return [case for case in select(cases("cuda"), True, []) if isinstance(case, kind)]


def operator_jobs(backend: str, device: str) -> list[Job]:
    """Every case, with each choice of GEMM and with eager PyTorch."""
    jobs = []
    for case in _cases(OpCase):
        forced: tuple[str, ...] = ()
        if backend == "cuda":
            # the emulator imitates an H100
            forced = peers.gemms_of(case, torch.cuda.get_device_capability() if device == "cuda" else (9, 0))
        # a forced choice that hangs or crashes costs none of the rows before it
        bounds = [each for each, op in _BOUNDS.items() if case.op == op]
        names = [f"ours {backend}", peers.EAGER[case.layout], *bounds, *(f"ours cuda {gemm}" for gemm in forced)]
        jobs.append(_job(case, names, 30 + 5 * len(names)))
    return jobs


def triton_jobs() -> list[Job]:
    """The headline cases; each kernel is compiled in several configurations first."""
    headline = [case for case in _cases(OpCase) if case.shape[1] == 1536 and not case.op.startswith("layer")]
    return [_job(case, ["ours triton"], 60) for case in headline]


def model_jobs(backend: str) -> list[Job]:
    return [_job(case, [f"ours {backend}", peers.EAGER[case.layout]], 60) for case in _cases(ModelCase)]


def compile_jobs() -> list[Job]:
    """torch.compile as a peer: minutes of compiling for milliseconds of measuring, so it comes late.

    max-autotune compiles longest: the blocks and, last of all, the training step of the smallest model.
    """
    compiled = [case for case in (*_cases(OpCase), *_cases(ModelCase)) if case.compiled]
    jobs = [_job(case, ["compile"], 40 if isinstance(case, OpCase) else 100) for case in compiled]
    longest = [case for case in compiled if isinstance(case, OpCase) and case.layout == "contiguous"]
    longest += [case for case in compiled if isinstance(case, ModelCase) and case.model == "256/8@32" and case.training]
    return [*jobs, *(_job(case, ["compile max-autotune"], 100) for case in longest)]


def confirm_jobs(run: Run) -> list[Job]:
    # torch's deterministic matrix products want it before their handle is made: in a new worker
    run.end_worker()
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return [{"kind": "confirm", "name": name, "limit": 120} for name in gpu_confirm.CONFIRMATIONS]


_JOBS: dict[str, Callable[[Run, list[str]], list[Job]]] = {
    "operators": lambda run, backends: operator_jobs(backends[0], run.device),
    "models": lambda run, backends: model_jobs(backends[0]),
    "triton": lambda run, backends: triton_jobs() if len(backends) > 1 else [],
    "compile": lambda run, backends: compile_jobs(),
    "confirm": lambda run, backends: confirm_jobs(run),
}


def rehearsal(jobs: Sequence[Job], plants: dict[str, str]) -> list[Job]:
    """For a CPU: the first job of each operator, and one of each mode of torch.compile.

    Args:
        plants: words of a job's name, and the fault that it gets.
    """
    found: dict[Any, Job] = {}
    for job in jobs:
        if job["kind"] == "confirm":
            # these have sizes of their own; tests/test_gpu_confirm.py runs them
            continue
        case, name = from_json(job["case"]), job["names"][0]
        # a plane that wgmma takes
        tiny = case.tiny() if isinstance(case, ModelCase) else dataclasses.replace(case, shape=(1, 8, 32, 32))
        # an emulated call takes a second at most, but another program may have the cores
        small = {**job, "case": to_json(tiny), "limit": 60}
        found.setdefault(name if name.startswith("compile") else case.op, small)
    for job in found.values():
        for words, fault in plants.items():
            if words in label(job):
                job |= {"plant": fault, "limit": 3 if fault == "hang" else 60}
    return list(found.values())


def _command(run: Run, command: list[str], limit: float, log: Path, **environment: str) -> int | None:
    """Run a command in the repository's root, its output in a file as it comes: its exit status, None if it ran out of time."""
    if (program := shutil.which("setpriv")) is not None:
        # it ends with this process: if that is killed, the next command must not share the GPU with it
        command = [program, "--pdeathsig", "KILL", *command]
    with open(log, "ab") as file:
        output = {"stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            command, cwd=machine.ROOT, env=os.environ | environment, start_new_session=True, **output
        )
        try:
            return process.wait(timeout=max(1.0, min(limit, run.left() - 3)))
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process.pid)
            # one that waits for the GPU goes as soon as the driver lets it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)


def tests(run: Run, limit: float, no_cuda: str | None) -> dict[str, Any]:
    """The tests marked gpu: the cases of the emulation with the real kernels, in parallel, each with a time limit."""
    log = run.path.parent / "tests.log"
    # a rehearsal's tests: a file whose GPU tests are skipped
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *(["tests/test_triton.py"] if run.device == "cpu" else [])]
    command += ["-v", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout=90"]
    status = _command(run, command, limit, log)
    lines = log.read_text(errors="replace").splitlines()
    passed = sum(" PASSED" in line or line.startswith("PASSED") for line in lines)
    text = f"out of time after {passed} passed" if status is None else lines[-1].strip("= ") if lines else ""
    failures = sorted({line for line in lines if line.startswith(("FAILED", "ERROR"))})
    return {"ok": status == 0, "summary": text, "failures": failures[:100]}


def is_clean(tool: str, status: int | None, output: str) -> bool:
    """Whether a compute-sanitizer tool ran to its end and found nothing: neither errors nor hazards, nor warnings."""
    wanted = "0 hazards displayed (0 errors, 0 warnings)" if tool == "racecheck" else "0 errors"
    found = {line.strip() for line in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)}
    return status == 0 and found == {wanted}


def sanitizer(run: Run, limit: float, no_cuda: str | None) -> dict[str, Any]:
    """compute-sanitizer's tools over every CUDA kernel at small sizes."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if no_cuda is not None or program is None:
        return {"ok": True, "summary": f"skipped: {no_cuda or 'compute-sanitizer is not installed'}"}
    until, found = time.monotonic() + limit, {}
    tools = ("memcheck", "racecheck", "initcheck")
    for index, tool in enumerate(tools):
        log = run.path.parent / f"{tool}.log"
        command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "benchmarks.gpu"]
        share = (until - time.monotonic()) / (len(tools) - index)
        # without torch's caching every tensor is an allocation of its own, with its own bounds
        status = _command(run, [*command, "--workload", "sanitizer"], share, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        clean = is_clean(tool, status, log.read_text(errors="replace"))
        found[tool] = "clean" if clean else "out of time" if status is None else f"see {log.name}"
    text = ", ".join(f"{tool} {verdict}" for tool, verdict in found.items())
    return {"ok": set(found.values()) == {"clean"}, "summary": text}


def profile(run: Run, limit: float, no_cuda: str | None) -> dict[str, Any]:
    """Nsight Compute on one launch of each headline kernel, to DIR/ncu.log: speed of light, occupancy, why warps did not issue."""
    program = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if no_cuda is not None or program is None:
        return {"ok": True, "summary": f"skipped: {no_cuda or 'ncu is not installed'}"}
    command = [program, "--clock-control", "none", "--profile-from-start", "off", "--nvtx", "--print-details", "all"]
    command += ["--kernel-name-base", "demangled", "--kernel-name", "regex:convmixer|gemm|nvjet|xmma"]
    for section in ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "MemoryWorkloadAnalysis"):
        command += ["--section", section]
    command += [sys.executable, "-m", "benchmarks.gpu", "--workload", "profile"]
    status = _command(run, command, limit, run.path.parent / "ncu.log")
    return {"ok": status == 0, "summary": "out of time" if status is None else f"status {status}: ncu.log"}


_PROGRAMS = {"tests": tests, "sanitizer": sanitizer, "profile": profile}


def measured_backends(device: str = "cuda") -> tuple[list[str], dict[str, str]]:
    """The backends that run on this GPU, the one to be measured first at the front, and why the others do not."""
    x, weight = torch.empty(1, 8, 16, 16, device=device), torch.empty(8, 1, 9, 9, device=device)
    found = {name: dispatch.load(name).can_run("depthwise", x, weight) for name in ("cuda", "triton")}
    absent = {name: reason for name, reason in found.items() if reason is not None}
    return [name for name in found if name not in absent], absent


def measure(run: Run, steps: Sequence[str], shares: dict[str, float], plants: dict[str, str]) -> int:
    """Run `steps` in the order of `shares`, which says what each one's seconds are; the command's exit status.

    A step may also take what the steps before it have left, but nothing of the later ones' shares. If there is less time than all
    shares together, all are cut alike.
    """
    before = run.document.get("environment", {}).get("commit")
    if before != machine.commit() and before is not None:
        print(f"benchmarks.gpu: {run.path.parent} has rows of commit {before}: name another folder", file=sys.stderr)
        return 2
    run.note("kind", "gpu")
    if (lost := killed(run.document)) is not None:
        # it may have been at fault: it is not run again
        run.append("broken", lost)
        run.append("done", lost["job"])
        run.note("under_way", None)
    backends, absent = measured_backends(run.device)
    for backend, reason in absent.items():
        print(f"{backend}: - ({reason})", flush=True)
    run.note("absent", absent)
    if not backends:
        print("benchmarks.gpu: no backend for this GPU", file=sys.stderr)
        return 2
    emulated = {"device": "emulated GPU", "device_type": "cuda"} if run.device == "cpu" else {}
    run.note("environment", machine.describe(torch.device(run.device), backends[0]) | emulated)
    try:
        run_jobs(run, "peaks", [{"kind": "peaks", "limit": 30}], 60)
        chosen = [step for step in shares if step in steps]
        scale = min(1.0, run.left() / sum(shares[step] for step in chosen))
        for index, step in enumerate(chosen):
            start = time.monotonic()
            later = sum(shares[each] for each in chosen[index + 1 :])
            seconds = run.left() - scale * later
            if step in _JOBS:
                jobs = _JOBS[step](run, backends)
                run_jobs(run, step, rehearsal(jobs, plants) if run.device == "cpu" else jobs, seconds)
            elif step not in run.document.get("done", ()):
                run.note(f"{step}_left_out", [step] if seconds < _LEAST_SECONDS else [])
                if seconds >= _LEAST_SECONDS:
                    run.note("under_way", {"step": step, "job": step})
                    found = _PROGRAMS[step](run, seconds, absent.get("cuda"))
                    run.note(step, found)
                    run.append("done", step)
                    print(f"{step}: {found['summary']}", flush=True)
            run.append("steps", {"step": step, "seconds": round(time.monotonic() - start, 1)})
    finally:
        run.end_worker()
    run.note("under_way", None)
    text = summary(run.document)
    (run.path.parent / SUMMARY).write_text(text)
    print(text, flush=True)
    outcomes = [run.document.get(key, {"ok": True}) for key in ("tests", "sanitizer")]
    wrong = not all(each["ok"] for each in (*outcomes, *run.document.get("confirmed", {}).values()))
    wrong = wrong or any(row["wrong"] for row in run.document["results"])
    return 1 if wrong or run.document.get("broken") else 0

# SPDX-License-Identifier: MIT
"""The steps of benchmarks.gpu: which jobs they have, and what a worker does with a job."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import check, engine, gpu_confirm, gpu_tools, machine, peers, tables
from benchmarks.cases import ModelCase, OpCase, cases, from_json, select, to_json
from benchmarks.console import first_line
from benchmarks.gpu_run import Job, Run, run_jobs
from convmixer_kernels import dispatch
from convmixer_kernels.backends import triton

#: Of timing one implementation of a model, which fewer calls fill.
_MODEL_SECONDS = 0.5
_DEVICE = torch.device("cuda")


def worker(path: Path) -> int:
    """The jobs of standard input, each announced on standard output by a line that begins with a record separator."""
    jobs: list[Job] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run = Run(path)
    if torch.cuda.is_available():
        # a context takes seconds, which are not the first job's
        torch.zeros(1, device="cuda").sum().item()
    for job in jobs:
        print("\x1e", flush=True)
        do(run, job)
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def do(run: Run, job: Job) -> None:
    """One job, with the environment variables that it sets."""
    settings = job.get("settings", {})
    os.environ.update(settings)
    _KINDS[job["kind"]](run, **{key: value for key, value in job.items() if key not in ("kind", "limit", "settings")})
    for key in settings:
        del os.environ[key]


def _peaks(run: Run) -> None:
    peaks = machine.measure_peaks(_DEVICE, ("bfloat16", "float16", "float32"))
    run.append("sessions", machine.session(_DEVICE, peaks))


def _measure(run: Run, case: dict[str, Any], names: Sequence[str], timed: bool = True) -> None:
    """The row of a case, on disk implementation by implementation; one that fails does not take the others with it."""
    measured = from_json(case)
    workload = engine.make_workload(measured, _DEVICE, rotate=timed)
    expected = check.expect(workload)
    sessions = run.document["sessions"]
    peaks = machine.Peaks(**sessions[-1]["peaks"]) if timed else None
    seconds = _MODEL_SECONDS if isinstance(measured, ModelCase) else engine.GPU_SECONDS
    clock = engine.clock_of(_DEVICE, seconds, None) if timed else None
    for name in names:
        try:
            row = engine.measure(workload, [name], clock, peaks, compile_all=True, expected=expected)
        except _failures() as error:
            torch.cuda.synchronize()
            row = {**engine.case_fields(measured), "implementations": {}, "absent": {}, "wrong": []}
            if name.startswith("ours"):
                row["wrong"].append({"implementation": name, "failure": first_line(error)})
            else:
                row["absent"][name] = f"failed: {first_line(error)}"
        run.row({**row, "session": len(sessions) - 1}, "results" if timed else "checks")
        torch.cuda.empty_cache()


def _failures() -> tuple[type[Exception], ...]:
    """What a kernel that cannot run raises: Triton's errors are no RuntimeError."""
    if not triton.build_info()["available"]:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def _names(run: Run, cases: Sequence[dict[str, Any]]) -> None:
    """Which kernels a call of the cuda backend launches, by case, in order."""
    from torch.profiler import ProfilerActivity, profile

    for case in map(from_json, cases):
        workload = engine.make_workload(case, _DEVICE, rotate=False)
        call = peers.prepare("ours cuda", workload, False).calls[0]
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        names = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        run.append("kernels", {"case": case.name, "names": names})


def _confirm(run: Run, name: str) -> None:
    run.note(name, gpu_confirm.outcome(name))


def _fault(run: Run, how: str) -> None:
    """For tests of what a broken kernel does to a run."""
    if how == "hang":
        time.sleep(600)
    if how == "crash":
        os.abort()
    if how == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    wrong = [{"implementation": "ours", "failure": how}] if how == "wrong" else []
    run.row({"case": how, "implementations": {}, "absent": {}, "wrong": wrong})


_KINDS: dict[str, Callable[..., None]] = {
    "peaks": _peaks,
    "measure": _measure,
    "names": _names,
    "confirm": _confirm,
    "fault": _fault,
}


def _job(case: OpCase | ModelCase, names: Sequence[str], limit: float, **more: Any) -> Job:
    return {"kind": "measure", "case": to_json(case), "names": list(names), "limit": limit, **more}


def check_jobs(backends: Sequence[str]) -> list[Job]:
    """Checks of the riskiest kernels, without times; those that have run least on hardware come first."""

    def job(op: str, shape: tuple[int, int, int, int], *gemms: str, layout: str = "contiguous", **more: Any) -> Job:
        case = OpCase(op, "check", shape, layout=layout, **{"dtype": "bfloat16", **more})
        return _job(case, [f"ours cuda {gemm}".strip() for gemm in gemms or ("",)], 20, timed=False)

    last, big = "channels_last", (64, 1536, 32, 32)
    jobs = [
        job("depthwise_eval", (5, 24, 17, 17)),
        job("depthwise_input_grad", (5, 24, 7, 7)),
        job("depthwise_weight_grad", (5, 24, 17, 17)),
        job("depthwise_weight_grad", (5, 24, 40, 40), kernel=15),
        job("depthwise_input_grad", (8, 64, 32, 32), layout=last),
        job("depthwise_weight_grad", (8, 64, 32, 32), layout=last),
        job("depthwise_weight_grad", (8, 64, 32, 32), dtype="float32"),
        job("pointwise_eval", (8, 256, 32, 32), "fused", "torch"),
        job("pointwise_train", (8, 256, 32, 32), "fused", "torch", layout=last),
        job("layer_eval", (8, 256, 32, 32), "fused", "layer"),
        job("pointwise_eval", (2, 128, 8, 8), "wgmma"),
        job("pointwise_train", (8, 192, 32, 32), "wgmma", layout=last),
        job("pointwise_eval", big, "wgmma"),
        job("pointwise_backward", (5, 136, 8, 24), "wgmma"),
        job("pointwise_backward", big, "wgmma"),
    ]
    return jobs if "cuda" in backends else []


def _cases() -> tuple[list[OpCase], list[ModelCase]]:
    chosen = select(cases("cuda"), True, [])
    return [c for c in chosen if isinstance(c, OpCase)], [c for c in chosen if isinstance(c, ModelCase)]


def operator_jobs(backend: str, wgmma: bool) -> list[Job]:
    """Every case, with each choice of GEMM and with eager PyTorch."""
    jobs = []
    for case in _cases()[0]:
        forced = peers.gemms_of(case, torch.cuda.get_device_capability()) if backend == "cuda" else ()
        names = [f"ours {backend}", *(f"ours cuda {gemm}" for gemm in forced if wgmma or gemm != "wgmma")]
        names += [peers.EAGER[case.layout]] + ([peers.CLONE] if case.op == "depthwise_eval" else [])
        jobs.append(_job(case, names, 30 + 5 * len(names)))
    return jobs


def triton_jobs() -> list[Job]:
    """The headline cases; each kernel is compiled in several configurations first."""
    headline = [case for case in _cases()[0] if case.shape[1] == 1536 and not case.op.startswith("layer")]
    return [_job(case, ["ours triton"], 60) for case in headline]


def model_jobs(backends: Sequence[str]) -> list[Job]:
    return [
        _job(case, [*(f"ours {backend}" for backend in backends), peers.EAGER[case.layout]], 60) for case in _cases()[1]
    ]


def compile_jobs() -> list[Job]:
    """torch.compile as a peer: minutes of compiling for milliseconds of measuring, so it comes late."""
    operators, models = _cases()
    jobs = [_job(case, ["compile"], 40) for case in operators if case.compiled]
    return jobs + [_job(case, ["compile"], 100) for case in models if case.compiled]


def names_job() -> Job:
    return {"kind": "names", "cases": [to_json(case) for case in _cases()[0]], "limit": 60}


def confirm_jobs() -> list[Job]:
    # torch's deterministic matrix products want it before their handle is made
    settings = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return [{"kind": "confirm", "name": name, "settings": settings, "limit": 120} for name in gpu_confirm.CONFIRMATIONS]


def measured_backends(device: str = "cuda") -> tuple[list[str], dict[str, str]]:
    """The backends that run on this GPU, the one to be measured first at the front, and why the others do not."""
    found: list[str] = []
    absent: dict[str, str] = {}
    x, weight = torch.empty(1, 8, 16, 16, device=device), torch.empty(8, 1, 9, 9, device=device)
    for name in ("cuda", "triton"):
        reason = dispatch.load(name).can_run("depthwise", x, weight)
        if reason is None:
            found.append(name)
        else:
            absent[name] = reason
    return found, absent


def describe(run: Run, backend: str) -> None:
    """Write down the machine and the versions."""
    run.note("environment", machine.describe(_DEVICE, backend))
    properties = torch.cuda.get_device_properties(0)
    run.note(
        "gpu",
        {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
    )


def measure(run: Run, steps: Sequence[str], most: dict[str, float]) -> int:
    """Run `steps` in the order of `most`, which says how many seconds each may take; the command's exit status."""
    run.note("kind", "gpu")
    backends, absent = measured_backends()
    for backend, reason in absent.items():
        print(f"{backend}: - ({reason})", flush=True)
    run.note("absent", absent)
    if not backends:
        print("benchmarks.gpu: no backend for this GPU", file=sys.stderr)
        return 2
    describe(run, backends[0])
    run_jobs(run, "peaks", [{"kind": "peaks", "limit": 30}], 60)
    for step in most:
        if step in steps and run.left() > 5:
            start = time.monotonic()
            _STEPS[step](run, min(most[step], run.left()), backends, absent)
            run.append("steps", {"step": step, "seconds": round(time.monotonic() - start, 1)})
    text = summary(run.document)
    (run.path.parent / "summary.txt").write_text(text)
    print(text, flush=True)
    failed = [key for key in ("tests", "sanitizer") if not run.document.get(key, {"ok": True})["ok"]]
    wrong = any(row["wrong"] for key in ("checks", "results") for row in run.document.get(key, ()))
    return 1 if failed or wrong or run.document.get("broken") else 0


def _wgmma_is_right(run: Run) -> bool:
    """A forced choice that failed its checks must not take the rows of the others with it."""
    right = wrong = 0
    for row in run.document.get("checks", ()):
        right += any(name.endswith(" wgmma") for name in row["implementations"])
        wrong += any(each["implementation"].endswith(" wgmma") for each in row["wrong"])
    return right >= 3 and not wrong and not any("wgmma" in each["job"] for each in run.document.get("broken", ()))


_STEPS: dict[str, Callable[[Run, float, list[str], dict[str, str]], None]] = {
    "check": lambda run, s, backends, absent: run_jobs(run, "check", check_jobs(backends), s),
    "operators": lambda run, s, backends, absent: run_jobs(
        run, "operators", operator_jobs(backends[0], _wgmma_is_right(run)), s
    ),
    "models": lambda run, s, backends, absent: run_jobs(run, "models", model_jobs(backends[:1]), s),
    "profile": lambda run, s, backends, absent: gpu_tools.profile(run, s),
    "tests": lambda run, s, backends, absent: gpu_tools.tests(run, s),
    "sanitizer": lambda run, s, backends, absent: gpu_tools.sanitizer(run, s, absent.get("cuda")),
    "names": lambda run, s, backends, absent: run_jobs(run, "names", [names_job()] if "cuda" in backends else [], s),
    "triton": lambda run, s, backends, absent: run_jobs(run, "triton", triton_jobs() if len(backends) > 1 else [], s),
    "compile": lambda run, s, backends, absent: run_jobs(run, "compile", compile_jobs(), s),
    "confirm": lambda run, s, backends, absent: run_jobs(run, "confirm", confirm_jobs(), s),
}


def summary(document: dict[str, Any]) -> str:
    """What is wrong or broken first, then the table of the rows."""
    lines = [f"BROKEN {each['job']}: {each['error']}" for each in document.get("broken", [])]
    for key in ("checks", "results"):
        lines += [f"WRONG {tables.explain(row, each)}" for row in document.get(key, []) for each in row["wrong"]]
    for key in ("tests", "sanitizer"):
        found = document.get(key, {})
        if found and not found["ok"]:
            lines.append(f"{key.upper()} NOT OK: {found.get('summary', '')}")
            lines += [f"  {line}" for line in found.get("failures", [])]
    for key, left in document.items():
        if key.endswith("_left_out"):
            lines.append(f"{key.removesuffix('_left_out')}: {len(left)} left out, from {left[0]} on")
    timed = [row for row in document["results"] if row["implementations"]]
    lines += ["", *tables.markdown_lines(tables.operators(timed, "cuda"), 3), ""]
    lines += [f"- {backend}: {reason}" for backend, reason in document.get("absent", {}).items()]
    steps = ", ".join(f"{each['step']} {each['seconds']:.0f} s" for each in document.get("steps", []))
    return "\n".join([*lines, f"steps: {steps}", ""])

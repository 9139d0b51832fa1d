# SPDX-License-Identifier: MIT
"""The steps of benchmarks.gpu: which jobs they have, and what a worker does with a job."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import check, engine, gpu_confirm, gpu_emulated, gpu_summary, gpu_tools, machine, peers, timing
from benchmarks.cases import ModelCase, OpCase, cases, from_json, select, to_json
from benchmarks.console import first_line
from benchmarks.gpu_run import READY, Job, Run, killed, run_jobs
from convmixer_kernels import dispatch
from convmixer_kernels.backends import triton

#: Of timing one implementation of a model, which fewer calls fill.
_MODEL_SECONDS = 0.5
_DEVICE = torch.device("cuda")
#: A tool that has less is not started.
_LEAST_SECONDS = 5


def use_cpu() -> None:
    """Tensors on the CPU, for emulated kernels."""
    global _DEVICE
    _DEVICE = torch.device("cpu")
    gpu_emulated.use()


def _synchronize() -> None:
    if _DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if _DEVICE.type == "cuda" else gpu_emulated.CAPABILITY


def worker(path: Path) -> int:
    """The jobs of standard input, one a line; gpu_run.READY on standard output says that the next one can come."""
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    run = Run(path)
    if _DEVICE.type == "cuda":
        # a context takes seconds, which are not the first job's
        torch.zeros(1, device="cuda").sum().item()
    while True:
        print(READY, flush=True)
        job = json.loads(jobs.get())
        run.reload()
        do(run, job)


def _read(jobs: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        jobs.put(line)
    # the command has ended, however it did
    os._exit(0)


def do(run: Run, job: Job) -> None:
    """One job. If it has a planted fault (for tests: --plant), it hangs, crashes or is wrong."""
    fields = {key: value for key, value in job.items() if key not in ("kind", "limit", "settings", "plant")}
    with gpu_emulated.planted(job.get("plant")):
        _KINDS[job["kind"]](run, **fields)


def _peaks(run: Run) -> None:
    peaks = machine.measure_peaks(_DEVICE, ("bfloat16", "float16", "float32"), small=_DEVICE.type == "cpu")
    run.append("sessions", machine.session(_DEVICE, peaks) | {"clock_hz": _clock_hz()})


def _clock_hz() -> float:
    """Cycles a second of a multiprocessor, by a kernel that waits for so many of them."""
    if _DEVICE.type == "cpu":
        return gpu_emulated.CLOCK_HZ
    cycles = 50_000_000
    return cycles / min(timing.elapsed(lambda: torch.cuda._sleep(cycles), _DEVICE) for _ in range(3))


def _measure(run: Run, case: dict[str, Any], names: Sequence[str], timed: bool = True) -> None:
    """The row of a case, on disk implementation by implementation; one that fails does not take the others with it."""
    measured = from_json(case)
    workload = engine.make_workload(measured, _DEVICE, rotate=timed and _DEVICE.type == "cuda")
    expected = check.expect(workload)
    # without peaks (their own job broke) a row has no floor
    sessions = run.document.get("sessions", [])
    peaks = machine.Peaks(**sessions[-1]["peaks"]) if timed and sessions else None
    seconds = _MODEL_SECONDS if isinstance(measured, ModelCase) else engine.GPU_SECONDS
    clock = engine.clock_of(_DEVICE, seconds, 1 if _DEVICE.type == "cpu" else None) if timed else None
    for name in names:
        try:
            row = engine.measure(workload, [name], clock, peaks, compile_all=True, expected=expected)
        except _failures() as error:
            _synchronize()
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

    kind = _DEVICE.type.upper()
    for case in map(from_json, cases):
        workload = engine.make_workload(case, _DEVICE, rotate=False)
        call = peers.prepare("ours cuda", workload, False).calls[0]
        call()
        _synchronize()
        with profile(activities=[getattr(ProfilerActivity, kind)]) as profiler:
            call()
            _synchronize()
        names = [e.name for e in profiler.events() if e.device_type == getattr(torch.autograd.DeviceType, kind)]
        run.append("kernels", {"case": case.name, "names": names})


def _confirm(run: Run, name: str) -> None:
    run.note(name, gpu_confirm.outcome(name))


def _fault(run: Run, how: str) -> None:
    """For tests of what a broken kernel does to a run."""
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
    if "cuda" not in backends:
        return []
    if _capability() != (9, 0):
        # forced there, it would be another kernel under this name
        jobs = [each for each in jobs if each["names"] != ["ours cuda wgmma"]]
    return jobs


def _cases() -> tuple[list[OpCase], list[ModelCase]]:
    chosen = select(cases("cuda"), True, [])
    return [c for c in chosen if isinstance(c, OpCase)], [c for c in chosen if isinstance(c, ModelCase)]


#: Beside the rows of which operator each is timed.
_BOUNDS = {peers.CLONE: "depthwise_eval", peers.MATMUL: "pointwise_eval"}


def operator_jobs(backend: str, wgmma: bool) -> list[Job]:
    """Every case, with each choice of GEMM and with eager PyTorch."""
    jobs = []
    for case in _cases()[0]:
        forced = peers.gemms_of(case, _capability()) if backend == "cuda" else ()
        names = [f"ours {backend}", *(f"ours cuda {gemm}" for gemm in forced if wgmma or gemm != "wgmma")]
        names += [peers.EAGER[case.layout]] + [each for each, op in _BOUNDS.items() if case.op == op]
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


def autotune_jobs() -> list[Job]:
    """max-autotune compiles longest: the blocks and the training step of the smallest model, last of all."""
    operators, models = _cases()
    blocks = [case for case in operators if case.compiled and case.layout == "contiguous"]
    small = [case for case in models if case.compiled and case.model == "256/8@32" and case.training]
    return [_job(case, ["compile max-autotune"], 100) for case in [*blocks, *small]]


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
    if _DEVICE.type == "cpu":
        run.note("environment", machine.describe(_DEVICE, backend) | gpu_emulated.ENVIRONMENT)
        run.note("gpu", gpu_emulated.GPU)
        return
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


def measure(run: Run, steps: Sequence[str], shares: dict[str, float]) -> int:
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
    backends, absent = measured_backends(_DEVICE.type)
    for backend, reason in absent.items():
        print(f"{backend}: - ({reason})", flush=True)
    run.note("absent", absent)
    if not backends:
        print("benchmarks.gpu: no backend for this GPU", file=sys.stderr)
        return 2
    describe(run, backends[0])
    try:
        run_jobs(run, "peaks", [{"kind": "peaks", "limit": 30}], 60)
        chosen = [step for step in shares if step in steps]
        scale = min(1.0, run.left() / sum(shares[step] for step in chosen))
        for index, step in enumerate(chosen):
            start = time.monotonic()
            later = sum(shares[each] for each in chosen[index + 1 :])
            seconds = run.left() - scale * later
            if step in _JOBS:
                run_jobs(run, step, gpu_emulated.adapt(_JOBS[step](run, backends), _DEVICE), seconds)
            elif step not in run.document.get("done", ()):
                run.note(f"{step}_left_out", [step] if seconds < _LEAST_SECONDS else [])
                if seconds >= _LEAST_SECONDS:
                    run.note("under_way", {"step": step, "job": step})
                    _TOOLS[step](run, seconds, absent)
                    run.append("done", step)
            run.append("steps", {"step": step, "seconds": round(time.monotonic() - start, 1)})
    finally:
        run.end_worker()
    run.note("under_way", None)
    text = gpu_summary.summary(run.document)
    (run.path.parent / gpu_summary.FILE).write_text(text)
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
    broken = (each["job"] for each in run.document.get("broken", ()) if each["step"] == "check")
    return right >= 3 and not wrong and not any("wgmma" in job for job in broken)


_JOBS: dict[str, Callable[[Run, list[str]], list[Job]]] = {
    "check": lambda run, backends: check_jobs(backends),
    "operators": lambda run, backends: operator_jobs(backends[0], _wgmma_is_right(run)),
    "models": lambda run, backends: model_jobs(backends[:1]),
    "names": lambda run, backends: [names_job()] if "cuda" in backends else [],
    "triton": lambda run, backends: triton_jobs() if len(backends) > 1 else [],
    "compile": lambda run, backends: compile_jobs(),
    "autotune": lambda run, backends: autotune_jobs(),
    "confirm": lambda run, backends: confirm_jobs(),
}
_TOOLS: dict[str, Callable[[Run, float, dict[str, str]], None]] = {
    "profile": lambda run, seconds, absent: gpu_tools.profile(run, seconds, absent.get("cuda")),
    "tests": lambda run, seconds, absent: gpu_tools.tests(run, seconds),
    "sanitizer": lambda run, seconds, absent: gpu_tools.sanitizer(run, seconds, absent.get("cuda")),
}

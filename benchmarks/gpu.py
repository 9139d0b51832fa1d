# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu: check, measure, profile, test and sanitize the kernels on this machine's GPU, within 9 minutes.

Nothing that happens on the device loses what was found before: every row is appended to DIR/rows.jsonl and flushed before the
next begins, and cases run in worker processes of their own. One that hangs or crashes costs its row; the next worker goes on
behind it. At the end DIR/summary.txt says what is wrong and what is fast, and `python -m benchmarks.gpu --fold DIR` makes
benchmarks/results/<gpu>.json of it. Needs no network. Where there is no _cuda, the Triton backend alone is measured.

On a machine with a GPU for minutes only, compile first elsewhere: `python -m benchmarks.gpu --prepare DIR` writes the device
objects, and the same option on the GPU's machine compiles and links only the binding for its Python.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_run import ROOT, Job, Run, describe_row, end, run_jobs

# ---- what a worker does ----------------------------------------------------------------------------------------------


def worker(path: Path) -> int:
    """The jobs of standard input, each announced on standard output by a line that begins with a record separator."""
    import torch

    from benchmarks import gpu_ops  # noqa: F401

    jobs: list[Job] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run = Run(path)
    if torch.cuda.is_available():
        # a context takes seconds, which are not the first job's
        torch.zeros(1, device="cuda").sum().item()
    for job in jobs:
        print("\x1e", flush=True)
        job = dict(job)
        job.pop("limit", None)
        settings = job.pop("settings", {})
        os.environ.update(settings)
        _KINDS[job.pop("kind")](run, settings, **job)
        for key in settings:
            del os.environ[key]
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _operator(run: Run, settings: dict[str, str], case: list[Any], backend: str, **options: Any) -> None:
    from benchmarks import gpu_ops

    if settings:
        before = run.row
        run.row = lambda row: before({**row, "settings": settings})  # type: ignore[method-assign]
    # sizes of workspaces may depend on settings
    gpu_ops.cuda._size.cache_clear()
    try:
        gpu_ops.measure_case(run, gpu_ops.OpCase.from_json(*case), backend, **options)
    finally:
        if settings:
            run.row = before  # type: ignore[method-assign]


def _peaks(run: Run, settings: dict[str, str]) -> None:
    from benchmarks import gpu_ops

    gpu_ops.peaks(run)


def _compiled_case(run: Run, settings: dict[str, str], case: list[Any]) -> None:
    from benchmarks import gpu_ops

    gpu_ops.compiled_case(run, gpu_ops.OpCase.from_json(*case))


def _names(run: Run, settings: dict[str, str], cases: list[list[Any]]) -> None:
    from benchmarks import gpu_ops

    gpu_ops.kernel_names(run, [gpu_ops.OpCase.from_json(*case) for case in cases])


def _model(run: Run, settings: dict[str, str], **options: Any) -> None:
    from benchmarks import gpu_models

    gpu_models.measure_model(run, **options)


def _compiled_model(run: Run, settings: dict[str, str], **options: Any) -> None:
    from benchmarks import gpu_models

    gpu_models.compiled_model(run, **options)


def _confirm(run: Run, settings: dict[str, str], name: str) -> None:
    from benchmarks import gpu_confirm

    run.note(name, gpu_confirm.outcome(name))


def _fault(run: Run, settings: dict[str, str], how: str) -> None:
    """For tests of what a broken kernel does to a run."""
    if how == "hang":
        time.sleep(600)
    if how == "crash":
        os.abort()
    if how == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    run.row({"case": how, "dtype": "", "layout": "", "implementation": "ours", "ok": how != "wrong"})


_KINDS: dict[str, Callable[..., None]] = {
    "fault": _fault,
    "operator": _operator,
    "peaks": _peaks,
    "compiled_case": _compiled_case,
    "names": _names,
    "model": _model,
    "compiled_model": _compiled_model,
    "confirm": _confirm,
}


# ---- steps ------------------------------------------------------------------------------------------------------------


def check_jobs(backends: Sequence[str]) -> list[Job]:
    """The riskiest kernels, right or wrong only: what has run the least on hardware goes first."""
    bf16, near, last = "bfloat16", "contiguous", "channels_last"
    cases: list[tuple[list[Any], list[str | None]]] = [
        (["depthwise_eval", (5, 24, 17, 17), 9, bf16, near], [None]),
        (["depthwise_input_grad", (5, 24, 7, 7), 9, bf16, near], [None]),
        (["depthwise_weight_grad", (5, 24, 17, 17), 9, bf16, near], [None]),
        (["depthwise_weight_grad", (5, 24, 40, 40), 15, bf16, near], [None]),
        (["depthwise_input_grad", (8, 64, 32, 32), 9, bf16, last], [None]),
        (["depthwise_weight_grad", (8, 64, 32, 32), 9, bf16, last], [None]),
        (["depthwise_weight_grad", (8, 64, 32, 32), 9, "float32", near], [None]),
        (["pointwise_eval", (8, 256, 32, 32), 9, bf16, near], ["fused", "torch"]),
        (["pointwise_train", (8, 256, 32, 32), 9, bf16, last], ["fused", "torch"]),
        (["mixer_eval", (8, 256, 32, 32), 9, bf16, near], ["fused", "layer"]),
        (["pointwise_eval", (2, 128, 8, 8), 9, bf16, near], ["wgmma"]),
        (["pointwise_train", (8, 192, 32, 32), 9, bf16, last], ["wgmma"]),
        (["pointwise_eval", (64, 1536, 32, 32), 9, bf16, near], ["wgmma"]),
        (["pointwise_backward", (5, 136, 8, 24), 9, bf16, near], ["wgmma"]),
        (["pointwise_backward", (64, 1536, 32, 32), 9, bf16, near], ["wgmma"]),
    ]
    return [_operator_job(case, "cuda", gemms=g, timed=False) for case, g in cases] if "cuda" in backends else []


def _operator_job(case: list[Any], backend: str, limit: float = 20, **options: Any) -> Job:
    return {"kind": "operator", "case": case, "backend": backend, "peers": False, "limit": limit, **options}


def operator_jobs(backend: str, wgmma: bool) -> list[Job]:
    """Every case, with each choice of GEMM and with eager PyTorch."""
    import torch

    from benchmarks import gpu_ops

    jobs = []
    for case in gpu_ops.operator_cases():
        forced = gpu_ops.forced_gemms(case, torch.cuda.get_device_capability()) if backend == "cuda" else ()
        gemms = [None, *(gemm for gemm in forced if wgmma or gemm != "wgmma")]
        jobs.append(_operator_job(case.to_json(), backend, 30, gemms=gemms, peers=True))
    return jobs


def triton_jobs() -> list[Job]:
    """The headline cases; each kernel is compiled in several configurations first."""
    from benchmarks import gpu_ops

    cases = [case for case in gpu_ops.operator_cases() if case.shape[:2] in ((64, 1536), (32, 1536))]
    return [_operator_job(case.to_json(), "triton", 60) for case in cases if case.op != "mixer_eval"]


def model_jobs(backends: Sequence[str]) -> list[Job]:
    from benchmarks import gpu_models

    return [
        {"kind": "model", "name": name, "batch": batch, "layout": layout, "training": training, "backends": backends,
         "limit": 60}
        for layout in ("contiguous", "channels_last")
        for name, batch in gpu_models.MODELS
        for training in (False, True)
    ]  # fmt: skip


def compile_jobs() -> list[Job]:
    """torch.compile as a peer: minutes of compiling for milliseconds of measuring, so it comes late."""
    from benchmarks import gpu_models

    headline = [["depthwise_eval", (64, 1536, 32, 32), 9, "bfloat16", "contiguous"],
                ["pointwise_eval", (64, 1536, 32, 32), 9, "bfloat16", "contiguous"],
                ["depthwise_eval", (64, 1536, 32, 32), 9, "bfloat16", "channels_last"]]  # fmt: skip
    jobs: list[Job] = [{"kind": "compiled_case", "case": case, "limit": 40} for case in headline]
    return jobs + [
        {"kind": "compiled_model", "name": name, "batch": batch, "training": training, "limit": 100}
        for name, batch in (gpu_models.MODELS[1], gpu_models.MODELS[0])
        for training in (False, True)
    ]


def names_job() -> Job:
    from benchmarks import gpu_ops

    cases = [case.to_json() for case in gpu_ops.operator_cases() if case.op != "mixer_eval"]
    return {"kind": "names", "cases": cases, "limit": 60}


#: Of a pytest, a compute-sanitizer or an ncu run: exit status (None: out of time) and seconds.
def _command(run: Run, command: list[str], limit: float, log: Path, **environment: str) -> tuple[int | None, float]:
    """A command in the repository's root, its output in a file as it comes."""
    start = time.monotonic()
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=max(1.0, min(limit, run.left() - 3)))
            status: int | None = process.returncode
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end(process)
    return status, time.monotonic() - start


def tests(run: Run, limit: float) -> None:
    """The tests marked gpu: the cases of the emulation with the real kernels, in parallel, each with a time limit."""
    log = run.path.parent / "tests.log"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    if _installed("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    if _installed("pytest_timeout"):
        command += ["--timeout=90"]
    status, seconds = _command(run, command, limit, log)
    lines = log.read_text(errors="replace").splitlines()
    failures = sorted({line for line in lines if line.startswith(("FAILED", "ERROR"))})
    passed = sum(" PASSED" in line or line.startswith("PASSED") for line in lines)
    ending = lines[-1].strip("= ") if lines else ""
    summary = ending if status is not None else f"out of time after {passed} passed"
    found = {"ok": status == 0, "finished": status is not None, "seconds": seconds, "summary": summary}
    run.note("tests", {**found, "failures": failures[:100]})
    print(f"tests: {summary}", flush=True)


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _summaries(output: str) -> list[str]:
    return re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)


def is_clean(tool: str, status: int | None, output: str) -> bool:
    """Whether a compute-sanitizer tool ran to its end and found nothing: neither errors nor hazards, nor warnings."""
    wanted = "0 hazards displayed (0 errors, 0 warnings)" if tool == "racecheck" else "0 errors"
    summaries = [line.strip() for line in _summaries(output)]
    return status == 0 and summaries != [] and set(summaries) == {wanted}


def sanitizer(run: Run, limit: float, no_cuda: str | None = None) -> None:
    """compute-sanitizer's tools over every CUDA kernel at small sizes; `no_cuda` says why there are none."""
    if no_cuda is not None:
        run.note("sanitizer", {"ok": True, "skipped": f"it checks the CUDA kernels: {no_cuda}"})
        return
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        run.note("sanitizer", {"ok": True, "skipped": "compute-sanitizer is not installed"})
        return
    found: dict[str, Any] = {"ok": True}
    until = time.monotonic() + limit
    for index, tool in enumerate(("memcheck", "racecheck", "initcheck")):
        log = run.path.parent / f"{tool}.log"
        command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "benchmarks.gpu"]
        command += ["--sanitizer-workload"]
        share = (until - time.monotonic()) / (3 - index)
        # without torch's caching every tensor is an allocation of its own, with its own bounds
        status, seconds = _command(run, command, share, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        output = log.read_text(errors="replace")
        ours = [line.strip("= ") for line in output.splitlines() if "convmixer" in line and " at " in line]
        found[tool] = {
            "ok": is_clean(tool, status, output),
            "finished": status is not None,
            "seconds": seconds,
            "summary": _summaries(output),
            "in_our_kernels": sorted(set(ours))[:20],
        }
        found["ok"] = found["ok"] and found[tool]["ok"]
        run.note("sanitizer", found)
        print(f"{tool}: {'out of time' if status is None else _summaries(output) or output[-1500:]}", flush=True)


#: Of each profiled kernel: speed of light, occupancy, why warps did not issue, bytes by level.
_NCU_SECTIONS = (
    "SpeedOfLight",
    "Occupancy",
    "LaunchStats",
    "SchedulerStats",
    "WarpStateStats",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
)


#: Name in the results and ncu's metric.
_NCU_METRICS = {
    "us": "gpu__time_duration.sum",
    "memory_percent": "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_percent": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")


def profiled_kernels(table: Path) -> list[dict[str, object]]:
    """Of each launch in an ncu table (--page raw --csv): the metrics above, and why its warps did not issue, worst first."""
    lines = [line for line in table.read_text(errors="replace").splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    headings, units, *launches = csv.reader(lines)
    found = []
    for cells in launches:
        launch = dict(zip(headings, cells, strict=True))
        unit = dict(zip(headings, units, strict=True))
        kernel: dict[str, object] = {"kernel": launch["Kernel Name"].removeprefix("void ").split("(")[0]}
        for name, metric in _NCU_METRICS.items():
            if launch.get(metric):
                value = float(launch[metric].replace(",", ""))
                kernel[name] = round(value / 1000 if unit[metric] == "ns" else value, 1)
        stalls = {
            match[1]: float(cell.replace(",", ""))
            for heading, cell in launch.items()
            if (match := _STALL.fullmatch(heading)) and cell and not match[1].endswith("not_issued")
        }
        worst = sorted((name for name in stalls if name != "selected"), key=stalls.__getitem__, reverse=True)[:4]
        found.append({**kernel, "stalls_per_issue": {name: round(stalls[name], 2) for name in worst}})
    return found


def profile(run: Run, limit: float) -> None:
    """Nsight Compute on one launch of each headline kernel, to DIR/ncu.csv."""
    program = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if program is None:
        run.note("profile", {"skipped": "ncu is not installed"})
        return
    table = run.path.parent / "ncu.csv"
    command = [program, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--kernel-name-base", "demangled", "--kernel-name", "regex:convmixer|gemm|nvjet|xmma"]
    command += [part for section in _NCU_SECTIONS for part in ("--section", section)]
    command += ["--log-file", str(table)]
    command += [sys.executable, "-m", "benchmarks.gpu", "--profile-workload"]
    status, seconds = _command(run, command, limit, run.path.parent / "ncu.log")
    kernels = profiled_kernels(table) if table.exists() else []
    run.note("profile", {"ok": status == 0, "finished": status is not None, "seconds": seconds, "kernels": kernels})
    print(f"ncu: {'out of time' if status is None else f'status {status}'}, {seconds:.0f} s", flush=True)


# ---- the command --------------------------------------------------------------------------------------------------


#: The steps in their order, with the most seconds that each may take.
STEPS = {
    "check": 90,
    "operators": 200,
    "models": 110,
    "profile": 50,
    "tests": 120,
    "sanitizer": 60,
    "names": 25,
    "triton": 90,
    "compile": 150,
    "confirm": 240,
}
_DEFAULT_STEPS = tuple(step for step in STEPS if step != "confirm")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all right, 1 a test, sanitizer run or result is wrong or broke, 2 there is no GPU."""
    what = __doc__.split(": ", 1)[1].split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=what)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where the files go (gpu-results)", default="gpu-results"
    )
    parser.add_argument("--seconds", type=float, default=540, help="stop after so many (540)")
    parser.add_argument("--only", default=",".join(_DEFAULT_STEPS), help=f"steps, of {','.join(STEPS)}")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="compile into DIR what needs no GPU and no torch")
    parser.add_argument("--fold", type=Path, metavar="DIR", help="make benchmarks/results/<gpu>.json of DIR/rows.jsonl")
    for hidden in ("--sanitizer-workload", "--profile-workload"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    steps = options.only.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"--only: steps are {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    if options.fold is not None:
        return fold(options.fold)
    if options.prepare is not None:
        return prepare(options.prepare)
    if options.worker is not None:
        return worker(options.worker)

    import torch

    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch.cuda.is_available() is False: no GPU to measure", file=sys.stderr)
        return 2
    if options.sanitizer_workload or options.profile_workload:
        from benchmarks import gpu_ops

        return gpu_ops.sanitizer_workload() if options.sanitizer_workload else gpu_ops.profile_workload()
    return measure(Run(options.output / "rows.jsonl", options.seconds), steps)


def measure(run: Run, steps: Sequence[str]) -> int:
    backends, absent = measured_backends()
    for backend, reason in absent.items():
        print(f"{backend}: - ({reason})", flush=True)
    run.note("absent", absent)
    if not backends:
        print("benchmarks.gpu: no backend for this GPU", file=sys.stderr)
        return 2
    describe(run, backends[0])
    run_jobs(run, "peaks", [{"kind": "peaks", "limit": 30}], 60)
    for step in STEPS:
        if step in steps and run.left() > 5:
            start = time.monotonic()
            _STEPS[step](run, min(STEPS[step], run.left()), backends, absent)
            run.append("steps", {"step": step, "seconds": round(time.monotonic() - start, 1)})
    text = summary(run.document)
    (run.path.parent / "summary.txt").write_text(text)
    print(text, flush=True)
    failed = [key for key in ("tests", "sanitizer") if not run.document.get(key, {"ok": True})["ok"]]
    wrong = any(row.get("ok") is False for row in run.document["results"])
    return 1 if failed or wrong or run.document.get("broken") else 0


def _wgmma_is_right(run: Run) -> bool:
    """A forced choice that failed its checks must not take the rows of the others with it."""
    rows = [row for row in run.document["results"] if row["implementation"].endswith(" wgmma")]
    broken = any("wgmma" in each["job"] for each in run.document.get("broken", []))
    return len(rows) >= 3 and all(row.get("ok") for row in rows) and not broken


_STEPS: dict[str, Callable[[Run, float, list[str], dict[str, str]], None]] = {
    "check": lambda run, s, backends, absent: run_jobs(run, "check", check_jobs(backends), s),
    "operators": lambda run, s, backends, absent: run_jobs(
        run, "operators", operator_jobs(backends[0], _wgmma_is_right(run)), s
    ),
    "models": lambda run, s, backends, absent: run_jobs(run, "models", model_jobs(backends[:1]), s),
    "profile": lambda run, s, backends, absent: profile(run, s),
    "tests": lambda run, s, backends, absent: tests(run, s),
    "sanitizer": lambda run, s, backends, absent: sanitizer(run, s, absent.get("cuda")),
    "names": lambda run, s, backends, absent: run_jobs(run, "names", [names_job()] if "cuda" in backends else [], s),
    "triton": lambda run, s, backends, absent: run_jobs(run, "triton", triton_jobs() if len(backends) > 1 else [], s),
    "compile": lambda run, s, backends, absent: run_jobs(run, "compile", compile_jobs(), s),
    "confirm": lambda run, s, backends, absent: run_jobs(run, "confirm", confirm_jobs(), s),
}


def confirm_jobs() -> list[Job]:
    from benchmarks import gpu_confirm

    # torch's deterministic matrix products want it before their handle is made
    settings = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return [{"kind": "confirm", "name": name, "settings": settings, "limit": 120} for name in gpu_confirm.CONFIRMATIONS]


def measured_backends(device: str = "cuda") -> tuple[list[str], dict[str, str]]:
    """The backends that run on this GPU, the one to be measured first at the front, and why the others do not."""
    import torch

    from convmixer_kernels import dispatch

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
    import torch

    from benchmarks import environment

    run.note("environment", environment.describe(torch.device("cuda"), backend))
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


def prepare(folder: Path) -> int:
    """Compile the device objects into `folder` where they are missing; link _cuda into this checkout where torch sees a GPU."""
    sys.path.insert(0, str(ROOT / "convmixer_kernels"))
    import _build as recipe

    cxx, nvcc = recipe.find_cxx(), recipe.find_nvcc()
    if cxx is None or nvcc is None:
        print("benchmarks.gpu --prepare: it needs a C++ compiler and nvcc", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    objects = recipe.cuda_objects(cxx, nvcc, recipe.cuda_archs(nvcc))
    device = [each for each in objects if each.source.suffix == ".cu"]
    missing = [each for each in device if not (folder / f"{each.source.stem}.o").exists()]
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    commands = [_filled(each, folder) for each in missing]
    if shutil.which("nvidia-smi"):
        binding = next(each for each in objects if each.source.suffix == ".cpp")
        commands.append(_filled(binding, folder))
    running: list[subprocess.Popen[bytes]] = []
    failed = 0
    for command in commands:
        running.append(subprocess.Popen(command, shell=True))
        if len(running) == jobs:
            failed |= running.pop(0).wait()
    for process in running:
        failed |= process.wait()
    if failed:
        return 1
    if shutil.which("nvidia-smi"):
        toolkit = nvcc.parent.parent
        output = ROOT / "convmixer_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
        link = [
            *cxx.split(),
            "-shared",
            "-o",
            str(output),
            *(str(folder / f"{each.source.stem}.o") for each in objects),
        ]
        link += [f"-L{path}" for path in (toolkit / "lib64", toolkit / "lib") if path.is_dir()]
        return subprocess.run([*link, "-lcudart_static", "-lrt", "-ldl", "-lpthread"]).returncode
    return 0


def _filled(item: Any, folder: Path) -> str:
    """A command of _build.py for the shell, as ninja would run it."""
    target = shlex.quote(str(folder / f"{item.source.stem}.o"))
    return " ".join(item.command).replace("$out", target).replace("$in", shlex.quote(str(item.source)))


def fold(folder: Path) -> int:
    """benchmarks/results/<gpu>.json from the rows of a run."""
    document = Run(folder / "rows.jsonl").document
    slug = re.sub(r"[^a-z0-9]+", "-", document["gpu"]["name"].lower()).strip("-")
    path = ROOT / "benchmarks" / "results" / f"{slug}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(path.relative_to(ROOT))
    return 0


def summary(document: dict[str, Any]) -> str:
    """What is wrong or broken first, then a table: ours, by backend, beside the best eager implementation of each case."""
    lines: list[str] = []
    for each in document.get("broken", []):
        lines.append(f"BROKEN {each['job']}: {each['error']}")
    for row in document["results"]:
        if row.get("ok") is False or "error" in row:
            lines.append("WRONG " + describe_row(row))
    for key in ("tests", "sanitizer"):
        found = document.get(key, {})
        if found and not found["ok"]:
            lines.append(f"{key.upper()} NOT OK: {found.get('summary', '')}")
            lines += [f"  {line}" for line in found.get("failures", [])]
    for key, left in document.items():
        if key.endswith("_left_out"):
            lines.append(f"{key.removesuffix('_left_out')}: {len(left)} left out, from {left[0]} on")
    cases: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in document["results"]:
        if "settings" not in row and "median_us" in row:
            cases.setdefault((row["case"], row["dtype"], row["layout"]), {})[row["implementation"]] = row
    ours = {"ours": "cuda", "triton": "triton"}
    heads = "".join(f"{name + ' us':>11}{'floor':>8}" for name in ours.values())
    lines.append(f"\n{'case':<44}{'dtype':<9}{'layout':<14}{heads}{'best peer us':>13}{'ratio':>8}")
    for (case, dtype, layout), found in cases.items():
        times = {name: row["median_us"] for name, row in found.items()}
        cells = ""
        for name in ours:
            percent = found.get(name, {}).get("percent_of_floor")
            cells += f"{times[name]:>11.1f}" if name in times else f"{'-':>11}"
            cells += f"{percent:>6.0f} %" if percent is not None else f"{'':>8}"
        mine = [times[name] for name in ours if name in times]
        theirs = [time for name, time in times.items() if name.startswith(("eager", "torch.compile"))]
        if theirs:
            cells += f"{min(theirs):>13.1f}" + (f"{min(theirs) / min(mine):>7.1f}x" if mine else "")
        lines.append(f"{case:<44}{dtype:<9}{layout:<14}{cells}".rstrip())
        forced = ", ".join(f"{n.removeprefix('ours ')} {times[n]:.1f}" for n in times if n.startswith("ours "))
        if forced:
            lines.append(f"    chosen {times.get('ours', float('nan')):.1f} us; {forced}")
    for row in document["results"]:
        if "settings" in row:
            lines.append(describe_row(row))
    for backend, reason in document.get("absent", {}).items():
        lines.append(f"- {backend}: {reason}")
    steps = ", ".join(f"{each['step']} {each['seconds']:.0f} s" for each in document.get("steps", []))
    return "\n".join([*lines, f"steps: {steps}", ""])


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: MIT
"""The programs that benchmarks.gpu runs on the kernels: pytest, compute-sanitizer and Nsight Compute, and what the last two watch."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.cases import LAYOUTS, OPERATORS, OpCase
from benchmarks.gpu_run import Run, end
from benchmarks.machine import ROOT
from benchmarks.ops import make_inputs
from convmixer_kernels.backends import torch_gemm

_DEVICE = torch.device("cuda")
#: What pytest collects: everything, or for the emulated command a file whose GPU tests are skipped.
_TESTS: list[str] = []


def on_cpu() -> None:
    _TESTS[:] = ["tests/test_triton.py"]


def _command(run: Run, command: list[str], limit: float, log: Path, **environment: str) -> tuple[int | None, float]:
    """Run a command in the repository's root, its output in a file as it comes: its exit status (None: out of time) and seconds."""
    start = time.monotonic()
    if (program := shutil.which("setpriv")) is not None:
        # it ends with this process: if that is killed, the next command must not share the GPU with it
        command = [program, "--pdeathsig", "KILL", *command]
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
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        *_TESTS,
        "-v",
        "--no-header",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
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


#: Speed of light, occupancy, why warps did not issue, bytes by level.
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
_RANGE = re.compile(r"row=(.*?);(.*?);")
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")


def profiled_kernels(table: Path) -> list[dict[str, object]]:
    """Each launch in an ncu table (--page raw --csv): the metrics above, and why its warps did not issue, worst first."""
    lines = [line for line in table.read_text(errors="replace").splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    headings, units, *launches = csv.reader(lines)
    found = []
    for cells in launches:
        launch = dict(zip(headings, cells, strict=True))
        unit = dict(zip(headings, units, strict=True))
        kernel: dict[str, object] = {"kernel": launch["Kernel Name"].removeprefix("void ").split("(")[0]}
        # the NVTX range of profile_workload, wherever this version of ncu puts it
        if (row := next(filter(None, map(_RANGE.search, cells)), None)) is not None:
            kernel |= {"case": row[1], "implementation": row[2]}
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


def profile(run: Run, limit: float, no_cuda: str | None = None) -> None:
    """Nsight Compute on one launch of each headline kernel, to DIR/ncu.csv; `no_cuda` says why there are none."""
    if no_cuda is not None:
        run.note("profile", {"skipped": f"it watches the CUDA kernels: {no_cuda}"})
        return
    program = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if program is None:
        run.note("profile", {"skipped": "ncu is not installed"})
        return
    table = run.path.parent / "ncu.csv"
    command = [program, "--clock-control", "none", "--profile-from-start", "off", "--nvtx", "--csv", "--page", "raw"]
    command += ["--kernel-name-base", "demangled", "--kernel-name", "regex:convmixer|gemm|nvjet|xmma"]
    command += [part for section in _NCU_SECTIONS for part in ("--section", section)]
    command += ["--log-file", str(table)]
    command += [sys.executable, "-m", "benchmarks.gpu", "--profile-workload"]
    status, seconds = _command(run, command, limit, run.path.parent / "ncu.log")
    kernels = profiled_kernels(table) if table.exists() else []
    run.note("profile", {"ok": status == 0, "finished": status is not None, "seconds": seconds, "kernels": kernels})
    print(f"ncu: {'out of time' if status is None else f'status {status}'}, {seconds:.0f} s", flush=True)


def _prepared(case: OpCase, name: str) -> peers.Prepared:
    return peers.prepare(name, peers.Workload(case, _DEVICE, make_inputs(case, _DEVICE, 1)), False)


def _run_ours(case: OpCase, name: str) -> None:
    prepared = _prepared(case, name)
    with prepared.setting():
        prepared.calls[0]()


def sanitizer_workload() -> int:
    """Every kernel once at sizes with every kind of edge, without torch's products: the tools have complaints about those."""
    torch_gemm.convolution = lambda x, *rest: x.clone()
    torch_gemm.input_grad = lambda da, *rest: da.clone()
    torch_gemm.weight_grad = lambda da, x, *rest: da.new_zeros(da.shape[1], x.shape[1])
    for dtype in ("bfloat16", "float32"):
        for layout in LAYOUTS:
            for shape, kernel in (((2, 8, 17, 16), 9), ((3, 5, 7, 7), 4), ((1, 8, 33, 40), 15)):
                for op in OPERATORS:
                    case = OpCase(op, "sanitizer", shape, kernel, dtype=dtype, layout=layout)
                    for gemm in ("", " layer") if op in ("pointwise_eval", "pointwise_train", "layer_eval") else ("",):
                        _run_ours(case, f"ours cuda{gemm}")
    torch.cuda.synchronize()
    return 0


def profile_workload() -> int:
    """One launch of each headline kernel between cudaProfilerStart and -Stop, at full size, after a warm one."""
    big, half = (64, 1536, 32, 32), (32, 1536, 32, 32)
    depthwise = ("depthwise_eval", "depthwise_input_grad_kernel", "depthwise_weight_grad")
    cases = [OpCase(op, "", big, dtype="bfloat16") for op in ("depthwise_train_kernel", *depthwise)]
    cases += [OpCase(op, "", big, dtype="bfloat16", layout="channels_last") for op in depthwise]
    cases += [OpCase("depthwise_eval", "", half), OpCase("depthwise_eval", "", (64, 768, 17, 17), dtype="bfloat16")]
    cases += [OpCase("pointwise_eval", "", shape, dtype="bfloat16") for shape in (big, (64, 256, 32, 32))]
    for case in cases:
        forced = [gemm for gemm in peers.gemms_of(case, torch.cuda.get_device_capability()) if gemm != "torch"]
        for name in [f"ours cuda {gemm}" for gemm in forced] or ["ours cuda"]:
            prepared = _prepared(case, name)
            with prepared.setting():
                prepared.calls[0]()
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                torch.cuda.nvtx.range_push(f"row={case.name};{name};")
                prepared.calls[0]()
                torch.cuda.nvtx.range_pop()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
        del prepared
        torch.cuda.empty_cache()
    return 0

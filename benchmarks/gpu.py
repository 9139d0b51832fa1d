# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu: build, test, sanitize and measure the kernels on this machine's GPU, within 9 minutes.

Writes benchmarks/results/<gpu>.json after every row, so that a run that is cut off keeps what it has. Needs no network.
Without nvcc, or on an AMD GPU, the Triton backend alone is tested and measured, and the file says why there is no other.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("build", "tests", "sanitizer", "ops", "models")
#: Most seconds of a section, of those that --seconds leaves; ops and models share what is left.
_LIMITS = {"build": 200, "tests": 150, "sanitizer": 75}
_MODELS_SHARE = 0.35


class Run:
    """What has been found out so far, on disk after every change, and how much time is left."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.deadline = path, time.monotonic() + seconds
        self.document: dict[str, object] = {"results": []}

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, key: str, value: object) -> None:
        self.document[key] = value
        self.save()

    def row(self, row: dict[str, object]) -> None:
        self.document["results"].append(row)
        self.save()
        shown = row.get("error") or f"{row['median_us']:10.1f} us {row.get('percent_of_floor', 0):6.1f} % of the floor"
        print(f"{row['case']:<44}{row['dtype']:<9}{row['layout']:<14}{row['implementation']:<19}{shown}", flush=True)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.document, indent=1) + "\n")
        os.replace(partial, self.path)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all right, 1 a build, test, sanitizer run or result is wrong, 2 there is no GPU."""
    what = __doc__.split(": ", 1)[1].split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=what)
    parser.add_argument("--seconds", type=float, default=530, help="stop after so many (530)")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {','.join(SECTIONS)}")
    parser.add_argument("--output", type=Path, help="the JSON file (benchmarks/results/<gpu>.json)")
    parser.add_argument("--sanitizer-workload", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sections = options.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--only: sections are {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")

    import torch

    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch.cuda.is_available() is False: no GPU to measure", file=sys.stderr)
        return 2
    if options.sanitizer_workload:
        from benchmarks import gpu_ops

        return gpu_ops.sanitizer_workload()
    name = torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    run = Run(options.output or ROOT / "benchmarks" / "results" / f"{slug}.json", options.seconds)
    if "build" in sections and not build(run):
        return 1
    backends, absent = measured_backends()
    for backend, reason in absent.items():
        print(f"{backend}: - ({reason})", flush=True)
    run.note("absent", absent)
    if not backends:
        print("benchmarks.gpu: no backend for this GPU", file=sys.stderr)
        return 2
    describe(run, backends[0])
    if "tests" in sections:
        tests(run)
    if "sanitizer" in sections:
        sanitizer(run, absent.get("cuda"))
    from benchmarks import gpu_ops

    gpu_ops.peaks(run)
    if "ops" in sections:
        seconds = run.left() * (1 - _MODELS_SHARE) if "models" in sections else run.left() - 5
        gpu_ops.operators(run, seconds, backends)
    if "models" in sections:
        gpu_ops.models(run, backends)
    summary(run)
    failed = [key for key in ("tests", "sanitizer") if not run.document.get(key, {"ok": True})["ok"]]
    return 1 if failed or any(row.get("ok") is False for row in run.document["results"]) else 0


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


# ---- sections that run other programs -----------------------------------------------------------------------------


def _command(run: Run, command: list[str], limit: float, **environment: str) -> tuple[int | None, str, float]:
    """Exit status (None: out of time), output and seconds of a command in the repository's root."""
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, min(limit, run.left() - 5)))
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        # the command may have children: end its session
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        status = None
    return status, output, time.monotonic() - start


def _built() -> tuple[str | None, bool]:
    """The sources' digest that the installed package was built from, and whether it has the CUDA module."""
    for entry in sys.path:
        folder = Path(entry or ".") / "convmixer_kernels"
        modules = list(folder.glob("_cuda.*.so")) if folder.is_dir() else []
        marker = folder / "_built.py"
        if marker.exists():
            found = re.search(r"'digest': '([0-9a-f]+)'", marker.read_text())
            return found and found.group(1), bool(modules)
    return None, False


def _cannot_build(recipe: ModuleType) -> str | None:
    """Why there is no _cuda to be built here; None where there is."""
    import torch

    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs"
    if recipe.find_nvcc() is None:
        return "there is no nvcc (on PATH, in CUDA_HOME or /usr/local/cuda)"
    return None


def build(run: Run) -> bool:
    """Install this checkout if the installed package is missing or was built from other sources, where nvcc is."""
    spec = importlib.util.spec_from_file_location("_build", ROOT / "convmixer_kernels" / "_build.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    reason = _cannot_build(recipe)
    if reason is not None:
        run.note("build", {"ok": True, "done": False, "seconds": 0.0, "skipped": reason})
        print(f"building: skipped, {reason}", flush=True)
        return True
    digest, has_cuda = _built()
    if digest == recipe.source_digest() and has_cuda:
        run.note("build", {"ok": True, "done": False, "seconds": 0.0})
        return True
    print("building: pip install --no-build-isolation --no-deps .", flush=True)
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps"]
    command += ["--force-reinstall", "."]
    status, output, seconds = _command(run, command, _LIMITS["build"], CONVMIXER_BUILD_CUDA="1")
    importlib.invalidate_caches()
    run.note("build", {"ok": status == 0, "done": True, "seconds": seconds})
    print(f"building took {seconds:.0f} s" if status == 0 else f"the build failed:\n{output[-6000:]}", flush=True)
    return status == 0


def tests(run: Run) -> None:
    """The tests marked gpu: the cases of the emulation with the real kernels."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    status, output, seconds = _command(run, command, _LIMITS["tests"])
    lines = [line for line in output.splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    ending = lines[-1] if lines else ""
    run.note(
        "tests",
        {
            "ok": status == 0,
            "finished": status is not None,
            "seconds": seconds,
            "summary": ending,
            "failures": failures[:100],
        },
    )
    print(f"tests: {'out of time' if status is None else ending}", flush=True)
    if status != 0:
        print(output[-5000:], flush=True)


def _summaries(output: str) -> list[str]:
    return re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)


def is_clean(tool: str, status: int | None, output: str) -> bool:
    """Whether a compute-sanitizer tool ran to its end and found nothing: neither errors nor hazards, nor warnings."""
    wanted = "0 hazards displayed (0 errors, 0 warnings)" if tool == "racecheck" else "0 errors"
    summaries = [line.strip() for line in _summaries(output)]
    return status == 0 and summaries != [] and set(summaries) == {wanted}


def sanitizer(run: Run, no_cuda: str | None = None) -> None:
    """compute-sanitizer's tools over every CUDA kernel at small sizes; `no_cuda` says why there are none."""
    if no_cuda is not None:
        run.note("sanitizer", {"ok": True, "skipped": f"it checks the CUDA kernels: {no_cuda}"})
        return
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        run.note("sanitizer", {"ok": True, "skipped": "compute-sanitizer is not installed"})
        return
    found: dict[str, object] = {"ok": True}
    for index, tool in enumerate(("memcheck", "racecheck", "initcheck")):
        command = [
            program,
            "--tool",
            tool,
            "--error-exitcode",
            "1",
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--sanitizer-workload",
        ]
        # without torch's caching every tensor is an allocation of its own, with its own bounds
        status, output, seconds = _command(
            run, command, _LIMITS["sanitizer"] / (3 - index) * (1 + index), PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
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
        print(
            f"{tool}: {'out of time' if status is None else _summaries(output) or output[-1500:]}, {seconds:.0f} s",
            flush=True,
        )
        if ours:
            print("\n".join(sorted(set(ours))[:20]), flush=True)


def summary(run: Run) -> None:
    """A short table: ours, by backend, beside the best eager implementation of each case."""
    cases: dict[tuple[object, ...], dict[str, dict[str, object]]] = {}
    for row in run.document["results"]:
        cases.setdefault((row["case"], row["dtype"], row["layout"]), {})[row["implementation"]] = row
    ours = {"ours": "cuda", "triton": "triton"}
    absent = run.document.get("absent", {})
    heads = "".join(f"{name + ' us':>11}{'floor':>8}" for name in ours.values())
    print(f"\n{'case':<44}{'dtype':<9}{'layout':<14}{heads}{'eager us':>11}{'ratio':>8}")
    for (case, dtype, layout), found in cases.items():
        times = {name: row["median_us"] for name, row in found.items() if row.get("median_us") is not None}
        cells = ""
        for name in ours:
            percent = found.get(name, {}).get("percent_of_floor")
            cells += f"{times[name]:>11.1f}" if name in times else f"{'-':>11}"
            cells += f"{percent:>6.0f} %" if percent is not None else f"{'':>8}"
        mine = [times[name] for name in ours if name in times]
        theirs = [time for name, time in times.items() if name.startswith("eager")]
        if theirs:
            cells += f"{min(theirs):>11.1f}" + (f"{min(theirs) / min(mine):>7.1f}x" if mine else "")
        wrong = "; ".join(f"{ours[name]}: {found[name]['error']}" for name in ours if "error" in found.get(name, {}))
        print(f"{case:<44}{dtype:<9}{layout:<14}{cells}  {wrong}".rstrip())
    for backend, reason in absent.items():
        print(f"- {backend}: {reason}")
    for (case, dtype, layout), found in cases.items():
        forced = [name for name in found if name.startswith("ours ") and found[name].get("median_us") is not None]
        if forced and found.get("ours", {}).get("median_us") is not None:
            times = ", ".join(f"{name.removeprefix('ours ')} {found[name]['median_us']:.1f}" for name in forced)
            print(f"{case} {dtype} {layout}: chosen {found['ours']['median_us']:.1f} us; {times}")
    print(f"written: {run.path}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

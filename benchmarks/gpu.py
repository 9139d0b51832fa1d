# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu: check, measure, profile, test and sanitize the kernels on this machine's GPU, within 9 minutes.

A broken kernel loses no earlier result: every row is appended to DIR/rows.jsonl and flushed before the next begins, and cases
run in a worker process. A case that hangs or crashes costs its own row; a new worker goes on behind it. The same command with
the same DIR goes on where an earlier one was killed. DIR/summary.md says at the end what is wrong, broke or was left out, each
kernel's time beside its prediction, and all times; `python -m benchmarks.gpu --fold DIR` makes it and
benchmarks/results/<gpu>.json of the rows. Needs no network. Without _cuda the Triton backend alone is measured.

If you have a machine with a GPU for minutes only, compile first elsewhere: `python -m benchmarks.gpu --prepare DIR` writes the
device objects, and the same option on the GPU's machine compiles and links only the binding for its Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

# --prepare must run without torch, so modules that import it are imported in main
_ROOT = Path(__file__).resolve().parent.parent

#: The steps in their order, with each one's share of SECONDS; "confirm" has a command of its own.
STEPS = {
    "check": 40,
    "operators": 110,
    "models": 80,
    "profile": 40,
    "tests": 90,
    "sanitizer": 35,
    "names": 10,
    "triton": 40,
    "compile": 50,
    "autotune": 25,
    "confirm": 240,
}
SECONDS = 540
_DEFAULT_STEPS = tuple(step for step in STEPS if step != "confirm")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all right, 1 a test, sanitizer run or result is wrong or broke, 2 there is no GPU."""
    what = __doc__.split(": ", 1)[1].split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=what)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the results (gpu-results)", default="gpu-results"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"stop after so many ({SECONDS})")
    parser.add_argument("--only", default=",".join(_DEFAULT_STEPS), help=f"steps, of {','.join(STEPS)}")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="compile into DIR what needs no GPU and no torch")
    parser.add_argument(
        "--fold",
        type=Path,
        metavar="DIR",
        help="make benchmarks/results/<gpu>.json and DIR/summary.md of DIR/rows.jsonl",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for tests, kernels are emulated"
    )
    parser.add_argument("--plant", metavar="FAULT=CASE,...", help="for tests, with --device cpu: hang, crash or wrong")
    for hidden in ("--sanitizer-workload", "--profile-workload"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    steps = options.only.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"--only: steps are {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    if options.plant is not None and options.device != "cpu":
        parser.error("--plant is for tests, with --device cpu")
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    if options.prepare is not None:
        return prepare(options.prepare)

    import torch

    from benchmarks import gpu_emulated, gpu_run, gpu_steps, gpu_tools

    if options.fold is not None:
        return fold(options.fold)
    if options.device == "cpu":
        if (reason := gpu_emulated.plant(options.plant)) is not None:
            parser.error(reason)
        gpu_steps.use_cpu()
    elif options.worker is None and not torch.cuda.is_available():
        print("benchmarks.gpu: torch.cuda.is_available() is False: no GPU to measure", file=sys.stderr)
        return 2
    if options.worker is not None:
        return gpu_steps.worker(options.worker)
    if options.sanitizer_workload:
        return gpu_tools.sanitizer_workload()
    if options.profile_workload:
        return gpu_tools.profile_workload()
    return gpu_steps.measure(gpu_run.Run(options.output / "rows.jsonl", options.seconds, options.device), steps, STEPS)


def prepare(folder: Path) -> int:
    """Compile the device objects that `folder` lacks; if this machine has a GPU, link _cuda into this checkout."""
    sys.path.insert(0, str(_ROOT / "convmixer_kernels"))
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
        output = _ROOT / "convmixer_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
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
    """A command of _build.py for the shell, as ninja runs it."""
    target = shlex.quote(str(folder / f"{item.source.stem}.o"))
    return " ".join(item.command).replace("$out", target).replace("$in", shlex.quote(str(item.source)))


def fold(folder: Path) -> int:
    """Write a run's document to benchmarks/results/<gpu>.json, and its summary, even if the command was killed."""
    from benchmarks import gpu_run, gpu_summary

    document = gpu_run.Run(folder / "rows.jsonl").document
    if "gpu" not in document:
        print(f"benchmarks.gpu --fold: {folder / 'rows.jsonl'} holds no run", file=sys.stderr)
        return 2
    if (lost := gpu_run.killed(document)) is not None:
        document["broken"] = [*document.get("broken", ()), lost]
    (folder / gpu_summary.FILE).write_text(gpu_summary.summary(document))
    kept = {key: value for key, value in document.items() if key not in ("done", "under_way")}
    slug = re.sub(r"[^a-z0-9]+", "-", document["gpu"]["name"].lower()).strip("-")
    path = _ROOT / "benchmarks" / "results" / f"{slug}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(path.relative_to(_ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())

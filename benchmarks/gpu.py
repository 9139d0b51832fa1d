# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu: check, measure, profile, test and sanitize the kernels on this machine's GPU, within 9 minutes.

A broken kernel loses no earlier result: every row is appended to DIR/rows.jsonl and flushed before the next begins, and cases
run in a worker process. A case that hangs or crashes costs its own row; a new worker goes on behind it. The same command with
the same DIR goes on where an earlier one was killed. DIR/summary.md says at the end what is wrong, broke or was left out, and all
times; `python -m benchmarks.gpu --fold DIR` makes it and benchmarks/results/<gpu>.json of the rows. Needs no network. Without
_cuda the Triton backend alone is measured.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# --prepare must run without torch, so modules that import it are imported in functions
_ROOT = Path(__file__).resolve().parent.parent

#: The steps in their order, with each one's share of SECONDS; "confirm" has a command of its own.
STEPS = {
    "operators": 150,
    "models": 80,
    "profile": 40,
    "tests": 90,
    "sanitizer": 35,
    "triton": 40,
    "compile": 75,
    "confirm": 240,
}
SECONDS = 540
DEFAULT_STEPS = tuple(step for step in STEPS if step != "confirm")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all right, 1 a test, sanitizer run or result is wrong or broke, 2 there is no GPU."""
    what = __doc__.split(": ", 1)[1].split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=what)
    folder = {"type": Path, "metavar": "DIR"}
    parser.add_argument("--output", **folder, default="gpu-results", help="folder of the results (gpu-results)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"stop after so many ({SECONDS})")
    parser.add_argument("--only", default=",".join(DEFAULT_STEPS), help=f"steps, of {','.join(STEPS)}")
    parser.add_argument("--prepare", **folder, help="compile into DIR what needs no GPU and no torch")
    parser.add_argument(
        "--fold", **folder, help="make benchmarks/results/<gpu>.json and DIR/summary.md of DIR/rows.jsonl"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, kernels are emulated"
    )
    parser.add_argument("--plant", default="", metavar="FAULT=CASE,...", help="with --device cpu: hang, crash or wrong")
    parser.add_argument("--workload", choices=("sanitizer", "profile"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    steps = options.only.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"--only: steps are {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    if options.plant and options.device != "cpu":
        parser.error("--plant is for rehearsals, with --device cpu")
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    if options.prepare is not None:
        return prepare(options.prepare)
    if options.fold is not None:
        return fold(options.fold)

    import torch

    from benchmarks import gpu_run, gpu_steps

    plants = {}
    for part in options.plant.split(",") if options.plant else ():
        fault, _, words = part.partition("=")
        if fault not in gpu_run.FAULTS or not words:
            parser.error(f"--plant must be FAULT=CASE,... with the faults {', '.join(gpu_run.FAULTS)}, got {part}")
        plants[words] = fault
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch.cuda.is_available() is False: no GPU to measure", file=sys.stderr)
        return 2
    if options.workload is not None:
        workload = gpu_run.sanitizer_workload if options.workload == "sanitizer" else gpu_run.profile_workload
        workload(torch.device("cuda"))
        return 0
    run = gpu_run.Run(options.output / "rows.jsonl", options.seconds, options.device)
    return gpu_steps.measure(run, steps, STEPS, plants)


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
    made = {each.source: folder / f"{each.source.stem}.o" for each in objects}
    has_gpu = shutil.which("nvidia-smi") is not None

    def compile_if_missing(item: Any) -> int:
        # the binding is for one Python, the device objects for any
        if not has_gpu if item.source.suffix == ".cpp" else made[item.source].exists():
            return 0
        return subprocess.run(_filled(item, made[item.source]), shell=True).returncode

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        statuses = list(pool.map(compile_if_missing, objects))
    if any(statuses):
        return 1
    if not has_gpu:
        return 0
    toolkit = nvcc.parent.parent
    output = _ROOT / "convmixer_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = [*cxx.split(), "-shared", "-o", str(output), *map(str, made.values())]
    link += [f"-L{path}" for path in (toolkit / "lib64", toolkit / "lib") if path.is_dir()]
    return subprocess.run([*link, "-lcudart_static", "-lrt", "-ldl", "-lpthread"]).returncode


def _filled(item: Any, target: Path) -> str:
    """A command of _build.py for the shell, as ninja runs it."""
    command = " ".join(item.command)
    return command.replace("$out", shlex.quote(str(target))).replace("$in", shlex.quote(str(item.source)))


def fold(folder: Path) -> int:
    """Write a run's document to benchmarks/results/<gpu>.json, and its summary, even if the command was killed."""
    from benchmarks import gpu_run, gpu_steps

    document = gpu_run.Run(folder / "rows.jsonl").document
    if "environment" not in document:
        print(f"benchmarks.gpu --fold: {folder / 'rows.jsonl'} holds no run", file=sys.stderr)
        return 2
    if (lost := gpu_run.killed(document)) is not None:
        document["broken"] = [*document.get("broken", ()), lost]
    (folder / gpu_steps.SUMMARY).write_text(gpu_run.summary(document))
    kept = {key: value for key, value in document.items() if key not in ("done", "under_way")}
    slug = re.sub(r"[^a-z0-9]+", "-", document["environment"]["device"].lower()).strip("-")
    path = _ROOT / "benchmarks" / "results" / f"{slug}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(path.relative_to(_ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: MIT
"""python -m benchmarks training: memory and speed of a training step of whole models, beside eager PyTorch and torch.compile.

Each implementation has a process of its own, so that none steps on memory that another has freed; they step in turn, so that all see
the same noise. Only ratios of one run count. `python -m benchmarks` checks the same models against float64.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks import machine, memory, models, peers, tables, timing
from benchmarks.cases import DTYPES, LAYOUTS, PRESETS, Network, Preset

CHOSEN = ("256/8@32", "768/32@224", "1536/20@224")
COMPILE = "compile"


def _serve(
    pipe: Connection, name: str, preset: Preset | Network, batch: int, dtype: str, device: torch.device, threads: int
) -> None:
    """One implementation: sends its memory, or why it cannot run; then the seconds of a step, for everything that it receives."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layout = LAYOUTS["channels_last" if name == peers.EAGER["channels_last"] else "contiguous"]
    model = preset.make().to(device, DTYPES[dtype], memory_format=layout).train()
    model = models.ours_like(model) if name.startswith("ours ") else model
    images = torch.randn(batch, 3, preset.image_size, preset.image_size, dtype=DTYPES[dtype], device=device)
    images = images.to(memory_format=layout)
    cotangent = torch.randn(batch, preset.n_classes, dtype=DTYPES[dtype], device=device)
    runs = torch.compile(model, dynamic=False, **peers.COMPILE[COMPILE]) if name == COMPILE else model
    step = models.call(model, images, cotangent, True, runs)
    own = [*model.parameters(), *model.buffers()]
    try:
        with memory.unfragmented():
            step()
            found = {"saved_bytes": memory.saved_bytes(lambda: runs(images), own)}
            pipe.send(found | {"peak_bytes": memory.peak_bytes(step, device)})
    except (RuntimeError, OSError) as error:
        pipe.send(peers.first_line(error))
    gc.disable()
    while True:
        pipe.recv()
        pipe.send(timing.elapsed(step, device))


def measure(names: Sequence[str], preset: Preset | Network, options: argparse.Namespace) -> dict[str, object]:
    """`implementations` and `absent` of a row."""
    batch, device = options.batch or preset.batch, torch.device(options.device)
    found, absent, pipes = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for name in names:
            arguments = (name, preset, batch, options.dtype, device, torch.get_num_threads())
            pipe, process = stack.enter_context(timing.new_process(_serve, *arguments))
            try:
                answer = pipe.recv()
            except EOFError:
                process.join()
                answer = f"its process ended with exit status {process.exitcode}"
            if isinstance(answer, str):
                absent[name] = answer
            else:
                found[name], pipes[name] = answer, pipe
        seconds: dict[str, list[float]] = {name: [] for name in pipes}
        for number in range(1 + options.repeats):
            for name in list(pipes)[:: -1 if number % 2 else 1]:
                # OpenMP's threads of the process before go on spinning for some milliseconds
                time.sleep(0.01)
                pipes[name].send(None)
                seconds[name].append(pipes[name].recv())
    for name, each in seconds.items():
        # the first step after `unfragmented` gets the memory that later ones reuse
        clocked = timing.summarise(each[1:])
        found[name] |= {**clocked.fields(), "images_per_second": batch / clocked.median}
    return {"implementations": found, "absent": absent, "wrong": []}


def _rows(path: Path, document: Mapping[str, object]) -> list[object]:
    """Of a file that an interrupted run has left.

    Raises:
        OSError: it was measured otherwise, or is no file of this command.
    """
    try:
        found = json.loads(path.read_text())
        same = all(found["environment"][key] == document["environment"][key] for key in ("device", "threads", "torch"))
        if same and all(found["options"][key] == document["options"][key] for key in ("batch", "dtype", "repeats")):
            return found["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is not a file of this command ({error!r}): name another file, or remove it") from error
    raise OSError(f"{path} was measured otherwise: name another file, or remove it")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 if ours could not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks training", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--presets", nargs="+", choices=PRESETS, default=CHOSEN, metavar="PRESET", help=", ".join(PRESETS)
    )
    compiled = "only for these, and compiling one takes up to some minutes; none if empty (all)"
    parser.add_argument("--compile", nargs="*", choices=PRESETS, metavar="PRESET", help=f"torch.compile {compiled}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(cpu)")
    parser.add_argument("--batch", type=int, help="images at a time, for every preset (each has its own)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and images (float32)")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each implementation (7)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write each row at once; go on with a file that has some"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: {options.json.parent} is not a folder")
    for name in ("batch", "repeats"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be positive, got {value}")
    environment = machine.describe(torch.device(options.device), None)
    asked = {name: getattr(options, name) for name in ("presets", "compile", "batch", "dtype", "repeats")}
    document = {"kind": "training", "environment": environment, "options": asked, "results": []}
    if options.json is not None and options.json.exists():
        document["results"] = _rows(options.json, document)
    done = {row["model"] for row in document["results"]}
    for name in (each for each in options.presets if each not in done):
        preset = PRESETS[name]
        print(f"{name}: memory and time of each implementation in turn", file=sys.stderr, flush=True)
        names = [*peers.EAGER.values(), COMPILE, f"ours {environment['backend']}"]
        left_out = options.compile is not None and name not in options.compile
        row = measure([each for each in names if each != COMPILE or not left_out], preset, options)
        if left_out:
            row["absent"][COMPILE] = "not asked to"
        batch = options.batch or preset.batch
        case = {"case": f"training {name} batch {batch} {options.dtype}", "op": "training", "model": name}
        document["results"].append({**case, "label": preset.label, "batch": batch, "dtype": options.dtype, **row})
        if options.json is not None:
            options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(tables.text(document, tables.training(document), tables.training_notes(document)))
    return int(any(name.startswith("ours ") for row in document["results"] for name in row["absent"]))

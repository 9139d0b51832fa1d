# SPDX-License-Identifier: MIT
"""python -m benchmarks: a photo through the reference and through this package, checked against float64 and timed."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

import convmixer_kernels
from benchmarks import console, engine, machine, models, peers, suite, tables, timing
from benchmarks.cases import DTYPES, LAYOUTS, PRESETS, ModelCase, Preset

#: Measured without --models; 1024/20 lies between the last two.
MODELS = ("256/8@32", "256/8@224", "768/32@224", "1536/20@224")
REPEATS, QUICK_REPEATS = 11, 5
#: What `python -m benchmarks NAME` runs instead of the models.
COMMANDS = {
    "ops": "benchmarks.suite",
    "grid": "benchmarks.grid",
    "host": "benchmarks.host",
    "compare": "benchmarks.compare",
    "report": "benchmarks.report",
}


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all right, 1 a result is wrong, 2 it could not run, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    _validate(parser, options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        document = run(options)
    except (console.MissingPackage, models.CheckpointError, OSError, NotImplementedError, peers.Absent) as error:
        # a user can cause these (a missing package, a bad file, a backend that cannot run this): no traceback
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        return suite.INTERRUPTED
    console.show_table(tables.machine(document), *tables.models(document), tables.model_notes(document))
    return suite.tell_wrong(document)


def run(options: argparse.Namespace) -> dict[str, object]:
    """Measure everything that the options ask for; returns what --json writes."""
    device = torch.device(options.device)
    picture = models.load_photo(options.image)
    described = machine.describe(device, options.backend)
    document: dict[str, object] = {
        "kind": "models",
        "environment": described,
        "quick": options.quick,
        "sessions": [],
        "results": [],
    }
    cases = list(_cases(options))
    with console.progress(len(cases)) as progress:
        progress("measuring the machine's peaks", 0)
        peaks = machine.measure_peaks(device, options.dtype)
        document["sessions"].append(machine.session(device, peaks))
        for case in cases:
            label = f"{case.preset.label}, {case.op}, {case.dtype}"
            progress(f"{label}: checking against float64", 0)
            images = models.image_batch(picture, case.batch, case.preset.image_size)
            workload = engine.model_workload(case, images, device, options.checkpoint)
            tell = functools.partial(progress, f"{label}: timing", 0)
            row = _measure(workload, str(described["backend"]), options, peaks, tell)
            document["results"].append({**row, "session": 0})
            progress(label, 1)
            if options.json is not None:
                # after every row: a run that is cut off keeps what it has
                suite.save(document, options.json)
    return document


def _measure(
    workload: peers.Workload,
    backend: str,
    options: argparse.Namespace,
    peaks: machine.Peaks,
    on_timing: Callable[[], None],
) -> engine.Row:
    """The row of eager PyTorch and ours, timed in a process of their own."""
    case = workload.case
    names = (peers.EAGER[case.layout], f"ours {backend}")

    def clock(ready: Mapping[str, peers.Prepared]) -> Mapping[str, timing.Timing]:
        if len(ready) < len(names):
            # ours is wrong, and eager alone says nothing
            return {}
        on_timing()
        return models.time_in_new_process(
            {name: prepared.model for name, prepared in ready.items()},
            workload.images,
            workload.cotangent,
            training=case.training,
            backend=options.backend,
            repeats=options.repeats,
            warmup=1 if options.quick else 2,
        )

    row = engine.measure(workload, names, clock, peaks)
    if row["absent"]:
        raise peers.Absent("; ".join(f"{name}: {reason}" for name, reason in row["absent"].items()))
    return row


def _cases(options: argparse.Namespace) -> Iterator[ModelCase]:
    for dtype in options.dtype:
        for name in options.models:
            preset = PRESETS[name]
            batch = options.batch or (preset.quick_batch if options.quick else preset.batch)
            yield ModelCase("model_eval", name, batch, dtype, options.layout)
            if _trains(preset, batch, options):
                yield ModelCase("model_step", name, batch, dtype, options.layout)


def _trains(preset: Preset, batch: int, options: argparse.Namespace) -> bool:
    # batch norm and pooling over one image leave nothing of it: every gradient before them is 0, up to rounding
    return (preset.quick_training or not options.quick) and batch > 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.partition(": ")[2],
        epilog=f"Other commands, each with its own --help: {', '.join(COMMANDS)}.",
    )
    known = ", ".join(PRESETS)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="within two minutes: small batches, few repeats, small models' training only",
    )
    parser.add_argument("--models", nargs="+", choices=PRESETS, default=list(MODELS), metavar="MODEL", help=known)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="one or several (float32)")
    parser.add_argument("--batch", type=_positive, help="images at a time, for every model (each has its own)")
    parser.add_argument("--repeats", type=_positive, help=f"timed calls ({REPEATS}; with --quick {QUICK_REPEATS})")
    parser.add_argument("--threads", type=_positive, help="of torch and the kernels (torch's choice)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="memory format of both (contiguous)")
    parser.add_argument("--backend", help="of this package (its own choice)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a photo of your own (a sample of scikit-learn's)")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="state_dict for the one model named by --models (random weights)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _validate(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.repeats is None:
        options.repeats = QUICK_REPEATS if options.quick else REPEATS
    if options.checkpoint is not None and len(options.models) != 1:
        parser.error("--checkpoint is the weights of one model: name it with --models")
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        parser.error(f"--device: {error}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.backend is not None:
        available = convmixer_kernels.available_backends()
        if options.backend not in available:
            parser.error(
                f"--backend {options.backend}: available here are {', '.join(available)} "
                "(python -m convmixer_kernels says why not others)"
            )
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: {options.json.parent} is not a folder")


if __name__ == "__main__":
    sys.exit(main())

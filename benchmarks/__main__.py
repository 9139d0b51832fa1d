# SPDX-License-Identifier: MIT
"""python -m benchmarks: a photo through the reference and through this package, checked against float64 and timed.

`python -m benchmarks ops` measures every operator and model beside its floor and its peers in the same way.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

import convmixer_kernels
from benchmarks import cases, engine, machine, models, peers, tables, timing
from benchmarks.cases import DTYPES, LAYOUTS, PRESETS, Case, ModelCase

#: What `python -m benchmarks NAME` runs instead of the models.
COMMANDS = ("ops", "networks", "grid", "host", "training", "compare", "report")
#: Measured without --models; 1024/20 lies between the last two.
MODELS = ("256/8@32", "256/8@224", "768/32@224", "1536/20@224")
INTERRUPTED = 130
#: Of timing one case of ops, in full and with --quick.
SECONDS, QUICK_SECONDS = 4.0, 1.0
#: Rows of one file must be comparable: what may not change if a run goes on with it.
_SAME = ("device", "cpu", "instruction_set", "threads", "torch", "commit", "convmixer_kernels")

Measure = Callable[[Case, machine.Peaks], engine.Row]


class Refused(RuntimeError):
    """The command cannot go on with the file that it names."""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all right, 1 a result is wrong, 2 it could not run, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name, command, rest = "models", _models, arguments
    if arguments and arguments[0] in COMMANDS:
        name, *rest = arguments
        own = {"ops": _ops, "networks": partial(_ops, kind="networks")}
        command = own[name] if name in own else importlib.import_module(f"benchmarks.{name}").main
    try:
        return command(rest)
    except ModuleNotFoundError as error:
        print(f"benchmarks {name}: {error.name} is not installed: pip install '.[bench]'", file=sys.stderr)
    except (Refused, peers.Absent, NotImplementedError, OSError) as error:
        # a user can cause these (a bad file, a backend that cannot run this): no traceback
        print(f"benchmarks {name}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"benchmarks {name}: interrupted; with --json the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return 2


def _models(arguments: Sequence[str]) -> int:
    parser = _parser("python -m benchmarks", __doc__.partition(": ")[2])
    parser.add_argument(
        "--models", nargs="+", choices=PRESETS, default=MODELS, metavar="MODEL", help=", ".join(PRESETS)
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="one or several (float32)")
    parser.add_argument("--batch", type=_positive(int), help="images at a time, for every model (each has its own)")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="memory format of both (contiguous)")
    parser.add_argument("--backend", choices=convmixer_kernels.available_backends(), help="of this package (its own)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a photo of your own (a sample of scikit-learn's)")
    options, device = _parse(parser, arguments)
    picture = models.load_photo(options.image)
    image = options.image and options.image.name
    document = _document("models", options, device, backend=options.backend, image=image)
    backend = f"ours {document['environment']['backend']}"
    chosen = []
    for dtype in options.dtype:
        for name in options.models:
            preset = PRESETS[name]
            batch = options.batch or (preset.quick_batch if options.quick else preset.batch)
            chosen.append(ModelCase("model_eval", name, batch, dtype, options.layout))
            # batch norm and pooling over one image leave nothing of it: every gradient before them is 0, up to rounding
            if (preset.quick_training or not options.quick) and batch > 1:
                chosen.append(ModelCase("model_step", name, batch, dtype, options.layout))

    def measure(case: ModelCase, peaks: machine.Peaks) -> engine.Row:
        images = models.image_batch(picture, case.batch, case.preset.image_size)
        workload = engine.model_workload(case, images, device)
        names = (peers.EAGER[case.layout], backend)

        def clock(ready: Mapping[str, peers.Prepared]) -> Mapping[str, timing.Timing]:
            if len(ready) < len(names):
                # ours is wrong, and eager alone says nothing
                return {}
            modules = {name: prepared.model for name, prepared in ready.items()}
            repeats, warmup = options.repeats or (5 if options.quick else 11), 1 if options.quick else 2
            call = (modules, workload.images, workload.cotangent, case.training, options.backend, repeats, warmup)
            return models.time_in_new_process(*call)

        row = engine.measure(workload, names, clock, peaks)
        if row["absent"]:
            raise peers.Absent("; ".join(f"{name}: {reason}" for name, reason in row["absent"].items()))
        return row

    _run(document, options.json, chosen, device, measure)
    print(tables.text(document, tables.models(document), tables.model_notes(document)))
    return _tell_wrong(document)


def _ops(arguments: Sequence[str], kind: str = "operators") -> int:
    name, what = (
        ("ops", "operator and model") if kind == "operators" else (kind, "convolution and model but ConvMixer's")
    )
    parser = _parser(f"python -m benchmarks {name}", f"every {what} beside its floor and its peers.")
    fit = (
        "cases that fit one: words are shell patterns of words of the name or network: 'depthwise_eval k9', 'RepLKNet*'"
    )
    parser.add_argument("--filter", nargs="+", default=[], metavar="PATTERN", help=fit)
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help="only these (all but 'ours reference')")
    parser.add_argument("--compile-all", action="store_true", help="torch.compile for every case, not for a few")
    parser.add_argument("--tiny", action="store_true", help="every case on a tiny plane: a test, no figures")
    options, device = _parse(parser, arguments)
    known = list(dict.fromkeys([*peers.names(device.type), *peers.EXTRA]))
    for name in options.implementations or ():
        if name not in known:
            parser.error(f"--implementations: known here are {', '.join(known)}; got {name!r}")
    every = cases.cases(device.type) if kind == "operators" else cases.networks(device.type)
    chosen = cases.select(every, options.quick, options.filter)
    if not chosen:
        parser.error("no case fits --filter; --list shows them all")
    if options.tiny:
        chosen = [case.tiny() for case in chosen]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    asked = {name: getattr(options, name) for name in ("implementations", "compile_all", "tiny")}
    document = _document(kind, options, device, **asked)
    if device.type == "cpu" and not options.tiny:
        machine.confine(torch.get_num_threads())
    seconds = engine.GPU_SECONDS if device.type == "cuda" else QUICK_SECONDS if options.quick else SECONDS
    clock = engine.clock_of(device, seconds, options.repeats)

    def measure(case: Case, peaks: machine.Peaks) -> engine.Row:
        # the baseline of the check is always there
        names = dict.fromkeys([*(options.implementations or peers.names(device.type)), peers.EAGER[case.layout]])
        workload = engine.make_workload(case, device, rotate=not options.tiny)
        return engine.measure(workload, list(names), clock, peaks, options.compile_all and not options.tiny)

    _run(document, options.json, chosen, device, measure, options.tiny)
    print(tables.text(document, tables.operators(document["results"], device.type), tables.operator_notes(document)))
    return _tell_wrong(document)


def _parser(program: str, description: str) -> argparse.ArgumentParser:
    """With the options that both commands have."""
    others = f"Other commands, each with its own --help: {', '.join(COMMANDS)}; python -m benchmarks.gpu."
    parser = argparse.ArgumentParser(prog=program, description=description, epilog=others)
    parser.add_argument(
        "--quick", action="store_true", help="a selection that takes minutes; smaller batches of models"
    )
    parser.add_argument("--repeats", type=_positive(int), help="timed calls of each implementation (by time)")
    parser.add_argument("--threads", type=_positive(int), help="of torch, the kernels and the peers (torch's choice)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(cpu)")
    kept = "write each row as soon as it is there; go on with a file that has some"
    parser.add_argument("--json", type=Path, metavar="FILE", help=kept)
    return parser


def _positive(kind: type) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
        return value

    return convert


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, torch.device]:
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: {options.json.parent} is not a folder")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options, torch.device(options.device)


def _document(kind: str, options: argparse.Namespace, device: torch.device, **asked: object) -> dict[str, object]:
    """A new document, or the one of --json, to go on with.

    Args:
        asked: options that decide what a row contains.

    Raises:
        Refused: the file was measured on something else, or holds something else.
    """
    described = machine.describe(device, asked.get("backend"))
    fresh = {"kind": kind, "quick": options.quick, "environment": described, "options": asked}
    fresh |= {"sessions": [], "results": []}
    path = options.json
    if path is None or not path.exists():
        return fresh
    refused = "name another file, or remove it"
    try:
        found = json.loads(path.read_text())
        wanted = {key: described[key] for key in _SAME} | asked
        before = {key: found["environment"].get(key) for key in _SAME} | {
            key: found["options"].get(key) for key in asked
        }
        if found["kind"] != kind or not all(isinstance(found[key], list) for key in ("sessions", "results")):
            raise ValueError(f"its kind is {found['kind']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path} is not a file of this command ({error!r}): {refused}") from error
    if changed := [f"{key} was {before[key]}, is {wanted[key]}" for key in wanted if before[key] != wanted[key]]:
        raise Refused(f"{path} was measured otherwise ({'; '.join(changed)}): {refused}")
    return found


def _run(
    document: dict[str, object],
    path: Path | None,
    chosen: Sequence[Case],
    device: torch.device,
    measure: Measure,
    small: bool = False,
) -> None:
    """Add the rows of `chosen` that `document` lacks, and write it after each: a run that is killed keeps what it has."""
    done = {row["case"] for row in document["results"]}
    # tiny cases of several shapes are one
    left = {case.name: case for case in chosen if case.name not in done}
    if not left:
        return
    print("measuring the machine's peaks", file=sys.stderr, flush=True)
    peaks = machine.measure_peaks(device, {case.dtype for case in left.values()}, small)
    document["sessions"].append(machine.session(device, peaks))
    for number, case in enumerate(left.values(), 1):
        print(f"[{number}/{len(left)}] {case.name}: checking against float64, timing", file=sys.stderr, flush=True)
        document["results"].append({**measure(case, peaks), "session": len(document["sessions"]) - 1})
        if path is not None:
            _save(document, path)


def _save(document: dict[str, object], path: Path) -> None:
    """All or nothing: if this process is killed, the file is as it was before or after."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _tell_wrong(document: Mapping[str, object]) -> int:
    """Name every wrong result on stderr; the exit status, 1 if there is one."""
    wrong = [tables.explain(row, each) for row in document["results"] for each in row["wrong"]]
    for line in wrong:
        print(f"WRONG {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

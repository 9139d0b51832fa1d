# SPDX-License-Identifier: MIT
"""python -m benchmarks ops: every operator and model beside its floor and its peers, checked before it is timed.

Rows go to the JSON file one by one, each as soon as it is finished; --resume goes on with a file that a run has left.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import console, engine, machine, peers, tables
from benchmarks.cases import Case, cases, select

KIND = "operators"
INTERRUPTED = 130
SECONDS, QUICK_SECONDS = 4.0, 1.0
#: Rows of one file must be comparable: what may not change between a run and its resumption.
_SAME = ("device", "cpu", "instruction_set", "threads", "torch", "commit", "convmixer_kernels")
#: Options that decide a row's contents; they may not change either.
_ASKED = ("implementations", "compile_all", "tiny")


class Refused(RuntimeError):
    """The options contradict the file that they name, or each other."""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all right, 1 a result of ours is wrong, 2 it could not run, 130 interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    known = list(dict.fromkeys([*peers.names(device.type), *peers.EXTRA]))
    for name in options.implementations or ():
        if name not in known:
            parser.error(f"--implementations: known here are {', '.join(known)}; got {name!r}")
    chosen = select(cases(device.type), options.quick, options.filter)
    if not chosen:
        parser.error("no case fits --filter; --list shows them all")
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    for name in ("threads", "repeats", "seconds"):
        if getattr(options, name) is not None and not 0 < getattr(options, name) < float("inf"):
            parser.error(f"--{name} must be positive and finite, got {getattr(options, name)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    path = options.json or Path("benchmarks/results") / f"{device.type}-ops.json"
    document: dict[str, object] = {"results": []}
    try:
        document = _open(path, options, device)
        run(document, chosen, path, options, device)
    except KeyboardInterrupt:
        finished = len(document["results"])
        print(f"\ninterrupted: {finished} rows are in {path}; the same command with --resume goes on", file=sys.stderr)
        return INTERRUPTED
    except (console.MissingPackage, Refused, OSError) as error:
        print(f"benchmarks ops: {error}", file=sys.stderr)
        return 2
    console.show_table(
        tables.machine(document), *tables.operators(document["results"]), tables.operator_notes(document)
    )
    return tell_wrong(document)


def tell_wrong(document: Mapping[str, object]) -> int:
    """Name every wrong result on stderr; the exit status, 1 if there is one."""
    wrong = [tables.explain(row, each) for row in document["results"] for each in row["wrong"]]
    for line in wrong:
        print(f"WRONG {line}", file=sys.stderr)
    return 1 if wrong else 0


def _open(path: Path, options: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """A new document, or the one to go on with.

    Raises:
        Refused: the file exists and neither --resume nor --overwrite was given, or it was measured on something else.
    """
    described = machine.describe(device, None)
    asked = {name: getattr(options, name) for name in _ASKED}
    fresh = {"kind": KIND, "environment": described, "quick": options.quick, "options": asked, "sessions": []}
    fresh["results"] = []
    if not path.parent.is_dir():
        raise Refused(f"--json: {path.parent} is not a folder")
    if not path.exists() or options.overwrite:
        return fresh
    if not options.resume:
        raise Refused(f"{path} exists: --resume goes on with it, --overwrite starts anew")
    document = _load(path)
    before = document["environment"]
    changed = [
        f"{key} was {before.get(key)}, is {described[key]}" for key in _SAME if before.get(key) != described[key]
    ]
    if changed:
        raise Refused(f"{path} was measured on something else ({'; '.join(changed)}): --overwrite starts anew")
    # otherwise the rows of the file would silently lack what the options name now
    known = document.get("options", asked)
    changed = [f"--{name.replace('_', '-')} was {known.get(name)}, is {asked[name]}" for name in asked]
    changed = [each for each, name in zip(changed, asked, strict=True) if known.get(name) != asked[name]]
    if changed:
        raise Refused(
            f"{path} was measured otherwise ({'; '.join(changed)}): the same options go on, --overwrite starts anew"
        )
    return document


def _load(path: Path) -> dict[str, object]:
    """The document of an earlier run.

    Raises:
        Refused: the file holds something else.
    """
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise Refused(f"{path} is not JSON ({error}): --overwrite starts anew") from error
    parts = {"environment": dict, "sessions": list, "results": list}
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise Refused(f"{path} is not a file of this command: --overwrite starts anew")
    if wrong := [name for name, kind in parts.items() if not isinstance(document.get(name), kind)]:
        raise Refused(f"{path} lacks its {' and '.join(wrong)}: --overwrite starts anew")
    return document


def save(document: dict[str, object], path: Path) -> None:
    """All or nothing: if this process is killed, the file is as it was before or after."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def run(
    document: dict[str, object],
    chosen: list[Case],
    path: Path,
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """Add the rows of `chosen` that `document` lacks, and write it after each."""
    done = {row["case"] for row in document["results"]}
    # tiny cases of several shapes are one
    wanted = {case.name: case for case in (case.tiny() if options.tiny else case for case in chosen)}
    left = [case for name, case in wanted.items() if name not in done]
    if not left:
        return
    cores = None if options.tiny or device.type == "cuda" else machine.confine(torch.get_num_threads())
    peaks = machine.measure_peaks(device, {case.dtype for case in left}, small=options.tiny)
    seconds = _seconds(options, device)
    session = {**machine.session(device, peaks), "cores": cores, "seconds_a_case": seconds}
    document["sessions"].append(session)
    clock = engine.clock_of(device, seconds, options.repeats)
    compile_all = options.compile_all and not options.tiny
    with console.progress(len(left)) as tell:
        for number, case in enumerate(left):
            label = f"[{number + 1}/{len(left)}] {case.name}"
            tell(label, 0)
            workload = engine.make_workload(case, device, rotate=not options.tiny)
            names = list(options.implementations or peers.names(device.type))
            baseline = peers.EAGER[case.layout]
            names += [] if baseline in names else [baseline]
            row = engine.measure(workload, names, clock, peaks, compile_all)
            document["results"].append({**row, "session": len(document["sessions"]) - 1})
            save(document, path)
            tell(label, 1)


def _seconds(options: argparse.Namespace, device: torch.device) -> float:
    if options.seconds is not None:
        return options.seconds
    return engine.GPU_SECONDS if device.type == "cuda" else QUICK_SECONDS if options.quick else SECONDS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks ops", description=__doc__.partition(": ")[2])
    parser.add_argument("--quick", action="store_true", help="a selection that takes a few minutes")
    parser.add_argument(
        "--filter",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="only cases that fit one of these; each word of one is a shell pattern for a word of the case's name or "
        "its network: 'depthwise_eval k9', 'RepLKNet* float32'",
    )
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help="only these (all but 'ours reference')")
    parser.add_argument("--compile-all", action="store_true", help="torch.compile for every case, not for a few")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"of timing a case ({SECONDS:g}; --quick {QUICK_SECONDS:g}; on a GPU {engine.GPU_SECONDS:g} each)",
    )
    parser.add_argument("--repeats", type=int, help="rounds of a case (as many as fit into --seconds)")
    parser.add_argument("--threads", type=int, help="of torch, the kernels and the peers (torch's choice)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="(benchmarks/results/<device>-ops.json)")
    parser.add_argument("--resume", action="store_true", help="go on with the file of an interrupted run")
    parser.add_argument("--overwrite", action="store_true", help="start anew if the file exists")
    parser.add_argument(
        "--tiny", action="store_true", help="every case on a tiny plane: a test that it runs, no figures"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

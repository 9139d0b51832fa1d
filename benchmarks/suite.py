# SPDX-License-Identifier: MIT
"""python -m benchmarks ops: every operator and model beside its floor and its peers, checked before it is timed.

`measure` makes a row, for this command and for all others. Rows go to the JSON file one by one, each as soon as it is finished;
--resume goes on with a file that a run has left.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import check, console, machine, models, peers, roofline, tables, timing
from benchmarks.cases import DTYPES, LAYOUTS, Case, ModelCase, cases, select
from benchmarks.ops import make_inputs
from benchmarks.peers import Prepared, Workload

Row = dict[str, object]
#: Times what is ready, by name.
Clock = Callable[[Mapping[str, Prepared]], Mapping[str, timing.Timing]]

KIND = "operators"
INTERRUPTED = 130
SECONDS, QUICK_SECONDS = 4.0, 1.0
#: Of measuring one implementation on a GPU.
GPU_SECONDS = 0.2
_REPEATS = (5, 101)
_MOST_INPUTS = 64
#: Rows of one file must be comparable: what may not change between a run and its resumption.
_SAME = ("device", "cpu", "instruction_set", "threads", "torch", "commit", "convmixer_kernels")
#: Options that decide what a row holds: as little.
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
    # rows that are there would lack what is asked for now, and nothing would say so
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
    clock = clock_of(device, seconds, options.repeats)
    compile_all = options.compile_all and not options.tiny
    with console.progress(sum(_work(case, options, seconds) for case in left)) as tell:
        for number, case in enumerate(left):
            label = f"[{number + 1}/{len(left)}] {case.name}"
            tell(label, 0)
            workload = make_workload(case, device, rotate=not options.tiny)
            names = list(options.implementations or peers.names(device.type))
            baseline = peers.EAGER[case.layout]
            names += [] if baseline in names else [baseline]
            row = measure(workload, names, clock, peaks, compile_all)
            document["results"].append({**row, "session": len(document["sessions"]) - 1})
            save(document, path)
            tell(label, _work(case, options, seconds))


def _seconds(options: argparse.Namespace, device: torch.device) -> float:
    if options.seconds is not None:
        return options.seconds
    return GPU_SECONDS if device.type == "cuda" else QUICK_SECONDS if options.quick else SECONDS


def _work(case: Case, options: argparse.Namespace, seconds: float) -> float:
    """Seconds, about: for the progress bar."""
    compiling = 40.0 if case.compiled or options.compile_all else 0.0
    return 1.0 + seconds + compiling + (5.0 if isinstance(case, ModelCase) else 0.0)


def measure(
    workload: Workload,
    names: Sequence[str],
    clock: Clock | None,
    peaks: machine.Peaks | None,
    compile_all: bool = False,
    expected: check.Expected | None = None,
) -> Row:
    """A row: each implementation checked, and timed if it is right (or is not ours).

    Args:
        clock: None: checked only.
        peaks: what the floor is computed from; None: no floor.
        compile_all: torch.compile for a case without the mark, too.
        expected: what check.expect(workload) has found, if it is known.

    Raises:
        RuntimeError: ours or eager PyTorch in the case's layout failed. The row says so of any other.
    """
    ready, absent = prepare(workload, names, compile_all)
    expected = check.expect(workload) if expected is None else expected
    verdicts = verify(workload, expected, ready, absent)
    timed: dict[str, Prepared] = {}
    wrong = []
    for name, prepared in ready.items():
        bad = [each for each in verdicts.get(name, ()) if not each.passed]
        if bad and name.startswith("ours"):
            # a speed is never shown for a wrong result
            wrong += [{"implementation": name, **each._asdict()} for each in bad]
        elif name not in absent:
            timed[name] = prepared
    allocated = {name: _peak(prepared, workload.device) for name, prepared in timed.items()} if clock else {}
    timings = clock(timed) if clock else {}
    floor = None if peaks is None else roofline.floor(workload.case, workload.device.type, peaks)
    implementations = {}
    for name in timed:
        fields = _check_fields(verdicts.get(name))
        if name in timings:
            found = timings[name]
            percent = {} if floor is None else {"percent_of_floor": 100 * floor.seconds / found.median}
            fields = {**found.fields(), **percent, "peak_bytes": allocated[name], **fields}
        implementations[name] = fields
    return {
        **case_fields(workload.case),
        **({} if floor is None else floor.fields()),
        "sets": len(workload.inputs) or 1,
        "implementations": implementations,
        "absent": absent,
        "wrong": wrong,
    }


def case_fields(case: Case) -> Row:
    fields = {"case": case.name, "op": case.op, "family": case.family, "dtype": case.dtype, "layout": case.layout}
    if isinstance(case, ModelCase):
        return fields | {"model": case.model, "label": case.preset.label, "batch": case.batch}
    return fields | {"shape": list(case.shape), "channels_out": case.out, "kernel": case.kernel}


def make_workload(case: Case, device: torch.device, rotate: bool = True) -> Workload:
    """The inputs of a case; of an operator so many sets that together they exceed the cache twice, and no call finds its own there.

    Args:
        rotate: False for only as many sets as a check needs.
    """
    if isinstance(case, ModelCase):
        preset = case.preset
        size = (case.batch, 3, preset.image_size, preset.image_size)
        return model_workload(case, torch.randn(size, generator=torch.Generator().manual_seed(0)), device)
    n, c, h, w = case.shape
    size = n * (c + 2 * case.out) * h * w * DTYPES[case.dtype].itemsize
    count = check.pooled_inputs(case)
    if rotate:
        count = max(count, 2, min(_MOST_INPUTS, -(-2 * machine.last_level_cache(device) // size)))
    return Workload(case, device, make_inputs(case, device, count))


def model_workload(
    case: ModelCase,
    images: Tensor,  # (N, 3, H, W) float32, on the CPU
    device: torch.device,
    checkpoint: Path | None = None,  # weights; None: random ones
) -> Workload:
    preset, dtype, layout = case.preset, DTYPES[case.dtype], LAYOUTS[case.layout]
    images = images.to(device)
    if checkpoint is not None:
        reference = models.checkpoint_reference(preset, checkpoint)
    else:
        # made on the device: on a CPU the largest model alone takes a minute
        with device:
            reference = models.random_reference(preset, images if device.type == "cpu" else images[:8])
    reference = reference.to(device, dtype).to(memory_format=layout)
    cotangent = torch.randn(case.batch, preset.n_classes, generator=torch.Generator().manual_seed(1))
    images = images.to(dtype).to(memory_format=layout)
    return Workload(case, device, [], reference, images, cotangent.to(device, dtype))


def prepare(workload: Workload, names: Sequence[str], compile_all: bool) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Those of `names` that can run a case, and why the others cannot."""
    ready, absent = {}, {}
    for name in names:
        try:
            ready[name] = peers.prepare(name, workload, compile_all)
        except peers.Absent as reason:
            absent[name] = str(reason)
        except RuntimeError as error:
            # a peer that cannot take a case (an engine's refusal, no memory) is a dash; ours and the measure of all are not
            if name.startswith("ours") or name == peers.EAGER[workload.case.layout]:
                raise
            absent[name] = f"failed: {console.first_line(error)}"
    return ready, absent


def verify(
    workload: Workload, expected: check.Expected, ready: Mapping[str, Prepared], absent: dict[str, str]
) -> dict[str, list[check.Comparison]]:
    """Every implementation's results against float64, beside eager PyTorch's in the case's layout.

    Args:
        absent: takes the peers that fail at their first call, and why.
    """
    verdicts = {}
    for name, prepared in ready.items():
        if name == peers.CLONE:
            continue
        try:
            if name == peers.EAGER[workload.case.layout]:
                found = expected.eager
            else:
                found = check.results(workload, prepared, len(expected.exact), expected.kept)
        except RuntimeError as error:
            if name.startswith("ours"):
                raise
            absent[name] = f"failed: {console.first_line(error)}"
            continue
        verdicts[name] = check.judge(workload, expected, found, complete=name.startswith("ours"))
    return verdicts


def _check_fields(comparisons: list[check.Comparison] | None) -> Row:
    if not comparisons:
        return {}
    nearest = comparisons[0]
    return {
        "passed": all(each.passed for each in comparisons),
        "tensors_checked": len(comparisons),
        "nearest_to_limit": nearest.tensor,
        "error": nearest.error,
        "eager_error": nearest.eager_error,
        "allowed": nearest.allowed,
    }


def _peak(prepared: Prepared, device: torch.device) -> int | None:
    if not prepared.torch_memory:
        return None
    with prepared.setting():
        return machine.peak_bytes(prepared.calls[0], device)


def clock_of(device: torch.device, seconds: float, repeats: int | None) -> Clock:
    """The clock of a device: `seconds` is of all implementations together on a CPU, of each on a GPU."""
    if device.type == "cuda":

        def graphs(ready: Mapping[str, Prepared]) -> dict[str, timing.Timing]:
            found = {}
            for name, prepared in ready.items():
                with prepared.setting():
                    found[name] = timing.graphed(_rotating(prepared), seconds=seconds, repeats=repeats)
            return found

        return graphs
    return lambda ready: _interleaved(ready, device, seconds, repeats)


def _rotating(prepared: Prepared) -> Callable[[], object]:
    """A call on the next set of inputs each time."""
    calls = itertools.cycle(prepared.calls)
    return lambda: next(calls)()


def rotating(prepared: Prepared, device: torch.device) -> Callable[[], None]:
    """As a program calls it that waits for each result: with the settings, and on a GPU until the work is done."""
    following = _rotating(prepared)

    def call() -> None:
        with prepared.setting():
            following()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def _interleaved(
    ready: Mapping[str, Prepared], device: torch.device, seconds: float, repeats: int | None
) -> dict[str, timing.Timing]:
    """In as many rounds as fit into `seconds`, between 5 and 101, or as many as asked for."""
    functions = {
        name: _rotating(prepared) if prepared.setting is Prepared.setting else rotating(prepared, device)
        for name, prepared in ready.items()
    }
    settle = _Settle({name for name, prepared in ready.items() if not prepared.torch_memory})
    for function in functions.values():
        function()
    if repeats is None:
        start = time.perf_counter()
        timing.interleaved(functions, repeats=1, warmup=0, device=device, before_call=settle)
        least, most = _REPEATS
        repeats = max(least, min(most, int(seconds / (time.perf_counter() - start))))
    return timing.interleaved(functions, repeats=repeats, warmup=0, device=device, before_call=settle)


class _Settle:
    """Between two calls: each library finds the cores free and its threads as its own previous call would leave them.

    After a call OpenMP's threads go on spinning for some milliseconds, in the way of another library's pool. Then they sleep, and the
    next call through torch has to wake them.
    """

    def __init__(self, own_pools: set[str]) -> None:
        self._own_pools, self._foreign = own_pools, False
        self._scratch = torch.zeros(1 << 18)

    def __call__(self, name: str) -> None:
        if not self._own_pools:
            return
        if name in self._own_pools:
            time.sleep(0.01)
        elif self._foreign:
            time.sleep(0.002)
            self._scratch.add_(1)
        self._foreign = name in self._own_pools


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
        help=f"of timing a case ({SECONDS:g}; --quick {QUICK_SECONDS:g}; on a GPU {GPU_SECONDS:g} each)",
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

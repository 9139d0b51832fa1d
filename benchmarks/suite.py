# SPDX-License-Identifier: MIT
"""python -m benchmarks ops: every operator and model beside its floor and its peers, checked before it is timed.

Rows go to the JSON file one by one, each as soon as it is finished; --resume goes on with a file that a run has left.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import check, environment, machine, memory, models, peers, report_ops, roofline, timing
from benchmarks.ops import make_sets
from benchmarks.optional import MissingPackage
from benchmarks.progress import progress
from benchmarks.shapes import DTYPES, LAYOUTS, Case, ModelCase, cases, select

KIND = "operators"
INTERRUPTED = 130
SECONDS, QUICK_SECONDS = 4.0, 1.0
_REPEATS = (5, 101)
_MOST_SETS = 64
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
    except (MissingPackage, Refused, OSError) as error:
        print(f"benchmarks ops: {error}", file=sys.stderr)
        return 2
    report_ops.show(document)
    wrong = [(row, tensor) for row in document["results"] for tensor in row["wrong"]]
    for row, tensor in wrong:
        print(f"WRONG {row['case']}: {tensor['implementation']}: {_explain(tensor)}", file=sys.stderr)
    return 1 if wrong else 0


def _explain(tensor: dict[str, object]) -> str:
    errors = f"{tensor['error']:.2e} (allowed {tensor['allowed']:.2e}, eager's {tensor['eager_error']:.2e})"
    return f"{tensor['tensor']}: relative error {errors}"


# ---- the file -------------------------------------------------------------------------------------------------------


def _open(path: Path, options: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """A new document, or the one to go on with.

    Raises:
        Refused: there is a file and no word on what to do with it, or it was measured on something else.
    """
    described = environment.describe(device, None)
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
    """All or nothing: who kills this process finds the file as it was before or after."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


# ---- the run --------------------------------------------------------------------------------------------------------


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
    wanted = {case.name: case for case in (_sized(case, options) for case in chosen)}
    left = [case for name, case in wanted.items() if name not in done]
    if not left:
        return
    cores = None if options.tiny or device.type == "cuda" else machine.confine(torch.get_num_threads())
    peaks = machine.measure_peaks(device, {case.dtype for case in left}, small=options.tiny)
    document["sessions"].append(
        {
            "date": environment.describe(device, None)["date"],
            "cores": cores,
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "peaks": peaks._asdict(),
            "cache_bytes": machine.last_level_cache(device),
            "seconds_a_case": _seconds(options),
            "versions": _versions(),
        }
    )
    work = sum(_work(case, options) for case in left)
    with progress(work) as tell:
        for number, case in enumerate(left):
            label = f"[{number + 1}/{len(left)}] {case.name}"
            tell(label, 0)
            row = measure(case, device, options, peaks)
            document["results"].append({**row, "session": len(document["sessions"]) - 1})
            save(document, path)
            tell(label, _work(case, options))


def _sized(case: Case, options: argparse.Namespace) -> Case:
    return case.tiny() if options.tiny else case


def _seconds(options: argparse.Namespace) -> float:
    if options.seconds is not None:
        return options.seconds
    return QUICK_SECONDS if options.quick else SECONDS


def _work(case: Case, options: argparse.Namespace) -> float:
    """Seconds, about: for the progress bar."""
    compiling = 40.0 if case.compiled or options.compile_all else 0.0
    return 1.0 + _seconds(options) + compiling + (5.0 if isinstance(case, ModelCase) else 0.0)


def _versions() -> dict[str, str | None]:
    from importlib import metadata

    found: dict[str, str | None] = {}
    for name in ("numpy", "onnxruntime", "openvino", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def measure(
    case: Case, device: torch.device, options: argparse.Namespace, peaks: machine.MachinePeaks
) -> dict[str, object]:
    """One row: everyone checked, and those who are right (or are not ours) timed."""
    inputs = make_inputs(case, device, rotate=not options.tiny)
    ready, absent = prepare(inputs, options)
    verdicts = verify(inputs, ready, absent)
    timed = {}
    wrong = []
    for name, comparisons in verdicts.items():
        bad = [each for each in comparisons if not each.passed]
        if bad and name.startswith("ours"):
            # a speed is never shown for a wrong result
            wrong += [{"implementation": name, **each._asdict()} for each in bad]
            absent[name] = f"wrong: {bad[0].tensor}"
        else:
            timed[name] = ready[name]
    if peers.CLONE in ready:
        timed[peers.CLONE] = ready[peers.CLONE]
    allocated = {name: _peak(timed[name], device) for name in timed}
    timings = time_all(timed, device, _seconds(options), options.repeats)
    floor = (roofline.model_floor if isinstance(case, ModelCase) else roofline.operator_floor)(case, device, peaks)
    implementations = {
        name: {
            **_timing_fields(found, floor),
            "peak_bytes": allocated[name],
            **_check_fields(verdicts.get(name)),
        }
        for name, found in timings.items()
    }
    return {
        **_case_fields(case),
        "device": device.type,
        "bytes": floor.bytes,
        "flops": floor.flops,
        "floor_ms": 1e3 * floor.seconds,
        "bound": floor.bound,
        "sets": len(inputs.sets) or 1,
        "passed": not wrong,
        "wrong": wrong,
        "implementations": implementations,
        "absent": absent,
    }


def _case_fields(case: Case) -> dict[str, object]:
    fields = {"case": case.name, "op": case.op, "family": case.family, "dtype": case.dtype, "layout": case.layout}
    if isinstance(case, ModelCase):
        return fields | {"model": case.model, "batch": case.batch}
    return fields | {"shape": list(case.shape), "channels_out": case.out, "kernel": case.kernel}


def make_inputs(case: Case, device: torch.device, rotate: bool = True) -> peers.Inputs:
    """The inputs of a case; of an operator as many sets as exceed the cache twice, so that none is found in it.

    Args:
        rotate: False for only as many sets as a check needs.
    """
    if isinstance(case, ModelCase):
        return _model_inputs(case, device)
    n, c, h, w = case.shape
    size = n * (c + 2 * case.out) * h * w * DTYPES[case.dtype].itemsize
    count = check.pooled_sets(case)
    if rotate:
        count = max(count, 2, min(_MOST_SETS, -(-2 * machine.last_level_cache(device) // size)))
    return peers.Inputs(case, device, make_sets(case, device, count))


def _model_inputs(case: ModelCase, device: torch.device) -> peers.Inputs:
    preset, dtype = case.preset, DTYPES[case.dtype]
    images = torch.randn(
        case.batch, 3, preset.image_size, preset.image_size, generator=torch.Generator().manual_seed(0)
    )
    reference = models.random_reference(preset, images).to(device, dtype)
    cotangent = torch.randn(case.batch, preset.n_classes, generator=torch.Generator().manual_seed(1))
    images = images.to(device, dtype).to(memory_format=LAYOUTS[case.layout])
    return peers.Inputs(case, device, [], reference, images, cotangent.to(device, dtype))


def prepare(inputs: peers.Inputs, options: argparse.Namespace) -> tuple[dict[str, peers.Prepared], dict[str, str]]:
    """Everyone who can run a case, and why the others cannot; eager PyTorch in its layout always is among them."""
    names = list(options.implementations or peers.names(inputs.device.type))
    baseline = peers.EAGER[inputs.case.layout]
    ready, absent = {}, {}
    for name in names if baseline in names else [*names, baseline]:
        try:
            ready[name] = peers.prepare(name, inputs, options.compile_all and not options.tiny)
        except peers.Absent as reason:
            absent[name] = str(reason)
        except RuntimeError as error:
            # a peer that cannot take a case (an engine's refusal, no memory) is a dash; ours and the measure of all are not
            if name.startswith("ours") or name == baseline:
                raise
            absent[name] = f"failed: {peers.first_line(error)}"
    return ready, absent


def verify(
    inputs: peers.Inputs, ready: dict[str, peers.Prepared], absent: dict[str, str] | None = None
) -> dict[str, list]:
    """Every implementation's results against float64, beside eager PyTorch's in the case's layout.

    Args:
        absent: takes the peers that fail at their first call, and why; without it they raise.
    """
    truth, baseline = check.exact(inputs), peers.EAGER[inputs.case.layout]
    eager = check.results(inputs, ready[baseline], truth)
    verdicts = {}
    for name, prepared in ready.items():
        if name != peers.CLONE:
            try:
                # a second call would start from running statistics that the first has changed
                found = eager if name == baseline else check.results(inputs, prepared, truth)
            except RuntimeError as error:
                if absent is None or name.startswith("ours"):
                    raise
                absent[name] = f"failed: {peers.first_line(error)}"
                continue
            verdicts[name] = check.compare(inputs, truth, eager, found)
    return verdicts


def _peak(prepared: peers.Prepared, device: torch.device) -> int | None:
    if not prepared.torch_memory:
        return None
    with prepared.setting():
        return memory.peak_bytes(prepared.calls[0], device)


def rotating(prepared: peers.Prepared, device: torch.device | None = None) -> Callable[[], None]:
    """A call on the next set each time; with a CUDA `device` it returns when the work is done."""
    calls: Iterator[Callable[[], object]] = itertools.cycle(prepared.calls)

    def call() -> None:
        next(calls)()

    def call_with_setting() -> None:
        with prepared.setting():
            next(calls)()

    def finished() -> None:
        call_with_setting()
        torch.cuda.synchronize(device)

    if device is not None and device.type == "cuda":
        return finished
    return call if prepared.setting is peers.Prepared.setting else call_with_setting


def time_all(
    ready: dict[str, peers.Prepared], device: torch.device, seconds: float, repeats: int | None = None
) -> dict[str, timing.Timing]:
    """Interleaved, in as many rounds as fit into `seconds`, between 5 and 101, or as many as asked for."""
    functions = {name: rotating(prepared) for name, prepared in ready.items()}
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

    Threads of OpenMP go on spinning for some milliseconds after a call, in the way of another library's pool, and sleep after
    that, which costs the next call through torch their awakening.
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


def _timing_fields(found: timing.Timing, floor: roofline.Floor) -> dict[str, float | int]:
    return {
        "median_ms": 1e3 * found.median,
        "q20_ms": 1e3 * found.low,
        "q80_ms": 1e3 * found.high,
        "repeats": found.repeats,
        "percent_of_floor": 100 * floor.seconds / found.median,
    }


def _check_fields(comparisons: list | None) -> dict[str, object]:
    if not comparisons:
        return {}
    nearest = comparisons[0]
    fields = {"error": nearest.error, "allowed": nearest.allowed, "nearest_to_limit": nearest.tensor}
    return fields | {"passed": all(each.passed for each in comparisons)}


def options_of(arguments: list[str]) -> argparse.Namespace:
    return _parser().parse_args(arguments)


# ---- the command line ---------------------------------------------------------------------------------------------


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
    parser.add_argument("--seconds", type=float, help=f"of timing a case ({SECONDS:g}; with --quick {QUICK_SECONDS:g})")
    parser.add_argument("--repeats", type=int, help="rounds of a case (as many as fit into --seconds)")
    parser.add_argument("--threads", type=int, help="of torch, the kernels and the peers (torch's choice)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="(benchmarks/results/<device>-ops.json)")
    parser.add_argument("--resume", action="store_true", help="go on with the file of an interrupted run")
    parser.add_argument("--overwrite", action="store_true", help="start anew where the file exists")
    parser.add_argument(
        "--tiny", action="store_true", help="every case on a tiny plane: a test that it runs, no figures"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

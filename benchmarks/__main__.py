# SPDX-License-Identifier: MIT
"""python -m benchmarks: a photo through the reference and through this package, checked against float64 and timed."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import convmixer_kernels
from benchmarks import accuracy, environment, models, photo, report, roofline, timing
from benchmarks.optional import MissingPackage, require
from benchmarks.progress import progress as progress_bar

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
REPEATS, QUICK_REPEATS = 11, 5
#: What `python -m benchmarks NAME` runs instead of the models.
COMMANDS = {
    "ops": "benchmarks.suite",
    "grid": "benchmarks.grid",
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
    except (MissingPackage, models.CheckpointError, OSError, NotImplementedError) as error:
        # What a user can cause (a package, a file, a backend that cannot run this) is told without a traceback.
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        return 130
    _print_table(document)
    wrong = [(row, tensor) for row in document["results"] for tensor in row["wrong"]]
    for row, tensor in wrong:
        limit = f"allowed {tensor['allowed']:.2e}, eager's {tensor['eager_error']:.2e}"
        where = f"{row['label']}, {row['mode']}, {row['dtype']}: {tensor['tensor']}"
        print(f"WRONG {where}: relative error {tensor['error']:.2e} ({limit})", file=sys.stderr)
    return 1 if wrong else 0


def run(options: argparse.Namespace) -> dict[str, object]:
    """Measure everything that the options ask for; returns what --json writes."""
    device = torch.device(options.device)
    picture = photo.load_photo(options.image)
    document: dict[str, object] = {
        "environment": environment.describe(device, options.backend),
        "quick": options.quick,
        "results": [],
    }
    cases = [models.CASES[name] for name in options.models]
    work = sum(_work(case, options) for case in cases) * len(options.dtype)
    with models.backend(options.backend), progress_bar(work) as progress:
        for dtype in (DTYPES[name] for name in options.dtype):
            peaks = roofline.measure_peaks(device, dtype)
            for case in cases:
                document["results"] += _run_case(case, picture, dtype, device, options, peaks, progress)
                if options.json is not None:
                    # After every case: a run that is cut off keeps what it has.
                    options.json.write_text(json.dumps(document, indent=1) + "\n")
    return document


def _run_case(
    case: models.Case,
    picture: Tensor,  # (3, H, W)
    dtype: torch.dtype,
    device: torch.device,
    options: argparse.Namespace,
    peaks: roofline.Peaks,
    progress: Callable[[str, float], None],
) -> list[dict[str, object]]:
    """Check, then time, eval and the training step of one model in one dtype: one row of results each."""
    batch = _batch(case, options)
    modes = ("eval", "train") if _trains(case, options) else ("eval",)
    progress(f"{case.label}: building", 0)
    images = photo.image_batch(picture, batch, case.image_size)
    random = options.checkpoint is None
    eager = models.random_reference(case, images) if random else models.checkpoint_reference(case, options.checkpoint)
    layout = LAYOUTS[options.layout]
    eager = eager.to(device, dtype).to(memory_format=layout)
    images = images.to(device, dtype).to(memory_format=layout)
    cotangent = torch.randn(batch, case.n_classes, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    ours = models.ours_like(case, eager).to(memory_format=layout)

    def results_of(model: nn.Module, name: str, share: float) -> dict[str, dict[str, Tensor]]:
        wide = next(model.parameters()).dtype
        results = {}
        for mode in modes:
            progress(f"{case.label}, {mode}: {name}", 0)
            if mode == "eval":
                results[mode] = accuracy.evaluate(model, images.to(wide))
            else:
                results[mode] = accuracy.training_step(model, images.to(wide), cotangent.to(wide))
            progress(f"{case.label}, {mode}: {name}", share * _cost(case, batch, mode))
        return results

    # In a function of its own the float64 model is gone before anything is timed.
    exact = results_of(copy.deepcopy(eager).double(), "float64", _EXACT_SHARE)
    theirs = results_of(eager, "eager", 1)
    mine = results_of(ours, "ours", 1)
    rows = []
    for mode in modes:
        comparisons = accuracy.compare(exact[mode], theirs[mode], mine[mode], dtype)
        row = _row(case, batch, mode, dtype, options.layout, comparisons)
        if row["passed"]:
            timings = models.time_in_new_process(
                {"reference": eager, "ours": ours},
                images,
                cotangent,
                training=mode == "train",
                backend=options.backend,
                repeats=options.repeats,
                warmup=_warmup(options),
                on_call=lambda name, mode=mode: progress(f"{case.label}, {mode}: timing", _cost(case, batch, mode)),
            )
            flops = 2 * roofline.multiply_adds(case, batch, mode == "train")
            floor = roofline.floor_seconds(case, batch, mode == "train", dtype, device, peaks)
            row |= {"flops": flops, "bytes": roofline.activation_bytes(case, batch, mode == "train", dtype.itemsize)}
            row |= {"floor_ms": 1e3 * floor, "gemm_gflops": peaks.flops / 1e9, "copy_gbytes": peaks.bandwidth / 1e9}
            row["implementations"] = {name: _timing_fields(value, flops, floor) for name, value in timings.items()}
        else:
            # A speed is never shown for a wrong result.
            progress(
                f"{case.label}, {mode}: wrong", 2 * (options.repeats + _warmup(options)) * _cost(case, batch, mode)
            )
        rows.append(row)
    return rows


def _row(
    case: models.Case, batch: int, mode: str, dtype: torch.dtype, layout: str, comparisons: list[accuracy.Comparison]
) -> dict[str, object]:
    nearest = comparisons[0]
    return {
        "case": next(name for name, known in models.CASES.items() if known is case),
        "label": case.label,
        "batch": batch,
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
        "passed": all(comparison.passed for comparison in comparisons),
        "tensors_checked": len(comparisons),
        "nearest_to_limit": nearest.tensor,
        "error": nearest.error,
        "eager_error": nearest.eager_error,
        "output_error": next(each.error for each in comparisons if each.tensor == "output"),
        "output_eager_error": next(each.eager_error for each in comparisons if each.tensor == "output"),
        "wrong": [comparison._asdict() for comparison in comparisons if not comparison.passed],
        "implementations": {},
    }


def _timing_fields(measured: timing.Timing, flops: int, floor: float) -> dict[str, float]:
    return {
        "median_ms": 1e3 * measured.median,
        "q20_ms": 1e3 * measured.low,
        "q80_ms": 1e3 * measured.high,
        "repeats": measured.repeats,
        "gflops": flops / measured.median / 1e9,
        "percent_of_floor": 100 * floor / measured.median,
    }


# ---- how much work there is, for the progress bar -----------------------------------------------------------------

#: A float64 pass beside a float32 one, about.
_EXACT_SHARE = 5.0


def _batch(case: models.Case, options: argparse.Namespace) -> int:
    if options.batch is not None:
        return options.batch
    return case.quick_batch if options.quick else case.batch


def _trains(case: models.Case, options: argparse.Namespace) -> bool:
    # Batch norm and pooling over one image leave nothing of it: every gradient before them is 0, up to rounding.
    return (case.quick_training or not options.quick) and _batch(case, options) > 1


def _warmup(options: argparse.Namespace) -> int:
    return 1 if options.quick else 2


def _cost(case: models.Case, batch: int, mode: str) -> float:
    """Of one call, in GFLOP; a training step takes longer than its arithmetic says."""
    return 2e-9 * roofline.multiply_adds(case, batch, False) * (5 if mode == "train" else 1)


def _work(case: models.Case, options: argparse.Namespace) -> float:
    calls = _EXACT_SHARE + 2 + 2 * (options.repeats + _warmup(options))
    modes = ("eval", "train") if _trains(case, options) else ("eval",)
    return calls * sum(_cost(case, _batch(case, options), mode) for mode in modes)


def _print_table(document: Mapping[str, object]) -> None:
    console = require("rich.console").Console()
    if not console.is_terminal:
        # A file or pipe has no width; 80 columns would break the lines.
        console.width = 120
    rich_table = require("rich.table")
    table = rich_table.Table(title=report.machine(document), title_justify="left", box=require("rich.box").SIMPLE_HEAD)
    for index, heading in enumerate(report.HEADINGS):
        table.add_column(heading, justify="left" if index < 3 else "right", no_wrap=index > 0)
    for row in report.table_rows(document):
        style = "bold red" if report.WRONG in row else None
        table.add_row(*row, style=style)
    console.print(table)
    for line in report.notes(document):
        console.print(line, style="dim", highlight=False)


# ---- the command line ---------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.partition(": ")[2],
        epilog=f"Other commands, each with its own --help: {', '.join(COMMANDS)}.",
    )
    known = ", ".join(models.CASES)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="within two minutes: small batches, few repeats, small models' training only",
    )
    parser.add_argument(
        "--models", nargs="+", choices=models.CASES, default=list(models.CASES), metavar="MODEL", help=known
    )
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

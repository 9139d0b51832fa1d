# SPDX-License-Identifier: MIT
"""python -m benchmarks report: the README's tables, the pictures and the page, from JSON files and nothing else."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import plots, report_ops
from benchmarks.optional import MissingPackage, require

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
OPERATORS_BEGIN, OPERATORS_END = "<!-- operators:begin -->", "<!-- operators:end -->"
GPU_BEGIN, GPU_END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
HEADINGS = ("model", "mode", "dtype", "error ours", "error eager", "reference ms", "ours ms", "speed-up")
WRONG, ABSENT = "WRONG", "-"
_MODES = {"eval": "Inference", "train": "Training step (forward + backward)"}


# ---- the table ----------------------------------------------------------------------------------------------------


def table_rows(document: Mapping[str, object]) -> list[list[str]]:
    """The cells of every row, in the order of HEADINGS; a training step that was left out is a row of dashes."""
    rows = []
    results = document["results"]
    trained = {(row["case"], row["dtype"]) for row in results if row["mode"] == "train"}
    for row in results:
        start = [_model(row), row["mode"], row["dtype"]]
        errors = [f"{row['error']:.1e}", f"{row['eager_error']:.1e}"]
        if row["passed"]:
            times = [milliseconds(row["implementations"][name]["median_ms"]) for name in ("reference", "ours")]
            rows.append([*start, *errors, *times, f"{speedup(row):.2f}x"])
        else:
            rows.append([*start, *errors, ABSENT, ABSENT, WRONG])
        if (row["case"], row["dtype"]) not in trained:
            rows.append([_model(row), "train", row["dtype"], *[ABSENT] * 5])
    return rows


def machine(document: Mapping[str, object]) -> str:
    """What it was measured on, in one line."""
    found = document["environment"]
    if found["device_type"] == "cpu":
        threads = found["threads"]
        device = f"{found['cpu']} ({found['instruction_set']}), {threads} thread{'s' if threads != 1 else ''}"
    else:
        device = found["device"]
    return f"{device}, torch {found['torch']}, {found['date'][:10]}"


def notes(document: Mapping[str, object]) -> list[str]:
    """What the table's columns mean, and what was left out."""
    results = document["results"]
    repeats = {each["repeats"] for row in results for each in row["implementations"].values()}
    number = f"{min(repeats)} " if len(repeats) == 1 else ""
    layouts = sorted({row["layout"] for row in results})
    lines = [
        "error: relative L2 against float64, of the tensor nearest to its limit (2 x eager's + one rounding step) "
        "among the output and, in train, the gradients of the images and all parameters and the running statistics.",
        f"reference: the same weights in eager PyTorch, {' and '.join(layouts)}. train: forward + backward. "
        f"Times are medians of {number}calls, interleaved with the other's.",
    ]
    trained = {row["case"] for row in results if row["mode"] == "train"}
    left_out = [row for row in results if row["case"] not in trained]
    if any(row["batch"] > 1 for row in left_out) or (document["quick"] and left_out):
        lines.append("-: not run with --quick; run without it for the training step of the large models.")
    elif left_out:
        lines.append("-: a training step needs two images at least: batch norm and pooling leave no gradient of one.")
    return lines


def markdown(document: Mapping[str, object]) -> str:
    """Machine, table and notes for the README."""
    rule = [":--"] * 3 + ["--:"] * (len(HEADINGS) - 3)
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEADINGS, rule, *table_rows(document))]
    return "\n".join([machine(document) + ":", "", *lines, "", *notes(document)])


def speedup(row: Mapping[str, object]) -> float:
    times = row["implementations"]
    return times["reference"]["median_ms"] / times["ours"]["median_ms"]


def milliseconds(value: float) -> str:
    """Three digits at least: 0.123, 1.23, 12.3, 123, 1234."""
    return f"{value:.{max(0, 2 - (len(str(int(value))) - 1) if value >= 1 else 3)}f}"


def _model(row: Mapping[str, object]) -> str:
    return f"{row['label']}, batch {row['batch']}"


def gpu_markdown(document: Mapping[str, Any], headline: bool = False) -> str:
    """The table of a JSON of python -m benchmarks.gpu: one row for each case that ran, wrong results named as such.

    Args:
        headline: only whole models and the kernels of the largest one.
    """
    cases: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in document["results"]:
        # not what was only checked, nor what was tried with other settings
        if "settings" not in row and ("median_us" in row or "error" in row):
            cases.setdefault((row["case"], row["dtype"], row["layout"]), {})[row["implementation"]] = row
    cases = {key: found for key, found in cases.items() if any("median_us" in row for row in found.values())}
    if headline:
        cases = {key: found for key, found in cases.items() if key[0].startswith("model") or "x1536x" in key[0]}
    # where there was no nvcc the Triton backend alone was measured
    first = "ours" if any("ours" in found for found in cases.values()) else "triton"
    headings = ["case", "dtype", "layout", first, "of the floor", "eager, same layout", "speed-up"]
    optional = {
        "triton": lambda found: _gpu_time(found.get("triton", {})) if first == "ours" else None,
        "other GEMMs": lambda found: _other_gemms(found),
        "called, not as a graph": lambda found: _called(found.get(first, {}), found),
    }
    shown = {name: cell for name, cell in optional.items() if any(cell(found) for found in cases.values())}
    lines = [f"| {' | '.join([*headings, *shown])} |"]
    lines.append(f"| :-- | :-- | :-- |{' --: |' * (len(headings) - 3 + len(shown))}")
    for (case, dtype, layout), found in cases.items():
        ours, eager = found.get(first, {}), found.get(f"eager {layout}", {}).get("median_us")
        cells = [case, dtype, layout]
        if ours.get("median_us") is None:
            cells += [f"wrong: {ours.get('error', 'not run')}", "-", f"{eager:.0f} us" if eager else "-", "-"]
        else:
            mine, floor = ours["median_us"], ours.get("percent_of_floor")
            cells += [f"{mine:.0f} us", f"{floor:.0f} %" if floor else "-"]
            cells += [f"{eager:.0f} us", f"{eager / mine:.1f}x"] if eager else ["-", "-"]
        lines.append(f"| {' | '.join([*cells, *(cell(found) or '-' for cell in shown.values())])} |")
    tests = document.get("tests", {}).get("summary", "not run")
    environment = document["environment"]
    missing = [f"{backend} was not measured: {reason}." for backend, reason in document.get("absent", {}).items()]
    head = f"{environment['device']}, torch {environment['torch']}; gpu tests: {tests}."
    return "\n".join([head, *missing, "", *lines])


def _gpu_time(row: Mapping[str, Any]) -> str | None:
    if "median_us" in row:
        return f"{row['median_us']:.0f} us"
    return "wrong" if row.get("ok") is False else None


def _other_gemms(found: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What the other choices of CONVMIXER_CUDA_GEMM took."""
    times = {name.removeprefix("ours "): _gpu_time(row) for name, row in found.items() if name.startswith("ours ")}
    return ", ".join(f"{name} {time}" for name, time in times.items() if time) or None


def _called(ours: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> str | None:
    """A model that is called from Python, launches included: ours beside eager PyTorch."""
    eager = next((row for name, row in found.items() if name.startswith("eager")), {})
    if "called_us" not in ours or "called_us" not in eager:
        return None
    mine, theirs = ours["called_us"], eager["called_us"]
    return f"{mine:.0f} us, {theirs / mine:.1f}x"


def write_readme(readme: Path, text: str, begin_marker: str = BEGIN, end_marker: str = END) -> None:
    """Put `text` between the markers of `readme`.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    before, begin, rest = (whole := readme.read_text()).partition(begin_marker)
    _, end, after = rest.partition(end_marker)
    if not begin or not end or whole.count(begin_marker) != 1 or whole.count(end_marker) != 1:
        raise ValueError(f"{readme} must contain {begin_marker} and then {end_marker}, once each")
    readme.write_text(f"{before}{begin_marker}\n{text}\n{end_marker}{after}")


# ---- the picture --------------------------------------------------------------------------------------------------

_OURS, _REFERENCE, _LOSS, _INK, _QUIET = "#0b7a75", "#c9ced6", "#b44d12", "#1f2933", "#616e7c"


def draw(document: Mapping[str, object], path: Path) -> None:
    """A panel for each mode, two bars for each model and dtype: the time beside the reference's, which is 100 %.

    Raises:
        MissingPackage: matplotlib is not installed.
        ValueError: there is nothing that was timed.
    """
    rows = [row for row in document["results"] if row["passed"]]
    modes = [mode for mode in _MODES if any(row["mode"] == mode for row in rows)]
    if not modes:
        raise ValueError("the results hold nothing that was timed")
    matplotlib = require("matplotlib")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot")
    several_dtypes = len({row["dtype"] for row in rows}) > 1
    names = list(dict.fromkeys(_name(row, several_dtypes) for row in rows))
    height = 1.6 + 0.82 * len(names)
    settings = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": _INK, "axes.labelcolor": _QUIET}
    with matplotlib.rc_context(settings):
        figure, panels = pyplot.subplots(
            1, len(modes), figsize=(1.8 + 4.4 * len(modes), height), sharey=True, squeeze=False
        )
        # Room for a label behind the longest bar of ours.
        width = max(1.0, *(1 / speedup(row) + 0.36 for row in rows))
        for panel, mode in zip(panels[0], modes, strict=True):
            _draw_panel(panel, {_name(row, several_dtypes): row for row in rows if row["mode"] == mode}, names, width)
            panel.set_title(_MODES[mode], loc="left", fontsize=11, fontweight="bold", color=_INK, pad=8)
        # Inches, not shares: the head keeps its size when there are more models.
        figure.subplots_adjust(
            left=1.75 / figure.get_figwidth(), right=0.985, top=1 - 1.02 / height, bottom=0.42 / height, wspace=0.06
        )
        left = 0.12 / figure.get_figwidth()
        dtype = "" if several_dtypes else f" in {rows[0]['dtype']}"
        title = f"ConvMixer{dtype}: time per batch beside eager PyTorch, shorter is better"
        figure.text(left, 1 - 0.3 / height, title, fontsize=14, fontweight="bold")
        figure.text(left, 1 - 0.54 / height, machine(document), fontsize=9, color=_QUIET)
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in (_REFERENCE, _OURS)]
        figure.legend(
            handles,
            ["reference (eager PyTorch)", "convmixer-kernels, same weights"],
            loc="lower left",
            bbox_to_anchor=(1.7 / figure.get_figwidth(), 0.0),
            ncols=2,
            frameon=False,
            fontsize=9,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, facecolor="white")
        pyplot.close(figure)


def _draw_panel(panel, rows: Mapping[str, Mapping[str, object]], names: list[str], width: float) -> None:
    thickness = 0.34
    for index, name in enumerate(names):
        if name not in rows:
            panel.text(0.02, index, "not measured in this run", va="center", fontsize=9, color=_QUIET, style="italic")
            continue
        times = rows[name]["implementations"]
        ratio = speedup(rows[name])
        reference, ours = (times[key]["median_ms"] for key in ("reference", "ours"))
        panel.barh(index - thickness / 2, 1.0, thickness, color=_REFERENCE)
        panel.barh(index + thickness / 2, 1 / ratio, thickness, color=_OURS)
        panel.text(0.98, index - thickness / 2, f"{milliseconds(reference)} ms", va="center", ha="right", fontsize=9)
        label, inside = f"{milliseconds(ours)} ms", 1 / ratio > 0.22
        if inside:
            panel.text(
                1 / ratio - 0.02, index + thickness / 2, label, va="center", ha="right", fontsize=9, color="white"
            )
        faster, color = (f"{ratio:.2f}x faster", _OURS) if ratio >= 1 else (f"{ratio:.2f}x, slower", _LOSS)
        rest = faster if inside else f"{faster}  ({label})"
        panel.text(
            1 / ratio + 0.02, index + thickness / 2, rest, va="center", fontsize=10, fontweight="bold", color=color
        )
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.45, -0.55)
    panel.set_xlim(0, width)
    panel.set_xticks([])
    panel.tick_params(axis="y", length=0, labelcolor=_INK)
    for side in ("top", "right", "bottom"):
        panel.spines[side].set_visible(False)
    panel.spines["left"].set_color(_REFERENCE)


def _name(row: Mapping[str, object], with_dtype: bool) -> str:
    model, _, size = row["label"].partition(", ")
    second = f"{size} px, batch {row['batch']}"
    return f"{model}\n{second}" + (f"\n{row['dtype']}" if with_dtype else "")


# ---- the command ----------------------------------------------------------------------------------------------------


def _kind(document: Mapping[str, object]) -> str:
    return "gpu" if "gpu" in document else document.get("kind", "models")


def _publish(document: Mapping[str, object], readme: Path, picture: Path) -> list[Path]:
    """The README's table and the pictures of one document; returns the pictures."""
    kind = _kind(document)
    if kind == "gpu":
        write_readme(readme, gpu_markdown(document, headline=True), GPU_BEGIN, GPU_END)
        return []
    if kind == "models":
        draw(document, picture)
        write_readme(readme, markdown(document))
        return [picture]
    drawn = []
    for name, function in plots.PICTURES.items():
        drawn.append(picture.with_name(name))
        function(document, drawn[-1], machine(document))
    write_readme(readme, f"{machine(document)}:\n\n{report_ops.markdown(document)}", OPERATORS_BEGIN, OPERATORS_END)
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 where a file could not be read, drawn or written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__.partition(": ")[2])
    parser.add_argument(
        "results",
        type=Path,
        nargs="*",
        help="JSON files of python -m benchmarks, of its ops and of benchmarks.gpu (the newest of each kind in "
        "benchmarks/results, and the page)",
    )
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="file with the markers (README.md)")
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("docs/speedup.png"),
        help="PNG of the models; those of the operators lie beside it (docs/speedup.png)",
    )
    parser.add_argument("--page", type=Path, help="one HTML page with everything (without files: docs/benchmarks.html)")
    options = parser.parse_args(arguments)
    try:
        documents = [json.loads(path.read_text()) for path in options.results]
        if not options.results:
            found = (json.loads(path.read_text()) for path in Path("benchmarks/results").glob("*.json"))
            # the static table of the CUDA kernels lies there too, and has its own page
            found = (each for each in found if isinstance(each, dict))
            newest = {_kind(each): each for each in sorted(found, key=lambda each: each["environment"]["date"])}
            documents = [newest[kind] for kind in ("models", "operators", "gpu") if kind in newest]
            options.page = options.page or Path("docs/benchmarks.html")
        pictures = {i: _publish(each, options.readme, options.picture) for i, each in enumerate(documents)}
        if options.page is not None:
            from benchmarks import page

            page.write(options.page, documents, pictures)
    except (MissingPackage, OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        print(f"benchmarks.report: not a file of benchmarks, or one without rows: {error!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

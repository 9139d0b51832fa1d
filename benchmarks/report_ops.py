# SPDX-License-Identifier: MIT
"""Tables of the operator suite, from its JSON: a row for each case, a column for each implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.optional import require

Row = Mapping[str, object]
ABSENT, INEXACT = "-", "*"
_COMPILE, _CUDNN = "compile", "cudnn"


def title(row: Row) -> str:
    """A case in words, without what the table says in other columns."""
    if "model" in row:
        return f"{row['op']} {row['model']}, batch {row['batch']}"
    kernel = f" k{row['kernel']}" if row["op"].startswith(("depthwise", "layer")) else ""
    size = "x".join(map(str, row["shape"]))
    out = f" to {row['channels_out']}" if row["channels_out"] != row["shape"][1] else ""
    return f"{row['op']}{kernel} {size}{out}"


def milliseconds(value: float) -> str:
    """Three digits: 0.0123, 0.123, 1.23, 12.3, 123, 1234."""
    digits = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def ours(row: Row) -> str | None:
    """The fastest of our backends in a row."""
    names = [name for name in row["implementations"] if name.startswith("ours ")]
    return min(names, key=lambda name: row["implementations"][name]["median_ms"], default=None)


def best_peer(row: Row) -> str | None:
    """The fastest implementation that is neither ours nor the bound."""
    found = row["implementations"]
    names = [name for name in found if not name.startswith("ours ") and name != "clone"]
    return min(names, key=lambda name: found[name]["median_ms"], default=None)


def speedup(row: Row, name: str) -> float | None:
    """How many times faster ours is than `name`; None where one of them is missing."""
    mine, found = ours(row), row["implementations"]
    return None if mine is None or name not in found else found[name]["median_ms"] / found[mine]["median_ms"]


def columns(rows: Sequence[Row]) -> list[str]:
    """The implementations that any row has or misses, in the order in which they were run."""
    found: dict[str, None] = {}
    for row in rows:
        for name in (*row["implementations"], *row["absent"]):
            found.setdefault(name)
    order = ("ours", "eager", _COMPILE, _CUDNN, "onnxruntime", "openvino", "clone")
    return sorted(found, key=lambda name: next((i for i, start in enumerate(order) if name.startswith(start)), 99))


def cells(row: Row, names: Sequence[str]) -> list[str]:
    """A row of the table: the case, its times, its memory, ours against the floor and against the best peer."""
    found, mine, peer = row["implementations"], ours(row), best_peer(row)
    times = []
    for name in names:
        each = found.get(name)
        mark = INEXACT if each and each.get("passed") is False else ""
        times.append(milliseconds(each["median_ms"]) + mark if each else "WRONG" if _is_wrong(row, name) else ABSENT)
    floor = f"{found[mine]['percent_of_floor']:.0f} %" if mine else ABSENT
    ratio = f"{speedup(row, peer):.2f}x" if mine and peer else ABSENT
    return [title(row), row["dtype"], row["layout"], *times, _memory(row), floor, ratio]


def _memory(row: Row) -> str:
    """Peak of torch's allocator in MiB, ours and eager PyTorch's in the same layout."""
    found = row["implementations"]
    both = (ours(row), "eager channels_last" if row["layout"] == "channels_last" else "eager NCHW")
    sizes = [found[name].get("peak_bytes") if name in found else None for name in both]
    return " / ".join(ABSENT if size is None else _mebibytes(size) for size in sizes)


def _mebibytes(size: int) -> str:
    value = size / 2**20
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else f"{value:.2f}"


def _is_wrong(row: Row, name: str) -> bool:
    return any(tensor["implementation"].startswith(name) for tensor in row["wrong"])


def headings(names: Sequence[str]) -> list[str]:
    return ["case", "dtype", "layout", *names, "MiB ours / eager", "of the floor", "best peer / ours"]


def notes(document: Mapping[str, object], rows: Sequence[Row]) -> list[str]:
    """What the columns mean and why some figures are missing."""
    session = document["sessions"][-1]
    peaks = session["peaks"]
    gemm = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in peaks["gemm"].items())
    lines = [
        "Milliseconds: medians, interleaved call by call, each checked against float64 before. layout is ours'; peers have their own. "
        "of the floor: the time that the bytes or the arithmetic need at this run's peaks, over ours. best peer / ours: above 1 ours "
        "is faster.",
        f"Peaks: copy {peaks['copy'] / 1e9:.1f} GB/s, multiply-add {peaks['fma'] / 1e9:.0f} GFLOP/s, matrix product "
        f"{gemm} GFLOP/s.",
    ]
    if not rows:
        return lines
    lines.append(
        "MiB: the most that torch's allocator held beyond the inputs; what native code takes itself is not in it."
    )
    if any(each.get("passed") is False for row in rows for each in row["implementations"].values()):
        lines.append(f"{INEXACT}: an error of more than twice that of eager PyTorch in the same layout.")
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, reason in row["absent"].items():
            reasons.setdefault(f"{name}: {reason}")
    lines += [f"{ABSENT} {each}." for each in reasons]
    return lines


#: The README's columns; one that several implementations share shows the fastest of them.
_README = {
    "ours": "ours ",
    "eager NCHW": "eager NCHW",
    "eager channels_last": "eager channels_last",
    "torch.compile": "compile",
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
}


def markdown(document: Mapping[str, object]) -> str:
    """The README's table: every operator at ConvMixer-256/8's plane, and the block in inference everywhere."""
    rows = [
        row
        for row in document["results"]
        if row["op"] == "depthwise_eval" or row["family"] in ("ConvMixer", "ConvMixer-256/8") or not row["passed"]
    ]
    headings = ["milliseconds", "dtype", "layout", *_README, "of the floor", "best peer / ours"]
    rule = [":--"] * 3 + ["--:"] * (len(headings) - 3)
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, rule)]
    for row in rows:
        found = row["implementations"]
        times = []
        for start in _README.values():
            some = [each["median_ms"] for name, each in found.items() if name.startswith(start)]
            times.append(milliseconds(min(some)) if some else "WRONG" if _is_wrong(row, start) else ABSENT)
        start, end = cells(row, ())[:3], cells(row, ())[4:]
        lines.append("| " + " | ".join([*start, *times, *end]) + " |")
    explained = notes(document, [])
    explained.append(f"{ABSENT}: it cannot run this, or was not asked to compile it; docs/benchmarks.html says which.")
    return "\n".join([*lines, "", *(f"{line}  " for line in explained[:-1]), explained[-1]])


def show(document: Mapping[str, object]) -> None:
    """The table on the terminal."""
    rows = document["results"]
    console = require("rich.console").Console()
    if not console.is_terminal:
        console.width = 220
    names = columns(rows)
    table = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD)
    for index, heading in enumerate(headings(names)):
        table.add_column(heading, justify="left" if index < 3 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*cells(row, names), style=None if row["passed"] else "bold red")
    console.print(table)
    for line in notes(document, rows):
        console.print(line, style="dim", highlight=False)

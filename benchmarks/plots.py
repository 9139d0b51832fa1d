# SPDX-License-Identifier: MIT
"""Pictures from the JSON files: speed-ups, the cost over the kernel size, and the roofline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import tables
from benchmarks.tables import Row

_INK, _QUIET, _OURS, _LOSS = "#1f2933", "#616e7c", "#0b7a75", "#b44d12"
_NOTE = {"textcoords": "offset points", "fontsize": 8}
_PEERS = {
    "eager NCHW": ("#8a949e", "o"),
    "eager channels_last": ("#c28f2c", "s"),
    "onnxruntime": ("#3b6fb6", "^"),
    "openvino": ("#8557a8", "D"),
}
_SWEEP = {
    "depthwise_eval": "Block, inference",
    "depthwise_input_grad": "Input gradient",
    "depthwise_weight_grad": "Weight gradient",
}


@contextlib.contextmanager
def _figure(path: Path, columns: int, size: tuple[float, float], **more: object) -> Iterator[tuple[object, Sequence]]:
    """A figure with its panels, written to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    quiet = dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), _QUIET)
    spines = {"axes.edgecolor": "#c9ced6", "axes.spines.top": False, "axes.spines.right": False}
    font = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": _INK}
    with matplotlib.rc_context({**quiet, **spines, **font}):
        figure, panels = pyplot.subplots(1, columns, figsize=size, squeeze=False, **more)
        yield figure, panels[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, facecolor="white")
        pyplot.close(figure)


def _head(figure, title: str, second: str) -> None:
    """Title and second line at the upper left, in inches from the edges."""
    width, height = figure.get_size_inches()
    figure.text(0.15 / width, 1 - 0.32 / height, title, fontsize=14, fontweight="bold")
    figure.text(0.15 / width, 1 - 0.56 / height, second, fontsize=9, color=_QUIET)


def _plain_logarithm(axis, base: float = 10) -> None:
    """Numbers instead of powers of ten on a logarithmic axis."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(base, subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_minor_locator(ticker.NullLocator())


def roofline(document: Mapping[str, object], path: Path, machine: str) -> None:
    """Every float32 operator with FLOPs: what ours and the best peer reach, below the copy, FMA and matrix product lines."""
    rows = [row for row in document["results"] if row.get("flops") and row["dtype"] == "float32" and tables.ours(row)]
    if not rows:
        raise ValueError("the results hold no operator in float32 with a convolution that was timed")
    peaks = document["sessions"][-1]["peaks"]
    with _figure(path, 1, (8.6, 5.4)) as (figure, (panel,)):
        intensities = [row["flops"] / row["bytes"] for row in rows]
        low, high = min(intensities) / 1.6, max(intensities) * 1.6
        for label, peak in (("multiply-add peak", peaks["fma"]), ("matrix product peak", peaks["gemm"]["float32"])):
            knee = peak / peaks["copy"]
            panel.plot([knee, high], [peak / 1e9] * 2, color=_INK, linewidth=1.2)
            panel.annotate(f"{label} {peak / 1e9:.0f} GFLOP/s", (knee, peak / 1e9), (26, 4), color=_QUIET, **_NOTE)
        knee = peaks["fma"] / peaks["copy"]
        panel.plot([low, knee], [low * peaks["copy"] / 1e9, peaks["fma"] / 1e9], color=_INK, linewidth=1.2)
        copy, middle = f"copy {peaks['copy'] / 1e9:.1f} GB/s", (knee / 5, peaks["fma"] / 5e9)
        panel.annotate(copy, middle, (-6, 4), ha="right", color=_QUIET, **_NOTE)
        for row in rows:
            found, x = row["implementations"], row["flops"] / row["bytes"]
            mine, peer = tables.ours(row), tables.best_peer(row)
            y = row["flops"] / found[mine]["median_ms"] / 1e6
            if peer is not None:
                theirs = row["flops"] / found[peer]["median_ms"] / 1e6
                panel.plot([x, x], [theirs, y], color="#d7dce2", linewidth=1, zorder=1)
                panel.scatter(x, theirs, s=20, facecolor="white", edgecolor=_QUIET, linewidth=1, zorder=2)
            panel.scatter(x, y, s=26, color=_OURS, marker=_shape_of(row), zorder=3)
        panel.set_xscale("log")
        panel.set_yscale("log")
        for axis in (panel.xaxis, panel.yaxis):
            _plain_logarithm(axis)
        panel.set_xlim(low, high)
        panel.set_xlabel("FLOP per byte that the operator must move")
        panel.set_ylabel("GFLOP/s")
        for label, marker, color, face in (
            ("ours, depthwise", "o", _OURS, _OURS),
            ("ours, pointwise", "s", _OURS, _OURS),
            ("ours, layer or model", "D", _OURS, _OURS),
            ("best peer of the same case", "o", _QUIET, "white"),
        ):
            panel.scatter([], [], s=26, marker=marker, facecolor=face, edgecolor=color, label=label)
        # above the slope there is nothing
        panel.legend(frameon=False, fontsize=8, loc="upper left")
        _head(figure, "Operators below the machine's roof (float32)", machine)
        figure.subplots_adjust(left=0.09, right=0.97, top=0.87, bottom=0.11)


def _shape_of(row: Row) -> str:
    return "o" if row["op"].startswith("depthwise") else "s" if row["op"].startswith("pointwise") else "D"


def speedups(document: Mapping[str, object], path: Path, machine: str) -> None:
    """A bar for each operator or model: how many times faster ours is than the best peer, and a mark for each peer."""
    rows = [row for row in document["results"] if tables.ours(row) and tables.best_peer(row)]
    if not rows:
        raise ValueError("the results hold no case that ours and a peer were timed on")
    order = list(dict.fromkeys(row["op"] for row in rows))
    rows = sorted(rows, key=lambda row: order.index(row["op"]))
    height = 1.5 + 0.235 * len(rows)
    with _figure(path, 1, (9.6, height)) as (figure, (panel,)):
        for index, row in enumerate(rows):
            ratio = tables.speedup(row, tables.best_peer(row))
            color = _OURS if ratio >= 1 else _LOSS
            panel.barh(index, ratio - 1, 0.62, left=1, color=color)
            right = {"ha": "right", "va": "center", "fontweight": "bold"}
            panel.annotate(f"{ratio:.2f}x", (min(1, ratio), index), (-6, 0), color=color, **right, **_NOTE)
            for name, (color, marker) in _PEERS.items():
                if (other := tables.speedup(row, name)) is not None:
                    panel.scatter(other, index, s=17, color=color, marker=marker, zorder=3, linewidth=0)
        ratios = [tables.speedup(row, tables.best_peer(row)) for row in rows]
        panel.set_xlim(left=min(0.65, 0.65 * min(ratios)))
        panel.axvline(1, color=_INK, linewidth=1)
        panel.set_xscale("log")
        _plain_logarithm(panel.xaxis)
        panel.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
        panel.set_ylim(len(rows) - 0.4, -0.7)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", color="#eceff2", zorder=0)
        panel.set_axisbelow(True)
        panel.set_xlabel("times faster than the peer (bar and figure: than the best peer; log scale)")
        for name, (color, marker) in _PEERS.items():
            if any(name in row["implementations"] for row in rows):
                panel.scatter([], [], s=17, color=color, marker=marker, linewidth=0, label=f"than {name}")
        place = {"loc": "upper left", "bbox_to_anchor": (0.01, 1 - 0.62 / height)}
        figure.legend(frameon=False, fontsize=8, ncols=4, handletextpad=0.2, **place)
        _head(figure, "Speed-up, case by case", machine)
        figure.subplots_adjust(left=0.355, right=0.98, top=1 - 0.98 / height, bottom=0.5 / height)


def _label(row: Row) -> str:
    extra = "" if row["dtype"] == "float32" else f" {row['dtype']}"
    return tables.title(row) + extra + ("" if row["layout"] == "contiguous" else " channels_last")


def kernel_sizes(document: Mapping[str, object], path: Path, machine: str) -> None:
    """The sweep: milliseconds over k, a line for each implementation and the floor, a panel for each direction."""
    sweep = [row for row in document["results"] if row["family"] == "sweep" and row["layout"] == "contiguous"]
    shapes = {tuple(row["shape"]) for row in sweep if row["op"] in _SWEEP}
    if len(shapes) != 1 or any(not any(row["op"] == op for row in sweep) for op in _SWEEP):
        raise ValueError("the results hold no sweep over the kernel size")
    with _figure(path, len(_SWEEP), (12.6, 4.9), sharey=True) as (figure, panels):
        for panel, (op, title) in zip(panels, _SWEEP.items(), strict=True):
            rows = sorted((row for row in sweep if row["op"] == op), key=lambda row: row["kernel"])
            _line(panel, rows, tables.ours, _OURS, "o", "ours", linewidth=2.4, zorder=4)
            for name, (color, marker) in _PEERS.items():
                _line(panel, rows, lambda row, n=name: n if n in row["implementations"] else None, color, marker, name)
            kernels = [row["kernel"] for row in rows]
            floors = [row["floor_ms"] for row in rows]
            panel.plot(kernels, floors, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="floor")
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xticks(kernels, [str(kernel) for kernel in kernels])
            panel.minorticks_off()
            panel.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
            panel.set_xlabel("kernel size k")
            panel.grid(color="#eceff2")
        _plain_logarithm(panels[0].yaxis)
        panels[0].set_ylabel("milliseconds")
        size = "x".join(map(str, next(iter(shapes))))
        _head(figure, f"Cost over the kernel size, depthwise {size}, float32", machine)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, ncols=len(labels), fontsize=9, loc="lower left")
        figure.subplots_adjust(left=0.055, right=0.985, top=0.81, bottom=0.2, wspace=0.06)


def _line(panel, rows: Sequence[Row], choose, color: str, marker: str, label: str, **more: object) -> None:
    points = [(row["kernel"], row["implementations"][name]) for row in rows if (name := choose(row)) is not None]
    if not points:
        return
    kernels = [kernel for kernel, _ in points]
    median, low, high = ([each[key] for _, each in points] for key in ("median_ms", "q20_ms", "q80_ms"))
    style = {"linewidth": 1.5, "zorder": 3, "markersize": 4.5, **more}
    panel.plot(kernels, median, color=color, marker=marker, label=label, **style)
    panel.fill_between(kernels, low, high, color=color, alpha=0.15)


#: The files in docs/ that are drawn from a document, by its kind.
PICTURES = {
    "models": {"speedup.png": speedups},
    "operators": {"operators.png": speedups, "kernel-size.png": kernel_sizes, "roofline.png": roofline},
    "networks": {},
    "training": {},
    "gpu": {},
}

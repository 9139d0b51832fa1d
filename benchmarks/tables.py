# SPDX-License-Identifier: MIT
"""Tables from the JSON files, for the terminal, README.md and docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks import ops, peers, roofline

Row = Mapping[str, object]
Document = Mapping[str, object]
#: A heading and the cell below it.
Column = tuple[str, Callable[[Row], str]]
Table = tuple[list[str], list[list[str]]]

ABSENT, INEXACT, SUM, WRONG = "-", "*", "+", "WRONG"
#: In the order in which the package chooses among them.
_OURS = ("ours cpu", "ours cuda", "ours triton", "ours reference")


def milliseconds(value: float) -> str:
    """Three digits: 0.0123, 0.123, 1.23, 12.3, 123, 1234."""
    digits = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def machine(document: Document) -> str:
    """The machine in one line."""
    found = document["environment"]
    device = found["device"]
    if found["device_type"] == "cpu":
        threads = found["threads"]
        device = f"{found['cpu']} ({found['instruction_set']}), {threads} thread{'s' if threads != 1 else ''}"
    return f"{device}, torch {found['torch']}, {found['date'][:10]}"


def title(row: Row) -> str:
    """A case in words, without what the table says in other columns."""
    if "model" in row:
        return f"{row['op']} {row['model']}, batch {row['batch']}"
    kernel = f" k{row['kernel']}" if row["op"].startswith(("depthwise", "layer")) else ""
    size = "x".join(map(str, row["shape"]))
    out = f" to {row['channels_out']}" if row["channels_out"] != row["shape"][1] else ""
    return f"{row['op']}{kernel} {size}{out}"


def explain(row: Row, wrong: Mapping[str, object]) -> str:
    """A wrong result in one line."""
    start = f"{row['case']}: {wrong['implementation']}"
    if "failure" in wrong:
        return f"{start}: {wrong['failure']}"
    errors = f"{wrong['error']:.2e} (allowed {wrong['allowed']:.2e}, eager's {wrong['eager_error']:.2e})"
    return f"{start}: {wrong['tensor']}: relative error {errors}"


def median(row: Row, name: str | None) -> float | None:
    """Milliseconds of an implementation, None if it was not timed."""
    return row["implementations"].get(name, {}).get("median_ms")


def ours(row: Row) -> str | None:
    """Our backend in a row: the first that was timed, in the order in which the package chooses."""
    return next((name for name in _OURS if median(row, name) is not None), None)


def best_peer(row: Row, start: str = "") -> str | None:
    """The fastest implementation that is neither ours nor a bound, of those whose name begins with `start`."""
    found = row["implementations"]
    names = [
        name for name in found if name.startswith(start) and not name.startswith("ours ") and name not in peers.BOUNDS
    ]
    return min((name for name in names if "median_ms" in found[name]), key=lambda name: median(row, name), default=None)


def speedup(row: Row, name: str | None) -> float | None:
    """How many times faster ours is than `name`; None if one of them is missing."""
    mine, theirs = median(row, ours(row)), median(row, name)
    return None if mine is None or theirs is None else theirs / mine


def _times(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}x"


def is_wrong(row: Row, name: str) -> bool:
    return any(each["implementation"] == name for each in row["wrong"])


def _cell(row: Row, name: str | None) -> str:
    """The time of an implementation."""
    if name is None or median(row, name) is None:
        return WRONG if name is not None and is_wrong(row, name) else ABSENT
    found = row["implementations"][name]
    marks = INEXACT * (found.get("passed") is False) + SUM * ("sum_of" in found)
    return milliseconds(median(row, name)) + marks


def _sums(rows: Sequence[Row]) -> list[str]:
    """Which rows of a run were added up, because a row of that run held less than it does now."""
    found = (each["sum_of"] for row in rows for each in row["implementations"].values() if "sum_of" in each)
    return [f"{SUM}: {each}, two rows of the same run added." for each in dict.fromkeys(map(" and ".join, found))]


def _ours_cell(row: Row) -> str:
    name = ours(row) or next((name for name in _OURS if is_wrong(row, name)), None)
    return _cell(row, name)


def _floor(row: Row) -> str:
    percent = row["implementations"].get(ours(row), {}).get("percent_of_floor")
    return ABSENT if percent is None else f"{percent:.0f} %"


def _other_products(row: Row) -> str:
    """Ours with each choice of CONVMIXER_CUDA_GEMM."""
    found = {**row["implementations"], **{each["implementation"]: {} for each in row["wrong"]}}
    forced = {name: _cell(row, name) for name in found if name.startswith("ours cuda ")}
    return ", ".join(f"{name.removeprefix('ours cuda ')} {cell}" for name, cell in forced.items()) or ABSENT


def _called(row: Row) -> str:
    """A model that is called from Python, not as a CUDA graph: ours, and how many times faster than eager PyTorch."""
    pair = [row["implementations"].get(name, {}).get("called_ms") for name in (ours(row), _same_layout(row))]
    return f"{milliseconds(pair[0])}, {_times(pair[1] / pair[0])}" if "model" in row and all(pair) else ABSENT


def _same_layout(row: Row) -> str:
    return peers.EAGER[row["layout"]]


_START: list[Column] = [
    ("milliseconds", title),
    ("dtype", lambda row: row["dtype"]),
    ("layout", lambda row: row["layout"]),
    ("ours", _ours_cell),
]
_END: list[Column] = [
    ("of the floor", _floor),
    ("best peer / ours", lambda row: _times(speedup(row, best_peer(row)))),
]
#: By device type. GPUs have eager PyTorch in the layout of the case only.
_PEERS: dict[str, list[Column]] = {
    "cpu": [
        ("eager NCHW", lambda row: _cell(row, "eager NCHW")),
        ("eager channels_last", lambda row: _cell(row, "eager channels_last")),
        ("torch.compile", lambda row: _cell(row, best_peer(row, "compile"))),
        ("ONNX Runtime", lambda row: _cell(row, "onnxruntime")),
        ("OpenVINO", lambda row: _cell(row, "openvino")),
    ],
    "cuda": [
        ("Triton", lambda row: ABSENT if ours(row) == "ours triton" else _cell(row, "ours triton")),
        ("eager, same layout", lambda row: _cell(row, _same_layout(row))),
        ("torch.compile", lambda row: _cell(row, best_peer(row, "compile"))),
        ("other products", _other_products),
        ("product alone", lambda row: _cell(row, peers.MATMUL)),
        ("called, not as a graph", _called),
    ],
}


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    return [heading for heading, _ in columns], [[cell(row) for _, cell in columns] for row in rows]


def operators(rows: Sequence[Row], device_type: str) -> Table:
    """A row for each case, less the columns without any figure."""
    shown = [column for column in _PEERS[device_type] if any(column[1](row) != ABSENT for row in rows)]
    return _table(rows, [*_START, *shown, *_END])


def operator_notes(document: Document, reasons: bool = True) -> list[str]:
    """The meaning of the columns and, with `reasons`, why some figures are missing."""
    rows, on_gpu = document["results"], document["environment"]["device_type"] == "cuda"
    how = "each as a CUDA graph" if on_gpu else "interleaved call by call"
    lines = [
        f"Milliseconds: medians, {how}, each checked against float64 before. layout is that of ours; peers have their own. of the "
        "floor: the time that the bytes or the arithmetic need at this run's peaks, over ours. best peer / ours: above 1 ours is faster."
    ]
    if document["sessions"]:
        peaks = document["sessions"][-1]["peaks"]
        unit, name = (1e12, "T") if on_gpu else (1e9, "G")
        gemm = ", ".join(f"{dtype} {value / unit:.0f}" for dtype, value in peaks["gemm"].items())
        lines.append(
            f"Peaks: copy {peaks['copy'] / 1e9:.1f} GB/s, multiply-add {peaks['fma'] / unit:.0f} {name}FLOP/s, "
            f"matrix product {gemm} {name}FLOP/s."
        )
    lines += _sums(rows)
    if any(each.get("passed") is False for row in rows for each in row["implementations"].values()):
        lines.append(f"{INEXACT}: an error of more than twice that of eager PyTorch in the same layout.")
    lines += [f"{WRONG}: {explain(row, each)}." for row in rows for each in row["wrong"]]
    lines += document.get("notes", ())
    if reasons:
        found = {f"{name}: {reason}": None for row in rows for name, reason in row["absent"].items()}
        lines += [f"{ABSENT} {each}." for each in found]
    else:
        lines.append(f"{ABSENT}: it cannot run this, was not asked to, or has no call with the same contents.")
    if "tests" in document:
        lines.append(f"Tests on this GPU: {document['tests']['summary']}.")
    return lines


def _error(kind: str) -> Callable[[Row], str]:
    """Of the tensor of ours that is nearest to its limit, or wrong."""

    def cell(row: Row) -> str:
        found = (*row["wrong"], *(row["implementations"][each] for each in _OURS if each in row["implementations"]))
        return f"{found[0][kind]:.1e}" if found and kind in found[0] else ABSENT

    return cell


_MODEL_COLUMNS: list[Column] = [
    ("model", lambda row: f"{row['label']}, batch {row['batch']}"),
    ("mode", lambda row: {"model_eval": "eval", "model_step": "train"}[row["op"]]),
    ("dtype", lambda row: row["dtype"]),
    ("error ours", _error("error")),
    ("error eager", _error("eager_error")),
    ("eager ms", lambda row: _cell(row, _same_layout(row))),
    ("ours ms", _ours_cell),
    ("speed-up", lambda row: WRONG if row["wrong"] else _times(speedup(row, _same_layout(row)))),
]


def models(document: Document) -> Table:
    """Of python -m benchmarks: a training step that was left out is a row of dashes."""
    rows = []
    trained = {(row["model"], row["dtype"]) for row in document["results"] if row["op"] == "model_step"}
    for row in document["results"]:
        rows.append(row)
        if (row["model"], row["dtype"]) not in trained:
            rows.append({**row, "op": "model_step", "implementations": {}, "wrong": []})
    return _table(rows, _MODEL_COLUMNS)


def model_notes(document: Document) -> list[str]:
    """The meaning of the columns, and which rows were left out."""
    rows = document["results"]
    repeats = {each["repeats"] for row in rows for each in row["implementations"].values() if "repeats" in each}
    number = f"{min(repeats)} " if len(repeats) == 1 else ""
    layouts = sorted({row["layout"] for row in rows})
    lines = [
        "error: relative L2 against float64, of the tensor nearest to its limit (2 x eager's + one rounding step): the output and, in "
        "train, the gradients of the images and of all parameters and the running statistics.",
        f"eager: the same weights in eager PyTorch, {' and '.join(layouts)}. train: forward + backward. "
        f"Times are medians of {number}calls, interleaved with the other's, in a process that does nothing else.",
    ]
    trained = {row["model"] for row in rows if row["op"] == "model_step"}
    left_out = [row for row in rows if row["model"] not in trained]
    if any(row["batch"] > 1 for row in left_out) or (document["quick"] and left_out):
        lines.append("-: not run with --quick; run without it for the training step of the large models.")
    elif left_out:
        lines.append("-: a training step needs two images at least: batch norm and pooling leave no gradient of one.")
    return lines


def training(document: Document) -> Table:
    """Of python -m benchmarks training: a row for each implementation."""

    def mebibytes(row: Row, key: str) -> str:
        return f"{row[key] / 2**20:.0f}" if key in row else ABSENT

    columns: list[Column] = [
        ("model", lambda row: f"{row['label']}, batch {row['batch']}"),
        ("dtype", lambda row: row["dtype"]),
        ("implementation", lambda row: row["name"].replace("compile", "torch.compile")),
        ("saved, MiB", lambda row: mebibytes(row, "saved_bytes")),
        ("peak, MiB", lambda row: mebibytes(row, "peak_bytes")),
        ("images/s", lambda row: milliseconds(row["images_per_second"]) if "images_per_second" in row else ABSENT),
        ("speed-up of ours", lambda row: _times(speedup(row, row["name"]))),
    ]
    rows = document["results"]
    names = [{**row, "name": name} for row in rows for name in (*row["implementations"], *row["absent"])]
    return _table([{**row, **row["implementations"].get(row["name"], {})} for row in names], columns)


def training_notes(document: Document) -> list[str]:
    """The meaning of the columns, and why some figures are missing."""
    on_gpu = document["environment"]["device_type"] == "cuda"
    peak = "memory that torch has allocated" if on_gpu else "resident memory"
    lines = [
        "saved: what a forward keeps for its backward, without the model's own parameters and statistics. peak: by how much a warm step "
        f"raises the {peak}, its gradients included. A step is a forward and a backward, without an optimizer.",
        f"images/s: by the median of {document['options']['repeats']} steps. Each implementation has a process of its own, and they step "
        "in turn. torch.compile compiles the contiguous model.",
    ]
    absent = [(row["label"], *each) for row in document["results"] for each in row["absent"].items()]
    return lines + [f"{ABSENT}: {label}, {name}: {reason}." for label, name, reason in absent]


#: The rows of README.md's tables, in words: the first eight of these that were timed.
_SMALL = {
    "cpu": {
        "model_eval 256/8@32 batch 32 float32 contiguous": "ConvMixer-256/8, 32x32, batch 32, inference",
        "model_step 256/8@32 batch 32 float32 contiguous": "ConvMixer-256/8, 32x32, batch 32, training step",
        "model_step 1536/20@224 batch 2 float32 contiguous": "ConvMixer-1536/20, 224x224, batch 2, training step",
        "depthwise_eval k9 1x768x32x32 float32 contiguous": "Depthwise block, inference",
        "depthwise_train k9 32x256x16x16 float32 contiguous": "Depthwise block, training forward",
        "depthwise_input_grad k9 1x768x32x32 float32 contiguous": "Depthwise block, input gradient",
        "depthwise_weight_grad k9 1x768x32x32 float32 contiguous": "Depthwise block, weight gradient",
        "pointwise_eval 32x256x16x16 float32 contiguous": "Pointwise block, inference",
    },
    "cuda": {
        "model_eval 1536/20@224 batch 32 bfloat16 contiguous": "ConvMixer-1536/20, 224x224, batch 32, inference",
        "model_step 1536/20@224 batch 32 bfloat16 contiguous": "ConvMixer-1536/20, 224x224, batch 32, training step",
        "model_step 256/8@32 batch 256 bfloat16 contiguous": "ConvMixer-256/8, 32x32, batch 256, training step",
        "depthwise_eval k9 64x1536x32x32 bfloat16 contiguous": "Depthwise block, inference",
        "depthwise_train k9 64x1536x32x32 bfloat16 contiguous": "Depthwise block, training forward",
        "depthwise_input_grad k9 64x1536x32x32 bfloat16 contiguous": "Depthwise block, input gradient",
        "depthwise_weight_grad k9 64x1536x32x32 bfloat16 contiguous": "Depthwise block, weight gradient",
        "pointwise_eval 64x1536x32x32 bfloat16 contiguous": "Pointwise block, inference",
        "model_step 768/32@224 batch 32 bfloat16 contiguous": "ConvMixer-768/32, 224x224, batch 32, training step",
    },
}


def small(documents: Sequence[Document], device_type: str) -> str:
    """A table of README.md as Markdown, from the documents of that device; of a row that two have, the first one's."""
    found = {row["case"]: row for document in reversed(documents) for row in document["results"]}
    chosen = [found[case] for case in _SMALL[device_type] if case in found]
    chosen = [row for row in chosen if ours(row) and best_peer(row, "eager")][:8]
    if not chosen:
        raise ValueError(f"none of the rows of the {device_type} table was timed")

    def name(row: Row) -> str:
        kernel = f", k = {row['kernel']}" if row["op"].startswith("depthwise") else ""
        size = f", {'x'.join(map(str, row['shape']))}" if "shape" in row else ""
        return _SMALL[device_type][row["case"]] + kernel + size

    columns: list[Column] = [
        (f"{chosen[0]['dtype']}, milliseconds", name),
        ("eager PyTorch", lambda row: _cell(row, best_peer(row, "eager"))),
        ("ours", _ours_cell),
        ("speed-up", lambda row: f"{speedup(row, best_peer(row, 'eager')):.1f}x"),
        ("of the floor", _floor),
    ]
    places = dict.fromkeys(machine(document) for document in documents)
    note = "Medians; eager PyTorch in the faster of the layouts that were measured."
    notes = [" ".join([note, *_sums(chosen)])]
    return "\n".join([f"{'; '.join(places)}:", "", *markdown_lines(_table(chosen, columns), 1), "", *notes])


def contents() -> Table:
    """What every row contains, from ops.py."""
    rows = []
    for name, operator in ops.OPERATORS.items():
        channels = zip(operator.passes, ("C", "C_out"), strict=True)
        size = " + ".join(f"{count} {of}" for count, of in channels if count)
        flops = f"{operator.convolutions} x" if operator.convolutions else ABSENT
        rows.append([f"`{name}`", operator.contains, size, flops])
    for (name, sentence), passes, times in zip(ops.MODELS.items(), roofline.MODEL_PASSES, (1, 3), strict=True):
        rows.append([f"`{name}`", sentence, f"{passes} C a layer", f"{times} x"])
    return ["row", "what it contains", "bytes: values read or written for each n, h, w", "FLOPs: convolutions"], rows


def text(document: Document, table: Table, notes: Sequence[str]) -> str:
    """For a terminal or a file: the first three columns stand left, the others right."""
    headings, rows = table
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [
        "  ".join(
            f"{cell:{'<' if i < 3 else '>'}{width}}" for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in (headings, ["-" * width for width in widths], *rows)
    ]
    return "\n".join([f"{machine(document)}:", "", *lines, "", *notes])


def markdown_lines(table: Table, words: int) -> list[str]:
    """A Markdown table; the first `words` columns stand left, the others right."""
    headings, rows = table
    rule = [":--"] * words + ["--:"] * (len(headings) - words)
    return ["| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows)]


def markdown(document: Document) -> str:
    """Machine, table and notes of a document for docs/performance.md."""
    if document.get("kind") == "models":
        table, notes = models(document), model_notes(document)
    elif document.get("kind") == "training":
        table, notes = training(document), training_notes(document)
    else:
        table = operators(document["results"], document["environment"]["device_type"])
        notes = operator_notes(document, reasons=False)
    # two spaces at its end keep a line from running into the next
    lines = [*(f"{line}  " for line in notes[:-1]), notes[-1]]
    return "\n".join([machine(document) + ":", "", *markdown_lines(table, 3), "", *lines])

# SPDX-License-Identifier: MIT
"""One HTML page with every table and picture, from the JSON files alone; it loads nothing from anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import report, report_ops

_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --quiet: #616e7c; --line: #dde2e8; --ours: #0b7a75; --loss: #b44d12; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1420px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.6rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
p.quiet, ul.notes { color: var(--quiet); font-size: .86rem; } ul.notes { padding-left: 1.1rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
nav a { margin-right: 1.2rem; } a { color: var(--ours); }
.wide { overflow: auto; max-height: 75vh; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .78rem; white-space: nowrap; width: 100%; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: #f3f5f7; text-align: right; padding: .42rem .42rem; vertical-align: bottom;
     white-space: normal; }
td { text-align: right; padding: .26rem .42rem; border-top: 1px solid #eef1f4; }
th.text, td.text { text-align: left; } td.best { font-weight: 600; color: var(--ours); } td.loss { color: var(--loss); }
tr:hover td { background: #f7faf9; } input { font: inherit; padding: .3rem .6rem; margin: .6rem 0; width: 22rem; max-width: 100%; }
"""
_SCRIPT = """
for (const input of document.querySelectorAll("input[data-table]"))
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(" ");
    for (const row of document.getElementById(input.dataset.table).tBodies[0].rows)
      row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  });
"""


def write(path: Path, documents: Sequence[Mapping[str, object]], pictures: Mapping[int, Sequence[Path]]) -> None:
    """The page of some documents, each a section.

    Args:
        pictures: PNG files of the document with that index, embedded.
    """
    sections, links = [], []
    for index, document in enumerate(documents):
        heading, body = _section(index, document)
        links.append(f'<a href="#s{index}">{html.escape(heading)}</a>')
        images = "".join(_image(picture) for picture in pictures.get(index, ()))
        sections.append(f'<h2 id="s{index}">{html.escape(heading)}</h2>\n{images}\n{body}')
    title = "convmixer-kernels: benchmarks"
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n<body>'
        f"<h1>{title}</h1>\n<p class=quiet>Written by python -m benchmarks report from the committed JSON files. Every "
        "result was checked against float64 before it was timed; losses are printed like wins.</p>\n"
        f"<nav>{''.join(links)}</nav>\n{''.join(sections)}\n<script>{_SCRIPT}</script></body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _section(index: int, document: Mapping[str, object]) -> tuple[str, str]:
    """Heading and body: the document's table and what its columns mean."""
    device = document["environment"]["device"]
    if document.get("kind") == "operators":
        rows = document["results"]
        names = report_ops.columns(rows)
        headings = report_ops.headings(names)
        body = [_operator_cells(row, names) for row in rows]
        return f"Operators: {device}", _about(document) + _table(index, headings, body) + _list(
            report_ops.notes(document, rows)
        )
    if "gpu" in document:
        headings, *body = _of_markdown(report.gpu_markdown(document))
        return f"Kernels: {device}", _about(document) + _table(
            index, headings, [[(c, "") for c in row] for row in body]
        )
    body = [[(cell, "") for cell in row] for row in report.table_rows(document)]
    return f"Models: {device}", _about(document) + _table(index, report.HEADINGS, body) + _list(report.notes(document))


def _operator_cells(row: report_ops.Row, names: Sequence[str]) -> list[tuple[str, str]]:
    """The row's cells with their classes: the fastest time, and a ratio that is a loss."""
    cells = report_ops.cells(row, names)
    found = row["implementations"]
    timed = [name for name in found if name != "clone"]
    fastest = min(timed, key=lambda name: found[name]["median_ms"], default=None)
    classes = ["", "", "", *("best" if name == fastest else "" for name in names), "", ""]
    ratio = cells[-1]
    classes.append("loss" if ratio.endswith("x") and float(ratio[:-1]) < 1 else "best" if ratio.endswith("x") else "")
    return list(zip(cells, classes, strict=True))


def _about(document: Mapping[str, object]) -> str:
    found = document["environment"]
    line = (
        f"{report.machine(document)}, commit {found.get('commit')}, Python {found.get('python')}, {found.get('system')}"
    )
    return f"<p class=quiet>{html.escape(line)}</p>\n"


def _table(index: int, headings: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Cells with their classes; words stand left, figures right."""
    left = {i for i in range(len(headings)) if headings[i] in ("case", "dtype", "layout", "model", "mode")}

    def attribute(i: int, extra: str = "") -> str:
        words = " ".join(word for word in ("text" if i in left else "", extra) if word)
        return f' class="{words}"' if words else ""

    head = "".join(f"<th{attribute(i)}>{html.escape(cell)}</th>" for i, cell in enumerate(headings))
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{attribute(i, kind)}>{html.escape(cell)}</td>" for i, (cell, kind) in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return (
        f'<input data-table="t{index}" type="search" placeholder="filter: words of a row, e.g. k9 bfloat16">\n'
        f'<div class=wide><table id="t{index}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
    )


def _list(lines: Sequence[str]) -> str:
    return "<ul class=notes>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>\n"


def _of_markdown(text: str) -> list[list[str]]:
    """The rows of the table in `text`, the headings first."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in rows if not all(set(cell) <= set(":-") for cell in row)]


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">\n'

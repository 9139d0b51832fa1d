# SPDX-License-Identifier: MIT
"""One HTML page with every table and picture, from the JSON files alone; it loads nothing from anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import tables

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
        f"<h1>{title}</h1>\n<p class=quiet>Written by python -m benchmarks report from JSON files. Every "
        "result was checked against float64 before it was timed; losses are printed like wins.</p>\n"
        f"<nav>{''.join(links)}</nav>\n{''.join(sections)}\n<script>{_SCRIPT}</script></body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _section(index: int, document: Mapping[str, object]) -> tuple[str, str]:
    """Heading and body: the document's table and what its columns mean."""
    device, rows = document["environment"]["device"], document["results"]
    if document["kind"] == "models":
        (headings, cells), notes = tables.models(document), tables.model_notes(document)
        body = [[(cell, "") for cell in each] for each in cells]
    else:
        (headings, cells), notes = tables.operators(rows), tables.operator_notes(document)
        body = [_marked(headings, row, each) for row, each in zip(rows, cells, strict=True)]
    heading = f"{document['kind'].capitalize() if document['kind'] != 'gpu' else 'GPU'}: {device}"
    return heading, _about(document) + _table(index, headings, body) + _list(notes)


def _marked(headings: Sequence[str], row: tables.Row, cells: Sequence[str]) -> list[tuple[str, str]]:
    """The cells of a row with their classes: the fastest time, and a ratio that is a loss."""
    fastest = min(
        (name for name in (tables.ours(row), tables.best_peer(row)) if name),
        key=lambda n: tables.median(row, n),
        default=None,
    )
    ratio = tables.speedup(row, tables.best_peer(row))
    last = "" if ratio is None else "loss" if ratio < 1 else "best"
    classes = ["best" if heading == fastest else "" for heading in headings[:-1]]
    return list(zip(cells, [*classes, last], strict=True))


def _about(document: Mapping[str, object]) -> str:
    found = document["environment"]
    line = (
        f"{tables.machine(document)}, commit {found.get('commit')}, Python {found.get('python')}, {found.get('system')}"
    )
    return f"<p class=quiet>{html.escape(line)}</p>\n"


def _table(index: int, headings: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Cells with their classes; words stand left, figures right."""
    left = {i for i in range(len(headings)) if headings[i] in ("milliseconds", "dtype", "layout", "model", "mode")}

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


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">\n'

# SPDX-License-Identifier: MIT
"""python -m benchmarks report: the tables of README.md and docs/performance.md and the pictures, from JSON files and nothing else."""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import plots, tables

RESULTS = Path("benchmarks/results")
KINDS = ("models", "operators", "networks", "gpu", "training")


def fill(path: Path, blocks: Mapping[str, str]) -> None:
    """Put each text between the markers of its name in a file.

    Raises:
        ValueError: the markers are not there once each, in order; the file stays as it is.
    """
    text = path.read_text()
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"{path} must contain {begin} and then {end}, once each")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
    path.write_text(text)


def load(named: Sequence[Path]) -> dict[str, Mapping[str, object]]:
    """Documents by kind: the newest in benchmarks/results, or the one that was named."""
    found = (json.loads(path.read_text()) for path in RESULTS.glob("*.json"))
    # the static table of the CUDA kernels lies there too, and has its own page
    found = [each for each in found if isinstance(each, dict)]
    documents = {each["kind"]: each for each in sorted(found, key=lambda each: each["environment"]["date"])}
    for path in named:
        document = json.loads(path.read_text())
        if document["kind"] not in KINDS or not document["results"]:
            raise ValueError(f"{path} is not a file of benchmarks, or one without rows")
        documents[document["kind"]] = document
    return {kind: documents[kind] for kind in KINDS if kind in documents}


def _short(documents: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """README.md's tables. A run that was cut off before their rows leaves the table as it is."""
    blocks = {}
    for name, kinds, device_type in (("cpu", ("models", "operators"), "cpu"), ("gpu", ("gpu",), "cuda")):
        found = [documents[kind] for kind in kinds if kind in documents]
        try:
            blocks |= {name: tables.small(found, device_type)} if found else {}
        except ValueError as error:
            print(f"benchmarks report: README.md keeps its table: {error}", file=sys.stderr)
    return blocks


def write_page(path: Path) -> None:
    """docs/performance.md as one HTML file that holds its pictures."""
    import markdown

    def embedded(found: re.Match[str]) -> str:
        picture = base64.b64encode(Path("docs", found[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{picture}"'

    body = markdown.markdown(Path("docs/performance.md").read_text(), extensions=["tables", "fenced_code"])
    body = re.sub(r'src="([^":]+\.png)"', embedded, body)
    style = "body{font-family:sans-serif;margin:2em} table{border-collapse:collapse} td,th{padding:.2em .8em} img{max-width:100%}"
    head = f'<!doctype html><meta charset="utf-8"><title>convmixer-kernels: performance</title><style>{style}</style>'
    path.write_text(f"{head}\n{body}\n")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 if a file could not be read, drawn or written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__.partition(": ")[2])
    instead = "JSON files, each instead of the newest of its kind in benchmarks/results"
    parser.add_argument("results", type=Path, nargs="*", help=instead)
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write docs/performance.md as one HTML file")
    options = parser.parse_args(arguments)
    try:
        documents = load(options.results)
        short = _short(documents)
        blocks = {kind: tables.markdown(document) for kind, document in documents.items()}
        blocks["rows"] = "\n".join(tables.markdown_lines(tables.contents(), 3))
        for kind, document in documents.items():
            for name, draw in plots.PICTURES[kind].items():
                draw(document, Path("docs", name), tables.machine(document))
        fill(Path("docs/performance.md"), blocks)
        fill(Path("README.md"), short)
        if options.page is not None:
            write_page(options.page)
    except (OSError, ValueError) as error:
        print(f"benchmarks report: {error}", file=sys.stderr)
        return 2
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        print(f"benchmarks report: not a file of benchmarks, or one without rows: {error!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

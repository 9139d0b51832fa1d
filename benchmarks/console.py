# SPDX-License-Identifier: MIT
"""Output on a terminal, and imports of packages that only the benchmarks need."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType


class MissingPackage(RuntimeError):
    """A package of the [bench] extra is not installed."""


def require(name: str) -> ModuleType:
    """Import the module `name`.

    Raises:
        MissingPackage: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # a package that is there but lacks one of its own dependencies names that one
        raise MissingPackage(
            f"the benchmarks need the package {error.name!r}, which is not installed; "
            "install what they need with: pip install '.[bench]'"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def progress(work: float) -> Iterator[Callable[[str, float], None]]:
    """Yields a function that takes a description of the current work and how much of `work` was done since its last call.

    On a terminal it moves a bar with the time left, else it writes lines to stderr.
    """
    console = require("rich.console").Console(stderr=True)
    if not console.is_terminal:
        last = None

        def line(what: str, done: float) -> None:
            nonlocal last
            if what != last:
                print(what, file=sys.stderr, flush=True)
            last = what

        yield line
        return
    bars = require("rich.progress")
    # a long description is cut, not the times
    text = require("rich.table").Column(ratio=1, no_wrap=True, overflow="ellipsis")
    columns = (bars.TextColumn("{task.description}", table_column=text), bars.BarColumn(20), bars.TaskProgressColumn())
    times = (bars.TimeElapsedColumn(), bars.TextColumn("left"), bars.TimeRemainingColumn())
    with bars.Progress(
        *columns, *times, console=console, transient=True, expand=True, speed_estimate_period=300
    ) as display:
        task = display.add_task("starting", total=work)
        yield lambda what, done: display.update(task, description=what, advance=done)


def show_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """Print a table; its first three columns are words. A row with WRONG in it is red."""
    console = require("rich.console").Console()
    if not console.is_terminal:
        # a file or pipe has no width; 80 columns would break the lines
        console.width = 220
    box = require("rich.box").SIMPLE_HEAD
    table = require("rich.table").Table(title=title, title_justify="left", box=box)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < 3 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row, style="bold red" if "WRONG" in row else None)
    console.print(table)
    for line in notes:
        console.print(line, style="dim", highlight=False)

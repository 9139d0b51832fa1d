# SPDX-License-Identifier: MIT
"""How far a run is: a bar with the time left on a terminal, else lines on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from benchmarks.optional import require


@contextlib.contextmanager
def progress(work: float) -> Iterator[Callable[[str, float], None]]:
    """A function to tell what is going on and how much of `work` has been done since it was last called."""
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
    # what is going on is cut short before the times are
    text = require("rich.table").Column(ratio=1, no_wrap=True, overflow="ellipsis")
    columns = (bars.TextColumn("{task.description}", table_column=text), bars.BarColumn(20), bars.TaskProgressColumn())
    times = (bars.TimeElapsedColumn(), bars.TextColumn("left"), bars.TimeRemainingColumn())
    with bars.Progress(
        *columns, *times, console=console, transient=True, expand=True, speed_estimate_period=300
    ) as display:
        task = display.add_task("starting", total=work)
        yield lambda what, done: display.update(task, description=what, advance=done)

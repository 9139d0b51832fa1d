# SPDX-License-Identifier: MIT
"""What a training run tells: log.csv, TensorBoard, curves.png, and a progress bar. One process of a run writes."""

from __future__ import annotations

import csv
import importlib
import io
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoints import write_atomically

#: One row a step; the last three in the last row of an epoch only. All but images_per_s are the same after a resume.
COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "test_loss", "test_top1", "test_top5")
Row = dict[str, float]


def read_log(path: Path) -> list[Row]:
    """The complete rows of a log.csv; none if there is no such file."""
    if not path.exists():
        return []
    rows = []
    # a kill may have cut the last line
    for line in csv.DictReader(io.StringIO(path.read_text().rpartition("\n")[0])):
        if None not in line.values():
            rows.append({name: float(value) for name, value in line.items() if value})
    return rows


class Log:
    """log.csv and TensorBoard of one run.

    Args:
        folder: of the run.
        last: the step of the checkpoint that the run goes on from; later rows, of steps that are now repeated, are removed.
    """

    def __init__(self, folder: Path, last: int) -> None:
        self.folder = folder
        self.rows = [row for row in read_log(folder / "log.csv") if row["step"] <= last]
        text = io.StringIO()
        self._format = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        self._format.writeheader()
        self._format.writerows(map(_cells, self.rows))
        write_atomically(folder / "log.csv", lambda file: file.write(text.getvalue().encode()))
        self._file = open(folder / "log.csv", "a", newline="")  # noqa: SIM115, closed by close()
        self._format = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._board = _tensorboard(folder / "tensorboard", last)

    def write(self, rows: list[Row]) -> None:
        """Adds rows, and has them on the disk before it returns."""
        self.rows += rows
        self._format.writerows(map(_cells, rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            for row in rows:
                for name, value in row.items():
                    if name not in ("step", "epoch"):
                        self._board.add_scalar(name.replace("test_", "test/"), value, int(row["step"]))

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def draw(self, title: str) -> Path | None:
        """curves.png, if matplotlib is installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
        loss, accuracy = figure.subplots(1, 2)
        steps = [row["step"] for row in self.rows]
        loss.plot(steps, [row["loss"] for row in self.rows], color="#9ecae1", linewidth=1, label="training, each step")
        tests = [row for row in self.rows if "test_loss" in row]
        at = [row["step"] for row in tests]
        loss.plot(at, [row["test_loss"] for row in tests], color="#08519c", marker=".", label="held out, each epoch")
        loss.set(xlabel="step", ylabel="cross-entropy (training: with label smoothing)", yscale="log", title=title)
        loss.legend()
        accuracy.plot(at, [row["test_top1"] for row in tests], color="#08519c", marker=".")
        best = max((row["test_top1"] for row in tests), default=0.0)
        accuracy.set(xlabel="step", ylabel="held-out images right, %", title=f"best {best:.2f} %")
        for axes in (loss, accuracy):
            axes.grid(alpha=0.3)
        path = self.folder / "curves.png"
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        write_atomically(path, lambda file: file.write(picture.getvalue()))
        return path


def _cells(row: Mapping[str, float]) -> dict[str, Any]:
    cells: dict[str, Any] = {name: repr(value) for name, value in row.items()}
    return {**cells, "step": int(row["step"]), "epoch": int(row["epoch"])}


def _tensorboard(folder: Path, last: int) -> Any:
    try:
        board = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        return None
    return board.SummaryWriter(str(folder), purge_step=last + 1)


class Progress:
    """On a terminal a bar with images/s and the time left, if rich is installed; `line` prints above it, or alone."""

    def __init__(self, steps: int, done: int, batch: int, shown: bool) -> None:
        self.total, self.done, self.batch, self.shown = steps, done, batch, shown
        self._start, self._first = time.perf_counter(), done
        self._bar = self._task = None
        if shown and sys.stderr.isatty():
            try:
                bars: Any = importlib.import_module("rich.progress")
            except ImportError:
                return
            self._bar = bars.Progress(
                bars.TextColumn("{task.description}"),
                bars.BarColumn(30),
                bars.TaskProgressColumn(),
                bars.TextColumn("{task.fields[rate]} images/s"),
                bars.TimeRemainingColumn(),
                bars.TextColumn("left"),
                console=importlib.import_module("rich.console").Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=steps, completed=done, rate="-")
            self._bar.start()

    def step(self, text: str) -> None:
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=text, rate=f"{self.rate():.0f}")

    def rate(self) -> float:
        """Images a second since the start."""
        return (self.done - self._first) * self.batch / max(1e-9, time.perf_counter() - self._start)

    def left(self) -> str:
        seconds = round((self.total - self.done) * self.batch / max(1e-9, self.rate()))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self.shown:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

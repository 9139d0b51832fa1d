# SPDX-License-Identifier: MIT
"""Results that survive whatever a GPU does to a process: rows on disk as they come, and jobs in workers with a watchdog."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases, tables
from benchmarks.machine import ROOT

Job = dict[str, Any]

#: Seconds that a worker may take before its first job: it imports torch and makes a context.
_START_LIMIT = 60


class Run:
    """The results so far, on disk after every row, and how much time is left."""

    def __init__(self, path: Path, seconds: float = float("inf")) -> None:
        self.path, self.deadline = path, time.monotonic() + seconds
        self.document: dict[str, Any] = {"results": []}
        self._read = 0
        self.reload()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, key: str, value: object) -> None:
        self._write({"note": key, "value": value})

    def append(self, key: str, value: object) -> None:
        """To the list `key`."""
        self._write({"append": key, "value": value})

    def row(self, row: dict[str, Any], key: str = "results") -> None:
        """Append a row of engine.measure, or a part of one, to the list `key`: parts of a case become one row."""
        self.append(key, row)
        print(describe_row(row), flush=True)

    def _write(self, line: dict[str, object]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # if a kill has cut off the last line, a new one begins behind it
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with open(self.path, "a") as file:
            file.write("\n" * torn + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.reload()

    def reload(self) -> None:
        """Take over what other processes have written, less a line that a kill has cut off."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                try:
                    found = json.loads(line)
                except ValueError:
                    continue
                if "append" in found:
                    self._append(self.document.setdefault(found["append"], []), found["value"])
                else:
                    self.document[found["note"]] = found["value"]

    @staticmethod
    def _append(values: list[Any], value: Any) -> None:
        """Add a value. A part of a row joins the row of its case and replaces earlier results of the same implementations."""
        known = None
        if isinstance(value, dict) and "implementations" in value:
            known = next((row for row in values if row["case"] == value["case"]), None)
        if known is None:
            values.append(value)
            return
        names = {*value["implementations"], *value["absent"], *(each["implementation"] for each in value["wrong"])}
        wrong = [each for each in known["wrong"] if each["implementation"] not in names] + value["wrong"]
        merged = {"wrong": wrong}
        for key in ("implementations", "absent"):
            merged[key] = {name: each for name, each in known[key].items() if name not in names} | value[key]
        known |= {**value, **merged}


def describe_row(row: dict[str, Any]) -> str:
    """A row as lines of the log."""
    lines = [f"WRONG {tables.explain(row, each)}" for each in row["wrong"]]
    lines += [f"{row['case']}: {name}: - ({reason})" for name, reason in row["absent"].items()]
    for name, each in row["implementations"].items():
        shown = "right" if each.get("passed", True) else "not within eager's error"
        if "median_ms" in each:
            shown = f"{1e3 * each['median_ms']:10.1f} us {each.get('percent_of_floor', 0):6.1f} % of the floor"
            shown += f", host {1e3 * each['host_ms']:.0f} us" if "host_ms" in each else ""
        lines.append(f"{row['case']:<64}{name:<20}{shown}")
    return "\n".join(lines)


def run_jobs(run: Run, name: str, jobs: Sequence[Job], seconds: float) -> None:
    """Every job in order while `seconds` last, in workers; the rest is named as left out.

    A job that hangs or crashes costs its row: it is noted as broken, and the next worker goes on behind it.
    """
    until = min(time.monotonic() + seconds, run.deadline - 3)
    first = 0
    while first < len(jobs) and time.monotonic() < until:
        first = _run_worker(run, jobs, first, until)
    if first < len(jobs):
        run.note(f"{name}_left_out", [_label(job) for job in jobs[first:]])
        print(f"{name}: out of time, {len(jobs) - first} of {len(jobs)} left out", flush=True)


def _label(job: Job) -> str:
    return " ".join(_word(value) for key, value in job.items() if key not in ("limit", "settings"))


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return cases.from_json(value).name
    return " ".join(map(_word, value)) if isinstance(value, list | tuple) else str(value)


def _run_worker(run: Run, jobs: Sequence[Job], first: int, until: float) -> int:
    """Jobs from number `first` on in one process; the number of the first that was not begun."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", str(run.path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    begun, last_words = first - 1, ""
    reason: str | None = None
    try:
        # the pipe stays open: a worker ends with this process, however that ends
        process.stdin.write(json.dumps(jobs[first:]) + "\n")
        process.stdin.flush()
        limit = time.monotonic() + _START_LIMIT
        while True:
            try:
                line = lines.get(timeout=max(0.0, min(limit, until) - time.monotonic()))
            except queue.Empty:
                if time.monotonic() >= until:
                    return begun + 1 if begun < first else begun
                reason = f"did not end within {jobs[max(begun, first)].get('limit', 20)} s"
                break
            if line is None:
                break
            if line.startswith("\x1e"):
                begun, last_words = begun + 1, ""
                limit = time.monotonic() + jobs[begun].get("limit", 20)
            elif line.strip():
                last_words = line.strip()
                print(line, end="", flush=True)
    except BrokenPipeError:
        pass
    finally:
        end(process)
        run.reload()
    if reason is None and process.returncode == 0:
        return len(jobs)
    reason = reason or f"ended its process with status {process.returncode}: {last_words[-200:]}"
    job = jobs[max(begun, first)]
    run.append("broken", {"job": _label(job), "error": reason})
    print(f"BROKEN {_label(job)}: {reason}", flush=True)
    return max(begun, first) + 1


def end(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started; one that waits for the GPU goes as soon as the driver lets it."""
    try:
        os.killpg(process.pid, 9) if process.poll() is None else None
        process.wait(timeout=10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass

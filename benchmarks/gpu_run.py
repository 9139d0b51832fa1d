# SPDX-License-Identifier: MIT
"""Results that survive whatever a GPU does to a process: rows on disk as they come, and jobs in workers with a watchdog."""

from __future__ import annotations

import contextlib
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
#: What a worker prints when it is ready for a job.
READY = "\x1e"


class Run:
    """The results so far, on disk after every row, and how much time is left."""

    def __init__(self, path: Path, seconds: float = float("inf"), device: str = "cuda") -> None:
        self.path, self.deadline = path, time.monotonic() + seconds
        self.device = device
        self.worker: Worker | None = None
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

    def end_worker(self) -> None:
        if self.worker is not None:
            self.worker.end()
            self.worker = None

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


def killed(document: dict[str, Any]) -> dict[str, str] | None:
    """Of a command that was killed: the job or step that it was at, as an entry of `broken`."""
    at = document.get("under_way")
    return None if at is None else {**at, "error": "the command was killed during it, or right after"}


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
    """Every job in order while `seconds` last, in a worker; the rest is named as left out.

    A job that hangs or crashes costs its row: it is noted as broken, and the next one gets a new worker. Jobs that an earlier command
    with the same folder has done are not done again, nor one that broke it.
    """
    until = min(time.monotonic() + seconds, run.deadline - 3)
    done = set(run.document.get("done", ()))
    # later rows refer to the peaks of the machine that they ran on
    waiting = [job for job in jobs if job["kind"] == "peaks" or label(job) not in done]
    while waiting and time.monotonic() < until and _do(run, name, waiting[0], until):
        waiting.pop(0)
    if waiting or run.document.get(f"{name}_left_out"):
        run.note(f"{name}_left_out", [label(job) for job in waiting])
    if waiting:
        print(f"{name}: out of time, {len(waiting)} of {len(jobs)} left out", flush=True)


def label(job: Job) -> str:
    return " ".join(_word(value) for key, value in job.items() if key not in ("limit", "settings", "plant"))


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return cases.from_json(value).name
    return " ".join(map(_word, value)) if isinstance(value, list | tuple) else str(value)


def _do(run: Run, step: str, job: Job, until: float) -> bool:
    """One job; False if time ran out before its end."""
    at = {"step": step, "job": label(job)}
    run.note("under_way", at)
    limit, reason = _START_LIMIT, None
    try:
        settings = job.get("settings", {})
        if run.worker is None or run.worker.settings != settings:
            run.end_worker()
            run.worker = Worker(run, settings)
            reason = run.worker.wait(min(until, time.monotonic() + limit))
        if reason is None:
            limit = job.get("limit", 20)
            run.worker.send(job)
            reason = run.worker.wait(min(until, time.monotonic() + limit))
    except TimeoutError:
        if time.monotonic() >= until:
            run.end_worker()
            return False
        reason = f"did not end within {limit} s"
    run.reload()
    if reason is not None:
        run.end_worker()
        run.append("broken", {**at, "error": reason})
        print(f"BROKEN {label(job)}: {reason}", flush=True)
    run.append("done", label(job))
    return True


class Worker:
    """A process that does one job after the other, so that importing and the GPU's context are paid once. It ends with this process."""

    def __init__(self, run: Run, settings: dict[str, str]) -> None:
        self.settings = settings
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", "--worker", str(run.path), "--device", run.device],
            cwd=ROOT,
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._last_words = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def send(self, job: Job) -> None:
        self._last_words = ""
        # of a process that has ended, wait() tells how
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()

    def wait(self, until: float) -> str | None:
        """Until it is ready for a job. Returns how the process ended, if it did.

        Raises:
            TimeoutError: it is not ready.
        """
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise TimeoutError from None
            if line is None:
                # it has closed its output: its own status comes at once
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=5)
                return f"ended its process with status {self._process.returncode}: {self._last_words[-200:]}"
            if READY in line:
                return None
            if line.strip():
                self._last_words = line.strip()
                print(line, end="", flush=True)

    def end(self) -> None:
        end(self._process)


def end(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started; one that waits for the GPU goes as soon as the driver lets it."""
    try:
        os.killpg(process.pid, 9) if process.poll() is None else None
        process.wait(timeout=10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass

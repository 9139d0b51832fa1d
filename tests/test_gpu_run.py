# SPDX-License-Identifier: MIT
"""benchmarks/gpu_run.py: rows on disk as they come, and jobs in a worker with a watchdog."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import cases, gpu_run, gpu_steps, machine


def _saved(run: gpu_run.Run) -> dict:
    return gpu_run.Run(run.path).document


def _jobs(*how: str, hang: float = 2) -> list[gpu_run.Job]:
    """A tiny case for each, distinct by its height, with that fault; "right" has none, "raise" is no job that there is."""
    found = []
    for height, each in enumerate(how, 4):
        case = cases.to_json(cases.OpCase("normalize", each, (1, 4, height, 5)))
        job = {"kind": "measure", "case": case, "names": ["ours reference"], "limit": 40}
        more = {"hang": {"limit": hang}, "raise": {"kind": "raise"}}.get(each, {})
        found.append(job | more | ({"plant": each} if each in ("hang", "crash", "wrong") else {}))
    return found


def _families(document: dict) -> list[str]:
    return [row["family"] for row in document["results"]]


def test_a_job_that_hangs_or_crashes_costs_its_row(run, capfd):
    jobs = _jobs("first", "hang", "second", "crash", "raise", "wrong", "last")
    gpu_run.run_jobs(run, "operators", jobs, 90)
    document = _saved(run)
    assert _families(document) == ["first", "second", "wrong", "last"]
    broken = {each["job"]: each["error"] for each in document["broken"]}
    assert list(broken) == [gpu_run.label(jobs[i]) for i in (1, 3, 4)]
    hung, crashed, raised = broken.values()
    assert hung == "did not end within 2 s"
    assert "status -6" in crashed
    assert raised == "KeyError: 'raise'"
    text = gpu_run.summary(document)
    assert text.count("- BROKEN") == 3
    assert text.count("- WRONG normalize 1x4x9x5 float32 contiguous: ours reference: y: relative error") == 1
    assert "operators_left_out" not in document


def test_jobs_that_time_does_not_suffice_for_are_named(run, capfd):
    first, hang, last = _jobs("first", "hang", "last", hang=60)
    gpu_run.run_jobs(run, "operators", [first, hang, last], 15)
    document = _saved(run)
    assert _families(document) == ["first"]
    assert document["operators_left_out"] == [gpu_run.label(hang), gpu_run.label(last)]
    assert f"OUT OF TIME operators: 2 left out, from {gpu_run.label(hang)} on" in gpu_run.summary(document)
    assert run.worker is None
    # with more time the same folder goes on behind what is done, and a broken job is not done again
    hang["limit"] = 2
    gpu_run.run_jobs(run, "operators", [first, hang, last], 90)
    document = _saved(run)
    assert _families(document) == ["first", "last"]
    assert document["operators_left_out"] == []
    gpu_run.run_jobs(run, "operators", [first, hang, last], 90)
    assert _saved(run) == document


def test_a_worker_serves_many_steps(run, capfd, monkeypatch):
    first, second, third = _jobs("first", "second", "third")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)  # another test of this process may have set it
    gpu_run.run_jobs(run, "operators", [first], 60)
    kept = run.worker
    gpu_run.run_jobs(run, "models", [second], 60)
    assert run.worker is kept
    assert b"CUBLAS_WORKSPACE_CONFIG" not in Path(f"/proc/{run.worker.process.pid}/environ").read_bytes()
    # the confirmations get one of their own, with torch's setting for determinism
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    gpu_steps.confirm_jobs(run)
    gpu_run.run_jobs(run, "confirm", [third], 60)
    assert b"CUBLAS_WORKSPACE_CONFIG=:4096:8" in Path(f"/proc/{run.worker.process.pid}/environ").read_bytes()
    assert _families(_saved(run)) == ["first", "second", "third"]


def _runs(argument: str) -> bool:
    """Whether some process has this among its arguments."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        # processes end meanwhile
        with contextlib.suppress(OSError):
            if argument.encode() in path.read_bytes().split(b"\0"):
                return True
    return False


def _wait(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_kill_9_loses_at_most_one_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    jobs = _jobs("first", "second", "hang", "last", hang=60)
    program = "from pathlib import Path\nfrom benchmarks import gpu_run\n"
    program += f"gpu_run.run_jobs(gpu_run.Run(Path({str(path)!r}), 90, 'cpu'), 'operators', {jobs!r}, 80)"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=machine.ROOT, stdout=subprocess.DEVNULL)
    _wait(lambda: path.exists() and path.read_text().count('"append": "results"') == 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # its worker, which hangs, ends with it
    _wait(lambda: not _runs(str(path)))
    # as if the kill had come while a row was written
    with open(path, "a") as file:
        file.write('{"append": "results", "val')
    assert _families(gpu_run.Run(path).document) == ["first", "second"]
    # and the next run goes on behind it
    again = gpu_run.Run(path)
    again.row({"case": "third", "family": "third", "implementations": {}, "absent": {}, "wrong": []})
    assert _families(gpu_run.Run(path).document) == ["first", "second", "third"]


def test_parts_of_a_row_become_one(run):
    """Implementation by implementation on disk, one row of the schema that all commands share."""
    row = {"case": "a", "op": "normalize", "implementations": {}, "absent": {}, "wrong": []}
    run.row({**row, "implementations": {"ours cuda": {"median_ms": 1.0}}})
    run.row({**row, "case": "b", "implementations": {"ours cuda": {"median_ms": 2.0}}})
    run.row({**row, "wrong": [{"implementation": "ours triton", "failure": "no"}]})
    run.row({**row, "absent": {"eager NCHW": "no memory"}})
    first, second = _saved(run)["results"]
    assert first == {
        **row,
        "implementations": {"ours cuda": {"median_ms": 1.0}},
        "absent": {"eager NCHW": "no memory"},
        "wrong": [{"implementation": "ours triton", "failure": "no"}],
    }
    assert second["case"] == "b"
    # a later run of the same implementation replaces what was known of it
    run.row({**row, "implementations": {"ours triton": {"median_ms": 3.0}}, "session": 1})
    run.row({**row, "wrong": [{"implementation": "ours cuda", "failure": "no"}], "session": 1})
    first, second = _saved(run)["results"]
    assert first == {
        **row,
        "implementations": {"ours triton": {"median_ms": 3.0}},
        "absent": {"eager NCHW": "no memory"},
        "wrong": [{"implementation": "ours cuda", "failure": "no"}],
        "session": 1,
    }


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv, of util-linux")
def test_a_tool_ends_with_the_command(tmp_path):
    """A killed command's tests would otherwise share the GPU with the next one's timings."""
    mark = str(tmp_path / "mark")
    program = "from pathlib import Path\nfrom benchmarks import gpu_run, gpu_steps\nimport sys\n"
    tool = f"[sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}]"
    program += f"run = gpu_run.Run(Path({mark!r}), 90)\ngpu_steps._command(run, {tool}, 60, Path({mark!r} + '.log'))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=machine.ROOT)
    try:
        _wait(lambda: _runs(mark))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _wait(lambda: not _runs(mark))

# SPDX-License-Identifier: MIT
"""Results that survive whatever a GPU does to a process: rows on disk as they come, and jobs in a worker with a watchdog.

A job is a dict: its "kind", the arguments of that kind's function below, "limit" (seconds) and, for tests, "plant" (a fault).
On a CPU (for tests) backend "cuda" takes CPU tensors if CONVMIXER_CUDA_EMULATION names the module that tests/emulation/build.py
prints, and "triton" if TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, check, engine, gpu_confirm, machine, peers, tables
from benchmarks.cases import LAYOUTS, ModelCase, OpCase
from benchmarks.ops import make_inputs
from convmixer_kernels.backends import torch_gemm

Job = dict[str, Any]

#: Seconds that a worker may take before its first job: it imports torch and makes a context.
_START_LIMIT = 60
#: Seconds of timing one implementation of a model, which fewer calls fill.
_MODEL_SECONDS = 0.5
FAULTS = ("hang", "crash", "wrong")


class Run:
    """The results so far, on disk after every row, and how much time is left."""

    def __init__(self, path: Path, seconds: float = float("inf"), device: str = "cuda") -> None:
        self.path, self.deadline, self.device = path, time.monotonic() + seconds, device
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

    def row(self, row: dict[str, Any]) -> None:
        """Append a row of engine.measure, or a part of one, to the results: parts of a case become one row."""
        self.append("results", row)
        for each in row["wrong"]:
            print(f"WRONG {tables.explain(row, each)}")
        for name, reason in row["absent"].items():
            print(f"{row['case']}: {name}: - ({reason})")
        for name, each in row["implementations"].items():
            shown = "right" if each.get("passed", True) else "not within eager's error"
            if "median_ms" in each:
                shown = f"{1e3 * each['median_ms']:10.1f} us {each.get('percent_of_floor', 0):6.1f} % of the floor"
            print(f"{row['case']:<64}{name:<20}{shown}", flush=True)

    def end_worker(self) -> None:
        if self.worker is not None:
            end(self.worker.process.pid)
            self.worker.process.join(10)
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
                    _add(self.document.setdefault(found["append"], []), found["value"])
                else:
                    self.document[found["note"]] = found["value"]


def _add(values: list[Any], value: Any) -> None:
    """Add a value. A part of a row joins the row of its case and replaces earlier results of the same implementations."""
    known = None
    if isinstance(value, dict) and "implementations" in value:
        known = next((row for row in values if row["case"] == value["case"]), None)
    if known is None:
        values.append(value)
        return
    names = {*value["implementations"], *value["absent"], *(each["implementation"] for each in value["wrong"])}
    merged = {"wrong": [each for each in known["wrong"] if each["implementation"] not in names] + value["wrong"]}
    for key in ("implementations", "absent"):
        merged[key] = {name: each for name, each in known[key].items() if name not in names} | value[key]
    known |= {**value, **merged}


def killed(document: dict[str, Any]) -> dict[str, str] | None:
    """Of a command that was killed: the job or step that it was at, as an entry of `broken`."""
    at = document.get("under_way")
    return None if at is None else {**at, "error": "the command was killed during it, or right after"}


def summary(document: dict[str, Any]) -> str:
    """As Markdown: what is wrong, broken, killed or out of time, then all times."""
    lines = [f"- BROKEN {each['job']}: {each['error']}" for each in document.get("broken", [])]
    lines += [f"- WRONG {tables.explain(row, each)}" for row in document["results"] for each in row["wrong"]]
    for key in ("tests", "sanitizer", "profile"):
        found = document.get(key, {})
        if not found.get("ok", True):
            lines.append(f"- {key.upper()} NOT OK: {found['summary']}")
            lines += [f"  {line}" for line in found.get("failures", [])]
    for name, found in document.get("confirmed", {}).items():
        lines += [] if found["ok"] else [f"- NOT CONFIRMED {name}: {found}"]
    for key, left in document.items():
        if key.endswith("_left_out") and left:
            lines.append(f"- OUT OF TIME {key.removesuffix('_left_out')}: {len(left)} left out, from {left[0]} on")
    lines = ["# Faults", "", *(lines or ["None: nothing is wrong, broke or was left out."])]
    timed = [row for row in document["results"] if row["implementations"]]
    lines += ["", "## Times", "", *tables.markdown_lines(tables.operators(timed, "cuda"), 3), ""]
    lines += [f"- {backend}: {reason}" for backend, reason in document.get("absent", {}).items()]
    steps = ", ".join(f"{each['step']} {each['seconds']:.0f} s" for each in document.get("steps", []))
    return "\n".join([*lines, f"- steps: {steps}", ""])


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


def label(job: Job) -> str:
    return " ".join(_word(value) for key, value in job.items() if key not in ("limit", "plant"))


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
        if run.worker is None:
            run.worker = Worker(run)
            reason = run.worker.wait(min(until, time.monotonic() + limit))
        if reason is None:
            limit = job["limit"]
            run.worker.jobs.send(job)
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

    def __init__(self, run: Run) -> None:
        context = multiprocessing.get_context("spawn")
        self.jobs, other = context.Pipe()
        self.process = context.Process(target=_work, args=(run.path, run.device, other))
        self.process.start()
        other.close()

    def wait(self, until: float) -> str | None:
        """Until it is ready for a job. Returns what went wrong with the one before, or how the process ended.

        Raises:
            TimeoutError: it is not ready.
        """
        if not self.jobs.poll(max(0.0, until - time.monotonic())):
            raise TimeoutError
        try:
            return self.jobs.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            return f"ended its process with status {self.process.exitcode}"


def end(pid: int) -> None:
    """End a process that leads a session, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, 9)


def _work(path: Path, device: str, jobs: Connection) -> None:
    """Jobs as they come; None, or an error, says that the next one can come."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run = Run(path, device=device)
    if device == "cuda":
        # a context takes seconds, which are not the first job's
        torch.zeros(1, device="cuda").sum().item()
    else:
        # not the pooled hundreds of channels, which an emulator takes minutes for
        check.POOL = 1
    jobs.send(None)
    while True:
        job = jobs.recv()
        run.reload()
        try:
            jobs.send(do(run, job))
        except Exception as error:
            # whatever it is, the command starts a new worker
            jobs.send(f"{type(error).__name__}: {peers.first_line(error)}")


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(0)


def do(run: Run, job: Job) -> None:
    """One job. If it has a planted fault (for tests: --plant), it hangs, crashes or is wrong."""
    if job.get("plant") == "hang":
        time.sleep(600)
    if job.get("plant") == "crash":
        os.abort()
    honest = peers.prepare
    if job.get("plant") == "wrong":
        peers.prepare = lambda name, *rest: _spoil(name, honest(name, *rest))
    try:
        fields = {key: value for key, value in job.items() if key not in ("kind", "limit", "plant")}
        {"peaks": _peaks, "measure": _measure, "confirm": _confirm}[job["kind"]](run, **fields)
    finally:
        peers.prepare = honest


def _spoil(name: str, prepared: peers.Prepared) -> peers.Prepared:
    """One value of ours is wrong in every call."""

    def off(call: Callable[[], peers.Results]) -> peers.Results:
        first, *rest = call()
        first = first.detach().clone()
        first.view(-1)[0] += first.abs().max() + 1
        return first, *rest

    if name.startswith("ours"):
        prepared.calls = [lambda call=call: off(call) for call in prepared.calls]
    return prepared


def _peaks(run: Run) -> None:
    device = torch.device(run.device)
    peaks = machine.measure_peaks(device, ("bfloat16", "float16", "float32"), small=device.type == "cpu")
    run.append("sessions", machine.session(device, peaks))


def _measure(run: Run, case: dict[str, Any], names: Sequence[str]) -> None:
    """The row of a case, on disk implementation by implementation."""
    measured, device = cases.from_json(case), torch.device(run.device)
    workload = engine.make_workload(measured, device, rotate=device.type == "cuda")
    expected = check.expect(workload)
    # without peaks (their own job broke) a row has no floor
    sessions = run.document.get("sessions", [])
    peaks = machine.Peaks(**sessions[-1]["peaks"]) if sessions else None
    seconds = _MODEL_SECONDS if isinstance(measured, ModelCase) else engine.GPU_SECONDS
    clock = engine.clock_of(device, seconds, 1 if device.type == "cpu" else None)
    for name in names:
        row = engine.measure(workload, [name], clock, peaks, compile_all=True, expected=expected)
        run.row({**row, "session": len(sessions) - 1})
        if device.type == "cuda":
            # an error of this implementation that was not told yet ends the worker here, not in the next one's row
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def _confirm(run: Run, name: str) -> None:
    run.note("confirmed", {**run.document.get("confirmed", {}), name: gpu_confirm.outcome(name)})


def _prepared(case: OpCase, name: str, device: torch.device) -> Callable[[], object]:
    workload = peers.Workload(case, device, make_inputs(case, device, 1))
    return engine.rotating(peers.prepare(name, workload, False), device)


def sanitizer_workload(device: torch.device) -> None:
    """Every kernel once at sizes with every kind of edge, without torch's products: the tools have complaints about those."""
    torch_gemm.convolution = lambda x, *rest: x.clone()
    torch_gemm.input_grad = lambda da, *rest: da.clone()
    torch_gemm.weight_grad = lambda da, x, *rest: da.new_zeros(da.shape[1], x.shape[1])
    for dtype in ("bfloat16", "float32"):
        for layout in LAYOUTS:
            for shape, kernel in (((2, 8, 17, 16), 9), ((3, 5, 7, 7), 4), ((1, 8, 33, 40), 15)):
                for op in cases.OPERATORS:
                    case = OpCase(op, "sanitizer", shape, kernel, dtype=dtype, layout=layout)
                    for gemm in ("", " layer") if op in ("pointwise_eval", "pointwise_train", "layer_eval") else ("",):
                        _prepared(case, f"ours cuda{gemm}", device)()


def profile_workload(device: torch.device) -> None:
    """One launch of each headline kernel between cudaProfilerStart and -Stop, at full size, after a warm one."""
    big, half = (64, 1536, 32, 32), (32, 1536, 32, 32)
    depthwise = ("depthwise_eval", "depthwise_input_grad_kernel", "depthwise_weight_grad")
    chosen = [OpCase(op, "", big, dtype="bfloat16") for op in ("depthwise_train_kernel", *depthwise)]
    chosen += [OpCase(op, "", big, dtype="bfloat16", layout="channels_last") for op in depthwise]
    chosen += [OpCase("depthwise_eval", "", half), OpCase("depthwise_eval", "", (64, 768, 17, 17), dtype="bfloat16")]
    chosen += [OpCase("pointwise_eval", "", shape, dtype="bfloat16") for shape in (big, (64, 256, 32, 32))]
    for case in chosen:
        forced = [gemm for gemm in peers.gemms_of(case, torch.cuda.get_device_capability()) if gemm != "torch"]
        for name in [f"ours cuda {gemm}" for gemm in forced] or ["ours cuda"]:
            call = _prepared(case, name, device)
            call()
            torch.cuda.profiler.start()
            with torch.cuda.nvtx.range(f"{case.name} {name}"):
                call()
            torch.cuda.profiler.stop()
        torch.cuda.empty_cache()

# SPDX-License-Identifier: MIT
"""Two ways to time: on a CPU call by call in turn, so that all see the same noise; on a GPU as one CUDA graph each.

Times of calls are seconds here, and milliseconds in every JSON file.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar("Result")


class Timing(NamedTuple):
    """Seconds a call: the median, the 20 % and 80 % quantiles, and of how many calls (or replays of a graph)."""

    median: float
    low: float
    high: float
    repeats: int
    #: On a GPU, for the row: host_ms (Python and launches of a call), called_ms (a call that is waited for, not in a graph),
    #: graph_calls (calls in one graph; 0 if they were not captured) and not_captured (why).
    more: dict[str, object] = {}  # noqa: RUF012

    def fields(self) -> dict[str, object]:
        """As they stand in a row of JSON."""
        times = {"median_ms": 1e3 * self.median, "q20_ms": 1e3 * self.low, "q80_ms": 1e3 * self.high}
        return {**times, "repeats": self.repeats, **self.more}


def summarise(seconds: list[float]) -> Timing:
    """Median and 20 % / 80 % quantiles (linear interpolation) of at least one measurement."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    low, _, _, high = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds), low, high, len(seconds))


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a CUDA device between two events around it."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return 1e-3 * start.elapsed_time(stop)
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    device: torch.device,
    before_call: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Time `functions` in rounds: each round calls every one once, and every other round in reverse order.

    Args:
        functions: name and what to time.
        repeats: timed rounds, at least 1.
        warmup: rounds before them that are not timed.
        device: of the functions; a CUDA device is synchronised before and after each call.
        before_call: called with the name before each call, outside the timed part.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    # a collection in the middle of a call would be billed to that call
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_number in range(warmup + repeats):
            for name in names if round_number % 2 == 0 else reversed(names):
                if before_call is not None:
                    before_call(name)
                taken = elapsed(functions[name], device)
                if round_number >= warmup:
                    seconds[name].append(taken)
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(measured) for name, measured in seconds.items()}


#: A call that takes longer gets no graph: its launches do not count, and capturing would take the run's time.
_LONGEST_CAPTURED = 0.1
#: Enough calls in a graph that one replay takes so long.
_REPLAY = 400e-6


def graphed(call: Callable[[], object], *, seconds: float, repeats: int | None = None) -> Timing:
    """Time `call` on the current CUDA device as a CUDA graph, so that Python's pace is not measured; else by events.

    Args:
        seconds: of measuring, about.
        repeats: replays; None: as many as fit, 5 to 200.
    """
    warm_up(call)
    device = torch.device("cuda")
    estimate = min(elapsed(call, device) for _ in range(2))
    called = summarise([elapsed(call, device) for _ in range(_fit(seconds / 2, estimate, 5, 20))])
    more: dict[str, object] = {
        "host_ms": 1e3 * _host_seconds(call, _fit(seconds / 4, estimate, 1, 10)),
        "called_ms": 1e3 * called.median,
        "graph_calls": 0,
    }
    if called.median > _LONGEST_CAPTURED:
        return called._replace(more=more)
    inner = max(1, min(50, round(_REPLAY / estimate)))
    replay, reason = _graph_of(call, inner)
    if replay is None:
        return called._replace(more={**more, "not_captured": reason})
    replay()
    estimate = min(elapsed(replay, device) for _ in range(2))
    count = _fit(seconds, estimate, 5, 200) if repeats is None else repeats
    found = summarise([elapsed(replay, device) / inner for _ in range(count)])
    return found._replace(more={**more, "graph_calls": inner})


def warm_up(call: Callable[[], object]) -> None:
    """Three calls on a side stream: a backward can be captured only after them, and libraries make their workspaces."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)


def _fit(seconds: float, each: float, least: int, most: int) -> int:
    return int(max(least, min(most, seconds / each)))


def _host_seconds(call: Callable[[], object], calls: int) -> float:
    """Python and launches of one call, while the GPU still works on earlier calls."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / calls


def _graph_of(call: Callable[[], object], times: int) -> tuple[Callable[[], object] | None, str | None]:
    """`times` calls as one CUDA graph; or None and why they cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = [call() for _ in range(times)]
    except RuntimeError as error:
        torch.cuda.synchronize()
        return None, str(error).splitlines()[0][:200]
    del kept
    return graph.replay, None


@contextlib.contextmanager
def new_process(
    work: Callable[..., None], *arguments: object
) -> Iterator[tuple[multiprocessing.connection.Connection, multiprocessing.Process]]:
    """`work(pipe, *arguments)`, all picklable, in a new process that has done nothing before but import torch; it ends with the context.

    What an earlier computation leaves behind changes the times of a later one: glibc keeps the memory that a training step
    has freed, and hands it to an evaluation that would take page faults for every tensor in a process of its own.
    """
    # Forked from a process that has imported torch and never computed, so without its threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    here, there = context.Pipe()
    process = context.Process(target=_start, args=(there, work, arguments), daemon=True)
    process.start()
    there.close()
    try:
        yield here, process
    finally:
        process.terminate()
        process.join()


def in_new_process(work: Callable[..., Result], *arguments: object) -> Result:
    """`work(*arguments)`, computed in a new process.

    Raises:
        RuntimeError: the process ended without a result; it has printed why.
    """
    with new_process(_send, work, arguments) as (pipe, process):
        try:
            return pipe.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"a process that was timing ended with exit status {process.exitcode}") from None


def _start(pipe: multiprocessing.connection.Connection, work: Callable[..., None], arguments: tuple) -> None:
    # Control-C reaches this process too; the process that waits for the result ends it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    work(pipe, *arguments)


def _send(pipe: multiprocessing.connection.Connection, work: Callable[..., object], arguments: tuple) -> None:
    pipe.send(work(*arguments))

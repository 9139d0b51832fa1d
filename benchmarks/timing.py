# SPDX-License-Identifier: MIT
"""Timing several implementations call by call in one run, so that all of them see the same noise; in a new process."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar("Result")


class Timing(NamedTuple):
    """Seconds a call: the median, the 20 % and 80 % quantiles, and of how many calls."""

    median: float
    low: float
    high: float
    repeats: int


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
    on_call: Callable[[str], None] | None = None,
    before_call: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Time `functions` in rounds: each round calls every one once, and every other round in reverse order.

    Args:
        functions: name and what to time.
        repeats: timed rounds, at least 1.
        warmup: rounds before them that are not timed.
        device: where they run; a CUDA device is synchronised before and after each call.
        on_call: told the name after each call, outside the timed part.
        before_call: told it before, outside too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    # A collection in the middle of a call would be billed to whoever happens to run.
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
                if on_call is not None:
                    on_call(name)
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(measured) for name, measured in seconds.items()}


def in_new_process(
    work: Callable[..., Result], *arguments: object, on_call: Callable[[str], None] | None = None
) -> Result:
    """`work(*arguments, on_call=...)`, computed in a new process that has done nothing before but import torch.

    What an earlier computation leaves behind changes the times of a later one: glibc keeps the memory that a training step
    has freed, and hands it to an evaluation that would take page faults for every tensor in a process of its own.

    Args:
        work: a function of a module's top level; it and `arguments` and its result must be picklable.
        on_call: told here what `work` tells its own.

    Raises:
        RuntimeError: the one that `work` raised (NotImplementedError is one), or the process ended without a result.
    """
    # Forked from a process that has imported torch and never computed, so without its threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            kind, value = receiver.recv()
            if kind == "result":
                return value
            if kind == "error":
                raise value
            if on_call is not None:
                on_call(value)
    except EOFError:
        process.join()
        raise RuntimeError(f"a process that was timing ended with exit status {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()
        receiver.close()


def _send(sender: multiprocessing.connection.Connection, work: Callable[..., object], arguments: tuple) -> None:
    # Control-C reaches this process too; whoever waits for the result ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        message = ("result", work(*arguments, on_call=lambda name: sender.send(("call", name))))
    except RuntimeError as error:  # torch's and the backends'; any other ends this process with its traceback
        message = ("error", error)
    sender.send(message)

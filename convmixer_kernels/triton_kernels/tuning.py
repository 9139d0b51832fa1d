# SPDX-License-Identifier: MIT
"""Picks a kernel's configuration: measured once on each kind of GPU and kept on disk; an import measures nothing.

The first call of a kernel with a new key runs every configuration of its list (config.py) on the call's own tensors and keeps the
fastest. Keys hold what changes the answer (kernel, dtype, layout, channels, image and kernel size), not the batch.
Results lie in $CONVMIXER_TRITON_CACHE, default $XDG_CACHE_HOME/convmixer-kernels (~/.cache), one JSON file for each GPU and version
of Triton. CONVMIXER_TRITON_AUTOTUNE=0 takes the first configuration of each list, as do torch.use_deterministic_algorithms
(a sum's last bits depend on the configuration), CUDA graph capture and the interpreter.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

from . import config
from .common import INTERPRETED
from .config import Config

logger = logging.getLogger("convmixer_kernels")
T = TypeVar("T")
_WARM_UP, _REPEATS = 2, 9
_SWITCH = "CONVMIXER_TRITON_AUTOTUNE"
#: What this process knows: (device, kernel, key) -> configuration.
_chosen: dict[tuple, Config] = {}


def enabled() -> bool:
    """Whether measured configurations are used; unknown ones are measured, except while a CUDA graph is captured."""
    return not INTERPRETED.value and _switched_on() and not torch.are_deterministic_algorithms_enabled()


def _switched_on() -> bool:
    value = os.environ.get(_SWITCH, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{_SWITCH} must be 0 or 1, got {value!r}")
    return value != "0"


@functools.cache
def generation(device: int) -> str:
    """The column of config.py's lists for this device."""
    if INTERPRETED.value:
        return "sm_90"
    if torch.version.hip is not None:
        return "small"
    return config.generation(*torch.cuda.get_device_capability(device))


@functools.cache
def processors(device: int) -> int:
    """Multiprocessors of the device; few in the interpreter, so that sums still have several parts."""
    return 4 if INTERPRETED.value else torch.cuda.get_device_properties(device).multi_processor_count


def split(programs: int, blocks: int, device: int, most: int | None = None) -> tuple[int, int]:
    """Parts of a reduction over `blocks`, `most` at most, and blocks a part, so that programs * parts fill the device several times."""
    parts = min(blocks, max(1, -(-8 * processors(device) // programs)))
    parts = parts if most is None else min(parts, most)
    per_part = -(-blocks // parts)
    return -(-blocks // per_part), per_part


def run(
    kernel: str,
    key: tuple,
    device: int,
    call: Callable[[Config], T],
    last: Callable[[Config], T] | None = None,
) -> T:
    """call(configuration) with the best known configuration of `kernel` for `key`.

    `call` must be repeatable: it is what is measured. `last`, if it is given, runs in the place of the last call, once.
    """
    last = call if last is None else last
    candidates = config.candidates(kernel, generation(device))
    if not enabled() or len(candidates) == 1:
        return _first_that_fits(candidates, last)
    place = (device, kernel, key)
    known = _chosen.get(place)
    if known is None:
        known = _read(device, kernel, key)
        if known not in candidates:
            if torch.cuda.is_current_stream_capturing():
                return _first_that_fits(candidates, last)
            known = _measure(kernel, key, candidates, call)
            if known is None:
                return _first_that_fits(candidates, last)
            _write(device, kernel, key, known)
        _chosen[place] = known
    return last(known)


def _first_that_fits(candidates: list[Config], call: Callable[[Config], T]) -> T:
    """Each list ends with a configuration that fits everywhere: a GPU with less shared memory than its generation's takes a later one."""
    for candidate in candidates[:-1]:
        with contextlib.suppress(OutOfResources):
            return call(candidate)
    return call(candidates[-1])


def _measure(kernel: str, key: tuple, candidates: list[Config], call: Callable[[Config], T]) -> Config | None:
    """The fastest configuration, None if none fits."""
    times: list[float] = []
    for candidate in candidates:
        try:
            times.append(_milliseconds(lambda c=candidate: call(c)))
        except OutOfResources:
            times.append(float("inf"))
    if min(times) == float("inf"):
        return None
    best = candidates[times.index(min(times))]
    shown = ", ".join(f"{t:.4f}" for t in times)
    logger.debug("triton %s %s: %s ms, taken: %s", kernel, key, shown, best)
    return best


def _milliseconds(call: Callable[[], object]) -> float:
    for _ in range(_WARM_UP):
        call()
    times = []
    for _ in range(_REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def cache_file(device: int) -> Path:
    """Where the results for this device's kind of GPU lie.

    Raises:
        OSError: nowhere: the user has no home.
    """
    directory = os.environ.get("CONVMIXER_TRITON_CACHE")
    if not directory:
        base = os.environ.get("XDG_CACHE_HOME")
        try:
            directory = (Path(base) if base else Path.home() / ".cache") / "convmixer-kernels"
        except RuntimeError as error:
            raise OSError(str(error)) from error
    name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device).lower())
    return Path(directory) / f"triton-{triton.__version__}-{name}.json"


def _entry(kernel: str, key: tuple) -> str:
    return " ".join(map(str, (kernel, *key)))


def _load(device: int) -> dict[str, Config]:
    try:
        path = cache_file(device)
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        # absent, or cut off by a full disk: it is measured again
        return {}
    return found if isinstance(found, dict) else {}


def _read(device: int, kernel: str, key: tuple) -> Config | None:
    return _load(device).get(_entry(kernel, key))


def _write(device: int, kernel: str, key: tuple, best: Config) -> None:
    """Adds one entry to the file, whole or not at all; several processes may write."""
    try:
        path = cache_file(device)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _load(device) | {_entry(kernel, key): best}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
            os.replace(partial, path)
    except OSError as error:
        logger.debug("triton: the tuning cache cannot be written: %s", error)

# SPDX-License-Identifier: MIT
"""Memory of one forward and of one training step, on a CPU and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

#: Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def saved_bytes(forward: Callable[[], Tensor], own: Sequence[Tensor] = ()) -> int:
    """Bytes of the storages that autograd keeps for the backward of one forward, each counted once, without those of `own`."""
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = forward()
    # tensors that a Function keeps as attributes, as torch.compile's does, pass no hook
    nodes, seen = [output.grad_fn], set()
    while nodes:
        if (node := nodes.pop()) is None or node in seen:
            continue
        seen.add(node)
        nodes += [each for each, _ in node.next_functions]
        for value in getattr(node, "__dict__", {}).values():
            for each in value if isinstance(value, list | tuple) else (value,):
                if isinstance(each, Tensor):
                    keep(each)
    return sum(kept[address] for address in kept.keys() - {t.untyped_storage().data_ptr() for t in own})


@contextlib.contextmanager
def unfragmented() -> Iterator[None]:
    """Large tensors get pages of their own from glibc and give them back, so that peak_bytes finds the same each time.

    By itself glibc keeps freed memory in a heap, whose holes add up to 60 % to the peak of a step, another share in each process.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 18)
    try:
        yield
    finally:
        # where glibc's own adjustment ends
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 64 << 20)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """By how much `call` raises the memory that torch has allocated on a GPU, or the resident memory of this process, at most.

    Raises:
        OSError: on a CPU, the system is not Linux.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # 5 sets the peak, VmHWM, to what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])

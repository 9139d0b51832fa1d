# SPDX-License-Identifier: MIT
"""How a row is made, for every command and every device: inputs, implementations, check, times, floor."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import check, machine, models, peers, roofline, timing
from benchmarks.cases import DTYPES, LAYOUTS, Case, ModelCase
from benchmarks.ops import make_inputs
from benchmarks.peers import Prepared, Workload, first_line
from convmixer_kernels.backends import triton

Row = dict[str, object]
#: Times ready implementations, by name.
Clock = Callable[[Mapping[str, Prepared]], Mapping[str, timing.Timing]]

#: Of timing one implementation on a GPU.
GPU_SECONDS = 0.2
_MOST_INPUTS = 64


def measure(
    workload: Workload,
    names: Sequence[str],
    clock: Clock | None,
    peaks: machine.Peaks | None,
    compile_all: bool = False,
    expected: check.Expected | None = None,
) -> Row:
    """A row: each implementation checked, and timed if it is right (or is not ours). One that fails is wrong, or a peer's dash.

    Args:
        clock: times the implementations; None: they are only checked.
        peaks: of this machine, for the floor; None: no floor.
        compile_all: run torch.compile even if the case has no mark for it.
        expected: the result of check.expect(workload), if it is known.
    """
    floor = {} if peaks is None else roofline.floor(workload.case, workload.device.type, peaks)
    expected = check.expect(workload) if expected is None else expected
    timed: dict[str, Prepared] = {}
    implementations, absent, wrong = {}, {}, []
    for name in names:
        try:
            prepared, verdict = verify(name, workload, expected, compile_all)
        except peers.Absent as reason:
            absent[name] = str(reason)
        except _failures() as error:
            if name.startswith("ours"):
                wrong.append({"implementation": name, "failure": first_line(error)})
            else:
                # an engine refuses it, no memory
                absent[name] = f"failed: {first_line(error)}"
        else:
            bad = [each for each in verdict if not each.passed]
            if bad and name.startswith("ours"):
                # a speed is never shown for a wrong result
                wrong += [{"implementation": name, **each._asdict()} for each in bad]
            else:
                timed[name], implementations[name] = prepared, _check_fields(verdict)
    if clock:
        for name, found in clock(timed).items():
            percent = {"percent_of_floor": 0.1 * floor["floor_ms"] / found.median} if floor else {}
            implementations[name] |= {**found.fields(), **percent}
    results = {"implementations": implementations, "absent": absent, "wrong": wrong}
    return {**case_fields(workload.case), **floor, **results}


def verify(
    name: str, workload: Workload, expected: check.Expected, compile_all: bool = False
) -> tuple[Prepared, list[check.Comparison]]:
    """An implementation, and its results against float64, beside eager PyTorch's in the case's layout.

    Raises:
        Absent: it cannot run this case, or is not asked to.
        RuntimeError: it failed; Triton's errors are no RuntimeError.
    """
    prepared = peers.prepare(name, workload, compile_all)
    if name in peers.BOUNDS:
        return prepared, []
    if name == peers.EAGER[workload.case.layout]:
        found = expected.eager
    else:
        found = check.results(workload, prepared, len(expected.exact), expected.kept)
    return prepared, check.judge(workload, expected, found, complete=name.startswith("ours"))


def _failures() -> tuple[type[Exception], ...]:
    if not triton.build_info()["available"]:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def case_fields(case: Case) -> Row:
    fields = {"case": case.name, "op": case.op, "family": case.family, "dtype": case.dtype, "layout": case.layout}
    if isinstance(case, ModelCase):
        return fields | {"model": case.model, "label": case.preset.label, "batch": case.batch}
    return fields | {"shape": list(case.shape), "channels_out": case.out, "kernel": case.kernel_name}


def make_workload(case: Case, device: torch.device, rotate: bool = True) -> Workload:
    """The inputs of a case: for an operator so many sets that together they exceed the cache twice, so that no call finds its own in it.

    Args:
        rotate: False for only as many sets as a check needs.
    """
    if isinstance(case, ModelCase):
        preset = case.preset
        size = (case.batch, 3, preset.image_size, preset.image_size)
        return model_workload(case, torch.randn(size, generator=torch.Generator().manual_seed(0)), device)
    n, c, h, w = case.shape
    size = n * (c + 2 * case.out) * h * w * DTYPES[case.dtype].itemsize
    count = check.pooled_inputs(case)
    if rotate:
        count = max(count, 2, min(_MOST_INPUTS, -(-2 * machine.last_level_cache(device) // size)))
    return Workload(case, device, make_inputs(case, device, count))


def model_workload(
    case: ModelCase,
    images: Tensor,  # (N, 3, H, W) float32, on the CPU
    device: torch.device,
) -> Workload:
    """Random weights; the loss is sum(output * cotangent)."""
    preset, dtype, layout = case.preset, DTYPES[case.dtype], LAYOUTS[case.layout]
    images = images.to(device)
    # made on the device: on a CPU the largest model alone takes a minute
    with device:
        reference = models.random_reference(preset, images if device.type == "cpu" else images[:8])
    reference = reference.to(device, dtype).to(memory_format=layout)
    cotangent = torch.randn(case.batch, preset.n_classes, generator=torch.Generator().manual_seed(1))
    images = images.to(dtype).to(memory_format=layout)
    return Workload(case, device, [], reference, images, cotangent.to(device, dtype))


def _check_fields(comparisons: list[check.Comparison]) -> Row:
    if not comparisons:
        return {}
    nearest, passed = comparisons[0]._asdict(), all(each.passed for each in comparisons)
    return nearest | {"passed": passed, "tensors_checked": len(comparisons), "nearest_to_limit": nearest.pop("tensor")}


def clock_of(device: torch.device, seconds: float, repeats: int | None) -> Clock:
    """The clock of a device: `seconds` is of all implementations together on a CPU, of each on a GPU."""
    return lambda ready: (_graphs if device.type == "cuda" else _interleaved)(ready, device, seconds, repeats)


def _graphs(
    ready: Mapping[str, Prepared], device: torch.device, seconds: float, repeats: int | None
) -> dict[str, timing.Timing]:
    found = {}
    for name, prepared in ready.items():
        with prepared.setting():
            found[name] = timing.graphed(_rotating(prepared), seconds=seconds, repeats=repeats)
    return found


def _rotating(prepared: Prepared) -> Callable[[], object]:
    """A call on the next set of inputs each time."""
    calls = itertools.cycle(prepared.calls)
    return lambda: next(calls)()


def rotating(prepared: Prepared, device: torch.device) -> Callable[[], None]:
    """As a program calls it that waits for each result: with the settings, and on a GPU until the work is done."""
    following = _rotating(prepared)

    def call() -> None:
        with prepared.setting():
            following()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def _interleaved(
    ready: Mapping[str, Prepared], device: torch.device, seconds: float, repeats: int | None
) -> dict[str, timing.Timing]:
    """In as many rounds as fit into `seconds`, between 5 and 101, or in `repeats` rounds."""
    functions = {name: rotating(prepared, device) for name, prepared in ready.items()}
    settle = _Settle({name for name, prepared in ready.items() if prepared.own_threads})
    for function in functions.values():
        function()
    if repeats is None:
        start = time.perf_counter()
        timing.interleaved(functions, repeats=1, warmup=0, device=device, before_call=settle)
        repeats = max(5, min(101, int(seconds / (time.perf_counter() - start))))
    return timing.interleaved(functions, repeats=repeats, warmup=0, device=device, before_call=settle)


class _Settle:
    """Between two calls: each library finds the cores free and its threads as its own previous call would leave them.

    After a call OpenMP's threads go on spinning for some milliseconds, in the way of another library's pool. Then they sleep, and the
    next call through torch has to wake them.
    """

    def __init__(self, own_pools: set[str]) -> None:
        self._own_pools, self._foreign = own_pools, False
        self._scratch = torch.zeros(1 << 18)

    def __call__(self, name: str) -> None:
        if name in self._own_pools:
            time.sleep(0.01)
        elif self._foreign:
            time.sleep(0.002)
            self._scratch.add_(1)
        self._foreign = name in self._own_pools

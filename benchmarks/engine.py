# SPDX-License-Identifier: MIT
"""How a row is made, for every command and every device: inputs, implementations, check, times, floor."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import check, console, machine, models, peers, roofline, timing
from benchmarks.cases import DTYPES, LAYOUTS, Case, ModelCase
from benchmarks.ops import make_inputs
from benchmarks.peers import Prepared, Workload

Row = dict[str, object]
#: Times ready implementations, by name.
Clock = Callable[[Mapping[str, Prepared]], Mapping[str, timing.Timing]]

#: Of timing one implementation on a GPU.
GPU_SECONDS = 0.2
_REPEATS = (5, 101)
_MOST_INPUTS = 64


def measure(
    workload: Workload,
    names: Sequence[str],
    clock: Clock | None,
    peaks: machine.Peaks | None,
    compile_all: bool = False,
    expected: check.Expected | None = None,
) -> Row:
    """A row: each implementation checked, and timed if it is right (or is not ours).

    Args:
        clock: times the implementations; None: they are only checked.
        peaks: of this machine, for the floor; None: no floor.
        compile_all: run torch.compile even if the case has no mark for it.
        expected: the result of check.expect(workload), if it is known.

    Raises:
        RuntimeError: ours or eager PyTorch in the case's layout failed. The row says so of any other.
    """
    ready, absent = prepare(workload, names, compile_all)
    expected = check.expect(workload) if expected is None else expected
    verdicts = verify(workload, expected, ready, absent)
    timed: dict[str, Prepared] = {}
    wrong = []
    for name, prepared in ready.items():
        bad = [each for each in verdicts.get(name, ()) if not each.passed]
        if bad and name.startswith("ours"):
            # a speed is never shown for a wrong result
            wrong += [{"implementation": name, **each._asdict()} for each in bad]
        elif name not in absent:
            timed[name] = prepared
    allocated = {name: _peak(prepared, workload.device) for name, prepared in timed.items()} if clock else {}
    timings = clock(timed) if clock else {}
    floor = None if peaks is None else roofline.floor(workload.case, workload.device.type, peaks)
    implementations = {}
    for name in timed:
        fields = _check_fields(verdicts.get(name))
        if name in timings:
            found = timings[name]
            percent = {} if floor is None else {"percent_of_floor": 100 * floor.seconds / found.median}
            fields = {**found.fields(), **percent, "peak_bytes": allocated[name], **fields}
        implementations[name] = fields
    return {
        **case_fields(workload.case),
        **({} if floor is None else floor.fields()),
        "sets": len(workload.inputs) or 1,
        "implementations": implementations,
        "absent": absent,
        "wrong": wrong,
    }


def case_fields(case: Case) -> Row:
    fields = {"case": case.name, "op": case.op, "family": case.family, "dtype": case.dtype, "layout": case.layout}
    if isinstance(case, ModelCase):
        return fields | {"model": case.model, "label": case.preset.label, "batch": case.batch}
    return fields | {"shape": list(case.shape), "channels_out": case.out, "kernel": case.kernel}


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
    checkpoint: Path | None = None,  # weights; None: random ones
) -> Workload:
    preset, dtype, layout = case.preset, DTYPES[case.dtype], LAYOUTS[case.layout]
    images = images.to(device)
    if checkpoint is not None:
        reference = models.checkpoint_reference(preset, checkpoint)
    else:
        # made on the device: on a CPU the largest model alone takes a minute
        with device:
            reference = models.random_reference(preset, images if device.type == "cpu" else images[:8])
    reference = reference.to(device, dtype).to(memory_format=layout)
    cotangent = torch.randn(case.batch, preset.n_classes, generator=torch.Generator().manual_seed(1))
    images = images.to(dtype).to(memory_format=layout)
    return Workload(case, device, [], reference, images, cotangent.to(device, dtype))


def prepare(workload: Workload, names: Sequence[str], compile_all: bool) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Those of `names` that can run a case, and why the others cannot."""
    ready, absent = {}, {}
    for name in names:
        try:
            ready[name] = peers.prepare(name, workload, compile_all)
        except peers.Absent as reason:
            absent[name] = str(reason)
        except RuntimeError as error:
            # if a peer cannot take a case (an engine refuses it, no memory), it gets a dash; ours and the baseline must run
            if name.startswith("ours") or name == peers.EAGER[workload.case.layout]:
                raise
            absent[name] = f"failed: {console.first_line(error)}"
    return ready, absent


def verify(
    workload: Workload, expected: check.Expected, ready: Mapping[str, Prepared], absent: dict[str, str]
) -> dict[str, list[check.Comparison]]:
    """Every implementation's results against float64, beside eager PyTorch's in the case's layout.

    Args:
        absent: a peer that fails at its first call is added, with the reason.
    """
    verdicts = {}
    for name, prepared in ready.items():
        if name in peers.BOUNDS:
            continue
        try:
            if name == peers.EAGER[workload.case.layout]:
                found = expected.eager
            else:
                found = check.results(workload, prepared, len(expected.exact), expected.kept)
        except RuntimeError as error:
            if name.startswith("ours"):
                raise
            absent[name] = f"failed: {console.first_line(error)}"
            continue
        verdicts[name] = check.judge(workload, expected, found, complete=name.startswith("ours"))
    return verdicts


def _check_fields(comparisons: list[check.Comparison] | None) -> Row:
    if not comparisons:
        return {}
    nearest = comparisons[0]
    return {
        "passed": all(each.passed for each in comparisons),
        "tensors_checked": len(comparisons),
        "nearest_to_limit": nearest.tensor,
        "error": nearest.error,
        "eager_error": nearest.eager_error,
        "allowed": nearest.allowed,
    }


def _peak(prepared: Prepared, device: torch.device) -> int | None:
    if not prepared.torch_memory:
        return None
    with prepared.setting():
        return machine.peak_bytes(prepared.calls[0], device)


def clock_of(device: torch.device, seconds: float, repeats: int | None) -> Clock:
    """The clock of a device: `seconds` is of all implementations together on a CPU, of each on a GPU."""
    if device.type == "cuda":

        def graphs(ready: Mapping[str, Prepared]) -> dict[str, timing.Timing]:
            found = {}
            for name, prepared in ready.items():
                with prepared.setting():
                    found[name] = timing.graphed(_rotating(prepared), seconds=seconds, repeats=repeats)
            return found

        return graphs
    return lambda ready: _interleaved(ready, device, seconds, repeats)


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
    functions = {
        name: _rotating(prepared) if prepared.setting is Prepared.setting else rotating(prepared, device)
        for name, prepared in ready.items()
    }
    settle = _Settle({name for name, prepared in ready.items() if not prepared.torch_memory})
    for function in functions.values():
        function()
    if repeats is None:
        start = time.perf_counter()
        timing.interleaved(functions, repeats=1, warmup=0, device=device, before_call=settle)
        least, most = _REPEATS
        repeats = max(least, min(most, int(seconds / (time.perf_counter() - start))))
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
        if not self._own_pools:
            return
        if name in self._own_pools:
            time.sleep(0.01)
        elif self._foreign:
            time.sleep(0.002)
            self._scratch.add_(1)
        self._foreign = name in self._own_pools

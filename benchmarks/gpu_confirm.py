# SPDX-License-Identifier: MIT
"""What a whole model does on a GPU, beside how fast its kernels are: `python -m benchmarks.gpu --only confirm`.

Bitwise determinism, no host synchronisation, CUDA graphs of a forward pass and of a training step with its optimizer,
torch.compile(mode="reduce-overhead"), peak memory of a training step beside eager PyTorch, and 500 steps of training beside
eager PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cases, check
from benchmarks.models import ours_like, random_reference

SMALL, LARGE = "256/8@32", "1536/20@224"
_BATCH, _LARGE_BATCH = 64, 64
_RUNS, _REPLAYS, _STEPS = 20, 3, 500
#: Images of a class of the training task are its pattern times this, plus normal noise.
_PATTERN = 0.25


def outcome(name: str) -> dict[str, object]:
    """What a confirmation found; an error is a finding too, that the others need not share."""
    try:
        return CONFIRMATIONS[name]()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}".splitlines()[0][:500]}


def _pair(
    name: str, batch: int, dtype: torch.dtype, device: str
) -> tuple[nn.Sequential, nn.Sequential, Tensor, Tensor]:
    """The reference and ours with the same random weights, images and labels."""
    preset = cases.PRESETS[name]
    generator = torch.Generator(device).manual_seed(0)
    size = (batch, 3, preset.image_size, preset.image_size)
    images = torch.randn(size, device=device, generator=generator)
    labels = torch.randint(preset.n_classes, (batch,), device=device, generator=generator)
    with torch.device(device):
        reference = random_reference(preset, images).to(dtype=dtype)
    return reference, ours_like(preset, reference), images.to(dtype), labels


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of one training step, after its backward."""
    loss = F.cross_entropy(model(images).float(), labels)
    loss.backward()
    return loss.detach()


@contextlib.contextmanager
def _deterministic() -> Iterator[list[str]]:
    """torch's own deterministic algorithms around ours; the list names torch's operations that have none."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    missing: list[str] = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield missing
        missing += sorted({str(each.message)[:100] for each in caught if "deterministic" in str(each.message)})
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _unequal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the tensors whose bits differ."""
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def determinism(device: str = "cuda", runs: int = _RUNS) -> dict[str, object]:
    """`runs` training steps from the same state: outputs, gradients and running statistics with the same bits."""
    _, ours, images, labels = _pair(SMALL, _BATCH, torch.bfloat16, device)
    cotangent = F.one_hot(labels, cases.PRESETS[SMALL].n_classes).to(images.dtype)
    start = _state(ours)
    unequal: set[str] = set()
    with _deterministic() as missing:
        for number in range(runs):
            ours.load_state_dict(start)
            found = check.training_step(ours, images, cotangent)
            if number == 0:
                expected = found
            unequal |= set(_unequal(found, expected))
    return {"ok": not unequal, "runs": runs, "unequal": sorted(unequal), "nondeterministic_in_torch": missing}


def host_synchronisation() -> dict[str, object]:
    """No call in a forward pass or a training step waits for the GPU, by the profiler's trace and torch's own guard."""
    _, ours, images, labels = _pair(SMALL, _BATCH, torch.bfloat16, "cuda")

    def evaluate() -> None:
        with torch.no_grad():
            ours.eval()(images)

    def train() -> None:
        _step(ours.train(), images, labels)

    found: dict[str, object] = {}
    for name, call in (("eval", evaluate), ("train", train)):
        for _ in range(3):
            call()
        found[name] = waiting_calls(call)
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # a trace in which a call that does wait is not seen would show nothing
    found["control"] = waiting_calls(lambda: images.sum().item())
    return {"ok": not found["eval"] and not found["train"] and bool(found["control"]), **found}


def waiting_calls(call: Callable[[], object]) -> list[str]:
    """Names of the CUDA calls during call() that make the host wait for the device."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler, torch.profiler.record_function(_MEASURED):
        call()
    return waiting_among(profiler.events())


_MEASURED = "convmixer_kernels.measured"


def waiting_among(events: Iterable[object]) -> list[str]:
    """Of a profiler's events, the names of those within the measured range that make the host wait."""
    events = list(events)
    (measured,) = (
        event.time_range
        for event in events
        if event.name == _MEASURED and event.device_type == torch.autograd.DeviceType.CPU
    )
    waiting = re.compile(r"(cuda|cu|hip)\w*(Synchronize\w*|Malloc|Free|Memcpy(?!\w*Async)\w*)$")
    inside = (event for event in events if measured.start <= event.time_range.start <= measured.end)
    return sorted(event.name for event in inside if waiting.match(event.name))


def forward_graph() -> dict[str, object]:
    """A whole forward pass as one CUDA graph has the bits of the calls, for images it was not captured with."""
    _, ours, images, _ = _pair(SMALL, _BATCH, torch.bfloat16, "cuda")
    ours.eval()
    with _deterministic() as missing, torch.no_grad():
        graph, static = torch.cuda.CUDAGraph(), images.clone()
        _warm_up(lambda: ours(static))
        with torch.cuda.graph(graph):
            output = ours(static)
        unequal = 0
        for _ in range(_REPLAYS):
            static.copy_(torch.randn_like(static))
            graph.replay()
            unequal += not torch.equal(output, ours(static))
    return {"ok": unequal == 0, "replays": _REPLAYS, "unequal": unequal, "nondeterministic_in_torch": missing}


def training_graph() -> dict[str, object]:
    """A whole training step with its optimizer as one CUDA graph leaves the parameters and statistics of the calls."""
    _, called, images, labels = _pair(SMALL, _BATCH, torch.bfloat16, "cuda")
    replayed = copy.deepcopy(called)
    batches = [(torch.randn_like(images), labels.roll(i)) for i in range(_REPLAYS)]
    with _deterministic() as missing:
        optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for model in (called, replayed)]
        start, static_images, static_labels = _state(replayed), images.clone(), labels.clone()

        def step() -> None:
            optimizers[1].zero_grad(set_to_none=True)
            _step(replayed, static_images, static_labels)
            optimizers[1].step()

        _warm_up(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        # capturing computes nothing, warming up did
        replayed.load_state_dict(start)
        for state in optimizers[1].state.values():
            state["momentum_buffer"].zero_()
        for new_images, new_labels in batches:
            static_images.copy_(new_images)
            static_labels.copy_(new_labels)
            graph.replay()
            optimizers[0].zero_grad(set_to_none=True)
            _step(called, new_images, new_labels)
            optimizers[0].step()
        unequal = _unequal(_state(replayed), _state(called))
    return {"ok": not unequal, "replays": _REPLAYS, "unequal": unequal, "nondeterministic_in_torch": missing}


def _warm_up(call: Callable[[], object]) -> None:
    """Three calls on a side stream, as capturing asks for: libraries make their handles and workspaces."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)


def _evaluate(model: nn.Module, images: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    return check.evaluate(model, images)


def reduce_overhead() -> dict[str, object]:
    """torch.compile(mode="reduce-overhead") captures everything, and its results are right by the package's rule."""
    from torch._dynamo.utils import counters

    reference, ours, images, labels = _pair(SMALL, _BATCH, torch.bfloat16, "cuda")
    cotangent = F.one_hot(labels, cases.PRESETS[SMALL].n_classes).to(images.dtype)
    exact = copy.deepcopy(reference).double()
    counters.clear()
    compiled = torch.compile(ours, mode="reduce-overhead")
    wrong: list[str] = []
    for measured in (_evaluate, check.training_step):
        state = _state(ours)
        for _ in range(3):  # the first calls compile, warm up and record
            ours.load_state_dict(state)
            torch.compiler.cudagraph_mark_step_begin()
            found = measured(compiled, images, cotangent)
        # the compiled module's names have a prefix, and the next replay overwrites its output
        found = {name.replace("_orig_mod.", ""): tensor.clone() for name, tensor in found.items()}
        truth = measured(exact, images.double(), cotangent.double())
        theirs = measured(reference, images, cotangent)
        compared = check.compare(truth, theirs, found, torch.bfloat16)
        wrong += [f"{measured.__name__.strip('_')}: {each.tensor}" for each in compared if not each.passed]
    skips = counters["inductor"]["cudagraph_skips"]
    return {"ok": not wrong and skips == 0, "cudagraph_skips": skips, "wrong": wrong}


def training_memory() -> dict[str, object]:
    """Peak memory of a training step of the largest model beside eager PyTorch's, parameters and gradients included."""
    reference, ours, images, labels = _pair(LARGE, _LARGE_BATCH, torch.bfloat16, "cuda")
    found: dict[str, object] = {"case": LARGE, "batch": _LARGE_BATCH}
    for name, model in (("eager", reference), ("ours", ours)):
        model.train()
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            _step(model, images, labels)
        torch.cuda.synchronize()
        found[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated()
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    found["ratio"] = round(found["ours_peak_bytes"] / found["eager_peak_bytes"], 3)
    return {"ok": found["ratio"] < 1, **found}


def training_curve(device: str = "cuda", steps: int = _STEPS, batch: int = _BATCH) -> dict[str, object]:
    """`steps` steps of AdamW under autocast from the same weights: our loss stays as near to eager PyTorch's as eager's other layout does.

    Two computations that round differently part after some steps. So the mean distance of our loss from eager's may be at most twice
    the distance between eager PyTorch's two memory formats.
    """
    reference, ours, _, _ = _pair(SMALL, batch, torch.float32, device)
    models = {"eager": reference, "ours": ours}
    models["eager channels_last"] = copy.deepcopy(reference).to(memory_format=torch.channels_last)
    curves = {name: _train(model, name, device, steps, batch) for name, model in models.items()}
    distance, allowed = (
        sum(abs(a - b) for a, b in zip(curves["eager"], curves[name], strict=True)) / steps
        for name in ("ours", "eager channels_last")
    )
    tenth = max(1, steps // 10)
    start, end = (sum(part) / tenth for part in (curves["ours"][:tenth], curves["ours"][-tenth:]))
    return {
        "ok": distance <= 2 * allowed and end < start,
        "mean_distance": distance,
        "mean_distance_of_eager_layouts": allowed,
        "first_tenth": start,
        "last_tenth": end,
        "curves": {name: [round(loss, 6) for loss in curve] for name, curve in curves.items()},
    }


def _train(model: nn.Module, name: str, device: str, steps: int, batch: int) -> list[float]:
    """Losses of a task that can be learnt: a fixed pattern for each class, in noise."""
    preset = cases.PRESETS[SMALL]
    generator = torch.Generator(device).manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, 3, preset.image_size, preset.image_size, device=device, generator=generator)

    patterns = _PATTERN * normal(preset.n_classes)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(steps):
        labels = torch.randint(preset.n_classes, (batch,), device=device, generator=generator)
        images = patterns[labels] + normal(batch)
        if name == "eager channels_last":
            images = images.to(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            output = model.train()(images)
        loss = F.cross_entropy(output.float(), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


CONFIRMATIONS: dict[str, Callable[[], dict[str, object]]] = {
    confirmation.__name__: confirmation
    for confirmation in (
        determinism,
        host_synchronisation,
        forward_graph,
        training_graph,
        training_memory,
        training_curve,
        reduce_overhead,
    )
}

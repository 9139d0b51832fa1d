# SPDX-License-Identifier: MIT
"""What a whole model does on a GPU, beside how fast its kernels are: `python -m benchmarks.gpu --only confirm`.

Bitwise determinism, CUDA graphs of a forward pass and of a training step with its optimizer (a call that made the host wait for the
GPU could not be captured), torch.compile(mode="reduce-overhead"), peak memory of a training step beside eager PyTorch, and 500
steps of training beside eager PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cases, check, engine
from benchmarks.cases import ModelCase
from benchmarks.models import ours_like
from benchmarks.peers import Workload
from benchmarks.timing import warm_up

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


def _pair(name: str, batch: int, dtype: str, device: str) -> tuple[Workload, nn.Sequential]:
    """The reference with random weights, images and a cotangent; and ours with the same weights."""
    workload = engine.make_workload(ModelCase("model_step", name, batch, dtype), torch.device(device))
    return workload, ours_like(workload.reference)


def _step(model: nn.Module, images: Tensor, cotangent: Tensor) -> None:
    """Forward and backward of the loss sum(output * cotangent)."""
    model(images).backward(cotangent)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """torch's own deterministic algorithms around ours; torch warns of its operations that have none."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _unequal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the tensors whose bits differ."""
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def determinism(device: str = "cuda", runs: int = _RUNS) -> dict[str, object]:
    """`runs` training steps from the same state: outputs, gradients and running statistics with the same bits."""
    workload, ours = _pair(SMALL, _BATCH, "bfloat16", device)
    start, unequal, expected = _state(ours), set(), None
    with _deterministic():
        for _ in range(runs):
            ours.load_state_dict(start)
            found = check.training_step(ours, workload.images, workload.cotangent)
            expected = found if expected is None else expected
            unequal |= set(_unequal(found, expected))
    return {"ok": not unequal, "runs": runs, "unequal": sorted(unequal)}


def forward_graph() -> dict[str, object]:
    """A whole forward pass as one CUDA graph has the bits of the calls, for images it was not captured with."""
    workload, ours = _pair(SMALL, _BATCH, "bfloat16", "cuda")
    ours.eval()
    with _deterministic(), torch.no_grad():
        graph, static = torch.cuda.CUDAGraph(), workload.images.clone()
        warm_up(lambda: ours(static))
        with torch.cuda.graph(graph):
            output = ours(static)
        unequal = 0
        for _ in range(_REPLAYS):
            static.copy_(torch.randn_like(static))
            graph.replay()
            unequal += not torch.equal(output, ours(static))
    return {"ok": unequal == 0, "replays": _REPLAYS, "unequal": unequal}


def training_graph() -> dict[str, object]:
    """A whole training step with its optimizer as one CUDA graph leaves the parameters and statistics of the calls."""
    workload, called = _pair(SMALL, _BATCH, "bfloat16", "cuda")
    images, cotangent = workload.images, workload.cotangent
    replayed = copy.deepcopy(called.train())
    batches = [(torch.randn_like(images), torch.randn_like(cotangent)) for _ in range(_REPLAYS)]
    with _deterministic():
        optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for model in (called, replayed)]
        start, static = _state(replayed), (images.clone(), cotangent.clone())

        def step() -> None:
            optimizers[1].zero_grad(set_to_none=True)
            _step(replayed, *static)
            optimizers[1].step()

        warm_up(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        # capturing computes nothing, warming up did
        replayed.load_state_dict(start)
        for state in optimizers[1].state.values():
            state["momentum_buffer"].zero_()
        for batch in batches:
            for tensor, new in zip(static, batch, strict=True):
                tensor.copy_(new)
            graph.replay()
            optimizers[0].zero_grad(set_to_none=True)
            _step(called, *batch)
            optimizers[0].step()
        unequal = _unequal(_state(replayed), _state(called))
    return {"ok": not unequal, "replays": _REPLAYS, "unequal": unequal}


def reduce_overhead() -> dict[str, object]:
    """torch.compile(mode="reduce-overhead") captures everything, and its results are right by the package's rule."""
    from torch._dynamo.utils import counters

    workload, ours = _pair(SMALL, _BATCH, "bfloat16", "cuda")
    images, cotangent, exact = workload.images, workload.cotangent, copy.deepcopy(workload.reference).double()
    counters.clear()
    compiled = torch.compile(ours, mode="reduce-overhead")
    wrong: list[str] = []
    for measured in (lambda model, images, cotangent: check.evaluate(model, images), check.training_step):
        state = _state(ours)
        for _ in range(3):  # the first calls compile, warm up and record
            ours.load_state_dict(state)
            torch.compiler.cudagraph_mark_step_begin()
            found = measured(compiled, images, cotangent)
        # the compiled module's names have a prefix, and the next replay overwrites its output
        found = {name.replace("_orig_mod.", ""): tensor.clone() for name, tensor in found.items()}
        truth = measured(exact, images.double(), cotangent.double())
        compared = check.compare(truth, measured(workload.reference, images, cotangent), found, torch.bfloat16)
        wrong += [each.tensor for each in compared if not each.passed]
    skips = counters["inductor"]["cudagraph_skips"]
    return {"ok": not wrong and skips == 0, "cudagraph_skips": skips, "wrong": wrong}


def training_memory() -> dict[str, object]:
    """Peak memory of a training step of the largest model beside eager PyTorch's, parameters and gradients included."""
    workload, ours = _pair(LARGE, _LARGE_BATCH, "bfloat16", "cuda")
    found: dict[str, object] = {"case": LARGE, "batch": _LARGE_BATCH}
    for name, model in (("eager", workload.reference), ("ours", ours)):
        model.train()
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            _step(model, workload.images, workload.cotangent)
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
    workload, ours = _pair(SMALL, batch, "float32", device)
    models = {"eager": workload.reference, "ours": ours}
    models["eager channels_last"] = copy.deepcopy(workload.reference).to(memory_format=torch.channels_last)
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


_ALL = (determinism, forward_graph, training_graph, training_memory, training_curve, reduce_overhead)
CONFIRMATIONS: dict[str, Callable[[], dict[str, object]]] = {each.__name__: each for each in _ALL}

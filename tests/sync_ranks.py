# SPDX-License-Identifier: MIT
"""What each process of test_sync_batch_norm.py runs: `torchrun tests/sync_ranks.py FILE` saves this rank's results to FILE.<rank>.

A scenario gives each rank its rows of one batch, cut at CUTS, and counts the messages. The test holds the ranks' results together
against one process with all rows.
"""

from __future__ import annotations

import datetime
import sys
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
from helpers import BLOCK_TENSORS, Case, make_inputs, run
from model_helpers import DIM, cumulative_average, features, image, make_pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import convmixer_kernels as ck

BATCH = 5
#: Where the batch is cut, by the number of ranks: uneven, and the second of three ranks has no image.
CUTS = {2: (0, 2, 5), 3: (0, 2, 2, 5)}
SEEDS = range(2)
#: Numbers in a message of a norm of the model: two sums per channel, and the count.
MESSAGE = 2 * DIM + 1

_LAYER = ("mixer_layer", (BATCH, 64, 7, 6), (3, 3))
_NO_PARAMETERS = ("bias", "norm_weight", "norm_bias", "running_mean", "running_var")
#: Operators by the name of their scenario. A last word may be a backend; "cuda" is emulated.
CASES = {
    "depthwise": Case("depthwise_block", (BATCH, 64, 6, 5), (5, 5)),
    "depthwise even kernel": Case("depthwise_block", (BATCH, 64, 6, 5), (4, 2), residual=False, activation="relu"),
    "pointwise": Case("pointwise_block", (BATCH, 64, 5, 6), channels_out=72, activation="gelu_tanh"),
    "pointwise channels_last": Case("pointwise_block", (BATCH, 64, 5, 6), memory_format="channels_last"),
    "layer": Case(*_LAYER, channels_out=80),
    "layer channels_last": Case(*_LAYER, memory_format="channels_last"),
    "layer mixed": Case(*_LAYER, dtype=torch.bfloat16, parameter_dtype=torch.float32),
    "layer without parameters": Case(*_LAYER, absent=_NO_PARAMETERS),
    "layer reference": Case(*_LAYER),
    "layer cuda": Case("mixer_layer", (BATCH, 64, 4, 8), (3, 3)),
    # one value per channel and image
    "few values": Case("mixer_layer", (BATCH, 64, 1, 1), (3, 3)),
    # E[h^2] - E[h]^2 loses all of float32 here
    "far from zero": Case("depthwise_block", (BATCH, 64, 6, 5), (5, 5), activation="identity"),
}


def inputs(name: str, seed: int) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """x, the tensors and dy of the joined batch."""
    x, tensors, dy = make_inputs(CASES[name], seed)
    if name == "far from zero":
        tensors[1] = tensors[1] + 5000.0
    return x, tensors, dy


def loss_weights() -> Tensor:
    return torch.linspace(-1, 1, BATCH * 7).view(BATCH, 7)


def step(model: nn.Module, call: Callable[[Tensor], Tensor], rows: slice, dtype=torch.float32) -> dict[str, Tensor]:
    """Output, gradients and buffers after one training step on these rows."""
    x = image(BATCH).to(dtype)[rows].requires_grad_()
    y = call(x)
    (y * loss_weights()[rows].to(y.dtype)).sum().backward()
    results = {"output": y.detach(), "grad of x": x.grad}
    results |= {f"grad of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return results | {name: b.clone() for name, b in model.named_buffers()}


def checkpointed(model: nn.Sequential, use_reentrant: bool) -> Callable[[Tensor], Tensor]:
    """The model with each layer recomputed in the backward."""

    def call(x: Tensor) -> Tensor:
        x = model[:3](x)
        for layer in model[3:5]:
            x = checkpoint(layer, x, use_reentrant=use_reentrant)
        return model[5:](x)

    return call


def autocast(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    return call


def count_batches_alike(model: nn.Module) -> None:
    """momentum=None: the cumulative average of all batches."""
    for layer in model[3:5]:
        cumulative_average(layer)


def track_nothing(model: nn.Module) -> None:
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.track_running_stats, norm.num_batches_tracked = False, None
            norm.running_mean = norm.running_var = None


def freeze(model: nn.Sequential) -> None:
    """Only the classifier learns."""
    model[:-1].requires_grad_(False)


def blocks() -> nn.Sequential:
    """The package's blocks as modules."""
    torch.manual_seed(0)
    return nn.Sequential(ck.DepthwiseBlock(DIM, 5), ck.PointwiseBlock(DIM), ck.DepthwiseBlock(DIM, 3, residual=False))


def blocks_step(model: nn.Module, rows: slice, dtype=torch.float32) -> dict[str, Tensor]:
    x, dy = features(BATCH).to(dtype)[rows].requires_grad_(), features(BATCH).to(dtype).flip(0)[rows]
    y = model(x)
    y.backward(dy)
    results = {"output": y.detach(), "grad of x": x.grad}
    results |= {f"grad of {i}": p.grad for i, p in enumerate(model.parameters())}
    return results | {f"{name.split('.')[-1]} {i}": b for i, (name, b) in enumerate(model.named_buffers())}


class _Messages:
    """The sizes of the all-reduces that Python sends; those of DDP's and FSDP's gradients go another way."""

    def __enter__(self) -> list[int]:
        self.sizes, self.original = [], dist.all_reduce

        def counted(tensor: Tensor, *args, **kwargs):
            assert tensor.dtype == torch.float64
            self.sizes.append(tensor.numel())
            return self.original(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self.sizes

    def __exit__(self, *_) -> None:
        dist.all_reduce = self.original


def _rows() -> slice:
    cuts, rank = CUTS[dist.get_world_size()], dist.get_rank()
    return slice(cuts[rank], cuts[rank + 1])


def _operator(name: str) -> list[dict[str, Tensor]]:
    case, results = CASES[name], []
    options = {"training": True, "activation": case.activation, "process_group": dist.group.WORLD}
    if name.split()[-1] in ("reference", "cuda"):
        options["backend"] = name.split()[-1]
    if case.op == "depthwise_block":
        options["residual"] = case.residual

    def call(x: Tensor, tensors: list[Tensor | None]) -> Tensor:
        return getattr(ck, case.op)(x, *tensors, **options)

    for seed in SEEDS:
        x, tensors, dy = inputs(name, seed)
        with _Messages() as sizes:
            results.append(run(call, x[_rows()], tensors, dy[_rows()]))
        channels = [64] if case.op == "depthwise_block" else [case.channels_out or 64]
        channels = [64, *channels] if case.op == "mixer_layer" else channels
        assert sizes == [2 * c + 1 for c in (*channels, *reversed(channels))], sizes
    return results


def _first_layer() -> dict[str, Tensor]:
    """The parameters' gradients of a layer whose input needs none: the messages are the same."""
    x, tensors, dy = make_inputs(CASES["layer"])
    leaves = [t.requires_grad_(i % 6 < 4) for i, t in enumerate(tensors)]
    with _Messages() as sizes:
        ck.mixer_layer(x[_rows()], *leaves, training=True, process_group=dist.group.WORLD).backward(dy[_rows()])
    assert sizes == [129, 161, 161, 129], sizes
    names = [f"d{block}_{name}" for block in ("depthwise", "pointwise") for name in BLOCK_TENSORS]
    return {name: t.grad for name, t in zip(names, leaves, strict=True) if t.grad is not None}


def _blocks() -> dict[str, Tensor]:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(blocks())
    with _Messages() as sizes:
        results = blocks_step(model, _rows())
    assert sizes == [MESSAGE] * 6, sizes
    return results


def _model(**changes) -> nn.Sequential:
    return nn.SyncBatchNorm.convert_sync_batchnorm(make_pair(**changes)[0])


def _step(model: nn.Module, call: Callable[[Tensor], Tensor], messages: int) -> dict[str, Tensor]:
    with _Messages() as sizes:
        results = step(model, call, _rows())
    assert sizes == [MESSAGE] * messages, sizes
    return results


def _ddp() -> dict[str, Tensor]:
    model = make_pair()[0]
    ddp = nn.parallel.DistributedDataParallel(model)
    # on a CPU DDP refuses an nn.SyncBatchNorm, which it looks for above only
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return _step(model, ddp, 10)


def _fsdp() -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = _model(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model[3:5]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    results = _step(model, model, 10)
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in results.items()}


def _checkpointed() -> dict[str, Tensor]:
    model = _model()
    # the layers' forward runs twice
    return _step(model, checkpointed(model, False), 14)


def _checkpointed_reentrant() -> dict[str, Tensor]:
    model = _model()
    return _step(model, checkpointed(model, True), 14)


def _cumulative() -> dict[str, Tensor]:
    model = _model()
    count_batches_alike(model)
    return _step(model, model, 10)


def _untracked() -> dict[str, Tensor]:
    model = _model()
    track_nothing(model)
    results = _step(model, model, 10)
    with _Messages() as sizes:
        # the batch's statistics in evaluation too, but of this process alone
        results["alone"] = model.eval()(image(BATCH)).detach()
    assert not sizes
    return results


def _frozen() -> dict[str, Tensor]:
    model = _model()
    freeze(model)
    x = image(BATCH)[_rows()]
    with _Messages() as sizes:
        y = model(x)
        (y * loss_weights()[_rows()]).sum().backward()
    assert sizes == [MESSAGE] * 5, sizes
    return {"output": y.detach()} | dict(model.named_buffers())


def _no_grad() -> dict[str, Tensor]:
    model, x = _model(), image(BATCH)[_rows()]
    with torch.no_grad(), _Messages() as sizes:
        y = model(x)
        assert sizes == [MESSAGE] * 5, sizes
        model.eval()(x)
    assert len(sizes) == 5, sizes
    return {"output": y} | dict(model.named_buffers())


def _compiled() -> dict[str, Tensor]:
    model = _model(depth=1)
    return _step(model, torch.compile(model, backend="aot_eager"), 6)


def _autocast() -> dict[str, Tensor]:
    model = _model()
    return _step(model, autocast(model), 10)


def _subgroup() -> dict[str, Tensor]:
    """Two of three ranks share a batch; the third, which is not in their group, has all of it."""
    model = make_pair()[0]
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group=dist.new_group([0, 1]))
    x = image(BATCH)[slice(*((0, 2), (2, 5), (0, 5))[dist.get_rank()])]
    with _Messages() as sizes:
        y = model(x)
    assert sizes == [MESSAGE] * (0 if dist.get_rank() == 2 else 5), sizes
    return {"output": y.detach()} | dict(model.named_buffers())


def _all_empty() -> None:
    """No rank has an image: the counters count a batch, and nothing else moves."""
    model = _model()
    before = {name: b.clone() for name, b in model.named_buffers()}
    y = model(image(BATCH)[:0])
    y.sum().backward()
    assert y.shape == (0, 7)
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name] + 1 if name.endswith("tracked") else before[name]), name


def _refused() -> dict[str, str]:
    """The errors of what cannot be. Every rank raises, so that none waits for a message."""
    messages = {}

    def record(name: str, call: Callable[[], object]) -> None:
        messages[name] = "no error"
        try:
            call()
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"

    x, tensors, dy = make_inputs(Case("depthwise_block", (2, 4, 3, 3), (3, 3)))
    tensors[0].requires_grad_()

    def block(x: Tensor, *changed: Tensor, **options) -> Tensor:
        options = {"training": True, "process_group": dist.group.WORLD} | options
        return ck.depthwise_block(x, *(changed or tensors), **options)

    y, weight = block(x), tensors[0]
    record("create_graph", lambda: torch.autograd.grad(y, weight, dy, create_graph=True))
    record("is_grads_batched", lambda: torch.autograd.grad(y, weight, torch.stack([dy, dy]), is_grads_batched=True))
    record("torch.func.grad", lambda: torch.func.grad(lambda x: block(x).sum())(x))
    record("strided statistics", lambda: block(x, *tensors[:4], torch.zeros(8)[::2], torch.ones(8)[::2]))
    single = x[: 1 if dist.get_rank() == 0 else 0, :, :1, :1]
    record("one value", lambda: block(single))
    record("no group", lambda: block(x, process_group="gloo"))
    hooked = _model()
    hooked[3][2].register_forward_hook(lambda *_: None)
    record("a hook, on a CPU", lambda: hooked(image(BATCH)))
    with _Messages() as sizes:
        block(x, training=False)
    messages["evaluation"] = str(sizes)
    return messages


_ONLY_TWO = {
    "model fsdp": _fsdp,
    "model checkpointed": _checkpointed,
    "model checkpointed reentrant": _checkpointed_reentrant,
    "model cumulative": _cumulative,
    "model untracked": _untracked,
    "model frozen": _frozen,
    "model no_grad": _no_grad,
    "model compiled": _compiled,
    "model autocast": _autocast,
}
_ONLY_THREE = {"model subgroup": _subgroup, "all empty": _all_empty, "refused": _refused}


def scenarios(world: int) -> dict[str, Callable]:
    """What `world` ranks run: all that uneven batches can change, and the rest once."""
    operators = {name: _operator for name in CASES if world == 2 or name != "layer cuda"}
    return {
        **operators,
        "first layer": _first_layer,
        "blocks": _blocks,
        "model ddp": _ddp,
        **(_ONLY_TWO if world == 2 else _ONLY_THREE),
    }


def main(path: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    results = {}
    for name, scenario in scenarios(dist.get_world_size()).items():
        print(f"rank {dist.get_rank()}: {name}", flush=True)
        torch.manual_seed(0)
        try:
            results[name] = scenario(name) if scenario is _operator else scenario()
        except Exception:
            results[name] = traceback.format_exc()
            # the other ranks are at another message now
            break
    torch.save(results, f"{path}.{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

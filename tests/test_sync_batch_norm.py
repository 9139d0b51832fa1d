# SPDX-License-Identifier: MIT
"""nn.SyncBatchNorm and process_group=: several processes, started by torchrun, get what one process gets from their joined batch.

Truth is one process in float64; eager PyTorch's float32 error in one process gives the limit (twice-eager). tests/sync_ranks.py is
what the processes run.
"""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sync_ranks
import torch
import torch.distributed as dist
from emulation.build import build
from helpers import Case, assert_twice_eager, eager, make_inputs, run
from model_helpers import features, image, make_pair
from model_helpers import step as model_step
from torch import Tensor, nn

import convmixer_kernels as ck
from convmixer import accelerate
from convmixer.reference import Residual
from convmixer_kernels import distributed
from convmixer_kernels.backends import triton
from convmixer_kernels.primitives import Statistics

ROOT = Path(__file__).parent.parent
#: Seconds for all scenarios of one number of ranks, which take 10 to 30.
LIMIT = 300


def _launch(world: int, path: Path) -> list[dict]:
    """The results of each rank, from real processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    emulated = {"CONVMIXER_CUDA_EMULATION": str(build())} if world == 2 else {}
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    with open(path / "output", "w+") as output:
        process = subprocess.Popen(
            [*command, str(ROOT / "tests" / "sync_ranks.py"), str(path / "rank")],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **emulated},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            # torchrun ends its ranks; killed, it could not
            process.terminate()
            process.wait(60)
            code = f"none after {LIMIT} s"
        output.seek(0)
        lines = output.read().splitlines()
    results = [torch.load(f"{path}/rank.{rank}") for rank in range(world) if Path(f"{path}/rank.{rank}").exists()]
    errors = [error for result in results for error in result.values() if isinstance(error, str)]
    if code != 0 or len(results) != world:
        pytest.fail("\n".join([f"torchrun's exit status: {code}", *lines[-40:], *errors]))
    return results


def _joined(parts: list[Tensor], name: str, averaged: bool) -> Tensor:
    """One tensor of the joined batch out of the ranks': rows, gradients of parameters, or buffers."""
    if name in ("y", "dx", "output", "grad of x"):
        return torch.cat(parts)
    if "running" in name or "tracked" in name or averaged:
        for part in parts[1:]:
            assert torch.equal(part, parts[0]), f"{name}: the ranks differ"
        return parts[0] * len(parts) if averaged and name.startswith("grad") else parts[0]
    return torch.stack([part.double() for part in parts]).sum(0).to(parts[0].dtype)


def _check_operator(name: str, ranks: list[list[dict[str, Tensor]]]) -> None:
    case, pooled = sync_ranks.CASES[name], {}
    mixed = case.dtype if case.parameter_dtype else None
    for seed in sync_ranks.SEEDS:
        x, tensors, dy = sync_ranks.inputs(name, seed)
        wide = [None if t is None else t.double() for t in tensors]
        exact = run(lambda x, t: eager(case, x, t), x.double(), wide, dy.double())
        baseline = run(lambda x, t: eager(case, x, t), x, tensors, dy, mixed)
        results = [rank[seed] for rank in ranks]
        assert all(result.keys() == exact.keys() for result in results)
        rows = sync_ranks.CUTS[len(ranks)]
        for rank, (first, end) in enumerate(itertools.pairwise(rows)):
            # a rank's gradient is that of its own images, which DDP averages
            if (
                beta := results[rank].get(("dpointwise_" if case.op == "mixer_layer" else "d") + "norm_bias")
            ) is not None:
                own = [t[first:end].sum((0, 2, 3)) for t in (dy, dy.double())]
                pooled.setdefault(f"dnorm_bias of rank {rank}", []).append((beta, own[0].to(beta.dtype), own[1]))
        for key in exact:
            # batch norm removes a constant: the exact gradient of the bias is 0
            if case.activation != "identity" or "bias" not in key or "norm" in key:
                mine = _joined([result[key] for result in results], key, False)
                pooled.setdefault(key, []).append((mine, baseline[key], exact[key]))
    for key, triples in pooled.items():
        mine, baseline, exact = (torch.cat([t.flatten() for t in part]) for part in zip(*triples, strict=True))
        assert_twice_eager(f"{name}: {key}", mine, baseline, exact, case.dtype)


def _check_first_layer(ranks: list[dict[str, Tensor]]) -> None:
    case = sync_ranks.CASES["layer"]
    x, tensors, dy = make_inputs(case)
    exact = run(lambda x, t: eager(case, x, t), x.double(), [t.double() for t in tensors], dy.double())
    baseline = run(lambda x, t: eager(case, x, t), x, tensors, dy)
    assert len(ranks[0]) == 8
    for key in ranks[0]:
        assert_twice_eager(key, _joined([rank[key] for rank in ranks], key, False), baseline[key], exact[key])


def _check_blocks(ranks: list[dict[str, Tensor]]) -> None:
    modules = []
    for block in sync_ranks.blocks():
        block.conv.__class__ = nn.Conv2d
        alone = nn.Sequential(block.conv, block.act, block.norm)
        modules.append(Residual(alone) if getattr(block, "residual", False) else alone)
    reference = nn.Sequential(*modules)
    exact = sync_ranks.blocks_step(copy.deepcopy(reference).double(), slice(None), torch.float64)
    baseline = sync_ranks.blocks_step(reference, slice(None))
    assert ranks[0].keys() == exact.keys()
    for key in exact:
        mine = _joined([rank[key] for rank in ranks], key, False)
        if mine.dtype.is_floating_point:
            assert_twice_eager(f"blocks: {key}", mine, baseline[key], exact[key])
        else:
            assert torch.equal(mine, baseline[key]), key


def _reference_step(name: str, double: bool) -> dict[str, Tensor]:
    """What one process gets from the reference's modules."""
    name = name.removeprefix("model ")
    reference = make_pair(depth=1 if name == "compiled" else 2)[1]
    if double:
        reference = copy.deepcopy(reference).double()
    changes = {
        "cumulative": sync_ranks.count_batches_alike,
        "untracked": sync_ranks.track_nothing,
        "frozen": sync_ranks.freeze,
    }
    changes.get(name, lambda model: None)(reference)
    call = reference
    if name.startswith("checkpointed"):
        call = sync_ranks.checkpointed(reference, "reentrant" in name)
    elif name == "autocast" and not double:
        call = sync_ranks.autocast(reference)
    dtype = torch.float64 if double else torch.float32
    results = sync_ranks.step(reference, call, slice(None), dtype)
    if name == "untracked":
        results["alone"] = reference.eval()(image(sync_ranks.BATCH).to(dtype)).detach()
    return results


def _check_model(name: str, ranks: list[dict[str, Tensor]]) -> None:
    exact, baseline = _reference_step(name, True), _reference_step(name, False)
    if name == "model subgroup":
        alone, ranks = ranks[2], ranks[:2]
        for key, value in alone.items():
            if value.dtype.is_floating_point:
                assert_twice_eager(f"{name}, alone: {key}", value, baseline[key], exact[key])
    if name not in ("model subgroup", "model frozen", "model no_grad"):
        assert ranks[0].keys() == exact.keys()
    dtype = torch.bfloat16 if name == "model autocast" else None
    for key in ranks[0]:
        mine = _joined([rank[key] for rank in ranks], key, name in ("model ddp", "model fsdp") or key == "alone")
        if mine.dtype.is_floating_point:
            assert_twice_eager(f"{name}: {key}", mine, baseline[key], exact[key], dtype)
        else:
            assert torch.equal(mine, baseline[key]), f"{name}: {key}"


_PLAIN = (
    "NotImplementedError: convmixer_kernels: statistics reduced over a process group have one plain backward, as nn.SyncBatchNorm's: "
    "no create_graph, is_grads_batched, torch.func transform or forward-mode differentiation"
)
REFUSED = {
    "create_graph": _PLAIN,
    "is_grads_batched": _PLAIN,
    "torch.func.grad": _PLAIN,
    "strided statistics": "NotImplementedError: depthwise_block: process_group needs plain tensors in memory, contiguous running "
    "statistics and no dispatch mode",
    "one value": "ValueError: convmixer_kernels: training needs more than one value per channel (N * H * W > 1) on all ranks together, "
    "got 1",
    "no group": "TypeError: depthwise_block: process_group must be a torch.distributed.ProcessGroup or None, got 'gloo'",
    "a hook, on a CPU": "ValueError: SyncBatchNorm expected input tensor to be on GPU or XPU or "
    + torch._C._get_privateuse1_backend_name(),
    "evaluation": "[]",
}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_get_what_one_process_gets_from_the_joined_batch(world, tmp_path, subtests):
    """Outputs, gradients and running statistics; uneven batches, and one rank of three without an image."""
    ranks = _launch(world, tmp_path)
    for name in sync_ranks.scenarios(world):
        with subtests.test(name):
            results = [rank.get(name, "not reached") for rank in ranks]
            errors = [result for result in results if isinstance(result, str)]
            assert not errors, "\n".join(errors)
            if name in sync_ranks.CASES:
                _check_operator(name, results)
            elif name == "refused":
                for result in results:
                    assert result == REFUSED
            elif name == "first layer":
                _check_first_layer(results)
            elif name == "blocks":
                _check_blocks(results)
            elif name.startswith("model"):
                _check_model(name, results)


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def _assert_converted_is_batch_norm() -> None:
    model = make_pair()[0]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    report = accelerate(converted)
    assert (report.accelerated, report.skipped) == (2, [])
    for training in (True, False):
        results = [model_step(m.train(training), image()) for m in (converted, model)]
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_one_rank_is_batch_norm(one_rank, calls):
    _assert_converted_is_batch_norm()
    assert calls == ["mixer_layer"] * 8


def test_without_a_process_group_it_is_batch_norm(calls):
    _assert_converted_is_batch_norm()
    assert calls == ["mixer_layer"] * 8


def test_an_operator_of_one_rank_sends_nothing(one_rank, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", None)
    x, tensors, _ = make_inputs(Case("mixer_layer", (2, 4, 5, 5), (3, 3)))
    alone = [t.clone() for t in tensors]
    y = ck.mixer_layer(x, *tensors, training=True, process_group=one_rank)
    assert torch.equal(y, ck.mixer_layer(x, *alone, training=True))
    assert all(map(torch.equal, tensors, alone))


def test_a_group_that_is_none_runs_the_modules():
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(make_pair()[0])[3]
    layer[3].process_group = "gloo"
    report = accelerate(layer)
    assert report.skipped == [("", "the process_group of its pointwise norm is 'gloo', not a ProcessGroup")]


def test_a_replaced_sync_batch_norm_runs_the_modules(monkeypatch, calls):
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(make_pair()[0])[3]
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: x + 1)
    layer(features())
    assert not calls


@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
def test_a_block_backward_in_one_piece_is_not_used(kind, monkeypatch):
    """Triton has one, which knows this rank's sums only. The other ranks are made up: they have the same batch as this one."""
    if (reason := triton.can_run(kind, torch.empty(1, 4, 1, 1), torch.empty(4, 1, 1, 1))) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(triton, f"{kind}_block_backward", lambda *_: pytest.fail("not for statistics of several ranks"))
    monkeypatch.setattr(distributed, "group_in_use", lambda *_: "twins")
    sums = []

    def two_ranks(group: str, message: Tensor) -> None:
        sums.append(group)
        message.mul_(2.0)

    monkeypatch.setattr(distributed, "_sum_over_ranks", two_ranks)
    case = Case(f"{kind}_block", (2, 16, 3, 4), (3, 3))
    x, tensors, dy = make_inputs(case)
    results = run(lambda x, t: getattr(ck, case.op)(x, *t, training=True, backend="triton"), x, tensors, dy)
    assert sums == ["twins"] * 2
    exact = run(lambda x, t: eager(case, x, t), x.double(), [t.double() for t in tensors], dy.double())
    baseline = run(lambda x, t: eager(case, x, t), x, tensors, dy)
    # the batch twice has the statistics of the batch, but for the unbiased variance
    for name in ("y", "dx", "dweight", "running_mean"):
        assert_twice_eager(name, results[name], baseline[name], exact[name])


def test_a_count_has_no_rounding(monkeypatch):
    """float32 has no number between 2^24 and 2^24 + 2."""
    counts = []
    monkeypatch.setattr(distributed, "_sum_over_ranks", lambda group, message: counts.append(int(message[-1])))
    batch, running = (Statistics(torch.full((2,), value), torch.ones(2)) for value in (3.0, 0.0))
    for count in (2**24 + 1, 3):
        merged, (update,) = distributed.merge_statistics("alone", batch, running, count, 0.1)
        assert torch.equal(merged.mean, batch.mean)
        assert torch.equal(merged.var, batch.var)
    assert counts == [2**24 + 1, 3]
    assert torch.equal(update.var, torch.full((2,), 1.5))
    assert update.count == 1

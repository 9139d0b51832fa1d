# SPDX-License-Identifier: MIT
"""What training and validation share: torchrun's processes (DDP or FSDP2, PyTorch's own), groups of parameters, evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .data import DataError
from .reference import Residual

_DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Parallel:
    """This process among those that torchrun started, or alone."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_world: int = 1

    @staticmethod
    @contextmanager
    def start(device: str | None) -> Iterator[Parallel]:
        """Joins torchrun's processes, if it started this one.

        Raises:
            DataError: there is no such device.
        """
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind.partition(":")[0] not in ("cpu", "cuda") or (kind.startswith("cuda") and not torch.cuda.is_available()):
            raise DataError(f"--device {kind} is not there: cpu{' or cuda' if torch.cuda.is_available() else ''}")
        # the stem's convolution is torch's: a resumed run must get its bits again
        torch.backends.cudnn.deterministic = True
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            yield Parallel(torch.device(kind))
            return
        local = int(os.environ["LOCAL_RANK"])
        chosen = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        try:
            yield Parallel(chosen, dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"]))
        finally:
            dist.destroy_process_group()

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return name if self.world == 1 else f"{self.world} processes, {name}"

    def tell(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def wrap(self, model: nn.Module, kind: str, sync_bn: bool) -> tuple[nn.Module, nn.Module]:
        """The module that holds the parameters, and the one to call in training."""
        if self.world == 1:
            return model, model
        if kind == "fsdp":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if sync_bn else model
            return self.shard(model, kind), model
        ids = [self.device.index] if self.device.type == "cuda" else None
        net = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        if sync_bn:
            # in place, and after DDP, which refuses SyncBatchNorm on a CPU when it is made
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model, net

    def shard(self, model: nn.Module, kind: str) -> nn.Module:
        """By FSDP2, layer by layer, if `kind` is "fsdp" and there are several processes."""
        if self.world == 1 or kind != "fsdp":
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        for layer in model.children():
            if isinstance(layer, nn.Sequential) and isinstance(layer[0], Residual):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def autocast(self, amp: str) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, _DTYPES[amp], enabled=amp != "none")

    def mean(self, values: Tensor) -> Tensor:
        """Over the processes."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.world
        return values

    def full_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The state_dict on the CPU, whole in each process."""
        return {name: _full(tensor) for name, tensor in model.state_dict().items()}

    def set_state(self, model: nn.Module, state: Mapping[str, Any], kind: str) -> None:
        if kind != "fsdp":
            model.load_state_dict(state)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, kind: str) -> dict[str, Any]:
        """Whole in each process, under the names of the parameters if `kind` is "fsdp"."""
        if kind != "fsdp":
            return optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        return get_optimizer_state_dict(
            model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )

    def set_optimizer_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], kind: str
    ) -> None:
        if kind != "fsdp":
            optimizer.load_state_dict(state)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def _full(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)  # of a DTensor; all processes call it
    return (tensor.detach() if full is None else full().detach()).cpu().clone()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of convolutions and of the classifier decay; norms and biases do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]:
    """For AveragedModel: the moving average of weights and statistics, with a decay that grows to `decay` over the first steps."""

    @torch.no_grad()
    def move(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Any) -> None:
        count = int(count)
        share = 1 - min(decay, (1 + count) / (10 + count))
        for mean, value in zip(averaged, current, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, share)
            else:
                mean.copy_(value)

    return move


class TestResult(NamedTuple):
    loss: float
    top1: float  # percent
    top5: float  # percent
    images: int


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Any], parallel: Parallel, amp: str = "none") -> TestResult:
    """Mean cross-entropy and accuracy over all images of all processes; those with the label -1 do not count.

    All processes take the running statistics of the first, as DDP does in training: they are what a checkpoint holds.
    """
    model.eval()
    if parallel.world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    sums = torch.zeros(4, dtype=torch.float64, device=parallel.device)
    dtype = next(model.parameters()).dtype
    for x, labels in batches:
        x, labels = x.to(parallel.device, dtype, non_blocking=True), labels.to(parallel.device)
        with parallel.autocast(amp):
            logits = model(x).float()
        counts = labels >= 0
        logits, labels = logits[counts], labels[counts]
        five = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        right = (five[:, 0].sum(), five.any(1).sum(), counts.sum())
        sums += torch.stack([F.cross_entropy(logits.double(), labels, reduction="sum"), *right]).to(sums)
    if parallel.world > 1:
        dist.all_reduce(sums)
    loss, top1, top5, count = sums.tolist()
    return TestResult(loss / count, 100 * top1 / count, 100 * top5 / count, int(count))

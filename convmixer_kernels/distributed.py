# SPDX-License-Identifier: MIT
"""Batch statistics over all ranks of a process group: what nn.SyncBatchNorm adds to nn.BatchNorm2d.

A block sends one message in its forward and one in its backward, both an all-reduce of 2 C + 1 float64 numbers: two sums per channel
and the number of values. Its size does not grow with the number of ranks. float64 because

* the sums of h and h^2 then lose no digit that float32 holds: E[h^2] - E[h]^2 has a relative error of 2^-52 * (1 + mean^2 / var);
* a count is exact up to 2^53 (float32's up to 2^24, which is 16384 images of 32x32);
* every rank sends the same form, whatever its backend computes in.

All ranks of a group must make the same calls in the same order, as for nn.SyncBatchNorm: each in training, and all or none with a
gradient of a convolution's tensors. A rank may have fewer images, or none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import gates
from .primitives import Statistics, Update


def is_group(group: object) -> bool:
    """Whether it is a process group, or the mark that new_group returns to ranks outside of it."""
    return dist.is_available() and (
        isinstance(group, dist.ProcessGroup) or group is dist.distributed_c10d.GroupMember.NON_GROUP_MEMBER
    )


def group_in_use(op: str, group: Any, training: bool) -> str | None:
    """The name of the group whose ranks a call reduces its statistics over; None if it reduces nothing: evaluation, or no other rank.

    A name, because a graph that outlives destroy_process_group would keep the group alive, and gloo then aborts the process at its end.

    Raises:
        TypeError: `group` is neither None nor a process group.
        NotImplementedError: a transform is active.
    """
    if group is None:
        return None
    if not is_group(group):
        raise TypeError(f"{op}: process_group must be a torch.distributed.ProcessGroup or None, got {group!r}")
    if not training or dist.get_world_size(group) < 2:
        return None
    if gates.transformed():
        check_differentiated_once(group.group_name)
    return group.group_name


def check_differentiated_once(group: str | None) -> None:
    """Raises NotImplementedError if statistics of this group would be differentiated otherwise than by one plain backward."""
    if group is not None:
        raise NotImplementedError(
            "convmixer_kernels: statistics reduced over a process group have one plain backward, as nn.SyncBatchNorm's: no "
            "create_graph, is_grads_batched, torch.func transform or forward-mode differentiation"
        )


def group_of(norm: nn.Module) -> Any:
    """The group that a call of this norm reduces its statistics over, as in nn.SyncBatchNorm.forward; None for other norms."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training or not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group if norm.process_group else dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _message(like: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A message whose numbers all are count, and its first 2 C as (2, C): the rest is in place, for each operation is a launch."""
    message = like.new_full((2 * like.shape[0] + 1,), count, dtype=torch.float64)
    return message, message[:-1].view(2, -1)


def _sum_over_ranks(group: str, message: Tensor) -> None:
    dist.all_reduce(message, group=dist.distributed_c10d._resolve_process_group(group))


def merge_statistics(
    group: str,
    batch: Statistics,  # of this rank's batch; any finite numbers if it is empty
    running: Statistics,
    count: int,  # values of a channel in this rank's batch
    momentum: float,
) -> tuple[Statistics, tuple[Update, ...]]:
    """The statistics of all ranks' batches together, and how the running ones move. The same bits on every rank.

    Raises:
        ValueError: all ranks together have one value per channel.
    """
    message, (first, second) = _message(batch.mean, count)
    first.mul_(batch.mean)
    second.mul_(batch.var).addcmul_(first, batch.mean.double())
    _sum_over_ranks(group, message)
    values = message[-1]
    message[:-1].div_(values)
    var = second.addcmul_(first, first, value=-1.0).clamp_(min=0.0)
    merged = Statistics(first.to(batch.mean.dtype), var.to(batch.var.dtype))
    # only here may all ranks have less than two: the others need not wait for the number
    if count < 2 and (together := int(values)) < 2:
        if together == 1:
            raise ValueError(
                "convmixer_kernels: training needs more than one value per channel (N * H * W > 1) on all ranks together, got 1"
            )
        return merged, ()
    if running.mean is None and running.var is None:
        return merged, ()
    # a count of 1: this variance is unbiased already, by a count that may still be on the GPU
    unbiased = (var * (values / (values - 1))).to(batch.var.dtype)
    return merged, (Update(*running, merged.mean, unbiased, 1, momentum),)


def merge_sums(group: str, sums: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The sums of norm_backward over all ranks, such that the primitives, which divide by this rank's count, divide by all ranks'."""
    message, (first, second) = _message(sums[0], count)
    first.copy_(sums[0])
    second.copy_(sums[1])
    _sum_over_ranks(group, message)
    message[:-1].div_(message[-1]).mul_(count)
    return first.to(sums[0].dtype), second.to(sums[1].dtype)

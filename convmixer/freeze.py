# SPDX-License-Identifier: MIT
"""A model for serving: weights packed once on a CPU, launches replayed as a CUDA graph on a GPU."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convmixer_kernels import dispatch

from .accelerate import accelerate

#: CUDA graphs that a model keeps, one for each shape, dtype and layout of its input. The one that was used longest ago goes.
MOST_GRAPHS = 16
_WARM_UPS = 3


class _Graph(NamedTuple):
    graph: Any  # torch.cuda.CUDAGraph
    source: Tensor  # its input
    result: Any  # its output, of the model's type
    done: Any  # torch.cuda.Event after its last use


def _capture(model: nn.Module, x: Tensor) -> _Graph:
    source = torch.empty_like(x).copy_(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):  # kernels load, tuners choose, workspaces grow: none of it may be captured
            model(source)
    torch.cuda.current_stream().wait_stream(side)
    graph, done = torch.cuda.CUDAGraph(), torch.cuda.Event()
    with torch.cuda.graph(graph):
        result = model(source)
    done.record()
    return _Graph(graph, source, result, done)


class FrozenModel(nn.Module):
    """An inference copy of a model, made by :func:`freeze`. `model` is the copy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        super().train(False)
        self._forget()

    def _forget(self) -> None:
        """Drop all that was derived from weights and addresses; the next call makes it again."""
        weights = (m.weight for m in self.model.modules() if isinstance(m, nn.Conv2d) and m.weight.dim() == 4)
        pointwise = [w for w in weights if w.shape[2:] == (1, 1) and w.device.type == "cpu"]
        self._packed = dispatch.load("cpu").PackedWeights(pointwise)
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._lock = threading.Lock()

    def forward(self, x: Tensor) -> Any:
        """The model's output for x. No gradient flows."""
        with torch.no_grad():
            if torch.compiler.is_compiling() or not isinstance(x, Tensor):
                return self.model(x)
            if x.device.type == "cpu":
                with self._packed.used():
                    return self.model(x)
            return self._replay(x) if x.device.type == "cuda" else self.model(x)

    def _replay(self, x: Tensor) -> Any:
        if torch.cuda.is_current_stream_capturing():
            return self.model(x)  # becomes part of the caller's graph
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (x.shape, x.stride(), x.dtype, x.device, autocast)
        with self._lock, torch.cuda.device(x.device):
            if key not in self._graphs:
                self._graphs[key] = _capture(self.model, x)
                if len(self._graphs) > MOST_GRAPHS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            graph, source, result, done = self._graphs[key]
            # another thread's call, on another stream, may still use the graph's tensors
            torch.cuda.current_stream().wait_event(done)
            source.copy_(x)
            graph.replay()
            y = _map(Tensor.clone, result)
            done.record()
        return y

    def train(self, mode: bool = True) -> FrozenModel:
        """Accepts False only.

        Raises:
            RuntimeError: mode is True.
        """
        if mode:
            raise RuntimeError(
                "a frozen model is for inference: train the model that it was made from, and freeze again"
            )
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenModel:
        # .to, .half, .cuda: parameters get other memory
        super()._apply(fn, recurse)
        self._forget()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's; the weights are packed and captured anew."""
        result = super().load_state_dict(*args, **kwargs)
        self._forget()
        return result

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_packed", "_graphs", "_lock"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()


def freeze(model: nn.Module) -> FrozenModel:
    """An inference copy of `model`: accelerated, in evaluation mode, without gradients; `model` itself stays as it is.

    The outputs are those of ``accelerate(model)`` in evaluation, with the same bits. Unlike the model, the copy keeps what its
    weights determine: on a CPU the 1x1 convolutions' weights in the order in which the kernels read them; on a GPU a CUDA graph for each
    shape, dtype and layout of input (at most 16), so that a call costs one launch, and the first call of a shape takes a second. Any batch
    size runs; a server does well to use few. Copy, pickle, ``.to`` and ``load_state_dict`` work and drop what was kept.

    Changes of a parameter of the copy other than by these and, on a CPU, by torch's in-place operations are not noticed.

    Args:
        model: any module whose forward takes one tensor. On a GPU it must be capturable: no control flow on values, no copy to the host.

    Returns:
        A :class:`FrozenModel`; safe to call from several threads.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, FrozenModel):
        model = model.model
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    accelerate(frozen)
    return FrozenModel(frozen)


def _map(function: Any, result: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: function(t) if isinstance(t, Tensor) else t, result)

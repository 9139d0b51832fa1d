# SPDX-License-Identifier: MIT
"""For the tests of the model: pairs of models, changes of a layer, and comparisons of our model with the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import assert_twice_eager
from torch import nn

from convmixer import ConvMixer, reference
from convmixer_kernels import functional

MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
# wide enough for an error norm over one vector not to be a matter of luck
DIM = 64
SMALL = {"dim": DIM, "depth": 2, "kernel_size": 5, "patch_size": 2, "n_classes": 7}


def randomize(model: nn.Module, seed: int = 1) -> nn.Module:
    """Norm parameters and running statistics away from 0 and 1, so that forgetting one of them shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t, low in (
                (module.weight, 0.5),
                (module.bias, -0.5),
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
            ):
                if t is not None:
                    t.data.uniform_(low, low + 1, generator=generator)
    return model


def make_pair(**changes) -> tuple[nn.Sequential, nn.Sequential]:
    """Our model and the reference with the same random tensors."""
    torch.manual_seed(0)
    ours = randomize(ConvMixer(**{**SMALL, **changes}))
    ref = reference.ConvMixer(**{**SMALL, **changes})
    ref.load_state_dict(ours.state_dict())
    return ours, ref


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients of x and of the parameters, and buffers after one call of the model and its backward."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y * weights.to(y.dtype)).sum().backward()
    result = {"output": y.detach(), "grad of x": x.grad}
    result.update({f"grad of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None})
    result.update({n: b.clone() for n, b in model.named_buffers()})
    return result


def assert_matches(ours: nn.Module, ref: nn.Module, x: torch.Tensor) -> None:
    """By the twice-eager rule, everything that `step` returns; `ours` and `ref` hold the same tensors before."""
    exact = step(copy.deepcopy(ref).double(), x.double())
    eager, actual = step(ref, x), step(ours, x)
    assert actual.keys() == eager.keys()
    for name, value in actual.items():
        if value.dtype.is_floating_point:
            assert value.dtype == eager[name].dtype
            assert_twice_eager(name, value, eager[name], exact[name])
        else:
            assert torch.equal(value, eager[name]), name


def image(n: int = 3, size: int = 12, dtype=torch.float32, channels_last: bool = False) -> torch.Tensor:
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(2)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def features(n: int = 3, size: int = 6, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(n, DIM, size, size, generator=torch.Generator().manual_seed(3)).to(dtype)


def assert_same_steps(ours: nn.Module, ref: nn.Module, x: torch.Tensor) -> None:
    """Bit by bit, everything that `step` returns."""
    torch.testing.assert_close(step(ours, x), step(ref, x), rtol=0, atol=0, equal_nan=True)


def assert_refused_alike(ours: nn.Module, ref: nn.Module, x: object) -> None:
    """Both raise, the same class with the same message."""
    with pytest.raises(Exception) as expected:
        ref(x)
    with pytest.raises(expected.type) as raised:
        ours(x)
    assert str(raised.value) == str(expected.value)


def count_operators(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operators that modules call from now on, in order: the fixture `calls`."""
    seen: list[str] = []

    def counted(function, name):
        def call(*args, **kwargs):
            seen.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("mixer_layer", "depthwise_block", "pointwise_block", "depthwise_conv2d"):
        monkeypatch.setattr(functional, name, counted(getattr(functional, name), name))
    # a layer's later calls
    monkeypatch.setattr(functional, "run_known_layer", counted(functional.run_known_layer, "mixer_layer"))
    return seen


Change = Callable[[nn.Sequential], None]


def attribute(path: str, name: str, value: object) -> Change:
    """A change of a layer: its module at `path` gets this attribute."""

    def change(layer):
        setattr(layer.get_submodule(path), name, value)

    change.__name__ = f"{path}.{name}={value}"
    return change


def replaced(path: str, build: Callable[[], nn.Module]) -> Change:
    """A change of a layer: its module at `path` is replaced, by one with the same numbers in each layer."""

    def change(layer):
        torch.manual_seed(7)
        layer.set_submodule(path, build().train(layer.training))

    change.__name__ = f"{path}={build()}".replace("\n", "")
    return change


def by_name(change: object) -> str | None:
    """The id of a parameter that is a change; pytest's own for others."""
    return getattr(change, "__name__", None)


def cumulative_average(layer):
    for norm in (layer[0].fn[2], layer[3]):
        norm.momentum = None
        norm.num_batches_tracked.fill_(2)


other_eps = attribute("3", "eps", 0.1)


class Annotated(torch.Tensor):
    """A tensor subclass, which may redefine every operation."""

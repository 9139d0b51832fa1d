# SPDX-License-Identifier: MIT
"""freeze: the accelerated model's bits in evaluation, with weights packed once; on a GPU one graph for each form of input."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys

import pytest
import torch
from torch import nn

import convmixer
from convmixer import accelerate, freeze, reference
from convmixer.freeze import MOST_GRAPHS, FrozenModel
from convmixer_kernels import _load
from convmixer_kernels.backends import cpu


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = reference.ConvMixer(40, 2, kernel_size=5, patch_size=4, n_classes=6)
    model(torch.randn(4, 3, 20, 20))  # statistics that are not 0 and 1
    return model


def expected_of(model, x):
    plain = copy.deepcopy(model).eval()
    accelerate(plain)
    with torch.no_grad():
        return plain(x)


@pytest.fixture
def packs(monkeypatch):
    """How often a weight was packed."""
    if cpu.native is None:
        pytest.skip("no native CPU module")
    calls = []

    class Counting:
        def __getattr__(self, name):
            if name == "pack_weight":
                calls.append(name)
            return getattr(_load.native_module("_cpu")[0], name)

    monkeypatch.setattr(cpu, "native", Counting())
    return calls


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_bits_are_the_accelerated_models_for_any_batch(model, layout, amp):
    frozen = freeze(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        for batch in (1, 3, 1, 2):
            x = torch.randn(batch, 3, 20, 20).contiguous(memory_format=layout)
            got, expected = frozen(x), expected_of(model, x)
            assert torch.equal(got, expected)
            assert got.dtype == expected.dtype
            assert not got.requires_grad


@pytest.mark.parametrize("size", [20, 160], ids=["layers-together", "layer-by-layer"])
def test_weights_are_packed_once_a_layout(model, packs, size):
    frozen = freeze(model)
    x = torch.randn(1, 3, size, size * 4)
    frozen(x)
    first = len(packs)
    assert first == 2  # the layers'
    frozen(x), frozen(x[..., :size])
    assert len(packs) <= 2 * first  # the smaller image may take the other layout
    accelerate(model)
    model.eval()(x)
    assert len(packs) <= 2 * first


def test_the_model_itself_stays(model):
    before, training = copy.deepcopy(model.state_dict()), model.training
    frozen = freeze(model)
    assert isinstance(frozen, FrozenModel)
    frozen(torch.randn(1, 3, 20, 20))
    assert model.training is training
    assert type(model[3]) is nn.Sequential
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    x = torch.randn(2, 3, 20, 20, requires_grad=True)
    assert not frozen(x).requires_grad


@pytest.mark.parametrize(
    "renewed",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), freeze, lambda m: m.to("cpu")],
    ids=["deepcopy", "pickle", "freeze", "to"],
)
def test_copies_run(model, renewed):
    frozen = freeze(model)
    x = torch.randn(2, 3, 20, 20)
    expected = frozen(x)
    again = renewed(frozen)
    assert torch.equal(again(x), expected)


def test_new_weights_are_noticed(model):
    frozen = freeze(model)
    x = torch.randn(2, 3, 20, 20)
    frozen(x)
    with torch.no_grad():
        frozen.model[3][1].weight.mul_(1.5)
        model[3][1].weight.mul_(1.5)
    assert torch.equal(frozen(x), expected_of(model, x))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    frozen.load_state_dict({f"model.{name}": value for name, value in model.state_dict().items()})
    assert torch.equal(frozen(x), expected_of(model, x))
    # another tensor in a parameter's place has another address, and is read as it is
    frozen.model[3][1].weight.data = model[3][1].weight.detach() * 2
    with torch.no_grad():
        model[3][1].weight.mul_(2)
    assert torch.equal(frozen(x), expected_of(model, x))


def test_it_does_not_train(model):
    frozen = freeze(model)
    assert frozen.eval() is frozen
    with pytest.raises(RuntimeError, match="a frozen model is for inference: train the model that it was made from"):
        frozen.train()
    with pytest.raises(TypeError, match=r"freeze: model must be an nn.Module, got Tensor"):
        freeze(torch.zeros(1))
    assert not convmixer.freeze(nn.Sequential()).training


class FakeGraph:
    """A CUDA graph on a CPU: replay computes the captured result again, in its memory."""

    def replay(self):
        self.result.copy_(self.model(self.source))


@pytest.fixture
def fake_cuda(monkeypatch, model):
    class Anything:
        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    @contextlib.contextmanager
    def nothing(*args):
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    for name in ("Event", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: Anything())
    for name in ("graph", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_graphs_are_kept_by_form_of_input(model, fake_cuda, monkeypatch):
    frozen = freeze(model)
    captures, module = [], sys.modules["convmixer.freeze"]
    capture = module._capture

    def counted(inner, x):
        made = capture(inner, x)
        captures.append(tuple(x.shape))
        made.graph.model, made.graph.source, made.graph.result = inner, made.source, made.result
        return made

    monkeypatch.setattr(module, "_capture", counted)
    with torch.no_grad():
        first = [torch.randn(2, 3, 20, 20) for _ in range(2)]
        results = [frozen._replay(x) for x in first]
        # each call's result is its own
        for x, y in zip(first, results, strict=True):
            assert torch.equal(y, expected_of(model, x))
        assert captures == [(2, 3, 20, 20)]
        frozen._replay(first[0].contiguous(memory_format=torch.channels_last))
        frozen._replay(first[0].expand(2, 3, 20, 20))
        assert len(captures) == 2
        assert frozen._replay(torch.randn(1, 3, 20, 20).expand(2, -1, -1, -1)).shape == (2, 6)
        for batch in range(1, MOST_GRAPHS + 3):
            frozen._replay(torch.randn(batch, 3, 20, 20))
        assert len(frozen._graphs) == MOST_GRAPHS
        assert len(captures) == len(set(captures)) + 2
        frozen.to("cpu")
        assert not frozen._graphs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(model, dtype):
    model = model.to("cuda", dtype)
    frozen = freeze(model)
    for batch in (1, 5, 1, 2, 5):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(batch, 3, 20, 20, device="cuda", dtype=dtype).contiguous(memory_format=layout)
            torch.testing.assert_close(frozen(x), expected_of(model, x))
    assert len(frozen._graphs) > 1

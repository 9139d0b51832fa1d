# SPDX-License-Identifier: MIT
"""Tensors whose storage was freed or shrunk, as FSDP and offloading do: an error names the tensor, nothing is read or changed."""

from __future__ import annotations

import pytest
import torch
from helpers import BLOCK_TENSORS, Case, make_inputs, ours, skip_unless_it_runs
from torch import Tensor

import convmixer_kernels as ck
from convmixer_kernels import functional
from convmixer_kernels.primitives import MixerEval, Norm

OPERATORS = {
    "depthwise_conv2d": BLOCK_TENSORS[:2],
    "depthwise_block": BLOCK_TENSORS,
    "pointwise_block": BLOCK_TENSORS,
    "mixer_layer": [f"{half}_{name}" for half in ("depthwise", "pointwise") for name in BLOCK_TENSORS],
}
#: Bytes that are left: none (the address is 0), and some (the address is valid, the memory behind it belongs to others).
LEFT = {"freed": 0, "shrunk": 8}


@pytest.fixture(params=["reference", "cpu", "cuda", "triton"])
def backend(request, monkeypatch):
    skip_unless_it_runs(request.param, monkeypatch)
    return request.param


def take_memory(t: Tensor, left: int) -> None:
    t.untyped_storage().resize_(left)


def lost(name: str) -> str:
    return f"{name} has lost its memory: its storage holds"


def case_of(op: str, training: bool = True) -> Case:
    return Case(op, (2, 8, 6, 5), (3, 3) if op != "pointwise_block" else (1, 1), training=training)


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("op", OPERATORS)
def test_forward(op, training, left, backend):
    """Every tensor of every operator in turn, with gradients and without."""
    case = case_of(op, training)
    for at, name in enumerate(["x", *OPERATORS[op]]):
        for wanted in (True, False):
            x, tensors, _ = make_inputs(case)
            given = [x, *tensors]
            given[0].requires_grad_(wanted)
            others = [t.detach().clone() for t in given]
            take_memory(given[at].data, LEFT[left])
            with pytest.raises(RuntimeError, match=f"{op}: {lost(name)} {LEFT[left]} bytes"):
                ours(case, x, tensors, backend)
            for i, (t, before) in enumerate(zip(given, others, strict=True)):
                assert i == at or torch.equal(t, before)


@pytest.mark.parametrize("left", LEFT)
def test_views_that_are_copied(left):
    """torch's own copy of a strided tensor would read missing memory."""
    wide = torch.randn(2, 8, 6, 10)
    x = wide[..., ::2]
    take_memory(wide, LEFT[left])
    with pytest.raises(RuntimeError, match=f"depthwise_conv2d: {lost('x')}"):
        ck.depthwise_conv2d(x, torch.randn(8, 1, 3, 3))
    case = case_of("depthwise_block")
    for at, name in enumerate(BLOCK_TENSORS):
        x, tensors, _ = make_inputs(case)
        wide = torch.stack([tensors[at]] * 2, -1)
        tensors[at] = wide[..., 0]
        # only the last element is missing
        take_memory(wide, wide.nbytes - 8 if left == "shrunk" else 0)
        with pytest.raises(RuntimeError, match=f"depthwise_block: {lost(name)}"):
            ours(case, x, tensors, None)


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("op", [op for op in OPERATORS if op != "depthwise_conv2d"])
def test_statistics_beside_a_strided_one(op, left, backend):
    """A registered operator runs if one of them is strided, and does not see the statistics that training moves."""
    names = OPERATORS[op]
    for at, name in enumerate(names):
        if at % 6 < 4:
            continue
        case = case_of(op)
        x, tensors, _ = make_inputs(case)
        other = at - 1 if at % 6 == 5 else at + 1
        tensors[other] = torch.stack([tensors[other]] * 2, -1)[..., 0]
        before = tensors[other].clone()
        take_memory(tensors[at], LEFT[left])
        with pytest.raises(RuntimeError, match=f"{op}: {lost(name)}"):
            ours(case, x, tensors, backend)
        assert torch.equal(tensors[other], before)


@pytest.mark.parametrize("left", LEFT)
def test_tensors_that_autocast_casts(left):
    for name in ("x", "weight", "bias"):
        given = {"x": torch.randn(1, 8, 6, 5), "weight": torch.randn(8, 1, 3, 3).half(), "bias": torch.randn(8).half()}
        take_memory(given[name], LEFT[left])
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=lost(name)):
            ck.depthwise_conv2d(**given)


def test_views_and_storages_that_hold_them():
    """A view in a larger storage, or one whose storage ends with its last element, is accepted."""
    for op in OPERATORS:
        case = case_of(op)
        x, tensors, _ = make_inputs(case)
        expected = ours(case, x, [t.clone() for t in tensors], None)
        held = []
        for t in (x, *tensors):
            larger = torch.cat([torch.zeros(3), t.flatten(), torch.zeros(5)])
            take_memory(larger, larger.nbytes - 20)
            held.append(larger[3 : 3 + t.numel()].view(t.shape))
        assert torch.equal(ours(case, held[0], held[1:], None), expected)


def _saved(y: Tensor) -> list[Tensor]:
    return [t for t in y.grad_fn.saved_tensors if t is not None]


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("op", OPERATORS)
def test_backward(op, training, left, backend):
    """Each saved tensor in turn, and the incoming gradient, freed between forward and backward."""
    case = case_of(op, training)

    x, tensors, dy = make_inputs(case)
    for t in (x, *(t for i, t in enumerate(tensors) if i % 6 < 4)):
        t.requires_grad_()
    y = ours(case, x, tensors, backend)
    saved = _saved(y)
    assert len(saved) >= 2
    for t, name in [*((t, ".*") for t in saved), (dy, "dy")]:
        storage, values = t.untyped_storage(), t.detach().clone()
        size = storage.nbytes()
        take_memory(t, LEFT[left])
        with pytest.raises(RuntimeError, match=rf"'s backward: {name} has lost its memory"):
            y.backward(dy, retain_graph=True)
        assert x.grad is None
        storage.resize_(size)
        t.data.copy_(values)
    y.backward(dy)


def test_backward_without_what_it_does_not_read():
    """As in eager, biases may be freed by then, and a weight whose input needs no gradient."""
    x, tensors, dy = make_inputs(case_of("depthwise_block"))
    weight, bias, norm_bias = tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[3].requires_grad_()
    y = ck.depthwise_block(x, *tensors, training=True)
    expected = torch.autograd.grad(y, (weight, bias, norm_bias), dy, retain_graph=True)
    for t in (weight, bias, norm_bias):
        take_memory(t.data, 0)
    assert all(map(torch.equal, torch.autograd.grad(y, (weight, bias, norm_bias), dy), expected))


def test_gradients_without_memory_of_their_own():
    """An expanded gradient, whose storage holds one value, and one that torch knows to be zero are accepted."""
    x, weight = torch.randn(2, 8, 6, 5, requires_grad=True), torch.randn(8, 1, 3, 3)
    y = ck.depthwise_conv2d(x, weight)
    (expanded,) = torch.autograd.grad(y, x, torch.ones(1, 1, 1, 1).expand_as(y), retain_graph=True)
    (dense,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert torch.equal(expanded, dense)
    # a strided one: only its last element is missing
    wide = torch.ones(2, 8, 6, 10)
    dy = wide[..., ::2]
    take_memory(wide, wide.nbytes - 8)
    with pytest.raises(RuntimeError, match=lost("dy")):
        torch.autograd.grad(y, x, dy, retain_graph=True)
    (zero,) = torch.autograd.grad(y, x, torch._efficientzerotensor(y.shape))
    assert not zero.any()


@pytest.mark.parametrize("left", LEFT)
def test_registered_operators(left, backend):
    for op, names in OPERATORS.items():
        for at, name in enumerate(["x", *names]):
            x, tensors, _ = make_inputs(case_of(op, training=False))
            take_memory((x, *tensors)[at], LEFT[left])
            options = ([1, 1],) if op == "depthwise_conv2d" else (False, 1e-5, "gelu", op == "depthwise_block", False)
            order = tensors if op != "mixer_layer" else [*tensors[:4], *tensors[6:10], *tensors[4:6], *tensors[10:]]
            with pytest.raises(RuntimeError, match=lost(name)):
                getattr(torch.ops.convmixer, op)(x, *order, *options, backend)


@pytest.mark.parametrize("left", LEFT)
def test_layers_in_one_call(left):
    if not functional.can_fuse_layers(torch.empty(4, 8, 6, 5)):
        pytest.skip("no backend here evaluates several layers in one call")
    for at, name in enumerate(["x", *OPERATORS["mixer_layer"]]):
        x, tensors, _ = make_inputs(case_of("mixer_layer", training=False))
        take_memory((x, *tensors)[at], LEFT[left])
        halves = (tensors[:6], tensors[6:])
        blocks = [(weight, bias, Norm(mean, var, g, h, 1e-5)) for weight, bias, g, h, mean, var in halves]
        layer = MixerEval("gelu", *blocks)
        with torch.no_grad(), pytest.raises(RuntimeError, match=f"mixer_layer: {lost(name)}"):
            functional.run_fused_layers(x, [layer, layer])


@pytest.mark.parametrize("op", OPERATORS)
def test_a_backward_of_a_backward(op):
    """torch's operations compute it, and would read missing memory."""
    x, tensors, dy = make_inputs(case_of(op, training=False))
    for t in (x, tensors[0]):
        t.requires_grad_()
    y = ours(case_of(op, training=False), x, tensors, None)
    for t in (x, tensors[0]):
        size, values = t.untyped_storage().nbytes(), t.detach().clone()
        take_memory(t, 0)
        with pytest.raises(RuntimeError, match="a saved tensor has lost its memory"):
            torch.autograd.grad(y, x, dy, create_graph=True)
        t.untyped_storage().resize_(size)
        t.data.copy_(values)
    assert torch.autograd.grad(y, x, dy, create_graph=True)[0].requires_grad

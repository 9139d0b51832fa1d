# SPDX-License-Identifier: MIT
"""Bad input: each raises with the argument, the rule and what it got, and leaves every tensor as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import convmixer_kernels as ck


def _block(c: int = 8, c_out: int | None = None, k: int = 3) -> dict[str, torch.Tensor]:
    n = c_out or c
    weight = torch.randn(c, 1, k, k) if c_out is None else torch.randn(c_out, c, 1, 1)
    return {
        "weight": weight,
        "bias": torch.randn(n),
        "norm_weight": torch.randn(n),
        "norm_bias": torch.randn(n),
        "running_mean": torch.zeros(n),
        "running_var": torch.ones(n),
    }


BAD = [
    ("x", lambda: torch.randn(8, 5, 5), {}, ValueError, r"depthwise_block: x must be \(N, C, H, W\)"),
    ("x", lambda: torch.ones(2, 8, 5, 5, dtype=torch.int64), {}, TypeError, r"x must be float16.*torch\.int64"),
    ("x", lambda: [[1.0]], {}, TypeError, "x must be a torch.Tensor, got list"),
    ("x", lambda: torch.randn(2, 8, 0, 5), {}, ValueError, "C, H and W of x must be positive"),
    ("x", lambda: torch.randn(2, 8, 5, 5).to_sparse(), {}, TypeError, "dense"),
    (
        "x",
        lambda: torch.randn(2, 8, 5, 5, dtype=torch.bfloat16),
        {"weight": torch.float16},
        TypeError,
        "weight must be",
    ),
    ("x", lambda: torch.nested.nested_tensor([torch.randn(8, 5, 5)] * 2), {}, TypeError, "x must be a dense tensor"),
    (
        "weight",
        lambda: torch.randn(8, 1, 3, 3).to_mkldnn(),
        {},
        TypeError,
        "weight must be a dense .* got weight.layout",
    ),
    ("bias", lambda: torch.nested.nested_tensor([torch.randn(4)] * 2), {}, TypeError, "bias must be a dense tensor"),
    (
        "running_var",
        lambda: torch.nested.nested_tensor([torch.randn(4)] * 2),
        {},
        TypeError,
        "running_var must be a dense tensor, got a nested one",
    ),
    ("x", lambda: np.ones((2, 8, 5, 5)), {}, TypeError, "x must be a torch.Tensor, got ndarray"),
    ("weight", lambda: np.ones((8, 1, 3, 3)), {}, TypeError, "weight must be a torch.Tensor or None, got ndarray"),
    ("running_mean", lambda: np.zeros(8), {}, TypeError, "running_mean must be a torch.Tensor or None, got ndarray"),
    ("activation", lambda: np.array(["gelu"]), {}, ValueError, "activation must be one of"),
    ("training", lambda: np.True_, {}, TypeError, "training must be a bool"),
    ("residual", lambda: np.True_, {}, TypeError, "residual must be a bool"),
    ("eps", lambda: np.array(1e-5), {}, TypeError, "eps must be a number"),
    ("backend", lambda: np.array(["cpu", "cpu"]), {}, ValueError, "backend must be one of"),
    ("bias", lambda: torch.randn(8).to_sparse(), {}, TypeError, "bias must be a dense .* got bias.layout"),
    ("weight", lambda: torch.randn(8, 1, 3), {}, ValueError, r"weight must be \(C, 1, kH, kW\)"),
    ("weight", lambda: torch.randn(4, 1, 3, 3), {}, ValueError, r"C = x.shape\[1\] = 8, got weight.shape=torch.Size"),
    ("weight", lambda: None, {}, TypeError, "weight must be a torch.Tensor, got None"),
    ("weight", lambda: torch.randn(8, 1, 3, 3).double(), {}, TypeError, r"weight must be torch\.float32"),
    ("weight", lambda: torch.empty(8, 1, 3, 3, device="meta"), {}, ValueError, "weight must be on x's device cpu"),
    ("bias", lambda: torch.randn(7), {}, ValueError, r"bias must be \(C,\) = \(8,\)"),
    ("norm_weight", lambda: torch.randn(8, 1), {}, ValueError, "norm_weight must be"),
    ("running_var", lambda: None, {}, ValueError, "must both be tensors or both be None"),
    ("activation", lambda: "swish", {}, ValueError, "one of gelu, gelu_tanh, identity, relu, got activation='swish'"),
    ("eps", lambda: -1.0, {}, ValueError, "eps must not be negative"),
    ("eps", lambda: 0.0, {}, ValueError, "eps must be positive in training, got eps=0.0"),
    ("eps", lambda: float("nan"), {}, ValueError, "eps must be finite"),
    ("momentum", lambda: None, {}, TypeError, "momentum must be a number"),
    ("training", lambda: 1, {}, TypeError, "training must be a bool"),
    ("residual", lambda: "no", {}, TypeError, "residual must be a bool, got residual='no'"),
    ("backend", lambda: "tpu", {}, ValueError, "backend must be one of reference, cpu, cuda, triton, got 'tpu'"),
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name,value,dtypes,error,message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_argument(name, value, dtypes, error, message):
    arguments = {"x": torch.randn(2, 8, 5, 5), **_block(), "training": True}
    arguments[name] = value()
    for other, dtype in dtypes.items():
        arguments[other] = arguments[other].to(dtype)
    tensors = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor) and not t.is_nested}
    before = {n: t.clone() for n, t in tensors.items() if t.device.type == "cpu"}
    with pytest.raises(error, match=message):
        ck.depthwise_block(**arguments)
    for n, t in before.items():
        assert torch.equal(t.to_dense(), arguments[n].to_dense()), n


def test_training_needs_more_than_one_value():
    block = _block()
    with pytest.raises(ValueError, match=r"more than one value per channel.*got x.shape=torch.Size\(\[1, 8, 1, 1\]\)"):
        ck.depthwise_block(torch.randn(1, 8, 1, 1), **block, training=True)
    assert torch.equal(block["running_mean"], torch.zeros(8))


def test_eval_needs_running_statistics():
    block = _block() | {"running_mean": None, "running_var": None}
    with pytest.raises(ValueError, match="must be tensors where training=False"):
        ck.depthwise_block(torch.randn(1, 8, 4, 4), **block)


def test_mixer_layer_checks_both_blocks_before_anything_changes():
    first, second = _block(), _block(8, 8) | {"norm_bias": torch.randn(3)}
    with pytest.raises(ValueError, match="mixer_layer: pointwise_norm_bias must be"):
        ck.mixer_layer(torch.randn(2, 8, 5, 5), *first.values(), *second.values(), training=True)
    assert torch.equal(first["running_mean"], torch.zeros(8))


def test_a_backend_by_name_says_why_it_cannot():
    x, block = torch.randn(2, 8, 5, 5).double(), {n: t.double() for n, t in _block().items()}
    with pytest.raises(
        NotImplementedError, match="backend 'cpu' cannot run this: it takes float32, float16 and bfloat16"
    ):
        ck.depthwise_block(x, **block, backend="cpu")
    assert ck.depthwise_block(x, **block).dtype == torch.float64


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    x = torch.randn(0, 8, 5, 5, requires_grad=True)
    block = _block()
    weight = block["weight"].requires_grad_()
    y = ck.depthwise_block(x, **block, training=training)
    y.sum().backward()
    assert y.shape == (0, 8, 5, 5)
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(block["running_mean"], torch.zeros(8))
    assert ck.mixer_layer(x, *_block().values(), *_block(8, 4).values(), training=training).shape == (0, 4, 5, 5)

# SPDX-License-Identifier: MIT
"""Each bad input raises an error that names the argument, the rule and the value, and changes no tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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


# Anyone can call torch.ops.convmixer.*: those operators make the same checks before any kernel, also on fake tensors.

_OPTIONS = {"batch_statistics": True, "eps": 1e-5, "activation": "gelu", "residual": True}
_STATISTICS = ("running_mean", "running_var")


def _arguments(op: str, training: bool = True) -> dict:
    """Good arguments of the registered operator `op` by name, in order: N, C, H, W = 2, 8, 5, 6, and 4 output channels."""
    torch.manual_seed(0)
    name, backward = op.removesuffix("_backward"), op.endswith("_backward")
    x, wide, narrow = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6), torch.randn(2, 4, 5, 6)
    if name == "depthwise_conv2d":
        weight = {"weight": torch.randn(8, 1, 3, 3), "bias": torch.randn(8)}
        if backward:
            return {
                "dy": wide,
                "x": x,
                "contiguous": True,
                **weight,
                "needs": [True] * 3,
                "dilation": [2, 1],
                "backend": "cpu",
            }
        return {"x": x, **weight, "dilation": [1, 2], "backend": "cpu"}
    blocks = {"depthwise_block": [("", _block())], "pointwise_block": [("", _block(8, 4))]}.get(
        name, [("depthwise_", _block()), ("pointwise_", _block(8, 4))]
    )
    parameters = {p + n: t for p, block in blocks for n, t in block.items() if n not in _STATISTICS}
    used = {p + n: t for p, block in blocks for n, t in block.items() if n in _STATISTICS}
    options = _OPTIONS | {"batch_statistics": training, "residual": name != "pointwise_block"}
    if not backward:
        used = dict.fromkeys(used) if training else used
        return {"x": x, **parameters, **used, **options, "save": True, "backend": "cpu"}
    used = {n.replace("running_", ""): t for n, t in used.items()}
    a = {
        "depthwise_block": {"a": wide},
        "pointwise_block": {"a": narrow},
        "mixer_layer": {"a_depthwise": wide, "a_pointwise": narrow},
    }[name]
    dy = torch.randn_like(wide if name == "depthwise_block" else narrow)
    needs = [True] * (1 + len(parameters))
    return {"dy": dy, "x": x, **a, **parameters, **used, **options, "needs": needs, "backend": "cpu"}


FORWARDS = ("depthwise_block", "pointwise_block", "mixer_layer", "depthwise_conv2d")
REGISTERED = (*FORWARDS, *(f"{op}_backward" for op in FORWARDS))


def _call(op: str, arguments: dict):
    return getattr(torch.ops.convmixer, op)(*arguments.values())


def _to_meta(t: torch.Tensor) -> torch.Tensor:
    return t.to("meta")


def _wrong_arguments():
    """(operator, argument, function that makes it wrong, error, message): shape, dtype and device of every tensor, every option."""
    for op in REGISTERED:
        backward = op.endswith("_backward")
        for name, value in _arguments(op, training=False).items():
            if isinstance(value, torch.Tensor):
                # the a of a backward determines what the other tensors must be
                said = r"must be|must be \(" if not (backward and name[0] == "a") else "must be"
                yield op, name, lambda t: t[..., None], ValueError, said
                yield op, name, _to_meta, ValueError, "device|must be on"
                if value.dim() == 4 and name not in ("x", "a_depthwise", "dy", "a"):
                    yield op, name, lambda t: t[:-1], ValueError, "must be"
                    yield op, name, lambda t: torch.cat([t, t], 1), ValueError, "must be"
                elif value.dim() == 1:
                    yield op, name, lambda t: t[:-1], ValueError, f"{name} must be"
                if (backward and value.dim() == 4) or name == "x":
                    yield op, name, lambda t: t[:, :-1], ValueError, "must be"
                # (a 16-bit x beside float32 parameters is right)
                yield op, name, (lambda t: t.double()) if name == "x" else (lambda t: t.half()), TypeError, "must be"
                yield op, name, torch.Tensor.to_sparse, TypeError, "dense"
            elif name == "activation":
                yield op, name, lambda _: "swish", ValueError, "activation must be one of"
            elif name == "eps":
                yield op, name, lambda _: float("nan"), ValueError, "eps must be finite"
                yield op, name, lambda _: -1.0, ValueError, "eps must not be negative"
            elif name == "needs":
                yield op, name, lambda needs: needs[1:], ValueError, "needs must hold"
            elif name == "backend":
                yield op, name, lambda _: "tpu", ValueError, "one of reference, cpu, cuda, triton, got 'tpu'"
        if backward:
            yield op, "x", lambda _: None, ValueError, "x must be a tensor where the weight's gradient is needed"


WRONG = list(_wrong_arguments())
# a fake tensor of another device or layout is refused by torch, and a backend is chosen when the operator runs
WRONG_FAKES = [w for w in WRONG if w[2] not in (_to_meta, torch.Tensor.to_sparse) and w[1] != "backend"]


@pytest.mark.parametrize("op,name,change,error,message", WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_registered_operators_check(op, name, change, error, message):
    arguments = _arguments(op, training=False)
    arguments[name] = change(arguments[name])
    before = {n: t.clone() for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.device.type == "cpu"}
    with pytest.raises(error, match=f"{op}.*({message})"):
        _call(op, arguments)
    for n, t in before.items():
        assert torch.equal(t.to_dense(), arguments[n].to_dense()), n


@pytest.mark.parametrize("op,name,change,error,message", WRONG_FAKES, ids=lambda v: v if isinstance(v, str) else "")
def test_fake_kernels_check(op, name, change, error, message):
    """Under torch.compile a bad input raises at compile time."""
    arguments = _arguments(op, training=False)
    arguments[name] = change(arguments[name])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        with pytest.raises(error, match=f"{op}.*({message})"):
            _call(op, fakes)


@pytest.mark.parametrize("op", FORWARDS[:3])
def test_registered_operators_check_statistics(op):
    arguments, eval_arguments = _arguments(op), _arguments(op, training=False)
    name = next(n for n in arguments if n.endswith("running_mean"))
    with pytest.raises(ValueError, match=f"{name}.*must be tensors where training=False"):
        _call(op, eval_arguments | {n: None for n in arguments if "running" in n})
    with pytest.raises(ValueError, match="must both be tensors or both be None"):
        _call(op, eval_arguments | {name: None})
    with pytest.raises(ValueError, match="running statistics must be None where batch_statistics is True"):
        _call(op, arguments | {n: t for n, t in eval_arguments.items() if "running" in n})
    with pytest.raises(ValueError, match="more than one value per channel"):
        _call(op, arguments | {"x": torch.randn(1, 8, 1, 1)})
    with pytest.raises(ValueError, match="eps must be positive in training"):
        _call(op, arguments | {"eps": 0.0})
    double = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    with pytest.raises(NotImplementedError, match="backend 'cpu' cannot run this: it takes float32"):
        _call(op, double)


def _strided(t: torch.Tensor) -> torch.Tensor:
    larger = torch.full((*t.shape, 2), 7.0, dtype=t.dtype)
    larger[..., 0] = t
    return larger[..., 0]


def _expanded(t: torch.Tensor) -> torch.Tensor:
    return t[:1].expand(t.shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("op", REGISTERED)
def test_registered_operators_take_strided_tensors(op, training):
    """Like the public functions they read strided tensors in place; results equal those of dense ones and have the layout
    that the fake kernel gives."""
    arguments = _arguments(op, training)
    tensors = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    changes = {n: {n: _strided(t)} for n, t in tensors.items()} | {"all": {n: _strided(t) for n, t in tensors.items()}}
    changes |= {f"{n} expanded": {n: _expanded(t)} for n, t in tensors.items() if t.dim() == 4 and len(t) == 2}
    for name, changed in changes.items():
        strided = arguments | changed
        dense = {n: t.contiguous() if isinstance(t, torch.Tensor) else t for n, t in strided.items()}
        results, expected = _call(op, strided), _call(op, dense)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in strided.items()}
            said = _call(op, fakes)
        results, expected, said = ((t,) if isinstance(t, torch.Tensor) else t for t in (results, expected, said))
        for actual, right, fake in zip(results, expected, said, strict=True):
            torch.testing.assert_close(actual, right, msg=name)
            assert (actual.shape, actual.dtype) == (fake.shape, fake.dtype), name
            assert actual.stride() == fake.stride(), name


@pytest.mark.parametrize("op", REGISTERED)
def test_registered_operators_take_an_empty_batch(op):
    arguments = _arguments(op)
    sizes = {n: t.shape for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    results = _call(
        op, {n: t[:0] if isinstance(t, torch.Tensor) and sizes[n][0] == 2 else t for n, t in arguments.items()}
    )
    expected = _call(op, arguments)
    results, expected = ((t,) if isinstance(t, torch.Tensor) else t for t in (results, expected))
    for actual, full in zip(results, expected, strict=True):
        assert actual.shape == ((0, *full.shape[1:]) if full.dim() == 4 and len(full) == 2 else full.shape)
        assert not actual.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("op", REGISTERED)
def test_opcheck_of_layouts(op, training):
    """Covers the backward operators too; test_dispatch.py has the checks that need gradients."""
    for change in (
        lambda t: t,
        lambda t: t.contiguous(memory_format=torch.channels_last),
        _strided,
    ):
        arguments = _arguments(op, training)
        for name, t in arguments.items():
            if isinstance(t, torch.Tensor) and t.dim() == 4:
                arguments[name] = change(t)
        torch.library.opcheck(
            getattr(torch.ops.convmixer, op), tuple(arguments.values()), test_utils=("test_schema", "test_faketensor")
        )

# SPDX-License-Identifier: MIT
"""Inputs and modes that the operators do not accept: a layer runs its modules, or raises and has changed nothing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_twice_eager
from model_helpers import (
    DIM,
    MODES,
    SMALL,
    Annotated,
    assert_matches,
    assert_refused_alike,
    assert_same_steps,
    attribute,
    by_name,
    cumulative_average,
    features,
    image,
    make_pair,
    other_eps,
    step,
)
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from convmixer import ConvMixer

pytestmark = pytest.mark.usefixtures("one_thread")


@MODES
def test_float64_is_the_references_bit_by_bit(calls, training):
    ours, ref = (m.double().train(training) for m in make_pair())
    assert_same_steps(ours, ref, image(dtype=torch.float64))
    assert calls == []


@pytest.mark.parametrize(
    "x",
    [
        features()[0],
        features().double(),
        features().bfloat16(),
        features().to(torch.complex64),
        features().int(),
        [1.0],
    ],
    ids=["unbatched", "float64", "bfloat16", "complex", "int", "list"],
)
def test_inputs_that_the_reference_refuses_are_refused_alike(x):
    layer, ref = (m[3] for m in make_pair())
    before = copy.deepcopy(layer.state_dict())
    assert_refused_alike(layer, ref, x)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def half_norm(layer):
    layer[3].half()


def half_running_statistics(layer):
    layer[3].running_mean, layer[3].running_var = layer[3].running_mean.half(), layer[3].running_var.half()


def one_running_statistic(layer):
    layer.eval()[3].running_var = None


def negative_eps_in_evaluation(layer):
    layer.eval()[3].eps = -1e-5


def smaller_depthwise_weight(layer):
    layer[0].fn[0].padding = (2, 2)
    layer[0].fn[0].weight = nn.Parameter(torch.zeros(DIM, 1, 3, 3))


def depthwise_weight_of_two_channels(layer):
    layer[0].fn[0].weight = nn.Parameter(torch.zeros(DIM, 2, 5, 5))


@pytest.mark.parametrize(
    "change",
    [
        half_norm,
        half_running_statistics,
        one_running_statistic,
        attribute("3", "eps", 0.0),
        negative_eps_in_evaluation,
        smaller_depthwise_weight,
        depthwise_weight_of_two_channels,
        attribute("1", "padding", "full"),
        attribute("0.fn.0", "groups", float(DIM)),
        attribute("0.fn.0", "padding", (2.0, 2.0)),
        attribute("3", "momentum", "0.1"),
        attribute("3", "eps", "0.1"),
    ],
    ids=by_name,
)
def test_layers_that_the_reference_refuses_are_refused_alike(calls, change):
    layer, ref = (m[3] for m in make_pair())
    for one in (layer, ref):
        change(one)
    assert_refused_alike(layer, ref, features())
    assert calls == []


def wrong_pointwise_weight(layer):
    layer[1].weight = nn.Parameter(torch.zeros(DIM, DIM // 2, 1, 1))


def wrong_pointwise_norm(layer):
    other_eps(layer)
    layer[3].bias = nn.Parameter(torch.zeros(DIM + 1))


@pytest.mark.parametrize(
    ("change", "x", "message"),
    [
        (lambda layer: None, features()[:, :8], "mixer_layer: depthwise_weight must be"),
        (lambda layer: None, features(1, 1), "mixer_layer: training needs more than one value per channel"),
        (cumulative_average, features(1, 1), "mixer_layer: training needs more than one value per channel"),
        (wrong_pointwise_weight, features(), "mixer_layer: pointwise_weight must be"),
        (wrong_pointwise_norm, features(), "pointwise_block: norm_bias must be"),
    ],
    ids=["channels", "one-value", "one-value-averaged", "pointwise-weight", "pointwise-norm"],
)
def test_a_call_that_raises_changes_nothing(change, x, message):
    layer = make_pair()[0][3]
    change(layer)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        layer(x)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def column_of_norm_weights(layer):
    layer[3].weight = nn.Parameter(layer[3].weight.detach()[:, None])


def test_what_the_operator_refuses_and_the_reference_runs(calls, monkeypatch):
    """In evaluation without gradients torch accepts norm weights of any number of dimensions: the layer runs its modules."""
    model, ref = (m.eval() for m in make_pair())
    for one in (model, ref):
        column_of_norm_weights(one[3])
    with torch.no_grad():
        assert torch.equal(model[3](features()), ref[3](features()))
        assert calls == ["mixer_layer"]
        torch.testing.assert_close(model(image()), ref(image()), rtol=1e-4, atol=1e-4)
        monkeypatch.setenv("CONVMIXER_BACKEND", "nonsense")
        with pytest.raises(ValueError, match="CONVMIXER_BACKEND must be one of"):
            model[3](features())


@pytest.mark.parametrize("name", ["n0", "h0"])
@MODES
def test_empty_inputs_are_the_references(training, name):
    layer, ref = (m[3].train(training) for m in make_pair())
    x = features()[:0] if name == "n0" else features()[:, :, :0]
    outcomes = []
    for one in (layer, ref):
        try:
            outcomes.append(one(x).shape)
        except (RuntimeError, ValueError) as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]
    torch.testing.assert_close(layer.state_dict(), ref.state_dict(), rtol=0, atol=0, equal_nan=True)


class DoublesGelu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is F.gelu else out


class DoublesGeluOperator(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is torch.ops.aten.gelu.default else out


@MODES
@pytest.mark.parametrize("mode", [DoublesGelu, DoublesGeluOperator])
def test_modes_see_what_the_reference_shows(calls, mode, training):
    ours, ref = (m.train(training) for m in make_pair())
    plain = copy.deepcopy(ref)(image())
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), mode():
            expected = ref(image())
            assert torch.equal(ours(image()), expected)
        assert not torch.equal(expected, plain)
    assert calls == []


@MODES
def test_a_default_device_or_dtype_changes_nothing(calls, training):
    layer, twin = (make_pair()[0][3].train(training) for _ in range(2))
    x, dy = features().requires_grad_(), features() + 1
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            results = torch.autograd.grad(layer(x), (x, *layer.parameters()), dy)
            with torch.no_grad():
                results += (layer(x),)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = torch.autograd.grad(twin(x), (x, *twin.parameters()), dy)
    with torch.no_grad():
        expected += (twin(x),)
    torch.testing.assert_close(results, expected, rtol=0, atol=0)
    assert calls == ["mixer_layer"] * 4


def test_meta_fake_and_subclassed_inputs(calls):
    with torch.device("meta"):
        assert ConvMixer(**SMALL)(torch.empty(2, 3, 12, 12)).shape == (2, 7)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert ConvMixer(**SMALL)(torch.empty(2, 3, 12, 12)).shape == (2, 7)
    layer, ref = (m[3].eval() for m in make_pair())
    y = layer(features().as_subclass(Annotated))
    assert type(y) is Annotated
    assert torch.equal(y.as_subclass(torch.Tensor), ref(features()))
    assert calls == []


def test_transforms_and_forward_mode(calls):
    layer, ref = (m[3].eval() for m in make_pair())
    parameters = dict(ref.named_parameters())

    def loss(model):
        return lambda p, x: torch.func.functional_call(model, p, (x,)).square().sum()

    results = [torch.func.grad(loss(one))(parameters, features()) for one in (layer, ref)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    results = [torch.func.vmap(one)(torch.stack([features(), features() + 1])) for one in (layer, ref)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    results = [torch.func.jvp(one, (features(),), (features(),)) for one in (layer, ref)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    with torch.autograd.forward_ad.dual_level():
        results = [
            torch.autograd.forward_ad.unpack_dual(
                one(torch.autograd.forward_ad.make_dual(features(), features()))
            ).tangent
            for one in (layer, ref)
        ]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert calls == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_scripting_and_export_see_the_modules(calls):
    model = make_pair()[0].eval()
    expected = make_pair()[1].eval()(image())
    programs = {
        "torch.fx": torch.fx.symbolic_trace(model),
        "torch.jit.trace": torch.jit.trace(model, image(), check_trace=False),
        "torch.jit.script": torch.jit.script(model),
        "torch.export": torch.export.export(model, (image(),)).module(),
        "torch.export, strict": torch.export.export(model, (image(),), strict=True).module(),
    }
    assert calls == []
    for name in ("torch.export", "torch.export, strict"):
        assert "convmixer" not in programs[name].code, name
    for name, program in programs.items():
        torch.testing.assert_close(program(image()), expected, msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing_without_gradients_warns_of_nothing():
    model = make_pair()[0].eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        program = torch.jit.trace(model, image(), check_trace=False)
        torch.testing.assert_close(program(image(5)), model(image(5)))


@MODES
def test_autocast(calls, training):
    """Inside a model the stem's result has autocast's dtype. If a layer is given float32 instead, it runs its modules."""
    ours, ref = (m.train(training) for m in make_pair())
    exact = step(copy.deepcopy(ref).double(), image().double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, actual = (step(m, image()) for m in (ref, ours))
        assert calls == ["mixer_layer"] * 2
        assert actual["output"].dtype == eager["output"].dtype == torch.bfloat16
        wide = [m[3].eval()(features()) for m in make_pair()]
        assert torch.equal(*wide)
        assert calls == ["mixer_layer"] * 2
    for name, value in actual.items():
        assert value.dtype == eager[name].dtype
        if value.dtype.is_floating_point:
            # parameters stay float32, but eager's error comes from the 16-bit arithmetic before them
            rounded = (t[name].to(torch.bfloat16) for t in (actual, eager))
            assert_twice_eager(name, *rounded, exact[name])


def test_float32_norms_in_a_half_model(calls):
    layer, ref = (m[3].bfloat16() for m in make_pair())
    for one in (layer, ref):
        one[0].fn[2].float()
        one[3].float()
    assert_matches(layer, ref, features(dtype=torch.bfloat16))
    assert calls == ["mixer_layer"]

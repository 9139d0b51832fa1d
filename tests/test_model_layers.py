# SPDX-License-Identifier: MIT
"""When a layer runs as one operator, as two, or by its modules: settings, hooks, replaced modules."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from model_helpers import (
    DIM,
    MODES,
    Annotated,
    assert_matches,
    assert_same_steps,
    attribute,
    by_name,
    cumulative_average,
    features,
    image,
    make_pair,
    other_eps,
    replaced,
)
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune

from convmixer import MixerLayer, reference

pytestmark = pytest.mark.usefixtures("one_thread")


def freeze_norms(layer):
    layer[0].fn[2].eval()
    layer[3].eval()


def untracked(layer):
    for holder, name in ((layer[0].fn, "2"), (layer, "3")):
        setattr(holder, name, nn.BatchNorm2d(DIM, track_running_stats=False).train(layer.training))


def stop_tracking(layer):
    layer[0].fn[2].track_running_stats = False
    layer[3].track_running_stats = False


def no_biases(layer):
    layer[0].fn[0].bias = None
    layer[1].register_parameter("bias", None)


def numeric_padding(layer):
    layer[0].fn[0].padding = (2, 2)
    layer[1].padding = "valid"


def replaced_kernel(layer):
    torch.manual_seed(9)
    layer[0].fn[0].weight = nn.Parameter(torch.randn(DIM, 1, 3, 4) / 3)


def attributes_that_nothing_reads(layer):
    layer[0].fn[0].in_channels = layer[0].fn[0].out_channels = layer[1].in_channels = 3
    layer[0].fn[0].kernel_size = (7, 7)
    layer[3].num_features = 3
    layer[3].training = int(layer[3].training)


def wider(layer):
    layer[1] = nn.Conv2d(DIM, 24, 1)
    layer[3] = nn.BatchNorm2d(24).train(layer.training)


ONE, TWO = ["mixer_layer"], ["depthwise_block", "pointwise_block"]
# change of a layer -> the operators that run it in eval and in training
SETTINGS = [
    (attribute("0.fn.2", "training", False), ONE, TWO),
    (freeze_norms, ONE, ONE),
    (cumulative_average, ONE, ONE),
    (untracked, ONE, ONE),
    (stop_tracking, ONE, ONE),
    (replaced("3", lambda: nn.BatchNorm2d(DIM, track_running_stats=False)), TWO, ONE),
    (replaced("0.fn.2", lambda: nn.BatchNorm2d(DIM, affine=False)), ONE, ONE),
    (other_eps, TWO, TWO),
    (attribute("0.fn.2", "momentum", 0.7), TWO, TWO),
    (replaced("2", lambda: nn.ReLU(inplace=True)), TWO, TWO),
    (no_biases, ONE, ONE),
    (numeric_padding, ONE, ONE),
    (replaced_kernel, ONE, ONE),
    (attributes_that_nothing_reads, ONE, ONE),
    (wider, ONE, ONE),
]


@MODES
@pytest.mark.parametrize(("change", "eval_calls", "train_calls"), SETTINGS, ids=[by_name(s[0]) for s in SETTINGS])
def test_settings_of_norms_and_convolutions(calls, change, eval_calls, train_calls, training):
    layer, ref = (m[3].train(training) for m in make_pair())
    for one in (layer, ref):
        torch.manual_seed(4)
        change(one)
    assert_matches(layer, ref, features())
    assert calls == (train_calls if training else eval_calls)


def test_cumulative_average_over_steps():
    layer, ref = (m[3] for m in make_pair())
    for one in (layer, ref):
        cumulative_average(one)
    for n in (3, 2, 5):
        assert_matches(layer, ref, features(n))
    assert layer[3].num_batches_tracked == 5


def inner_modules(layer: nn.Sequential) -> dict[str, nn.Module]:
    return {name: module for name, module in layer.named_modules() if name}


INNER = ["0", "0.fn", "0.fn.0", "0.fn.1", "0.fn.2", "1", "2", "3"]


def forward_hook(module, seen):
    return module.register_forward_hook(lambda m, args, out: seen.append(m))


def forward_pre_hook(module, seen):
    return module.register_forward_pre_hook(lambda m, args: seen.append(m))


def full_backward_hook(module, seen):
    return module.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(m))


def full_backward_pre_hook(module, seen):
    return module.register_full_backward_pre_hook(lambda m, grad_out: seen.append(m))


def legacy_backward_hook(module, seen):
    return module.register_backward_hook(lambda m, grad_in, grad_out: seen.append(m))


HOOKS = pytest.mark.parametrize(
    "register",
    [forward_hook, forward_pre_hook, full_backward_hook, full_backward_pre_hook, legacy_backward_hook],
    ids=by_name,
)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@HOOKS
@pytest.mark.parametrize("name", INNER)
def test_hooks_on_inner_modules_fire(calls, register, name):
    layer = make_pair()[0][3]
    layer(features())
    assert calls == ["mixer_layer"]
    module, seen = inner_modules(layer)[name], []
    handle = register(module, seen)
    layer(features().requires_grad_()).sum().backward()
    assert seen == [module]
    assert calls == ["mixer_layer"]
    handle.remove()
    layer(features())
    assert len(seen) == 1
    assert calls == ["mixer_layer"] * 2


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@HOOKS
def test_hooks_on_whole_layers_and_models_fire_beside_the_operator(calls, register):
    model, seen = make_pair()[0], []
    register(model[3], seen)
    register(model, seen)
    model(image().requires_grad_()).sum().backward()
    assert {id(m) for m in seen} == {id(model), id(model[3])}
    assert len(seen) == 2
    assert calls == ["mixer_layer"] * 2


@pytest.mark.parametrize(
    "register",
    [
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    ],
    ids=by_name,
)
def test_hooks_on_all_modules_fire(calls, register):
    layer, seen = make_pair()[0][3], []
    handle = register(lambda m, *rest: seen.append(m))
    try:
        layer(features().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    # each of the 8 inner modules and the layer once; backward hooks run in the reverse order
    assert {id(m) for m in seen} == {id(m) for m in layer.modules()}
    assert len(seen) == len(INNER) + 1
    assert calls == []
    layer(features())
    assert calls == ["mixer_layer"]


def test_a_forward_hook_may_replace_the_output():
    layer, ref = (m[3].eval() for m in make_pair())
    for one in (layer, ref):
        one[0].fn[0].register_forward_hook(lambda m, args, out: out.clamp(-0.1, 0.1))
    assert torch.equal(layer(features()), ref(features()))


class DoubledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def doubled_conv(layer):
    layer[0].fn[0].__class__ = DoubledConv


def parametrized(layer):
    parametrize.register_parametrization(layer[0].fn[0], "weight", Doubled())


def weight_norm(layer):
    parametrizations.weight_norm(layer[1])


def spectral_norm(layer):
    torch.manual_seed(6)
    parametrizations.spectral_norm(layer[1])


def legacy_spectral_norm(layer):
    torch.manual_seed(6)
    nn.utils.spectral_norm(layer[0].fn[0])


def pruned(layer):
    prune.l1_unstructured(layer[0].fn[0], "weight", 0.5)


def own_forward(layer):
    layer[1].forward = lambda x: 3 * x


def own_forward_of_the_residual(layer):
    layer[0].forward = lambda x: x - layer[0].fn(x)


def plain_attribute(path, name):
    """A change of a layer: a parameter or buffer becomes a plain attribute."""

    def change(layer):
        holder = layer.get_submodule(path)
        value = 2 * getattr(holder, name).detach()
        delattr(holder, name)
        setattr(holder, name, value)

    change.__name__ = f"plain {path}.{name}"
    return change


def convolution_bias_deleted(layer):
    del layer[0].fn[0].bias
    layer[0].fn[0].bias = None


def replaced_pointwise_weight(layer):
    torch.manual_seed(7)
    layer[1].weight = nn.Parameter(torch.randn(DIM, DIM, 3, 3) / 24)


def own_conv_forward(layer):
    layer[1]._conv_forward = lambda x, weight, bias: F.conv2d(x, 2 * weight, bias)


def own_input_check(layer):
    layer[3]._check_input_dim = lambda x: x.mul_(2)


def hidden_weight(layer):
    layer[1].__dict__["weight"] = 2 * layer[1].weight.detach()


def hidden_running_mean(layer):
    layer[3].__dict__["running_mean"] = layer[3].running_mean + 1


def fused_pair(layer):
    layer[1] = nn.utils.fusion.fuse_conv_bn_eval(layer[1].eval(), layer[3].eval())
    layer[3] = nn.Identity()


def dropout_added(layer):
    layer.append(nn.Flatten())


def norm_removed(layer):
    del layer[3]


def longer_fn(layer):
    layer[0].fn.append(nn.Tanh())


class ScaledResidual(reference.Residual):
    def forward(self, x):
        return 0.5 * self.fn(x) + x


def scaled_residual(layer):
    layer[0].__class__ = ScaledResidual


def subclassed_parameter(layer):
    layer[1].weight.data = layer[1].weight.data.as_subclass(Annotated)
    layer[1]._parameters["weight"] = layer[1].weight.detach().as_subclass(Annotated)


def subclassed_norm_parameter(layer):
    layer[0].fn[2]._parameters["bias"] = layer[0].fn[2].bias.detach().as_subclass(Annotated)


ALTERATIONS = [
    doubled_conv,
    parametrized,
    weight_norm,
    spectral_norm,
    legacy_spectral_norm,
    pruned,
    own_forward,
    own_forward_of_the_residual,
    plain_attribute("1", "weight"),
    plain_attribute("1", "bias"),
    convolution_bias_deleted,
    plain_attribute("3", "bias"),
    plain_attribute("0.fn.2", "running_var"),
    plain_attribute("3", "num_batches_tracked"),
    replaced("3", lambda: nn.GroupNorm(4, DIM)),
    replaced("0.fn.2", lambda: nn.GroupNorm(4, DIM)),
    replaced("0.fn.1", nn.SiLU),
    attribute("0.fn.0", "dilation", (2, 2)),
    replaced("0.fn.0", lambda: nn.Conv2d(DIM, DIM, 5, groups=DIM, padding="same", padding_mode="reflect")),
    replaced("0.fn.0", lambda: nn.Conv2d(DIM, DIM, 5, groups=4, padding="same")),
    replaced("1", lambda: nn.Conv2d(DIM, DIM, 1, groups=2)),
    replaced("1", lambda: nn.Conv2d(DIM, DIM, 3, padding=1)),
    attribute("1", "stride", (2, 2)),
    attribute("1", "padding", (1, 1)),
    replaced_pointwise_weight,
    attribute("0.fn.0", "padding", 2),
    attribute("3", "eps", float("inf")),
    attribute("0.fn.2", "momentum", float("nan")),
    attribute("3", "momentum", float("inf")),
    own_conv_forward,
    own_input_check,
    hidden_weight,
    hidden_running_mean,
    fused_pair,
    dropout_added,
    norm_removed,
    longer_fn,
    scaled_residual,
    subclassed_parameter,
    subclassed_norm_parameter,
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("alter", ALTERATIONS, ids=by_name)
def test_an_altered_layer_runs_its_modules(calls, alter):
    layer, ref = (m[3] for m in make_pair())
    for one in (layer, ref):
        alter(one)
    for _ in range(2):
        assert_same_steps(layer, ref, features())
    assert type(layer) is MixerLayer
    assert calls == []


def test_a_compiled_inner_module_is_called(calls):
    layer = make_pair()[0][3].eval()
    layer[1].compile(backend="eager")
    layer(features())
    assert calls == []


REPLACED = [
    (nn.Module, "__call__"),
    (nn.Conv2d, "forward"),
    (nn.Conv2d, "_conv_forward"),
    (nn.BatchNorm2d, "forward"),
    (nn.BatchNorm2d, "_check_input_dim"),
    (nn.GELU, "forward"),
    (nn.GELU, "__call__"),
    (nn.Sequential, "forward"),
    (reference.Residual, "forward"),
    (reference.Residual, "__call__"),
    (F, "conv2d"),
    (F, "gelu"),
    (F, "batch_norm"),
    (torch, "batch_norm"),
]


@MODES
@pytest.mark.parametrize(("owner", "name"), REPLACED, ids=by_name)
def test_what_is_replaced_in_torch_is_called(calls, monkeypatch, owner, name, training):
    model, ref = (m.train(training) for m in make_pair())
    original, seen = getattr(owner, name), []

    def replacement(*args, **kwargs):
        seen.append(1)
        out = original(*args, **kwargs)
        return 1.5 * out if isinstance(out, torch.Tensor) else out

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, replacement)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                expected, count = ref(image()), len(seen)
                assert torch.equal(model(image()), expected)
                assert len(seen) == 2 * count > 0
                seen.clear()
    assert calls == []
    model(image())
    assert calls == ["mixer_layer"] * 2


BEFORE_THE_IMPORT = """
import functools, torch
from torch import nn
original = nn.GELU.forward
nn.GELU.forward = functools.wraps(original)(lambda self, x: 2 * original(self, x))
from convmixer import ConvMixer, accelerate, reference
model = ConvMixer(8, 1, 3, 2, 4).eval()
ref = reference.ConvMixer(8, 1, 3, 2, 4).eval()
ref.load_state_dict(model.state_dict())
x = torch.randn(2, 3, 8, 8)
assert torch.equal(model(x), ref(x))
print(accelerate(ref))
"""


def test_what_was_replaced_before_the_import_is_called():
    done = subprocess.run([sys.executable, "-c", BEFORE_THE_IMPORT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "3: GELU.forward is not torch's own" in done.stdout

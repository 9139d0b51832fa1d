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
    count_operators,
    cumulative_average,
    features,
    image,
    make_pair,
    other_eps,
    step,
)
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune

from convmixer import MixerLayer, reference


@pytest.fixture(autouse=True)
def _one_thread():
    """These tensors are too small to share; conftest.py restores the number."""
    torch.set_num_threads(1)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the operators that layers call, in order."""
    return count_operators(monkeypatch)


# ---- settings of norms and convolutions ------------------------------------------------------------------------------


def freeze_one_norm(layer):
    layer[0].fn[2].eval()


def freeze_norms(layer):
    layer[0].fn[2].eval()
    layer[3].eval()


def untracked(layer):
    for holder, name in ((layer[0].fn, "2"), (layer, "3")):
        setattr(holder, name, nn.BatchNorm2d(DIM, track_running_stats=False).train(layer.training))


def stop_tracking(layer):
    layer[0].fn[2].track_running_stats = False
    layer[3].track_running_stats = False


def untracked_pointwise(layer):
    layer[3] = nn.BatchNorm2d(DIM, track_running_stats=False).train(layer.training)


def not_affine(layer):
    layer[0].fn[2] = nn.BatchNorm2d(DIM, affine=False).train(layer.training)


def other_momentum(layer):
    layer[0].fn[2].momentum = 0.7


def other_activation(layer):
    layer[2] = nn.ReLU(inplace=True)


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
    (freeze_one_norm, ONE, TWO),
    (freeze_norms, ONE, ONE),
    (cumulative_average, ONE, ONE),
    (untracked, ONE, ONE),
    (stop_tracking, ONE, ONE),
    (untracked_pointwise, TWO, ONE),
    (not_affine, ONE, ONE),
    (other_eps, TWO, TWO),
    (other_momentum, TWO, TWO),
    (other_activation, TWO, TWO),
    (no_biases, ONE, ONE),
    (numeric_padding, ONE, ONE),
    (replaced_kernel, ONE, ONE),
    (attributes_that_nothing_reads, ONE, ONE),
    (wider, ONE, ONE),
]


@MODES
@pytest.mark.parametrize(("change", "eval_calls", "train_calls"), SETTINGS, ids=[s[0].__name__ for s in SETTINGS])
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


# ---- never a silently ignored hook ------------------------------------------------------------------------------


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


HOOKS = [forward_hook, forward_pre_hook, full_backward_hook, full_backward_pre_hook, legacy_backward_hook]
HOOKS = pytest.mark.parametrize("register", HOOKS, ids=lambda f: f.__name__)


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
    ids=lambda f: f.__name__,
)
def test_hooks_on_all_modules_fire(calls, register):
    layer, seen = make_pair()[0][3], []
    handle = register(lambda m, *rest: seen.append(m))
    try:
        layer(features().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    # the order of backward hooks is the reverse; each of the 8 inner modules and the layer once
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


def plain_attribute(layer):
    weight = 2 * layer[1].weight.detach()
    del layer[1].weight
    layer[1].weight = weight


def _as_plain_attribute(module, name):
    value = getattr(module, name)
    delattr(module, name)
    setattr(module, name, value if value is None else value.detach())


def plain_convolution_bias(layer):
    _as_plain_attribute(layer[1], "bias")


def convolution_bias_deleted(layer):
    del layer[0].fn[0].bias
    layer[0].fn[0].bias = None


def plain_norm_bias(layer):
    _as_plain_attribute(layer[3], "bias")


def plain_running_var(layer):
    _as_plain_attribute(layer[0].fn[2], "running_var")


def plain_counter(layer):
    _as_plain_attribute(layer[3], "num_batches_tracked")


def group_norm(layer):
    layer[3] = nn.GroupNorm(4, DIM)


def sync_batch_norm(layer):
    layer[3] = nn.SyncBatchNorm.convert_sync_batchnorm(layer[3])


def group_norm_inside(layer):
    layer[0].fn[2] = nn.GroupNorm(4, DIM)


def silu(layer):
    layer[0].fn[1] = nn.SiLU()


def dilated(layer):
    layer[0].fn[0].dilation = (2, 2)


def reflecting(layer):
    torch.manual_seed(7)
    layer[0].fn[0] = nn.Conv2d(DIM, DIM, 5, groups=DIM, padding="same", padding_mode="reflect")


def grouped_less(layer):
    torch.manual_seed(7)
    layer[0].fn[0] = nn.Conv2d(DIM, DIM, 5, groups=4, padding="same")


def grouped_pointwise(layer):
    torch.manual_seed(7)
    layer[1] = nn.Conv2d(DIM, DIM, 1, groups=2)


def pointwise_of_three(layer):
    torch.manual_seed(7)
    layer[1] = nn.Conv2d(DIM, DIM, 3, padding=1)


def strided_pointwise(layer):
    layer[1].stride = (2, 2)


def padded_pointwise(layer):
    layer[1].padding = (1, 1)


def replaced_pointwise_weight(layer):
    torch.manual_seed(7)
    layer[1].weight = nn.Parameter(torch.randn(DIM, DIM, 3, 3) / 24)


def padding_as_a_number(layer):
    layer[0].fn[0].padding = 2


def infinite_eps(layer):
    layer[3].eps = float("inf")


def momentum_that_is_no_number(layer):
    layer[0].fn[2].momentum = float("nan")


def infinite_momentum(layer):
    layer[3].momentum = float("inf")


def own_conv_forward(layer):
    layer[1]._conv_forward = lambda x, weight, bias: F.conv2d(x, 2 * weight, bias)


def own_input_check(layer):
    layer[3]._check_input_dim = lambda x: x.mul_(2)


def hidden_weight(layer):
    layer[1].__dict__["weight"] = 2 * layer[1].weight.detach()


def hidden_running_mean(layer):
    layer[3].__dict__["running_mean"] = layer[3].running_mean + 1


def fused_pair(layer):
    nn.utils.fusion.fuse_conv_bn_weights  # noqa: B018 - the name must exist
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
    plain_attribute,
    plain_convolution_bias,
    convolution_bias_deleted,
    plain_norm_bias,
    plain_running_var,
    plain_counter,
    group_norm,
    group_norm_inside,
    silu,
    dilated,
    reflecting,
    grouped_less,
    grouped_pointwise,
    pointwise_of_three,
    strided_pointwise,
    padded_pointwise,
    replaced_pointwise_weight,
    padding_as_a_number,
    infinite_eps,
    momentum_that_is_no_number,
    infinite_momentum,
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
@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda f: f.__name__)
def test_an_altered_layer_runs_its_modules(calls, alter):
    layer, ref = (m[3] for m in make_pair())
    for one in (layer, ref):
        alter(one)
    for _ in range(2):
        results = [step(one, features()) for one in (layer, ref)]
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
    assert type(layer) is MixerLayer
    assert calls == []


def test_a_sync_batch_norm_runs_as_a_module(calls):
    layer, ref = (m[3].eval() for m in make_pair())
    for one in (layer, ref):
        sync_batch_norm(one)
    assert torch.equal(layer(features()), ref(features()))
    assert calls == []


def test_a_compiled_inner_module_is_called(calls):
    layer = make_pair()[0][3].eval()
    layer[1].compile(backend="eager")
    layer(features())
    assert calls == []


# ---- what somebody replaced for all ---------------------------------------------------------------------------------

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
@pytest.mark.parametrize(("owner", "name"), REPLACED, ids=lambda v: getattr(v, "__name__", v))
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

# SPDX-License-Identifier: MIT
"""accelerate: which layers of other people's models it takes, which it leaves and why, and that results stay."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys

import pytest
import torch
from model_helpers import DIM, MODES, assert_matches, attribute, by_name, features, image, replaced
from torch import nn

from convmixer import MixerLayer, MixerSequential, accelerate, recognize, reference
from convmixer_kernels.recognize import recognize_block, why_not_convolution


class Residual(nn.Module):
    """As the paper's script and timm write it."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x) + x


class Swapped(Residual):
    def forward(self, inputs):
        """The same sum in the other order."""
        return inputs + self.fn(inputs)


def layer(residual: type[nn.Module] = Residual, act: type[nn.Module] = nn.GELU, kernel_size: int = 5) -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(DIM, DIM, kernel_size, groups=DIM, padding="same"), act(), nn.BatchNorm2d(DIM))
    return nn.Sequential(residual(block), nn.Conv2d(DIM, DIM, 1), act(), nn.BatchNorm2d(DIM))


class TimmLike(nn.Module):
    """The structure of timm's ConvMixer: stem, blocks, pooling, head."""

    def __init__(self, depth: int = 3, act: type[nn.Module] = nn.GELU):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, DIM, 2, stride=2), act(), nn.BatchNorm2d(DIM))
        self.blocks = nn.Sequential(*[layer(act=act) for _ in range(depth)])
        self.pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(DIM, 7)

    def forward(self, x):
        return self.head(self.pooling(self.blocks(self.stem(x))))


pytestmark = pytest.mark.usefixtures("one_thread")


MODELS = {
    "reference": lambda: reference.ConvMixer(DIM, 3, kernel_size=5, patch_size=2, n_classes=7),
    "timm-like": TimmLike,
    "timm-like-relu": lambda: TimmLike(act=nn.ReLU),
    "nested": lambda: nn.ModuleDict({"net": nn.Sequential(TimmLike())})["net"],
}


@MODES
@pytest.mark.parametrize("name", MODELS)
def test_results_keys_and_parameters_stay(calls, name, training):
    torch.manual_seed(0)
    model = MODELS[name]().train(training)
    original = copy.deepcopy(model)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    report = accelerate(model)
    assert (report.accelerated, report.skipped) == (3, [])
    assert list(model.state_dict()) == keys
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert_matches(model, original, image())
    assert calls == ["mixer_layer"] * 3


def test_nothing_is_set_on_an_instance():
    model = TimmLike()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    accelerate(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert all(type(m) is MixerLayer for m in model.blocks)
    assert type(model.blocks) is MixerSequential


def test_again_is_harmless():
    model = TimmLike()
    assert str(accelerate(model)) == "accelerated 3 mixer layers"
    assert accelerate(model).accelerated == 3


def test_a_root_that_is_a_layer(calls):
    one = layer()
    expected = one.eval()(features())
    report = accelerate(one)
    assert report.accelerated == 1
    assert type(one) is MixerLayer
    assert str(report) == "accelerated 1 mixer layer"
    torch.testing.assert_close(one(features()), expected, rtol=1e-4, atol=1e-5)
    assert calls == ["mixer_layer"]


def test_a_model_without_layers():
    report = accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.Sequential()))
    assert (report.accelerated, report.skipped) == (0, [])
    assert str(report).startswith("accelerated nothing: found no mixer layer, no conv-activation-norm block")
    absent = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3))
    absent[0] = None
    assert accelerate(nn.Sequential(absent)).accelerated == 0
    with pytest.raises(TypeError, match=r"accelerate: model must be an nn\.Module, got list"):
        accelerate([layer()])


class Scaled(Residual):
    def forward(self, x):
        return self.fn(x) * 0.5 + x


class Twice(Residual):
    def forward(self, x):
        return self.fn(x) + self.fn(x)


class InTraining(Residual):
    def forward(self, x):
        return self.fn(x) + x if self.training else x


class Dropped(Residual):
    def forward(self, x):
        return nn.functional.dropout(self.fn(x), 0.1, self.training) + x


class Variadic(Residual):
    def forward(self, *x):
        return self.fn(x) + x


class OwnCall(Residual):
    def __call__(self, x):
        return super().__call__(x) * 2


class OwnLookup(Residual):
    def __getattr__(self, name):
        return nn.Tanh() if name == "fn" else super().__getattr__(name)


class OtherName(Residual):
    inner = staticmethod(torch.tanh)

    def forward(self, x):
        return self.inner(x) + x


class FnProperty(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.inner = fn

    @property
    def fn(self):
        return self.inner

    def forward(self, x):
        return self.fn(x) + x


@pytest.mark.parametrize("residual", [Residual, Swapped, reference.Residual], ids=lambda c: c.__qualname__)
def test_residuals_that_are_taken(residual):
    assert accelerate(layer(residual)).accelerated == 1


@pytest.mark.parametrize(
    "residual",
    [Scaled, Twice, InTraining, Dropped, Variadic, OwnCall, OwnLookup, OtherName, FnProperty],
    ids=lambda c: c.__qualname__,
)
def test_residuals_that_are_left(residual):
    model = nn.ModuleDict({"one": layer(residual), "two": layer()})
    report = accelerate(model)
    assert report.layers == 1
    assert type(model["one"]) is not MixerLayer
    assert report.skipped == [("one", f"its residual, {residual.__name__}, is not known to compute fn(x) + x")]
    assert f"left 1 unchanged:\n  one: its residual, {residual.__name__}" in str(report)


def test_a_residual_is_proven_once(calls, monkeypatch):
    """Accelerate proves it. A forward proves it again only if the class has another forward since."""

    class Own(Residual):
        def forward(self, x):
            return x + self.fn(x)

    one, proofs, prove = layer(Own), [], recognize._prove
    accelerate(one)
    monkeypatch.setattr(recognize, "_prove", lambda kind: proofs.append(kind) or prove(kind))
    one(features())
    assert (calls, proofs) == (["mixer_layer"], [])
    Own.forward = lambda self, x: self.fn(x) + x
    one(features())
    assert (calls, proofs) == (["mixer_layer"] * 2, [Own])


def test_a_residual_whose_class_changes_later(calls, monkeypatch):
    one = layer().eval()
    accelerate(one)
    one(features())
    assert len(calls) == 1
    monkeypatch.setattr(Residual, "forward", lambda self, x: self.fn(x))
    assert torch.equal(one(features()), nn.Sequential(*one)(features()))
    assert len(calls) == 1
    monkeypatch.undo()


class NamedSequential(nn.Sequential):
    pass


def subclassed(one):
    one.__class__ = NamedSequential


def inner_hook(one):
    one[1].register_forward_hook(lambda *a: None)


def parametrized(one):
    nn.utils.parametrizations.weight_norm(one[1])


def replaced_weight(one):
    conv = one[0].fn[0]
    weight = conv.weight.detach()
    del conv.weight
    conv.weight = weight


def replaced_counter(one):
    norm = one[3]
    del norm.num_batches_tracked
    norm.num_batches_tracked = torch.tensor(0)


def own_forward(one):
    one.forward = lambda x: x


def extra_module(one):
    one.append(nn.Dropout())


# then the residual cannot be added
valid_padding = attribute("0.fn.0", "padding", (0, 0))

LEFT = [
    (subclassed, "its class, NamedSequential, is not nn.Sequential itself"),
    (
        replaced("3", lambda: nn.GroupNorm(4, DIM)),
        "its pointwise norm is GroupNorm, not nn.BatchNorm2d or nn.SyncBatchNorm",
    ),
    (
        replaced("0.fn.2", lambda: nn.InstanceNorm2d(DIM)),
        "its depthwise norm is InstanceNorm2d, not nn.BatchNorm2d or nn.SyncBatchNorm",
    ),
    (
        replaced("0.fn.0", lambda: nn.Conv2d(DIM, DIM, 3, padding="same")),
        "its depthwise convolution is Conv2d(64, 64, kernel_size=(3, 3), stride=(1, 1), padding=same), "
        "not depthwise with stride 1, dilation 1 and zero padding 'same'",
    ),
    (
        valid_padding,
        "its depthwise convolution is Conv2d(64, 64, kernel_size=(5, 5), stride=(1, 1), groups=64), "
        "not depthwise with stride 1, dilation 1 and zero padding 'same'",
    ),
    (
        attribute("1", "stride", (2, 2)),
        "its pointwise convolution is Conv2d(64, 64, kernel_size=(1, 1), stride=(2, 2)), "
        "not 1x1 with stride 1, one group and no padding",
    ),
    (replaced("2", nn.SiLU), "its pointwise activation is SiLU(), not GELU, ReLU or Identity"),
    (inner_hook, "its pointwise convolution has a hook or its own forward"),
    (replaced_weight, "a parameter or method of its depthwise convolution was replaced"),
    (replaced_counter, "a parameter, buffer or method of its pointwise norm was replaced"),
    (parametrized, "its pointwise convolution is ParametrizedConv2d, not nn.Conv2d"),
    (own_forward, "it has its own forward"),
    (extra_module, "it has 5 children, not the 2 or 4 of a mixer layer"),
]


@pytest.mark.parametrize(("alter", "reason"), LEFT, ids=[by_name(case[0]) for case in LEFT])
def test_layers_that_are_left(alter, reason):
    model = TimmLike().eval()
    alter(model.blocks[1])
    report = accelerate(model)
    assert report.layers == 2
    assert report.skipped == [("blocks.1", reason)]
    assert type(model.blocks[1]) is not MixerLayer
    if alter is not valid_padding:
        assert model(image()).shape == (3, 7)


def test_an_accelerated_layer_that_no_longer_runs_as_one_says_so():
    model = TimmLike()
    accelerate(model)
    handle = model.blocks[2][0].register_forward_hook(lambda *a: None)
    report = accelerate(model)
    assert report.layers == 2
    assert report.skipped == [("blocks.2", "its Residual has a hook or its own forward")]
    handle.remove()
    assert accelerate(model).layers == accelerate(model).accelerated == 3


def test_a_block_or_convolution_alone_is_recognized():
    depthwise, *pointwise = layer()
    for kind, modules in (("depthwise", depthwise.fn), ("pointwise", pointwise)):
        block = recognize_block(kind, *modules)
        assert (block.conv, block.activation, block.norm) == (modules[0], "gelu", modules[2])
        assert why_not_convolution(kind, modules[0]) is None
    assert "is Conv2d(64, 64, kernel_size=(1, 1)" in recognize_block("depthwise", *pointwise)
    assert why_not_convolution("depthwise", nn.Conv1d(8, 8, 3)) == (
        "its depthwise convolution is Conv1d, not nn.Conv2d"
    )


def test_copies_keep_the_class(calls):
    model = TimmLike().eval()
    accelerate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(image()), model(image()))
    assert len(calls) == 12


LIBRARY = """
from torch import nn

class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x

def layer():
    fn = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, padding="same"), nn.GELU(), nn.BatchNorm2d(8))
    return nn.Sequential(Residual(fn), nn.Conv2d(8, 8, 1), nn.GELU(), nn.BatchNorm2d(8))
"""
LOAD = """
import sys, torch
sys.path.insert(0, "")
model, x, y = torch.load("model.pt", weights_only=False)
from convmixer_kernels import functional
calls, operator = [], functional.mixer_layer
functional.mixer_layer = lambda *a, **k: calls.append(1) or operator(*a, **k)
torch.testing.assert_close(model(x), y)
print(len(calls))
"""


def test_a_saved_model_loads_in_another_process(tmp_path, monkeypatch):
    """In that process nobody called accelerate: the first forward proves the other library's residual."""
    (tmp_path / "other_library.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    build = importlib.import_module("other_library").layer
    model = nn.Sequential(build(), build()).eval()
    assert accelerate(model).accelerated == 2
    x = torch.randn(2, 8, 5, 5)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    run = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "2"


def test_timms_own_model():
    timm = pytest.importorskip("timm", reason="timm is not installed: TimmLike has its structure")
    model = timm.create_model("convmixer_768_32").eval()
    x = torch.randn(1, 3, 28, 28)
    expected = model(x)
    assert accelerate(model).accelerated == 32
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)

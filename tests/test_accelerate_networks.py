# SPDX-License-Identifier: MIT
"""accelerate on other networks than ConvMixer as the paper writes it: forms of a layer, blocks, depthwise convolutions."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_twice_eager
from model_helpers import DIM, MODES, assert_matches, features, randomize, step
from torch import nn
from torch.nn.utils import parametrizations

import convmixer_kernels as ck
from convmixer import MixerLayer, MixerSequential, accelerate, reference
from convmixer_kernels.modules import BlockSequential

pytestmark = pytest.mark.usefixtures("one_thread", "always_gains")


def depthwise(kernel_size=5, **options):
    padding = options.pop("padding", "same")
    return nn.Conv2d(DIM, DIM, kernel_size, padding=padding, groups=DIM, **options)


class OwnGELU(nn.Module):
    """As timm's, which takes an argument that it does not use."""

    def __init__(self, inplace: bool = False):
        super().__init__()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """An activation."""
        return F.gelu(input)


class OwnGELUTanh(nn.Module):
    def forward(self, x):
        return F.gelu(x, approximate="tanh")


class OwnReLU(nn.Module):
    def forward(self, x):
        return F.relu(x)


def block(act=nn.GELU, conv=depthwise):
    return conv(), act(), nn.BatchNorm2d(DIM)


def pointwise():
    return nn.Conv2d(DIM, DIM, 1)


def short_model(h=DIM, d=2, k=5, p=2, n=7):
    """ConvMixer in few characters: each convolution, activation, norm is a Sequential, and the residual is one with its own forward."""

    def with_norm(conv):
        return nn.Sequential(conv, nn.GELU(), nn.BatchNorm2d(h))

    kind = type("", (nn.Sequential,), {"forward": lambda s, x: s[0](x) + x})
    layers = [
        nn.Sequential(kind(with_norm(nn.Conv2d(h, h, k, groups=h, padding=k // 2))), with_norm(nn.Conv2d(h, h, 1)))
        for _ in range(d)
    ]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(h, n)
    return nn.Sequential(with_norm(nn.Conv2d(3, h, p, p)), *layers, *head)


class IndexedSequential(nn.Sequential):
    def forward(self, x):
        return x + self[0](x)


class AddingSequential(nn.Sequential):
    def forward(self, input):
        return super().forward(input) + input


class OtherName(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.block = fn

    def forward(self, x):
        return x + self.block(x)


LAYERS = {
    "index": lambda: nn.Sequential(IndexedSequential(nn.Sequential(*block())), nn.Sequential(*block(conv=pointwise))),
    "super": lambda: nn.Sequential(AddingSequential(*block()), *block(conv=pointwise)),
    "other-name": lambda: nn.Sequential(OtherName(nn.Sequential(*block())), *block(conv=pointwise)),
    "own-gelu": lambda: nn.Sequential(
        reference.Residual(nn.Sequential(*block(OwnGELU))), *block(OwnGELU, conv=pointwise)
    ),
    "own-gelu-tanh": lambda: nn.Sequential(
        reference.Residual(nn.Sequential(*block(OwnGELUTanh))), *block(lambda: nn.GELU(approximate="tanh"), pointwise)
    ),
    "own-relu": lambda: nn.Sequential(OtherName(nn.Sequential(*block(OwnReLU))), *block(OwnReLU, conv=pointwise)),
}


def pair(model: nn.Module, training: bool) -> tuple[nn.Module, nn.Module]:
    model = randomize(model).train(training)
    return model, copy.deepcopy(model)


@MODES
@pytest.mark.parametrize("name", LAYERS)
def test_forms_of_a_layer(calls, name, training):
    ours, ref = pair(nn.Sequential(LAYERS[name](), LAYERS[name]()), training)
    keys = list(ours.state_dict())
    report = accelerate(ours)
    assert str(report) == "accelerated 2 mixer layers"
    assert list(ours.state_dict()) == keys
    assert_matches(ours, ref, features())
    assert calls == ["mixer_layer"] * 2


def test_the_short_model(calls):
    ours, ref = pair(short_model(), True)
    assert str(accelerate(ours)) == "accelerated 2 mixer layers"
    assert [type(m) for m in ours][:3] == [nn.Sequential, MixerLayer, MixerLayer]
    assert_matches(ours, ref, torch.randn(3, 3, 12, 12))
    assert calls == ["mixer_layer"] * 2


class TwoInIndex(IndexedSequential):
    pass


class Reversed(nn.Sequential):
    def __getitem__(self, at):
        return super().__getitem__(-1 - at)

    def forward(self, x):
        return x + self[0](x)


class OtherSuper(AddingSequential):
    def forward(self, x):
        return super().forward(x) + x


class ConstantOne(nn.Sequential):
    def forward(self, x):
        return self[1](x) + x


class ScaledGELU(nn.Module):
    def forward(self, x):
        return F.gelu(x) * 2


class OtherF(nn.Module):
    forward = type(OwnGELU.forward)(OwnGELU.forward.__code__, {"F": torch.special})


class CallingGELU(OwnGELU):
    def __call__(self, x):
        return super().__call__(2 * x)


@pytest.mark.parametrize(
    ("residual", "act"),
    [
        (lambda *m: TwoInIndex(nn.Sequential(*m), nn.Tanh()), nn.GELU),
        (lambda *m: Reversed(nn.Sequential(*m)), nn.GELU),
        (lambda *m: OtherSuper(*m), nn.GELU),
        (lambda *m: ConstantOne(nn.Identity(), nn.Sequential(*m)), nn.GELU),
        (lambda *m: AddingSequential(*m, nn.Identity()), nn.GELU),
        (lambda *m: OtherName(nn.Sequential(*m)), ScaledGELU),
        (lambda *m: OtherName(nn.Sequential(*m)), OtherF),
        (lambda *m: OtherName(nn.Sequential(*m)), CallingGELU),
    ],
    ids=["two", "getitem", "super", "constant", "four", "scaled", "other-F", "call"],
)
def test_what_only_looks_like_a_layer_is_none(residual, act):
    model = nn.Sequential(residual(*block(act)), *block(conv=pointwise))
    assert accelerate(model).layers == 0
    assert type(model) is not MixerLayer


def test_an_activation_that_changes_later(calls, monkeypatch):
    one, ref = pair(LAYERS["own-gelu"](), False)
    accelerate(one)
    one(features())
    monkeypatch.setattr(OwnGELU, "forward", lambda self, x: 3 * x)
    assert torch.equal(one(features()), ref(features()))
    monkeypatch.undo()
    monkeypatch.setitem(OwnGELU.forward.__globals__, "F", torch.special)
    monkeypatch.setattr(torch.special, "gelu", lambda x: -x, raising=False)
    assert torch.equal(one(features()), ref(features()))
    assert calls == ["mixer_layer"]


class HandWritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.dw, self.pw = nn.Sequential(*block()), nn.Sequential(*block(conv=pointwise))

    def forward(self, x):
        x = x + self.dw(x)
        return self.pw(x)


class InPieces(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.norm = block()

    def forward(self, x):
        return x + self.norm(self.act(self.conv(x)))


class ConvNeXtLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.dwconv = depthwise(7, padding=3)
        self.norm = nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.gamma = nn.Parameter(torch.full((DIM,), 0.1))

    def forward(self, x):
        y = self.dwconv(x).permute(0, 2, 3, 1)
        return x + (self.gamma * self.mlp(self.norm(y))).permute(0, 3, 1, 2)


class InceptionLike(nn.Module):
    """A square and two stripes, each on a slice of the channels."""

    def __init__(self):
        super().__init__()
        g = DIM // 4
        self.square = nn.Conv2d(g, g, 3, padding=1, groups=g)
        self.row = nn.Conv2d(g, g, (1, 11), padding=(0, 5), groups=g)
        self.column = nn.Conv2d(g, g, (11, 1), padding=(5, 0), groups=g)

    def forward(self, x):
        rest, *parts = x.chunk(4, 1)
        convs = self.square, self.row, self.column
        return torch.cat([rest, *(conv(part) for conv, part in zip(convs, parts, strict=True))], 1)


class InvertedBottleneck(nn.Module):
    """Depthwise convolutions between 1x1 ones, each with norm then activation; the second has stride 2."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            depthwise(3, padding=1, bias=False),
            nn.BatchNorm2d(DIM),
            nn.Conv2d(DIM, DIM, 1, bias=False),
            nn.BatchNorm2d(DIM),
            nn.ReLU(),
            depthwise(5, padding=2, stride=2, bias=False),
            nn.BatchNorm2d(DIM),
            nn.Hardswish(),
        )

    def forward(self, x):
        return self.layers(x)


class Branches(nn.Module):
    """Re-parametrisable: a large kernel and small ones beside it, each with its norm, as RepLKNet (31 + 5) and SLaK (51x5 + 5x51 + 5)."""

    def __init__(self, *kernels):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(DIM, DIM, k, padding=tuple(size // 2 for size in k), groups=DIM, bias=False),
                nn.BatchNorm2d(DIM),
            )
            for k in kernels
        )
        self.ffn = nn.Sequential(nn.Conv2d(DIM, DIM, 1), nn.GELU(), nn.BatchNorm2d(DIM))

    def forward(self, x):
        x = x + torch.relu(sum(branch(x) for branch in self.branches))
        return x + self.ffn(x)


NETWORKS = {
    # name -> model, (layers, blocks, convolutions, left), operators of a forward
    "hand-written": (HandWritten, (0, 2, 0, 0), {"depthwise_block": 1, "pointwise_block": 1}),
    "in pieces": (InPieces, (0, 0, 1, 0), {"depthwise_conv2d": 1}),
    "convnext": (ConvNeXtLike, (0, 0, 1, 0), {"depthwise_conv2d": 1}),
    "inceptionnext": (InceptionLike, (0, 0, 3, 0), {"depthwise_conv2d": 3}),
    "mobilenet": (InvertedBottleneck, (0, 0, 1, 1), {"depthwise_conv2d": 1}),
    "replknet": (lambda: Branches((13, 13), (5, 5)), (0, 1, 2, 0), {"depthwise_conv2d": 2, "pointwise_block": 1}),
    "slak": (lambda: Branches((15, 5), (5, 15), (5, 5)), (0, 1, 3, 0), {"depthwise_conv2d": 3, "pointwise_block": 1}),
    "long": (
        lambda: nn.Sequential(nn.Tanh(), *block(), *block(nn.ReLU, pointwise), depthwise(3), nn.Tanh()),
        (0, 2, 1, 0),
        {"depthwise_block": 1, "pointwise_block": 1, "depthwise_conv2d": 1},
    ),
    "mixed": (
        lambda: nn.Sequential(LAYERS["super"](), *block(), ConvNeXtLike()),
        (1, 1, 1, 0),
        {"mixer_layer": 1, "depthwise_block": 1, "depthwise_conv2d": 1},
    ),
}


@MODES
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(calls, name, training):
    build, counts, operators = NETWORKS[name]
    ours, ref = pair(build(), training)
    state = {module: set(vars(module)) for module in ours.modules()}
    keys = list(ours.state_dict())
    for _ in range(2):  # again is harmless
        report = accelerate(ours)
        assert (report.layers, report.blocks, report.convolutions, len(report.skipped)) == counts
        assert report.accelerated == sum(counts[:3])
    assert list(ours.state_dict()) == keys
    assert {module: set(vars(module)) for module in ours.modules()} == state  # classes alone were changed
    assert_matches(ours, ref, features())
    assert Counter(calls) == Counter(operators)


def test_the_operators_modules_count():
    model = nn.Sequential(ck.DepthwiseBlock(DIM, 3), ck.PointwiseBlock(DIM), ck.DepthwiseConv2d(DIM, 3))
    assert str(accelerate(model)) == "accelerated 2 conv-activation-norm blocks, 1 depthwise convolution"
    model[0].act.register_forward_hook(lambda *a: None)
    report = accelerate(model)
    assert report.skipped == [("0.conv", "its depthwise activation has a hook or its own forward")]
    assert (report.blocks, report.convolutions) == (1, 2)


@pytest.mark.parametrize("name", ["hand-written", "convnext", "mixed"])
def test_copies_and_channels_last(calls, name):
    ours, ref = pair(NETWORKS[name][0](), False)
    accelerate(ours)
    ours, ref = (m.to(memory_format=torch.channels_last) for m in (ours, ref))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_matches(twin, ref, features().to(memory_format=torch.channels_last))
    assert Counter(calls) == Counter(NETWORKS[name][2]) + Counter(NETWORKS[name][2])


def test_dilation(calls):
    ours, ref = pair(nn.Sequential(depthwise(3, dilation=(2, 3)), depthwise(5, dilation=2, padding=4)), False)
    report = accelerate(ours)
    assert_matches(ours, ref, features())
    assert (report.convolutions, calls) == (2, ["depthwise_conv2d"] * 2)
    # padding that forgets the dilation
    assert accelerate(depthwise(5, dilation=2, padding=2)).accelerated == 0


@pytest.mark.parametrize("name", ["mixed", "hand-written", "replknet"])
def test_compile_in_one_graph(name):
    ours, ref = pair(NETWORKS[name][0](), False)
    accelerate(ours)
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(features()), ref(features()), rtol=1e-4, atol=1e-5)


def test_classes():
    model = NETWORKS["mixed"][0]()
    accelerate(model)
    assert type(model) is MixerSequential
    assert type(model[0]) is MixerLayer
    assert type(model[4].dwconv) is ck.DepthwiseConv2d
    assert type(model[1]) is nn.Conv2d  # the block's, which runs with its Sequential
    hand = HandWritten()
    accelerate(hand)
    assert type(hand.dw) is type(hand.pw) is BlockSequential
    assert repr(hand.dw).startswith("BlockSequential(\n  (0): Conv2d(64, 64, kernel_size=(5, 5)")


def test_a_module_in_two_places_counts_once():
    conv = depthwise()
    report = accelerate(nn.Sequential(conv, nn.Tanh(), conv))
    assert (report.convolutions, report.skipped) == (1, [])


class OwnConv(nn.Conv2d):
    pass


class NamedSequential(nn.Sequential):
    pass


def own_forward(module):
    module.forward = lambda x: x
    return module


def with_hook(module):
    module[0].register_forward_hook(lambda *a: None)
    return module


LEFT = [
    (lambda: depthwise(stride=2, padding=2), "its stride is (2, 2), not 1"),
    (lambda: depthwise(padding=0), "its padding, (0, 0), does not keep the size of its input"),
    (lambda: depthwise(padding="valid"), "its padding, valid, does not keep the size of its input"),
    (lambda: depthwise(padding_mode="reflect"), "its padding_mode is 'reflect', not 'zeros'"),
    (lambda: OwnConv(DIM, DIM, 3, padding=1, groups=DIM), "its class, OwnConv, is not nn.Conv2d itself"),
    (lambda: parametrizations.weight_norm(depthwise()), "its class, ParametrizedConv2d, is not nn.Conv2d itself"),
    (lambda: own_forward(depthwise()), "it has its own forward"),
    (
        lambda: NamedSequential(*block(conv=pointwise)),
        "its class, NamedSequential, is not nn.Sequential itself",
    ),
    (
        lambda: with_hook(nn.Sequential(*block(conv=pointwise))),
        "its pointwise convolution has a hook or its own forward",
    ),
    (
        lambda: own_forward(nn.Sequential(*block(conv=pointwise))),
        "the Sequential around it has its own forward",
    ),
]


@pytest.mark.parametrize(("build", "reason"), LEFT, ids=[reason for _, reason in LEFT])
def test_what_is_left_and_why(build, reason):
    module = build()
    kinds = [type(m) for m in module.modules()]
    report = accelerate(nn.ModuleDict({"one": module}))
    name = "one.0" if isinstance(module, nn.Sequential) else "one"
    assert (report.accelerated, report.skipped) == (0, [(name, reason)])
    assert [type(m) for m in module.modules()] == kinds
    assert str(report) == f"accelerated nothing; left 1 unchanged:\n  {name}: {reason}"


def test_reasons_are_grouped():
    model = nn.Sequential(*(depthwise(stride=2, padding=2) for _ in range(5)), depthwise(padding=0), depthwise())
    assert str(accelerate(model)) == (
        "accelerated 1 depthwise convolution; left 6 unchanged:\n"
        "  0, 1, 2 and 2 more: its stride is (2, 2), not 1\n"
        "  5: its padding, (0, 0), does not keep the size of its input"
    )
    assert str(accelerate(depthwise(stride=2, padding=2))).endswith("\n  the model itself: its stride is (2, 2), not 1")


def test_ordinary_convolutions_need_no_line():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
    )
    assert str(accelerate(model)).startswith("accelerated nothing: found no")


def test_what_to_change_in_hand_written_layers():
    report = accelerate(nn.ModuleList([InPieces(), InPieces(), HandWritten()]))
    (hint,) = report.hints
    assert hint.startswith(
        "2 InPieces: it may call a convolution, an activation and a norm itself; in an nn.Sequential"
    )
    assert str(report).endswith(hint)


def test_where_nothing_gains(monkeypatch):
    monkeypatch.setattr("convmixer_kernels.dispatch.gains", lambda *form, **more: False)
    report = accelerate(nn.ModuleDict({"conv": depthwise(3), "block": nn.Sequential(*block(conv=pointwise))}))
    assert report.accelerated == 0
    assert report.skipped == [
        ("conv", "no kernel was measured to be faster than torch's own for 3x3 on cpu in float32"),
        ("block.0", "no kernel was measured to be faster than torch's own for 1x1 on cpu in float32"),
    ]
    monkeypatch.setattr("convmixer_kernels.dispatch.has_kernels", lambda device: False)
    report = accelerate(depthwise(3))
    assert report.skipped == [
        ("", "no kernels for cpu tensors are installed here (python -m convmixer_kernels says why)")
    ]
    monkeypatch.setattr("convmixer_kernels.dispatch.has_kernels", lambda device: True)
    monkeypatch.setattr("convmixer_kernels.dispatch.gains", lambda *form, **more: form[3])
    report = accelerate(nn.ModuleDict({"conv": depthwise(3)}))
    assert report.convolutions == 1
    assert str(report).endswith(
        "1 run torch's own in cases where that was measured to be faster (small kernels in channels_last)"
    )


def test_a_graph_of_torch_fx(calls):
    ours, ref = pair(NETWORKS["hand-written"][0](), False)
    graph = torch.fx.symbolic_trace(ours)
    report = accelerate(graph)
    assert (report.layers, report.blocks, report.convolutions) == (0, 0, 1)
    assert report.hints == [
        "the model was traced by torch.fx, which leaves no nn.Sequential: only convolutions can be accelerated"
    ]
    assert_matches(graph, ref, features())
    assert calls == ["depthwise_conv2d"]
    accelerate(ours)
    calls.clear()
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(features()), ref(features()))
    assert calls == []


SHARDED = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from convmixer import accelerate
from convmixer_kernels import dispatch, functional
dispatch.gains = lambda *form, **more: True
calls = []
for name in ("mixer_layer", "depthwise_block", "pointwise_block", "depthwise_conv2d"):
    def counted(*a, f=getattr(functional, name), n=name, **k):
        calls.append(n)
        return f(*a, **k)
    setattr(functional, name, counted)
sys.path[:0] = "", "tests"
from test_accelerate_networks import NETWORKS, HandWritten, features
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
for first in (True, False):
    torch.manual_seed(0)
    model = nn.Sequential(NETWORKS["mixed"][0](), HandWritten()).train()
    expected = model(features())
    if first:
        print(accelerate(model))
    for part in (model[0][0], model[0], model[1].dw, model):
        fully_shard(part, mesh=mesh)
    if not first:
        print(accelerate(model))
    calls.clear()
    y = model(features())
    y.sum().backward()
    torch.testing.assert_close(y.detach(), expected.detach())
    print(*sorted(calls))
"""


def test_fully_shard():
    """Before it everything is accelerated; after it what it has not wrapped, and the report says so."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHARDED], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split("accelerated ")[1:]
    assert before.splitlines() == [
        "1 mixer layer, 3 conv-activation-norm blocks, 1 depthwise convolution",
        "depthwise_block depthwise_block depthwise_conv2d mixer_layer pointwise_block",
    ]
    assert "  0.1, 0.0, 1.dw.0: fully_shard has wrapped it: call accelerate before" in after
    assert after.splitlines()[-1].split() == ["depthwise_conv2d"] * 4 + ["pointwise_block"]


TIMM = {
    # name -> (layers, blocks, convolutions)
    "convmixer_768_32": (32, 0, 0),
    "convnext_atto": (0, 0, 12),
    "convformer_s18": (0, 0, 18),
    "inception_next_atto": (0, 0, 36),
    "mobilenetv4_conv_small": (0, 0, 13),
    "efficientnet_b0": (0, 0, 12),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm", reason="timm is not installed: NETWORKS has the patterns of its models")
    model = timm.create_model(name, num_classes=7).eval()
    ref = copy.deepcopy(model)
    report = accelerate(model)
    assert (report.layers, report.blocks, report.convolutions) == TIMM[name]
    assert all(reason == "its stride is (2, 2), not 1" for _, reason in report.skipped)
    x = torch.randn(1, 3, 64, 64)
    exact, eager, actual = step(copy.deepcopy(ref).double(), x.double()), step(ref, x), step(model, x)
    assert_twice_eager("output", actual["output"], eager["output"], exact["output"])
    # some parameters are one number, whose two rounding errors have any ratio
    gradients = [torch.cat([t.flatten() for n, t in of.items() if "grad" in n]) for of in (actual, eager, exact)]
    assert_twice_eager("gradients", *gradients)

# SPDX-License-Identifier: MIT
"""DepthwiseBlock, PointwiseBlock, BlockSequential and DepthwiseConv2d: torch's modules, run by one operator if that gives the same."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_twice_eager
from model_helpers import DIM, MODES, assert_matches, assert_refused_alike, by_name, features, randomize
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import convmixer_kernels as ck
from convmixer_kernels.modules import BlockSequential

pytestmark = pytest.mark.usefixtures("one_thread", "always_gains")


class Plain(nn.Module):
    """What a block computes, in torch's modules under the block's names."""

    def __init__(self, conv, act, norm, residual=False):
        super().__init__()
        self.conv, self.act, self.norm, self.residual = conv, act, norm, residual

    def forward(self, x):
        h = self.norm(self.act(self.conv(x)))
        return h + x if self.residual else h


def depthwise_conv(kernel_size=5):
    return nn.Conv2d(DIM, DIM, kernel_size, padding="same", groups=DIM)


def sequence(kind):
    return kind(
        depthwise_conv(),
        nn.GELU(),
        nn.BatchNorm2d(DIM),
        nn.Conv2d(DIM, 48, 1),
        nn.ReLU(),
        nn.BatchNorm2d(48),
        nn.Tanh(),
    )


# name -> ours, the same in torch's modules, the operators that run it
MODULES = {
    "depthwise": (
        lambda: ck.DepthwiseBlock(DIM, 5),
        lambda: Plain(depthwise_conv(), nn.GELU(), nn.BatchNorm2d(DIM), True),
        ["depthwise_block"],
    ),
    "depthwise-options": (
        lambda: ck.DepthwiseBlock(
            DIM, (3, 4), activation="gelu_tanh", residual=False, bias=False, momentum=None, eps=0.1
        ),
        lambda: Plain(
            nn.Conv2d(DIM, DIM, (3, 4), padding="same", groups=DIM, bias=False),
            nn.GELU(approximate="tanh"),
            nn.BatchNorm2d(DIM, momentum=None, eps=0.1),
        ),
        ["depthwise_block"],
    ),
    "pointwise": (
        lambda: ck.PointwiseBlock(DIM, 48, activation="relu"),
        lambda: Plain(nn.Conv2d(DIM, 48, 1), nn.ReLU(), nn.BatchNorm2d(48)),
        ["pointwise_block"],
    ),
    "sequence": (
        lambda: sequence(BlockSequential),
        lambda: sequence(nn.Sequential),
        ["depthwise_block", "pointwise_block"],
    ),
    "convolution": (lambda: ck.DepthwiseConv2d(DIM, 5), depthwise_conv, ["depthwise_conv2d"]),
}
EVERY = pytest.mark.parametrize("name", MODULES)
BLOCKS = pytest.mark.parametrize("name", [name for name in MODULES if name != "convolution"])


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    ours, plain = (build() for build in MODULES[name][:2])
    randomize(plain)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


@MODES
@EVERY
def test_it_computes_what_its_modules_do(calls, name, training):
    ours, plain = (m.train(training) for m in pair(name))
    for n in (3, 2):
        assert_matches(ours, plain, features(n))
    assert calls == MODULES[name][2] * 2


@EVERY
def test_keys_and_initial_values_are_those_of_torchs_modules(name):
    ours, plain = MODULES[name][:2]
    states = []
    for build in (ours, plain):
        torch.manual_seed(5)
        states.append(build().state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


@EVERY
def test_copies(calls, name):
    module = pair(name)[0].eval()
    expected = module(features())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(features()), expected)
    assert calls == MODULES[name][2] * 3


def test_tools_of_torch_find_the_parts():
    block = ck.DepthwiseBlock(DIM, 5)
    kinds = {name: type(module) for name, module in block.named_children()}
    assert kinds == {"conv": ck.DepthwiseConv2d, "act": nn.GELU, "norm": nn.BatchNorm2d}
    assert "residual=True" in repr(block)
    decayed = [p for m in block.modules() if isinstance(m, nn.Conv2d) for p in (m.weight,)]
    assert len(decayed) == 1
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert type(converted.norm) is nn.SyncBatchNorm
    with pytest.raises(ValueError, match=r"DepthwiseBlock: activation must be one of .*, got 'silu'"):
        ck.DepthwiseBlock(8, activation="silu")


def test_a_converted_block_stays_one_operator(calls):
    ours, plain = (nn.SyncBatchNorm.convert_sync_batchnorm(m).eval() for m in pair("depthwise"))
    assert_matches(ours, plain, features())
    assert calls == ["depthwise_block"]


def test_update_bn(calls):
    ours, plain = pair("sequence")
    batches = [features(2), features(3)]
    for module in (ours, plain):
        torch.optim.swa_utils.update_bn(batches, module)
    assert calls == MODULES["sequence"][2] * 2
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name))


@BLOCKS
def test_frozen_norms(calls, name):
    ours, plain = pair(name)
    for module in (ours, plain):
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
    assert_matches(ours, plain, features())
    assert calls == MODULES[name][2]
    assert all(int(b) == 0 for n, b in ours.named_buffers() if n.endswith("num_batches_tracked"))


def children(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_children()]


@BLOCKS
@pytest.mark.parametrize(
    "register",
    [nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook, nn.Module.register_full_backward_hook],
    ids=by_name,
)
def test_hooks_on_children_fire(calls, register, name):
    for child in children(pair(name)[0])[:3]:
        ours, plain = pair(name)
        seen: list[type] = []
        for module in (ours, plain):
            register(module.get_submodule(child), lambda m, *rest, seen=seen: seen.append(type(m)))
        assert_matches(ours, plain, features())
        assert len(seen) == 3  # the plain one runs in float64 too
        assert MODULES[name][2][0] not in calls
        calls.clear()


def test_hooks_of_a_convolution_fire_beside_its_operator(calls):
    conv, seen = pair("convolution")[0], []
    conv.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    conv(features())
    assert (calls, len(seen)) == (["depthwise_conv2d"], 1)


@EVERY
def test_what_is_replaced_in_torch_is_called(calls, monkeypatch, name):
    ours, plain = (m.eval() for m in pair(name))
    forward, seen = nn.Conv2d.forward, []
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: seen.append(1) or 2 * forward(self, x))
    assert torch.equal(plain(features()), ours(features()))
    assert len(seen) == 2 * sum(isinstance(m, nn.Conv2d) for m in plain.modules())
    assert calls == []


def weight_norm(conv):
    parametrizations.weight_norm(conv)


def spectral_norm(conv):
    torch.manual_seed(6)
    parametrizations.spectral_norm(conv)


def strided(conv):
    conv.stride, conv.padding = (2, 2), (1, 1)


def reflecting(conv):
    conv.padding_mode = "reflect"
    conv._reversed_padding_repeated_twice = (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("alter", "runs"),
    [(weight_norm, True), (spectral_norm, True), (strided, False), (reflecting, False)],
    ids=by_name,
)
def test_altered_convolutions(calls, alter, runs):
    ours, plain = (m.eval() for m in pair("convolution"))
    for conv in (ours, plain):
        alter(conv)
    assert_matches(ours, plain, features())
    assert calls == ["depthwise_conv2d"] * runs


@pytest.mark.parametrize("gains", [True, False])
def test_a_spectral_norm_takes_one_step_a_call(monkeypatch, gains):
    monkeypatch.setattr("convmixer_kernels.dispatch.gains", lambda *form, **more: gains)
    ours, plain = pair("convolution")
    for conv in (ours, plain):
        spectral_norm(conv)
    for x in (features(), features(2)):
        assert_matches(ours, plain, x)
    with pytest.raises(RuntimeError), torch.no_grad():
        ours(features().to(torch.bfloat16))
    with pytest.raises(RuntimeError), torch.no_grad():
        plain(features().to(torch.bfloat16))
    assert torch.equal(ours.parametrizations.weight[0]._u, plain.parametrizations.weight[0]._u)


def test_a_pruned_convolution(calls):
    """Its weight is an attribute that a hook before forward computes."""
    ours, plain = pair("convolution")
    for conv in (ours, plain):
        prune.l1_unstructured(conv, "weight", 0.5)
    torch.testing.assert_close(ours(features()), plain(features()))
    assert calls == ["depthwise_conv2d"]


@pytest.mark.parametrize("alter", [weight_norm, strided], ids=by_name)
def test_a_block_of_an_altered_convolution_runs_its_modules(calls, alter):
    ours, plain = (m.eval() for m in pair("depthwise-options"))
    for block in (ours, plain):
        alter(block.conv)
    assert_matches(ours, plain, features())
    assert "depthwise_block" not in calls


def scripted(module, x):
    return torch.jit.script(module)


def traced(module, x):
    return torch.jit.trace(module, x)


def fx_traced(module, x):
    return torch.fx.symbolic_trace(module)


def exported(module, x):
    return torch.export.export(module, (x,)).module()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@EVERY
@pytest.mark.parametrize("export", [scripted, traced, fx_traced, exported], ids=by_name)
def test_exports_hold_torchs_operations_alone(calls, export, name):
    module, plain = (m.eval() for m in pair(name))
    program = export(module, features())
    calls.clear()
    y = program(features())
    assert calls == []
    torch.testing.assert_close(y, plain(features()))
    code = str(program.inlined_graph if isinstance(program, torch.jit.ScriptModule) else program.graph)
    assert "convmixer" not in code.replace("convmixer_kernels", "")  # torch.jit.trace names classes
    assert not any(type(m).__module__.startswith("convmixer") for m in program.modules())


@pytest.mark.filterwarnings("ignore")
def test_onnx():
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    for name in MODULES:
        file = io.BytesIO()
        torch.onnx.export(pair(name)[0].eval(), (features(),), file, dynamo=False)
        graph = onnx.load_from_string(file.getvalue()).graph
        assert {node.domain for node in graph.node} == {""}
        assert any(node.op_type == "Conv" for node in graph.node)


@EVERY
def test_compile_in_one_graph(name):
    ours, x = pair(name)[0], features()
    if name == "depthwise-options":
        ours.norm.momentum = 0.1  # a momentum that depends on the counter breaks the graph, in torch's own norm too
    twin = copy.deepcopy(ours)
    if name == "depthwise-options":
        for block in (ours, twin):
            block.norm.momentum = (
                0.1  # a momentum that depends on the counter breaks the graph, in torch's own norm too
            )
    y, expected = torch.compile(ours, fullgraph=True, backend="aot_eager")(x), twin(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(ours.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@MODES
@EVERY
def test_autocast(calls, name, training):
    """Of a float32 input, as the first module of a network and all of ConvNeXt's convolutions have it."""
    ours, plain = (m.train(training) for m in pair(name))
    x = features()
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, eager = ours(x), plain(x)
    assert_twice_eager("y", y, eager, exact, torch.bfloat16)
    assert calls == MODULES[name][2]


@EVERY
def test_what_torch_refuses_is_refused(name):
    ours, plain = pair(name)
    before = {n: t.clone() for n, t in ours.state_dict().items()}
    for x in (features().to(torch.bfloat16), features()[0, 0]):
        assert_refused_alike(ours, plain, x)
    for x in (features()[:, :-1], torch.randn(1, DIM, 1, 1))[: 1 if name == "convolution" else 2]:
        for module in (plain, ours):
            with pytest.raises((RuntimeError, ValueError)):
                module(x)
    assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items())


@EVERY
def test_double_and_unbatched_inputs_run_the_modules(calls, name):
    ours, plain = (m.double() for m in pair(name))
    assert torch.equal(ours(features().double()), plain(features().double()))
    assert calls == []
    if name == "convolution":
        conv, ref = pair(name)
        assert torch.equal(conv(features()[0]), ref(features()[0]))


@EVERY
def test_meta_and_fake_tensors_run_the_modules(calls, name):
    for mode in (torch.device("meta"), FakeTensorMode()):
        with mode:
            assert MODULES[name][0]().eval()(torch.empty(2, DIM, 6, 7)).shape == (2, *output_shape(name))
    assert calls == []


def output_shape(name: str) -> tuple[int, int, int]:
    return 48 if name in ("pointwise", "sequence") else DIM, 6, 7


@BLOCKS
def test_checkpointing_counts_as_modules_do(name):
    ours, plain = pair(name)
    for module in (ours, plain):
        checkpoint(module, features().requires_grad_(), use_reentrant=False).sum().backward()
    for key, buffer in plain.named_buffers():
        torch.testing.assert_close(ours.get_buffer(key), buffer)


@EVERY
def test_other_attributes_and_children(name):
    """Attributes of other types than nn.Conv2d sets, and a child of another class: as torch treats them."""
    for change in ({"kernel_size": 5}, {"dilation": 1}, {"dilation": (1,)}):
        ours, plain = (m.eval() for m in pair(name))
        for module in (ours, plain):
            conv = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
            vars(conv).update(change)
        try:
            expected = plain(features())
        except (TypeError, RuntimeError) as error:
            with pytest.raises(type(error)):
                ours(features())
        else:
            torch.testing.assert_close(ours(features()), expected)
    if name == "depthwise":
        ours.conv = nn.Identity()
        assert ours(features()).shape == features().shape


def test_functional_call_runs_the_operator(calls):
    block, _ = (m.eval() for m in pair("depthwise"))
    other = {key: torch.zeros_like(t) for key, t in block.named_parameters()}
    assert torch.equal(torch.func.functional_call(block, other, (features(),)), features())
    assert calls == ["depthwise_block"]

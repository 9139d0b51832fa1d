# SPDX-License-Identifier: MIT
"""A layer's second call finds that its first one was checked (prepared.py): the same bits, and no change of anything is missed."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from helpers import use_cuda
from torch import Tensor, nn

import convmixer_kernels as ck
from convmixer import ConvMixer
from convmixer_kernels import composite, functional, prepared
from convmixer_kernels.backends import cpu

BF16 = torch.bfloat16
#: Of a layer: x, and the parameters' dtype; C_out is not C.
CASES = [
    ((2, 16, 9, 8), BF16, BF16, "contiguous"),
    ((2, 16, 9, 8), BF16, torch.float32, "contiguous"),
    ((3, 24, 8, 8), torch.float16, torch.float16, "channels_last"),
    ((2, 16, 5, 7), torch.float32, torch.float32, "contiguous"),
]
GEMMS = ["fused", "wgmma", "layer", "torch"]


@pytest.fixture(autouse=True)
def _no_entries():
    prepared._entries.clear()
    yield
    prepared._entries.clear()


@pytest.fixture
def hits(monkeypatch) -> list[prepared.Entry]:
    """The entries that calls of mixer_layer have found."""
    found, original = [], functional.run_known_layer

    def counted(entry, *arguments):
        found.append(entry)
        return original(entry, *arguments)

    monkeypatch.setattr(functional, "run_known_layer", counted)
    return found


def _layer(case, c_out: int = 20, requires_grad: bool = True) -> tuple[Tensor, list[Tensor | None]]:
    shape, dtype, parameter_dtype, memory_format = case
    c = shape[1]
    x = torch.randn(shape).to(dtype)
    x = x.contiguous(
        memory_format=getattr(torch, "channels_last" if memory_format == "channels_last" else "contiguous_format")
    )
    tensors = []
    for size, weight in ((c, torch.randn(c, 1, 5, 4) / 4), (c_out, torch.randn(c_out, c, 1, 1) / c**0.5)):
        parameters = [weight, *(torch.randn(size) for _ in range(3))]
        tensors += [t.to(parameter_dtype).requires_grad_(requires_grad) for t in parameters]
        tensors += [torch.randn(size).to(parameter_dtype), torch.rand(size).to(parameter_dtype) + 0.5]
    return x, tensors


def _step(x: Tensor, tensors: list[Tensor | None], training: bool, dy: Tensor | None = None, **options) -> list[Tensor]:
    """y, running statistics as they have moved, and the gradients, of copies of the statistics."""
    state = [t.clone() for t in tensors]
    x = x.detach().requires_grad_(x.requires_grad)
    y = ck.mixer_layer(x, *tensors, training=training, **options)
    results = [y.detach(), *(tensors[i].clone() for i in (4, 5, 10, 11))]
    if y.requires_grad:
        y.backward(torch.ones_like(y) if dy is None else dy)
        results += [t.grad for t in (x, *tensors) if t is not None and t.grad is not None]
    for t, before in zip(tensors, state, strict=True):
        if t is not None:
            t.grad = None
            if not t.requires_grad:
                t.copy_(before)
    return results


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_second_call_has_the_bits_of_the_first(case, training, gemm, hits, monkeypatch):
    use_cuda(monkeypatch, gemm=gemm)
    x, tensors = _layer(case)
    if training:
        x.requires_grad_()
    dy = torch.randn(x.shape[0], 20, *x.shape[2:]).to(x.dtype)
    runs = []
    for _ in range(3):
        with torch.set_grad_enabled(training):
            runs.append(_step(x, tensors, training, dy, backend="cuda"))
    assert len(hits) == 2
    assert len(runs[0]) == (14 if training else 5)
    for later in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], later, strict=True))
        assert [t.stride() for t in later] == [t.stride() for t in runs[0]]
    native = case[1] != torch.float32 and gemm != "torch"
    assert all((entry.train is not None) is (native and training) for entry in hits)
    assert all(
        (entry.evaluate is not None) is ((native or (gemm == "layer" and case[1] != torch.float32)) and not training)
        for entry in hits
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_backend_that_prepares_nothing(training, hits):
    x, tensors = _layer(CASES[3])
    x.requires_grad_(training)
    first, second = (_step(x, tensors, training, backend="reference") for _ in range(2))
    assert len(hits) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


CPU_CASES = [
    *CASES,
    ((2, 1, 6, 5), torch.float32, torch.float32, "contiguous"),
    ((3, 40, 1, 1), torch.float32, torch.float32, "contiguous"),
    ((3, 24, 8, 8), torch.float32, torch.float32, "channels_last"),
    # too wide for a core's cache
    ((1, 200, 33, 31), torch.float32, torch.float32, "channels_last"),
    ((1, 200, 33, 31), torch.float16, torch.float32, "contiguous"),
]


@pytest.mark.skipif(cpu.native is None, reason="the native module _cpu is not built")
@pytest.mark.parametrize(("c_out", "absent"), [(20, ()), (1, ()), (20, (1,)), (7, (2, 3, 9)), (8, (7, 8, 9))])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_the_cpus_second_call_has_the_bits_of_the_first(case, training, c_out, absent, hits, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    x, tensors = _layer(case, c_out)
    # strides of channels_last, and contiguous nonetheless
    tensors[6] = tensors[6].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for i in absent:
        tensors[i] = None
    dy = torch.randn(x.shape[0], c_out, *x.shape[2:]).to(x.dtype)
    dy = dy.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
    for x_needed in (True, False):
        prepared._entries.clear()
        del hits[:]
        x.requires_grad_(training and x_needed)
        runs = []
        for _ in range(3):
            with torch.set_grad_enabled(training):
                state = [None if t is None else t.detach().clone() for t in tensors]
                y = ck.mixer_layer(x, *tensors, training=training, backend="cpu")
                runs.append([y.detach(), *(tensors[i].clone() for i in (4, 5, 10, 11))])
            if training:
                y.backward(dy)
                leaves = [t for t in (x, *tensors) if t is not None and t.requires_grad]
                runs[-1] += [t.grad for t in leaves]
                assert all(t.grad.stride() == t.stride() for t in leaves[x_needed:])
                for t in leaves:
                    t.grad = None
            for i in (4, 5, 10, 11):
                tensors[i].copy_(state[i])
        assert len(hits) == 2
        assert all((entry.train is not None, entry.evaluate is not None) == (training, not training) for entry in hits)
        for later in runs[1:]:
            assert len(later) == (5 + x_needed + 8 - len(absent) if training else 5)
            assert all(torch.equal(a, b) for a, b in zip(runs[0], later, strict=True))
            assert [t.stride() for t in later] == [t.stride() for t in runs[0]]


@pytest.mark.skipif(cpu.native is None, reason="the native module _cpu is not built")
def test_products_of_torch_are_not_prepared(hits, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    x, tensors = _layer(((2, 32, 5, 5), BF16, BF16, "contiguous"), 32)
    for training in (True, False):
        for _ in range(2):
            _step(x, tensors, training, backend="cpu")
    assert [(entry.train, entry.evaluate) for entry in hits] == [(None, None)] * 2


def test_gradients_of_some_parameters_only(hits, monkeypatch):
    """The prepared backward gives all; a frozen parameter takes the general one."""
    use_cuda(monkeypatch, gemm="fused")
    x, tensors = _layer(CASES[0])
    x.requires_grad_()
    tensors[2].requires_grad_(False)
    first, second = (_step(x, tensors, True, backend="cuda") for _ in range(2))
    assert len(hits) == 1
    assert len(first) == 13
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("absent", [(1,), (2, 3), (7, 8, 9)])
def test_parameters_that_are_none(absent, hits, monkeypatch):
    use_cuda(monkeypatch, gemm="fused")
    x, tensors = _layer(CASES[0])
    for i in absent:
        tensors[i] = None

    def step() -> list[Tensor]:
        y = ck.mixer_layer(x, *tensors, training=True, backend="cuda")
        y.backward(torch.ones_like(y))
        grads = [t.grad for t in tensors if t is not None and t.requires_grad]
        for t in tensors:
            if t is not None:
                t.grad = None
        return [y.detach(), *grads]

    first, second = step(), step()
    assert len(hits) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# what a second call must notice: each change makes a tensor, a setting or a surrounding that the first call has not checked


def _data(t: Tensor) -> None:
    t.data = torch.randn_like(t)


def _transposed(t: Tensor) -> None:
    t.data = t.data.transpose(0, -1).contiguous().transpose(0, -1)


def _half_the_storage(t: Tensor) -> None:
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)


def _freed(t: Tensor) -> None:
    t.untyped_storage().resize_(0)


def _other_dtype(t: Tensor) -> None:
    t.data = t.data.double()


def _other_size(t: Tensor) -> None:
    t.data = torch.randn(t.shape[0] + 1, *t.shape[1:], dtype=t.dtype)


@pytest.mark.parametrize("which", range(12))
@pytest.mark.parametrize("change", [_half_the_storage, _freed, _other_dtype, _other_size], ids=lambda f: f.__name__)
def test_a_tensor_that_no_longer_is_what_it_was(change, which, hits):
    """An error by name, as on a first call."""
    x, tensors = _layer(CASES[3], requires_grad=False)
    ck.mixer_layer(x, *tensors)
    change(tensors[which])
    with pytest.raises((RuntimeError, ValueError, TypeError), match=r"^mixer_layer: "):
        ck.mixer_layer(x, *tensors)
    assert not hits


@pytest.mark.parametrize("which", range(12))
def test_other_memory_behind_the_same_tensor(which, hits):
    x, tensors = _layer(CASES[3], requires_grad=False)
    before = ck.mixer_layer(x, *tensors)
    tensors[which].data = tensors[which].data.abs() * 1.5 + 0.1
    changed = ck.mixer_layer(x, *tensors)
    assert not hits
    assert torch.equal(changed, ck.mixer_layer(x, *[t.clone() for t in tensors]))
    assert not torch.equal(changed, before)


def test_values_are_read_anew(hits):
    x, tensors = _layer(CASES[3], requires_grad=False)
    ck.mixer_layer(x, *tensors)
    for t in tensors:
        t.mul_(1.25)
    assert torch.equal(ck.mixer_layer(x, *tensors), ck.mixer_layer(x.clone(), *[t.clone() for t in tensors]))
    assert len(hits) == 1


def test_a_strided_weight_of_the_same_memory(hits):
    x, tensors = _layer(((2, 16, 5, 7), torch.float32, torch.float32, "contiguous"), c_out=16, requires_grad=False)
    ck.mixer_layer(x, *tensors)
    tensors[6].data = tensors[6].data.transpose(0, 1)
    y = ck.mixer_layer(x, *tensors)
    assert not hits
    assert torch.equal(y, ck.mixer_layer(x, *[t.contiguous().clone() for t in tensors]))


def test_a_negative_view_of_the_same_memory(hits):
    x, tensors = _layer(CASES[3], requires_grad=False)
    ck.mixer_layer(x, *tensors)
    tensors[1].data = torch._neg_view(tensors[1].data)
    y = ck.mixer_layer(x, *tensors)
    assert torch.equal(y, ck.mixer_layer(x, *[t.resolve_neg().clone() for t in tensors]))
    assert len(hits) == int(not tensors[1].is_neg())


def test_an_input_that_is_not_what_it_was(hits):
    x, tensors = _layer(CASES[3], requires_grad=False)
    y = ck.mixer_layer(x, *tensors)
    assert torch.equal(ck.mixer_layer(x.contiguous(memory_format=torch.channels_last), *tensors).contiguous(), y)
    assert torch.equal(ck.mixer_layer((-x)._neg_view(), *tensors), y)
    wide = torch.cat([x, x], 3)[..., : x.shape[3]]
    assert torch.equal(ck.mixer_layer(wide, *tensors), y)
    assert not hits
    short = x.clone()
    short.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match=r"^mixer_layer: x has lost its memory"):
        ck.mixer_layer(short, *tensors)
    with pytest.raises(TypeError, match=r"^mixer_layer: "):
        ck.mixer_layer(x.double(), *tensors)
    assert not hits


@pytest.mark.parametrize(
    "settings",
    [
        {"eps": 1e-3},
        {"activation": "relu"},
        {"training": True, "momentum": 0.5},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_other_settings_are_other_calls(settings, hits):
    x, tensors = _layer(CASES[3], requires_grad=False)
    ck.mixer_layer(x, *tensors, training="training" in settings)
    y = ck.mixer_layer(x, *[t.clone() for t in tensors], **settings)
    assert torch.equal(y, ck.mixer_layer(x, *tensors, **settings))
    assert not hits


@pytest.mark.parametrize(
    ("name", "value"), [("training", 0), ("momentum", True), ("eps", True), ("activation", b"gelu"), ("backend", "no")]
)
def test_a_wrong_setting_is_refused_again(name, value, hits):
    x, tensors = _layer(CASES[3], requires_grad=False)
    right = {"training": False, "momentum": 1.0, "eps": 1.0, "activation": "gelu"}
    ck.mixer_layer(x, *tensors, **right)
    with pytest.raises((TypeError, ValueError), match=r"^mixer_layer: "):
        ck.mixer_layer(x, *tensors, **(right | {name: value}))
    assert not hits


@pytest.mark.parametrize("wrong", [None, object(), 3.0, "x"], ids=["None", "object", "number", "text"])
def test_what_is_no_tensor_is_refused_again(wrong, hits):
    x, tensors = _layer(CASES[3], requires_grad=False)
    ck.mixer_layer(x, *tensors)
    with pytest.raises(TypeError, match=r"^mixer_layer: x must be a torch.Tensor"):
        ck.mixer_layer(wrong, *tensors)
    for i in range(12):
        with pytest.raises((TypeError, ValueError), match=r"^mixer_layer: "):
            ck.mixer_layer(x, *tensors[:i], wrong if i in (0, 6) or wrong is not None else 1, *tensors[i + 1 :])
    assert not hits


def test_surroundings(hits, monkeypatch):
    """A backend chosen for a block of code or by the environment, autocast, a dispatch mode, a transform, a profiler."""
    x, tensors = _layer(CASES[3], requires_grad=False)
    ck.mixer_layer(x, *tensors)
    with ck.use_backend("reference"):
        ck.mixer_layer(x, *tensors)
    monkeypatch.setenv("CONVMIXER_BACKEND", "reference")
    ck.mixer_layer(x, *tensors, backend="cpu")
    monkeypatch.delenv("CONVMIXER_BACKEND")
    with torch.autocast("cpu", dtype=BF16):
        assert ck.mixer_layer(x, *tensors).dtype == BF16
        assert ck.mixer_layer(x.bfloat16(), *tensors).dtype == BF16
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    hits.clear()
    with Seen():
        ck.mixer_layer(x, *tensors)
    assert "convmixer.mixer_layer.default" in seen
    ck.mixer_layer(x, *tensors)
    hits.clear()
    torch.func.vmap(lambda one: ck.mixer_layer(one, *tensors))(x[None])
    with torch.profiler.profile() as profile:
        ck.mixer_layer(x, *tensors)
    assert any("convmixer::mixer_layer" in event.name for event in profile.events())
    assert not hits


def test_second_derivatives_and_hooks_of_saved_tensors(hits, monkeypatch):
    """In the backward of a prepared forward: a graph of it, saved tensors that come back elsewhere, a strided gradient."""
    use_cuda(monkeypatch, gemm="fused")
    x, tensors = _layer(CASES[0])
    x.requires_grad_()
    leaves = [x, *(t for t in tensors if t.requires_grad)]

    def gradients(backward) -> list[Tensor]:
        return list(backward(ck.mixer_layer(x, *tensors, training=True, backend="cuda")))

    def plain(y, dy=None):
        return torch.autograd.grad(y, leaves, torch.ones_like(y) if dy is None else dy)

    expected = gradients(plain)
    composed = [0]
    original = composite.mixer_backward
    monkeypatch.setattr(
        composite, "mixer_backward", lambda *a: (composed.__setitem__(0, composed[0] + 1), original(*a))[1]
    )
    graph = gradients(lambda y: torch.autograd.grad(y, leaves, torch.ones_like(y), create_graph=True))
    assert composed == [1]
    assert all(g.requires_grad for g in graph[:1])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        moved = gradients(plain)
    expanded = gradients(lambda y: plain(y, torch.ones(1, dtype=y.dtype).expand(y.shape)))
    assert len(hits) == 3
    for found in (moved, expanded):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_weight_changed_between_forward_and_backward(hits, monkeypatch):
    use_cuda(monkeypatch, gemm="fused")
    x, tensors = _layer(CASES[0])
    for _ in range(2):
        y = ck.mixer_layer(x, *tensors, training=True, backend="cuda")
        with torch.no_grad():
            tensors[6].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(torch.ones_like(y))
    assert len(hits) == 1


def test_running_statistics_count_their_versions(hits, monkeypatch):
    use_cuda(monkeypatch, gemm="fused")
    x, tensors = _layer(CASES[0])
    versions = []
    for _ in range(3):
        ck.mixer_layer(x, *tensors, training=True, backend="cuda")
        versions.append(tensors[4]._version)
    assert versions == sorted(set(versions))
    assert len(hits) == 2


def test_entries_hold_no_tensor():
    x, tensors = _layer(CASES[3])
    ck.mixer_layer(x, *tensors, training=True)
    references = [weakref.ref(t) for t in (x, *tensors)]
    del x, tensors
    gc.collect()
    assert [r for r in references if r() is not None] == []


def test_computed_weights_are_not_kept():
    x, tensors = _layer(CASES[3])
    ck.mixer_layer(x, 2 * tensors[0], *tensors[1:], training=True)
    assert not prepared._entries


def test_entries_have_a_limit(monkeypatch):
    monkeypatch.setattr(prepared, "_MOST_ENTRIES", 4)
    x, tensors = _layer(CASES[3], requires_grad=False)
    for n in range(1, 12):
        ck.mixer_layer(x[:1].repeat(n, 1, 1, 1), *tensors)
        assert len(prepared._entries) <= 4


# the model


def _model(gemm: str, monkeypatch) -> tuple[nn.Sequential, Tensor]:
    use_cuda(monkeypatch, gemm=gemm)
    return ConvMixer(16, 2, 5, 2, 4).to(BF16), torch.randn(2, 3, 16, 16).to(BF16)


def test_a_model_trains_as_its_first_steps(hits, monkeypatch):
    """Steps of a prepared model beside a copy whose every call is the first."""
    model, images = _model("fused", monkeypatch)
    other = copy.deepcopy(model)
    with ck.use_backend("cuda"):
        for step in range(3):
            for each in (model, other):
                if each is other:
                    prepared._entries.clear()
                loss = each(images).square().sum()
                loss.backward()
                with torch.no_grad():
                    for p in each.parameters():
                        p.sub_(p.grad, alpha=0.01)
                        p.grad = None
            if step == 0:
                hits.clear()
            for name, value in model.state_dict().items():
                assert torch.equal(value, other.state_dict()[name]), (step, name)
            # the other's calls forgot the model's
            with torch.no_grad():
                model(images)
                for key in model.state_dict():
                    model.state_dict()[key].copy_(other.state_dict()[key])
    assert hits


def test_a_model_notices_a_hook_and_a_mode(hits, monkeypatch):
    model, _ = _model("fused", monkeypatch)
    model.eval()
    layer = model[3]
    h = torch.randn(2, 16, 8, 8).to(BF16)
    with torch.no_grad(), ck.use_backend("cuda"):
        expected = [layer(h) for _ in range(2)][-1]
        assert len(hits) == 1
        called = []
        handle = layer[2].register_forward_hook(lambda *a: called.append(a))
        layer(h)
        assert called
        handle.remove()
        hits.clear()
        assert torch.equal(layer(h), expected)
        assert len(hits) == 1
        layer[3].eps = 1e-2
        assert not torch.equal(layer(h), expected)
        assert len(hits) == 1


def test_counters_of_a_prepared_training_call(hits, monkeypatch):
    """num_batches_tracked steps once a call, also in one that fails."""
    model, _ = _model("fused", monkeypatch)
    layer, h = model[3], torch.randn(2, 16, 8, 8).to(BF16)
    counter = layer[3].num_batches_tracked
    with ck.use_backend("cuda"):
        for calls in range(1, 4):
            layer(h)
            assert counter.item() == calls
        assert len(hits) == 2
        monkeypatch.setattr(functional, "run_known_layer", lambda *a: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            layer(h)
    assert counter.item() == 3

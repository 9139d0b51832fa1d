# SPDX-License-Identifier: MIT
"""The model against the reference: the same tree, numbers and results, less memory, and still an nn.Sequential."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from model_helpers import DIM, SMALL, assert_matches, assert_same_steps, features, image, make_pair
from torch import nn

import convmixer_kernels
from convmixer import ConvMixer, MixerLayer, MixerSequential, reference
from convmixer_kernels import functional
from convmixer_kernels.backends import cpu

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "changes",
    [{}, {"kernel_size": (3, 8), "activation": "relu"}, {"depth": 0}, {"in_chans": 1, "dtype": torch.bfloat16}],
    ids=["plain", "non-square", "no-layer", "bfloat16"],
)
def test_tree_and_initial_numbers_are_the_references(changes):
    models = []
    for build in (ConvMixer, reference.ConvMixer):
        torch.manual_seed(5)
        models.append(build(**{**SMALL, **changes}))
    ours, ref = models
    assert type(ours) is MixerSequential
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in ref.named_modules()]
    state, expected = ours.state_dict(), ref.state_dict()
    assert list(state) == list(expected)
    assert state._metadata == expected._metadata
    for name, value in state.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name
    ours.load_state_dict(expected, strict=True)
    ref.load_state_dict(state, strict=True)


def test_layers_and_keys_are_the_papers():
    model = ConvMixer(**SMALL)
    assert [type(m) for m in model] == [
        nn.Conv2d,
        nn.GELU,
        nn.BatchNorm2d,
        MixerLayer,
        MixerLayer,
        nn.AdaptiveAvgPool2d,
        nn.Flatten,
        nn.Linear,
    ]
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    layer = [
        "0.fn.0.weight",
        "0.fn.0.bias",
        *[f"0.fn.2.{n}" for n in norm],
        "1.weight",
        "1.bias",
        *[f"3.{n}" for n in norm],
    ]
    assert [k for k in model.state_dict() if k.startswith("3.")] == [f"3.{k}" for k in layer]
    assert model(image()).shape == (3, SMALL["n_classes"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dim": 0}, ValueError, "ConvMixer: dim must be at least 1, got dim=0"),
        ({"depth": -1}, ValueError, "ConvMixer: depth must be at least 0, got depth=-1"),
        ({"dim": 8.0}, TypeError, "ConvMixer: dim must be an int, got dim=8.0"),
        ({"n_classes": True}, TypeError, "ConvMixer: n_classes must be an int, got n_classes=True"),
        ({"kernel_size": (3, 0)}, ValueError, r"ConvMixer: kernel_size must be at least 1, got kernel_size=\(3, 0\)"),
        ({"patch_size": "7"}, TypeError, "ConvMixer: patch_size must be an int or a pair .*, got patch_size='7'"),
        ({"activation": "silu"}, ValueError, "ConvMixer: activation must be one of gelu, gelu_tanh, relu, identity"),
    ],
)
@pytest.mark.parametrize("build", [ConvMixer, reference.ConvMixer], ids=["ours", "reference"])
def test_wrong_arguments_raise(build, changes, error, message):
    with pytest.raises(error, match=message):
        build(**{**SMALL, **changes})


# each dtype, activation, mode and memory format at least twice; the operators' own tests cover the product
GRID = [
    ("gelu", torch.float32, True, False, 5),
    ("gelu", torch.float32, False, True, 5),
    ("gelu", torch.bfloat16, True, True, 9),
    ("gelu", torch.float16, False, False, 4),
    ("gelu_tanh", torch.float32, True, True, 4),
    ("gelu_tanh", torch.bfloat16, False, False, (3, 6)),
    ("relu", torch.float32, True, False, 7),
    ("relu", torch.float16, True, True, 5),
    # in training a constant before a norm has a gradient of zero, and no relative error
    ("identity", torch.float32, False, False, 5),
    ("identity", torch.bfloat16, False, True, 9),
]


@pytest.mark.parametrize(("activation", "dtype", "training", "channels_last", "kernel_size"), GRID)
def test_outputs_gradients_and_statistics(calls, activation, dtype, training, channels_last, kernel_size):
    ours, ref = make_pair(activation=activation, kernel_size=kernel_size)
    for model in (ours, ref):
        model.to(dtype).train(training)
        if channels_last:
            model.to(memory_format=torch.channels_last)
    assert_matches(ours, ref, image(dtype=dtype, channels_last=channels_last))
    assert calls == ["mixer_layer"] * 2


def test_memory_format_passes_through():
    ours, _ = make_pair()
    x = image(channels_last=True)
    assert ours[:5](x).is_contiguous(memory_format=torch.channels_last)
    assert ours[:5](image()).is_contiguous()


def test_several_training_steps_follow_the_reference():
    """Every call sees the optimizer's in-place changes, a load_state_dict and a write to .data."""
    ours, ref = make_pair()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (ours, ref)]
    for _ in range(3):
        for model, optimizer in zip((ours, ref), optimizers, strict=True):
            model.zero_grad()
            F.cross_entropy(model(image()), torch.arange(3)).backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), ref.state_dict(), rtol=1e-4, atol=1e-5)
    before = ours.eval()(image())
    ours.load_state_dict(make_pair()[1].state_dict())
    assert not torch.allclose(ours(image()), before)
    ours[3][1].weight.data.zero_()
    ours[3][3].weight.data.zero_()
    assert torch.equal(ours[:4](image())[0, :, 0, 0], ours[3][3].bias)


def test_parts_without_gradients():
    """requires_grad_(False) on parts: the other parameters get the reference's gradients, and these get none."""
    ours, ref = make_pair()
    for model in (ours, ref):
        model[3][0].requires_grad_(False)
        model[4][1].weight.requires_grad_(False)
        model[4][3].bias.requires_grad_(False)
    assert_matches(ours, ref, image())
    assert [p.grad is None for p in ours.parameters()] == [p.grad is None for p in ref.parameters()]
    with torch.no_grad():
        assert not ours(image()).requires_grad


def test_empty_batch():
    layer, ref = (m[3] for m in make_pair())
    assert_same_steps(layer, ref, features(0))


def test_slices(calls):
    ours, ref = (m.eval() for m in make_pair())
    x = features()
    tail = ours[3][1:]
    assert type(tail) is MixerLayer
    assert len(tail) == 3
    assert tail[0] is ours[3][1]
    for part in (slice(1, None), slice(None, 1), slice(1, 3), slice(0, 0)):
        assert torch.equal(ours[3][part](x), ref[3][part](x))
    assert calls == []
    assert type(ours[:4]) is MixerSequential
    assert len(ours[:4]) == 4
    ours[3:5](x)
    ours[3][:](x)
    assert calls == ["mixer_layer"] * 3


def test_growing_and_replacing(calls):
    ours, _ = (m.eval() for m in make_pair())
    ours.insert(4, copy.deepcopy(ours[3]))
    ours[3].append(nn.ReLU())
    assert ours(image()).shape == (3, 7)
    assert (ours[3](features()) >= 0).all()
    assert len(calls) == 2
    built = MixerLayer(*ours[4])
    assert torch.equal(built(features()), ours[4](features()))
    assert len(calls) == 4
    assert len(list(ours.modules())) == len({id(m) for m in ours.modules()})
    assert "MixerLayer(" in repr(ours)


def test_copies_and_pickles():
    ours, _ = (m.eval() for m in make_pair())
    expected = ours(image())
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)]
    for twin in copies:
        assert type(twin[3]) is MixerLayer
        assert torch.equal(twin(image()), expected)
        twin[3][1].weight.data.zero_()
    assert torch.equal(ours(image()), expected)
    assert all(p.is_shared() for p in ours.share_memory().parameters())


def test_a_saved_model_loads_in_another_process(tmp_path):
    ours, _ = (m.eval() for m in make_pair())
    torch.save({"model": ours, "x": image(), "y": ours(image())}, tmp_path / "model.pt")
    script = (
        "import sys, torch; saved = torch.load(sys.argv[1], weights_only=False); model = saved['model']\n"
        "torch.testing.assert_close(model(saved['x']), saved['y']); print(type(model[3]).__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.pt")], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "MixerLayer"


def test_checkpointing_and_saved_tensor_hooks():
    """Activation checkpointing runs a layer twice: the same gradients, and batches counted as the reference counts."""
    from torch.utils.checkpoint import checkpoint_sequential

    gradients, counters = [], []
    for model in make_pair():
        y = checkpoint_sequential(model, 2, image().requires_grad_(), use_reentrant=False)
        with torch.autograd.graph.save_on_cpu():
            y.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        counters.append([b for n, b in model.named_buffers() if n.endswith("tracked")])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert counters[0] == counters[1]


class _Recomputed(nn.Sequential):
    use_reentrant = False

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint_sequential

        return checkpoint_sequential(self, 3, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_recomputation_moves_the_statistics_as_the_reference(use_reentrant, momentum):
    """torch.utils.checkpoint runs a training forward twice, and both move the running statistics: those of torch's modules too."""
    models = [_Recomputed(*model) for model in make_pair()]
    for model in models:
        model.use_reentrant = use_reentrant
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = momentum
    assert_matches(*models, image())
    assert models[0][3][3].num_batches_tracked == 2


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """The number of layers in each call of the CPU backend's mixer_eval."""
    if cpu.native is None:
        pytest.skip("the native module _cpu is not built")
    seen, original = [], cpu.mixer_eval
    # with AMX, bfloat16 layers run block by block
    monkeypatch.setattr(cpu, "takes_torch_product", lambda x, *channels: False)
    monkeypatch.setattr(
        cpu, "mixer_eval", lambda x, layers, *rest: seen.append(len(layers)) or original(x, layers, *rest)
    )
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_layers_are_evaluated_together_with_the_bits_of_each_alone(runs, dtype, channels_last):
    model = make_pair(depth=3)[0].eval().to(dtype)
    x = image(dtype=dtype, channels_last=channels_last)
    with torch.no_grad():
        y = model(x)
        assert runs == [3]
        features_together = model[:6](x)
        one_by_one = nn.Sequential(*model[:6])(x)
        assert runs == [3, 3, 1, 1, 1]
        assert torch.equal(features_together, one_by_one)
        assert features_together.stride() == one_by_one.stride()
        assert torch.equal(y, nn.Sequential(*model)(x))
    with torch.inference_mode():
        assert torch.equal(model(x), y)
    del runs[:]
    assert model(x).requires_grad
    assert runs == []


def _hook_on_a_layer(model):
    model[4].register_forward_hook(lambda m, args, y: y * 2)


def _module_between(model):
    model.insert(4, nn.ReLU())


def _training_layer(model):
    model[4].train()


def _batch_statistics(model):
    model[4][3].running_mean = model[4][3].running_var = None


def _two_epsilons(model):
    model[4][3].eps = 0.5


def _double_parameters(model):
    model[4][1].weight = nn.Parameter(model[4][1].weight.to(torch.float16))


def _wider(model):
    model[4][1], model[4][3] = nn.Conv2d(DIM, 2 * DIM, 1), nn.BatchNorm2d(2 * DIM).eval()
    model[5] = make_pair(dim=2 * DIM)[0][4].eval()
    model[6] = nn.Identity()
    del model[7:]


def _own_forward(model):
    model[4].forward = lambda x: x + 1


def _another_kernel_and_activation(model):
    model[4] = make_pair(kernel_size=(3, 8), activation="relu")[0][4].eval()


@pytest.mark.parametrize(
    ("alter", "expected"),
    [
        (_hook_on_a_layer, [1, 1, 1]),
        (_module_between, [1, 2]),
        (_training_layer, [1, 1]),
        (_batch_statistics, [1, 1]),
        (_two_epsilons, [1, 1]),
        (_wider, [1, 1, 1]),
        (_own_forward, [1, 1]),
        (_another_kernel_and_activation, [3]),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_runs_of_layers_end_where_a_layer_is_another(runs, alter, expected):
    model = make_pair(depth=3)[0].eval()
    alter(model)
    counterpart = copy.deepcopy(model)
    with torch.no_grad():
        y = model(image())
        assert runs == expected
        assert torch.equal(y, nn.Sequential(*counterpart)(image()))


def test_layers_together_refuse_what_a_layer_refuses():
    model, ref = (m.eval() for m in make_pair())
    for one in (model, ref):
        one[4][1] = nn.Conv2d(DIM + 1, DIM, 1)
    with torch.no_grad():
        for one in (model, ref):
            with pytest.raises((RuntimeError, ValueError), match=r"channels|C_in"):
                one(image())


def test_what_does_not_fit_is_left_to_the_layers_at_once(monkeypatch):
    """Images larger than a core's cache: the layers run one by one, and none is recognized twice."""
    model, x = make_pair()[0].eval(), features(size=80)
    monkeypatch.setattr(functional, "run_fused_layers", lambda *a: pytest.fail("it was asked"))
    with torch.no_grad():
        assert torch.equal(model[3:5](x), nn.Sequential(*model[3:5])(x))


def test_layers_together_run_on_the_backend_that_is_asked_for(runs):
    model = make_pair()[0].eval()
    with torch.no_grad(), convmixer_kernels.use_backend("reference"):
        assert torch.equal(model(image()), nn.Sequential(*model)(image()))
    assert runs == []


def test_layers_together_see_every_change_and_other_modes(runs):
    model, ref = (m.eval() for m in make_pair())
    with torch.no_grad():
        before = model(image())
        model[3][1].weight.mul_(2)
        ref[3][1].weight.mul_(2)
        assert not torch.equal(model(image()), before)
        torch.testing.assert_close(model(image()), ref(image()), rtol=1e-4, atol=1e-4)
        del runs[:]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(image()), nn.Sequential(*model)(image()))
        assert model(image()[:0]).shape == (0, 7)
        assert 2 not in runs
        traced = torch.jit.trace(model, image())
        assert torch.equal(traced(image()), ref(image()))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(image()), ref(image()), rtol=1e-4, atol=1e-4)


def saved_bytes(model: nn.Module, x: torch.Tensor, unit: int) -> tuple[int, int]:
    """Bytes saved for backward in unique storages without parameters, and how many have at least `unit`."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            # kept, so that its address is not reused
            storages[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    sizes = [s.nbytes() for s in storages.values()]
    return sum(sizes), sum(size >= unit for size in sizes)


@pytest.mark.parametrize(
    ("activation", "ours_count", "eager_count", "bar"), [("gelu", 26, 50, 0.53), ("relu", 25, 33, 0.77)]
)
def test_memory_saved_for_backward(activation, ours_count, eager_count, bar):
    """256/8: three activation-sized tensors a layer and torch's stem. The classifier saves next to nothing."""
    x = torch.randn(2, 3, 16, 16)
    unit = 2 * 256 * 8 * 8 * 4
    options = {"dim": 256, "depth": 8, "kernel_size": 9, "patch_size": 2, "n_classes": 10, "activation": activation}
    ours = saved_bytes(ConvMixer(**options), x, unit)
    eager = saved_bytes(reference.ConvMixer(**options), x, unit)
    assert (ours[1], eager[1]) == (ours_count, eager_count)
    assert ours[0] <= bar * eager[0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_layer_saves_three_activations(training):
    layer = make_pair()[0][3].train(training)
    x = features().requires_grad_()
    assert saved_bytes(layer, x, x.nbytes)[1] == 3

# SPDX-License-Identifier: MIT
"""Running statistics and counters change only after everything else has succeeded."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import BLOCK_TENSORS, Case, make_inputs, skip_unless_it_runs
from torch import Tensor

import convmixer_kernels as ck
from convmixer_kernels import dispatch, prepared

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = ("depthwise_block", "pointwise_block", "mixer_layer")


class Injected(Exception):
    pass


@pytest.fixture(params=["reference", "cpu", "cuda", "triton"])
def backend(request, monkeypatch):
    skip_unless_it_runs(request.param, monkeypatch)
    return dispatch.load(request.param)


def inputs_of(op: str) -> tuple[Tensor, list[Tensor]]:
    x, tensors, _ = make_inputs(Case(op, (2, 8, 6, 5), (3, 3) if op != "pointwise_block" else (1, 1)))
    return x, tensors


def train(op: str, x: Tensor, tensors: list[Tensor], **options) -> Tensor:
    return getattr(ck, op)(x, *tensors, training=True, **options)


def state_of(tensors: list[Tensor]) -> list[Tensor]:
    return [t for i, t in enumerate(tensors) if i % 6 >= 4]


@pytest.fixture
def unmoved():
    """A function that remembers tensors and returns one that asserts that neither their values nor their versions changed."""

    def remember(tensors: list[Tensor]):
        values, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]

        def check() -> None:
            assert all(map(torch.equal, tensors, values))
            assert [t._version for t in tensors] == versions

        return check

    return remember


@pytest.mark.parametrize("wanted", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("op", BLOCKS)
def test_a_primitive_fails(op, wanted, backend, unmoved, monkeypatch):
    """Each call of a primitive fails in turn, the last one too; after that the same operator call succeeds."""
    monkeypatch.setattr(prepared, "keep", lambda *arguments: None)  # the next test has prepared layers
    x, tensors = inputs_of(op)
    x.requires_grad_(wanted)
    check = unmoved(state_of(tensors))
    calls: list[str] = []
    fails_at = 0

    def failing(name: str, primitive):
        def call(*arguments):
            calls.append(name)
            if len(calls) == fails_at:
                raise Injected
            return primitive(*arguments)

        return call

    for name in ("depthwise_train", "pointwise_train", "normalize"):
        monkeypatch.setattr(backend, name, failing(name, getattr(backend, name)))
    while True:
        calls.clear()
        fails_at += 1
        try:
            train(op, x, tensors, backend=backend.name)
        except Injected:
            check()
        else:
            break
    assert len(calls) == fails_at - 1 == (4 if op == "mixer_layer" else 2)
    for t in state_of(tensors):
        assert t._version > 0


@pytest.mark.parametrize("wanted", [True, False], ids=["grad", "no_grad"])
def test_a_native_call_of_a_prepared_layer_fails(wanted, unmoved, monkeypatch):
    """Each native call of a layer that was checked before fails in turn, as if memory ran out."""
    cpu = dispatch.load("cpu")
    if cpu.native is None:
        pytest.skip("the native module _cpu is not built")
    calls: list[str] = []
    fails_at = 0

    class Failing:
        def __getattr__(self, name: str):
            function = getattr(original, name)

            def call(*arguments):
                calls.append(name)
                if len(calls) == fails_at:
                    raise MemoryError
                return function(*arguments)

            return call

    original = cpu.native
    monkeypatch.setattr(cpu, "native", Failing())
    x, tensors = inputs_of("mixer_layer")
    x.requires_grad_(wanted)
    train("mixer_layer", x, tensors, backend="cpu")
    assert any(entry.train is not None for entry in prepared._entries.values())
    check = unmoved(state_of(tensors))
    for each in range(1, 6):
        fails_at = each
        calls.clear()
        with pytest.raises(MemoryError):
            train("mixer_layer", x, tensors, backend="cpu")
        check()
    assert calls[-1] == "update_running_statistics"
    calls.clear()
    fails_at = 0
    train("mixer_layer", x, tensors, backend="cpu")
    assert len(calls) == 5


@pytest.mark.parametrize("op", BLOCKS)
def test_an_allocation_fails(op, backend, unmoved, monkeypatch):
    """Each allocation of a forward fails in turn; with Triton every sixth, because its interpreter also allocates and is slow."""
    x, tensors = inputs_of(op)
    check = unmoved(state_of(tensors))
    left = 0

    def counted(allocate):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise Injected
            return allocate(*arguments, **options)

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"), (Tensor, "clone")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    failures = 0
    while True:
        left = failures * (6 if backend.name == "triton" else 1) + 1
        try:
            train(op, x, tensors, backend=backend.name)
        except Injected:
            failures += 1
            check()
        else:
            break
    # the reference allocates in torch's operations
    assert failures >= (0 if backend.name == "reference" else 4 if op != "mixer_layer" else 8)


_OUT_OF_MEMORY = """
import resource, sys, torch
import convmixer_kernels as ck
torch.set_num_threads(2)
def inputs(c, size):
    block = [torch.randn(c), torch.randn(c), torch.randn(c), torch.zeros(c), torch.ones(c)]
    return torch.randn(1, c, size, size), [torch.randn(c, 1, 3, 3), *block], [torch.randn(c, c, 1, 1) / c**0.5, *(t.clone() for t in block)]
def call(op, x, depthwise, pointwise):
    tensors = {"depthwise_block": depthwise, "pointwise_block": pointwise, "mixer_layer": depthwise + pointwise}[op]
    getattr(ck, op)(x, *tensors, training=True, backend="cpu")
op, size = sys.argv[1], int(sys.argv[2])
with torch.no_grad():
    # threads and what torch allocates once
    call(op, *inputs(16, 32))
    x, depthwise, pointwise = inputs(1024, size)
    state = [*depthwise[4:], *pointwise[4:]]
    before = [t.clone() for t in state]
    step, failures, held = 64 * 1024, 0, [None] * 100000
    def leave(headroom):
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + headroom, resource.RLIM_INFINITY))
    # what the heap still holds would let the first call succeed
    leave(0)
    for at in range(len(held)):
        try:
            held[at] = torch.empty(step, dtype=torch.uint8)
        except (MemoryError, RuntimeError):
            break
    for headroom in range(0, 1 << 30, step):
        leave(headroom)
        try:
            call(op, x, depthwise, pointwise)
        except (MemoryError, RuntimeError):
            failures += 1
            for t, old in zip(state, before):
                if not torch.equal(t, old):
                    sys.exit(f"moved at {headroom} bytes: {t[:4]}")
        else:
            break
print(failures)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory through /proc")
@pytest.mark.parametrize("size", [7, 40])
@pytest.mark.parametrize("op", BLOCKS)
def test_memory_runs_out(op, size):
    """Memory runs out in the native CPU module and before it: each call gets a little more, until one succeeds."""
    if dispatch.load("cpu").native is None:
        pytest.skip("the native module _cpu is not built")
    done = subprocess.run(
        [sys.executable, "-c", _OUT_OF_MEMORY, op, str(size)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 0


@pytest.mark.parametrize("op", BLOCKS)
@pytest.mark.parametrize("name", ["eps", "momentum"])
def test_numbers(op, name, unmoved):
    """A number that is no finite float raises by name before anything changes; one that converts to a float gives its result."""
    x, tensors = inputs_of(op)
    check = unmoved(state_of(tensors))
    for value, error in ((10**400, ValueError), (-(10**400), ValueError), (float("nan"), ValueError)):
        with pytest.raises(error, match=f"{op}: {name} must be finite"):
            train(op, x, tensors, **{name: value})
    for value in (1j, "0.1", np.array([0.1]), torch.tensor([0.1]), True, None):
        with pytest.raises(TypeError, match=f"{op}: {name} must be a number"):
            train(op, x, tensors, **{name: value})
    with pytest.raises(ValueError, match=f"{op}: {name} must be finite"):
        train(op, x, tensors, **{name: Fraction(10**400)})
    check()
    for value in (Fraction(1, 8), np.float32(0.125), np.float64(0.125), 1, np.int64(1)):
        for chosen in ("cpu", "reference"):
            if dispatch.load(chosen).can_run("depthwise", x, tensors[0]) is not None:
                continue
            results = []
            for given in (value, float(value)):
                _, fresh = inputs_of(op)
                results.append([train(op, x, fresh, **{name: given}, backend=chosen), *state_of(fresh)])
            assert all(map(torch.equal, *results))


@pytest.mark.parametrize("op", BLOCKS)
def test_statistics_that_share_an_element(op, backend):
    """With running_var=torch.ones(1).expand(C) every channel updates the one element, one after the other as in eager."""
    x, tensors = inputs_of(op)
    torch.set_num_threads(1)
    tensors[4], tensors[5] = torch.randn(1).expand(8), torch.ones(1).expand(8)
    expected = [t[:1].clone().expand(8) for t in tensors[4:6]]
    convolve = F.conv2d(x, tensors[0], tensors[1], padding="same", groups=1 if op == "pointwise_block" else 8)
    F.batch_norm(F.gelu(convolve), *expected, training=True)
    train(op, x, tensors, backend=backend.name)
    for ours, exact in zip(tensors[4:6], expected, strict=True):
        assert ours.stride() == (0,)
        torch.testing.assert_close(ours, exact)


def test_the_second_half_under_autocast(monkeypatch, unmoved):
    """A float32 x with 16-bit blocks takes two calls."""
    x, tensors = inputs_of("mixer_layer")
    check = unmoved(state_of(tensors))
    chosen = dispatch.load("reference")

    def fail(*_):
        raise Injected

    with torch.autocast("cpu", torch.bfloat16):
        with monkeypatch.context() as patch:
            patch.setattr(chosen, "pointwise_train", fail)
            with pytest.raises(Injected):
                train("mixer_layer", x, tensors, backend="reference")
        check()
        train("mixer_layer", x, tensors, backend="reference")
    for t, name in zip(state_of(tensors), ("mean", "var", "mean", "var"), strict=True):
        assert t._version > 0, name


@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
def test_the_counter_of_a_module(kind, backend, monkeypatch, unmoved):
    module = ck.DepthwiseBlock(8, 3) if kind == "depthwise" else ck.PointwiseBlock(8)
    check = unmoved(list(module.buffers()))

    def fail(*_):
        raise Injected

    with ck.use_backend(backend.name):
        with monkeypatch.context() as patch:
            patch.setattr(backend, "normalize", fail)
            with pytest.raises(Injected):
                module(torch.randn(2, 8, 6, 5))
        check()
        module(torch.randn(2, 8, 6, 5))
    assert module.norm.num_batches_tracked == 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCK_TENSORS[4:])
def test_statistics_that_require_a_gradient(name, training):
    """As in eager, they raise if a graph is built."""
    x, tensors = inputs_of("depthwise_block")
    at = BLOCK_TENSORS.index(name)
    tensors[at].requires_grad_()
    norm = (*tensors[4:], *tensors[2:4], training)
    with pytest.raises(RuntimeError, match=name):
        F.batch_norm(x, *norm)
    with pytest.raises(RuntimeError, match=f"depthwise_block: {name} must not require a gradient"):
        ck.depthwise_block(x, *tensors, training=training)
    with torch.no_grad():
        F.batch_norm(x, *norm)
        ck.depthwise_block(x, *tensors, training=training)

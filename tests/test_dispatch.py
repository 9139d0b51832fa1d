# SPDX-License-Identifier: MIT
"""The choice of a backend, FLOP counts and saved tensors of the operators, and the registered operators."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import Case, eager, make_inputs, ours, skip_unless_it_runs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import convmixer
import convmixer_kernels as ck
from convmixer_kernels import _load, dispatch
from convmixer_kernels.backends import cpu, cuda, triton

OPERATORS = ["depthwise_block", "pointwise_block", "mixer_layer", "depthwise_conv2d"]


def _chosen(monkeypatch, call) -> str:
    seen = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *a: seen.append(choose(*a)) or seen[-1])
    call()
    return seen[0].name


def test_order_of_the_ways_to_choose(monkeypatch):
    x, tensors, _ = make_inputs(Case("depthwise_conv2d", (1, 4, 5, 5), (3, 3)))
    call = lambda backend=None: ck.depthwise_conv2d(x, *tensors, backend=backend)  # noqa: E731
    assert _chosen(monkeypatch, call) == "cpu"
    monkeypatch.setenv("CONVMIXER_BACKEND", "reference")
    assert _chosen(monkeypatch, call) == "reference"
    with ck.use_backend("cpu"):
        assert _chosen(monkeypatch, call) == "cpu"
        assert _chosen(monkeypatch, lambda: call("reference")) == "reference"
    monkeypatch.setenv("CONVMIXER_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="CONVMIXER_BACKEND must be one of"):
        call()
    with pytest.raises(ValueError, match="use_backend: name must be one of"), ck.use_backend("nonsense"):
        pass


def test_automatic_choice_logs_the_reason(caplog):
    x, tensors, _ = make_inputs(Case("depthwise_conv2d", (1, 4, 5, 5), (3, 3), dtype=torch.float64))
    with caplog.at_level(logging.DEBUG, logger="convmixer_kernels"):
        ck.depthwise_conv2d(x, *tensors)
    assert "backend 'cpu' not used: it takes float32" in caplog.text


def test_available_backends_and_info():
    assert {"reference", "cpu"} <= set(ck.available_backends())
    info = ck.build_info()
    assert info["version"] == ck.__version__ == convmixer.__version__
    assert info["operators"]["cpu"]["mixer_layer"]["backend"] == "cpu"
    printed = subprocess.run([sys.executable, "-m", "convmixer_kernels"], capture_output=True, text=True, check=True)
    assert f"convmixer-kernels {ck.__version__}" in printed.stdout
    assert "mixer_layer       runs on cpu" in printed.stdout


@pytest.mark.parametrize(
    ("variable", "value", "out", "error"),
    [
        ("CONVMIXER_BACKEND", "reference", "mixer_layer       runs on reference", ""),
        ("CONVMIXER_BACKEND", "fast", "", "CONVMIXER_BACKEND must be one of reference, cpu, cuda, triton, got 'fast'"),
        ("CONVMIXER_CPU_ISA", "sse9", "the value of CONVMIXER_CPU_ISA is not a known instruction set", ""),
    ],
    ids=lambda v: v[:16],
)
def test_the_command_heeds_the_environment(variable, value, out, error):
    command = [sys.executable, "-m", "convmixer_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, variable: value})
    assert out in done.stdout
    assert error in done.stderr
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == (not error)


class _Counting:
    """The native module with its calls counted."""

    def __init__(self, native):
        self.native, self.calls = native, []

    def __getattr__(self, name):
        function = getattr(self.native, name)
        return lambda *a: self.calls.append(name) or function(*a)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_native_calls_and_no_torch_arithmetic(monkeypatch, memory_format):
    counting = _Counting(cpu.native)
    monkeypatch.setattr(cpu, "native", counting)
    case = Case("depthwise_block", (2, 16, 8, 8), (9, 9), memory_format=memory_format)
    x, tensors, dy = make_inputs(case)

    with torch.no_grad():
        ours(Case("depthwise_block", (2, 16, 8, 8), (9, 9), training=False), x, tensors, "cpu")
    assert len(counting.calls) == 1
    counting.calls.clear()
    tensors[0].requires_grad_()
    y = ours(case, x.requires_grad_(), tensors, "cpu")
    assert len(counting.calls) <= 3
    counting.calls.clear()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            big = isinstance(out, torch.Tensor) and out.numel() >= x.numel()
            harmless = ("empty", "detach", "contiguous", "new_empty", "view")
            assert not big or any(name in str(function) for name in harmless), function
            return out

    dy = dy.contiguous(
        memory_format=torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    )
    with Watch():
        y.backward(dy)
    assert len(counting.calls) <= 5


@pytest.mark.parametrize("operator", OPERATORS)
def test_dispatch_modes_see_the_operator_and_change_nothing(operator):
    case = Case(operator, (2, 6, 7, 5), (4, 3) if operator != "pointwise_block" else (1, 1))
    x, tensors, _ = make_inputs(case)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    expected = ours(case, x, [t.clone() for t in tensors], "cpu")
    copies = [t.clone() for t in tensors]
    with Watch():
        actual = ours(case, x, copies, "cpu")
    assert torch.equal(actual, expected)
    assert f"convmixer.{operator}.default" in seen


# Counters and profilers.


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("wanted", ["everything", "x", "weights", "nothing"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("operator", OPERATORS)
def test_flops_are_those_of_the_equivalent(operator, training, wanted):
    kernel = (1, 1) if operator == "pointwise_block" else (4, 3)
    out = 8 if operator in ("pointwise_block", "mixer_layer") else None
    case = Case(operator, (2, 6, 7, 5), kernel, out, training=training)
    x, tensors, dy = make_inputs(case)
    counts = []
    for call in (eager, lambda case, x, t: ours(case, x, t, None)):
        leaves = [x.clone(), *(t.clone() for t in tensors)]
        for i, t in enumerate(leaves):
            floating = i == 0 or (i - 1) % 6 < 4
            t.requires_grad_(floating and {"everything": True, "x": i == 0, "weights": i > 0, "nothing": False}[wanted])
        with FlopCounterMode(display=False) as counter:
            y = call(case, leaves[0], leaves[1:])
            if wanted != "nothing":
                y.backward(dy)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("training", [True, False])
def test_flops_of_a_model_are_the_references_module_by_module(training):
    counts = []
    for build in (convmixer.ConvMixer, convmixer.reference.ConvMixer):
        model = build(8, 2, 3, 2, 4).train(training)
        with FlopCounterMode(display=False) as counter:
            y = model(torch.randn(2, 3, 8, 8))
            y.sum().backward()
        found = counter.get_flop_counts()
        counts.append({name.partition(".")[2]: dict(count) for name, count in found.items()})
    assert counts[0] == counts[1]
    assert len(counts[0]) > 4


FLOPS = """
import sys
{first}
import torch, convmixer_kernels as ck
assert ("torch.utils.flop_counter" in sys.modules) == {imported}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    ck.depthwise_conv2d(torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3))
print(counter.get_total_flops())
"""


@pytest.mark.parametrize("first", ["", "import torch.utils.flop_counter"])
def test_flops_are_known_whatever_is_imported_first(first):
    """Also, torch's counter, which imports triton, is not imported unless somebody counts."""
    script = FLOPS.format(first=first, imported=bool(first))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(2 * 2 * 25 * 9), done.stderr


def test_profilers_see_evaluation_by_name():
    x = torch.randn(2, 8, 8, 9)
    model = convmixer.ConvMixer(8, 2, 3, 2, 4, in_chans=8).eval()
    calls = {
        "depthwise_block": ck.DepthwiseBlock(8, 3).eval(),
        "pointwise_block": ck.PointwiseBlock(8).eval(),
        "depthwise_conv2d": ck.DepthwiseConv2d(8, 3),
        "mixer_layer": model[3],
        "mixer_layers": model,
    }
    with torch.no_grad():
        for name, call in calls.items():
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                call(x)
            assert [e.key for e in seen.key_averages() if "convmixer" in e.key] == [f"convmixer::{name}"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend, training):
    case = Case("mixer_layer", (2, 5, 6, 7), (3, 2), 4, training=training)
    x, tensors, _ = make_inputs(case)
    leaves = [t.requires_grad_() for t in (x, *tensors[:4], *tensors[6:10])]
    running = (None,) * 4 if training else (*tensors[4:6], *tensors[10:12])
    options = (training, 1e-5, "gelu", True, True, backend)
    torch.library.opcheck(torch.ops.convmixer.mixer_layer, (*leaves, *running, *options))
    for kind, block in (("depthwise", tensors[:6]), ("pointwise", tensors[6:])):
        statistics = (None, None) if training else tuple(block[4:])
        operator = getattr(torch.ops.convmixer, f"{kind}_block")
        torch.library.opcheck(operator, (x, *block[:4], *statistics, *options[:3], kind == "depthwise", *options[4:]))
    for dilation in ([1, 1], [2, 3]):
        arguments = (x, tensors[0], tensors[1], dilation, backend)
        torch.library.opcheck(torch.ops.convmixer.depthwise_conv2d, arguments)


def test_compile_full_graph():
    block = ck.DepthwiseBlock(6, 5)
    twin = ck.DepthwiseBlock(6, 5)
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 6, 9, 8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), twin(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(block.conv.weight.grad, twin.conv.weight.grad)
    torch.testing.assert_close(block.norm.running_var, twin.norm.running_var)
    assert block.norm.num_batches_tracked == twin.norm.num_batches_tracked == 1


def test_weight_changes_are_seen():
    x, tensors, _ = make_inputs(Case("depthwise_conv2d", (1, 4, 5, 5), (3, 3)))
    ck.depthwise_conv2d(x, *tensors)
    tensors[0].data.mul_(2)
    tensors[1].data.mul_(2)
    torch.testing.assert_close(ck.depthwise_conv2d(x, *tensors), 2 * ck.depthwise_conv2d(x, *(t / 2 for t in tensors)))


@pytest.mark.parametrize("operator", ["depthwise_block", "pointwise_block"])
def test_bits_do_not_depend_on_threads(operator):
    case = Case(operator, (3, 33, 17, 15), (7, 7) if operator == "depthwise_block" else (1, 1))
    x, tensors, dy = make_inputs(case)
    tensors[0].requires_grad_()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        y = ours(case, leaf, [t.detach().clone() if i else t for i, t in enumerate(tensors)], "cpu")
        results.append((y, *torch.autograd.grad(y, (leaf, tensors[0]), dy)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_warning_where_only_torch_operations_were_installed(monkeypatch):
    """pip hides the message of the build."""
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 1, 3, 3)
    dispatch._warn_if_nothing_faster.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # float64 always runs on torch operations
            ck.depthwise_conv2d(x.double(), weight.double())
            ck.depthwise_conv2d(x, weight)
        dispatch._warn_if_nothing_faster.cache_clear()
        monkeypatch.setattr(cpu, "native", None)
        monkeypatch.setattr(cpu, "_reason", "the native module _cpu is not built")
        with pytest.warns(RuntimeWarning, match="torch operations for cpu tensors.*module _cpu is not built") as seen:
            [ck.depthwise_conv2d(x, weight) for _ in range(3)]
        assert len(seen) == 1
    finally:
        dispatch._warn_if_nothing_faster.cache_clear()


def test_one_warning_where_a_refused_module_left_a_slower_backend(monkeypatch):
    """If _cuda is refused, the Triton kernels run: nothing but this warning would say so."""
    monkeypatch.setattr(_load, "refused", {"_cuda": "there/_cuda.so is refused: it was built from other sources"})
    monkeypatch.setattr(cuda, "build_info", lambda: {"available": False, "detail": _load.refused["_cuda"]})
    monkeypatch.setattr(triton, "build_info", lambda: {"available": True, "detail": ""})
    dispatch._warn_if_nothing_faster.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"there/_cuda\.so is refused") as seen:
            [dispatch._warn_if_nothing_faster("cuda") for _ in range(3)]
        assert len(seen) == 1
    finally:
        dispatch._warn_if_nothing_faster.cache_clear()


@pytest.mark.parametrize(
    ("op", "changes", "expected"),
    [
        ("depthwise_conv2d", {}, True),
        ("depthwise_conv2d", {"kernel": (3, 3)}, True),
        ("depthwise_conv2d", {"kernel": (3, 3), "contiguous": False}, False),
        ("depthwise_conv2d", {"kernel": (3, 3), "contiguous": False, "backward": True}, False),
        ("depthwise_conv2d", {"kernel": (5, 5), "contiguous": False, "backward": True}, True),
        ("depthwise_conv2d", {"kernel": (11, 1), "contiguous": False, "backward": True}, False),
        ("depthwise_conv2d", {"contiguous": False}, False),
        ("depthwise_conv2d", {"contiguous": False, "dtype": torch.bfloat16}, True),
        ("depthwise_conv2d", {"contiguous": False, "kernel": (9, 9)}, True),
        ("depthwise_conv2d", {"shape": (8, 64, 7, 7)}, True),
        ("pointwise_block", {"shape": (8, 64, 7, 7)}, False),
        ("depthwise_conv2d", {"kernel": (33, 3)}, True),
        ("depthwise_conv2d", {"kernel": (13, 13), "dilation": (1, 3)}, True),
        ("depthwise_block", {"kernel": (3, 3), "contiguous": False}, True),
        ("depthwise_block", {"kernel": (3, 3), "contiguous": False, "backward": True}, True),
        ("pointwise_block", {"kernel": (1, 1)}, True),
        ("pointwise_block", {"kernel": (1, 1), "dtype": torch.bfloat16}, False),
        ("depthwise_conv2d", {"device": "cuda"}, False),
        ("depthwise_conv2d", {"device": "cuda", "graph": True}, True),
        ("depthwise_conv2d", {"device": "cuda", "shape": (64, 96, 56, 56), "contiguous": False}, True),
        ("depthwise_conv2d", {"device": "cuda", "graph": True, "kernel": (3, 3), "dtype": torch.bfloat16}, True),
        ("depthwise_conv2d", {"device": "cuda", "graph": True, "kernel": (3, 3), "contiguous": False}, False),
        ("depthwise_conv2d", {"device": "cuda", "graph": True, "kernel": (1, 11)}, False),
        ("depthwise_conv2d", {"device": "cuda", "graph": True, "kernel": (63, 63)}, True),
        ("depthwise_conv2d", {"device": "cuda", "graph": True, "kernel": (65, 65)}, False),
        ("depthwise_conv2d", {"device": "cuda", "graph": True, "dilation": (1, 3)}, False),
        ("pointwise_block", {"device": "cuda", "graph": True, "kernel": (1, 1), "dtype": torch.float16}, True),
        ("pointwise_block", {"device": "cuda", "graph": True, "kernel": (1, 1)}, False),
    ],
    ids=str,
)
def test_where_an_operator_gains(op, changes, expected):
    form = {"device": "cpu", "dtype": torch.float32, "contiguous": True, "shape": (8, 64, 28, 28), "kernel": (7, 7)}
    assert dispatch.gains(op, **{**form, "backward": False, **changes}) is expected


def test_a_call_that_does_not_gain_is_torchs(calls, monkeypatch):
    skip_unless_it_runs("cpu", monkeypatch)
    conv = ck.DepthwiseConv2d(16, 3)
    x = torch.randn(2, 16, 12, 12).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(conv(x), torch.nn.Conv2d.forward(conv, x))
        assert calls == []
        conv(x.contiguous())
        assert calls == ["depthwise_conv2d"]
        with ck.use_backend("cpu"):  # a name binds
            conv(x)
        with monkeypatch.context() as patch:
            patch.setenv("CONVMIXER_BACKEND", "cpu")
            conv(x)
            patch.setenv("CONVMIXER_BACKEND", "")
            conv(x)
        assert calls == ["depthwise_conv2d"] * 3
        # a slice has the layout that its strides resemble
        conv(torch.randn(2, 32, 12, 12).to(memory_format=torch.channels_last)[:, :16])
    assert calls == ["depthwise_conv2d"] * 3

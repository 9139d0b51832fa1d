# SPDX-License-Identifier: MIT
"""The native CPU backend alone: its instruction sets, exact GELU, and the evaluation of layers in one call."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Case, assert_twice_eager, check_case, make_inputs, ours

import convmixer_kernels as ck
from convmixer_kernels import autograd
from convmixer_kernels.backends import cpu
from convmixer_kernels.primitives import ACTIVATIONS, MixerEval, Norm

pytestmark = pytest.mark.skipif(cpu.native is None, reason="the native module _cpu is not built")

ROOT = Path(__file__).resolve().parent.parent
OTHER_SETS = [] if cpu.native is None else [s for s in cpu.native.supported_isas().split(", ") if s != cpu.native.isa()]


@pytest.fixture(autouse=True)
def _products_are_ours(monkeypatch):
    """Our kernels on CPUs with AMX too, where torch computes the bfloat16 products; test_amx says otherwise."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def gelu_error(gradient: bool) -> float:
    """The largest error over float32: of gelu in units of 2^-24 |x|, of its derivative in units of 2^-24."""
    worst = 0.0
    # every 1021st bit pattern of both signs, and all around the switches of the polynomials
    patterns = torch.arange(0, 0x7F800000, 1021, dtype=torch.int64)
    edges = torch.tensor([(k + 0.5) / 2.75 for k in range(16)] + [5.5, 5.63], dtype=torch.float32)
    near = edges.view(torch.int32).to(torch.int64)[:, None] + torch.arange(-500, 500)
    for part in (*patterns.split(1 << 20), near.flatten()):
        positive = part.to(torch.int32).view(torch.float32)
        # below, |x| times the error of a subnormal's rounding is no longer relative
        positive = positive[positive > 1e-30]
        x = torch.cat([positive, -positive])
        y = torch.empty_like(x)
        cpu.native.activation(x.data_ptr(), y.data_ptr(), len(x), ACTIVATIONS.index("gelu"), gradient)
        exact = x.double()
        cdf = 0.5 * torch.special.erfc(-exact * 0.5**0.5)
        if gradient:
            density = torch.exp(-0.5 * exact * exact) / (2 * torch.pi) ** 0.5
            error = (y.double() - (cdf + exact * density)).abs()
        else:
            error = (y.double() - exact * cdf).abs() / exact.abs()
        worst = max(worst, float(error.max()) * 2**24)
    return worst


def test_gelu_is_exact():
    assert gelu_error(gradient=False) <= 3
    # a sum of two rounded terms near 1.13: its bound is our own, one rounding above the value's
    assert gelu_error(gradient=True) <= 4


def test_gelu_of_special_values():
    x = torch.tensor([float("nan"), float("inf"), 0.0, 6.0, 1e30, -6.0, -1e30])
    y = torch.empty_like(x)
    cpu.native.activation(x.data_ptr(), y.data_ptr(), len(x), ACTIVATIONS.index("gelu"), False)
    assert torch.isnan(y[0])
    assert y[1:].tolist() == [float("inf"), 0.0, 6.0, x[4].item(), 0.0, 0.0]


# widths of one tile, more and less; channels of one vector, more and less; rows of one item and more; more blocks of
# channels than an item takes
IN_PLACE = [
    ((1, 16, 5, 16), (3, 3)),
    ((2, 24, 17, 17), (3, 3)),
    ((1, 3, 33, 40), (5, 5)),
    ((3, 33, 7, 31), (7, 7)),
    ((1, 40, 2, 33), (7, 3)),
    ((1, 8, 40, 20), (2, 4)),
    ((1, 272, 4, 18), (3, 5)),
    ((1, 16, 1, 64), (1, 49)),
    ((1, 16, 50, 16), (31, 1)),
    ((2, 20, 9, 23), (1, 1)),
    ((2, 24, 18, 19), (9, 9)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, kernel", IN_PLACE, ids=str)
def test_channels_last_in_place(shape, kernel, dtype):
    """Small kernels read channels_last tensors in place: the bits of contiguous tensors, which go through padded planes."""
    g = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    weight, bias = torch.randn(shape[1], 1, *kernel, generator=g), 100 * torch.randn(shape[1], generator=g)
    norm = Norm(*(torch.rand(shape[1], generator=g) + 0.5 for _ in range(4)), 1e-5)
    # what lies outside the image is 0 and no neighbouring value
    x[0, 0, 0, 0], x[-1, -1, -1, -1] = float("inf"), float("nan")

    def results(memory_format: torch.memory_format) -> list[torch.Tensor]:
        t, d = (v.contiguous(memory_format=memory_format) for v in (x, dy))
        plain = cpu.depthwise_eval(t, weight, bias, "identity", None, False)
        blocks = [cpu.depthwise_eval(t, weight, bias, "gelu", norm, residual) for residual in (False, True)]
        a, *_ = cpu.depthwise_train(t, weight, None, "relu")
        grads = [cpu.depthwise_input_grad(d, None, weight, "identity", None, None, r) for r in (False, True)]
        return [plain, *blocks, a, *grads]

    for mine, expected in zip(results(torch.channels_last), results(torch.contiguous_format), strict=True):
        assert torch.equal(mine.isnan(), expected.isnan())
        assert torch.equal(mine.nan_to_num(0), expected.nan_to_num(0))


def test_channels_last_in_place_statistics():
    """The statistics of a training forward: twice eager's error at most, for any number of threads the same bits."""
    threads = torch.get_num_threads()
    try:
        for shape, kernel in IN_PLACE[1:4]:
            x = torch.randn(shape).to(memory_format=torch.channels_last) + 3
            weight = torch.randn(shape[1], 1, *kernel)
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(cpu.depthwise_train(x, weight, None, "gelu"))
            for other in found[1:]:
                assert all(torch.equal(mine, first) for mine, first in zip(other, found[0], strict=True))
            h = torch.nn.functional.gelu(found[0][0])
            exact = torch.var_mean(torch.nn.functional.gelu(found[0][0].double()), (0, 2, 3), correction=0)
            eager = torch.var_mean(h, (0, 2, 3), correction=0)
            for name, mine, theirs, right in zip(("var", "mean"), found[0][:0:-1], eager, exact, strict=True):
                assert_twice_eager(name, mine, theirs, right)
    finally:
        torch.set_num_threads(threads)


def _run(isa: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CONVMIXER_CPU_ISA": isa, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", OTHER_SETS)
def test_other_instruction_sets(isa):
    """Some tests of the operators, and this file, under the narrower sets: a process picks its set once."""
    names = "test_gelu or test_mixer or test_layers or test_deep or test_gradients or test_isa or in_place"
    selection = f"(cpu and (33x9x31 or 24x16x16)) or {names}"
    result = _run(
        isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_operators.py", __file__, "-k", selection
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_isa_of_the_environment():
    wanted = os.environ.get("CONVMIXER_CPU_ISA")
    assert cpu.native.isa() == (wanted or cpu.native.supported_isas().split(", ")[0])


def test_unknown_instruction_set():
    script = "import torch, convmixer_kernels as k; k.depthwise_conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3))"
    result = _run("sse9", "-c", script)
    assert result.returncode != 0
    assert (
        "CONVMIXER_CPU_ISA is not a known instruction set; the known ones are avx512, avx2 and baseline"
        in result.stderr
    )


def test_build_info_of_an_unknown_instruction_set():
    """build_info() reports it, does not raise, and says that no operator runs."""
    result = _run("sse9", "-m", "convmixer_kernels")
    assert result.returncode == 0, result.stderr
    assert "cpu        not available: convmixer_kernels: the value of CONVMIXER_CPU_ISA is not a known" in result.stdout
    assert "depthwise_conv2d  runs on nothing" in result.stdout
    assert "cpu" not in _run("sse9", "-c", "import convmixer_kernels as k; print(k.available_backends())").stdout


# of the shapes: partial blocks of channels, tiled rows, several blocks together, one channel, one position, one image that
# threads share; and, not in one call, more threads than images and an image beyond the cache
MIXER_SHAPES = [
    ((4, 20, 7, 5), 33, (9, 9)),
    ((3, 17, 17, 17), 17, (4, 7)),
    ((2, 5, 160, 140), 4, (31, 31)),
    ((6, 64, 16, 16), 100, (9, 9)),
    ((1, 20, 9, 9), 8, (5, 5)),
    ((1, 37, 17, 16), 50, (9, 4)),
    ((5, 1, 6, 6), 3, (3, 3)),
    ((5, 3, 1, 1), 2, (3, 3)),
    ((2, 300, 24, 24), 8, (3, 3)),
]


@pytest.mark.parametrize("shape, channels_out, kernel", MIXER_SHAPES, ids=str)
def test_mixer_layer_is_its_two_blocks(shape, channels_out, kernel):
    """One native call gives the bits of two, in every dtype and format, for any number of threads."""
    channels = shape[1]
    modes = itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (torch.contiguous_format, torch.channels_last), (True, False)
    )
    for (dtype, memory_format, residual), activation in zip(modes, itertools.cycle(ACTIVATIONS), strict=False):
        x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
        blocks = (
            autograd.Block(
                torch.randn(channels, 1, *kernel), torch.randn(channels).to(dtype), torch.randn(channels), None
            ),
            autograd.Block(torch.randn(channels_out, channels, 1, 1).to(dtype), None, torch.randn(channels_out), None),
        )
        running = [autograd.Statistics(torch.randn(c), torch.rand(c) + 0.1) for c in (channels, channels_out)]
        norms = [Norm(*r, b.norm_weight, None, 1e-5) for r, b in zip(running, blocks, strict=True)]
        z = cpu.depthwise_eval(x, *blocks[0][:2], activation, norms[0], residual)
        expected = cpu.pointwise_eval(z, *blocks[1][:2], activation, norms[1])
        options = autograd.Options(False, 0.1, 1e-5, activation, residual, False)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, _, _ = autograd.mixer_forward(cpu, x, blocks, tuple(running), options)
            assert torch.equal(y, expected)
            assert y.stride() == expected.stride()


def test_mixer_layer_evaluates_in_one_call(monkeypatch):
    """The public function runs layers of small images in one call."""
    case = Case("mixer_layer", (4, 16, 8, 8), (5, 5), 16, training=False)
    x, tensors, _ = make_inputs(case)
    calls = []
    for name in ("depthwise_forward", "pointwise_forward", "mixer_forward"):
        original = getattr(cpu.native, name)

        def counted(*arguments, name=name, original=original):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(cpu.native, name, counted)
    with torch.no_grad():
        ours(case, x, tensors, "cpu")
    assert calls == ["mixer_forward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_of_different_shapes_in_one_call(dtype):
    """Kernels, widths and activations change from layer to layer: margins are cleared again, planes are large enough."""
    kernels, channels = [(9, 9), (3, 3), (3, 3), (4, 7), (31, 1), (1, 1)], [20, 33, 33, 7, 40, 2, 16]
    for memory_format, n in itertools.product((torch.contiguous_format, torch.channels_last), (5, 1)):
        x = torch.randn(n, channels[0], 9, 11).to(dtype).contiguous(memory_format=memory_format)
        layers = []
        for kernel, (c, c_out), activation in zip(
            kernels, itertools.pairwise(channels), itertools.cycle(ACTIVATIONS), strict=False
        ):
            norms = [Norm(torch.randn(n), torch.rand(n) + 0.1, torch.randn(n), None, 1e-5) for n in (c, c_out)]
            weights = torch.randn(c, 1, *kernel), torch.randn(c_out, c, 1, 1) / c**0.5
            layers.append(MixerEval(activation, (weights[0], torch.randn(c), norms[0]), (weights[1], None, norms[1])))
        expected = x
        for layer in layers:
            lower, upper = layer.depthwise, layer.pointwise
            z = cpu.depthwise_eval(expected, *lower[:2], layer.activation, lower[2], True)
            expected = cpu.pointwise_eval(z, *upper[:2], layer.activation, upper[2])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = cpu.mixer_eval(x, layers, True)
            assert torch.isfinite(y).all()
            assert torch.equal(y, expected)
            assert y.stride() == expected.stride()


# widths below and above the limit up to which da stays in cache; images of one chunk and of several; more chunks than groups
GRADIENT_SHAPES = [
    ((3, 20, 17, 31), 288),
    ((2, 288, 9, 5), 21),
    ((2, 289, 16, 17), 24),
    ((2, 24, 16, 17), 289),
    ((35, 17, 16, 16), 33),
    ((1, 5, 70, 71), 3),
]


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "channels_out"), GRADIENT_SHAPES, ids=str)
def test_gradients_of_products(shape, channels_out, memory_format):
    """The twice-eager rule holds; the bits depend neither on the number of threads nor on which gradients are computed."""
    check_case(Case("pointwise_block", shape, (1, 1), channels_out, memory_format=memory_format), "cpu")
    n, c, h, w = shape
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    weight, bias = torch.randn(channels_out, c, 1, 1), torch.randn(channels_out)
    norm = Norm(torch.randn(channels_out), torch.rand(channels_out) + 0.1, torch.randn(channels_out), None, 1e-5)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        dy, a = (torch.randn(n, channels_out, h, w).to(dtype).contiguous(memory_format=layout) for _ in range(2))
        torch.set_num_threads(1)
        sums = cpu.norm_backward(dy, a, "gelu", norm)
        expected = cpu.pointwise_backward(dy, a, x, weight, bias, "gelu", norm, sums, (True, True, True))
        for threads, needs in itertools.product((1, 2, 3), itertools.product((True, False), repeat=3)):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, cpu.norm_backward(dy, a, "gelu", norm), sums))
            source = x if needs[1] else None
            grads = cpu.pointwise_backward(dy, a, source, weight, bias, "gelu", norm, sums, needs)
            for grad, wanted, full in zip(grads, needs, expected, strict=True):
                assert torch.equal(grad, full) if wanted else grad is None


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "kernel"), [((5, 33, 16, 32), (3, 3)), ((2, 20, 31, 9), (5, 4)), ((9, 3, 40, 48), (3, 3))]
)
def test_gradients_of_depthwise_weights(shape, kernel, memory_format):
    """As above, for the depthwise convolution."""
    check_case(Case("depthwise_block", shape, kernel, memory_format=memory_format), "cpu")
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    c = shape[1]
    weight, bias = torch.randn(c, 1, *kernel), torch.randn(c)
    norm = Norm(torch.randn(c), torch.rand(c) + 0.1, torch.randn(c), None, 1e-5)
    x, a, dy = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(3))
    torch.set_num_threads(1)
    sums = cpu.norm_backward(dy, a, "gelu", norm)
    expected = cpu.depthwise_weight_grad(dy, a, x, weight, bias, "gelu", norm, sums)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        grads = cpu.depthwise_weight_grad(dy, a, x, weight, bias, "gelu", norm, sums)
        assert all(map(torch.equal, grads, expected))


class _Recorder:
    """A native module that notes which functions are called."""

    def __init__(self, module):
        self.module, self.called = module, set()

    def __getattr__(self, name):
        self.called.add(name)
        return getattr(self.module, name)


AMX_CASES = [
    Case(op, (2, 32, 7, 9), (3, 3), out, torch.bfloat16, parameters, memory_format, training, "gelu", absent=absent)
    for op, out, parameters, absent in (
        ("pointwise_block", 64, None, ()),
        ("pointwise_block", 96, torch.float32, ("bias",)),
        ("mixer_layer", None, torch.float32, ()),
    )
    for memory_format in ("contiguous", "channels_last")
    for training in (True, False)
] + [Case("pointwise_block", (3, 64, 1, 1), channels_out=32, dtype=torch.bfloat16, activation="relu")]


@pytest.mark.parametrize("case", AMX_CASES, ids=str)
def test_amx(case, monkeypatch):
    """torch's bfloat16 products: the twice-eager rule for output, gradients and statistics. No product is ours."""
    recorder = _Recorder(cpu.native)
    monkeypatch.setattr(cpu, "native", recorder)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    check_case(case, "cpu")
    assert not [name for name in recorder.called if "pointwise" in name or "mixer" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("c", "c_out"), [(15, 33), (33, 15), (40, 80), (80, 40), (64, 96)])
def test_what_is_not_finite_stays_in_its_pixel_and_filter(c, c_out, channels_last, dtype, monkeypatch):
    """torch's bfloat16 products on AMX read beyond a row that does not fill a tile: NaN times 0 reached the neighbours."""
    monkeypatch.undo()  # the CPU's own kernels, AMX where it has it
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(1, c, 4, 9).to(dtype).contiguous(memory_format=layout)
    x[0, 0, 2, 5] = torch.inf
    weight = torch.randn(c_out, c, 1, 1).to(dtype)
    weight[7, 0] = torch.nan
    norm = [torch.rand(c_out).to(dtype) + 0.5 for _ in range(4)]
    options = {"training": False, "activation": "identity", "backend": "cpu"}
    for save in (False, True):
        x.requires_grad_(save)
        y = ck.pointwise_block(x, weight, None, *norm, **options)
        broken = torch.zeros_like(y, dtype=torch.bool)
        broken[0, :, 2, 5] = broken[0, 7] = True
        assert torch.equal(~y.isfinite(), broken)
    weight[7, 0] = 0
    dy = torch.randn(y.shape).to(dtype)
    dy[0, 0, 1, 8] = torch.nan
    ck.pointwise_block(x, weight, None, *norm, **options).backward(dy.contiguous(memory_format=layout))
    broken = torch.zeros_like(x, dtype=torch.bool)
    broken[0, :, 1, 8] = True
    assert torch.equal(~x.grad.isfinite(), broken)


def test_amx_rule(monkeypatch):
    x = torch.randn(1, 32, 8, 8)
    for amx in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert cpu.takes_torch_product(x.bfloat16(), 32, 64) == amx
        assert not cpu.takes_torch_product(x, 32, 64)
        assert not cpu.takes_torch_product(x.half(), 32, 64)
        assert not cpu.takes_torch_product(x.bfloat16(), 33, 64)
        assert not cpu.takes_torch_product(x.bfloat16(), 32, 80)
        assert cpu.mixer_may_fit(x.bfloat16()) != amx
        with torch.backends.mkldnn.flags(enabled=False):
            assert not cpu.takes_torch_product(x.bfloat16(), 32)
        recorder = _Recorder(cpu.native)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "native", recorder)
            inputs = make_inputs(Case("pointwise_block", (1, 32, 8, 8), dtype=torch.bfloat16))
            ours(Case("pointwise_block", (1, 32, 8, 8), training=False), *inputs[:2], "cpu")
        assert ("pointwise_forward" in recorder.called) != amx

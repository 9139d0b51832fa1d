# SPDX-License-Identifier: MIT
"""A narrow network's eval layer in one kernel (csrc/cuda/mixer.cuh): emulated everywhere, and on a GPU if there is one.

Tiles are 16 x 16 pixels, stages 32 values of C, 128 output channels at a time; 16 warps take the channels in turns.
"""

from __future__ import annotations

import pytest
import torch
from helpers import Case, assert_twice_eager, eager, make_inputs, use_cuda
from torch import Tensor, nn

import convmixer_kernels as ck
from convmixer import ConvMixer
from convmixer_kernels.backends import cuda, cuda_choice
from convmixer_kernels.primitives import MixerEval, Norm
from convmixer_kernels.testing import relative_error

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device of a test's tensors: "cpu" for the emulated kernels, or "cuda"; the layer is one kernel."""
    return use_cuda(monkeypatch, request.param == "emulated", gemm="layer")


def _case(shape, kernel, out=None, dtype=torch.bfloat16, **options) -> Case:
    return Case("mixer_layer", shape, kernel, out, dtype=dtype, training=False, **options)


CASES = [
    # one tile and four, planes around it: 16-, 8- and 2-byte accesses, smaller than the kernel, one pixel
    _case((1, 8, 16, 16), (9, 9)),
    _case((2, 8, 32, 32), (9, 9), 16),
    _case((1, 16, 15, 24), (9, 9), 24),
    _case((2, 8, 17, 20), (7, 7), 8, torch.float16),
    _case((1, 8, 16, 17), (9, 9), 8),
    _case((2, 8, 7, 15), (5, 9), 8, torch.float16),
    _case((3, 8, 3, 2), (9, 9), 8),
    _case((5, 8, 1, 1), (3, 3), 8),
    # kernels: even, of one row and one column, of one value
    *(_case((1, 8, 18, 12), k, 8) for k in ((8, 8), (2, 9), (9, 4), (1, 7), (6, 1), (1, 1))),
    # channels around the warps, the stages and the weight's rows; the weight is copied value by value if C % 8 != 0
    *(
        _case((1, c, 6, 8), (3, 3), out, dtype)
        for c, out, dtype in (
            (1, 1, torch.bfloat16),
            (15, 31, torch.float16),
            (17, 33, torch.bfloat16),
            (31, 127, torch.bfloat16),
            (32, 128, torch.float16),
            (33, 129, torch.bfloat16),
            (64, 64, torch.float16),
            (72, 160, torch.bfloat16),
        )
    ),
    _case((1, 256, 4, 16), (9, 9), 256),
    _case((1, 250, 4, 16), (9, 9), 3, torch.float16),
    # activations, tensors that may be None, parameters of another dtype, memory
    *(_case((1, 8, 8, 20), (9, 9), 16, d, activation=a) for d in DTYPES for a in ("relu", "gelu_tanh", "identity")),
    _case((1, 8, 8, 8), (3, 3), absent=("bias", "norm_weight", "norm_bias")),
    _case((1, 8, 8, 8), (3, 3), absent=("norm_bias",), dtype=torch.float16),
    _case((1, 8, 8, 8), (3, 3), parameter_dtype=torch.float32),
    _case((1, 8, 8, 8), (3, 3), parameter_dtype=torch.float32, dtype=torch.float16),
    _case((2, 8, 8, 8), (3, 3), memory_format="sliced"),
]


def _one_kernel(monkeypatch) -> list[Tensor | None]:
    """Returns the list to which mixer_eval's results are added from now on."""
    returned, primitive = [], cuda.mixer_eval
    monkeypatch.setattr(cuda, "mixer_eval", lambda *a: returned.append(primitive(*a)) or returned[-1])
    return returned


def _one_launch(x: Tensor, lower, upper, activation: str, residual: bool) -> Tensor | None:
    return cuda.mixer_eval(x, (MixerEval(activation, lower, upper),), residual)


def _on(device: str, tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.to(device) for t in tensors]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(case, device, monkeypatch):
    """The twice-eager rule holds, pooled over seeds if values are few. Emulated, the layer has the bits of two launches."""
    returned, results = _one_kernel(monkeypatch), []
    seeds = max(
        1, min(8, 512 // (case.shape[0] * (case.channels_out or case.shape[1]) * case.shape[2] * case.shape[3]))
    )
    for seed in range(seeds):
        x, tensors, _ = make_inputs(case, seed)
        exact = eager(case, x.double(), [None if t is None else t.double() for t in tensors])
        mixed = case.parameter_dtype is not None
        with torch.no_grad(), torch.autocast(device, dtype=case.dtype, enabled=mixed):
            baseline = eager(case, x.to(device), _on(device, tensors))
        options = {"activation": case.activation, "backend": "cuda"}
        with torch.no_grad():
            y = ck.mixer_layer(x.to(device), *_on(device, tensors), **options)
        assert returned[-1] is not None
        assert y.is_contiguous()
        results.append((y, baseline, exact))
        if device == "cpu" and seed == 0:
            monkeypatch.setattr(cuda_choice, "forced_gemm", lambda: "fused")
            with torch.no_grad():
                assert torch.equal(ck.mixer_layer(x, *tensors, **options), y)
            assert returned.pop() is None
            monkeypatch.setattr(cuda_choice, "forced_gemm", lambda: "layer")
    joined = [torch.cat([t.flatten() for t in part]) for part in zip(*results, strict=True)]
    assert_twice_eager(str(case), *joined, case.dtype)


# The primitive.


def _arguments(shape, kernel, c_out, dtype, device, seed=0) -> tuple:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    def norm(c: int) -> Norm:
        return Norm(normal(c), normal(c).abs() + 0.5, normal(c), normal(c), 1e-5)

    c = shape[1]
    lower = (normal(c, 1, *kernel) / (kernel[0] * kernel[1]) ** 0.5).to(dtype), normal(c), norm(c)
    upper = (normal(c_out, c, 1, 1) / c**0.5).to(dtype), normal(c_out), norm(c_out)
    return normal(*shape).to(dtype), lower, upper


def _two_launches(x, lower, upper, activation, residual) -> Tensor:
    forced, cuda_choice.forced_gemm = cuda_choice.forced_gemm, lambda: "fused"
    try:
        weight, bias, norm = lower
        z = cuda.depthwise_eval(x, weight, bias, activation, norm, residual)
        weight, bias, norm = upper
        return cuda.pointwise_eval(z, weight, bias, activation, norm)
    finally:
        cuda_choice.forced_gemm = forced


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_residual_or_norm(dtype, residual, device):
    x, lower, upper = _arguments((1, 40, 18, 12), (9, 9), 24, dtype, device)
    for norms in ((lower[2], upper[2]), (None, upper[2]), (lower[2], None), (None, None)):
        layer = x, (*lower[:2], norms[0]), (*upper[:2], norms[1])
        y, expected = _one_launch(*layer, "gelu", residual), _two_launches(*layer, "gelu", residual)
        # on a GPU the two kernels' products group their float32 sums differently
        assert torch.equal(y, expected) if device == "cpu" else relative_error(y, expected.double()) < 2**-8


def test_bits_do_not_depend_on_the_order_of_threads(device, monkeypatch):
    for shape, kernel, c_out in (((1, 40, 17, 16), (9, 9), 136), ((2, 19, 5, 7), (4, 9), 20)):
        layer = _arguments(shape, kernel, c_out, torch.bfloat16, device)
        expected = _one_launch(*layer, "gelu", True)
        for order in ("1", "7", "23"):
            monkeypatch.setenv("EMU_ORDER", order)
            assert torch.equal(_one_launch(*layer, "gelu", True), expected)
        monkeypatch.delenv("EMU_ORDER")


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "gelu_tanh"])
def test_non_finite_values_go_through(activation, device):
    """A NaN or infinity reaches the same values as with two launches: all channels of the pixels in its window."""
    x, lower, upper = _arguments((2, 8, 18, 24), (3, 5), 16, torch.bfloat16, device)
    x[0, 3, 1, 2], x[0, 5, 16, 17], x[1, 0, 9, 16] = float("nan"), float("inf"), -float("inf")
    y = _one_launch(x, lower, upper, activation, True)
    expected = _two_launches(x, lower, upper, activation, True)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    touched = ~y.isfinite()
    assert 3 * 15 >= touched.any(dim=1).sum() > 15
    if device == "cpu":
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_operands_off_16_bytes(device):
    """Addresses decide how x and the weight are read, but do not change the bits."""
    x, lower, upper = _arguments((2, 40, 12, 16), (9, 9), 24, torch.bfloat16, device)
    expected = _one_launch(x, lower, upper, "gelu", True)
    for off in (1, 4):
        moved = torch.empty(x.numel() + off, dtype=x.dtype, device=device)[off:].view(x.shape).copy_(x)
        assert torch.equal(_one_launch(moved, lower, upper, "gelu", True), expected)
    weight = torch.empty(upper[0].numel() + 1, dtype=x.dtype, device=device)[1:].view(upper[0].shape).copy_(upper[0])
    assert torch.equal(_one_launch(x, lower, (weight, *upper[1:]), "gelu", True), expected)


def test_no_images(device):
    x, lower, upper = _arguments((1, 8, 6, 8), (3, 3), 12, torch.bfloat16, device)
    tensors = []
    for weight, bias, norm in (lower, upper):
        tensors += [weight, bias, norm.weight, norm.bias, norm.mean, norm.var]
    with torch.no_grad():
        assert ck.mixer_layer(x[:0], *tensors, backend="cuda").shape == (0, 12, 6, 8)


@pytest.mark.parametrize(
    "shape, kernel, c_out, dtype, memory_format",
    [
        ((1, 8, 6, 8), (3, 3), 8, torch.float32, "contiguous"),
        ((1, 8, 6, 8), (3, 3), 8, torch.bfloat16, "channels_last"),
        ((1, 8, 6, 8), (10, 3), 8, torch.bfloat16, "contiguous"),
        ((1, 8, 6, 8), (3, 11), 8, torch.bfloat16, "contiguous"),
        ((1, 257, 2, 2), (3, 3), 8, torch.bfloat16, "contiguous"),
        ((1, 8, 2, 2), (3, 3), 257, torch.bfloat16, "contiguous"),
    ],
    ids=str,
)
def test_what_is_out_of_reach_is_declined(shape, kernel, c_out, dtype, memory_format, device):
    x, lower, upper = _arguments(shape, kernel, c_out, dtype, device)
    if memory_format == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    assert _one_launch(x, lower, upper, "gelu", True) is None


@pytest.mark.parametrize("kb, channels", [(227, 256), (163, 256), (99, 128)])
def test_shared_memory_limits_the_channels(kb, channels, monkeypatch):
    """sm_80 and sm_90 hold z of 256 channels, sm_86, 89 and 120 of 128."""
    monkeypatch.setenv("EMU_BLOCK_SHARED_KB", str(kb))
    use_cuda(monkeypatch)
    fits = cuda._native().module.mixer_fits
    for c in (1, 32, 64, 96, 128, 160, 192, 224, 256):
        assert fits(1, c, 16, 16, 2, False, 256, 9, 9) is (c <= channels)


# Which kernels run.


def test_layers_of_a_model_are_a_launch_each(monkeypatch):
    """One call decides and launches consecutive layers, a launch each; if one cannot use this kernel, none does."""
    use_cuda(monkeypatch, gemm="layer")
    torch.manual_seed(0)
    module, model = cuda._native().module, ConvMixer(8, 3, 5, 2, 4).eval().to(torch.bfloat16)
    returned, x = _one_kernel(monkeypatch), torch.randn(2, 3, 16, 16).to(torch.bfloat16)
    with torch.no_grad(), ck.use_backend("cuda"):
        before = module.launches()
        together = model[:6](x)
        assert module.launches() - before == len(returned[0:1]) * 3
        assert torch.equal(together, nn.Sequential(*model[:6])(x))
        assert [y is None for y in returned] == [False] * 4
        model[4][0].fn[0] = nn.Conv2d(8, 8, 11, groups=8, padding="same").to(torch.bfloat16)
        expected = nn.Sequential(*model[:6])(x)
        del returned[:]
        # together they cannot run; then each runs alone, the larger kernel in two launches
        before = module.launches()
        assert torch.equal(model[:6](x), expected)
        assert module.launches() - before == 1 + 2 + 1
        assert [y is None for y in returned] == [True]


def test_an_eval_layer_is_one_launch(monkeypatch):
    use_cuda(monkeypatch)
    module = cuda._native().module
    x, tensors, _ = make_inputs(_case((2, 8, 8, 8), (9, 9)))
    counts = {}
    for forced in ("layer", "fused"):
        monkeypatch.setattr(cuda_choice, "forced_gemm", lambda forced=forced: forced)
        before = module.launches()
        with torch.no_grad():
            ck.mixer_layer(x, *tensors, backend="cuda")
        counts[forced] = module.launches() - before
    assert counts == {"layer": 1, "fused": 2}


@pytest.mark.gpu
def test_it_is_captured_in_a_graph(monkeypatch):
    monkeypatch.setattr(cuda_choice, "forced_gemm", lambda: "layer")
    layer = _arguments((2, 256, 32, 32), (9, 9), 256, torch.bfloat16, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = _one_launch(*layer, "gelu", True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = _one_launch(*layer, "gelu", True)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


class _OnGpu:
    """The attributes of a tensor that use_one_kernel reads."""

    is_cuda = True

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def get_device(self) -> int:
        return 0


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((64, 128, 32, 32), True),
        ((256, 64, 16, 16), True),
        # values one by one
        ((256, 64, 16, 15), False),
        ((256, 60, 16, 16), False),
        # the layer's two launches are nearly as fast: the products weigh more, the saved traffic less
        ((64, 256, 32, 32), False),
        # fewer tiles than multiprocessors, and one more than they hold at a time
        ((1, 128, 32, 32), False),
        ((133, 128, 16, 16), False),
        # 7 x 7 of the 16 x 16 pixels exist
        ((256, 128, 7, 7), False),
    ],
)
def test_what_the_rule_chooses_on_an_h100(shape, expected, monkeypatch):
    monkeypatch.setattr(cuda_choice, "forced_gemm", lambda: None)
    monkeypatch.setattr(cuda_choice, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_choice, "_multiprocessors", lambda device: 132)
    tiles = shape[0] * -(-shape[2] // 16) * -(-shape[3] // 16)
    assert cuda_choice.use_one_kernel(_OnGpu(*shape), shape[1], tiles) is expected
    # emulated, and with another GEMM forced: two launches
    assert not cuda_choice.use_one_kernel(torch.empty(1, 8, 8, 8), 8, 1000)
    for forced in ("fused", "wgmma", "torch"):
        monkeypatch.setattr(cuda_choice, "forced_gemm", lambda forced=forced: forced)
        assert not cuda_choice.use_one_kernel(_OnGpu(*shape), shape[1], tiles)

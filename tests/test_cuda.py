# SPDX-License-Identifier: MIT
"""The CUDA backend: emulated on the CPU everywhere, and on a GPU if there is one (marked gpu), by the same table.

The grid is small because every case runs all primitives forward and backward, and an emulated case takes up to a second:
each size, kernel, layout and dtype appears with each primitive, but not in every combination.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from emulation.build import build
from helpers import ACTIVATIONS, Case, check_case, check_relu_stops_gradients, use_cuda
from torch import Tensor

from convmixer_kernels import _load
from convmixer_kernels.backends import cuda, reference
from convmixer_kernels.primitives import Norm, Update, update_running_statistics
from convmixer_kernels.testing import relative_error, within_twice_eager

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("contiguous", "channels_last")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device of a test's tensors: "cpu" for the emulated kernels, or "cuda"."""
    return use_cuda(monkeypatch, request.param == "emulated")


# Blocks.


def _depthwise(shape, kernel, **options) -> Case:
    return Case("depthwise_block", shape, (kernel, kernel) if isinstance(kernel, int) else kernel, **options)


DEPTHWISE_CASES = [
    # planes equal to, below and above the tiles of 16 rows and 8 columns; smaller than the kernel; odd
    *(
        _depthwise((2, 3, h, w), 9, dtype=torch.bfloat16)
        for h, w in ((16, 16), (15, 17), (17, 15), (7, 7), (33, 32), (3, 40), (1, 1))
    ),
    *(_depthwise((3, 10, h, w), 9, dtype=torch.float16, memory_format="channels_last") for h, w in ((16, 16), (7, 9))),
    _depthwise((2, 16, 9, 17), 9, dtype=torch.bfloat16, memory_format="channels_last"),
    # tiles of rows and of columns
    *(_depthwise((1, 8, h, w), 9, dtype=torch.bfloat16, memory_format="channels_last") for h, w in ((67, 9), (5, 70))),
    *(_depthwise((2, 3, h, w), 7, memory_format=f) for h, w in ((16, 16), (13, 9)) for f in FORMATS),
    # kernels: odd, even, non-square, 1x1, the largest
    *(_depthwise((2, 8, 12, 13), k, dtype=torch.bfloat16) for k in (1, 2, 5, 8, 15, 25, (3, 10))),
    # asynchronous copies of the weight gradient: several images a unit, several units a block, tiles of rows and columns
    *(
        _depthwise(shape, k, dtype=torch.bfloat16)
        for shape, k in (
            ((5, 3, 16, 16), 15),
            ((3, 32, 70, 8), 11),
            ((2, 2, 40, 24), 31),
            ((1, 2, 9, 136), (4, 13)),
            ((2, 3, 20, 16), (12, 7)),
            # 47.8 KB of dynamic shared memory; with static arrays it is above the 48 KB that are always allowed
            ((2, 1, 40, 40), 11),
        )
    ),
    # rows off 16 bytes, copied as spans: tiles of rows and of columns, several images, tensors that end inside of 16 bytes
    *(
        _depthwise(shape, k, dtype=torch.bfloat16)
        for shape, k in (((2, 2, 70, 35), 9), ((1, 3, 5, 131), 9), ((1, 2, 20, 147), 11), ((20, 2, 6, 14), 13))
    ),
    *(_depthwise((1, 8, 12, 13), k, dtype=torch.float16, memory_format="channels_last") for k in (3, 4, 11, (6, 3))),
    *(_depthwise((2, 4, 12, 13), k) for k in (1, 4, 11, (3, 10))),
    _depthwise((1, 1, 20, 33), 31, dtype=torch.bfloat16),
    _depthwise((1, 1, 9, 33), 31),
    # eval, activations, tensors that may be None, parameters of another dtype
    *(_depthwise((2, 3, 16, 16), 9, dtype=d, training=False, memory_format=f) for d in DTYPES for f in FORMATS),
    *(_depthwise((2, 3, 9, 16), 5, dtype=d, activation=a) for d in DTYPES[:2] for a in ("relu", "gelu_tanh")),
    _depthwise((2, 3, 9, 16), 5, activation="identity"),
    _depthwise((2, 3, 9, 16), 5, dtype=torch.bfloat16, residual=False, absent=("bias", "norm_weight", "norm_bias")),
    _depthwise((2, 3, 9, 16), 5, dtype=torch.float16, absent=("norm_bias", "running_mean", "running_var")),
    _depthwise((2, 3, 9, 16), 5, dtype=torch.bfloat16, parameter_dtype=torch.float32),
    _depthwise((2, 3, 9, 16), 5, dtype=torch.bfloat16, memory_format="sliced"),
    _depthwise((2, 3, 9, 16), 5, memory_format="expanded"),
]

POINTWISE_CASES = [
    Case("pointwise_block", shape, (1, 1), channels_out, dtype=dtype, memory_format=memory_format, training=training)
    for dtype in DTYPES
    for memory_format in FORMATS
    for shape, channels_out, training in (
        ((2, 16, 8, 8), None, True),
        ((3, 5, 7, 7), 11, True),
        ((1, 8, 3, 5), 16, False),
        ((4, 6, 1, 1), 64, True),
    )
]
POINTWISE_CASES += [
    Case("pointwise_block", (2, 8, 5, 5), (1, 1), dtype=torch.bfloat16, activation=activation, absent=absent)
    for activation, absent in (("relu", ()), ("gelu_tanh", ("bias",)), ("identity", ("norm_weight", "norm_bias")))
]

OTHER_CASES = [
    Case("mixer_layer", (2, 8, 8, 9), (5, 5), dtype=dtype, memory_format=memory_format)
    for dtype, memory_format in ((torch.float32, "contiguous"), (torch.bfloat16, "channels_last"))
]
OTHER_CASES += [Case("depthwise_conv2d", (2, 3, 8, 9), (7, 4), dtype=dtype) for dtype in DTYPES]


# Kernels beyond 31 (cuda_large.py): tensor cores, float32 copies, and one that the image cuts to less than 31; dilated ones.
LARGE_CASES = [
    _depthwise((1, 2, 33, 40), (33, 45), dtype=torch.bfloat16),
    _depthwise((2, 3, 30, 29), 51, dtype=torch.float16, memory_format="channels_last"),
    _depthwise((1, 2, 36, 34), (5, 63), dtype=torch.float16, training=False),
    _depthwise((1, 2, 34, 9), (64, 6), dtype=torch.bfloat16),
    _depthwise((2, 3, 12, 13), 51, dtype=torch.bfloat16, memory_format="channels_last"),
    *(_depthwise((1, 12, 33, 20), (51, 5), memory_format=f) for f in FORMATS),
    *(Case("depthwise_conv2d", (1, 1, 52, 40), (101, 33), dtype=d) for d in DTYPES[:2]),
    *(
        Case("depthwise_conv2d", (2, 3, 14, 17), kernel, dtype=d, memory_format=f, dilation=dilation)
        for d, f, kernel, dilation in (
            (torch.bfloat16, "contiguous", (7, 7), (3, 3)),
            (torch.float16, "channels_last", (5, 4), (2, 3)),
            (torch.float32, "contiguous", (3, 3), (3, 2)),
            (torch.float32, "channels_last", (2, 11), (5, 1)),
            (torch.bfloat16, "contiguous", (11, 3), (1, 8)),
            (torch.bfloat16, "contiguous", (7, 7), (9, 9)),
        )
    ),
]


@pytest.mark.parametrize("case", DEPTHWISE_CASES + LARGE_CASES + POINTWISE_CASES + OTHER_CASES, ids=str)
def test_operator(case, device):
    check_case(case, "cuda", device=device, pool=64 if device == "cuda" else 1)


@pytest.mark.parametrize(
    "case",
    [_depthwise((3, 8, h, w), 9, dtype=torch.bfloat16, memory_format="channels_last") for h, w in ((16, 16), (7, 35))],
    ids=str,
)
def test_channels_last_where_two_large_blocks_do_not_fit(case, monkeypatch):
    """On GPUs with 100 or 164 KB a multiprocessor a block takes 8 channels instead of 16."""
    monkeypatch.setenv("EMU_SHARED_KB", "100")
    use_cuda(monkeypatch)
    check_case(case, "cuda", pool=1)


@pytest.mark.parametrize(
    "case",
    [
        # whole images by 16 bytes and by 8; tiles of rows of spans; whole images of spans; columns
        _depthwise(shape, 9, dtype=torch.bfloat16, memory_format=memory_format)
        for shape, memory_format in (
            ((14, 2, 16, 16), "contiguous"),
            ((9, 2, 12, 12), "contiguous"),
            ((2, 2, 70, 35), "contiguous"),
            ((40, 2, 7, 7), "contiguous"),
            ((2, 2, 3, 131), "contiguous"),
            ((9, 16, 16, 16), "channels_last"),
            # more channels than blocks, of one item each; items of a channel over several blocks
            ((1, 11, 8, 8), "contiguous"),
            ((37, 3, 16, 16), "contiguous"),
        )
    ],
    ids=str,
)
@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_blocks_that_walk_through_several_items(case, blocks, monkeypatch):
    """Large tensors give a block several items: stages change, copies run ahead, a run may end within a channel."""
    monkeypatch.setenv("EMU_BLOCKS", str(blocks))
    use_cuda(monkeypatch)
    check_case(case, "cuda", pool=1)


# The primitives of batch norm, at sizes that the blocks above do not reach.


def _formatted(t: Tensor, memory_format: str) -> Tensor:
    channels_last = memory_format == "channels_last"
    return t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _inputs(shape, dtype, memory_format, device, count=2, mean=0.0):
    tensors = [_formatted(torch.randn(shape) + mean, memory_format).to(dtype) for _ in range(count)]
    c = shape[1]
    norm = Norm(torch.randn(c), torch.rand(c) + 0.5, torch.randn(c), torch.randn(c), 1e-5)
    return [t.to(device) for t in tensors], Norm(*(t.to(device) for t in norm[:4]), norm.eps)


def _wide(*values):
    """Arguments of a primitive in float64."""
    return tuple(
        Norm(*(None if t is None else t.double() for t in v[:4]), v.eps)
        if isinstance(v, Norm)
        else v.double()
        if isinstance(v, Tensor)
        else tuple(t.double() for t in v)
        if isinstance(v, tuple) and v and isinstance(v[0], Tensor)
        else v
        for v in values
    )


def _per_channel(t: Tensor) -> Tensor:
    return t[:, None, None]


def _eager_norm_backward(dy, a, activation, norm):
    """Computes in float32; the reference backend computes in more."""
    hhat = (ACTIVATIONS[activation](a.float()) - _per_channel(norm.mean)) * _per_channel((norm.var + norm.eps).rsqrt())
    return dy.float().sum((0, 2, 3)), (dy.float() * hhat).sum((0, 2, 3))


def _eager_pointwise_backward(dy, a, x, weight, bias, activation, norm, sums, needs):
    """Computes in float32 and rounds da to dy's dtype; the reference backend computes in more."""
    count, rstd = dy.numel() // dy.shape[1], (norm.var + norm.eps).rsqrt()
    a = a.float().requires_grad_()
    h = ACTIVATIONS[activation](a)
    hhat = (h.detach() - _per_channel(norm.mean)) * _per_channel(rstd)
    dh = dy.float() - _per_channel(sums[0] / count) - hhat * _per_channel(sums[1] / count)
    (da,) = torch.autograd.grad(h, a, dh * _per_channel(rstd * norm.weight))
    da = da.to(dy.dtype)
    dx = torch.einsum("nohw,oi->nihw", da, weight.flatten(1).to(da.dtype))
    dw = torch.einsum("nohw,nihw->oi", da, x)[:, :, None, None].to(weight.dtype)
    return dx, dw, da.float().sum((0, 2, 3)).to(bias.dtype)


#: The baselines of the primitives that the reference backend computes in more than float32.
_EAGER = {"norm_backward": _eager_norm_backward, "pointwise_backward": _eager_pointwise_backward}


def _check(primitive: str, *arguments, dtype: torch.dtype, more: tuple[tuple, ...] = ()) -> None:
    """Compares the primitive with the reference backend, in float64 and as the eager baseline; pooled with `more` arguments."""
    errors: dict[int, list[tuple[float, float]]] = {}
    for draw in (arguments, *more):
        results = getattr(cuda, primitive)(*draw)
        baseline = _EAGER.get(primitive, getattr(reference, primitive))(*draw)
        exact = getattr(reference, primitive)(*_wide(*draw))
        if isinstance(results, Tensor):
            results, baseline, exact = (results,), (baseline,), (exact,)
        for i, (r, b, e) in enumerate(zip(results, baseline, exact, strict=True)):
            if r is not None:
                # the reference keeps norm_backward's sums in float64
                assert r.dtype == b.dtype or primitive == "norm_backward"
                errors.setdefault(i, []).append((relative_error(r, e), relative_error(b, e)))
    for i, pairs in errors.items():
        error, allowed = torch.tensor(pairs, dtype=torch.float64).square().mean(0).sqrt().tolist()
        assert within_twice_eager(error, allowed, dtype), f"{primitive}[{i}]: {error:.3e}, reference {allowed:.3e}"


#: planes that are and are not whole 16-byte windows, more than one part a channel, more channels than a block of lanes
NORM_SHAPES = [(3, 5, 7, 7), (2, 8, 4, 4), (1, 3, 131, 130), (3, 80, 2, 3), (2, 4, 64, 130)]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norm_primitives(shape, dtype, memory_format, device):
    (dy, a), norm = _inputs(shape, dtype, memory_format, device)
    _check("normalize", a, "gelu", norm, dy, dtype=dtype)
    _check("normalize", a, "gelu_tanh", norm._replace(weight=None, bias=None), None, dtype=dtype)
    _check("norm_backward", dy, a, "relu", norm, dtype=dtype)

    def backward_arguments() -> tuple:
        (dy, a), norm = _inputs(shape, dtype, memory_format, device)
        sums, x = cuda.norm_backward(dy, a, "gelu", norm), _formatted(dy[:, :2], memory_format)
        weight = torch.randn(shape[1], x.shape[1], 1, 1, device=device)
        # a GEMM of two columns over 8320 values is as exact as the kernel that torch picks for it: no baseline for dw
        return dy, a, x, weight, norm.bias, "gelu", norm, sums, (True, shape[2] < 64, True)

    # small ones are pooled: the error of a dw of 2 x 5 values is chance
    first, *more = (backward_arguments() for _ in range(8 if shape[2] < 64 else 1))
    _check("pointwise_backward", *first, dtype=dtype, more=tuple(more))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_statistics(shape, dtype, memory_format, device):
    """Mean, variance and running statistics are within 1e-6 of those that float64 computes from the stored values."""
    (x,), _ = _inputs(shape, dtype, memory_format, device, count=1, mean=3.0)
    c = shape[1]
    weight, bias = torch.eye(c, device=device)[:, :, None, None].contiguous(), torch.full((c,), 0.25, device=device)
    running = torch.randn(c, device=device), torch.rand(c, device=device)
    expected = [t.double() for t in running]
    a, mean, var = cuda.pointwise_train(x, weight, bias, "gelu")
    count = a.numel() // c
    cuda.normalize(a, "gelu", Norm(mean, var, None, None, 1e-5), None, (Update(*running, mean, var, count, 0.1),))
    h = torch.nn.functional.gelu(a.double())
    exact_var, exact_mean = torch.var_mean(h, dim=(0, 2, 3), correction=0)
    update_running_statistics(Update(*expected, exact_mean, exact_var, count, 0.1))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-5  # the 16-bit gelu is good to 1e-6 absolute
    for ours, exact in zip((mean, var, *running), (exact_mean, exact_var, *expected), strict=True):
        assert relative_error(ours, exact) < tolerance


def _pairwise_bound(values: Tensor) -> float:
    """The root mean square error of a float32 pairwise sum of each channel's values (N, C, H, W) over all channels, times 3.

    Each value carries 4 roundings of its own; each of log2 n levels rounds partial sums, whose squares add up to those of
    the values and, as far as these have a mean, to 2 total^2 over all levels.
    """
    values, n = values.double(), values.numel() // values.shape[1]
    squares = (math.log2(n) + 4) * values.square().sum() + 2 * values.sum((0, 2, 3)).square().sum()
    return 3 * 2.0**-24 / 3**0.5 * squares.sqrt().item()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(32, 8, 32, 32), (600, 8, 9, 11)], ids=str)
def test_long_sums_are_as_exact_as_pairwise_ones(shape, memory_format, device):
    """float32 sums over N, H and W are as exact as pairwise sums: no long chains of additions, no errors of one sign."""
    (dy, a, x), norm = _inputs(shape, torch.float32, memory_format, device, count=3, mean=0.1)
    c = shape[1]
    weight, bias = torch.randn(c, 1, 3, 3, device=device), torch.randn(c, device=device)
    # sums of unit values over this many elements have this size: their means are subtracted from dy
    sums = torch.randn(c, device=device) * 200, torch.randn(c, device=device) * 200
    wide = _wide(dy, a, x, weight, bias, norm, sums)
    da = reference._da(wide[0], wide[1], "gelu", wide[5], wide[6])
    dw, db = cuda.depthwise_weight_grad(dy, a, x, weight, bias, "gelu", norm, sums)
    exact_dw, exact_db = reference.depthwise_weight_grad(*wide[:5], "gelu", *wide[5:])
    assert (db.double() - exact_db).norm() <= _pairwise_bound(da)
    # 9 taps
    assert (dw.double() - exact_dw).norm() <= 9**0.5 * _pairwise_bound(da * wide[2])

    hhat = reference.normalize(wide[1], "gelu", wide[5]._replace(weight=None, bias=None), None)
    exact_dy, exact_dy_hhat = reference.norm_backward(*wide[:2], "gelu", wide[5])
    sum_dy, sum_dy_hhat = cuda.norm_backward(dy, a, "gelu", norm)
    assert (sum_dy.double() - exact_dy).norm() <= _pairwise_bound(wide[0])
    assert (sum_dy_hhat.double() - exact_dy_hhat).norm() <= _pairwise_bound(wide[0] * hhat)

    forward, mean, var = cuda.depthwise_train(x, weight, bias, "gelu")
    h = torch.nn.functional.gelu(forward.double())
    exact_var, exact_mean = torch.var_mean(h, dim=(0, 2, 3), correction=0)
    count = h.numel() // c
    assert (mean.double() - exact_mean).norm() * count <= _pairwise_bound(h)
    assert (var.double() - exact_var).norm() * count <= _pairwise_bound((h - _per_channel(exact_mean)).square())


@pytest.mark.parametrize("memory_format", FORMATS)
def test_bias_gradient_where_the_mean_of_dy_is_below_its_last_place(memory_format, device):
    """dy minus its mean rounds to dy again, for each dy: that error would grow with their number."""
    (dy, a), norm = _inputs((32, 8, 32, 32), torch.float32, memory_format, device)
    dy = (1 + torch.rand_like(dy)).copysign(dy)
    bias = torch.randn(8, device=device)
    sums = torch.full_like(bias, 32 * 32 * 32 * 2.0**-25), torch.zeros_like(bias)
    matrix, wide = torch.randn(8, 8, 1, 1, device=device), _wide(dy, a, norm, sums)
    da = reference._da(wide[0], wide[1], "identity", wide[2], wide[3])
    _, _, db = cuda.pointwise_backward(dy, a, None, matrix, bias, "identity", norm, sums, (False, False, True))
    assert (db.double() - da.sum((0, 2, 3))).norm() <= _pairwise_bound(da)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(2, 64, 9, 16), (4, 16, 32, 32)], ids=str)
def test_variance_of_one_value_among_zeros(shape, memory_format, device):
    """relu leaves one value of a channel: the squares of all others would round alike if they were added to it one by one."""
    x = torch.full(shape, -1.0)
    c = shape[1]
    x[torch.randint(shape[0], (c,)), torch.arange(c), torch.randint(shape[2], (c,)), torch.randint(shape[3], (c,))] = (
        torch.rand(c) + 0.5
    )
    x = _formatted(x, memory_format).to(device)
    a, mean, var = cuda.depthwise_train(x, torch.ones(c, 1, 1, 1, device=device), None, "relu")
    assert torch.equal(a, x)
    h = x.double().relu()
    exact_var, exact_mean = torch.var_mean(h, dim=(0, 2, 3), correction=0)
    count = h.numel() // c
    assert (mean.double() - exact_mean).norm() * count <= _pairwise_bound(h)
    assert (var.double() - exact_var).norm() * count <= _pairwise_bound((h - _per_channel(exact_mean)).square())


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addresses_off_16_bytes(dtype, memory_format, device):
    """A dense tensor may start at any address; then no access is a vector."""
    shape = (2, 8, 6, 8)
    (dy, a), norm = _inputs(shape, dtype, memory_format, device)
    moved = torch.empty(a.numel() + 1, dtype=dtype, device=device)[1:].as_strided(a.shape, a.stride()).copy_(a)
    assert moved.data_ptr() % 16 != 0
    assert torch.equal(cuda.normalize(moved, "gelu", norm, dy), cuda.normalize(a, "gelu", norm, dy))
    for ours, aligned in zip(
        cuda.norm_backward(dy, moved, "gelu", norm), cuda.norm_backward(dy, a, "gelu", norm), strict=True
    ):
        assert relative_error(ours, aligned) < 1e-6
    weight = torch.randn(8, 1, 5, 5, device=device)
    ours, aligned = (cuda.depthwise_eval(x, weight, None, "gelu", norm, True) for x in (moved, a))
    assert torch.equal(ours, aligned)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "gelu_tanh"])
def test_non_finite_values_go_through(activation, dtype, memory_format, device):
    (a, dy), norm = _inputs((1, 8, 4, 5), dtype, memory_format, device)
    # torch's own gelu of an infinity depends on the memory format
    highest = 3e4 if activation.startswith("gelu") else float("inf")
    specials = torch.tensor([float("nan"), highest, -highest, 0.0, -0.0, 3e4, -3e4], dtype=dtype)
    a[0, 1, 0, :5], a[0, 2, 0, :2] = specials[:5].to(device), specials[5:].to(device)
    ours, expected = cuda.normalize(a, activation, norm, None), reference.normalize(a, activation, norm, None)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.isinf(), expected.isinf())
    statistics = torch.stack(cuda.norm_backward(dy, a, activation, norm)).isfinite()
    assert torch.equal(statistics, torch.stack(reference.norm_backward(dy, a, activation, norm)).isfinite())


def test_relu_lets_the_gradient_of_a_nan_through(device):
    """torch's own backward does; with a constant norm the NaN has no other effect."""
    (a, dy), norm = _inputs((1, 8, 4, 8), torch.float32, "contiguous", device)
    a[0, 1, 1, 2:4] = float("nan")
    one = torch.ones(8, 1, 1, 1, device=device)
    ours = cuda.depthwise_input_grad(dy, a, one, "relu", norm, None, False)
    assert relative_error(ours, reference.depthwise_input_grad(dy, a, one, "relu", norm, None, False).double()) < 1e-6


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_stops_gradients_that_are_not_finite(dtype, memory_format, device):
    check_relu_stops_gradients(cuda, dtype, memory_format, device)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=str)
def test_gradients_beside_a_special_value_behind_constant_statistics(special, dtype, memory_format, device):
    """The gradients then depend on act'(a) only, not on act(a): if that is finite, so are they."""
    (dy, a, x), norm = _inputs((2, 8, 9, 16), dtype, memory_format, device, count=3)
    a[0, 1, 4, 7], a[1, 2, 0, 15] = special, special
    weight, bias = torch.randn(8, 1, 5, 5, device=device), torch.randn(8, device=device)
    matrix = torch.randn(8, 8, 1, 1, device=device, dtype=dtype)
    for activation in ("identity", "relu"):

        def gradients(backend, *tensors, activation=activation) -> list[Tensor]:
            dy, a, x, weight, bias, matrix = tensors
            return [
                backend.depthwise_input_grad(dy, a, weight, activation, norm, None, True),
                *backend.depthwise_weight_grad(dy, a, x, weight, bias, activation, norm, None),
                *backend.pointwise_backward(dy, a, x, matrix, bias, activation, norm, None, (True, True, True)),
            ]

        tensors = dy, a, x, weight, bias, matrix
        for ours, expected in zip(gradients(cuda, *tensors), gradients(reference, *tensors), strict=True):
            assert expected.isfinite().all()
            assert relative_error(ours, expected.double()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kernel", [(3, 1), (4, 4), (3, 6), (9, 9), (2, 13), (17, 18)], ids=str)
@pytest.mark.parametrize("special", [math.nan, math.inf], ids=str)
def test_a_special_value_reaches_the_outputs_under_the_filter_alone(special, kernel, dtype, memory_format, device):
    """Filters are padded with zeros, to widths that are unrolled and to Toeplitz matrices; 0 times a special value is NaN."""
    (x, dy, a), norm = _inputs((2, 8, 9, 40), dtype, memory_format, device, count=3)
    for t in (x, dy):
        t[0, 1, 4, 17], t[1, 2, 8, 39], t[1, 3, 0, 0] = special, -special, special
    weight, bias = torch.randn(8, 1, *kernel, device=device), torch.randn(8, device=device)
    for results in (
        lambda backend: backend.depthwise_eval(x, weight, bias, "relu", norm, True),
        lambda backend: backend.depthwise_train(x, weight, bias, "relu")[0],
        lambda backend: backend.depthwise_input_grad(dy, a, weight, "gelu", norm, None, True),
    ):
        ours, expected = results(cuda), results(reference)
        finite = expected.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        assert torch.equal(ours.isnan(), expected.isnan())
        assert relative_error(ours[finite], expected[finite].double()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("memory_format", FORMATS)
def test_bits_do_not_change_between_runs(memory_format, device):
    (dy, a, x), norm = _inputs((4, 8, 16, 16), torch.bfloat16, memory_format, device, count=3)
    weight, bias = torch.randn(8, 1, 9, 9, device=device), torch.randn(8, device=device)

    def everything() -> list[Tensor]:
        sums = cuda.norm_backward(dy, a, "gelu", norm)
        return [
            *cuda.depthwise_train(x, weight, bias, "gelu"),
            *sums,
            cuda.depthwise_input_grad(dy, a, weight, "gelu", norm, sums, True),
            *cuda.depthwise_weight_grad(dy, a, x, weight, bias, "gelu", norm, sums),
        ]

    for first, second in zip(everything(), everything(), strict=True):
        assert torch.equal(first, second)


# Limits.


def test_can_run_names_what_it_cannot(device):
    weight, x = torch.empty(2, 1, 9, 9, device=device), torch.empty(1, 2, 4, 4, device=device)
    assert cuda.can_run("depthwise", x, weight) is None
    assert "float64" in cuda.can_run("depthwise", x.double(), weight)
    assert "101x101" in cuda.can_run("depthwise", x, torch.empty(2, 1, 102, 3, device=device))
    assert "span up to 101, got 9x105" in cuda.can_run("depthwise", x, weight, (1, 13))
    assert "up to 2^30" in cuda.can_run("depthwise", x[:1, :, :1, :1].expand(2**30 + 1, 2, 1, 1), weight)
    assert "x.device=meta" in cuda.can_run("depthwise", torch.empty(1, 2, 4, 4, device="meta"), weight)
    assert cuda.build_info()["available"]


def test_a_missing_module_says_how_to_build_it(monkeypatch):
    monkeypatch.delenv("CONVMIXER_CUDA_EMULATION", raising=False)
    monkeypatch.setattr(_load, "native_module", lambda name: (None, f"the native module {name} is not built"))
    monkeypatch.setattr(cuda, "_native", functools.cache(cuda._native.__wrapped__))
    reason = cuda.can_run("depthwise", torch.empty(1, 2, 4, 4), torch.empty(2, 1, 3, 3))
    assert "not built" in reason
    assert "CONVMIXER_BUILD_CUDA=1 pip install" in reason
    assert cuda.build_info() == {"available": False, "detail": reason}


def test_emulation_by_the_environment_variable(monkeypatch, tmp_path):
    """The variable names the module, for processes that a test starts; if the file is missing, that is the reason not to run."""
    monkeypatch.setattr(cuda, "_native", functools.cache(cuda._native.__wrapped__))
    monkeypatch.setenv("CONVMIXER_CUDA_EMULATION", str(build()))
    x, weight = torch.empty(1, 2, 4, 4), torch.empty(2, 1, 3, 3)
    with pytest.warns(UserWarning, match="emulated on the CPU, for tests only"):
        assert cuda.can_run("depthwise", x, weight) is None
    cuda._native.cache_clear()
    monkeypatch.setenv("CONVMIXER_CUDA_EMULATION", str(tmp_path / "none.so"))
    with pytest.warns(UserWarning, match="for tests only"):
        assert "none.so" in cuda.can_run("depthwise", x, weight)


@pytest.mark.gpu
def test_graph_capture_and_streams():
    """Calls allocate by the caching allocator only, never synchronise, and use the current stream: a graph replays the bits."""
    (dy, a, x), norm = _inputs((4, 16, 16, 16), torch.bfloat16, "contiguous", "cuda", count=3)
    weight, bias = torch.randn(16, 1, 9, 9, device="cuda"), torch.randn(16, device="cuda")
    matrix = torch.randn(16, 16, 1, 1, device="cuda")

    def everything() -> list[Tensor]:
        sums = cuda.norm_backward(dy, a, "gelu", norm)
        return [
            *cuda.depthwise_train(x, weight, bias, "gelu"),
            cuda.depthwise_input_grad(dy, a, weight, "gelu", norm, sums, True),
            *cuda.depthwise_weight_grad(dy, a, x, weight, bias, "gelu", norm, sums),
            cuda.pointwise_eval(x, matrix, bias, "gelu", norm),
            *cuda.pointwise_backward(dy, a, x, matrix, bias, "gelu", norm, sums, (True, True, True)),
        ]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = everything()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = everything()
        graph.replay()
    torch.cuda.synchronize()
    for ours, eager in zip(captured, expected, strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.gpu
def test_launch_counts():
    """A depthwise block's training forward takes 3 kernels, its backward at most 5 (reduce, finish, dx, dw, finish)."""
    import convmixer_kernels as ck

    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    x = torch.randn(4, 16, 32, 32, **options)
    parameters = [torch.randn(shape, **options) for shape in ((16, 1, 9, 9), (16,), (16,), (16,))]
    running = torch.zeros(16, device="cuda"), torch.ones(16, device="cuda")

    def kernels(call) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return sum("convmixer" in event.name for event in profile.events())

    def block() -> Tensor:
        return ck.depthwise_block(x, *parameters, *running, training=True, backend="cuda")

    y = block()
    dy = torch.randn_like(y)
    y.backward(dy)
    assert kernels(block) == 3
    y = block()
    assert 0 < kernels(lambda: y.backward(dy)) <= 5

# SPDX-License-Identifier: MIT
"""Kernels beyond 31, stripes and dilation on the CPU's backends; test_cuda.py and test_triton.py have the others."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from helpers import Case, check_case, in_format
from torch.utils.flop_counter import FlopCounterMode

import convmixer_kernels as ck
from convmixer_kernels import dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("contiguous", "channels_last")
KERNELS = (
    (33, 33),
    (51, 51),
    (63, 63),
    (101, 101),
    (51, 5),
    (5, 51),
    (1, 63),
    (101, 1),
    (32, 32),
    (64, 2),
)
# images smaller than a kernel, than half of it, and larger; 16 columns are a CPU tile
SHAPES = ((2, 16, 7, 5), (1, 19, 14, 16), (1, 16, 33, 20))
DILATED = ((3, 3), (5, 5), (7, 7), (11, 1), (2, 4))
DILATIONS = ((2, 2), (3, 3), (1, 3), (3, 2), (19, 1))


def _large_cases():
    modes = itertools.cycle(itertools.product(FORMATS, DTYPES, ("depthwise_conv2d", "depthwise_block")))
    for kernel, shape in itertools.product(KERNELS, SHAPES):
        memory_format, dtype, op = next(modes)
        if kernel[0] * kernel[1] > 2000 and shape == SHAPES[2]:
            # seconds in float64
            continue
        yield Case(op, shape, kernel, dtype=dtype, memory_format=memory_format)
    # rows in several tiles, whose planes share margins
    yield Case("depthwise_conv2d", (1, 3, 150, 60), (33, 3))
    yield Case("depthwise_conv2d", (1, 3, 150, 60), (3, 3), memory_format="channels_last", dilation=(16, 2))


def _dilated_cases():
    modes = itertools.cycle(itertools.product(FORMATS, DTYPES))
    for dilation, shape, kernel in itertools.product(DILATIONS, (*SHAPES, (1, 3, 1, 40)), DILATED):
        memory_format, dtype = next(modes)
        yield Case("depthwise_conv2d", shape, kernel, dtype=dtype, memory_format=memory_format, dilation=dilation)
    # read in place: 16 columns of each phase (eager's bfloat16 weight gradient is NaN there, torch 2.13)
    for dilation, kernel, channels in (((2, 2), (3, 3), 19), ((1, 3), (5, 7), 16), ((3, 2), (4, 9), 33)):
        for dtype in DTYPES[::2]:
            yield Case(
                "depthwise_conv2d", (1, channels, 6, 50), kernel, None, dtype, None, FORMATS[1], dilation=dilation
            )


@pytest.mark.parametrize("case", [*_large_cases(), *_dilated_cases()], ids=str)
def test_cpu(case):
    check_case(case, "cpu", pool=48)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("kernel", "dilation"), [((51, 5), (1, 1)), ((7, 7), (3, 3)), ((4, 2), (3, 5)), ((3, 5), (2, 1))]
)
def test_reference(kernel, dilation, memory_format):
    shape = (2, 8, 9, 12)
    check_case(
        Case("depthwise_conv2d", shape, kernel, memory_format=memory_format, dilation=dilation), "reference", pool=32
    )


@pytest.mark.parametrize("dilation", [1, 2, (2, 3)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (51, 51), (2, 33)], ids=str)
def test_bits_do_not_depend_on_threads(kernel, dilation):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 40, 20, 17), torch.randn(40, 1, *kernel)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [t.clone().requires_grad_() for t in (x, weight)]
            y = ck.depthwise_conv2d(*leaves, dilation=dilation, backend="cpu")
            y.backward(x)
            results.append([y.detach(), *(t.grad for t in leaves)])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        for t, other in zip(results[0], others, strict=True):
            assert torch.equal(t, other)


def test_which_backend_takes_it(caplog):
    x = torch.randn(1, 2, 9, 9)

    def chosen(kernel, dilation=(1, 1)):
        return dispatch.choose("depthwise_conv2d", None, "depthwise", x, (torch.empty(2, 1, *kernel),), dilation).name

    assert chosen((101, 101)) == chosen((1023, 1)) == chosen((3, 3), (64, 1)) == "cpu"
    with caplog.at_level(logging.DEBUG, "convmixer_kernels"):
        assert chosen((1, 1025)) == "reference"
        assert chosen((3, 3), (1, 65)) == "reference"
    assert "it takes kernels up to 1023x1023, got weight.shape=(2, 1, 1, 1025)" in caplog.text
    assert "it takes dilations up to 64, got dilation=(1, 65)" in caplog.text
    with pytest.raises(
        NotImplementedError, match=r"depthwise_conv2d: backend 'cpu' cannot run this: it takes dilations"
    ):
        ck.depthwise_conv2d(x, torch.randn(2, 1, 3, 3), dilation=65, backend="cpu")
    torch.testing.assert_close(
        ck.depthwise_conv2d(x, torch.ones(2, 1, 3, 3), dilation=65), x, rtol=0, atol=0, msg="only the middle tap counts"
    )


@pytest.mark.parametrize("dilation", [0, -1, (1, 0), (2,), (1, 2, 3), ()], ids=str)
def test_wrong_dilation(dilation):
    message = r"^depthwise_conv2d: dilation must be one int of at least 1, or two, \(dH, dW\), got dilation="
    with pytest.raises(ValueError, match=message):
        ck.depthwise_conv2d(torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3), dilation=dilation)


@pytest.mark.parametrize("dilation", [True, 1.0, None, "2", (1, 2.0), (True, 1)], ids=str)
def test_no_dilation(dilation):
    message = r"^depthwise_conv2d: dilation must be an int or two, \(dH, dW\), got dilation="
    with pytest.raises(TypeError, match=message):
        ck.depthwise_conv2d(torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3), dilation=dilation)


@pytest.mark.parametrize("dilation", [2, (3, 1)], ids=str)
def test_autograd_of_any_order(dilation):
    torch.manual_seed(0)
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, 5, 6), (2, 1, 3, 2), (2,))]

    def function(*tensors):
        return ck.depthwise_conv2d(*tensors, dilation=dilation)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    # the cpu backend's create_graph runs composite.py
    x, weight, bias = (t.detach().float().requires_grad_() for t in inputs)

    def second_derivatives(y):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight, bias))

    ours = second_derivatives(ck.depthwise_conv2d(x, weight, bias, dilation=dilation, backend="cpu"))
    eager = second_derivatives(F.conv2d(x, weight, bias, padding="same", dilation=dilation, groups=2))
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_compile_vmap_and_flops(memory_format):
    torch.manual_seed(0)
    x, weight, bias = in_format(torch.randn(3, 2, 8, 7), memory_format), torch.randn(2, 1, 3, 5), torch.randn(2)

    def ours(x, weight):
        return ck.depthwise_conv2d(x, weight, bias, dilation=(2, 1))

    def eager(x, weight):
        return F.conv2d(x, weight, bias, padding="same", dilation=(2, 1), groups=2)

    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")

    def run(function):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = function(*leaves)
        y.sum().backward()
        return y.detach(), *(t.grad for t in leaves)

    for t, of_compiled, of_eager in zip(run(ours), run(compiled), run(eager), strict=True):
        assert torch.equal(t, of_compiled)
        torch.testing.assert_close(t, of_eager)
    with FlopCounterMode(display=False) as counter:
        run(ours)
    with FlopCounterMode(display=False) as expected:
        run(eager)
    assert counter.get_total_flops() == expected.get_total_flops() > 0
    stacked = torch.stack([x, x + 1])
    torch.testing.assert_close(
        torch.func.vmap(ours, (0, None))(stacked, weight), torch.stack([eager(t, weight) for t in stacked])
    )


def test_empty_batch():
    x, weight = torch.randn(0, 2, 8, 7, requires_grad=True), torch.randn(2, 1, 3, 3, requires_grad=True)
    y = ck.depthwise_conv2d(x, weight, dilation=2)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert not weight.grad.any()


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize(("kernel", "dilation"), [((25, 25), (1, 1)), ((7, 5), (3, 2)), ((3, 51), (1, 1))])
def test_padding_times_a_value_that_is_not_finite(kernel, dilation, special):
    """The weight gradient leaves out products with the padding; in eager they are NaN if the gradient is not finite there."""
    torch.manual_seed(0)
    dy, x, weight = torch.randn(2, 20, 40, 5), torch.randn(2, 20, 40, 5) + 3, torch.randn(20, 1, *kernel)
    dy[1, 3, 39, 0], dy[0, 18, 20, 2] = special, -special
    results = []
    for call in (ck.depthwise_conv2d, F.conv2d):
        dtype = torch.float32 if call is ck.depthwise_conv2d else torch.float64
        leaf = weight.to(dtype, copy=True).requires_grad_()
        options = {"backend": "cpu"} if call is ck.depthwise_conv2d else {"padding": "same", "groups": 20}
        call(x.to(dtype), leaf, dilation=dilation, **options).backward(dy.to(dtype))
        results.append(leaf.grad)
    ours, exact = results
    assert torch.equal(ours.isnan(), exact.isnan())
    assert torch.equal(ours.isinf(), exact.isinf())
    assert ours[4].isfinite().all()

# SPDX-License-Identifier: MIT
"""What stands between a tensor and its memory: views, strides, transforms, devices without data."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import convmixer_kernels as ck

BACKENDS = ("reference", "cpu")
OPERATORS = ("depthwise_block", "pointwise_block", "mixer_layer", "depthwise_conv2d")


def _inputs(op, channels=6):
    def norm():
        return [torch.randn(channels), torch.randn(channels), torch.randn(channels), torch.rand(channels) + 0.5]

    depthwise = [torch.randn(channels, 1, 3, 4), torch.randn(channels)]
    pointwise = [torch.randn(channels, channels, 1, 1), torch.randn(channels)]
    tensors = {
        "depthwise_block": [*depthwise, *norm()],
        "pointwise_block": [*pointwise, *norm()],
        "mixer_layer": [*depthwise, *norm(), *pointwise, *norm()],
        "depthwise_conv2d": depthwise,
    }[op]
    return torch.randn(2, channels, 7, 5), tensors


def _equivalent(op, x, tensors):
    def block(x, weight, bias, norm_weight, norm_bias, mean, var, groups, training=False):
        h = F.gelu(F.conv2d(x, weight, bias, padding="same", groups=groups))
        return F.batch_norm(h, mean, var, norm_weight, norm_bias, training)

    channels = x.shape[1]
    if op == "depthwise_conv2d":
        return F.conv2d(x, *tensors, padding="same", groups=channels)
    if op == "pointwise_block":
        return block(x, *tensors, 1)
    y = block(x, *tensors[:6], channels) + x
    return y if op == "depthwise_block" else block(y, *tensors[6:], 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPERATORS)
def test_negative_views(op, backend):
    """A negative view shares memory that holds the opposite values."""
    operator = getattr(ck, op)
    x, tensors = _inputs(op)
    expected = operator(x, *tensors, backend=backend)
    assert torch.equal(operator(torch._neg_view(-x), *tensors, backend=backend), expected)
    assert torch.equal(operator(x, torch._neg_view(-tensors[0]), *tensors[1:], backend=backend), expected)
    dy = torch.randn_like(expected)
    grads = []
    for gradient in (dy, torch._neg_view(-dy)):
        leaves = [x.clone().requires_grad_(), tensors[0].clone().requires_grad_()]
        y = operator(leaves[0], leaves[1], *tensors[1:], backend=backend)
        grads.append(torch.autograd.grad(y, leaves, gradient))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("op", OPERATORS[:3])
def test_strided_parameters_and_statistics(op, training, backend):
    """Every second element of a buffer: read and updated where it is, its neighbours left alone."""
    x, dense = _inputs(op)
    buffers = [torch.full((*t.shape, 2), 7.0) for t in dense]
    strided = [b[..., 0] for b in buffers]
    for t, value in zip(strided, dense, strict=True):
        t.copy_(value)
    assert not any(t.is_contiguous() for t in strided)
    operator = getattr(ck, op)
    y = operator(x, *strided, training=training, backend=backend)
    assert torch.equal(y, operator(x, *dense, training=training, backend=backend))
    for t, value, buffer in zip(strided, dense, buffers, strict=True):
        torch.testing.assert_close(t, value, rtol=1e-6, atol=1e-7)
        assert (buffer[..., 1] == 7).all()


@pytest.mark.parametrize("op", OPERATORS)
def test_function_transforms(op):
    """vmap, grad, jvp and forward-mode differentiation give what the equivalent gives."""
    x, tensors = _inputs(op)
    operator = getattr(ck, op)
    tangent = torch.randn_like(x)

    def both(transform):
        return transform(lambda x: operator(x, *tensors)), transform(lambda x: _equivalent(op, x, tensors))

    def dual(function):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent

    batch = torch.randn(3, *x.shape)
    for transform in (
        lambda f: torch.func.vmap(f)(batch),
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.jvp(torch.func.grad(lambda x: f(x).square().sum()), (x,), (tangent,))[1],
        dual,
    ):
        torch.testing.assert_close(*both(transform))


@pytest.mark.parametrize("op", OPERATORS)
def test_second_derivative_raises(op):
    """Also where dy is a constant, which torch's once_differentiable lets pass as a derivative of 0."""
    x, tensors = _inputs(op)
    x.requires_grad_()
    y = getattr(ck, op)(x, *tensors)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (y.mean() + dx.square().sum()).backward()


@pytest.mark.parametrize("op", OPERATORS)
def test_meta_device(op):
    """Shapes without data, as torch's own modules on the meta device."""
    x, tensors = _inputs(op)
    for memory_format, training in itertools.product((torch.contiguous_format, torch.channels_last), (True, False)):
        x = x.contiguous(memory_format=memory_format)
        options = {} if op == "depthwise_conv2d" else {"training": training}
        y = getattr(ck, op)(x.to("meta"), *(t.to("meta") for t in tensors), **options)
        assert (y.device.type, y.shape, y.stride()) == ("meta", x.shape, x.stride())


def test_model_on_the_meta_device():
    from convmixer import ConvMixer

    model = ConvMixer(16, 2, 5, 2, 10, device="meta")
    for mode in (True, False):
        assert model.train(mode)(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 10)

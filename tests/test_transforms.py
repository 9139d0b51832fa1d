# SPDX-License-Identifier: MIT
"""What stands between a tensor and its memory: views, strides, transforms, devices without data."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import Case, assert_twice_eager, eager, make_inputs, ours
from torch.autograd import forward_ad

import convmixer_kernels as ck

BACKENDS = ("reference", "cpu")
OPERATORS = ("depthwise_block", "pointwise_block", "mixer_layer", "depthwise_conv2d")


def _inputs(op, training=False):
    # 32 channels: the twice-eager rule compares rounding errors, over few numbers that is luck
    case = Case(op, (2, 32, 7, 5), (1, 1) if op == "pointwise_block" else (3, 4), training=training)
    x, tensors, dy = make_inputs(case)
    return case, x, tensors, dy


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPERATORS)
def test_negative_views(op, backend):
    """A negative view shares memory that holds the opposite values."""
    operator = getattr(ck, op)
    _, x, tensors, dy = _inputs(op)
    expected = operator(x, *tensors, backend=backend)
    assert torch.equal(operator(torch._neg_view(-x), *tensors, backend=backend), expected)
    assert torch.equal(operator(x, torch._neg_view(-tensors[0]), *tensors[1:], backend=backend), expected)
    grads = []
    for gradient in (dy, torch._neg_view(-dy)):
        leaves = [x.clone().requires_grad_(), tensors[0].clone().requires_grad_()]
        y = operator(leaves[0], leaves[1], *tensors[1:], backend=backend)
        grads.append(torch.autograd.grad(y, leaves, gradient))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("op", OPERATORS)
def test_tensors_without_memory(op):
    """torch keeps none for a tensor that it knows to be 0."""
    case, x, tensors, _ = _inputs(op)
    nothing = torch._efficientzerotensor(x.shape)
    assert torch.equal(ours(case, nothing, tensors, None), ours(case, torch.zeros_like(x), tensors, None))
    x.requires_grad_()
    y = ours(case, x, tensors, None)
    y.backward(torch._efficientzerotensor(y.shape))
    assert not x.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("op", OPERATORS[:3])
def test_strided_parameters_and_statistics(op, training, backend):
    """Every second element of a buffer: read and updated where it is, its neighbours left alone."""
    case, x, dense, _ = _inputs(op, training)
    buffers = [torch.full((*t.shape, 2), 7.0) for t in dense]
    strided = [b[..., 0] for b in buffers]
    for t, value in zip(strided, dense, strict=True):
        t.copy_(value)
    assert not any(t.is_contiguous() for t in strided)
    in_eager, exact = [t.clone() for t in dense], [t.double() for t in dense]
    y = ours(case, x, strided, backend)
    assert_twice_eager("y", y, eager(case, x, in_eager), eager(case, x.double(), exact))
    for i, (t, *others) in enumerate(zip(strided, in_eager, exact, strict=True)):
        assert_twice_eager(f"tensor {i}", t, *others)
    assert torch.equal(y, ours(case, x, dense, backend))
    assert all((buffer[..., 1] == 7).all() for buffer in buffers)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPERATORS)
def test_weight_gradients_have_the_weights_strides(op, backend):
    """A contiguous weight of a channels_last model has strides of its own, and DDP compares those of the gradient. The
    result and x's gradient keep x's format beside it."""
    _, x, tensors, dy = _inputs(op)
    x.requires_grad_()
    weights = [t.to(memory_format=torch.channels_last).requires_grad_() for t in tensors if t.dim() == 4]
    given = iter(weights)
    y = getattr(ck, op)(x, *(next(given) if t.dim() == 4 else t for t in tensors), backend=backend)
    dx, *gradients = torch.autograd.grad(y, [x, *weights], dy)
    assert y.is_contiguous()
    assert dx.is_contiguous()
    for weight, gradient in zip(weights, gradients, strict=True):
        assert weight.is_contiguous()
        assert weight.stride() != torch.empty(weight.shape).stride()
        assert gradient.stride() == weight.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("op", OPERATORS)
def test_changes_between_forward_and_backward(op, training, backend):
    """As in eager: of a weight they raise, a bias may change, and the gradients are the same."""
    _, x, tensors, dy = _inputs(op, training)
    options = {"backend": backend} if op == "depthwise_conv2d" else {"backend": backend, "training": training}
    results = []
    for change in (False, True):
        leaves = [x, *(t.clone() for t in tensors)]
        differentiable = [t.requires_grad_() for i, t in enumerate(leaves) if i == 0 or (i - 1) % 6 < 4]
        y = getattr(ck, op)(*leaves, **options)
        if change:
            with torch.no_grad():
                for i, t in enumerate(leaves[1:]):
                    if i % 6 in (1, 3):
                        t.add_(1)
        results.append(torch.autograd.grad(y, differentiable, dy))
    assert all(map(torch.equal, *results))
    for i in (0, 2, 6, 8):
        if i < len(tensors):
            leaves = [x, *(t.clone().requires_grad_(j % 6 < 4) for j, t in enumerate(tensors))]
            y = getattr(ck, op)(*leaves, **options)
            with torch.no_grad():
                leaves[1 + i].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward(dy)


def _dual(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


TRANSFORMS = {
    "vmap": lambda f, x, _: torch.func.vmap(f)(torch.stack([x, x + 1, -x])),
    "grad": lambda f, x, _: torch.func.grad(lambda x: f(x).square().sum())(x),
    "jvp": lambda f, x, tangent: torch.func.jvp(f, (x,), (tangent,))[1],
    "second": lambda f, x, t: torch.func.jvp(torch.func.grad(lambda x: f(x).square().sum()), (x,), (t,))[1],
    "dual": _dual,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPERATORS)
def test_function_transforms(op, transform):
    """vmap, grad, jvp and forward-mode differentiation give what the equivalent gives."""
    case, x, tensors, tangent = _inputs(op)
    apply = TRANSFORMS[transform]
    exact = [t.double() for t in tensors]
    assert_twice_eager(
        transform,
        apply(lambda x: ours(case, x, tensors, None), x, tangent),
        apply(lambda x: eager(case, x, tensors), x, tangent),
        apply(lambda x: eager(case, x, exact), x.double(), tangent.double()),
    )


@pytest.mark.parametrize("op", OPERATORS)
def test_second_derivative_raises(op):
    """Also where dy is a constant, which torch's once_differentiable lets pass as a derivative of 0."""
    _, x, tensors, _ = _inputs(op)
    x.requires_grad_()
    y = getattr(ck, op)(x, *tensors)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (y.mean() + dx.square().sum()).backward()


@pytest.mark.parametrize("op", OPERATORS)
def test_meta_device(op):
    """Shapes without data, as torch's own modules on the meta device."""
    _, x, tensors, _ = _inputs(op)
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

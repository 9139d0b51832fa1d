# SPDX-License-Identifier: MIT
"""Tensors that are not plain memory: views, strides, transforms, devices without data."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import Case, assert_twice_eager, check_case, eager, make_inputs, ours, run, use_cuda
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

import convmixer_kernels as ck

BACKENDS = ("reference", "cpu")
OPERATORS = ("depthwise_block", "pointwise_block", "mixer_layer", "depthwise_conv2d")


def _inputs(op, training=False):
    # 32 channels: the twice-eager rule compares rounding errors, whose ratio is chance over few numbers
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
    """torch has no memory for a tensor that it knows to be 0."""
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
    """Every second element of a buffer is read and updated in place; its neighbours do not change."""
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
    """A contiguous weight of a channels_last model has other strides than x, and DDP compares them with the gradient's. The
    result and x's gradient keep x's format."""
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
    """As in eager, a changed weight raises; a bias may change, and the gradients stay the same."""
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


class Doubled(torch.Tensor):
    """A tensor with memory whose operators give twice the result: whoever reads its memory misses that."""

    @staticmethod
    def __new__(cls, plain):
        doubled = torch.Tensor._make_subclass(cls, plain)
        doubled.plain = plain
        return doubled

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda t: t.plain, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, lambda t: 2 * t, function(*args, **kwargs))


@pytest.mark.parametrize("op", OPERATORS)
def test_subclasses_are_asked(op):
    """Given as x, as the weight or as the last tensor: the operator is dispatched to the subclass."""
    _, x, tensors, _ = _inputs(op)
    given = [x, *tensors]
    expected = 2 * getattr(ck, op)(*given)
    for i in (0, 1, len(given) - 1):
        y = getattr(ck, op)(*(Doubled(t) if i == j else t for j, t in enumerate(given)))
        assert torch.equal(y, expected)


def _dual(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


TRANSFORMS = {
    "vmap": lambda f, x, _: torch.func.vmap(f)(torch.stack([x, x + 1, -x])),
    "vmap-strided": lambda f, x, _: torch.func.vmap(f)(torch.stack([x, x + 1, -x]).mT),
    "grad": lambda f, x, _: torch.func.grad(lambda x: f(x).square().sum())(x),
    "jvp": lambda f, x, tangent: torch.func.jvp(f, (x,), (tangent,))[1],
    "second": lambda f, x, t: torch.func.jvp(torch.func.grad(lambda x: f(x).square().sum()), (x,), (t,))[1],
    "dual": _dual,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPERATORS)
def test_function_transforms(op, transform):
    """vmap, grad, jvp and forward-mode differentiation give the results of the equivalent in torch operations."""
    case, x, tensors, tangent = _inputs(op)
    apply = TRANSFORMS[transform]
    exact = [t.double() for t in tensors]
    assert_twice_eager(
        transform,
        apply(lambda x: ours(case, x, tensors, None), x, tangent),
        apply(lambda x: eager(case, x, tensors), x, tangent),
        apply(lambda x: eager(case, x, exact), x.double(), tangent.double()),
    )


# Saved tensors.


def _strided(t):
    buffer = torch.full((*t.shape, 2), 7.0, dtype=t.dtype)
    buffer[..., 0] = t
    return buffer[..., 0]


def _moved(t):
    """The values in new memory and another layout, as from another device or a file."""
    return torch.frombuffer(bytearray(t.contiguous().numpy().tobytes()), dtype=t.dtype).view(t.shape)


HOOKS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "strided": _strided,
    "negative": lambda t: torch._neg_view(-t),
    "expanded": lambda t: t.unsqueeze(0).expand(2, *t.shape)[1],
    "moved": _moved,
}


def _hooks(unpack):
    # a copy: a kernel that reads the original gives another result
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(memory_format=torch.preserve_format), unpack)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", OPERATORS)
def test_saved_tensors_that_come_back_in_another_layout(op, memory_format, hook, backend):
    """All of them, and every second one, so that tensors of one call have different layouts."""
    for training in (True, False):
        case = Case(op, (2, 32, 7, 5), (1, 1) if op == "pointwise_block" else (3, 4), 40, memory_format=memory_format)
        case = replace(case, training=training)
        for rest in range(3):
            count = itertools.count()

            def unpack(t, n=count, rest=rest):
                return HOOKS[hook](t) if rest == 2 or next(n) % 2 == rest else t

            check_case(case, backend, context=lambda unpack=unpack: _hooks(unpack))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", OPERATORS)
def test_saved_tensors_in_another_layout_on_a_gpu(op, backend, monkeypatch):
    """The GPU's kernels, emulated and interpreted, with the hook of save_on_cpu, whose copies are contiguous."""
    if backend == "cuda":
        use_cuda(monkeypatch)
    else:
        pytest.importorskip("triton", reason="triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("the interpreter is not in use where there is a GPU")
    case = Case(op, (2, 32, 5, 6), (1, 1) if op == "pointwise_block" else (3, 4), memory_format="channels_last")
    count = itertools.count()
    check_case(case, backend, pool=32, context=lambda: _hooks(lambda t: t.contiguous() if next(count) % 2 else t))


@pytest.mark.parametrize("op", OPERATORS)
def test_saved_tensors_that_come_back_as_something_else(op):
    """Another dtype, shape or device raises by name before any kernel, as in torch."""
    _, x, tensors, dy = _inputs(op)
    size = x.numel()
    broken = {
        "must be torch.float32|must be on|dtype": lambda t: t.half() if t.numel() == size else t,
        r"must be \(|shape": lambda t: t[:, :, :-1] if t.numel() == size else t,
        "device": lambda t: t.to("meta") if t.numel() == size else t,
        "weight must be": lambda t: t[:-1] if t.dim() == 4 and t.numel() != size else t,
    }
    for message, unpack in broken.items():
        leaves = [x.clone().requires_grad_(), *(t.clone().requires_grad_(i % 6 < 4) for i, t in enumerate(tensors))]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = getattr(ck, op)(*leaves)
        with pytest.raises((ValueError, TypeError), match=f"backward: .*({message})"):
            y.backward(dy)


@pytest.mark.parametrize("op", OPERATORS)
def test_compressing_hooks(op):
    """Packed as another dtype and back: the gradients are those of the unpacked values."""
    case, x, tensors, dy = _inputs(op)

    def compressed(call, dtype):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.dtype, t.bfloat16()), lambda p: p[1].to(p[0])):
            return run(call, x.to(dtype), [t.to(dtype) for t in tensors], dy.to(dtype))

    exact = run(lambda x, t: eager(case, x, t), x.double(), [t.double() for t in tensors], dy.double())
    baseline = compressed(lambda x, t: eager(case, x, t), torch.float32)
    for name, t in compressed(lambda x, t: ours(case, x, t, None), torch.float32).items():
        assert_twice_eager(name, t, baseline[name], exact[name], torch.bfloat16)


@pytest.mark.parametrize("op", OPERATORS)
def test_meta_device(op):
    """On the meta device operators give shapes without data, like torch's own modules."""
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

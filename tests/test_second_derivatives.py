# SPDX-License-Identifier: MIT
"""Derivatives of the backward and batches of gradients equal those of torch's own operations: operators, modules, models."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import weakref

import pytest
import torch
import torch.autograd.functional as AF
from helpers import ACTIVATIONS, BLOCK_TENSORS, Case, assert_twice_eager, eager, make_inputs, ours
from model_helpers import image, make_pair
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint_sequential

import convmixer_kernels as ck

OPERATORS = ("depthwise_block", "pointwise_block", "mixer_layer", "depthwise_conv2d")
FORMATS = ("contiguous", "channels_last")


def _case(op, **options) -> Case:
    # 32 channels: the twice-eager rule compares rounding errors, whose ratio is chance over few numbers
    return Case(op, (3, 32, 7, 6), (1, 1) if op == "pointwise_block" else (3, 4), **options)


def _names(case: Case, tensors: list[Tensor | None]) -> dict[int, str]:
    """The parameters whose gradients are computed: the index and name of each."""
    names = {i: f"{i // 6}.{BLOCK_TENSORS[i % 6]}" for i, t in enumerate(tensors) if t is not None and i % 6 < 4}
    if case.activation == "identity" and case.training:
        # batch norm removes a constant: the exact derivative is 0, every computed one is rounding
        names = {i: n for i, n in names.items() if not n.endswith(".bias")}
    return names


def _weighted(tensors) -> Tensor:
    """A twice differentiable number that depends on each element differently."""
    return sum((t.square() * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in tensors)


def _second(call, case, x, tensors, dy, wanted=None, context=contextlib.nullcontext) -> dict[str, Tensor]:
    """First derivatives with create_graph, and the gradients of a function of them with respect to dy, x and the parameters."""
    names = _names(case, tensors)
    leaves = [None if t is None else t.detach().clone() for t in tensors]
    inputs = {"x": x.detach().clone(memory_format=torch.preserve_format), **{n: leaves[i] for i, n in names.items()}}
    inputs = {n: t.requires_grad_() for n, t in inputs.items() if wanted is None or n in wanted}
    dy = dy.detach().clone().requires_grad_()
    with context():
        y = call(inputs.get("x", x), leaves)
    first = torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype), create_graph=True)
    second = torch.autograd.grad(_weighted(first), [dy, *inputs.values()], materialize_grads=True)
    results = {f"d{n}": t.detach() for n, t in zip(inputs, first, strict=True)}
    return results | {f"second of {n}": t for n, t in zip(("dy", *inputs), second, strict=True)}


def _check_second(case: Case, backend=None, wanted=None, context=contextlib.nullcontext) -> None:
    x, tensors, dy = make_inputs(case)
    mixed = case.parameter_dtype not in (None, case.dtype)
    cast = (lambda: torch.autocast("cpu", case.dtype)) if mixed else contextlib.nullcontext
    results = _second(lambda x, t: ours(case, x, t, backend), case, x, tensors, dy, wanted, context)
    baseline = _second(lambda x, t: eager(case, x, t), case, x, tensors, dy, wanted, cast)
    exact = [None if t is None else t.double() for t in tensors]
    truth = _second(lambda x, t: eager(case, x, t), case, x.double(), exact, dy.double(), wanted)
    for name, t in results.items():
        assert_twice_eager(f"{case}: {name}", t, baseline[name], truth[name], case.dtype)


CASES = [
    *(
        _case(op, training=training, activation=activation, memory_format=memory_format)
        for op, training, activation, memory_format in itertools.product(
            OPERATORS[:3], (True, False), ACTIVATIONS, FORMATS
        )
    ),
    *(_case("depthwise_conv2d", memory_format=memory_format) for memory_format in FORMATS),
    *(
        _case(op, training=training, absent=absent)
        for op, training in itertools.product(OPERATORS[:3], (True, False))
        for absent in (("bias",), ("norm_weight", "norm_bias"), ("bias", "norm_bias"))
    ),
    *(_case(op, absent=("running_mean", "running_var")) for op in OPERATORS[:3]),
    *(_case("depthwise_block", training=training, residual=False) for training in (True, False)),
    *(Case("mixer_layer", (3, 24, 7, 6), (5, 5), 40, training=training) for training in (True, False)),
    _case("depthwise_conv2d", absent=("bias",)),
    *(_case(op, dtype=torch.bfloat16, training=training) for op in OPERATORS for training in (True, False)),
    *(_case(op, dtype=torch.bfloat16, parameter_dtype=torch.float32, training=False) for op in OPERATORS),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_derivatives(case):
    _check_second(case)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", OPERATORS)
def test_gradgradcheck_float64(op, activation, training):
    case = Case(op, (2, 2, 3, 4), (3, 2), 2, torch.float64, training=training, activation=activation)
    x, tensors, dy = make_inputs(case)
    names = _names(case, tensors)

    def call(x, *differentiable):
        filled = [t.clone() for t in tensors]
        for i, t in zip(names, differentiable, strict=True):
            filled[i] = t
        return ours(case, x, filled, "reference")

    inputs = [x.requires_grad_(), *(tensors[i].clone().requires_grad_() for i in names)]
    assert torch.autograd.gradgradcheck(call, inputs, dy.requires_grad_(), check_batched_grad=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "wanted",
    [("x",), ("0.weight",), ("0.bias",), ("x", "0.norm_weight"), ("0.norm_bias",), ("x", "1.weight"), ("1.bias",)],
    ids="+".join,
)
@pytest.mark.parametrize("op", OPERATORS)
def test_some_need_gradients(op, wanted, training):
    """If no weight needs a gradient, x is not saved, and yet second derivatives pass through it."""
    case = _case(op, training=training)
    names = ("x", *_names(case, make_inputs(case)[1]).values())
    if any(n in names for n in wanted):
        _check_second(case, wanted=wanted)


@pytest.mark.parametrize("op", OPERATORS)
def test_x_is_not_kept_for_derivatives_that_may_never_be_asked(op):
    """With frozen weights the graph keeps no further tensor of x's size."""
    case = _case(op)
    x, tensors, _ = make_inputs(case)
    sizes = []

    def pack(t):
        sizes.append(t.untyped_storage().nbytes())
        return t

    source = x.requires_grad_()
    x = source * 2
    alive = weakref.ref(x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ours(case, x, tensors, None)
    assert sum(size >= x.nbytes for size in sizes) == {"mixer_layer": 2, "depthwise_conv2d": 0}.get(op, 1)
    del x
    assert alive() is None
    # and the graph ends at the right node
    (dx,) = torch.autograd.grad(y.square().sum(), source, create_graph=True)
    assert torch.autograd.grad(dx.square().sum(), source)[0].any()


@pytest.mark.parametrize("op", OPERATORS)
def test_no_reference_cycle(op):
    case = _case(op)
    x, tensors, _ = make_inputs(case)
    x.requires_grad_()
    tensors[0].requires_grad_()
    gc.collect()
    gc.disable()
    try:
        y = ours(case, x, tensors, None)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        graphs = [weakref.ref(y), weakref.ref(dx), weakref.ref(y.grad_fn)]
        del y, dx
        assert all(graph() is None for graph in graphs)
    finally:
        gc.enable()


@pytest.mark.parametrize("op", OPERATORS)
def test_inputs_that_depend_on_each_other(op):
    """A weight computed from the source of x, and a tensor in two places: no path is counted twice."""

    def call(operator):
        def function(p, case, x, tensors):
            tensors = [t.clone() for t in tensors]
            tensors[0] = tensors[0] * p.mean()
            tensors[1] = tensors[1] * p[: len(tensors[1])]
            if len(tensors) > 2:
                tensors[2] = tensors[3] = tensors[1].sin()
            return operator(case, x * p.sum() + tensors[1].view(1, -1, 1, 1), tensors).square().sum()

        return function

    case = _case(op)
    x, tensors, _ = make_inputs(case)
    p, v = torch.linspace(0.5, 1, 32), torch.linspace(1, -1, 32)
    exact = x.double(), [t.double() for t in tensors]
    results = [
        AF.hvp(lambda p, c=c, x=x, t=t: c(p, case, x, t), p.to(x.dtype), v.to(x.dtype))[1]
        for c, (x, t) in (
            (call(lambda *a: ours(*a, None)), (x, tensors)),
            (call(eager), (x, tensors)),
            (call(eager), exact),
        )
    ]
    assert_twice_eager("hvp", *results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("op", OPERATORS)
def test_a_bias_that_changes_between_forward_and_backward(op, training):
    """As in eager, it may change: the derivatives are those at its value in the forward."""
    case = _case(op, training=training)
    x, tensors, dy = make_inputs(case)
    results = []
    # the reference backend's convolution is torch's, so that the rule compares like with like
    calls = ((lambda *a: ours(*a, "reference"), torch.float32), (eager, torch.float32), (eager, torch.float64))
    for call, dtype in calls:
        leaves = [t.to(dtype, copy=True) for t in tensors]
        inputs = [x.detach().to(dtype, copy=True), *(leaves[i] for i in _names(case, tensors))]
        for t in inputs:
            t.requires_grad_()
        y = call(case, inputs[0], leaves)
        with torch.no_grad():
            for i in _names(case, tensors):
                if i % 6 in (1, 3):
                    leaves[i].add_(1)
        first = torch.autograd.grad(y, inputs, dy.to(dtype), create_graph=True)
        results.append([*first, *torch.autograd.grad(_weighted(first), inputs, materialize_grads=True)])
    for i, triple in enumerate(zip(*results, strict=True)):
        assert_twice_eager(f"{case}: {i}", *triple)


def test_a_bias_that_left_its_graph():
    x, weight, bias = torch.randn(2, 8, 5, 5), torch.randn(8, 1, 3, 3, requires_grad=True), torch.randn(8)
    p = torch.ones(8, requires_grad=True)
    bias = bias * p
    y = ck.depthwise_conv2d(x, weight, bias)
    bias.mul_(2)
    assert torch.autograd.grad(y.sum(), p, retain_graph=True)[0].any()
    with pytest.raises(RuntimeError, match="an inplace operation gave it another"):
        torch.autograd.grad(y.sum(), p, create_graph=True)


# Batches of gradients.


def _is_grads_batched(y, inputs, dys):
    return torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)


def _vmap(y, inputs, dys):
    return torch.func.vmap(lambda dy: torch.autograd.grad(y, inputs, dy, retain_graph=True))(dys)


def _dual(y, inputs, dys):
    """Forward over reverse: a backward is linear in dy, so its derivative in a direction is the backward of that."""
    results = []
    for dy in dys:
        with forward_ad.dual_level():
            grads = torch.autograd.grad(y, inputs, forward_ad.make_dual(torch.zeros_like(dy), dy), retain_graph=True)
            results.append([forward_ad.unpack_dual(g).tangent for g in grads])
    return [torch.stack(t) for t in zip(*results, strict=True)]


def _check_batches(op, memory_format, frozen, batched, context=contextlib.nullcontext) -> None:
    for training in (True, False):
        case = _case(op, training=training, memory_format=memory_format)
        x, tensors, _ = make_inputs(case)
        dys = torch.randn(3, *x.shape)
        results = []
        for call, dtype in ((lambda *a: ours(*a, None), torch.float32), (eager, torch.float32), (eager, torch.float64)):
            leaves = [t.to(dtype, copy=True) for t in tensors]
            inputs = [x.detach().to(dtype, copy=True).requires_grad_()]
            if not frozen:
                inputs += [leaves[i].requires_grad_() for i in _names(case, tensors)]
            with context():
                y = call(case, inputs[0], leaves)
            if dtype == torch.float64:
                rows = [torch.autograd.grad(y, inputs, dy.double(), retain_graph=True) for dy in dys]
                results.append([torch.stack(t) for t in zip(*rows, strict=True)])
            else:
                results.append(batched(y, inputs, dys))
        for i, triple in enumerate(zip(*results, strict=True)):
            assert_twice_eager(f"{case}: {i}", *triple)


@pytest.mark.parametrize("batched", [_is_grads_batched, _vmap, _dual])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("op", OPERATORS)
def test_batches_of_gradients(op, memory_format, frozen, batched):
    """The rows of a batch are the gradients one by one."""
    _check_batches(op, memory_format, frozen, batched)


@pytest.mark.parametrize("op", OPERATORS)
def test_a_plain_backward_runs_the_kernels(op, monkeypatch):
    """Only create_graph and batches leave the kernels: a plain backward gives their bits."""
    from convmixer_kernels import composite

    case = _case(op)
    x, tensors, dy = make_inputs(case)
    inputs = [x.requires_grad_(), *(tensors[i].requires_grad_() for i in _names(case, tensors))]
    y = ours(case, x, [t.clone() for t in tensors], "cpu")
    for name in ("block_backward", "mixer_backward", "convolution_backward"):
        monkeypatch.setattr(composite, name, lambda *_: pytest.fail("torch's operations ran"))
    torch.autograd.grad(y, inputs, dy, retain_graph=True)
    with torch.enable_grad():
        y.backward(dy)


# Other callers: registered operators, torch.compile, modules.


class _Nothing(TorchDispatchMode):
    """A mode makes the forward take the registered operator."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("op", OPERATORS)
def test_registered_operators(op, training):
    """Registered operators have second derivatives and batches of gradients."""
    case = _case(op, training=training)
    x, tensors, _ = make_inputs(case)
    x.requires_grad_()
    with _Nothing():
        assert "convmixer" in ours(case, x, tensors, "cpu").grad_fn.name()
    _check_second(case, "cpu", context=_Nothing)
    _check_second(case, "cpu", ("x",), _Nothing)
    _check_batches(op, "contiguous", False, _is_grads_batched, _Nothing)
    _check_batches(op, "channels_last", True, _vmap, _Nothing)


@pytest.mark.parametrize("op", OPERATORS)
def test_compiled_operators_say_so(op):
    """torch.compile has no second derivatives: it raises, and never gives a derivative of 0."""
    case = _case(op, training=False)
    x, tensors, _ = make_inputs(case)
    x.requires_grad_()
    tensors[0].requires_grad_()
    torch._dynamo.reset()
    y = torch.compile(lambda x: ours(case, x, tensors, None), backend="aot_eager")(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(dx.square().sum(), x)


@pytest.mark.parametrize("training", [True, False])
def test_blocks_as_modules(training):
    """A gradient penalty through DepthwiseBlock and PointwiseBlock gives all parameters' gradients."""
    torch.manual_seed(1)
    blocks = torch.nn.Sequential(ck.DepthwiseBlock(16, 5), ck.PointwiseBlock(16, 24), ck.DepthwiseConv2d(24, 3))
    blocks.train(training)
    x = torch.randn(2, 16, 9, 8)
    reference = torch.nn.Sequential(*(copy.deepcopy(block) for block in blocks))
    reference[0].forward = lambda x, b=reference[0]: _eager_module("depthwise_block", b, x)
    reference[1].forward = lambda x, b=reference[1]: _eager_module("pointwise_block", b, x)
    reference[2].forward = lambda x, b=reference[2]: torch.nn.Conv2d.forward(b, x)
    results = []
    for model, dtype in ((blocks, torch.float32), (reference, torch.float32), (reference, torch.float64)):
        model.to(dtype).zero_grad()
        inputs = x.to(dtype).requires_grad_()
        (dx,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        (dx.flatten(1).norm(dim=1) - 1).square().mean().backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(list(blocks.parameters()))
    for triple in zip(*results, strict=True):
        assert_twice_eager("penalty", *triple)


def _eager_module(op: str, block: torch.nn.Module, x: Tensor) -> Tensor:
    conv, norm = block.conv, block.norm
    tensors = [conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return eager(Case(op, x.shape, training=block.training), x, tensors)


# Models.


def _loss(model):
    return lambda x: model(x).square().sum()


def _penalty(model, x, _):
    x = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(_loss(model)(x), x, create_graph=True)
    (dx.flatten(1).norm(dim=1) - 1).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _of_parameters(model, x, _):
    parameters = list(model.parameters())
    first = torch.autograd.grad(_loss(model)(x), parameters, create_graph=True)
    second = torch.autograd.grad(sum((g * g.detach().sin()).sum() for g in first), parameters, materialize_grads=True)
    return torch.cat([t.flatten() for t in second])


def _third(model, x, _):
    x = x.detach().requires_grad_()
    y = model(x).pow(3).sum()
    for _ in range(3):
        (y,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    return y


def _frozen(function):
    return lambda model, *rest: function(model.requires_grad_(False), *rest)


def _checkpointed(model, x, v):
    return AF.hvp(lambda x: checkpoint_sequential(model, 2, x, use_reentrant=False).square().sum(), x, v)[1]


def _autocast(model, x, v):
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
        return AF.hvp(lambda x: model(x).to(x.dtype).square().sum(), x, v)[1]


FUNCTIONS = {
    "hvp": lambda model, x, v: AF.hvp(_loss(model), x, v)[1],
    "vhp": lambda model, x, v: AF.vhp(_loss(model), x, v)[1],
    "jvp": lambda model, x, v: AF.jvp(model, x, v)[1],
    "hessian": lambda model, x, _: AF.hessian(_loss(model), x[:2, :, :4, :4]),
    "vectorised hessian": lambda model, x, _: AF.hessian(_loss(model), x[:2, :, :4, :4], vectorize=True),
    "forward over reverse": lambda model, x, _: AF.hessian(
        _loss(model), x[:2, :, :4, :4], vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "jacobian": lambda model, x, _: AF.jacobian(model, x),
    "vectorised jacobian": lambda model, x, _: AF.jacobian(model, x, vectorize=True),
    "gradient penalty": _penalty,
    "of parameters": _of_parameters,
    "third": _third,
    "checkpointed": _checkpointed,
    "autocast": _autocast,
}
FUNCTIONS |= {f"frozen {n}": _frozen(FUNCTIONS[n]) for n in ("hvp", "jvp", "vectorised jacobian")}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("depth", "function"),
    [
        *((1, function) for function in FUNCTIONS),
        *((2, function) for function in ("hvp", "jvp", "gradient penalty", "vectorised jacobian", "third")),
    ],
)
def test_models(depth, function, training):
    for activation, channels_last in (("gelu", False), ("relu", True)):
        models = make_pair(depth=depth, activation=activation)
        x = image(channels_last=channels_last)
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        results = []
        for model, dtype in ((models[0], x.dtype), (models[1], x.dtype), (models[1], torch.float64)):
            model = copy.deepcopy(model).to(dtype).train(training)
            results.append(FUNCTIONS[function](model, x.to(dtype), v.to(dtype)))
        rounding = torch.bfloat16 if function == "autocast" else None
        assert_twice_eager(f"{function}, {activation}", *results, rounding)

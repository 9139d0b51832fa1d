# SPDX-License-Identifier: MIT
"""Every operator on every backend that runs on a CPU, against float64 by the twice-eager rule.

The grid is a selection, not a product: sizes around the 16 channels and 16 columns of a CPU tile, images smaller than the
kernel, odd, even and non-square kernels; dtype, memory format, mode and activation take turns.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import Case, assert_twice_eager, check_case, eager, make_inputs, ours, run
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "cpu")

SHAPES = [
    (2, 16, 16, 16),
    (1, 17, 15, 17),
    (3, 3, 7, 5),
    (2, 33, 9, 31),
    (1, 40, 32, 33),
    (2, 1, 6, 40),
    (1, 20, 1, 1),
    (5, 8, 2, 3),
    (1, 16, 56, 49),
]
KERNELS = [
    (1, 1),
    (2, 2),
    (3, 3),
    (4, 5),
    (5, 5),
    (7, 7),
    (8, 8),
    (9, 9),
    (1, 9),
    (11, 3),
    (13, 13),
    (6, 31),
    (31, 31),
    (30, 30),
]


def _depthwise_cases():
    modes = itertools.cycle(itertools.product((True, False), ("contiguous", "channels_last"), DTYPES))
    activations = itertools.cycle(("gelu", "gelu", "relu", "gelu_tanh", "identity"))
    for shape, kernel in itertools.product(SHAPES, KERNELS):
        training, memory_format, dtype = next(modes)
        if shape[0] * shape[2] * shape[3] == 1:
            training = False
        yield Case("depthwise_block", shape, kernel, None, dtype, None, memory_format, training, next(activations))


def _pointwise_cases():
    modes = itertools.cycle(itertools.product(("contiguous", "channels_last"), (True, False), DTYPES))
    activations = itertools.cycle(("gelu", "relu", "gelu_tanh", "gelu", "identity"))
    for shape, channels_out in itertools.product(SHAPES, (1, 8, 17, 64)):
        memory_format, training, dtype = next(modes)
        if shape[0] * shape[2] * shape[3] == 1:
            training = False
        yield Case(
            "pointwise_block", shape, (1, 1), channels_out, dtype, None, memory_format, training, next(activations)
        )


def _option_cases():
    small = (2, 18, 10, 12)
    for op, training in itertools.product(("depthwise_block", "pointwise_block", "mixer_layer"), (True, False)):
        kernel = (1, 1) if op == "pointwise_block" else (5, 5)
        base = {"op": op, "shape": small, "kernel": kernel, "training": training}
        for dtype, memory_format in itertools.product(DTYPES, ("contiguous", "channels_last", "sliced", "expanded")):
            yield Case(**base, dtype=dtype, memory_format=memory_format)
        for dtype in DTYPES[1:]:
            yield Case(**base, dtype=dtype, parameter_dtype=torch.float32)
            yield Case(**base, dtype=dtype, parameter_dtype=torch.float32, memory_format="channels_last")
        for absent in (("bias",), ("norm_weight",), ("norm_bias",), ("bias", "norm_weight", "norm_bias")):
            yield Case(**base, absent=absent)
        if training:
            yield Case(**base, absent=("running_mean", "running_var"))
        for activation in ("relu", "gelu_tanh", "identity"):
            yield Case(**base, activation=activation)
        yield Case(**(base | {"shape": (4, 24, 16, 16), "kernel": (1, 1) if op == "pointwise_block" else (9, 9)}))
    for training in (True, False):
        yield Case("depthwise_block", small, (5, 5), training=training, residual=False)
        yield Case("mixer_layer", small, (9, 9), 7, training=training)
    for dtype, memory_format in itertools.product(DTYPES, ("contiguous", "channels_last", "sliced")):
        yield Case("depthwise_conv2d", small, (4, 9), dtype=dtype, memory_format=memory_format)
    yield Case("depthwise_conv2d", small, (3, 3), absent=("bias",))


CASES = [*_depthwise_cases(), *_pointwise_cases(), *_option_cases()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(case, backend):
    check_case(case, backend)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    op=st.sampled_from(["depthwise_block", "pointwise_block", "mixer_layer", "depthwise_conv2d"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 35), st.integers(1, 20), st.integers(1, 20)),
    kernel=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    channels_out=st.integers(1, 35),
    dtype=st.sampled_from(DTYPES),
    memory_format=st.sampled_from(["contiguous", "channels_last", "sliced"]),
    training=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_random_shapes(op, shape, kernel, channels_out, dtype, memory_format, training, seed):
    # with few values a channel, batch norm divides by a variance that may be mere rounding: nothing to compare
    training = training and shape[0] * shape[2] * shape[3] >= 64
    assume(shape[0] * shape[1] * shape[2] * shape[3] >= 16)
    out = channels_out if op in ("pointwise_block", "mixer_layer") else None
    check_case(Case(op, shape, kernel, out, dtype, None, memory_format, training), "cpu", seed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [(9, 9), (4, 3)])
def test_large_image(backend, kernel):
    check_case(Case("depthwise_block", (1, 3, 230, 225), kernel), backend)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("channels", "channels_out"), [(513, 40), (1100, 530), (512, 513)])
def test_deep_products(channels, channels_out, memory_format):
    """Sums run over more channels than a packed panel holds, forward and backward; the last chunk is partial."""
    case = Case("pointwise_block", (3, channels, 9, 7), (1, 1), channels_out, memory_format=memory_format)
    for training in (True, False):
        check_case(replace(case, training=training), "cpu")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("op", ["depthwise_block", "pointwise_block", "mixer_layer", "depthwise_conv2d"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "identity"])
def test_gradcheck_float64(op, training, activation):
    from helpers import make_inputs, ours

    case = Case(op, (2, 3, 4, 5), (3, 2), 4, torch.float64, training=training, activation=activation)
    x, tensors, _ = make_inputs(case)
    leaves = [i for i in range(len(tensors)) if i % 6 < 4]

    def call(x, *differentiable):
        filled = [t.clone() for t in tensors]
        for i, t in zip(leaves, differentiable, strict=True):
            filled[i] = t
        return ours(case, x, filled, "reference")

    inputs = [x.requires_grad_(), *(tensors[i].clone().requires_grad_() for i in leaves)]
    assert torch.autograd.gradcheck(call, inputs, check_batched_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("op", ["depthwise_block", "pointwise_block"])
def test_values_that_are_not_finite_with_relu(op, value, backend):
    """If relu is 0, so is its gradient, even for a NaN. An infinite mean makes the running mean infinite, not NaN, except
    on the reference backend, which computes mean and variance together."""
    case = Case(op, (3, 64, 5, 6), (3, 3), activation="relu")
    x, tensors, dy = make_inputs(case)
    x[1, 1, 2, 3] = value
    exact = run(lambda x, t: eager(case, x, t), x.double(), [t.double() for t in tensors], dy.double())
    results = run(lambda x, t: ours(case, x, t, backend), x, tensors, dy)
    for name in ("dx", "running_mean") if backend == "cpu" else ("dx",):
        assert not exact[name].isfinite().all()
        masked = [torch.where(t.isfinite(), 0.0, t.double()) for t in (results[name], exact[name])]
        torch.testing.assert_close(*masked, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(3, 3), (9, 9), (16, 31)], ids=str)
def test_a_bias_larger_than_the_sum(kernel, memory_format, backend):
    """The products must not be rounded at the bias's scale: eager adds it last."""
    case = Case("depthwise_conv2d", (2, 48, 9, 13), kernel, memory_format=memory_format)
    x, (weight, bias), _ = make_inputs(case)
    tensors = [weight, 8 * bias]
    exact = eager(case, x.double(), [t.double() for t in tensors])
    assert_twice_eager(str(case), ours(case, x, tensors, backend), eager(case, x, tensors), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_weight_gradients_of_small_images(memory_format, backend):
    """Eager adds up the few hundred products of a tap in short sums. Eight seeds are tested one by one."""
    case = Case("depthwise_conv2d", (2, 16, 16, 16), (5, 5), memory_format=memory_format)
    for seed in range(8):
        x, tensors, dy = make_inputs(case, seed)
        exact = run(lambda x, t: eager(case, x, t), x.double(), [t.double() for t in tensors], dy.double() + 5)
        baseline = run(lambda x, t: eager(case, x, t), x, tensors, dy + 5)
        results = run(lambda x, t: ours(case, x, t, backend), x, tensors, dy + 5)
        assert_twice_eager(f"seed {seed}", *(r["dweight"] for r in (results, baseline, exact)))


def test_a_small_bias_does_not_shift_the_mean():
    """Added last as a whole, it would round alike for all sums of a binade, which the mean of values around 0 shows."""
    case = Case("depthwise_block", (4, 48, 16, 16), (3, 3), activation="identity")
    x, tensors, _ = make_inputs(case)
    tensors[1] *= 0.01
    for t, value in ((tensors[4], 0.0), (tensors[5], 1.0)):
        t.fill_(value)
    results = []
    for call, dtype in ((ours, torch.float32), (eager, torch.float32), (eager, torch.float64)):
        changed = [t.to(dtype, copy=True) for t in tensors]
        call(case, x.to(dtype), changed, *([None] if call is ours else []))
        results.append(changed[4])
    assert_twice_eager("running_mean", *results)

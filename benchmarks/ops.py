# SPDX-License-Identifier: MIT
"""What an operator case computes: its inputs, eager PyTorch's way, ours, and which bytes and FLOPs it cannot avoid.

An operator has the same start and end for everyone. The input gradients start at dy and a, batch norm's parameter
gradients included; the weight gradients of eager PyTorch start at da, which it has stored, ours at dy and a, since it never
stores da: that difference is eager's gain. A step is the forward and the backward with all gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import convmixer_kernels as ck
from benchmarks.shapes import DTYPES, LAYOUTS, OpCase
from convmixer_kernels.primitives import Norm
from convmixer_kernels.testing import eager_convolution, never_returns

EPS, MOMENTUM = 1e-5, 0.1
Results = tuple[Tensor, ...]


class Parameters(NamedTuple):
    """Of one block."""

    weight: Tensor  # (C, 1, k, k) or (C_out, C, 1, 1)
    bias: Tensor  # (C_out,), as all that follow
    norm_weight: Tensor
    norm_bias: Tensor
    running_mean: Tensor
    running_var: Tensor


@dataclass
class Set:
    """One set of activations; a case rotates several. The statistics are those of a, so that a backward is a real one."""

    x: Tensor  # (N, C, H, W)
    a: Tensor  # (N, C_out, H, W), the convolution's output
    dy: Tensor  # (N, C_out, H, W)
    da: Tensor  # (N, C_out, H, W), what eager PyTorch has stored when the weight gradient starts
    mean: Tensor  # (C_out,) of gelu(a)
    var: Tensor  # (C_out,)
    blocks: tuple[Parameters, ...]  # the depthwise one, the pointwise one, or both

    @property
    def parameters(self) -> Parameters:
        return self.blocks[0]

    @property
    def rstd(self) -> Tensor:
        return torch.rsqrt(self.var + EPS)

    @property
    def norm(self) -> Norm:
        p = self.parameters
        return Norm(self.mean, self.var, p.norm_weight, p.norm_bias, EPS)

    def map(self, function: Callable[[Tensor], Tensor]) -> Set:
        activations = (function(t) for t in (self.x, self.a, self.dy, self.da, self.mean, self.var))
        return Set(*activations, tuple(Parameters(*map(function, block)) for block in self.blocks))

    def double(self) -> Set:
        """The same numbers in float64; what was derived from others is derived again."""
        wide = self.map(Tensor.double)
        wide.da = _da(wide)
        return wide

    def channels(self, kept: Tensor) -> Set:
        """The same with only the channels `kept`, where none of them depends on another (no pointwise block)."""
        return self.map(lambda t: t[kept] if t.dim() == 1 or t.shape[1] == 1 else t[:, kept])

    def in_layout(self, layout: str) -> Set:
        return self.map(lambda t: t.contiguous(memory_format=LAYOUTS[layout]) if t.dim() == 4 and _planes(t) else t)


def _planes(t: Tensor) -> bool:
    # convolution weights have one layout in ours; eager takes any, and converts them itself where oneDNN wants another
    return t.shape[1] > 1 and (t.shape[2] > 1 or t.shape[3] > 1)


def make_sets(case: OpCase, device: torch.device, count: int) -> list[Set]:
    """Random inputs of a case, in its dtype and layout: as many sets of activations as asked for, and one of parameters."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, (_, c, _, _) = DTYPES[case.dtype], case.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def block(weight: Tensor) -> Parameters:
        out = len(weight)
        vectors = (normal(out), normal(out), normal(out), normal(out), normal(out).abs() + 0.5)
        return Parameters(*(t.to(dtype) for t in (weight, *vectors)))

    blocks = []
    if case.has_depthwise or not case.has_pointwise:
        blocks.append(block(normal(c, 1, case.kernel, case.kernel) / case.kernel))
    if case.has_pointwise:
        blocks.append(block(normal(case.out, c, 1, 1) / c**0.5))
    return [_make_set(case, tuple(blocks), generator) for _ in range(count)]


def _make_set(case: OpCase, blocks: tuple[Parameters, ...], generator: torch.Generator) -> Set:
    dtype, (n, c, h, w) = DTYPES[case.dtype], case.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    x, a, dy = (normal(n, k, h, w).to(dtype) for k in (c, case.out, case.out))
    var, mean = torch.var_mean(F.gelu(a.double()), (0, 2, 3), correction=0)
    some = Set(x, a, dy, a, mean.float(), var.float(), blocks)
    if case.op.endswith("weight_grad"):
        some.da = _da(some).to(dtype)
    return some.in_layout(case.layout)


def _da(some: Set) -> Tensor:
    """The gradient of the convolution's output, by eager PyTorch, float32 at least."""
    wide = torch.promote_types(some.a.dtype, torch.float32)
    a, dy, gamma = some.a.to(wide), some.dy.to(wide), some.parameters.norm_weight.to(wide)
    mean, rstd = some.mean.to(wide), some.rstd.to(wide)
    return _activation_chain(dy, a, gamma, mean, rstd)[0]


# ---- eager PyTorch, also what torch.compile compiles and, in float64, the truth ------------------------------------


def _convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return eager_convolution(x, weight, bias, groups=x.shape[1] // weight.shape[1], padding=weight.shape[2] // 2)


def _block(x: Tensor, *block: Tensor, training: bool = False) -> Tensor:
    weight, bias, norm_weight, norm_bias, mean, var = block
    h = F.gelu(_convolution(x, weight, bias))
    y = F.batch_norm(h, mean, var, norm_weight, norm_bias, training, MOMENTUM, EPS)
    return y + x if weight.shape[1] == 1 else y


def _layer(x: Tensor, *blocks: Tensor, training: bool = False) -> Tensor:
    return _block(_block(x, *blocks[:6], training=training), *blocks[6:], training=training)


def _train(x: Tensor, *block: Tensor) -> Tensor:
    return _block(x, *block, training=True)


def _train_layer(x: Tensor, *blocks: Tensor) -> Tensor:
    return _layer(x, *blocks, training=True)


def _activation_chain(dy: Tensor, a: Tensor, norm_weight: Tensor, mean: Tensor, rstd: Tensor) -> Results:
    dh, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        dy, F.gelu(a), norm_weight, None, None, mean, rstd, True, EPS, [True, True, True]
    )
    return torch.ops.aten.gelu_backward(dh, a), dgamma, dbeta


def _convolution_backward(da: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> Results:
    padding, groups = weight.shape[2] // 2, x.shape[1] // weight.shape[1]
    if never_returns(x, weight):
        grads = _convolution_backward(da.float(), x.float(), weight.float(), mask)
        return tuple(None if g is None else g.to(x.dtype) for g in grads)
    # by position: bias sizes, stride, padding, dilation, transposed, output padding
    return torch.ops.aten.convolution_backward(
        da, x, weight, [len(weight)], [1, 1], [padding, padding], [1, 1], False, [0, 0], groups, mask
    )


def _input_grad(
    dy: Tensor, a: Tensor, x: Tensor, weight: Tensor, norm_weight: Tensor, mean: Tensor, rstd: Tensor
) -> Results:
    da, dgamma, dbeta = _activation_chain(dy, a, norm_weight, mean, rstd)
    dx = _convolution_backward(da, x, weight, [True, False, False])[0]
    return dx + dy if weight.shape[1] == 1 else dx, dgamma, dbeta


def _weight_grad(da: Tensor, x: Tensor, weight: Tensor) -> Results:
    return _convolution_backward(da, x, weight, [False, True, True])[1:]


def _normalize(a: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.batch_norm(F.gelu(a), mean, var, norm_weight, norm_bias, False, MOMENTUM, EPS) + x


def _norm_backward(dy: Tensor, a: Tensor, norm_weight: Tensor, mean: Tensor, rstd: Tensor) -> Results:
    masks = [False, True, True]
    _, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        dy, F.gelu(a), norm_weight, None, None, mean, rstd, True, EPS, masks
    )
    return dbeta, dgamma


def _flat(some: Set) -> Results:
    return some.x, *(t for block in some.blocks for t in block)


# ---- ours ---------------------------------------------------------------------------------------------------------


def backend_module(name: str) -> ModuleType:
    return importlib.import_module(f"convmixer_kernels.backends.{name}")


def _ours_layer(some: Set, training: bool, backend: str, x: Tensor, *tensors: Tensor) -> Tensor:
    public = ck.mixer_layer
    if len(some.blocks) == 1:
        public = ck.depthwise_block if some.parameters.weight.shape[1] == 1 else ck.pointwise_block
    return public(x, *tensors, training=training, eps=EPS, momentum=MOMENTUM, backend=backend)


def _our_input_grad(some: Set, backend: str) -> Results:
    module, p = backend_module(backend), some.parameters
    sums = module.norm_backward(some.dy, some.a, "gelu", some.norm)
    if p.weight.shape[1] == 1:
        dx = module.depthwise_input_grad(some.dy, some.a, p.weight, "gelu", some.norm, sums, True)
    else:
        needs = (True, False, False)
        dx = module.pointwise_backward(some.dy, some.a, None, p.weight, p.bias, "gelu", some.norm, sums, needs)[0]
    # sum dy is beta's gradient, sum dy * hhat gamma's
    return dx, sums[1], sums[0]


def _our_weight_grad(some: Set, backend: str) -> Callable[[], Results]:
    module, p = backend_module(backend), some.parameters
    sums = module.norm_backward(some.dy, some.a, "gelu", some.norm)
    if p.weight.shape[1] == 1:
        return lambda: module.depthwise_weight_grad(some.dy, some.a, some.x, p.weight, p.bias, "gelu", some.norm, sums)
    needs = (False, True, True)
    return lambda: module.pointwise_backward(some.dy, some.a, some.x, p.weight, p.bias, "gelu", some.norm, sums, needs)[
        1:
    ]


# ---- the operators -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """An operator for everyone: `function(*arguments(set))` is eager PyTorch's."""

    function: Callable[..., Tensor | Results]
    arguments: Callable[[Set], Results]
    outputs: tuple[str, ...]
    #: activation-sized tensors read or written: with C channels (x, dx, z), and with C_out (a, dy, y)
    passes: tuple[int, int]
    convolutions: int  # of each block
    activations: int  # evaluations of erf an element, for gelu, its derivative or both, of each block
    training: bool = False
    step: bool = False

    def call(self, some: Set, function: Callable[..., Tensor | Results] | None = None) -> Callable[[], Results]:
        """What is timed, for eager PyTorch or what torch.compile made of `function`."""
        function = self.function if function is None else function
        arguments = self.arguments(some)
        if self.step:
            return _step(function, some, arguments)
        if self.training:
            return _recorded(function, arguments)
        return lambda: _tuple(function(*arguments))

    def ours(self, some: Set, backend: str) -> Callable[[], Results]:
        """What is timed, for one of our backends."""
        if self.function is _input_grad:
            return lambda: _our_input_grad(some, backend)
        if self.function is _weight_grad:
            return _our_weight_grad(some, backend)
        if self.function is _normalize:
            return lambda: (backend_module(backend).normalize(some.a, "gelu", some.norm, some.x),)
        if self.function is _norm_backward:
            return lambda: backend_module(backend).norm_backward(some.dy, some.a, "gelu", some.norm)
        if self.function is _convolution:
            return lambda: (ck.depthwise_conv2d(some.x, *some.parameters[:2], backend=backend),)

        def function(x: Tensor, *tensors: Tensor) -> Tensor:
            return _ours_layer(some, self.training, backend, x, *tensors)

        return self.call(some, function)


def _tuple(results: Tensor | Results) -> Results:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _leaves(arguments: Results) -> tuple[Results, Results]:
    """The arguments of a block in training, and those of them that get gradients (all but the running statistics).

    Everyone gets running statistics of its own, since a forward changes them.
    """
    fixed = {i for i in range(len(arguments)) if i and i % 6 in (5, 0)}
    made = tuple(t.clone() if i in fixed else t.detach().requires_grad_() for i, t in enumerate(arguments))
    return made, tuple(t for i, t in enumerate(made) if i not in fixed)


def _recorded(function: Callable[..., Tensor], arguments: Results) -> Callable[[], Results]:
    """The forward of a training step: the graph is recorded. Running statistics are results too."""
    made, _ = _leaves(arguments)
    statistics = [t for i, t in enumerate(made) if i and i % 6 in (5, 0)]

    def forward() -> Results:
        return function(*made), *statistics

    return forward


def _step(function: Callable[..., Tensor], some: Set, arguments: Results) -> Callable[[], Results]:
    made, leaves = _leaves(arguments)

    def step() -> Results:
        y = function(*made)
        return y, *torch.autograd.grad(y, leaves, some.dy)

    return step


def _chain_arguments(some: Set) -> Results:
    return some.dy, some.a, some.parameters.norm_weight, some.mean.to(some.a.dtype), some.rstd.to(some.a.dtype)


def _input_grad_arguments(some: Set) -> Results:
    dy, a, *rest = _chain_arguments(some)
    return dy, a, some.x, some.parameters.weight, *rest


_FORWARD = ("y", "running_mean", "running_var")
_GRADS = ("dx", "dw", "db", "dgamma", "dbeta")
_LAYER_GRADS = ("dx", *(f"{block} {name}" for block in ("depthwise", "pointwise") for name in _GRADS[1:]))


def _weight_grad_arguments(some: Set) -> Results:
    return some.da, some.x, some.parameters.weight


def _normalize_arguments(some: Set) -> Results:
    p = some.parameters
    return some.a, some.x, p.norm_weight, p.norm_bias, some.mean.to(some.a.dtype), some.var.to(some.a.dtype)


#: Passes: eval x, y. train x, a; a, x, y (the pointwise block: without the second x). Input gradient dy, a; dy, a, dx. Weight
#: gradient dy, a, x. Step: train, reduce (dy, a), dx, weight gradient. layer_eval x, y: nothing between the blocks need be
#: stored. layer_step 9 forward, 16 backward and 1 to rebuild z (with C_out = C; roofline.py counts the same for a model).
OPERATORS = {
    "depthwise_conv": Operator(_convolution, lambda s: (s.x, *s.parameters[:2]), ("y",), (1, 1), 1, 0),
    "depthwise_eval": Operator(_block, _flat, ("y",), (1, 1), 1, 1),
    "depthwise_train": Operator(_train, _flat, _FORWARD, (2, 3), 1, 2, training=True),
    "depthwise_input_grad": Operator(_input_grad, _input_grad_arguments, ("dx", "dgamma", "dbeta"), (1, 4), 1, 2),
    "depthwise_weight_grad": Operator(_weight_grad, _weight_grad_arguments, ("dw", "db"), (1, 2), 1, 1),
    "depthwise_step": Operator(_train, _flat, ("y", *_GRADS), (4, 9), 3, 5, training=True, step=True),
    "pointwise_eval": Operator(_block, _flat, ("y",), (1, 1), 1, 1),
    "pointwise_train": Operator(_train, _flat, _FORWARD, (1, 3), 1, 2, training=True),
    "pointwise_input_grad": Operator(_input_grad, _input_grad_arguments, ("dx", "dgamma", "dbeta"), (1, 4), 1, 2),
    "pointwise_weight_grad": Operator(_weight_grad, _weight_grad_arguments, ("dw", "db"), (1, 2), 1, 1),
    "pointwise_step": Operator(_train, _flat, ("y", *_GRADS), (3, 9), 3, 5, training=True, step=True),
    "normalize": Operator(_normalize, _normalize_arguments, ("y",), (1, 2), 0, 1),
    "norm_backward": Operator(_norm_backward, _chain_arguments, ("dbeta", "dgamma"), (0, 2), 0, 1),
    "layer_eval": Operator(_layer, _flat, ("y",), (1, 1), 1, 1),
    "layer_step": Operator(_train_layer, _flat, ("y", *_LAYER_GRADS), (17, 9), 3, 5, training=True, step=True),
}

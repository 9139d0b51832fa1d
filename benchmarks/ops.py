# SPDX-License-Identifier: MIT
"""The operators: their inputs, eager PyTorch's way, ours, and the bytes and FLOPs that no implementation can avoid.

A row starts and ends at the same tensors for every implementation and device. The table OPERATORS names them, and
docs/performance.md is generated from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import convmixer_kernels as ck
from benchmarks.cases import DTYPES, LAYOUTS, OpCase
from convmixer_kernels import dispatch
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
class Inputs:
    """What one call starts from; a case rotates several. The statistics are those of a, so that a backward is a real one."""

    x: Tensor  # (N, C, H, W)
    a: Tensor  # (N, C_out, H, W), the convolution's output
    dy: Tensor  # (N, C_out, H, W)
    da: Tensor  # (N, C_out, H, W), what eager PyTorch has stored when the weight gradient starts
    mean: Tensor  # (C_out,) of gelu(a)
    var: Tensor  # (C_out,)
    blocks: tuple[Parameters, ...]  # the depthwise one, the pointwise one, or both
    dilation: int = 1  # of a convolution alone

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

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        activations = (function(t) for t in (self.x, self.a, self.dy, self.da, self.mean, self.var))
        return Inputs(*activations, tuple(Parameters(*map(function, block)) for block in self.blocks), self.dilation)

    def double(self) -> Inputs:
        """The same numbers in float64; da is derived again."""
        wide = self.map(Tensor.double)
        wide.da = _da(wide)
        return wide

    def channels(self, kept: Tensor) -> Inputs:
        """Only the channels `kept`; valid if no channel depends on another (no pointwise block)."""
        return self.map(lambda t: t[kept] if t.dim() == 1 or t.shape[1] == 1 else t[:, kept])

    def in_layout(self, layout: str) -> Inputs:
        """Weights keep theirs: our kernels read one, and eager takes any and converts if oneDNN needs another."""

        def convert(t: Tensor) -> Tensor:
            activation = t.dim() == 4 and t.shape[1] > 1 and t.shape[2:].numel() > 1
            return t.contiguous(memory_format=LAYOUTS[layout]) if activation else t

        return self.map(convert)


def make_inputs(case: OpCase, device: torch.device, count: int) -> list[Inputs]:
    """`count` sets of random activations in the case's dtype and layout, and one set of parameters that they share."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, (n, c, h, w) = DTYPES[case.dtype], case.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def block(weight: Tensor) -> Parameters:
        out = len(weight)
        vectors = (normal(out), normal(out), normal(out), normal(out), normal(out).abs() + 0.5)
        return Parameters(*(t.to(dtype) for t in (weight, *vectors)))

    def one(blocks: Sequence[Parameters]) -> Inputs:
        x, a, dy = (normal(n, channels, h, w).to(dtype) for channels in (c, case.out, case.out))
        var, mean = torch.var_mean(F.gelu(a.double()), (0, 2, 3), correction=0)
        inputs = Inputs(x, a, dy, a, mean.float(), var.float(), tuple(blocks), case.dilation)
        if case.op.endswith("weight_grad"):
            inputs.da = _da(inputs).to(dtype)
        return inputs.in_layout(case.layout)

    blocks = []
    if case.has_depthwise or not case.has_pointwise:
        height, width = case.kernel_size
        blocks.append(block(normal(c, 1, height, width) / (height * width) ** 0.5))
    if case.has_pointwise:
        blocks.append(block(normal(case.out, c, 1, 1) / c**0.5))
    return [one(blocks) for _ in range(count)]


def _da(inputs: Inputs) -> Tensor:
    """The gradient of the convolution's output, by eager PyTorch, float32 at least."""
    wide = torch.promote_types(inputs.a.dtype, torch.float32)
    a, dy, gamma = inputs.a.to(wide), inputs.dy.to(wide), inputs.parameters.norm_weight.to(wide)
    return _activation_chain(dy, a, gamma, inputs.mean.to(wide), inputs.rstd.to(wide))[0]


# Eager PyTorch: also what torch.compile compiles and, in float64, the truth.


def _convolution(x: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1) -> Tensor:
    padding = tuple(dilation * (k // 2) for k in weight.shape[2:])
    groups = x.shape[1] // weight.shape[1]
    return eager_convolution(x, weight, bias, groups=groups, padding=padding, dilation=(dilation, dilation))


def _blocks(x: Tensor, *tensors: Tensor, training: bool = False) -> Tensor:
    """One block or two, of six tensors each."""
    for start in range(0, len(tensors), 6):
        weight, bias, norm_weight, norm_bias, mean, var = tensors[start : start + 6]
        h = F.gelu(_convolution(x, weight, bias))
        y = F.batch_norm(h, mean, var, norm_weight, norm_bias, training, MOMENTUM, EPS)
        x = y + x if weight.shape[1] == 1 else y
    return x


def _train(x: Tensor, *tensors: Tensor) -> Tensor:
    return _blocks(x, *tensors, training=True)


def _batch_norm_backward(
    dy: Tensor, a: Tensor, norm_weight: Tensor, mean: Tensor, rstd: Tensor, mask: list[bool]
) -> Results:
    return torch.ops.aten.native_batch_norm_backward(
        dy, F.gelu(a), norm_weight, None, None, mean, rstd, True, EPS, mask
    )


def _activation_chain(dy: Tensor, a: Tensor, *norm: Tensor) -> Results:
    dh, dgamma, dbeta = _batch_norm_backward(dy, a, *norm, [True, True, True])
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


def _backward(dy: Tensor, a: Tensor, x: Tensor, weight: Tensor, *norm: Tensor) -> Results:
    da, dgamma, dbeta = _activation_chain(dy, a, *norm)
    return *_convolution_backward(da, x, weight, [True, True, True]), dgamma, dbeta


def _input_grad(dy: Tensor, a: Tensor, x: Tensor, weight: Tensor, *norm: Tensor) -> Results:
    da, dgamma, dbeta = _activation_chain(dy, a, *norm)
    dx = _convolution_backward(da, x, weight, [True, False, False])[0]
    return dx + dy if weight.shape[1] == 1 else dx, dgamma, dbeta


def _weight_grad(da: Tensor, x: Tensor, weight: Tensor) -> Results:
    return _convolution_backward(da, x, weight, [False, True, True])[1:]


def _statistics(x: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1) -> Results:
    a = _convolution(x, weight, bias, dilation)
    var, mean = torch.var_mean(F.gelu(a).to(torch.promote_types(a.dtype, torch.float32)), (0, 2, 3), correction=0)
    return a, mean, var


def _normalize(a: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.batch_norm(F.gelu(a), mean, var, norm_weight, norm_bias, False, MOMENTUM, EPS) + x


def _norm_backward(dy: Tensor, a: Tensor, norm_weight: Tensor, mean: Tensor, rstd: Tensor) -> Results:
    _, dgamma, dbeta = _batch_norm_backward(dy, a, norm_weight, mean, rstd, [False, True, True])
    return dbeta, dgamma


def _our_block(inputs: Inputs, training: bool, backend: str, x: Tensor, *tensors: Tensor) -> Tensor:
    if len(tensors) == 3:
        *parameters, dilation = tensors
        return ck.depthwise_conv2d(x, *parameters, dilation=dilation, backend=backend)
    public = ck.mixer_layer
    if len(inputs.blocks) == 1:
        public = ck.depthwise_block if inputs.parameters.weight.shape[1] == 1 else ck.pointwise_block
    return public(x, *tensors, training=training, eps=EPS, momentum=MOMENTUM, backend=backend)


def _our_gradients(
    needs: tuple[bool, bool, bool],  # of x, weight, bias
    whole: bool,  # the reduction of batch norm's backward is in it
    backend: str,
    i: Inputs,
    sums: Results | None,  # of the reduction, if it is not
) -> Results:
    module, p = dispatch.load(backend), i.parameters
    if whole:
        sums = module.norm_backward(i.dy, i.a, "gelu", i.norm)
    if p.weight.shape[1] != 1:
        every = module.pointwise_backward(i.dy, i.a, i.x, p.weight, p.bias, "gelu", i.norm, sums, needs)
        found = tuple(grad for grad, needed in zip(every, needs, strict=True) if needed)
    elif needs[0]:
        found = (module.depthwise_input_grad(i.dy, i.a, p.weight, "gelu", i.norm, sums, True),)
    else:
        found = module.depthwise_weight_grad(i.dy, i.a, i.x, p.weight, p.bias, "gelu", i.norm, sums)
    # sum dy is beta's gradient, sum dy * hhat gamma's
    return (*found, sums[1], sums[0]) if whole else found


def _our_statistics(backend: str, i: Inputs, sums: None) -> Results:
    p, module = i.parameters, dispatch.load(backend)
    primitive = module.depthwise_train if p.weight.shape[1] == 1 else module.pointwise_train
    return primitive(i.x, p.weight, p.bias, "gelu")


def _our_norm_backward(backend: str, i: Inputs, sums: None) -> Results:
    return dispatch.load(backend).norm_backward(i.dy, i.a, "gelu", i.norm)


@dataclass(frozen=True)
class Operator:
    """A row's contents: `function(*arguments(inputs))` is eager PyTorch's way."""

    contains: str  # for the table in docs/performance.md
    function: Callable[..., Tensor | Results]
    arguments: Callable[[Inputs], Results]
    outputs: tuple[str, ...]
    #: activation-sized tensors read or written: with C channels (x, dx, z), and with C_out (a, dy, y)
    passes: tuple[int, int]
    convolutions: int  # of each block
    activations: int  # evaluations of erf an element, for gelu, its derivative or both, of each block
    #: of a backend's name, the inputs and the result of the reduction; None: ours is the public operator
    primitives: Callable[..., Tensor | Results] | None = None
    reduced: bool = False  # ours starts at the result of the reduction, which is not timed
    training: bool = False
    step: bool = False
    part: bool = False  # one kernel of ours; eager PyTorch has no call of the same contents

    def call(self, inputs: Inputs, function: Callable[..., Tensor | Results] | None = None) -> Callable[[], Results]:
        """What is timed, for eager PyTorch or what torch.compile made of `function`."""
        function = self.function if function is None else function
        arguments = self.arguments(inputs)
        if self.training:
            return _recorded(function, arguments, inputs.dy if self.step else None)
        return lambda: _tuple(function(*arguments))

    def ours(self, inputs: Inputs, backend: str) -> Callable[[], Results]:
        """What is timed, for one of our backends."""
        if self.primitives is not None:
            sums = _our_norm_backward(backend, inputs, None) if self.reduced else None
            return lambda: _tuple(self.primitives(backend, inputs, sums))

        def function(x: Tensor, *tensors: Tensor) -> Tensor:
            return _our_block(inputs, self.training, backend, x, *tensors)

        return self.call(inputs, function)


def _tuple(results: Tensor | Results) -> Results:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _recorded(function: Callable[..., Tensor], arguments: Results, dy: Tensor | None) -> Callable[[], Results]:
    """The forward of a training step, which autograd records, and with dy its backward.

    Each caller gets running statistics of its own, since a forward changes them; without dy they are results too.
    """
    statistics = {i for i in range(1, len(arguments)) if i % 6 in (5, 0)}
    made = [
        t if isinstance(t, int) else t.clone() if i in statistics else t.detach().requires_grad_()
        for i, t in enumerate(arguments)
    ]
    leaves = [t for t in made if isinstance(t, Tensor) and t.requires_grad]

    def forward() -> Results:
        return function(*made), *(made[i] for i in sorted(statistics))

    def step() -> Results:
        y = function(*made)
        return y, *torch.autograd.grad(y, leaves, dy)

    return forward if dy is None else step


def _all(inputs: Inputs) -> Results:
    return inputs.x, *(t for block in inputs.blocks for t in block)


def _convolution_arguments(inputs: Inputs) -> Results:
    return inputs.x, *inputs.parameters[:2], inputs.dilation


def _chain_arguments(inputs: Inputs) -> Results:
    mean, rstd = inputs.mean, inputs.rstd
    if not inputs.a.is_cuda:
        # torch's CPU kernel takes statistics in the dtype of the parameters, its CUDA kernel in float32
        mean, rstd = mean.to(inputs.a.dtype), rstd.to(inputs.a.dtype)
    return inputs.dy, inputs.a, inputs.parameters.norm_weight, mean, rstd


def _backward_arguments(inputs: Inputs) -> Results:
    dy, a, *rest = _chain_arguments(inputs)
    return dy, a, inputs.x, inputs.parameters.weight, *rest


_FORWARD = ("y", "running_mean", "running_var")
_GRADS = ("dx", "dw", "db", "dgamma", "dbeta")
_LAYER_GRADS = ("dx", *(f"{block} {name}" for block in ("depthwise", "pointwise") for name in _GRADS[1:]))
_SUMS = ("dgamma", "dbeta")
_X, _WEIGHT, _ALL = (True, False, False), (False, True, True), (True, True, True)


def _of_both_blocks(kind: str, convolution: str, residual: str, second_x: int) -> dict[str, Operator]:
    """The operators that the depthwise and the pointwise block have.

    Args:
        convolution: in words.
        residual: what the text says of it.
        second_x: passes over x or dx that are the residual's.
    """
    return {
        f"{kind}_eval": Operator(
            f"{kind.capitalize()} block in inference: {convolution} + bias, GELU, batch norm by running statistics{residual}.",
            _blocks, _all, ("y",), (1, 1), 1, 1,
        ),
        f"{kind}_train": Operator(
            f"Training forward of the {kind} block: convolution + bias, GELU, batch norm by the batch's statistics{residual}; running "
            "statistics move and autograd records.",
            _train, _all, _FORWARD, (1 + second_x, 3), 1, 2, training=True,
        ),
        f"{kind}_input_grad": Operator(
            "From dy: the reduction of batch norm's backward (dgamma, dbeta), the derivatives of batch norm and GELU, the "
            f"convolution's input gradient{residual.replace('x', 'dy')}. The forward and the weight gradient are not in it.",
            _input_grad, _backward_arguments, ("dx", *_SUMS), (1, 4), 1, 2, partial(_our_gradients, _X, True),
        ),
        f"{kind}_weight_grad": Operator(
            "dw and db of the convolution. Ours starts at dy, a and the result of the reduction, because it never stores da; eager "
            "PyTorch starts at da, which it has stored: that is in eager's favour.",
            _weight_grad, lambda i: (i.da, i.x, i.parameters.weight), ("dw", "db"), (1, 2), 1, 1, partial(_our_gradients, _WEIGHT, False),
            reduced=True,
        ),
        f"{kind}_backward": Operator(
            "From dy: the reduction of batch norm's backward (dgamma, dbeta), the derivatives of batch norm and GELU, the "
            "convolution's gradients dx, dw and db.",
            _backward, _backward_arguments, _GRADS, (2, 6), 2, 3, partial(_our_gradients, _ALL, True),
        ),
        f"{kind}_step": Operator(
            f"{kind}_train and its whole backward: the gradients of x, weight, bias, batch norm's weight and bias.",
            _train, _all, ("y", *_GRADS), (3 + second_x, 9), 3, 5, training=True, step=True,
        ),
    }  # fmt: skip


def _first_kernel(kind: str) -> Operator:
    return Operator(
        f"Ours only, the first kernel of {kind}_train: from x to a and the mean and variance of GELU(a).",
        _statistics, _convolution_arguments, ("a", "mean", "var"), (1, 1), 1, 1, _our_statistics, part=True,
    )  # fmt: skip


#: What each row contains, its bytes (`passes`) and its FLOPs (`convolutions`): the one place that says so.
#: The passes are those that remain if each kernel reads and writes each tensor once. eval: x, y. train: x, a; a, x, y (the pointwise
#: block: without the second x). Input gradient: dy, a; dy, a, dx. Weight gradient: dy, a, x. Step: train, reduction (dy, a), dx, weight
#: gradient. layer_eval: x, y, because nothing between the blocks must be stored. layer_step: 9 forward, 16 backward and 1 to rebuild z.
OPERATORS = {
    "depthwise_conv": Operator(
        "The depthwise convolution + bias alone.",
        _convolution, _convolution_arguments, ("y",), (1, 1), 1, 0,
        lambda backend, i, _: ck.depthwise_conv2d(i.x, *i.parameters[:2], dilation=i.dilation, backend=backend),
    ),
    "depthwise_conv_step": Operator(
        "The depthwise convolution + bias alone, with its whole backward: the gradients of x, weight and bias.",
        _convolution, _convolution_arguments, ("y", "dx", "dw", "db"), (3, 3), 3, 0, training=True, step=True,
    ),
    **_of_both_blocks("depthwise", "convolution", ", + x", 1),
    **_of_both_blocks("pointwise", "1x1 convolution", "", 0),
    "normalize": Operator(
        "From a: GELU, batch norm by given statistics, + x.",
        _normalize, lambda i: (i.a, i.x, *i.parameters[2:4], i.mean.to(i.a.dtype), i.var.to(i.a.dtype)), ("y",), (1, 2), 0, 1,
        lambda backend, i, _: dispatch.load(backend).normalize(i.a, "gelu", i.norm, i.x),
    ),
    "norm_backward": Operator(
        "The reduction of batch norm's backward alone: from dy and a to dgamma and dbeta.",
        _norm_backward, _chain_arguments, _SUMS[::-1], (0, 2), 0, 1, _our_norm_backward,
    ),
    "layer_eval": Operator(
        "Depthwise and pointwise block in inference.", _blocks, _all, ("y",), (1, 1), 1, 1,
    ),
    "layer_step": Operator(
        "Training step of the depthwise and the pointwise block: forward and the gradients of x and of all parameters.",
        _train, _all, ("y", *_LAYER_GRADS), (17, 9), 3, 5, training=True, step=True,
    ),
    "depthwise_train_kernel": _first_kernel("depthwise"),
    "depthwise_input_grad_kernel": Operator(
        "Ours only, depthwise_input_grad without the reduction: from dy, a and the result of norm_backward to dx.",
        lambda *arguments: _input_grad(*arguments)[0], _backward_arguments, ("dx",), (1, 2), 1, 1, partial(_our_gradients, _X, False),
        reduced=True, part=True,
    ),
    "pointwise_train_kernel": _first_kernel("pointwise"),
}  # fmt: skip
# a whole backward of the depthwise block is its input and its weight gradient: it has no call of its own
del OPERATORS["depthwise_backward"]

MODELS = {
    "model_eval": "A whole ConvMixer in inference, without gradients.",
    "model_step": "Forward and backward of a whole ConvMixer: the gradients of all parameters. No optimizer.",
}

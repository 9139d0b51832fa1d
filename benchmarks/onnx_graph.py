# SPDX-License-Identifier: MIT
"""The forward operators and models as ONNX graphs, for the peers that take those (float32, opset 20: the first with Gelu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.cases import OpCase
from benchmarks.console import require
from benchmarks.ops import EPS, Inputs

_OPSET, _IR_VERSION = 20, 10

#: The operators that have an ONNX graph: those of inference.
OPERATORS = ("depthwise_conv", "depthwise_eval", "pointwise_eval", "layer_eval")


class _Graph:
    """Nodes and constants in the order in which they are made; each method returns the name of what it makes."""

    def __init__(self) -> None:
        self.nodes: list[object] = []
        self.constants: list[object] = []

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(require("onnx.helper").make_node(op, list(inputs), [name], **attributes))
        return name

    def constant(self, tensor: Tensor) -> str:
        name = f"c{len(self.constants)}"
        array = tensor.detach().float().contiguous().numpy()
        self.constants.append(require("onnx.numpy_helper").from_array(array, name))
        return name

    def convolution(self, x: str, weight: Tensor, bias: Tensor, groups: int, stride: int = 1) -> str:
        # a strided convolution is a patch embedding: no padding
        k = list(weight.shape[2:])
        pads = [] if stride > 1 else [(n - 1) // 2 for n in k] + [n // 2 for n in k]
        extra = {"pads": pads} if pads else {}
        shared = {"kernel_shape": k, "strides": [stride, stride], "group": groups}
        return self.node("Conv", x, self.constant(weight), self.constant(bias), **shared, **extra)

    def norm(self, x: str, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> str:
        return self.node("BatchNormalization", x, *map(self.constant, (weight, bias, mean, var)), epsilon=eps)

    def serialize(self, output: str, inputs: Sequence[tuple[str, Sequence[int]]], rank: int = 4) -> bytes:
        helper, kind = require("onnx.helper"), require("onnx").TensorProto.FLOAT
        values = [helper.make_tensor_value_info(name, kind, list(shape)) for name, shape in inputs]
        results = [helper.make_tensor_value_info(output, kind, [None] * rank)]
        graph = helper.make_graph(self.nodes, "case", values, results, self.constants)
        opsets = [helper.make_opsetid("", _OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION).SerializeToString()


def operator(case: OpCase, inputs: Inputs) -> bytes:
    """The graph of one of OPERATORS, from "x" to its output."""
    graph, shape = _Graph(), tuple(inputs.x.shape)
    y = "x"
    for p in inputs.blocks:
        depthwise = p.weight.shape[1] == 1
        a = graph.convolution(y, p.weight, p.bias, len(p.weight) if depthwise else 1)
        if case.op == "depthwise_conv":
            return graph.serialize(a, [("x", shape)])
        h = graph.norm(graph.node("Gelu", a), p.norm_weight, p.norm_bias, p.running_mean, p.running_var, EPS)
        y = graph.node("Add", h, y) if depthwise else h
    return graph.serialize(y, [("x", shape)])


def model(reference: nn.Sequential, images: Tensor) -> bytes:
    """The graph of convmixer.reference.ConvMixer in eval mode, from "x", the images (N, 3, H, W), to the logits."""
    graph = _Graph()
    return graph.serialize(_modules(graph, reference, "x"), [("x", tuple(images.shape))], rank=2)


def _modules(graph: _Graph, module: nn.Module, x: str) -> str:
    if isinstance(module, nn.Sequential):
        for child in module:
            x = _modules(graph, child, x)
        return x
    if isinstance(module, nn.Conv2d):
        return graph.convolution(x, module.weight, module.bias, module.groups, module.stride[0])
    if isinstance(module, nn.BatchNorm2d):
        return graph.norm(x, module.weight, module.bias, module.running_mean, module.running_var, module.eps)
    if isinstance(module, nn.GELU):
        return graph.node("Gelu", x)
    if isinstance(module, nn.ReLU):
        return graph.node("Relu", x)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return graph.node("GlobalAveragePool", x)
    if isinstance(module, nn.Flatten):
        return graph.node("Flatten", x)
    if isinstance(module, nn.Linear):
        return graph.node("Gemm", x, graph.constant(module.weight), graph.constant(module.bias), transB=1)
    if hasattr(module, "fn"):
        return graph.node("Add", _modules(graph, module.fn, x), x)
    raise NotImplementedError(f"no ONNX node is known for {type(module).__name__}")


def numpy_input(x: Tensor) -> dict[str, object]:
    """What a graph takes: x contiguous, as a numpy array."""
    return {"x": x.detach().contiguous(memory_format=torch.contiguous_format).numpy()}

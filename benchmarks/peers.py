# SPDX-License-Identifier: MIT
"""Who is measured: each implementation's way to run a case, or the reason why it cannot."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import convmixer_kernels
from benchmarks import models, onnx_graph
from benchmarks.ops import OPERATORS, Set, backend_module
from benchmarks.optional import MissingPackage, require
from benchmarks.shapes import LAYOUTS, Case, ModelCase
from convmixer_kernels import dispatch

Results = tuple[Tensor, ...]
Calls = list[Callable[[], Results]]

EAGER = {"contiguous": "eager NCHW", "channels_last": "eager channels_last"}
#: What torch.compile is told. layout_optimization is what TORCHINDUCTOR_LAYOUT_OPTIMIZATION=0 sets.
COMPILE = {
    "compile": {},
    "compile max-autotune": {"mode": "max-autotune"},
    "compile layout opt. off": {"options": {"layout_optimization": False}},
}
CUDNN = {f"cudnn {mode}": mode for mode in ("auto", "cudnn", "native")}
CLONE = "clone"


def names(device_type: str) -> list[str]:
    """Every implementation for a device type, in the order of the tables: ours by backend first, those that cannot run here too."""
    ours = [f"ours {name}" for name in dispatch.automatic_order(device_type) if name != "reference"]
    others = ["onnxruntime", "openvino"] if device_type == "cpu" else list(CUDNN)
    return [*ours, *EAGER.values(), *COMPILE, *others, CLONE]


#: What exists beside names(), for who asks by name: the definition that the backends are held against, which is not made to be
#: fast, and backends whose emulation or interpreter takes CPU tensors.
EXTRA = tuple(f"ours {name}" for name in dispatch.BACKENDS)


class Absent(RuntimeError):
    """An implementation does not run a case here; the message says why."""


@dataclass
class Prepared:
    """An implementation, ready to be called on each set in turn."""

    calls: Calls
    torch_memory: bool  # whether torch's allocator sees what it allocates
    #: wraps the whole of a timing or check, for settings that are global
    setting: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


@dataclass
class Inputs:
    """What every implementation of a case starts from."""

    case: Case
    device: torch.device
    sets: list[Set]  # of an operator
    reference: nn.Sequential | None = None  # of a model, in the case's dtype
    images: Tensor | None = None  # (N, 3, H, W)
    cotangent: Tensor | None = None  # (N, classes)


def prepare(name: str, inputs: Inputs, compile_all: bool) -> Prepared:
    """`name` on the inputs of a case.

    Raises:
        Absent: it cannot run here, or is not asked to.
    """
    case = inputs.case
    if name.startswith("ours "):
        return _ours(name.removeprefix("ours "), inputs)
    if name in EAGER.values():
        layout = next(key for key, value in EAGER.items() if value == name)
        return Prepared(_eager(inputs, layout), True)
    if name in COMPILE:
        if not case.compiled and not compile_all:
            raise Absent("compiled only for a few cases: a compiler needs 10 to 60 s for each (--compile-all)")
        return Prepared(_compiled(inputs, COMPILE[name]), True)
    if name in CUDNN:
        return _cudnn(CUDNN[name], inputs)
    if name == "onnxruntime":
        return Prepared(_onnxruntime(inputs), False)
    if name == "openvino":
        return Prepared(_openvino(inputs), False)
    assert name == CLONE, name
    if isinstance(case, ModelCase):
        raise Absent("a copy of the images is no bound of a model")
    return Prepared([lambda s=s: (s.x.clone(),) for s in inputs.sets], True)


# ---- eager and compiled PyTorch, ours -------------------------------------------------------------------------------


def _ours(backend: str, inputs: Inputs) -> Prepared:
    module = backend_module(backend)
    if isinstance(inputs.case, ModelCase):
        preset, images = inputs.case.preset, inputs.images
        x, weight = images.new_empty(1, preset.dim, 8, 8), images.new_empty(preset.dim, 1, *[preset.kernel_size] * 2)
        if (reason := module.can_run("depthwise", x, weight)) is not None:
            raise Absent(reason)
        model = models.ours_like(preset, inputs.reference)
        model.to(memory_format=LAYOUTS[inputs.case.layout])
        calls = model_calls(inputs, model, inputs.case.layout)
        return Prepared(calls, True, lambda: convmixer_kernels.use_backend(backend))
    some = inputs.sets[0]
    for block in some.blocks:
        kind = "depthwise" if block.weight.shape[1] == 1 else "pointwise"
        reason = module.can_run(kind, some.x, block.weight)
        if reason is not None:
            raise Absent(reason)
    operator = OPERATORS[inputs.case.op]
    return Prepared([operator.ours(s, backend) for s in inputs.sets], True)


def _eager(inputs: Inputs, layout: str) -> Calls:
    if isinstance(inputs.case, ModelCase):
        model = copy.deepcopy(inputs.reference).to(memory_format=LAYOUTS[layout])
        return model_calls(inputs, model, layout)
    operator = OPERATORS[inputs.case.op]
    sets = inputs.sets if layout == inputs.case.layout else [s.in_layout(layout) for s in inputs.sets]
    return [operator.call(s) for s in sets]


def _compiled(inputs: Inputs, options: dict[str, object]) -> Calls:
    # every case counts towards one function's limit of recompilations otherwise
    torch._dynamo.reset()
    try:
        if isinstance(inputs.case, ModelCase):
            model = copy.deepcopy(inputs.reference).to(memory_format=LAYOUTS[inputs.case.layout])
            calls = model_calls(inputs, model, inputs.case.layout, torch.compile(model, dynamic=False, **options))
        else:
            operator = OPERATORS[inputs.case.op]
            function = torch.compile(operator.function, dynamic=False, **options)
            calls = [operator.call(s, function) for s in inputs.sets]
        calls[0]()
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError, NotImplementedError) as error:
        raise Absent(f"torch.compile: {first_line(error)}") from error
    return calls


def _cudnn(mode: str, inputs: Inputs) -> Prepared:
    if not hasattr(torch.backends.cudnn, "depthwise_kernel"):
        raise Absent(f"torch {torch.__version__} has no torch.backends.cudnn.depthwise_kernel")

    @contextlib.contextmanager
    def setting() -> Iterator[None]:
        before = torch.backends.cudnn.depthwise_kernel
        torch.backends.cudnn.depthwise_kernel = mode
        try:
            yield
        finally:
            torch.backends.cudnn.depthwise_kernel = before

    return Prepared(_eager(inputs, inputs.case.layout), True, setting)


def model_calls(inputs: Inputs, model: nn.Module, layout: str, runs: Callable[[Tensor], Tensor] | None = None) -> Calls:
    """`runs` is the model, or what torch.compile made of it. A step's results: the logits and all gradients."""
    runs = model if runs is None else runs
    images = inputs.images.contiguous(memory_format=LAYOUTS[layout])
    if inputs.case.op == "model_eval":
        model.eval()

        def evaluate() -> Results:
            with torch.no_grad():
                return (runs(images),)

        return [evaluate]
    model.train()
    parameters = list(model.parameters())

    def step() -> Results:
        output = runs(images)
        return output, *torch.autograd.grad(output, parameters, inputs.cotangent)

    return [step]


# ---- engines that take ONNX -------------------------------------------------------------------------------------------


def _graph(inputs: Inputs) -> tuple[bytes, list[dict[str, object]]]:
    """The graph of a case, and its inputs as numpy arrays, for each set."""
    case = inputs.case
    if case.dtype != "float32":
        raise Absent(f"its graph is made for float32 only, not {case.dtype}")
    try:
        if isinstance(case, ModelCase):
            if case.op != "model_eval":
                raise Absent("it has no training step")
            graph = onnx_graph.model(copy.deepcopy(inputs.reference).eval(), inputs.images)
            return graph, [onnx_graph.numpy_input(inputs.images)]
        if case.op not in onnx_graph.OPERATORS:
            raise Absent("it runs inference only")
        arrays = [onnx_graph.numpy_input(s.x) for s in inputs.sets]
        return onnx_graph.operator(case, inputs.sets[0]), arrays
    except MissingPackage as error:
        raise Absent(str(error)) from error


def _onnxruntime(inputs: Inputs) -> Calls:
    graph, arrays = _graph(inputs)
    try:
        runtime, state = require("onnxruntime"), require("onnxruntime.capi.onnxruntime_pybind11_state")
    except MissingPackage as error:
        raise Absent(str(error)) from error
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # its pool would otherwise go on spinning on the cores that the next implementation is timed on
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Fail, NotImplemented, InvalidGraph, ...: its refusals have no base class of their own
    refusals = tuple(c for c in vars(state).values() if isinstance(c, type) and issubclass(c, Exception))
    try:
        session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except refusals as error:
        raise Absent(f"failed: {first_line(error)}") from error
    return [lambda a=a: (torch.from_numpy(session.run(None, a)[0]),) for a in arrays]


def first_line(error: BaseException) -> str:
    """Of an error's message; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _openvino(inputs: Inputs) -> Calls:
    graph, arrays = _graph(inputs)
    try:
        openvino = require("openvino")
    except MissingPackage as error:
        raise Absent(str(error)) from error
    # bfloat16 is its own choice on CPUs that have it
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    request = core.compile_model(core.read_model(graph), "CPU", settings).create_infer_request()

    def call(array: dict[str, object]) -> Results:
        return (torch.from_numpy(request.infer(array, share_inputs=True, share_outputs=True)[0]),)

    return [lambda a=a: call(a) for a in arrays]

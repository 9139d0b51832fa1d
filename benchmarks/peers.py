# SPDX-License-Identifier: MIT
"""The implementations: each one's way to run a case, or the reason why it cannot."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

import convmixer_kernels
from benchmarks import models
from benchmarks.cases import LAYOUTS, Case, ModelCase
from benchmarks.ops import OPERATORS, Inputs, Results
from convmixer_kernels import dispatch
from convmixer_kernels.backends import cuda, cuda_choice

Calls = list[Callable[[], Results]]

EAGER = {"contiguous": "eager NCHW", "channels_last": "eager channels_last"}
#: Arguments of torch.compile. TORCHINDUCTOR_LAYOUT_OPTIMIZATION=0 sets the same option as the last.
COMPILE = {
    "compile": {},
    "compile max-autotune": {"mode": "max-autotune"},
    "compile layout opt. off": {"options": {"layout_optimization": False}},
}
CLONE = "clone"
#: The matrix product of a pointwise block's forward and nothing else.
MATMUL = "matmul"
#: What does only a part of a row's work, so that nobody is much faster.
BOUNDS = (CLONE, MATMUL)
#: The products of ours on a GPU that CONVMIXER_CUDA_GEMM can force: "ours cuda wgmma" is "ours cuda" with that choice.
GEMMS = ("fused", "torch", "wgmma", "layer")


def names(device_type: str) -> list[str]:
    """The implementations of a device type in the order of the tables, ours by backend first; some may not run here."""
    ours = [f"ours {name}" for name in dispatch.automatic_order(device_type) if name != "reference"]
    others = ["onnxruntime", "openvino", CLONE] if device_type == "cpu" else [CLONE, MATMUL]
    return [*ours, *EAGER.values(), *COMPILE, *others]


#: Implementations that run only if named: the reference backend, which is not made to be fast, backends that take CPU tensors in an
#: emulation or interpreter, and forced products.
EXTRA = (*(f"ours {name}" for name in dispatch.BACKENDS), *(f"ours cuda {gemm}" for gemm in GEMMS))


class Absent(RuntimeError):
    """An implementation does not run a case here; the message says why."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@dataclass
class Prepared:
    """An implementation, ready to be called on each set of inputs in turn."""

    calls: Calls
    own_threads: bool = False  # not those of torch and of our kernels
    #: wraps the whole of a timing or check, for settings that are global
    setting: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    model: nn.Module | None = None  # of a model case, if every tensor of it can be checked


@dataclass(eq=False)
class Workload:
    """A case with the tensors that every implementation of it starts from."""

    case: Case
    device: torch.device
    inputs: list[Inputs]  # of an operator
    reference: nn.Sequential | None = None  # of a model, in the case's dtype
    images: Tensor | None = None  # (N, 3, H, W), in the case's dtype and layout
    cotangent: Tensor | None = None  # (N, classes)


def prepare(name: str, workload: Workload, compile_all: bool) -> Prepared:
    """`name` on the inputs of a case.

    Raises:
        Absent: it cannot run here, or is not asked to.
    """
    case = workload.case
    if name.startswith("ours "):
        return _ours(name.removeprefix("ours "), workload)
    if name == CLONE:
        if isinstance(case, ModelCase):
            raise Absent("a copy of the images is no bound of a model")
        return Prepared([lambda i=i: (i.x.clone(),) for i in workload.inputs])
    if name == MATMUL:
        if case.op not in ("pointwise_eval", "pointwise_train", "pointwise_train_kernel"):
            raise Absent("its work is not one product")
        return Prepared([_product(case.layout, inputs) for inputs in workload.inputs])
    if not isinstance(case, ModelCase) and OPERATORS[case.op].part:
        raise Absent("this row is one kernel of ours")
    if name in EAGER.values():
        return eager(workload, next(key for key, value in EAGER.items() if value == name))
    if name in COMPILE:
        if not case.compiled and not compile_all:
            raise Absent("compiled only for a few cases: a compiler needs 10 to 60 s for each (--compile-all)")
        return _compiled(workload, COMPILE[name])
    try:
        calls = {"onnxruntime": _onnxruntime, "openvino": _openvino}[name](workload)
    except ModuleNotFoundError as error:
        raise Absent(f"{error.name} is not installed: pip install '.[bench]'") from error
    return Prepared(calls, own_threads=True)


def _ours(choice: str, workload: Workload) -> Prepared:
    backend, _, gemm = choice.partition(" ")
    module = dispatch.load(backend)
    case = workload.case
    if isinstance(case, ModelCase):
        x, weight = workload.images.new_empty(1, 8, 8, 8), workload.images.new_empty(8, 1, 9, 9)
        if (reason := module.can_run("depthwise", x, weight)) is not None:
            raise Absent(reason)
        model = models.ours_like(workload.reference)
        return _model(workload, model, case.layout, lambda: convmixer_kernels.use_backend(backend))
    for block in workload.inputs[0].blocks:
        kind = "depthwise" if block.weight.shape[1] == 1 else "pointwise"
        if (reason := module.can_run(kind, workload.inputs[0].x, block.weight)) is not None:
            raise Absent(reason)
    calls = [OPERATORS[case.op].ours(inputs, backend) for inputs in workload.inputs]
    return Prepared(calls, setting=lambda: forced_gemm(gemm)) if gemm else Prepared(calls)


@contextlib.contextmanager
def forced_gemm(gemm: str) -> Iterator[None]:
    """Calls of the cuda backend inside `with` run as with CONVMIXER_CUDA_GEMM=gemm."""
    try:
        with mock.patch.object(cuda_choice, "forced_gemm", lambda: gemm):  # noqa: PT008  a mock's own call takes microseconds
            # sizes of workspaces depend on it
            cuda._size.cache_clear()
            yield
    finally:
        cuda._size.cache_clear()


def gemms_of(case: Case, capability: tuple[int, int]) -> tuple[str, ...]:
    """Those of GEMMS that make a difference to a case on a device of this compute capability."""
    if isinstance(case, ModelCase) or not case.op.startswith(("pointwise", "layer_eval")):
        return ()
    c, plane = case.shape[1], case.shape[2] * case.shape[3]
    narrow, near = case.dtype != "float32", case.layout == "contiguous"
    hopper = narrow and capability == (9, 0)
    if case.op == "layer_eval":
        # if the device is too small for the layer in one kernel, "layer" is "fused" once more
        both = ("fused", "torch", "wgmma") if hopper else ("fused", "torch")
        return (*both, "layer") if narrow and near and c <= 256 and max(case.kernel_size) <= 9 else both
    if case.op not in ("pointwise_eval", "pointwise_train", "pointwise_train_kernel"):
        # the weight gradient
        return ("wgmma",) if hopper and near and plane % 64 == 0 and case.op != "pointwise_input_grad" else ()
    aligned = c % 8 == 0 and (not near or plane % 64 == 0)
    return ("fused", "torch", "wgmma") if hopper and aligned else ("fused", "torch")


def eager(workload: Workload, layout: str) -> Prepared:
    """Eager PyTorch with tensors in `layout`."""
    case = workload.case
    if isinstance(case, ModelCase):
        return _model(workload, copy.deepcopy(workload.reference), layout)
    inputs = workload.inputs if layout == case.layout else [each.in_layout(layout) for each in workload.inputs]
    return Prepared([OPERATORS[case.op].call(each) for each in inputs])


def _product(layout: str, inputs: Inputs) -> Callable[[], Results]:
    """torch.matmul of the weight and x as they lie in memory."""
    weight = inputs.parameters.weight.flatten(1)
    if layout == "contiguous":
        x = inputs.x.flatten(2)
        return lambda: (torch.matmul(weight, x),)
    rows = inputs.x.permute(0, 2, 3, 1).flatten(0, 2)
    return lambda: (torch.matmul(rows, weight.t()),)


def _model(
    workload: Workload,
    model: nn.Module,
    layout: str,
    setting: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Prepared:
    model.to(memory_format=LAYOUTS[layout])
    images = workload.images.contiguous(memory_format=LAYOUTS[layout])
    call = models.call(model, images, workload.cotangent, workload.case.training)
    return Prepared([call], setting=setting, model=model)


def _compiled(workload: Workload, options: dict[str, object]) -> Prepared:
    # every case counts towards one function's limit of recompilations otherwise
    torch._dynamo.reset()
    case = workload.case
    try:
        if isinstance(case, ModelCase):
            model = copy.deepcopy(workload.reference).to(memory_format=LAYOUTS[case.layout])
            compiled = torch.compile(model, dynamic=False, **options)
            calls = [models.call(model, workload.images, workload.cotangent, case.training, compiled)]
        else:
            operator = OPERATORS[case.op]
            function = torch.compile(operator.function, dynamic=False, **options)
            calls = [operator.call(inputs, function) for inputs in workload.inputs]
        calls[0]()
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError, NotImplementedError) as error:
        raise Absent(f"torch.compile: {first_line(error)}") from error
    return Prepared(calls)


@functools.lru_cache(maxsize=1)
def _onnx_graph(workload: Workload) -> bytes:
    """The eager implementation as an ONNX graph of opset 20, the first with Gelu; weights are its constants."""
    # it says of each model that there is no torchvision
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    case = workload.case
    if isinstance(case, ModelCase):
        module, x = copy.deepcopy(workload.reference).eval(), workload.images
    else:
        x, *parameters = OPERATORS[case.op].arguments(workload.inputs[0])
        module = _Function(OPERATORS[case.op].function, parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, (x,), dynamo=True, opset_version=20, input_names=["x"], verbose=False, optimize=True
        )
    return program.model_proto.SerializeToString()


class _Function(nn.Module):
    """A function of x with constant parameters."""

    def __init__(self, function: Callable[..., Tensor], parameters: list[Tensor]) -> None:
        super().__init__()
        self._function, self._constants = function, parameters

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x, *self._constants)


def _arrays(workload: Workload) -> list[dict[str, object]]:
    """What an engine takes, for each set of inputs: x contiguous, as a numpy array."""
    case = workload.case
    if case.dtype != "float32":
        raise Absent(f"its graph is made for float32 only, not {case.dtype}")
    if not case.op.endswith("_eval") and case.op != "depthwise_conv":
        raise Absent("it runs inference only")
    tensors = [workload.images] if isinstance(case, ModelCase) else [inputs.x for inputs in workload.inputs]
    return [{"x": x.detach().contiguous(memory_format=torch.contiguous_format).numpy()} for x in tensors]


def _onnxruntime(workload: Workload) -> Calls:
    arrays = _arrays(workload)
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # its pool would otherwise go on spinning on the cores that the next implementation is timed on
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Fail, NotImplemented, InvalidGraph, ...: its refusals have no base class of their own
    refusals = tuple(c for c in vars(state).values() if isinstance(c, type) and issubclass(c, Exception))
    try:
        session = onnxruntime.InferenceSession(_onnx_graph(workload), options, providers=["CPUExecutionProvider"])
    except refusals as error:
        raise Absent(f"failed: {first_line(error)}") from error
    return [lambda a=a: (torch.from_numpy(session.run(None, a)[0]),) for a in arrays]


def _openvino(workload: Workload) -> Calls:
    arrays = _arrays(workload)
    import openvino

    # bfloat16 is its own choice on CPUs that have it
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    request = core.compile_model(core.read_model(_onnx_graph(workload)), "CPU", settings).create_infer_request()

    def call(array: dict[str, object]) -> Results:
        return (torch.from_numpy(request.infer(array, share_inputs=True, share_outputs=True)[0]),)

    return [lambda a=a: call(a) for a in arrays]

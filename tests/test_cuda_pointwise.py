# SPDX-License-Identifier: MIT
"""The pointwise block in one kernel (csrc/cuda/pointwise_gemm.cu): emulated everywhere, and on a GPU if there is one.

test_cuda.py runs the same block as torch's GEMM and passes of ours. Tiles are 128 x 128 results (16-bit: if enough of
them keep the GPU busy, 4 in the emulation) or 64 x 64. A stage is 32 values of C_in; there are three.
"""

from __future__ import annotations

import pytest
import torch
from helpers import Case, check_case, use_cuda
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import convmixer_kernels as ck
from convmixer_kernels.backends import cuda, cuda_choice, reference, torch_gemm
from convmixer_kernels.primitives import Norm, Update, update_running_statistics
from convmixer_kernels.testing import relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("contiguous", "channels_last")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device of a test's tensors: "cpu" for the emulated kernels, or "cuda"; the GEMM is ours."""
    return use_cuda(monkeypatch, request.param == "emulated", gemm="fused")


def _case(shape, channels_out, **options) -> Case:
    return Case("pointwise_block", shape, (1, 1), channels_out, **options)


CASES = [
    # 16-byte pieces: K below, equal to and above a stage and all stages; channels and pixels around both tiles
    *(
        _case((n, c, 8, w), out, dtype=torch.bfloat16, memory_format=f)
        for f in FORMATS
        for n, c, w, out in (
            (1, 8, 8, 64),
            (3, 32, 5, 72),
            (1, 104, 7, 56),
            (4, 40, 8, 136),
            (5, 72, 7, 248),
            (4, 136, 8, 256),
        )
    ),
    # values one by one: odd channels, odd planes, planes smaller than a piece, one pixel an image
    *(
        _case(shape, out, dtype=torch.float16, memory_format=f)
        for f in FORMATS
        for shape, out in (((3, 5, 7, 7), 11), ((2, 33, 3, 11), 65), ((23, 8, 2, 3), 64), ((70, 9, 1, 1), 16))
    ),
    # channels_last with aligned inputs and results that are not
    _case((1, 16, 5, 5), 12, dtype=torch.bfloat16, memory_format="channels_last"),
    # float32: one tile, four, K of less and more than the stages
    *(
        _case(shape, out, memory_format=f)
        for f in FORMATS
        for shape, out in (
            ((1, 8, 8, 16), 128),
            ((2, 7, 8, 8), 127),
            ((3, 41, 7, 7), 132),
            ((5, 3, 5, 5), 129),
            ((17, 2, 1, 3), 4),
            ((130, 9, 1, 1), 8),
        )
    ),
    # eval, activations, tensors that may be None, parameters of another dtype
    *(_case((2, 16, 8, 9), 24, dtype=d, training=False, memory_format=f) for d in DTYPES for f in FORMATS),
    *(
        _case((2, 8, 8, 5), 16, dtype=d, activation=a, training=t)
        for d in DTYPES[:2]
        for a in ("relu", "gelu_tanh", "identity")
        for t in (True, False)
    ),
    _case((2, 8, 8, 5), 16, dtype=torch.bfloat16, absent=("bias", "norm_weight", "norm_bias")),
    _case((2, 8, 8, 5), 16, dtype=torch.float16, absent=("norm_bias", "running_mean", "running_var")),
    _case((2, 8, 8, 5), 16, dtype=torch.bfloat16, parameter_dtype=torch.float32),
    _case((2, 8, 8, 5), 16, dtype=torch.float16, parameter_dtype=torch.float32, memory_format="channels_last"),
    _case((2, 8, 8, 5), 16, dtype=torch.bfloat16, memory_format="sliced"),
    _case((2, 8, 8, 5), 16, memory_format="expanded"),
    *(
        Case("mixer_layer", (2, 8, 8, 9), (5, 5), dtype=dtype, memory_format=f, training=t)
        for dtype, f, t in (
            (torch.float32, "contiguous", True),
            (torch.bfloat16, "channels_last", True),
            (torch.bfloat16, "contiguous", True),
            (torch.bfloat16, "contiguous", False),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(case, device):
    check_case(case, "cuda", device=device, pool=64 if device == "cuda" else 1)


#: 128 x 128 tiles, stages of 64 values of C_in, two warp groups in turns: one tile and five of two blocks; images of 64
#: and of more pixels, a last tile of one image
WGMMA_CASES = [
    _case(shape, out, dtype=dtype, memory_format=f, training=t)
    for f in FORMATS
    for dtype, t, shape, out in (
        (torch.bfloat16, True, (1, 8, 8, 8), 16),
        (torch.bfloat16, True, (5, 72, 8, 8), 136),
        (torch.float16, True, (2, 328, 8, 16), 128),
        (torch.bfloat16, False, (5, 64, 16, 8), 144),
        (torch.float16, False, (3, 136, 8, 8), 24),
    )
] + [_case((3, 40, 5, 7), 20, dtype=torch.bfloat16, memory_format="channels_last")]


@pytest.fixture
def wgmma(device, monkeypatch):
    """Like `device`, with sm_90a's instructions."""
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"wgmma needs sm_90, got {torch.cuda.get_device_capability()}")
    monkeypatch.setattr(cuda_choice, "forced_gemm", lambda: "wgmma")
    return device


@pytest.mark.parametrize("case", WGMMA_CASES, ids=str)
def test_wgmma(case, wgmma):
    check_case(case, "cuda", device=wgmma, pool=64 if wgmma == "cuda" else 1)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("processors", [1, 2])
@pytest.mark.parametrize("steps", [4, 5, 6, 12, 26])
def test_wgmma_groups_take_turns(steps, processors, memory_format, wgmma, monkeypatch):
    """Both warp groups have several tiles of more stages than there are: no group takes the other's stage for its own."""
    monkeypatch.setenv("EMU_PROCESSORS", str(processors))
    # on a GPU more than two tiles a multiprocessor, as here
    images, size = (5, (8, 16)) if wgmma == "cpu" else (40, (32, 32))
    x, weight, bias, norm = _inputs((images, 64 * steps, *size), 256, torch.bfloat16, memory_format, wgmma)
    wide = Norm(*(t.double() for t in norm[:4]), norm.eps)
    exact = reference.pointwise_eval(x.double(), weight.double(), bias.double(), "gelu", wide)
    for order in ("0", "1"):
        monkeypatch.setenv("EMU_ORDER", order)
        y = cuda.pointwise_eval(x, weight, bias, "gelu", norm)
        assert relative_error(y, exact) < 2**-8


@pytest.mark.parametrize("memory_format", FORMATS)
def test_wgmma_agrees_with_mma(memory_format, wgmma, monkeypatch):
    """Both add 16 products at a time to a float32 sum: only the rounding of those sums differs."""
    x, weight, bias, norm = _inputs((5, 136, 8, 16), 200, torch.bfloat16, memory_format, wgmma)
    ours = []
    for kind in ("wgmma", "fused"):
        monkeypatch.setattr(cuda_choice, "forced_gemm", lambda kind=kind: kind)
        train = cuda.pointwise_train(x, weight, bias, "gelu")
        ours.append([cuda.pointwise_eval(x, weight, bias, "gelu", norm), *train])
    for first, second in zip(*ours, strict=True):
        assert relative_error(first, second.double()) < 2**-8
    if wgmma == "cpu":
        monkeypatch.setattr(cuda_choice, "forced_gemm", lambda: "wgmma")
        for order in ("1", "7"):
            monkeypatch.setenv("EMU_ORDER", order)
            train = cuda.pointwise_train(x, weight, bias, "gelu")
            for first, second in zip(
                (cuda.pointwise_eval(x, weight, bias, "gelu", norm), *train), ours[0], strict=True
            ):
                assert torch.equal(first, second)


# The primitives.


def _formatted(t: Tensor, memory_format: str) -> Tensor:
    return t.contiguous(memory_format=getattr(torch, memory_format + "_format" * (memory_format == "contiguous")))


def _inputs(shape, c_out, dtype, memory_format, device):
    x = _formatted(torch.randn(shape), memory_format).to(dtype).to(device)
    weight = (torch.randn(c_out, shape[1], 1, 1) / shape[1] ** 0.5).to(dtype).to(device)
    vectors = [torch.randn(c_out, device=device) for _ in range(4)]
    return x, weight, vectors[3], Norm(vectors[0], vectors[1].abs() + 0.5, vectors[2], vectors[0], 1e-5)


SHAPES = [((5, 40, 8, 7), 136), ((3, 9, 7, 7), 70)]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, c_out", SHAPES, ids=str)
def test_statistics(shape, c_out, dtype, memory_format, device):
    """Mean, variance and running statistics are within 1e-6 of those that float64 computes from the stored values."""
    x, weight, bias, _ = _inputs(shape, c_out, dtype, memory_format, device)
    bias = bias + 3
    running = torch.randn(c_out, device=device), torch.rand(c_out, device=device)
    expected = [t.double() for t in running]
    a, mean, var = cuda.pointwise_train(x, weight, bias, "gelu")
    count = a.numel() // c_out
    cuda.normalize(a, "gelu", Norm(mean, var, None, None, 1e-5), None, (Update(*running, mean, var, count, 0.1),))
    exact_var, exact_mean = torch.var_mean(torch.nn.functional.gelu(a.double()), dim=(0, 2, 3), correction=0)
    update_running_statistics(Update(*expected, exact_mean, exact_var, count, 0.1))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-5  # the 16-bit gelu is good to 1e-6 absolute
    for ours, exact in zip((mean, var, *running), (exact_mean, exact_var, *expected), strict=True):
        assert relative_error(ours, exact) < tolerance


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_paths_agree(dtype, memory_format, device):
    """At addresses off 16 bytes values are copied one by one, in tiles of another size: y is the same to the last bit."""
    x, weight, bias, norm = _inputs((5, 40, 8, 7), 136, dtype, memory_format, device)
    expected = cuda.pointwise_eval(x, weight, bias, "gelu", norm)
    moved = torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:].as_strided(x.shape, x.stride()).copy_(x)
    assert moved.data_ptr() % 16 != 0
    assert torch.equal(cuda.pointwise_eval(moved, weight, bias, "gelu", norm), expected)
    off = torch.empty(weight.numel() + 1, dtype=dtype, device=device)[1:].view(weight.shape).copy_(weight)
    assert torch.equal(cuda.pointwise_eval(x, off, bias, "gelu", norm), expected)
    # one image at a time: fewer tiles
    images = [cuda.pointwise_eval(_formatted(image, memory_format), weight, bias, "gelu", norm) for image in x.split(1)]
    assert torch.equal(torch.cat(images), expected)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(dtype, memory_format, device, monkeypatch):
    for shape, c_out in SHAPES:
        x, weight, bias, norm = _inputs(shape, c_out, dtype, memory_format, device)

        def everything(x=x, weight=weight, bias=bias, norm=norm) -> list[Tensor]:
            train = cuda.pointwise_train(x, weight, bias, "gelu")
            return [cuda.pointwise_eval(x, weight, bias, "gelu", norm), *train]

        expected = everything()
        for order in ("1", "7"):
            monkeypatch.setenv("EMU_ORDER", order)
            for first, second in zip(everything(), expected, strict=True):
                assert torch.equal(first, second)
        monkeypatch.delenv("EMU_ORDER")


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "gelu_tanh"])
def test_non_finite_values_go_through(activation, dtype, memory_format, device):
    """A NaN or infinity reaches all channels of its pixel and no other pixel."""
    x, weight, bias, norm = _inputs((2, 8, 5, 8), 16, dtype, memory_format, device)
    x[0, 3, 1, 2], x[1, 0, 4, 7] = float("nan"), float("nan")
    weight[5] = 0
    bias[5] = float("inf") if activation in ("identity", "relu") else 1.0
    ours = cuda.pointwise_eval(x, weight, bias, activation, norm)
    expected = reference.pointwise_eval(x, weight, bias, activation, norm)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.isinf(), expected.isinf())
    assert ours.isnan().any(dim=1).sum() == 2


def test_an_infinite_gelu_stays_infinite(device):
    for dtype in DTYPES:
        x, weight, bias, norm = _inputs((1, 8, 4, 8), 8, dtype, "contiguous", device)
        bias[2] = float("inf")
        y = cuda.pointwise_eval(x, weight, bias, "gelu", norm)
        assert y[0, 2].isinf().all()
        assert y[0, :2].isfinite().all()


# Which kernels run: launches, the choice, memory.


def _block(kind: str, memory_format: str = "contiguous"):
    """x, the operator's tensors and a call of it."""
    options = {"dtype": torch.bfloat16}
    x = _formatted(torch.randn(2, 8, 8, 8, **options), memory_format).requires_grad_()
    depthwise = [torch.randn(shape, **options, requires_grad=True) for shape in ((8, 1, 9, 9), (8,), (8,), (8,))]
    pointwise = [torch.randn(shape, **options, requires_grad=True) for shape in ((8, 8, 1, 1), (8,), (8,), (8,))]
    running = [torch.zeros(8), torch.ones(8)]
    tensors = {
        "depthwise_block": (*depthwise, *running),
        "pointwise_block": (*pointwise, *running),
        "mixer_layer": (*depthwise, *running, *pointwise, *(t.clone() for t in running)),
    }[kind]
    return x, lambda training: getattr(ck, kind)(x, *tensors, training=training, backend="cuda")


@pytest.fixture
def launches(monkeypatch):
    """A function that counts the native launches of a call, under emulation."""
    use_cuda(monkeypatch, gemm="fused")
    module = cuda._native().module

    def count(call) -> tuple[int, Tensor | None]:
        before = module.launches()
        result = call()
        return module.launches() - before, result

    return count


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "kind, evaluation, forward, backward",
    [
        ("depthwise_block", 1, 3, 5),  # backward: reduce, finish, dx, dw, finish
        ("pointwise_block", 1, 3, 4),  # backward: reduce, finish, da, finish; dx and dw are torch's GEMMs
        ("mixer_layer", 2, 6, 10),  # and z
    ],
)
def test_launch_counts(kind, evaluation, forward, backward, memory_format, launches):
    _, call = _block(kind, memory_format)
    with torch.no_grad():
        assert launches(lambda: call(False))[0] == evaluation
    count, y = launches(lambda: call(True))
    assert count == forward
    assert launches(lambda: y.backward(torch.randn_like(y)))[0] == backward


@pytest.mark.parametrize("memory_format", FORMATS)
def test_mixer_layer_saves_three_activations(memory_format, launches):
    x, call = _block("mixer_layer", memory_format)
    storages = set()

    def pack(t: Tensor) -> Tensor:
        if t.numel() == x.numel():
            storages.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(True)
    assert len(storages) == 3
    assert x.untyped_storage().data_ptr() in storages


_ALLOCATIONS = {"aten.empty", "aten.empty_like", "aten.new_empty"}


class _Seen(TorchDispatchMode):
    """Records the torch operations that make or take tensors of at least `size` values."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and t.numel() >= self.size for t in (*args, result)):
            self.names.add(str(func.overloadpacket))
        return result


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_torch_operation_touches_an_activation(dtype, memory_format, launches):
    x, weight, bias, norm = _inputs((3, 16, 8, 8), 24, dtype, memory_format, "cpu")
    with _Seen(3 * 16 * 64) as seen:
        cuda.pointwise_eval(x, weight.float(), bias, "gelu", norm)
        a, mean, var = cuda.pointwise_train(x, weight, bias, "gelu")
        cuda.normalize(a, "gelu", norm._replace(mean=mean, var=var), None)
    assert seen.names <= _ALLOCATIONS
    # the backward: views of dy, a and x, and the two products
    with _Seen(3 * 16 * 64) as seen:
        sums = cuda.norm_backward(a, a, "gelu", norm)
        cuda.pointwise_backward(a, a, x, weight, bias, "gelu", norm, sums, (True, True, True))
    views = {"aten.view", "aten._unsafe_view", "aten.permute", "aten.t", "aten.transpose", "aten.expand", "aten.slice"}
    # on the CPU _to_copy widens the operands of dw
    assert seen.names <= _ALLOCATIONS | {"aten.mm", "aten.bmm", "aten.baddbmm", "aten._to_copy", *views}


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_training_step_is_captured_in_a_graph(memory_format, monkeypatch):
    """Forward and backward of mixer_layer never synchronise and allocate by the caching allocator only."""
    monkeypatch.setattr(cuda_choice, "forced_gemm", lambda: "fused")
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    x = _formatted(torch.randn(2, 16, 16, 16, **options), memory_format).requires_grad_()
    shapes = ((16, 1, 9, 9), (16,), (16,), (16,), (16, 16, 1, 1), (16,), (16,), (16,))
    parameters = [torch.randn(shape, **options, requires_grad=True) for shape in shapes]
    running = [f(16, device="cuda") for f in (torch.zeros, torch.ones, torch.zeros, torch.ones)]
    dy = torch.randn_like(x)

    def step() -> list[Tensor]:
        y = ck.mixer_layer(
            x, *parameters[:4], *running[:2], *parameters[4:], *running[2:], training=True, backend="cuda"
        )
        return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        graph.replay()
    torch.cuda.synchronize()
    for ours, eager in zip(captured, expected, strict=True):
        assert torch.equal(ours, eager)


def test_the_table_chooses():
    # our kernel saves passes over the result, torch's GEMM is the faster product: a limit on C_in
    h100, a100 = (cuda_choice.most_fused_channels(c, True, 2) for c in ((9, 0), (8, 0)))
    assert 256 < h100 < 768 < 1536 < a100
    assert cuda_choice.most_fused_channels((9, 0), True, 1) == pytest.approx(h100 / 2)
    # as measured: faster than torch's GEMM and a pass up to the widest of the published models
    assert cuda_choice.most_fused_channels((9, 0), True, 1, wgmma=True) > 1536
    assert cuda_choice.most_fused_channels((12, 1), True, 2) == cuda_choice.most_fused_channels((12, 0), True, 2)
    for capability, rates in cuda_choice._RATES.items():
        for narrow, rate in zip((True, False), rates, strict=True):
            assert rate.mma < rate.torch
            # at the limit both are equal: one product more slowly, or one and two passes
            c, size = cuda_choice.most_fused_channels(capability, narrow, 2), 2 if narrow else 4
            assert 2 * c / rate.mma == pytest.approx(2 * c / rate.torch + 2 * size / rate.memory)


class _OnGpu:
    """The attributes of a tensor that choose_kernel reads."""

    is_cuda = True

    def __init__(self, shape, dtype=torch.bfloat16, memory_format="contiguous") -> None:
        self.shape, self.dtype, self.memory_format = shape, dtype, memory_format

    def is_contiguous(self) -> bool:
        return self.memory_format == "contiguous"

    def get_device(self) -> int:
        return 0


@pytest.mark.parametrize(
    "x, passes, hopper, expected",
    [
        (_OnGpu((64, 1536, 32, 32)), 2, True, "wgmma"),
        (_OnGpu((64, 1536, 32, 32)), 1, True, "wgmma"),
        (_OnGpu((64, 16384, 32, 32)), 2, True, "torch"),
        (_OnGpu((64, 256, 32, 32)), 0, True, "torch"),
        # a build or a shape without sm_90a's instructions
        (_OnGpu((64, 256, 32, 32)), 2, False, "mma"),
        (_OnGpu((64, 1536, 32, 32)), 2, False, "torch"),
        (_OnGpu((64, 384, 32, 32), memory_format="channels_last"), 2, False, "mma"),
        # torch's GEMM adds the bias of rows: one pass less to save
        (_OnGpu((64, 384, 32, 32), memory_format="channels_last"), 1, False, "torch"),
        # operands that are not 16-byte aligned
        (_OnGpu((64, 256, 7, 7)), 2, False, "torch"),
        (_OnGpu((64, 256, 7, 7), memory_format="channels_last"), 2, False, "mma"),
        (_OnGpu((64, 250, 8, 8)), 2, False, "torch"),
        (_OnGpu((64, 128, 7, 7), torch.float32), 2, True, "mma"),
        (_OnGpu((64, 256, 32, 32), torch.float32), 2, True, "torch"),
    ],
)
def test_what_the_table_chooses_on_an_h100(x, passes, hopper, expected, monkeypatch):
    monkeypatch.setattr(cuda_choice, "forced_gemm", lambda: None)
    monkeypatch.setattr(cuda_choice, "_capability", lambda device: (9, 0))
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert cuda_choice.choose_kernel(x, passes, lambda: hopper) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_product_and_bias_are_rounded_once(dtype, memory_format, training, monkeypatch):
    """By torch's GEMM too: rounded twice, relu flips where the two cancel, and gradients are up to 30 times as far off as eager's."""
    use_cuda(monkeypatch, gemm="torch")
    shape, options = (4, 96, 17, 17), {"activation": "relu", "training": training}
    check_case(_case(shape, 101, dtype=dtype, memory_format=memory_format, **options), "cuda")


def test_passes_of_a_bias():
    """Rows take it in the product's epilogue; contiguous images need it as the product's third operand."""
    x, bias = torch.empty(2, 4, 3, 3), torch.empty(4)
    assert torch_gemm.bias_passes(x, None) == 0
    assert torch_gemm.bias_passes(x, bias) == 2
    assert torch_gemm.bias_passes(x.contiguous(memory_format=torch.channels_last), bias) == 0


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("tf32", True), ("ieee", False), ("none", False)],
)
def test_tf32_is_as_torchs_convolutions_have_it(setting, expected, monkeypatch):
    monkeypatch.setattr(cuda_choice, "forced_gemm", lambda: None)
    monkeypatch.setattr(cuda_choice, "_capability", lambda device: (9, 0))
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = setting
    try:
        x = _OnGpu((64, 64, 8, 8), torch.float32)
        assert torch_gemm.takes_tf32(x) is expected
        assert not torch_gemm.takes_tf32(_OnGpu((64, 64, 8, 8)))
        assert not torch_gemm.takes_tf32(torch.empty(1, 8, 8, 8))
        assert cuda_choice.choose_kernel(x, 2, lambda: False) == ("torch" if expected else "mma")
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_tf32_on_a_gpu_is_as_eagers(training, memory_format):
    """This is torch's default, which other tests switch off."""
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert torch_gemm.takes_tf32(torch.empty(1, device="cuda"))
        check_case(_case((5, 264, 16, 16), 136, memory_format=memory_format, training=training), "cuda", device="cuda")


@pytest.mark.parametrize("memory_format", FORMATS)
def test_tf32_products_are_torchs_convolutions(memory_format, monkeypatch):
    """Tests the three products on the CPU, without tf32, in x's memory format."""
    x, weight, *_ = _inputs((3, 20, 5, 7), 12, torch.float32, memory_format, "cpu")
    da = _formatted(torch.randn(3, 12, 5, 7), memory_format)
    rows = torch_gemm.is_rows(da, x)
    expected = [
        torch_gemm.convolution(x, weight, None),
        torch_gemm.input_grad(da, weight, rows),
        torch_gemm.weight_grad(da, x, rows),
    ]
    monkeypatch.setattr(torch_gemm, "takes_tf32", lambda t: True)
    assert torch_gemm.bias_passes(x, da) == 0
    found = [
        torch_gemm.convolution(x, weight, None),
        torch_gemm.input_grad(da, weight, rows),
        torch_gemm.weight_grad(da, x, rows),
    ]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.stride() == theirs.stride()
        assert relative_error(mine, theirs.double()) < 1e-6


def test_the_choice_can_be_forced(monkeypatch):
    cuda_choice.forced_gemm.cache_clear()
    try:
        choices = (("fused", "mma"), ("layer", "mma"), ("wgmma", "wgmma"), ("torch", "torch"), ("auto", "torch"))
        for value, expected in choices:
            monkeypatch.setenv("CONVMIXER_CUDA_GEMM", value)
            cuda_choice.forced_gemm.cache_clear()
            # a CPU tensor, as in the emulation: torch's GEMM unless forced
            assert cuda_choice.choose_kernel(torch.empty(1, 8, 8, 8), 2, lambda: True) == expected
        monkeypatch.setenv("CONVMIXER_CUDA_GEMM", "cutlass")
        cuda_choice.forced_gemm.cache_clear()
        message = "CONVMIXER_CUDA_GEMM must be auto, fused, wgmma, torch or layer, got 'cutlass'"
        with pytest.raises(ValueError, match=message):
            cuda_choice.forced_gemm()
    finally:
        cuda_choice.forced_gemm.cache_clear()

# SPDX-License-Identifier: MIT
"""The pointwise block's weight gradient by wgmma (csrc/cuda/pointwise_weight_grad.cu): emulated everywhere, and on an H100."""

from __future__ import annotations

import pytest
import torch
from helpers import Case, check_case, use_cuda
from torch import Tensor

from convmixer_kernels.backends import _native, cuda, cuda_choice, torch_gemm
from convmixer_kernels.testing import relative_error


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device of a test's tensors: "cpu" for the emulated kernels, or "cuda". Products are ours if they can be."""
    emulated = request.param == "emulated"
    if not emulated and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"wgmma needs sm_90, got {torch.cuda.get_device_capability()}")
    return use_cuda(monkeypatch, emulated, gemm="wgmma")


#: Processors of the emulation, shape of x, C_out, parts of K in all. Tiles are 128 x 128 channels, a stage of K 64 pixels.
WEIGHT_GRADS = [
    # one tile, of one stage, of parts of two and of one; on one multiprocessor parts gain nothing
    (2, (1, 8, 8, 8), 8, 1),
    (5, (3, 24, 8, 16), 16, 3),
    (4, (1, 136, 8, 8), 24, 2),
    (1, (4, 40, 8, 24), 264, 3),
    # tiles that are not full, of parts that begin and end inside of images
    (7, (5, 24, 8, 24), 136, 6),
    (8, (5, 132, 8, 24), 520, 16),
    # many tiles and few multiprocessors: whole ones, then parts
    (3, (2, 392, 8, 16), 264, 12),
    (5, (3, 264, 16, 16), 520, 15),
    # rows that 16 bytes do not divide
    (3, (3, 33, 8, 24), 31, 3),
]


def _case(shape, channels_out, **options) -> Case:
    return Case("pointwise_block", shape, (1, 1), channels_out, **options)


def _weight_grad(da: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    cuda._size.cache_clear()
    dw = cuda._pointwise_weight_grad(da, x, torch.empty(da.shape[1], x.shape[1], 1, 1, dtype=dtype, device=x.device))
    assert dw is not None
    assert dw.shape == (da.shape[1], x.shape[1], 1, 1)
    assert dw.dtype == dtype
    return dw


@pytest.mark.parametrize("processors, shape, c_out, parts", WEIGHT_GRADS, ids=str)
def test_against_float64(processors, shape, c_out, parts, device, monkeypatch):
    """The error against float64 is that of rounding the sums, in every dtype of the weight; the order of threads changes no bit."""
    monkeypatch.setenv("EMU_PROCESSORS", str(processors))
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(shape).to(dtype).to(device)
        da = torch.randn(shape[0], c_out, *shape[2:]).to(dtype).to(device)
        exact = torch.einsum("nohw,nihw->oi", da.double(), x.double())[:, :, None, None]
        wide = _weight_grad(da, x, torch.float32)
        # a tensor core truncates its sums, of up to 48 products of 16 values here
        assert relative_error(wide, exact) < (2e-6 if device == "cpu" else 2e-5)
        # the rest of a sum in float32 rounds to exactly these values
        assert torch.equal(_weight_grad(da, x, dtype), wide.to(dtype))
        for order in ("1", "7"):
            monkeypatch.setenv("EMU_ORDER", order)
            assert torch.equal(_weight_grad(da, x, torch.float32), wide)
        monkeypatch.delenv("EMU_ORDER")
    if device == "cpu":
        size = cuda._size("pointwise_weight_grad_workspace", -1, *_native.shape_args(x), c_out)
        assert size == parts * 128 * 128 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("channels", [(1536, 1536), (768, 768), (256, 256), (128, 1664), (136, 24)], ids=str)
def test_many_pixels(channels, device):
    """Uses all multiprocessors, whole waves and parts, more steps than stages; the error is at most twice that of torch's products."""
    c_in, c_out = channels
    x = torch.randn(64, c_in, 32, 32, dtype=torch.bfloat16, device=device)
    da = torch.randn(64, c_out, 32, 32, dtype=torch.bfloat16, device=device)
    exact = sum(a.flatten(1).double() @ b.flatten(1).double().t() for a, b in zip(da, x, strict=True))
    ours = _weight_grad(da, x, torch.float32)
    error = relative_error(ours.flatten(1), exact)
    theirs = relative_error(torch_gemm.weight_grad(da, x, False), exact)
    # a sum of 4096 products of 16 values, which the tensor core may truncate each time; torch's begin anew with each image
    assert error <= 2 * theirs + 2**-11
    assert torch.equal(_weight_grad(da, x, torch.float32), ours)


@pytest.mark.parametrize(
    "case",
    [
        _case((5, 72, 8, 8), 136, dtype=torch.bfloat16),
        _case((3, 20, 8, 16), 12, dtype=torch.float16, parameter_dtype=torch.float32),
        _case((2, 8, 8, 8), 16, dtype=torch.bfloat16, absent=("bias",)),
        Case("mixer_layer", (2, 8, 8, 8), (5, 5), dtype=torch.bfloat16),
        # torch's products run, each for one reason
        _case((2, 8, 8, 8), 16, dtype=torch.bfloat16, memory_format="channels_last"),
        _case((2, 8, 8, 12), 16, dtype=torch.bfloat16),
        _case((2, 8, 8, 8), 16),
    ],
    ids=str,
)
def test_operator(case, device, monkeypatch):
    taken, launcher = [], cuda._pointwise_weight_grad

    def noted(*arguments):
        dw = launcher(*arguments)
        taken.append(dw is not None)
        return dw

    monkeypatch.setattr(cuda, "_pointwise_weight_grad", noted)
    check_case(case, "cuda", device=device, pool=64 if device == "cuda" else 1)
    fits = case.dtype != torch.float32 and case.shape[3] % 8 == 0
    # channels_last tensors never reach it
    assert set(taken) == (set() if case.memory_format == "channels_last" else {fits})


def test_addresses_off_16_bytes_are_torchs(device):
    x, da = (torch.randn(2 * c * 64 + 1).to(torch.bfloat16).to(device)[1:].view(2, c, 8, 8) for c in (8, 16))
    weight = torch.empty(16, 8, 1, 1, device=device)
    assert cuda._pointwise_weight_grad(da, x, weight) is None
    assert cuda._pointwise_weight_grad(da.clone(), x.clone(), weight) is not None


def test_it_is_ours_only_where_asked(monkeypatch):
    """It has not run on hardware."""
    for forced in (None, "fused", "torch", "wgmma"):
        monkeypatch.setattr(cuda_choice, "forced_gemm", lambda forced=forced: forced)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.empty(2, 8, 8, 8, dtype=dtype)
            assert cuda_choice.use_wgmma_weight_grad(x) is (forced == "wgmma" and dtype != torch.float32)

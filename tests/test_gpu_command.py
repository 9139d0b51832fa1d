# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu: what can be tested of it without a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu, gpu_ops
from convmixer_kernels.backends import pointwise_gemm, reference
from convmixer_kernels.testing import relative_error

_MEMCHECK = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: {}\n"
_RACECHECK = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: {}\n"


@pytest.mark.parametrize(
    ("tool", "status", "output", "clean"),
    [
        ("memcheck", 0, _MEMCHECK.format("0 errors"), True),
        ("memcheck", 0, _MEMCHECK.format("1 error"), False),
        ("memcheck", 0, _MEMCHECK.format("10 errors"), False),
        ("memcheck", 1, _MEMCHECK.format("0 errors"), False),
        ("memcheck", None, _MEMCHECK.format("0 errors"), False),
        ("memcheck", 0, "the program ended before the tool could start", False),
        ("memcheck", 0, _MEMCHECK.format("2 errors") + _MEMCHECK.format("0 errors"), False),
        ("initcheck", 0, _MEMCHECK.format("0 errors"), True),
        ("racecheck", 0, _RACECHECK.format("0 hazards displayed (0 errors, 0 warnings)"), True),
        ("racecheck", 0, _RACECHECK.format("1 hazard displayed (0 errors, 1 warning)"), False),
        ("racecheck", 0, _RACECHECK.format("0 hazards displayed (3 errors, 0 warnings)"), False),
        ("racecheck", 0, _RACECHECK.format("100 hazards displayed (100 errors, 0 warnings)"), False),
        # racecheck that found nothing to check says so in memcheck's words
        ("racecheck", 0, _MEMCHECK.format("0 errors"), False),
    ],
)
def test_only_a_clean_summary_is_clean(tool, status, output, clean):
    assert gpu.is_clean(tool, status, output) is clean


# ---- the choice among GEMMs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "layout", "capability", "expected"),
    [
        ("pointwise_eval", (64, 1536, 32, 32), torch.bfloat16, "contiguous", (9, 0), ("fused", "torch", "wgmma")),
        ("pointwise_train", (64, 768, 7, 7), torch.bfloat16, "channels_last", (9, 0), ("fused", "torch", "wgmma")),
        # boxes of 64 pixels of one image; 16-byte rows; other GPUs; float32
        ("pointwise_eval", (64, 768, 7, 7), torch.bfloat16, "contiguous", (9, 0), ("fused", "torch")),
        ("pointwise_eval", (64, 1537, 32, 32), torch.bfloat16, "contiguous", (9, 0), ("fused", "torch")),
        ("pointwise_eval", (64, 1536, 32, 32), torch.bfloat16, "contiguous", (8, 0), ("fused", "torch")),
        ("pointwise_eval", (64, 1536, 32, 32), torch.float32, "contiguous", (9, 0), ("fused", "torch")),
        ("mixer_eval", (64, 256, 32, 32), torch.bfloat16, "contiguous", (8, 0), ("fused", "torch", "layer")),
        ("mixer_eval", (64, 257, 32, 32), torch.bfloat16, "contiguous", (9, 0), ("fused", "torch")),
        ("depthwise_eval", (64, 256, 32, 32), torch.bfloat16, "contiguous", (9, 0), ()),
    ],
)
def test_which_gemms_are_timed(op, shape, dtype, layout, capability, expected):
    assert gpu_ops.forced_gemms(gpu_ops.OpCase(op, shape, 9, dtype, layout), capability) == expected


def test_every_forced_gemm_is_one_that_the_backend_knows(monkeypatch):
    cases = [case for case in gpu_ops.operator_cases() if gpu_ops.forced_gemms(case, (9, 0))]
    assert {case.op for case in cases} == {"pointwise_eval", "pointwise_train", "mixer_eval"}
    before = pointwise_gemm.forced_gemm
    for name in {name for case in cases for name in gpu_ops.forced_gemms(case, (9, 0))}:
        with gpu_ops.forcing(name):
            assert pointwise_gemm.forced_gemm() == name
        monkeypatch.setenv("CONVMIXER_CUDA_GEMM", name)
        before.cache_clear()
        assert before() == name
    before.cache_clear()
    with gpu_ops.forcing(None):
        assert pointwise_gemm.forced_gemm is before


def test_a_layer_is_checked_by_all_its_channels():
    """The check of a few outputs keeps every channel of the layer's first block, and agrees with eager."""
    case = gpu_ops.OpCase("mixer_eval", (2, 12, 6, 8), 5, torch.float32, "contiguous")
    tensors = gpu_ops.Tensors(case, sets=1, device="cpu")
    kept = torch.tensor([1, 7])
    part = tensors.channels(kept)
    part.sets[0][0] = tensors.set(0)[0]
    exact = gpu_ops.ours(case.op, reference, part.double())
    assert exact.shape == (2, 2, 6, 8)
    for y in (
        gpu_ops.ours(case.op, reference, tensors)[:, kept],
        gpu_ops.eager(case.op, tensors, 0, "contiguous")()[:, kept],
    ):
        assert relative_error(y, exact) < 1e-6
    floor = gpu_ops._floor(case, {"copy_bytes_per_s": 1e12, "float32_flops_per_s": 1e12})
    assert floor["flops"] == 2 * 2 * 12 * 6 * 8 * (12 + 25)
    assert floor["bytes"] == 2 * 2 * 12 * 6 * 8 * 4

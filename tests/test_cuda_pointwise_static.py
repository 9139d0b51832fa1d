# SPDX-License-Identifier: MIT
"""The machine code of the pointwise block's GEMM kernels and of the layer in one kernel has the main loops that their headers describe.

Needs no GPU.
"""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.static import gemm as static_gemm
from benchmarks.static import kernels as static_kernels
from benchmarks.static import sass

#: mma_kernel<T, MT, NT, LAST, ALIGNED> with 128 x 128 tiles
LARGE = r"mma_kernelI\w*Li4ELi8ELb[01]ELb1E"
THREADS_AND_SHARED = {
    "mma_kernel": (128, 49152),
    "fma_kernel": (256, 33792),
    "wgmma_kernel": (384, 217152),
    "wgmma_weight_grad_kernel": (384, 197744),
    "sum_slots_kernel": (256, 0),
}


@pytest.fixture(scope="module")
def resources(cuda_module):
    return [r for r in sass.resources(cuda_module) if "9pointwise" in r.function or "mixer_kernel" in r.function]


@pytest.fixture(scope="module", params=("sm_80", "sm_90a"))
def kernels(request, cuda_module, resources):
    if request.param not in {r.architecture for r in resources}:
        pytest.skip(f"the CUDA module holds no code for {request.param}")
    return list(sass.kernels(cuda_module, request.param, lambda name: "9pointwise" in name or "mixer_kernel" in name))


def _loop_of(kernel, instruction: str):
    """The instruction counts of the innermost loop with this instruction."""
    found = []
    for loop in kernel.all_loops():
        counts = sum((kernel.blocks[i].counts for i in loop.blocks), type(kernel.counts)())
        if counts[instruction]:
            found.append(counts)
    assert found, f"{kernel.function}: no loop with {instruction}"
    return min(found, key=lambda counts: counts["all"])


def test_tensor_cores_take_most_of_the_main_loop(kernels):
    found = [kernel for kernel in kernels if re.search(LARGE, kernel.function)]
    assert len(found) == 4
    for kernel in found:
        loop = _loop_of(kernel, "HMMA")
        assert (loop["HMMA"], loop["LDSM"], loop["LDGSTS.128"]) == (64, 16, 8), kernel.function
        assert loop["all"] <= 160, kernel.function
        assert kernel.counts["STG.128"] > 0


def test_small_and_unaligned_tiles_use_tensor_cores_too(kernels):
    found = [kernel for kernel in kernels if re.search(r"mma_kernelI\w*Li2ELi4E", kernel.function)]
    assert len(found) == 8
    for kernel in found:
        loop = _loop_of(kernel, "HMMA")
        assert (loop["HMMA"], loop["LDSM"]) == (16, 8), kernel.function
        # without alignment the values come one by one
        aligned = kernel.function.split("Li4ELb")[1][4] == "1"
        assert (loop["LDGSTS.128"] == 4) == aligned, kernel.function


def test_float32_is_bound_by_its_products(kernels):
    found = [kernel for kernel in kernels if "fma_kernel" in kernel.function]
    assert len(found) == 2
    for kernel in found:
        loop = _loop_of(kernel, "FFMA")
        assert (loop["FFMA"], loop["LDS.128"], loop["LDGSTS"]) == (512, 32, 8), kernel.function
        assert loop["all"] <= 640, kernel.function


def test_wgmma_is_not_serialized(kernels):
    found = [kernel for kernel in kernels if re.search("wgmma_(?:weight_grad_)?kernel", kernel.function)]
    assert len(found) == 6
    for kernel in found:
        if kernel.architecture != "sm_90a":
            assert kernel.counts["all"] < 32, kernel.function
            continue
        loop = _loop_of(kernel, "HGMMA")
        # one arrival and one wait a stage: the compiler has put none between the products
        assert (loop["HGMMA"], loop["WARPGROUP"]) == (8, 2), kernel.function
        assert loop["all"] <= 80, kernel.function
        assert kernel.counts["UTMALDG"] >= 2
        if "weight_grad" in kernel.function:
            # 128 sums of a thread, two side by side
            assert kernel.counts["STG.64"] == 64
        assert kernel.counts["USETMAXREG"] == 2


def test_occupancy(resources, kernels):
    """A multiprocessor runs two blocks, three or four of the smaller tiles, one of wgmma."""
    for kernel in kernels:
        if "mixer_kernel" in kernel.function:
            continue
        (mine,) = (r for r in resources if (r.architecture, r.function) == (kernel.architecture, kernel.function))
        # the longest of the names that fit
        name = max((n for n in THREADS_AND_SHARED if n in kernel.function), key=len)
        if name.startswith("wgmma") and kernel.architecture != "sm_90a":
            continue
        threads, shared = THREADS_AND_SHARED[name]
        small = "Li2ELi4E" in kernel.function
        wanted = 1 if name.startswith("wgmma") else 3 if small else 2
        blocks = sass.blocks_per_multiprocessor(
            mine.registers, threads, shared // 2 if small else shared, kernel.architecture
        )
        assert blocks >= wanted, kernel.function
        assert mine.stack == mine.local == 0


def test_a_layer_in_one_kernel(resources, kernels):
    """Both loops have tensor-core products and copies, and no local memory; shared memory fits one block, also on sm_80."""
    found = [kernel for kernel in kernels if "mixer_kernel" in kernel.function]
    assert len(found) == 4
    for kernel in found:
        (mine,) = (r for r in resources if (r.architecture, r.function) == (kernel.architecture, kernel.function))
        assert mine.stack == mine.local == 0
        assert mine.registers <= 128, "512 threads share 65536"
        assert sass.blocks_per_multiprocessor(mine.registers, 512, static_gemm.MIXER.shared, kernel.architecture) == 1
        if not re.search(static_gemm.MIXER.kernel.replace("13__nv_bfloat16", r"\w+"), kernel.function):
            # weights that are not aligned: value by value
            assert kernel.counts["LDGSTS.128"] == 0
            continue
        z, step, epilogue = static_gemm.measure_mixer(kernel)
        assert {key: round(8 * z[key]) for key in ("HMMA", "LDSM.x4", "LDGSTS.64")} == {
            "HMMA": 20,
            "LDSM.x4": 10,
            "LDGSTS.64": 5,
        }
        assert (step["HMMA"], step["LDSM.x4"], step["LDGSTS.128"]) == (32, 12, 1)
        assert z["all"] <= 42
        assert step["all"] <= 110
        assert epilogue["all"] <= 20
        assert kernel.counts["STG.128"] >= 8


def test_the_committed_table(resources, kernels):
    """docs/cuda-kernels.md was made from these kernels."""
    committed = json.loads((static_kernels.RESULTS / "cuda-static-gemm.json").read_text())
    rows = static_gemm.rows([k for k in kernels if static_gemm.is_of_a_case(k.function)], resources)
    assert len(rows) >= 6
    for row in rows:
        keys = ("name", "layout", "dtype", "architecture")
        (old,) = (r for r in committed if all(r[key] == row[key] for key in keys))
        label = [row[key] for key in keys]
        stale = f"{label}: run python -m benchmarks.static"
        assert row["blocks"] >= row["blocks_claimed"], label
        assert row["spilled_bytes"] == 0, label
        # another nvcc moves an instruction here and there
        assert row["step"]["all"] == pytest.approx(old["step"]["all"], rel=0.1), stale
        assert row["epilogue"] == pytest.approx(old["epilogue"], rel=0.1), stale
        assert row["registers"] == pytest.approx(old["registers"], abs=8), stale
        assert (row["shared"], row["blocks"]) == (old["shared"], old["blocks"]), stale

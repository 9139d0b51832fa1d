# SPDX-License-Identifier: MIT
"""The machine code of the CUDA kernels: no spills, the claimed occupancy, tensor cores and wide accesses. Needs no GPU.

Reads the installed module if it was built from this checkout; .ci/run builds it for sm_80 and sm_90a.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter

import pytest

from benchmarks.static import kernels as static_kernels
from benchmarks.static import sass
from convmixer_kernels import _build

#: Kernels of 16-bit depthwise convolution.
TENSOR_CORE_KERNELS = r"contiguous_kernel|channels_last_kernel|weight_grad\d+(?:warp|block)_kernel"


@pytest.fixture(scope="module")
def resources(cuda_module):
    found = sass.resources(cuda_module)
    assert len(found) > 50
    return found


@pytest.fixture(scope="module", params=static_kernels.ARCHITECTURES)
def architecture(request, resources):
    if request.param not in {r.architecture for r in resources}:
        pytest.skip(f"the CUDA module holds no code for {request.param}")
    return request.param


@pytest.fixture(scope="module")
def kernels(cuda_module, architecture) -> list[sass.Kernel]:
    """The kernels of 16-bit depthwise convolution and of the table, disassembled."""

    def wanted(name: str) -> bool:
        return re.search(TENSOR_CORE_KERNELS, name) is not None or static_kernels.is_of_a_case(name)

    return list(sass.kernels(cuda_module, architecture, wanted))


def test_no_kernel_spills_or_uses_local_memory(resources, architecture):
    # a few kernels spill 8 to 16 bytes (the float32 GEMM 100) on sm_86, 89, 100 or 120, which no header speaks of
    found = [r for r in resources if r.architecture == architecture]
    assert len(found) > 50
    assert sass.in_local_memory(found) == []


def test_tensor_core_kernels_hold_what_they_are_for(kernels):
    found = [kernel for kernel in kernels if re.search(TENSOR_CORE_KERNELS, kernel.function)]
    assert len(found) > 60
    problems = {kernel.function: static_kernels.lacks(kernel.function, kernel.counts) for kernel in found}
    assert {name: lacking for name, lacking in problems.items() if lacking} == {}


def test_occupancy_and_the_committed_table(kernels, architecture, resources):
    """Registers and shared memory allow the blocks that the headers claim; docs/cuda-kernels.md was made from these kernels."""
    committed = json.loads((static_kernels.RESULTS / "cuda-static.json").read_text())
    committed = {(r["name"], r["layout"], r["dtype"]): r for r in committed if r["architecture"] == architecture}
    for row in static_kernels.rows(kernels, resources):
        label = row["name"], row["layout"], row["dtype"]
        if architecture == "sm_90a":
            assert row["blocks"] >= row["blocks_claimed"], label
        assert row["spilled_bytes"] == 0, label
        old = committed[label]
        # another nvcc moves an instruction here and there
        stale = f"{label}: run python -m benchmarks.static"
        assert row["total_per_output"] == pytest.approx(old["total_per_output"], rel=0.05), stale
        assert row["registers"] == pytest.approx(old["registers"], abs=8), stale
        assert (row["dynamic_shared"], row["blocks"]) == (old["dynamic_shared"], old["blocks"]), stale


# The 16-bit activations.

_ONE_ACTIVATION = """
#include "{math}"
using namespace convmixer;
extern "C" __global__ void nothing(float* x) {{ x[threadIdx.x] = fmaf(x[threadIdx.x], 2.f, 1.f); }}
extern "C" __global__ void gelu(float* x) {{ x[threadIdx.x] = fmaf(fast_activation<2>(x[threadIdx.x]), 2.f, 1.f); }}
extern "C" __global__ void gelu_and_grad(float* x) {{
  const ValueAndGrad h = fast_activation_and_grad<2>(x[threadIdx.x]);
  x[threadIdx.x] = fmaf(h.value, h.grad, 1.f);
}}
"""


def test_fast_gelu_takes_at_most_15_instructions(tmp_path):
    """Compares with a kernel that does the same without GELU, on each architecture."""
    nvcc = _build.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    if (reason := sass.missing_tool()) is not None:
        pytest.skip(reason)
    source, cubin = tmp_path / "one.cu", tmp_path / "one.cubin"
    source.write_text(_ONE_ACTIVATION.format(math=_build.CSRC / "math.h"))
    for architecture in static_kernels.ARCHITECTURES:
        command = [str(nvcc), "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", str(source), "-o", str(cubin)]
        subprocess.run(command, check=True, capture_output=True)
        found = {kernel.function: kernel.counts for kernel in sass.kernels(cubin, architecture)}
        instructions = {name: counts["all"] - found["nothing"]["all"] for name, counts in found.items()}
        assert 6 <= instructions["gelu"] <= 15
        # value and derivative together
        assert 8 <= instructions["gelu_and_grad"] <= 20
        assert found["gelu"]["MUFU.EX2"] == 1


# The checks themselves.

_RESOURCES = """
Fatbin elf code:
================
arch = sm_90a
Resource usage:
 Common:
  GLOBAL:0
 Function _Z4goodPf:
  REG:{registers} STACK:{stack} SHARED:16 LOCAL:{local} CONSTANT[0]:520 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@pytest.mark.parametrize(("stack", "local", "caught"), [(0, 0, 0), (8, 0, 1), (0, 4, 1)])
def test_planted_spills_are_seen(stack, local, caught):
    found = sass.parse_resources(_RESOURCES.format(registers=32, stack=stack, local=local).splitlines())
    assert [(r.architecture, r.registers, r.shared) for r in found] == [("sm_90a", 32, 16)]
    assert len(sass.in_local_memory(found)) == caught


def test_resources_without_figures_raise():
    with pytest.raises(ValueError, match="no resource usage of _Z4goodPf"):
        sass.parse_resources([" Function _Z4goodPf:"])
    with pytest.raises(ValueError, match="without figures"):
        sass.parse_resources([" Function _Z4goodPf:", "  REG:32"])


def test_occupancy_arithmetic():
    assert sass.blocks_per_multiprocessor(128, 128, 0, "sm_90a") == 4
    assert sass.blocks_per_multiprocessor(129, 128, 0, "sm_90a") == 3
    assert sass.blocks_per_multiprocessor(32, 128, 75 << 10, "sm_90a") == 3
    assert sass.blocks_per_multiprocessor(32, 128, 75 << 10, "sm_80") == 2
    assert sass.blocks_per_multiprocessor(32, 1024, 0, "sm_80") == 2


def test_what_a_kernel_lacks_is_named():
    whole = Counter({"HMMA": 9, "LDSM": 9, "LDGSTS.128": 1, "LDG.128": 8, "STG.128": 8, "STG": 8})
    assert static_kernels.lacks("channels_last_kernel", whole) == []
    for gone in ("HMMA", "LDSM"):
        assert static_kernels.lacks("channels_last_kernel", whole - Counter({gone: 9})) == [gone]
    # a 16-byte store that the compiler split into four
    split = whole + Counter({"STG": 23}) - Counter({"STG.128": 6})
    assert static_kernels.lacks("channels_last_kernel", split) == ["8 STG.128"]
    assert static_kernels.lacks("weight_grad11warp_kernel", Counter({"HMMA": 1, "LDSM": 1})) == [
        "LDGSTS.128 or LDG.128"
    ]
    assert (
        static_kernels.lacks("weight_grad12block_kernelI13__nv_bfloat16Li2ELi1EE", Counter({"HMMA": 1, "LDSM": 1}))
        == []
    )
    octets = Counter({"HMMA": 1, "LDSM": 1, "LDG.128": 24, "STS.128": 24})
    assert static_kernels.lacks("weight_grad12block_kernelI13__nv_bfloat16Li1ELi8EE", octets) == []
    split = static_kernels.lacks("weight_grad12block_kernelI13__nv_bfloat16Li1ELi8EE", octets - Counter({"STS.128": 7}))
    assert split == ["24 LDG.128 and STS.128"]
    assert static_kernels.lacks("contiguous_kernel", whole + Counter({"STL": 1})) == ["no local memory"]


_SASS = """
		Function : loop
        /*0000*/                   MOV R1, c[0x0][0x28] ;     /* 0x0 */
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/              @!P0 BRA 0x60 ;
        /*0030*/                   MUFU.EX2 R3, R3 ;
        /*0040*/                   FMUL R3, R3, R3 ;
        /*0050*/                   BRA 0x80 ;
        /*0060*/                   MUFU.EX2 R3, R3 ;
        /*0070*/                   MUFU.RCP R3, R3 ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0090*/               @P1 BRA 0x10 ;
        /*00a0*/               @P2 STG.E.128 desc[UR4][R2.64], R4 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
"""


def test_a_path_through_a_loop():
    (kernel,) = sass.parse_sass(_SASS.splitlines())
    assert kernel.counts["all"] == 13
    assert kernel.counts["STG.128"] == 1
    (loop,) = kernel.all_loops()
    assert len(loop.blocks) == 4

    def no_division(counts):
        return counts["MUFU.RCP"] > 0

    path = kernel.once_through(loop, lambda counts: (counts["MUFU.EX2"],), no_division)
    assert (path["all"], path["MUFU.EX2"], path["HMMA"], path["MUFU.RCP"]) == (7, 1, 1, 0)
    # without the rule the shorter way wins
    assert kernel.once_through(loop, lambda counts: (counts["MUFU.EX2"],))["MUFU.RCP"] == 1
    with pytest.raises(ValueError, match="to be avoided"):
        kernel.once_through(loop, lambda counts: (), lambda counts: counts["LDSM"] > 0)
    assert static_kernels.shared_cycles(path) == 4


_DETOURS = """
		Function : detours
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   FADD R3, R3, R3 ;
        /*0020*/                   BRA.CONV ~URZ, 0x50 ;
        /*0030*/                   MOV R5, 0x50 ;
        /*0040*/                   CALL.REL.NOINC 0x200 ;
        /*0050*/                   LDS R4, [R2] ;
        /*0060*/              @!PT LDS RZ, [RZ] ;
        /*0070*/                   LDSM.16.M88.2 R6, [R2] ;
        /*0080*/                   BRX R2 -0x90 ;
        /*0090*/                   MUFU.EX2 R3, R3 ;
        /*00a0*/                   BRA 0xc0 ;
        /*00b0*/                   MUFU.RCP R3, R3 ;
        /*00c0*/               @P1 BRA 0x10 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   SHFL.BFLY PT, R3, R3, R3, R3 ;
        /*00f0*/                   BRA 0x10 ;
"""


def test_detours_of_divided_warps_are_no_part_of_a_loop():
    (kernel,) = sass.parse_sass(_DETOURS.splitlines())
    (loop,) = kernel.all_loops()
    path = kernel.once_through(loop, lambda counts: (counts["MUFU.EX2"],))
    # neither the call nor the code behind the end of the switch
    assert (path["all"], path["CALL"], path["SHFL"], path["MUFU.EX2"], path["MUFU.RCP"]) == (9, 0, 0, 1, 0)
    # an access that is predicated off takes only an issue slot, two matrices take two cycles
    assert static_kernels.shared_cycles(path) == 1 + 2

# SPDX-License-Identifier: MIT
"""The CUDA sources compile with CUDA 12.4 too, the oldest toolkit that the build accepts: its headers, its libdevice, its ptxas.

There is no nvcc 12 on the package index, so clang takes its place. The wheels are nvidia-cuda-runtime-cu12, -cccl-cu12 and -nvcc-cu12
of version 12.4.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
SOURCES = sorted(path.stem for path in CUDA.glob("*.cu"))
#: Compiled to machine code: every kind of PTX (cp.async, mma, wgmma, TMA) in the smallest sources that have it.
ASSEMBLED = [("batch_norm", "80"), ("mixer", "80"), ("pointwise_gemm", "90a"), ("pointwise_weight_grad", "90a")]
#: clang has its own form of this CUDA header, without the functions for vectors.
CLANG_LACKS = """#pragma once
__device__ __forceinline__ uint4 __ldcs(const uint4* p) {
  uint4 v;
  asm("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ void __stcs(uint4* p, uint4 v) {
  asm("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
"""


def _clang() -> str | None:
    return next((name for name in ("clang++-19", "clang++-20", "clang++-21", "clang++-18") if shutil.which(name)), None)


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    """clang over a CUDA 12.4 toolkit made of the wheels."""
    clang = _clang()
    if clang is None:
        pytest.skip("clang 18 or newer is not installed")
    folder = tmp_path_factory.mktemp("cuda12")
    for package in ("cuda_runtime", "cuda_cccl", "cuda_nvcc"):
        try:
            found = importlib.util.find_spec(f"nvidia.{package}")
        except ModuleNotFoundError:
            found = None
        if found is None or found.origin is None:
            pytest.skip(f"nvidia-{package.replace('_', '-')}-cu12 is not installed")
        for part in ("include", "nvvm", "bin"):
            source = Path(found.origin).parent / part
            if source.is_dir():
                shutil.copytree(source, folder / part, dirs_exist_ok=True)
    assert "CUDART_VERSION  12040" in (folder / "include" / "cuda_runtime_api.h").read_text()
    (folder / "bin" / "ptxas").chmod(0o755)
    (folder / "version.json").write_text('{"cuda": {"version": "12.4.1"}}')
    (folder / "clang").mkdir()
    (folder / "clang" / "lacks.h").write_text(CLANG_LACKS)
    # clang includes it for the sake of curand
    (folder / "clang" / "curand_mtgp32_kernel.h").touch()
    return [
        *(clang, "-x", "cuda", f"--cuda-path={folder}", "-isystem", str(folder / "clang")),
        *("-include", str(folder / "clang" / "lacks.h"), "-std=c++17", "-w", "-Wno-unknown-cuda-version"),
    ]


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("source", SOURCES)
def test_headers_of_cuda_12(command, source, arch):
    """Host and device code use nothing that CUDA 12.4 lacks."""
    done = subprocess.run(
        [*command, f"--cuda-gpu-arch=sm_{arch}", "-fsyntax-only", str(CUDA / f"{source}.cu")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source, arch", ASSEMBLED)
def test_ptxas_of_cuda_12(command, source, arch, tmp_path):
    options = [f"--cuda-gpu-arch=sm_{arch}", "--cuda-device-only", "-O1", "-c", "-o", str(tmp_path / "cubin")]
    done = subprocess.run([*command, *options, str(CUDA / f"{source}.cu")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cubin").stat().st_size > 0

# SPDX-License-Identifier: MIT
"""The CPU kernels on aarch64 with NEON, under QEMU, give the bits of the AVX2 kernels, which test_operators.py checks."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from convmixer_kernels import _build

TESTS = Path(__file__).parent
CPU = TESTS.parent / "csrc" / "cpu"
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64-static"


def _runs_avx2() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and cpuinfo.exists() and "avx2" in cpuinfo.read_text()


def _digests(folder: Path, compiler: str, kernels: str, flags: list[str], *runner: str) -> list[str]:
    program = folder / kernels
    sources = [TESTS / "aarch64_driver.cpp", CPU / "isa.cpp", CPU / f"isa_{kernels}.cpp"]
    subprocess.run([compiler, *_build.CXX_FLAGS, *flags, "-static", "-o", program, *sources], check=True)
    return subprocess.run([*runner, program], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(QEMU)), reason=f"needs {CROSS} and {QEMU} (Debian: qemu-user-static)"
)
@pytest.mark.skipif(not _runs_avx2(), reason="compares with AVX2 kernels, which this machine cannot run")
def test_neon_gives_the_bits_of_avx2(tmp_path):
    neon = _digests(tmp_path, CROSS, "baseline", [], QEMU)
    avx2 = _digests(tmp_path, "g++", "avx2", _build.ISA_FLAGS["avx2"])
    # dtypes, activations, (results, cases, layouts; two that the driver checks itself)
    assert len(set(avx2)) == len(avx2) == 3 * 4 * (17 * 6 * 2 - 2)
    assert [line for line, other in zip(neon, avx2, strict=True) if line != other] == []

# SPDX-License-Identifier: MIT
"""Compiles the sources of the CUDA kernels for the CPU, for tests without a GPU.

    CONVMIXER_CUDA_EMULATION=$(python tests/emulation/build.py) python ...    # backend "cuda" takes CPU tensors

g++ compiles csrc/cuda/*.cu with cuda_emu.h, which runs them with CUDA's semantics, thousands of times slower than a GPU. The
module goes into $XDG_CACHE_HOME/convmixer-kernels (default ~/.cache); its name holds a digest of all its sources.
EMU_ORDER chooses the order of threads (0 forward, 1 reverse, n >= 2 shuffled).
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from convmixer_kernels import _build

_JOBS = 2
_MODULE = "_cuda_emulated"
EMULATOR = Path(__file__).resolve().parent
#: The sources of this checkout, even if an installed package is used.
CSRC = EMULATOR.parents[1] / "csrc"
#: -O1 compiles sooner than -O2, and switching between emulated threads takes most of the time anyway.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-DCONVMIXER_EMULATED"]


def sources() -> list[Path]:
    """All files that the emulated module is built from."""
    cuda = sorted(p for p in (CSRC / "cuda").glob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp"))
    return [*cuda, *sorted(CSRC.glob("*.h")), *sorted(EMULATOR.glob("*.h"))]


def compile_command(compiler: str, source: Path, output: Path) -> list[str]:
    """The command that compiles one .cu file or module.cpp to an object."""
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    includes = [f"-I{CSRC / 'cuda'}", f"-I{EMULATOR}"]
    if source.name == "module.cpp":
        import pybind11

        includes += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    return [*compiler.split(), *FLAGS, *includes, *language, "-c", str(source), "-o", str(output)]


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "convmixer-kernels"


def _compiler() -> str:
    compiler = _build.find_cxx()
    if compiler is None:
        raise RuntimeError("the emulated CUDA module needs a C++ compiler: install g++ or set CXX")
    return compiler


def _digest(compiler: str, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for part in (_build.compiler_version(compiler), sys.version, sysconfig.get_config_var("EXT_SUFFIX"), *FLAGS):
        digest.update(str(part).encode() + b"\0")
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulated CUDA module does not compile:\n{' '.join(command)}\n{done.stderr[-4000:]}")


@functools.cache
def build() -> Path:
    """The emulated module's file, compiled if it is not cached; safe with several processes.

    Raises:
        RuntimeError: no compiler, or a compile error.
    """
    files, compiler = sources(), _compiler()
    cache = _cache_directory()
    digest = _digest(compiler, files)
    output = cache / f"{_MODULE}-{digest}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if output.exists():
        return output
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{digest}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if output.exists():
            return output
        directory = Path(tempfile.mkdtemp(dir=cache))
        try:
            units = [path for path in files if path.suffix in (".cu", ".cpp")]
            objects = [directory / f"{path.stem}.o" for path in units]
            commands = [compile_command(compiler, *pair) for pair in zip(units, objects, strict=True)]
            with concurrent.futures.ThreadPoolExecutor(_JOBS) as pool:
                list(pool.map(_run, commands))
            _run([*compiler.split(), "-shared", *map(str, objects), "-o", str(directory / "module.so")])
            os.replace(directory / "module.so", output)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    return output


def main() -> int:
    print(build())
    return 0


if __name__ == "__main__":
    sys.exit(main())

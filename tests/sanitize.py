# SPDX-License-Identifier: MIT
"""python -m tests.sanitize: the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds _cpu from csrc/ with both sanitizers and runs tests and fuzzed cases on it for each instruction set; fails each of its
allocations in turn (failing_allocations.cpp); then builds the emulated CUDA kernels likewise and runs all of
emulation/check_kernels.py. A report of a sanitizer ends its process. AVX-512 is left out: AddressSanitizer does not see
masked loads. The built modules are cached as emulation/build.py caches its own. `--only cpu`, `allocations` or `cuda` runs one part.
"""

from __future__ import annotations

import argparse
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

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(path) for path in (TESTS, ROOT) if str(path) not in sys.path]

from emulation import build as emulation

from convmixer_kernels import _build

INSTRUCTION_SETS = ("baseline", "avx2")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FLAGS = [*SANITIZERS, "-O1", "-g1", "-fno-omit-frame-pointer"]
#: The functions that failing_allocations.cpp stands before: convmixer::cpu::scratch and operator new.
WRAPPED = ("_ZN9convmixer3cpu7scratchEim", "_Znwm")
_INJECTION = TESTS / "failing_allocations.cpp"


@functools.cache
def problem() -> str | None:
    """Why nothing can be sanitized here, or None."""
    compiler = _build.find_cxx()
    if compiler is None:
        return "there is no C++ compiler"
    for name in ("libasan.so", "libubsan.so"):
        if not _library(compiler, name).is_file():
            return f"{compiler} has no {name}"
    return None


def _library(compiler: str, name: str) -> Path:
    """A library of the compiler; the bare name if it has none."""
    command = [*compiler.split(), f"-print-file-name={name}"]
    return Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())


def _cached(name: str, files: list[Path], make) -> Path:
    """The folder that `make(folder)` fills, made if it is not cached; safe with several processes."""
    digest = hashlib.sha256(_build.compiler_version(_build.find_cxx()).encode() + sys.version.encode())
    for path in [*files, Path(__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    cache = emulation._cache_directory()
    folder = cache / f"{name}-{digest.hexdigest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            made = Path(tempfile.mkdtemp(dir=cache))
            try:
                make(made)
                os.replace(made, folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    return folder


def build_cpu() -> Path:
    """A folder for Python's path, whose convmixer_kernels/ holds the sanitized _cpu."""

    def make(folder: Path) -> None:
        compiler = _build.find_cxx()
        output = folder / "convmixer_kernels" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
        output.parent.mkdir()
        objects = [_build.Object(o.source, [*o.command, *FLAGS]) for o in _build.cpu_objects(compiler)]
        plain = [*compiler.split(), "-std=c++17", "-fPIC", "-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]
        objects.append(_build.Object(_INJECTION, plain))
        link = [*compiler.split(), "-shared", "-fopenmp", *SANITIZERS]
        link += [f"-Wl,--wrap={name}" for name in WRAPPED]
        _build.run_ninja([_build.Module("_cpu", objects, [*link, "-o", "$out", "$in"], output)], folder / "objects")
        shutil.rmtree(folder / "objects")

    csrc = [p for p in sorted(_build.CSRC.rglob("*")) if p.suffix in (".h", ".cuh", ".cpp", ".cu")]
    return _cached("_cpu_sanitized", [*csrc, _INJECTION], make)


def build_cuda() -> Path:
    """The file of the sanitized emulated CUDA kernels."""
    files = emulation.sources()

    def make(folder: Path) -> None:
        compiler = _build.find_cxx()
        units = [path for path in files if path.suffix in (".cu", ".cpp")]
        objects = [folder / f"{path.stem}.o" for path in units]
        commands = [
            [*emulation.compile_command(compiler, *pair), *FLAGS] for pair in zip(units, objects, strict=True)
        ]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(functools.partial(subprocess.run, check=True), commands))
        link = [*compiler.split(), "-shared", *SANITIZERS, *map(str, objects)]
        subprocess.run([*link, "-o", str(folder / "module.so")], check=True)
        for path in objects:
            path.unlink()

    return _cached("_cuda_emulated_sanitized", files, make) / "module.so"


def environment(isa: str | None = None) -> dict[str, str]:
    """The environment of a process that loads sanitized modules: sanitized _cpu where `isa` names its instruction set."""
    compiler = _build.find_cxx()
    # libstdc++ too: AddressSanitizer looks for its throw before Python loads it
    preload = " ".join(str(_library(compiler, name)) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))
    added = {
        "LD_PRELOAD": preload,
        # Python and torch keep memory until the end
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_WAIT_POLICY": "passive",
    }
    if isa is not None:
        added |= {"CONVMIXER_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join([str(build_cpu()), str(ROOT)])}
    return os.environ | added

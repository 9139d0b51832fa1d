# SPDX-License-Identifier: MIT
"""python -m tests.sanitize: the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds _cpu from csrc/ with both sanitizers and runs tests and fuzzed cases on it for each instruction set; fails each of its
allocations in turn (failing_allocations.cpp); then builds the emulated CUDA kernels likewise and runs all of
emulation/check_kernels.py. A report of a sanitizer ends its process. AVX-512 is left out: AddressSanitizer does not see
masked loads. The built modules are cached as emulation/build.py caches its own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from emulation import build as emulation
from helpers import Case, make_inputs, ours
from torch import Tensor

import convmixer
from convmixer_kernels import _build

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
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


def _cached(name: str, files: list[Path], make: Callable[[Path], None]) -> Path:
    """The folder that `make(folder)` fills, made if it is not cached; safe with several processes."""
    digest = hashlib.sha256(_build.compiler_version(_build.find_cxx()).encode() + sys.version.encode())
    digest.update(" ".join([*FLAGS, *WRAPPED]).encode())
    for path in files:
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
        objects = [
            _build.Object(o.source, [*o.command, *FLAGS])
            for o in _build.cpu_objects(compiler)
            if o.source.stem != "isa_avx512"
        ]
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
        commands = [[*emulation.compile_command(compiler, *pair), *FLAGS] for pair in zip(units, objects, strict=True)]
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


def _start(what: str, arguments: list[str], env: dict[str, str]) -> bool:
    """Runs Python with `arguments`. Prints what happened, and the output if it failed."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    told = done.stdout.strip().splitlines()
    print(f"{what}: {told[-1] if told else ''} ({time.monotonic() - begin:.0f} s)", flush=True)
    if done.returncode != 0:
        reports = "\n".join(line for line in done.stderr.splitlines() if "failed to allocate" not in line)
        print(f"{what} FAILED, exit status {done.returncode}:\n{done.stdout[-4000:]}\n{reports[:8000]}", flush=True)
    return done.returncode == 0


def run_cpu(cases: int, tests: list[str]) -> bool:
    """Fuzzed cases and tests on the sanitized _cpu, in each instruction set."""
    right = True
    for isa in INSTRUCTION_SETS:
        env = environment(isa)
        right &= _start(f"{isa}, fuzz", ["-m", "tests.fuzz", "--cases", str(cases), "--backend", "cpu"], env)
        if tests:
            right &= _start(f"{isa}, tests", ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], env)
    return right


def run_allocations(isas: Sequence[str] = INSTRUCTION_SETS) -> bool:
    """Fails every allocation of _cpu in turn, in each instruction set."""
    return all([_start(f"{isa}, allocations", [__file__, "--inside"], environment(isa)) for isa in isas])


def run_cuda(checks: list[str]) -> bool:
    """Checks of emulation/check_kernels.py, each in three orders of threads, on the sanitized kernels; all if none is named."""
    module, env = str(build_cuda()), environment()
    driver = str(TESTS / "emulation" / "check_kernels.py")

    def run(check: str) -> bool:
        return _start(check, [driver, module, check], env | {"OMP_NUM_THREADS": "1"})

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return all(list(pool.map(run, checks)))


def cuda_checks() -> list[str]:
    from emulation.check_kernels import CHECKS

    return list(CHECKS)


def allocation_cases() -> list[Case]:
    """Each kernel that takes memory: narrow and wide, both layouts, with and without a backward's parts."""
    shapes = {
        "depthwise_conv2d": [((2, 20, 3, 50), (3, 9), 20)],
        "depthwise_block": [((2, 9, 8, 7), (5, 5), 9), ((1, 3, 60, 60), (3, 3), 3)],
        "pointwise_block": [((3, 9, 8, 7), (1, 1), 12), ((1, 300, 5, 5), (1, 1), 292)],
        "mixer_layer": [((2, 9, 8, 7), (3, 3), 12)],
    }
    return [
        Case(op, shape, kernel, channels_out, dtype, None, memory_format, training)
        for op, sizes in shapes.items()
        for shape, kernel, channels_out in sizes
        for dtype, memory_format in ((torch.float32, "contiguous"), (torch.bfloat16, "channels_last"))
        for training in ((True, False) if op == "mixer_layer" else (True,))
    ]


def fail_allocations() -> int:
    """In a process with the sanitized _cpu: each allocation of each case fails once.

    Then the call raises MemoryError, no running statistic has moved unless the forward had returned, no gradient is there, and the
    same call without a failure gives the bits that it gave before.
    """
    from convmixer_kernels.backends import cpu

    library = ctypes.CDLL(cpu.native.__file__)
    library.convmixer_failed.restype = ctypes.c_bool
    torch.set_num_threads(2)
    failures = calls = 0
    for case in allocation_cases():
        expected, failed = _results(case, None)
        for at in range(1, 1000):
            library.convmixer_fail_at(at)
            results, failed = _results(case, library)
            calls += 1
            failures += failed
            assert failed or results is not None, f"{case}: MemoryError although no allocation failed"
            # a thread without memory does no harm if the other one did all the work
            assert results is None or all(map(torch.equal, results, expected)), f"{case}: other bits"
            if not failed:
                break
        assert 1 < at < 999, f"{case}: {at - 1} allocations"
    failures += _fail_fused_layers(library)
    print(f"{failures} allocations failed in {calls} calls")
    return 0


def _results(case: Case, library: ctypes.CDLL | None) -> tuple[list[Tensor] | None, bool]:
    """Output, gradients and statistics, or None after a MemoryError if everything is as it must be then; whether an allocation failed."""
    x, tensors, dy = make_inputs(case)
    leaves = [x, *(t for i, t in enumerate(tensors) if i % 6 < 4)]
    statistics = [t for i, t in enumerate(tensors) if i % 6 >= 4]
    for t in leaves:
        t.requires_grad_()
    before, y, failed = [t.detach().clone() for t in (*leaves, *statistics)], None, False
    results = None
    try:
        y = ours(case, x, tensors, "cpu")
        moved = [t.clone() for t in statistics]
        y.backward(dy)
        results = [y.detach(), *(t.grad for t in leaves), *statistics]
    except MemoryError:
        now = before[len(leaves) :] if y is None else moved
        assert all(map(torch.equal, statistics, now)), f"{case}: a running statistic moved"
        assert all(map(torch.equal, leaves, before[: len(leaves)])), f"{case}: a tensor changed"
        assert y is not None or all(t._version == 0 for t in statistics), f"{case}: a running statistic was written"
        assert all(t.grad is None for t in leaves), f"{case}: a part of the gradients is there"
    finally:
        if library is not None:
            failed = library.convmixer_failed()
            library.convmixer_fail_at(0)
    return results, failed


def _fail_fused_layers(library: ctypes.CDLL) -> int:
    """As fail_allocations, for several layers of a model in one native call. Returns the number of failures."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = convmixer.ConvMixer(16, 2, 3, 1, 5).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        for at in range(1, 1000):
            library.convmixer_fail_at(at)
            try:
                assert torch.equal(model(x), expected)
            except MemoryError:
                assert library.convmixer_failed()
            if not library.convmixer_failed():
                library.convmixer_fail_at(0)
                return at - 1
    raise AssertionError("the fused layers have no end of allocations")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument("--only", choices=("cpu", "allocations", "cuda"), help="this part alone")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return fail_allocations()
    if problem() is not None:
        sys.exit(f"nothing to sanitize with: {problem()}")
    parts = {
        "cpu": lambda: run_cpu(
            500,
            ["tests/test_operators.py", "tests/test_cpu.py", "-k", "not reference and not instruction_set and not isa"],
        ),
        "allocations": run_allocations,
        "cuda": lambda: run_cuda(cuda_checks()),
    }
    return 0 if all([run() for name, run in parts.items() if options.only in (None, name)]) else 1


if __name__ == "__main__":
    sys.exit(main())

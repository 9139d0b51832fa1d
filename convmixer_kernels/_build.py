# SPDX-License-Identifier: MIT
"""The build: sources, flags, GPU architectures. setup.py reads it; it imports neither torch nor the package.

Environment variables:
    CXX                   the C++ compiler (default: the first of c++, g++, clang++ on PATH)
    CONVMIXER_BUILD_CUDA  1: build _cuda or fail; 0: do not; unset: build it if nvcc is found, or if an NVIDIA driver is
                          visible and pip can download nvcc (_build_backend.py)
    CONVMIXER_CUDA_ARCHS  for example "80;90a" or "90a;120+PTX" (default: the local GPUs', else DEFAULT_CUDA_ARCHS)
    CUDA_HOME, CUDA_PATH  where the CUDA toolkit lies (default: nvcc on PATH, /usr/local/cuda, pip's packages)
    MAX_JOBS              parallel compile jobs (default: the number of processors)
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

#: The oldest nvcc: CUDA 12 runs on drivers of the 525 series and newer, CUDA 13 of the 580 series and newer.
LEAST_CUDA = (12, 4)
#: NVIDIA's compiler on the package index; a mix of minor versions does not work.
COMPILER_PACKAGES = [
    f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "nvvm", "cuda-runtime", "cuda-crt", "cuda-cccl")
]
_DEFAULT_TOOLKIT = "/usr/local/cuda"
DEFAULT_CUDA_ARCHS = "80;80+PTX;86;89;90a;100;120;120+PTX"
#: No contraction: sources call fma where they need it, so that an expression has the same bits wherever it is inlined.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra", "-ffp-contract=off"]
#: No path of this machine gets into a module: the same sources give the same bytes in any folder.
CXX_FLAGS.append(shlex.quote(f"-ffile-prefix-map={ROOT}=."))
#: The instruction sets of csrc/cpu/isa_<name>.cpp, each with its own flags, and only there.
ISA_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "baseline": [],
}
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xfatbin=-compress-all",
    "--threads=1",
]


#: Bindings only pass arguments on, and their templates are slow to compile.
BINDING_FLAGS = ["-O1"]


class Object(NamedTuple):
    """One object file: `command` compiles `source` to `$out` and writes a depfile to `$out.d`."""

    source: Path
    command: list[str]


class Module(NamedTuple):
    """A native module: the command `link` + objects gives `output`."""

    name: str
    objects: list[Object]
    link: list[str]
    output: Path


def source_digest() -> str:
    """A digest of the native sources. A built package carries the digest of those that it was built from."""
    digest = hashlib.sha256()
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")):
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def cxx_candidates() -> list[str]:
    """CXX alone if it is set, else the usual names that are on PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return [name for name in names if shutil.which(name.split()[0])]


def find_cxx() -> str | None:
    """The first C++ compiler that can build a Python module with OpenMP, or None."""
    return next((name for name in cxx_candidates() if cxx_problem(name) is None), None)


_PROBE = """#include <Python.h>
#include <omp.h>
#include <vector>
int probe() { return static_cast<int>(std::vector<int>(omp_get_max_threads()).size()); }
"""


@functools.cache
def cxx_problem(cxx: str) -> str | None:
    """Why this C++ compiler cannot build a small module, or None if it can."""
    flags = ["-std=c++17", "-fPIC", "-fopenmp", "-shared", f"-I{sysconfig.get_path('include')}"]
    return _problem([*cxx.split(), *flags], "probe.cpp", _PROBE)


@functools.cache
def nvcc_problem(nvcc: Path, cxx: str, archs: tuple[str, ...] = ()) -> str | None:
    """Why this nvcc cannot compile, with this host compiler and for these architectures, or None if it can."""
    version = re.search(r"release (\d+)\.(\d+)", compiler_version(nvcc))
    if version is not None and (int(version[1]), int(version[2])) < LEAST_CUDA:
        return f"{nvcc} is of CUDA {version[1]}.{version[2]}, which is too old: {'.'.join(map(str, LEAST_CUDA))} or newer is needed"
    command = [str(nvcc), "-ccbin", cxx.split()[0], *NVCC_FLAGS, *gencode_flags(archs), "-c"]
    return _problem(command, "probe.cu", "__global__ void probe(float* x) { *x = 1.0f; }\n")


def _problem(command: list[str], name: str, source: str) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder, name), Path(folder, "output")
        path.write_text(source)
        try:
            done = subprocess.run(
                [*command, str(path), "-o", str(output)], capture_output=True, text=True, errors="replace", timeout=300
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode == 0 and output.exists():
            return None
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        told = next((line for line in lines if "error" in line or "fatal" in line), lines[0] if lines else "no message")
        return f"{command[0]} cannot compile: {told} (exit status {done.returncode})"


def find_nvcc() -> Path | None:
    """nvcc of a CUDA toolkit with headers, or None; CONVMIXER_BUILD_CUDA=0 hides it."""
    if os.environ.get("CONVMIXER_BUILD_CUDA") == "0":
        return None
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    on_path = shutil.which("nvcc")
    if on_path:
        # a wrapper script on PATH may lie outside the toolkit: ask it
        roots += [Path(os.path.realpath(on_path)).parent.parent, _toolkit_of(on_path)]
    roots.append(_DEFAULT_TOOLKIT)
    # where pip puts COMPILER_PACKAGES
    roots += [os.path.join(folder, "nvidia", "cu13") for folder in sys.path if folder]
    for root in filter(None, roots):
        nvcc = Path(root) / "bin" / "nvcc"
        if os.access(nvcc, os.X_OK) and (Path(root) / "include" / "cuda_runtime.h").exists():
            return nvcc
    return None


def nvidia_driver() -> bool:
    """Whether this machine shows an NVIDIA driver."""
    return shutil.which("nvidia-smi") is not None or os.path.exists("/proc/driver/nvidia/version")


def needs_compiler_packages() -> bool:
    """Whether the build wants _cuda and has no nvcc: an NVIDIA driver is visible, or CONVMIXER_BUILD_CUDA=1."""
    wanted = os.environ.get("CONVMIXER_BUILD_CUDA")
    return (wanted == "1" or (wanted != "0" and nvidia_driver())) and find_nvcc() is None and find_cxx() is not None


def _toolkit_of(nvcc: str) -> str | None:
    """The folder that `nvcc --dryrun` names as TOP."""
    listing = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    return next((line.split("=", 1)[1].strip() for line in listing.splitlines() if line.startswith("#$ TOP=")), None)


def local_cuda_archs() -> list[str]:
    """The compute capabilities of the GPUs that nvidia-smi lists, for example ["90a"]."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = subprocess.run([smi, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True)
    found = sorted({line.strip().replace(".", "") for line in query.stdout.splitlines() if "." in line})
    return ["90a" if arch == "90" else arch for arch in found] if query.returncode == 0 else []


def requested_cuda_archs() -> list[str]:
    """The architectures in CONVMIXER_CUDA_ARCHS, each like "90a" or "80+PTX"."""
    requested = os.environ.get("CONVMIXER_CUDA_ARCHS", "").replace(",", ";").split(";")
    return [arch.strip().replace("sm_", "").replace(".", "") for arch in requested if arch.strip()]


def cuda_archs(nvcc: Path) -> list[str]:
    """The architectures to build for, each like "90a" or "80+PTX"; without the default ones that this nvcc does not know."""
    requested = requested_cuda_archs()
    if requested:
        return requested
    local = local_cuda_archs()
    if local:
        return local
    listing = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    defaults = DEFAULT_CUDA_ARCHS.split(";")
    return [arch for arch in defaults if f"compute_{arch.removesuffix('+PTX').rstrip('a')}" in listing]


def gencode_flags(archs: Iterable[str]) -> list[str]:
    """nvcc's flags; "80" gives machine code, "80+PTX" gives PTX."""
    flags = []
    for arch in archs:
        name = arch.removesuffix("+PTX")
        code = f"compute_{name}" if arch.endswith("+PTX") else f"sm_{name}"
        flags.append(f"-gencode=arch=compute_{name},code={code}")
    return flags


def _binding_flags() -> list[str]:
    import pybind11

    # the module carries the digest of its sources, and _load.py refuses a module of other sources
    digest = shlex.quote(f'-DCONVMIXER_DIGEST="{source_digest()}"')
    flags = [*BINDING_FLAGS, digest]
    for name, path in (("pybind11", pybind11.get_include()), ("python", sysconfig.get_path("include"))):
        # their assertions name the file
        flags += [f"-I{path}", f"-ffile-prefix-map={path}={name}"]
    return flags


#: If better instruction sets are built too, only old processors run the portable kernels: -O2 halves the compile time
#: and gives the same bits.
FALLBACK_FLAGS = ["-O2"]


def cpu_instruction_sets() -> list[str]:
    """The instruction sets that the compiler of this machine builds for."""
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["baseline"]


def cpu_objects(cxx: str) -> list[Object]:
    """The objects of _cpu: the binding, the choice at run time, and one per instruction set."""
    sets = cpu_instruction_sets()
    defines = [f"-DCONVMIXER_ISA_{name.upper()}" for name in sets]
    compile_command = [*cxx.split(), *CXX_FLAGS, *defines, "-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]
    flags = {**ISA_FLAGS, "baseline": FALLBACK_FLAGS if len(sets) > 1 else []}
    objects = [Object(CSRC / "cpu" / f"isa_{name}.cpp", [*compile_command, *flags[name]]) for name in sets]
    objects.append(Object(CSRC / "cpu" / "isa.cpp", compile_command))
    objects.append(Object(CSRC / "cpu" / "module.cpp", [*compile_command, *_binding_flags()]))
    return objects


def cuda_objects(cxx: str, nvcc: Path, archs: list[str]) -> list[Object]:
    """The objects of _cuda: one per .cu file, and the binding, which the host compiler compiles."""
    device = [str(nvcc), "-ccbin", cxx.split()[0], *NVCC_FLAGS, *gencode_flags(archs)]
    device += ["-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]
    objects = [Object(path, device) for path in sorted((CSRC / "cuda").glob("*.cu"))]
    host = [*cxx.split(), *CXX_FLAGS, *_binding_flags(), "-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]
    objects.append(Object(CSRC / "cuda" / "module.cpp", host))
    return objects


def run_ninja(modules: list[Module], directory: Path) -> None:
    """Compile and link the modules in `directory`. One run of ninja builds all of them, so that no core idles between
    modules, and rebuilds only what changed.

    Raises:
        subprocess.CalledProcessError: a compile failed; its output has been printed.
    """
    import ninja

    directory.mkdir(parents=True, exist_ok=True)

    def escape(text: str | Path) -> str:
        return str(text).replace("$ ", "$$ ").replace(" ", "$ ").replace(":", "$:")

    lines = ["ninja_required_version = 1.5"]
    for module in modules:
        names = []
        for i, item in enumerate(module.objects):
            name, rule = directory / module.name / f"{item.source.stem}.o", f"compile_{module.name}_{i}"
            names.append(name)
            lines += [f"rule {rule}", f"  command = {' '.join(item.command)}", "  depfile = $out.d", "  deps = gcc"]
            lines.append(f"build {escape(name)}: {rule} {escape(item.source)}")
        lines += [f"rule link_{module.name}", f"  command = {' '.join(module.link)}"]
        lines.append(f"build {escape(module.output)}: link_{module.name} {' '.join(map(escape, names))}")
    (directory / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(directory), "-j", jobs], check=True)


def compiler_version(command: str | Path) -> str:
    """The line of `command --version` that names the version."""
    lines = subprocess.run([*str(command).split(), "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line.strip() for line in lines if "release" in line), lines[0].strip() if lines else "unknown")

# SPDX-License-Identifier: MIT
"""Builds _cpu if a C++ compiler is found, and _cuda if nvcc is found too; convmixer_kernels/_build.py describes the build."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# by path: importing the package would import torch, which a build environment need not have
_spec = importlib.util.spec_from_file_location("_build", Path(__file__).parent / "convmixer_kernels" / "_build.py")
_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_build)


def say(*lines: str) -> None:
    for line in lines:
        print(f"convmixer-kernels: {line}", flush=True)


cxx = _build.find_cxx()
if cxx is None:
    problems = [_build.cxx_problem(name) for name in _build.cxx_candidates()]
    say(
        *problems,
        "no C++ compiler that works (set CXX): installing WITHOUT native kernels; the operators will run on the slow",
        "'reference' backend. Install g++ (and Python's headers) and reinstall to get the fast ones.",
    )

nvcc = _build.find_nvcc() if cxx else None
archs = _build.cuda_archs(nvcc) if nvcc else []
problem = _build.nvcc_problem(nvcc, cxx, tuple(archs)) if nvcc else None
if os.environ.get("CONVMIXER_BUILD_CUDA") == "1" and (nvcc is None or problem is not None):
    found = problem or "no C++ compiler that works with an nvcc was found on PATH, in CUDA_HOME or /usr/local/cuda"
    sys.exit(f"CONVMIXER_BUILD_CUDA=1, but {found}")
if problem is not None and _build.requested_cuda_archs():
    sys.exit(
        f"CONVMIXER_CUDA_ARCHS={os.environ['CONVMIXER_CUDA_ARCHS']}, but {problem}; CONVMIXER_BUILD_CUDA=0 leaves _cuda out"
    )
if problem is not None:
    say(problem, "installing WITHOUT CUDA kernels")
    nvcc, archs = None, []
if cxx is not None:
    where = f"{nvcc} for {' '.join(archs)}" if nvcc else "not built, no nvcc found (or CONVMIXER_BUILD_CUDA=0)"
    say(f"_cpu: {cxx} for {' '.join(_build.cpu_instruction_sets())}; _cuda: {where}")

BUILT = {
    "digest": _build.source_digest(),
    "cxx": _build.compiler_version(cxx) if cxx else None,
    "instruction_sets": _build.cpu_instruction_sets() if cxx else [],
    "nvcc": _build.compiler_version(nvcc) if nvcc else None,
    "cuda_archs": archs,
}


class BuildExt(build_ext):
    """Builds by ninja, which rebuilds only what changed."""

    def build_extensions(self):
        _build.run_ninja([self._module(ext) for ext in self.extensions], Path(self.build_temp).resolve())

    def _module(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        link = [cxx, "-shared", "-o", "$out", "$in"]
        if ext.name.endswith("_cuda"):
            objects = _build.cuda_objects(cxx, nvcc, archs)
            toolkit = nvcc.parent.parent
            link += [f"-L{path}" for path in (toolkit / "lib64", toolkit / "lib") if path.is_dir()]
            link += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        else:
            objects = _build.cpu_objects(cxx)
            link.append("-fopenmp")
        return _build.Module(ext.name.rpartition(".")[2], objects, link, output)


class BuildPy(build_py):
    """Writes _built.py, which tells build_info() what was built."""

    def run(self):
        # an earlier build here may have left modules that this one does not make
        shutil.rmtree(Path(self.build_lib), ignore_errors=True)
        super().run()
        if not self.editable_mode:
            path = Path(self.build_lib) / "convmixer_kernels" / "_built.py"
            path.write_text(f"# SPDX-License-Identifier: MIT\n# written by setup.py\nBUILT = {BUILT!r}\n")


extensions = [Extension("convmixer_kernels._cpu", [])] if cxx else []
if nvcc:
    extensions.append(Extension("convmixer_kernels._cuda", []))
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExt, "build_py": BuildPy})

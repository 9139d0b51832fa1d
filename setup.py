# SPDX-License-Identifier: MIT
"""Builds _cpu where a C++ compiler is found and _cuda where nvcc is found too; convmixer_kernels/_build.py says how."""

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

cxx = _build.find_cxx()
nvcc = _build.find_nvcc() if cxx else None
if os.environ.get("CONVMIXER_BUILD_CUDA") == "1" and nvcc is None:
    sys.exit(
        "CONVMIXER_BUILD_CUDA=1, but no C++ compiler with an nvcc was found on PATH, in CUDA_HOME or /usr/local/cuda"
    )
archs = _build.cuda_archs(nvcc) if nvcc else []

if cxx is None:
    print(
        "convmixer-kernels: no C++ compiler found (set CXX): installing WITHOUT native kernels; the operators will run"
    )
    print(
        "convmixer-kernels: on the slow 'reference' backend. Install g++ and reinstall to get the fast ones.",
        flush=True,
    )
else:
    where = f"{nvcc} for {' '.join(archs)}" if nvcc else "not built, no nvcc found (or CONVMIXER_BUILD_CUDA=0)"
    print(f"convmixer-kernels: _cpu: {cxx} for {' '.join(_build.cpu_instruction_sets())}; _cuda: {where}", flush=True)

BUILT = {
    "digest": _build.source_digest(),
    "cxx": _build.compiler_version(cxx) if cxx else None,
    "instruction_sets": _build.cpu_instruction_sets() if cxx else [],
    "nvcc": _build.compiler_version(nvcc) if nvcc else None,
    "cuda_archs": archs,
}


class BuildExt(build_ext):
    """Hands the objects and the link to ninja, which redoes only what changed."""

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
    """Writes down what was built, for build_info()."""

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

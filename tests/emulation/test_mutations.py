# SPDX-License-Identifier: MIT
"""Plants bugs in copies of the kernels' sources; the emulation must catch each one.

If the text of a mutation is no longer in the source, its test fails: change the mutation (mutations.py) with the kernel. Only the unit
with the bug is compiled (-O0: a compile costs more than a run); weak stand-ins replace the other units.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import shutil
import subprocess
from pathlib import Path

import pytest
from emulation import build, check_kernels
from emulation.mutations import MUTATIONS, Mutation

from convmixer_kernels import _build

CUDA = _build.CSRC / "cuda"


def _stand_ins() -> str:
    """Weak definitions of every launcher, which the unit under test overrides; depthwise launchers call the FMA ones."""
    depthwise = {
        "int depthwise_forward{}(const DepthwiseForward& p, void* stream)": "p, stream",
        "int depthwise_input_grad{}(const DepthwiseInputGrad& p, void* stream)": "p, stream",
        "int depthwise_weight_grad{}(const DepthwiseWeightGrad& p, void* stream)": "p, stream",
        "int64_t depthwise_forward{}_partials(const Shape& s, int kh, int kw)": "s, kh, kw",
        "int64_t depthwise_weight_grad{}_workspace(const Shape& s, int kh, int kw)": "s, kh, kw",
    }
    others = [
        "int merge_statistics(const MergeStatistics&, void*)",
        "int normalize(const Normalize&, void*)",
        "int norm_backward(const NormBackward&, void*)",
        "int pointwise_statistics(const PointwiseStatistics&, void*)",
        "int pointwise_grad_prologue(const PointwiseGradPrologue&, void*)",
        "int pointwise_forward(const PointwiseForward&, void*)",
        "int64_t pointwise_forward_partials(const Shape&, int64_t, const void*, const void*, bool)",
        "bool pointwise_runs_hopper(const Shape&, int64_t, const void*, const void*)",
        "bool mixer_fits(const Shape&, int64_t, int, int)",
        "int64_t mixer_tiles(const Shape&)",
        "int mixer_forward(const MixerForward&, void*)",
        "int64_t norm_backward_workspace(const Shape&)",
        "int64_t pointwise_statistics_partials(const Shape&)",
        "int64_t pointwise_grad_prologue_workspace(const Shape&)",
        "int pointwise_weight_grad(const PointwiseWeightGrad&, void*)",
        "int64_t pointwise_weight_grad_workspace(const Shape&, int64_t)",
    ]
    bodies = {signature: "return 801;" for signature in others}
    for signature, arguments in depthwise.items():
        name = signature.split()[1].split("(")[0].format("_fma")
        bodies[signature.format("_fma")] = "return 801;"
        bodies[signature.format("")] = f"return {name}({arguments});"
    bodies["const char* error_string(int)"] = 'return "a stand-in was called";'
    bodies["int toolkit_version()"] = "return 0;"
    bodies["int device_count(int* n)"] = "*n = 1; return 0;"
    lines = [f"__attribute__((weak)) {signature} {{ {body} }}" for signature, body in bodies.items()]
    return "\n".join(['#include "kernels.h"', "namespace convmixer {", *lines, "}", ""])


def _compile(source: Path, output: Path, csrc: Path) -> None:
    command = build.compile_command(_build.find_cxx(), source, output)
    # headers of the copy come before those of the repository
    command = [*command[:1], f"-I{csrc / 'cuda'}", *command[1:], "-O0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> list[Path]:
    """The objects that every module has in common: the binding and the stand-ins."""
    directory = tmp_path_factory.mktemp("common")
    (directory / "stand_ins.cpp").write_text(_stand_ins())
    objects = [directory / "module.o", directory / "stand_ins.o"]
    _compile(CUDA / "module.cpp", objects[0], _build.CSRC)
    _compile(directory / "stand_ins.cpp", objects[1], _build.CSRC)
    return objects


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.BaseContext:
    """Makes processes of a server's that has imported torch, which takes longer than a check."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytest"])
    return context


def _run(
    processes, directory: Path, common: list[Path], unit: str, checks: list[str], mutation: Mutation | None
) -> str | None:
    """The first failure of a module with the mutated unit, or None if every check passes."""
    csrc = directory / "csrc"
    shutil.copytree(CUDA, csrc / "cuda")
    for header in _build.CSRC.glob("*.h"):
        shutil.copy(header, csrc)
    if mutation is not None:
        path = csrc / "cuda" / mutation.file
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
    _compile(csrc / "cuda" / f"{unit}.cu", directory / "unit.o", csrc)
    module = directory / "_cuda_emulated.so"
    link = [*_build.find_cxx().split(), "-shared", str(directory / "unit.o"), *map(str, common), "-o", str(module)]
    subprocess.run(link, check=True)
    for check in checks:
        output = directory / "output"
        process = processes.Process(target=check_kernels.main, args=(str(module), check, str(output)))
        process.start()
        process.join()
        if process.exitcode != 0:
            told = output.read_text()
            assert "Traceback" not in told, told
            return f"{check}: {told or f'exit status {process.exitcode}'}"
    return None


def test_the_table_is_large_enough_and_in_the_sources():
    assert len(MUTATIONS) >= 20
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
    for m in MUTATIONS:
        assert m.old in (CUDA / m.file).read_text(), (
            f"{m.name}: the text to break is no longer in {m.file}: follow the kernel"
        )


def test_unbroken_kernels_pass_every_check(tmp_path, common, processes):
    """Without this a check that always fails would catch everything."""
    units = sorted({m.unit for m in MUTATIONS})
    checks = {unit: sorted({m.check for m in MUTATIONS if m.unit == unit}) for unit in units}
    for unit in units:
        (tmp_path / unit).mkdir()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda unit: _run(processes, tmp_path / unit, common, unit, checks[unit], None), units))
    assert dict(zip(units, found, strict=True)) == dict.fromkeys(units)


def test_every_planted_bug_is_caught(tmp_path, common, processes):
    directories = [tmp_path / str(i) for i in range(len(MUTATIONS))]
    for directory in directories:
        directory.mkdir()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda m, d: _run(processes, d, common, m.unit, [m.check], m), MUTATIONS, directories))
    missed = [m.name for m, problem in zip(MUTATIONS, found, strict=True) if problem is None]
    assert missed == []

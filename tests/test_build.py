# SPDX-License-Identifier: MIT
"""What is built if a compiler does not work, and which native module is loaded if several are found."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

import convmixer_kernels
from convmixer_kernels import _build
from convmixer_kernels.backends import cpu

ROOT = _build.ROOT


# A compiler that cannot compile counts as missing.


def _program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def _toolkit(folder: Path, script: str) -> Path:
    """A CUDA toolkit whose nvcc is a script."""
    _program(folder / "bin" / "nvcc", script)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    return folder


def _setup(**environment: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs setup.py up to where a build would begin: it prints the version."""
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("the build needs setuptools 77 or newer")
    unset = ("CXX", "CUDA_HOME", "CUDA_PATH", "CONVMIXER_BUILD_CUDA", "CONVMIXER_CUDA_ARCHS")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    environment = {name: str(value) for name, value in environment.items()}
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, timeout=300)


def test_a_compiler_that_works_has_no_problem():
    cxx = _build.find_cxx()
    if cxx is None:
        pytest.skip("no C++ compiler")
    assert _build.cxx_problem(cxx) is None


@pytest.mark.parametrize(
    ("script", "told"),
    [("exit 1", "no message (exit status 1)"), ("echo 'error: no disk' >&2; exit 4", "error: no disk"), ("exit 0", "")],
    ids=["false", "message", "does-nothing"],
)
def test_a_compiler_that_does_not_work_is_a_missing_one(monkeypatch, tmp_path, script, told):
    cxx = str(_program(tmp_path / "c++", script))
    monkeypatch.setenv("CXX", cxx)
    assert _build.cxx_candidates() == [cxx]
    assert _build.find_cxx() is None
    assert f"{cxx} cannot compile" in _build.cxx_problem(cxx)
    assert told in _build.cxx_problem(cxx)
    done = _setup(CXX=cxx)
    assert done.returncode == 0, done.stderr
    assert f"{cxx} cannot compile" in done.stdout
    assert "installing WITHOUT native kernels" in done.stdout
    assert "Traceback" not in done.stderr
    forced = _setup(CXX=cxx, CONVMIXER_BUILD_CUDA="1")
    assert forced.returncode == 1
    assert "CONVMIXER_BUILD_CUDA=1, but no C++ compiler that works" in forced.stderr


def test_the_next_compiler_is_tried(monkeypatch, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    monkeypatch.delenv("CXX", raising=False)
    _program(tmp_path / "c++", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _build.cxx_problem.cache_clear()
    try:
        assert _build.find_cxx() == "g++"
    finally:
        _build.cxx_problem.cache_clear()


@pytest.mark.parametrize(("release", "works"), [("11.8", False), ("12.3", False), ("12.4", True), ("13.0", True)])
def test_the_oldest_nvcc(tmp_path, release, works):
    script = f"echo 'Cuda compilation tools, release {release}, V{release}.0'; for last; do :; done; touch $last"
    nvcc = _program(tmp_path / "nvcc", script)
    problem = _build.nvcc_problem(nvcc, "c++")
    assert problem is None if works else "too old: 12.4 or newer" in problem


@pytest.mark.parametrize("script", ["exit 1", "echo 'nvcc fatal   : Unsupported gpu architecture' >&2; exit 1"])
def test_an_nvcc_that_does_not_work_is_a_missing_one_unless_it_was_asked_for(tmp_path, script):
    if _build.find_cxx() is None:
        pytest.skip("no C++ compiler")
    toolkit = _toolkit(tmp_path / "cuda", script)
    done = _setup(CUDA_HOME=toolkit)
    assert done.returncode == 0, done.stderr
    assert f"{toolkit}/bin/nvcc cannot compile" in done.stdout
    assert "installing WITHOUT CUDA kernels" in done.stdout
    for variable, value in (("CONVMIXER_BUILD_CUDA", "1"), ("CONVMIXER_CUDA_ARCHS", "80")):
        done = _setup(CUDA_HOME=toolkit, **{variable: value})
        assert done.returncode == 1
        assert f"{variable}={value}, but {toolkit}/bin/nvcc cannot compile" in done.stderr
        assert "Traceback" not in done.stderr
    assert _setup(CUDA_HOME=toolkit, CONVMIXER_BUILD_CUDA="0").returncode == 0


# Native modules of other sources.

USE = """
import json, warnings, torch
import convmixer_kernels as ck
x, weight = torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    ys = [ck.depthwise_conv2d(x, weight) for _ in range(2)]
torch.testing.assert_close(ys[0], torch.nn.functional.conv2d(x, weight, padding="same", groups=2))
info = ck.build_info()["backends"]["cpu"]
print(json.dumps([info["available"], info["detail"], [str(w.message) for w in seen if w.category is RuntimeWarning]]))
"""


def _package(folder: Path, digest: str | None = None, fake_module: bool = False) -> Path:
    """A copy of the package's Python files without a native module; with `digest` it counts as an install."""
    source = Path(convmixer_kernels.__file__).parent
    skipped = shutil.ignore_patterns("*.so", "__pycache__", "_built.py")
    package = Path(shutil.copytree(source, folder / "convmixer_kernels", ignore=skipped))
    if digest is not None:
        (package / "_built.py").write_text(f"BUILT = {{'digest': '{digest}', 'cxx': None}}\n")
    if fake_module:
        (package / "_cpu.py").write_text("digest = 'abc'\n")
    return folder


def _use(*folders: Path) -> tuple[bool, str, list[str]]:
    path = [*map(str, folders), str(Path(cpu.native.__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("CONVMIXER_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-P", "-c", USE] if sys.version_info >= (3, 11) else [sys.executable, "-c", USE],
        cwd=folders[0].parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


native = pytest.mark.skipif(cpu.native is None, reason="the native module _cpu is not built")


@native
def test_the_module_says_what_it_was_built_from():
    assert len(cpu.native.digest) == 16
    if (ROOT / "csrc").is_dir():
        assert cpu.native.digest == _build.source_digest()


@native
def test_a_module_of_other_sources_is_refused_by_a_checkout(tmp_path):
    checkout = _package(tmp_path / "checkout")
    shutil.copytree(ROOT / "csrc", checkout / "csrc")
    assert _use(checkout)[0] is True
    with open(checkout / "csrc" / "cpu" / "module.cpp", "a") as file:
        file.write("// another line\n")
    available, detail, warned = _use(checkout)
    assert available is False
    refusal = f"{cpu.native.__file__} is refused: it was built from other sources (digest {cpu.native.digest})"
    assert refusal in detail
    assert str(checkout / "csrc") in detail
    assert len(warned) == 1
    assert refusal in warned[0]


@native
def test_a_module_of_another_install_is_refused_by_an_install(tmp_path):
    assert _use(_package(tmp_path / "same", cpu.native.digest)) == (True, cpu.build_info()["detail"], [])
    available, detail, warned = _use(_package(tmp_path / "other", "0123456789abcdef"))
    assert available is False
    assert "is refused: it was built from other sources" in detail
    assert str(tmp_path / "other" / "convmixer_kernels" / "_built.py") in detail
    assert "is refused" in warned[0]
    available, detail, _ = _use(_package(tmp_path / "neither"))
    assert available is False
    assert "is refused: it belongs to another install" in detail


@native
def test_the_right_module_is_found_behind_a_wrong_one(tmp_path):
    mine, older = _package(tmp_path / "mine", cpu.native.digest), _package(tmp_path / "older", "abc", True)
    available, detail, warned = _use(mine, older)
    assert (available, detail) == (True, cpu.build_info()["detail"])
    assert warned == []


# NVIDIA's compiler from the package index


@pytest.fixture
def backend(monkeypatch):
    """The build backend, on a machine with a C++ compiler and without nvcc, driver and network."""
    monkeypatch.syspath_prepend(str(ROOT / "convmixer_kernels"))
    module = importlib.import_module("_build_backend")
    monkeypatch.delenv("CONVMIXER_BUILD_CUDA", raising=False)
    monkeypatch.setattr(module._build, "find_cxx", lambda: "c++")
    monkeypatch.setattr(module._build, "find_nvcc", lambda: None)
    monkeypatch.setattr(module._build, "nvidia_driver", lambda: False)
    monkeypatch.setattr(module, "_download_problem", lambda packages: None)
    yield module
    for name in ("_build_backend", "_build"):
        sys.modules.pop(name)


def _asked_for(module) -> list[str]:
    wheel, editable = module.get_requires_for_build_wheel(), module.get_requires_for_build_editable()
    assert wheel == editable
    return wheel


@pytest.mark.parametrize(
    ("driver", "variable", "nvcc", "asks"),
    [
        (True, None, None, True),
        (False, "1", None, True),
        (True, "1", None, True),
        (False, None, None, False),
        (True, "0", None, False),
        (True, None, "nvcc", False),
        (False, "1", "nvcc", False),
    ],
)
def test_who_gets_nvidias_compiler(backend, monkeypatch, driver, variable, nvcc, asks):
    monkeypatch.setattr(backend._build, "nvidia_driver", lambda: driver)
    monkeypatch.setattr(backend._build, "find_nvcc", lambda: nvcc)
    if variable is not None:
        monkeypatch.setenv("CONVMIXER_BUILD_CUDA", variable)
    assert _asked_for(backend) == (_build.COMPILER_PACKAGES if asks else [])
    # one minor version for all of them
    assert {package.split("==")[1] for package in _build.COMPILER_PACKAGES} == {"13.0.*"}


def test_a_failed_download_is_a_message_unless_cuda_was_asked_for(backend, monkeypatch, capsys):
    monkeypatch.setattr(backend, "_download_problem", lambda packages: "ERROR: no network")
    monkeypatch.setattr(backend._build, "nvidia_driver", lambda: True)
    assert _asked_for(backend) == []
    assert "cannot be downloaded (ERROR: no network): installing WITHOUT CUDA kernels" in capsys.readouterr().out
    monkeypatch.setenv("CONVMIXER_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=r"no network\), and CONVMIXER_BUILD_CUDA=1 needs it"):
        backend.get_requires_for_build_wheel()


def test_pip_says_what_it_cannot_download(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "convmixer_kernels"))
    module = importlib.import_module("_build_backend")
    try:
        if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode != 0:
            assert module._download_problem(["convmixer-no-such-package==0"]) is None
            pytest.skip("no pip here")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        assert "convmixer-no-such-package" in module._download_problem(["convmixer-no-such-package==0"])
    finally:
        for name in ("_build_backend", "_build"):
            sys.modules.pop(name)


def test_nvcc_where_pip_puts_it(monkeypatch, tmp_path):
    for name in ("CUDA_HOME", "CUDA_PATH", "CONVMIXER_BUILD_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(_build, "_DEFAULT_TOOLKIT", str(tmp_path / "none"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert _build.find_nvcc() is None
    toolkit = _toolkit(tmp_path / "nvidia" / "cu13", "exit 0")
    assert _build.find_nvcc() == toolkit / "bin" / "nvcc"
    monkeypatch.setenv("CONVMIXER_BUILD_CUDA", "0")
    assert _build.find_nvcc() is None

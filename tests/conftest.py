# SPDX-License-Identifier: MIT
"""Fixtures, some of which restore global state after each test."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # triton reads this when it is imported: set it before, so that the Triton kernels run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, torch.cuda.is_available() is False"))
        return
    from convmixer_kernels.backends import cuda

    native = cuda.build_info()
    for item in items:
        if "gpu" in item.keywords and item.path.name.startswith("test_cuda") and not native["available"]:
            item.add_marker(pytest.mark.skip(reason=f"needs the CUDA kernels: {native['detail']}"))


# pytest does not capture this file descriptor
_STDERR = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Names a test that reaches faulthandler_timeout (pyproject.toml), just before pytest ends the process with its traceback.

    faulthandler knows a test's function, not its parameters. pytest.fail would not help: a test that hangs never returns.
    """
    limit = float(item.config.getini("faulthandler_timeout"))
    name = f"\n{item.nodeid} has run for {limit:g} s: the process ends here\n".encode()
    timer = threading.Timer(limit - min(1.0, limit / 2), os.write, (_STDERR, name))
    timer.daemon = True
    if limit > 0:
        timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()


@pytest.fixture(autouse=True)
def _global_state():
    threads, default = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    if torch.cuda.is_available():
        # if eager rounded float32 products to tf32, its error would hide ours
        torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_num_threads(threads)
    assert torch.get_default_dtype() == default, "a test left another default dtype behind"


@pytest.fixture(autouse=True)
def _poisoned_allocations():
    """Fills torch.empty* with NaN: an element that a kernel does not write is NaN in the result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """For tensors that are too small to share. _global_state restores the number."""
    torch.set_num_threads(1)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the operators that modules call, in order."""
    from model_helpers import count_operators

    return count_operators(monkeypatch)


@pytest.fixture
def always_gains(monkeypatch):
    """Small tensors run on the kernels too, where eager would be faster."""
    from convmixer_kernels import dispatch

    monkeypatch.setattr(dispatch, "gains", lambda *form, **more: True)


@pytest.fixture(scope="session")
def cuda_module() -> Path:
    """The built _cuda module, of this checkout's sources, and the tools that read its machine code."""
    from benchmarks.static import kernels, sass
    from convmixer_kernels import _build

    found = kernels.find_module()
    if found is None:
        pytest.skip("the CUDA module is not built: no nvcc")
    if (reason := sass.missing_tool()) is not None:
        pytest.skip(reason)
    built = found.with_name("_built.py")
    if not built.exists() or _build.source_digest() not in built.read_text():
        pytest.skip("the installed CUDA module was built from other sources")
    return found


@pytest.fixture
def run(tmp_path):
    """The results of a run of python -m benchmarks.gpu --device cpu."""
    from benchmarks import gpu_run

    run = gpu_run.Run(tmp_path / "rows.jsonl", 100, "cpu")
    yield run
    run.end_worker()

# SPDX-License-Identifier: MIT
"""A reduced grid of `python -m tests.sanitize`: fuzzed cases and failing allocations on the sanitized _cpu.

The emulated CUDA kernels are left to that command: they take minutes to compile with sanitizers.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import sanitize

needs_sanitizers = pytest.mark.skipif(sanitize.problem() is not None, reason=f"{sanitize.problem()}")


@needs_sanitizers
def test_fuzzed_cases(capfd):
    assert sanitize.run_cpu(40, []), capfd.readouterr().out


@needs_sanitizers
def test_every_allocation_fails(capfd):
    assert sanitize.run_allocations(["avx2"]), capfd.readouterr().out


@needs_sanitizers
@pytest.mark.parametrize("isa", sanitize.INSTRUCTION_SETS)
def test_a_read_beyond_a_tensor_is_reported(isa):
    """The sanitized module is the one that runs, and sees torch's tensors."""
    call = (
        "import torch; from convmixer_kernels.backends import cpu; x, y = torch.zeros(64), torch.zeros(4096);"
        f"assert cpu.native.isa() == {isa!r}; cpu.native.activation(x.data_ptr(), y.data_ptr(), 4096, 2, False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", call], env=sanitize.environment(isa), cwd=sanitize.ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr, done.stderr

# SPDX-License-Identifier: MIT
"""Options of `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("convmixer-kernels")
    group.addoption("--cases", choices=("quick", "all", "tiny"), default="quick", help="which cases (quick)")
    group.addoption("--filter", nargs="+", default=[], metavar="PATTERN", help="as python -m benchmarks ops --filter")
    group.addoption("--compile-all", action="store_true", help="torch.compile for every case, not for a few")

# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu: what can be tested of it without a GPU."""

from __future__ import annotations

import pytest

from benchmarks import gpu

_MEMCHECK = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: {}\n"
_RACECHECK = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: {}\n"


@pytest.mark.parametrize(
    ("tool", "status", "output", "clean"),
    [
        ("memcheck", 0, _MEMCHECK.format("0 errors"), True),
        ("memcheck", 0, _MEMCHECK.format("1 error"), False),
        ("memcheck", 0, _MEMCHECK.format("10 errors"), False),
        ("memcheck", 1, _MEMCHECK.format("0 errors"), False),
        ("memcheck", None, _MEMCHECK.format("0 errors"), False),
        ("memcheck", 0, "the program ended before the tool could start", False),
        ("memcheck", 0, _MEMCHECK.format("2 errors") + _MEMCHECK.format("0 errors"), False),
        ("initcheck", 0, _MEMCHECK.format("0 errors"), True),
        ("racecheck", 0, _RACECHECK.format("0 hazards displayed (0 errors, 0 warnings)"), True),
        ("racecheck", 0, _RACECHECK.format("1 hazard displayed (0 errors, 1 warning)"), False),
        ("racecheck", 0, _RACECHECK.format("0 hazards displayed (3 errors, 0 warnings)"), False),
        ("racecheck", 0, _RACECHECK.format("100 hazards displayed (100 errors, 0 warnings)"), False),
        # racecheck that found nothing to check says so in memcheck's words
        ("racecheck", 0, _MEMCHECK.format("0 errors"), False),
    ],
)
def test_only_a_clean_summary_is_clean(tool, status, output, clean):
    assert gpu.is_clean(tool, status, output) is clean

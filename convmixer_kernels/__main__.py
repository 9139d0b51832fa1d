# SPDX-License-Identifier: MIT
"""`python -m convmixer_kernels`: what was built and what would run where."""

from .info import describe

print(describe())

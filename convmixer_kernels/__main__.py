# SPDX-License-Identifier: MIT
"""`python -m convmixer_kernels`: what was built and what would run where."""

import sys

from .info import describe

try:
    print(describe())
except (ValueError, RuntimeError) as error:
    # an environment variable's value, as every operator would refuse it
    sys.exit(str(error))

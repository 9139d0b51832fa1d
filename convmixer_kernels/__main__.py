# SPDX-License-Identifier: MIT
"""`python -m convmixer_kernels` prints what was built and which backend runs each operator."""

import sys

from .info import describe

try:
    print(describe())
except (ValueError, RuntimeError) as error:
    # an environment variable has a value that every operator would refuse
    sys.exit(str(error))

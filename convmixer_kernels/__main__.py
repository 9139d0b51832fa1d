# SPDX-License-Identifier: MIT
"""`python -m convmixer_kernels` prints what was built and which backend runs each operator."""

import argparse
import sys
from pathlib import Path

from .info import describe

parser = argparse.ArgumentParser(
    prog="python -m convmixer_kernels", description="Print what was built and which backend runs each operator."
)
parser.add_argument(
    "--igemm-path",
    action="store_true",
    help="print only the folder of a module depthwise_conv2d_implicit_gemm, for PYTHONPATH, LARGE_KERNEL_CONV_IMPL or DWCONV_IMPL",
)
if parser.parse_args().igemm_path:
    print(Path(__file__).resolve().parent / "igemm")
    sys.exit()
try:
    print(describe())
except (ValueError, RuntimeError) as error:
    # an environment variable has a value that every operator would refuse
    sys.exit(str(error))

# SPDX-License-Identifier: MIT
"""python -m benchmarks.static: write docs/cuda-kernels.md and its JSON from the built CUDA module; needs no GPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.static import gemm, kernels, sass


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 written, 2 nothing to read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.partition(": ")[2])
    parser.add_argument("--module", type=Path, help="the built _cuda module (the installed one)")
    options = parser.parse_args(arguments)
    module = options.module or kernels.find_module()
    problem = "the CUDA module is not built here" if module is None else sass.missing_tool()
    if problem is not None:
        print(f"benchmarks.static: {problem}", file=sys.stderr)
        return 2
    resources = sass.resources(module)
    found, products = [], []
    for architecture in kernels.ARCHITECTURES:
        if architecture in {r.architecture for r in resources}:
            found += kernels.rows(list(sass.kernels(module, architecture, kernels.is_of_a_case)), resources)
            products += gemm.rows(list(sass.kernels(module, architecture, gemm.is_of_a_case)), resources)
    (kernels.RESULTS / "cuda-static.json").write_text(json.dumps(found, indent=1) + "\n")
    (kernels.RESULTS / "cuda-static-gemm.json").write_text(json.dumps(products, indent=1) + "\n")
    kernels.TABLE.write_text(kernels.markdown(found) + "\n" + gemm.markdown(products))
    print(f"written: {kernels.TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

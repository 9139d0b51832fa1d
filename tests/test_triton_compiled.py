# SPDX-License-Identifier: MIT
"""The Triton kernels, compiled ahead of time by triton_aot.py for GPUs that need not be here: their resources and instructions."""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from convmixer_kernels.triton_kernels import config

ROOT = Path(__file__).resolve().parent.parent


def _compile(generation: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "0"}
    command = [sys.executable, str(ROOT / "tests" / "triton_aot.py"), generation]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled():
    """The reports of triton_aot.py for each generation; two compile at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        generations = ("sm_90", "sm_80", "sm_100")
        return dict(zip(generations, pool.map(_compile, generations), strict=True))


@pytest.mark.parametrize("generation", ["sm_80", "sm_90", "sm_100"])
def test_every_configuration_compiles_and_fits(compiled, generation):
    from triton_aot import SHARED_LIMIT

    report = compiled[generation]
    assert all(row["shared"] <= SHARED_LIMIT[generation] for row in report)
    seen = {(row["list"], row["index"]) for row in report}
    for kernel in config.kernels():
        for index in range(len(config.candidates(kernel, generation))):
            assert (kernel, index) in seen, f"{kernel} {index} was not compiled"


def test_multiplies_and_adds_are_fused_whatever_the_default(compiled):
    """Triton 3.10 fuses only if asked to; _compile sets that default."""
    assert [row for row in compiled["sm_90"] if not row["options"].get("enable_fp_fusion")] == []
    loops = [row for row in compiled["sm_90"] if row["list"] == "depthwise_fma" and row["index"] == 0]
    assert loops
    assert all(row["FFMA"] > row["FMUL"] for row in loops)


@pytest.mark.parametrize("generation", ["sm_80", "sm_90", "sm_100"])
def test_chosen_configurations_do_not_spill(compiled, generation):
    spilled = [row for row in compiled[generation] if row["index"] == 0 and (row["stack"] or row["local"])]
    assert spilled == []


@pytest.mark.parametrize("generation, instruction", [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")])
def test_products_run_on_tensor_cores(compiled, generation, instruction):
    from triton_aot import PRODUCTS

    products = [row for row in compiled[generation] if row["list"].startswith(PRODUCTS) and row["index"] == 0]
    products = [row for row in products if row["kernel"] in ("gemm_kernel", "forward_kernel", "weight_grad_kernel")]
    # float32 without tf32 has none
    products = [row for row in products if "float32" not in row["case"]]
    assert len(products) >= 12
    assert [row["case"] for row in products if row[instruction] == 0] == []

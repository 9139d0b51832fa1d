# SPDX-License-Identifier: MIT
"""The GEMM kernels' part of docs/cuda-kernels.md: what kernels.py says of the others, by step of K and by output.

A step is one way through the main loop by one warp; the epilogue is what a tile adds to its steps, eval and GELU. Cycles are those
of an H100's multiprocessor for 1024 outputs (a 32x32 plane of one output channel) with C_in = C_out = C, for each unit alone:
    HBM      x once and y once; the weight comes from L2
    issue    4 warp instructions a cycle
    L1       shared memory's 128 bytes a cycle; for HGMMA, which reads it itself, 6 KB each
    tensor   2 cycles for HMMA.16816, 64 for HGMMA.64x128x16;  FMA: 128 lanes
The bound is the largest. The layer in one kernel has three parts that follow each other: its bound is the sum of theirs.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from benchmarks.static import kernels, sass

CHANNELS = (256, 1536)
_PLANE = kernels.PLANE


@dataclass(frozen=True)
class Case:
    """A kernel, and how a block's tile is shared: `warps` make `outputs` results from `depth` values of K a step."""

    name: str
    kernel: str  # regular expression of its mangled name
    layout: str
    dtype: str
    threads: int
    shared: int  # dynamic, bytes
    blocks: int  # on a multiprocessor, as the file header claims
    warps: int
    outputs: int
    depth: int
    product: str
    only: str | None = None  # the one architecture whose code it holds


def _mma(tiles: str, last: int) -> str:
    return rf"10mma_kernelI13__nv_bfloat16{tiles}ELb{last}ELb1E"


CASES = (
    *(
        case
        for last, layout in enumerate(("contiguous", "channels_last"))
        for case in (
            Case("pointwise, 128 x 128", _mma("Li4ELi8", last), layout, "bfloat16", 128, 49152, 2, 4, 16384, 32, "HMMA"),
            Case("pointwise, 64 x 64", _mma("Li2ELi4", last), layout, "bfloat16", 128, 24576, 3, 4, 4096, 32, "HMMA"),
            Case("pointwise, wgmma", rf"wgmma_kernelI13__nv_bfloat16Lb{last}E", layout, "bfloat16", 384, 217152, 1, 4,
                 16384, 64, "HGMMA", "sm_90a"),
            Case("pointwise, 128 x 128", rf"10fma_kernelILb{last}E", layout, "float32", 256, 33792, 2, 8, 16384, 8, "FFMA"),
        )
    ),
)  # fmt: skip
#: 256 pixels x 128 output channels by 16 warps, 32 values of K a step; shared memory at C = 256.
MIXER = Case("mixer layer", r"12mixer_kernelI13__nv_bfloat16Lb1E", "contiguous", "bfloat16", 512, 166400, 1, 16,
             32768, 32, "HMMA")  # fmt: skip
_Z_VALUES = 8  # of a thread, for one channel of the tile


def _is_not_eval(counts: Counter[str]) -> bool:
    """gelu_tanh divides more than integer division does; training's statistics shuffle, out of line on sm_80."""
    return counts["MUFU.RCP"] > 4 or counts["SHFL"] + counts["CALL"] > 0


def _has(kernel: sass.Kernel, loop: sass.Loop, key: str) -> bool:
    return any(kernel.blocks[b].counts[key] for b in loop.blocks)


def main_loop(kernel: sass.Kernel, product: str) -> sass.Loop:
    """The innermost loop with the products.

    Raises:
        ValueError: there is none.
    """
    fitting = [loop for loop in kernel.all_loops() if _has(kernel, loop, product)]
    if not fitting:
        raise ValueError(f"{kernel.function} on {kernel.architecture}: no loop with {product}")
    return min(fitting, key=lambda loop: len(loop.blocks))


def measure(kernel: sass.Kernel, case: Case) -> tuple[Counter[str], Counter[str]]:
    """One warp's step, and one thread's epilogue for one output (fractions)."""
    loop = main_loop(kernel, case.product)

    def prefer(*keys: str):
        return lambda counts: tuple(counts[key] for key in (case.product, *keys))

    step = kernel.once_through(loop, prefer("LDGSTS"), lambda c: c["MUFU.EX2"] > 0 or c["SHFL"] > 0)
    each = case.outputs / (32 * case.warps)
    around = [other for other in kernel.all_loops() if other is not loop and loop.blocks < other.blocks]
    if around:
        # a persistent block: what is around the main loop, in the loop over tiles
        tile = min(around, key=lambda other: len(other.blocks))
        rest = kernel.once_through(tile, prefer("MUFU.EX2", "STS", "STG.128"), _is_not_eval, loop)
    else:
        rest = kernel.once_through(kernel.whole, prefer("MUFU.EX2", "STS", "STG.128"), _is_not_eval, loop)
    epilogue = Counter({key: count / each for key, count in rest.items()})
    # staged results leave in a loop of its own
    stores = [
        kernel.once_through(other, lambda c: (c["STG.128"],))
        for other in kernel.all_loops()
        if _has(kernel, other, "STG.128") and other is not loop and other not in around
    ]
    if stores:
        cheapest = min(stores, key=lambda counts: counts["all"] / counts["STG.128"])
        epilogue.update({key: count / (8 * cheapest["STG.128"]) for key, count in cheapest.items()})
    return step, epilogue


def measure_mixer(kernel: sass.Kernel) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """One value of z, one warp's step, one output's epilogue."""
    plain = ("HMMA", "LDSM", "LDS", "SHFL", "MUFU.EX2", "LDGSTS", "STG.128")

    def through(loop: sass.Loop, avoid: str, inner: sass.Loop | None = None) -> Counter[str]:
        # a warp that is not together goes through copies of what needs it to be, which end in this
        detours = (avoid, "ENDCOLLECTIVE")
        return kernel.once_through(
            loop, lambda c: tuple(c[key] for key in plain), lambda c: any(c[key] for key in detours), inner
        )

    channels = next(loop for loop in kernel.all_loops() if _has(kernel, loop, "LDGSTS.64"))
    products = main_loop(kernel, "LDGSTS.128")
    passes = next(loop for loop in kernel.all_loops() if products.blocks < loop.blocks)
    each = MIXER.outputs / (32 * MIXER.warps)
    return (
        Counter({key: count / _Z_VALUES for key, count in through(channels, "MUFU.RCP").items()}),
        through(products, "MUFU.EX2"),
        Counter({key: count / each for key, count in through(passes, "MUFU.RCP", products).items()}),
    )


def _units(counts: Counter[str], per_output: float) -> dict[str, float]:
    """Cycles for 1024 outputs, of which each takes `per_output` of a thread's `counts`."""
    warps = _PLANE / 32 * per_output
    return {
        "issue": warps * counts["all"] / 4,
        # four warps share an HGMMA
        "L1": warps * (kernels.shared_cycles(counts) + 12 * counts["HGMMA"] + counts["SHFL"]),
        "tensor": warps * (2 * counts["HMMA.16816"] + 16 * counts["HGMMA"]),
        "FMA": warps * 32 * counts["FFMA"] / 128,
    }


def _row(case: Case, kernel: sass.Kernel, resources: sass.Resources) -> dict[str, object]:
    return {
        "name": case.name,
        "layout": case.layout,
        "dtype": case.dtype,
        "architecture": kernel.architecture,
        "registers": resources.registers,
        "spilled_bytes": resources.stack + resources.local,
        "shared": resources.shared + case.shared,
        "blocks": sass.blocks_per_multiprocessor(
            resources.registers, case.threads, resources.shared + case.shared, kernel.architecture
        ),
        "blocks_claimed": case.blocks,
    }


def _bounds(case: Case, step: Counter[str], epilogue: Counter[str]) -> dict[str, dict[str, int]]:
    _, bandwidth = kernels.measured()
    found = {}
    for c in CHANNELS:
        main = _units(step, c / case.depth * 32 * case.warps / case.outputs)
        after = _units(epilogue, 1)
        units = {"HBM": 2 * (4 if case.dtype == "float32" else 2) * _PLANE / bandwidth}
        if case.dtype == "float32":
            units["FMA"] = main["FMA"]
        units |= {key: main[key] + after[key] for key in ("issue", "L1", "tensor")}
        found[str(c)] = {key: round(value) for key, value in units.items() if value >= 1}
    return found


def rows(kernels: list[sass.Kernel], resources: list[sass.Resources]) -> list[dict[str, object]]:
    """Every case, of the kernels of one architecture.

    Raises:
        ValueError: not exactly one kernel is that of a case, or it lacks the main loop.
    """
    known = {(r.architecture, r.function): r for r in resources}

    def find(case: Case) -> sass.Kernel:
        fitting = [kernel for kernel in kernels if re.search(case.kernel, kernel.function)]
        if len(fitting) != 1:
            raise ValueError(f"{case.name} {case.layout} {case.dtype}: {len(fitting)} kernels fit {case.kernel}")
        return fitting[0]

    found = []
    for case in CASES:
        kernel = find(case)
        if case.only not in (None, kernel.architecture):
            continue
        step, epilogue = measure(kernel, case)
        found.append(
            _row(case, kernel, known[kernel.architecture, kernel.function])
            | {
                "step": {key: step[key] for key in ("all", case.product)},
                "depth": case.depth,
                "epilogue": round(epilogue["all"], 1),
                "cycles": _bounds(case, step, epilogue),
            }
        )
    kernel = find(MIXER)
    z, step, epilogue = measure_mixer(kernel)
    parts = {
        "z": _units(z, 1),
        "products": _units(step, 256 / MIXER.depth * 32 * MIXER.warps / MIXER.outputs),
        "epilogue": _units(epilogue, 1),
    }
    found.append(
        _row(MIXER, kernel, known[kernel.architecture, kernel.function])
        | {
            "step": {key: step[key] for key in ("all", "HMMA")},
            "depth": MIXER.depth,
            "z": round(z["all"], 1),
            "epilogue": round(epilogue["all"], 1),
            "parts": {
                name: {key: round(value) for key, value in units.items() if key != "FMA"}
                for name, units in parts.items()
            },
        }
    )
    return found


def is_of_a_case(function: str) -> bool:
    """Whether a kernel with this mangled name is one of these."""
    return any(re.search(case.kernel, function) for case in (*CASES, MIXER))


def markdown(all_rows: list[dict[str, object]]) -> str:
    """The sections that follow kernels.py's."""
    lines = [
        "# The products: pointwise block and layer in one kernel",
        "",
        "From the same SASS, by benchmarks/static/gemm.py, which says how: a step is one way of a warp through the main loop, for so many",
        "values of K; the epilogue is eval's, with GELU. Measured on an H100 at 64x1536x32x32, eval: mma 128 x 128 828 us contiguous",
        "and 870 channels_last, wgmma 494 and 502, where the tensor core's bounds are 652 and 326; torch's GEMM and a pass 602 and 594.",
        "What keeps wgmma from its bound is L2, at 75 % in that run: 128 x 128 tiles read 64 bytes a cycle and multiprocessor from it.",
        "",
        "| kernel | dtype | layout | code | registers | spills | shared KB | blocks | a step: instructions (products), K "
        "| epilogue, an output |",
        "| :-- | :-- | :-- | :-- | --: | --: | --: | --: | :-- | --: |",
    ]
    for r in all_rows:
        (_, total), (product, count) = r["step"].items()
        also = f"; z {r['z']:g} a value" if "z" in r else ""
        lines.append(
            f"| {r['name']} | {r['dtype']} | {r['layout']} | {r['architecture']} | {r['registers']} | {r['spilled_bytes']} "
            f"| {r['shared'] / 1024:.0f} | {r['blocks']} | {total} ({count} {product}), {r['depth']}{also} | {r['epilogue']:g} |"
        )
    units = ("HBM", "issue", "L1", "tensor", "FMA")
    lines += [
        "",
        "## Cycles of an H100 multiprocessor for 1024 outputs (sm_90a)",
        "",
        "| kernel | dtype | layout | C | " + " | ".join(units) + " | bound |",
        "| :-- | :-- | :-- | --: | " + "--: | " * len(units) + ":-- |",
    ]
    hopper = [r for r in all_rows if r["architecture"] == "sm_90a"]
    for r in (r for r in hopper if "cycles" in r):
        for c, cycles in r["cycles"].items():
            figures = " | ".join(str(cycles.get(unit, "-")) for unit in units)
            lines.append(
                f"| {r['name']} | {r['dtype']} | {r['layout']} | {c} | {figures} | {max(cycles, key=cycles.get)} |"
            )
    for r in (r for r in hopper if "parts" in r):
        total = sum(max(units.values()) for units in r["parts"].values())
        bounds = ((name, max(units, key=units.get)) for name, units in r["parts"].items())
        text = ", ".join(f"{name} {r['parts'][name][unit]} ({unit})" for name, unit in bounds)
        lines += [
            "",
            f"The mixer layer, C = 256, for 1024 values of z and of y, one part after the other: {text}; together {total} cycles.",
        ]
    return "\n".join([*lines, ""])

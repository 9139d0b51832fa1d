# SPDX-License-Identifier: MIT
"""The depthwise and batch-norm kernels' part of docs/cuda-kernels.md, from the built CUDA module's SASS.

For one 32x32 plane on an H100's multiprocessor: what each unit would be busy for if it were the only one.
    HBM      bytes read once and written once over the copy bandwidth that the GPU run measured
    issue    SASS instructions an output along the path that such a plane takes, 4 warp instructions a cycle
    L1       shared memory's 128 bytes a cycle (4 cycles for LDSM.x4 and 16-byte accesses of a warp, 2 for 8-byte ones, 1 else;
             no bank conflicts) and, of global accesses, a cycle for each 128-byte line that a warp touches
    tensor   2 cycles for HMMA.16816, 1 for HMMA.1688;  FMA: 128 lanes
A path is the most of products, 16-byte accesses and erf-GELU that one way through a loop meets, else the shortest;
loops are recognised by what they hold. Shared memory is what the launcher asks for, recorded from an emulated launch.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.static import sass

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = RESULTS / "nvidia-h100-80gb-hbm3.json"
TABLE = ROOT / "docs" / "cuda-kernels.md"
ARCHITECTURES = ("sm_80", "sm_90a")
#: Of an H100 SXM under load: it turns microseconds and bandwidth into cycles alike, so that their ratio does not depend on it.
_CLOCK, _MULTIPROCESSORS = 1.7e9, 132
#: Elements of a plane; cycles of a multiprocessor for one instruction of every element's thread.
PLANE, ISSUE = 32 * 32, 32 * 32 / 32 / 4


@dataclass(frozen=True)
class Part:
    """A loop of a kernel, found by what one way through it `has` and `lacks`, and the values that this way handles.

    "loop of products" finds the loop around the one with HMMA, "kernel" what is in no loop. `values` is a number, or the
    name of an instruction whose count times `each` it is. `times`: passes over all values.
    """

    name: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    values: str | float = 0
    each: float = 1
    times: float = 1.0


@dataclass(frozen=True)
class Case:
    """A kernel that does one primitive at (N, C, 32, 32)."""

    name: str
    kernel: str  # regular expression of its mangled name
    op: str  # a primitive
    layout: str
    dtype: str
    blocks: int  # on a multiprocessor with 228 KB, as the file header and the launch bounds claim
    passes: int  # activation-sized tensors read or written
    parts: tuple[Part, ...]
    fma: float = 0.0  # FMAs an output
    lines: int = 4  # of 128 bytes that one global access of a warp touches
    k: int = 9


def _mma(kernel: str, grad: bool, channels: int = 0) -> str:
    last = f"Li{channels}E" if channels else ""
    return rf"{kernel}I13__nv_bfloat16Lb{int(grad)}ELi1ELi9ELi4ELb1E{last}E"


# channels_last transposes the zero rows above and below an image too: 40 rows instead of 32
_HALO = 40 / 32
CASES = (
    Case(
        "depthwise eval", _mma("contiguous_kernel", False), "depthwise_eval", "contiguous", "bfloat16", 5, 2,
        (
            Part("products, epilogue, store", ("HMMA", "MUFU.EX2", "STG.128"), (), 16),
            Part("copy", ("LDGSTS.128",), ("HMMA", "STS.128"), "LDGSTS.128", 8),
            Part("item", ("loop of products",), (), 16),
        ),
    ),
    Case(
        "depthwise input gradient", _mma("contiguous_kernel", True), "depthwise_input_grad", "contiguous", "bfloat16", 4, 3,
        (
            Part("products, store", ("HMMA", "STG.128"), (), 16),
            Part("da", ("MUFU.EX2", "STS.128"), ("HMMA",), 8),
            Part("copy", ("LDGSTS.128",), ("HMMA", "STS.128"), "LDGSTS.128", 4),
            Part("item", ("loop of products",), (), 16),
        ),
    ),
    Case(
        "depthwise weight gradient", r"warp_kernelI13__nv_bfloat16Lb1ELi9E", "depthwise_weight_grad", "contiguous",
        "bfloat16", 4, 3,
        (
            Part("da, products", ("HMMA", "MUFU.EX2"), (), 16),
            Part("copy of dy and a", ("LDGSTS.128",), ("HMMA",), "LDGSTS.128", 8, 2),
            Part("copy of x", ("LDGSTS.64",), ("HMMA",), "LDGSTS.64", 4),
            Part("16 rows", ("loop of products",), (), 16),
        ),
    ),
    Case(
        "depthwise eval", _mma("channels_last_kernel", False, 16), "depthwise_eval", "channels_last", "bfloat16", 2, 2,
        (
            Part("copy", ("LDGSTS.128",), ("HMMA",), "LDGSTS.128", 8),
            Part("to planes", ("LDS.128", "STS.128"), ("HMMA",), "STS.128", 8, _HALO),
            Part("products, epilogue", ("HMMA", "MUFU.EX2"), (), 16),
            Part("channel", ("loop of products",), (), 32),
            Part("from planes, store", ("LDS.128", "STG.128", "STG"), ("HMMA",), "LDS.128", 8),
        ),
        lines=16,
    ),
    Case(
        "depthwise input gradient", _mma("channels_last_kernel", True, 16), "depthwise_input_grad", "channels_last",
        "bfloat16", 2, 3,
        (
            Part("copy of dy", ("LDGSTS.128",), ("HMMA",), "LDGSTS.128", 8),
            Part("to planes", ("LDG.128", "LDS.128", "STS.128"), ("HMMA", "MUFU.EX2"), "LDS.128", 8, _HALO),
            Part("da", ("MUFU.EX2", "STS.128"), ("HMMA",), "STS.128", 8),
            Part("products", ("HMMA",), (), 16),
            Part("channel", ("loop of products",), (), 32),
            Part("from planes, store", ("LDS.128", "STG.128", "STG"), ("HMMA",), "LDS.128", 8),
        ),
        lines=16,
    ),
    Case(
        "depthwise weight gradient", r"block_kernelI13__nv_bfloat16Li1ELi8E", "depthwise_weight_grad", "channels_last",
        "bfloat16", 2, 3,
        (
            Part("load x", ("LDG.128", "STS.128"), ("HMMA", "MUFU.EX2"), "STS.128", 8, _HALO),
            Part("load dy and a", ("LDG.128", "STS.128"), ("HMMA", "MUFU.EX2"), "STS.128", 8, 2),
            Part("da", ("MUFU.EX2", "STS.128"), ("HMMA",), "STS.128", 8),
            Part("products", ("HMMA",), ("MUFU.EX2",), 16),
        ),
        lines=32,
    ),
    Case(
        "depthwise eval", r"depthwise_forward_tileIfNS_3fma6LayoutILb0ELi9E", "depthwise_eval", "contiguous", "float32", 4, 2,
        (
            Part("FMAs", ("FFMA",), ("MUFU.EX2",), "FFMA", 1 / 81),
            Part("copy", ("LDGSTS.128",), (), "LDGSTS.128", 4, (40 / 32) ** 2),
            Part("once", ("kernel", "MUFU.EX2", "LDS.128"), (), 32),
        ),
        81,
    ),
    Case(
        "depthwise input gradient", r"depthwise_input_grad_tileIfNS_3fma6LayoutILb0ELi9E", "depthwise_input_grad",
        "contiguous", "float32", 4, 3,
        (
            Part("FMAs", ("FFMA",), ("MUFU.EX2",), "FFMA", 1 / 81),
            Part("da", ("FFMA", "MUFU.EX2", "LDG.128"), (), "LDG.128", 2, (40 / 32) ** 2),
            Part("once", ("kernel", "LDG.128", "STG.128"), (), 32),
        ),
        81,
    ),
    Case(
        "depthwise weight gradient", r"depthwise_weight_grad_tilesIfNS_3fma6LayoutILb0ELi9E", "depthwise_weight_grad",
        "contiguous", "float32", 3, 3,
        (
            Part("FMAs", ("FFMA",), ("MUFU.EX2",), "FFMA", 1 / 81),
            Part("da", ("FFMA", "MUFU.EX2", "LDG.128"), (), "LDG.128", 2),
            Part("copy of x", ("LDGSTS.128",), (), "LDGSTS.128", 4, (40 / 32) ** 2),
        ),
        81,
    ),
    *(
        Case(name, rf"{kernel}I13__nv_bfloat16\S+{functor}", op, layout, "bfloat16", blocks, passes,
             (Part("window", ("MUFU.EX2", "LDG.128"), (), 8),))
        for layout, kernel in (("contiguous", "planes_kernel"), ("channels_last", "rows_kernel"))
        for name, functor, op, passes, blocks in (
            ("normalize", "NormalizeOp", "normalize", 3, 4 if layout == "contiguous" else 3),
            ("batch norm backward", "NormBackwardOp", "norm_backward", 2, 4 if layout == "contiguous" else 3),
        )
    ),
)  # fmt: skip


def _large(k: int, steps: int, groups: int, blocks: tuple[int, int, int]) -> tuple[Case, ...]:
    """The kernels of k x k filters, k > 9: `steps` of 16 window columns, `groups` of kernel rows in the weight gradient.

    The loop over kernel rows takes four of them, two LDSM each; the code around it has room for the three that are left.
    """
    products = Part("products", ("HMMA", "LDSM"), ("MUFU.EX2", "STG.128"), "LDSM", 8 / (k - 3))
    kernel = rf"contiguous_kernelI13__nv_bfloat16Lb{{}}ELi{steps}ELi0ELi4ELb1EE"
    return (
        Case(
            f"depthwise eval, k = {k}", kernel.format(0), "depthwise_eval", "contiguous", "bfloat16", blocks[0], 2,
            (
                products,
                Part("last rows, epilogue, store", ("HMMA", "MUFU.EX2", "STG.128"), (), 16),
                Part("copy", ("LDGSTS.128",), ("HMMA", "STS.128"), "LDGSTS.128", 8),
            ),
            k=k,
        ),
        Case(
            f"depthwise input gradient, k = {k}", kernel.format(1), "depthwise_input_grad", "contiguous", "bfloat16",
            blocks[1], 3,
            (
                products,
                Part("last rows, store, item", ("HMMA", "STG.128"), (), 16),
                Part("da", ("MUFU.EX2", "STS.128"), ("HMMA",), 8),
                Part("copy", ("LDGSTS.128",), ("HMMA", "STS.128"), "LDGSTS.128", 4),
            ),
            k=k,
        ),
        Case(
            f"depthwise weight gradient, k = {k}", rf"block_kernelI13__nv_bfloat16Li{steps}ELi0EE",
            "depthwise_weight_grad", "contiguous", "bfloat16", blocks[2], 3,
            (
                Part("products", ("HMMA",), ("MUFU.EX2",), 16, 1, groups),
                Part("da", ("MUFU.EX2", "STS.128"), ("HMMA",), "STS.128", 8),
                Part("copy of dy and a", ("LDGSTS.128",), ("HMMA",), "LDGSTS.128", 8, 2),
                Part("copy of x", ("LDGSTS.64",), ("HMMA",), "LDGSTS.64", 4),
            ),
            k=k,
        ),
    )  # fmt: skip


CASES += _large(13, 2, 3, (4, 4, 1)) + _large(31, 3, 6, (4, 3, 1))

_PATH_KEYS = ("HMMA", "STG.128", "LDGSTS.128", "LDG.128")


def _prefer(wants: tuple[str, ...]):
    """HMMA and FFMA first, then erf-GELU, then the rest of what a part has."""
    return lambda counts: (
        counts["HMMA"],
        counts["MUFU.EX2"],
        *(counts[key] for key in _PATH_KEYS + wants),
        counts["FFMA"],
    )


def _is_other_case(counts: Counter[str]) -> bool:
    # gelu_tanh and training's moments divide; erf-GELU and its derivative do not
    return counts["MUFU.RCP"] > 0


def measure_part(kernel: sass.Kernel, part: Part) -> Counter[str]:
    """Instructions for one value: the cheapest loop that fits. Fractions in a Counter.

    Raises:
        ValueError: no loop fits.
    """
    if "kernel" in part.has:

        def prefer(counts: Counter[str]) -> tuple[int, ...]:
            return tuple(counts[key] for key in part.has[1:])

        # what comes before the loops divides integers too
        path = kernel.once_through(kernel.whole, prefer, lambda counts: counts["MUFU.RCP"] > 4)
        return Counter({key: count * part.times / part.values for key, count in path.items()})
    fitting = []
    for loop in kernel.all_loops():
        outer = "loop of products" in part.has
        if outer and not any(_own(kernel, inner)["HMMA"] for inner in loop.inner):
            continue
        products = next((inner for inner in loop.inner if _own(kernel, inner)["HMMA"]), None) if outer else None
        try:
            wants = _prefer(() if outer else part.has)
            if outer:
                path = kernel.once_through(loop, lambda counts: (), _is_other_case, products)
            else:
                # an integer division is no reason to avoid a block where there is no activation to tell apart
                avoid = (lambda counts: False) if "MUFU.EX2" in part.lacks else _is_other_case
                path = kernel.once_through(loop, wants, avoid)
        except ValueError:
            continue
        if not outer and (any(path[key] == 0 for key in part.has) or any(path[key] for key in part.lacks)):
            continue
        values = part.values if isinstance(part.values, (int, float)) else path[part.values]
        values = values * part.each
        fitting.append(Counter({key: count * part.times / values for key, count in path.items()}))
    if not fitting:
        raise ValueError(f"{kernel.function} on {kernel.architecture}: no loop is {part.name!r} ({part.has})")
    return min(fitting, key=lambda counts: (-counts["HMMA"], counts["all"]))


def _own(kernel: sass.Kernel, loop: sass.Loop) -> Counter[str]:
    inner = set().union(*(i.blocks for i in loop.inner)) if loop.inner else set()
    return sum((kernel.blocks[b].counts for b in loop.blocks - inner), Counter())


def lacks(function: str, counts: Counter[str]) -> list[str]:
    """What a kernel of 16-bit depthwise convolution should hold and does not."""
    rules = {
        "HMMA": counts["HMMA"] > 0,
        "LDSM": counts["LDSM"] > 0,
        # 4 bytes at a time: contiguous tensors that the warp kernel does not take, and C % 8 != 0
        "LDGSTS.128 or LDG.128": counts["LDGSTS.128"] + counts["LDG.128"] > 0
        or re.search(r"block_kernelI\w+Li\dELi[12]E", function) is not None,
        "no local memory": counts["LDL"] + counts["STL"] == 0,
    }
    if "channels_last_kernel" in function:
        rules["8 STG.128"] = counts["STG.128"] >= 8
    if re.search(r"block_kernelI\w+Li\dELi8E", function):
        # an 8x8 transpose each of x, dy and a
        rules["24 LDG.128 and STS.128"] = min(counts["LDG.128"], counts["STS.128"]) >= 24
    if "contiguous_kernel" in function:
        rules["STG.128"] = counts["STG.128"] > 0
    return [name for name, right in rules.items() if not right]


def shared_cycles(counts: Counter[str]) -> float:
    """Cycles of shared memory that a warp's instructions take."""
    cycles = 4.0 * counts["LDSM"] - 2 * counts["LDSM.x2"] - 3 * counts["LDSM.x1"]
    for name in ("LDS", "STS", "LDGSTS"):
        wide, middle = counts[f"{name}.128"], counts[f"{name}.64"]
        cycles += 4 * wide + 2 * middle + (counts[name] - wide - middle)
    return cycles


def global_lines(counts: Counter[str], lines: int) -> float:
    """Lines that a warp's global accesses touch."""
    return lines * (counts["LDG"] + counts["STG"] + counts["LDGSTS"])


@functools.cache
def launch_of(op: str, dtype: str, layout: str, k: int) -> tuple[int, int]:
    """Threads and dynamic shared memory of the first kernel that a primitive launches, from the emulation at (4, 16, 32, 32)."""
    import torch

    from convmixer_kernels import _load
    from convmixer_kernels.backends import cuda
    from convmixer_kernels.primitives import Norm

    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.zeros(4, 16, 32, 32, dtype=getattr(torch, dtype)).contiguous(memory_format=memory_format)
    ones, weight = torch.ones(16), torch.zeros(16, 1, k, k)
    norm = Norm(ones, ones, ones, ones, 1e-5)
    arguments = {
        "depthwise_eval": (x, weight, ones, "gelu", norm, True),
        "depthwise_input_grad": (x, x, weight, "gelu", norm, (ones, ones), True),
        "depthwise_weight_grad": (x, x, x, weight, ones, "gelu", norm, (ones, ones)),
        "normalize": (x, "gelu", norm, x),
        "norm_backward": (x, x, "gelu", norm),
    }[op]
    build = [sys.executable, str(ROOT / "tests" / "emulation" / "build.py")]
    path = subprocess.run(build, check=True, capture_output=True, text=True).stdout.strip()
    module = _load.from_file("_cuda_emulated", path)
    native, cuda._native = cuda._native, lambda: cuda._Native(module, None, True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EMU_LAUNCHES"] = str(Path(folder) / "launches")
        try:
            getattr(cuda, op)(*arguments)
            threads, shared = Path(os.environ["EMU_LAUNCHES"]).read_text().splitlines()[0].split()
        finally:
            del os.environ["EMU_LAUNCHES"]
            cuda._native = native
            cuda._size.cache_clear()
    return int(threads), int(shared)


def measured() -> tuple[dict[tuple[str, str, str], float], float]:
    """Cycles a plane by (primitive, layout, dtype) at (N, 1536, 32, 32), k = 9, and bytes a cycle of a copy, of a multiprocessor."""
    document = json.loads(MEASURED.read_text())
    found = {}
    # an operator's row can hold more than the primitive of that name, whose row is then called _kernel
    for row in sorted(document["results"], key=lambda row: row["op"].endswith("_kernel")):
        timed = row["implementations"].get("ours cuda", {})
        if row.get("shape", [])[1:] == [1536, 32, 32] and "median_ms" in timed:
            planes = row["shape"][0] * 1536 / _MULTIPROCESSORS
            key = row["op"].removesuffix("_kernel"), row["layout"], row["dtype"]
            found[key] = timed["median_ms"] * 1e-3 * _CLOCK / planes
    return found, document["sessions"][-1]["peaks"]["copy"] / _CLOCK / _MULTIPROCESSORS


#: Why a measurement is more than 25 % above the largest bound, by ncu in the same run: (op, layout, dtype).
_STARTS = (
    "blocks began anew every 8 items, 2.5 us each, a fifth of the time; warps issued in 61 % of the cycles, and waited for results of the "
    "last instruction most. The kernel of now takes even runs of items."
)
WHY = {
    ("depthwise_eval", "contiguous", "bfloat16"): _STARTS,
    ("depthwise_train", "contiguous", "bfloat16"): _STARTS,
    ("depthwise_input_grad", "contiguous", "bfloat16"): f"as eval: {_STARTS}",
    (
        "depthwise_weight_grad",
        "contiguous",
        "bfloat16",
    ): "warps issued in 67 % of the cycles: 16 warps a multiprocessor do not hide the latency of their own results.",
    (
        "depthwise_eval",
        "channels_last",
        "bfloat16",
    ): "copy, transposes, products and stores are phases between barriers; no unit above 54 %.",
    (
        "depthwise_input_grad",
        "channels_last",
        "bfloat16",
    ): "warps wait for the loads of dy and a (5.3 cycles an instruction), which one stage in flight does not hide.",
    (
        "depthwise_weight_grad",
        "channels_last",
        "bfloat16",
    ): "warps wait for each other at barriers (2.6 cycles an instruction); L1 at 68 %, L2 at 70 %.",
    (
        "depthwise_eval",
        "contiguous",
        "float32",
    ): "warps issued in 67 % of the cycles; the fill before and the epilogue after the FMAs overlap only with other blocks.",
    (
        "depthwise_input_grad",
        "contiguous",
        "float32",
    ): "as for eval; the exact erf and exp of da are 60 % of its instructions, computed again for the halo of each tile.",
    (
        "norm_backward",
        "contiguous",
        "bfloat16",
    ): "two reads and no write: a copy, which the floor is taken from, may not be the "
    "fastest a read can be, and 16 384 values a block leave its start and reduction visible.",
}


def row(case: Case, kernel: sass.Kernel, resources: sass.Resources) -> dict[str, object]:
    """What is known of a case without running it."""
    parts = {part.name: measure_part(kernel, part) for part in case.parts}
    total = Counter()
    for counts in parts.values():
        for key, count in counts.items():
            total[key] += count
    threads, dynamic = launch_of(case.op, case.dtype, case.layout, case.k)
    _, bandwidth = measured()
    size = 4 if case.dtype == "float32" else 2
    bounds = {
        "HBM": case.passes * size * PLANE / bandwidth,
        "issue": ISSUE * total["all"],
        "L1": PLANE / 32 * (shared_cycles(total) + global_lines(total, case.lines)),
        "tensor": PLANE / 32 * (2 * total["HMMA.16816"] + total["HMMA.1688"]),
        "FMA": PLANE * case.fma / 128,
    }
    return {
        "name": case.name,
        "op": case.op,
        "layout": case.layout,
        "dtype": case.dtype,
        "k": case.k,
        "architecture": kernel.architecture,
        "registers": resources.registers,
        "spilled_bytes": resources.stack + resources.local,
        "static_shared": resources.shared,
        "dynamic_shared": dynamic,
        "threads": threads,
        "blocks": sass.blocks_per_multiprocessor(
            resources.registers, threads, resources.shared + dynamic, kernel.architecture
        ),
        "blocks_claimed": case.blocks,
        "in_the_code": {
            key: kernel.counts[key] for key in ("HMMA", "LDSM", "LDGSTS.128", "LDG.128", "STG.128", "FFMA")
        },
        "instructions_per_output": {name: round(counts["all"], 2) for name, counts in parts.items()},
        "total_per_output": round(total["all"], 1),
        "cycles_per_plane": {name: round(cycles) for name, cycles in bounds.items() if cycles >= 1},
    }


def find_module() -> Path | None:
    """The built _cuda module, or None; not imported, so that it needs no driver."""
    import convmixer_kernels

    found = [path for folder in convmixer_kernels.__path__ for path in Path(folder).glob("_cuda.*.so")]
    return found[0] if found else None


def is_of_a_case(function: str) -> bool:
    """Whether a kernel with this mangled name is in CASES."""
    return any(re.search(case.kernel, function) for case in CASES)


def rows(kernels: list[sass.Kernel], resources: list[sass.Resources]) -> list[dict[str, object]]:
    """Every case, of the kernels of one architecture.

    Raises:
        ValueError: not exactly one kernel is that of a case, or a loop that a case names is not in it.
    """
    known = {(r.architecture, r.function): r for r in resources}
    found = []
    for case in CASES:
        fitting = [kernel for kernel in kernels if re.search(case.kernel, kernel.function)]
        if len(fitting) != 1:
            raise ValueError(f"{case.name} {case.layout} {case.dtype}: {len(fitting)} kernels fit {case.kernel}")
        found.append(row(case, fitting[0], known[fitting[0].architecture, fitting[0].function]))
    return found


def markdown(all_rows: list[dict[str, object]]) -> str:
    """The table for documentation."""
    times, _ = measured()
    lines = [
        "# What the CUDA kernels are made of, and what that predicts",
        "",
        "Written by `python -m benchmarks.static` from the SASS of the built module and, in the column `measured`, from",
        "[the H100 run](../benchmarks/results/nvidia-h100-80gb-hbm3.json). (64, 1536, 32, 32) in bfloat16 and (32, 1536, 32, 32) in",
        "float32, k = 9 where no other is named, GELU. benchmarks/static/kernels.py says how the numbers are counted.",
        "",
    ]
    for architecture in ARCHITECTURES:
        some = [r for r in all_rows if r["architecture"] == architecture]
        if not some:
            continue
        lines += [
            f"## {architecture}",
            "",
            "| kernel | dtype | layout | registers | spills | shared KB | blocks | instructions an output |",
            "| :-- | :-- | :-- | --: | --: | --: | --: | :-- |",
        ]
        for r in some:
            parts = ", ".join(f"{name} {count:g}" for name, count in r["instructions_per_output"].items())
            shared = (r["static_shared"] + r["dynamic_shared"]) / 1024
            lines.append(
                f"| {r['name']} | {r['dtype']} | {r['layout']} | {r['registers']} | {r['spilled_bytes']} | {shared:.0f} "
                f"| {r['blocks']} | **{r['total_per_output']:g}**: {parts} |"
            )
        lines.append("")
    units = ("HBM", "issue", "L1", "tensor", "FMA")
    lines += [
        "## Cycles of an H100 multiprocessor for a 32x32 plane (sm_90a)",
        "",
        "Each column alone; the largest is the predicted bound. The H100 run of 2026-11-28 measured; contiguous forward and input gradient",
        "have changed since.",
        "",
        "| kernel | dtype | layout | " + " | ".join(units) + " | bound | measured | bound / measured |",
        "| :-- | :-- | :-- | " + "--: | " * len(units) + ":-- | --: | --: |",
    ]
    misses = []
    for r in (r for r in all_rows if r["architecture"] == "sm_90a"):
        cycles = r["cycles_per_plane"]
        bound = max(cycles, key=cycles.get)
        now = times.get((r["op"], r["layout"], r["dtype"])) if r["k"] == 9 else None
        shown = "-", "-"
        if now is not None:
            shown = f"{now:.0f}", f"{100 * cycles[bound] / now:.0f} %"
            if now > 1.25 * cycles[bound]:
                misses.append((r, bound, now))
        figures = " | ".join(str(cycles.get(unit, "-")) for unit in units)
        lines.append(f"| {r['name']} | {r['dtype']} | {r['layout']} | {figures} | {bound} | {shown[0]} | {shown[1]} |")
    lines += ["", "## Where the prediction is more than 25 % off", ""]
    for r, bound, now in misses:
        cycles = r["cycles_per_plane"]
        why = WHY.get((r["op"], r["layout"], r["dtype"]), "not understood.")
        lines.append(
            f"- {r['name']}, {r['dtype']}, {r['layout']}: {now:.0f} cycles, {now / cycles[bound]:.1f} times the bound by {bound}: {why}"
        )
    return "\n".join([*lines, ""])

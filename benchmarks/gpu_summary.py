# SPDX-License-Identifier: MIT
"""What a run of benchmarks.gpu found: faults first, then each kernel beside its prediction and what to try, then all times."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import tables
from benchmarks.machine import ROOT

#: In the folder of a run.
FILE = "summary.md"
_STATIC = ROOT / "benchmarks" / "results"
#: The static tables hold cycles of this architecture only (docs/cuda-kernels.md), for planes of so many values.
_CAPABILITY, _PLANE = "9.0", 32 * 32
#: docs/cuda-kernels.md calls a prediction off from here on.
_NEAR = 1.25
#: What makes a kernel faster that is as fast as the unit that bounds it.
_UNITS = {
    "HBM": "at the pace of a copy: only fewer bytes help",
    "issue": "fewer instructions an output",
    "L1": "fewer or wider accesses to shared memory",
    "tensor": "fewer products that are thrown away",
    "FMA": "tensor cores, or fewer multiply-adds",
    "parts": "depthwise, products and epilogue run one after the other: overlap them",
}
#: ncu's names of the reasons why warps do not issue, and what shortens them.
_STALLS = {
    "long_scoreboard": "global loads are waited for: load earlier, or more warps",
    "short_scoreboard": "shared memory is waited for: fewer bank conflicts, or load earlier",
    "barrier": "warps wait for each other: fewer barriers, or more blocks",
    "wait": "results of the last instruction are waited for: more independent work, or more warps",
    "math_pipe_throttle": "the arithmetic units are full: fewer instructions",
    "mio_throttle": "shared memory's queue is full: fewer, wider accesses",
    "lg_throttle": "the queue of global accesses is full: fewer, wider accesses",
    "not_selected": "enough warps are ready: fewer instructions",
    "dispatch_stall": "the dispatcher waits: fewer registers read an instruction",
    "no_instruction": "instructions are waited for: less unrolling",
    "membar": "memory fences are waited for: fewer of them",
}


class Predicted(NamedTuple):
    """A kernel's time in microseconds, and the unit that bounds it."""

    case: str
    implementation: str
    measured: float
    predicted: float
    unit: str


def predictions(document: dict[str, Any]) -> Iterator[Predicted]:
    """Measured and predicted time of each row that the static tables know.

    The tables' cycles become time by this run's clock and count of multiprocessors, and a row's bytes by its copy.
    """
    if document.get("gpu", {}).get("capability") != _CAPABILITY:
        return
    named = _kernel_rows(document["results"])
    for row in document["results"]:
        if "shape" not in row or row.get("session", -1) < 0 or row["case"] in named:
            continue
        session = document["sessions"][row["session"]]
        if "clock_hz" not in session:
            continue
        n, _, h, w = row["shape"]
        if h * w != _PLANE:
            continue
        each = n * row["channels_out"] / document["gpu"]["multiprocessors"] / session["clock_hz"]
        for name, timed in row["implementations"].items():
            cycles = _cycles(row, name) if "median_ms" in timed else {}
            if cycles:
                seconds = {unit: count * each for unit, count in cycles.items() if unit != "HBM"}
                seconds["HBM"] = row["bytes"] / session["peaks"]["copy"]
                unit = max(seconds, key=seconds.__getitem__)
                yield Predicted(row["case"], name, 1e3 * timed["median_ms"], 1e6 * seconds[unit], unit)


def _kernel_rows(rows: list[dict[str, Any]]) -> set[str]:
    """The cases of operators that contain more than the kernel of that name, where the kernel has a row of its own."""
    return {row["case"].replace("_kernel", "", 1) for row in rows if row["op"].endswith("_kernel")}


def _cycles(row: dict[str, Any], name: str) -> dict[str, float]:
    """Cycles by unit for a plane of 32x32 values; empty if no table has the kernel."""
    op, words = row["op"].removesuffix("_kernel"), name.split()
    if words[:2] != ["ours", "cuda"]:
        return {}
    like = {"layout": row["layout"], "dtype": row["dtype"], "architecture": "sm_90a"}
    if words == ["ours", "cuda"] and op != "pointwise_eval":
        # the tables have k = 9 for operators without a kernel size too
        kernel = row["kernel"] if op.startswith("depthwise") else 9
        return next(
            (each["cycles_per_plane"] for each in _table("cuda-static") if _fits(each, like, op=op, k=kernel)), {}
        )
    if op == "pointwise_eval" and len(words) == 3:
        kernels = {"fused": "pointwise, 128 x 128", "wgmma": "pointwise, wgmma"}
        found = (e for e in _table("cuda-static-gemm") if _fits(e, like, name=kernels.get(words[2])))
        return next((each["cycles"].get(str(row["shape"][1]), {}) for each in found), {})
    if (op, words[2:], row["shape"][1]) == ("layer_eval", ["layer"], 256):
        found = (each["parts"].values() for each in _table("cuda-static-gemm") if _fits(each, like, name="mixer layer"))
        return next(({"parts": sum(max(part.values()) for part in parts)} for parts in found), {})
    return {}


def _fits(entry: dict[str, Any], *wanted: dict[str, Any], **more: Any) -> bool:
    return all(entry.get(key) == value for each in (*wanted, more) for key, value in each.items())


def _table(name: str) -> list[dict[str, Any]]:
    path: Path = _STATIC / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def advice(found: Predicted, document: dict[str, Any]) -> str:
    """What to try next: by the unit if the kernel is near its bound, else by why its warps did not issue."""
    if found.measured <= _NEAR * found.predicted:
        return f"at its bound, {found.unit}: {_UNITS[found.unit]}"
    launches = document.get("profile", {}).get("kernels", ())
    launches = [
        launch
        for launch in launches
        if (launch.get("case"), launch.get("implementation")) == (found.case, found.implementation)
    ]
    if not launches:
        return "not profiled: ncu's stall reasons say why it is not at its bound"
    longest = max(launches, key=lambda launch: launch.get("us", 0))
    used = {unit: longest.get(f"{unit.lower()}_percent", 0) for unit in ("DRAM", "L1", "L2", "issue")}
    unit = max(used, key=used.__getitem__)
    stalls = [
        f"{reason} {value:g} ({_STALLS.get(reason, '?')})" for reason, value in longest["stalls_per_issue"].items()
    ]
    return f"busiest unit {unit} {used[unit]:.0f} %; warps wait for {', '.join(stalls[:2]) or 'nothing'}"


def summary(document: dict[str, Any]) -> str:
    """As Markdown."""
    timed = [row for row in document["results"] if row["implementations"]]
    lines = [*_faults(document), "", "## Kernels beside their prediction", "", *_predicted(document)]
    lines += ["", "## Times", "", *tables.markdown_lines(tables.operators(timed, "cuda"), 3), ""]
    lines += [f"- {backend}: {reason}" for backend, reason in document.get("absent", {}).items()]
    for key in ("profile", "sanitizer"):
        if "skipped" in document.get(key, {}):
            lines.append(f"- {key}: {document[key]['skipped']}")
    seconds: Counter[str] = Counter()
    for each in document.get("steps", []):
        seconds[each["step"]] += each["seconds"]
    steps = ", ".join(f"{step} {taken:.0f} s" for step, taken in seconds.items())
    return "\n".join([*lines, f"- steps: {steps}", ""])


def _faults(document: dict[str, Any]) -> list[str]:
    lines = [f"- BROKEN {each['job']}: {each['error']}" for each in document.get("broken", [])]
    for key in ("checks", "results"):
        lines += [f"- WRONG {tables.explain(row, each)}" for row in document.get(key, []) for each in row["wrong"]]
    for key in ("tests", "sanitizer"):
        found = document.get(key, {})
        if found and not found["ok"]:
            lines.append(f"- {key.upper()} NOT OK: {found.get('summary', '')}")
            lines += [f"  {line}" for line in found.get("failures", [])]
    for key, left in document.items():
        if key.endswith("_left_out") and left:
            lines.append(f"- OUT OF TIME {key.removesuffix('_left_out')}: {len(left)} left out, from {left[0]} on")
    for key in ("profile", "tests"):
        if document.get(key, {}).get("finished") is False:
            lines.append(f"- OUT OF TIME {key}")
    return ["# Faults", "", *(lines or ["None: nothing is wrong, broke or was left out."])]


def _predicted(document: dict[str, Any]) -> list[str]:
    found = sorted(predictions(document), key=lambda each: each.predicted / each.measured)
    if not found:
        return ["No row that docs/cuda-kernels.md predicts: it has cycles of sm_90a, for planes of 32x32."]
    headings = ["kernel", "what to try", "measured, us", "predicted, us", "measured / predicted", "bound"]
    cells = [
        [
            f"{each.case}, {each.implementation}",
            advice(each, document),
            f"{each.measured:.1f}",
            f"{each.predicted:.1f}",
            f"{each.measured / each.predicted:.2f}",
            each.unit,
        ]
        for each in found
    ]
    note = (
        "Predicted: the bound of docs/cuda-kernels.md at this run's copy, multiprocessors and the clock of an idle one."
    )
    return [*tables.markdown_lines((headings, cells), 2), "", note]

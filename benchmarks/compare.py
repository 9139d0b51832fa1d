# SPDX-License-Identifier: MIT
"""python -m benchmarks compare A.json B.json: what became faster or slower between two runs, beyond their noise.

A change counts if the 20 % to 80 % ranges of the two runs do not overlap. Only files of one machine say something about code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.tables import milliseconds

_SAME = ("device", "instruction_set", "threads", "torch")


class Range(NamedTuple):
    """Milliseconds of one implementation of one case."""

    median: float
    low: float  # 20 % of the calls took less
    high: float  # 20 % took more


class Change(NamedTuple):
    """One implementation of one case in both files."""

    case: str
    implementation: str
    before: Range
    after: Range

    @property
    def ratio(self) -> float:
        """Above 1 is faster than before."""
        return self.before.median / self.after.median

    @property
    def beyond_noise(self) -> bool:
        return self.after.low > self.before.high or self.after.high < self.before.low


def ranges(document: Mapping[str, object]) -> dict[tuple[str, str], Range]:
    """What a file holds, by case and implementation."""
    return {
        (row["case"], name): Range(each["median_ms"], each["q20_ms"], each["q80_ms"])
        for row in document["results"]
        for name, each in row["implementations"].items()
        if "median_ms" in each
    }


def changes(before: Mapping[str, object], after: Mapping[str, object]) -> list[Change]:
    """Of what both files have, the largest change first."""
    old, new = ranges(before), ranges(after)
    both = [Change(*key, old[key], new[key]) for key in old if key in new]
    return sorted(both, key=lambda change: -max(change.ratio, 1 / change.ratio))


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; with --fail 1 if one of ours is slower beyond noise; 2 if the files cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__.partition(": ")[2])
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--all", action="store_true", help="peers too, not only ours")
    parser.add_argument("--fail", action="store_true", help="exit with 1 if one of ours became slower beyond noise")
    options = parser.parse_args(arguments)
    try:
        before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
        found = changes(before, after)
        missing = ranges(before).keys() ^ ranges(after).keys()
        differing = {key: [document["environment"].get(key) for document in (before, after)] for key in _SAME}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        print(f"benchmarks compare: not two files of benchmarks: {error!r}", file=sys.stderr)
        return 2
    differing = {key: values for key, values in differing.items() if values[0] != values[1]}
    for key, (old, new) in differing.items():
        print(f"note: {key} differs: {old} and {new}")
    if options.fail and "device" in differing:
        print("benchmarks compare: --fail: two machines say nothing about a change of the code", file=sys.stderr)
        return 2
    if not found:
        print("benchmarks compare: the files have no case in common", file=sys.stderr)
        return 2
    shown = [each for each in found if options.all or each.implementation.startswith("ours")]
    moved = [each for each in shown if each.beyond_noise]
    for heading, listed in (
        ("faster", [each for each in moved if each.ratio > 1]),
        ("slower", [each for each in moved if each.ratio <= 1]),
    ):
        print(f"{heading}: {len(listed)}")
        for each in listed:
            times = f"{milliseconds(each.before.median)} -> {milliseconds(each.after.median)} ms"
            print(f"  {each.ratio:6.2f}x  {times:<24}{each.implementation:<24}{each.case}")
    print(f"within noise: {len(shown) - len(moved)}; in one file only: {len(missing)}")
    return 1 if options.fail and any(each.ratio <= 1 for each in moved) else 0


if __name__ == "__main__":
    sys.exit(main())

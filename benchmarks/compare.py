# SPDX-License-Identifier: MIT
"""python -m benchmarks compare A.json B.json: what of ours became faster or slower between two runs, beyond their noise.

A change counts if the 20 % to 80 % ranges of the two runs do not overlap. Only files of one machine say something about code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.tables import milliseconds

_SAME = ("device", "instruction_set", "threads", "torch")


def timed(document: Mapping[str, object]) -> dict[tuple[str, str], dict[str, float]]:
    """What a file says of ours, by case and implementation: median_ms, q20_ms, q80_ms and more."""
    return {
        (row["case"], name): each
        for row in document["results"]
        for name, each in row["implementations"].items()
        if "median_ms" in each and name.startswith("ours")
    }


def changes(before: Mapping[str, object], after: Mapping[str, object]) -> dict[tuple[str, str], float]:
    """By how much what both files have became faster (above 1) or slower beyond noise, the largest change first."""
    old, new = timed(before), timed(after)
    found = {
        key: old[key]["median_ms"] / new[key]["median_ms"]
        for key in old
        if key in new and (new[key]["q20_ms"] > old[key]["q80_ms"] or new[key]["q80_ms"] < old[key]["q20_ms"])
    }
    return dict(sorted(found.items(), key=lambda each: -max(each[1], 1 / each[1])))


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; with --fail 1 if one of ours is slower beyond noise; 2 if the files cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__.partition(": ")[2])
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--fail", action="store_true", help="exit with 1 if one of ours became slower beyond noise")
    options = parser.parse_args(arguments)
    try:
        before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
        old, new, moved = timed(before), timed(after), changes(before, after)
        machines = {key: [document["environment"].get(key) for document in (before, after)] for key in _SAME}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        print(f"benchmarks compare: not two files of benchmarks: {error!r}", file=sys.stderr)
        return 2
    for key, (first, second) in machines.items():
        if first != second:
            print(f"note: {key} differs: {first} and {second}")
    if options.fail and machines["device"][0] != machines["device"][1]:
        print("benchmarks compare: --fail: two machines say nothing about a change of the code", file=sys.stderr)
        return 2
    both = old.keys() & new.keys()
    if not both:
        print("benchmarks compare: the files have no case of ours in common", file=sys.stderr)
        return 2
    slower = [key for key, ratio in moved.items() if ratio <= 1]
    for heading, keys in (("faster", [key for key in moved if key not in slower]), ("slower", slower)):
        print(f"{heading}: {len(keys)}")
        for key in keys:
            times = f"{milliseconds(old[key]['median_ms'])} -> {milliseconds(new[key]['median_ms'])} ms"
            print(f"  {moved[key]:6.2f}x  {times:<24}{key[1]:<24}{key[0]}")
    print(f"within noise: {len(both) - len(moved)}; in one file only: {len(old.keys() ^ new.keys())}")
    return 1 if options.fail and slower else 0

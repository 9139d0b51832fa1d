# SPDX-License-Identifier: MIT
"""What is made of the benchmarks' JSON files: comparisons, tables, pictures and the page; and what of files that are none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from benchmarks.optional import require

from benchmarks import __main__ as command
from benchmarks import compare, environment, report, report_ops

pytest.importorskip("rich", reason="the benchmarks need rich: pip install '.[bench]'")

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def test_compare_tells_change_from_noise(tmp_path, capsys):
    def document(**times: tuple[float, float, float]) -> dict:
        rows = [
            {
                "case": name,
                "op": "depthwise_eval",
                "implementations": {"ours cpu": dict(zip(("median_ms", "q20_ms", "q80_ms"), each, strict=True))},
            }
            for name, each in times.items()
        ]
        return {"environment": {"device": "x"}, "results": rows}

    before = document(a=(1.0, 0.9, 1.1), b=(1.0, 0.9, 1.1), c=(1.0, 0.9, 1.1), gone=(1.0, 1.0, 1.0))
    after = document(a=(0.5, 0.4, 0.6), b=(1.2, 1.05, 1.3), c=(2.0, 1.8, 2.2))
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, each in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(each))
    arguments = ["compare", *map(str, paths)]
    assert command.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "faster: 1"
    assert lines[1].split() == ["2.00x", "1.00", "->", "0.500", "ms", "ours", "cpu", "a"]
    assert lines[2] == "slower: 1"
    assert lines[3].split()[0] == "0.50x"
    assert lines[4] == "within noise: 1; in one file only: 1"
    assert command.main([*arguments, "--fail"]) == 1
    capsys.readouterr()
    # another machine: told, and no verdict about the code
    paths[0].write_text(json.dumps(before | {"environment": {"device": "y"}}))
    assert command.main(arguments) == 0
    assert capsys.readouterr().out.startswith("note: device differs: y and x")
    assert command.main([*arguments, "--fail"]) == 2
    assert "two machines" in capsys.readouterr().err
    zero = document(a=(0.0, 0.0, 0.0))
    for unfit in ({}, [], {"results": before["results"]}, document(other=(1.0, 1.0, 1.0)), zero, {"results": [1]}):
        paths[0].write_text(json.dumps(unfit))
        assert command.main(arguments) == 2
        assert "benchmarks compare: " in capsys.readouterr().err
    for text in ("", "{"):
        paths[0].write_text(text)
        assert command.main(arguments) == 2


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"kind": "operators", "results": []}', '{"results": [], "environment": {}, "quick": false}'],
)
def test_a_report_of_no_results_ends_without_a_traceback(tmp_path, capsys, content):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install '.[bench]'")
    path, readme = tmp_path / "x.json", tmp_path / "README.md"
    path.write_text(content)
    readme.write_text(text := f"{report.BEGIN}\n{report.END}\n{report.OPERATORS_BEGIN}\n{report.OPERATORS_END}\n")
    arguments = ["report", str(path), "--readme", str(readme), "--picture", str(tmp_path / "docs" / "speedup.png")]
    assert command.main([*arguments, "--page", str(tmp_path / "page.html")]) == 2
    assert "benchmarks.report: " in capsys.readouterr().err
    assert readme.read_text() == text


def test_files_name_no_folder_of_the_machine():
    assert str(ROOT) not in json.dumps(environment.describe(CPU, None))
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert "/convmixer_kernels/" not in path.read_text()


def test_compare_reads_every_committed_file():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        document = json.loads(path.read_text())
        if isinstance(document, list):
            # the static table of the CUDA kernels: nothing was timed
            continue
        assert len(compare.ranges(document)) >= len(document["results"]) // 2
        assert all(not change.beyond_noise for change in compare.changes(document, document))


# ---- the report ----


@pytest.fixture
def committed() -> Path:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install '.[bench]'")
    return ROOT / "benchmarks" / "results" / "cpu-ops.json"


def test_report_writes_table_pictures_and_a_page_that_loads_nothing(tmp_path, committed):
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "page.html"
    readme.write_text(f"before\n{report.OPERATORS_BEGIN}\nold\n{report.OPERATORS_END}\nafter\n")
    arguments = ["report", str(committed), "--readme", str(readme), "--picture", str(tmp_path / "docs" / "speedup.png")]
    assert command.main([*arguments, "--page", str(page)]) == 0
    document, text = json.loads(committed.read_text()), readme.read_text()
    assert "old" not in text
    assert text.endswith("after\n")
    row = next(row for row in document["results"] if row["op"] == "depthwise_eval")
    median = report_ops.milliseconds(row["implementations"]["ours cpu"]["median_ms"])
    assert f"| {report_ops.title(row)} | float32 | contiguous | {median} |" in text
    for name in ("operators.png", "kernel-size.png", "roofline.png"):
        with require("PIL.Image").open(tmp_path / "docs" / name) as image:
            assert image.width > 800
    written = page.read_text()
    assert written.count("<img ") == 3
    assert written.count("<tr>") == len(document["results"]) + 1
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", written)
    assert "http" not in re.sub(r"base64,[^\"]*", "", written)


def test_the_readme_is_what_the_committed_files_say(tmp_path, committed, monkeypatch):
    """Nobody edits a figure by hand, and no file is newer than its table."""
    whole = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(whole)
    monkeypatch.chdir(ROOT)
    arguments = ["report", "--readme", str(tmp_path / "README.md"), "--picture", str(tmp_path / "docs" / "speedup.png")]
    assert command.main([*arguments, "--page", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "README.md").read_text() == whole


def test_tables_mark_what_is_wrong_missing_or_inexact():
    def row(**more) -> dict:
        fields = {"op": "depthwise_eval", "shape": [1, 2, 3, 4], "channels_out": 2, "kernel": 3, "dtype": "float32"}
        timed = {"median_ms": 2.0, "percent_of_floor": 50.0, "peak_bytes": 1 << 21}
        found = {"ours cpu": timed, "eager NCHW": {**timed, "median_ms": 1.0}, "clone": {**timed, "median_ms": 0.1}}
        base = {
            "layout": "contiguous",
            "implementations": found,
            "absent": {"openvino": "why"},
            "wrong": [],
            "passed": True,
        }
        return {**fields, **base, **more}

    names = ["ours cpu", "eager NCHW", "openvino"]
    good = row()
    assert report_ops.cells(good, names)[3:] == ["2.00", "1.00", "-", "2.0 / 2.0", "50 %", "0.50x"]
    good["implementations"]["eager NCHW"]["passed"] = False
    assert report_ops.cells(good, names)[4] == "1.00*"
    wrong = row(wrong=[{"implementation": "ours cpu"}], passed=False)
    del wrong["implementations"]["ours cpu"]
    assert report_ops.cells(wrong, names)[3:] == ["WRONG", "1.00", "-", "- / 2.0", "-", "-"]
    assert [report_ops.milliseconds(value) for value in (0.01234, 0.1234, 1.234, 12.34, 123.4)] == [
        "0.0123",
        "0.123",
        "1.23",
        "12.3",
        "123",
    ]

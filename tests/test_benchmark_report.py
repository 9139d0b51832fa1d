# SPDX-License-Identifier: MIT
"""Comparisons, tables and pictures from the benchmarks' JSON files; and the error for any other file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import compare, machine, ops, plots, report, tables, training

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def test_compare_tells_change_from_noise(tmp_path, capsys):
    def document(**times: tuple[float, float, float]) -> dict:
        rows = [
            {
                "case": name,
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
    # another machine: a note, and no verdict about the code
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


READMES = "before\n<!-- cpu:begin -->\nold\n<!-- cpu:end -->\n<!-- gpu:begin -->\n<!-- gpu:end -->\nafter\n"
PERFORMANCE = "".join(f"{name}\n<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in (*report.KINDS, "rows"))


@pytest.fixture
def pages(tmp_path, monkeypatch) -> None:
    """In a folder that has documents with every marker, and the committed results."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install '.[bench]'")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(READMES)
    (tmp_path / "docs" / "performance.md").write_text(PERFORMANCE)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / report.RESULTS).symlink_to(ROOT / report.RESULTS)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"kind": "operators", "results": []}', '{"results": [], "environment": {}, "quick": false}'],
)
def test_a_report_of_no_results_ends_without_a_traceback(tmp_path, capsys, pages, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    assert command.main(["report", str(path)]) == 2
    assert "benchmarks report: " in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == READMES
    assert (tmp_path / "docs" / "performance.md").read_text() == PERFORMANCE


def test_files_name_no_folder_of_the_machine():
    assert str(ROOT) not in json.dumps(machine.describe(CPU, None))
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert "/convmixer_kernels/" not in path.read_text()


def committed() -> dict[str, dict]:
    """The committed results by kind, less the static tables of the CUDA kernels: nothing was timed there."""
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    return {document["kind"]: document for document in found if isinstance(document, dict)}


def test_committed_files_have_one_schema():
    """Rows of every command and device: ops.py says what they contain, and only right results have a time."""
    documents = committed()
    assert set(documents) == set(report.KINDS)
    for kind, document in documents.items():
        assert document["environment"]["device_type"] in ("cpu", "cuda")
        assert len({row["case"] for row in document["results"]}) == len(document["results"])
        if kind == "training":
            # memory beside times, and whole models alone: the next test
            continue
        for row in document["results"]:
            assert row["op"] in ops.OPERATORS or row["op"] in ops.MODELS
            wrong = {each["implementation"] for each in row["wrong"]}
            for name, each in row["implementations"].items():
                assert 0 < each["q20_ms"] <= each["median_ms"] <= each["q80_ms"]
                assert name not in wrong
            if row["op"] in ops.OPERATORS and ops.OPERATORS[row["op"]].part:
                assert {name.split()[0] for name in row["implementations"]} <= {"ours", "clone"}
        assert len(compare.timed(document)) >= len(document["results"])
        assert compare.changes(document, document) == {}


def test_committed_training_has_its_schema():
    document = committed()["training"]
    assert {row["model"] for row in document["results"]} >= set(training.CHOSEN)
    for row in document["results"]:
        assert {*row["implementations"], *row["absent"]} >= {"eager NCHW", "eager channels_last", "compile"}
        assert tables.ours(row)
        for each in row["implementations"].values():
            assert 0 < each["saved_bytes"] < each["peak_bytes"]
            assert 0 < each["q20_ms"] <= each["median_ms"] <= each["q80_ms"]
            assert each["images_per_second"] == pytest.approx(1e3 * row["batch"] / each["median_ms"])


def test_report_writes_tables_and_pictures(tmp_path, pages):
    picture = pytest.importorskip("PIL.Image", reason="needs Pillow")
    assert command.main(["report"]) == 0
    documents, readme = committed(), (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!-- cpu:begin -->\n")
    assert readme.endswith("<!-- gpu:end -->\nafter\n")
    assert "old" not in readme
    for heading in ("float32, milliseconds", "bfloat16, milliseconds"):
        table = readme.partition(f"| {heading} |")[2].partition("\n\n")[0].splitlines()
        # the rest of the heading, the rule, the rows
        assert 2 < len(table) - 2 <= 8
    performance = (tmp_path / "docs" / "performance.md").read_text()
    assert "old" not in performance
    for kind, document in documents.items():
        row = next(row for row in document["results"] if tables.ours(row))
        median = tables.milliseconds(tables.median(row, tables.ours(row)))
        block = performance.partition(f"<!-- {kind}:begin -->")[2].partition(f"<!-- {kind}:end -->")[0]
        if kind == "training":
            rate = tables.milliseconds(row["implementations"][tables.ours(row)]["images_per_second"])
            assert re.search(rf"\| {re.escape(row['label'])}.*\| {tables.ours(row)} \|.*\| {rate} \| 1.00x \|", block)
            continue
        assert re.search(
            rf"\| {re.escape(row['label'] if kind == 'models' else tables.title(row))}.*\| {median} \|", block
        )
        assert tables.machine(document) in block
    for name, operator in ops.OPERATORS.items():
        assert f"| `{name}` | {operator.contains} |" in performance
    pictures = [name for each in plots.PICTURES.values() for name in each]
    assert sorted(pictures) == ["kernel-size.png", "operators.png", "roofline.png", "speedup.png"]
    for name in pictures:
        with picture.open(tmp_path / "docs" / name) as image:
            assert image.width > 800
    # again: the same text, and the page of it
    pytest.importorskip("markdown", reason="needs the library markdown")
    assert command.main(["report", "--page", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<table>") == sum(line.startswith("| :--") for line in performance.splitlines()) > 3
    assert (tmp_path / "README.md").read_text() == readme
    assert (tmp_path / "docs" / "performance.md").read_text() == performance


def test_a_named_file_takes_the_place_of_its_kind(tmp_path, pages):
    document = committed()["models"]
    document["environment"]["cpu"] = "Another CPU"
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document))
    assert command.main(["report", str(path)]) == 0
    performance = (tmp_path / "docs" / "performance.md").read_text()
    assert performance.count("Another CPU") == 1
    assert tables.machine(committed()["operators"]) in performance
    # README.md's table has rows of both
    assert "Another CPU" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("spoilt", ["", "<!-- rows:end -->\n<!-- rows:begin -->", "<!-- rows:begin -->"])
def test_a_missing_marker_is_told_and_nothing_is_written(tmp_path, capsys, pages, spoilt):
    path = tmp_path / "docs" / "performance.md"
    path.write_text(text := PERFORMANCE.partition("<!-- rows:begin -->")[0] + spoilt)
    assert command.main(["report"]) == 2
    assert "must contain <!-- rows:begin --> and then <!-- rows:end -->, once each" in capsys.readouterr().err
    assert path.read_text() == text
    assert (tmp_path / "README.md").read_text() == READMES


def test_the_documents_are_what_the_committed_files_say(tmp_path, pages):
    """Nobody edits a figure by hand, and no file is newer than its table: else run python -m benchmarks report."""
    names = ("README.md", "docs/performance.md")
    for name in names:
        (tmp_path / name).write_text((ROOT / name).read_text())
    assert command.main(["report"]) == 0
    for name in names:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()


def row(**more) -> dict:
    fields = {"op": "depthwise_eval", "shape": [1, 2, 3, 4], "channels_out": 2, "kernel": 3, "dtype": "float32"}
    timed = {"median_ms": 2.0, "percent_of_floor": 50.0}
    found = {"ours cpu": timed, "eager NCHW": {**timed, "median_ms": 1.0}, "clone": {**timed, "median_ms": 0.1}}
    base = {
        "case": "c",
        "layout": "contiguous",
        "implementations": found,
        "absent": {"openvino": "why"},
        "wrong": [],
    }
    return {**fields, **base, **more}


def test_tables_mark_what_is_wrong_missing_inexact_or_a_sum():
    headings, (cells,) = tables.operators([row()], "cpu")
    assert headings[3:] == ["ours", "eager NCHW", "of the floor", "best peer / ours"]
    assert cells[3:] == ["2.00", "1.00", "50 %", "0.50x"]
    inexact = row()
    inexact["implementations"]["eager NCHW"]["passed"] = False
    inexact["implementations"]["ours cpu"] = {"median_ms": 2.0, "sum_of": ["a", "b"]}
    assert tables.operators([inexact], "cpu")[1][0][3:] == ["2.00+", "1.00*", "-", "0.50x"]
    document = {"results": [inexact], "environment": {"device_type": "cpu"}, "sessions": []}
    notes = "\n".join(tables.operator_notes(document))
    assert "+: a and b, two rows of the same run added." in notes
    assert "*: an error of more than twice" in notes
    assert "- openvino: why." in notes
    failed = {"implementation": "ours cpu", "tensor": "y", "error": 1.0, "allowed": 0.1, "eager_error": 0.05}
    wrong = row(wrong=[failed])
    del wrong["implementations"]["ours cpu"]
    assert tables.operators([wrong], "cpu")[1][0][3:] == ["WRONG", "1.00", "-", "-"]
    assert (
        tables.explain(wrong, failed) == "c: ours cpu: y: relative error 1.00e+00 (allowed 1.00e-01, eager's 5.00e-02)"
    )
    figures = [tables.milliseconds(value) for value in (0.01234, 0.1234, 1.234, 12.34, 123.4, 1234.5)]
    assert figures == ["0.0123", "0.123", "1.23", "12.3", "123", "1234"]


def test_a_forced_product_is_no_result_of_ours():
    """Only what the package itself chooses is its speed."""
    each = row()
    each["implementations"] = {"ours cuda wgmma": {"median_ms": 1.0}, "ours cuda": {"median_ms": 2.0}}
    assert tables.ours(each) == "ours cuda"
    del each["implementations"]["ours cuda"]
    assert tables.ours(each) is None
    assert tables.best_peer(each) is None

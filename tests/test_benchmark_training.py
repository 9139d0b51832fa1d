# SPDX-License-Identifier: MIT
"""python -m benchmarks training on a tiny model, and its counters of memory against numbers by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import cases, memory, training

CPU = torch.device("cpu")
TINY = cases.Preset(64, 2, 3, 2, 16, "gelu", 5, batch=3, quick_batch=2, quick_training=False)
OURS = "ours cpu"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(training, "PRESETS", {"tiny": TINY})


def run(tmp_path, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "x.json"
    status = command.main(["training", "--presets", "tiny", "--repeats", "2", "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


def test_measures_prints_and_writes(tmp_path, capsys):
    status, document = run(tmp_path, "--batch", "4", "--compile")
    assert status == 0
    assert document["kind"] == "training"
    assert document["options"]["compile"] == []
    (row,) = document["results"]
    assert row["case"] == "training tiny batch 4 float32"
    assert list(row["implementations"]) == ["eager NCHW", "eager channels_last", OURS]
    assert row["absent"] == {"compile": "not asked to"}
    for each in row["implementations"].values():
        assert each["repeats"] == 2
        assert each["images_per_second"] == pytest.approx(4e3 / each["median_ms"])
    # the file is gone on with, and measured otherwise it is refused
    assert run(tmp_path, "--batch", "4", "--compile") == (0, document)
    assert command.main(["training", "--json", str(tmp_path / "x.json")]) == 2
    printed, told = capsys.readouterr()
    assert "x.json was measured otherwise: name another file" in told
    for word in (
        "saved, MiB",
        "peak, MiB",
        "images/s",
        "ConvMixer-64/2, 16x16, batch 4",
        "-: ConvMixer-64/2, 16x16, compile: not asked to.",
    ):
        assert word in printed
    saved = {name: each["saved_bytes"] for name, each in row["implementations"].items()}
    plane = 4 * 64 * 8 * 8 * 4
    # the images, what the head keeps, and vectors over channels: mean and rstd of each norm, a bias that ours copies
    small, vector = 4 * 3 * 16 * 16 * 4 + 4 * 64 * 4, 64 * 4
    # the patch embedding: before and after its activation; a layer of ours: its input and both convolutions' outputs; a layer of eager:
    # the input of each convolution, activation and norm
    for name, planes, vectors in (
        (OURS, 2 + 2 * 3, 12),
        ("eager NCHW", 2 + 2 * 6, 10),
        ("eager channels_last", 14, 10),
    ):
        assert planes * plane + small <= saved[name] <= planes * plane + small + vectors * vector


def test_what_cannot_run_is_told_and_fails(tmp_path, capsys, monkeypatch):
    # the whole row is there although no implementation can take images that are smaller than a patch
    monkeypatch.setattr(training, "PRESETS", {"tiny": dataclasses.replace(TINY, image_size=1)})
    status, document = run(tmp_path, "--compile")
    assert status == 1
    (row,) = document["results"]
    assert row["implementations"] == {}
    assert set(row["absent"]) == {"eager NCHW", "eager channels_last", "compile", OURS}
    assert "-: ConvMixer-64/2, 1x1, eager NCHW: " in capsys.readouterr().out


def test_saved_bytes_counts_each_storage_once_and_not_the_parameters():
    layer, x = nn.Linear(8, 4), torch.randn(16, 8)
    assert memory.saved_bytes(lambda: layer(x), [layer.weight]) == x.nbytes
    wide = torch.randn(16, 80)
    # a view keeps all of its storage; both layers keep the same one
    assert memory.saved_bytes(lambda: layer(wide[:, :8]) + layer(wide[:, 8:16]), [layer.weight]) == wide.nbytes


class _Keeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.more = [torch.zeros(100), None]
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def test_saved_bytes_counts_attributes_of_a_function():
    x = torch.randn(10, requires_grad=True)
    assert memory.saved_bytes(lambda: _Keeps.apply(x).sum()) == x.nbytes + 400


def test_peak_bytes_is_of_the_call_alone():
    """Neither what was held before it nor what it has freed before its peak."""
    size, held = 32 << 20, torch.ones(32 << 20, dtype=torch.uint8)

    def call() -> None:
        for _ in range(3):
            pair = [torch.ones(size, dtype=torch.uint8) for _ in range(2)]
            del pair

    with memory.unfragmented():
        call()
        for _ in range(2):
            assert memory.peak_bytes(call, CPU) == pytest.approx(2 * size, rel=0.1)
    assert held.sum() == size


def test_wrong_options_are_named(tmp_path, capsys):
    for arguments, message in (
        (("--batch", "0"), "--batch must be positive, got 0"),
        (("--json", str(tmp_path / "none" / "x.json")), "none is not a folder"),
        (("--presets", "huge"), "invalid choice: 'huge'"),
    ):
        with pytest.raises(SystemExit):
            command.main(["training", *arguments])
        assert message in capsys.readouterr().err

# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu --only confirm: what can be tested of it without a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import cases, check, gpu_confirm, gpu_run

TINY = cases.Preset(16, 2, 3, 4, 16, "gelu", 4, batch=8, quick_batch=2, quick_training=False)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(cases, "PRESETS", {gpu_confirm.SMALL: TINY, gpu_confirm.LARGE: TINY})


def test_one_that_fails_or_raises_is_a_finding(monkeypatch, tmp_path):
    def raises():
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(gpu_confirm, "CONFIRMATIONS", {"a": lambda: {"ok": False, "unequal": ["x"]}, "b": raises})
    run = gpu_run.Run(tmp_path / "rows.jsonl")
    for name in ("a", "b"):
        gpu_run.do(run, {"kind": "confirm", "name": name, "limit": 10})
    assert run.document["confirmed"] == {
        "a": {"ok": False, "unequal": ["x"]},
        "b": {"ok": False, "error": "RuntimeError: out of memory"},
    }
    assert gpu_run.summary(run.document).count("- NOT CONFIRMED") == 2


def test_determinism_is_of_every_bit(monkeypatch):
    found = gpu_confirm.determinism("cpu", runs=3)
    assert found == {"ok": True, "runs": 3, "unequal": []}
    honest, calls, before = check.training_step, [], torch.are_deterministic_algorithms_enabled()

    def last_bit(*arguments):
        results = honest(*arguments)
        calls.append(None)
        if len(calls) == 3:
            results["gradient of 3.1.weight"].view(torch.int16).view(-1)[7] ^= 1
        return results

    monkeypatch.setattr(check, "training_step", last_bit)
    found = gpu_confirm.determinism("cpu", runs=3)
    assert not found["ok"]
    assert found["unequal"] == ["gradient of 3.1.weight"]
    assert torch.are_deterministic_algorithms_enabled() == before


@pytest.mark.parametrize("ours, last, ok", [(0.1, 0.5, True), (0.2, 0.5, True), (0.3, 0.5, False), (0.1, 2.0, False)])
def test_a_curve_is_held_against_the_distance_of_eagers_two_layouts(monkeypatch, ours, last, ok):
    off = {"eager": 0.0, "ours": ours, "eager channels_last": 0.1}
    monkeypatch.setattr(
        gpu_confirm, "_train", lambda model, name, *rest: [value + off[name] for value in (1.0, 0.75, last)]
    )
    found = gpu_confirm.training_curve("cpu", steps=3, batch=2)
    assert found["ok"] is ok
    assert found["mean_distance"] == pytest.approx(ours)


def test_a_model_learns_the_task():
    found = gpu_confirm.training_curve("cpu", steps=40, batch=8)
    assert {len(curve) for curve in found["curves"].values()} == {40}
    assert found["last_tenth"] < found["first_tenth"]
    assert found["curves"]["ours"][0] == pytest.approx(found["curves"]["eager"][0], rel=2**-7)
    json.dumps(found, allow_nan=False)

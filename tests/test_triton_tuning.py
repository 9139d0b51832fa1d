# SPDX-License-Identifier: MIT
"""How the Triton backend picks a configuration and keeps it on disk, tested with a fake clock."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from convmixer_kernels.triton_kernels import config, tuning


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """The tuner with a fake clock: configurations A, B, C take 3, 1 and 2 ms; the list of those that were timed."""
    lists = [{"BLOCK": name} for name in "ABC"]
    timed: list[str] = []
    current: list[str] = []

    def milliseconds(call):
        call()
        timed.append(current[-1])
        return {"A": 3.0, "B": 1.0, "C": 2.0}[current[-1]]

    def call(candidate):
        current.append(candidate["BLOCK"])
        return candidate["BLOCK"]

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "INTERPRETED", type("constant", (), {"value": False}))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake GPU/1")
    monkeypatch.setattr(tuning, "generation", lambda device: "sm_90")
    monkeypatch.setattr(config, "candidates", lambda kernel, generation: lists)
    monkeypatch.setenv("CONVMIXER_TRITON_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    return timed, lambda key=(1, 2): tuning.run("kernel", key, 0, call), call


def test_tuning_takes_the_fastest_and_remembers_it_on_disk(tuner, tmp_path):
    timed, run, _ = tuner
    assert run() == "B"
    assert timed == ["A", "B", "C"]
    assert run() == "B"
    tuning._chosen.clear()
    assert run() == "B"
    assert len(timed) == 3, "another process measures again what is on disk"
    (file,) = tmp_path.glob("*.json")
    assert "fake-gpu-1" in file.name
    assert json.loads(file.read_text()) == {"kernel 1 2": {"BLOCK": "B"}}
    assert run((3, 4)) == "B"
    assert len(timed) == 6
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"kernel 1 2": {"BLOCK": "gone from the list"}}'])
def test_tuning_survives_what_it_finds_on_disk(tuner, content):
    timed, run, _ = tuner
    tuning.cache_file(0).write_text(content)
    assert run() == "B"
    assert len(timed) == 3


def test_tuning_works_without_a_disk(tuner, monkeypatch):
    monkeypatch.setenv("CONVMIXER_TRITON_CACHE", "/proc/nowhere")
    assert tuner[1]() == "B"


def test_tuning_works_for_a_user_without_a_home(tuner, monkeypatch):
    for name in ("CONVMIXER_TRITON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert tuner[1]() == "B"


def test_several_writers_lose_no_entry_of_each_other(tuner, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: tuning._write(0, "kernel", (i,), {"BLOCK": "A"}), range(40)))
    (file,) = tmp_path.glob("*.json")
    assert len(json.loads(file.read_text())) == 40


def test_where_nothing_fits_nothing_is_remembered(tuner, tmp_path):
    from triton.runtime.errors import OutOfResources

    def huge(candidate):
        raise OutOfResources(200, 100, "shared memory")

    for _ in range(2):
        with pytest.raises(OutOfResources):
            tuning.run("kernel", (5,), 0, huge)
    assert tuning._chosen == {}
    assert list(tmp_path.glob("*.json")) == []


@pytest.mark.parametrize("value", ["off", "false", "2"])
def test_a_switch_that_is_neither_on_nor_off_is_told(tuner, monkeypatch, value):
    monkeypatch.setenv("CONVMIXER_TRITON_AUTOTUNE", value)
    with pytest.raises(ValueError, match=f"CONVMIXER_TRITON_AUTOTUNE must be 0 or 1, got '{value}'"):
        tuner[1]()


def test_tuning_is_switched_off(tuner, monkeypatch):
    timed, run, _ = tuner
    monkeypatch.setenv("CONVMIXER_TRITON_AUTOTUNE", "0")
    assert run() == "A"
    monkeypatch.delenv("CONVMIXER_TRITON_AUTOTUNE")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert run() == "A"
    assert timed == []


def test_a_graph_capture_measures_nothing_but_uses_what_is_known(tuner, monkeypatch):
    timed, run, _ = tuner
    run()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert run() == "B"
    assert run((3, 4)) == "A"
    assert len(timed) == 3


def test_what_does_not_fit_is_passed_over(tuner, monkeypatch):
    from triton.runtime.errors import OutOfResources

    timed, _, call = tuner

    def picky(candidate):
        if candidate["BLOCK"] in "AB":
            raise OutOfResources(200, 100, "shared memory")
        return call(candidate)

    assert tuning.run("kernel", (5,), 0, picky) == "C"
    monkeypatch.setenv("CONVMIXER_TRITON_AUTOTUNE", "0")
    assert tuning.run("kernel", (5,), 0, picky) == "C"
    assert timed == ["C"]

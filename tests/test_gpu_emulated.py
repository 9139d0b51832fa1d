# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu --device cpu: the whole command with a case that hangs, one that crashes, one that is wrong, and a kill -9."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from emulation.build import build

from benchmarks import gpu, gpu_run, gpu_steps, machine, report

_HANGS, _CRASHES, _WRONG, _KILLED = "depthwise_step", "normalize", "norm_backward", "depthwise_train"
#: What stands on PATH in the place of NVIDIA's programs: they answer, and watch nothing.
_TOOLS = {
    "ncu": "print('Warp Cycles Per Issued Instruction')",
    "compute-sanitizer": """print({
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
}.get(argv[argv.index("--tool") + 1], "ERROR SUMMARY: 0 errors"))""",
}
_STEPS = [step for step in gpu.STEPS if step not in ("triton", "confirm")]


def _start(folder: Path, tools: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--output", str(folder)]
    command += ["--only", ",".join(_STEPS), "--plant", f"hang={_HANGS},crash={_CRASHES},wrong={_WRONG}"]
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    settings = {"CONVMIXER_CUDA_EMULATION": str(build()), "PATH": path, "OMP_WAIT_POLICY": "passive"}
    # Triton's interpreter takes a minute for these steps
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | settings
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=machine.ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> SimpleNamespace:
    """A command that was killed in a row, and the same one again."""
    tools, folder = tmp_path_factory.mktemp("tools"), tmp_path_factory.mktemp("run")
    for name, line in _TOOLS.items():
        (tools / name).write_text(f"#!{sys.executable}\nfrom sys import argv\n{line}\n")
        (tools / name).chmod(0o755)
    rows = folder / "rows.jsonl"
    process = _start(folder, tools)
    deadline = time.monotonic() + 120
    try:
        while f'"under_way", "value": {{"step": "operators", "job": "measure {_KILLED} ' not in (
            rows.read_text() if rows.exists() else ""
        ):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    killed = folder.with_name("killed")
    shutil.copytree(folder, killed)
    process = _start(folder, tools)
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    return SimpleNamespace(
        killed=killed,
        folder=folder,
        output=output,
        status=process.returncode,
        document=gpu_run.Run(rows).document,
    )


def _operators() -> set[str]:
    jobs = gpu_steps.operator_jobs("cuda", "cpu")
    return {job["case"]["op"] for job in gpu_steps.rehearsal(jobs, {})}


def test_every_other_row_is_there(runs):
    assert runs.status == 1, runs.output
    broken = {each["job"].split()[1]: each["error"] for each in runs.document["broken"]}
    assert len(runs.document["broken"]) == 3
    assert broken.pop(_HANGS) == "did not end within 3 s"
    assert "status -6" in broken.pop(_CRASHES)
    # the kill came in this row or, if this test looked too late, in one behind it
    ((killed, error),) = broken.items()
    assert error.startswith("the command was killed")
    rows = {row["op"]: row for row in runs.document["results"] if "model" not in row}
    measured = {op for op, row in rows.items() if "median_ms" in row["implementations"].get("ours cuda", {})}
    assert measured | {_HANGS, _CRASHES, _WRONG, killed} == _operators()
    assert not measured & {_HANGS, _CRASHES, _WRONG}
    assert {op for op, row in rows.items() if row["wrong"]} == {_WRONG}
    assert "eager NCHW" in rows[_WRONG]["implementations"]
    assert {"fused", "torch", "wgmma"} <= {name.split()[-1] for name in rows["pointwise_eval"]["implementations"]}
    assert {"compile", "compile max-autotune", "clone"} <= set(rows["depthwise_eval"]["implementations"])
    assert "matmul" in rows["pointwise_eval"]["implementations"]
    assert {row["op"] for row in runs.document["results"] if "model" in row} == {"model_eval", "model_step"}


def test_the_second_command_goes_on_behind_the_kill(runs):
    first, done = gpu_run.Run(runs.killed / "rows.jsonl").document, runs.document["done"]
    # each command measures the peaks of the machine that it runs on
    once = [job for job in done if job != "peaks"]
    assert len(once) == len(set(once)) == len(done) - 2
    assert len(done) > len(first["done"]) > 1
    assert done[: len(first["done"])] == first["done"]
    assert len(runs.document["sessions"]) == 2
    assert {each["step"] for each in runs.document["steps"]} == set(_STEPS)
    assert not [key for key, left in runs.document.items() if key.endswith("_left_out") and left]
    assert runs.document["under_way"] is None


def test_every_tool_was_asked(runs):
    assert runs.document["profile"] == {"ok": True, "summary": "status 0: ncu.log"}
    assert "Warp Cycles" in (runs.folder / "ncu.log").read_text()
    tools = ("memcheck", "racecheck", "initcheck")
    assert runs.document["sanitizer"] == {"ok": True, "summary": ", ".join(f"{tool} clean" for tool in tools)}
    assert runs.document["tests"]["ok"]
    assert "skipped" in runs.document["tests"]["summary"]
    assert len(list(runs.folder.iterdir())) <= 8


def test_the_summary_names_all_four(runs):
    text = (runs.folder / gpu_steps.SUMMARY).read_text()
    assert text in runs.output
    faults = text.partition("## Times")[0]
    for words in (
        f"BROKEN measure {_HANGS} ",
        f"BROKEN measure {_CRASHES} ",
        f"WRONG {_WRONG} ",
        "was killed during it",
    ):
        assert faults.count(words) == 1


@pytest.mark.parametrize("which", ["killed", "folder"])
def test_a_run_is_folded_into_results_and_docs(runs, which, monkeypatch, tmp_path, capsys):
    """Into a copy of them, from the command that was killed and from the one behind it."""
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/performance.md"):
        shutil.copy(machine.ROOT / name, tmp_path / name)
    (tmp_path / report.RESULTS).mkdir(parents=True)
    monkeypatch.setattr(gpu, "_ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = getattr(runs, which)
    assert gpu.main(["--fold", str(folder)]) == 0
    assert "was killed during it" in (folder / gpu_steps.SUMMARY).read_text()
    document = json.loads((report.RESULTS / "emulated-gpu.json").read_text())
    assert {"done", "under_way"}.isdisjoint(document)
    assert len(document["broken"]) == (1 if which == "killed" else 3)
    assert report.main([]) == 0
    # none of its rows is in README.md's table, which stays
    assert "keeps its table" in capsys.readouterr().err
    assert Path("README.md").read_text() == (machine.ROOT / "README.md").read_text()
    text = Path("docs/performance.md").read_text()
    assert "emulated GPU, torch" in text
    assert "| depthwise_eval k9 1x8x32x32 | bfloat16 |" in text
    assert (f"WRONG: {_WRONG}" in text) is (which == "folder")


@pytest.mark.parametrize("text", ["hang", "hang=", "fail=normalize"])
def test_a_plant_that_is_none_is_told(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--device", "cpu", "--plant", text])
    assert "hang, crash, wrong" in capsys.readouterr().err


def test_a_gpu_gets_no_planted_fault(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--plant", "hang=normalize"])
    assert "--device cpu" in capsys.readouterr().err

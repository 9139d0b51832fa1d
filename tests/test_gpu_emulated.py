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
import torch
from emulation.build import build

from benchmarks import gpu, gpu_emulated, gpu_run, gpu_steps, gpu_summary, machine, report

_HANGS, _CRASHES, _WRONG, _KILLED = "depthwise_step", "normalize", "norm_backward", "depthwise_train"
_PROFILED = "depthwise_eval k9 1x8x32x32 bfloat16 contiguous"
_STALLED = "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
_LAUNCH = [f'"Kernel Name","NVTX","gpu__time_duration.sum","{_STALLED}"', '"","","us","inst"']
_LAUNCH.append(f'"void convmixer::kernel<int>(int)","row={_PROFILED};ours cuda;","12.5","3.25"')
#: What stands on PATH in the place of NVIDIA's programs: they answer, and watch nothing.
_TOOLS = {
    "ncu": f"Path(argv[argv.index('--log-file') + 1]).write_text({chr(10).join(_LAUNCH)!r})",
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
        (tools / name).write_text(f"#!{sys.executable}\nfrom pathlib import Path\nfrom sys import argv\n{line}\n")
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
    jobs = gpu_steps.operator_jobs("cuda", wgmma=False)
    return {job["case"]["op"] for job in gpu_emulated.adapt(jobs, torch.device("cpu"))}


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(gpu_steps, "_DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_emulated, "_plants", {})


def test_every_other_row_is_there(runs, on_the_cpu):
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
    assert all(not row["wrong"] for row in runs.document["checks"])


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
    (launch,) = runs.document["profile"]["kernels"]
    assert launch["case"] == _PROFILED
    assert runs.document["sanitizer"]["ok"]
    assert set(runs.document["sanitizer"]) == {"ok", "memcheck", "racecheck", "initcheck"}
    assert runs.document["tests"]["ok"]
    assert "skipped" in runs.document["tests"]["summary"]
    assert runs.document["kernels"]


def test_the_summary_names_all_four(runs):
    text = (runs.folder / gpu_summary.FILE).read_text()
    assert text in runs.output
    faults = text.partition("## Kernels")[0]
    for words in (
        f"BROKEN measure {_HANGS} ",
        f"BROKEN measure {_CRASHES} ",
        f"WRONG {_WRONG} ",
        "was killed during it",
    ):
        assert faults.count(words) == 1
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {_PROFILED}, ours cuda |")]
    assert "long_scoreboard 3.25 (global loads are waited for" in line


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
    assert "was killed during it" in (folder / gpu_summary.FILE).read_text()
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
def test_a_plant_that_is_none_is_told(text, monkeypatch, capsys):
    monkeypatch.setattr(gpu_emulated, "_plants", {})
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--device", "cpu", "--plant", text])
    assert "hang, crash, wrong" in capsys.readouterr().err


def test_a_gpu_gets_no_planted_fault(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--plant", "hang=normalize"])
    assert "--device cpu" in capsys.readouterr().err
    jobs = gpu_steps.compile_jobs()
    assert gpu_emulated.adapt(jobs, torch.device("cuda")) is jobs


def _h100() -> dict:
    """The committed run, with the clock that docs/cuda-kernels.md assumes."""
    document = json.loads((machine.ROOT / report.RESULTS / "nvidia-h100-80gb-hbm3.json").read_text())
    document["sessions"] = [{**each, "clock_hz": 1.7e9} for each in document["sessions"]]
    return document


def test_predictions_are_those_of_the_docs():
    found = {(each.case, each.implementation): each for each in gpu_summary.predictions(_h100())}
    case = "depthwise_weight_grad k9 64x1536x32x32 bfloat16 {}"
    for layout, unit, ratio in (("contiguous", "HBM", 0.68), ("channels_last", "L1", 0.62)):
        each = found[case.format(layout), "ours cuda"]
        assert each.unit == unit
        assert each.predicted / each.measured == pytest.approx(ratio, abs=0.01)
    each = found["pointwise_eval 64x1536x32x32 bfloat16 contiguous", "ours cuda wgmma"]
    assert (each.unit, round(each.measured)) == ("tensor", 494)
    # 768 cycles for 1024 of 64 * 1536 * 1024 values
    assert each.predicted == pytest.approx(768 * 64 * 1536 / 132 / 1.7e3)
    # three parts, one after the other
    each = found["layer_eval k9 64x256x32x32 bfloat16 contiguous", "ours cuda layer"]
    assert each.unit == "parts"
    assert each.predicted == pytest.approx((324 + 256 + 146) * 64 * 256 / 132 / 1.7e3)
    # the input gradient's row holds more than the kernel, which has its own
    assert not any(name.startswith("depthwise_input_grad k9 64x1536") for name, _ in found)


@pytest.mark.parametrize("capability", ["8.0", "10.0"])
def test_other_gpus_have_no_predictions(capability):
    document = _h100()
    document["gpu"]["capability"] = capability
    assert list(gpu_summary.predictions(document)) == []
    assert "No row that docs/cuda-kernels.md predicts" in gpu_summary.summary(document)


def test_a_kernel_at_its_bound_is_told_what_helps():
    near = gpu_summary.Predicted("case", "ours cuda", 120, 100, "HBM")
    assert gpu_summary.advice(near, {}) == "at its bound, HBM: at the pace of a copy: only fewer bytes help"
    far = near._replace(measured=200)
    assert gpu_summary.advice(far, {}).startswith("not profiled")
    launch = {"case": "case", "implementation": "ours cuda", "dram_percent": 40.0, "l1_percent": 71.0}
    kernels = [
        {**launch, "us": 3, "stalls_per_issue": {"barrier": 9.0}},
        {**launch, "us": 80, "stalls_per_issue": {"wait": 2.5, "unheard_of": 1.0, "barrier": 0.5}},
    ]
    text = gpu_summary.advice(far, {"profile": {"kernels": kernels}})
    assert text.startswith("busiest unit L1 71 %; warps wait for wait 2.5 (results of")
    assert "unheard_of 1 (?)" in text
    assert "barrier" not in text

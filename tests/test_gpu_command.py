# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu: what can be tested of it without a GPU."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulation.build import build
from helpers import use_cuda

from benchmarks import gpu, gpu_models, gpu_ops, report
from convmixer_kernels.backends import cuda, cuda_choice, reference, triton
from convmixer_kernels.testing import relative_error

_MEMCHECK = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: {}\n"
_RACECHECK = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: {}\n"


@pytest.mark.parametrize(
    ("tool", "status", "output", "clean"),
    [
        ("memcheck", 0, _MEMCHECK.format("0 errors"), True),
        ("memcheck", 0, _MEMCHECK.format("1 error"), False),
        ("memcheck", 0, _MEMCHECK.format("10 errors"), False),
        ("memcheck", 1, _MEMCHECK.format("0 errors"), False),
        ("memcheck", None, _MEMCHECK.format("0 errors"), False),
        ("memcheck", 0, "the program ended before the tool could start", False),
        ("memcheck", 0, _MEMCHECK.format("2 errors") + _MEMCHECK.format("0 errors"), False),
        ("initcheck", 0, _MEMCHECK.format("0 errors"), True),
        ("racecheck", 0, _RACECHECK.format("0 hazards displayed (0 errors, 0 warnings)"), True),
        ("racecheck", 0, _RACECHECK.format("1 hazard displayed (0 errors, 1 warning)"), False),
        ("racecheck", 0, _RACECHECK.format("0 hazards displayed (3 errors, 0 warnings)"), False),
        ("racecheck", 0, _RACECHECK.format("100 hazards displayed (100 errors, 0 warnings)"), False),
        # racecheck that found nothing to check says so in memcheck's words
        ("racecheck", 0, _MEMCHECK.format("0 errors"), False),
    ],
)
def test_only_a_clean_summary_is_clean(tool, status, output, clean):
    assert gpu.is_clean(tool, status, output) is clean


@pytest.fixture
def run(tmp_path):
    return gpu.Run(tmp_path / "rows.jsonl", 100)


def _saved(run: gpu.Run) -> dict:
    return gpu.Run(run.path).document


# ---- nothing is lost -------------------------------------------------------------------------------------------------


def _faults(*how: str, limit: float = 20) -> list[gpu.Job]:
    return [{"kind": "fault", "how": each, "limit": 2 if each == "hang" else limit} for each in how]


def test_a_job_that_hangs_or_crashes_costs_its_row(run, capfd):
    gpu.run_jobs(run, "check", _faults("first", "hang", "second", "crash", "raise", "wrong", "last"), 90)
    document = _saved(run)
    assert [row["case"] for row in document["results"]] == ["first", "second", "wrong", "last"]
    broken = {each["job"]: each["error"] for each in document["broken"]}
    assert broken["fault hang"] == "did not end within 2 s"
    assert "status -6" in broken["fault crash"]
    assert "status 1: RuntimeError: CUDA error" in broken["fault raise"]
    text = gpu.summary(document)
    for word in ("fault hang", "fault crash", "fault raise", "WRONG wrong"):
        assert word in text
    assert "check_left_out" not in document


def test_jobs_that_time_does_not_suffice_for_are_named(run, capfd):
    gpu.run_jobs(run, "check", [*_faults("first"), {"kind": "fault", "how": "hang", "limit": 60}, *_faults("last")], 15)
    document = _saved(run)
    assert [row["case"] for row in document["results"]] == ["first"]
    assert document["check_left_out"] == ["fault hang", "fault last"]
    assert "check: 2 left out, from fault hang on" in gpu.summary(document)


def _runs(argument: str) -> bool:
    """Whether some process has this among its arguments."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        # processes end meanwhile
        with contextlib.suppress(OSError):
            if argument.encode() in path.read_bytes().split(b"\0"):
                return True
    return False


def test_kill_9_loses_at_most_one_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    jobs = [*_faults("first", "second"), {"kind": "fault", "how": "hang", "limit": 60}, *_faults("last")]
    program = f"from pathlib import Path\nfrom benchmarks import gpu\ngpu.run_jobs(gpu.Run(Path({str(path)!r}), 90), 'check', {jobs!r}, 80)"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=gpu.ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and path.read_text().count("\n") == 2):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # its worker, which hangs, ends with it
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _runs(str(path)):
        time.sleep(0.1)
    assert not _runs(str(path))
    # as if the kill had come while a row was written
    with open(path, "a") as file:
        file.write('{"append": "results", "val')
    assert [row["case"] for row in gpu.Run(path).document["results"]] == ["first", "second"]
    # and the next run goes on behind it
    again = gpu.Run(path)
    again.row({"case": "third", "dtype": "", "layout": "", "implementation": "ours", "ok": True})
    assert [row["case"] for row in gpu.Run(path).document["results"]] == ["first", "second", "third"]


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setenv("CONVMIXER_CUDA_EMULATION", str(build()))
    use_cuda(monkeypatch)


def test_no_gpu_is_exit_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU to measure" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--only", "tests,none"], ["--seconds", "0"], ["--seconds", "nan"]])
def test_bad_options_are_told(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_only_backends_that_run_here_are_measured(monkeypatch):
    monkeypatch.setattr(cuda, "can_run", lambda *a: "the native module is not built")
    monkeypatch.setattr(triton, "can_run", lambda *a: None)
    assert gpu.measured_backends("cpu") == (["triton"], {"cuda": "the native module is not built"})


def test_a_sanitizer_without_cuda_kernels_says_so(run):
    gpu.sanitizer(run, 10, "the native module is not built")
    assert _saved(run)["sanitizer"] == {
        "ok": True,
        "skipped": "it checks the CUDA kernels: the native module is not built",
    }


def test_the_first_backend_is_measured_everywhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    cases = [case.to_json() for case in gpu_ops.operator_cases()]
    for backend in ("cuda", "triton"):
        jobs = gpu.operator_jobs(backend, wgmma=True)
        assert [(job["case"], job["backend"], job["peers"]) for job in jobs] == [
            (case, backend, True) for case in cases
        ]
        assert {gemm for job in jobs for gemm in job["gemms"]} == (
            {None, "fused", "torch", "wgmma", "layer"} if backend == "cuda" else {None}
        )
    # a kernel that failed its checks does not take other rows with it
    assert all("wgmma" not in job["gemms"] for job in gpu.operator_jobs("cuda", wgmma=False))
    # a layer in one kernel is cuda's alone
    assert {job["case"][0] for job in gpu.triton_jobs()} == set(gpu_ops._PASSES) - {"mixer_eval"}
    assert {job["backend"] for job in gpu.triton_jobs()} == {"triton"}


def test_every_job_survives_json(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    jobs = gpu.check_jobs(["cuda"]) + gpu.operator_jobs("cuda", True) + gpu.triton_jobs() + gpu.model_jobs(["cuda"])
    jobs += [*gpu.compile_jobs(), gpu.names_job(), *gpu.confirm_jobs()]
    assert json.loads(json.dumps(jobs)) == json.loads(json.dumps(jobs, default=str))
    for job in jobs:
        assert job["kind"] in gpu._KINDS
        assert job["limit"] > 0
    for case in gpu_ops.operator_cases():
        assert gpu_ops.OpCase.from_json(*json.loads(json.dumps(case.to_json()))) == case


def test_wgmma_is_measured_where_its_checks_passed(run):
    row = {"case": "pointwise_eval", "dtype": "bfloat16", "layout": "contiguous", "implementation": "ours wgmma"}
    for _ in range(3):
        assert not gpu._wgmma_is_right(run)
        run.row({**row, "ok": True})
    assert gpu._wgmma_is_right(run)
    run.append("broken", {"job": "operator depthwise_eval", "error": "did not end"})
    assert gpu._wgmma_is_right(run)
    run.append("broken", {"job": "operator pointwise_eval wgmma", "error": "did not end"})
    assert not gpu._wgmma_is_right(run)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Cases on CPU tensors, and a clock that does not run them."""

    class OnTheCpu(gpu_ops.Tensors):
        def __init__(self, case):
            super().__init__(case, sets=1, device="cpu")

    monkeypatch.setattr(gpu_ops, "Tensors", OnTheCpu)
    timing = {"median_us": 10.0, "q20_us": 9.0, "q80_us": 11.0, "repeats": 5, "calls": 1, "host_us": 2.0}

    def measure(call, *options, **more):
        call(0)
        return timing

    monkeypatch.setattr(gpu_ops, "measure", measure)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


_PEAKS = {"copy_bytes_per_s": 1e12, **{f"{d}_flops_per_s": 1e14 for d in ("float32", "float16", "bfloat16")}}


@pytest.mark.skipif(
    not triton._interpreted(), reason="with a GPU the command itself runs these: python -m benchmarks.gpu"
)
@pytest.mark.parametrize("layout", gpu_ops.LAYOUTS)
@pytest.mark.parametrize("op", gpu_ops._PASSES)
def test_every_operator_runs_on_triton_alone(op, layout, run, on_the_cpu, capsys):
    """Rows of triton, eager and in eval a copy, from a machine that has no other backend."""
    pytest.importorskip("triton", reason="triton is not installed")
    case = gpu_ops.OpCase(op, (2, 16, 5, 6), 3, torch.float16, layout)
    run.note("peaks", _PEAKS)
    gpu_ops.measure_case(run, case, "triton", peers=True)
    rows = {row["implementation"]: row for row in _saved(run)["results"]}
    assert rows["triton"].get("ok"), rows["triton"]
    expected = {"triton", f"eager {layout}"} | ({"clone"} if op == "depthwise_eval" else set())
    assert set(rows) == expected
    run.note("absent", {"cuda": "not built"})
    text = gpu.summary(run.document)
    assert "- cuda: not built" in text
    (line,) = [line for line in text.splitlines() if line.startswith(case.label)]
    # on CPU tensors eager PyTorch lacks some operators in float16
    if "median_us" in rows[f"eager {layout}"]:
        assert line.split()[-1] == "1.0x"


def test_a_wrong_result_has_no_time(run, on_the_cpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu_ops, "wrong", lambda *a: "output 0: relative error 1")
    run.note("peaks", _PEAKS)
    case = gpu_ops.OpCase("normalize", (2, 4, 5, 6), 3, torch.float32, "contiguous")
    gpu_ops.measure_case(run, case, "triton", peers=True)
    row = next(row for row in _saved(run)["results"] if row["implementation"] == "triton")
    assert row["ok"] is False
    assert "median_us" not in row
    (line,) = [line for line in gpu.summary(run.document).splitlines() if line.startswith("WRONG")]
    assert line.endswith("triton             output 0: relative error 1")


@pytest.mark.parametrize("op", gpu_ops._PASSES)
def test_every_operator_of_the_emulated_kernels_with_settings(op, run, on_the_cpu, emulated, monkeypatch):
    """A worker's way: the case by its JSON, a setting that only it sees, every choice of GEMM, right or wrong only."""
    case = gpu_ops.OpCase(op, (2, 16, 5, 8), 3, torch.bfloat16, "contiguous")
    gemms = [None, *gpu_ops.forced_gemms(case, (8, 0))]
    gpu._operator(run, {"EMU_BLOCKS": "3"}, case.to_json(), "cuda", gemms=gemms, peers=False, timed=False)
    rows = _saved(run)["results"]
    assert [row["implementation"] for row in rows] == ["ours" if g is None else f"ours {g}" for g in gemms]
    assert all(row["ok"] and row["settings"] == {"EMU_BLOCKS": "3"} for row in rows)
    assert "EMU_BLOCKS" not in os.environ


def test_models_are_measured_with_the_backend_that_there_is(run, monkeypatch):
    """Which backend runs which model, with a clock, images and weights that cost nothing."""
    seen: list[tuple[str, str | None]] = []
    active: list[str | None] = [None]

    class Using:
        def __init__(self, backend):
            self.backend = backend

        def __enter__(self):
            active[0] = self.backend

        def __exit__(self, *exception):
            active[0] = None

    model = SimpleNamespace(to=lambda **k: None)
    monkeypatch.setattr(gpu_models, "_models", lambda name, batch: (model, model, torch.empty(4, 3, 8, 8)))
    monkeypatch.setattr(gpu_models, "_model_wrong", lambda a, b, images, backend: "bad" if backend == "cuda" else None)
    monkeypatch.setattr(gpu_models, "_using", Using)
    monkeypatch.setattr(gpu_models, "_model_row", lambda *a: seen.append(active[0]) or {"median_us": 1.0})
    jobs = gpu.model_jobs(["cuda", "triton"])
    assert len(jobs) == len(gpu_models.MODELS) * 2 * 2
    for job in jobs:
        gpu._model(run, {}, **{key: value for key, value in job.items() if key not in ("kind", "limit")})
    rows = _saved(run)["results"]
    assert len(rows) == len(jobs) * 3
    assert {(row["implementation"], row["ok"], "error" in row) for row in rows} == {
        ("ours", False, True),
        ("triton", True, False),
        ("eager contiguous", True, False),
        ("eager channels_last", True, False),
    }
    assert set(seen) == {"triton", None}


def test_the_report_of_triton_alone_shows_its_times(run):
    shared = {"case": "normalize 2x4x5x6", "dtype": "float32", "layout": "contiguous", "ok": True}
    run.row({**shared, "implementation": "triton", "median_us": 10.0, "percent_of_floor": 50.0})
    run.row({**shared, "implementation": "eager contiguous", "median_us": 30.0, "percent_of_floor": 20.0})
    run.note("absent", {"cuda": "there is no nvcc"})
    run.note("environment", {"device": "A GPU", "torch": "2.13.0"})
    text = report.gpu_markdown(_saved(run))
    assert "cuda was not measured: there is no nvcc." in text
    assert "| normalize 2x4x5x6 | float32 | contiguous | 10 us | 50 % | 30 us | 3.0x |" in text
    assert "| case | dtype | layout | triton |" in text


@pytest.fixture
def no_real_gpu(monkeypatch):
    """The command sees a GPU, and its steps do nothing but say that they ran."""
    ran: list[tuple] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "describe", lambda run, backend: ran.append(("describe", backend)))
    monkeypatch.setattr(gpu, "run_jobs", lambda run, name, jobs, seconds: ran.append((name, len(jobs) > 0)))
    return ran


def test_the_command_measures_what_there_is(no_real_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "measured_backends", lambda: (["triton"], {"cuda": "the native module is not built"}))
    assert gpu.main(["--only", "check,operators,sanitizer,models,triton", "--output", str(tmp_path)]) == 0
    assert no_real_gpu == [
        ("describe", "triton"),
        ("peaks", True),
        ("check", False),
        ("operators", True),
        ("models", True),
        ("triton", False),
    ]
    document = gpu.Run(tmp_path / "rows.jsonl").document
    assert document["absent"] == {"cuda": "the native module is not built"}
    assert [each["step"] for each in document["steps"]] == ["check", "operators", "models", "sanitizer", "triton"]
    assert "cuda: - (the native module is not built)" in capsys.readouterr().out
    assert "cuda: the native module is not built" in (tmp_path / "summary.txt").read_text()


def test_a_wrong_row_is_exit_status_1(no_real_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "measured_backends", lambda: (["triton"], {}))
    row = {"case": "a", "dtype": "", "layout": "", "implementation": "ours", "ok": False}
    monkeypatch.setattr(gpu, "run_jobs", lambda run, name, jobs, seconds: run.row(row))
    assert gpu.main(["--only", "models", "--output", str(tmp_path)]) == 1


def test_a_gpu_without_any_backend_is_exit_status_2(no_real_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "measured_backends", lambda: ([], {"cuda": "not built", "triton": "not installed"}))
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert no_real_gpu == []
    assert "triton: - (not installed)" in capsys.readouterr().out


# ---- the choice among GEMMs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "layout", "capability", "expected"),
    [
        ("pointwise_eval", (64, 1536, 32, 32), torch.bfloat16, "contiguous", (9, 0), ("fused", "torch", "wgmma")),
        ("pointwise_train", (64, 768, 7, 7), torch.bfloat16, "channels_last", (9, 0), ("fused", "torch", "wgmma")),
        # boxes of 64 pixels of one image; 16-byte rows; other GPUs; float32
        ("pointwise_eval", (64, 768, 7, 7), torch.bfloat16, "contiguous", (9, 0), ("fused", "torch")),
        ("pointwise_eval", (64, 1537, 32, 32), torch.bfloat16, "contiguous", (9, 0), ("fused", "torch")),
        ("pointwise_eval", (64, 1536, 32, 32), torch.bfloat16, "contiguous", (8, 0), ("fused", "torch")),
        ("pointwise_eval", (64, 1536, 32, 32), torch.float32, "contiguous", (9, 0), ("fused", "torch")),
        ("mixer_eval", (64, 256, 32, 32), torch.bfloat16, "contiguous", (8, 0), ("fused", "torch", "layer")),
        ("mixer_eval", (64, 264, 32, 32), torch.bfloat16, "contiguous", (9, 0), ("fused", "torch", "wgmma")),
        ("depthwise_eval", (64, 256, 32, 32), torch.bfloat16, "contiguous", (9, 0), ()),
        # the weight gradient
        ("pointwise_backward", (64, 1536, 32, 32), torch.bfloat16, "contiguous", (9, 0), ("wgmma",)),
        ("pointwise_backward", (64, 768, 7, 7), torch.bfloat16, "contiguous", (9, 0), ()),
        ("pointwise_backward", (64, 1536, 32, 32), torch.bfloat16, "channels_last", (9, 0), ()),
        ("pointwise_backward", (64, 1536, 32, 32), torch.bfloat16, "contiguous", (8, 0), ()),
    ],
)
def test_which_gemms_are_timed(op, shape, dtype, layout, capability, expected):
    assert gpu_ops.forced_gemms(gpu_ops.OpCase(op, shape, 9, dtype, layout), capability) == expected


def test_every_forced_gemm_is_one_that_the_backend_knows(monkeypatch):
    cases = [case for case in gpu_ops.operator_cases() if gpu_ops.forced_gemms(case, (9, 0))]
    assert {case.op for case in cases} == {"pointwise_eval", "pointwise_train", "pointwise_backward", "mixer_eval"}
    before = cuda_choice.forced_gemm
    for name in {name for case in cases for name in gpu_ops.forced_gemms(case, (9, 0))}:
        with gpu_ops.forcing(name):
            assert cuda_choice.forced_gemm() == name
        monkeypatch.setenv("CONVMIXER_CUDA_GEMM", name)
        before.cache_clear()
        assert before() == name
    before.cache_clear()
    with gpu_ops.forcing(None):
        assert cuda_choice.forced_gemm is before


def test_a_layer_is_checked_by_all_its_channels():
    """The check of a few outputs keeps every channel of the layer's first block, and agrees with eager."""
    case = gpu_ops.OpCase("mixer_eval", (2, 12, 6, 8), 5, torch.float32, "contiguous")
    tensors = gpu_ops.Tensors(case, sets=1, device="cpu")
    kept = torch.tensor([1, 7])
    part = tensors.channels(kept)
    part.sets[0][0] = tensors.set(0)[0]
    exact = gpu_ops.ours(case.op, reference, part.double())
    assert exact.shape == (2, 2, 6, 8)
    for y in (
        gpu_ops.ours(case.op, reference, tensors)[:, kept],
        gpu_ops.eager(case.op, tensors, 0, "contiguous")()[:, kept],
    ):
        assert relative_error(y, exact) < 1e-6
    floor = gpu_ops._floor(case, {"copy_bytes_per_s": 1e12, "float32_flops_per_s": 1e12})
    assert floor["flops"] == 2 * 2 * 12 * 6 * 8 * (12 + 25)
    assert floor["bytes"] == 2 * 2 * 12 * 6 * 8 * 4

# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu: what can be tested of it without a GPU."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from emulation.build import build
from helpers import use_cuda

from benchmarks import (
    cases,
    check,
    engine,
    gpu,
    gpu_run,
    gpu_steps,
    machine,
    models,
    peers,
    tables,
    timing,
)
from benchmarks.cases import OpCase
from convmixer_kernels.backends import cuda, cuda_choice, torch_gemm, triton

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
    assert gpu_steps.is_clean(tool, status, output) is clean


def _saved(run: gpu_run.Run) -> dict:
    return gpu_run.Run(run.path).document


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setenv("CONVMIXER_CUDA_EMULATION", str(build()))
    use_cuda(monkeypatch)


def test_no_gpu_is_exit_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU to measure" in capsys.readouterr().err


def test_objects_are_prepared_without_torch(tmp_path):
    """A machine that only compiles has no torch: an empty PATH ends it before it compiles anything."""
    program = "import sys; sys.modules['torch'] = None\nfrom benchmarks import gpu\n"
    program += f"sys.exit(gpu.main(['--prepare', {str(tmp_path / 'objects')!r}]))"
    environment = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=machine.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "it needs a C++ compiler and nvcc" in done.stderr


@pytest.mark.parametrize("arguments", [["--only", "tests,none"], ["--seconds", "0"], ["--seconds", "nan"]])
def test_bad_options_are_told(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_only_backends_that_run_here_are_measured(monkeypatch):
    monkeypatch.setattr(cuda, "can_run", lambda *a: "the native module is not built")
    monkeypatch.setattr(triton, "can_run", lambda *a: None)
    assert gpu_steps.measured_backends("cpu") == (["triton"], {"cuda": "the native module is not built"})


@pytest.mark.parametrize("program", [gpu_steps.sanitizer, gpu_steps.profile])
def test_a_program_without_cuda_kernels_says_so(run, program):
    found = program(run, 10, "the native module is not built")
    assert found == {"ok": True, "summary": "skipped: the native module is not built"}


def _jobs(run: gpu_run.Run) -> list[gpu_run.Job]:
    jobs = (
        gpu_steps.operator_jobs("cuda", "cpu")
        + gpu_steps.triton_jobs()
        + gpu_steps.model_jobs("cuda")
        + gpu_steps.compile_jobs()
    )
    return [*jobs, *gpu_steps.confirm_jobs(run)]


def test_the_sanitizer_sees_every_operator_and_no_product_of_torch(emulated, monkeypatch):
    """One of its sizes, emulated; the others differ in tensors only."""
    honest, ran = gpu_run._prepared, []

    def prepared(case, name, device):
        ran.append((case.op, name))
        if (case.shape, case.dtype, case.layout) == ((3, 5, 7, 7), "float32", "contiguous"):
            return honest(case, name, device)
        return lambda: None

    def product(*arguments, **options):
        raise AssertionError("a product of torch")

    monkeypatch.setattr(gpu_run, "_prepared", prepared)
    for name in ("mm", "addmm", "bmm", "baddbmm", "matmul"):
        monkeypatch.setattr(torch, name, product)
    for name in ("convolution", "input_grad", "weight_grad"):
        # the workload replaces them for good, in a process of its own
        monkeypatch.setattr(torch_gemm, name, getattr(torch_gemm, name))
    gpu_run.sanitizer_workload(torch.device("cpu"))
    assert {op for op, _ in ran} == set(cases.OPERATORS)
    assert ("layer_eval", "ours cuda layer") in ran


def test_the_first_backend_is_measured_everywhere():
    expected = [case.name for case in cases.cases("cuda") if case.quick and isinstance(case, OpCase)]
    for backend in ("cuda", "triton"):
        jobs = gpu_steps.operator_jobs(backend, "cpu")
        measured = [cases.from_json(job["case"]) for job in jobs]
        assert [case.name for case in measured] == expected
        for case, job in zip(measured, jobs, strict=True):
            assert job["names"][0] == f"ours {backend}"
            assert peers.EAGER[case.layout] in job["names"]
        forced = {name for job in jobs for name in job["names"] if len(name.split()) == 3}
        assert forced == ({f"ours cuda {gemm}" for gemm in peers.GEMMS} if backend == "cuda" else set())
    assert {tuple(job["names"]) for job in jobs} & {
        ("ours triton", "eager NCHW", "clone"),
        ("ours triton", "eager NCHW", "matmul"),
    }
    # a layer in one kernel is cuda's alone
    ops = {cases.from_json(job["case"]).op for job in gpu_steps.triton_jobs()}
    assert ops == {op for op in cases.OPERATORS if not op.startswith("layer")}
    assert {tuple(job["names"]) for job in gpu_steps.triton_jobs()} == {("ours triton",)}


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_a_kernel_of_hopper_is_measured_on_hopper(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    jobs = gpu_steps.operator_jobs("cuda", "cuda")
    assert any("ours cuda wgmma" in job["names"] for job in jobs) is (capability == (9, 0))
    assert any("ours cuda fused" in job["names"] for job in jobs)


def test_every_job_survives_json(run, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    for job in _jobs(run):
        assert job["kind"] in ("measure", "confirm")
        assert job["limit"] > 0
        if "case" in job:
            # as a worker gets it
            again = json.loads(json.dumps(job))
            assert cases.from_json(again["case"]) == cases.from_json(job["case"])
    for case in cases.cases("cuda"):
        assert cases.from_json(json.loads(json.dumps(cases.to_json(case)))) == case


def test_compiled_peers_are_few():
    found = [(job["names"], cases.from_json(job["case"]).op) for job in gpu_steps.compile_jobs()]
    longest = [op for names, op in found if names == ["compile max-autotune"]]
    # the blocks and, last, one model
    assert longest == ["depthwise_eval", "pointwise_eval", "model_step"]
    assert [op for _, op in found[-3:]] == longest
    assert {op for names, op in found if names == ["compile"]} == {
        "depthwise_eval",
        "pointwise_eval",
        "model_eval",
        "model_step",
    }
    assert len(found) <= 8 + 3


_PEAKS = machine.Peaks(1e12, 1e14, dict.fromkeys(cases.DTYPES, 1e14), "invented")


@pytest.fixture
def on_the_cpu(monkeypatch, run):
    """Cases on CPU tensors, and a clock that does not run them more than once."""

    def clock_of(device, seconds, repeats):
        def clock(ready):
            for prepared in ready.values():
                with prepared.setting():
                    prepared.calls[0]()
            return {name: timing.Timing(1e-5, 9e-6, 1.1e-5, 5, {"host_ms": 2e-3}) for name in ready}

        return clock

    monkeypatch.setattr(engine, "clock_of", clock_of)
    # not the pooled hundreds of channels, which an interpreter and an emulation take minutes for
    monkeypatch.setattr(check, "POOL", 1)
    monkeypatch.setattr(machine, "last_level_cache", lambda device: 1)
    run.append("sessions", machine.session(torch.device("cpu"), _PEAKS))


@pytest.mark.skipif(
    not triton._interpreted(), reason="with a GPU the command itself runs these: python -m benchmarks.gpu"
)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("op", cases.OPERATORS)
def test_every_operator_runs_on_triton_alone(op, layout, run, on_the_cpu, capsys):
    """Rows of triton, eager and in eval a copy, from a machine that has no other backend."""
    pytest.importorskip("triton", reason="triton is not installed")
    case = OpCase(op, "sweep", (2, 16, 5, 6), 3, dtype="float16", layout=layout)
    eager = peers.EAGER[layout]
    names = ["ours triton", eager, *([peers.CLONE] if op == "depthwise_eval" else [])]
    gpu_run.do(run, gpu_steps._job(case, names, 10))
    (row,) = _saved(run)["results"]
    assert not row["wrong"], row["wrong"]
    absent = {eager} if op in cases.PARTS else set()
    assert set(row["absent"]) == absent
    assert set(row["implementations"]) == set(names) - absent
    assert row["implementations"]["ours triton"]["percent_of_floor"] > 0
    assert row["implementations"]["ours triton"]["host_ms"] == 2e-3
    run.note("absent", {"cuda": "not built"})
    text = gpu_run.summary(run.document)
    assert "- cuda: not built" in text
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {tables.title(row)} ")]
    if not absent:
        assert line.endswith("| 1.00x |")


def test_a_wrong_result_has_no_time(run, on_the_cpu, monkeypatch, capsys):
    honest = check.judge

    def judge(*arguments, complete):
        found = honest(*arguments, complete=complete)
        return [each._replace(passed=False) for each in found] if complete else found

    monkeypatch.setattr(check, "judge", judge)
    case = OpCase("normalize", "", (2, 4, 5, 6))
    gpu_run.do(run, gpu_steps._job(case, ["ours reference", "eager NCHW"], 10))
    (row,) = _saved(run)["results"]
    assert set(row["implementations"]) == {"eager NCHW"}
    assert [each["implementation"] for each in row["wrong"]] == ["ours reference"]
    (line,) = [line for line in gpu_run.summary(run.document).splitlines() if line.startswith("- WRONG")]
    assert line.startswith(f"- WRONG {case.name}: ours reference: y: relative error")


def test_one_that_fails_does_not_take_the_others_with_it(run, on_the_cpu, monkeypatch, capsys):
    honest = peers.prepare

    def prepare(name, *rest):
        if name in ("ours cpu", "clone"):
            raise RuntimeError(f"{name}: an illegal instruction\nwas encountered")
        return honest(name, *rest)

    monkeypatch.setattr(peers, "prepare", prepare)
    names = ["ours cpu", "clone", "ours reference"]
    gpu_run.do(run, gpu_steps._job(OpCase("normalize", "", (2, 4, 5, 6)), names, 10))
    (row,) = _saved(run)["results"]
    assert row["wrong"] == [{"implementation": "ours cpu", "failure": "ours cpu: an illegal instruction"}]
    assert row["absent"] == {"clone": "failed: clone: an illegal instruction"}
    assert set(row["implementations"]) == {"ours reference"}


@pytest.mark.parametrize("op", cases.OPERATORS)
def test_every_operator_of_the_emulated_kernels(op, run, on_the_cpu, emulated, monkeypatch):
    """A worker's way: the case by its JSON, every choice of GEMM, right or wrong only."""
    case = OpCase(op, "sweep", (2, 16, 5, 8), 3, dtype="bfloat16")
    names = ["ours cuda", *(f"ours cuda {gemm}" for gemm in peers.gemms_of(case, (8, 0)))]
    job = gpu_steps._job(case, names, 10)
    gpu_run.do(run, json.loads(json.dumps(job)))
    (row,) = _saved(run)["results"]
    assert not row["wrong"], row["wrong"]
    assert not row["absent"]
    assert list(row["implementations"]) == names
    assert all(each["passed"] for each in row["implementations"].values())


def test_models_are_measured_with_the_backend_that_there_is(run, on_the_cpu, monkeypatch, capsys):
    """A tiny model in both modes and layouts, by a backend that is here and one that is not, and by eager PyTorch."""
    jobs = [{**job, "names": ["ours cuda", *job["names"]]} for job in gpu_steps.model_jobs("reference")]
    assert len(jobs) == 3 * 2 * 2
    monkeypatch.setattr(cuda, "can_run", lambda *a: "the native module is not built")
    for job in jobs:
        tiny = dataclasses.replace(cases.from_json(job["case"]).tiny(), dtype="float32")
        gpu_run.do(run, {**job, "case": cases.to_json(tiny)})
    rows = _saved(run)["results"]
    assert {(row["op"], row["layout"]) for row in rows} == {(op, f) for op in cases.MODEL_MODES for f in cases.LAYOUTS}
    for row in rows:
        assert not row["wrong"]
        assert set(row["implementations"]) == {"ours reference", peers.EAGER[row["layout"]]}
        assert set(row["absent"]) == {"ours cuda"}


def test_a_model_is_timed_in_the_mode_of_its_case(monkeypatch):
    """On a GPU its inference alone is checked: that must not leave the training step in eval mode."""
    workload = _like_a_gpu("model_step")
    expected = check.expect(workload)
    assert set(expected.exact[0]) == {"output"}
    assert len(expected.exact[0]["output"]) == check._GPU_IMAGES
    prepared = peers.prepare("ours reference", workload, False)
    found = check.results(workload, prepared, 1, None)
    assert all(each.passed for each in check.judge(workload, expected, found, complete=True))
    assert prepared.model.training
    assert len(prepared.calls[0]()) == 1 + len(list(prepared.model.parameters()))


@pytest.mark.parametrize("op", cases.MODEL_MODES)
def test_a_compiled_model_is_checked_by_what_is_comparable(op):
    """It returns the outputs of all images, or of a training step, where inference of a few is the truth."""
    workload = _like_a_gpu(op)
    expected = check.expect(workload)
    call = models.call(workload.reference, workload.images, workload.cotangent, workload.case.training)
    found = check.results(workload, peers.Prepared([call]), 1, None)
    verdict = check.judge(workload, expected, found, complete=False)
    assert [each.tensor for each in verdict] == (["output"] if op == "model_eval" else [])
    assert all(each.passed for each in verdict)


def _like_a_gpu(op: str) -> peers.Workload:
    """A tiny model on the CPU that is checked as on a GPU."""
    workload = engine.make_workload(cases.ModelCase(op, "tiny", 8), torch.device("cpu"))
    workload.device = torch.device("cuda")
    return workload


def test_the_report_of_triton_alone_shows_its_times(run):
    row = {
        **engine.case_fields(OpCase("normalize", "", (2, 4, 5, 6))),
        "implementations": {
            "ours triton": {"median_ms": 0.01, "percent_of_floor": 50.0},
            "eager NCHW": {"median_ms": 0.03, "percent_of_floor": 20.0},
        },
        "absent": {"ours cuda": "there is no nvcc"},
        "wrong": [],
    }
    run.row(row)
    run.append("sessions", machine.session(torch.device("cpu"), _PEAKS))
    run.note("kind", "gpu")
    run.note("environment", {"device": "A GPU", "device_type": "cuda", "torch": "2.13.0", "date": "2026-01-01T00"})
    text = tables.markdown(_saved(run))
    assert text.startswith("A GPU, torch 2.13.0, 2026-01-01:")
    assert "| normalize 2x4x5x6 | float32 | contiguous | 0.0100 | 0.0300 | 50 % | 3.00x |" in text
    assert "| milliseconds | dtype | layout | ours | eager, same layout |" in text
    assert "- ours cuda: there is no nvcc." in tables.operator_notes(_saved(run))


@pytest.fixture
def no_real_gpu(monkeypatch):
    """The command sees a GPU, and its steps do nothing but say that they ran."""
    ran: list[tuple] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "describe", lambda device, backend: ran.append(("describe", backend)) or {})
    monkeypatch.setattr(gpu_steps, "run_jobs", lambda run, name, jobs, seconds: ran.append((name, len(jobs) > 0)))
    return ran


def test_the_command_measures_what_there_is(no_real_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        gpu_steps, "measured_backends", lambda device: (["triton"], {"cuda": "the native module is not built"})
    )
    assert gpu.main(["--only", "operators,sanitizer,models,triton", "--output", str(tmp_path)]) == 0
    assert no_real_gpu == [
        ("describe", "triton"),
        ("peaks", True),
        ("operators", True),
        ("models", True),
        ("triton", False),
    ]
    document = gpu_run.Run(tmp_path / "rows.jsonl").document
    assert document["absent"] == {"cuda": "the native module is not built"}
    assert [each["step"] for each in document["steps"]] == ["operators", "models", "sanitizer", "triton"]
    assert "cuda: - (the native module is not built)" in capsys.readouterr().out
    assert "cuda: the native module is not built" in (tmp_path / gpu_steps.SUMMARY).read_text()


def _seconds_of_steps(monkeypatch, tmp_path, *arguments: str) -> dict[str, float]:
    """What each step of jobs may take if no step takes any time."""
    found = {}
    monkeypatch.setattr(gpu_steps, "measured_backends", lambda device: (["triton"], {"cuda": "not built"}))
    monkeypatch.setattr(gpu_steps, "run_jobs", lambda run, name, jobs, seconds: found.update({name: seconds}))
    ended = {"ok": True, "summary": ""}
    tests = {"tests": lambda run, seconds, no_cuda: found.update(tests=seconds) or ended}
    monkeypatch.setattr(gpu_steps, "_PROGRAMS", gpu_steps._PROGRAMS | tests)
    assert gpu.main(["--output", str(tmp_path), *arguments]) == 0
    return found


def test_a_step_leaves_the_later_ones_their_shares(no_real_gpu, monkeypatch, tmp_path):
    assert sum(gpu.STEPS[step] for step in gpu.DEFAULT_STEPS) <= gpu.SECONDS - 15
    found = _seconds_of_steps(monkeypatch, tmp_path)
    assert list(found) == ["peaks", *(s for s in gpu.DEFAULT_STEPS if s not in ("profile", "sanitizer"))]
    names = list(gpu.DEFAULT_STEPS)
    for step in found.keys() - {"peaks"}:
        later = sum(gpu.STEPS[each] for each in names[names.index(step) + 1 :])
        assert found[step] == pytest.approx(gpu.SECONDS - later, abs=5)
        assert found[step] >= gpu.STEPS[step]


def test_with_less_time_all_shares_are_cut_alike(no_real_gpu, monkeypatch, tmp_path):
    found = _seconds_of_steps(monkeypatch, tmp_path, "--only", "models,tests,confirm", "--seconds", "41")
    # a tenth of 80 + 90 + 240
    assert found["models"] == pytest.approx(41 - 33, abs=0.5)
    assert found["tests"] == pytest.approx(41 - 24, abs=0.5)
    assert found["confirm"] == pytest.approx(41, abs=0.5)


def test_a_tool_without_time_is_named(no_real_gpu, monkeypatch, tmp_path):
    _seconds_of_steps(monkeypatch, tmp_path, "--only", "tests", "--seconds", "4")
    assert "OUT OF TIME tests: 1 left out" in (tmp_path / gpu_steps.SUMMARY).read_text()
    found = _seconds_of_steps(monkeypatch, tmp_path, "--only", "tests")
    assert "tests" in found
    assert "OUT OF TIME" not in (tmp_path / gpu_steps.SUMMARY).read_text()


def test_rows_of_two_commits_are_not_mixed(no_real_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "commit", lambda: "new")
    gpu_run.Run(tmp_path / "rows.jsonl").note("environment", {"commit": "old"})
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert "rows of commit old: name another folder" in capsys.readouterr().err
    assert no_real_gpu == []


def test_a_wrong_row_is_exit_status_1(no_real_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_steps, "measured_backends", lambda device: (["triton"], {}))
    wrong = [{"implementation": "ours cuda", "failure": "no"}]
    row = {"case": "a", "implementations": {}, "absent": {}, "wrong": wrong}
    monkeypatch.setattr(gpu_steps, "run_jobs", lambda run, name, jobs, seconds: run.row(row))
    assert gpu.main(["--only", "models", "--output", str(tmp_path)]) == 1


def test_a_gpu_without_any_backend_is_exit_status_2(no_real_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        gpu_steps, "measured_backends", lambda device: ([], {"cuda": "not built", "triton": "not installed"})
    )
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert no_real_gpu == []
    assert "triton: - (not installed)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "layout", "capability", "expected"),
    [
        ("pointwise_eval", (64, 1536, 32, 32), "bfloat16", "contiguous", (9, 0), ("fused", "torch", "wgmma")),
        ("pointwise_train", (64, 768, 7, 7), "bfloat16", "channels_last", (9, 0), ("fused", "torch", "wgmma")),
        # boxes of 64 pixels of one image; 16-byte rows; other GPUs; float32
        ("pointwise_eval", (64, 768, 7, 7), "bfloat16", "contiguous", (9, 0), ("fused", "torch")),
        ("pointwise_eval", (64, 1537, 32, 32), "bfloat16", "contiguous", (9, 0), ("fused", "torch")),
        ("pointwise_eval", (64, 1536, 32, 32), "bfloat16", "contiguous", (8, 0), ("fused", "torch")),
        ("pointwise_eval", (64, 1536, 32, 32), "float32", "contiguous", (9, 0), ("fused", "torch")),
        ("layer_eval", (64, 256, 32, 32), "bfloat16", "contiguous", (8, 0), ("fused", "torch", "layer")),
        ("layer_eval", (64, 264, 32, 32), "bfloat16", "contiguous", (9, 0), ("fused", "torch", "wgmma")),
        ("depthwise_eval", (64, 256, 32, 32), "bfloat16", "contiguous", (9, 0), ()),
        # the weight gradient
        ("pointwise_backward", (64, 1536, 32, 32), "bfloat16", "contiguous", (9, 0), ("wgmma",)),
        ("pointwise_backward", (64, 768, 7, 7), "bfloat16", "contiguous", (9, 0), ()),
        ("pointwise_backward", (64, 1536, 32, 32), "bfloat16", "channels_last", (9, 0), ()),
        ("pointwise_backward", (64, 1536, 32, 32), "bfloat16", "contiguous", (8, 0), ()),
    ],
)
def test_which_gemms_are_timed(op, shape, dtype, layout, capability, expected):
    assert peers.gemms_of(OpCase(op, "", shape, 9, None, dtype, layout), capability) == expected


def test_every_forced_gemm_is_one_that_the_backend_knows(monkeypatch):
    assert {case.op for case in cases.cases("cuda") if case.quick and peers.gemms_of(case, (9, 0))} == {
        op for op in cases.OPERATORS if op.startswith(("pointwise", "layer_eval")) and op != "pointwise_input_grad"
    }
    before = cuda_choice.forced_gemm
    for name in peers.GEMMS:
        with peers.forced_gemm(name):
            assert cuda_choice.forced_gemm() == name
        monkeypatch.setenv("CONVMIXER_CUDA_GEMM", name)
        before.cache_clear()
        assert before() == name
    before.cache_clear()
    assert cuda_choice.forced_gemm is before


def test_float32_is_held_against_eager_s_product_of_all_channels():
    """The order of a product's sums depends on its size: eager's few channels of a narrow product err less than those of the whole."""
    case = OpCase("pointwise_eval", "", (2, 256, 4, 4))
    workload = engine.make_workload(case, torch.device("cpu"), rotate=False)
    expected = check.expect(workload)
    assert expected.kept is None
    assert expected.eager[0]["y"].shape == case.shape

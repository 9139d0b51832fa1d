# SPDX-License-Identifier: MIT
"""python -m benchmarks.gpu: what can be tested of it without a GPU."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_ops, report
from convmixer_kernels.backends import cuda, pointwise_gemm, reference, triton
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


# ---- without nvcc ----


@pytest.fixture
def run(tmp_path):
    return gpu.Run(tmp_path / "gpu.json", 100)


def _saved(run: gpu.Run) -> dict:
    return json.loads(run.path.read_text())


def test_no_gpu_is_exit_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU to measure" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--only", "ops,none"], ["--seconds", "0"], ["--seconds", "nan"]])
def test_bad_options_are_told(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(("hip", "reason"), [(None, "there is no nvcc"), ("6.4", "built for AMD GPUs")])
def test_without_nvcc_nothing_is_built_and_that_is_no_failure(run, monkeypatch, hip, reason):
    monkeypatch.setattr(gpu, "_command", lambda *a, **k: pytest.fail("a command was run"))
    monkeypatch.setattr(torch.version, "hip", hip)
    # hides nvcc
    monkeypatch.setenv("CONVMIXER_BUILD_CUDA", "0")
    assert gpu.build(run)
    assert reason in _saved(run)["build"]["skipped"]


def test_only_backends_that_run_here_are_measured(monkeypatch):
    monkeypatch.setattr(cuda, "can_run", lambda *a: "the native module is not built")
    monkeypatch.setattr(triton, "can_run", lambda *a: None)
    assert gpu.measured_backends("cpu") == (["triton"], {"cuda": "the native module is not built"})


def test_a_sanitizer_without_cuda_kernels_says_so(run):
    gpu.sanitizer(run, "the native module is not built")
    assert _saved(run)["sanitizer"] == {
        "ok": True,
        "skipped": "it checks the CUDA kernels: the native module is not built",
    }


def test_the_first_backend_is_measured_everywhere():
    cases = gpu_ops.operator_cases()
    assert gpu_ops.operator_runs(["triton"]) == [(case, "triton") for case in cases]
    both = gpu_ops.operator_runs(["cuda", "triton"])
    assert both[: len(cases)] == [(case, "cuda") for case in cases]
    # a layer in one kernel is cuda's alone
    assert {case.op for case, backend in both[len(cases) :]} == set(gpu_ops._PASSES) - {"mixer_eval"}
    assert {backend for _, backend in both[len(cases) :]} == {"triton"}


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Cases on CPU tensors, and a clock that does not run them."""

    class OnTheCpu(gpu_ops.Tensors):
        def __init__(self, case):
            super().__init__(case, sets=1, device="cpu")

    monkeypatch.setattr(gpu_ops, "Tensors", OnTheCpu)
    timing = {"median_us": 10.0, "q20_us": 9.0, "q80_us": 11.0, "repeats": 5, "calls": 1}

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
    gpu_ops._case(run, case, _PEAKS, "triton", peers=True)
    rows = {row["implementation"]: row for row in _saved(run)["results"]}
    assert rows["triton"].get("ok"), rows["triton"]
    expected = {"triton", f"eager {layout}"} | ({"clone"} if op == "depthwise_eval" else set())
    assert set(rows) == expected
    run.note("absent", {"cuda": "not built"})
    gpu.summary(run)
    printed = capsys.readouterr().out
    assert "- cuda: not built" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith(case.label) and " - " in line]
    # on CPU tensors eager PyTorch lacks some operators in float16
    if "median_us" in rows[f"eager {layout}"]:
        assert line.split()[-1] == "1.0x"


def test_a_wrong_result_has_no_time(run, on_the_cpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu_ops, "wrong", lambda *a: "output 0: relative error 1")
    gpu_ops._case(
        run, gpu_ops.OpCase("normalize", (2, 4, 5, 6), 3, torch.float32, "contiguous"), _PEAKS, "triton", True
    )
    row = next(row for row in _saved(run)["results"] if row["implementation"] == "triton")
    assert row["ok"] is False
    assert "median_us" not in row
    gpu.summary(run)
    assert "triton: output 0: relative error 1" in capsys.readouterr().out


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
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
    monkeypatch.setattr(torch, "randn", lambda size, **k: torch.empty(size, device="meta"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_ops, "_reference_model", lambda *a: model)
    monkeypatch.setattr(gpu_ops.model_cases, "ours_like", lambda *a: model)
    monkeypatch.setattr(gpu_ops, "_model_wrong", lambda a, b, images, backend: "wrong" if backend == "cuda" else None)
    monkeypatch.setattr(gpu_ops, "_using", Using)
    monkeypatch.setattr(gpu_ops, "_model_row", lambda *a: seen.append(active[0]) or {"median_us": 1.0})
    gpu_ops.models(run, ["cuda", "triton"])
    rows = _saved(run)["results"]
    assert len(rows) == len(gpu_ops._MODELS) * 2 * 2 * 3
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
    """The command sees a GPU, and its sections do nothing but say that they ran."""
    ran: list[tuple] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Some GPU")
    monkeypatch.setattr(gpu, "describe", lambda run, backend: ran.append(("describe", backend)))
    monkeypatch.setattr(gpu, "build", lambda run: True)
    monkeypatch.setattr(gpu_ops, "peaks", lambda run: None)
    monkeypatch.setattr(gpu_ops, "operators", lambda run, seconds, backends: ran.append(("ops", *backends)))
    monkeypatch.setattr(gpu_ops, "models", lambda run, backends: ran.append(("models", *backends)))
    return ran


def test_the_command_measures_what_there_is(no_real_gpu, monkeypatch, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "measured_backends", lambda: (["triton"], {"cuda": "the native module is not built"}))
    assert gpu.main(["--only", "build,sanitizer,ops,models", "--output", str(path)]) == 0
    assert no_real_gpu == [("describe", "triton"), ("ops", "triton"), ("models", "triton")]
    assert json.loads(path.read_text())["absent"] == {"cuda": "the native module is not built"}
    assert "cuda: - (the native module is not built)" in capsys.readouterr().out


def test_a_gpu_without_any_backend_is_exit_status_2(no_real_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "measured_backends", lambda: ([], {"cuda": "not built", "triton": "not installed"}))
    assert gpu.main(["--output", str(tmp_path / "gpu.json")]) == 2
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
        ("mixer_eval", (64, 257, 32, 32), torch.bfloat16, "contiguous", (9, 0), ("fused", "torch")),
        ("depthwise_eval", (64, 256, 32, 32), torch.bfloat16, "contiguous", (9, 0), ()),
    ],
)
def test_which_gemms_are_timed(op, shape, dtype, layout, capability, expected):
    assert gpu_ops.forced_gemms(gpu_ops.OpCase(op, shape, 9, dtype, layout), capability) == expected


def test_every_forced_gemm_is_one_that_the_backend_knows(monkeypatch):
    cases = [case for case in gpu_ops.operator_cases() if gpu_ops.forced_gemms(case, (9, 0))]
    assert {case.op for case in cases} == {"pointwise_eval", "pointwise_train", "mixer_eval"}
    before = pointwise_gemm.forced_gemm
    for name in {name for case in cases for name in gpu_ops.forced_gemms(case, (9, 0))}:
        with gpu_ops.forcing(name):
            assert pointwise_gemm.forced_gemm() == name
        monkeypatch.setenv("CONVMIXER_CUDA_GEMM", name)
        before.cache_clear()
        assert before() == name
    before.cache_clear()
    with gpu_ops.forcing(None):
        assert pointwise_gemm.forced_gemm is before


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

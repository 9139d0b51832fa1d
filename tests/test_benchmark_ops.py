# SPDX-License-Identifier: MIT
"""The operator suite: every case runs and is checked, its counters equal counts by hand, no finished row is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as command
from benchmarks import cases, check, engine, machine, ops, peers, roofline, tables
from benchmarks.cases import ModelCase, OpCase
from convmixer_kernels.backends import reference

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
TINY_CASES = {case.tiny().name: case.tiny() for case in cases.cases("cpu") + cases.cases("cuda")}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny planes are slower with several; and the suite's confinement to cores must not outlive a test."""
    torch.set_num_threads(1)


CLOCK = engine.clock_of(CPU, 1.0, repeats=1)
PEAKS = machine.Peaks(1e10, 1e11, dict.fromkeys(cases.DTYPES, 1e11), "invented")


def make_workload(case: cases.Case) -> peers.Workload:
    return engine.make_workload(case, CPU, rotate=False)


def verified(case: cases.Case, name: str, compile_all: bool = False) -> list[check.Comparison]:
    """The verdict on an implementation; skips the test if it cannot run here."""
    workload = make_workload(case)
    try:
        return engine.verify(name, workload, check.expect(workload), compile_all)[1]
    except peers.Absent as reason:
        pytest.skip(str(reason))


def dashes(case: cases.Case, names: list[str]) -> dict[str, str]:
    """Which of the implementations do not run a case, and why."""
    return engine.measure(make_workload(case), names, None, None)["absent"]


def run(path: Path, *arguments: str) -> tuple[int, dict]:
    status = command.main(["ops", "--tiny", "--repeats", "1", "--threads", "1", "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


@pytest.mark.parametrize("op", [*cases.OPERATORS, *cases.MODEL_MODES])
def test_every_case_runs_and_is_right(op):
    """One repeat of every implementation but the compiled ones, which take a compiler 10 s each."""
    found = [case for case in TINY_CASES.values() if case.op == op]
    assert found
    for case in found:
        row = engine.measure(make_workload(case), peers.names("cpu"), CLOCK, PEAKS)
        assert not row["wrong"], row["wrong"]
        json.dumps(row, allow_nan=False)
        expected = {"ours cpu"}
        if op not in cases.PARTS:
            expected |= {"eager NCHW", "eager channels_last"} - set(row["absent"])
            assert peers.EAGER[case.layout] in expected
        assert expected <= set(row["implementations"])
        assert set(row["implementations"]) | set(row["absent"]) == set(peers.names("cpu"))
        for name, each in row["implementations"].items():
            assert 0 < each["q20_ms"] <= each["median_ms"] <= each["q80_ms"]
            assert each["percent_of_floor"] > 0
            # eager is the measure of the rest, and so never beyond twice itself
            assert each.get("passed", True) or name != peers.EAGER[case.layout]


@pytest.mark.parametrize("op", [*cases.OPERATORS, *cases.MODEL_MODES])
def test_every_gpu_case_can_be_made(op):
    """The columns of a GPU's table from the inputs of each of its cases: ready, or a dash with its reason."""
    names = peers.names("cuda")
    found = {case.tiny().name: case.tiny() for case in cases.cases("cuda") if case.op == op}
    for case in found.values():
        ready, absent, workload = [], {}, make_workload(case)
        for name in names:
            try:
                peers.prepare(name, workload, False)
                ready.append(name)
            except peers.Absent as reason:
                absent[name] = str(reason)
        assert all(absent.values())
        assert (
            "ours triton" in ready
            or "GPU" in absent["ours triton"]
            or "triton is not installed" in absent["ours triton"]
        )


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="with a GPU: python -m benchmarks ops --device cuda"
)
@pytest.mark.parametrize("op", ["depthwise_input_grad", "pointwise_weight_grad", "layer_step", "model_eval"])
def test_the_triton_column_is_right(op):
    """A few, in Triton's interpreter: test_triton.py has its operators, test_gpu_command.py each primitive."""
    pytest.importorskip("triton", reason="triton is not installed")
    case = OpCase(op, "sweep", (1, 64, 4, 5), 3, dtype="float16")
    if op in cases.MODEL_MODES:
        case = ModelCase(op, "tiny", 2)
    workload = make_workload(case)
    _, found = engine.verify("ours triton", workload, check.expect(workload))
    assert [each for each in found if not each.passed] == []


def test_columns_are_those_of_the_device():
    for device, ours in (("cpu", ["ours cpu"]), ("cuda", ["ours cuda", "ours triton"])):
        names = peers.names(device)
        assert names[: len(ours)] == ours
        assert set(names) >= {"eager NCHW", "eager channels_last", "clone"}
        assert set(names) >= {"compile", "compile max-autotune", "compile layout opt. off"}
    assert set(peers.names("cpu")) >= {"onnxruntime", "openvino"}


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_the_product_alone_is_the_one_of_the_block(layout):
    case = OpCase("pointwise_eval", "", (2, 16, 4, 5), channels_out=24, layout=layout)
    workload = make_workload(case)
    (found,) = peers.prepare(peers.MATMUL, workload, False).calls[0]()
    inputs = workload.inputs[0]
    expected = torch.nn.functional.conv2d(inputs.x, inputs.parameters.weight)
    if layout == "channels_last":
        found = found.view(2, 4, 5, 24).permute(0, 3, 1, 2)
    torch.testing.assert_close(found.reshape(expected.shape), expected)
    for op in ("depthwise_eval", "pointwise_step", "layer_eval"):
        with pytest.raises(peers.Absent, match="not one product"):
            peers.prepare(peers.MATMUL, make_workload(OpCase(op, "", (2, 16, 4, 5), 3)), False)


def test_a_bound_is_no_peer():
    row = {"implementations": {name: {"median_ms": 1.0} for name in ("ours cuda", "eager NCHW", *peers.BOUNDS)}}
    assert tables.best_peer(row) == "eager NCHW"


def test_compiled_operators_are_right():
    """The smallest case of a forward and of a step, under torch.compile."""
    for op in ("depthwise_eval", "depthwise_step"):
        found = verified(OpCase(op, "sweep", (2, 32, 6, 7), 3), "compile", compile_all=True)
        assert found
        assert all(each.error < 1e-5 for each in found)


def test_pytest_benchmark_drives_the_same_cases(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install '.[bench]'")
    command_line = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--benchmark-max-time", "0.01"]
    command_line += ["-q", "-k", "norm_backward and float32 and contiguous"]
    command_line += ["-p", "no:cacheprovider", "--benchmark-json", str(tmp_path / "found.json")]
    # pytest's own options are for the tests, not for what they test
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    timed = {
        each["extra_info"]["implementation"] for each in json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    }
    assert timed >= {"eager NCHW", "eager channels_last", "clone"}


def test_the_table_has_what_it_promises():
    for device in ("cpu", "cuda"):
        found = cases.cases(device)
        assert len({case.name for case in found}) == len(found)
        for op in cases.DEPTHWISE:
            assert {case.kernel for case in found if case.op == op} >= set(cases.KERNELS)
        for op in cases.OPERATORS:
            mine = [case for case in found if case.op == op]
            assert {(case.dtype, case.layout) for case in mine} == {(d, f) for d in cases.DTYPES for f in cases.LAYOUTS}
            assert any(case.quick for case in mine)
        assert {case.model for case in found if case.op == "model_step"} == set(cases.PRESETS)
        families = {case.family.split("-")[0] for case in found if case.op == "depthwise_eval"}
        assert families == {"sweep", "ConvMixer", "ConvNeXt", "RepLKNet"}
    quick = cases.select(cases.cases(), True, [])
    assert {case.kernel for case in quick if case.op == "depthwise_weight_grad"} >= set(cases.KERNELS)


def test_filters_take_patterns_of_words():
    found = cases.select(cases.cases(), False, ["depthwise_eval k9 bfloat16", "RepLKNet* depthwise_step"])
    assert {(case.op, case.kernel) for case in found} == {
        ("depthwise_eval", 9),
        *(("depthwise_step", k) for k in (31, 29, 27, 13)),
    }
    assert not cases.select(cases.cases(), False, ["depthwise_eval k8"])


@pytest.mark.parametrize("case", [OpCase("depthwise_step", "sweep", (2, 32, 6, 7), 3)], ids=str)
def test_a_wrong_result_gets_no_time(monkeypatch, tmp_path, capsys, case):
    honest = ops.Operator.ours

    def wrong(self, inputs, backend):
        call = honest(self, inputs, backend)

        def off() -> ops.Results:
            y, dx, dw, *rest = call()
            dw[3, 0, 1, 1] += dw.abs().max() / 1000
            return y, dx, dw, *rest

        return off

    monkeypatch.setattr(ops.Operator, "ours", wrong)
    status, document = run(
        tmp_path / "ops.json", "--filter", "depthwise_step k3 float32", "--implementations", "ours cpu"
    )
    assert status == 1
    (row,) = document["results"]
    assert [each["tensor"] for each in row["wrong"]] == ["dw"]
    assert set(row["implementations"]) == {"eager NCHW"}
    printed = capsys.readouterr()
    assert "WRONG" in printed.out
    assert "ours cpu: dw: relative error" in printed.err


@pytest.mark.parametrize("when", ["made", "called"])
def test_a_peer_that_fails_is_a_dash_and_ours_is_wrong(monkeypatch, when):
    honest = peers.prepare

    def fail():
        raise RuntimeError("no memory\nfor this")

    def prepare(name, *rest):
        prepared = honest(name, *rest)
        if name not in ("ours cpu", "eager channels_last"):
            return prepared
        if when == "made":
            fail()
        return dataclasses.replace(prepared, calls=[fail] * len(prepared.calls))

    monkeypatch.setattr(peers, "prepare", prepare)
    workload = make_workload(TINY_CASES["depthwise_eval k9 2x32x6x7 float32 contiguous"])
    row = engine.measure(workload, ["ours cpu", "eager NCHW", "eager channels_last"], CLOCK, PEAKS)
    assert row["absent"] == {"eager channels_last": "failed: no memory"}
    assert row["wrong"] == [{"implementation": "ours cpu", "failure": "no memory"}]
    assert set(row["implementations"]) == {"eager NCHW"}


def test_an_engine_that_refuses_a_graph_is_a_dash(monkeypatch):
    """ONNX Runtime's errors are no RuntimeError."""

    class Fail(Exception):
        pass

    def session(*arguments, **options):
        raise Fail("no kernel for this\nat all")

    runtime, capi = types.ModuleType("onnxruntime"), types.ModuleType("onnxruntime.capi")
    runtime.SessionOptions = lambda: types.SimpleNamespace(add_session_config_entry=lambda *a: None)
    runtime.InferenceSession = session
    capi.onnxruntime_pybind11_state = types.SimpleNamespace(Fail=Fail)
    for module in (runtime, capi):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(peers, "_onnx_graph", lambda workload: b"")
    case = TINY_CASES["depthwise_eval k9 2x32x6x7 float32 contiguous"]
    assert dashes(case, ["onnxruntime"]) == {"onnxruntime": "failed: no kernel for this"}
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    missing = "onnxruntime is not installed: pip install '.[bench]'"
    assert dashes(case, ["onnxruntime"]) == {"onnxruntime": missing}


_GRAPHS = {"layer": OpCase("layer_eval", "", (2, 8, 6, 7), 3), "model": ModelCase("model_eval", "tiny", 2)}


@pytest.mark.parametrize("case", _GRAPHS.values(), ids=_GRAPHS)
def test_a_graph_is_that_of_the_eager_implementation(case):
    """No node is missing or more: an engine would otherwise be timed at other work."""
    onnx = pytest.importorskip("onnx", reason="the graphs need onnx: pip install '.[bench]'")
    pytest.importorskip("onnxscript", reason="the graphs need onnxscript: pip install '.[bench]'")
    block = ["Conv", "Gelu", "BatchNormalization"]
    layer = [*block, "Add", *block]
    expected = layer if case.op == "layer_eval" else [*block, *layer, *layer]
    found = onnx.load_from_string(peers._onnx_graph(make_workload(case))).graph
    nodes = [node.op_type for node in found.node]
    # pooling, flattening and the classifier follow
    assert nodes == expected + (["ReduceMean", "Reshape", "Gemm"] if case.op == "model_eval" else [])
    assert [each.name for each in found.input] == ["x"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threads", "0"],
        ["--repeats", "-1"],
        ["--filter", "none such"],
        ["--implementations", "matmul"],
    ],
)
def test_bad_options_are_told_without_a_traceback(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["ops", *arguments])
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "op", ["depthwise_step", "depthwise_train_kernel", "pointwise_step", "layer_step", "normalize"]
)
def test_sampled_channels_are_the_whole_s(monkeypatch, op):
    """A check of some channels sees the same numbers as one of all."""
    out = 320 if op == "pointwise_step" else None
    workload = make_workload(OpCase(op, "sweep", (2, 256, 5, 6), 3, out, layout="channels_last"))
    whole = check.expect(workload)
    monkeypatch.setattr(check, "_LARGEST_EXACT", 1000)
    monkeypatch.setattr(check, "_LARGEST_COMPARED", 5000)
    sampled = check.expect(workload)
    assert whole.kept is None
    assert len(sampled.kept) == 128
    for name, tensor in sampled.exact[0].items():
        everything = whole.exact[0][name]
        expected = everything[:, sampled.kept] if name in ("y", "dx", "a") else everything[sampled.kept]
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)
    prepared = peers.prepare("ours cpu", workload, False)
    found = check.results(workload, prepared, 1, sampled.kept)
    for name, tensor in found[0].items():
        assert tensor.shape == sampled.exact[0][name].shape
    assert all(each.passed for each in check.judge(workload, sampled, found, complete=True))


@pytest.mark.parametrize(
    ("op", "timed"),
    [
        ("depthwise_input_grad", ["norm_backward", "depthwise_input_grad"]),
        ("depthwise_input_grad_kernel", ["depthwise_input_grad"]),
        ("depthwise_weight_grad", ["depthwise_weight_grad"]),
        ("pointwise_input_grad", ["norm_backward", "pointwise_backward"]),
        ("pointwise_weight_grad", ["pointwise_backward"]),
        ("pointwise_backward", ["norm_backward", "pointwise_backward"]),
        ("depthwise_train", ["depthwise_train", "normalize"]),
        ("depthwise_train_kernel", ["depthwise_train"]),
    ],
)
def test_what_a_row_of_ours_contains(monkeypatch, op, timed):
    """Which primitives are timed: the same on every device, since all backends have these."""
    called = []
    for name in ("norm_backward", "depthwise_input_grad", "depthwise_weight_grad", "pointwise_backward", "normalize"):
        _record(monkeypatch, name, called)
    _record(monkeypatch, "depthwise_train", called)
    (inputs,) = ops.make_inputs(OpCase(op, "", (2, 8, 5, 6), 3), CPU, 1)
    call = ops.OPERATORS[op].ours(inputs, "reference")
    called.clear()
    call()
    assert called == timed


def _record(monkeypatch: pytest.MonkeyPatch, name: str, called: list[str]) -> None:
    honest = getattr(reference, name)
    monkeypatch.setattr(reference, name, lambda *arguments: called.append(name) or honest(*arguments))


@pytest.mark.parametrize("op", cases.OPERATORS)
def test_flops_are_those_that_torch_counts(op):
    """torch's counter sees every convolution of eager PyTorch's way, forward and backward."""
    case = OpCase(op, "sweep", (2, 6, 5, 7), 3, channels_out=10 if op.startswith("pointwise") else None)
    (inputs,) = ops.make_inputs(case, CPU, 1)
    with FlopCounterMode(display=False) as counter:
        ops.OPERATORS[op].call(inputs)()
    depthwise, pointwise = roofline.operator_flops(case)
    if op in ("depthwise_weight_grad", "depthwise_step", "depthwise_conv_step", "layer_step"):
        # torch (2.13) counts a grouped convolution's weight gradient as if it had one group: 6 times for 6 channels
        depthwise += 5 * depthwise // ops.OPERATORS[op].convolutions
    assert depthwise + pointwise == counter.get_total_flops()


def test_bytes_by_hand():
    pixels = 2 * 5 * 7

    def counted(op: str, **more) -> int:
        return roofline.operator_bytes(OpCase(op, "sweep", (2, 6, 5, 7), 3, **more))

    # x, y; x, a, a, x, y; dy, a, dy, a, dx; x, dy, a
    assert counted("depthwise_eval") == 2 * 6 * pixels * 4
    assert counted("depthwise_train", dtype="bfloat16") == 5 * 6 * pixels * 2
    assert counted("depthwise_input_grad") == 5 * 6 * pixels * 4
    assert counted("depthwise_weight_grad") == 3 * 6 * pixels * 4
    # 5 forward, then dy, a; dy, a, dx; x, dy, a
    assert counted("depthwise_step") == 13 * 6 * pixels * 4
    # x has 6 channels, a, dy and y have 10
    assert counted("pointwise_eval", channels_out=10) == (6 + 10) * pixels * 4
    assert counted("pointwise_train", channels_out=10) == (6 + 3 * 10) * pixels * 4
    assert counted("pointwise_step", channels_out=10) == (3 * 6 + 9 * 10) * pixels * 4
    assert counted("normalize") == 3 * 6 * pixels * 4
    assert counted("norm_backward") == 2 * 6 * pixels * 4
    # the reduction's dy, a; dx from dy, a; dw from x, dy, a
    assert counted("pointwise_backward", channels_out=10) == (2 * 6 + 6 * 10) * pixels * 4
    # an operator without its other kernels: x, a; dy, a, dx
    assert counted("depthwise_train_kernel") == 2 * 6 * pixels * 4
    assert counted("depthwise_input_grad_kernel") == 3 * 6 * pixels * 4
    # as roofline counts a model's layer: 26 passes
    assert counted("layer_step") == 26 * 6 * pixels * 4


def test_floors_by_hand():
    peaks = machine.Peaks(copy=1e9, fma=2e9, gemm={"float32": 1e9, "bfloat16": 1e9}, fma_source="")
    case = OpCase("layer_eval", "sweep", (1, 10, 10, 10), 9)
    # of 10 rows and 10 columns of 9 taps, 70 taps each are inside
    arithmetic = 2 * 10 * 70 * 70 / 2e9 + 2 * 1000 * 10 / 2e9 + 36 * 1000 * 2 / 2e9
    floor = roofline.floor(case, "cpu", peaks)
    assert (floor["bytes"], floor["flops"], floor["bound"]) == (8000, 182_000, "arithmetic")
    assert floor["floor_ms"] == pytest.approx(1e3 * arithmetic)
    fast = peaks._replace(fma=1e15, gemm=dict.fromkeys(peaks.gemm, 1e15))
    floor = roofline.floor(case, "cpu", fast)
    assert (floor["bound"], floor["floor_ms"]) == ("bytes", pytest.approx(8e-3))
    # tensor cores carry a GPU's 16-bit convolutions, and its erfs run beside the rest
    half = OpCase("depthwise_eval", "sweep", (1, 10, 10, 10), 9, dtype="bfloat16")
    assert roofline.floor(half, "cuda", peaks)["floor_ms"] == pytest.approx(4e-3)


def test_peaks_are_sane():
    """More than a microcontroller, less than a rack: a typed exponent would show."""
    peaks = machine.measure_peaks(CPU, {"bfloat16"}, small=True)
    assert 1e7 < peaks.copy < 1e13
    assert 1e7 < peaks.fma < 1e13
    assert set(peaks.gemm) == {"float32", "bfloat16"}
    assert peaks.fma >= peaks.gemm["float32"]
    if shutil.which("cc"):
        assert peaks.fma_source == "a loop of multiply-adds"
    assert 1 << 16 < machine.last_level_cache(CPU) < 1 << 32


def test_goes_on_without_repeating(tmp_path, capsys):
    path = tmp_path / "ops.json"
    some = ("--implementations", "ours cpu", "--filter", "norm_backward float32 contiguous")
    status, first = run(path, *some)
    assert (status, len(first["results"])) == (0, 1)
    wider = ("--implementations", "ours cpu", "--filter", "norm_backward float32")
    status, second = run(path, *wider)
    assert status == 0
    assert second["results"][0] == first["results"][0]
    assert [row["layout"] for row in second["results"]] == ["contiguous", "channels_last"]
    assert [row["session"] for row in second["results"]] == [0, 1]
    status, third = run(path, *wider)
    assert third == second
    second["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(second))
    assert run(path, *wider)[0] == 2
    assert "torch was 1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"kind": "operators"}', '{"kind": "operators", "environment": {}, "results": {}}']
)
def test_going_on_with_what_is_no_results_is_refused(tmp_path, capsys, content):
    path = tmp_path / "ops.json"
    path.write_text(content)
    assert command.main(["ops", "--tiny", "--threads", "1", "--json", str(path)]) == 2
    assert f"{path} is not a file of this command" in capsys.readouterr().err
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--implementations", "ours cpu", "clone"], "implementations was ['ours cpu'], is ['ours cpu', 'clone']"),
        (["--implementations", "ours cpu", "--compile-all"], "compile_all was False, is True"),
    ],
)
def test_going_on_with_other_options_is_refused(tmp_path, capsys, changed, told):
    """The rows that are there would lack what is asked for now."""
    path = tmp_path / "ops.json"
    chosen = ("--filter", "norm_backward float32 contiguous")
    run(path, *chosen, "--implementations", "ours cpu")
    status, _ = run(path, *chosen, *changed)
    assert status == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_finished_rows_survive(tmp_path, number):
    path = tmp_path / "ops.json"
    arguments = [
        "ops",
        "--tiny",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--implementations",
        "ours cpu",
        "--json",
        str(path),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (path.exists() and len(json.loads(path.read_text())["results"]) >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while True:
        process.send_signal(number)
        # Python drops an interrupt that arrives in a finalizer
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, printed = process.communicate(timeout=1)
            break
    left = json.loads(path.read_text())
    if number == signal.SIGINT:
        assert process.returncode == command.INTERRUPTED
        assert "the same command goes on" in printed
    names = [row["case"] for row in left["results"]]
    assert 3 <= len(names) < len(TINY_CASES)
    status, document = run(path, "--implementations", "ours cpu", "--filter", "depthwise_eval k3", names[-1])
    assert status == 0
    assert document["results"][: len(names)] == left["results"]

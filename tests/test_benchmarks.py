# SPDX-License-Identifier: MIT
"""python -m benchmarks on a model small enough for a test, its report, and its counters against numbers by hand."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import types

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cases, check, grid, host, machine, models, roofline, tables, timing
from convmixer_kernels import prepared
from convmixer_kernels.backends import cuda, torch_gemm

for package in ("PIL", "sklearn"):
    pytest.importorskip(package, reason=f"the benchmarks need {package}: pip install '.[bench]'")

# Wide enough that the error of a bias's gradient is not a matter of luck.
TINY = cases.Preset(64, 2, 3, 2, 16, "gelu", 5, batch=3, quick_batch=2, quick_training=False)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> cases.Preset:
    """The only model there is, on a machine whose peaks take no time to measure; one thread is enough for it."""
    torch.set_num_threads(1)
    for module in (cases, command):
        monkeypatch.setattr(module, "PRESETS", {"tiny": TINY})
    monkeypatch.setattr(command, "MODELS", ("tiny",))
    peaks = machine.Peaks(1e10, 1e11, dict.fromkeys(cases.DTYPES, 1e11), "invented")
    monkeypatch.setattr(machine, "measure_peaks", lambda device, dtypes, small: peaks)
    return TINY


def run(tmp_path, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "results.json"
    status = command.main(["--repeats", "2", "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_checks_times_prints_and_writes(tmp_path, capsys, layout):
    status, document = run(tmp_path, "--layout", layout, "--dtype", "float32", "bfloat16")
    assert status == 0
    printed = capsys.readouterr()
    for word in ("error ours", "eager ms", "speed-up", "ConvMixer-64/2, 16x16, batch 3", "eval", "train", "bfloat16"):
        assert word in printed.out
    assert "tiny" not in printed.out
    assert "float64" in printed.err
    assert [(row["op"], row["dtype"]) for row in document["results"]] == [
        ("model_eval", "float32"),
        ("model_step", "float32"),
        ("model_eval", "bfloat16"),
        ("model_step", "bfloat16"),
    ]
    # 1 output; 1 output + images + 2 per convolution and norm of a block + classifier + 3 buffers of each of 5 norms
    parameters = (1 + 2 * TINY.depth) * 4 + 2
    eager = {"contiguous": "eager NCHW", "channels_last": "eager channels_last"}[layout]
    for row, checked in zip(document["results"], [1, 2 + parameters + 15] * 2, strict=True):
        assert row["layout"] == layout
        assert row["model"] == "tiny"
        assert set(row["implementations"]) == {eager, "ours cpu"}
        for each in row["implementations"].values():
            assert each["tensors_checked"] == checked
            assert 0 < each["q20_ms"] <= each["median_ms"] <= each["q80_ms"]
            assert each["repeats"] == 2
    found = document["environment"]
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()


def test_as_a_user_runs_it():
    """A process times each row; it cannot take what it runs from the module that `python -m` starts."""
    arguments = ["--models", "256/8@32", "--batch", "1", "--repeats", "1", "--threads", "1"]
    command = [sys.executable, "-m", "benchmarks", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=machine.ROOT)
    assert ran.returncode == 0, ran.stderr
    assert "ConvMixer-256/8, 32x32, batch 1" in ran.stdout
    assert "Traceback" not in ran.stderr


def test_quick_says_what_it_leaves_out(tmp_path, capsys):
    status, document = run(tmp_path, "--quick")
    assert status == 0
    assert [row["op"] for row in document["results"]] == ["model_eval"]
    assert tables.models(document)[1][1][3:] == ["-"] * 5
    assert "not run with --quick" in capsys.readouterr().out


@pytest.mark.parametrize(
    "op, tensor",
    [
        ("model_eval", "output"),
        ("model_step", "gradient of 3.0.fn.0.weight"),
        ("model_step", "3.3.running_var"),
        ("model_step", "gradient of the images"),
    ],
)
def test_a_wrong_tensor_is_named_and_fails(tmp_path, capsys, monkeypatch, op, tensor):
    """One element of one tensor of ours is off by a thousandth of the largest."""
    name = "evaluate" if op == "model_eval" else "training_step"
    honest, calls = getattr(check, name), []

    def wrong(model, images, *rest):
        results = honest(model, images, *rest)
        calls.append(images.dtype)
        if len(calls) == 3:  # after float64 and eager
            results[tensor] = results[tensor].clone()
            results[tensor].view(-1)[0] += results[tensor].abs().max() / 1000
        return results

    monkeypatch.setattr(check, name, wrong)
    status, document = run(tmp_path)
    assert status == 1
    assert calls == [torch.float64, torch.float32, torch.float32]
    printed = capsys.readouterr()
    assert f"{op} tiny batch 3 float32 contiguous: ours cpu: {tensor}: relative error" in printed.err
    assert tables.WRONG in printed.out
    good, bad = sorted(document["results"], key=lambda row: len(row["wrong"]))
    assert bad["op"] == op
    assert [each["tensor"] for each in bad["wrong"]] == [tensor]
    assert not good["wrong"]
    assert {name for name, each in good["implementations"].items() if "median_ms" in each} == {"eager NCHW", "ours cpu"}
    assert not any("median_ms" in each for each in bad["implementations"].values())


def test_nan_and_missing_tensors_are_wrong():
    exact = {"a": torch.ones(3), "b": torch.ones(3)}
    found = check.compare(exact, exact, {"a": torch.tensor([1.0, float("nan"), 1.0])}, torch.float32)
    assert [each.passed for each in found] == [False, False]
    exact["c"], wrong = torch.ones(3), torch.zeros(3)
    found = check.compare(exact, exact, {"a": torch.ones(3), "b": wrong, "c": wrong * float("nan")}, torch.float32)
    assert [each.tensor for each in found] == ["c", "b", "a"]


def test_one_image_is_not_trained_on(tmp_path, capsys):
    """Batch norm and pooling over one image leave nothing of it: every gradient before them is exactly 0."""
    status, document = run(tmp_path, "--batch", "1")
    assert status == 0
    assert [row["op"] for row in document["results"]] == ["model_eval"]
    assert "a training step needs two images" in capsys.readouterr().out


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert command.main([]) == 2
    error = capsys.readouterr().err
    assert "PIL" in error
    assert "pip install '.[bench]'" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--backend", "fpga"], "--backend: invalid choice: 'fpga'"),
        (["--device", "meta"], "--device: invalid choice: 'meta'"),
        (["--repeats", "0"], "must be positive"),
        (["--json", "no/such/folder/a.json"], "is not a folder"),
        (["--models", "vgg"], "invalid choice"),
    ],
)
def test_bad_options_end_with_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_batch_of_a_photo_is_normalised_and_varied(tmp_path):
    picture = models.load_photo()
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 427, 640)
    images = models.image_batch(picture, 4, 32)
    assert images.shape == (4, 3, 32, 32)
    assert torch.equal(images, models.image_batch(picture, 4, 32))
    # different pictures, not one picture and its rounding: the values' standard deviation is near 1
    assert all((images[i] - images[j]).abs().mean() > 0.1 for i in range(4) for j in range(i))
    # a white image file, enlarged, is white's normalised value everywhere
    path = tmp_path / "white.png"
    import PIL.Image

    PIL.Image.new("L", (9, 7), 255).save(path)
    white = models.image_batch(models.load_photo(path), 2, 16)
    expected = (1 - torch.tensor(models.MEAN)) / torch.tensor(models.STD)
    torch.testing.assert_close(white, expected.view(1, 3, 1, 1).expand(2, 3, 16, 16))


def test_timing_interleaves_in_alternating_order():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = timing.interleaved(functions, repeats=2, warmup=1, device=torch.device("cpu"))
    assert "".join(calls) == "abbaab"
    assert found["a"].repeats == 2
    assert timing.summarise([5.0, 1.0, 2.0, 3.0, 4.0]) == timing.Timing(3.0, 1.8, 4.2, 5)


@pytest.mark.parametrize(
    ("seconds_a_call", "reason", "fields"),
    [
        (1e-5, None, {"graph_calls": 40}),
        (1e-2, None, {"graph_calls": 1}),
        (1e-5, "a call that waits", {"graph_calls": 0, "not_captured": "a call that waits"}),
        # its launches do not count, and it is not captured
        (0.2, None, {"graph_calls": 0}),
    ],
)
def test_a_gpu_is_timed_by_graphs(monkeypatch, seconds_a_call, reason, fields):
    """A clock, streams and a graph that are invented: a replay takes as long as its calls."""
    calls, captured = [], []

    def elapsed(call, device):
        call()
        return seconds_a_call * (captured[-1] if call is replay else 1)

    def replay():
        pass

    def graph_of(call, times):
        captured.append(times)
        return (None, reason) if reason else (replay, None)

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream,
        "stream": contextlib.nullcontext,
        "current_stream": lambda: stream,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "elapsed", elapsed)
    monkeypatch.setattr(timing, "_graph_of", graph_of)
    found = timing.graphed(lambda: calls.append(1), seconds=0.2)
    assert found.median == pytest.approx(seconds_a_call)
    assert found.fields()["median_ms"] == pytest.approx(1e3 * seconds_a_call)
    assert found.more["called_ms"] == pytest.approx(1e3 * seconds_a_call)
    assert found.more["host_ms"] < 1
    assert {name: found.more.get(name) for name in fields} == fields
    assert ("not_captured" in found.more) == (reason is not None)
    assert bool(captured) == (seconds_a_call < 0.1)
    assert len(calls) >= 3 + 2 + 5


def in_another(what: str) -> tuple[int, int]:
    """What a test has another process do."""
    if what == "die":
        os._exit(3)
    return os.getpid(), os.getppid()


def test_a_new_process_for_every_computation(capfd):
    found = [timing.in_new_process(in_another, "work") for _ in range(2)]
    assert len({os.getpid(), *(pid for pid, _ in found)}) == 3
    with pytest.raises(RuntimeError, match="ended with exit status 3"):
        timing.in_new_process(in_another, "die")
    assert "Traceback" not in capfd.readouterr().err


def test_counters_equal_numbers_by_hand():
    # 16 x 16 in patches of 2: 64 positions, 3 images: 192 pixels of 64 channels
    stem, layer, head = 192 * 64 * 12, 192 * 64 * (9 + 64), 3 * 64 * 5
    assert roofline.multiply_adds(TINY, 3, training=False) == stem + 2 * layer + head == 1_942_464
    assert roofline.multiply_adds(TINY, 3, training=True) == 3 * 1_942_464 - stem == 5_679_936
    assert roofline.activations(TINY, 3) == 192 * 64 * 5 == 61_440
    assert roofline.model_bytes(TINY, 3, training=False, itemsize=2) == 192 * 64 * 2 * 2 * 4
    assert roofline.model_bytes(TINY, 3, training=True, itemsize=4) == 192 * 64 * 2 * 4 * 26
    slow = machine.Peaks(1e12, 1e9, {"float32": 1e9}, "")
    narrow = machine.Peaks(1e9, 1e15, {"float32": 1e15}, "")
    floor = roofline.floor(cases.ModelCase("model_eval", "tiny", 3), "cpu", slow)
    # of 8 rows and 8 columns of 3 taps, 2 taps each are outside
    outside = 2 * 192 * 64 * (9 - 22 * 22 / 64)
    assert floor["floor_ms"] == pytest.approx(1e3 * 2 * (1_942_464 - outside + 18 * 61_440) / 1e9)
    assert (floor["flops"], floor["bound"]) == (2 * 1_942_464, "arithmetic")
    floor = roofline.floor(cases.ModelCase("model_step", "tiny", 3), "cpu", narrow)
    assert floor["floor_ms"] == pytest.approx(1e3 * 192 * 64 * 2 * 4 * 26 / 1e9)
    assert floor["bound"] == "bytes"


def test_taps_inside_the_image():
    """Against a convolution of ones, which counts them."""
    for size, kernel, dilation in (
        ((5, 7), (3, 3), 1),
        ((4, 4), (9, 5), 1),
        ((1, 1), (31, 31), 1),
        ((8, 8), (1, 1), 1),
        ((9, 6), (7, 3), 3),
        ((5, 8), (1, 11), 2),
    ):
        ones = torch.ones(1, 1, *size)
        counted = torch.nn.functional.conv2d(ones, torch.ones(1, 1, *kernel), padding="same", dilation=dilation).sum()
        share = roofline.taps_inside(size, kernel, dilation)
        assert share * math.prod(size) * math.prod(kernel) == pytest.approx(counted.item())


def test_published_models_have_the_published_parameters(monkeypatch):
    """ConvMixer's tables 1 and 2: 21.1 M and 51.6 M parameters; 256/8 with patch 2 on CIFAR-10 0.71 M; the other networks' papers."""
    monkeypatch.undo()
    published = {"256/8@32": 0.71, "768/32@224": 21.1, "1536/20@224": 51.6, "ConvNeXt-T": 28.59, "RepLKNet-31B": 79.86}
    for name, millions in published.items():
        with torch.device("meta"):
            model = cases.PRESETS[name].make()
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_results_name_no_folder_of_the_machine():
    found = machine._without_paths(
        {"available": False, "detail": "cannot import '_x' from 'p' (/a/b/p/convmixer_kernels/__init__.py)"}
    )
    assert found == {"available": False, "detail": "cannot import '_x' from 'p' (convmixer_kernels/__init__.py)"}
    text = json.dumps(machine.describe(torch.device("cpu"), None))
    assert str(machine.ROOT) not in text
    assert sys.prefix not in text


def test_the_host_benchmark_prepares_each_layer_once(capsys, monkeypatch):
    """Nothing of its stub is left behind, and what it times are calls that were prepared."""
    before = cuda._native, torch_gemm.input_grad, torch.get_num_threads()
    kept, found, keep, find = [], [], prepared.keep, prepared.find
    monkeypatch.setattr(prepared, "keep", lambda *a: (kept.append(a), keep(*a)))
    monkeypatch.setattr(prepared, "find", lambda *a: (entry := find(*a), found.append(entry))[0])
    prepared._entries.clear()
    assert host.main(["--repeats", "2"]) == 0
    prepared._entries.clear()
    assert len(kept) == 2 * 8
    assert sum(entry is not None for entry in found) == 2 * 8 * 4
    lines = capsys.readouterr().out.splitlines()
    assert [line[:20].strip() for line in lines[1:]] == ["eval", "train forward", "train backward"]
    assert all(float(number) > 0 for line in lines[1:] for number in line[20:].split())
    assert (cuda._native, torch_gemm.input_grad) == before[:2]
    torch.set_num_threads(before[2])


def test_the_grid_tells_where_eager_is_faster(monkeypatch, capsys):
    monkeypatch.setattr(grid, "SHAPES", [(1, 8, 6, 7)])
    arguments = ["grid", "--threads", "1", "--kernels", "3", "1x5", "--repeats", "1"]
    times = {"eager": timing.Timing(2.0, 1.0, 3.0, 1), "ours": timing.Timing(1.0, 1.0, 1.0, 1)}
    honest, results = timing.interleaved, []

    def interleaved(functions, **options):
        # eager PyTorch and ours compute the same thing
        first, second = (function() for function in functions.values())
        results.append([each[0] if isinstance(each, tuple) else each for each in (first, second)])
        assert set(honest(functions, **options)) == {"eager", "ours"}
        return times

    monkeypatch.setattr(timing, "interleaved", interleaved)
    assert command.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(results) == len(lines) - 2 == 2 * 2 * len(grid.OPERATORS)
    assert lines[-1] == "eager is faster in 0 rows that modules do not leave to it"
    left = [line.split()[:2] for line in lines if line.endswith("left to torch")]
    assert ["conv", "k3x3"] in left
    assert ["conv_step", "k1x5"] in left
    assert ["eval", "k3x3"] not in left
    for eager, ours in results:
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    times["ours"] = timing.Timing(5.0, 4.0, 6.0, 1)
    assert command.main(arguments) == 1
    assert capsys.readouterr().out.count("SLOWER") == 2 * 2 * len(grid.OPERATORS)

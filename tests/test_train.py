# SPDX-License-Identifier: MIT
"""python -m convmixer.train, predict and validate: real processes on scikit-learn's digits, killed, resumed, two at a time."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_twice_eager

import convmixer
from convmixer import data, engine, logs, predict, presets, train, validate
from convmixer_kernels import _build

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
TINY = ["--dim", "16", "--depth", "2"]


def start(module: str, *arguments: object, launcher: tuple[str, ...] = (), **options) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_build.ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def repeated(rows: list[logs.Row]) -> list[logs.Row]:
    """Without the columns that depend on the machine's speed."""
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in rows]


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in logs.read_log(folder / "log.csv")], dtype=torch.float64)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """The README's command, in an empty folder: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("train")
    return folder / "run", finish(start("convmixer.train", "digits", "--epochs", 3, "--output", "run", cwd=folder))


def test_digits_are_learnt(run):
    folder, output = run
    assert "1438 images to train on, 359 held out, 10 classes" in output
    rows = logs.read_log(folder / "log.csv")
    assert [row["step"] for row in rows] == list(range(1, 3 * 44 + 1))
    assert rows[-1]["test_top1"] >= 98
    assert rows[-1]["test_top5"] >= 99
    assert {path.name for path in folder.iterdir()} >= {"best.pth", "last.pt", "log.csv"}
    assert f"{rows[-1]['test_top1']:.2f} % right" in output
    if (folder / "curves.png").exists():
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*"))


def test_validate_and_predict(run, tmp_path, capsys):
    folder, _ = run
    best = max(row["test_top1"] for row in logs.read_log(folder / "log.csv") if "test_top1" in row)
    assert validate.main([str(folder / "best.pth"), "digits"]) == 0
    assert f"359 images: {best:.2f} % right" in capsys.readouterr().out
    pil = pytest.importorskip("PIL.Image")
    held_out = data.open_data("digits").held_out
    for number in (3, 7):
        pil.fromarray(held_out.images[held_out.labels.index(number)][0].numpy()).save(tmp_path / f"{number}.png")
    assert predict.main([str(folder / "last.pt"), *(str(tmp_path / f"{number}.png") for number in (3, 7))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert [lines[at].split()[-1] for at in (1, 7)] == ["3", "7"]
    assert isinstance(convmixer.load(folder / "last.pt"), convmixer.MixerSequential)


def test_a_killed_run_resumes_with_the_same_curve(tmp_path, capsys, one_thread):
    """Losses, accuracy and all weights of a run that was killed within an epoch, and its log torn, are the whole run's."""
    arguments = ["digits", "--epochs", "2", "--save-every", "8", "--batch-size", "16", *TINY, "--output"]
    assert train.main([*arguments, str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    process = start("convmixer.train", *arguments, killed)
    deadline = time.monotonic() + 120
    while not (killed / "last.pt").exists() or len(logs.read_log(killed / "log.csv")) < 20:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()
    before = logs.read_log(killed / "log.csv")
    # what a kill may leave behind
    with open(killed / "log.csv", "a") as log:
        log.write(f"{len(before) + 1},2,0.7")
    (killed / ".last.pt.tmp").write_bytes(b"half")
    capsys.readouterr()
    assert train.main([*arguments, str(killed), "--resume"]) == 0
    resumed = int(capsys.readouterr().out.partition("resumes after step ")[2].split()[0])
    # a row is written before the checkpoint that counts it, and every 20 steps at least
    assert len(before) - 8 <= resumed <= len(before)
    # within an epoch
    assert 0 < resumed < 1438 // 16
    rows = logs.read_log(killed / "log.csv")
    assert repeated(rows) == repeated(logs.read_log(tmp_path / "whole" / "log.csv"))
    assert len(rows) == 2 * (1438 // 16)
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (killed, tmp_path / "whole")]
    torch.testing.assert_close(*[state["state_dict"] for state in states], rtol=0, atol=0)
    torch.testing.assert_close(*[state["state_dict_ema"] for state in states], rtol=0, atol=0)
    assert [path.name for path in killed.glob(".*")] == []


def test_fast_and_reference_curves_are_equal(tmp_path, monkeypatch, one_thread):
    """50 steps of one seed against float64: our error is at most twice that of the paper's code."""
    build, normalise = presets.Preset.build, data._normalise
    curves = []
    for kind in ("fast", "--reference", "exact"):
        if kind == "exact":
            monkeypatch.setattr(presets.Preset, "build", lambda self, **options: build(self, **options).double())
            monkeypatch.setattr(data, "_normalise", lambda *a, **options: normalise(*a, **options).double())
        options = [
            *TINY,
            "--epochs",
            "3",
            "--output",
            str(tmp_path / kind),
            *(["--reference"] if kind != "fast" else []),
        ]
        assert train.main(["digits", *options]) == 0
        curves.append(losses(tmp_path / kind)[:50])
    fast, plain, exact = curves
    assert exact[-10:].mean() < 0.75 * exact[0]
    assert not torch.equal(exact, plain)
    assert_twice_eager("losses", fast.float(), plain.float(), exact)


def test_two_processes(tmp_path, one_thread):
    """torchrun with gloo: DDP and FSDP2 train alike, with synchronised statistics as one process; each held-out image counts once."""
    # batch norm over processes on a CPU is this package's
    synchronised = ["--sync-bn"] if hasattr(convmixer.model, "run_norm") else []
    arguments = ["digits", "--epochs", "1", "--batch-size", "64", *TINY, "--output"]
    assert train.main([*arguments, str(tmp_path / "one")]) == 0
    for kind in ("ddp", "fsdp"):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        options = [*arguments, tmp_path / kind, "--parallel", kind, *synchronised]
        assert "2 processes, CPU" in finish(start("convmixer.train", *options, launcher=launcher))
        rows = logs.read_log(tmp_path / kind / "log.csv")
        assert len(rows) == 22
        # a count of 359 images
        assert abs(rows[-1]["test_top1"] * 3.59 - round(rows[-1]["test_top1"] * 3.59)) < 1e-6
        assert isinstance(convmixer.load(tmp_path / kind / "best.pth"), convmixer.MixerSequential)
    one, ddp, fsdp = (losses(tmp_path / kind).float() for kind in ("one", "ddp", "fsdp"))
    torch.testing.assert_close(fsdp, ddp)
    if synchronised:
        torch.testing.assert_close(ddp, one)
    else:
        assert not torch.allclose(ddp, one)


def test_options_that_are_refused(tmp_path, capsys, one_thread, run):
    folder, _ = run
    out = ["--output", str(tmp_path / "new")]
    more = ["--epochs", "3", "--output", str(folder)]
    for arguments, message in (
        (["digits", *more], "last.pt exists: give --resume to go on from it, or another --output"),
        (["digits", *more, "--resume", "--lr", "0.1"], "was trained with other options: --lr 0.01 (now 0.1)"),
        ([str(tmp_path / "none"), "--epochs", "1", *out], "is not a folder (or the word 'digits')"),
        (["digits", "--epochs", "1", "--batch-size", "2000", *out], "1438 images to train on are less than one step"),
        (["digits", "--epochs", "1", "--patch-size", "9", *out], "a patch of 9 pixels does not fit an image of 8"),
        (["digits", "--epochs", "1", "--device", "tpu", *out], "--device tpu is not there: cpu"),
        (["digits", "--epochs", "9", "--lr", "1e30", "--clip-grad", "0", *TINY, *out], "is nan: give a lower --lr"),
    ):
        assert train.main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "last.pt").write_bytes(b"PK")
    (tmp_path / "file").touch()
    broken = ["digits", "--epochs", "1", "--resume", "--output"]
    assert train.main([*broken, str(tmp_path / "broken")]) == 2
    assert "last.pt is not a checkpoint of convmixer.train, or damaged" in capsys.readouterr().err
    assert train.main([*broken, str(tmp_path / "file")]) == 2
    assert "File exists" in capsys.readouterr().err
    for arguments, message in (
        (["digits", "--epochs", "0", *out], "must be at least 1, got 0"),
        (["digits", "--epochs", "1", "--ema", "1", *out], "--ema must be in [0, 1), got 1.0"),
        (
            ["digits", "--epochs", "1", "--model", "convmixer_768_32", "--dim", "3", *out],
            "--model is a whole architecture",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def make_images(root: Path, names: tuple[str, ...], count: int) -> None:
    pil = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for at, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(64 * at, 64 * at + 64, (20 + number, 30, 3), generator=generator, dtype=torch.uint8)
            pil.fromarray(pixels.numpy()).save(root / name / f"{number}.png")


def test_a_folder_of_images(tmp_path, capsys, one_thread):
    """train/ and val/, read by a worker process; then an image that is none."""
    make_images(tmp_path / "data" / "train", ("cat", "dog", "eel"), 8)
    make_images(tmp_path / "data" / "val", ("cat", "eel"), 3)
    sizes = [
        "--epochs",
        "2",
        "--dim",
        "8",
        "--depth",
        "1",
        "--kernel-size",
        "3",
        "--patch-size",
        "4",
        "--image-size",
        "16",
    ]
    command = [str(tmp_path / "data"), *sizes, "--batch-size", "6", "--augment", "crop", "--output"]
    assert train.main([*command, str(tmp_path / "run"), "--workers", "1"]) == 0
    assert "24 images to train on, 6 held out, 3 classes" in capsys.readouterr().out
    rows = logs.read_log(tmp_path / "run" / "log.csv")
    assert len(rows) == 8
    assert train.main([*command, str(tmp_path / "again"), "--workers", "0"]) == 0
    assert repeated(logs.read_log(tmp_path / "again" / "log.csv")) == repeated(rows), "workers changed the images"
    capsys.readouterr()
    assert validate.main([str(tmp_path / "run" / "best.pth"), str(tmp_path / "data")]) == 0
    assert "6 images: " in capsys.readouterr().out
    assert predict.main([str(tmp_path / "run" / "best.pth"), str(tmp_path / "data/val/cat/0.png")]) == 0
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]} == {"cat", "dog", "eel"}
    (tmp_path / "data/val/cat/1.png").write_text("no picture")
    assert validate.main([str(tmp_path / "run" / "best.pth"), str(tmp_path / "data"), "--workers", "1"]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot read {tmp_path / 'data/val/cat/1.png'} as an image: ")
    make_images(tmp_path / "data" / "val", ("fox",), 1)
    assert validate.main([str(tmp_path / "run" / "best.pth"), str(tmp_path / "data")]) == 2
    assert "val/fox is not one of the 3 classes: cat, dog, eel" in capsys.readouterr().err


def test_one_folder_is_split_alike_each_time(tmp_path):
    make_images(tmp_path, ("cat", "dog"), 10)
    first, second = data.open_data(str(tmp_path)), data.open_data(str(tmp_path))
    assert first == second
    assert (len(first.train.images), len(first.held_out.images)) == (16, 4)
    assert not set(first.train.images) & set(first.held_out.images)
    assert first.held_out.labels == [0, 0, 1, 1]


def test_the_ranks_share_each_step():
    whole = data.TrainingSteps(50, 12, 0, 1, seed=3)
    parts = [data.TrainingSteps(50, 12, rank, 3, seed=3) for rank in range(3)]
    for epoch in range(2):
        for steps in (whole, *parts):
            steps.epoch = epoch
        together = [sorted(itertools.chain(*step)) for step in zip(*parts, strict=True)]
        assert together == [sorted(step) for step in whole]
        assert len(set(itertools.chain(*together))) == 48
    order = list(whole)
    whole.first = 3
    assert list(whole) == order[3:]
    assert len(whole) == 1
    whole.epoch, whole.first = 0, 0
    assert list(whole) != order
    evaluated = [list(data.EvaluationSteps(25, 12, rank, 3)) for rank in range(3)]
    assert [len(steps) for steps in evaluated] == [3, 3, 3]
    assert sorted(at for steps in evaluated for step in steps for epoch, at in step if epoch >= 0) == list(range(25))


@pytest.mark.parametrize("kind", ["crop", "shift", "none", "rand"])
@pytest.mark.parametrize("size", [(3, 40, 61), (3, 5, 7), (1, 16, 16)], ids=str)
def test_augmentation_is_a_function_of_seed_epoch_and_image(kind, size):
    if kind == "rand":
        try:
            data.require("torchvision.transforms.v2", "this test")
        except data.DataError as error:
            pytest.skip(str(error))
    channels = size[0]
    preset = presets.Preset(
        8, 1, in_chans=channels, image_size=16, crop=0.9, mean=(0.5,) * channels, std=(0.2,) * channels
    )
    image = torch.randint(256, (2, *size), dtype=torch.uint8)
    samples = data.Images(data.Source(image, [4, 5]), data.augmentation(kind, preset), channels, seed=1)
    first, label = samples[3, 1]
    assert (first.shape, first.dtype, label) == ((channels, 16, 16), torch.float32, 5)
    others = [samples[epoch, 1][0] for epoch in (4, 5, 6)]
    torch.rand(3)
    assert torch.equal(samples[3, 1][0], first)
    assert any(not torch.equal(other, first) for other in others) == (kind != "none")
    assert samples[-1, 1][1] == -1


def test_images_that_fill_up_do_not_count():
    logits = torch.randn(7, 6)
    labels = torch.tensor([2, -1, 0, 5, -1, 3, 3])
    model = torch.nn.Linear(6, 6)
    batches = [(logits[:4], labels[:4]), (logits[4:5], labels[4:5]), (logits[5:], labels[5:])]
    result = engine.evaluate(model, batches, engine.Parallel(torch.device("cpu")))
    counts = labels >= 0
    output = model(logits)[counts]
    right = output.argsort(1, descending=True)[:, :5] == labels[counts, None]
    assert result.images == 5
    assert result.top1 == pytest.approx(100 * right[:, 0].double().mean().item())
    assert result.top5 == pytest.approx(100 * right.any(1).double().mean().item())
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(output, labels[counts]).item())


def test_prepare_is_the_central_square():
    preset = presets.Preset(8, 1, image_size=8, crop=0.5, mean=(0.5,) * 3, std=(0.25,) * 3)
    image = torch.zeros(3, 16, 20, dtype=torch.uint8)
    image[:, 4:12, 6:14] = 255
    assert torch.equal(data.prepare(image, preset), torch.full((3, 8, 8), 2.0))
    torch.testing.assert_close(data.prepare(image.new_full((3, 50, 9), 255), preset), torch.full((3, 8, 8), 2.0))


def test_the_package_imports_without_what_training_needs():
    names = ["sklearn", "torchvision", "PIL", "matplotlib", "rich", "tensorboard", "safetensors", "numpy"]
    modules = "convmixer, convmixer.train, convmixer.predict, convmixer.validate"
    code = f"import sys, torch; before = set(sys.modules)\nimport {modules}\nprint([n for n in {names} if n in set(sys.modules) - before])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_build.ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_missing_package_is_named_with_its_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    assert train.main(["digits", "--epochs", "1", "--mixup", "0.5", "--output", str(tmp_path / "a")]) == 2
    assert "--mixup needs the package torchvision: pip install '.[train]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert train.main(["digits", "--epochs", "1", "--output", str(tmp_path / "a")]) == 2
    assert "the digits needs the package sklearn: pip install '.[train]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"needs the package safetensors: pip install '\.\[train\]'"):
        convmixer.save(convmixer.ConvMixer(2, 1, 1), tmp_path / "x.safetensors")

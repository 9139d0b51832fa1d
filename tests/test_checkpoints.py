# SPDX-License-Identifier: MIT
"""convmixer.load and save: every form of a checkpoint, what is inferred, what is named, what is refused; nothing in a file runs."""

from __future__ import annotations

import argparse
import builtins
import copy
import io
import json
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from model_helpers import randomize
from test_accelerate import TimmLike
from torch import nn
from torch.optim.swa_utils import AveragedModel

import convmixer
from convmixer import ConvMixer, checkpoints, presets, reference

SMALL = {"dim": 6, "depth": 2, "kernel_size": 3, "patch_size": 2, "n_classes": 4}


def small(**changes) -> nn.Sequential:
    torch.manual_seed(3)
    return randomize(ConvMixer(**{**SMALL, **changes}), seed=3).eval()


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    assert str(model) == str(expected)


@pytest.mark.parametrize("form", checkpoints.FORMS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_save_and_load(tmp_path, form, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    model, path = small(activation="relu"), tmp_path / f"model{suffix}"
    for dtype in (torch.float32, torch.bfloat16):
        convmixer.save(model.to(dtype), path, form=form)
        loaded = convmixer.load(path)
        assert_same(loaded, model)
        assert not loaded.training
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
    x = torch.randn(2, 3, 8, 8).bfloat16()
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("kernel", [1, 4, 7, (3, 8)], ids=str)
@pytest.mark.parametrize("patch, in_chans, classes", [(1, 1, 2), ((2, 3), 4, 1), (7, 3, 9)], ids=str)
def test_inferred_architectures(depth, kernel, patch, in_chans, classes):
    model = small(depth=depth, kernel_size=kernel, patch_size=patch, in_chans=in_chans, n_classes=classes)
    found, preset = checkpoints.load_with_preset(model.state_dict(), activation="gelu")
    assert_same(found, model)
    assert (preset.depth, preset.patch_size, preset.in_chans, preset.n_classes) == (depth, patch, in_chans, classes)
    assert preset.kernel_size == kernel or not depth


def prefixed(prefix):
    return lambda model: {f"{prefix}{key}": tensor for key, tensor in model.state_dict().items()}


def between(model):
    """torch.compile and FSDP of single layers."""
    return {key.replace("3.", "3._orig_mod.", 1): tensor for key, tensor in model.state_dict().items()}


WRAPPED = {
    "data parallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "of a larger module": prefixed("net.backbone."),
    "compiled layers": between,
    "averaged": lambda model: AveragedModel(model, use_buffers=True).state_dict(),
    "state_dict": lambda model: {"epoch": 3, "state_dict": model.state_dict()},
    "model": lambda model: {"optimizer": {"state": {}}, "model": model.state_dict()},
    "nested": lambda model: {"model": {"state_dict": prefixed("module.")(model)}},
    "ema before model": lambda model: {"model": prefixed("x.")(nn.Linear(2, 2)), "model_ema": model.state_dict()},
    "parameters": lambda model: dict(model.state_dict(keep_vars=True)),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("through", ["state_dict", "file", "old file"])
def test_wrappers(tmp_path, wrapped, through):
    model = small()
    source = WRAPPED[wrapped](model)
    if through != "state_dict":
        torch.save(source, tmp_path / "x.pt", _use_new_zipfile_serialization=through == "file")
        source = tmp_path / "x.pt"
    assert_same(convmixer.load(source, activation="gelu"), model)


def test_average_or_weights(tmp_path):
    weights, average = small(), small(activation="relu")
    average[0].weight.data += 1
    torch.save({"state_dict": weights.state_dict(), "state_dict_ema": average.state_dict()}, tmp_path / "x.pt")
    assert torch.equal(convmixer.load(tmp_path / "x.pt", activation="relu")[0].weight, average[0].weight)
    assert torch.equal(convmixer.load(tmp_path / "x.pt", activation="relu", ema=False)[0].weight, weights[0].weight)


def test_timms_class_and_its_keys(tmp_path):
    timm = randomize(TimmLike(act=nn.ReLU)).eval()
    path = tmp_path / "x.pth"
    convmixer.save(timm, path, form="timm")
    assert set(torch.load(path)["state_dict"]) == set(timm.state_dict())
    timm.load_state_dict(torch.load(path)["state_dict"])
    loaded = convmixer.load(path)
    assert isinstance(loaded[1], nn.ReLU)
    size = timm.stem[0].kernel_size[0] * 4
    x = torch.randn(2, 3, size, size)
    torch.testing.assert_close(loaded(x), timm(x))


class Evil:
    def __init__(self, marker: Path, call=os.mkdir):
        self.marker, self.call = marker, call

    def __reduce__(self):
        return self.call, (str(self.marker),)


def official(path: Path, model: nn.Module, **more) -> None:
    """As the paper's training program writes, and its cleaning program in the format before torch 1.6."""
    arguments = argparse.Namespace(model="convmixer", lr=0.01, epochs=150, output=Path("x"), mean=None, opt_betas=[0.9])
    content = {"epoch": 1, "arch": "convmixer", "args": arguments, "state_dict": model.state_dict(), "version": 2}
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save(
        {**content, "optimizer": optimizer.state_dict(), "metric": 81.3, **more},
        path,
        _use_new_zipfile_serialization=False,
    )


def test_official_files(tmp_path, monkeypatch):
    """The names of the three files tell their activation, but only if the sizes are those too."""
    model = small(activation="relu")
    official(tmp_path / "checkpoint.pth.tar", model)
    assert_same(convmixer.load(tmp_path / "checkpoint.pth.tar", activation="relu"), model)
    with pytest.raises(
        ValueError, match=r"checkpoint\.pth\.tar does not tell its activation: pass activation=, one of gelu"
    ):
        convmixer.load(tmp_path / "checkpoint.pth.tar")
    name = "convmixer_768_32_ks7_p7_relu"
    os.rename(tmp_path / "checkpoint.pth.tar", tmp_path / f"{name}.pth.tar")
    with pytest.raises(ValueError, match="does not tell its activation"):
        convmixer.load(tmp_path / f"{name}.pth.tar")
    monkeypatch.setitem(presets.PUBLISHED_FILES, name, presets.Preset(**{**SMALL, "activation": "relu"}))
    assert_same(convmixer.load(tmp_path / f"{name}.pth.tar"), model)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_the_published(name):
    preset = presets.PRESETS[name]
    model = preset.build(device="meta")
    assert checkpoints.activation_of(model) == ("relu" if name == "convmixer_768_32" else "gelu")
    published = {
        "convmixer_768_32": 21_110_248,
        "convmixer_1536_20": 51_625_960,
        "convmixer_1024_20_ks9_p14": 24_383_464,
    }
    assert sum(parameter.numel() for parameter in model.parameters()) == published[name]
    assert (preset.image_size, preset.crop, preset.mean, preset.std) == (
        224,
        0.96,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    assert type(preset.build(reference=True, device="meta")) is nn.Sequential
    assert any(each is preset for each in presets.PUBLISHED_FILES.values())


def test_a_preset_goes_through_a_file(tmp_path):
    preset = presets.Preset(**SMALL, image_size=32, crop=0.5, mean=(0.1, 0.2, 0.3), classes=("a", "b", "c", "d"))
    convmixer.save(small(), tmp_path / "x.pth", preset=preset)
    assert checkpoints.load_with_preset(tmp_path / "x.pth")[1] == preset
    torch.save(
        {"state_dict": small().state_dict(), "convmixer": {"activation": "gelu", "classes": ["a"]}}, tmp_path / "x.pth"
    )
    with pytest.raises(ValueError, match="tells a classes that does not fit its tensors"):
        convmixer.load(tmp_path / "x.pth")


def test_a_state_dict_is_copied():
    model = small()
    loaded = convmixer.load(model.state_dict(), activation="gelu")
    loaded[0].weight.data.zero_()
    assert model[0].weight.abs().sum() > 0
    loaded.train()(torch.randn(2, 3, 4, 4)).sum().backward()
    assert loaded[0].weight.grad is not None


def changed(change):
    state = small().state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("4.1.bias"), r"missing: 4\.1\.bias$"),
        (lambda s: s.update({"9.weight": torch.zeros(2)}), r"unexpected: 9\.weight$"),
        (lambda s: s.update({"4.3.bias": torch.zeros(5)}), r"wrong shapes: 4\.3\.bias \(5,\) instead of \(6,\)$"),
        (lambda s: s.pop("7.weight"), r"missing: 7\.weight"),
        (lambda s: s.pop("3.0.fn.0.weight"), r"depth 0, .*missing: 5\.weight, 5\.bias; unexpected: 3\.0\.fn\.0\.bias"),
        (
            lambda s: s.pop("0.weight"),
            r"0\.weight \(timm: stem\.0\.weight\).* is missing; its keys are 0\.bias, .* and 28 more",
        ),
        (lambda s: s.update({"0.weight": torch.zeros(6)}), r"has shape \(6,\)"),
        (lambda s: s.update({"0.weight": torch.zeros(6, 3, 0, 2)}), r"has shape \(6, 3, 0, 2\)"),
        (lambda s: s.update({"0.bias": torch.zeros(6, dtype=torch.int64)}), r"0\.bias has dtype torch\.int64"),
        (lambda s: s.clear(), "holds no tensors by name"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        convmixer.load(changed(change), activation="gelu")


def test_counters_may_be_missing():
    state = {key: tensor for key, tensor in small().state_dict().items() if not key.endswith("num_batches_tracked")}
    assert convmixer.load(state, activation="gelu")[2].num_batches_tracked == 0


def test_wrong_arguments(tmp_path):
    with pytest.raises(
        ValueError, match="activation must be one of gelu, gelu_tanh, relu, identity, got activation='silu'"
    ):
        convmixer.load({}, activation="silu")
    with pytest.raises(TypeError, match="source must be a path or a state_dict, got int"):
        convmixer.load(3)
    with pytest.raises(FileNotFoundError, match=r"no\.pth"):
        convmixer.load(tmp_path / "no.pth")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        convmixer.load(tmp_path)
    with pytest.raises(ValueError, match="form must be one of paper, timm"):
        convmixer.save(small(), tmp_path / "x", form="hf")
    with pytest.raises(ValueError, match="must be a ConvMixer with one activation"):
        convmixer.save(nn.Linear(2, 2), tmp_path / "x")
    model = small()
    model[3][2] = nn.ReLU()
    with pytest.raises(ValueError, match="got gelu, relu"):
        convmixer.save(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def zipped(folder="x", compression=zipfile.ZIP_STORED, **records: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(f"{folder}/{name.replace('__', '/')}".replace("data/pkl", "data.pkl"), content)
    return data.getvalue()


class Storages(pickle.Pickler):
    """Writes ("storage", FloatStorage, key, "cpu", elements) for such a tuple."""

    def persistent_id(self, value):
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None


class Rebuilt:
    def __init__(self, *arguments, function=torch._utils._rebuild_tensor_v2):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def claim(elements, shape, stride) -> bytes:
    """The pickle of a state_dict with one tensor."""
    data = io.BytesIO()
    storage = ("storage", torch.FloatStorage, "0", "cpu", elements)
    Storages(data, protocol=2).dump({"0.weight": Rebuilt(storage, 0, shape, stride, False, {})})
    return data.getvalue()


def pickled(value, protocol=2) -> bytes:
    return pickle.dumps(value, protocol=protocol)


def torch_saved(value, **options) -> bytes:
    data = io.BytesIO()
    torch.save(value, data, **options)
    return data.getvalue()


def small_file(**options) -> bytes:
    return torch_saved({"state_dict": small().state_dict()}, **options)


def changed_directory(at: int, value: int) -> bytes:
    data = bytearray(small_file())
    data[data.index(b"PK\x01\x02") + at] = value
    return bytes(data)


HUGE = 10**12
REFUSED = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"hello\nworld\n", "is a text file"),
    "page": (lambda: b"\n<!DOCTYPE html>\n<html>", "is a web page"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(50), "is a compressed file"),
    "tar": (lambda: bytes(257) + b"ustar" + bytes(300), "is a tar archive"),
    "picture": (
        lambda: b"\x89PNG\r\n\x1a\n" + bytes(50),
        "is not a file of torch.save or safetensors: it starts with b'.x89PNG",
    ),
    "a zip": (lambda: zipped(a=b"1"), "is a zip archive that torch.save did not write"),
    "a program": (lambda: zipped(data__pkl=b"", constants=b"", **{"code__a": b""}), "is a TorchScript archive"),
    "a pickle": (lambda: pickled({"a": 1}), "is a pickle that torch.save did not write"),
    "protocol 4": (lambda: pickled({"a": 1}, 4), "is a pickle that torch.save did not write"),
    "a number": (lambda: torch_saved(3), "holds a int, not a state_dict"),
    "a list": (lambda: torch_saved([torch.zeros(3)]), "holds a list, not a state_dict"),
    "a whole model": (
        lambda: torch_saved(small()),
        r"names convmixer\.model\.MixerSequential: code, which this never runs",
    ),
    "cut zip": (lambda: small_file()[:-40], "is truncated or corrupt"),
    "cut old file": (
        lambda: small_file(_use_new_zipfile_serialization=False)[:-8],
        "is truncated: storage .* ends at byte",
    ),
    "cut names": (lambda: small_file(_use_new_zipfile_serialization=False)[:400], "is truncated"),
    "changed bytes": (
        lambda: small_file().replace(small()[7].weight.detach().numpy().tobytes(), bytes(96)),
        "Bad CRC-32",
    ),
    "expanded": (
        lambda: torch_saved({"0.weight": torch.zeros(1).expand(HUGE)}),
        "claims sizes .1000000000000,., its storage has 1",
    ),
    "storage": (
        lambda: zipped(data__pkl=claim(HUGE, (3,), (1,)), data__0=bytes(12)),
        "claims 4000000000000 bytes, the file has",
    ),
    "sizes": (lambda: zipped(data__pkl=claim(3, (HUGE, 1), (1, 1)), data__0=bytes(12)), "a tensor claims sizes"),
    "strides": (lambda: zipped(data__pkl=claim(3, (3,), (HUGE,)), data__0=bytes(12)), "a tensor claims sizes"),
    "negative": (
        lambda: zipped(data__pkl=claim(3, (-3,), (1,)), data__0=bytes(12)),
        "without a storage, sizes or strides",
    ),
    "no record": (lambda: zipped(data__pkl=claim(3, (3,), (1,))), "has no record data/0"),
    "other size": (
        lambda: zipped(data__pkl=claim(3, (3,), (1,)), data__0=bytes(40)),
        "claims 12 bytes, its record has 40",
    ),
    "zip version": (
        lambda: changed_directory(6, 255),
        "is truncated or corrupt: the directory .* zip file version 25.5",
    ),
    "bomb": (
        lambda: zipped(compression=zipfile.ZIP_DEFLATED, data__pkl=bytes(10**7)),
        "has a compressed record, x/data.pkl",
    ),
    "a bytearray": (
        lambda: zipped(data__pkl=pickled(Rebuilt(HUGE, function=bytearray))),
        "holds a _Skipped, not a state_dict",
    ),
    "a FloatTensor": (
        lambda: zipped(data__pkl=pickled(Rebuilt(HUGE, function=torch.FloatTensor))),
        r"names torch\.FloatTensor",
    ),
    "a long string": (lambda: b"\x80\x02X\xff\xff\xff\xffabc.", "is truncated"),
    "a memo": (lambda: zipped(data__pkl=b"\x80\x02}r\xff\xff\xff\xff."), "holds no tensors by name"),
    "deep keys": (
        lambda: zipped(data__pkl=b"\x80\x02}K\x01" + b"\x85" * 10**4 + b"K\x01s."),
        "holds no tensors by name",
    ),
    "an itself": (lambda: zipped(data__pkl=b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."), "holds no tensors by name"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_refused(tmp_path, kind):
    make, message = REFUSED[kind]
    (tmp_path / "x.pth").write_bytes(make())
    with pytest.raises(ValueError, match=message) as refused:
        convmixer.load(tmp_path / "x.pth", activation="gelu")
    assert str(refused.value).startswith(f"load: {tmp_path / 'x.pth'} ")


def safetensors_header(header: object, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "data, message",
    [
        (b"\x02\0\0\0\0\0\0\0{}", "holds no tensors by name"),
        (safetensors_header({}, 1 << 60), "its header claims 1152921504606846976 bytes, the file has 10"),
        (
            safetensors_header({"0.weight": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}),
            "is truncated, or no safetensors file",
        ),
        (
            safetensors_header({"0.weight": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4]}}) + bytes(4),
            "no safetensors",
        ),
        (b"", "is empty"),
        (b"<html></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"\x02\0\0", "is truncated"),
    ],
    ids=["none", "header", "beyond", "sizes", "empty", "page", "lfs", "cut"],
)
def test_safetensors_that_are_refused(tmp_path, data, message):
    pytest.importorskip("safetensors")
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        convmixer.load(tmp_path / "x.safetensors", activation="gelu")


@pytest.mark.parametrize(
    "call", [os.mkdir, os.system, builtins.eval, builtins.exec, builtins.__import__], ids=lambda call: call.__name__
)
@pytest.mark.parametrize("form", ["zip", "old", "pickle", "protocol 4", "beside", "official"])
def test_code_does_not_run(tmp_path, call, form):
    marker, path = tmp_path / "ran", tmp_path / "x.pth"
    evil = Evil(f"mkdir {marker}" if call is os.system else f"__import__('os').mkdir({str(marker)!r})", call)
    if call is os.mkdir:
        evil = Evil(marker)
    state = small().state_dict()
    if form in ("zip", "old"):
        torch.save({**state, "0.weight": evil}, path, _use_new_zipfile_serialization=form == "zip")
    elif form in ("pickle", "protocol 4"):
        path.write_bytes(pickled(evil, 2 if form == "pickle" else 4))
    elif form == "beside":
        torch.save({"state_dict": state, "args": evil}, path)
    else:
        official(path, small(), evil=evil)
    with pytest.raises(ValueError, match=r"code, which this never runs|that torch\.save did not write"):
        convmixer.load(path, activation="gelu")
    assert not marker.exists()


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_damaged_files_load_or_are_refused(tmp_path, form):
    """A cut or some changed bytes: a ValueError, or, if only values changed, a model of the same architecture."""
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pth")
    model = small(depth=1)
    if form == "safetensors":
        pytest.importorskip("safetensors")
        convmixer.save(model, path)
    else:
        torch.save({"state_dict": model.state_dict()}, path, _use_new_zipfile_serialization=form == "zip")
    data, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        for _ in range(rng.choice([1, 4])):
            # the start has the names and sizes
            if damaged:
                damaged[rng.randrange(min(len(damaged), rng.choice([600, len(data)])))] = rng.choice(
                    [0, 255, rng.randrange(256)]
                )
        path.write_bytes(damaged)
        try:
            loaded = convmixer.load(path, activation="gelu")
        except ValueError:
            refused += 1
        else:
            assert [t.shape for t in loaded.state_dict().values()] == [t.shape for t in model.state_dict().values()]
    assert refused > 100


def test_a_failed_save_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    convmixer.save(small(), path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        convmixer.save(copy.deepcopy(small()), path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
    assert path.read_bytes() == before


def test_the_reference_reads_what_is_saved(tmp_path):
    model = small()
    convmixer.save(model, tmp_path / "x.pth")
    reference.ConvMixer(**SMALL).load_state_dict(
        torch.load(tmp_path / "x.pth", weights_only=True)["state_dict"], strict=True
    )

# SPDX-License-Identifier: MIT
"""mypy --strict passes on a user's file: public functions and classes have the types that their documentation gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import convmixer
import convmixer_kernels
from convmixer_kernels import _build
from convmixer_kernels.backends import cpu

# mypy also reports an ignore that is not needed: so each of these errors must be found
USER = """
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import convmixer
import convmixer_kernels as ck
from convmixer import ConvMixer, MixerLayer, MixerSequential, Report, accelerate, reference

model = ConvMixer(8, 2, kernel_size=(3, 5), patch_size=2, n_classes=4, activation="relu", device="cpu", dtype=torch.float32)
assert_type(model, nn.Sequential)
plain = reference.ConvMixer(8, 2, 3)
assert_type(plain, nn.Sequential)
report = accelerate(plain)
assert_type(report, Report)
assert_type(report.accelerated, int)
assert_type(report.skipped, list[tuple[str, str]])
assert_type(convmixer.load("model.pth", activation="gelu"), nn.Sequential)
assert_type(convmixer.load(model.state_dict(), activation="gelu", ema=False), nn.Sequential)
convmixer.save(model, "model.safetensors", form="timm", preset=convmixer.presets.convmixer_768_32)
assert_type(convmixer.presets.convmixer_768_32.build(reference=True), nn.Sequential)
assert_type(convmixer.__version__, str)
assert_type(ck.__version__, str)
layer = MixerLayer(reference.Residual(nn.Identity()), nn.Identity())
layers: nn.Sequential = MixerSequential(layer)

x, w, p = torch.randn(1, 8, 4, 4), torch.randn(8, 1, 3, 3), torch.randn(8, 8, 1, 1)
none = (None, None, None, None, None)
assert_type(layer.forward(x), Tensor)
assert_type(ck.depthwise_conv2d(x, w, None, backend="cpu"), Tensor)
assert_type(ck.depthwise_block(x, w, *none, training=True, momentum=0.1, eps=1e-5, activation="relu", residual=False), Tensor)
assert_type(ck.pointwise_block(x, p, *none, training=True), Tensor)
assert_type(ck.mixer_layer(x, w, *none, p, *none, training=True, backend=None), Tensor)
block = ck.DepthwiseBlock(8, (3, 5), activation="gelu", residual=True, bias=False, momentum=None, device=torch.device("cpu"))
assert_type(block.forward(x), Tensor)
assert_type(block.conv, nn.Conv2d)
assert_type(block.norm, nn.BatchNorm2d)
assert_type(ck.PointwiseBlock(8, None, affine=False).forward(x), Tensor)
conv: nn.Conv2d = ck.DepthwiseConv2d(8, (3, 5), bias=False, dtype=torch.float32)
assert_type(ck.available_backends(), list[str])
assert_type(ck.build_info(), dict[str, Any])
with ck.use_backend("reference"):
    pass

ck.depthwise_conv2d(x, 3)  # type: ignore[arg-type]
ck.depthwise_block(x, w, *none, training="yes")  # type: ignore[arg-type]
ck.mixer_layer(x, w)  # type: ignore[call-arg]
ck.DepthwiseBlock(8, activation=None)  # type: ignore[arg-type]
ConvMixer(8, 2, "3")  # type: ignore[arg-type]
accelerate(x)  # type: ignore[arg-type]
convmixer.load(3)  # type: ignore[arg-type]
"""


def test_the_packages_say_that_they_are_typed():
    folders = {Path(package.__file__).parent for package in (convmixer, convmixer_kernels)}
    if cpu.native is not None:
        # beside a checkout's that of the install
        folders.add(Path(cpu.native.__file__).parent)
    assert all((folder / "py.typed").exists() for folder in folders), folders


def test_a_users_file_passes_mypy_strict(pytestconfig, tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    cache = pytestconfig.cache.mkdir("mypy") if hasattr(pytestconfig, "cache") else tmp_path
    # silent: as for an installed package, errors are told of the user's file
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={cache}", "user.py"]
    environment = {**os.environ, "MYPYPATH": str(_build.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr

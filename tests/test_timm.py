# SPDX-License-Identifier: MIT
"""convmixer.timm: timm's models come accelerated from timm's own functions and scripts. Skips without timm."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from convmixer import MixerLayer
from convmixer_kernels import _build

timm = pytest.importorskip("timm")

import convmixer.timm  # noqa: E402, F401  registers

NAME = "convmixer_768_32"


def layers(model) -> int:
    return sum(type(module) is MixerLayer for module in model.modules())


def test_create_model_accelerates_convmixers():
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=10).eval()
    assert layers(model) == 32
    # timm's registry knows it as before
    assert timm.models.is_model_in_modules(NAME, ["convmixer"])
    assert NAME + ".in1k" in timm.list_pretrained(NAME)
    assert model.default_cfg["architecture"] == NAME
    plain = timm.models.model_entrypoint(NAME).__wrapped__(num_classes=10).eval()
    assert layers(plain) == 0
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 35, 35)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("feature_cls", ["getter", "fx", "hook"])
def test_feature_extractors(feature_cls):
    kwargs = {"features_only": True, "feature_cls": feature_cls, "out_indices": (1, 3)}
    model = timm.create_model(NAME, **kwargs).eval()
    plain = timm.models.model_entrypoint(NAME).__wrapped__(**kwargs).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 35, 35)
    with torch.no_grad():
        for got, expected in zip(model(x), plain(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
import helper_beside_the_script
import convmixer.timm
from timm.models import create_model
from convmixer import MixerLayer
model = create_model(sys.argv[1], pretrained=False)
print(sys.argv[1:], __name__, type(model).__name__)
"""


@pytest.mark.parametrize("everything", [False, True], ids=["convmixers", "all"])
def test_a_script_runs_with_it(everything, tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    (folder / "helper_beside_the_script.py").write_text("")
    name = "convnext_atto" if everything else NAME
    command = [
        sys.executable,
        "-m",
        "convmixer.timm",
        *(["--all"] if everything else []),
        "scripts/train.py",
        name,
        "-b",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(_build.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{name}: accelerated") == 1
    assert done.stdout.splitlines()[-1] == f"['{name}', '-b', '2'] __main__ {'ConvNeXt' if everything else 'ConvMixer'}"


def test_a_missing_script_is_named(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(_build.ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "convmixer.timm", "train.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "there is no file train.py" in done.stderr

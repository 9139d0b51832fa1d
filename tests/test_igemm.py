# SPDX-License-Identifier: MIT
"""Repositories that import depthwise_conv2d_implicit_gemm run unchanged: their ways of finding it, and what they do with it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convmixer_kernels import _build

FOLDER = _build.ROOT / "convmixer_kernels" / "igemm"

# how the repositories find the module: RepLKNet and its descendants, HorNet, and those that expect it to be installed
IMPORTS = {
    "LARGE_KERNEL_CONV_IMPL": "import os, sys; sys.path.append(os.environ['LARGE_KERNEL_CONV_IMPL'])",
    "DWCONV_IMPL": "import os, sys; sys.path.append(os.environ['DWCONV_IMPL'])",
    "PYTHONPATH": "pass",
}
PROGRAM = """
from depthwise_conv2d_implicit_gemm import DepthWiseConv2dImplicitGEMM
from depthwise_conv2d_implicit_gemm import _DepthWiseConv2dImplicitGEMMFP16, _DepthWiseConv2dImplicitGEMMFP32
import torch
m = DepthWiseConv2dImplicitGEMM(8, 13, bias=True)
y = m(torch.randn(2, 8, 9, 9))
y.sum().backward()
print(tuple(y.shape), sorted(m.state_dict()), m.weight.grad is not None)
"""


@pytest.fixture
def igemm(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield __import__("depthwise_conv2d_implicit_gemm")
    sys.modules.pop("depthwise_conv2d_implicit_gemm", None)


@pytest.mark.parametrize("variable", IMPORTS)
def test_a_program_finds_it_by_the_printed_path(variable, tmp_path):
    printed = subprocess.run(
        [sys.executable, "-m", "convmixer_kernels", "--igemm-path"], cwd=_build.ROOT, capture_output=True, text=True
    )
    assert printed.stdout == f"{FOLDER}\n", printed.stderr
    environment = {k: v for k, v in os.environ.items() if k not in IMPORTS}
    # the checkout stands for an installed package
    environment["PYTHONPATH"] = str(_build.ROOT)
    path = printed.stdout.strip()
    environment[variable] = f"{path}{os.pathsep}{_build.ROOT}" if variable == "PYTHONPATH" else path
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS[variable] + PROGRAM],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "(2, 8, 9, 9) ['bias', 'weight'] True\n", done.stderr


def test_the_folder_shadows_nothing():
    assert [p.name for p in FOLDER.iterdir() if p.name != "__pycache__"] == ["depthwise_conv2d_implicit_gemm.py"]


@pytest.mark.parametrize("kernel", [5, 13, (11, 3)], ids=str)
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=str)
def test_it_gives_what_conv2d_gives(igemm, kernel, amp):
    torch.manual_seed(0)
    ours = igemm.DepthWiseConv2dImplicitGEMM(8, kernel, bias=True)
    pair = (kernel, kernel) if isinstance(kernel, int) else kernel
    eager = nn.Conv2d(8, 8, kernel, padding=(pair[0] // 2, pair[1] // 2), groups=8)
    assert isinstance(ours, nn.Conv2d)
    eager.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 10, 12)
    with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
        got, expected = ours(x), eager(x)
    assert got.dtype == expected.dtype == (amp or torch.float32)
    got.float().square().sum().backward()
    expected.float().square().sum().backward()
    close = {"rtol": 2e-2, "atol": 2e-2} if amp else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got, expected, **close)
    largest = expected.new_tensor(eager.weight.grad.abs().max().item()).float()
    torch.testing.assert_close(ours.weight.grad / largest, eager.weight.grad / largest, **close)


def test_reparametrised_branches_merge(igemm):
    """RepLKNet's merge_kernel makes an nn.Conv2d with this module's attributes: its padding must be the one that it computes with."""
    ours = igemm.DepthWiseConv2dImplicitGEMM(4, 7)
    merged = nn.Conv2d(
        ours.in_channels,
        ours.out_channels,
        ours.kernel_size,
        stride=ours.stride,
        padding=ours.padding,
        dilation=ours.dilation,
        groups=ours.groups,
        bias=False,
    )
    merged.load_state_dict(ours.state_dict())
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(ours(x), merged(x))


def test_computed_weights_as_in_smpconv(igemm):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    factors = torch.randn(8, 3, requires_grad=True), torch.randn(3, 25, requires_grad=True)

    def gradients(convolution):
        y = convolution(x, (factors[0] @ factors[1]).reshape(8, 1, 5, 5))
        return y, *torch.autograd.grad(y.square().sum(), (x, *factors))

    got = gradients(igemm._DepthWiseConv2dImplicitGEMMFP32.apply)
    expected = gradients(lambda x, w: F.conv2d(x, w, padding=2, groups=8))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    half = igemm._DepthWiseConv2dImplicitGEMMFP16.apply(x.detach().half(), torch.randn(8, 1, 5, 5).half())
    assert half.dtype == torch.float16
    with pytest.raises(
        TypeError, match=r"_DepthWiseConv2dImplicitGEMMFP16: x must be torch.float16, got x.dtype=torch.float32"
    ):
        igemm._DepthWiseConv2dImplicitGEMMFP16.apply(x, torch.randn(8, 1, 5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        # float32 outputs of a norm, and weights that autocast's matmul has made narrow
        y = igemm._DepthWiseConv2dImplicitGEMMFP32.apply(x, torch.randn(8, 1, 5, 5).bfloat16())
    assert y.dtype == torch.float32


def test_even_kernels_are_refused(igemm):
    with pytest.raises(ValueError, match=r"DepthWiseConv2dImplicitGEMM: kernel must be odd, got kernel=\(4, 3\)"):
        igemm.DepthWiseConv2dImplicitGEMM(4, (4, 3))

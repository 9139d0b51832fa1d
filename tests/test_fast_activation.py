# SPDX-License-Identifier: MIT
"""csrc/math.h's activations for 16-bit results, over every bfloat16 and every float16 number, against float64."""

from __future__ import annotations

import ctypes
import math
import subprocess

import pytest
import torch

from convmixer_kernels import _build

_SOURCE = """
#include "{math}"
template <int ACT>
void run(const float* x, int n, float* value, float* value_too, float* grad) {{
  for (int i = 0; i < n; ++i) {{
    const convmixer::ValueAndGrad both = convmixer::fast_activation_and_grad<ACT>(x[i]);
    value[i] = convmixer::fast_activation<ACT>(x[i]), value_too[i] = both.value, grad[i] = both.grad;
  }}
}}
extern "C" void gelu(const float* x, int n, float* v, float* w, float* g) {{ run<2>(x, n, v, w, g); }}
extern "C" void gelu_tanh(const float* x, int n, float* v, float* w, float* g) {{ run<3>(x, n, v, w, g); }}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The functions as the emulated kernels use them, with exact exp2 and division; the GPU's have an error of 2^-22."""
    compiler = _build.find_cxx()
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("math")
    (folder / "fast.cpp").write_text(_SOURCE.format(math=_build.CSRC / "math.h"))
    command = [*compiler.split(), "-std=c++17", "-O1", "-fPIC", "-shared", str(folder / "fast.cpp")]
    subprocess.run([*command, "-o", str(folder / "fast.so")], check=True)
    return ctypes.CDLL(str(folder / "fast.so"))


def _exact(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation and its derivative in float64."""
    if name == "gelu":
        cdf = 0.5 * torch.special.erfc(-x / math.sqrt(2.0))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    scale = math.sqrt(2.0 / math.pi)
    sigmoid = torch.sigmoid(2.0 * scale * (x + 0.044715 * x**3))
    return x * sigmoid, sigmoid + x * sigmoid * (1.0 - sigmoid) * 2.0 * scale * (1.0 + 0.134145 * x * x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_every_16_bit_number(name, dtype, library):
    """Absolute error at most 1e-5 of the value and of the derivative.

    gelu_tanh only rounds: 5e-7 up to 2, where cancellation in its derivative does not hide a wrong constant.
    """
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    x = x[x.isfinite()]
    assert x.numel() > 60000
    if name == "gelu_tanh":
        # x * x overflows float32 beyond, and eager's derivative is NaN too
        x = x[x.abs() < 1e18]
    value, value_too, grad = (torch.empty_like(x) for _ in range(3))
    addresses = (ctypes.c_void_p(t.data_ptr()) for t in (value, value_too, grad))
    getattr(library, name)(ctypes.c_void_p(x.data_ptr()), x.numel(), *addresses)
    exact, exact_grad = _exact(name, x.double())
    assert torch.equal(value, value_too)
    for result, truth in ((value, exact), (grad, exact_grad)):
        error = (result.double() - truth).abs()
        assert error.max() <= 1e-5
        assert name == "gelu" or error[x.abs() <= 2].max() <= 5e-7


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_nan_goes_through(name, library):
    x = torch.tensor([float("nan")])
    results = [torch.zeros(1) for _ in range(3)]
    getattr(library, name)(ctypes.c_void_p(x.data_ptr()), 1, *(ctypes.c_void_p(t.data_ptr()) for t in results))
    assert all(t.isnan().all() for t in results)

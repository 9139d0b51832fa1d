# SPDX-License-Identifier: MIT
"""Which kernels the `cuda` backend takes for a pointwise block and for a layer: ours, or torch's GEMM (torch_gemm.py) and a pass.

Forward: one kernel of ours (csrc/cuda/pointwise_gemm.cu: GEMM, bias, activation, norm or statistics), or torch's GEMM and a pass over
its result. Backward: one pass writes da, and two products read it; a kernel that computed da as it loads its operands would compute it
C_in / 128 times. dx is torch's GEMM, because no pass follows that a kernel of ours could save. dw is torch's GEMM, or on sm_90, if asked,
csrc/cuda/pointwise_weight_grad.cu: images and channels interleave in a contiguous tensor, so torch needs a product an image. At
64x1536x32x32 in bfloat16 an H100 took 1486 us for the backward by torch's products (da about 207, dx 480, dw 800); ours should take 485
for dw.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .torch_gemm import takes_tf32


class _Rates(NamedTuple):
    torch: float  # FLOP/s of torch's GEMM
    mma: float  # FLOP/s of our kernel's main loop, by mma.sync or FMA units
    memory: float  # bytes/s of a pass over its result
    wgmma: float = 0.0  # FLOP/s of our kernel with sm_90a's instructions


#: By compute capability, 16-bit and float32. Per result our kernel loses 2 C_in (1 / ours - 1 / torch) seconds in the
#: product and saves the passes over it: so it is the faster one up to a C_in that no other size changes.
#: (9, 0) was measured on an H100 (benchmarks/results/nvidia-h100-80gb-hbm3.json, pointwise_eval 64x1536x32x32 in bfloat16: 494 us by
#: wgmma and 828 us by mma.sync, epilogue included; torch's GEMM is 602 us less two passes at the copy's pace). The others are computed:
#: cuBLAS feeds sm_100 through tcgen05, ours through mma.sync; on sm_80, 86, 89 and 120, where cuBLAS has no other
#: instruction, ours is taken for 85 % of it. FMA: 75 %.
_RATES = {
    (8, 0): (_Rates(250e12, 212e12, 1.6e12), _Rates(18e12, 13.5e12, 1.6e12)),  # A100
    (8, 6): (_Rates(65e12, 55e12, 0.85e12), _Rates(27e12, 20e12, 0.85e12)),  # RTX 3090
    (8, 9): (_Rates(150e12, 127e12, 0.95e12), _Rates(60e12, 45e12, 0.95e12)),  # RTX 4090
    (9, 0): (_Rates(665e12, 374e12, 2.95e12, 626e12), _Rates(49e12, 37e12, 2.95e12)),  # H100
    (10, 0): (_Rates(1500e12, 470e12, 7e12), _Rates(60e12, 45e12, 7e12)),  # B200
    (12, 0): (_Rates(210e12, 178e12, 1.6e12), _Rates(85e12, 64e12, 1.6e12)),  # RTX 5090
}


@functools.cache
def forced_gemm() -> str | None:
    """CONVMIXER_CUDA_GEMM: "fused", "wgmma", "torch" or "layer"; None (unset or "auto") leaves the choice to the table.

    "fused" is our kernel by mma.sync or FMA units, "wgmma" is "fused" with sm_90a's own instructions where the GPU and the shape
    allow them (csrc/cuda/pointwise_wgmma.cuh), and alone has the weight gradient computed by them too. "layer" is "fused", and an eval
    layer is one kernel wherever that can run (csrc/cuda/mixer.cuh); the others never take that one.

    Raises:
        ValueError: another value.
    """
    value = os.environ.get("CONVMIXER_CUDA_GEMM", "auto")
    if value not in ("auto", "fused", "wgmma", "torch", "layer"):
        raise ValueError(f"CONVMIXER_CUDA_GEMM must be auto, fused, wgmma, torch or layer, got {value!r}")
    return None if value == "auto" else value


@functools.lru_cache(maxsize=256)
def most_fused_channels(capability: tuple[int, int], narrow: bool, passes: int, wgmma: bool = False) -> float:
    """The largest C_in at which our kernel is expected to beat torch's GEMM and `passes` passes over its result."""
    known = [key for key in _RATES if key <= capability]
    rates = _RATES[max(known)][0 if narrow else 1]
    ours = rates.wgmma if wgmma else rates.mma
    saved = passes * (2 if narrow else 4) / rates.memory
    return saved / (2 * (1 / ours - 1 / rates.torch))


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def choose_kernel(
    x: Tensor,  # (N, C_in, H, W)
    passes: int,  # over the result, beside torch's GEMM
    runs_wgmma: Callable[[], bool],
) -> str:
    """What computes the forward of this pointwise block: "torch" (and passes over its result), or our "mma" or "wgmma" kernel.

    Args:
        runs_wgmma: whether device, shape and addresses let our kernel use sm_90a's instructions.
    """
    forced = forced_gemm()
    if forced is not None:
        return "torch" if forced == "torch" else "wgmma" if forced == "wgmma" and runs_wgmma() else "mma"
    if not x.is_cuda or passes == 0:
        # emulated (for tests): the CPU's GEMM is thousands of times faster
        return "torch"
    capability, narrow, channels = _capability(x.get_device()), x.dtype != torch.float32, x.shape[1]
    if narrow and channels <= most_fused_channels(capability, True, passes, wgmma=True) and runs_wgmma():
        return "wgmma"
    if narrow and (channels % 8 != 0 or (x.is_contiguous() and x.shape[2] * x.shape[3] % 8 != 0)):
        # our kernel would load value by value: no 16-byte piece is aligned
        return "torch"
    if takes_tf32(x):
        # ours is float32 throughout
        return "torch"
    return "mma" if channels <= most_fused_channels(capability, narrow, passes) else "torch"


def use_wgmma_weight_grad(
    x: Tensor,  # (N, C_in, H, W) contiguous
) -> bool:
    """Whether the weight gradient is ours (csrc/cuda/pointwise_weight_grad.cu) if GPU, shape and build allow it.

    Only where asked: it has not run on hardware.
    """
    return x.dtype != torch.float32 and forced_gemm() == "wgmma"


#: Cycles of a multiprocessor for a tile of the one-kernel layer, beside its products at mma.sync's rate: the depthwise part
#: for an input channel (shared memory), the epilogue for an output channel (issue); docs/one-kernel-layer.md counts them.
_TILE_PIXELS = 256
_DEPTHWISE_CYCLES, _EPILOGUE_CYCLES = 81, 37
#: The next four fit the H100's mixer_eval rows at 64x64x32x32 and 64x128x32x32 (one kernel 29 and 47 us, two launches 38 and 54).
#: The share of those cycles that the kernel reaches.
_SHARE_OF_CYCLES = 0.71
#: Shares of the copy bandwidth: the depthwise and the pointwise kernel's.
_DEPTHWISE_SHARE, _POINTWISE_SHARE = 0.66, 0.8
#: Seconds beside the work: of the one kernel, of each of two launches.
_ONE_FIXED, _LAUNCH_FIXED = 14.7e-6, 11e-6
#: Of the two launches' time that one kernel must save before it is taken: less is within the error of the fit.
_LEAST_GAIN = 0.05
_CLOCKS = {(8, 0): 1.41e9, (8, 6): 1.7e9, (8, 9): 2.5e9, (9, 0): 1.7e9, (10, 0): 1.85e9, (12, 0): 2.4e9}


def one_kernel_gain(
    capability: tuple[int, int], multiprocessors: int, c_in: int, c_out: int, pixels: int, tiles: int
) -> float:
    """The share of two launches' time that the layer in one kernel is expected to save (negative: to lose).

    Two launches are bound by memory: x and z, then z and y. One kernel takes whole waves of tiles.
    """
    known = max(key for key in _RATES if key <= capability)
    rates, clock = _RATES[known][0], _CLOCKS[known]
    # 32 output channels a warp
    products = 2 * c_in * (-(-c_out // 32) * 32) * _TILE_PIXELS * multiprocessors / rates.mma
    cycles = (_DEPTHWISE_CYCLES * c_in + _EPILOGUE_CYCLES * c_out) / _SHARE_OF_CYCLES
    one = _ONE_FIXED + -(-tiles // multiprocessors) * (products + cycles / clock)
    values = 2 * c_in / _DEPTHWISE_SHARE + (c_in + c_out) / _POINTWISE_SHARE
    two = 2 * _LAUNCH_FIXED + 2 * values * pixels / rates.memory
    return 1 - one / two


def use_one_kernel(
    x: Tensor,  # (N, C_in, H, W)
    c_out: int,
    tiles: int,  # of all images
) -> bool:
    """Whether an eval layer that fits in one kernel runs there."""
    forced = forced_gemm()
    if forced is not None or not x.is_cuda:
        return forced == "layer"
    if x.shape[1] % 8 != 0 or x.shape[3] % 4 != 0:
        # the kernel would load value by value: no 16-byte piece of the weight or 8-byte piece of x is aligned
        return False
    device = x.get_device()
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    gain = one_kernel_gain(_capability(device), _multiprocessors(device), x.shape[1], c_out, pixels, tiles)
    return gain >= _LEAST_GAIN


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

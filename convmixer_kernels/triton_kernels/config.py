# SPDX-License-Identifier: MIT
"""Every choice of the Triton backend in one place: configurations per kernel and GPU generation, and the form of each convolution.

No figure here was measured yet. The lists are reasoned from shared memory, registers (no spills: tests compile each of
them for sm_80, sm_90 and sm_100) and instructions an output; the first entry is what runs where tuning is off (tuning.py).
"""

from __future__ import annotations

import torch

#: Block sizes, num_warps and num_stages: a kernel's keyword arguments.
Config = dict[str, int]
GENERATIONS = ("sm_80", "sm_90", "sm_100", "small")


def generation(major: int, minor: int) -> str:
    """The column of a device of this compute capability; "small" are those with 99 KB of shared memory a block."""
    if major == 8:
        return "sm_80" if minor == 0 else "small"
    if major == 9:
        return "sm_90"
    return "sm_100" if major in (10, 11) else "small"


def _elementwise(block_p: int, block_c: int, num_warps: int) -> Config:
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": num_warps, "num_stages": 1}


_CONTIGUOUS = [_elementwise(1024, 1, 4), _elementwise(2048, 1, 8)]
_CHANNELS_LAST = [_elementwise(16, 128, 4), _elementwise(32, 128, 8)]


def _fma(rows: int, block_p: int, block_c: int, num_warps: int) -> Config:
    return {"ROWS": rows, **_elementwise(block_p, block_c, num_warps)}


def _fma_weight_grad(taps: int, block_p: int, block_c: int, num_warps: int) -> Config:
    return {"TAPS": taps, **_elementwise(block_p, block_c, num_warps)}


def _toeplitz(block_m: int, num_warps: int, num_stages: int) -> Config:
    return {"BLOCK_M": block_m, "num_warps": num_warps, "num_stages": num_stages}


def _gemm(m: int, n: int, k: int, num_warps: int, num_stages: int) -> Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return blocks | {"num_warps": num_warps, "num_stages": num_stages}


def _product(m: int, n: int, k: int, num_warps: int, num_stages: int) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": num_warps, "num_stages": num_stages}


def _everywhere(*configs: Config) -> dict[str, list[Config]]:
    return {generation: list(configs) for generation in GENERATIONS}


#: Kernel -> generation -> configurations. The last of each fits into 99 KB of shared memory.
_SMALL_TOEPLITZ = _toeplitz(32, 4, 1)
_LISTS: dict[str, dict[str, list[Config]]] = {
    # 29 % of the issued instructions (sm_90 machine code, k = 9) are useful FMAs in contiguous float32, 31 % in channels_last: there 16
    # channels are a whole sector, and 4 x 16 weights few enough for every thread to load its own (4 x 64 take a barrier a tap: 22 %)
    "depthwise_fma": _everywhere(_fma(4, 512, 1, 4), _fma(4, 256, 1, 4)),
    "depthwise_fma_channels_last": _everywhere(_fma(4, 64, 16, 4), _fma(4, 8, 64, 4)),
    "depthwise_fma_weight_grad": _everywhere(_fma_weight_grad(4, 512, 1, 4)),
    "depthwise_fma_weight_grad_channels_last": _everywhere(_fma_weight_grad(4, 16, 64, 4)),
    # A is 256 * BLOCK_M elements a stage, T 32 KB
    "depthwise_toeplitz": {
        "sm_80": [_toeplitz(64, 4, 2), _SMALL_TOEPLITZ],
        "sm_90": [_toeplitz(64, 4, 2), _toeplitz(128, 8, 2), _SMALL_TOEPLITZ],
        "sm_100": [_toeplitz(64, 4, 2), _toeplitz(128, 8, 2), _SMALL_TOEPLITZ],
        "small": [_SMALL_TOEPLITZ],
    },
    # a window that needs several products: T is built for each
    "depthwise_toeplitz_large": {
        "sm_80": [_toeplitz(128, 8, 2), _SMALL_TOEPLITZ],
        "sm_90": [_toeplitz(128, 8, 2), _SMALL_TOEPLITZ],
        # with two stages k = 31 spills
        "sm_100": [_toeplitz(128, 8, 1), _SMALL_TOEPLITZ],
        "small": [_SMALL_TOEPLITZ],
    },
    "depthwise_toeplitz_weight_grad": {
        "sm_80": [_toeplitz(32, 8, 2), _toeplitz(32, 8, 1)],
        "sm_90": [_toeplitz(64, 8, 2), _toeplitz(32, 8, 1)],
        "sm_100": [_toeplitz(64, 8, 2), _toeplitz(32, 8, 1)],
        "small": [_toeplitz(32, 8, 1)],
    },
    # 128 x 128 x 32 spills with 4 warps and an epilogue, not with 8
    "pointwise": {
        "sm_80": [_gemm(128, 128, 32, 8, 3), _gemm(64, 64, 32, 4, 2)],
        "sm_90": [_gemm(128, 128, 64, 8, 3), _gemm(128, 256, 64, 8, 3), _gemm(64, 64, 32, 4, 2)],
        "sm_100": [_gemm(128, 128, 64, 8, 3), _gemm(64, 64, 32, 4, 2)],
        "small": [_gemm(64, 64, 32, 4, 2)],
    },
    # operands take twice the registers and the shared memory, and statistics are float64: 128 x 128 x 64 spills 7 KB a thread on
    # sm_90, 128 x 128 x 32 some bytes with channels_last
    "pointwise_float32": {
        "sm_80": [_gemm(64, 128, 32, 8, 3), _gemm(64, 64, 32, 4, 2)],
        "sm_90": [_gemm(64, 128, 32, 8, 3), _gemm(64, 64, 32, 4, 2)],
        "sm_100": [_gemm(64, 128, 32, 8, 3), _gemm(64, 64, 32, 4, 2)],
        "small": [_gemm(64, 64, 32, 4, 2)],
    },
    # da in the prologue takes registers; one tile still holds 128 columns (fuse_prologue)
    "pointwise_fused": {
        "sm_80": [_gemm(64, 128, 32, 8, 2)],
        "sm_90": [_gemm(64, 128, 32, 8, 2)],
        # 8 warps leave a thread 80 registers here
        "sm_100": [_gemm(64, 128, 32, 4, 2)],
        "small": [_gemm(64, 128, 32, 8, 2)],
    },
    "pointwise_weight_grad": {
        "sm_80": [_product(32, 128, 128, 8, 3), _product(32, 64, 64, 4, 2)],
        "sm_90": [_product(64, 128, 128, 8, 3), _product(32, 64, 64, 4, 2)],
        "sm_100": [_product(64, 128, 128, 8, 3), _product(32, 64, 64, 4, 2)],
        "small": [_product(32, 64, 64, 4, 2)],
    },
}
for _name in ("normalize", "norm_backward", "grad_prologue"):
    _LISTS[_name] = _everywhere(*_CONTIGUOUS)
    _LISTS[_name + "_channels_last"] = _everywhere(*_CHANNELS_LAST)
for _name in ("pointwise", "pointwise_float32", "pointwise_fused", "pointwise_weight_grad"):
    _LISTS[_name + "_channels_last"] = _LISTS[_name]


def kernels() -> list[str]:
    """The names of the lists."""
    return list(_LISTS)


def candidates(kernel: str, generation: str) -> list[Config]:
    """The configurations of a kernel on a GPU generation, the default first."""
    return _LISTS[kernel][generation]


#: The widest dense filter whose window, 32 columns and the filter's, is one product of 128 columns.
LARGEST_TOEPLITZ = 97


def depthwise_form(
    dtype: torch.dtype, channels_last: bool, kernel: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> str:
    """The depthwise kernels that run by default: "fma", which run any case, or "toeplitz", up to filters of LARGEST_TOEPLITZ.

    By estimate (instructions an output, one 32x32 plane of bfloat16 is 305 cycles of an H100's memory; no run yet):

    =====================  =====================================  ====================================
    16-bit, contiguous     toeplitz: about 45 for k <= 9          fma: 81 FMAs and 27 loads for k = 9
    16-bit, channels_last  toeplitz reads 2 bytes of 32           fma: 16-byte loads of 8 channels
    k <= 3                 toeplitz: as for k = 9                 fma: about 30
    k = 63                 toeplitz: products 4 times k = 31's    fma: 3969 FMAs
    k = 7, dilation 3      toeplitz: 3.5 times dilation 1's       fma: 49 FMAs, as dilation 1
    float32                no products of float32 without tf32    fma
    =====================  =====================================  ====================================
    """
    span = max(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    if dtype == torch.float32 or channels_last or max(kernel) <= 3 or span > LARGEST_TOEPLITZ:
        return "fma"
    return "toeplitz"


def fuse_prologue(dtype: torch.dtype, columns: int) -> bool:
    """Whether a pointwise gradient computes da in its prologue: if one tile holds all columns of the product.

    By count: da in memory is 2 reads, 1 write and 1 read of each product; in the prologues 2 reads of each product, and the
    arithmetic again. With more tiles every tile would repeat it. In float32 the products are bound by their arithmetic, and da beside
    operands of twice the size spills (3 KB a thread in the weight gradient on sm_90).
    """
    return dtype != torch.float32 and columns <= 128


def input_precision() -> str:
    """The precision of float32 products: tf32 only if torch's own matrix products may use it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"

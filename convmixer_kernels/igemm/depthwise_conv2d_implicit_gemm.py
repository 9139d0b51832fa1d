# SPDX-License-Identifier: MIT
"""The module depthwise_conv2d_implicit_gemm, which RepLKNet, SLaK, UniRepLKNet, HorNet and SMPConv import, on these kernels.

This folder is no package and holds nothing else, so that it shadows nothing on a search path. Print its name with
``python -m convmixer_kernels --igemm-path`` and give it to the repository: as PYTHONPATH, LARGE_KERNEL_CONV_IMPL or DWCONV_IMPL.

The original is the PyTorch extension in MegEngine's fork of cutlass (examples/19_large_depthwise_conv2d_torch_extension). This module
also runs on CPUs, takes bfloat16, channels_last, torch.compile and kernels that are not square, and differentiates as often as nn.Conv2d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convmixer_kernels import DepthwiseConv2d, depthwise_conv2d

__all__ = ["DepthWiseConv2dImplicitGEMM"]


class DepthWiseConv2dImplicitGEMM(DepthwiseConv2d):
    """nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=bias): (N, C, H, W) -> (N, C, H, W).

    Under autocast it computes in autocast's dtype, as nn.Conv2d does.

    Args:
        channels: C.
        kernel: k or (kH, kW), odd.
        bias: whether to learn a bias (C,).

    Raises:
        ValueError: an even kernel size, for which the original's result has another size than its input.
    """

    def __init__(self, channels: int, kernel: int | tuple[int, int], bias: bool = False) -> None:
        super().__init__(channels, kernel, bias=bias)
        if not all(size % 2 for size in self.kernel_size):
            raise ValueError(f"DepthWiseConv2dImplicitGEMM: kernel must be odd, got kernel={kernel!r}")


class _AutogradHelper:
    """The name under which SMPConv calls the convolution of weights that it computes: ``Helper.apply(x, weight)``."""

    dtype: torch.dtype

    @classmethod
    def apply(cls, x: Tensor, weight: Tensor) -> Tensor:
        """depthwise_conv2d(x, weight): (N, C, H, W), (C, 1, kH, kW) -> (N, C, H, W). Autocast casts both to the helper's dtype.

        Raises:
            TypeError: x has another dtype, without autocast. Those of convmixer_kernels.depthwise_conv2d.
        """
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return depthwise_conv2d(x.to(cls.dtype), weight.to(cls.dtype))
        if x.dtype != cls.dtype:
            raise TypeError(f"{cls.__name__}: x must be {cls.dtype}, got x.dtype={x.dtype}")
        return depthwise_conv2d(x, weight)


class _DepthWiseConv2dImplicitGEMMFP32(_AutogradHelper):
    dtype = torch.float32


class _DepthWiseConv2dImplicitGEMMFP16(_AutogradHelper):
    dtype = torch.float16

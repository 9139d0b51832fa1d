# SPDX-License-Identifier: MIT
"""torch's matrix products for the pointwise block of `cuda`, and of `cpu` on AMX, without copies of an activation-sized tensor."""

from __future__ import annotations

import torch
from torch import Tensor

#: Bytes of float32 partial weight gradients that a chunk of images may make: they are added to again and again and so
#: belong in the L2 cache (50 MB on H100, 40 MB on A100).
_PARTIAL_PRODUCTS = 32 << 20


def takes_tf32(t: Tensor) -> bool:
    """Whether a product may round its operands to tf32: if torch's convolutions may, which is torch's default.

    Then torch's convolution computes it: its matrix products have a setting of their own.
    """
    if t.dtype != torch.float32 or not t.is_cuda:
        return False
    return torch.backends.cudnn.enabled and torch.backends.cudnn.conv.fp32_precision == "tf32"


def rows_of(t: Tensor) -> Tensor:
    """A channels_last tensor as its memory lies, (N * H * W, C)."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """(N * H * W, C) as a channels_last tensor of `like`'s images."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def is_rows(*tensors: Tensor | None) -> bool:
    """Whether these tensors lie as rows: channels_last, or H = W = 1, which is both formats."""
    return any(t is not None and (not t.is_contiguous() or t.shape[2] * t.shape[3] == 1) for t in tensors)


def _formatted(t: Tensor, like: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.contiguous_format if like.is_contiguous() else torch.channels_last)


def images_product(
    matrix: Tensor,  # (R, C)
    t: Tensor,  # (N, C, H, W)
    bias: Tensor | None = None,  # (R,)
) -> Tensor:  # (N, R, H * W)
    """matrix @ t (+ bias) of each image, without copies of the matrix."""
    planes = t.view(t.shape[0], t.shape[1], -1)
    bias = None if bias is None else bias[:, None]
    if planes.shape[0] == 1:
        product = torch.mm(matrix, planes[0]) if bias is None else torch.addmm(bias, matrix, planes[0])
        return product.unsqueeze(0)
    matrices = matrix.expand(planes.shape[0], -1, -1)
    return torch.bmm(matrices, planes) if bias is None else torch.baddbmm(bias, matrices, planes)


def bias_passes(x: Tensor, bias: Tensor | None) -> int:
    """How many passes over its result `convolution` needs for a bias: none in a GEMM of rows, else a copy that the product reads."""
    return 0 if bias is None or is_rows(x) or takes_tf32(x) else 2


def convolution(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
) -> Tensor:  # (N, C_out, H, W)
    """The product with its bias, in x's memory format.

    The bias is in the product, so that the sum is rounded once: rounded before the bias and again after it, relu flips if the two cancel,
    and gradients were 9 times as far off as eager's.
    """
    if takes_tf32(x):
        return _formatted(torch.nn.functional.conv2d(x, weight, bias), x)
    matrix, bias = weight.flatten(1).to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not is_rows(x):
        return images_product(matrix, x, bias).view(x.shape[0], -1, *x.shape[2:])
    rows = rows_of(x)
    return from_rows(torch.mm(rows, matrix.t()) if bias is None else torch.addmm(bias, rows, matrix.t()), x)


def input_grad(
    da: Tensor,  # (N, C_out, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    rows: bool,  # is_rows of da and x
) -> Tensor:  # (N, C_in, H, W)
    """weight^T da."""
    if takes_tf32(da):
        return _formatted(torch.nn.functional.conv_transpose2d(da, weight), da)
    matrix = weight.flatten(1).to(da.dtype)
    if rows:
        return from_rows(torch.mm(rows_of(da), matrix), da)
    return images_product(matrix.t(), da).view(da.shape[0], -1, *da.shape[2:])


def weight_grad(
    da: Tensor,  # (N, C_out, H, W)
    x: Tensor,  # (N, C_in, H, W)
    rows: bool,
) -> Tensor:  # (C_out, C_in) float32
    """da x^T, summed and kept in float32."""
    if takes_tf32(da):
        shape = (da.shape[1], x.shape[1], 1, 1)
        return torch.nn.grad.conv2d_weight(x, shape, da).flatten(1)
    if rows:
        return _rows_product(rows_of(da), rows_of(x))
    return _planes_product(da.flatten(2), x.flatten(2))


def _rows_product(
    da: Tensor,  # (M, C_out)
    x: Tensor,  # (M, C_in)
) -> Tensor:  # (C_out, C_in) float32
    if x.dtype == torch.float32:
        return torch.mm(da.t(), x)
    if not x.is_cuda:
        return torch.mm(da.t().float(), x.float())
    return torch.mm(da.t(), x, out_dtype=torch.float32)


def _planes_product(
    da: Tensor,  # (N, C_out, H * W)
    x: Tensor,  # (N, C_in, H * W)
) -> Tensor:  # (C_out, C_in) float32
    """sum over n of da[n] x[n]^T, without a transposed copy of either tensor.

    Images and channels interleave in memory, so this is no single GEMM. One GEMM an image would leave a partial wave of
    tiles N times, one batch of N would write N products to memory: so batches whose products fit in the L2 cache, added
    up there.
    """
    if not x.is_cuda:
        da, x = da.float(), x.float()
    x = x.transpose(1, 2)
    narrow = x.dtype != torch.float32
    batch = max(1, min(x.shape[0], _PARTIAL_PRODUCTS // (4 * da.shape[1] * x.shape[2])))
    options = {"out_dtype": torch.float32} if narrow else {}
    products = torch.bmm(da[:batch], x[:batch], **options)
    for first in range(batch, x.shape[0], batch):
        left, right = da[first : first + batch], x[first : first + batch]
        some = products[: left.shape[0]]
        if narrow:
            torch.ops.aten.baddbmm.dtype_out(some, left, right, torch.float32, out=some)
        else:
            torch.baddbmm(some, left, right, out=some)
    return products[0] if batch == 1 else products.sum(0)

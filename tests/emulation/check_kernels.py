# SPDX-License-Identifier: MIT
"""Runs one check on an emulated native module.

test_mutations.py runs each in a process of its own, because a broken kernel may end the process. A check compares one
primitive of the `cuda` backend with the reference backend in float64, at a few small sizes, in three orders of threads.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from convmixer_kernels import _load
from convmixer_kernels.backends import cuda, cuda_choice, reference
from convmixer_kernels.primitives import MixerEval, Norm, Update, update_running_statistics
from convmixer_kernels.testing import relative_error

ORDERS = ("0", "1", "7")
DTYPES = (torch.float32, torch.bfloat16)
#: Relative errors below the error of every planted bug.
ROOM = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


class Wrong(Exception):
    """A result is further from the exact one than rounding explains."""


def _before_nan(t: torch.Tensor) -> torch.Tensor:
    """t in memory that goes on with NaN: what is read beyond it, and multiplied by 0, must show."""
    held = torch.full((t.numel() + 4096,), torch.nan, dtype=t.dtype)
    return held.as_strided(t.shape, t.stride()).copy_(t)


def _tensors(shape, dtype, channels_last, count, *more):
    generator = torch.Generator().manual_seed(sum(shape))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    made = [
        _before_nan(torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout))
        for _ in range(count)
    ]
    c = shape[1]
    vectors = [torch.randn(c, generator=generator) for _ in range(5)]
    norm = Norm(vectors[0], vectors[1].abs() + 0.5, vectors[2], vectors[3], 1e-5)
    return made, norm, (vectors[4], vectors[0]), [torch.randn(size, generator=generator) for size in more]


def _double(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, Norm):
        return Norm(*(t.double() for t in value[:4]), value.eps)
    return tuple(map(_double, value)) if isinstance(value, tuple) else value


def _compare(primitive: str, dtype: torch.dtype, *arguments) -> None:
    tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
    os.environ["EMU_ENDS"] = ",".join(str(t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
    mine = getattr(cuda, primitive)(*arguments)
    theirs = getattr(reference, primitive)(*arguments)
    exact = getattr(reference, primitive)(*map(_double, arguments))
    if isinstance(mine, torch.Tensor):
        mine, theirs, exact = (mine,), (theirs,), (exact,)
    for index, (m, t, e) in enumerate(zip(mine, theirs, exact, strict=True)):
        # test_cuda.py tests accuracy, at sizes whose error does not depend on a few elements
        error, allowed = relative_error(m, e), relative_error(t, e)
        if not error <= 4 * allowed + ROOM[dtype]:
            raise Wrong(f"{primitive}[{index}] {tuple(arguments[0].shape)}: error {error:.2e}, reference {allowed:.2e}")


def normalize() -> None:
    for shape, dtype, last in itertools.product(((2, 3, 5, 7), (2, 8, 4, 4)), DTYPES, (False, True)):
        (a, residual), norm, _, _ = _tensors(shape, dtype, last, 2)
        _compare("normalize", dtype, a, "gelu", norm, residual)
        _running_statistics(a, norm)


def _running_statistics(a: torch.Tensor, norm: Norm) -> None:
    """The updates of normalize's launch: for two blocks, of other dtypes, one wider than a block of threads; some are None."""
    generator = torch.Generator().manual_seed(0)
    updates, expected = [], []
    for c, count, dtypes in ((5, 7, (torch.float32, torch.float16)), (259, 1, (torch.bfloat16, None))):
        # no kernel may touch the value behind the end of each tensor
        mean, var = torch.randn(c, generator=generator), torch.rand(c, generator=generator)
        wide = [None if t is None else torch.rand(c + 1, generator=generator).to(t) for t in dtypes]
        exact = [None if t is None else t.double() for t in wide]
        updates.append(Update(*(None if t is None else t[:c] for t in wide), mean, var, count, 0.3))
        moved = Update(*(None if t is None else t[:c] for t in exact), mean.double(), var.double(), count, 0.3)
        update_running_statistics(moved)
        expected += [(ours, e) for ours, e in zip(wide, exact, strict=True) if e is not None]
    cuda.normalize(a, "gelu", norm, None, updates)
    for ours, exact in expected:
        if not relative_error(ours, exact) < ROOM[ours.dtype] or ours[-1] != exact[-1]:
            raise Wrong(f"running statistics: {ours.tolist()}, expected {exact.tolist()}")


def norm_backward() -> None:
    # the last but one has more windows than a block has threads, the last four parts a channel
    for shape, dtype, last in (
        ((2, 3, 5, 7), torch.bfloat16, False),
        ((3, 8, 8, 8), torch.float32, False),
        ((3, 8, 8, 8), torch.float32, True),
        ((2, 10, 5, 7), torch.bfloat16, True),
        ((60, 1, 5, 7), torch.bfloat16, False),
        ((2, 1, 200, 201), torch.float32, False),
    ):
        (dy, a), norm, _, _ = _tensors(shape, dtype, last, 2)
        _compare("norm_backward", dtype, dy, a, "gelu", norm)


def statistics() -> None:
    """merge_statistics with partials of unequal counts, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(5, n, generator=generator) + 2 for n in [*range(1, 36), 0]]
    moments = [(torch.full((5,), float(p.shape[1])), p.mean(1), p.var(1, correction=0) * p.shape[1]) for p in parts]
    # the mean and M2 of an empty part must not be read
    partials = torch.stack([torch.stack(m, 1) for m in moments], 1).nan_to_num(7.0)
    values = torch.cat(parts, 1).double()
    mean, var = cuda._merged(cuda._native().module, partials.contiguous(), values.shape[1], 0)
    var_exact, mean_exact = torch.var_mean(values, dim=1, correction=0)
    for ours, exact in ((mean, mean_exact), (var, var_exact)):
        if not relative_error(ours, exact) < 1e-6:
            raise Wrong(f"merge_statistics: {ours.tolist()}, expected {exact.tolist()}")


def _merge_in_torch(native, partials, count, stream):
    """Computes in torch what merge_statistics computes, so that a check of another kernel does not depend on it."""
    counts, means, m2 = partials.double().unbind(2)
    if counts.isnan().any():
        raise Wrong("a part of the statistics was not written")
    mean = torch.where(counts > 0, counts * means, 0.0).sum(1) / count
    m2 = torch.where(counts > 0, m2 + counts * (means - mean[:, None]) ** 2, 0.0).sum(1)
    return mean.float(), (m2 / count).float()


def pointwise_statistics() -> None:
    cuda._merged = _merge_in_torch
    for shape, dtype, last in itertools.product(((2, 5, 5, 7), (3, 8, 8, 8)), DTYPES, (False, True)):
        (x,), _, (bias, _), (weight,) = _tensors(shape, dtype, last, 1, (shape[1], shape[1], 1, 1))
        _compare("pointwise_train", dtype, x, weight, bias, "gelu")


def _pointwise_forward(dtype: torch.dtype, last: bool) -> None:
    """Whole tiles and parts of tiles, more values of C_in than the stages hold, aligned and unaligned."""
    cuda._merged = _merge_in_torch
    cuda_choice.forced_gemm = lambda: "fused"
    for shape, c_out in (((5, 136, 7, 8), 136), ((2, 24, 5, 8), 24), ((3, 41, 5, 7), 70)):
        (x,), _, _, (weight, bias, *vectors) = _tensors(shape, dtype, last, 1, (c_out, shape[1], 1, 1), *[(c_out,)] * 5)
        norm = Norm(vectors[0], vectors[1].abs() + 0.5, vectors[2], vectors[3], 1e-5)
        _compare("pointwise_eval", dtype, x, weight, bias, "gelu", norm)
        _compare("pointwise_train", dtype, x, weight, bias, "gelu")


def _pointwise_wgmma(last: bool) -> None:
    """Tiles of more stages than there are, several tiles for both warp groups, a last tile of one image."""
    os.environ["EMU_PROCESSORS"] = "1"
    cuda._merged = _merge_in_torch
    cuda_choice.forced_gemm = lambda: "wgmma"
    for shape, c_out in (((5, 72, 8, 8), 136), ((3, 456, 8, 8), 24)):
        (x,), _, _, (weight, bias, *vectors) = _tensors(
            shape, torch.bfloat16, last, 1, (c_out, shape[1], 1, 1), *[(c_out,)] * 5
        )
        norm = Norm(vectors[0], vectors[1].abs() + 0.5, vectors[2], vectors[3], 1e-5)
        if c_out > 128:
            _compare("pointwise_eval", torch.bfloat16, x, weight, bias, "gelu", norm)
        _compare("pointwise_train", torch.bfloat16, x, weight, bias, "gelu")


def pointwise_weight_grad() -> None:
    """Whole tiles and parts of K, of fewer stages than there are and of more, which begin and end inside of images."""
    cuda_choice.forced_gemm = lambda: "wgmma"
    for processors, shape, c_out in (
        ("8", (5, 132, 8, 24), 520),  # a tile each, and two left over in four parts
        ("3", (5, 39, 8, 24), 520),  # three items a block, of 15 stages and of 5
        ("7", (5, 39, 8, 24), 24),  # one tile in seven parts
        ("3", (1, 8, 8, 8), 8),
    ):
        os.environ["EMU_PROCESSORS"] = processors
        cuda._size.cache_clear()
        (x,), _, _, _ = _tensors(shape, torch.bfloat16, False, 1)
        (da,), _, _, _ = _tensors((shape[0], c_out, *shape[2:]), torch.bfloat16, False, 1)
        mine = cuda._pointwise_weight_grad(da, x, torch.empty(c_out, shape[1], 1, 1))
        exact = torch.einsum("nohw,nihw->oi", da.double(), x.double())
        if not (error := relative_error(mine.flatten(1), exact)) < 1e-5:
            raise Wrong(f"pointwise_weight_grad {shape}: error {error:.2e}")


def mixer() -> None:
    """More steps than stages, rows of a second pass, more channels than warps; tiles inside the image and across its edge."""
    cuda_choice.forced_gemm = lambda: "layer"
    for shape, kernel, c_out in (((1, 40, 17, 8), (9, 8), 136), ((2, 18, 5, 19), (4, 9), 20)):
        (x,), norm, (bias, _), (weight, product, *vectors) = _tensors(
            shape, torch.bfloat16, False, 1, (shape[1], 1, *kernel), (c_out, shape[1], 1, 1), *[(c_out,)] * 5
        )
        lower = weight / 9, bias, norm
        upper = product / 6, vectors[4], Norm(vectors[0], vectors[1].abs() + 0.5, vectors[2], vectors[3], 1e-5)

        def two(x, lower, upper):
            z = reference.depthwise_eval(x, *lower[:2], "gelu", lower[2], True)
            return reference.pointwise_eval(z, *upper[:2], "gelu", upper[2])

        mine = cuda.mixer_eval(x, (MixerEval("gelu", lower, upper),), True)
        exact = two(*map(_double, (x, lower, upper)))
        error, allowed = relative_error(mine, exact), relative_error(two(x, lower, upper), exact)
        if not error <= 4 * allowed + ROOM[torch.bfloat16]:
            raise Wrong(f"mixer_eval {shape}: error {error:.2e}, reference {allowed:.2e}")


def pointwise_grad() -> None:
    for shape, dtype, last in (
        ((2, 5, 5, 7), torch.bfloat16, False),
        ((3, 8, 8, 8), torch.float32, True),
        ((3, 4, 8, 8), torch.float32, False),
        ((2, 2, 130, 131), torch.bfloat16, False),
    ):
        (dy, a, x), norm, sums, (weight,) = _tensors(shape, dtype, last, 3, (shape[1], shape[1], 1, 1))
        arguments = (dy, a, x, weight.to(dtype), sums[0].to(dtype), "gelu", norm, sums, (True, True, True))
        _compare("pointwise_backward", dtype, *arguments)


def _depthwise(dtype: torch.dtype, last: bool, more_shapes: tuple = ()):
    """(x, norm, sums, weight) over planes smaller than, equal to and larger than a tile, with several images."""
    # channels_last: with and without vectors of channels
    few, more = (8, 9) if last else (3, 3)
    for shape, kernel in (
        ((5, few, 16, 16), 9),
        ((3, more, 7, 9), 7),
        ((1, 8 if last else 2, 18, 41), 9),
        ((2, 2, 9, 20), 12),
        *more_shapes,
    ):
        tensors, norm, sums, (weight,) = _tensors(shape, dtype, last, 3, (shape[1], 1, kernel, kernel))
        # means of the size of dy: a value beside the image that is not masked gives a wrong result
        count = shape[0] * shape[2] * shape[3]
        yield tensors, norm, tuple(count * t for t in sums), weight / kernel


#: contiguous 16-bit tensors with rows off 16 bytes: tiles of rows; of columns, the tensor ending inside of 16 bytes
_SPANS = (((2, 1, 70, 35), 9), ((1, 1, 3, 131), 9))


def _forward(dtype: torch.dtype, last: bool) -> None:
    cuda._merged = _merge_in_torch
    spans = _SPANS if dtype == torch.bfloat16 and not last else ()
    for (x, *_), norm, _, weight in _depthwise(dtype, last, spans):
        _compare("depthwise_eval", dtype, x, weight, norm.bias, "gelu", norm, True)
        _compare("depthwise_train", dtype, x, weight, norm.bias, "gelu")


def _input_grad(dtype: torch.dtype, last: bool) -> None:
    spans = _SPANS if dtype == torch.bfloat16 and not last else ()
    for (dy, a, _), norm, sums, weight in _depthwise(dtype, last, spans):
        _compare("depthwise_input_grad", dtype, dy, a, weight, "gelu", norm, sums, True)


def _weight_grad(dtype: torch.dtype, last: bool) -> None:
    # as many channels as keep all warps busy with some: each warp takes several images in turn
    turns = (((5, 42, 17, 24), 3), ((3, 16, 70, 8), 11), ((40, 2, 5, 9), 11), ((1, 1, 20, 147), 11))
    # dynamic shared memory a little below 48 KB
    turns += (((2, 1, 40, 40), 11),)
    turns = turns if dtype == torch.bfloat16 and not last else ()
    for (dy, a, x), norm, sums, weight in _depthwise(dtype, last, turns):
        _compare("depthwise_weight_grad", dtype, dy, a, x, weight, sums[0], "gelu", norm, sums)


def _same_nan(primitive: str, *arguments) -> None:
    mine, theirs = (getattr(backend, primitive)(*arguments).isnan() for backend in (cuda, reference))
    if not torch.equal(mine, theirs):
        raise Wrong(f"{primitive} {tuple(arguments[0].shape)}: {int(mine.sum())} NaN, reference {int(theirs.sum())}")


def _nan_forward(dtype: torch.dtype, last: bool) -> None:
    for (x, *_), norm, _, weight in _depthwise(dtype, last):
        x[0, 1, 2, 3] = float("nan")
        _same_nan("depthwise_eval", x, weight, norm.bias, "gelu", norm, True)


def _nan_input_grad(dtype: torch.dtype, last: bool) -> None:
    for (dy, a, _), norm, _, weight in _depthwise(dtype, last):
        # behind constant statistics act(a) does not count, and relu lets the gradient of a NaN through
        a[0, 1, -1, -1], dy[0, 1, 0, 0] = float("nan"), float("nan")
        # if relu is 0, the reference's gradient is 0 even for a NaN; the kernels multiply the NaN by 0
        a[0, 1, 0, 0] = 1
        _same_nan("depthwise_input_grad", dy, a, weight, "relu", norm, None, True)


CHECKS = {
    "normalize": normalize,
    "norm_backward": norm_backward,
    "statistics": statistics,
    "pointwise_statistics": pointwise_statistics,
    "pointwise_grad": pointwise_grad,
    "mixer": mixer,
    "pointwise_weight_grad": pointwise_weight_grad,
    "pointwise_wgmma": lambda: _pointwise_wgmma(False),
    "pointwise_wgmma_channels_last": lambda: _pointwise_wgmma(True),
}
for _name, _dtype, _last in (
    ("float32", torch.float32, False),
    ("float32_channels_last", torch.float32, True),
    ("bfloat16", torch.bfloat16, False),
    ("bfloat16_channels_last", torch.bfloat16, True),
):
    for _primitive in (_forward, _input_grad, _weight_grad, _pointwise_forward, _nan_forward, _nan_input_grad):
        CHECKS[f"{_primitive.__name__[1:]}_{_name}"] = lambda p=_primitive, d=_dtype, last=_last: p(d, last)


def main(path: str, check: str, output: str) -> None:
    """As a program whose output goes to a file. Exit status 0 if all is right."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    # every output starts as NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    module = _load.from_file("_cuda_emulated", path)
    cuda._native = lambda: cuda._Native(module, None, True)
    for order in ORDERS:
        os.environ["EMU_ORDER"] = order
        # in two of the orders, blocks walk through several items, and from one channel into the next
        os.environ["EMU_BLOCKS"] = "1000" if order == "0" else "2" if order == "1" else "1"
        cuda._size.cache_clear()
        try:
            CHECKS[check]()
        except (Wrong, RuntimeError) as error:
            sys.exit(f"order {order}: {error}")

# SPDX-License-Identifier: MIT
"""The primitives in native code for CPUs (csrc/cpu): one native call each. Where the CPU has AMX, the pointwise block's bfloat16
products are torch's, and native code does the rest."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .. import _load
from ..primitives import MixerEval, Norm, Update
from . import torch_gemm
from ._native import ACTIVATION_CODES, CODES, address, norm_args, param_args, shape_args, sums_args, unsupported

native, _reason = _load.native_module("_cpu")

name = "cpu"

#: Far beyond use: the kernels count a filter's taps in 32 bits, and a row's margins grow with the dilation.
_LARGEST_KERNEL = 1023
_LARGEST_DILATION = 64


def can_run(op: str, x: Tensor, weight: Tensor, dilation: tuple[int, int] = (1, 1)) -> str | None:
    """None if this backend can run `op` on these tensors, else the reason why not."""
    if native is None:
        return f"{_reason}; reinstall with a C++ compiler: pip install --force-reinstall --no-deps ."
    if x.device.type != "cpu":
        return f"it takes CPU tensors, got x.device={x.device}"
    if (reason := unsupported(x, weight, _LARGEST_KERNEL)) is not None:
        return reason
    if max(dilation) > _LARGEST_DILATION:
        return f"it takes dilations up to {_LARGEST_DILATION}, got dilation={dilation}"
    return None


def build_info() -> dict[str, object]:
    """What this backend is made of, for convmixer_kernels.build_info()."""
    if native is None:
        return {"available": False, "detail": _reason}
    try:
        isa = native.isa()
    except RuntimeError as error:
        # CONVMIXER_CPU_ISA, which every call will raise
        return {"available": False, "detail": str(error)}
    return {
        "available": True,
        "detail": f"{isa} (this CPU runs {native.supported_isas()}), compiler {native.compiler}",
    }


#: Channels of a tile of AMX.
_AMX_CHANNELS = 32


def takes_torch_product(x: Tensor, *channels: int) -> bool:
    """Whether torch computes the pointwise products of tensors like x between so many channels: bfloat16 on a CPU whose matrix unit (AMX)
    oneDNN uses.

    On a Xeon with AMX its product took 0.16 to 0.40 of our kernel's time for 256 to 1536 channels; its float16 one took longer than ours.
    Of a row that does not fill its last tile, torch 2.13's product reads on into the next row and multiplies that by 0: a NaN or an
    infinity there makes this row NaN too. So only whole tiles go to it.
    """
    return (
        x.dtype == torch.bfloat16
        and all(count % _AMX_CHANNELS == 0 for count in channels)
        and torch.backends.mkldnn.enabled
        and torch.cpu._is_amx_tile_supported()
    )


#: dtype code of a pointwise weight that pack_weight has packed (csrc/cpu/kernels.h)
_PACKED = 3


class PackedWeights:
    """Pointwise weights as the panels that the kernels read, each made when an evaluation first meets the weight.

    Without it every call makes them anew, which takes as long as a few positions' products. A weight is packed again if an in-place
    operation of torch's has changed it; a change that torch does not count (through ``.data`` or NumPy) goes unnoticed.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        # the references keep the addresses from being used again
        self.weights = {t.data_ptr(): t for t in weights}
        self.panels: dict[tuple, tuple[int, Tensor]] = {}  # of a weight in a layout: its version then, and the panels

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Evaluations in the `with` block read these panels."""
        token = _packed.set(self)
        try:
            yield
        finally:
            _packed.reset(token)

    def args(self, weight: Tensor, channels_last: bool) -> tuple[int, int]:
        """The arguments of a packed weight, or of another one as it is."""
        key = weight.data_ptr(), weight.shape, weight.dtype, channels_last
        if key[0] not in self.weights:
            return param_args(weight)
        version, panels = self.panels.get(key, (None, None))
        if panels is None or version != weight._version:
            c, c_in = weight.shape[:2]
            panels = torch.empty(native.packed_floats(channels_last, c, c_in), dtype=torch.float32, device="cpu")
            native.pack_weight(*param_args(weight), c, c_in, channels_last, panels.data_ptr(), torch.get_num_threads())
            self.panels[key] = weight._version, panels
        return panels.data_ptr(), _PACKED


_packed: contextvars.ContextVar[PackedWeights | None] = contextvars.ContextVar("convmixer_packed", default=None)


def _weight_args(weight: Tensor, channels_last: bool) -> tuple[int, int]:
    packed = _packed.get()
    return param_args(weight) if packed is None else packed.args(weight, channels_last)


def _ones(t: Tensor) -> Tensor:
    """The weight of a depthwise convolution that changes nothing: around it lie the statistics of act(a), and da."""
    return torch.ones(t.shape[1], 1, 1, 1, dtype=torch.float32, device="cpu")


def _preactivation(a: Tensor | None, activation: str, norm: Norm | None) -> int:
    """a's address, or 0 if da = dy."""
    return 0 if a is None or (norm is None and activation == "identity") else a.data_ptr()


def depthwise_eval(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    activation: str,
    norm: Norm | None,
    residual: bool,
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:  # (N, C, H, W)
    """norm(act(conv(x) + bias)) (+ x), in one native call."""
    y = torch.empty_like(x)
    native.depthwise_forward(
        x.data_ptr(),
        y.data_ptr(),
        *shape_args(x),
        weight.shape[2],
        weight.shape[3],
        *param_args(weight),
        *param_args(bias),
        ACTIVATION_CODES[activation],
        *norm_args(norm),
        residual,
        torch.get_num_threads(),
        *dilation,
    )
    return y


def depthwise_train(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    bias: Tensor | None,  # (C,)
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """a = conv(x) + bias rounded to x's dtype, and mean and biased variance (float32) of act(a) over N, H, W."""
    a = torch.empty_like(x)
    mean, var = (torch.empty(x.shape[1], dtype=torch.float32, device="cpu") for _ in range(2))
    native.depthwise_train(
        x.data_ptr(),
        a.data_ptr(),
        *shape_args(x),
        weight.shape[2],
        weight.shape[3],
        *param_args(weight),
        *param_args(bias),
        ACTIVATION_CODES[activation],
        mean.data_ptr(),
        var.data_ptr(),
        torch.get_num_threads(),
    )
    return a, mean, var


def _pointwise_output(x: Tensor, weight: Tensor) -> Tensor:
    n, _, height, width = x.shape
    memory_format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return torch.empty((n, weight.shape[0], height, width), dtype=x.dtype, memory_format=memory_format, device=x.device)


def _pointwise_shape(y: Tensor, x: Tensor) -> tuple[int, int, int, int, int, bool, int]:
    """y's shape, and C_in. A tensor of one channel or one position is of both formats; then the other one decides."""
    return *y.shape, CODES[y.dtype], not (x.is_contiguous() and y.is_contiguous()), x.shape[1]


def pointwise_eval(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
    activation: str,
    norm: Norm | None,
) -> Tensor:  # (N, C_out, H, W)
    """norm(act(conv1x1(x) + bias)), in one native call, or torch's product and one pass over it."""
    if takes_torch_product(x, *weight.shape[:2]):
        a = torch_gemm.convolution(x, weight, bias)
        return a if activation == "identity" and norm is None else normalize(a, activation, norm, None)
    y = _pointwise_output(x, weight)
    shape = _pointwise_shape(y, x)
    native.pointwise_forward(
        x.data_ptr(),
        y.data_ptr(),
        *shape,
        *_weight_args(weight, shape[5]),
        *param_args(bias),
        ACTIVATION_CODES[activation],
        *norm_args(norm),
        torch.get_num_threads(),
    )
    return y


def pointwise_train(
    x: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,)
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As depthwise_train, for the 1x1 convolution."""
    if takes_torch_product(x, *weight.shape[:2]):
        a = torch_gemm.convolution(x, weight, bias)
        return depthwise_train(a, _ones(a), None, activation)
    a = _pointwise_output(x, weight)
    mean, var = (torch.empty(a.shape[1], dtype=torch.float32, device="cpu") for _ in range(2))
    native.pointwise_train(
        x.data_ptr(),
        a.data_ptr(),
        *_pointwise_shape(a, x),
        *param_args(weight),
        *param_args(bias),
        ACTIVATION_CODES[activation],
        mean.data_ptr(),
        var.data_ptr(),
        torch.get_num_threads(),
    )
    return a, mean, var


def mixer_may_fit(x: Tensor) -> bool:
    """Whether mixer_eval is worth asking for layers of x's width."""
    if native is None or x.dtype not in CODES or takes_torch_product(x, x.shape[1]):
        return False
    return native.mixer_fits(*shape_args(x), torch.get_num_threads())


def mixer_eval(
    x: Tensor,  # (N, C, H, W)
    layers: Sequence[MixerEval],
    residual: bool,
) -> Tensor | None:  # (N, C_out of the last layer, H, W)
    """All layers in one native call, image by image; None if that fits in no core's cache, or if the products are torch's."""
    if takes_torch_product(x, x.shape[1], *(layer.pointwise[0].shape[0] for layer in layers)):
        return None
    threads = torch.get_num_threads()
    n, _, height, width, *layout = shape = shape_args(x)
    widest = max(x.shape[1], *(layer.pointwise[0].shape[0] for layer in layers))
    if not native.mixer_fits(n, widest, height, width, *layout, threads):
        return None
    y = _pointwise_output(x, layers[-1].pointwise[0])
    native.mixer_forward(
        x.data_ptr(),
        y.data_ptr(),
        *shape,
        [
            (
                ACTIVATION_CODES[layer.activation],
                layer.pointwise[0].shape[0],
                *layer.depthwise[0].shape[2:],
                *(
                    (*weight, *param_args(bias), *norm_args(norm))
                    for weight, (_, bias, norm) in (
                        (param_args(layer.depthwise[0]), layer.depthwise),
                        # between layers activations have channels in a vector's lanes, as channels_last has
                        (_weight_args(layer.pointwise[0], True), layer.pointwise),
                    )
                ),
            )
            for layer in layers
        ],
        residual,
        threads,
    )
    return y


def normalize(
    a: Tensor,  # (N, C, H, W)
    activation: str,
    norm: Norm,
    residual: Tensor | None,  # (N, C, H, W)
    updates: Sequence[Update] = (),
) -> Tensor:  # (N, C, H, W)
    """norm(act(a)) (+ residual): the second pass of the training forward, and z rebuilt in mixer_layer's backward."""
    y = torch.empty_like(a)
    native.normalize(
        a.data_ptr(),
        address(residual),
        y.data_ptr(),
        *shape_args(a),
        ACTIVATION_CODES[activation],
        *norm_args(norm),
        torch.get_num_threads(),
    )
    if updates:
        # in one call: if memory ran out between two, one would have moved
        native.update_running_statistics(
            [
                (
                    mean.data_ptr(),
                    var.data_ptr(),
                    len(mean),
                    count,
                    *param_args(running_mean),
                    *param_args(running_var),
                    momentum,
                )
                for running_mean, running_var, mean, var, count, momentum in updates
            ]
        )
    return y


def norm_backward(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor,  # (N, C, H, W)
    activation: str,
    norm: Norm,
) -> tuple[Tensor, Tensor]:
    """sum dy and sum dy * hhat over N, H, W: the gradients of beta and gamma, (C,) float32 each."""
    sum_dy, sum_dy_hhat = (torch.empty(a.shape[1], dtype=torch.float32, device="cpu") for _ in range(2))
    native.norm_backward(
        dy.data_ptr(),
        a.data_ptr(),
        *shape_args(a),
        ACTIVATION_CODES[activation],
        *param_args(norm.mean),
        *param_args(norm.var),
        norm.eps,
        sum_dy.data_ptr(),
        sum_dy_hhat.data_ptr(),
        torch.get_num_threads(),
    )
    return sum_dy, sum_dy_hhat


def depthwise_input_grad(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor | None,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW)
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    residual: bool,
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """dx = correlate(da, flipped weight) (+ dy), in one native call."""
    dx = torch.empty_like(dy)
    native.depthwise_input_grad(
        dy.data_ptr(),
        _preactivation(a, activation, norm),
        dx.data_ptr(),
        *shape_args(dy),
        weight.shape[2],
        weight.shape[3],
        *param_args(weight),
        ACTIVATION_CODES[activation],
        *norm_args(norm),
        *sums_args(sums),
        residual,
        torch.get_num_threads(),
        *dilation,
    )
    return dx


def depthwise_weight_grad(
    dy: Tensor,  # (N, C, H, W)
    a: Tensor | None,  # (N, C, H, W)
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (C, 1, kH, kW): for its shape and dtype
    bias: Tensor | None,  # (C,): for its presence and dtype
    activation: str,
    norm: Norm | None,
    sums: tuple[Tensor, Tensor] | None,
    dilation: tuple[int, int] = (1, 1),
) -> tuple[Tensor, Tensor | None]:
    """dw[c, 0, i, j] = sum da * shifted x and db = sum da, in weight's and bias's dtypes; db is None if bias is."""
    dw = torch.empty_like(weight)
    db = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device="cpu")
    native.depthwise_weight_grad(
        dy.data_ptr(),
        _preactivation(a, activation, norm),
        x.data_ptr(),
        *shape_args(x),
        weight.shape[2],
        weight.shape[3],
        ACTIVATION_CODES[activation],
        *norm_args(norm),
        *sums_args(sums),
        *param_args(dw),
        *param_args(db),
        torch.get_num_threads(),
        *dilation,
    )
    return dw, db


def pointwise_backward(
    dy: Tensor,  # (N, C_out, H, W)
    a: Tensor,  # (N, C_out, H, W)
    x: Tensor | None,  # (N, C_in, H, W); None if dw is not needed
    weight: Tensor,  # (C_out, C_in, 1, 1)
    bias: Tensor | None,  # (C_out,): for its presence and dtype
    activation: str,
    norm: Norm,
    sums: tuple[Tensor, Tensor] | None,
    needs: tuple[bool, bool, bool],  # dx, dw, db
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx = weight^T da, dw = da x^T, db = sum da; None if not needed."""
    if takes_torch_product(dy, *weight.shape[:2]):
        da = depthwise_input_grad(dy, a, _ones(dy), activation, norm, sums, False)
        dx = torch_gemm.input_grad(da, weight, torch_gemm.is_rows(da, x)) if needs[0] else None
        # in both formats one product over all positions, whose sum is rounded once
        dw = torch_gemm.rows_of(da).t() @ torch_gemm.rows_of(x) if needs[1] else None
        db = da.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype) if needs[2] and bias is not None else None
        return dx, None if dw is None else dw.view(weight.shape).to(weight.dtype), db
    # float32 for 16-bit tensors too: rounding da would add to the error of both products
    narrow = native.pointwise_is_narrow(*weight.shape[:2])
    da = None if narrow else torch.empty_like(dy, dtype=torch.float32)
    source = _pointwise_output(dy, weight.transpose(0, 1)) if x is None else x
    dx = torch.empty_like(source) if needs[0] else None
    dw = torch.empty_like(weight) if needs[1] else None
    db = torch.empty(bias.shape, dtype=bias.dtype, device="cpu") if needs[2] and bias is not None else None
    native.pointwise_backward(
        dy.data_ptr(),
        a.data_ptr(),
        source.data_ptr(),
        *_pointwise_shape(dy, source),
        *param_args(weight),
        ACTIVATION_CODES[activation],
        *norm_args(norm),
        *sums_args(sums),
        address(da),
        address(dx),
        *param_args(dw),
        *param_args(db),
        torch.get_num_threads(),
    )
    return dx, dw, db

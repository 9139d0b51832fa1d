# SPDX-License-Identifier: MIT
"""Chooses a backend, and says why not another.

A name (the `backend` argument, `use_backend`, the CONVMIXER_BACKEND environment variable, in this order) is binding: if that
backend cannot run, its reason is raised. Without a name the first of the device's list that can run is taken, and the logger
"convmixer_kernels" says at DEBUG level why those before it cannot. If only torch operations were installed for a device, one
RuntimeWarning says so.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import _load

logger = logging.getLogger("convmixer_kernels")

BACKENDS = ("reference", "cpu", "cuda", "triton")
#: The order in which backends are tried for a tensor on a device of the given type. "cuda" comes before "triton" because it
#: was measured (benchmarks/results/nvidia-h100-80gb-hbm3.json: 6 to 69 times as fast as eager's depthwise convolution). "triton"
#: was not: by estimate it is near "cuda" for contiguous 16-bit tensors and behind it elsewhere.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
#: Backends with a module <name>_layer.py.
_PREPARE_LAYERS = ("cpu", "cuda")
#: The name that lets a registered operator choose when it runs (torch.compile).
AUTOMATIC = "automatic"
_ENVIRONMENT_VARIABLE = "CONVMIXER_BACKEND"
# os.environ.get would take longer than all else that a module asks before it leaves a call to torch
_environment, _ENVIRONMENT_KEY = os.environ._data, os.environ.encodekey(_ENVIRONMENT_VARIABLE)  # type: ignore[attr-defined]

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("convmixer_backend", default=None)
_modules: dict[str, ModuleType] = {}


def load(name: str) -> ModuleType:
    """The backend's module of primitives. It can be imported even if its native module is missing: can_run gives the reason."""
    module = _modules.get(name)
    if module is None:
        module = _modules[name] = importlib.import_module(f".backends.{name}", __package__)
    return module


def automatic_order(device_type: str) -> tuple[str, ...]:
    """The backends that are tried for a tensor on a device of this type, fastest first."""
    return _ORDER.get(device_type, ("reference",))


def _known(source: str, name: str) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@functools.cache
def load_layers(name: str) -> ModuleType | None:
    """The module that prepares whole layers for the backend `name`, if there is one."""
    return importlib.import_module(f".backends.{name}_layer", __package__) if name in _PREPARE_LAYERS else None


def requested_backend(op: str, backend: str | None) -> str | None:
    """The name that binds this call, or None for automatic choice.

    Raises:
        ValueError: an unknown name.
    """
    if backend is not None:
        return _known(f"{op}: backend", backend)
    name = _chosen.get()
    if name is not None:
        return name
    name = os.environ.get(_ENVIRONMENT_VARIABLE)
    return _known(_ENVIRONMENT_VARIABLE, name) if name else None


def backend_is_named() -> bool:
    """Whether use_backend or the environment names a backend for calls without a `backend` argument."""
    return _chosen.get() is not None or _environment.get(_ENVIRONMENT_KEY, b"") != b""


def choose(
    op: str,
    backend: str | None,
    primitive: str,
    x: Tensor,
    weights: tuple[Tensor, ...],
    dilation: tuple[int, int] = (1, 1),
) -> ModuleType:
    """The backend that runs `op` on `x`; `weights` are its convolutions' weights.

    Args:
        op: the public function's name, for messages.
        backend: the argument of that name.
        primitive: "depthwise", "pointwise" or "mixer" (both, one weight each), which the backend must be able to run.
        dilation: of a depthwise convolution.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: the named backend cannot run this.
        RuntimeError: the named backend is not available here.
    """
    name = requested_backend(op, backend)
    if name is not None:
        module = load(name)
        reason = _reason(module, primitive, x, weights, dilation)
        if reason is not None:
            error = NotImplementedError if module.build_info().get("available") else RuntimeError
            raise error(f"{op}: backend {name!r} cannot run this: {reason}")
        return module
    for name in automatic_order(x.device.type):
        module = load(name)
        reason = _reason(module, primitive, x, weights, dilation)
        if reason is None:
            if name == "reference" or (_load.refused and name != x.device.type):
                _warn_if_nothing_faster(x.device.type)
            return module
        logger.debug("%s: backend %r not used: %s", op, name, reason)
    raise NotImplementedError(f"{op}: no backend can run this on {x.device}")


@functools.cache
def _warn_if_nothing_faster(device_type: str) -> None:
    """Warn once if native modules are missing or refused: pip does not show that a build left them out or that two installs are
    mixed, and a slow result looks like any other."""
    details = {name: load(name).build_info() for name in automatic_order(device_type) if name != "reference"}
    if details and not any(detail["available"] for detail in details.values()):
        reasons = "; ".join(f"{name}: {detail['detail']}" for name, detail in details.items())
        warnings.warn(
            f"convmixer_kernels computes with torch operations for {device_type} tensors, right but not faster ({reasons}). "
            "python -m convmixer_kernels says what was built",
            RuntimeWarning,
            stacklevel=5,
        )
    elif f"_{device_type}" in _load.refused:
        warnings.warn(f"convmixer_kernels: {_load.refused[f'_{device_type}']}", RuntimeWarning, stacklevel=5)


def _reason(
    module: ModuleType, primitive: str, x: Tensor, weights: tuple[Tensor, ...], dilation: tuple[int, int]
) -> str | None:
    kinds = ("depthwise", "pointwise") if primitive == "mixer" else (primitive,)
    for kind, weight in zip(kinds, weights, strict=True):
        reason = module.can_run(kind, x, weight, dilation)
        if reason is not None:
            return reason
    return None


def resolve(
    op: str,
    name: str,
    primitive: str,
    x: Tensor,
    weights: tuple[Tensor, ...],
    dilation: tuple[int, int] = (1, 1),
) -> ModuleType:
    """The backend `name` for a registered operator, or an automatic choice if it is AUTOMATIC. Raises as :func:`choose`."""
    return choose(op, None if name == AUTOMATIC else name, primitive, x, weights, dilation)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the `with` block on the backend `name`; a `backend` argument still wins.

    The choice belongs to the current thread (or asyncio task); a backward pass runs where its forward ran.

    Raises:
        ValueError: an unknown name. Whether the backend can run is decided, and raised, at each call.
    """
    token = _chosen.set(_known("use_backend: name", name))
    try:
        yield
    finally:
        _chosen.reset(token)


def available_backends() -> list[str]:
    """The backends that can run on this machine, "reference" always among them."""
    return [name for name in BACKENDS if load(name).build_info()["available"]]


#: On a GPU larger kernels are several launches and copies, which were not measured.
_LARGEST_GPU_KERNEL = 63


def gains(
    op: str,  # "depthwise_conv2d", "depthwise_block" or "pointwise_block"
    device: str,  # a device type
    dtype: torch.dtype,  # of the result
    contiguous: bool,  # or channels_last
    shape: Sequence[int],  # of x, (N, C, H, W)
    kernel: tuple[int, int],
    backward: bool,  # whether a backward follows
    graph: bool = False,  # whether the host's time does not count: torch.compile, a CUDA graph
    dilation: tuple[int, int] = (1, 1),
) -> bool:
    """Whether an operator was measured to be no slower than the modules that it replaces. If not, they run."""
    height, width = kernel
    wide, smaller = dtype == torch.float32, min(height, width)
    if device == "cpu":
        # python -m benchmarks grid, on a Xeon with AMX (2 threads and 1), k = 1 to 31, 1x11, 11x1
        if op == "pointwise_block":
            return wide and shape[2] * shape[3] >= 64  # 7x7 planes: 0.9 to 1.3 times as fast, 16-bit: 0.5 to 1.6 times
        if contiguous:
            return True
        if backward:
            # the others 0.5 to 1.3 times as fast
            return op == "depthwise_block" or smaller >= 5 or width >= 11
        return op == "depthwise_block" or smaller >= (9 if wide else 7)
    # benchmarks/results/nvidia-h100-80gb-hbm3.json. What was not measured is left to torch: stripes, 3x3 to 6x6 in channels_last or
    # in float32, dilated kernels; and float32 products (0.9 times as fast)
    if dilation != (1, 1) or max(kernel) > _LARGEST_GPU_KERNEL:
        return False
    if not graph and math.prod(shape) < 1 << 21:
        return False  # eager takes 10 to 40 us, which is less than a call of ours costs the host
    if op == "pointwise_block":
        return not wide
    return smaller >= (3 if contiguous and not wide else 7)


def has_kernels(device_type: str) -> bool:
    """Whether a backend other than torch's operations can run on this machine for tensors on such a device."""
    return any(load(name).build_info()["available"] for name in automatic_order(device_type) if name != "reference")

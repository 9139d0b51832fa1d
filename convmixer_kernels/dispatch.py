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
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

from torch import Tensor

from . import _load

logger = logging.getLogger("convmixer_kernels")

BACKENDS = ("reference", "cpu", "cuda", "triton")
#: The order in which backends are tried for a tensor on a device of the given type. "cuda" comes before "triton" because it
#: was measured (benchmarks/results/nvidia-h100-80gb-hbm3.json: 6 to 69 times as fast as eager's depthwise convolution). "triton"
#: was not: by estimate it is near "cuda" for contiguous 16-bit tensors and behind it elsewhere.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
#: Backends with a module <name>_layer.py.
_PREPARE_LAYERS = ("cuda",)
#: The name that lets a registered operator choose when it runs (torch.compile).
AUTOMATIC = "automatic"
_ENVIRONMENT_VARIABLE = "CONVMIXER_BACKEND"

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

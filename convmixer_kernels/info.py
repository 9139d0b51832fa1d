# SPDX-License-Identifier: MIT
"""Tells what was built, what this machine has, and which backend runs each operator here."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch

from . import dispatch
from ._version import __version__

_PRIMITIVES = {
    "depthwise_block": ("depthwise",),
    "pointwise_block": ("pointwise",),
    "mixer_layer": ("depthwise", "pointwise"),
    "depthwise_conv2d": ("depthwise",),
}


def build_info() -> dict[str, Any]:
    """Version, native modules, torch, GPUs, the backend of each operator, and why other backends do not run it.

    Returns:
        A dictionary of plain values: "version", "python", "platform", "torch", "threads", "gpus" (list of str), "backends" (name -> its
        build information, with "available" and "detail"), "operators" (device type -> operator -> {"backend": name, "not": {name: reason}},
        for a float32 tensor with a 9x9 or 1x1 kernel; the name is None if the backend that CONVMIXER_BACKEND or use_backend asks
        for cannot run it, or if this CPU does not have CONVMIXER_CPU_ISA). `python -m convmixer_kernels` prints it.

    Raises:
        ValueError: another environment variable of this package has an unknown value.
    """
    gpus = [
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    devices = ["cpu"] + (["cuda"] if gpus else [])
    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "backends": {name: dispatch.load(name).build_info() for name in dispatch.BACKENDS},
        "operators": {device: {op: _operator(device, op) for op in _PRIMITIVES} for device in devices},
    }


def _operator(device: str, op: str) -> dict[str, object]:
    weights = {"depthwise": torch.empty(8, 1, 9, 9, device=device), "pointwise": torch.empty(8, 8, 1, 1, device=device)}
    x = torch.empty(1, 8, 16, 16, device=device)
    chosen, reasons = None, {}
    requested = dispatch.requested_backend(op, None)
    for name in dispatch.automatic_order(device) if requested is None else (requested,):
        backend = dispatch.load(name)
        reason = next((r for p in _PRIMITIVES[op] if (r := backend.can_run(p, x, weights[p])) is not None), None)
        if reason is None and not (built := backend.build_info())["available"]:
            # this backend would be chosen, and raise
            reasons[name] = str(built["detail"])
            break
        if reason is None:
            chosen = chosen or name
        else:
            reasons[name] = reason
    return {"backend": chosen, "not": reasons}


def describe() -> str:
    """build_info() as the text that `python -m convmixer_kernels` prints."""
    info = build_info()
    lines = [
        f"convmixer-kernels {info['version']}, Python {info['python']}, {info['platform']}",
        f"torch {info['torch']}, {info['threads']} threads, GPUs: {', '.join(info['gpus']) or 'none'}",
        "",
        "backends:",
    ]
    for name, backend in info["backends"].items():
        lines.append(f"  {name:<10} {'available' if backend['available'] else 'not available'}: {backend['detail']}")
        lines += [f"  {'':<10} {k}: {v}" for k, v in backend.items() if k not in ("available", "detail")]
    for device, operators in info["operators"].items():
        lines += ["", f"on a {device} tensor (float32):"]
        for op, choice in operators.items():
            lines.append(f"  {op:<17} runs on {choice['backend'] or 'nothing: the backend that it would be cannot'}")
            lines += [f"  {'':<17} not {name}: {reason}" for name, reason in choice["not"].items()]
    return "\n".join(lines)

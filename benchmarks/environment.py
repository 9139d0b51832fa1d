# SPDX-License-Identifier: MIT
"""What a result was measured on."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import convmixer_kernels

_ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device, backend: str | None) -> dict[str, object]:
    """The machine, the versions and the settings, ready for JSON."""
    info = convmixer_kernels.build_info()
    automatic = info["operators"].get(device.type, {}).get("mixer_layer", {}).get("backend")
    return {
        "device": device_name(device),
        "device_type": device.type,
        "cpu": cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "allow_tf32": torch.backends.cudnn.allow_tf32 if device.type == "cuda" else False,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "convmixer_kernels": info["version"],
        "backend": automatic if backend is None else backend,
        "backends": {name: _without_paths(backend) for name, backend in info["backends"].items()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _without_paths(backend: dict[str, object]) -> dict[str, object]:
    """An import error names files of this machine: only what lies inside the package or its sources is of interest."""
    inside = re.compile(r"/[^\s()]*/(?=convmixer_kernels/|csrc\b)")
    return {key: inside.sub("", value) if isinstance(value, str) else value for key, value in backend.items()}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this source tree, "-dirty" where tracked files differ from it; None outside a git checkout."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=_ROOT, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")

# SPDX-License-Identifier: MIT
"""The build backend of pyproject.toml: setuptools', with two additions.

The same sources give the same bytes: an sdist's entries are sorted, of no owner and, as a wheel's, of one date.

It asks for NVIDIA's compiler if the CUDA kernels need it. Most people who use PyTorch's GPU builds have a driver and no CUDA toolkit.
NVIDIA's compiler is on the package index, so a build without nvcc requires it, about 104 MB, where an NVIDIA driver is visible or
CONVMIXER_BUILD_CUDA=1.
"""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import _build
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

# the first date of a zip file
os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")


def build_sdist(sdist_directory, config_settings=None):
    """setuptools' sdist, whose entries have the times and the owner of the files here, packed again."""
    name = build_meta.build_sdist(sdist_directory, config_settings)
    path, date = Path(sdist_directory, name), int(os.environ["SOURCE_DATE_EPOCH"])
    packed = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new:
        for entry in sorted(old.getmembers(), key=lambda entry: entry.name):
            data = old.extractfile(entry) if entry.isfile() else None
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname, entry.pax_headers = date, 0, 0, "", "", {}
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            new.addfile(entry, data)
    # without a file name and with a fixed date in gzip's header too
    path.write_bytes(gzip.compress(packed.getvalue(), mtime=date))
    return name


def _download_problem(packages: list[str]) -> str | None:
    """Why pip cannot get these packages, or None. An unknown pip is trusted."""
    # pip hides itself from a build by PYTHONPATH
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], env=environment, capture_output=True).returncode != 0:
        return None
    dry_run = [*pip, "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", *packages]
    done = subprocess.run(dry_run, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return lines[-1] if lines else f"pip failed with exit status {done.returncode}"


def _compiler_packages() -> list[str]:
    if not _build.needs_compiler_packages():
        return []
    problem = _download_problem(_build.COMPILER_PACKAGES)
    if problem is None:
        return _build.COMPILER_PACKAGES
    message = f"convmixer-kernels: NVIDIA's compiler cannot be downloaded ({problem})"
    if os.environ.get("CONVMIXER_BUILD_CUDA") == "1":
        sys.exit(f"{message}, and CONVMIXER_BUILD_CUDA=1 needs it: install a CUDA toolkit, or unset the variable")
    print(f"{message}: installing WITHOUT CUDA kernels", flush=True)
    return []


# setuptools' own hooks would run setup.py, which needs what these ask for; [build-system] requires the rest
def get_requires_for_build_wheel(config_settings=None):
    return _compiler_packages()


def get_requires_for_build_editable(config_settings=None):
    return _compiler_packages()

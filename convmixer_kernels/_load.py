# SPDX-License-Identifier: MIT
"""Finds the native modules, and refuses one that was built from other sources than these Python files belong to.

`__path__` may name several folders: that of a checkout, which has no native module after a plain `pip install .`, and those of
all installs on Python's path. The Python files come from the first one. A native module carries the digest of its sources. The
digest must be the one that setup.py wrote beside these Python files (_built.py), or in a checkout that of csrc/.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from . import _build

_FOLDER = Path(__file__).resolve().parent
#: Name -> the files that were refused and why, if no right one was found.
refused: dict[str, str] = {}


@functools.cache
def _expected() -> tuple[str | None, Path]:
    """The digest that a native module must have, or None if it is unknown; and the file or folder that gives it."""
    built = _FOLDER / "_built.py"
    if built.is_file():
        found = re.search(r"'digest': '([0-9a-f]+)'", built.read_text())
        return (found[1] if found else None), built
    if (_build.CSRC / "cpu" / "module.cpp").is_file():
        return _build.source_digest(), _build.CSRC
    return None, _FOLDER


def _refusal(module: ModuleType) -> str | None:
    file, digest = Path(module.__file__), getattr(module, "digest", "unknown")
    expected, source = _expected()
    if expected is None:
        # nothing to compare with: a module beside these files came with them
        return None if file.resolve().parent == _FOLDER else f"{file} is refused: it belongs to another install"
    if digest == expected:
        return None
    return f"{file} is refused: it was built from other sources (digest {digest}) than {source} ({expected})"


def native_module(name: str) -> tuple[ModuleType | None, str | None]:
    """The first native module `name` ("_cpu", "_cuda") that was built from these sources, or None and the reason.

    Reading a module's digest loads the module; a refused one is not used after that.
    """
    full_name = f"{__package__}.{name}"
    reasons, refusals = [], []
    for folder in dict.fromkeys(sys.modules[__package__].__path__):
        spec = PathFinder.find_spec(full_name, [folder])
        if spec is None or spec.loader is None:
            continue
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            reasons.append(f"{spec.origin}: {error}")
            continue
        reason = _refusal(module)
        if reason is None:
            sys.modules[full_name] = module
            return module, None
        reasons.append(reason)
        refusals.append(reason)
    if refusals:
        refused[name] = "; ".join(refusals)
    return None, "; ".join(reasons) or f"the native module {name} is not built"


def from_file(name: str, path: str | Path) -> ModuleType:
    """The native module `name` in this file, built from any sources.

    Raises:
        ImportError: the file is missing or holds another module.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a native module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

# SPDX-License-Identifier: MIT
"""Packages that only the benchmarks need, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingPackage(RuntimeError):
    """A package of the [bench] extra is not installed."""


def require(name: str) -> ModuleType:
    """Import the module `name`.

    Raises:
        MissingPackage: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A package that is there but lacks one of its own dependencies names that one.
        raise MissingPackage(
            f"the benchmarks need the package {error.name!r}, which is not installed; "
            "install what they need with: pip install '.[bench]'"
        ) from error

# SPDX-License-Identifier: MIT
"""No module of this repository imports itself, however long the way round: imports inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("convmixer_kernels", "convmixer", "benchmarks")


def modules() -> dict[str, Path]:
    """Every module by its dotted name; a package is its __init__.py."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, source: str, is_package: bool, known: frozenset[str]) -> Iterator[str]:
    """The modules among `known` that the module `name` imports: at its top, in functions, for its types."""
    here = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = here.split(".")[: len(here.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # what is imported from a package is a module, or a name of the package itself
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        yield from (each for each in names if each in known and each != name)


def circle(graph: Mapping[str, set[str]]) -> list[str] | None:
    """The names along one circle, the first again at its end; None if there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str] | None:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        for following in sorted(graph[name]):
            if (found := visit(following, [*way, name])) is not None:
                return found
        done.add(name)
        return None

    return next((found for name in sorted(graph) if (found := visit(name, [])) is not None), None)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself(package):
    paths = modules()
    known = frozenset(paths)
    graph = {
        name: set(imported(name, path.read_text(), path.name == "__init__.py", known)) for name, path in paths.items()
    }
    mine = {name for name in graph if name.split(".")[0] == package}
    assert len(mine) > 3
    assert circle({name: graph[name] & mine for name in mine}) is None
    # and imports between the packages run one way
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    assert not [(name, each) for name in mine for each in graph[name] if each.split(".")[0] in above]


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    known = frozenset({"p", "p.q", "p.q.r", "p.s", "t"})
    source = "import t, torch\nfrom p import s, name\ndef f():\n    from . import q\n    from .q.r import x\n    from ..p import s"
    assert set(imported("p.s", source, False, known)) == {"t", "p", "p.q", "p.q.r"}
    assert set(imported("p.q", "from .r import x\nfrom .. import s", True, known)) == {"p.q.r", "p.s"}

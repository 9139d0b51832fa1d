# SPDX-License-Identifier: MIT
"""No module of this repository imports itself, however long the way round, and what it takes from another exists there."""

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


def bound(tree: ast.Module) -> set[str]:
    """The names that a module's own statements bind; those of its functions and classes are not among them."""
    found: set[str] = set()
    statements: list[ast.AST] = list(tree.body)
    while statements:
        node = statements.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        else:
            statements.extend(ast.iter_child_nodes(node))
    return found


def taken(name: str, source: str, is_package: bool, trees: Mapping[str, ast.Module]) -> Iterator[tuple[str, str]]:
    """(module, name) of each name that the module `name` takes from a module of ours: by `from` or by an attribute."""
    here = name if is_package else name.rpartition(".")[0]
    aliases: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = here.split(".")[: len(here.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            for alias in node.names:
                if f"{base}.{alias.name}" in trees:
                    aliases[alias.asname or alias.name] = f"{base}.{alias.name}"
                elif base in trees:
                    yield base, alias.name
    # an argument or a variable of the same name is not the module
    stored = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    stored |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
            continue
        if node.value.id in aliases.keys() - stored and not node.attr.startswith("__"):
            yield aliases[node.value.id], node.attr


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


def test_what_a_module_takes_from_another_exists():
    paths = modules()
    trees = {name: ast.parse(path.read_text()) for name, path in paths.items()}
    names = {name: bound(tree) for name, tree in trees.items()}
    uses = [
        (name, *use)
        for name, path in paths.items()
        for use in taken(name, path.read_text(), path.name == "__init__.py", trees)
    ]
    assert len(uses) > 800
    missing = [
        f"{name}: {module}.{attribute}"
        for name, module, attribute in uses
        if attribute not in names[module] and f"{module}.{attribute}" not in trees
        if "__getattr__" not in names[module]
    ]
    assert missing == []


def test_a_name_that_is_missing_is_found():
    trees = {"p": ast.parse(""), "p.q": ast.parse("if 1:\n    x = 1\ndef f(inner): y = 2"), "p.r": ast.parse("")}
    assert bound(trees["p.q"]) == {"x", "f"}
    source = "from . import q\nfrom .q import f\nfrom p import r\ndef g(r): return r.a, q.x, q.gone"
    assert sorted(taken("p.s", source, False, trees)) == [("p.q", "f"), ("p.q", "gone"), ("p.q", "x")]


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    known = frozenset({"p", "p.q", "p.q.r", "p.s", "t"})
    source = "import t, torch\nfrom p import s, name\ndef f():\n    from . import q\n    from .q.r import x\n    from ..p import s"
    assert set(imported("p.s", source, False, known)) == {"t", "p", "p.q", "p.q.r"}
    assert set(imported("p.q", "from .r import x\nfrom .. import s", True, known)) == {"p.q.r", "p.s"}

"""The shape of the package, read from its source: layers, sizes, tests, names."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyrolora"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in FILES if path.name != "__init__.py"]

# From left to right: a module imports from layers to its left, and from its own package.
LAYERS = (
    {"distributions", "adapters"},
    {"priors", "likelihoods"},
    {"tasks"},
    {"program"},
    {"guides"},
    {"inference"},
    {"construct"},
    {"recipe"},
    {"saved"},
    {"diagnostics", "report", "options"},
    {"commands"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FORBIDDEN = re.compile(r"wrapper|wrapped|utils?(?![a-z])|manager|helper", re.IGNORECASE)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


NAMES = {name_of(path): path for path in FILES}


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of everything that a file imports from this package; a name of a module counts as that module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((node.lineno, inner if inner in NAMES else str(node.module)))
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
    return [(line, module) for line, module in found if module.split(".")[0] == "pyrolora"]


def layer(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_come_from_the_left(path: Path) -> None:
    """Law: a module imports from its own package and from layers to its left, never from its layer's neighbour."""
    own = layer(name_of(path))
    for line, module in imports(path):
        if module == "pyrolora":
            continue
        left = layer(module) == own or LEVEL[layer(module)] < LEVEL[own]
        assert left, f"{relative(path)}:{line}: {own} imports {module}, which is not to its left"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_nobody_imports_a_package(path: Path) -> None:
    """Law: inside the package modules are imported, never a package's __init__, whose order of import is not theirs."""
    for line, module in imports(path):
        assert module in NAMES, f"{relative(path)}:{line}: there is no module {module}"
        assert NAMES[module].name != "__init__.py", f"{relative(path)}:{line}: imports the package {module}"


def test_packages_export_what_is_theirs() -> None:
    """Law: a package's __init__ imports its own modules only, holds nothing but imports and __all__, and the top one
    stands above all layers."""
    for path in FILES:
        if path.name != "__init__.py":
            continue
        package = name_of(path)
        for line, module in imports(path):
            assert module.startswith(package), f"{relative(path)}:{line}: re-exports {module}"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            plain = isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr)
            assert plain, f"{relative(path)}:{node.lineno}: more than imports"
            if isinstance(node, ast.Assign):
                assert [ast.unparse(target) for target in node.targets] == ["__all__"]


def test_no_cycles() -> None:
    """Law: the modules can be put in an order in which each imports earlier ones only."""
    graph = {name_of(path): {module for _, module in imports(path)} for path in MODULES}
    order = list(TopologicalSorter(graph).static_order())
    assert set(graph) <= set(order)


def test_every_part_has_its_layer() -> None:
    """Law: each package and module directly under pyrolora/ stands in exactly one layer, and no layer is empty."""
    parts = {layer(name_of(path)) for path in MODULES}
    assert parts == set(LEVEL)
    assert sum(len(names) for names in LAYERS) == len(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_and_functions_stay_small(path: Path) -> None:
    """Law: no file over 400 lines, no function over 60."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, f"{relative(path)}: {len(text.splitlines())} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            assert size <= 60, f"{relative(path)}:{node.lineno}: {node.name} has {size} lines"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_has_its_test(path: Path) -> None:
    """Law: pyrolora/x/y.py is tested by tests/x/test_y.py."""
    mirrored = ROOT / "tests" / path.relative_to(PACKAGE).with_name(f"test_{path.name}")
    assert mirrored.is_file(), f"{relative(path)}: {relative(mirrored)} is missing"
    assert re.search(r"^def test_", mirrored.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_module_says_what_it_is(path: Path) -> None:
    """Law: each file begins with a docstring, and each public class and function in it has one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{relative(path)}: no docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{relative(path)}:{node.lineno}: {node.name} has no docstring"


def packages() -> list[ModuleType]:
    return [importlib.import_module(name) for name, path in NAMES.items() if path.name == "__init__.py"]


def test_what_is_exported_exists_and_is_explained() -> None:
    """Law: every name in an __all__ exists, stands there once, and has a docstring of its own, as have the public
    methods of its class that no base class explains."""
    for package in packages():
        names = package.__all__
        assert len(names) == len(set(names)), package.__name__
        for name in names:
            thing = getattr(package, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                assert thing.__doc__, f"{package.__name__}.{name} has no docstring"
            if not inspect.isclass(thing) or not thing.__module__.startswith("pyrolora"):
                continue
            for method, found in vars(thing).items():
                if inspect.isfunction(found) and not method.startswith("_") and method != "forward":
                    assert inspect.getdoc(getattr(thing, method)), (
                        f"{thing.__module__}.{name}.{method} has no docstring"
                    )


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_names_say_what_things_are(path: Path) -> None:
    """Law: no file, class, function, argument or variable of ours is a wrapper, utils, manager or helper."""
    assert not FORBIDDEN.search(relative(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        given = {
            ast.ClassDef: lambda n: n.name,
            ast.FunctionDef: lambda n: n.name,
            ast.arg: lambda n: n.arg,
            ast.Name: lambda n: n.id if isinstance(n.ctx, ast.Store) else "",
            ast.Attribute: lambda n: n.attr if isinstance(n.ctx, ast.Store) else "",
        }.get(type(node), lambda n: "")(node)
        assert not FORBIDDEN.search(given), f"{relative(path)}:{getattr(node, 'lineno', 0)}: {given}"


def test_the_project_states_python_and_licence() -> None:
    """Law: pyproject.toml names the oldest Python, which parses every file, and a licence whose text is here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11"
    assert project["license"] == "Apache-2.0"
    for name in project["license-files"]:
        assert "Apache License" in (ROOT / name).read_text(encoding="utf-8")
    for path in FILES:
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 11))

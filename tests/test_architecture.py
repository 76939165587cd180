"""The structure of the package: which room may import which, and how long a file may be."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted((ROOT / "keras_moe").rglob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def room(module):
    """The file or folder directly in the package that a module "keras_moe.x.y" is of."""
    return module.split(".")[1] if "." in module else ""


def imported(path):
    """The modules of the package that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "keras_moe")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "keras_moe":
            if node.module == "keras_moe":  # Names of rooms, or public names: those have no room.
                yield from (f"keras_moe.{alias.name}" for alias in node.names)
            else:
                yield node.module


def order():
    """The rooms as CONTRIBUTING.md names them: each may import those before it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^- Imports run one way: (.*?)\.$", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"`(\w+)`", line)


def test_contributing_names_every_room_once():
    rooms = {path.relative_to(ROOT / "keras_moe").parts[0] for path in MODULES} - {"__init__.py"}
    assert sorted(order()) == sorted(room.removesuffix(".py") for room in rooms)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path):
    here = path.relative_to(ROOT / "keras_moe").parts[0].removesuffix(".py")
    if here == "__init__":
        return  # It has all of them.
    rooms = order()
    allowed = rooms[: rooms.index(here) + 1]
    assert [module for module in imported(path) if room(module) not in allowed] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_one_file_holds_one_idea(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            assert node.end_lineno - node.lineno + 1 <= 60

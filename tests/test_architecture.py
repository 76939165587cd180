"""The structure of the package: which room may import which, and how long a file may be."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "keras_moe"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Where TensorFlow is all that there is to it.
OF_TENSORFLOW = (
    "backend/tensorflow/",
    "distribute/optimizer.py",
    "distribute/sharded_variable.py",
    "serving/",
)


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


def of_tensorflow(path):
    return path.relative_to(PACKAGE).as_posix().startswith(OF_TENSORFLOW)


def imported_at_once(node):
    """The names of all modules that are imported as a file is, not where its functions run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module or ""
        elif not isinstance(child, (ast.FunctionDef, ast.Lambda)):
            yield from imported_at_once(child)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_backends_are_imported_behind_the_seam(path):
    modules = imported_at_once(ast.parse(path.read_text(encoding="utf-8")))
    names = {module.split(".")[0] for module in modules}
    if not of_tensorflow(path):
        assert "tensorflow" not in names
    if not path.relative_to(PACKAGE).as_posix().startswith("backend/jax/"):
        assert "jax" not in names


def defined(path):
    """The names at the top of a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets)


def asked_of_backends():
    """What files that run on every backend take of the seam: pairs of a module and a name."""
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if "backend" in path.relative_to(PACKAGE).parts or of_tensorflow(path):
            continue
        modules = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "keras_moe.backend"
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in modules - {"requirements"}:
                    yield node.value.id, node.attr


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_backends_bring_what_is_asked_of_them(backend):
    folder = PACKAGE / "backend" / backend
    missing = {
        (module, name)
        for module, name in set(asked_of_backends())
        if name not in defined(folder / f"{module}.py")
    }
    assert missing == set()
    text = (PACKAGE / "backend" / "__init__.py").read_text(encoding="utf-8").split('"""')[1]
    assert {module for module, _ in asked_of_backends()} <= set(re.findall(r"`(\w+)`", text))

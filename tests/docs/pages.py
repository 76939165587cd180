"""Reads the documentation as a reader runs it: every page from top to bottom, in one namespace.

A fence `python` is run. A fence `text` right behind one is what it prints. A directive of
mkdocstrings, `::: keras_moe.NAME`, stands for the fences in that name's docstring. A fence behind
`<!-- not run: REASON -->` is left out.
"""

import contextlib
import importlib
import inspect
import io
import linecache
import pathlib
import re
import textwrap
import typing

ROOT = pathlib.Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
PART = re.compile(
    r"^(?:<!-- not run: .+ -->\n)?```\w*\n.*?^```$|^::: (?P<name>\S+)(?:\n {4,}[^\n]*)*",
    re.MULTILINE | re.DOTALL,
)
MEMBERS = re.compile(r"members: \[(.*)\]")


class Code(typing.NamedTuple):
    """A fence to run: where it stands, and what it prints, `None` where that isn't told."""

    place: str
    line: int
    source: str
    prints: str | None = None


def pages():
    """All pages: those of docs/, and README."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def find(name):
    """The object of a name with dots."""
    module, found = name, None
    while found is None:
        module = module.rpartition(".")[0]
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(module)
    for part in name.removeprefix(module + ".").split("."):
        found = getattr(found, part)
    return found


def names(page):
    """The names that a page documents: those of its directives and of the members they ask for."""
    for part in PART.finditer(page.read_text(encoding="utf-8")):
        if part["name"]:
            yield part["name"]
            for members in MEMBERS.findall(part.group()):
                yield from (f"{part['name']}.{member}" for member in members.split(", "))


def fences_of_docstring(name):
    """The fences `python` in a docstring."""
    thing = find(name)
    documented = inspect.isroutine(thing) or inspect.isclass(thing)
    text = (inspect.getdoc(thing) or "") if documented else ""
    return [
        Code(f"the docstring of {name}", 1, textwrap.dedent(fence["code"]))
        for fence in FENCE.finditer(text)
        if fence["language"] == "python"
    ]


def code(page):
    """What a page runs, in its order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for part in PART.finditer(text):
        if part["name"]:
            for name in names_of(part):
                found += fences_of_docstring(name)
            continue
        fence = FENCE.search(part.group())
        line = text.count("\n", 0, part.start()) + 2
        if fence["language"] == "python" and not part.group().startswith("<!--"):
            found.append(Code(page.name, line, fence["code"]))
        elif fence["language"] == "text" and found:
            between = text[: part.start()].rstrip()
            if between.endswith(found[-1].source.rstrip() + "\n```"):
                found[-1] = found[-1]._replace(prints=fence["code"])
    return found


def names_of(part):
    """A directive's name and the members it asks for."""
    members = [member for found in MEMBERS.findall(part.group()) for member in found.split(", ")]
    return [part["name"], *(f"{part['name']}.{member}" for member in members)]


def run(page):
    """Runs a page; AssertionError where it prints something else than it says."""
    namespace = {"__name__": "page"}
    for place, line, source, prints in code(page):
        place = f"<{place}, line {line}>"
        # AutoGraph and tracebacks read the source of what they meet.
        linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(source, place, "exec"), namespace)
        if prints is not None:
            assert out.getvalue() == prints, f"{place} prints\n{out.getvalue()}"

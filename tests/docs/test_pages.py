"""What README, guides and reference show is true: their code runs and prints what it says."""

import re

import pages
import pytest
import replicas
import tensorflow as tf

# Run operation by operation, as their models take a minute to trace; tests/models traces them.
EAGER = ("models.md", "callbacks.md")
# A page's images count as links. Code doesn't.
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s#]+)")
pytestmark = pytest.mark.usefixtures("for_cpus")
# Keras 3.15 warns of its own default wherever `fit` is given a dataset.
SHUFFLED = pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning")


def name_of(page):
    return str(page.relative_to(pages.ROOT))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder for what a page writes."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def eager():
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def two_replicas(monkeypatch):
    """Makes a strategy over all devices, as pages ask for it, one of two replicas."""
    strategy = replicas.strategy(2)
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda: strategy)


def with_code(are_eager):
    found = [page for page in pages.pages() if (page.name in EAGER) == are_eager]
    return [page for page in found if pages.code(page)]


@SHUFFLED
@pytest.mark.parametrize("page", with_code(False), ids=name_of)
def test_the_code_of_a_page_runs(page, folder, two_replicas):
    pages.run(page)


@SHUFFLED
# What is eager are the models, not the functions of data pipelines.
@pytest.mark.filterwarnings("ignore:.*does not apply to tf.data functions:UserWarning")
@pytest.mark.parametrize("page", with_code(True), ids=name_of)
def test_the_code_of_a_page_with_models_runs(page, folder, eager):
    pages.run(page)


@pytest.mark.parametrize("page", pages.pages(), ids=name_of)
def test_links_lead_to_files(page):
    targets = LINK.findall(CODE.sub("", page.read_text(encoding="utf-8")))
    files = [target for target in targets if ":" not in target]
    assert [target for target in files if not (page.parent / target).exists()] == []


def test_a_page_that_says_what_is_wrong_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n<!-- not run: no such name -->\n```python\ny\n```\n"
        "```python\nprint(x)\n```\n\n```text\n2\n```\n"
    )
    assert [code.prints for code in pages.code(page)] == [None, "2\n"]
    with pytest.raises(AssertionError, match="prints\n1"):
        pages.run(page)


def test_readme_is_short():
    assert len((pages.ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120

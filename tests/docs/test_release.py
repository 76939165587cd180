"""What a release says of itself agrees, and its page has no links that lead nowhere."""

import importlib.util
import re

import pages

import keras_moe

README = (pages.ROOT / "README.md").read_text(encoding="utf-8")
LINKS = re.compile(r"(?<=\]\()[^()\s]+(?=\))")


def page(*args):
    """What setup.py makes of README."""
    spec = importlib.util.spec_from_file_location("setup_py", pages.ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.page(README, *args)


def test_citation_and_changelog_have_the_version():
    citation = (pages.ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (pages.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (version,) = re.findall(r"^version: (.*)$", citation, re.MULTILINE)
    (date,) = re.findall(r"^date-released: (.*)$", citation, re.MULTILINE)
    assert version == keras_moe.__version__
    assert re.findall(r"^## (\d.*)$", changelog, re.MULTILINE)[0] == f"{version} – {date}"


def test_the_page_of_a_release_links_to_addresses_alone():
    assert all(":" in target for target in LINKS.findall(page()))
    assert "![" not in page() and "[CITATION.cff]" in README
    assert "CITATION.cff cites the package" in page()
    assert pages.FENCE.findall(page()) == pages.FENCE.findall(README)


def test_the_page_of_a_release_leads_to_the_repository_where_its_address_is_told():
    found = page("https://example.com/moe", "v1.0")
    assert "(https://example.com/moe/blob/v1.0/docs/limits.md)" in found
    assert "(https://example.com/moe/raw/v1.0/docs/capacity.png)" in found
    assert all(":" in target for target in LINKS.findall(found))
    assert len(LINKS.findall(found)) == len(LINKS.findall(README))

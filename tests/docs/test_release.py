"""What a release says of itself agrees."""

import re

import pages

import keras_moe


def test_the_citation_has_the_version():
    citation = (pages.ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [keras_moe.__version__]

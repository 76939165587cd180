"""An extension of Griffe, which reads docstrings: it meets those of this package halfway."""

import re
import textwrap

import griffe

PARAGRAPHS = re.compile(r"^(Returns|Yields):\n((?:(?: {4}.*)?\n?)+)", re.MULTILINE)


def as_text(match):
    """A section as a title and its text."""
    title, text = match.groups()
    return f"**{title}:**\n\n{textwrap.dedent(text)}"


class Docstrings(griffe.Extension):
    """Gives sections the form that Griffe knows.

    Keras' section "Call arguments" is one of arguments. "Returns" and "Yields" have sentences, not
    a list of types.
    """

    def on_object(self, *, obj, **kwargs):
        """Called for each function, class and module."""
        if obj.docstring:
            text = obj.docstring.value
            text = text.replace("Call arguments:\n", "Other Parameters: Call arguments:\n")
            obj.docstring.value = PARAGRAPHS.sub(as_text, text)

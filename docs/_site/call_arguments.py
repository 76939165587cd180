"""An extension of Griffe, which reads docstrings: Keras' section "Call arguments" is one of arguments."""

import griffe


class CallArguments(griffe.Extension):
    """Gives the section the name of one that Griffe knows, and its own as the title."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = text.replace(
                "Call arguments:\n", "Other Parameters: Call arguments\n"
            )

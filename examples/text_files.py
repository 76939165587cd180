"""Lines of text files in three parts, training, validation and test; and where sentences end."""

import bz2
import gzip
import lzma
import pathlib

import numpy as np

# Regular expressions (RE2). \p{Lu} is a capital letter.
_TITLE = r"Mr|Mrs|Messrs|Ms|Dr|St|Hon|Gen|Lt|Col|Capt|Sgt|Rep|Sen|Gov|Nos?|\p{Lu}"
_END = r"""[.?!]["'”’)]*"""
_BEGIN = r"""["'“‘(]*\p{Lu}"""
# The full stop of an abbreviation or an initial ends no sentence: "Mr. Polk", "U.S. Navy".
ABBREVIATION = rf"\b({_TITLE})\.[ \t]+"
BETWEEN_SENTENCES = rf"({_END})\s+({_BEGIN})"
BETWEEN_LINES = r"\s*\n\s*"

_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_FILE_BLOCKS = 100
_FILE_HELD_OUT = {9: "validation", 19: "test"}  # of every 20 blocks
# The names of given parts: "book.train.txt" has "book.valid.txt" and "book.test.txt" beside it.
_PART_NAMES = {
    "train": (".train.",),
    "validation": (".valid.", ".validation."),
    "test": (".test.",),
}


def read_lines(paths):
    """Reads UTF-8 text files.

    Of a file `NAME.train.txt` the files `NAME.valid.txt` (or `.validation.`) and `NAME.test.txt`
    beside it are what is held out. Of every 20 hundredths of any other file, one is held out for
    validation and one for testing: whole blocks of lines, so that few held-out lines have a
    neighbour in training. Files whose names end in `.gz`, `.bz2` or `.xz` are decompressed.

    Args:
        paths: The files.

    Returns:
        A dict from `"train"`, `"validation"` and `"test"` to lists of strings.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged or not UTF-8, or too short for parts of it to be held out.
    """
    parts = {part: [] for part in _PART_NAMES}
    for path in map(pathlib.Path, paths):
        for part, lines in read_parts(path).items():
            parts[part].extend(lines)
    return parts


def read_parts(path):
    """Returns the lines of each part of one file, as `read_lines` tells."""
    (mark,) = _PART_NAMES["train"]
    if mark in path.name:
        files = {part: _part_beside(path, part) for part in _PART_NAMES}
        parts = {part: _read_lines(file) for part, file in files.items()}
        for part, lines in parts.items():
            if not lines:
                raise ValueError(f"The file must hold text. Received: {str(files[part])!r}")
        return parts
    lines = _read_lines(path)
    if len(lines) < _FILE_BLOCKS:
        raise ValueError(
            f"The text file must have at least {_FILE_BLOCKS} lines of text, a sentence or a "
            f"paragraph on each, for parts of it to be held out. Received: {str(path)!r} with "
            f"{len(lines)}"
        )
    parts = {part: [] for part in _PART_NAMES}
    for i, block in enumerate(np.array_split(np.array(lines, object), _FILE_BLOCKS)):
        parts[_FILE_HELD_OUT.get(i % 20, "train")].extend(block)
    return parts


def _part_beside(path, part):
    """The file of a part, given that of the training part."""
    (mark,) = _PART_NAMES["train"]
    before, after = path.name.rsplit(mark, 1)
    names = [before + name + after for name in _PART_NAMES[part]]
    for name in names:
        if path.with_name(name).is_file():
            return path.with_name(name)
    return path.with_name(names[0])  # It is missing.


def _read_lines(path):
    """Returns the lines of a file that hold more than spaces."""
    if not path.is_file():
        raise FileNotFoundError(f"The text file must exist. Received: {str(path)!r}")
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            lines = file.read().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            "The text file must be UTF-8; `iconv -f ISO-8859-1 -t UTF-8` converts a Latin-1 one. "
            f"Received: {str(path)!r}, byte {error.object[error.start]:#04x} at {error.start}"
        ) from error
    except (EOFError, lzma.LZMAError, OSError) as error:
        raise ValueError(
            "The text file must be readable, whole and compressed as its name says. Received: "
            f"{str(path)!r}: {error}"
        ) from error
    return [line for line in lines if line.strip()]

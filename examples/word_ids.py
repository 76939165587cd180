"""What a word is, and the ids that are no words: what all readers of words share."""

PADDING_ID, UNKNOWN_ID, EOS_ID = range(3)
SPECIAL = ("", "<unk>", "<eos>")  # no words of a text: the tokeniser sets "<" and ">" apart

# Regular expressions (RE2). \p{L} is a letter.
NUMBER = r"\d[\d,.]*\d|\d"
# Words without a space around them: "u.s", "'s", a run of dashes or dots, any other mark.
APART = r"\b\p{L}(?:\.\p{L})+\b|'(?:s|t|d|m|ll|re|ve)\b|[-–—]+|\.+|[^\p{L}\s]"
APOSTROPHE, QUOTE = "[‘’]", "[“”]"


def room_for_words(size):
    """How many of `size` ids can be words, or ValueError if there is no room for any."""
    if size <= len(SPECIAL):
        raise ValueError(
            f"size must be above {len(SPECIAL)}, the number of special ids. Received: {size}"
        )
    return size - len(SPECIAL)


def decode(ids, lookup):
    """Turns ids [B, L], an array, lists or ragged, into B strings, without the padding."""
    vocabulary = lookup.get_vocabulary()
    return [" ".join(vocabulary[i] for i in row if i != PADDING_ID) for row in ids]

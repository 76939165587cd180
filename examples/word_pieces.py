"""Word pieces: parts of words that a vocabulary of fixed size writes any text with.

    pieces = word_pieces.WordPieces(word_pieces.learn(sentences, 8000))
    ids = pieces.tokenize(["Good morning."])                # ragged int32 [sentences, (pieces)]
    strings = pieces.detokenize(ids)                        # the same strings

Both directions are TensorFlow operations, so that an exported model maps strings to strings. Pieces
tell where spaces were and a character without a piece is written as its bytes, so nothing gets lost
but the kind and number of spaces.

SentencePiece learns the vocabulary, by merging the most frequent neighbours (Sennrich et al., 2016,
arXiv:1508.07909): seconds, where the word-piece trainer of tensorflow-text takes half an hour.
Ids: 0 padding, 1 unknown, 2 end of sentence, then words of the user's own, bytes, and pieces from
frequent to rare.
"""

import io
import pathlib
import tempfile
import unicodedata

import sentencepiece
import tensorflow as tf
import tensorflow_text as tf_text
from sentencepiece import sentencepiece_model_pb2
from vocabulary import EOS_ID, PADDING_ID, UNKNOWN_ID

_SPACE = "▁"  # What SentencePiece writes a space as.
_NORMALISATION = "".join(f"{ord(space):X}\t20\n" for space in "\t\n\v\f\r")


def learn(sentences, size, words=(), sample=2_000_000):
    """Learns a vocabulary.

    Args:
        sentences: Strings: those of the training part, sources and targets, as
            `parallel_text.sentences` yields them.
        size: How many ids there are, the special ones included.
        words: Strings that are one piece each wherever they stand as words of their own, such as
            `"<2fr>"`.
        sample: The most sentences to learn from, drawn from all of them.

    Returns:
        The vocabulary as bytes, for `WordPieces`.

    Raises:
        ValueError: The sentences have too few pieces for the size, or too many characters, or are
            none.
    """
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        rules = pathlib.Path(folder, "rules.tsv")
        rules.write_text(_NORMALISATION)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(unicodedata.normalize("NFC", text) for text in sentences),
                model_writer=model,
                model_type="bpe",
                vocab_size=size,
                pad_id=PADDING_ID,
                unk_id=UNKNOWN_ID,
                unk_surface="",
                eos_id=EOS_ID,
                bos_id=-1,
                user_defined_symbols=[_SPACE + word for word in words],
                normalization_rule_tsv=str(rules),
                byte_fallback=True,
                input_sentence_size=sample,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(
                "There must be sentences, and a size between the number of their characters and "
                f"that of their possible pieces. Received: size={size}; SentencePiece says {error}"
            ) from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.ClearField("normalization_rule_tsv")  # the path of a file that is gone
    return proto.SerializeToString(deterministic=True)


class WordPieces:
    """Turns strings into ids and back.

    Args:
        model: The vocabulary, bytes that `learn` returned.

    Attributes:
        size: How many ids there are.
    """

    def __init__(self, model):
        self._model = model
        self.size = int(self._tokenizer.vocab_size())

    @property
    def _tokenizer(self):
        # Anew for each graph: what it holds dies with the kernel that made it, as in
        # `tf.random.set_seed` (https://github.com/tensorflow/text/issues/570).
        return tf_text.SentencepieceTokenizer(self._model)

    def tokenize(self, strings):
        """Turns strings [B] into their ids, an int32 `tf.RaggedTensor` [B, (L)] without ends."""
        return self._tokenizer.tokenize(tf_text.normalize_utf8(strings, "NFC"))

    def detokenize(self, ids):
        """Turns ids [B, L], ragged or padded, into strings [B]. Ends are left out."""
        return self._tokenizer.detokenize(ids)

    def text(self, ids):
        """A list of ids as a string. What is cut off within a character shows as �."""
        return self.detokenize(tf.constant([ids], tf.int32)).numpy()[0].decode(errors="replace")

    def names(self, ids):
        """The pieces of a list of ids as strings, for pictures."""
        return [
            piece.decode().replace(_SPACE, " ").strip() or " "
            for piece in self._tokenizer.id_to_string(tf.constant(ids, tf.int32)).numpy()
        ]

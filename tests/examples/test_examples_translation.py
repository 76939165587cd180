"""The example that trains translation models, from strings to an export that maps strings."""

import json
import pathlib
import subprocess
import sys

import c_api
import django_catalogs
import keras
import numpy as np
import parallel_text
import pytest
import tensorflow as tf
import tensorflow_text
import translating
import translation
import word_pieces
from translating import Translator
from vocabulary import EOS_ID

import keras_moe
from keras_moe.backend.tensorflow import devices
from keras_moe.models import TranslationModel


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pairs of two languages, 120 each."""
    folder = tmp_path_factory.mktemp("pairs")
    paths = []
    for language in ("de", "fr"):
        lines = ["\t".join(pair) for pair in django_catalogs.messages(language)[:120]]
        paths.append(folder / f"en-{language}.tsv")
        paths[-1].write_text("\n".join(lines), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def ran(files, tmp_path_factory):
    """The command line, the tables and what was printed."""
    folder = tmp_path_factory.mktemp("run")
    options = {
        "vocabulary-size": 600,
        "width": 8,
        "num-experts": 4,
        "words-per-batch": 1024,
        "epochs": 2,
        "evaluations": 2,
        "warm-up": 2,
        "beam-width": 2,
        "output": folder / "pictures",
        "export": folder / "exports",
    }
    command = ["--data", *files]
    for name, value in options.items():
        command += [f"--{name}", value]
    args = translation.parse_arguments(list(map(str, command)))
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *parts, **_: printed.extend(map(str, parts)))
        with devices.choosing(0):  # The export has no way for GPUs, which takes long to trace.
            results = translation.main(args)
    return args, results, "\n".join(printed)


def test_all_models_and_pairs_are_measured(ran):
    _, results, printed = ran
    assert list(results) == ["en-de", "en-fr"]
    for rows in results.values():
        assert list(rows) == ["MoE-32", "no-experts"]
        for name, row in rows.items():
            assert 1 < row["perplexity"] < 600  # less than that of a guess at 600 word pieces
            assert 0 <= row["BLEU"] <= 100
            for part in ("encoder", "decoder"):
                load = row[f"max/mean load, {part}"]
                assert load is None if name == "no-experts" else load >= 1
        assert rows["MoE-32"]["parameters"] > rows["no-experts"]["parameters"]
    assert "<2de>" in printed and "<2fr>" in printed and "reference" in printed


def test_pictures_are_drawn(ran):
    args, _, _ = ran
    for name in ("perplexity", "attention"):
        picture = tf.io.decode_png((args.output / f"{name}.png").read_bytes())
        assert len(np.unique(picture)) > 10


def test_the_export_translates_strings_without_keras_moe(ran):
    args, _, _ = ran
    expected = json.loads((args.output / "expected.json").read_text(encoding="utf-8"))
    assert len(expected) == 12  # of each pair: lines 19, 39, ... of a hundred blocks, six in all
    (sentence, translation_found), *_ = expected.items()
    wrong = args.output / "wrong.json"
    wrong.write_text(json.dumps({"": "something else"}), encoding="utf-8")
    script = translation.ROOT / "examples" / "translate.py"
    command = [sys.executable, script, args.export / "1", sentence, "--expected", wrong]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.stdout.startswith(f"  {sentence} … {translation_found}\n   … ")
    assert "    expected: something else\n1 translations, 1 other than" in answer.stdout
    assert "does not translate as the trained one did" in answer.stderr
    assert answer.returncode == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--presets", "MoE-33"], "one of no-experts, MoE-32.*Received: 'MoE-33'"),
        (["--pairs", "en-xx"], "one of the dataset. Received: 'en-xx'"),
    ],
)
def test_what_there_is_not_is_refused_before_training(tmp_path, arguments, message):
    args = translation.parse_arguments([*arguments, "--width", "8", "--export", str(tmp_path)])
    with pytest.raises(ValueError, match=message):
        translation.main(args)


# Translating


@pytest.fixture(scope="module")
def pieces(files):
    corpora = parallel_text.load_files(files[:1])
    return word_pieces.WordPieces(word_pieces.learn(parallel_text.sentences(corpora), 600))


@pytest.fixture(scope="module")
def model(pieces):
    """An untrained model whose translations depend on the source."""
    model = TranslationModel(pieces.size, 8, lstm_units=8, seed=0)
    model.build((None, None))
    random = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(random.normal(size=weight.shape))
    return model


def test_translations_are_in_the_order_of_the_sources(model, pieces):
    texts = ["Yes", "a much longer sentence than the others are", "No", "", "Add another", "Yes"]
    sources = tf.concat([pieces.tokenize(texts), tf.fill([6, 1], EOS_ID)], axis=1)
    # A batch each for the longest and for the others, against one of its own for each.
    translator = Translator(model, pieces, beam_width=2, max_length=8)
    together = translator.translate_all(sources, 40)
    alone = [translator.translate(sources[i : i + 1].to_tensor())[0][0] for i in range(6)]
    assert together == [string.numpy().decode() for string in alone]
    assert len(set(together)) > 2 and together[0] == together[-1]


def test_the_signature_cuts_what_is_too_long(model, pieces):
    translator = Translator(model, pieces, beam_width=1, max_length=4)
    serve, _ = translator.signatures()["serving_default"]
    longest = "漢" * 84 + "Ж"  # a space, then the bytes of characters without a piece: three, two
    assert len(pieces.tokenize([longest]).to_list()[0]) == translating.MAX_PIECES - 1
    answers = serve(tf.constant([longest, longest + "Yes", "Yes"]))
    first, second, _ = answers["translations"].numpy()
    assert first == second
    assert answers["scores"][0] == answers["scores"][1] != answers["scores"][2]


def test_the_c_api_translates(model, pieces, program, tmp_path):
    translator = Translator(model, pieces, beam_width=2, max_length=8)
    signatures = translator.signatures()
    serve, _ = signatures["serving_default"]
    path = keras_moe.export_saved_model(model, tmp_path, signatures=signatures)
    operations = pathlib.Path(tensorflow_text.__file__).parent / "python" / "ops"
    libraries = [
        operations / f"_{name}.so" for name in ("normalize_ops", "sentencepiece_tokenizer")
    ]
    server = c_api.Server(program, path, libraries)
    texts = ["Yes", "a much longer sentence than the others are", "", "漢Ж", "Add another"]
    for batch in (1, 7, 64):
        sentences = np.array([texts[i % 5].encode() for i in range(batch)], object)
        answer = server.ask("serving_default", sentences=sentences)
        expected = serve(tf.constant(sentences))
        np.testing.assert_array_equal(answer["translations"], expected["translations"].numpy())
        np.testing.assert_allclose(answer["scores"], expected["scores"], rtol=1e-5)
    alone = answer  # of which the first is "Yes"
    for hostile in (b"\xff\xfe \xc3\x28", b"x" * 2**20, b"\x00" * 1000):
        both = server.ask("serving_default", sentences=np.array([hostile, b"Yes"], object))
        assert both["translations"][1] == alone["translations"][0]
        np.testing.assert_allclose(both["scores"][1], alone["scores"][0], rtol=1e-6)
    code, _ = server.ask("serving_default", sentences=np.zeros([2], "int32"))
    assert code == 3  # INVALID_ARGUMENT
    empty = server.ask("serving_default", sentences=np.zeros([0], object))
    assert empty["translations"].shape == empty["scores"].shape == (0,)
    assert server.close() == 0


def test_attention_is_that_of_the_search(model, pieces):
    source, words = [7, 300, 410, EOS_ID], [12, 500, EOS_ID]
    weights = translating.attention(model, source, words)
    assert weights.shape == (3, 4)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    # Step by step: what the decoder reads, the end first.
    encoded = model.encode(tf.constant([source]))
    memory = model.attention_lstm.attention.remember(encoded)
    states = model.attention_lstm.initial_states(1, 1)
    for row, word in zip(weights, [EOS_ID, *words[:-1]], strict=True):
        x = model.target_embedding(tf.constant([[word]]))
        _, states, attention = model.attention_lstm.step(x, states, memory)
        np.testing.assert_allclose(row, attention[0, 0], rtol=1e-4, atol=1e-6)


def test_wide_experts_may_learn_at_a_lower_rate():
    made = translation.make_optimizer(translation.parse_arguments([]))
    assert type(made) is keras.optimizers.Adam
    args = translation.parse_arguments(["--full-rate-inputs", "256"])
    assert translation.make_optimizer(args).full_rate_inputs == 256


def test_a_wrong_number_of_inputs_is_refused_before_the_pairs_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(translation, "read_pairs", lambda args: pytest.fail("too late"))
    options = ["--full-rate-inputs", "-1", "--export", str(tmp_path)]
    with pytest.raises(ValueError, match="at least 1. Received: -1"):
        translation.main(translation.parse_arguments(options))

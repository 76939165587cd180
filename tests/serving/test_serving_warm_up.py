"""`export_saved_model`: the warm-up requests in an export."""

import sys

import keras
import pytest
import tensorflow as tf
from exports import TOKENS
from tensorflow_serving.apis import prediction_log_pb2

import keras_moe


@pytest.fixture
def model():
    """A model that is soon exported."""
    return keras.Sequential([keras.Input((None,), dtype="int32"), keras.layers.Embedding(9, 2)])


def test_warm_up_requests_are_answered_and_stored(model, tmp_path):
    signatures = {"serving_default": (model, [TOKENS]), "same": (model, [TOKENS])}
    requests = {"serving_default": {"tokens": [[1, 2]]}, "same": [{"tokens": [[3]]}] * 2}
    path = keras_moe.export_saved_model(model, tmp_path, signatures=signatures, warm_up=requests)
    served = tf.saved_model.load(path)
    file = path / "assets.extra" / "tf_serving_warmup_requests"
    records = [*tf.data.TFRecordDataset(str(file)).as_numpy_iterator()]
    names = []
    for record in records:
        request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
        names.append(request.model_spec.signature_name)
        inputs = {key: tf.make_ndarray(value) for key, value in request.inputs.items()}
        assert inputs["tokens"].dtype == "int32"
        served.signatures[names[-1]](**{k: tf.constant(v) for k, v in inputs.items()})
    assert names == ["serving_default", "same", "same"]


def test_warm_up_without_its_package_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    signatures = {"serving_default": (model, [TOKENS])}
    with pytest.raises(ImportError, match=r"pip install keras_moe\[serving\]"):
        keras_moe.export_saved_model(
            model,
            tmp_path,
            signatures=signatures,
            warm_up={"serving_default": {"tokens": [[1]]}},
        )
    keras_moe.export_saved_model(model, tmp_path, signatures=signatures)

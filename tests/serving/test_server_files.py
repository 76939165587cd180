"""The settings of a server that stand beside the exports."""

import os

import keras
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

import keras_moe
from keras_moe.serving import server_files


def message_type(name, **fields):
    """A protocol buffer with those fields of TensorFlow Serving's that the files set.

    Its package for Python has neither of the two. Fields are boolean, strings, or messages of
    other fields.
    """
    file = descriptor_pb2.FileDescriptorProto(name=f"{name}.proto", package=name, syntax="proto3")

    def add(message, name, fields):
        message.name = name
        for number, (field, kind) in enumerate(fields.items(), start=1):
            type_name = None
            if isinstance(kind, dict):
                add(message.nested_type.add(), field.title(), kind)
                type_name, kind = field.title(), "MESSAGE"
            kind = getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{kind}")
            message.field.add(name=field, number=number, label=1, type=kind, type_name=type_name)

    add(file.message_type.add(), "Message", fields)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{name}.Message"))


NUMBER = {"value": "INT64"}
BATCHING = message_type(
    "batching",
    max_batch_size=NUMBER,
    batch_timeout_micros=NUMBER,
    max_enqueued_batches=NUMBER,
    num_batch_threads=NUMBER,
    pad_variable_length_inputs="BOOL",
)
MONITORING = message_type("monitoring", prometheus_config={"enable": "BOOL", "path": "STRING"})


def test_files_are_written_on_request_and_not_over_those_of_an_operator(tmp_path):
    model = keras.Sequential([keras.Input((2,), name="x"), keras.layers.Dense(1)])
    keras_moe.export_saved_model(model, tmp_path)
    assert os.listdir(tmp_path) == ["1"]
    (tmp_path / "monitoring_config.txt").write_text("mine")
    keras_moe.export_saved_model(model, tmp_path, server_files=True)
    assert sorted(os.listdir(tmp_path)) == [
        "1",
        "2",
        "batching_parameters.txt",
        "monitoring_config.txt",
    ]
    assert (tmp_path / "monitoring_config.txt").read_text() == "mine"
    text = (tmp_path / "batching_parameters.txt").read_text()
    assert text == server_files.FILES["batching_parameters.txt"]
    assert os.stat(tmp_path / "batching_parameters.txt").st_mode & 0o444 == 0o444


def test_a_server_can_read_the_files():
    batching = text_format.Parse(server_files.FILES["batching_parameters.txt"], BATCHING())
    assert batching.pad_variable_length_inputs
    assert batching.max_batch_size.value == 64 and batching.max_enqueued_batches.value == 100
    monitoring = text_format.Parse(server_files.FILES["monitoring_config.txt"], MONITORING())
    assert monitoring.prometheus_config.enable

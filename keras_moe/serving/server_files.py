"""Settings of TensorFlow Serving beside the versions of a model: where to begin."""

import pathlib
import tempfile

# Text of protocol buffers: tensorflow.serving.BatchingParameters, and MonitoringConfig.
FILES = {
    "batching_parameters.txt": """\
# --enable_batching --batching_parameters_file=THIS_FILE
# Rows of a batch. A request with more is refused.
max_batch_size { value: 64 }
# How long a request waits for others. 0: only while all threads are busy.
batch_timeout_micros { value: 1000 }
# How many batches wait, of each signature, before requests are refused as UNAVAILABLE.
max_enqueued_batches { value: 100 }
# Batches at the same time. Default: as many as the server has cores.
# num_batch_threads { value: 4 }
# Requests of different lengths share a batch; the shorter ones are padded with their own first
# entry. Right for signatures with `lengths` and for strings, and wrong for all others.
pad_variable_length_inputs: true
""",
    "monitoring_config.txt": """\
# --monitoring_config_file=THIS_FILE, on the port of --rest_api_port
prometheus_config {
  enable: true
  path: "/monitoring/prometheus/metrics"
}
""",
}


def write_missing(path):
    """Writes those files that the folder of a model lacks; what an operator has set is kept."""
    for name, text in FILES.items():
        target = pathlib.Path(path, name)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path) as folder:
            whole = pathlib.Path(folder, name)
            whole.write_text(text, encoding="utf-8")
            try:
                target.hardlink_to(whole)  # Complete as soon as it is there; fails if it is.
            except FileExistsError:
                pass

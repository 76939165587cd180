"""What the examples print while they train."""

import pytest
import report


@pytest.mark.parametrize(
    "loads, printed",
    [
        ({}, "MoE-3   12.0  MoE-32    5.0\n"),
        ({"MoE-3": 1.5, "MoE-32": 2.5}, "MoE-32    5.0  max/mean load 1.50\n"),
        (
            {"MoE-3_decoder_moe": 8.0, "MoE-3_encoder_moe": 1.25, "MoE-32_encoder_moe": 2.5},
            "MoE-32    5.0  max/mean load decoder_moe: 8.00, encoder_moe: 1.25\n",
        ),
        ({"MoE-3_1": 1.5, "MoE-3_11": 2.0}, "MoE-32    5.0  max/mean load 1: 1.50, 11: 2.00\n"),
    ],
    ids=["no mixtures", "one", "encoder and decoder", "blocks"],
)
def test_progress_shows_the_loads_of_the_first_model(capsys, loads, printed):
    progress = report.Progress(["MoE-3", "MoE-32"], steps=100)
    progress.on_train_begin()
    logs = {"val_MoE-3/perplexity": 12.0, "val_MoE-32/perplexity": 5.0}
    logs |= {f"val_{name}/max_over_mean_load": load for name, load in loads.items()}
    logs |= {f"{name}/max_over_mean_load": 9.0 for name in loads}  # those of the training
    logs |= {f"val_{name}/cv_load": 7.0 for name in loads}
    progress.on_epoch_end(0, logs)
    assert capsys.readouterr().out.endswith(printed)

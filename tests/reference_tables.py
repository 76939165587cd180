"""What the paper prints of its language models: Tables 7 and 8."""

# Printed: ops/timestep and parameters, both in millions, both without embedding and softmax.
PRINTED_7 = {
    "LSTM-2048-512": (9.4, 9.4),
    "4xLSTM-512": (8.4, 8.4),
    "MoE-1-Wide": (8.4, 8.4),
    "MoE-1-Deep": (8.4, 8.4),
    "MoE-4": (8.4, 8.4),
    "MoE-32": (8.4, 37.8),
    "MoE-256": (8.65, 272.9),  # The paper prints 8.6, cut off: 8,650,752.
    "MoE-256-h": (8.4, 272.9),
    "MoE-1024-h": (8.5, 1079.0),
    "MoE-4096-h": (8.9, 4303.4),
    "MoE-34M": (33.8, 4313.9),
    "MoE-143M": (142.7, 4371.1),
}
PRINTED_8 = {
    "4xLSTM-512": (8.4, 8.4),
    "MoE-32": (8.4, 37.8),
    "MoE-256-h": (8.4, 272.9),
    "MoE-1024-h": (8.5, 1079.0),
    "MoE-4096-h": (8.6, 4303.4),
    "MoE-16384-h": (8.8, 17201.0),
    "MoE-65536-h": (9.2, 68791.0),
    "MoE-131072-h": (9.7, 137577.6),
}

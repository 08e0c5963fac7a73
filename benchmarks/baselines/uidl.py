"""UIDL: remove blocks, then train adapters on all MLPs (Gromov et al., arXiv 2403.17887)."""

from __future__ import annotations

from streamline_hooks import CompressionConfig, DistillationConfig, HealingConfig
from streamline_hooks.pipeline import Preset
from streamline_hooks.repair import NoneConfig

MLP_LAYERS = (
    "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "w1", "w2", "mlp.c_fc", "mlp.c_proj",
    "dense_h_to_4h", "dense_4h_to_h",
)  # fmt: skip

PRESET = Preset(
    "uidl",
    CompressionConfig(
        repair=NoneConfig(),
        distillation=DistillationConfig(
            loss={"lm": 1.0},
            learning_rate=3e-4,
            weight_decay=0.0,
            betas=(0.9, 0.999),
            warmup_ratio=0.02,
            min_lr_ratio=0.0,
            max_grad_norm=1.0,
        ),
        healing=HealingConfig(method="lora", where="all", rank=64, alpha=64.0, dropout=0.05, targets=MLP_LAYERS),
    ),
    "Gromov et al., arXiv 2403.17887, A.1 and B.3: plain removal, then adapters on the MLPs of all blocks, trained "
    "by the LM loss. The paper uses batches of 16 sequences, 100 warm-up steps of 5,000, and blocks in 4 bits; this "
    "preset does not quantize.",
)

"""Recommended and published configs by name."""

from __future__ import annotations

from dataclasses import dataclass

from streamline_hooks.core.config import Registry
from streamline_hooks.pipeline.config import CompressionConfig, DataConfig
from streamline_hooks.repair import (
    BlockConfig,
    DistillationConfig,
    FeedForwardConfig,
    HealingConfig,
    LinearConfig,
    NoneConfig,
    SwiGLUConfig,
)
from streamline_hooks.selection import DisjointSearch


@dataclass(frozen=True)
class Preset:
    """A config under a name.

    Attributes
    ----------
    name : str
    config : CompressionConfig
        How many sequences are run at a time, and so how many steps are made, is not part of a recipe: set
        ``hardware=HardwareConfig(batch_size=...)``.
    source : str
        The paper and repository it comes from, and what differs here.
    """

    name: str
    config: CompressionConfig
    source: str


_DISTILLATION = DistillationConfig(
    loss={"kl": 1.0, "lm": 1.0}, learning_rate=1e-3, weight_decay=0.01, warmup_ratio=0.05, min_lr_ratio=0.05
)
_HEALING = HealingConfig(method="partial", where="after", learning_rate_ratio=0.2)
_BEST = CompressionConfig(
    repair=SwiGLUConfig(), distillation=_DISTILLATION, healing=_HEALING, data=DataConfig(repeated=1.0)
)

PRESETS: Registry[Preset] = Registry("preset", "PRESETS.add(name, Preset(...))")
"""All presets by name."""

for _preset in (
    Preset(
        "best",
        _BEST,
        "This library's own, the best repair in benchmarks/results/quality.md: a SwiGLU beside the least-squares map, "
        "and the blocks behind it trained at a fifth of the learning rate at the same time. With the tokens divided "
        "between the two, one after the other, it ends further from the original (KL 0.53 and 0.54 against 0.51 on "
        "validation text, 8 of 30 blocks removed). It learns the original's logits and the text itself; by the logits "
        "alone it ends further too (0.63 against 0.52 on held-out text). Blocks are chosen on text that repeats each "
        "passage, because the blocks that prose needs least are those that copy "
        "(benchmarks/results/quality_generation.md). If the text is unlike what the model is for, train the "
        "replacement alone by KL, which does not adapt the model to the text: SwiGLUConfig() with loss={'kl': 1.0}.",
    ),
    Preset(
        "two-windows",
        CompressionConfig(
            repair=LinearConfig(),
            search=DisjointSearch(criterion="cosine_and_magnitude"),
            distillation=_DISTILLATION,
            healing=_HEALING,
            data=_BEST.data,
        ),
        "This library's own, for models that must copy from their context (benchmarks/results/quality_generation.md): "
        "two windows with blocks between them, which cost less of that than one of their total length. Each is "
        "replaced by its least-squares map, beside which a network learned nothing more; training and healing as in "
        "`best`.",
    ),
    Preset(
        "iterative",
        CompressionConfig(repair=_BEST.repair, distillation=_DISTILLATION, healing=_HEALING, data=_BEST.data, rounds=2),
        "IteRABRe, arXiv 2503.06291: remove a little, train, rank again on the repaired model. Here two rounds of "
        "`best`, which share its text, with the original as the teacher of both.",
    ),
    Preset("none", CompressionConfig(repair=NoneConfig()), "Plain removal."),
    Preset(
        "llm-streamline-ffn",
        CompressionConfig(
            repair=FeedForwardConfig(),
            distillation=DistillationConfig(
                loss={"mse": 1.0},
                learning_rate=2e-4,
                weight_decay=1e-3,
                betas=(0.9, 0.95),
                warmup_ratio=0.03,
                min_lr_ratio=0.025,
                max_grad_norm=1.0,
            ),
        ),
        "LLM-Streamline, arXiv 2403.19135; RUCKBReasoning/LLM-Streamline, examples/"
        "mlp_mseloss_train_without_memory_issue: d to 4d to d with ReLU and biases, no residual path, random initial "
        "weights, MSE of the hidden states. Its batches hold 128 sequences of 2,048 tokens and more; its weight decay "
        "includes biases.",
    ),
    Preset(
        "llm-streamline-layer",
        CompressionConfig(
            repair=BlockConfig(solve=False),
            distillation=DistillationConfig(
                loss={"mse": 1.0},
                learning_rate=2e-4,
                weight_decay=1e-3,
                betas=(0.9, 0.999),
                warmup_ratio=0.01,
                min_lr_ratio=0.25,
                max_grad_norm=5.0,
            ),
        ),
        "LLM-Streamline, arXiv 2403.19135; RUCKBReasoning/LLM-Streamline, LLM_Streamline/train_lightweightnetwork.py: "
        "an unchanged copy of the window's first block, trained by the MSE of the hidden states. Its batches hold 128 "
        "sequences of 2,048 tokens. Its script runs the block without a causal mask during training; here it has one.",
    ),
):
    PRESETS.add(_preset.name, _preset)

"""Define the presets: recommended and published configs by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from streamline_hooks.core import Registry
from streamline_hooks.distillation import DistillationConfig, HealingConfig
from streamline_hooks.pipeline.config import CompressionConfig, DataConfig
from streamline_hooks.repair import BlockConfig, FeedForwardConfig, LinearConfig, NoneConfig, SwiGLUConfig
from streamline_hooks.selection import DisjointSearch


@dataclass(frozen=True)
class Preset:
    """A named config and its source.

    Attributes
    ----------
    name : str
    config : CompressionConfig
        The batch size, and so the number of training steps, is not part of a preset: set
        ``hardware=HardwareConfig(batch_size=...)``.
    source : str
        The paper and repository of the preset, and the differences from them.

    Examples
    --------
    >>> from streamline_hooks.pipeline import PRESETS
    >>> PRESETS["none"].source
    'Plain removal.'
    """

    name: str
    config: CompressionConfig
    source: str


_DISTILLATION = DistillationConfig(
    loss={"kl": 1.0, "lm": 1.0}, learning_rate=1e-3, weight_decay=0.01, warmup_ratio=0.05, min_lr_ratio=0.05
)
_HEALING = HealingConfig(method="partial", where="after", learning_rate_ratio=0.2)
_BEST = CompressionConfig(
    repair=SwiGLUConfig(), distillation=_DISTILLATION, healing=_HEALING, data=DataConfig(repeated_context=1.0)
)

PRESETS: Registry[Preset] = Registry("preset", "PRESETS.add(name, Preset(...))")
"""All presets by name."""

for _preset in (
    Preset(
        "best",
        _BEST,
        "The best repair of this library in benchmarks/results/retained_quality.md: a SwiGLU network parallel to the "
        "least-squares map, trained on the original's logits and on the text, together with the blocks after it at a "
        "fifth of the learning rate. Blocks are ranked on text that repeats each passage, because ranking on prose "
        "selects the blocks that copy (benchmarks/results/quality_generation.md). If the text differs from the "
        "intended use of the model, train the replacement alone by KL, which does not adapt the model to the text: "
        "SwiGLUConfig() with loss={'kl': 1.0}.",
    ),
    Preset(
        "best-plain",
        replace(_BEST, repair=BlockConfig()),
        "`best` with an inherited block instead of the SwiGLU, so that the result has the original architecture and "
        "every engine serves it. It removes one block more and keeps the first block of the window, trained with the "
        "blocks after it. It retains less generation than `best` (benchmarks/results/retained_quality.md).",
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
        "A preset of this library for models that must copy from their context "
        "(benchmarks/results/quality_generation.md): two separate windows, which reduce copying less than one window "
        "of the same total length. Each window is replaced by its least-squares map, because an additional network did "
        "not improve it. Training and healing as in `best`.",
    ),
    Preset(
        "iterative",
        CompressionConfig(repair=_BEST.repair, distillation=_DISTILLATION, healing=_HEALING, data=_BEST.data, rounds=2),
        "IteRABRe, arXiv 2503.06291: remove a few blocks, train, and rank the repaired model again. Here two rounds of "
        "`best` that divide its text; the original is the teacher in both.",
    ),
    Preset("none", CompressionConfig(repair=NoneConfig()), "Plain removal."),
    Preset(
        "llm-streamline-ffn",
        CompressionConfig(
            repair=FeedForwardConfig(),
            distillation=DistillationConfig(
                loss={"mse": 1.0},
                learning_rate=2e-4,
                scale_parameter=False,
                weight_decay=1e-3,
                betas=(0.9, 0.95),
                warmup_ratio=0.03,
                min_lr_ratio=0.025,
                max_grad_norm=1.0,
            ),
        ),
        "LLM-Streamline, arXiv 2403.19135; RUCKBReasoning/LLM-Streamline, examples/"
        "mlp_mseloss_train_without_memory_issue: d to 4d to d with ReLU and biases, no residual path, random initial "
        "weights, MSE of the hidden states. There, a batch has 128 or more sequences of 2,048 tokens, and weight decay "
        "includes biases.",
    ),
    Preset(
        "llm-streamline-layer",
        CompressionConfig(
            repair=BlockConfig(solve=False),
            distillation=DistillationConfig(
                loss={"mse": 1.0},
                learning_rate=2e-4,
                scale_parameter=False,
                weight_decay=1e-3,
                betas=(0.9, 0.999),
                warmup_ratio=0.01,
                min_lr_ratio=0.25,
                max_grad_norm=5.0,
            ),
        ),
        "LLM-Streamline, arXiv 2403.19135; RUCKBReasoning/LLM-Streamline, LLM_Streamline/train_lightweightnetwork.py: "
        "a copy of the window's first block, trained by the MSE of the hidden states. There, a batch has 128 sequences "
        "of 2,048 tokens, and the block is trained without a causal mask; here it is trained with the mask.",
    ),
):
    PRESETS.add(_preset.name, _preset)

"""Presets do what their papers say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from streamline_hooks import CompressionConfig, StreamlineError
from streamline_hooks.pipeline.presets import PRESETS
from streamline_hooks.repair.healing import healing_copies
from streamline_hooks.stack import find_stack
from streamline_hooks.testing import tiny_model

# From benchmarks/results/quality_generation.md, and from the papers and repositories that the presets name: loss, rate,
# decay, betas, warm-up, last rate, clip.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "best": ("kl + lm", 1e-3, 0.01, (0.9, 0.95), 0.05, 5e-5, 1.0),
    "two-windows": ("kl + lm", 1e-3, 0.01, (0.9, 0.95), 0.05, 5e-5, 1.0),
    "llm-streamline-ffn": ("mse", 2e-4, 1e-3, (0.9, 0.95), 0.03, 5e-6, 1.0),
    "llm-streamline-layer": ("mse", 2e-4, 1e-3, (0.9, 0.999), 0.01, 5e-5, 5.0),
    "uidl": ("lm", 3e-4, 0.0, (0.9, 0.999), 100 / 5000, 0.0, 1.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_trained_is_trained_as_published(name: str) -> None:
    distillation = PRESETS[name].config.distillation
    assert distillation is not None
    found = (
        str(distillation.objective),
        distillation.learning_rate,
        distillation.weight_decay,
        distillation.betas,
        distillation.warmup_ratio,
        pytest.approx(distillation.min_lr_ratio * distillation.learning_rate),
        distillation.max_grad_norm,
    )
    assert PUBLISHED[name] == found


def test_iterative_is_the_best_in_two_rounds() -> None:
    best, found = CompressionConfig.preset("best"), CompressionConfig.preset("iterative")
    assert (best.rounds, found.rounds) == (1, 2)
    assert replace(best, rounds=2) == found


@pytest.mark.parametrize("name", PRESETS)
def test_published_methods_search_for_one_window(name: str) -> None:
    """And what stands in one table with them."""
    config = PRESETS[name].config
    found = (config.search.kind, config.search.resolved_criterion.name, config.data.repeated)
    ours = {
        "two-windows": ("disjoint", "cosine_and_magnitude", 1.0),
        **dict.fromkeys(("best", "iterative"), ("window", "cosine_and_magnitude", 1.0)),
    }
    assert found == ours.get(name, ("window", "cosine_and_magnitude", 0.0))


@pytest.mark.parametrize("name", sorted(set(PRESETS) - set(PUBLISHED) - {"iterative"}))
def test_the_others_train_nothing(name: str) -> None:
    assert PRESETS[name].config.distillation is None
    assert PRESETS[name].config.healing is None


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_name_and_a_source(name: str) -> None:
    preset = PRESETS[name]
    assert preset.name == name
    assert "arXiv" in preset.source or name in ("none", "best", "two-windows")


@pytest.mark.parametrize(("type_", "layers"), [("llama", 3), ("gpt2", 2), ("opt", 2), ("gpt_neox", 2)])
def test_uidl_puts_adapters_of_rank_64_on_the_mlps_alone(type_: str, layers: int) -> None:
    healing = PRESETS["uidl"].config.healing
    assert healing is not None
    copies, _ = healing_copies(find_stack(tiny_model(type_)), [range(2, 4)], healing)
    adapters = {n.split(".lora_")[0]: p for n, p in copies[0].named_parameters() if p.requires_grad and ".lora_A" in n}
    assert len(adapters) == layers
    assert not any("attn" in name or "attention" in name for name in adapters)
    assert {p.shape[0] for p in adapters.values()} == {64}


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(StreamlineError, match=r"'bets'.*Expected one of best, two-windows.*Did you mean 'best'"):
        CompressionConfig.preset("bets")

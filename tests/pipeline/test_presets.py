"""Presets do what their papers say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from streamline_hooks import CompressionConfig
from streamline_hooks.pipeline.presets import PRESETS
from tests.processes import in_a_new_process

# From benchmarks/results/quality_generation.md, and from the papers and repositories that the presets name: loss, rate,
# decay, betas, warm-up, last rate, clip.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "best": ("kl + lm", 1e-3, 0.01, (0.9, 0.95), 0.05, 5e-5, 1.0),
    "two-windows": ("kl + lm", 1e-3, 0.01, (0.9, 0.95), 0.05, 5e-5, 1.0),
    "llm-streamline-ffn": ("mse", 2e-4, 1e-3, (0.9, 0.95), 0.03, 5e-6, 1.0),
    "llm-streamline-layer": ("mse", 2e-4, 1e-3, (0.9, 0.999), 0.01, 5e-5, 5.0),
}
NAMES = (*PUBLISHED, "iterative", "none")
"""The library's own presets: other tests may add more."""


def test_the_library_has_these_presets() -> None:
    code = "from streamline_hooks.pipeline import PRESETS; print(*PRESETS)"
    assert sorted(in_a_new_process(code).stdout.split()) == sorted(NAMES)


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


@pytest.mark.parametrize("name", NAMES)
def test_published_methods_search_for_one_window(name: str) -> None:
    """And what stands in one table with them."""
    config = PRESETS[name].config
    found = (config.search.kind, config.search.resolved_criterion.name, config.data.repeated_context)
    ours = {
        "two-windows": ("disjoint", "cosine_and_magnitude", 1.0),
        **dict.fromkeys(("best", "iterative"), ("window", "cosine_and_magnitude", 1.0)),
    }
    assert found == ours.get(name, ("window", "cosine_and_magnitude", 0.0))


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_has_its_name_and_a_source(name: str) -> None:
    preset = PRESETS[name]
    assert preset.name == name
    assert "arXiv" in preset.source or name in ("none", "best", "two-windows")

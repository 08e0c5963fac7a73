"""Presets do what their papers say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import CompressionConfig, DataConfig, compress
from streamline_hooks.pipeline.presets import PRESETS
from streamline_hooks.repair import BlockConfig
from streamline_hooks.testing import tiny_model
from tests.processes import in_a_new_process

# From benchmarks/results/quality_generation.md, and from the papers and repositories that the presets name: loss, rate,
# decay, betas, warm-up, last rate, clip.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "best": ("kl + lm", 1e-3, 0.01, (0.9, 0.95), 0.05, 5e-5, 1.0),
    "best-plain": ("kl + lm", 1e-3, 0.01, (0.9, 0.95), 0.05, 5e-5, 1.0),
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


@pytest.mark.parametrize(("name", "is_scaled"), [(name, not name.startswith("llm-streamline")) for name in PUBLISHED])
def test_published_rates_are_not_scaled(name: str, is_scaled: bool) -> None:
    distillation = PRESETS[name].config.distillation
    assert distillation is not None
    assert distillation.scale_parameter == is_scaled


def test_iterative_is_the_best_in_two_rounds() -> None:
    best, found = CompressionConfig.preset("best"), CompressionConfig.preset("iterative")
    assert (best.rounds, found.rounds) == (1, 2)
    assert replace(best, rounds=2) == found


def test_best_plain_is_the_best_in_the_original_architecture(tmp_path: Path) -> None:
    best, plain = (CompressionConfig.preset(name, remove=2) for name in ("best", "best-plain"))
    assert plain.repair == BlockConfig() and replace(best, repair=BlockConfig()) == plain
    model, rows = tiny_model("llama", blocks=6), torch.arange(3, 35).repeat(12, 1) + torch.arange(12)[:, None]
    data = {"calibration": [*rows[:8].split(2)], "validation": [rows[8:10]], "test": [rows[10:]]}
    compress(model, data, replace(plain, data=DataConfig()), output=tmp_path / "small")
    saved = type(tiny_model("llama")).from_pretrained(tmp_path / "small")  # without the library's code
    assert len(saved.model.layers) == 4
    with torch.no_grad():
        torch.testing.assert_close(saved(rows[10:]).logits, model(rows[10:]).logits)


@pytest.mark.parametrize("name", NAMES)
def test_published_methods_search_for_one_window(name: str) -> None:
    """And what stands in one table with them."""
    config = PRESETS[name].config
    found = (config.search.kind, config.search.resolved_criterion.name, config.data.repeated_context)
    ours = {
        "two-windows": ("disjoint", "cosine_and_magnitude", 1.0),
        **dict.fromkeys(("best", "best-plain", "iterative"), ("window", "cosine_and_magnitude", 1.0)),
    }
    assert found == ours.get(name, ("window", "cosine_and_magnitude", 0.0))


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_has_its_name_and_a_source(name: str) -> None:
    preset = PRESETS[name]
    assert preset.name == name
    assert "arXiv" in preset.source or name in ("none", "best", "best-plain", "two-windows")

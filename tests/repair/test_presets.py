"""Presets do what their papers say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from streamline_hooks import StreamlineError
from streamline_hooks.cli.short_forms import parse_replacement
from streamline_hooks.repair.healing import healing_copies
from streamline_hooks.repair.presets import PRESETS, preset_named
from streamline_hooks.selection import SEARCHES
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
    training = preset_named(name).training
    assert training is not None
    found = (
        str(training.objective),
        training.learning_rate,
        training.weight_decay,
        training.betas,
        training.warmup,
        pytest.approx(training.floor * training.learning_rate),
        training.clip,
    )
    assert PUBLISHED[name] == found


def test_iterative_is_the_best_in_two_rounds() -> None:
    best, found = preset_named("best"), preset_named("iterative")
    assert (best.rounds, found.rounds) == (1, 2)
    assert replace(best, name=found.name, source=found.source, rounds=2) == found


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_searches_for_can_be_searched(name: str) -> None:
    """And those that were published, or stand in one table with them, search for one window."""
    preset = preset_named(name)
    SEARCHES[preset.search](preset.criterion or None).check(0.25)
    found = (preset.search, preset.criterion, preset.repeated)
    ours = {
        "two-windows": ("disjoint", "cosine_and_magnitude", 1.0),
        **dict.fromkeys(("best", "iterative"), ("window", "", 1.0)),
    }
    assert found == ours.get(name, ("window", "", 0.0))


@pytest.mark.parametrize("name", sorted(set(PRESETS) - set(PUBLISHED) - {"iterative"}))
def test_the_others_train_nothing(name: str) -> None:
    assert preset_named(name).training is None
    assert preset_named(name).healing is None


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_kind_and_a_source(name: str) -> None:
    preset = PRESETS[name]
    assert parse_replacement(preset.kind).name == preset.kind
    assert "arXiv" in preset.source or name in ("none", "best", "two-windows")


@pytest.mark.parametrize(("type_", "layers"), [("llama", 3), ("gpt2", 2), ("opt", 2), ("gpt_neox", 2)])
def test_uidl_puts_adapters_of_rank_64_on_the_mlps_alone(type_: str, layers: int) -> None:
    healing = preset_named("uidl").healing
    assert healing is not None
    copies, _ = healing_copies(find_stack(tiny_model(type_)), [range(2, 4)], healing)
    adapters = {n.split(".lora_")[0]: p for n, p in copies[0].named_parameters() if p.requires_grad and ".lora_A" in n}
    assert len(adapters) == layers
    assert not any("attn" in name or "attention" in name for name in adapters)
    assert {p.shape[0] for p in adapters.values()} == {64}


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(StreamlineError, match=r"'worst'.*Known: best, two-windows, iterative"):
        preset_named("worst")

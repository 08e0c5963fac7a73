"""Nested depths: each is the repair that is fitted alone, and they are chosen together."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from typing import Any

import pytest
import torch

from streamline_hooks import (
    DistillationConfig,
    LayerSurgeon,
    LinearConfig,
    StreamlineError,
    at_depth,
    compress,
    find_stack,
    fit_depths,
    fit_windows,
    perplexity,
)
from streamline_hooks.core import split_into_batches
from streamline_hooks.modeling import Task
from streamline_hooks.pipeline import DataConfig
from streamline_hooks.pipeline.prepare import prepare_compression
from streamline_hooks.repair import BlockConfig, FoldedConfig, NoneConfig
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.selection import DisjointSearch
from streamline_hooks.surgery import depths_of
from streamline_hooks.testing import tiny_model
from tests.configured import configured

SIZES = DataConfig(sequence_length=64, calibration_tokens=6400, validation_tokens=640, test_tokens=640)


def batches(count: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (2, 8), generator=generator) for _ in range(count)]


def test_the_windows_are_nested_and_the_model_unchanged() -> None:
    model = tiny_model("llama")
    before, ids = copy.deepcopy(model.state_dict()), batches(1)[0]
    logits = model(ids).logits
    fitted = fit_depths(model, batches(), [5, 7, 4])
    assert [one.depth for one in fitted] == [7, 5, 4] and depths_of(model) == (8, 7, 5, 4)
    for inner, outer in itertools.pairwise(fitted):
        assert set(inner.window) < set(outer.window)
    for one in fitted:
        assert len(one.window) == 8 - one.depth and one.best_distance <= one.distance
        with at_depth(model, one.depth):
            assert len(find_stack(model)) == one.depth
            assert not torch.allclose(model(ids).logits, logits)
    assert torch.equal(model(ids).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("repair", [LinearConfig(), NoneConfig(), LinearConfig(rank=4)])
def test_a_depth_is_the_replacement_that_is_fitted_for_its_window_alone(repair: Any) -> None:
    model, data = tiny_model("llama"), batches()
    fitted = fit_depths(model, data, [6, 4], repair=repair)
    config = configured(remove=4, repair=repair)
    for one in fitted:
        plain = tiny_model("llama")
        split = {"calibration": data[:12], "validation": data[12:14], "test": data[14:]}
        ready = prepare_compression(plain, None, split, config, task=Task.of(plain))
        (alone,) = fit_windows(plain, [one.window], repair, ready.fit, ready.held_out)
        module = alone.replacement_module
        with at_depth(model, one.depth):
            spliced = [m for m in model.modules() if isinstance(m, LinearReplacement)]
            assert len(spliced) == (module is not None)
            for splice in spliced:
                for name, value in module.state_dict().items():
                    torch.testing.assert_close(splice.state_dict()[name], value)


def test_the_combination_has_the_smallest_product_of_all_nested_ones(stories: Any, story_texts: list[str]) -> None:
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    fitted = fit_depths(model, story_texts, [4, 3], tokenizer=tokenizer, config=configured(data=SIZES))
    products = [
        distance_of(stories, tuple(story_texts), range(inner, inner + 1))
        * distance_of(stories, tuple(story_texts), range(start, start + 2))
        for start in range(4)
        for inner in (start, start + 1)
    ]
    assert math.prod(one.distance for one in fitted) == pytest.approx(min(products), rel=1e-3)


@functools.cache
def distance_of(stories: Any, texts: tuple[str, ...], window: range) -> float:
    """The distance of one window, as `compress` verifies it where nothing else can be removed."""
    protect = tuple(k for k in range(5) if k not in window)
    settings: dict[str, Any] = {"data": SIZES, "speed": False, "generation": False}
    config = configured(remove=len(window), search="window", protect=protect, **settings)
    return compress(copy.deepcopy(stories[0]), list(texts), config, tokenizer=stories[1]).candidates[0].distance


def test_a_depth_of_a_trained_model_is_better_with_its_replacement(stories: Any, story_texts: list[str]) -> None:
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    ids = tokenizer(story_texts[:8], return_tensors="pt", truncation=True, max_length=100).input_ids
    held_out = split_into_batches(ids, 4)
    fitted = fit_depths(model, story_texts[8:], [4, 3], tokenizer=tokenizer, config=configured(data=SIZES))
    original = perplexity(model, held_out).value
    for one in fitted:
        plain = copy.deepcopy(stories[0])
        with LayerSurgeon(plain) as surgeon:
            surgeon.remove(one.window)
            removed = perplexity(plain, held_out).value
        with at_depth(model, one.depth):
            assert original < perplexity(model, held_out).value < removed
    assert fitted[0].distance < fitted[1].distance


@pytest.mark.parametrize(
    ("depths", "settings", "text"),
    [
        ([], {}, "Expected different numbers of blocks from 1 to 7"),
        ([8], {}, "Leave out the full depth"),
        ([6, 6], {}, "Expected different"),
        ([6], {"search": DisjointSearch()}, "disjoint.*WindowSearch"),
        ([6], {"distillation": DistillationConfig()}, "Expected closed-form"),
        ([6], {"repair": BlockConfig()}, "takes a cache slot"),
        ([6], {"repair": FoldedConfig()}, "changes blocks around the window"),
        ([6], {"repairs": 2}, "unknown"),
    ],
)
def test_what_gives_no_depths_is_refused(depths: list[int], settings: dict[str, Any], text: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(StreamlineError, match=text):
        fit_depths(model, batches(), depths, **settings)
    with pytest.raises(StreamlineError, match="one depth"):
        depths_of(model)

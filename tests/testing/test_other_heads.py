"""Models that are no causal language models: what holds for them, and what cannot be asked of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.modeling import find_stacks
from streamline_hooks.testing import (
    assert_cached_generation_matches,
    assert_causal,
    assert_checkpoint_round_trip,
    assert_restores,
    assert_shapes,
)
from streamline_hooks.testing import tiny_model as tiny_of_type
from streamline_hooks.testing.checkpoint_round_trip import compare_loaded
from tests.other_models import made
from tests.tiny_models import tiny_model


def of_class(name: str, model_type: str = "llama", **settings: object) -> Any:
    """A tiny model of another class than the causal language model."""
    config = copy.deepcopy(tiny_of_type(model_type, blocks=3).config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, name)(type(config)(**{**config.to_dict(), "pad_token_id": 0, **settings})).eval()


def image_classifier() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(config).eval()
        return model, {"pixel_values": torch.randn(2, 3, 8, 8)}


def test_a_model_without_a_head_passes() -> None:
    model = of_class("LlamaModel")
    assert_shapes(model)
    assert_causal(model)
    assert_restores(model)
    assert_checkpoint_round_trip(model)


@pytest.mark.parametrize("labels", [3, 12], ids=["3-labels", "as-many-labels-as-tokens"])
def test_a_classifier_is_read_with_its_own_class(labels: int) -> None:
    model = of_class("LlamaForSequenceClassification", num_labels=labels)
    assert_checkpoint_round_trip(model)
    with torch.no_grad():
        model.score.weight[0, 0] += 1  # the head is looked at too
    assert_checkpoint_round_trip(model)


def test_an_image_classifier_is_read_with_its_own_class() -> None:
    model, batch = image_classifier()
    assert_checkpoint_round_trip(model, batch=batch)


def test_what_a_class_of_its_own_reads_otherwise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = of_class("LlamaForSequenceClassification", num_labels=3)
    read = type(model).from_pretrained

    def other(folder: Path, **more: object) -> Any:
        loaded = read(folder, **more)
        loaded.score.weight.data.mul_(2)
        return loaded

    monkeypatch.setattr(type(model), "from_pretrained", other)
    with pytest.raises(AssertionError, match=r"Loaded.*LlamaForSequenceClassification.from_pretrained"):
        assert_checkpoint_round_trip(model)


def test_what_was_read_is_compared_where_the_model_is(tmp_path: Path) -> None:
    """What was read lies on another device, and is filled as it is moved."""
    model, moved = tiny_model("llama"), []

    def read(folder: Path) -> nn.Module:
        loaded = copy.deepcopy(model).to("meta")

        def to(device: torch.device) -> None:
            moved.append(device)
            loaded.to_empty(device=device)
            with torch.no_grad():
                for empty, full in zip([*loaded.parameters(), *loaded.buffers()], values, strict=True):
                    empty.copy_(full)

        loaded.to = to
        return loaded

    values = [*model.parameters(), *model.buffers()]
    compare_loaded(model, "a copy", read, tmp_path)
    assert moved == [model.device]


def test_the_states_of_a_classifier_are_looked_at_and_its_answer_is_not() -> None:
    model, batch = image_classifier()
    for subject, given in ((of_class("LlamaForSequenceClassification", num_labels=3), None), (model, batch)):
        with pytest.raises(StreamlineError, match=r"\(\d.*\d\)"):
            assert_shapes(subject, given)
        with LayerSurgeon(subject, probe=False) as surgeon:
            surgeon.insert(1, Poisoned())
            with pytest.raises(AssertionError, match=r"block 1.*NaN"):
                assert_shapes(subject, given)


class Poisoned(nn.Module):
    def forward(self, state: Tensor) -> Tensor:
        return torch.full_like(state, torch.nan)


def test_a_classifier_is_told_why_it_cannot_be_causal() -> None:
    model, batch = image_classifier()
    for subject, given in ((of_class("LlamaForSequenceClassification", num_labels=3), None), (model, batch)):
        with pytest.raises(StreamlineError, match=r"one output per token.*one output per sequence"):
            assert_causal(subject, given)


def read_and_written(model: Any, padding: int) -> dict[str, Tensor]:
    """Texts of different lengths, the one that is read padded."""
    ids = torch.arange(3, 25).reshape(2, 11)
    mask = torch.ones(2, 9).long()
    mask[1, 9 - padding :] = 0
    return {"input_ids": ids[:, :9], "attention_mask": mask, "decoder_input_ids": ids[:, 11 - 9 + padding :]}


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_with_a_decoder_passes(name: str, padding: int) -> None:
    model = made(f"{name} decoder")
    batch = read_and_written(model, padding)
    for stack in (stack.path for stack in find_stacks(model)):
        assert_shapes(model, batch, stack=stack)
    assert_causal(model, batch)
    with pytest.raises(StreamlineError, match="encoder-decoder model"):
        assert_cached_generation_matches(model, batch)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_that_looks_ahead_is_seen(name: str) -> None:
    class Leak(nn.Module):
        def forward(self, state: Tensor) -> Tensor:
            return state + 0.1 * state.mean(dim=1, keepdim=True)

    model = made(f"{name} decoder")
    decoder = next(stack.path for stack in find_stacks(model) if "decoder" in stack.path)
    with LayerSurgeon(model, decoder, probe=False) as surgeon:
        surgeon.insert(2, Leak())
        with pytest.raises(AssertionError, match="later tokens"):
            assert_causal(model, read_and_written(model, 0), stack=decoder)

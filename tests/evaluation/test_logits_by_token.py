"""Large logits are computed for a few tokens at a time, and give the same distances and perplexities."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout
from transformers import BertConfig, BertForMaskedLM

from streamline_hooks import DistillationConfig, LayerSurgeon, UnsupportedSurgery, perplexity, train
from streamline_hooks.data import packed_batches
from streamline_hooks.distillation import Student
from streamline_hooks.evaluation import (
    agreement,
    compare_on_batches,
    distances_of_candidates,
    distances_of_variants,
    guarantee,
    perplexity_of_candidates,
)
from streamline_hooks.modeling import Candidate, Task
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery import ModelSource, split_large_batches
from streamline_hooks.testing import tiny_model
from tests.tiny_models import left_padded, padded, tokens

FAMILIES = ("llama", "gpt2", "gemma3_text", "cohere", "opt", "granite", "bloom", "gpt_neox", "mixtral", "falcon_h1")
"""With tied and untied heads, scaled and capped logits, post-norms, mixtures of experts and recurrent blocks."""


def candidates(model: nn.Module) -> list[Candidate]:
    torch.manual_seed(1)
    linear = LinearReplacement(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        linear.projection.weight.add_(torch.randn_like(linear.projection.weight) * 0.1)
    return [Candidate(range(1, 3)), Candidate(range(0, 2), linear), Candidate(range(3, 6))]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], list[int]]:
    """Let all logits be too large, three tokens fit, and count the tokens of each call of the head of a model."""

    def watch(model: Any) -> list[int]:
        counted: list[int] = []
        vocabulary = model.get_output_embeddings().weight.shape[0]
        monkeypatch.setattr("streamline_hooks.surgery.token_outputs.WHOLE_LOGIT_BYTES", 0)
        monkeypatch.setattr("streamline_hooks.surgery.token_outputs.LOGIT_BYTES", 3 * 4 * vocabulary)
        model.get_output_embeddings().register_forward_hook(lambda _, args, __: counted.append(args[0][..., 0].numel()))
        return counted

    return watch


@pytest.mark.parametrize("family", FAMILIES)
def test_distances_and_perplexities_are_those_of_whole_batches(
    family: str, sizes: Callable[[nn.Module], list[int]]
) -> None:
    model = tiny_model(family)
    batches = [tokens(2, 11), left_padded(3, 11), padded([4, 9], "right")]
    own = candidates(model)
    expected = distances_of_candidates(model, batches, own), perplexity_of_candidates(model, batches, own)
    counted = sizes(model)
    assert distances_of_candidates(model, batches, own) == pytest.approx(expected[0], rel=1e-4, abs=1e-7)
    assert max(counted[1:]) <= 3 and counted[0] == 8, "a forward of eight tokens checks the head"
    original, results = perplexity_of_candidates(model, batches, own)
    for one, other in zip([original, *results], [expected[1][0], *expected[1][1]], strict=True):
        assert one.tokens == other.tokens and one.nll == pytest.approx(other.nll, rel=1e-5)


def test_packed_documents_and_ignored_labels_count_as_in_whole_batches(
    sizes: Callable[[nn.Module], list[int]],
) -> None:
    model = tiny_model("llama")
    rows = packed_batches([[[5, 6, 7], [8, 9, 10, 11]], [[12, 13, 14, 15, 16, 17]]], batch_size=2)
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    batches = [*rows, {"input_ids": ids, "labels": labels}]
    expected = perplexity(model, batches)
    counted = sizes(model)
    result = perplexity(model, batches)
    assert max(counted[1:]) == 3 and (result.tokens, result.nll) == (
        expected.tokens,
        pytest.approx(expected.nll, rel=1e-5),
    )


def test_another_model_may_be_the_reference(sizes: Callable[[nn.Module], list[int]]) -> None:
    original = tiny_model("llama")
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)  # type: ignore[union-attr, operator]
    batches, own = [tokens(2, 11), left_padded(3, 11)], candidates(model)
    expected = distances_of_candidates(model, batches, own, original=original)
    counted = sizes(model), sizes(original)
    result = distances_of_candidates(model, batches, own, original=original)
    assert result == pytest.approx(expected, rel=1e-4) and all(max(sizes[1:]) == 3 for sizes in counted)
    assert result != pytest.approx(distances_of_candidates(model, batches, own), rel=1e-2)


def test_surgeries_and_refusals_are_variants(sizes: Callable[[nn.Module], list[int]]) -> None:
    model = tiny_model("llama")

    @contextmanager
    def without(*blocks: int) -> Iterator[None]:
        with LayerSurgeon(model) as surgeon:
            for block in blocks:
                surgeon.remove([block])
            yield

    @contextmanager
    def refused() -> Iterator[None]:
        raise UnsupportedSurgery("not this one", "test")
        yield

    variants = [lambda: without(1), refused, lambda: without(2, 7)]
    arguments = [ModelSource(model), [tokens(2, 11), left_padded(3, 11)], variants, "variants", Task("causal-lm")]
    expected = distances_of_variants(*arguments)  # type: ignore[arg-type]
    counted = sizes(model)
    first, second, third = distances_of_variants(*arguments)  # type: ignore[arg-type]
    assert [first, third] == pytest.approx([expected[0], expected[2]], rel=1e-4) and max(counted[1:]) <= 3
    assert isinstance(second, UnsupportedSurgery) and len(model.model.layers) == 8  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("fault", ["other tokens", "input ids"])
def test_a_model_whose_logits_depend_on_more_than_the_state_runs_whole(
    fault: str, is_padded: bool, sizes: Callable[[nn.Module], list[int]]
) -> None:
    model: Any = tiny_model("llama")
    if fault == "other tokens":
        model.model.norm.register_forward_hook(lambda _, __, output: output - output.mean(dim=1, keepdim=True))
    else:  # logits of a pointer network, which copies from its input
        embedded: list[torch.Tensor] = []
        model.model.embed_tokens.register_forward_hook(lambda _, __, output: embedded.append(output))
        model.model.norm.register_forward_hook(lambda _, __, output: output + embedded.pop())
    ids = torch.cat([torch.zeros(2, 9, dtype=torch.long), tokens(2, 11)], dim=1)  # more padding than tokens compared
    left = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    batches, own = [left if is_padded else tokens(2, 11)], [Candidate(range(1, 3))]
    expected = distances_of_candidates(model, batches, own)
    counted = sizes(model)
    assert distances_of_candidates(model, batches, own) == expected
    assert counted[-1] == (40 if is_padded else 22)


def test_models_are_compared_with_as_many_sequences_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Any = tiny_model("llama")
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    batches = [padded([4, 9, 7], "right"), left_padded(2, 5)]
    expected = agreement(model, original, batches), compare_on_batches(model, original, batches)
    documents = guarantee(original, model, batches, "kl")
    rows: list[int] = []
    original.lm_head.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    monkeypatch.setattr("streamline_hooks.surgery.token_outputs.WHOLE_LOGIT_BYTES", 2 * 9 * 64 * 4)
    result = agreement(model, original, batches)
    assert rows == [2, 1, 2] and (result.tokens, result.same) == (expected[0].tokens, expected[0].same)
    assert result.kl == pytest.approx(expected[0].kl, rel=1e-5)
    compared = compare_on_batches(model, original, batches)
    assert compared.changed.nll == pytest.approx(expected[1].changed.nll, rel=1e-6)
    assert guarantee(original, model, batches, "kl").losses == pytest.approx(documents.losses, rel=1e-4)


def test_training_runs_as_many_sequences_at_once_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, rows = [], []
    short = tokens(1, 9)  # the last batch of a text has fewer sequences, which must not limit the others
    for limit in (2**29, 9 * 64 * 4):
        monkeypatch.setattr("streamline_hooks.surgery.token_outputs.WHOLE_LOGIT_BYTES", limit)
        model: Any = tiny_model("llama")  # its logits depend on other tokens, so those of a few cannot be computed
        model.model.norm.register_forward_hook(lambda _, __, output: output + output.mean(dim=1, keepdim=True))
        replacement = LinearReplacement(32)
        model.lm_head.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
        batches = [padded([4, 9, 7], "right"), tokens(3, 9), short]
        train(Student(model, [(range(2, 4), replacement)]), batches, batches[:1], DistillationConfig(validations=1))
        weights.append(replacement.projection.weight)
    assert max(rows[: len(rows) // 3]) == 3 and rows[-1] == 1
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_dropout_after_the_blocks_of_a_model_in_training_mode_is_off(
    sizes: Callable[[nn.Module], list[int]],
) -> None:
    model: Any = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda norm, _, output: dropout(output, 0.5, norm.training))
    batches, own = [tokens(2, 11)], [Candidate(range(1, 3))]
    expected = distances_of_candidates(model, batches, own)
    model.train()
    counted = sizes(model)
    assert distances_of_candidates(model, batches, own) == pytest.approx(expected, rel=1e-4)
    assert max(counted[1:]) == 3


def test_masked_models_run_whole(sizes: Callable[[nn.Module], list[int]]) -> None:
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=48)
    model = BertForMaskedLM(config).eval()
    batches, own = [tokens(2, 11)], [Candidate(range(1, 3))]
    expected = distances_of_candidates(model, batches, own)
    counted = sizes(model)
    assert distances_of_candidates(model, batches, own) == expected and set(counted) == {22}


def test_a_stack_is_not_needed_for_small_logits() -> None:
    class OneBlock(nn.Module):
        """A model without a stack of blocks."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.embed(input_ids))
            return logits

    assert perplexity(OneBlock(), [torch.arange(8).view(2, 4)]).tokens == 6


def test_batches_with_other_tensors_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamline_hooks.surgery.token_outputs.WHOLE_LOGIT_BYTES", 0)
    model = tiny_model("llama")
    batch = {"input_ids": tokens(3, 5), "pixel_values": torch.zeros(7, 4)}
    assert len(split_large_batches(model, [batch])) == 1 and len(split_large_batches(model, [tokens(3, 5)])) == 3

"""Scores of attention and MLP: against NumPy, and against the model with a branch zeroed."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack
from streamline_hooks.core import prepare_inputs
from streamline_hooks.modeling import BRANCHES, Branches, TensorSite, branches_of, reading_branches
from streamline_hooks.recording import HiddenStateRecorder
from streamline_hooks.statistics.branches import BranchScores, measure_branches
from streamline_hooks.testing import tiny_inputs
from streamline_hooks.testing import tiny_model as tiny
from tests.tiny_models import BLOCKS, Nudge, padded, shuffled_batches, tiny_model

KINDS = ["llama", "gpt2", "gpt_neox", "gemma2", "qwen2_moe", "bloom", "falcon", "opt", "bamba", "granite", "cohere"]


def reference(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """Mean cosine and mean relative magnitude, in NumPy."""
    x, y = before.double().numpy(), after.double().numpy()
    cosine = (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))
    return float(cosine.mean()), float((np.linalg.norm(y - x, axis=-1) / np.linalg.norm(x, axis=-1)).mean())


def states(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The sums


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 5))
def test_sums_are_those_of_numpy_over_real_tokens(seed: int, rows: int, tokens: int) -> None:
    before, after = states(seed, rows, tokens, 7), states(seed + 1, rows, tokens, 7)
    mask = states(seed + 2, rows, tokens) > 0
    mask[0, 0] = True
    before[~mask] = after[~mask] = float("nan")  # padding may hold anything
    scores = BranchScores(3)
    scores.update(1, "mlp", before, after, mask.long())
    cosine, magnitude = reference(before[mask], after[mask])
    assert scores.tokens.tolist() == [[0, 0], [0, int(mask.sum())], [0, 0]]
    assert scores.cosine[1, 1].item() == pytest.approx(cosine, rel=1e-12)
    assert scores.magnitude[1, 1].item() == pytest.approx(magnitude, rel=1e-12)
    assert scores.cosine.isnan().sum() == 5


def test_merged_parts_are_the_whole() -> None:
    before, after, mask = states(0, 4, 6, 5), states(1, 4, 6, 5), torch.ones(4, 6)
    whole, part, other = BranchScores(2), BranchScores(2), BranchScores(2)
    whole.update(0, "attention", before, after, mask)
    part.update(0, "attention", before[:1], after[:1], mask[:1])
    other.load_state_dict(part.state_dict())
    rest = BranchScores(2)
    rest.update(0, "attention", before[1:], after[1:], mask[1:])
    other.merge(rest)
    assert torch.equal(other.tokens, whole.tokens)
    torch.testing.assert_close(other.cosine, whole.cosine, rtol=1e-12, atol=0, equal_nan=True)
    torch.testing.assert_close(other.magnitude, whole.magnitude, rtol=1e-12, atol=0, equal_nan=True)
    assert part.tokens.sum() == 6  # a loaded copy shares nothing
    with pytest.raises(StreamlineError, match=r"of 3.*of 2"):
        whole.merge(BranchScores(3))


def test_what_cannot_be_scored_raises() -> None:
    scores, mask = BranchScores(2), torch.ones(1, 2)
    good = states(0, 1, 2, 3)
    for bad in (torch.zeros_like(good), torch.full_like(good, float("inf"))):
        with pytest.raises(StreamlineError, match=r"block 1.*NaN"):
            scores.update(1, "mlp", bad, good, mask)
    assert scores.tokens.sum() == 0


# The pass


def truth(
    model: nn.Module, k: int, batch: dict[str, torch.Tensor], first: str | None
) -> dict[str, tuple[float, float]]:
    """From the block's own output with the other branch zeroed."""

    def output(*zeroed: str) -> tuple[torch.Tensor, torch.Tensor]:
        with LayerSurgeon(model) as surgeon:
            for branch in zeroed:
                surgeon.zero_branch(k, branch)
            with torch.no_grad(), HiddenStateRecorder(model, [k], tokens="real") as record:
                model(**prepare_inputs(model, batch))
        return record.inputs[k][0], record.outputs[k][0]

    entered, left = output()
    attention, mlp = output("mlp")[1], output("attention")[1]
    return {
        "attention": reference(entered, attention),
        "mlp": reference(attention, left) if first == "attention" else reference(entered, mlp),
    }


@pytest.mark.sample(4)
@pytest.mark.parametrize("model_type", KINDS)
def test_scores_are_those_of_the_block_with_the_other_branch_zeroed(model_type: str) -> None:
    model = tiny(model_type, blocks=3)
    batch = tiny_inputs(model, left_padding=True)
    scores = measure_branches(model, [batch])
    found = branches_of(find_stack(model), range(3))
    for k in (0, 2):
        assert isinstance(found[k], Branches)
        expected = truth(model, k, batch, found[k].first)
        for column, branch in enumerate(BRANCHES):
            got = scores.cosine[k, column].item(), scores.magnitude[k, column].item()
            assert got == pytest.approx(expected[branch], rel=1e-4, abs=1e-6)
    assert scores.tokens.unique().tolist() == [int(batch["attention_mask"].sum())]


@settings(max_examples=10)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_batching_and_padding_make_no_difference(lengths: list[int], side: str, size: int, random: Random) -> None:
    model = tiny_model("llama")
    one_by_one = [padded([length], side) for length in lengths]
    for number, batch in enumerate(one_by_one):  # the rows of the padded batch are cut from the same source
        batch["input_ids"] = padded(lengths, "right")["input_ids"][number : number + 1, : lengths[number]]
    alone = measure_branches(model, one_by_one)
    whole = padded(lengths, side)
    for number, batch in enumerate(one_by_one):
        row = whole["attention_mask"][number].bool()
        whole["input_ids"][number, row] = batch["input_ids"][0]
    together = measure_branches(model, shuffled_batches(whole, size, random))
    assert torch.equal(alone.tokens, together.tokens)
    torch.testing.assert_close(alone.cosine, together.cosine, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.magnitude, together.magnitude, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_a_planted_branch_that_does_nothing_is_found(model_type: str) -> None:
    model = tiny_model(model_type)
    found = branches_of(find_stack(model), [2])[2]
    assert isinstance(found, Branches)
    for name in found.writers["mlp"]:
        find_stack(model)[2].get_parameter(name).data.mul_(1e-4)
    scores = measure_branches(model, [padded([9, 5], "left")])
    assert scores.magnitude.argmin().item() == scores.cosine.argmax().item() == 2 * 2 + 1


def test_nothing_is_left_in_the_model() -> None:
    model = tiny_model("qwen3").train()
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    measure_branches(model, [padded([6], "left")])
    assert hooks == [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    assert all(module.training for module in model.modules())


def test_only_what_was_asked_for_is_run_and_measured() -> None:
    model, ran = tiny_model("llama"), set()
    for k, block in enumerate(find_stack(model).blocks):
        block.register_forward_hook(lambda module, args, output, k=k: ran.add(k))
    scores = measure_branches(model, [padded([6], "left")], blocks=[1, 2])
    assert scores.tokens[:, 0].tolist() == [0, 6, 6, 0, 0, 0]
    assert max(ran) == 2


def test_batches_that_can_be_read_once_only() -> None:
    batches = [padded([6, 4], "left"), padded([3], "left")]
    once = measure_branches(tiny_model("llama"), (batch for batch in batches))
    assert torch.equal(once.cosine, measure_branches(tiny_model("llama"), batches).cosine)
    assert once.tokens.unique().tolist() == [13]


@pytest.mark.parametrize("batches", [[], [{**padded([4], "left"), "attention_mask": torch.zeros(1, 4).long()}]])
def test_no_token_at_all_is_said(batches: list[dict[str, torch.Tensor]]) -> None:
    with pytest.raises(StreamlineError, match=r"batches=\[.*no token.*Expected"):
        measure_branches(tiny_model("llama"), batches)


def test_a_splice_before_the_block_belongs_to_the_state_that_enters() -> None:
    model, batch = tiny_model("llama"), padded([6], "left")
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(2, Nudge())
        surgeon.insert(BLOCKS, Nudge(seed=1))
        scores = measure_branches(model, [batch])
        for k in (2, BLOCKS - 1):
            with torch.no_grad(), HiddenStateRecorder(model, [k], tokens="real") as record:
                middle: list[torch.Tensor] = []
                norm = find_stack(model)[k].post_attention_layernorm
                handle = norm.register_forward_pre_hook(lambda module, args, kept=middle: kept.append(args[0][0]))
                model(**prepare_inputs(model, batch))
                handle.remove()
            expected = reference(record.inputs[k][0], middle[0])
            assert (scores.cosine[k, 0].item(), scores.magnitude[k, 0].item()) == pytest.approx(expected, rel=1e-6)


def test_blocks_without_two_branches_are_left_out_or_refused() -> None:
    model = tiny("zamba", blocks=4)
    batch = tiny_inputs(model)
    with pytest.raises(UnsupportedSurgery, match=r"block 1.*Zamba.* no mlp branch"):
        measure_branches(model, [batch], blocks=[1])
    with pytest.raises(UnsupportedSurgery, match="branches of block 0"):
        measure_branches(model, [batch])


def test_a_block_that_text_alone_does_not_run_is_left_out() -> None:
    model = tiny("mllama", blocks=5)
    scores = measure_branches(model, [tiny_inputs(model)])
    assert scores.tokens[:, 0].tolist() == [24, 24, 24, 0, 24]
    assert scores.cosine[3].isnan().all()
    with pytest.raises(UnsupportedSurgery, match=r"block 3.*Block 3 was called 0 times"):
        measure_branches(model, [tiny_inputs(model)], blocks=[3])


# Checks that must be able to fail


@pytest.mark.parametrize(
    ("model_type", "wrong", "text"),
    [
        ("llama", {"attention": TensorSite("input_layernorm", "input")}, "state between the branches"),
        ("llama", {"attention": TensorSite("mlp", "output", 3)}, "did not pass mlp"),
        (
            "gpt_neox",
            {"attention": TensorSite("attention.dense", "output"), "mlp": TensorSite("attention.dense", "output")},
            "sum to",
        ),
    ],
)
def test_a_wrong_tap_is_noticed_while_reading(model_type: str, wrong: dict[str, TensorSite], text: str) -> None:
    model = tiny_model(model_type)
    stack = find_stack(model)
    found = branches_of(stack, [1])[1]
    assert isinstance(found, Branches)
    planted = {1: Branches(found.first, found.writers, wrong)}
    with pytest.raises(UnsupportedSurgery, match=text), torch.no_grad():
        with reading_branches({1: stack[1]}, planted, lambda *given: None):
            model(**prepare_inputs(model, padded([6], "left")))
    assert not stack[1]._forward_hooks


def test_a_block_that_no_module_shows_the_inside_of_cannot_be_read() -> None:
    stack = find_stack(tiny_model("llama"))
    blind = Branches("attention", {branch: () for branch in BRANCHES}, {})
    with pytest.raises(UnsupportedSurgery, match=r"block 1.*LlamaDecoderLayer"):
        with reading_branches({1: stack[1]}, {1: blind}, lambda *given: None):
            pass

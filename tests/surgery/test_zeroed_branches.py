"""One branch of a block zeroed: what is computed, what comes back, what is saved, what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack
from streamline_hooks.modeling import BRANCHES, Branches, branches_of, read_output, write_output
from streamline_hooks.surgery import zeroed_branches
from streamline_hooks.testing import tiny_inputs
from streamline_hooks.testing import tiny_model as tiny
from tests.surgery.test_surgeon import bypassed, fingerprint, logits
from tests.tiny_models import BLOCKS, FAMILIES, left_padded, tiny_model

# The modules whose output is what a branch adds, known here by name.
MODULES = {
    "llama": ("self_attn", "mlp"),
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "phi": ("self_attn", "mlp"),
    "qwen2_moe": ("self_attn", "mlp"),
    "falcon": ("self_attention", "mlp"),
    "opt": ("self_attn", "fc2"),
    "bamba": ("mamba", "feed_forward"),
    "granite": ("self_attn", "mlp"),
    "cohere": ("self_attn", "mlp"),
    "mixtral": ("self_attn", "mlp" if transformers.__version__ >= "5" else "block_sparse_moe"),
}
families = st.sampled_from(FAMILIES)
branches = st.sampled_from(BRANCHES)
blocks = st.integers(0, BLOCKS - 1)


def nothing(module: nn.Module, args: object, output: object) -> object:
    return write_output(output, torch.zeros_like(read_output(output)))


@pytest.mark.parametrize("model_type", MODULES)
@pytest.mark.parametrize("branch", BRANCHES)
def test_zeroed_is_the_model_without_what_the_branch_adds(model_type: str, branch: str) -> None:
    model = tiny(model_type, blocks=3)
    own = find_stack(model)[1].get_submodule(MODULES[model_type][BRANCHES.index(branch)])
    for left_padding in (False, True):
        batch = tiny_inputs(model, left_padding=left_padding)
        handle = own.register_forward_hook(nothing)
        expected = logits(model, batch)
        handle.remove()
        with LayerSurgeon(model) as surgeon:
            surgeon.zero_branch(1, branch)
            assert torch.equal(logits(model, batch), expected)
        assert not torch.equal(logits(model, batch), expected)


@settings(max_examples=12)
@given(families, blocks, st.booleans())
def test_both_zeroed_is_the_block_bypassed(family: str, k: int, padded: bool) -> None:
    model = tiny_model(family)
    batch = left_padded(3, 9) if padded else None
    expected = bypassed(model, range(k, k + 1), batch)
    with LayerSurgeon(model) as surgeon:
        for branch in BRANCHES:
            surgeon.zero_branch(k, branch)
        got = logits(model, batch)
    real = slice(None) if batch is None else batch["attention_mask"].bool()
    assert torch.equal(got[real], expected[real])


# With other operations


def test_a_zeroed_block_that_goes_is_gone() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        expected = logits(model)
    before = fingerprint(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.zero_branch(2, "mlp")
        surgeon.remove([2])
        assert torch.equal(logits(model), expected)
        assert surgeon.plan.zeroed == {}
        with pytest.raises(StreamlineError, match=r"zero_branch\(2, ...\).*removed"):
            surgeon.zero_branch(2, "attention")
    assert fingerprint(model) == before


def test_twice_is_once_and_the_other_branch_may_follow() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.zero_branch(2, "mlp")
        zeros = find_stack(model)[2].mlp.down_proj.weight
        surgeon.zero_branch(2, "mlp")
        assert find_stack(model)[2].mlp.down_proj.weight is zeros
        surgeon.zero_branch(2, "attention")
        assert surgeon.plan.zeroed == {2: ("attention", "mlp")}
        assert find_stack(model)[2].mlp.down_proj.weight is zeros  # an optimizer goes on knowing it


# The probe must be able to fail


@pytest.mark.parametrize("wrong", ["self_attn.v_proj.weight", "self_attn.q_proj.weight", "mlp.down_proj.weight"])
def test_a_projection_that_does_not_zero_its_branch_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is zeroed and what the truth throws away are found apart: here the first is planted, and wrong."""
    model = tiny_model("llama")
    right = branches_of(find_stack(model), [2])[2]
    assert isinstance(right, Branches)
    zeros = {wrong: torch.nn.Parameter(torch.zeros_like(find_stack(model)[2].get_parameter(wrong)))}
    monkeypatch.setattr("streamline_hooks.surgery.surgeon.find_zeros", lambda *given: zeros)
    observed = zeroed_branches.observe_zeroed
    monkeypatch.setattr(
        "streamline_hooks.surgery.surgeon.observe_zeroed",
        lambda model, block, paths: observed(model, block, right.writers["attention"]),
    )
    before = fingerprint(model)
    with LayerSurgeon(model) as surgeon:
        if wrong == "self_attn.v_proj.weight":  # which without a bias zeroes attention too
            surgeon.zero_branch(2, "attention")
        else:
            with pytest.raises(UnsupportedSurgery, match=r"attention branch of block 2 .*other logits"):
                surgeon.zero_branch(2, "attention")
            assert surgeon.plan.zeroed == {}
    assert fingerprint(model) == before


# Saying no


@pytest.mark.parametrize(
    ("k", "branch", "text"),
    [
        (6, "mlp", r"zero_branch\(6, ...\).*does not exist.*\[0, 1, 2, 3, 4, 5\]"),
        (-1, "mlp", r"zero_branch\(-1, ...\).*does not exist"),
        (1, "ffn", r"'ffn' is unknown.*attention, mlp"),
    ],
)
def test_what_is_not_there_cannot_be_zeroed(k: int, branch: str, text: str) -> None:
    with LayerSurgeon(tiny_model("llama")) as surgeon, pytest.raises(StreamlineError, match=text):
        surgeon.zero_branch(k, branch)


def test_a_block_without_two_branches_is_refused() -> None:
    model = tiny("bert", blocks=3)
    before = fingerprint(model)
    with LayerSurgeon(model) as surgeon:
        with pytest.raises(UnsupportedSurgery, match=r"block 1.*BertLayer") as error:
            surgeon.zero_branch(1, "mlp")
        assert error.value.cause == "branches"
    assert fingerprint(model) == before

"""One branch of a block silenced: what is computed, what comes back, what is saved, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack
from streamline_hooks.branches import BRANCHES, Branches
from streamline_hooks.hidden_state import read_output, write_output
from streamline_hooks.surgery import silence
from streamline_hooks.surgery.silence import branches_of
from streamline_hooks.testing import tiny_inputs
from streamline_hooks.testing import tiny_model as tiny
from tests.surgery.test_surgeon import bypassed, fingerprint, logits
from tests.tiny_models import BLOCKS, FAMILIES, Nudge, left_padded, tiny_model, tokens

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
def test_silenced_is_the_model_without_what_the_branch_adds(model_type: str, branch: str) -> None:
    model = tiny(model_type, blocks=3)
    own = find_stack(model)[1].get_submodule(MODULES[model_type][BRANCHES.index(branch)])
    for left_padding in (False, True):
        batch = tiny_inputs(model, left_padding=left_padding)
        handle = own.register_forward_hook(nothing)
        expected = logits(model, batch)
        handle.remove()
        with LayerSurgeon(model) as surgeon:
            surgeon.silence(1, branch)
            assert torch.equal(logits(model, batch), expected)
        assert not torch.equal(logits(model, batch), expected)


@settings(max_examples=12)
@given(families, blocks, st.booleans())
def test_both_silenced_is_the_block_bypassed(family: str, k: int, padded: bool) -> None:
    model = tiny_model(family)
    batch = left_padded(3, 9) if padded else None
    expected = bypassed(model, range(k, k + 1), batch)
    with LayerSurgeon(model) as surgeon:
        for branch in BRANCHES:
            surgeon.silence(k, branch)
        got = logits(model, batch)
    real = slice(None) if batch is None else batch["attention_mask"].bool()
    assert torch.equal(got[real], expected[real])


@settings(max_examples=12)
@given(families, blocks, branches, st.booleans())
def test_generate_with_a_cache_equals_without(family: str, k: int, branch: str, padded: bool) -> None:
    model = tiny_model(family)
    batch = left_padded(2, 7) if padded else {"input_ids": tokens(2, 7), "attention_mask": torch.ones(2, 7).long()}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with LayerSurgeon(model) as surgeon:
        surgeon.silence(k, branch)
        assert len(surgeon.stack.container) == BLOCKS == model.config.num_hidden_layers
        with_cache = model.generate(**batch, **options, use_cache=True)
        assert torch.equal(with_cache, model.generate(**batch, **options, use_cache=False))


# With other operations, in any order


def outcome(family: str, order: list[str]) -> tuple[str, torch.Tensor]:
    model = tiny_model(family)
    operations = {
        "silence 3": lambda s: s.silence(3, "attention"),
        "silence 5": lambda s: s.silence(5, "mlp"),
        "remove 1": lambda s: s.remove([1]),
        "replace 4": lambda s: s.replace([4], Nudge()),
        "insert 3": lambda s: s.insert(3, Nudge(seed=1)),
    }
    with LayerSurgeon(model) as surgeon:
        for name in order:
            operations[name](surgeon)
        return str(surgeon.plan), logits(model)


ORDER = ["silence 3", "silence 5", "remove 1", "replace 4", "insert 3"]


@settings(max_examples=8)
@given(families, st.permutations(ORDER))
def test_the_order_of_operations_makes_no_difference(family: str, order: list[str]) -> None:
    plan, expected = outcome(family, ORDER)
    other_plan, got = outcome(family, order)
    assert other_plan == plan and torch.equal(got, expected)


def test_a_silenced_block_that_goes_is_gone() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        expected = logits(model)
    before = fingerprint(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.silence(2, "mlp")
        surgeon.remove([2])
        assert torch.equal(logits(model), expected)
        assert surgeon.plan.silenced == {}
        with pytest.raises(StreamlineError, match=r"silence\(2, ...\).*removed"):
            surgeon.silence(2, "attention")
    assert fingerprint(model) == before


def test_twice_is_once_and_the_other_branch_may_follow() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.silence(2, "mlp")
        zeros = find_stack(model)[2].mlp.down_proj.weight
        surgeon.silence(2, "mlp")
        assert find_stack(model)[2].mlp.down_proj.weight is zeros
        surgeon.silence(2, "attention")
        assert surgeon.plan.silenced == {2: ("attention", "mlp")}
        assert find_stack(model)[2].mlp.down_proj.weight is zeros  # an optimiser goes on knowing it


def test_the_plan_says_what_is_silent() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        surgeon.silence(4, "mlp")
        surgeon.silence(4, "attention")
        surgeon.silence(1, "attention")
        assert str(surgeon.plan).splitlines() == [
            "model.layers: 6 blocks -> 5",
            "     1  -> 0 without attention",
            "     2  -> 1",
            "     3  -> 2",
            "     4  -> 3 without attention and mlp",
            "     5  -> 4",
            "removed: 0",
        ]
        assert surgeon.plan.to_dict()["silenced"] == [[1, "attention"], [4, "attention"], [4, "mlp"]]


# Coming back


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@settings(max_examples=8)
@given(family=families, k=blocks, branch=branches, removed=blocks)
def test_everything_comes_back_to_the_bit(
    error: type[BaseException] | None, family: str, k: int, branch: str, removed: int
) -> None:
    model = tiny_model(family)
    before = fingerprint(model)
    held = {n: (id(p), p.clone()) for n, p in model.named_parameters(remove_duplicate=False)}
    try:
        with LayerSurgeon(model) as surgeon:
            surgeon.silence(k, branch)
            surgeon.remove([removed])
            logits(model).sum()
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert fingerprint(model) == before
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert held[name][0] == id(parameter) and torch.equal(held[name][1], parameter)


def test_nested_surgeons_each_take_back_their_own() -> None:
    model = tiny_model("gpt2")
    before = fingerprint(model)
    with LayerSurgeon(model) as outer:
        outer.silence(1, "mlp")
        expected = logits(model)
        with LayerSurgeon(model) as inner:
            inner.silence(1, "mlp")
            inner.silence(1, "attention")
            inner.silence(3, "mlp")
            assert inner.plan.silenced == {1: ("attention", "mlp"), 3: ("mlp",)}
        assert torch.equal(logits(model), expected)
        assert outer.plan.silenced == {1: ("mlp",)}
    assert fingerprint(model) == before


def test_what_was_put_aside_follows_a_model_that_is_moved() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.silence(1, "attention")
        model.to(torch.bfloat16)
        surgeon.silence(2, "mlp")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert logits(model).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(tiny_model("llama", torch.bfloat16)))


def test_a_refusal_leaves_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.silence(1, "mlp")
        before, expected = fingerprint(model), logits(model)
        for wrong in (lambda: surgeon.silence(9, "mlp"), lambda: surgeon.silence(2, "both")):
            with pytest.raises(StreamlineError):
                wrong()
        assert fingerprint(model) == before and torch.equal(logits(model), expected)
        assert surgeon.plan.silenced == {1: ("mlp",)}


# The probe must be able to fail


@pytest.mark.parametrize("wrong", ["self_attn.v_proj.weight", "self_attn.q_proj.weight", "mlp.down_proj.weight"])
def test_a_projection_that_does_not_silence_its_branch_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is zeroed and what the truth throws away are found apart: here the first is planted, and wrong."""
    model = tiny_model("llama")
    right = branches_of(find_stack(model), [2])[2]
    assert isinstance(right, Branches)
    zeros = {wrong: torch.nn.Parameter(torch.zeros_like(find_stack(model)[2].get_parameter(wrong)))}
    monkeypatch.setattr("streamline_hooks.surgery.branch_surgery.find_zeros", lambda *given: zeros)
    observed = silence.observe_silenced
    monkeypatch.setattr(
        "streamline_hooks.surgery.branch_surgery.observe_silenced",
        lambda model, block, paths: observed(model, block, right.writers["attention"]),
    )
    before = fingerprint(model)
    with LayerSurgeon(model) as surgeon:
        if wrong == "self_attn.v_proj.weight":  # which without a bias silences attention too
            surgeon.silence(2, "attention")
        else:
            with pytest.raises(UnsupportedSurgery, match=r"attention branch of block 2 .*other logits"):
                surgeon.silence(2, "attention")
            assert surgeon.plan.silenced == {}
    assert fingerprint(model) == before


# Saying no


@pytest.mark.parametrize(
    ("k", "branch", "text"),
    [
        (6, "mlp", r"silence\(6, ...\).*no such block.*\[0, 1, 2, 3, 4, 5\]"),
        (-1, "mlp", r"silence\(-1, ...\).*no such block"),
        (1, "ffn", r"'ffn' is unknown.*attention, mlp"),
    ],
)
def test_what_is_not_there_cannot_be_silenced(k: int, branch: str, text: str) -> None:
    with LayerSurgeon(tiny_model("llama")) as surgeon, pytest.raises(StreamlineError, match=text):
        surgeon.silence(k, branch)


def test_a_block_without_two_branches_is_refused() -> None:
    model = tiny("bert", blocks=3)
    before = fingerprint(model)
    with LayerSurgeon(model) as surgeon:
        with pytest.raises(UnsupportedSurgery, match=r"block 1.*BertLayer") as error:
            surgeon.silence(1, "mlp")
        assert error.value.cause == "branches"
    assert fingerprint(model) == before


def test_a_tied_projection_is_refused() -> None:
    model = tiny_model("llama")
    layers = find_stack(model)
    layers[3].mlp.down_proj.weight = layers[1].mlp.down_proj.weight
    with LayerSurgeon(model) as surgeon:
        text = r"branch of block 1.*model.layers.1.mlp.down_proj.weight and model.layers.3.*one parameter"
        with pytest.raises(UnsupportedSurgery, match=text):
            surgeon.silence(1, "mlp")
        surgeon.silence(1, "attention")


def test_a_quantised_projection_is_refused() -> None:
    class Packed(torch.nn.Parameter):
        pass

    model = tiny_model("llama")
    projection = find_stack(model)[1].mlp.down_proj
    projection.weight = Packed(projection.weight.data)
    with LayerSurgeon(model) as surgeon:
        with pytest.raises(UnsupportedSurgery, match=r"mlp.down_proj.weight.*block 1"):
            surgeon.silence(1, "mlp")


def test_a_model_that_does_not_say_its_input_needs_a_batch() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    batch = {"src": torch.randn(2, 5, 16)}
    before = [(n, id(p)) for n, p in model.named_parameters()]
    with LayerSurgeon(model) as surgeon:
        with pytest.raises(StreamlineError, match=r"on what.*give a batch"):
            surgeon.silence(1, "mlp")
        expected = model.layers[1](batch["src"])
        surgeon.silence(1, "mlp", batch=batch)
        surgeon.silence(1, "attention", batch=batch)
        assert torch.equal(model.layers[1](batch["src"]), batch["src"]) and not torch.equal(expected, batch["src"])
    assert before == [(n, id(p)) for n, p in model.named_parameters()]


# For good


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2_moe", "gemma2", "gpt_neox", "bamba"])
def test_the_checkpoint_is_a_plain_one(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type, blocks=4)
    plain = type(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        surgeon.silence(1, "attention")
        surgeon.silence(3, "mlp")
        plan = surgeon.commit()
    assert plan.silenced == {1: ("attention",), 3: ("mlp",)}
    assert model.config.streamline_hooks["history"][0]["silenced"] == [[1, "attention"], [3, "mlp"]]
    assert type(model) is plain
    batch = tiny_inputs(model, left_padding=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is plain
    weights = loaded.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=1e-5, atol=1e-5)
    with LayerSurgeon(loaded) as surgeon:  # what is silent already is still known for what it is
        surgeon.silence(0, "attention")
        surgeon.silence(0, "mlp")
        assert surgeon.plan.silenced == {0: ("attention", "mlp")}


def test_a_copy_of_a_silenced_block_is_silent() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.silence(2, "mlp")
        added = surgeon.insert(BLOCKS, copy.deepcopy(surgeon.stack[2]))
        assert not added.mlp.down_proj.weight.any()
    assert find_stack(model)[2].mlp.down_proj.weight.any()

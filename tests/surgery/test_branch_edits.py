"""What zeroing, folding and scaling have in common: caches, order, restoration, refusals, checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack
from streamline_hooks.modeling import BRANCHES
from streamline_hooks.testing import tiny_inputs
from streamline_hooks.testing import tiny_model as tiny
from tests.surgery.test_fold import a_map, times
from tests.surgery.test_fold import width as width_of
from tests.surgery.test_surgeon import fingerprint, logits
from tests.tiny_models import BLOCKS, FAMILIES, Nudge, left_padded, tiny_model, tokens

Edit = Callable[..., None]


def zero_branch(surgeon: LayerSurgeon, k: int, branch: str, **options: object) -> None:
    surgeon.zero_branch(k, branch, **options)


def fold(surgeon: LayerSurgeon, k: int, branch: str, width: int = 32, **options: object) -> None:
    surgeon.fold(k, a_map(width), branch, **options)


def scale(surgeon: LayerSurgeon, k: int, branch: str, **options: object) -> None:
    surgeon.scale(k, 1.7, **options)


branches = st.sampled_from(BRANCHES)
blocks = st.integers(0, BLOCKS - 1)


@st.composite
def cases(draw: st.DrawFn, edit: Edit) -> tuple[nn.Module, int, str]:
    """A model, one of its blocks and branches; a norm follows those of Gemma 3, so that it can only be zeroed."""
    families = FAMILIES if edit is zero_branch else [family for family in FAMILIES if family != "gemma3"]
    return tiny_model(draw(st.sampled_from(families))), draw(blocks), draw(branches)


@pytest.mark.parametrize("edit", [zero_branch, fold, scale])
def test_generate_with_a_cache_equals_without(edit: Edit) -> None:
    @settings(max_examples=8)
    @given(cases(edit), st.booleans())
    def check(case: tuple[nn.Module, int, str], padded: bool) -> None:
        model, k, branch = case
        batch = left_padded(2, 7) if padded else {"input_ids": tokens(2, 7), "attention_mask": torch.ones(2, 7).long()}
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        with LayerSurgeon(model) as surgeon:
            edit(surgeon, k, branch)
            assert len(surgeon.stack.container) == BLOCKS == model.config.num_hidden_layers
            with_cache = model.generate(**batch, **options, use_cache=True)
            assert torch.equal(with_cache, model.generate(**batch, **options, use_cache=False))

    check()


# With other operations, in any order

OPERATIONS: dict[str, Callable[[LayerSurgeon], object]] = {
    "fold 3": lambda s: s.fold(3, a_map()),
    "fold 5": lambda s: s.fold(5, a_map(seed=1), "attention"),
    "zero 3": lambda s: s.zero_branch(3, "attention"),
    "zero 5": lambda s: s.zero_branch(5, "mlp"),
    "remove 1": lambda s: s.remove([1]),
    "replace 4": lambda s: s.replace([4], Nudge()),
    "insert 3": lambda s: s.insert(3, Nudge(seed=1)),
}


def outcome(family: str, order: list[str]) -> tuple[str, torch.Tensor]:
    model = tiny_model(family)
    with LayerSurgeon(model) as surgeon:
        for name in order:
            OPERATIONS[name](surgeon)
        return str(surgeon.plan), logits(model)


@settings(max_examples=8)
@given(st.sampled_from([family for family in FAMILIES if family != "gemma3"]), st.permutations(list(OPERATIONS)))
def test_the_order_of_operations_makes_no_difference(family: str, order: list[str]) -> None:
    plan, expected = outcome(family, list(OPERATIONS))
    other_plan, got = outcome(family, order)
    assert other_plan == plan and torch.equal(got, expected)


def test_the_plan_lists_zeroed_and_folded_branches() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        for branch in ("mlp", "attention"):
            surgeon.fold(4, a_map(), branch)
            surgeon.zero_branch(5, branch)
        surgeon.zero_branch(1, "attention")
        surgeon.fold(1, a_map())
        assert str(surgeon.plan).splitlines() == [
            "model.layers: 6 blocks -> 5",
            "     1  -> 0 without attention with mlp folded",
            "     2  -> 1",
            "     3  -> 2",
            "     4  -> 3 with attention and mlp folded",
            "     5  -> 4 without attention and mlp",
            "removed: 0",
        ]
        values = surgeon.plan.to_dict()
        assert values["folded"] == [[1, "mlp"], [4, "attention"], [4, "mlp"]]
        assert values["silenced"] == [[1, "attention"], [5, "attention"], [5, "mlp"]]


# Coming back


@pytest.mark.parametrize("edit", [zero_branch, fold, scale])
def test_everything_comes_back_to_the_bit(edit: Edit) -> None:
    @settings(max_examples=10)
    @given(cases(edit), blocks, st.sampled_from([None, ValueError, KeyboardInterrupt]))
    def check(case: tuple[nn.Module, int, str], removed: int, error: type[BaseException] | None) -> None:
        model, k, branch = case
        before = fingerprint(model)
        held = {n: (id(p), p.clone()) for n, p in model.named_parameters(remove_duplicate=False)}
        try:
            with LayerSurgeon(model) as surgeon:
                edit(surgeon, k, branch)
                surgeon.remove([removed])
                logits(model).sum()
                if error:
                    raise error
        except (ValueError, KeyboardInterrupt):
            pass
        assert fingerprint(model) == before
        for name, parameter in model.named_parameters(remove_duplicate=False):
            assert held[name][0] == id(parameter) and torch.equal(held[name][1], parameter)

    check()


def test_nested_surgeons_each_take_back_their_own() -> None:
    model = tiny_model("gpt2")
    before = fingerprint(model)
    with LayerSurgeon(model) as outer:
        outer.zero_branch(1, "mlp")
        outer.fold(2, a_map())
        expected = logits(model)
        with LayerSurgeon(model) as inner:
            inner.zero_branch(1, "mlp")
            inner.zero_branch(1, "attention")
            inner.zero_branch(3, "mlp")
            inner.fold(2, a_map(seed=1))
            inner.fold(3, a_map(), "attention")
            assert inner.plan.zeroed == {1: ("attention", "mlp"), 3: ("mlp",)}
            assert inner.plan.folded == {2: ("mlp",), 3: ("attention",)}
        assert torch.equal(logits(model), expected)
        assert outer.plan.zeroed == {1: ("mlp",)} and outer.plan.folded == {2: ("mlp",)}
    assert fingerprint(model) == before


@pytest.mark.parametrize("edit", [zero_branch, fold])
def test_what_was_put_aside_follows_a_model_that_is_moved(edit: Edit) -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        edit(surgeon, 1, "attention")
        model.to(torch.bfloat16)
        edit(surgeon, 2, "mlp")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert logits(model).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(tiny_model("llama", torch.bfloat16)))


def test_a_refusal_leaves_what_was_done_before() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.zero_branch(1, "mlp")
        surgeon.fold(3, a_map())
        before, expected = fingerprint(model), logits(model)
        refused: list[Callable[[], None]] = [
            lambda: surgeon.zero_branch(9, "mlp"),
            lambda: surgeon.zero_branch(2, "both"),  # type: ignore[arg-type]
            lambda: surgeon.fold(9, a_map()),
            lambda: surgeon.fold(2, a_map(33)),
        ]
        for wrong in refused:
            with pytest.raises(StreamlineError):
                wrong()
        assert fingerprint(model) == before and torch.equal(logits(model), expected)
        assert surgeon.plan.zeroed == {1: ("mlp",)} and surgeon.plan.folded == {3: ("mlp",)}


# Saying no


@pytest.mark.parametrize("edit", [zero_branch, fold])
def test_a_tied_projection_is_refused(edit: Edit) -> None:
    model = tiny_model("llama")
    layers = find_stack(model)
    layers[3].mlp.down_proj.weight = layers[1].mlp.down_proj.weight
    with LayerSurgeon(model) as surgeon:
        text = r"branches of block 1.*model.layers.1.mlp.down_proj.weight and model.layers.3.*same parameter.*Untie"
        with pytest.raises(UnsupportedSurgery, match=text):
            edit(surgeon, 1, "mlp")
        edit(surgeon, 1, "attention")


@pytest.mark.parametrize("edit", [zero_branch, fold, scale])
def test_a_quantized_projection_is_refused(edit: Edit) -> None:
    class Packed(torch.nn.Parameter):
        pass

    model = tiny_model("llama")
    projection = find_stack(model)[1].mlp.down_proj
    projection.weight = Packed(projection.weight.data)
    with LayerSurgeon(model) as surgeon:
        with pytest.raises(UnsupportedSurgery, match=r"mlp.down_proj.weight of block 1.*a Packed"):
            edit(surgeon, 1, "mlp")


def test_a_model_that_does_not_say_its_input_needs_a_batch() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    batch, map_ = {"src": torch.randn(2, 5, 16)}, a_map(16).float()
    before = [(n, id(p)) for n, p in model.named_parameters()]
    with LayerSurgeon(model) as surgeon, torch.no_grad():
        for edit in (lambda: surgeon.zero_branch(1, "mlp"), lambda: surgeon.fold(1, map_)):
            with pytest.raises(StreamlineError, match=r"no probe inputs.*Pass a batch"):
                edit()
        handle = model.layers[1].linear2.register_forward_hook(times(map_))
        expected = model.layers[1](batch["src"])
        handle.remove()
        surgeon.fold(1, map_, batch=batch)
        torch.testing.assert_close(model.layers[1](batch["src"]), expected)
        surgeon.zero_branch(1, "mlp", batch=batch)
        surgeon.zero_branch(1, "attention", batch=batch)
        assert torch.equal(model.layers[1](batch["src"]), batch["src"]) and not torch.equal(expected, batch["src"])
    assert before == [(n, id(p)) for n, p in model.named_parameters()]


# For good


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2_moe", "gemma2", "gpt_neox", "bamba", "opt"])
def test_the_checkpoint_is_a_plain_one(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type, blocks=4)
    plain, foldable = type(model), model_type != "gemma2"
    with LayerSurgeon(model) as surgeon:
        surgeon.zero_branch(1, "attention")
        surgeon.zero_branch(3, "mlp")
        if foldable:
            surgeon.fold(2, a_map(width_of(model)))
        with pytest.raises(StreamlineError, match="open LayerSurgeon"):
            model.save_pretrained(tmp_path)
        surgeon.remove([0])
        plan = surgeon.commit()
    assert plan.zeroed == {1: ("attention",), 3: ("mlp",)} and plan.folded == ({2: ("mlp",)} if foldable else {})
    entry = model.config.streamline_hooks["history"][0]
    assert entry["silenced"] == [[1, "attention"], [3, "mlp"]] and entry["folded"] == [[2, "mlp"]] * foldable
    assert type(model) is plain
    batch = tiny_inputs(model, left_padding=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is plain
    weights = loaded.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=1e-5, atol=1e-5)
    with LayerSurgeon(loaded) as surgeon:  # a branch that is zero already is still found
        surgeon.zero_branch(0, "attention")
        surgeon.zero_branch(0, "mlp")
        assert surgeon.plan.zeroed == {0: ("attention", "mlp")}


@pytest.mark.parametrize("edit", [zero_branch, fold])
def test_a_copy_of_a_changed_block_is_changed(edit: Edit) -> None:
    model = tiny_model("llama")
    before = find_stack(model)[2].mlp.down_proj.weight.detach().clone()
    with LayerSurgeon(model) as surgeon:
        edit(surgeon, 2, "mlp")
        added = surgeon.insert(BLOCKS, copy.deepcopy(surgeon.stack[2]))
        assert torch.equal(added.mlp.down_proj.weight, find_stack(model)[2].mlp.down_proj.weight)
        assert not torch.allclose(added.mlp.down_proj.weight, before)
    assert torch.equal(find_stack(model)[2].mlp.down_proj.weight, before)

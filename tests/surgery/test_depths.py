"""A model with several depths: each depth is the surgery by hand, and full depth is the model that it was."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery import DepthCut, at_depth, depths_of, set_depths
from tests.surgery.test_surgeon import fingerprint
from tests.tiny_models import FAMILIES, WIDTH, left_padded, tiny_model, tokens

SMALL, LARGE = range(2, 4), range(1, 5)


def replacement(seed: int) -> LinearReplacement:
    module = LinearReplacement(WIDTH)
    with torch.no_grad():
        module.projection.weight.copy_(
            torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))
        )
    return module


def with_depths(family: str = "llama") -> tuple[Any, dict[int, DepthCut]]:
    model = tiny_model(family)
    blocks = model.config.num_hidden_layers
    cuts = {blocks - 2: DepthCut((SMALL,), (replacement(0),)), blocks - 4: DepthCut((LARGE,), (replacement(1),))}
    set_depths(model, list(cuts.values()))
    return model, cuts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_depth_is_the_surgery_by_hand_and_full_depth_the_model_before(family: str) -> None:
    model, cuts = with_depths(family)
    plain, before = tiny_model(family), fingerprint(model)
    batch = left_padded(2, 7)
    expected = plain(**batch).logits
    assert depths_of(model) == (model.config.num_hidden_layers, *cuts)
    for depth, cut in cuts.items():
        with at_depth(model, depth), LayerSurgeon(plain) as surgeon:
            cut.apply(surgeon)
            assert torch.equal(model(**batch).logits, plain(**batch).logits)
            options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            told = [m.generate(**batch, **options, use_cache=c) for m in (model, plain) for c in (True, False)]
            assert all(torch.equal(told[0], other) for other in told[1:])
        assert torch.equal(model(**batch).logits, expected) and fingerprint(model) == before


@settings(max_examples=10)
@given(st.lists(st.sampled_from(["4", "2", "6", "error", "half"]), max_size=8))
def test_any_order_of_depths_and_errors_leaves_the_model_as_it_was(steps: list[str]) -> None:
    model, _ = with_depths()
    before, ids = fingerprint(model), tokens(1, 6)
    logits = {}
    for depth in depths_of(model):
        with at_depth(model, depth):
            logits[depth] = model(ids).logits
    for step in steps:
        if step == "error":
            with pytest.raises(RuntimeError, match="inside"), at_depth(model, 4):
                raise RuntimeError("inside")
        elif step == "half":
            model.to(torch.bfloat16).to(torch.float32)
            before = fingerprint(model)
            for depth in depths_of(model):
                with at_depth(model, depth):
                    logits[depth] = model(ids).logits
        else:
            with at_depth(model, int(step)):
                assert torch.equal(model(ids).logits, logits[int(step)])
    assert fingerprint(model) == before and torch.equal(model(ids).logits, logits[6])


def test_replacements_of_depths_are_not_the_models() -> None:
    model, cuts = with_depths()
    plain = tiny_model("llama")
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not {id(p) for p in model.parameters()} & {id(p) for c in cuts.values() for p in c.modules[0].parameters()}  # type: ignore[union-attr]


def test_a_copy_has_depths_of_its_own() -> None:
    model, _ = with_depths()
    other = copy.deepcopy(model)
    with torch.no_grad(), at_depth(other, 4):
        other.model.layers[2].spliced_before[0].projection.weight.zero_()
    ids = tokens(1, 6)
    with at_depth(model, 4), at_depth(other, 4):
        assert not torch.allclose(model(ids).logits, other(ids).logits)


def test_gradients_reach_the_replacement_of_a_depth() -> None:
    model, cuts = with_depths()
    with at_depth(model, 4):
        model(tokens(1, 6)).logits.sum().backward()
    weight = cuts[4].modules[0].projection.weight  # type: ignore[union-attr]
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_a_cache_of_another_depth_is_refused() -> None:
    model, _ = with_depths()
    ids = tokens(1, 6)
    filled = model(ids, use_cache=True).past_key_values
    with at_depth(model, 4):
        with pytest.raises(StreamlineError, match=r"filled with 6 blocks.*runs with 4"):
            model(ids[:, :1], past_key_values=filled)
        shallow = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=shallow)
    with pytest.raises(StreamlineError, match=r"filled with 4 blocks.*runs with 6"):
        model(ids[:, :1], past_key_values=shallow)
    assert torch.isfinite(model(ids[:, :1], past_key_values=filled).logits).all()


def test_a_cache_that_generate_made_keeps_its_depth() -> None:
    from transformers import DynamicCache

    model, _ = with_depths()
    cache = DynamicCache(config=model.config)
    with at_depth(model, 4):
        model.generate(tokens(1, 4), max_new_tokens=2, past_key_values=cache, eos_token_id=None, pad_token_id=0)
    with pytest.raises(StreamlineError, match="filled with 4 blocks"):
        model(tokens(1, 1), past_key_values=cache)


def test_what_cannot_be_a_depth_is_refused() -> None:
    model = tiny_model("llama")
    block = copy.deepcopy(model.model.layers[3])
    for cuts, text in (
        ([DepthCut((SMALL,), (None,)), DepthCut((range(3, 6),), (None,))], "not nested"),
        ([DepthCut((SMALL,), (None,)), DepthCut((SMALL,), (replacement(0),))], "not nested"),
        ([DepthCut((SMALL,), (block,))], "a block of the model"),
        ([DepthCut((range(0, 6),), (None,))], "Leave at least one block"),
    ):
        with pytest.raises(StreamlineError, match=text):
            set_depths(model, cuts)
    with pytest.raises(StreamlineError, match="one depth"):
        depths_of(model)
    with pytest.raises(StreamlineError, match="Expected one module"):
        DepthCut((SMALL,), ())


def test_a_window_that_cannot_be_removed_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[3].self_attn.q_proj.weight = model.model.layers[5].self_attn.q_proj.weight
    with pytest.raises(UnsupportedSurgery):
        set_depths(model, [DepthCut((range(3, 4),), (None,))])


def test_at_depth_is_refused_where_its_numbers_would_mean_other_blocks() -> None:
    model, _ = with_depths()
    with pytest.raises(StreamlineError, match=r"depth=5.*6, 4, 2"), at_depth(model, 5):
        pass
    with at_depth(model, 4), pytest.raises(StreamlineError, match="open"), at_depth(model, 2):
        pass
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([5])
        with pytest.raises(StreamlineError, match="open"), at_depth(model, 4):
            pass
        surgeon.commit()
    with pytest.raises(StreamlineError, match=r"has 5 blocks.*made for 6"), at_depth(model, 4):
        pass


def test_another_thread_may_not_choose_a_depth_meanwhile() -> None:
    model, _ = with_depths()
    raised: list[str] = []

    def choose() -> None:
        try:
            with at_depth(model, 2):
                raised.append("nothing")
        except StreamlineError as error:
            raised.append(str(error))

    with at_depth(model, 4):
        thread = threading.Thread(target=choose)
        thread.start()
        thread.join()
    assert len(raised) == 1 and "open" in raised[0]


def test_depths_can_be_taken_away() -> None:
    model, _ = with_depths()
    set_depths(model, [])
    with pytest.raises(StreamlineError, match="one depth"):
        depths_of(model)
    set_depths(model, [DepthCut((SMALL,), (nn.Identity(),))])
    assert depths_of(model) == (6, 4) and len(model._forward_pre_hooks) == 1

"""Which tokens count, stack by stack: of an encoder and a decoder, of towers, of blocks inside a model that masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamline_hooks import HiddenStateRecorder, StreamlineError, find_stack, profile
from streamline_hooks.core import padding_mask_of_call
from streamline_hooks.modeling.hooks import WatchedMask
from streamline_hooks.modeling.state_layout import by_token
from streamline_hooks.statistics import WindowMoments, measure_moments
from streamline_hooks.testing import causal_model_types, tiny_model
from tests.other_models import DECODED, LONG, OTHERS, WHOLE, made, padded, pictures, rwkv


def require_own_tokens(model: Any, path: str, batch: dict[str, torch.Tensor], mask: torch.Tensor | None) -> None:
    with torch.no_grad(), HiddenStateRecorder(model, stack=path) as record:
        record(**batch)
    blocks = find_stack(model, path)
    entering, leaving = by_token(record.inputs[1][0], blocks[1]), by_token(record.outputs[2][0], blocks[2])
    real = torch.ones(entering.shape[:2]) if mask is None else mask
    expected = WindowMoments(entering.shape[-1])
    expected.update(entering, leaving, real)
    (found,) = measure_moments(model, [batch], [range(1, 3)], stack=path)
    asked = {} if record.inputs[1][0].ndim == 3 else {"replicates": 0}
    assert found.tokens == int(real.sum()) == profile(model, [batch], stack=path, **asked).tokens
    torch.testing.assert_close(found.xx, expected.xx, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.xd, expected.xd, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
def test_moments_count_the_stacks_own_tokens(name: str) -> None:
    case = OTHERS[name]
    model = made(name)
    require_own_tokens(model, case.path(model), case.batch, case.real)


@pytest.mark.parametrize(("model_type", "path"), [("llama", "model.layers"), ("gpt2", "transformer.h")])
def test_a_decoder_alone_counts_what_its_mask_says(model_type: str, path: str) -> None:
    require_own_tokens(tiny_model(model_type, blocks=3), path, LONG, LONG["attention_mask"])


def test_a_model_that_hands_no_mask_on_has_that_of_the_one_around_it() -> None:
    model = rwkv().eval()
    with torch.no_grad(), WatchedMask(find_stack(model)) as watched:
        model(**LONG)
    assert torch.equal(watched.mask, LONG["attention_mask"])


def test_queries_and_sounds_have_not_the_masks_of_the_text() -> None:
    """A call as a Q-Former's, with as many queries as there are tokens; and one of sounds, masked by query and key."""
    text = LONG["attention_mask"]

    class QFormer(torch.nn.Module):
        def forward(self, query_embeds: Any, attention_mask: Any = None, encoder_hidden_states: Any = None) -> None: ...

    class Sounds(torch.nn.Module):
        def forward(self, input_features: Any, attention_mask: Any = None) -> None: ...

    queries, states, laid_out = torch.ones(2, 9, 8), torch.ones(2, 4, 8), torch.ones(2, 1, 9, 9)
    assert padding_mask_of_call(QFormer(), (queries,), {"encoder_hidden_states": states}, text) is None
    assert padding_mask_of_call(Sounds(), (states,), {"attention_mask": laid_out}, text) is laid_out
    bert = torch.nn.Module()
    bert.forward = lambda hidden_states, attention_mask=None, encoder_hidden_states=None: None  # type: ignore[method-assign]
    assert padding_mask_of_call(bert, (queries, laid_out), {"encoder_hidden_states": states}, text) is text


def test_patches_as_many_as_tokens_are_not_masked_by_the_text() -> None:
    batch = padded([5, 3], 5) | pictures()
    require_own_tokens(made("clip pictures"), "vision_model.encoder.layers", batch, None)


@pytest.mark.parametrize("name", ["qwen2-vl pictures", "qwen2.5-vl pictures"])
def test_patches_in_one_row_are_all_real_and_one_sequence(name: str) -> None:
    model, case = made(name), OTHERS[name]
    stack = find_stack(model, case.path(model))
    with torch.no_grad(), WatchedMask(stack) as watched:
        model(**case.batch)
    assert watched.mask is None
    found = profile(model, [case.batch], stack=stack.path)
    assert found.tokens == len(case.batch["pixel_values"]) and found.sequences == 1  # the batch, of all its pictures
    with pytest.raises(StreamlineError, match=r"two different sequences.*has 1"):
        found.interval("cosine", range(0, 1))


def test_a_mask_is_of_one_call_and_the_hooks_go() -> None:
    model = made("t5 decoder")
    with torch.no_grad(), WatchedMask(find_stack(model, "decoder.block")) as watched:
        model(**LONG, **DECODED)
        assert torch.equal(watched.mask, DECODED["decoder_attention_mask"])
        model(**LONG, **WHOLE)
        assert watched.mask is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_masks_that_an_outer_model_makes_by_kind_of_attention_hide_no_token() -> None:
    """Gemma 4 hands its text model a mask for each kind of attention, also if it is called without a mask."""
    if "gemma4" not in causal_model_types():
        pytest.skip("this version of Transformers has no Gemma 4")
    model, ids = tiny_model("gemma4"), LONG["input_ids"]
    without, full = profile(model, [ids]), profile(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    assert without.tokens == full.tokens == ids.numel()
    torch.testing.assert_close(without.cosine, full.cosine, rtol=1e-9, atol=1e-12)
    assert profile(model, [LONG]).tokens == int(LONG["attention_mask"].sum()) < ids.numel()

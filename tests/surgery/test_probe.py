"""The probe of a model whose forward somebody has wrapped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, compress, find_stack
from streamline_hooks.core import UnsupportedSurgery, prepare_inputs
from streamline_hooks.modeling import isolated_inference, probe_logits
from streamline_hooks.surgery import resume
from streamline_hooks.surgery.fold import scaled_logits_allclose
from streamline_hooks.surgery.probe import (
    ReferenceRun,
    matches_reference,
    probe_logits_allclose,
    run_reference,
)
from streamline_hooks.testing import causal_model_types
from streamline_hooks.testing import tiny_model as tiny
from tests.configured import configured
from tests.tiny_models import tiny_config, tiny_model


def test_what_is_wrapped_for_mixed_precision_is_probed_in_its_own() -> None:
    """As accelerate wraps it: answers are float32 and no more exact than bfloat16, as if a cache no longer fitted."""
    model: Any = tiny_model("llama").eval()
    own = probe_logits(model)
    model._original_forward = model.forward

    def wrapped(input_ids: Any = None, use_cache: Any = None, past_key_values: Any = None, **given: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            output = model._original_forward(input_ids, use_cache=use_cache, past_key_values=past_key_values, **given)
        output.logits = output.logits.float()
        return output

    model.forward = wrapped
    assert not torch.equal(probe_logits(model), own)
    with isolated_inference(model):
        assert torch.equal(probe_logits(model), own)
    assert model.forward is wrapped
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
    assert model.forward is wrapped


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fault_is_seen_in_half_precision(dtype: torch.dtype) -> None:
    """A planted one: a block adds something once it has another number of blocks before it."""
    model: Any = tiny_model("llama", dtype)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
    stack = find_stack(model)
    forward, length = stack[2].forward, len(stack)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return output if len(stack.container) == length else output + 0.3 * torch.arange(32).sin().to(dtype)

    stack[2].forward = faulty
    with LayerSurgeon(model) as surgeon, pytest.raises(UnsupportedSurgery, match="other logits"):
        surgeon.remove([1])


class TwoCodebooks(LlamaForCausalLM):
    """Answers with logits of two codebooks for each token."""

    @functools.wraps(LlamaForCausalLM.forward)  # what it takes is read
    def forward(self, *args: Any, **given: Any) -> Any:
        output = super().forward(*args, **given)
        output.logits = torch.stack([output.logits, -output.logits], dim=2)
        return output


def test_cached_decoding_is_compared_where_a_token_has_more_than_one_row_of_logits() -> None:
    model: Any = TwoCodebooks(tiny_config("llama")).eval()
    truth = run_reference(find_stack(model), range(1, 2))
    assert truth is not None and truth.logits.ndim == 4 and truth.cached


def test_what_transformers_installs_while_it_probes_stays_beside_the_users_hooks() -> None:
    """It installs its hooks once; on a block with a hook of the user's they would be lost, and states with them."""
    model: Any = tiny_model("llama").eval()
    find_stack(model)[1].register_forward_hook(lambda *_: None)
    with isolated_inference(model):
        model(ids := torch.arange(3, 9)[None], output_hidden_states=True)
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == len(find_stack(model)) + 1


@pytest.mark.parametrize(("kind", "attentions"), [("recurrent_gemma", range(2, 6)), ("nemotron_h", range(2, 7))])
def test_a_model_that_ran_with_its_state_has_to_run_with_it_afterwards(kind: str, attentions: range) -> None:
    """Its cached decoding is not the forward to the last digit, and is not asked for; that it fails is seen still."""
    if kind not in causal_model_types():
        pytest.skip(f"this version of Transformers has no {kind}")
    model: Any = tiny(kind)
    ids = torch.arange(3, 27).view(2, 12)
    model(input_ids=ids)
    with LayerSurgeon(model) as surgeon:
        try:
            surgeon.remove(attentions)
        except UnsupportedSurgery as error:
            assert "with its default cache" in str(error)
        else:  # in an older version of Transformers it runs without any
            model(input_ids=ids)
    model(input_ids=ids)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([attentions.start])
        model(input_ids=ids)


def test_no_cache_is_built_where_that_is_not_said_by_name() -> None:
    """Granite's mixtures take ``use_cache`` among others; the blocks behind a window may have none of their own."""
    model: Any = tiny("granitemoehybrid")
    ids = torch.arange(3, 27).view(2, 12)
    assert model.config.use_cache
    with torch.no_grad():
        assert model(**prepare_inputs(model, ids)).past_key_values is None
        with HiddenStateRecorder(model, [6]) as record:
            whole = model(**prepare_inputs(model, ids)).logits
        assert torch.equal(resume(model, 6, record.inputs[6][0], ids).logits, whole)
    rows = torch.randint(3, 60, (6, 2, 12), generator=torch.Generator().manual_seed(0))
    parts: dict[str, Any] = {"calibration": list(rows[:4]), "validation": [rows[4]], "test": [rows[5]]}
    result = compress(model, parts, configured(remove=2, repair="folded", shortlist=2, speed=False, generation=False))
    assert len(result.plan.slots) == 6
    model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)


def test_a_model_that_fails_does_not_match_a_reference() -> None:
    model: Any = tiny_model("llama")
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    reference = ReferenceRun(inputs, probe_logits(model, inputs), cached=False)
    assert matches_reference(reference, model)
    model.lm_head.weight.data.neg_()
    assert not matches_reference(reference, model)
    model.lm_head = torch.nn.Linear(3, 3)
    assert not matches_reference(reference, model)


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("allclose", [probe_logits_allclose, scaled_logits_allclose])
def test_masked_logits_do_not_widen_the_tolerance(allclose: Callable[[Tensor, Tensor], bool], mask: float) -> None:
    """Models mask entries of the vocabulary with the lowest number, and a part of it would allow any difference."""
    expected = torch.ones(1, 2, 3)
    expected[..., 0] = mask
    got = expected.clone()
    assert allclose(got, expected)
    got[0, 1, 2] += 0.5
    assert not allclose(got, expected)
    got = expected.clone()
    got[0, 0, 0] = 0.0
    assert not allclose(got, expected)

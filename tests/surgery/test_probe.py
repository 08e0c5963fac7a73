"""The probe of a model whose forward somebody has wrapped."""

from __future__ import annotations

from typing import Any

import torch

from streamline_hooks import LayerSurgeon, find_stack
from streamline_hooks.surgery.probe import logits_of_probe, undisturbed
from tests.tiny_models import tiny_model


def test_what_is_wrapped_for_mixed_precision_is_probed_in_its_own() -> None:
    """As accelerate wraps it: answers are float32 and no more exact than bfloat16, as if a cache no longer fitted."""
    model: Any = tiny_model("llama").eval()
    own = logits_of_probe(model)
    model._original_forward = model.forward

    def wrapped(input_ids: Any = None, use_cache: Any = None, past_key_values: Any = None, **given: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            output = model._original_forward(input_ids, use_cache=use_cache, past_key_values=past_key_values, **given)
        output.logits = output.logits.float()
        return output

    model.forward = wrapped
    assert not torch.equal(logits_of_probe(model), own)
    with undisturbed(model):
        assert torch.equal(logits_of_probe(model), own)
    assert model.forward is wrapped
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
    assert model.forward is wrapped


def test_what_transformers_installs_while_it_probes_stays_beside_the_users_hooks() -> None:
    """It installs its hooks once; on a block with a hook of the user's they would be lost, and states with them."""
    model: Any = tiny_model("llama").eval()
    find_stack(model)[1].register_forward_hook(lambda *_: None)
    with undisturbed(model):
        model(ids := torch.arange(3, 9)[None], output_hidden_states=True)
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == len(find_stack(model)) + 1

"""Half precision, bfloat16 and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon
from streamline_hooks.recording import RecordingConfig
from streamline_hooks.replacements import LinearReplacement
from tests.tiny_models import BLOCKS, WIDTH, Nudge, tiny_model, tokens

halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
families = pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])


def loss_of(model: nn.Module) -> Tensor:
    ids = tokens(2, 7)
    return model(ids, labels=ids, use_cache=False).loss


@halves
@families
def test_a_model_in_half_precision(family: str, dtype: torch.dtype) -> None:
    model, nudge = tiny_model(family, dtype), Nudge()
    with LayerSurgeon(model) as surgeon, HiddenStateRecorder(model) as record:
        surgeon.replace([1, 2], nudge)
        surgeon.insert(BLOCKS, LinearReplacement.from_map(torch.zeros(WIDTH, WIDTH)))
        loss = loss_of(model)
        loss.backward()
    assert loss.isfinite() and nudge.weight.dtype == dtype and nudge.weight.grad.isfinite().all()
    assert {v[0].dtype for v in (*record.inputs.values(), *record.outputs.values()) if v} == {dtype}


@families
def test_made_half_inside_the_context(family: str) -> None:
    model = tiny_model(family)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1, 2], Nudge())
        model.half()
        assert loss_of(model).isfinite()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert torch.equal(loss_of(model), loss_of(tiny_model(family).half()))


@halves
@families
def test_autocast(family: str, dtype: torch.dtype) -> None:
    model, nudge = tiny_model(family), Nudge()
    with torch.autocast("cpu", dtype), HiddenStateRecorder(model) as plain:
        loss_of(model)
    with torch.autocast("cpu", dtype), LayerSurgeon(model) as surgeon, HiddenStateRecorder(model) as record:
        surgeon.replace([1, 2], nudge)
        loss = loss_of(model)
        loss.backward()
    assert loss.isfinite() and nudge.weight.dtype == torch.float32 and nudge.weight.grad.isfinite().all()
    for k in set(range(BLOCKS)) - {1, 2}:
        assert record.outputs[k][0].dtype == plain.outputs[k][0].dtype
        assert record.outputs[k][0].isfinite().all()
    torch.testing.assert_close(record.outputs[0][0], plain.outputs[0][0])


def test_a_splice_does_not_lower_the_precision_of_the_state() -> None:
    """Under autocast a bare Linear returns bfloat16, where the residual stream is float32."""
    model = tiny_model("llama")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), LayerSurgeon(model) as surgeon:
        surgeon.insert(2, nn.Linear(WIDTH, WIDTH))
        with HiddenStateRecorder(model) as record:
            loss_of(model)
    assert {v[0].dtype for v in record.inputs.values()} == {torch.float32}


def test_an_identity_under_autocast_changes_nothing_to_the_bit() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = loss_of(model)
        with LayerSurgeon(model) as surgeon:
            surgeon.insert(0, nn.Identity())
            surgeon.insert(BLOCKS, nn.Identity())
            assert torch.equal(loss_of(model), before)


@halves
def test_states_are_kept_in_the_precision_that_was_asked_for(dtype: torch.dtype) -> None:
    with (
        torch.no_grad(),
        HiddenStateRecorder(tiny_model("llama", dtype), config=RecordingConfig(dtype=torch.float64)) as record,
    ):
        record(input_ids=tokens(1, 4))
    assert record.inputs[3][0].dtype == torch.float64


def test_a_splice_in_another_precision_than_its_model() -> None:
    """A user who trains the splice in float32 inside a bfloat16 model under autocast."""
    model, nudge = tiny_model("llama", torch.bfloat16), Nudge()
    with LayerSurgeon(model) as surgeon, torch.autocast("cpu", torch.bfloat16):
        surgeon.replace([1, 2], nudge)
        nudge.float()
        loss = loss_of(model)
        loss.backward()
    assert loss.isfinite() and nudge.weight.grad.dtype == torch.float32

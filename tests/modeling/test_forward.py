"""Resuming, preparing and driving batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, find_stack, profile
from streamline_hooks.core import prepare_inputs, split_into_batches
from streamline_hooks.modeling.forward import inference
from streamline_hooks.surgery import resume
from tests.tiny_models import BLOCKS, FAMILIES, Nudge, left_padded, tiny_model, tokens


@given(st.sampled_from(FAMILIES), st.integers(0, BLOCKS), st.booleans())
def test_resuming_gives_what_the_whole_forward_gives(family: str, k: int, padded: bool) -> None:
    model = tiny_model(family)
    batch = left_padded(3, 9) if padded else {"input_ids": tokens(2, 9)}
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        whole = model(**prepare_inputs(model, batch)).logits
        states = record.inputs[k][0] if k < BLOCKS else record.outputs[BLOCKS - 1][0]
        assert torch.equal(resume(model, k, states, batch).logits, whole)


def test_resuming_runs_no_earlier_block() -> None:
    model, called = tiny_model("llama"), []
    for k, block in enumerate(find_stack(model).blocks):
        block.mlp.register_forward_hook(lambda m, a, o, k=k: called.append(k))
    resume(model, 4, torch.zeros(2, 9, 32), tokens(2, 9))
    assert called == [4, 5]


def test_resuming_in_a_model_with_splices_starts_after_them() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), Nudge())
        surgeon.insert(BLOCKS, Nudge(seed=1))
        with HiddenStateRecorder(model) as record:
            whole = model(tokens(2, 9)).logits
        assert torch.equal(resume(model, 1, record.inputs[1][0], tokens(2, 9)).logits, whole)
        assert torch.equal(resume(model, 4, record.outputs[3][0], tokens(2, 9)).logits, whole)


@pytest.mark.parametrize("gone", [range(0, 2), range(1, 3), range(4, 6)], ids=str)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_is_spliced_in_before_is_not_run_on_states_that_have_passed_it(family: str, gone: range) -> None:
    """Where the blocks in front are not run, but those whose position bias all need, as T5's first."""
    if family == "t5" and 0 in gone:
        pytest.skip("T5's first block makes the position bias of all, and stays")
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=6, num_heads=4, vocab_size=64)
    model: Any = tiny_model("llama") if family == "llama" else transformers.T5EncoderModel(config).eval()
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(gone, Nudge())
        surgeon.commit()
    length, batch = len(find_stack(model)), prepare_inputs(model, tokens(2, 9))
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        whole = model(**batch)[0]
        for k in range(1, length):
            found = resume(model, k, record.outputs[k - 1][0], tokens(2, 9), before_splices=True)
            torch.testing.assert_close(found[0], whole, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(**batch)[0], whole), "and it is as it was"


def test_what_cannot_be_resumed() -> None:
    model = tiny_model("llama")
    with pytest.raises(StreamlineError, match=r"block 7.*6 blocks.*0 to 6"):
        resume(model, 7, torch.zeros(2, 9, 32), tokens(2, 9))
    with pytest.raises(StreamlineError, match=r"\(2.*8.*32\).*\(2.*9.*32\)"):
        resume(model, 3, torch.zeros(2, 8, 32), tokens(2, 9))
    assert not find_stack(model)[3]._forward_pre_hooks and len(find_stack(model)) == BLOCKS


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_does_not_change_the_real_tokens(family: str) -> None:
    """Without position_ids GPT-2 would count the padding."""
    model, batch = tiny_model(family), left_padded(3, 9)
    with inference(model):
        padded = model(**prepare_inputs(model, batch)).logits
        for row in range(3):
            real = batch["attention_mask"][row].bool()
            alone = model(**prepare_inputs(model, batch["input_ids"][row][real][None])).logits
            torch.testing.assert_close(padded[row][real], alone[0], rtol=1e-4, atol=1e-4)


def test_prepare_leaves_what_is_given() -> None:
    model = tiny_model("gpt2")
    given_ids = torch.zeros(3, 9, dtype=torch.long)
    assert prepare_inputs(model, {**left_padded(3, 9), "position_ids": given_ids})["position_ids"] is given_ids
    assert prepare_inputs(model, {"input_ids": tokens(1, 3), "use_cache": True})["use_cache"] is True
    assert "use_cache" not in prepare_inputs(nn.Linear(3, 3), {"input": torch.zeros(1, 3)})


def test_inference_gives_the_mode_back_module_by_module() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[2].eval()
    before = [m.training for m in model.modules()]
    with inference(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
    assert [m.training for m in model.modules()] == before


def exhaust(passed: AbstractContextManager[Iterator[Any]]) -> int:
    with passed as several:
        return len(list(several))


def test_an_error_that_is_kept_keeps_nothing_of_the_model() -> None:
    """As a notebook keeps the last one: the model stayed in evaluation, with hooks, and all gradients off."""
    model = tiny_model("llama").train()
    with pytest.raises(StreamlineError) as kept:
        profile(model, [tokens(2, 8)], tokens=[torch.ones(2, 7)], replicates=0)
    assert kept.value.__traceback__ is not None
    assert model.training and torch.is_grad_enabled()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_states_that_are_not_finite_are_named() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    batches = split_into_batches(tokens(4, 9), 2)
    with pytest.raises(StreamlineError, match=r"block 2.*NaN.*0\)"):
        exhaust(HiddenStateRecorder(model, [2, 3]).over(batches))


def test_a_batch_number_is_that_of_the_batch() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[7] = float("inf")
    clean, dirty = torch.full((1, 4), 5), torch.tensor([[5, 7, 5, 5]])
    with pytest.raises(StreamlineError, match=r"block 0.*NaN.*1\)"):
        exhaust(HiddenStateRecorder(model, [0]).over([clean, dirty]))


def test_padding_may_hold_anything() -> None:
    model, batch = tiny_model("llama"), left_padded(2, 6)
    model.model.embed_tokens.weight.data[0] = 1e30  # the padding token
    record = HiddenStateRecorder(model, [0], sites=["block.input"], stop=True)
    assert exhaust(record.over([batch])) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_are_recorded_without_their_padding(family: str) -> None:
    """Left-padded, the real tokens have the states of the sequences alone."""
    model, batch = tiny_model(family).train(), left_padded(3, 9)
    record = HiddenStateRecorder(model, [1, 3], stop=True)
    alone = [batch["input_ids"][row][batch["attention_mask"][row].bool()][None] for row in range(3)]
    with record.over([batch, *alone], "states") as recorded:
        found = []
        for one in recorded:
            assert one.output is None and not model.training and not torch.is_grad_enabled()
            found.append((one.entering(1)[one.real], one.leaving(3)[one.real], one.real.clone()))
    assert torch.equal(found[0][2], batch["attention_mask"].bool()) and all(one[2].all() for one in found[1:])
    for place in (0, 1):
        torch.testing.assert_close(found[0][place], torch.cat([one[place] for one in found[1:]]), rtol=1e-4, atol=1e-4)
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_a_recorder_that_chooses_tokens_yields_no_batches() -> None:
    with pytest.raises(StreamlineError, match="tokens='all'.*mask"):
        exhaust(HiddenStateRecorder(tiny_model("llama"), [0], tokens="real").over([tokens(1, 4)]))


def test_a_block_that_is_called_twice_is_refused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.inner(x)

    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in [*self.layers, *self.layers]:
                x = layer(x)
            return x

    model = Looped()
    with pytest.raises(StreamlineError, match=r"block 0 2 times.*expected"):
        exhaust(HiddenStateRecorder(model).over([{"x": torch.zeros(1, 2, 4)}]))

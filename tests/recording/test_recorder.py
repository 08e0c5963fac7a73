"""What the recorder reads, and that it leaves nothing behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack
from streamline_hooks.modeling import by_token, read_output
from streamline_hooks.recording import BlockSite, Intervention, RecordingConfig, Zero
from streamline_hooks.recording.recorder import ForwardStopped
from streamline_hooks.testing import causal_model_types, tiny_inputs
from streamline_hooks.testing import tiny_model as tiny_of_type
from streamline_hooks.training import HiddenStateMonitor
from tests.tiny_models import BLOCKS, FAMILIES, Nudge, left_padded, tiny_model, tokens


def hooks(model: nn.Module) -> list[object]:
    return [(n, list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()]


@given(st.sampled_from(FAMILIES), st.booleans())
def test_inputs_equal_output_hidden_states_for_every_block(family: str, padded: bool) -> None:
    model = tiny_model(family)
    batch = left_padded(3, 9) if padded else {"input_ids": tokens(2, 9)}
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        states = model(**batch, output_hidden_states=True).hidden_states
    for k in range(BLOCKS):
        assert torch.equal(record.inputs[k][0], states[k])
        assert k == BLOCKS - 1 or torch.equal(record.outputs[k][0], states[k + 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_output_is_the_blocks_own_and_not_the_normed_state(family: str) -> None:
    model, own = tiny_model(family), []
    find_stack(model)[-1].register_forward_hook(lambda m, a, out: own.append(read_output(out)))
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        normed = model(tokens(2, 9), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(record.outputs[BLOCKS - 1][0], own[0])
    assert not torch.allclose(record.outputs[BLOCKS - 1][0], normed, atol=1e-2)


@pytest.mark.parametrize("opened_first", ["recorder", "surgeon"])
def test_at_a_splice_the_state_after_it_is_recorded(opened_first: str) -> None:
    model, nudge, end = tiny_model("llama"), Nudge(seed=1), Nudge(seed=2)
    with torch.no_grad(), HiddenStateRecorder(model) as plain:
        model(tokens(2, 9))
    record, surgeon = HiddenStateRecorder(model), LayerSurgeon(model)
    with torch.no_grad():
        for context in (record, surgeon) if opened_first == "recorder" else (surgeon, record):
            context.__enter__()
        surgeon.insert(2, nudge)
        surgeon.insert(BLOCKS, end)
        model(tokens(2, 9))
        assert torch.equal(record.inputs[2][0], nudge(plain.inputs[2][0]))
        torch.testing.assert_close(record.outputs[BLOCKS - 1][0], end(own_last(model, record)))
        record.__exit__(None, None, None)
        surgeon.__exit__(None, None, None)


def own_last(model: nn.Module, record: HiddenStateRecorder) -> torch.Tensor:
    """The last block's own output, run once more on what it received."""
    block = find_stack(model)[-1]
    state = record.inputs[BLOCKS - 1][0]
    positions = torch.arange(state.shape[1])[None]
    return block.forward(state, position_embeddings=model.model.rotary_emb(state, positions))


@given(st.sampled_from(FAMILIES), st.integers(1, 5))
def test_generate_tells_prefill_and_steps_apart(family: str, steps: int) -> None:
    model, batch = tiny_model(family), left_padded(2, 7)
    with HiddenStateRecorder(model, [0, -1]) as record:
        model.generate(**batch, max_new_tokens=steps + 1, do_sample=False, eos_token_id=None)
    assert [v.shape[1] for v in record.inputs[0]] == [7] + [1] * steps
    assert [v.shape[1] for v in record.outputs[BLOCKS - 1]] == [7] + [1] * steps


def test_last_real_token_under_any_padding() -> None:
    model = tiny_model("llama")
    left = left_padded(3, 9)
    with torch.no_grad(), HiddenStateRecorder(model, [2], tokens="last") as record:
        model(**left)
    with torch.no_grad(), HiddenStateRecorder(model, [2]) as whole:
        model(**left)
    assert torch.equal(record.inputs[2][0], whole.inputs[2][0][:, -1])
    right = {"input_ids": left["input_ids"].flip(1), "attention_mask": left["attention_mask"].flip(1)}
    with torch.no_grad(), HiddenStateRecorder(model, [2], tokens="last") as record:
        model(**right)
    with torch.no_grad(), HiddenStateRecorder(model, [2]) as whole:
        model(**right)
    ends = right["attention_mask"].sum(1) - 1
    assert torch.equal(record.inputs[2][0], whole.inputs[2][0][torch.arange(3), ends])


def test_real_tokens_and_a_mask() -> None:
    model, batch = tiny_model("gpt2"), left_padded(3, 9)
    with torch.no_grad(), HiddenStateRecorder(model, [1]) as whole:
        model(**batch)
    for kept in ("real", batch["attention_mask"].bool()):
        with torch.no_grad(), HiddenStateRecorder(model, [1], tokens=kept) as record:
            model(**batch)
        assert torch.equal(record.outputs[1][0], whole.outputs[1][0][batch["attention_mask"].bool()])
    with pytest.raises(StreamlineError, match=r"\(3.*4\).*\(3.*9\)"), torch.no_grad():
        with HiddenStateRecorder(model, [1], tokens=torch.ones(3, 4)):
            model(**batch)


def test_a_block_that_works_in_place_does_not_change_what_was_recorded() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x += self.inner(x)
            return x

    model = nn.Sequential(nn.Identity(), nn.Sequential(*(InPlace() for _ in range(3))))
    x = torch.randn(2, 3, 4)
    states = [x.clone()]
    with torch.no_grad():
        for block in model[1]:
            states.append(block(states[-1].clone()).clone())
        with HiddenStateRecorder(model) as record:
            model(x.clone())
    for k in range(3):
        torch.testing.assert_close(record.inputs[k][0], states[k])
        torch.testing.assert_close(record.outputs[k][0], states[k + 1])


def test_an_output_that_is_the_next_input_is_kept_once() -> None:
    with torch.no_grad(), HiddenStateRecorder(tiny_model("llama")) as record:
        record(input_ids=tokens(2, 9))
    assert record.outputs[0][0] is record.inputs[1][0]


def test_dtype_and_the_graph() -> None:
    model = tiny_model("llama")
    with HiddenStateRecorder(model, [1], config=RecordingConfig(dtype=torch.float64)) as record:
        model(tokens(1, 4))
    assert record.inputs[1][0].dtype == torch.float64 and not record.inputs[1][0].requires_grad
    with HiddenStateRecorder(model, [1], config=RecordingConfig(detach=False)) as record:
        model(tokens(1, 4))
    record.outputs[1][0].sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert model.model.layers[2].mlp.up_proj.weight.grad is None


@pytest.mark.parametrize(
    ("sites", "ran"), [(["block.input", "block.output"], 3), (["block.input"], 2), (["block.input", "mlp.output"], 3)]
)
def test_stop_runs_no_further_block(sites: list[BlockSite], ran: int) -> None:
    model, called = tiny_model("llama"), []
    for k, block in enumerate(find_stack(model).blocks):
        block.mlp.register_forward_hook(lambda m, a, o, k=k: called.append(k))
    model.lm_head.register_forward_hook(lambda m, a, o: called.append("head"))
    with HiddenStateRecorder(model, [0, 1, 2], sites=sites, stop=True) as record:
        assert record(input_ids=tokens(1, 4)) is None
        with pytest.raises(ForwardStopped, match=r"record\(\*\*batch\)"):
            model(tokens(1, 4))
    assert called == list(range(ran)) * 2
    assert len(record.inputs[0]) == len(record.inputs[2]) == 2


@pytest.mark.parametrize("fault", ["return", "exception", "bad index", "bad stack", "failing block"])
def test_nothing_is_left_behind(fault: str) -> None:
    model = tiny_model("llama")
    before = hooks(model)
    if fault == "bad index":
        with pytest.raises(StreamlineError, match=r"block 6.*0 to 5.*6 blocks"):
            HiddenStateRecorder(model, [0, 6]).__enter__()
    elif fault == "bad stack":
        with pytest.raises(StreamlineError, match=r"No stack.*'nowhere'"):
            HiddenStateRecorder(model, stack="nowhere").__enter__()
    elif fault == "failing block":
        handle = find_stack(model)[3].mlp.register_forward_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError), HiddenStateRecorder(model):
            model(tokens(1, 4))
        handle.remove()
    elif fault == "exception":
        with pytest.raises(KeyboardInterrupt), HiddenStateRecorder(model):
            raise KeyboardInterrupt
    else:
        with HiddenStateRecorder(model):
            model(tokens(1, 4))
    assert hooks(model) == before


def test_a_registration_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = hooks(model)

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no more hooks")

    monkeypatch.setattr(find_stack(model)[4], "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no more hooks"):
        HiddenStateRecorder(model).__enter__()
    assert hooks(model) == before


def test_a_copy_of_the_model_does_not_write_into_the_recorder() -> None:
    model = tiny_model("llama")
    with HiddenStateRecorder(model) as record:
        copy.deepcopy(model)(tokens(1, 4))
    assert record.inputs[0] == []


def test_compiled_models_and_wrong_words_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(StreamlineError, match="never fire"):
        HiddenStateRecorder(torch.compile(model)).__enter__()
    with pytest.raises(StreamlineError, match=r"tokens='some' is unknown.*'all' or 'last' or 'real'"):
        HiddenStateRecorder(model, tokens="some")
    with pytest.raises(StreamlineError, match="sites=.. is empty.*Omit sites"):
        HiddenStateRecorder(model, sites=[])
    with pytest.raises(StreamlineError, match=r"site='attn' is unknown.*attention\.output"):
        HiddenStateRecorder(model, sites=["attn"])
    with pytest.raises(StreamlineError, match=r"stop=True ends the forward pass before"):
        HiddenStateRecorder(model, sites=["logits"], stop=True)
    with pytest.raises(StreamlineError, match="not open"):
        HiddenStateRecorder(model)(input_ids=tokens(1, 4))


def test_a_sequence_of_padding_has_no_last_token() -> None:
    batch = {"input_ids": tokens(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}
    with pytest.raises(StreamlineError, match="no real token.*tokens='last'"), torch.no_grad():
        with HiddenStateRecorder(tiny_model("llama"), [1], tokens="last") as record:
            record(**batch)


def test_a_forward_without_a_mask_forgets_the_one_before() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), HiddenStateRecorder(model, [1], tokens="real") as record:
        model(**left_padded(3, 9))
        model(tokens(3, 9))
    assert [len(v) for v in record.inputs[1]] == [9 + 7 + 5, 27]


def test_the_last_token_while_decoding() -> None:
    model, batch = tiny_model("llama"), left_padded(3, 9)
    with HiddenStateRecorder(model, [1], tokens="last") as record:
        model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    with HiddenStateRecorder(model, [1]) as whole:
        model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    for last, every in zip(record.inputs[1], whole.inputs[1], strict=True):
        assert torch.equal(last, every[:, -1])


def test_an_encoders_mask_says_nothing_of_the_decoder() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    model, ids = BartForConditionalGeneration(config).eval(), torch.randint(3, 40, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids, "use_cache": False}
    with torch.no_grad(), HiddenStateRecorder(model, [1], tokens="last", stack="model.decoder.layers") as record:
        model(**given)
    with torch.no_grad(), HiddenStateRecorder(model, [1], stack="model.decoder.layers") as whole:
        model(**given)
    assert torch.equal(record.inputs[1][0], whole.inputs[1][0][:, -1])


def test_a_mask_of_another_shape_is_not_guessed() -> None:
    model = tiny_model("llama")
    with pytest.raises(StreamlineError, match=r"\(1.*1.*9.*9\)"), torch.no_grad():
        with HiddenStateRecorder(model, [1], tokens="last"):
            model(tokens(1, 9), attention_mask=torch.ones(1, 1, 9, 9))


def test_running_the_recorder_completes_the_batch() -> None:
    """GPT-2 would count the padding."""
    model, batch = tiny_model("gpt2"), left_padded(3, 9)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), HiddenStateRecorder(model, [2]) as record:
        record(**batch)
        model(**batch, position_ids=positions, use_cache=False)
    assert torch.equal(*record.inputs[2])


def test_copies_on_several_gpus_are_refused() -> None:
    """Their hooks write into copies: nothing was recorded."""
    model = nn.DataParallel(tiny_model("llama"))
    model.device_ids = [0, 1]
    with pytest.raises(StreamlineError, match=r"DataParallel.*2 GPUs"):
        HiddenStateRecorder(model).__enter__()
    with pytest.raises(StreamlineError, match="model in DataParallel"):
        HiddenStateMonitor(model).open()
    with pytest.raises(StreamlineError, match=r"DataParallel.*DataParallel"):
        LayerSurgeon(model).__enter__()


@pytest.mark.parametrize("kind", ["llama", "xlnet", "gemma3n_text", "deepseek_v4"])
@pytest.mark.parametrize("length", [3, 5])
def test_tokens_are_chosen_by_the_layout_of_the_block(kind: str, length: int) -> None:
    """Where there are as many sequences as tokens, an axis taken for the other is not seen by its size."""
    if kind not in causal_model_types():
        pytest.skip(f"this Transformers has no {kind}")
    model = tiny_of_type(kind, blocks=3)
    batch = tiny_inputs(model, batch=3, tokens=length)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with HiddenStateRecorder(model) as record, torch.no_grad():
        record(**batch)
    block = record.stack[1]
    whole = by_token(record.outputs[1][0], block)
    assert whole.shape[:2] == (3, length)
    mask = torch.arange(3 * length).reshape(3, length) % 2 == 0
    choices: list[tuple[Any, Tensor]] = [
        ("last", whole[:, -1]), ("real", whole.flatten(0, 1)), (mask, whole[mask])
    ]  # fmt: skip
    for choice, wanted in choices:
        with HiddenStateRecorder(model, tokens=choice) as chosen, torch.no_grad():
            chosen(**batch)
        assert torch.equal(chosen.outputs[1][0], wanted)


def test_tokens_of_a_model_with_one_block_are_chosen() -> None:
    model = tiny_of_type("llama", blocks=1)
    with HiddenStateRecorder(model, tokens="last") as record, torch.no_grad():
        record(input_ids=tokens(2, 5))
    assert record.outputs[0][0].shape[0] == 2


def test_a_mask_of_something_else_is_refused() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    class Patched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = encoder.layers

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            state = torch.zeros(1, 7, 8)
            for layer in self.layers:
                state = layer(state)
            return state

    with (
        HiddenStateRecorder(Patched(), tokens="real") as record,
        pytest.raises(StreamlineError, match=r"\(1.*7\).*\(2.*4\)"),
    ):
        record(input_ids=torch.ones(2, 4).long(), attention_mask=torch.ones(2, 4))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_generation_with_a_static_cache_records_what_a_dynamic_one_does(family: str, attention: str) -> None:
    model: Any = tiny_model(family)
    model.set_attn_implementation(attention)
    batch = left_padded(2, 7)
    for tokens_ in ("last", "real", "all"):
        recorded = []
        for options in ({}, {"cache_implementation": "static"}):
            with HiddenStateRecorder(model, [0, -1], tokens=tokens_) as record:
                model.generate(**batch, **options, max_new_tokens=6, do_sample=False, eos_token_id=None)
            recorded.append(record)
        dynamic, static = recorded
        assert [len(static.outputs[k]) for k in static.blocks] == [6, 6]  # the prefill and five decoding steps
        for k in static.blocks:
            for ours, theirs in zip(static.outputs[k], dynamic.outputs[k], strict=True):
                if tokens_ == "all" and ours.shape[1] > 1:
                    ours, theirs = (state[batch["attention_mask"].bool()] for state in (ours, theirs))
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        if tokens_ == "real":
            assert len(static.outputs[0][0]) == int(batch["attention_mask"].sum()) == 12


def test_a_static_cache_in_use_and_a_second_prompt() -> None:
    """A call of several tokens on a cache that holds some: the mask's columns begin before them."""
    from transformers import StaticCache

    model: Any = tiny_model("llama")
    batch, recorded = left_padded(2, 7), []
    for static in (False, True):
        cache = StaticCache(config=model.config, max_cache_len=16) if static else None
        out = model.generate(
            **batch, past_key_values=cache, max_new_tokens=2, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True,
        )  # fmt: skip
        held = out.past_key_values  # of 8 tokens: the last one generated was not run
        ids = torch.cat([out.sequences, tokens(2, 5, seed=4)], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 7, dtype=torch.long)], dim=1)
        with HiddenStateRecorder(model, [-1], tokens="real") as record:
            model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=held, max_new_tokens=1, do_sample=False,
                eos_token_id=None,
            )  # fmt: skip
        recorded.append(record.outputs[BLOCKS - 1])
    assert len(recorded[1][0]) == 2 * 6
    torch.testing.assert_close(recorded[1], recorded[0], rtol=1e-4, atol=1e-4)


class TwoParts(nn.Module):
    """A block whose state is the sum of what it takes and returns, as in vLLM."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return hidden / 2, hidden if residual is None else residual + hidden / 2


def test_a_state_in_two_parts_is_refused() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([TwoParts(), TwoParts(), TwoParts()])
    refused: list[Any] = [
        HiddenStateRecorder(model, sites=["block.output"]),
        Intervention(model, {("block.output", 1): Zero()}),
        LayerSurgeon(model),
    ]
    for context in refused:
        with pytest.raises(UnsupportedSurgery, match="two parts, one of them named residual"):
            context.__enter__()


def test_states_that_were_not_recorded_are_refused() -> None:
    model = tiny_model("llama")
    record = HiddenStateRecorder(model, [1], sites=["block.output", "attention.output"])
    with record.over([{"input_ids": tokens(2, 9)}]) as runs:
        batch = next(runs)
        assert torch.equal(batch.leaving(1), record.outputs[1][0])
        with pytest.raises(
            StreamlineError, match=r"block 3 at block\.output is not recorded.*the blocks \[1\].*blocks="
        ):
            batch.leaving(3)
        with pytest.raises(StreamlineError, match=r"'block\.input' is not recorded.*block\.output, attention\.output"):
            batch.entering(1)


def test_two_recorders_in_one_zip_leave_gradients_enabled() -> None:
    """The first recorder ends before the second, which was started without gradients."""
    models = [tiny_model("llama").train() for _ in range(2)]
    first, second = (HiddenStateRecorder(model, [1]).over([tokens(2, 5)] * 2) for model in models)
    with first as runs, second as others:
        pairs = [(torch.is_grad_enabled(), a.real.shape, b.real.shape) for a, b in zip(runs, others, strict=False)]
    assert pairs == [(False, (2, 5), (2, 5))] * 2
    assert torch.is_grad_enabled() and all(module.training for model in models for module in model.modules())

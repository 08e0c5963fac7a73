"""Blocks skipped for prompts: equal to a slow reference that runs every block and replaces its outputs."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery
from streamline_hooks.surgery import PromptSkip
from streamline_hooks.testing import tiny_model as model_of_type
from tests.prompt_skips import prompt_marks, random_maps, replaced_outputs, with_positions
from tests.surgery.test_surgeon import fingerprint
from tests.tiny_models import FAMILIES, WIDTH, left_padded, tiny_model, tokens

WINDOW = range(2, 5)
needs_transformers_5 = pytest.mark.skipif(
    transformers.__version__ < "5", reason="Transformers 4 fails in this way without PromptSkip too, or has other types"
)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def maps(count: int = len(WINDOW)) -> list[nn.Module | None]:
    return random_maps(count, WIDTH)


@torch.no_grad()
def greedy_reference(
    model: Any, estimates: Sequence[nn.Module | None], batch: dict[str, Tensor], new: int, last_tokens: int = 1
) -> Tensor:
    """Greedy tokens, each from a full forward pass without a cache over the whole sequence."""
    prompt = batch["input_ids"].shape[1]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    whole = {"input_ids": batch["input_ids"], "attention_mask": mask}
    for _ in range(new):
        with replaced_outputs(model, WINDOW, estimates, prompt_marks(whole, prompt, last_tokens)):
            logits = model(**with_positions(model, whole), use_cache=False).logits
        token = logits[:, -1:].argmax(dim=-1)
        whole = {
            "input_ids": torch.cat([whole["input_ids"], token], dim=1),
            "attention_mask": torch.cat([whole["attention_mask"], torch.ones_like(token)], dim=1),
        }
    return whole["input_ids"]


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens(2, 9)}, left_padded(3, 9)]


@pytest.mark.parametrize("family", FAMILIES)
def test_marked_tokens_equal_the_reference_and_the_model_is_restored(family: str) -> None:
    model, estimates = tiny_model(family), maps()
    before = fingerprint(model)
    for batch in batches():
        marks, real = prompt_marks(batch), batch.get("attention_mask", torch.ones(1)).bool()
        with torch.no_grad():
            with replaced_outputs(model, WINDOW, estimates, marks):
                expected = model(**batch).logits
            with PromptSkip(model, WINDOW, estimates) as skip, skip.marked(marks):
                computed = model(**batch).logits
        assert torch.allclose(computed[real.expand(marks.shape)], expected[real.expand(marks.shape)], atol=1e-5)
        assert not torch.allclose(computed, model(**batch).logits, atol=1e-2)
    assert fingerprint(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_skips_the_prompt_except_its_first_and_last_token(family: str) -> None:
    model, estimates = tiny_model(family), maps()
    for batch in batches():
        expected = greedy_reference(model, estimates, batch, 5)
        with PromptSkip(model, WINDOW, estimates, last_tokens=1):
            assert torch.equal(model.generate(**batch, max_new_tokens=5, **GREEDY), expected)
        assert not torch.equal(model.generate(**batch, max_new_tokens=5, **GREEDY), expected)


@pytest.mark.parametrize("last_tokens", [2, 3, 4, 20])
@pytest.mark.parametrize("way", [{}, {"prefill_chunk_size": 4}, {"prefill_chunk_size": 5}])
def test_the_last_tokens_of_a_prompt_run_every_block(last_tokens: int, way: dict[str, int]) -> None:
    if way and transformers.__version__ < "5":
        pytest.skip("Transformers 4 has no such argument")
    model, estimates = tiny_model("llama"), maps()
    for batch in batches():
        expected = greedy_reference(model, estimates, batch, 5, last_tokens)
        with PromptSkip(model, WINDOW, estimates, last_tokens=last_tokens):
            assert torch.equal(model.generate(**batch, max_new_tokens=5, **GREEDY, **way), expected)


def test_by_default_sixteen_tokens_at_the_end_run_every_block() -> None:
    model, seen = tiny_model("llama"), []
    model.model.layers[3].mlp.register_forward_pre_hook(lambda mlp, args: seen.append(args[0].shape[1]))
    with PromptSkip(model, WINDOW) as skip:
        seen.clear()
        model.generate(tokens(1, 20), max_new_tokens=2, **GREEDY)
        model.generate(tokens(1, 17), max_new_tokens=1, **GREEDY)
    assert seen == [17, 1, 17] and skip.last_tokens == 16
    with pytest.raises(StreamlineError, match="last_tokens=0.*at least 1"):
        PromptSkip(model, WINDOW, last_tokens=0)


WAYS = {
    "static cache": {"cache_implementation": "static"},
    "prompt in chunks": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("last_tokens", [1, 3])
@needs_transformers_5
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_generating_give_the_tokens_of_the_reference(family: str, way: str, last_tokens: int) -> None:
    model, estimates = tiny_model(family), maps()
    for batch in [{"input_ids": tokens(1, 11)}] if way == "prompt lookup" else batches():
        expected = greedy_reference(model, estimates, batch, 5, last_tokens)
        with PromptSkip(model, WINDOW, estimates, last_tokens=last_tokens):
            assert torch.equal(model.generate(**batch, max_new_tokens=5, **GREEDY, **WAYS[way]), expected), batch


@pytest.mark.parametrize("last_tokens", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_beam_search_equals_the_reference(family: str, last_tokens: int) -> None:
    model, estimates = tiny_model(family), maps()
    for batch in batches():
        expanded = {name: value.repeat_interleave(3, dim=0) for name, value in batch.items()}
        with replaced_outputs(model, WINDOW, estimates, prompt_marks(expanded, last_tokens=last_tokens)):
            expected = model.generate(**batch, num_beams=3, max_new_tokens=5, **GREEDY)
        with PromptSkip(model, WINDOW, estimates, last_tokens=last_tokens):
            assert torch.equal(model.generate(**batch, num_beams=3, max_new_tokens=5, **GREEDY), expected)


@pytest.mark.parametrize("last_tokens", [1, 3])
@needs_transformers_5
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_assisted_generation_skips_the_prompt_and_no_drafts(family: str, last_tokens: int) -> None:
    model, assistant, estimates = tiny_model(family), tiny_model(family), maps()
    single = {"input_ids": tokens(1, 9)}
    expected = greedy_reference(model, estimates, single, 6, last_tokens)
    with PromptSkip(model, WINDOW, estimates, last_tokens=last_tokens):
        drafted = model.generate(**single, assistant_model=assistant, max_new_tokens=6, **GREEDY)
    assert torch.equal(drafted, expected)


@pytest.mark.parametrize("last_tokens", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_second_turn_skips_only_its_new_tokens(family: str, last_tokens: int) -> None:
    model, estimates, first = tiny_model(family), maps(), tokens(1, 7)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad(), PromptSkip(model, WINDOW, estimates, last_tokens=last_tokens):
        turn = model.generate(first, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
        history = torch.cat([turn.sequences, tokens(1, 5, seed=3)], dim=1)
        cached = turn[name].get_seq_length()
        assert cached == turn.sequences.shape[1] - 1
        second = model.generate(history, max_new_tokens=1, **GREEDY, **{name: turn[name]})
    columns = torch.arange(history.shape[1])
    marks = (columns >= 1) & (columns < 7 - last_tokens) | (columns >= cached) & (
        columns < history.shape[1] - last_tokens
    )
    with torch.no_grad(), replaced_outputs(model, WINDOW, estimates, marks[None]):
        expected = model(history, use_cache=False).logits[:, -1].argmax(dim=-1)
    assert torch.equal(second[:, -1], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_one_token_and_plain_forward_passes_are_the_full_models_to_the_bit(family: str) -> None:
    model, ids = tiny_model(family), tokens(2, 6)
    options = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True, **GREEDY}
    with torch.no_grad():
        expected, logits = model.generate(ids[:, :1], **options), model(ids).logits
        with PromptSkip(model, WINDOW, maps(), last_tokens=1):
            computed = model.generate(ids[:, :1], **options)
            assert torch.equal(model(ids).logits, logits)
    assert torch.equal(torch.stack(computed.logits), torch.stack(expected.logits))


@given(
    family=st.sampled_from(["llama", "gemma3", "opt"]),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    start=st.integers(0, 5),
    size=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_any_tokens_of_any_window_equal_the_reference(
    family: str, lengths: list[int], start: int, size: int, seed: int
) -> None:
    model, width = tiny_model(family), max(lengths)
    window = range(start, min(start + size, 6))
    estimates = [None if (seed + n) % 4 == 0 else module for n, module in enumerate(maps(len(window)))]
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    batch = {"input_ids": tokens(len(lengths), width, seed), "attention_mask": mask}
    chosen = torch.rand(len(lengths), width, generator=torch.Generator().manual_seed(seed)) < 0.6
    marks = chosen & (torch.arange(width) != mask.argmax(dim=1)[:, None])
    with torch.no_grad():
        with replaced_outputs(model, window, estimates, marks):
            expected = model(**batch).logits
        with PromptSkip(model, window, estimates, probe=True) as skip, skip.marked(chosen):
            computed = model(**batch).logits
    assert torch.allclose(computed[mask.bool()], expected[mask.bool()], atol=1e-5)


class LowRank(nn.Linear):
    """A projection with a low-rank part that starts at zero, such as LoRA's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.load_state_dict(base.state_dict())
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, state: Tensor) -> Tensor:
        return super().forward(state) + self.up(self.down(state))


def test_adapters_of_keys_and_values_that_are_zero_at_first_are_used_and_trained() -> None:
    model, ids, estimates = tiny_model("llama"), tokens(2, 7), maps()
    for k in WINDOW:
        attention = model.model.layers[k].self_attn
        attention.k_proj, attention.v_proj = LowRank(attention.k_proj), LowRank(attention.v_proj)
    marks = prompt_marks({"input_ids": ids})
    with PromptSkip(model, WINDOW, estimates, last_tokens=1) as skip:
        adapters = [module for module in model.modules() if isinstance(module, LowRank)]
        for adapter in adapters:
            nn.init.normal_(adapter.up.weight, std=0.3)
        with skip.marked(marks):
            computed = model(ids).logits
        computed[~marks].square().mean().backward()
    assert all(adapter.down.weight.grad is not None and adapter.down.weight.grad.any() for adapter in adapters)
    with torch.no_grad(), replaced_outputs(model, WINDOW, estimates, marks):
        assert torch.allclose(computed, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("only_new", [True, False])
def test_a_turn_may_be_given_as_all_tokens_or_as_the_new_ones(only_new: bool) -> None:
    model, estimates, first = tiny_model("llama"), maps(), tokens(1, 4)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    seen: list[int] = []
    with torch.no_grad(), PromptSkip(model, WINDOW, estimates, last_tokens=1):
        cache = model(first, use_cache=True)[name]
        whole = torch.cat([first, tokens(1, 9, seed=3)], dim=1)
        model.model.layers[3].mlp.register_forward_pre_hook(lambda mlp, args: seen.append(args[0].shape[1]))
        inputs = {"input_ids": whole[:, 4:] if only_new else whole, "attention_mask": torch.ones_like(whole)}
        model.generate(**inputs, max_new_tokens=2, **GREEDY, **{name: cache})
    assert seen == [1, 1]


@needs_transformers_5
def test_drafts_by_the_model_itself_leave_its_prompt_skipping() -> None:
    model, estimates, ids = tiny_model("llama"), maps(), tokens(1, 9)
    seen: list[int] = []
    expected = greedy_reference(model, estimates, {"input_ids": ids}, 6)
    with PromptSkip(model, WINDOW, estimates, last_tokens=1):
        model.model.layers[4].mlp.register_forward_pre_hook(lambda mlp, args: seen.append(args[0].shape[1]))
        options = {"assistant_early_exit": 2, "max_new_tokens": 6, **GREEDY}
        assert torch.equal(model.generate(ids, **options), expected)
    assert seen and max(seen) < 9


def test_an_assistant_whose_prompts_skip_blocks_runs_drafts_in_full() -> None:
    model, assistant, ids, seen = tiny_model("llama"), tiny_model("llama"), tokens(1, 9), []
    expected = model.generate(ids, max_new_tokens=6, **GREEDY)
    with PromptSkip(assistant, WINDOW, last_tokens=1):
        skipped = assistant.model.layers[3]
        skipped.mlp.register_forward_pre_hook(lambda mlp, args: seen.append(args[0].shape[1]))
        skipped.register_forward_pre_hook(lambda block, args: seen.append(-args[0].shape[1]))
        drafted = model.generate(ids, assistant_model=assistant, max_new_tokens=6, **GREEDY)
    assert torch.equal(drafted, expected)
    calls = list(zip(seen[::2], seen[1::2], strict=True))
    assert calls[0] == (-9, 2) and all(tokens_in == -run for tokens_in, run in calls[1:])


@needs_transformers_5
@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_a_chunk_in_which_every_token_skips_works_where_blocks_return_tuples(name: str) -> None:
    model, ids = model_of_type(name), tokens(2, 12)
    with PromptSkip(model, range(4, 8), last_tokens=1):
        expected = model.generate(ids, max_new_tokens=3, **GREEDY)
        assert torch.equal(model.generate(ids, max_new_tokens=3, prefill_chunk_size=4, **GREEDY), expected)


def test_other_threads_are_refused_while_one_generates_or_marks() -> None:
    model, ids, errors = tiny_model("llama"), tokens(1, 6), []

    def elsewhere(skip: PromptSkip) -> None:
        for call in (lambda: model.generate(ids, max_new_tokens=2), lambda: skip.marked(ids > 0).__enter__()):
            try:
                call()
            except StreamlineError as error:
                errors.append(str(error))

    with PromptSkip(model, WINDOW, maps()) as skip, skip.marked(torch.ones(1, 6)):
        thread = threading.Thread(target=elsewhere, args=(skip,))
        thread.start()
        thread.join()
    assert len(errors) == 2 and all("two threads" in error for error in errors)


def test_marks_inside_marks_end_with_their_context() -> None:
    model, ids, marks = tiny_model("llama"), tokens(1, 6), torch.tensor([[False, True, True, False, False, False]])
    with torch.no_grad(), PromptSkip(model, WINDOW, maps()) as skip, skip.marked(marks):
        expected = model(ids).logits
        with skip.marked(marks.roll(1)):
            assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
        assert torch.equal(model(ids).logits, expected)


def test_padding_does_not_run_the_skipped_blocks() -> None:
    """Its positions are all the same, but no document begins there."""
    model, counts = tiny_model("llama"), []
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :30] = 0
    with PromptSkip(model, range(3, 6), last_tokens=1) as skip:
        skip.stack[3].mlp.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[1]))
        model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert counts == [3]  # columns: the first token of each row, and the last one


@pytest.mark.parametrize("has_mask", [False, True])
def test_the_first_token_of_each_packed_document_runs_every_block(has_mask: bool) -> None:
    model, length = tiny_model("llama"), 8
    documents = [tokens(1, length, seed=k) for k in range(2)]
    ids, positions = torch.cat(documents, dim=1), torch.arange(length).repeat(2)[None]
    marks = torch.zeros(1, 2 * length, dtype=torch.bool)
    marks[:, : length - 2] = marks[:, length : 2 * length - 2] = True
    more: dict[str, Any] = {}
    if has_mask:
        rows = torch.arange(2 * length)
        allowed = (rows[:, None] >= rows) & (rows[:, None] // length == rows // length)
        more["attention_mask"] = torch.zeros(1, 1, 2 * length, 2 * length).masked_fill(~allowed, -torch.inf)
    with torch.no_grad(), PromptSkip(model, range(3, 6)) as skip:
        with skip.marked(marks):
            packed = model(ids, position_ids=positions, use_cache=False, **more).logits
        for k, document in enumerate(documents):
            with skip.marked(marks[:, :length]):
                alone = model(document, use_cache=False).logits
            torch.testing.assert_close(packed[:, k * length : (k + 1) * length], alone, rtol=1e-3, atol=1e-3)


def test_a_forward_pass_without_a_prompt_compiles_to_one_graph() -> None:
    model, ids = tiny_model("llama"), tokens(1, 7)
    with torch.no_grad(), PromptSkip(model, WINDOW, maps(), last_tokens=1):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(ids, use_cache=False).logits, model(ids).logits, atol=1e-5)


def test_only_the_first_and_last_token_run_the_rest_of_a_skipped_block() -> None:
    model, seen = tiny_model("llama"), []
    model.model.layers[3].mlp.register_forward_pre_hook(lambda mlp, args: seen.append(args[0].shape[1]))
    with PromptSkip(model, WINDOW, last_tokens=1):
        seen.clear()
        model.generate(tokens(1, 9), max_new_tokens=3, **GREEDY)
    assert seen == [2, 1, 1]


def test_the_queries_of_skipped_tokens_are_one_head_of_zeros() -> None:
    model, ids = tiny_model("llama"), tokens(1, 12)
    attention, seen = model.model.layers[3].self_attn, []
    attention.q_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with PromptSkip(model, WINDOW, maps()) as skip, skip.marked(prompt_marks({"input_ids": ids})):
        seen.clear()
        model(ids)
    zeros, run = seen
    assert zeros.shape == (1, 12, attention.head_dim) and not bool(zeros.any())
    assert run.shape == (1, 2, attention.q_proj.out_features)


def test_out_of_memory_is_raised_and_one_head_stays() -> None:
    model, ids, shapes = tiny_model("llama"), tokens(1, 12), []
    attention, marks = model.model.layers[3].self_attn, prompt_marks({"input_ids": ids})

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    attention.q_proj.register_forward_hook(lambda module, args, output: shapes.append(output.shape[-1]))
    with PromptSkip(model, WINDOW, maps()) as skip, skip.marked(marks):
        handle = attention.k_proj.register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            model(ids)
        handle.remove()
        shapes.clear()
        model(ids)
    assert shapes == [attention.head_dim, attention.q_proj.out_features]


def test_maps_of_another_precision_and_in_training_mode_work() -> None:
    model, ids = tiny_model("llama").bfloat16(), tokens(1, 9)
    estimates = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)).train() for _ in WINDOW]
    marks = prompt_marks({"input_ids": ids})
    with torch.no_grad(), PromptSkip(model, WINDOW, estimates) as skip, skip.marked(marks):
        assert all(module.training for module in estimates)
        assert model(ids).logits.dtype == torch.bfloat16


def test_compiled_calls_equal_the_model_itself() -> None:
    model, ids, estimates = tiny_model("llama"), tokens(1, 7), maps()
    marks = prompt_marks({"input_ids": ids})
    with torch.no_grad(), PromptSkip(model, WINDOW, estimates, last_tokens=1) as skip:
        compiled = torch.compile(model, backend="eager")
        full = model(ids).logits
        with skip.marked(marks):
            expected = model(ids).logits
            assert torch.allclose(compiled(ids).logits, expected, atol=1e-5)
        assert torch.allclose(compiled(ids).logits, full, atol=1e-5)
    assert not torch.allclose(full, expected, atol=1e-2)


def test_gradients_reach_the_maps_and_the_blocks() -> None:
    model, ids, estimates = tiny_model("llama"), tokens(2, 7), maps()
    marks = prompt_marks({"input_ids": ids})
    loss = {}
    for way in ("reference", "skipped"):
        model.zero_grad()
        nn.ModuleList(estimates).zero_grad()
        if way == "reference":
            with replaced_outputs(model, WINDOW, estimates, marks):
                model(ids).logits[~marks].square().mean().backward()
        else:
            with PromptSkip(model, WINDOW, estimates) as skip, skip.marked(marks):
                model(ids).logits[~marks].square().mean().backward()
        parameters = [*model.parameters(), *nn.ModuleList(estimates[:-1]).parameters()]
        loss[way] = [p.grad for p in parameters if p.grad is not None]
    assert len(loss["reference"]) == len(loss["skipped"])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*loss.values(), strict=True))


def test_an_error_in_a_forward_pass_leaves_nothing_marked() -> None:
    model, ids = tiny_model("llama"), tokens(1, 6)
    expected = model(ids).logits
    with PromptSkip(model, WINDOW, maps(), last_tokens=1) as skip:
        handle = model.model.layers[3].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), skip.marked(prompt_marks({"input_ids": ids})):
            model(ids)
        with pytest.raises(ZeroDivisionError):
            model.generate(ids, max_new_tokens=2)
        handle.remove()
        assert torch.equal(model(ids).logits, expected)


def open_surgeon(model: Any, skip: PromptSkip) -> None:
    LayerSurgeon(model).__enter__()


def second(model: Any, skip: PromptSkip) -> None:
    PromptSkip(model, range(1, 2)).__enter__()


def with_checkpointing(model: Any, skip: PromptSkip) -> None:
    model.train().gradient_checkpointing_enable()
    with skip.marked(torch.ones(1, 5)):
        model(tokens(1, 5))


def without_cache(model: Any, skip: PromptSkip) -> None:
    model.generate(tokens(1, 20), max_new_tokens=3, use_cache=False)


def with_attentions(model: Any, skip: PromptSkip) -> None:
    with skip.marked(torch.ones(1, 5)):
        model(tokens(1, 5), output_attentions=True)


def in_batches(model: Any, skip: PromptSkip) -> None:
    model.generate_batch([[3, 4]])


def with_other_attention(model: Any, skip: PromptSkip) -> None:
    model.config._attn_implementation = "flash_attention_2"
    try:
        model.generate(tokens(1, 20), max_new_tokens=2)
    finally:
        model.config._attn_implementation = "sdpa"


def with_other_shape(model: Any, skip: PromptSkip) -> None:
    with skip.marked(torch.ones(1, 4)):
        model(tokens(1, 5))


def saved(model: Any, skip: PromptSkip) -> None:
    model.save_pretrained("never_written")


def copied(model: Any, skip: PromptSkip) -> None:
    copy.deepcopy(model)


def pickled(model: Any, skip: PromptSkip) -> None:
    pickle.dumps(model)


INSIDE = {
    open_surgeon: "A PromptSkip is open",
    second: "Another PromptSkip is open",
    with_checkpointing: "gradient checkpointing",
    without_cache: "use_cache=True",
    with_attentions: "output_attentions",
    in_batches: "generate_batch",
    with_other_attention: "set_attn_implementation",
    with_other_shape: r"\(1, 4\).*\(1, 5\)",
    saved: "Leave the with statement",
    copied: "copied or pickled",
    pickled: "copied or pickled",
}


@pytest.mark.parametrize("action", INSIDE, ids=lambda action: action.__name__)
def test_what_would_be_wrong_inside_is_refused(action: Any) -> None:
    model, ids = tiny_model("llama"), tokens(1, 5)
    expected = model(ids).logits
    with PromptSkip(model, WINDOW, maps()) as skip, pytest.raises(StreamlineError, match=INSIDE[action]):
        action(model, skip)
    assert torch.equal(model.eval()(ids).logits, expected)


REFUSED = {
    "mamba": "takes no cache|recurrent|fails",
    "recurrent_gemma": "recurrent|fails",
    "rwkv": "takes no cache",
    "qwen3_next": "without a recurrent state",
    "falcon_h1": "does not give the logits",
    "openai-gpt": "takes no cache",
}


@needs_transformers_5
@pytest.mark.parametrize("name", REFUSED)
def test_models_without_plain_keys_and_values_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedSurgery, match=REFUSED[name]):
        PromptSkip(model_of_type(name), range(1, 7))


def test_wrong_maps_and_attention_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(StreamlineError, match="2 maps were given for blocks 2 to 4"):
        PromptSkip(model, WINDOW, maps(2))
    with pytest.raises(StreamlineError, match="marked.. was called outside"):
        PromptSkip(model, WINDOW).marked(torch.ones(1, 4)).__enter__()
    with pytest.raises(StreamlineError, match="compiled"):
        PromptSkip(torch.compile(tiny_model("llama")), WINDOW)
    with LayerSurgeon(tiny_model("llama")) as surgeon, pytest.raises(StreamlineError, match="LayerSurgeon is open"):
        PromptSkip(surgeon.model, WINDOW)

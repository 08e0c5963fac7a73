"""Many prompts written on at the same time, against each written on alone, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.cache_utils import DynamicLayer

from benchmarks.probe_levels import probes_at
from streamline_hooks import StreamlineError
from streamline_hooks.modeling import generation
from streamline_hooks.modeling.generation import (
    SamplingConfig,
    eos_token_ids,
    generate_tokens,
    require_generate,
    seeded_sampling,
)
from streamline_hooks.testing import causal_model_types
from streamline_hooks.testing import tiny_model as tiny
from tests.tiny_models import FAMILIES, VOCABULARY, repaired, tiny_model


class Ends:
    """The part of a tokenizer that generation asks for."""

    pad_token_id = None
    eos_token_id = 2


PROMPTS = [[5, 9, 11, 4, 8, 20], [7], [3, 12, 6]]


def greedy(model: nn.Module, prompt: list[int], count: int, ends: set[int]) -> list[int]:
    """The likeliest token each time, from whole forwards without a cache."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_forwards_without_a_cache(family: str) -> None:
    """Also of a model in training mode whose own settings would sample and forbid repetitions."""
    model: Any = tiny_model(family, torch.float64)
    settings = model.generation_config
    settings.do_sample, settings.repetition_penalty, settings.no_repeat_ngram_size = True, 5.0, 1
    settings.temperature, settings.min_new_tokens = 9.0, 3
    ends = eos_token_ids(model, Ends())
    model.train()
    found = generate_tokens(model, Ends(), PROMPTS, new_tokens=8)
    assert model.training and model.generation_config is settings
    model.eval()
    assert found == [[greedy(model, prompt, 8, ends)] for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["recurrent_gemma", "bart", "mbart"])
def test_prompts_of_one_length_alone_are_run_together_where_padding_is_heeded(kind: str) -> None:
    """A recurrence takes padding into its state, and learned positions count it, whatever the mask says."""
    model: Any = tiny(kind, vocabulary=VOCABULARY)
    prompts, told = [[*PROMPTS[0], *range(3, 20)], *PROMPTS, [8, 4, 2 + 1]], []
    if kind == "recurrent_gemma" and int(transformers.__version__.split(".")[0]) < 5:
        prompts[2] = [7, 9]  # before Transformers 5 its first call fails for a single token
    with pytest.warns(UserWarning, match=rf"of 4.*{type(model).__name__}"):
        found = generate_tokens(model, None, prompts, new_tokens=8, on_step=told.append)
    assert found == [generate_tokens(model, None, [prompt], new_tokens=8)[0] for prompt in prompts]
    assert sorted(set(told)) == [1, 2]
    with pytest.MonkeyPatch.context() as patch:  # the planted fault
        patch.setattr(generation, "padding_dependence", lambda *given: "")
        assert generate_tokens(model, None, prompts, new_tokens=8) != found


def test_each_text_is_written_alone_where_company_is_heeded() -> None:
    """RWKV's cached step takes the states of all texts for each, which its first token does not show."""
    model: Any = tiny("rwkv", vocabulary=VOCABULARY).double()
    prompts, told = [PROMPTS[0], PROMPTS[2], PROMPTS[2]], []
    expected = [greedy(model, prompt, 8, set()) for prompt in prompts]
    with pytest.warns(UserWarning, match=r"3 texts.*RwkvForCausalLM"):
        assert generate_tokens(model, None, prompts, new_tokens=8, on_step=told.append) == [[one] for one in expected]
    assert set(told) == {1}
    nearly = SamplingConfig(samples=2, temperature=1e-4)
    with pytest.warns(UserWarning, match=r"2 texts are.*one at a time"):
        assert generate_tokens(model, None, prompts[:1], new_tokens=8, sampling=nearly) == [expected[:1] * 2]
    assert generate_tokens(model, None, prompts[:1], new_tokens=8) == [expected[:1]]  # and nothing is said
    with pytest.MonkeyPatch.context() as patch:  # the planted fault
        patch.setattr(generation, "batch_dependence", lambda *given: "")
        assert generate_tokens(model, None, prompts, new_tokens=8) != [[one] for one in expected]


def test_models_that_have_lost_blocks() -> None:
    model: Any = repaired("llama", dtype=torch.float64)
    found = generate_tokens(model, Ends(), PROMPTS, new_tokens=6)
    assert found == [[greedy(model, prompt, 6, eos_token_ids(model, Ends()))] for prompt in PROMPTS]


def test_it_stops_where_the_text_ends() -> None:
    model: Any = tiny_model("llama", torch.float64)
    free = generate_tokens(model, Ends(), PROMPTS[:1], new_tokens=8)[0][0]
    model.generation_config.eos_token_id = [free[3], VOCABULARY - 1]
    assert generate_tokens(model, Ends(), PROMPTS[:1], new_tokens=8) == [[free[: free.index(free[3])]]]


def test_samples_are_seeded_and_leave_the_random_state_alone() -> None:
    model: Any = tiny_model("llama")
    before = torch.get_rng_state()
    runs = []
    for seed in (1, 1, 2):
        with seeded_sampling(torch.device("cpu"), seed, "x"):
            runs.append(generate_tokens(model, Ends(), PROMPTS, new_tokens=8, sampling=SamplingConfig(3, 1.5)))
    assert torch.equal(before, torch.get_rng_state())
    assert runs[0] == runs[1] != runs[2]
    assert [len(several) for several in runs[0]] == [3, 3, 3]
    assert len({tuple(text) for text in runs[0][0]}) == 3


def _sampled(model: Any, prompts: list[list[int]] | None = None) -> tuple[list[list[list[int]]], list[Any]]:
    """What is written, and the shapes of the tokens that the model was run on once it was known to ignore padding."""
    if prompts is None:
        prompts = [*PROMPTS[::2], [7, 8]]
    shapes: list[Any] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    with seeded_sampling(torch.device("cpu"), 1):
        found = generate_tokens(model, Ends(), prompts, new_tokens=10, sampling=SamplingConfig(3, 1.5))
    handle.remove()
    lengths = sorted(map(len, prompts))
    shorter = [length for length in lengths if length < lengths[-1]]
    ends = list(dict.fromkeys([shorter[0], shorter[-1]])) if shorter else []
    if ends and generation.padding_dependence(model, [min(prompts, key=len), max(prompts, key=len)], pad=2):
        del ends[1:]  # one is enough to know
    tried = [shape for length in ends for shape in ((1, length), (2, lengths[-1]))]
    if generation.cache_argument(model) is None:  # two tokens of it, alone and beside itself
        tried = [(1, lengths[-1]), (1, 1), (2, lengths[-1]), (2, 1), *tried]
    assert shapes[: len(tried)] == tried, "the shortest and the longest padded prompt, alone and behind padding"
    return found, shapes[len(tried) :]


@pytest.mark.parametrize("family", [*FAMILIES, "repaired"])
def test_a_prompt_is_run_once_for_all_of_its_samples(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is written is what each sample with a prompt of its own would be."""
    model: Any = repaired("llama", dtype=torch.float64) if family == "repaired" else tiny_model(family, torch.float64)
    found, shapes = _sampled(model)
    assert shapes[:4] == [(2, 5), (2, 1), (2, 6), (3, 5)] and set(shapes[4:]) == {(9, 1)}
    monkeypatch.setattr(generation, "shared_prefill", lambda *_: {})
    assert _sampled(model)[0] == found


@pytest.mark.skipif("doge" not in causal_model_types(), reason="this Transformers has no Doge")
def test_padding_is_tested_on_the_longest_padded_prompt_too() -> None:
    """Doge attends to a fixed number of tokens, so that the shortest prompt does not depend on its padding."""
    model: Any = tiny("doge", blocks=4, keep_window_size=6)
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 30, (n,), generator=random).tolist() for n in (14, 5, 9)]
    with pytest.warns(UserWarning, match="generated in separate batches"):
        texts = generate_tokens(model, None, prompts, new_tokens=8)
    assert texts == [generate_tokens(model, None, [prompt], new_tokens=8)[0] for prompt in prompts]


@pytest.mark.parametrize("half", ["weights", "autocast"])
def test_a_prompt_is_run_once_in_half_precision(half: str) -> None:
    """Of many logits some are far off by rounding alone; a cache is not refused for that, see `logits_allclose`."""
    model: Any = tiny_model("llama", torch.bfloat16 if half == "weights" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        _, shapes = _sampled(model)
        assert torch.is_autocast_enabled("cpu") is (half == "autocast")
    assert shapes[:4] == [(2, 5), (2, 1), (2, 6), (3, 5)] and set(shapes[4:]) == {(9, 1)}


def test_smollm2_goes_on_from_a_prompt_in_bfloat16(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    texts = [several[0].prompt for several in probes_at(1, 3, seed=0, shots=4).values()]
    prompts = [tokenizer(text).input_ids for text in texts]
    shapes: list[Any] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        with torch.autocast("cpu", torch.bfloat16):
            generate_tokens(model, tokenizer, prompts, new_tokens=2, sampling=SamplingConfig(3, 1.0))
    finally:
        handle.remove()
    rows = 3 * len(prompts)
    assert shapes[-1] == (rows, 1) and (rows, max(map(len, prompts))) not in shapes


@pytest.mark.parametrize("kind", ["roberta", "gpt_bigcode", "bloom", "mistral"])
@pytest.mark.parametrize("prompts", [[[7, 8, 9, 10, 11]], [[7, 8, 9], [10, 11, 12]], PROMPTS[::2]])
def test_positions_are_those_that_it_would_write_on_at(
    kind: str, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is not told them may number them otherwise, as RoBERTa does where nothing is padded."""
    model = tiny(kind, vocabulary=VOCABULARY)
    found, _ = _sampled(model, prompts)
    monkeypatch.setattr(generation, "shared_prefill", lambda *_: {})
    assert _sampled(model, prompts)[0] == found


def test_positions_of_an_earlier_call_are_not_gone_on_with() -> None:
    """Qwen-VL's models keep them, for as many rows as there were, and take them where they are given a cache."""
    model: Any = tiny_model("llama", torch.float64)
    expected = _sampled(model)[0]
    model.model.rope_deltas = torch.tensor([[-7]])
    assert _sampled(model) == (expected, [(9, 6)] + [(9, 1)] * 9)


@pytest.mark.parametrize("kind", ["mamba", "falcon_h1", "git"])
def test_prompts_are_run_for_each_sample_where_more_than_keys_and_values_is_kept(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        model = tiny(kind, vocabulary=VOCABULARY)
    except StreamlineError as error:
        pytest.skip(str(error))
    found, shapes = _sampled(model)
    # Before Transformers 5 padding has a part in the answer of git, and without any its keys and values are enough.
    apart = bool(generation.padding_dependence(model, [*PROMPTS[::2], [7, 8]], pad=2))
    assert ((9, 6) in shapes) is not apart and (kind == "git" or not apart)
    monkeypatch.setattr(generation, "shared_prefill", lambda *_: {})
    assert _sampled(model)[0] == found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keys_and_values_that_give_something_else_are_not_gone_on_from(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_model("llama", dtype)
    expected = _sampled(model)[0]
    original = DynamicLayer.update

    def forget(self: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        known, others = original(self, keys, values, *args, **kwargs)
        probed = known.shape[0] == 2 and keys.shape[2] == 1  # of the two prompts that are compared, from a cache
        return known * (1.5 if probed else 1.0), others

    monkeypatch.setattr(DynamicLayer, "update", forget)
    found, shapes = _sampled(model)
    assert shapes == [(2, 5), (2, 1), (2, 6), (9, 6)] + [(9, 1)] * 9
    assert found == expected or dtype == torch.bfloat16  # which rounds otherwise from a cache


def test_what_cannot_be_written_on() -> None:
    model: Any = tiny_model("llama")
    with pytest.raises(StreamlineError, match=r"prompt is empty.*at least one token"):
        generate_tokens(model, Ends(), [[3], []], new_tokens=2)
    positions = model.config.max_position_embeddings
    with pytest.raises(StreamlineError, match=rf"6 tokens.*new_tokens={positions}"):
        generate_tokens(model, Ends(), PROMPTS, new_tokens=positions)
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(StreamlineError, match="T5ForConditionalGeneration"):
        generate_tokens(T5ForConditionalGeneration(T5Config(**sizes)), Ends(), PROMPTS, new_tokens=2)
    with pytest.raises(StreamlineError, match=r"a Linear.*cannot generate.*causal language model"):
        require_generate(nn.Linear(1, 1), "It")

"""Likelihoods of choices against each text run alone, whatever is shared, padded and batched."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.evaluation import continuations as module
from streamline_hooks.evaluation.choices import score_choices
from streamline_hooks.evaluation.continuations import NotFiniteLikelihood
from streamline_hooks.evaluation.questions import Question, read_questions
from streamline_hooks.generation import cache_argument
from streamline_hooks.testing import tiny_model as tiny
from tests.tiny_models import FAMILIES, VOCABULARY, repaired, tiny_model


class Numbers:
    """A tokenizer of texts that are numbers with spaces between; "4" and a "2" right behind it are one token, 42."""

    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def numbers(random: Random, count: int) -> str:
    return " ".join(str(random.randrange(3, VOCABULARY)) for _ in range(count))


def asked(random: Random, count: int) -> list[Question]:
    """Questions of one query with two to four choices, and of two contexts with one continuation."""
    found = []
    for _ in range(count):
        if random.random() < 0.3:
            contexts = tuple(numbers(random, random.randrange(1, 9)) for _ in range(2))
            found.append(Question(contexts, (numbers(random, 3),) * 2, random.randrange(2)))
        else:
            texts = tuple(numbers(random, random.randrange(1, 6)) for _ in range(random.randrange(2, 5)))
            found.append(Question((numbers(random, random.randrange(1, 12)),) * len(texts), texts, 0))
    return found


def questions_of(model: nn.Module, count: int, choices: int, seed: int) -> list[Question]:
    """Questions whose right answers are those that a model gives."""
    random = Random(seed)
    open_ = []
    for _ in range(count):
        texts = tuple(numbers(random, 3) for _ in range(choices))
        open_.append(Question((numbers(random, 8),) * choices, texts, 0))
    found = score_choices(model, Numbers(), open_).loglikelihoods
    return [Question(q.contexts, q.continuations, int(np.argmax(f))) for q, f in zip(open_, found, strict=True)]


def reference(model: nn.Module, question: Question, first: Sequence[int] = ()) -> list[float]:
    """Each choice run alone, without a cache, padding, or a batch."""
    found = []
    for context, continuation in zip(question.contexts, question.continuations, strict=True):
        ids = [*first, *map(int, context.split()), *map(int, continuation.split())]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()
        logs = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        own = len(continuation.split())
        found.append(float(sum(logs[at - 1, ids[at]] for at in range(len(ids) - own, len(ids)))))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8)
@given(st.randoms(use_true_random=False), st.integers(1, 7), st.integers(1, 9))
def test_they_equal_each_text_run_alone(family: str, random: Random, count: int, size: int) -> None:
    """Gemma's windows of four tokens lie across context and choice; in training mode as in evaluation."""
    model, questions = tiny_model(family, torch.float64), asked(random, count)
    expected = [reference(model, question) for question in questions]
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the context is shared
        got = score_choices(model, Numbers(), questions, batch_size=size)
    assert model.training
    for mine, theirs in zip(got.loglikelihoods, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-9)
    expected = [list(mine) for mine in got.loglikelihoods]  # which of two equal ones wins is left to rounding
    assert got.accuracy == np.mean([np.argmax(e) == q.gold for e, q in zip(expected, questions, strict=True)])
    per_character = [np.array(e) / [len(c) for c in q.continuations] for e, q in zip(expected, questions, strict=True)]
    right = [np.argmax(e) == q.gold for e, q in zip(per_character, questions, strict=True)]
    assert got.normalised_accuracy == np.mean(right)
    if count > 1:
        assert got.normalised_standard_error == pytest.approx(np.std(right, ddof=1) / math.sqrt(count))
        assert got.standard_error == pytest.approx(np.std(got.right, ddof=1) / math.sqrt(count))
    else:
        assert math.isnan(got.standard_error)


@pytest.mark.parametrize("model", [repaired("llama", dtype=torch.float64), repaired("gpt2", dtype=torch.float64)])
def test_models_that_have_lost_blocks(model: nn.Module) -> None:
    questions = asked(Random(3), 5)
    got = score_choices(model, Numbers(), questions).loglikelihoods
    for mine, question in zip(got, questions, strict=True):
        assert mine == pytest.approx(reference(model, question), rel=1e-9)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
        got = score_choices(model, Numbers(), questions).loglikelihoods
        assert got[0] == pytest.approx(reference(model, questions[0]), rel=1e-9)


def test_a_shared_context_is_run_once() -> None:
    model, widths, said = tiny_model("llama"), [], []
    random = Random(0)
    questions = [Question((numbers(random, 20),) * 4, tuple(numbers(random, 2) for _ in range(4)), 0) for _ in range(3)]
    score_choices(model, Numbers(), questions[:1])  # whose check is not to be counted below
    model.model.layers[0].register_forward_pre_hook(
        lambda m, a, kw: widths.append((a[0] if a else kw["hidden_states"]).shape[:2]), with_kwargs=True
    )
    model.lm_head.register_forward_pre_hook(lambda m, args: said.append(args[0].shape[:2]))
    score_choices(model, Numbers(), questions, batch_size=12)
    check, run = widths[:3], widths[3:]
    assert check == [(8, 22), (2, 19), (8, 3)]  # each choice alone; the contexts but for their last tokens; the rest
    assert run == [(3, 19), (12, 3)]
    assert said == [(8, 3), (2, 1), (8, 3), (3, 1), (12, 3)]  # the head only where something is scored


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "bloom", "mpt", "falcon", "jamba", "bamba", "qwen3_next"])
def test_models_of_other_kinds_are_right_or_run_alone(kind: str) -> None:
    """Recurrent states see the padding, and have no keys to share; distances are counted in several ways."""
    try:
        model = tiny(kind, vocabulary=VOCABULARY + 3).eval()
    except StreamlineError as error:
        pytest.skip(str(error))
    questions = asked(Random(1), 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = score_choices(model, Numbers(), questions, batch_size=5).loglikelihoods
    for mine, question in zip(got, questions, strict=True):
        assert mine == pytest.approx(reference(model, question), rel=1e-4)


def test_a_cache_that_gives_something_else_is_not_used() -> None:
    model, questions = tiny_model("llama", torch.float64), asked(Random(2), 6)
    name = cache_argument(model)

    def forget(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get(name) is not None:
            for layer in kwargs[name].layers:
                layer.keys = layer.keys * 1.5

    model.register_forward_pre_hook(forget, with_kwargs=True)
    with pytest.warns(UserWarning, match=r"alone.*LlamaForCausalLM fails"):
        got = score_choices(model, Numbers(), questions).loglikelihoods
    for mine, question in zip(got, questions, strict=True):
        assert mine == pytest.approx(reference(tiny_model("llama", torch.float64), question), rel=1e-9)


def test_under_autocast_a_shared_context_may_differ_by_its_rounding() -> None:
    """Weights in float32 say nothing of products in bfloat16; what is more than their rounding is still seen."""
    model, questions = tiny_model("llama"), asked(Random(2), 6)
    head, size = model.get_output_embeddings(), [1.01]

    def coarse(module: nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits * size[0] if logits.shape[:2] == (4, 5) else logits  # of the choices behind what they share

    head.register_forward_hook(coarse)
    with torch.autocast("cpu", torch.bfloat16):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            score_choices(model, Numbers(), questions)
        size[0] = 1.3
        with pytest.warns(UserWarning, match="Each choice is run alone"):
            score_choices(model, Numbers(), questions)
    size[0] = 1.01
    with pytest.warns(UserWarning, match="Each choice is run alone"):
        score_choices(model, Numbers(), questions)


class Pairs:
    """A tokenizer of letters, to which "ab" is one token, wherever it comes from; it may put a BOS in front."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = []
        while text:
            step = 2 if text.startswith("ab") else 1
            ids.append(50 if step == 2 else 3 + ord(text[0]) % 40)
            text = text[step:]
        return {"input_ids": ([1] if add_special_tokens else []) + ids}


def encoded(*continuations: str, context: str = "x a", add_bos: bool = False) -> list[Any]:
    question = Question((context,) * len(continuations), continuations, 0)
    return module.Encoder(Pairs(), add_bos, None)(question)


def test_a_token_across_the_boundary_is_scored_for_every_choice() -> None:
    """ "x a" and "b" with nothing between are the tokens x, space, ab: the a belongs to what is scored."""
    question = Question(("xa", "xa"), ("b", "c"), 0)
    # A space goes between, unless one of the two brings it.
    apart = module.Encoder(Pairs(), False, None)(question)
    assert [s.start for s in apart] == [2, 2] and [len(s.tokens) for s in apart] == [4, 4]
    joined = module.Encoder(Pairs(), False, None)(Question(("x a\n", "x a\n"), ("b", "c"), 0))
    assert [s.start for s in joined] == [4, 4]

    class Greedy(Pairs):
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return super().__call__(text.replace("a b", "ab"), add_special_tokens)

    merged = module.Encoder(Greedy(), False, None)(Question(("xa", "xa"), ("b", "c"), 0))
    assert [s.tokens[s.start :] for s in merged] == [(50,), (3 + ord("a") % 40, 3 + 32, 3 + ord("c") % 40)]
    assert merged[0].tokens[: merged[0].start] == merged[1].tokens[: merged[1].start]


def test_white_space_and_bos() -> None:
    space = 3 + 32
    for context, continuation in (("x", "y"), ("x ", "y"), ("x", " y")):
        assert encoded(continuation, context=context)[0].tokens == (3 + ord("x") % 40, space, 3 + ord("y") % 40)
    assert encoded("y", context="x", add_bos=True)[0].tokens[0] == 1
    assert encoded("y", context="")[0] == module.EncodedChoice((1, 3 + ord("y") % 40), 1)  # nothing to predict it from

    class Bare(Pairs):
        bos_token_id = None

    assert module.Encoder(Bare(), False, None)(Question(("",), ("y",), 0))[0].tokens[0] == 2
    with pytest.raises(StreamlineError, match="bos_token_id to begin"):
        module.Encoder(Bare(), True, None)(Question(("x",), ("y",), 0))


def test_what_cannot_be_scored() -> None:
    model, random = tiny_model("llama"), Random(0)
    long = Question((numbers(random, 126),) * 2, (numbers(random, 1), numbers(random, 3)), 0, "q.jsonl, line 7")
    with pytest.raises(StreamlineError, match=r"q.jsonl.*line 7.*129 tokens.*128 positions"):
        score_choices(model, Numbers(), [long])
    blank = Question(("5 6",) * 2, ("7", " "), 0, "q.jsonl, line 8")
    with pytest.raises(StreamlineError, match=r"q.jsonl.*line 8"):
        score_choices(model, Numbers(), [blank])
    with pytest.raises(StreamlineError, match="no question"):
        score_choices(model, Numbers(), [])
    with pytest.raises(StreamlineError, match=r"batch_size=0.*1 or"):
        score_choices(model, Numbers(), [blank], batch_size=0)
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NotFiniteLikelihood, match=r"q.jsonl.*line 9"):
        score_choices(model, Numbers(), [Question(("5 6",) * 2, ("7", "8 9"), 0, "q.jsonl, line 9")])


def test_real_text(stories: tuple[Any, Any], tmp_path: Path) -> None:
    """A model of small stories knows how they go on; by its own tokenizer, and as each text run alone."""
    model, tokenizer = stories
    path = tmp_path / "stories.jsonl"
    path.write_text(
        '{"query": "Once upon a time, there was a girl named", "choices": ["Lily.", "engine.", "very."], "gold": 0}\n'
        '{"query": "The sun was", "choices": ["shining.", "a tax on the."], "gold": 0}\n'
        '{"context_options": ["Tom was sad. He started to", "Tom was happy. He started to"], "continuation": "cry.", '
        '"gold": 0}\n'
    )
    questions = read_questions(path)
    got = score_choices(model, tokenizer, questions, add_bos=True)
    assert got.accuracy == 1.0 and got.standard_error == 0.0
    assert str(got) == ("100.0% ± 0.0% of 3 questions answered right, 100.0% ± 0.0% by likelihood a character")
    for mine, question in zip(got.loglikelihoods, questions, strict=True):
        for value, context, text in zip(mine, question.contexts, question.continuations, strict=True):
            whole = tokenizer(f"{context} {text}", add_special_tokens=False)["input_ids"]
            start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
            ids = torch.tensor([[tokenizer.bos_token_id, *whole]])
            with torch.no_grad():
                logs = model(ids).logits[0].double().log_softmax(-1)
            alone = sum(float(logs[at - 1, ids[0, at]]) for at in range(start + 1, len(ids[0])))
            assert value == pytest.approx(alone, rel=1e-4)

"""Whether the end of a text is what a model would have written, against its own greedy text."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation import (
    LastWord,
    LastWordScores,
    read_last_words,
    score_last_words,
    write_on,
)
from streamline_hooks.evaluation.perplexity import NotFiniteLikelihood
from tests.evaluation.number_tasks import Numbers
from tests.tiny_models import tiny_model

CONTEXT = "Once upon a time, there was a little girl named Lily. She loved to"


def alone(model: Any, tokenizer: Any, end: str) -> float:
    """The log-likelihood of one end, by a pass over its text without padding."""
    context, whole = (
        [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for text in (CONTEXT, f"{CONTEXT} {end}")
    )
    assert whole[: len(context)] == context
    with torch.no_grad():
        logs = model(torch.tensor([whole])).logits[0].double().log_softmax(dim=-1)
    return sum(float(logs[k - 1, whole[k]]) for k in range(len(context), len(whole)))


def test_an_end_is_right_where_every_token_is_the_likeliest(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    ((written,),) = write_on(model, tokenizer, [CONTEXT], new_tokens=12)
    words = written.text.split()
    ends = [" ".join(words[:count]) for count in (1, 2, 3)]
    wrong = [f"{ends[1]}ing", "xylophone", f"{words[0]} xylophone"]
    found = score_last_words(
        model, tokenizer, [LastWord(CONTEXT, end) for end in (*ends, *wrong)], add_bos=True, batch_size=4
    )
    assert found.right == (True, True, True, False, False, False)
    assert found.accuracy == 0.5 and found.standard_error == pytest.approx(math.sqrt(0.25 / 5))
    assert found.loglikelihoods == pytest.approx([alone(model, tokenizer, end) for end in (*ends, *wrong)], rel=1e-4)
    mean = sum(found.loglikelihoods) / len(found.loglikelihoods)
    assert found.perplexity == pytest.approx(math.exp(-mean))
    assert str(found) == "50.0% ± 22.4% of 6 ends predicted"


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "ends.jsonl"
    rows = [{"context": "A cat", "continuation": "sat"}, {"text": "The dog ran away\n"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_last_words(path)
    assert (first.context, first.continuation) == ("A cat", "sat")
    assert (second.context, second.continuation) == ("The dog ran", "away")
    path.write_text(json.dumps({"text": "The dog\nran  away"}))
    (divided,) = read_last_words(path)
    assert (divided.context, divided.continuation) == ("The dog\nran ", "away")
    path.write_text(json.dumps({"context": "A cat"}))
    with pytest.raises(StreamlineError, match=r"row 0.*context.*Expected context and continuation"):
        read_last_words(path)
    path.write_text("")
    with pytest.raises(StreamlineError, match=r"ends.jsonl.*empty"):
        read_last_words(path)


def test_an_end_that_is_all_but_impossible_has_no_finite_perplexity() -> None:
    assert LastWordScores((False,), (-800.0,)).perplexity == math.inf
    assert LastWordScores((False,), (-700.0,)).perplexity == pytest.approx(math.exp(700))


def test_a_token_that_spans_the_boundary_is_scored_with_the_end() -> None:
    """4 and a 2 right behind it are one token, 42."""
    model = tiny_model("llama")
    found = score_last_words(model, Numbers(), [LastWord("7 8 4\n", "2"), LastWord("7 8 4", "2 ")], batch_size=1)
    assert found.loglikelihoods[0] == pytest.approx(found.loglikelihoods[1], rel=1e-5)
    joined = score_last_words(model, Joined(), [LastWord("7 8 4", "2")]).loglikelihoods
    with torch.no_grad():
        logs = model(torch.tensor([[7, 8, 42]])).logits[0].log_softmax(dim=-1)
    assert joined[0] == pytest.approx(float(logs[1, 42]), rel=1e-5)


class Joined(Numbers):
    """Reads "4 2" as 42."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return super().__call__(text.replace("4 2", "42"), add_special_tokens)


def test_a_text_that_does_not_fit_or_is_not_finite(stories: tuple[Any, Any]) -> None:
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    with pytest.raises(StreamlineError, match=r"mine has \d+ tokens.*512 positions"):
        score_last_words(model, tokenizer, [LastWord("a " * 600, "cat", "mine")])
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(NotFiniteLikelihood, match=r"mine is nan"):
        score_last_words(model, tokenizer, [LastWord("A", "cat", "mine")])


def test_nothing_to_score(stories: tuple[Any, Any]) -> None:
    with pytest.raises(StreamlineError, match="no text whose end"):
        score_last_words(*stories, [])

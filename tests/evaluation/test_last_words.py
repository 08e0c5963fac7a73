"""Whether the end of a text is what a model would have written, against its own greedy text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation import (
    LastWord,
    LastWordScores,
    read_last_words,
    score_choices,
    score_last_words,
    write_on,
)
from streamline_hooks.evaluation.questions import Question

CONTEXT = "Once upon a time, there was a little girl named Lily. She loved to"


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
    questions = [Question((CONTEXT,) * 2, (end, "no"), 0) for end in (*ends, *wrong)]
    scored = score_choices(model, tokenizer, questions, add_bos=True).loglikelihoods
    assert found.loglikelihoods == pytest.approx([first for first, _ in scored], rel=1e-4)
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
    with pytest.raises(StreamlineError, match=r'line 1.*expected \{"context".*"continuation"\}'):
        read_last_words(path)
    path.write_text("")
    with pytest.raises(StreamlineError, match=r"ends.jsonl.*empty"):
        read_last_words(path)


def test_an_end_that_is_all_but_impossible_has_no_finite_perplexity() -> None:
    assert LastWordScores((False,), (-800.0,)).perplexity == math.inf
    assert LastWordScores((False,), (-700.0,)).perplexity == pytest.approx(math.exp(700))


def test_nothing_to_score(stories: tuple[Any, Any]) -> None:
    with pytest.raises(StreamlineError, match="no text whose end"):
        score_last_words(*stories, [])

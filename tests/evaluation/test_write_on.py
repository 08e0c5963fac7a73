"""Generated texts: their bounds, batches and repetition, and their agreement with another model's."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation.samples import (
    GeneratedText,
    GenerationAgreement,
    GenerationStatistics,
    TextGenerationConfig,
    generate_texts,
)

PROMPTS = ["Once upon a time, there was a little girl named Lily. She", "Tom", "One day, a big dog and a small cat"]


def test_the_batch_makes_no_difference(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    alone = [
        generate_texts(model, tokenizer, [prompt], TextGenerationConfig(new_tokens=24))[0][0] for prompt in PROMPTS
    ]
    together = generate_texts(model, tokenizer, PROMPTS, TextGenerationConfig(new_tokens=24, batch_size=2))
    assert [one.text for (one,) in together] == [one.text for one in alone]
    assert [one.prompt for (one,) in together] == PROMPTS
    assert all(len(one.tokens) == 24 and not one.ended for one in alone)


def test_a_text_ends_before_what_it_is_to_stop_at(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    free = generate_texts(model, tokenizer, PROMPTS[:1], TextGenerationConfig(new_tokens=40))[0][0]
    stop = free.text.split(".")[0][-3:]
    (cut,) = generate_texts(
        model, tokenizer, PROMPTS[:1], TextGenerationConfig(new_tokens=40, stop=[stop, "no such text"])
    )[0]
    assert cut.text == free.text[: free.text.index(stop)] and cut.ended
    assert tokenizer.decode(cut.tokens).endswith(stop) and len(cut.tokens) < 40  # it was not written to the end
    prompts = [*PROMPTS, f"{PROMPTS[0]} {stop}"]  # what is in the prompt does not count, nor what others go on with
    alone = [
        generate_texts(model, tokenizer, [prompt], TextGenerationConfig(new_tokens=40, stop=[stop]))[0][0]
        for prompt in prompts
    ]
    assert [
        one for (one,) in generate_texts(model, tokenizer, prompts, TextGenerationConfig(new_tokens=40, stop=[stop]))
    ] == alone
    assert len(alone[-1].tokens) > 1


def test_samples_differ_and_come_again(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    runs = [
        generate_texts(
            model, tokenizer, PROMPTS, TextGenerationConfig(new_tokens=16, samples=2, temperature=1.2, seed=seed)
        )
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert all(len({text.text for text in several}) == 2 for several in runs[0])
    widths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    many = generate_texts(
        model, tokenizer, PROMPTS[:2], TextGenerationConfig(new_tokens=4, samples=5, temperature=1.2, batch_size=2)
    )
    handle.remove()
    assert max(widths) == 2 and [len(several) for several in many] == [5, 5]
    assert len({text.text for text in many[0]}) > 1


@given(st.lists(st.integers(0, 3), max_size=30))
def test_repetition_counts_runs_that_were_there_before(tokens: list[int]) -> None:
    seen: list[list[int]] = []
    repeated = 0
    for k in range(len(tokens) - 3):
        run = tokens[k : k + 4]
        repeated += run in seen
        seen.append(run)
    found = GeneratedText("", "", tuple(tokens), True).repetition
    assert math.isnan(found) if not seen else found == pytest.approx(repeated / len(seen))


def test_scores_of_several_texts() -> None:
    texts = (
        GeneratedText("", "", (1,) * 8, True),
        GeneratedText("", "", tuple(range(8)), False),
        GeneratedText("", "", (1, 2), True),
    )
    scores = GenerationStatistics(texts)
    assert (scores.repetition, scores.length, scores.ended) == (pytest.approx(0.4), 6.0, pytest.approx(2 / 3))
    assert str(scores) == "3 texts, 6 tokens on average, 67% ended; 40.0% of the 4-grams are repeated"
    assert math.isnan(GenerationStatistics(texts[2:]).repetition)


def test_what_cannot_be_asked_for(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    with pytest.raises(StreamlineError, match=r"prompts is empty.*Pass"):
        generate_texts(model, tokenizer, [])
    with pytest.raises(StreamlineError, match=r"samples=3.*temperature=0.*3 times.*Set temperature"):
        generate_texts(model, tokenizer, PROMPTS, TextGenerationConfig(samples=3))
    with pytest.raises(StreamlineError, match=r"new_tokens=0.*1 or"):
        generate_texts(model, tokenizer, PROMPTS, TextGenerationConfig(new_tokens=0))
    with pytest.raises(StreamlineError, match=r"no chat template.*Set chat=False"):
        generate_texts(model, tokenizer, PROMPTS, TextGenerationConfig(chat=True))
    for prompts, said in (("once", "prompts='once'.*list of strings"), ([1, 2], "int.*[Ee]xpected")):
        with pytest.raises(StreamlineError, match=said):
            generate_texts(model, tokenizer, prompts)


def test_the_bar_moves_with_each_token(story_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[int] = []

    class Watched(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            moves.append(int(n or 0))
            return super().update(n)

    monkeypatch.setattr("streamline_hooks.core.progress.tqdm", Watched)
    model, tokenizer = story_model
    generate_texts(model, tokenizer, ["Once", "One day"], TextGenerationConfig(new_tokens=4, batch_size=2))
    assert moves[:4] == [2, 2, 2, 2]


def text(*tokens: int, ended: bool = False, prompt: str = "p") -> GeneratedText:
    return GeneratedText(prompt, "", tokens, ended)


@pytest.mark.parametrize(
    ("mine", "theirs", "length", "same"),
    [
        (text(1, 2, 3), text(1, 2, 3), 3, True),
        (text(1, 2, 3), text(1, 2, 4), 2, False),
        (text(1, 2), text(1, 2, 3), 2, False),
        (text(1, 2, ended=True), text(1, 2), 2, False),  # the end is a token too
        (text(5), text(1, 5), 0, False),
        (text(), text(), 0, True),
    ],
)
def test_common_beginnings(mine: GeneratedText, theirs: GeneratedText, length: int, same: bool) -> None:
    assert (
        GenerationAgreement.of([mine], [theirs])
        == GenerationAgreement.of([theirs], [mine])
        == GenerationAgreement((length,), (same,))
    )


def test_other_prompts_are_refused() -> None:
    with pytest.raises(StreamlineError, match=r"1 texts and 1 of"):
        GenerationAgreement.of([text(1)], [text(1, prompt="q")])
    with pytest.raises(StreamlineError, match="same prompts"):
        GenerationAgreement.of([], [])

"""Two models' texts of the same prompts stand beside each other, the original's on the left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation import (
    GeneratedText,
    TextGenerationConfig,
    generate_texts,
    generate_with_both,
    side_by_side,
)


def text(prompt: str, content: str) -> GeneratedText:
    return GeneratedText(prompt, content, (1,), ended=True)


def test_each_model_writes_its_own_column(story_model: tuple[Any, Any]) -> None:
    original, tokenizer = story_model
    changed = copy.deepcopy(original)
    with torch.no_grad():
        for block in changed.model.layers:
            block.mlp.down_proj.weight.zero_()
    prompts = ["Once upon a time", "One day, Lily"]
    pairs = generate_with_both(changed, original, tokenizer, prompts, new_tokens=12)
    for (mine, theirs), prompt in zip(pairs, prompts, strict=True):
        config, k = TextGenerationConfig(new_tokens=12), prompts.index(prompt)
        assert mine == generate_texts(changed, tokenizer, prompts, config)[k][0]
        assert theirs == generate_texts(original, tokenizer, prompts, config)[k][0]
        assert mine.text != theirs.text
    lines = side_by_side(pairs, ("before", "after")).splitlines()
    assert lines[0] == "Once upon a time ..."
    before, after = lines[1].split("|")
    assert (before.strip(), after.strip()) == ("before", "after")
    first = lines[2].split("|")
    assert pairs[0][1].text.strip().startswith(first[0].strip()) and pairs[0][0].text.strip().startswith(
        first[1].strip()
    )


def test_long_and_empty_texts_stay_within_the_width() -> None:
    long = "word " * 60 + "x" * 300 + "\n\nlast"
    found = side_by_side([(text("a " * 90, ""), text("a " * 90, long))], width=60)
    assert max(map(len, found.splitlines())) <= 60
    assert "(nothing)" in found and "last" in found
    assert "".join(found.split()).count("x") == 300


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(StreamlineError, match="different prompts, 'a' and 'b'.*Generate"):
        side_by_side([(text("a", "x"), text("b", "y"))])
    with pytest.raises(StreamlineError, match="width=10.*at least 40"):
        side_by_side([], width=10)

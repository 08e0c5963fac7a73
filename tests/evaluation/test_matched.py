"""How far two texts go along with each other."""

from __future__ import annotations

import pytest

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation import Matched, Written


def text(*tokens: int, ended: bool = False, prompt: str = "p") -> Written:
    return Written(prompt, "", tokens, ended)


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
def test_common_beginnings(mine: Written, theirs: Written, length: int, same: bool) -> None:
    assert Matched.of([mine], [theirs]) == Matched.of([theirs], [mine]) == Matched((length,), (same,))


def test_other_prompts_are_refused() -> None:
    with pytest.raises(StreamlineError, match=r"1 texts.*1 of"):
        Matched.of([text(1)], [text(1, prompt="q")])
    with pytest.raises(StreamlineError, match="same prompts"):
        Matched.of([], [])

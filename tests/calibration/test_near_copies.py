from __future__ import annotations

import zlib
from typing import Any

import pytest

from streamline_hooks.calibration.near_copies import NearCopies

STORY = (
    "The old lighthouse stood at the end of the pier, where the wind never rested and the gulls complained from dawn "
    "to dusk. Every evening Martha climbed its hundred and ten steps with a can of oil in one hand and a book in the "
    "other, for the light needed company as much as it needed oil. One night in autumn a ship came in without a single "
    "lamp, and she rang the bell until her arms were sore."
)


def ids(text: str) -> list[int]:
    """One id a word, by its hash."""
    return [zlib.crc32(word.encode()) for word in text.split()]


@pytest.mark.parametrize(
    "copy",
    [
        STORY,
        STORY.replace("Martha", "Agnes").replace("autumn", "spring"),
        "Here is a story. " + STORY,
        STORY + " In the morning there was no ship, and nobody in the village had heard the bell.",
        STORY[len(STORY) // 4 :],
    ],
)
def test_what_is_mostly_an_earlier_text_is_a_near_copy(copy: str) -> None:
    copies = NearCopies()
    assert copies.keep(ids(STORY))
    assert not copies.keep(ids(copy))


def test_another_text_about_the_same_thing_is_none() -> None:
    copies = NearCopies()
    assert copies.keep(ids(STORY))
    other = (
        "The old lighthouse stood at the end of the pier, and nobody had lit it for forty years. The children said "
        "that there was a woman on its stairs, in one hand a can of oil. The postman, who had been there, knew better: "
        "there were only gulls, and a book without a cover, and a bell."
    )
    assert copies.keep(ids(other))


def test_what_is_dropped_is_not_remembered() -> None:
    """Otherwise a chain of small changes would drop what is like no text that was kept."""
    copies = NearCopies()
    kept = list(range(40))
    assert copies.keep(kept)
    assert not copies.keep([*range(30), *range(100, 120)])
    assert copies.keep([*range(100, 130)])


def test_short_texts_are_compared_whole() -> None:
    copies = NearCopies()
    assert copies.keep([1, 2]) and copies.keep([1, 3]) and not copies.keep([1, 2])
    assert copies.keep([]) and not copies.keep([])


def test_the_work_grows_with_the_text_alone() -> None:
    seen: list[int] = []

    class Counted(list):  # type: ignore[type-arg]
        def __getitem__(self, key: Any) -> Any:
            seen.append(1)
            return super().__getitem__(key)

    copies = NearCopies()
    for number in range(200):
        copies.keep(Counted(range(100 * number, 100 * number + 100)))
    assert len(seen) == 200 * 95

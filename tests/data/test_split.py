from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamline_hooks.core import StreamlineError
from streamline_hooks.data import TokenSplit, check_tokenizer, read_documents, split_documents

PARTS = ("calibration", "validation", "test")


def letters(text: str, *, add_special_tokens: bool, verbose: bool) -> Any:
    """Tokenizes a text to its bytes, so that the text can be read off the ids."""
    assert not add_special_tokens
    return {"input_ids": list(text.encode())}


def words_of(part: torch.Tensor) -> list[str]:
    """The words of a part that are not cut at its end."""
    return re.findall(r"p\d+w\d+x", bytes(part.flatten().tolist()).decode())


def paragraph(number: int, words: int) -> str:
    return " ".join(f"p{number}w{word}x" for word in range(words))


def documents_of(shape: list[list[tuple[int, int]]]) -> list[str]:
    return ["\n\n".join(paragraph(*one) for one in document) for document in shape]


def equal(one: TokenSplit, other: TokenSplit) -> bool:
    return one.fingerprint == other.fingerprint and all(
        torch.equal(getattr(one, part), getattr(other, part)) for part in PARTS
    )


# Paragraphs of the same number are copies of one another: at least 15 words make them longer than 80 characters.
shapes = st.lists(
    st.lists(st.integers(0, 60).map(lambda n: (n, 15 + n % 40)), min_size=1, max_size=12), min_size=1, max_size=60
)
sizes = st.fixed_dictionaries(
    {
        "sequence_length": st.integers(8, 100),
        "calibration_tokens": st.integers(100, 3_000),
        "validation_tokens": st.integers(100, 800),
        "test_tokens": st.integers(100, 1_500),
        "seed": st.integers(0, 3),
    }
)


@settings(deadline=None)
@given(shapes, sizes, st.randoms(use_true_random=False))
def test_no_long_paragraph_is_in_two_parts(
    shape: list[list[tuple[int, int]]], options: dict[str, int], rng: random.Random
) -> None:
    documents = documents_of(shape)
    unique = {one for document in shape for one in document}
    length = options["sequence_length"]
    try:
        split = split_documents(documents, letters, **options)
    except StreamlineError as error:
        # Three sequences, a quarter of one lost at the end of each part, and a word at each cut.
        assert sum(len(paragraph(*one)) for one in unique) < 3 * (1.25 * length + 20)
        assert f"one sequence of {length:,} tokens" in str(error)
        return

    counted = [set(words_of(getattr(split, part))) for part in PARTS]
    assert sum(map(len, counted)) == len(set.union(*counted))
    for part in PARTS:
        ids = getattr(split, part)
        assert ids.dtype == torch.long
        assert ids.shape[1] == length
        full = options[f"{part}_tokens"] // length
        assert 1 <= ids.shape[0] <= full
        if not any("shrunk" in note for note in split.notes):
            assert ids.shape[0] == full

    shuffled = documents + documents[:2]
    rng.shuffle(shuffled)
    assert equal(split, split_documents(shuffled, letters, **options))


@settings(deadline=None)
@given(st.integers(20, 120), st.integers(1, 4), sizes)
def test_no_document_is_in_two_parts_where_they_are_many(count: int, paragraphs: int, options: dict[str, int]) -> None:
    documents = documents_of([[(100 * n + k, 10) for k in range(paragraphs)] for n in range(count)])
    try:
        split = split_documents(documents, letters, **options)
    except StreamlineError:
        return
    owners: dict[str, set[str]] = {}
    for part in PARTS:
        for word in words_of(getattr(split, part)):
            owners.setdefault(str(int(word[1 : word.index("w")]) // 100), set()).add(part)
    if not any("cut into pieces" in note for note in split.notes):
        assert all(len(parts) == 1 for parts in owners.values())
    elif sum(map(len, documents)) > 3 * sum(options[f"{part}_tokens"] for part in PARTS):
        pytest.fail("cut although there was three times as much text as was asked for")


@settings(deadline=None)
@given(shapes, shapes, sizes)
def test_separate_test_documents(
    shape: list[list[tuple[int, int]]], scored: list[list[tuple[int, int]]], options: dict[str, int]
) -> None:
    documents, test_documents = documents_of(shape), documents_of(scored)
    try:
        split = split_documents(documents, letters, test_documents=test_documents, **options)
    except StreamlineError:
        return
    all_scored = {word for document in test_documents for word in document.split()}
    assert set(words_of(split.test)) <= all_scored
    assert all_scored.isdisjoint(words_of(split.calibration) + words_of(split.validation))


def test_a_short_document_that_is_scored_is_not_calibrated_on() -> None:
    shared = [f"p{n}w0x is short" for n in range(40)]
    other = [f"p{n}w0x is short" for n in range(40, 200)]
    split = split_documents(
        shared + other,
        letters,
        sequence_length=8,
        calibration_tokens=800,
        validation_tokens=200,
        test_tokens=100,
        test_documents=shared,
    )
    assert split.notes == ()
    assert set(words_of(split.test)) <= {f"p{n}w0x" for n in range(40)}
    assert {f"p{n}w0x" for n in range(40)}.isdisjoint(words_of(split.calibration) + words_of(split.validation))


SMALL = {"sequence_length": 16, "calibration_tokens": 640, "validation_tokens": 128, "test_tokens": 256}


def test_one_long_document_is_cut_at_paragraphs() -> None:
    document = "\n\n".join(f"This is the paragraph number {n}, of one line." for n in range(2_000))
    split = split_documents(
        [document], letters, sequence_length=128, calibration_tokens=5_120, validation_tokens=1_024, test_tokens=2_048
    )
    assert [getattr(split, part).shape for part in PARTS] == [(40, 128), (8, 128), (16, 128)]
    assert split.notes == (
        "too few documents to fill test and validation and calibration with whole documents: they were cut into "
        "pieces, so two parts may contain pieces of one document",
    )
    text = {part: bytes(getattr(split, part).flatten().tolist()).decode() for part in PARTS}
    assert text["test"].startswith("This is the paragraph number ")
    assert all("paragraph" in one for one in re.findall(r"\n\n(.*), of one line", "".join(text.values())))
    numbers = [set(re.findall(r"number (\d+),", one)) for one in text.values()]
    assert sum(map(len, numbers)) == len(set.union(*numbers))


@pytest.mark.parametrize("between", ["\n", " ", ""])
def test_a_document_without_paragraphs_is_cut_at_lines_or_words_or_anywhere(between: str) -> None:
    document = between.join(f"p{n}w0x" for n in range(1_000))
    split = split_documents([document], letters, **SMALL)
    seen = [set(words_of(getattr(split, part))) for part in PARTS]
    assert sum(map(len, seen)) == len(set.union(*seen)) > 50


def test_no_document_makes_up_more_than_a_quarter_of_its_part() -> None:
    documents = [" ".join(f"p{n}w{k}x" for k in range(500)) for n in range(12)]
    split = split_documents(documents, letters, **SMALL)
    assert split.notes == ()
    for part in PARTS:
        words = words_of(getattr(split, part))
        numbers = [word[: word.index("w")] for word in words]
        assert len(set(numbers)) == 4


def test_little_text_shrinks_the_parts_by_one_ratio() -> None:
    documents = [f"This is the document number {n}." for n in range(120)]
    asked = {"calibration_tokens": 16_000, "validation_tokens": 3_200, "test_tokens": 6_400}
    split = split_documents(documents, letters, sequence_length=16, **asked)
    counts = {part: getattr(split, part).numel() for part in PARTS}
    assert 3_000 < sum(counts.values()) < 4_000
    for part in PARTS:
        assert counts[part] / asked[f"{part}_tokens"] == pytest.approx(counts["test"] / 6_400, abs=0.01)
    (note,) = split.notes
    assert re.fullmatch(
        r"the text has about [34],\d+ tokens: test 6,400, validation 3,200, calibration 16,000 were requested and "
        r"shrunk to test \d+, validation \d+, calibration [\d,]+",
        note,
    )
    assert note in split.describe()


def test_another_seed_deals_differently() -> None:
    documents = documents_of([[(n, 15)] for n in range(200)])
    prints = {split_documents(documents, letters, seed=seed, **SMALL).fingerprint for seed in range(5)}
    assert len(prints) == 5


def test_no_more_is_tokenized_than_is_needed() -> None:
    read = 0

    def counting(text: str, **options: Any) -> Any:
        nonlocal read
        read += len(text)
        return letters(text, **options)

    documents = documents_of([[(100 * n + k, 40) for k in range(100)] for n in range(200)])
    assert sum(map(len, documents)) > 5_000_000
    split_documents(documents, counting, **SMALL)
    assert read < 80_000


def test_describe() -> None:
    split = split_documents(documents_of([[(n, 15)] for n in range(200)]), letters, **SMALL)
    assert split.describe() == (
        f"calibration 640, validation 128, test 256 tokens in sequences of 16; fingerprint {split.fingerprint[:12]}"
    )
    assert re.fullmatch("[0-9a-f]{64}", split.fingerprint)


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, r"about 0 usable tokens.*in 0 documents.*Expected.*sequence of 16 tokens"),
        (
            ["Too short."],
            {},
            r"10 usable tokens.*in 1 document\).*test and validation and calibration.*48",
        ),
        (["Too short."], {}, r"Give more text.*--sequence-length"),
        (["x"], {"test_tokens": 15}, r"test_tokens=15.*sequence_length=16.*Request test_tokens=16"),
        (["x"], {"sequence_length": 0}, r"sequence_length=0.*positive"),
        (documents_of([[(n, 15)] for n in range(99)]), {"test_documents": []}, r"each of test.*16"),
    ],
)
def test_errors(documents: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamlineError, match=message):
        split_documents(documents, letters, **{**SMALL, **options})


def test_calibration_text_that_is_all_in_the_test_documents() -> None:
    documents = documents_of([[(n, 15)] for n in range(99)])
    copies = [document + "\n\nand more" for document in documents]
    with pytest.raises(StreamlineError, match="each of validation and calibration"):
        split_documents(documents, letters, test_documents=copies, **SMALL)


class TestCheckTokenizer:
    class Tokenizer:
        name_or_path = "some/tokenizer"

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 7, "c": 3}

    split = TokenSplit(*torch.arange(12).view(3, 1, 4), fingerprint="")

    def test_passes(self) -> None:
        check_tokenizer(self.Tokenizer(), 8)
        check_tokenizer(self.Tokenizer(), 12, self.split)

    @pytest.mark.parametrize(
        ("rows", "split", "message"),
        [
            (7, None, r"'some/tokenizer'.*id 7.*7 rows.*0 to 6"),
            (11, split, r"id 11.*11 rows"),
        ],
    )
    def test_raises(self, rows: int, split: TokenSplit | None, message: str) -> None:
        with pytest.raises(StreamlineError, match=message):
            check_tokenizer(self.Tokenizer(), rows, split)


def test_pydoc_with_a_real_tokenizer(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    split = split_documents(read_documents("pydoc"), tokenizer)
    assert [getattr(split, part).shape for part in PARTS] == [(80, 512), (16, 512), (32, 512)]
    assert split.notes == ()
    check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings, split)
    assert not (split.calibration == tokenizer.bos_token_id).any()


def test_real_texts(stories: tuple[Any, Any], data_folder: Path) -> None:
    _, tokenizer = stories
    documents = read_documents(data_folder / "text" / "train")
    held_out = read_documents(data_folder / "text" / "heldout" / "peps.txt")
    split = split_documents(documents, tokenizer, test_documents=held_out)
    assert [getattr(split, part).shape for part in PARTS] == [(80, 512), (16, 512), (32, 512)]
    assert equal(split, split_documents(documents[::-1], tokenizer, test_documents=held_out[::-1]))

"""Several sources in shares: what is read as a mixture, and that no text gets from one part into another."""

from __future__ import annotations

import re
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamline_hooks import (
    RunOptions,
    compress,
)
from streamline_hooks.cli import parse_mixture
from streamline_hooks.core import StreamlineError
from streamline_hooks.data import MixedSource, TokenSplit, mixed_split
from streamline_hooks.data.document_parts import long_paragraphs
from streamline_hooks.data.mixture import sequences_by_source, smallest_part
from tests.configured import configured
from tests.tiny_models import tiny_model

PARTS = ("calibration", "validation", "test")
SMALL: dict[str, int] = {
    "sequence_length": 16, "calibration_tokens": 640, "validation_tokens": 160, "test_tokens": 320,
}  # fmt: skip


def mixed(documents: Any, shares: Any, tokenizer: Any, conversations: Any = (), **options: Any) -> TokenSplit:
    """Mix sources that are given as documents and shares by name."""
    sources = {name: MixedSource(documents[name], share, name in conversations) for name, share in shares.items()}
    return mixed_split(sources, tokenizer, **options)


def letters(text: str, **options: Any) -> Any:
    """Tokenizes a text to its bytes, so that the text can be read off the ids."""
    return {"input_ids": list(text.encode())}


TOKENIZER: Any = letters


def paragraphs(source: str, number: int, words: int = 15) -> str:
    return " ".join(f"{source}{number}w{word}x" for word in range(words))


def source_of(name: str, count: int) -> list[str]:
    return [f"{paragraphs(name, 2 * n)}\n\n{paragraphs(name, 2 * n + 1)}" for n in range(count)]


def words_of(part: torch.Tensor) -> list[str]:
    """The words of a part that are not cut at the edge of a row."""
    rows = [bytes(row.tolist()).decode() for row in part]
    return [word for row in rows for word in re.findall(r"(?<=\s)[a-z]\d+w\d+x(?=\s)", row)]


def owners(part: torch.Tensor) -> list[str]:
    """Of each row, whose words it holds most."""
    found = []
    for row in part:
        names = re.findall(r"[a-v](?=\d+w)", bytes(row.tolist()).decode())
        found.append(max(sorted(set(names)), key=names.count) if names else "?")
    return found


class TestParse:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("self:0.5,folder:0.5", {"self": 0.5, "folder": 0.5}),
            (" a/b.txt:.25 , pydoc:7.5e-1", {"a/b.txt": 0.25, "pydoc": 0.75}),
            ("name:config:0.5,chat:0.5", {"name:config": 0.5, "chat": 0.5}),
            ("a:0.333,b:0.333,c:0.333", dict.fromkeys("abc", pytest.approx(1 / 3))),
            ("self:1", {"self": 1.0}),
            ("pydoc", None),
            ("name:config", None),
            ("name:2023", None),
            ("a,b", None),
            ("a" * 5000, None),
        ],
    )
    def test_what_is_a_mixture(self, text: str, expected: dict[str, float] | None) -> None:
        assert parse_mixture(text) == expected

    def test_a_path_that_is_there_is_no_mixture(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("a:0.5,b:0.5").write_text("text")
        assert parse_mixture("a:0.5,b:0.5") is None
        Path("one.txt").write_text("text")
        with pytest.raises(StreamlineError, match=r"has '\./one\.txt' twice"):
            parse_mixture("one.txt:0.5,./one.txt:0.5")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("self:0.5,folder", r"'self:0\.5'.*'folder'.*Expected"),
            ("self:0.5,folder:0.4", r"'self:0\.5,folder:0\.4'.*0\.9.*Expected"),
            ("a:2020,b:2021", r"sum of 4041"),
            ("self:0.5", r"sum of 0\.5"),
            ("self:1.5,folder:-0.5", r"-0\.5.*'folder'.*above 0"),
            ("self:1,folder:0", r"'folder': 0.*above 0"),
            ("self:0.5,self:0.5", r"'self' twice.*once"),
            (":0.5,a:0.5", r"without a source.*':0\.5'"),
        ],
    )
    def test_what_is_refused(self, text: str, message: str) -> None:
        with pytest.raises(StreamlineError, match=message):
            parse_mixture(text)


def test_each_part_has_its_shares_and_what_was_asked_for() -> None:
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    split = mixed({name: source_of(name, 200) for name in shares}, shares, TOKENIZER, **SMALL)
    assert [getattr(split, part).numel() for part in PARTS] == [640, 160, 320]
    assert split.notes == ("calibration is a 320, b 192, c 128 tokens (50.0 %, 30.0 %, 20.0 %)",)
    for part in PARTS:
        found = owners(getattr(split, part))
        assert {name: found.count(name) / len(found) for name in shares} == pytest.approx(shares)
    again = mixed({name: source_of(name, 200)[::-1] for name in shares}, shares, TOKENIZER, **SMALL)
    assert again.fingerprint == split.fingerprint and torch.equal(again.test, split.test)
    other = mixed({name: source_of(name, 200) for name in shares}, shares, TOKENIZER, seed=1, **SMALL)
    assert other.fingerprint != split.fingerprint


def test_every_beginning_and_end_is_about_the_mixture() -> None:
    shares = {"a": 0.6, "b": 0.25, "c": 0.15}
    split = mixed({name: source_of(name, 200) for name in shares}, shares, TOKENIZER, **SMALL)
    for part in PARTS:
        found = owners(getattr(split, part))
        for one in (found, found[::-1]):
            for count in range(1, len(one) + 1):
                for name, share in shares.items():
                    assert abs(one[:count].count(name) - share * count) <= 1.5, (part, count, name)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=5), min_size=20, max_size=60),
    st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=5), min_size=20, max_size=60),
    st.booleans(),
    st.integers(0, 2),
)
def test_no_long_paragraph_is_in_two_parts_whichever_source_it_is_of(
    first: list[list[int]], second: list[list[int]], apart: bool, seed: int
) -> None:
    """Paragraphs of one number are copies, within a source and between the two."""
    sources = {
        "one": ["\n\n".join(paragraphs("p", n) for n in document) for document in first],
        "two": ["\n\n".join(paragraphs("p", n) for n in document) for document in second],
    }
    test = [paragraphs("p", n) for n in range(25, 35)] if apart else None
    sizes = {"sequence_length": 16, "calibration_tokens": 640, "validation_tokens": 64, "test_tokens": 64}
    try:
        split = mixed(sources, {"one": 0.5, "two": 0.5}, TOKENIZER, seed=seed, test_documents=test, **sizes)
    except StreamlineError as error:
        assert re.search(r"The source '(one|two)'|fill too few sequences", str(error))
        return
    sets = [set(words_of(getattr(split, part))) for part in PARTS]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    if apart:
        unseen = {f"p{n}w{k}x" for n in range(25, 35) for k in range(15)}
        assert sets[2] <= unseen and not (sets[0] | sets[1]) & unseen


def test_short_documents_that_two_sources_have_are_of_the_first() -> None:
    common = [f"a{n}w0x is short" for n in range(150)]
    shares = {"one": 0.5, "two": 0.5}
    own = [f"b{n}w0x is short" for n in range(150)]
    split = mixed({"one": common, "two": [*common, *own]}, shares, TOKENIZER, **SMALL)
    text = [bytes(getattr(split, part).flatten().tolist()).decode() for part in PARTS]
    numbers = [set(re.findall(r"a\d+w", one)) for one in text]
    assert all(numbers) and sum(map(len, numbers)) == len(set.union(*numbers))


def test_too_little_of_one_source_shrinks_the_part_and_keeps_the_shares() -> None:
    shares = {"a": 0.25, "b": 0.75}
    documents = {"a": source_of("a", 1), "b": source_of("b", 200)}
    split = mixed(documents, shares, TOKENIZER, **SMALL)
    counts = {part: getattr(split, part).numel() for part in PARTS}
    assert counts["calibration"] < 640 and counts["test"] < 320
    for part in PARTS:
        asked = sequences_by_source(shares, {part: counts[part]}, 16)[part]
        found = owners(getattr(split, part))
        assert abs(found.count("b") - asked["b"]) <= found.count("?")
    notes = " | ".join(split.notes)
    assert "a: the text has about" in notes
    expected = f"calibration is {counts['calibration']} of 640 requested tokens, because there is too little text of a"
    assert expected in notes
    assert (
        f"calibration is a {sequences_by_source(shares, {'x': counts['calibration']}, 16)['x']['a'] * 16}, b" in notes
    )


FRAME = "[system] You are a helpful model which answers what it is asked, shortly, and with all the care there is."


class ChatTokenizer:
    added_tokens_encoder: ClassVar = {"[say]": 300, "[end]": 301}

    def __call__(self, text: str, **options: Any) -> Any:
        return letters(text)


def test_conversations_stay_whole_and_keep_what_they_share() -> None:
    """A system prompt is a long paragraph that all have; a copy of one would be left out of a document."""
    chat = [f"{FRAME}\n\n[user] go\n\n[say]model\n{paragraphs('c', n)}[end]" for n in range(120)]
    assert FRAME in list(long_paragraphs(chat[0]))
    tokenizer: Any = ChatTokenizer()
    stolen = [paragraphs("c", n) for n in range(0, 120, 2)]
    sizes = {"sequence_length": 64, "calibration_tokens": 3840, "validation_tokens": 2560, "test_tokens": 2560}
    split = mixed(
        {"text": [*source_of("a", 90), *stolen], "chat": chat}, {"text": 0.5, "chat": 0.5}, tokenizer,
        conversations=["chat"], **sizes,
    )  # fmt: skip
    assert [getattr(split, part).numel() for part in PARTS] == [3840, 2560, 2560]
    for part in PARTS:
        text = bytes(getattr(split, part)[1::2].flatten().tolist()).decode()
        begun = re.findall(r"\[user\] go\n\n\[say\]model\nc(\d+)w0x", text)
        assert len(begun) > 3 and all(int(number) % 2 for number in begun)
        assert abs(text.count(f"{FRAME}\n\n[user]") - len(begun)) <= 1
        assert "[end]\n\n" not in text and "[end][system]" in text


def test_conversations_are_not_cut_up_where_they_are_few() -> None:
    chat = [f"{FRAME}\n\n{paragraphs('c', n)}[end]" for n in range(6)]
    split = mixed({"chat": chat}, {"chat": 1.0}, TOKENIZER, conversations=["chat"], **SMALL)
    text = {part: bytes(getattr(split, part).flatten().tolist()).decode() for part in PARTS}
    assert all(one.startswith("[system]") for one in text.values())
    numbers = [set(re.findall(r"c\d+w", one)) for one in text.values()]
    assert sum(map(len, numbers)) == len(set.union(*numbers))
    assert "requested and shrunk to" in " ".join(split.notes)


@pytest.mark.parametrize(
    ("documents", "shares", "options", "message"),
    [
        ({}, {}, {}, r"shares \{\} sum.*Expected.*sum to 1"),
        ({"a": ["x"]}, {"a": 0.7}, {}, r"0\.7.*Expected.*sum to 1"),
        ({"a": ["x"], "b": ["x"]}, {"a": 0.5, "b": 0.5}, {}, r"'a'.*usable tokens"),
        (
            {"a": source_of("a", 99), "b": source_of("a", 99)}, {"a": 0.5, "b": 0.5}, {},
            r"'b' \(without.*about 0 usable tokens",
        ),
        (
            {"a": source_of("a", 99), "b": source_of("b", 99)}, {"a": 0.96, "b": 0.04}, {},
            r"validation_tokens=160.*sequence_length=16.*10 sequences.*0\.04.*'b'.*Request validation_tokens=400",
        ),
        ({"a": ["x"]}, {"a": 1.0}, {"test_tokens": 15}, r"test_tokens=15 with sequence_length=16"),
        (
            {"a": [paragraphs("a", 0, 12)], "b": source_of("b", 99)}, {"a": 0.9, "b": 0.1}, {},
            r"too few sequences.*\(a 1, b .*Give more text of 'a'",
        ),
    ],
)  # fmt: skip
def test_errors(documents: Any, shares: Any, options: Any, message: str) -> None:
    with pytest.raises(StreamlineError, match=message):
        mixed(documents, shares, TOKENIZER, **{**SMALL, **options})


def test_the_smallest_part_suffices_for_every_source() -> None:
    for shares in ({"a": 0.5, "b": 0.5}, {"a": 0.9, "b": 0.1}, {"a": 1.0}, {"a": 0.61, "b": 0.26, "c": 0.13}):
        counts = sequences_by_source(shares, {"x": smallest_part(shares, 8)}, 8)["x"]
        assert min(counts.values()) >= 1
    sums = [sum(sequences_by_source({"a": 0.5, "b": 0.5}, {"x": 8 * n}, 8)["x"].values()) for n in range(2, 20)]
    assert all(after == before + 1 for before, after in pairwise(sums))


class WordTokenizer:
    """One id a word, by its hash."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [zlib.crc32(word.encode()) % 61 for word in text.split()]}


class TestCompress:
    def split(self, tokenizer: Any) -> TokenSplit:
        documents = {name: source_of(name, 60) for name in "ab"}
        return mixed(documents, {"a": 0.5, "b": 0.5}, tokenizer, **SMALL)

    def test_takes_text_that_is_dealt_out(self) -> None:
        tokenizer: Any = WordTokenizer()
        split = self.split(tokenizer)
        result = compress(
            tiny_model("llama"),
            split,
            configured(remove=1, speed=False, generation=False, shortlist=2),
            tokenizer=tokenizer,
        )
        assert result.data["fingerprint"] == split.fingerprint
        assert result.data["sequence_length"] == 16 and result.data["calibration_tokens"] == 640
        assert result.data["notes"] == list(split.notes)

    def test_and_no_other_test_text(self) -> None:
        tokenizer: Any = WordTokenizer()
        model = tiny_model("llama")
        with pytest.raises(StreamlineError, match=r"TokenSplit.*Leave test_texts"):
            compress(
                model,
                self.split(tokenizer),
                configured(remove=1),
                tokenizer=tokenizer,
                options=RunOptions(test_texts=["text"]),
            )
        assert len(model.model.layers) == 6

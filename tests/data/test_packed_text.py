from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import profile
from streamline_hooks.core import Processes, StreamlineError
from streamline_hooks.data import PackedText, PackingConfig, check_packing, document_starts, packed_text
from tests.data.test_documents import fake_datasets, jsonl
from tests.processes import in_two_processes
from tests.tiny_models import VOCABULARY, tiny_model

WORDS = 1000  # of a document at most


def document(number: int, words: int) -> str:
    return " ".join(f"{number}:{word}" for word in range(words))


def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
    """Tells by a token which document it is from, and where in it."""
    pairs = [word.partition(":") for word in text.split()]
    return {"input_ids": [WORDS * int(number) + int(word or 0) for number, _, word in pairs]}


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    lengths = torch.randint(5, 90, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [document(n, length) for n, length in enumerate(lengths)]
    (tmp_path / "a.jsonl").write_text(jsonl(*texts[:250], *texts[:50]))
    (tmp_path / "b.txt").write_text("\n\n\n".join([*texts[200:], *texts[100:150]]))
    return tmp_path


def documents_of(part: PackedText) -> set[int]:
    return set((part.input_ids // WORDS).flatten().tolist())


SIZES = {"calibration": 4000, "validation": 1000, "test": 2000}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [0, 40])
def test_the_rows_of_all_processes(folder: Path, count: int, shuffle: int) -> None:
    config = PackingConfig(sequence_length=64, shuffle=shuffle)
    shares = [
        packed_text(folder, tokenizer, SIZES, config, processes=Processes(rank, count))  # type: ignore[arg-type]
        for rank in range(count)
    ]
    for name, size in SIZES.items():
        lengths = [len(share[name].input_ids) for share in shares]
        assert sum(lengths) == size // 64 and max(lengths) - min(lengths) <= 1
    owners = [documents_of(share[name]) for share in shares for name in SIZES]
    assert sum(map(len, owners)) == len(set().union(*owners)), "a document is in two parts or processes"
    ids = torch.cat([part.input_ids.flatten() for share in shares for part in share.values()])
    assert len(ids) == len(ids.unique()), "a token is in two places"
    for part in (part for share in shares for part in share.values()):
        assert part.note == "" and part.input_ids.dtype == torch.int32
        starts = document_starts(part.position_ids)
        assert (part.position_ids[starts] == 0).all()
        steps = part.input_ids.diff(dim=1)
        assert (steps[~starts[:, 1:]] == 1).all(), "a piece leaves something out"
        assert len(documents_of(part)) == part.documents
        assert int(starts.sum()) <= part.documents + part.cuts


def test_a_document_is_of_the_same_part_in_any_process_and_another_with_another_seed(folder: Path) -> None:
    def parts_of(count: int, seed: int) -> dict[int, str]:
        found = {}
        for rank in range(count):
            parts = packed_text(
                folder, tokenizer, SIZES, PackingConfig(64, seed=seed), processes=Processes(rank, count)  # type: ignore[arg-type]
            )  # fmt: skip
            found.update({number: name for name, part in parts.items() for number in documents_of(part)})
        return found

    alone, three, other = parts_of(1, 0), parts_of(3, 0), parts_of(1, 1)
    both = set(alone) & set(three)
    assert len(both) > 50 and all(alone[number] == three[number] for number in both)
    both = set(alone) & set(other)
    assert sum(alone[number] != other[number] for number in both) > 0.2 * len(both)


def test_batches_are_what_a_model_takes(folder: Path) -> None:
    def bounded(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + id % (VOCABULARY - 3) for id in tokenizer(text)["input_ids"]]}

    part = packed_text(folder, bounded, {"all": 640}, PackingConfig(64))["all"]  # type: ignore[arg-type]
    batches = part.batches(4)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 64), (4, 64), (2, 64)]
    assert all(value.dtype == torch.long for batch in batches for value in batch.values())
    model = tiny_model("llama")
    check_packing(model, batches)
    assert profile(model, batches).tokens == 640


def test_no_more_is_read_and_made_into_tokens_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read, longest = [], [0]

    def rows() -> Iterator[dict[str, str]]:
        for n in range(10**9):
            read.append(n)
            yield {"text": document(n, 100)}

    def watched(text: str, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_special_tokens": False, "verbose": False}
        longest[0] = max(longest[0], len(text))
        return tokenizer(text)

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(rows(), []))  # type: ignore[arg-type]
    part = packed_text("some-one/huge", watched, {"a": 6400}, PackingConfig(64))["a"]  # type: ignore[arg-type]
    assert part.input_ids.numel() == 6400
    assert len(read) == 64


def test_of_a_very_long_document_only_a_beginning_is_used(tmp_path: Path) -> None:
    longest = [0]

    def watched(text: str, **options: Any) -> dict[str, list[int]]:
        longest[0] = max(longest[0], len(text))
        return {"input_ids": [len(word) for word in text.split()]}

    (tmp_path / "a.jsonl").write_text(jsonl("word " * 100_000, *("other " * n for n in range(1, 400))))
    part = packed_text(tmp_path, watched, {"a": 1280}, PackingConfig(64))["a"]  # type: ignore[arg-type]
    assert int((part.input_ids == 4).sum()) == 1280 // 4
    assert longest[0] <= 16 * 1280 // 4
    assert part.cuts >= 1 and part.documents > 40


def test_special_tokens_are_the_tokenizers(folder: Path) -> None:
    def with_bos(text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [-1] * add_special_tokens + tokenizer(text)["input_ids"]}

    for wanted in (False, True):
        part = packed_text(folder, with_bos, {"a": 640}, PackingConfig(64, special_tokens=wanted))["a"]  # type: ignore[arg-type]
        assert int((part.input_ids == -1).sum()) == wanted * part.documents
        assert (part.position_ids[part.input_ids == -1] == 0).all()


def test_where_the_source_ends_the_part_is_smaller_and_says_so(folder: Path) -> None:
    part = packed_text(folder, tokenizer, {"a": 640_000}, PackingConfig(64))["a"]  # type: ignore[arg-type]
    held = part.input_ids.numel()
    assert part.note == f"a: 640,000 tokens were requested, and the source ended after {held:,}"
    assert held == 64 * len(part.input_ids) and part.documents == 400
    of_two = packed_text(
        folder, tokenizer, {"a": 640_000}, PackingConfig(64), processes=Processes(1, 2)  # type: ignore[arg-type]
    )["a"]  # fmt: skip
    assert of_two.note.startswith("a of rank 1 of 2: 320,000 tokens were requested")


def test_what_cannot_be_had(folder: Path) -> None:
    def ask(tokens: dict[str, int], length: int, **options: Any) -> None:
        packed_text(folder, tokenizer, tokens, PackingConfig(length, **options))  # type: ignore[arg-type]

    with pytest.raises(StreamlineError, match=r"99,999 tokens.*'a'"):
        ask({"a": 99_999}, 99_999)
    with pytest.raises(StreamlineError, match=r"10 tokens.*'b'.*sequence_length=64.*64 tokens"):
        ask({"a": 64, "b": 10}, 64)
    with pytest.raises(StreamlineError, match="sequence_length=0"):
        ask({"a": 64}, 0)
    with pytest.raises(StreamlineError, match=r"No part.*Expected.*for each part"):
        ask({}, 64)
    with pytest.raises(StreamlineError, match=r"buffer=0.*at least 1"):
        ask({"a": 64}, 64, buffer=0)


def test_a_process_without_a_row_has_none_and_reads_nothing() -> None:
    part = packed_text("pydoc", tokenizer, {"a": 64}, PackingConfig(64), processes=Processes(1, 2))["a"]  # type: ignore[arg-type]
    assert tuple(part.input_ids.shape) == (0, 64) and part.batches(2) == [] and part.note == ""


@pytest.mark.long
def test_two_processes_profile_their_own_rows_and_fail_together(tmp_path: Path) -> None:
    words = [f"{'x' * (n % 7)} {'y ' * (n % 50)} {n:b}" for n in range(400)]
    (tmp_path / "a.jsonl").write_text(jsonl(*words))
    code = """
        import streamline_hooks.core.distributed as distributed
        from streamline_hooks import StreamlineError, profile
        from streamline_hooks.data import PackingConfig, packed_text
        from streamline_hooks.testing import tiny_model

        def tokenizer(text, **options):
            return {"input_ids": [3 + len(word) for word in text.split()]}

        part = packed_text(folder + "/a.jsonl", tokenizer, {"a": 16 * 21}, PackingConfig(16))["a"]
        found = profile(tiny_model("llama"), part.batches(4), shard=False)
        said["rows"], said["tokens"], said["cosine"] = len(part.input_ids), found.tokens, found.cosine.tolist()

        def failing(text, **options):
            if rank == 1:
                raise StreamlineError("no such word")
            return tokenizer(text)

        try:
            packed_text(folder + "/a.jsonl", failing, {"a": 16 * 21}, PackingConfig(16))
        except StreamlineError as error:
            said["error"] = str(error)
    """
    first, second = in_two_processes(code, tmp_path)
    assert (first["rows"], second["rows"]) == (11, 10)
    assert first["tokens"] == second["tokens"] == 16 * 21
    assert first["cosine"] == second["cosine"]
    assert first["error"] == second["error"] == "Process 1 of 2: no such word"

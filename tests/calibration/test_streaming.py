from __future__ import annotations

import gzip
import json
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks.calibration import files, read_documents, stream_documents
from streamline_hooks.calibration.streaming import shuffled_within
from streamline_hooks.distributed import Processes
from streamline_hooks.errors import StreamlineError
from tests.calibration.test_documents import fake_datasets, jsonl


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """Files of each kind, with repetitions within and between them."""
    texts = [f"document {n % 70}" for n in range(120)]
    random.Random(0).shuffle(texts)
    (tmp_path / "b.jsonl").write_text(jsonl(*texts[:40]))
    (tmp_path / "a.txt").write_text("\n\n\n".join(texts[40:80]))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(*texts[80:]).encode()))
    return tmp_path


def shares(folder: Path, count: int, **options: int) -> list[list[str]]:
    return [list(stream_documents(folder, processes=Processes(rank, count), **options)) for rank in range(count)]


def test_it_gives_what_reading_gives(folder: Path) -> None:
    assert list(stream_documents(folder)) == read_documents(folder)
    assert list(stream_documents([folder / "b.jsonl", folder])) == read_documents([folder / "b.jsonl", folder])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"shuffle": 16}, {"remember": 20}, {"remember": 0}, {"remember": 1}])
def test_every_document_goes_to_one_process(folder: Path, count: int, options: dict[str, int]) -> None:
    whole = list(stream_documents(folder, **options))
    parts = shares(folder, count, **options)
    assert Counter(document for part in parts for document in part) == Counter(whole)
    assert sum(bool(set(one) & set(other)) for one in parts for other in parts) == count  # each with itself alone
    assert all(len(part) > len(whole) / count / 2 for part in parts)
    if "shuffle" not in options:
        for part in parts:
            assert part == [document for document in whole if document in set(part)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 12), st.integers(1, 3))
def test_what_is_remembered(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], remember: int, count: int
) -> None:
    path = tmp_path_factory.mktemp("stream") / "a.jsonl"
    path.write_text(jsonl(*map(str, numbers)))
    expected = [str(n) for i, n in enumerate(numbers) if n not in numbers[max(0, i - remember) : i]]
    assert Counter(chain(*shares(path, count, remember=remember))) == Counter(expected)
    assert list(stream_documents(path, remember=remember)) == expected


def test_a_shuffle_is_told_by_its_seed_and_loses_nothing(folder: Path) -> None:
    orders = [list(stream_documents(folder, shuffle=30, seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert set(map(frozenset, orders)) == {frozenset(read_documents(folder))}
    assert len(orders[0]) == len(set(orders[0]))
    assert list(stream_documents(folder, shuffle=1, seed=3)) == read_documents(folder)


@given(st.integers(0, 60), st.integers(2, 20), st.integers())
def test_nothing_comes_before_the_buffer_reaches_it(count: int, size: int, seed: int) -> None:
    order = list(shuffled_within(range(count), size, seed))
    assert sorted(order) == list(range(count))
    assert all(item <= place + size for place, item in enumerate(order))


def test_every_place_in_the_buffer_is_as_likely() -> None:
    firsts = Counter(next(shuffled_within(range(50), 10, seed)) for seed in range(2000))
    assert set(firsts) == set(range(10))
    assert max(firsts.values()) < 2 * min(firsts.values())


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl("one", "two"))
    (tmp_path / "b.jsonl").write_text("damaged")
    documents = stream_documents(tmp_path)
    assert [next(documents), next(documents)] == ["one", "two"]
    with pytest.raises(StreamlineError, match=r"b\.jsonl.*line 1.*JSON"):
        next(documents)


def test_a_missing_source_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(StreamlineError, match=r"'/no/such/file'.*no such file or folder"):
        stream_documents([tmp_path / "a.txt", "/no/such/file"])


@pytest.mark.parametrize("rank", [0, 1])
def test_sources_without_text(tmp_path: Path, rank: int) -> None:
    (tmp_path / "a.txt").write_text(" \n\n\n ")
    with pytest.raises(StreamlineError, match=r"No text.*Check"):
        next(stream_documents(tmp_path, processes=Processes(rank, 2)))


def test_a_process_without_a_document_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    assert sorted(map(len, shares(tmp_path, 3))) == [0, 0, 1]


@pytest.mark.parametrize("name", ["shuffle", "remember"])
def test_negative_numbers(name: str) -> None:
    with pytest.raises(StreamlineError, match=rf"{name}=-1.*0 or.*Use 0"):
        stream_documents("pydoc", **{name: -1})


def test_a_data_set_is_streamed_as_far_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def rows() -> Iterator[dict[str, str]]:
        for n in range(10**9):
            read.append(n)
            yield {"text": f"document {n} " + "x" * 1_000_000}

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(rows(), []))  # type: ignore[arg-type]
    documents = stream_documents("some-one/huge")
    assert read == []
    for _ in range(60):  # past the limit of read_documents
        next(documents)
    assert len(read) == 60


def test_a_real_data_set_is_streamed_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text(jsonl(*(f"document {n}" for n in range(50))))
    load, given = datasets.load_dataset, []

    def load_dataset(*arguments: object, **options: object) -> object:
        given.append((arguments, options))
        return load("json", data_files=str(tmp_path / "a.jsonl"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(stream_documents("wiki")) == [f"document {n}" for n in range(50)]
    assert given[-1] == (("wiki", None), {"split": "train", "streaming": True})


def test_repetitions_are_told_apart_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHARACTERS_AT_ONCE", 1_000)
    path = tmp_path / "a.jsonl"
    peaks = []
    for count in (4_000, 16_000):
        path.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(count)))
        tracemalloc.start()
        assert sum(1 for _ in stream_documents(path, remember=1_000)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0], peaks

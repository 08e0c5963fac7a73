"""Where rows of questions come from: many files in a zip, and data sets on disk or a hub."""

from __future__ import annotations

import gzip
import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation.questions import questions_from, read_questions
from streamline_hooks.evaluation.rows import read_rows

ROWS = [{"query": f"Is {k} even?", "choices": ["no", "yes"], "gold": 1 - k % 2} for k in range(3)]
TEXT = "\n".join(map(json.dumps, ROWS)).encode()


def test_a_zip_is_read_in_the_order_of_its_names_without_hidden_files(tmp_path: Path) -> None:
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b.jsonl", TEXT)
        archive.writestr("__MACOSX/._b.jsonl", b"\xb0\x00")
        archive.writestr(".hidden.jsonl", b"\xb0")
        archive.writestr("a/readme.txt", b"not a question")
        archive.writestr("a/c.jsonl.gz", gzip.compress(TEXT))
    rows = read_rows(path)
    assert rows == ROWS * 2
    assert [row.file for row in rows] == ["a/c.jsonl.gz"] * 3 + ["b.jsonl"] * 3
    assert rows[4].where == f"{path}: b.jsonl, line 2"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("d.jsonl", TEXT + b"\n{")
    with pytest.raises(StreamlineError, match=r"all.zip.*d.jsonl.*line 4.*JSON"):
        read_rows(path)
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("readme.txt", b"nothing")
    with pytest.raises(StreamlineError, match=r"none.zip.*no question"):
        read_questions(tmp_path / "none.zip")


def test_a_data_set_in_memory_and_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    split = datasets.Dataset.from_list(ROWS)
    expected = questions_from(ROWS)
    assert questions_from(split) == expected
    split.save_to_disk(tmp_path / "one")
    found = read_questions(tmp_path / "one")
    assert [(q.contexts, q.continuations, q.gold) for q in found] == [
        (q.contexts, q.continuations, q.gold) for q in expected
    ]
    assert found[2].where == f"{tmp_path / 'one'}, row 2"
    both = datasets.DatasetDict(validation=split, test=split)
    with pytest.raises(StreamlineError, match=r"row 0.*expected"):
        questions_from(both)
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(StreamlineError, match=r"give.*'.*/both/SPLIT'"):
        read_questions(tmp_path / "both")
    assert len(read_questions(tmp_path / "both" / "test")) == 3
    (tmp_path / "other").mkdir()
    with pytest.raises(StreamlineError, match=r"other.*read as a data set"):
        read_questions(tmp_path / "other")


def test_a_data_set_of_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(*args: str, split: str) -> Any:
        calls.append((*args, split))
        if args[0] == "absent":
            raise ConnectionError("no network")
        return {"a": [], "b": []} if split == "all" else ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_rows("hub:allenai/ai2_arc:ARC-Easy:validation") == ROWS
    assert read_rows("hub:baber/piqa:test")[1].where == "hub:baber/piqa:test, row 1"
    assert calls == [("allenai/ai2_arc", "ARC-Easy", "validation"), ("baber/piqa", "test")]
    with pytest.raises(StreamlineError, match=r"'hub:absent:test'.*\(ConnectionError"):
        read_rows("hub:absent:test")
    with pytest.raises(StreamlineError, match=r"give.*'hub:x:SPLIT'"):
        read_rows("hub:x:all")
    for wrong in ("hub:", "hub:x", "hub:x:", "hub:x::test", "hub:a:b:c:d"):
        with pytest.raises(StreamlineError, match=r"split of a data set.*expected.*hub:NAME:SPLIT"):
            read_rows(wrong)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("hub:x:test", tmp_path):
        with pytest.raises(StreamlineError, match=r"`datasets`.*pip install datasets"):
            read_rows(source)

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks.calibration import read_documents
from streamline_hooks.errors import StreamlineError


def jsonl(*texts: str) -> str:
    return "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\nstill one\n\n\ntwo\n\n\n\n\nthree\n", ["one\n\nstill one", "two", "three"]),
        ("a.md", "one\n\n\ntwo", ["one", "two"]),
        ("a.txt", "one\r\n\r\n\r\ntwo\r\nlines", ["one", "two\nlines"]),
        ("a.txt", "\ufeffone\n\n\ntwo", ["one", "two"]),
        ("a.txt", "one\n\n\n  one  \n\n\n \n\n\ntwo\n\n\none", ["one", "two"]),
        ("a.jsonl", jsonl("one\n\n\nstill one", "two", " two ", ""), ["one\n\n\nstill one", "two"]),
        ("a.jsonl", jsonl("one") + "\n\n" + jsonl("two").strip(), ["one", "two"]),
        ("A.JSONL", '{"text": "a line end of Unicode: \u2028 here"}\n', ["a line end of Unicode: \u2028 here"]),
        ("a.jsonl", '{"text": "half a pair: \\ud83d"}\n', ["half a pair: ?"]),
        ("a.jsonl", '{"text": "a pair: \\ud83d\\ude00"}\n', ["a pair: 😀"]),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_files(tmp_path: Path, name: str, content: str, expected: list[str], compressed: bool) -> None:
    path = tmp_path / (name + ".gz" if compressed else name)
    data = content.encode()
    path.write_bytes(gzip.compress(data) if compressed else data)
    assert read_documents(path) == expected
    assert read_documents(str(path)) == expected


def test_folder_is_read_recursively_in_the_order_of_names(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": "four",
        "a/z.txt": "three",
        "a/b.jsonl": jsonl("two"),
        "a/.hidden/no.txt": "no",
        ".no.txt": "no",
        "README.md": "no",
        "a/a.txt.gz": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "a/a.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "folder.txt").mkdir()
    assert read_documents(tmp_path) == ["one", "two", "three", "four"]


def test_several_sources_are_read_in_their_order_without_repetitions(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n\ntwo")
    (tmp_path / "b.jsonl").write_text(jsonl("three", "two"))
    assert read_documents([tmp_path / "b.jsonl", str(tmp_path / "a.txt")]) == ["three", "two", "one"]


def test_pydoc_is_one_document_a_topic() -> None:
    documents = read_documents("pydoc")
    assert len(documents) > 50
    assert sum(map(len, documents)) > 200_000
    assert any(document.startswith('The "assert" statement') for document in documents)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=12))
def test_jsonl_keeps_every_text_once(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "texts.jsonl"
    path.write_text(jsonl(*texts), encoding="utf-8", newline="")
    expected = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if expected:
        assert read_documents(path) == expected
    else:
        with pytest.raises(StreamlineError, match="No text was found"):
            read_documents(path)


BAD_FILES = {
    "empty": ("a.txt", b" \n\n\n ", r"No text.*a\.txt'.*Expected.*Check"),
    "not JSON": (
        "a.jsonl",
        b'{"text": "fine"}\n\n{"text": oops}\n',
        r"a\.jsonl, line 3.*not JSON.*column 10.*Expected.*Mend",
    ),
    "no text": (
        "a.jsonl",
        b'{"text": "fine"}\n{"content": "x", "b": 2}\n',
        r"a\.jsonl, line 2.*\['b', 'content'\].*`text`.*Rename",
    ),
    "text is a number": ("a.jsonl", b'{"text": 3}\n', r"line 1.*\['text'\].*`text` that is a"),
    "a list": ("a.jsonl", b"[1]\n", r"line 1.*a list.*`text`.*a string"),
    "not UTF-8": ("a.txt", b"abc\xff", r"a\.txt.*UTF-8.*byte 3 is 0xff.*Expected.*Convert"),
    "not gzip": ("a.txt.gz", b"plain", r"a\.txt\.gz.*cannot be decompressed.*drop the \.gz"),
    "cut gzip": ("a.txt.gz", gzip.compress(b"x" * 99)[:-9], r"cannot be decompressed.*Write"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, name: str) -> None:
    file, content, message = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(StreamlineError, match=message):
        read_documents(tmp_path / file)


def test_folder_without_texts(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\xff")
    with pytest.raises(StreamlineError, match=r"No text.*\.txt, \.txt\.gz"):
        read_documents(tmp_path)
    with pytest.raises(StreamlineError, match=r"No text.*empty list"):
        read_documents([])


@pytest.mark.parametrize(
    "source", ["/no/such/file", "./no", "no/such/folder/here", "typing_error.txt", "a b", Path("wiki")]
)
def test_what_looks_like_a_path_is_never_taken_for_a_data_set(
    source: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets([{"text": "no"}], []))
    with pytest.raises(StreamlineError, match=r"no such file or folder.*Expected.*spelling"):
        read_documents(source)


def test_a_missing_path_without_datasets_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(StreamlineError, match=r"'wikitext:small'.*`datasets`"):
        read_documents("wikitext:small")


def fake_datasets(rows: list[dict[str, Any]], calls: list[Any]) -> ModuleType:
    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        calls.append((arguments, options))
        if arguments[0] == "missing":
            raise FileNotFoundError("no data set of that name")
        return rows

    module = ModuleType("datasets")
    vars(module)["load_dataset"] = load_dataset
    return module


def test_a_data_set_is_streamed_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    rows = [{"text": "a" * 10}, {"text": "b" * 10}, {"text": "c" * 10}]
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(rows, calls))
    assert read_documents("some-one/wiki:small", limit_characters=15) == ["a" * 10, "b" * 10]
    assert read_documents("wiki") == ["a" * 10, "b" * 10, "c" * 10]
    options = {"split": "train", "streaming": True}
    assert calls == [(("some-one/wiki", "small"), options), (("wiki", None), options)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing", r"'missing'.*FileNotFoundError: no data set.*give"),
        ("wiki", r"'wiki'.*\['content'\].*Expected.*`text`.*JSONL"),
    ],
)
def test_data_sets_that_cannot_be_read(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets([{"content": "x"}], []))
    with pytest.raises(StreamlineError, match=message):
        read_documents(source)

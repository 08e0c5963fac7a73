"""Documents of files, folders and data sets, read whole or streamed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamline_hooks.core import Processes, StreamlineError
from streamline_hooks.data import documents as module
from streamline_hooks.data import read_documents, stream_documents

datasets = pytest.importorskip("datasets")


def zstandard(data: bytes) -> bytes:
    pytest.importorskip("zstandard")
    import pyarrow

    return pyarrow.compress(data, codec="zstd", asbytes=True)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard,
}  # fmt: skip


def jsonl(*texts: str) -> str:
    return "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts)


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def fake_datasets(rows: Any, calls: list[Any]) -> ModuleType:
    def load_dataset(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        if arguments[0] == "missing":
            raise FileNotFoundError("no data set of that name")
        return rows

    fake = ModuleType("datasets")
    vars(fake)["load_dataset"] = load_dataset
    return fake


class TestFiles:
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
            ("a.jsonl", '{"text": "one"}\n{"text": "two", "more": [1]}\n{"more": "x", "text": "2020-01-01"}\n',
             ["one", "two", "2020-01-01"]),
        ],
    )  # fmt: skip
    def test_texts_and_jsonl(self, tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
        path = tmp_path / name
        path.write_bytes(content.encode())
        assert read_documents(path) == read_documents(str(path)) == expected

    @pytest.mark.parametrize("suffix", COMPRESS)
    def test_compression(self, tmp_path: Path, suffix: str) -> None:
        compress = COMPRESS[suffix]
        (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"one\n\n\ntwo\n\n\nthree"))
        (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(jsonl("four", "five").encode()))
        assert read_documents(tmp_path) == ["one", "two", "three", "four", "five"]

    def test_a_name_is_no_pattern(self, tmp_path: Path) -> None:
        for name in ("a[0-9]*?.jsonl", "a1.jsonl"):
            (tmp_path / name).write_text(jsonl(name))
        assert read_documents(tmp_path / "a[0-9]*?.jsonl") == ["a[0-9]*?.jsonl"]

    @pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
    def test_parquet(self, tmp_path: Path, kind: str) -> None:
        import pyarrow as pa

        texts = [f"document {n}\n\n\nof one cell" for n in range(200)]
        texts[7] = texts[150] = None
        column = pa.array(texts, pa.string())
        column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
        path = write_parquet(tmp_path / "a.parquet", {"id": list(range(200)), "text": column}, row_group_size=33)
        assert read_documents(path) == read_documents(tmp_path) == [text for text in texts if text]

    def test_a_folder_is_read_recursively_in_the_order_of_names(self, tmp_path: Path) -> None:
        for name, content in {
            "b.txt": "four", "a/z.txt": "three", "a/b.jsonl": jsonl("two"), "a/.hidden/no.txt": "no", ".no.txt": "no",
            "README.md": "no", "a/a.txt.gz": "", "c.txt": "", "d.jsonl": "",
        }.items():  # fmt: skip
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        (tmp_path / "a/a.txt.gz").write_bytes(gzip.compress(b"one"))
        (tmp_path / "folder.txt").mkdir()
        assert read_documents(tmp_path) == ["one", "two", "three", "four"]

    def test_several_sources_are_read_in_their_order_without_repetitions(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one\n\n\ntwo")
        (tmp_path / "b.jsonl").write_text(jsonl("three", "two"))
        assert read_documents([tmp_path / "b.jsonl", str(tmp_path / "a.txt")]) == ["three", "two", "one"]

    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=12))
    def test_jsonl_keeps_every_text_once(self, tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
        path = tmp_path_factory.mktemp("jsonl") / "texts.jsonl"
        path.write_text(jsonl(*texts, "last"), encoding="utf-8", newline="")
        assert read_documents(path) == list(dict.fromkeys([*filter(None, map(str.strip, texts)), "last"]))

    @given(
        st.lists(st.sampled_from(["a", " ", "\n", "\n\n", "\n\n\n", "\r", "\r\n", "ä", "😀", "\u2028"])).map("".join)
    )
    @example("\n\n\n")
    @example("a\r\n\r\n\r\nb")
    def test_texts_are_split_as_a_whole_one_would_be(self, tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
        path = tmp_path_factory.mktemp("text") / "a.txt"
        path.write_bytes(text.encode() + b"\n\n\nlast")
        lines = text.replace("\r\n", "\n").replace("\r", "\n") + "\n\n\nlast"
        expected = [part.strip() for part in re.split(r"\n{3,}", lines) if part.strip()]
        assert read_documents(path) == list(dict.fromkeys(expected))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", b" \n\n\n ", r"No text.*a\.txt'.*Expected.*Check"),
            (
                "a.jsonl",
                b'{"text": "fine"}\n\n{"text": oops}\n',
                r"a\.jsonl, line 3.*not JSON.*column 10.*Exp.*Cor",
            ),
            (
                "a.jsonl",
                b'{"text": "a"}\n{"content": "x", "b": 2}\n',
                r"line 2.*\['b', 'content'\].*`text`.*Rename",
            ),
            ("a.jsonl", b'{"text": 3}\n', r"line 1.*`text` is a int.*Expected a string.*rename"),
            ("a.jsonl", b'{"text": null}\n', r"line 1.*`text` is a NoneType.*Expected a string"),
            ("a.jsonl", b"[1]\n", r"line 1 is a list.*Expected an object"),
            ("a.txt", b"abc\xff", r"a\.txt cannot be read.*UnicodeDecodeError.*Expected.*UTF-8.*Write"),
            ("a.txt.gz", b"plain", r"a\.txt\.gz cannot be read.*Expected.*compressed.*suffix"),
            ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], r"a\.txt\.gz cannot be read.*EOFError"),
            ("a.parquet", b"no", r"a\.parquet cannot be read.*Expected a complete file"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StreamlineError, match=message):
            read_documents(tmp_path / name)

    def test_parquet_with_other_columns(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", {"content": ["x"], "id": [1]})
        with pytest.raises(StreamlineError, match=r"a\.parquet has.*\['content', 'id'\].*Expected.*`text`.*Rename"):
            read_documents(path)
        write_parquet(path, {"text": [1, 2]})
        with pytest.raises(StreamlineError, match=r"a\.parquet, row 0: `text` is a int.*Expected a string"):
            read_documents(path)

    def test_a_document_without_end_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "LONGEST", 100)
        (tmp_path / "a.txt").write_bytes(b"line\n" * 50)
        with pytest.raises(StreamlineError, match=r"a\.txt contains a document of more than 100 char.*Expected.*Split"):
            read_documents(tmp_path / "a.txt")

    def test_folders_without_texts(self, tmp_path: Path) -> None:
        (tmp_path / "picture.png").write_bytes(b"\xff")
        with pytest.raises(StreamlineError, match=r"No text.*\.txt, \.txt\.gz"):
            read_documents(tmp_path)
        with pytest.raises(StreamlineError, match=r"No text.*empty list"):
            read_documents([])


class TestWithout:
    def test_nothing_is_written_and_no_network_is_used(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "a.txt").write_text("one")
        (tmp_path / "data" / "b.jsonl").write_text(jsonl("two"))
        write_parquet(tmp_path / "data" / "c.parquet", {"text": ["three"]})
        code = f"""
            import socket
            def refused(*_): raise AssertionError("a network was used")
            socket.socket.connect = refused
            from streamline_hooks.data import read_documents
            assert read_documents({str(tmp_path / "data")!r}) == ["one", "two", "three"]
        """
        home = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        run_python(code, {name: value for name, value in os.environ.items() if name != "HF_DATASETS_CACHE"} | home)
        assert not list((tmp_path / "home").rglob("*"))

    def test_strings_and_files_of_text_do_not_import_datasets(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one\n\n\ntwo")
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl("three").encode()))
        run_python(
            f"""
            import sys
            sys.modules["datasets"] = sys.modules["pyarrow"] = sys.modules["pandas"] = None
            from streamline_hooks.data import read_documents
            assert read_documents({str(tmp_path)!r}) == ["one", "two", "three"]
            """,
            dict(os.environ),
        )
        run_python(
            """
            import sys
            sys.modules["datasets"] = None
            from streamline_hooks.data import pack, read_documents, split_documents
            def tokenizer(text, **options):
                return {"input_ids": [len(word) for word in text.split()]}
            split = split_documents([f"This is the document number {n}." for n in range(60)], tokenizer,
                sequence_length=12, calibration_tokens=120, validation_tokens=24, test_tokens=48)
            assert split.calibration.shape == (10, 12)
            assert len(read_documents("pydoc")) > 50
            assert sys.modules["datasets"] is None
            """,
            dict(os.environ),
        )

    @pytest.mark.parametrize("name", ["a.parquet", None])
    def test_the_error_names_the_extra(self, tmp_path: Path, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        source = "wikitext:small" if name is None else str(tmp_path / name)
        if name:
            Path(source).write_text("text")
        message = rf"{re.escape(source)}.*`datasets`.*not installed.*pip install \"streamline_hooks\[datasets\]"
        with pytest.raises(StreamlineError, match=message):
            read_documents(source)


def run_python(code: str, environment: dict[str, str]) -> None:
    code = "\n".join(line.removeprefix("            ") for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class TestDataSets:
    @pytest.mark.parametrize(
        "source", ["/no/such/file", "./no", "no/such/folder/here", "typing_error.txt", "a b", Path("wiki")]
    )
    def test_what_looks_like_a_path_is_never_taken_for_a_data_set(
        self, source: str | Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "datasets", fake_datasets([{"text": "no"}], []))
        with pytest.raises(StreamlineError, match=r"no such file or folder.*Expected.*spelling"):
            read_documents(source)

    def test_a_data_set_is_streamed_up_to_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
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
            ("wiki", r"'wiki'.*\['content'\].*Expected.*`text`.*Rename"),
        ],
    )
    def test_data_sets_that_cannot_be_read(self, source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", fake_datasets([{"content": "x"}], []))
        with pytest.raises(StreamlineError, match=message):
            read_documents(source)

    def test_a_data_set_is_streamed_as_far_as_it_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read = []

        def rows() -> Iterator[dict[str, str]]:
            for n in range(10**9):
                read.append(n)
                yield {"text": f"document {n} " + "x" * 1_000_000}

        monkeypatch.setitem(sys.modules, "datasets", fake_datasets(rows(), []))
        documents = stream_documents("some-one/huge")
        assert read == []
        for _ in range(60):  # beyond the limit of read_documents
            next(documents)
        assert len(read) == 60


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


class TestStreaming:
    def test_it_yields_what_reading_returns(self, folder: Path) -> None:
        assert list(stream_documents(folder)) == read_documents(folder)
        assert list(stream_documents([folder / "b.jsonl", folder])) == read_documents([folder / "b.jsonl", folder])

    @pytest.mark.parametrize("count", [1, 2, 3])
    @pytest.mark.parametrize("options", [{}, {"shuffle": 16}, {"remember": 20}, {"remember": 0}, {"remember": 1}])
    def test_every_document_goes_to_one_process(self, folder: Path, count: int, options: dict[str, int]) -> None:
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
        self, tmp_path_factory: pytest.TempPathFactory, numbers: list[int], remember: int, count: int
    ) -> None:
        path = tmp_path_factory.mktemp("stream") / "a.jsonl"
        path.write_text(jsonl(*map(str, numbers)))
        expected = [str(n) for i, n in enumerate(numbers) if n not in numbers[max(0, i - remember) : i]]
        assert Counter(chain(*shares(path, count, remember=remember))) == Counter(expected)
        assert list(stream_documents(path, remember=remember)) == expected

    def test_a_shuffle_depends_on_its_seed_and_loses_nothing(self, folder: Path) -> None:
        orders = [list(stream_documents(folder, shuffle=30, seed=seed)) for seed in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]
        assert set(map(frozenset, orders)) == {frozenset(read_documents(folder))}
        assert len(orders[0]) == len(set(orders[0]))
        assert list(stream_documents(folder, shuffle=1, seed=3)) == read_documents(folder)

    def test_a_file_is_read_when_its_first_document_is_asked_for(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(jsonl("one", "two"))
        (tmp_path / "b.jsonl").write_text("damaged")
        documents = stream_documents(tmp_path)
        assert [next(documents), next(documents)] == ["one", "two"]
        with pytest.raises(StreamlineError, match=r"b\.jsonl.*line 1.*JSON"):
            next(documents)

    def test_a_missing_source_is_told_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one")
        with pytest.raises(StreamlineError, match=r"'/no/such/file'.*no such file or folder"):
            stream_documents([tmp_path / "a.txt", "/no/such/file"])

    @pytest.mark.parametrize("rank", [0, 1])
    def test_sources_without_text(self, tmp_path: Path, rank: int) -> None:
        (tmp_path / "a.txt").write_text(" \n\n\n ")
        with pytest.raises(StreamlineError, match=r"No text.*Check"):
            next(stream_documents(tmp_path, processes=Processes(rank, 2)))

    def test_a_process_without_a_document_is_no_error(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one")
        assert sorted(map(len, shares(tmp_path, 3))) == [0, 0, 1]

    @pytest.mark.parametrize("name", ["shuffle", "remember"])
    def test_negative_numbers(self, name: str) -> None:
        with pytest.raises(StreamlineError, match=rf"{name}=-1.*>= 0.*Use 0"):
            stream_documents("pydoc", **{name: -1})

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
    def test_the_memory_does_not_grow_with_the_file(self, tmp_path: Path, name: str) -> None:
        import pyarrow

        peaks = []
        for count in (1_000, 8_000):
            texts = [random.randbytes(500).hex() for _ in range(count)]  # which cannot be compressed to little
            path = tmp_path / name
            if name == "a.parquet":
                write_parquet(path, {"text": texts}, row_group_size=250)
            else:
                plain = jsonl(*texts) if "jsonl" in name else "\n\n\n".join(texts)
                path.write_bytes(COMPRESS[".gz" if name.endswith(".gz") else ""](plain.encode()))
            before, most = pyarrow.total_allocated_bytes(), 0
            tracemalloc.start()
            for _ in stream_documents(path, remember=500):
                most = max(most, pyarrow.total_allocated_bytes() - before)
            peaks.append(tracemalloc.get_traced_memory()[1] + most)
            tracemalloc.stop()
        assert peaks[1] < 1.5 * peaks[0], peaks
        assert peaks[1] < 3_000_000 < 8_000 * len(texts[-1]) / 2, peaks


@pytest.mark.parametrize("name", ["c4-train.00000.json.gz", "rows.json", "rows.ndjson", "rows.csv", "ROWS.TSV"])
def test_markup_is_not_read_as_text(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text('{"text": "One day"}\n')
    with pytest.raises(StreamlineError, match=r"is JSON or a table.*rename the file to .jsonl"):
        read_documents(file)
    file.rename(tmp_path / "rows.jsonl")
    assert list(read_documents(tmp_path / "rows.jsonl")) == ["One day"]

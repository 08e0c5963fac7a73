from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import re
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamline_hooks.calibration import files, read_documents
from streamline_hooks.calibration.files import documents_of_file
from streamline_hooks.errors import StreamlineError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow().compress(data, codec="zstd", asbytes=True),
}


def pyarrow() -> Any:
    return pytest.importorskip("pyarrow")


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, **options)
    return path


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_of_several_parts(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"one\n\n\ntw") + compress(b"o\n\n\nthree"))
    (tmp_path / f"b.JSONL{suffix}").write_bytes(compress(jsonl(["four"])) + compress(jsonl(["five", "six"])))
    assert read_documents(tmp_path) == ["one", "two", "three", "four", "five", "six"]


@pytest.mark.parametrize(("suffix", "named"), [(".bz2", "bzip2"), (".xz", "xz"), (".zst", "Zstandard")])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"plain text"])
def test_damaged_compressed_files(tmp_path: Path, suffix: str, named: str, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(damage(COMPRESS[suffix](b"one\n\n\ntwo" * 99)))
    message = rf"a\.txt\{suffix}.*cannot be decompressed.*Expected.*{named}"
    with pytest.raises(StreamlineError, match=message):
        read_documents(path)


TEXTS = st.lists(st.sampled_from(["a", "b", " ", "\n", "\n\n", "\n\n\n", "\r", "\r\n", "ä", "€", "😀", "\u2028"]))


@given(TEXTS.map("".join), st.integers(1, 7))
@example("\n\n\n", 1)
@example("a\r\n\r\n\r\nb", 3)
def test_texts_are_split_as_a_whole_one_would_be(
    tmp_path_factory: pytest.TempPathFactory, text: str, at_once: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    expected = [part.strip() for part in re.split(r"\n{3,}", lines) if part.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHARACTERS_AT_ONCE", at_once)
        assert [part.strip() for part in documents_of_file(path) if part.strip()] == expected


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize(
    ("data", "place"),
    [(b"abc\xff", "byte 3 is 0xff"), ("ä€".encode() + b"\xc3", "byte 5 is 0xc3"), (b"\xef\xbb\xbfab\xfe", "5 is 0xfe")],
)
def test_the_place_of_what_is_not_utf8(
    tmp_path: Path, data: bytes, place: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHARACTERS_AT_ONCE", at_once)
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(StreamlineError, match=place):
        list(documents_of_file(tmp_path / "a.txt"))


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
@pytest.mark.parametrize("codec", ["snappy", "zstd", "gzip", "none"])
def test_parquet(tmp_path: Path, kind: str, codec: str) -> None:
    pa = pyarrow()
    texts = [f"document {n}\n\n\nof one cell" for n in range(200)]
    texts[7] = texts[150] = None
    column = pa.array(texts, pa.string())
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
    path = write_parquet(
        tmp_path / "a.parquet", {"id": list(range(200)), "text": column}, compression=codec, row_group_size=33
    )
    assert read_documents(path) == [text for text in texts if text]
    assert read_documents(tmp_path) == [text for text in texts if text]


def test_parquet_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, {"content": ["x"], "id": [1]})
    with pytest.raises(StreamlineError, match=r"\['content'.*'id'\].*Expected.*`text`.*Rename"):
        read_documents(path)
    write_parquet(path, {"text": [1, 2]})
    with pytest.raises(StreamlineError, match=r"`text`.*a\.parquet.*int64.*Expected"):
        read_documents(path)
    write_parquet(path, {"text": ["x" * 500] * 9})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(StreamlineError, match=r"a\.parquet.*Expected"):
        read_documents(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(StreamlineError, match=r"`pyarrow`.*pip install pyarrow"):
        read_documents(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_what_has_no_separators_is_refused_and_not_held(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"line\n" * 50 if name == "a.txt" else b'{"text": "' + b"x" * 200)
    with pytest.raises(StreamlineError, match=rf"{name} holds.*than 100"):
        list(documents_of_file(tmp_path / name, longest=100))
    (tmp_path / "b.txt").write_bytes(b"line\n\n\n" * 50)
    assert len(list(documents_of_file(tmp_path / "b.txt", longest=100))) == 51


def peak(path: Path) -> int:
    """The most bytes that are held at once while a file is read."""
    arrow, before, most = pyarrow(), pyarrow().total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        for _ in documents_of_file(path):
            most = max(most, arrow.total_allocated_bytes() - before)
        return tracemalloc.get_traced_memory()[1] + most
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.txt.zst", "a.parquet"])
def test_the_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    peaks = []
    for count in (1_000, 8_000):
        texts = [random.randbytes(1_000).hex() for _ in range(count)]  # which cannot be compressed to little
        path = tmp_path / name
        if name == "a.parquet":
            write_parquet(path, {"text": texts}, row_group_size=250)
        else:
            plain = jsonl(texts) if "jsonl" in name else "\n\n\n".join(texts).encode()
            path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](plain))
        peaks.append(peak(path))
    assert peaks[1] < 1.5 * peaks[0], peaks  # Parquet lists its row groups
    assert peaks[1] < 3_000_000 < 8_000 * len(texts[-1]) / 4, peaks

"""JSONL files, plain, compressed and in archives."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation.task_files import random_subset, read_rows

ROWS = [{"query": f"Is {k} even?", "choices": ["no", "yes"], "gold": 1 - k % 2} for k in range(3)]
TEXT = "\n".join(map(json.dumps, ROWS)).encode()


def test_plain_and_compressed(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + TEXT + b"\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(TEXT))
    with pyarrow.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as stream:
        stream.write(TEXT)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        assert read_rows(tmp_path / name) == ROWS
    (tmp_path / "b.jsonl").write_text('{"text": "one\u2028line"}', encoding="utf-8")
    assert read_rows(str(tmp_path / "b.jsonl")) == [{"text": "one\u2028line"}]


def test_a_zip_is_read_in_the_order_of_its_names_without_hidden_files(tmp_path: Path) -> None:
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b.jsonl", TEXT)
        archive.writestr("__MACOSX/._b.jsonl", b"\xb0\x00")
        archive.writestr(".hidden.jsonl", b"\xb0")
        archive.writestr("a/readme.txt", b"not a question")
        archive.writestr("a/c.jsonl.gz", gzip.compress(TEXT[: TEXT.index(b"\n")]))
    assert read_rows(path) == [ROWS[0], *ROWS]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("d.jsonl", TEXT + b"\n{")
    with pytest.raises(StreamlineError, match=r"all.zip.*d.jsonl.*line 4.*JSON"):
        read_rows(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"\n", "is empty"), (b"[1]", r"line 1 is a list.*object"), (b"\xb0", "cannot be read"), (None, "cannot be read")],
)
def test_what_cannot_be_read(content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(StreamlineError, match=rf"a.jsonl.*{says}"):
        read_rows(tmp_path / "a.jsonl")


def test_a_subset_is_seeded_and_in_order() -> None:
    items = list(range(100))
    assert random_subset(items, 5, "0 a") == sorted(random_subset(items, 5, "0 a")) != random_subset(items, 5, "1 a")
    assert random_subset(items, None, "0") == random_subset(items, 200, "0") == items

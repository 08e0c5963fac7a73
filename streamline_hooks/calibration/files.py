"""Read the documents of a file piece by piece, so that memory holds one of them and not the file."""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import json
import lzma
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamline_hooks.errors import StreamlineError

_TEXT, _JSONL, _PARQUET = ".txt", ".jsonl", ".parquet"
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (_PARQUET, *(kind + packed for kind in (_TEXT, _JSONL) for packed in ("", *_COMPRESSED)))
"""How the names of files end that are read in a folder."""

_AT_ONCE = 1 << 18  # bytes
_ROWS_AT_ONCE = 64


def documents_of_file(path: Path, longest: float = math.inf) -> Iterator[str]:
    r"""Yield the documents of one file, in their order and as they stand there.

    Parameters
    ----------
    path : Path
        Its name tells what it is: Parquet, JSONL, or else a text; the last two also compressed.
    longest : float
        The most characters that a document of a text or a line of a JSONL file may have.

    Yields
    ------
    str
        An empty cell of a Parquet file is passed over.

    Raises
    ------
    StreamlineError
        If the file cannot be decompressed, decoded or parsed, or a document is too long; with the place.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "two.txt")
    ...     _ = path.write_text("one\n\nstill one\n\n\ntwo")
    ...     [document.strip() for document in documents_of_file(path)]
    ['one\n\nstill one', 'two']
    """
    name = path.name.lower()
    if name.endswith(_PARQUET):
        return _parquet(path)
    if name.endswith(tuple(_JSONL + packed for packed in ("", *_COMPRESSED))):
        return _jsonl(path, longest)
    return _text(path, longest)


def _text(path: Path, longest: float) -> Iterator[str]:
    """Split at two or more blank lines."""
    lines: list[str] = []
    length, blank = 0, False
    for line in _lines(path, longest):
        if blank and not line:
            if lines:
                yield "\n".join(lines)
            lines, length = [], 0
        else:
            lines.append(line)
            length += len(line) + 1
            if length > longest:
                raise _too_long(path, longest)
        blank = not line
    yield "\n".join(lines)


def _jsonl(path: Path, longest: float) -> Iterator[str]:
    for number, line in enumerate(_lines(path, longest), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise StreamlineError(
                f"{path}, line {number} is not JSON ({error.msg} at column {error.colno}). Expected an object "
                'with a `text` field in each line, like {"text": "..."}. Mend the line or leave it out.'
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            given = f"the fields {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise StreamlineError(
                f"{path}, line {number} holds {given} and no `text` that is a string. Expected an object with a "
                '`text` field in each line, like {"text": "..."}. Rename the field that holds the text.'
            )
        # JSON can spell half a surrogate pair, which is no character and which tokenizers refuse.
        yield row["text"].encode("utf-8", "replace").decode()


def _parquet(path: Path) -> Iterator[str]:
    pyarrow, parquet = _imported("pyarrow", path), _imported("pyarrow.parquet", path)
    try:
        with parquet.ParquetFile(path, buffer_size=_AT_ONCE, pre_buffer=False) as file:  # it would hold all
            schema = file.schema_arrow
            if "text" not in schema.names:
                raise StreamlineError(
                    f"{path} has the columns {sorted(schema.names)}. Expected a column `text` that holds strings. "
                    "Rename the column that holds the text."
                )
            kind = schema.field("text").type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            strings = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
            if kind not in strings:
                raise StreamlineError(
                    f"The column `text` of {path} holds {kind}. Expected strings. Write the text there as strings, or "
                    "rename the column that holds it."
                )
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["text"], use_threads=False):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError) as error:
        raise StreamlineError(
            f"{path} cannot be read as Parquet ({error}). Expected a whole Parquet file. Write it again, or rename it "
            "if it is something else."
        ) from error


def _lines(path: Path, longest: float) -> Iterator[str]:
    r"""Yield lines that end in \n, \r or \r\n; JSON may hold the other line ends of Unicode inside a string."""
    parts: list[str] = []
    length = 0
    for chunk in _decoded(path):
        first, *others = chunk.split("\n")
        parts.append(first)
        length += len(first)
        if others:
            yield "".join(parts)
            yield from others[:-1]
            parts, length = [others[-1]], len(others[-1])
        if length > longest:
            raise _too_long(path, longest)
    yield "".join(parts)


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    before = 0  # bytes that were decoded
    for chunk in _bytes(path):
        try:
            yield newlines.decode(decoder.decode(chunk, final=not chunk), final=not chunk)
        except UnicodeDecodeError as error:
            place = before + len(chunk) - len(error.object) + error.start
            raise StreamlineError(
                f"{path} is not UTF-8: byte {place:,} is 0x{error.object[error.start]:02x}. "
                "Expected text in UTF-8. Convert it (for instance with iconv), or leave the file out."
            ) from error
        before += len(chunk)


def _bytes(path: Path) -> Iterator[bytes]:
    """Yield pieces of a file, decompressed, and an empty one at its end."""
    suffix = path.suffix.lower() if path.suffix.lower() in _COMPRESSED else ""
    try:
        with _opened(path, suffix) as file:
            chunk = b"."
            while chunk:
                chunk = file.read(_AT_ONCE)
                yield chunk
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if not suffix:
            raise
        raise StreamlineError(
            f"{path} ends in {suffix} and cannot be decompressed ({error}). Expected a whole {_named(suffix)} file. "
            f"Write it again, or drop the {suffix} from its name if it is plain text."
        ) from error


def _opened(path: Path, suffix: str) -> Any:
    if suffix == ".zst":
        return _imported("pyarrow", path).input_stream(str(path), compression="zstd")
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)
    return opener(path, "rb")


def _named(suffix: str) -> str:
    return {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}[suffix]


def _too_long(path: Path, longest: float) -> StreamlineError:
    return StreamlineError(
        f"{path} holds a document of more than {int(longest):,} characters, and a document is held in memory whole. "
        "Expected documents that are separated by two blank lines, or one in each line of a JSONL file. Cut it at its "
        "chapters, or write a JSONL file."
    )


def _imported(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise StreamlineError(
            f"{path} cannot be read: the package `pyarrow` is not installed. Expected it for {_PARQUET} and .zst "
            "files. Install it (pip install pyarrow), or write a JSONL file."
        ) from error

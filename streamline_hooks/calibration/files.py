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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamline_hooks.errors import StreamlineError
from streamline_hooks.json_file import parse_json

_TEXT, _JSONL, PARQUET = ".txt", ".jsonl", ".parquet"
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
JSONL_SUFFIXES = tuple(_JSONL + packed for packed in ("", *_COMPRESSED))
"""How the names of JSONL files end."""

SUFFIXES = (PARQUET, *JSONL_SUFFIXES, *(_TEXT + packed for packed in ("", *_COMPRESSED)))
"""How the names of files end that are read in a folder."""

CHARACTERS_AT_ONCE = 1 << 18  # bytes
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
    if path.name.lower().endswith(PARQUET):
        return _parquet(path)
    if path.name.lower().endswith(JSONL_SUFFIXES):
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
    for number, row in json_rows(path, '{"text": "..."}', longest):
        if not isinstance(row.get("text"), str):
            raise StreamlineError(
                f"{path}, line {number} holds the fields {sorted(row)} and no `text` that is a string. Expected an "
                'object with a `text` field in each line, like {"text": "..."}. Rename the field that holds the text.'
            )
        yield mended(row["text"])


def json_rows(path: Path, like: str, longest: float = math.inf) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSONL file, plain or compressed, with the numbers of their lines.

    Parameters
    ----------
    path : Path
    like : str
        A line as it is expected, for what is said of one that is not so.
    longest : float
        The most characters that a line may have.

    Raises
    ------
    StreamlineError
        If the file cannot be decompressed, decoded or parsed, or a line holds something else; with the line.
    """
    names = list(json.loads(like))
    fields = " and ".join(f"a `{name}` field" for name in names)
    for number, line in enumerate(_lines(path, longest), start=1):
        if not line.strip():
            continue
        try:
            row: Any = parse_json(line)
        except json.JSONDecodeError as error:
            raise StreamlineError(
                f"{path}, line {number} is not JSON ({error.msg} at column {error.colno}). Expected an object "
                f"with {fields} in each line, like {like}. Mend the line or leave it out."
            ) from error
        if not isinstance(row, dict):
            raise StreamlineError(
                f"{path}, line {number} holds a {type(row).__name__} and no "
                f"{' and '.join(f'`{name}` that is a string' for name in names)}. Expected an object with {fields} in "
                f"each line, like {like}. Write each line so."
            )
        yield number, row


def mended(text: str) -> str:
    """Replace what is no character: JSON can spell half a surrogate pair, which tokenizers refuse."""
    return text.encode("utf-8", "replace").decode()


def _parquet(path: Path) -> Iterator[str]:
    columns = parquet_columns(path)
    if "text" not in columns:
        raise StreamlineError(
            f"{path} has the columns {sorted(columns)}. Expected a column `text` that holds strings. "
            "Rename the column that holds the text."
        )
    yield from (text for (text,) in parquet_texts(path, ["text"]) if text is not None)


def parquet_columns(path: Path) -> list[str]:
    """Return the names of the columns of a Parquet file.

    Raises
    ------
    StreamlineError
        If it cannot be read, or ``pyarrow`` is not installed.
    """
    with opened_parquet(path) as file:
        return list(file.schema_arrow.names)


def parquet_texts(path: Path, columns: Sequence[str]) -> Iterator[tuple[str | None, ...]]:
    """Yield the cells of columns that hold strings, row by row; an empty cell is None.

    Raises
    ------
    StreamlineError
        If a column holds something else, or the file cannot be read.
    """
    pyarrow = imported("pyarrow", path)
    strings = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
    with opened_parquet(path) as file:
        for name in columns:
            kind = file.schema_arrow.field(name).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if kind not in strings:
                raise StreamlineError(
                    f"The column `{name}` of {path} holds {kind}. Expected strings. Write the text there as strings, "
                    "or rename the column that holds it."
                )
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=list(columns), use_threads=False):
            yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


@contextmanager
def opened_parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file for reading in pieces.

    Yields
    ------
    pyarrow.parquet.ParquetFile

    Raises
    ------
    StreamlineError
        If ``pyarrow`` is not installed, or the file cannot be read: here, or by what is done inside.
    """
    pyarrow, parquet = imported("pyarrow", path), imported("pyarrow.parquet", path)
    try:
        with parquet.ParquetFile(path, buffer_size=CHARACTERS_AT_ONCE, pre_buffer=False) as file:  # it would hold all
            yield file
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
                chunk = file.read(CHARACTERS_AT_ONCE)
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
        return imported("pyarrow", path).input_stream(str(path), compression="zstd")
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


def imported(module: str, path: Path) -> Any:
    """Import the package ``pyarrow`` or a module of it, or say for which file it is needed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise StreamlineError(
            f"{path} cannot be read: the package `pyarrow` is not installed. Expected it for {PARQUET} and .zst "
            "files. Install it (pip install pyarrow), or write a JSONL file."
        ) from error

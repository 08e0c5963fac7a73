"""Read documents from files, folders, data sets or Python's own help, through Hugging Face `datasets`."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import random
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from streamline_hooks.distributed import Processes, here
from streamline_hooks.errors import StreamlineError
from streamline_hooks.json_file import parse_json

_Item = TypeVar("_Item")
Columns = Sequence[tuple[str, ...]]
"""Sets of columns that are looked for, in this order; the first that a file has is read."""

_COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zst")
PARQUET = ".parquet"
JSONL_SUFFIXES = tuple(".jsonl" + compression for compression in _COMPRESSED)
_SUFFIXES = (PARQUET, *JSONL_SUFFIXES, *(".txt" + compression for compression in _COMPRESSED))
_EXPECTED = (
    "a text file (documents separated by two blank lines), a JSONL file (a `text` field in each line), a Parquet file "
    "(a column `text`), a folder of .txt, .txt.gz, .jsonl, .jsonl.gz or .parquet files, the word 'pydoc', or the name "
    "of a data set"
)
_DATASET_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:\w[\w.+-]*)?")
CHUNK = 1 << 20
"""Characters of a file that are read at once."""
LONGEST = 50_000_000
"""Maximal characters of a document in a text file; one without separators would not fit in memory."""
_ROWS = 100


def read_documents(source: str | Path | Sequence[str | Path], *, limit_characters: int = 50_000_000) -> list[str]:
    r"""Read all documents of one or several sources into memory.

    Use `stream_documents` for sources larger than memory. All sources but ``"pydoc"`` need the optional package
    ``datasets``: ``pip install "streamline_hooks[datasets]"``.

    Parameters
    ----------
    source : str, Path or a sequence of them
        Each is one of:

        - a text file, plain or compressed (``.gz``, ``.bz2``, ``.xz``, ``.zst``); two blank lines (``"\n\n\n"``)
          separate its documents;
        - a JSONL file (``.jsonl``, plain or compressed); each line is an object whose ``text`` is one document;
        - a Parquet file (``.parquet``), whose column ``text`` is read; null values are skipped;
        - a folder of such files, read recursively in the order of their names; hidden files are skipped;
        - ``"pydoc"``: the language reference inside every CPython (``pydoc_data.topics``), one document per topic;
        - where none of that exists, ``"name"`` or ``"name:config"`` of a data set, whose split ``train`` is
          streamed and whose column ``text`` is read.
    limit_characters : int, default 50 million
        Where to stop reading a data set, in characters. Files are always read to their end.

    Returns
    -------
    list of str
        The documents in order, stripped, without empty documents and exact repetitions.

    Raises
    ------
    StreamlineError
        If a source does not exist, cannot be read, or no source contains text.

    Examples
    --------
    >>> documents = read_documents("pydoc")
    >>> len(documents) > 50
    True
    """
    sources = listed(source)
    documents = dict.fromkeys(filter(None, map(str.strip, _documents(sources, limit_characters))))
    if not documents:
        raise _no_text(sources)
    return list(documents)


def stream_documents(
    source: str | Path | Sequence[str | Path],
    *,
    shuffle: int = 0,
    seed: int = 0,
    remember: int = 1_000_000,
    processes: Processes | None = None,
) -> Iterator[str]:
    """Yield this rank's documents of sources of any size.

    Memory holds a chunk of the file, the shuffle buffer and the digests of ``remember`` documents. Each document
    belongs to the rank that its content determines, so that all ranks together yield what one process would yield.
    Each rank reads the whole source; tokenization is shared.

    Parameters
    ----------
    source : str, Path or a sequence of them
        See `read_documents`. A data set is streamed to its end.
    shuffle : int, default 0
        Size of the shuffle buffer in documents; 0 keeps the order.
    seed : int, default 0
        Seed of the shuffle.
    remember : int, default 1,000,000
        A document is skipped if it equals one of so many documents before it; 0 keeps repetitions.
    processes : Processes, optional
        Rank and world size. Default: `streamline_hooks.distributed.here`.

    Yields
    ------
    str
        Documents, stripped, without empty documents.

    Raises
    ------
    StreamlineError
        At once if a source does not exist or an argument is negative. During iteration if a source cannot be read,
        contains a document of more than 50 million characters, or no source contains text.

    Examples
    --------
    >>> whole = list(stream_documents("pydoc"))
    >>> shares = [list(stream_documents("pydoc", processes=Processes(rank, 3))) for rank in range(3)]
    >>> sorted(whole) == sorted(shares[0] + shares[1] + shares[2])
    True
    >>> mixed = list(stream_documents("pydoc", shuffle=50))
    >>> whole == mixed, sorted(whole) == sorted(mixed)
    (False, True)
    """
    for name, value in (("shuffle", shuffle), ("remember", remember)):
        if value < 0:
            raise StreamlineError(f"{name}={value}: expected a number of documents >= 0. Use 0 to switch it off.")
    sources = listed(source)
    own = _of_rank(_documents(sources), sources, remember, processes or here())
    return _shuffled(own, shuffle, seed) if shuffle > 1 else own


def content_digest(document: str) -> bytes:
    """Return a digest of 16 bytes of a document."""
    return hashlib.blake2b(document.encode(), digest_size=16).digest()


def listed(source: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Return one or several sources as a list."""
    return [source] if isinstance(source, (str, Path)) else list(source)


def visible_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """List the files with these suffixes in a folder and its sub-folders, without hidden ones, in order of names."""
    found = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    visible = (
        path
        for path in found
        if path.name.lower().endswith(suffixes) and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    return sorted(visible, key=Path.as_posix)


def read_columns(path: Path, columns: Columns) -> Iterator[tuple[str | None, ...]]:
    """Yield the strings in some columns of a JSONL or Parquet file, row by row.

    Parameters
    ----------
    path : Path
    columns : sequence of tuple of str

    Yields
    ------
    tuple of str or None
        None is a null value of a Parquet file.

    Raises
    ------
    StreamlineError
        If the file cannot be read, has none of the columns, or they contain something other than strings.
    """
    if not path.name.lower().endswith(PARQUET):
        expected = json.dumps(dict.fromkeys(columns[0], "..."))
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _strings(where, _json_object(where, line, expected), columns)
        return
    names = _present(str(path), list(open_parquet(path).features), columns)
    for number, row in enumerate(parquet_rows(path, names)):
        yield _strings(f"{path}, row {number}", row, [names], nullable=True)


def open_parquet(path: Path, **options: Any) -> Any:
    """Open a Parquet file as a streaming data set, which writes no cache.

    Parameters
    ----------
    path : Path
    **options
        Of `datasets.IterableDataset.from_parquet`.

    Returns
    -------
    datasets.IterableDataset
    """
    return _opened("from_parquet", path, **options)


def parquet_rows(path: Path, names: Sequence[str], cast: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Yield some columns of a Parquet file row by row.

    Parameters
    ----------
    path : Path
    names : sequence of str
    cast : mapping of str to feature, optional
        Types of `datasets` that columns are cast to.
    """
    with _readable(path):
        rows = open_parquet(path, columns=list(names), batch_size=_ROWS).reshard()  # else Arrow reads ahead to the end
    for name, feature in (cast or {}).items():
        rows = rows.cast_column(name, feature)
    with _readable(path):
        for batch in rows.iter(_ROWS):
            for values in zip(*(batch[name] for name in names), strict=True):
                yield dict(zip(names, values, strict=True))


def import_datasets(source: str | Path) -> Any:
    """Import the optional package `datasets`.

    Raises
    ------
    StreamlineError
        If it is not installed, naming the source and the extra.
    """
    try:
        import datasets
    except ImportError as error:
        raise StreamlineError(
            f"{str(source)!r} cannot be read: the package `datasets` is not installed. Expected it for files, folders "
            'and data sets. Install it (pip install "streamline_hooks[datasets]"), or give a list of strings in Python.'
        ) from error
    return datasets


def _documents(sources: Sequence[str | Path], limit_characters: float = math.inf) -> Iterator[str]:
    readers = [_reader(source, limit_characters) for source in sources]  # raises now if a source does not exist
    return (document for read in readers for document in read())


def _reader(source: str | Path, limit_characters: float) -> Callable[[], Iterable[str]]:
    if source == "pydoc":
        return _read_pydoc
    path = Path(source).expanduser()
    if path.is_dir():
        return lambda: (text for file in visible_files(path, _SUFFIXES) for text in _read_file(file))
    if path.exists():
        return partial(_read_file, path)
    missing = f"No text can be read from {str(source)!r}: there is no such file or folder"
    if isinstance(source, Path) or not _DATASET_NAME.fullmatch(source) or source.lower().endswith(_SUFFIXES):
        raise StreamlineError(f"{missing}. Expected {_EXPECTED}. Check the spelling of the path.")
    return partial(_read_dataset, source, missing, limit_characters)


def _read_pydoc() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _read_file(path: Path) -> Iterator[str]:
    if path.name.lower().endswith((PARQUET, *JSONL_SUFFIXES)):
        return (text for (text,) in read_columns(path, [("text",)]) if text is not None)
    return _split_at_blank_lines(path)


def _split_at_blank_lines(path: Path) -> Iterator[str]:
    """Split a text at two or more blank lines."""
    lines: list[str] = []
    length, blank = 0, False
    for line in _lines(path):
        if blank and not line:
            yield "\n".join(lines)
            lines, length = [], 0
        else:
            lines.append(line)
            length += len(line) + 1
        if length > LONGEST:
            raise StreamlineError(
                f"{path} contains a document of more than {LONGEST:,} characters. Expected documents that are "
                "separated by two blank lines. Split it, or write a JSONL file."
            )
        blank = not line
    yield "\n".join(lines)


def _read_dataset(source: str, missing: str, limit_characters: float) -> Iterator[str]:
    datasets = import_datasets(source)
    name, _, config = source.partition(":")
    read = 0
    try:
        for row in datasets.load_dataset(name, config or None, split="train", streaming=True):
            if read >= limit_characters:
                return
            (text,) = _strings(f"The data set {source!r}", row, [("text",)])
            read += len(text or "")
            yield text or ""
    except StreamlineError:
        raise
    except Exception as error:  # whatever the loader of a data set raises
        raise StreamlineError(
            f"{missing}, and as a data set it cannot be loaded ({type(error).__name__}: {error}). "
            f"Expected {_EXPECTED}. Check the spelling, the network, or give a file."
        ) from error


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, decompressed; only line feeds and carriage returns end a line."""
    rows = _opened("from_text", path, chunksize=CHUNK)
    lines = chain.from_iterable(batch["text"] for batch in rows.iter(_ROWS))
    with _readable(path):
        yield next(lines, "").removeprefix("\ufeff")
        yield from lines


def _opened(reader: str, path: Path, **options: Any) -> Any:
    """Open a file with a reader of `datasets`: streaming, without network access, cache or glob patterns."""
    datasets = import_datasets(path)
    with tempfile.TemporaryDirectory() as cache, _readable(path):
        return getattr(datasets.IterableDataset, reader)(glob.escape(str(path.absolute())), cache_dir=cache, **options)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the file in whatever its reader raises."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StreamlineError):
            raise
        raise StreamlineError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Expected a whole file, compressed as its name "
            "says (.zst needs the package `zstandard`), with text in UTF-8. Write it again, or leave it out."
        ) from error


def _json_object(where: str, line: str, expected: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except json.JSONDecodeError as error:
        raise StreamlineError(
            f"{where} is not JSON ({error.msg} at column {error.colno}). Expected an object in each line, such as "
            f"{expected}. Correct the line or remove it."
        ) from error
    if not isinstance(row, dict):
        raise StreamlineError(
            f"{where} is a {type(row).__name__}. Expected an object in each line, such as {expected}. Write each line "
            "as an object."
        )
    return row


def _strings(where: str, row: Mapping[str, Any], columns: Columns, nullable: bool = False) -> tuple[str | None, ...]:
    """Return the values of the first set of columns that a row has."""
    names = _present(where, list(row), columns)
    for name in names:
        if not (isinstance(row[name], str) or (nullable and row[name] is None)):
            raise StreamlineError(
                f"{where}: `{name}` is a {type(row[name]).__name__}. Expected a string. Write the text as a string, or "
                "rename the column."
            )
    # Half a surrogate pair, which JSON can spell, is no character for a tokenizer.
    return tuple(row[name] and row[name].encode("utf-8", "replace").decode() for name in names)


def _present(where: str, there: Sequence[str], columns: Columns) -> tuple[str, ...]:
    for names in columns:
        if set(names) <= set(there):
            return names
    expected = " or ".join(" and ".join(f"`{name}`" for name in names) for names in columns)
    raise StreamlineError(
        f"{where} has the columns {sorted(there)}. Expected {expected}. Rename the columns that hold the text."
    )


def _no_text(sources: Sequence[str | Path]) -> StreamlineError:
    quoted = ", ".join(repr(str(source)) for source in sources) or "an empty list of sources"
    return StreamlineError(
        f"No text was found in {quoted}. Expected {_EXPECTED}. Check that the source is the one you mean and is not "
        "empty."
    )


def _of_rank(
    documents: Iterator[str], sources: Sequence[str | Path], remember: int, processes: Processes
) -> Iterator[str]:
    """Yield the documents of a rank, without empty and repeated ones."""
    last_seen: OrderedDict[bytes, int] = OrderedDict()  # other ranks remember the other documents
    number = -1
    for document in filter(None, map(str.strip, documents)):
        number += 1
        digest = content_digest(document)
        if int.from_bytes(digest[:8]) % processes.count != processes.rank:
            continue
        last = last_seen.pop(digest, None)
        if remember:
            last_seen[digest] = number
            while last_seen[next(iter(last_seen))] <= number - remember:
                last_seen.popitem(last=False)
        if last is None or number - last > remember:
            yield document
    if number < 0:
        raise _no_text(sources)


def _shuffled(items: Iterable[_Item], size: int, seed: int) -> Iterator[_Item]:
    """Shuffle within a buffer, as `IterableDataset.shuffle` does."""
    draw = random.Random(seed)
    buffer: list[_Item] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
        else:
            place = draw.randrange(size)
            yield buffer[place]
            buffer[place] = item
    draw.shuffle(buffer)
    yield from buffer

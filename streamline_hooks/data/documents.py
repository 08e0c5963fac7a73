"""Read documents from files, folders, data sets or Python's help text.

Text and JSONL files need no optional package; Parquet files and data sets are read with Hugging Face `datasets`.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import random
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from streamline_hooks.core import Processes, StreamlineError, current_processes, parse_json

Columns = Sequence[tuple[str, ...]]
"""Alternative sets of column names; the first set that a file has is read."""

_COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zst")
PARQUET = ".parquet"
JSONL_SUFFIXES = tuple(".jsonl" + compression for compression in _COMPRESSED)
_SUFFIXES = (PARQUET, *JSONL_SUFFIXES, *(".txt" + compression for compression in _COMPRESSED))
_EXPECTED = (
    "a text file (documents separated by two blank lines), a JSONL file (a `text` field in each line), a Parquet file "
    "(a column `text`), a folder of .txt, .txt.gz, .jsonl, .jsonl.gz or .parquet files, the word 'pydoc', or the name "
    "of a data set"
)
_MARKUP = tuple(kind + compression for kind in (".json", ".ndjson", ".csv", ".tsv") for compression in _COMPRESSED)
_DATASET_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:\w[\w.+-]*)?")
LONGEST = 50_000_000
"""Maximum characters of a document in a text file; a file without separators might not fit in memory."""
_ROWS = 100
_LIMIT = 50_000_000


@runtime_checkable
class TextDataset(Protocol):
    """A `datasets.Dataset` or `datasets.IterableDataset` with documents in the column ``text``."""

    column_names: Any
    features: Any

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the rows."""


def text_column(dataset: TextDataset) -> list[str]:
    """Return the documents of a data set.

    Raises
    ------
    StreamlineError
        If the data set has no column ``text``.
    """
    if "text" not in (dataset.column_names or ()):
        raise StreamlineError(
            f"The data set has the columns {dataset.column_names}. Expected a column 'text'. Rename a column with "
            "data.rename_column(..., 'text'), or select a split of the data set first."
        )
    return [row["text"] for row in dataset]


class Documents(list[str]):
    """List of documents with the names of the sources that they were read from.

    Slices and copies have no sources, because they need not contain all documents of the sources.

    Attributes
    ----------
    sources : tuple of str
        Names of the files, folders and data sets. Relative paths begin with ``./`` or ``../``.

    Examples
    --------
    >>> read_documents("pydoc").sources, getattr(read_documents("pydoc")[:3], "sources", ())
    (('pydoc',), ())
    """

    def __init__(self, documents: Iterable[str] = (), sources: Sequence[str] = ()) -> None:
        super().__init__(documents)
        self.sources = tuple(sources)


def read_documents(source: str | Path | Sequence[str | Path], *, limit_characters: int = _LIMIT) -> Documents:
    r"""Read all documents of one or more sources into memory.

    Parquet files, data sets and ``.zst`` need the extra ``datasets``: ``pip install "streamline_hooks[datasets]"``.

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
        - if no such file or folder exists: ``"name"`` or ``"name:config"`` of a data set; the column ``text`` of its
          split ``train`` is streamed.
    limit_characters : int, default 50 million
        Stop reading a data set after this many characters. Files are always read completely.

    Returns
    -------
    Documents
        List of strings: the stripped documents in order, without empty documents and exact repetitions. `compress`
        records its ``sources`` in the checkpoint.

    Raises
    ------
    StreamlineError
        If a source does not exist or cannot be read, or if no source contains text.

    Examples
    --------
    >>> len(read_documents("pydoc")) > 50
    True
    """
    sources = as_list(source)
    documents = dict.fromkeys(filter(None, map(str.strip, _documents(sources, limit_characters))))
    if not documents:
        raise _no_text_error(sources)
    return Documents(documents, list(map(_recorded_name, sources)) if limit_characters == _LIMIT else ())


def _recorded_name(source: str | Path) -> str:
    """Return the name of a source, with a leading ``./`` for relative paths to distinguish them from data sets."""
    name = str(source)
    is_path = source != "pydoc" and Path(source).exists() and not Path(source).is_absolute()
    return f"./{name}" if is_path and not name.startswith(".") else name


def stream_documents(
    source: str | Path | Sequence[str | Path],
    *,
    shuffle: int = 0,
    seed: int = 0,
    remember: int = 1_000_000,
    processes: Processes | None = None,
) -> Iterator[str]:
    """Yield the documents assigned to this rank, without loading the sources into memory.

    A document is assigned to a rank by its content, so all ranks together yield what a single process would yield.
    Each rank reads all sources; only the later tokenization is divided among ranks.

    Parameters
    ----------
    source : str, Path or a sequence of them
        See `read_documents`. A data set is streamed to its end.
    shuffle : int, default 0
        Size of the shuffle buffer in documents; 0 keeps the order.
    seed : int, default 0
        Seed of the shuffle.
    remember : int, default 1,000,000
        Skip a document that equals one of this many preceding documents; 0 keeps repetitions.
    processes : Processes, optional
        Rank and world size. Default: `streamline_hooks.core.current_processes`.

    Yields
    ------
    str
        Stripped documents; empty documents are dropped.

    Raises
    ------
    StreamlineError
        Immediately if a source does not exist or an argument is negative. During iteration if a source cannot be read
        or contains a document of more than 50 million characters, or if no source contains text.

    Examples
    --------
    >>> whole = list(stream_documents("pydoc"))
    >>> shares = [list(stream_documents("pydoc", processes=Processes(rank, 3))) for rank in range(3)]
    >>> sorted(whole) == sorted(shares[0] + shares[1] + shares[2])
    True
    """
    for name, value in (("shuffle", shuffle), ("remember", remember)):
        if value < 0:
            raise StreamlineError(f"{name}={value} is invalid. Expected a number of documents >= 0. Use 0 to disable.")
    sources = as_list(source)
    documents = _of_rank(_documents(sources), sources, remember, processes or current_processes())
    return _shuffled(documents, shuffle, seed) if shuffle > 1 else documents


def content_digest(document: str) -> bytes:
    """Return a 16-byte digest of a document."""
    return hashlib.blake2b(document.encode(), digest_size=16).digest()


def as_list(source: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Return a source or a sequence of sources as a list."""
    return [source] if isinstance(source, (str, Path)) else list(source)


def visible_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """List the files with these suffixes below a folder, sorted by path, without hidden files."""
    files = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    files = (path for path in files if path.name.lower().endswith(suffixes))
    return sorted((p for p in files if not re.search(r"(^|/)\.", p.relative_to(folder).as_posix())), key=Path.as_posix)


def column_names(path: Path) -> list[str]:
    """Return the columns of a Parquet file or the keys of a JSONL file's first row, if any."""
    if path.name.lower().endswith(PARQUET):
        return list(open_parquet(path).features)
    first = next((line for line in _lines(path) if line.strip()), "{}")
    with _name_file_in_errors(path):
        row = parse_json(first)
    return list(row) if isinstance(row, dict) else []


def read_columns(path: Path, columns: Columns) -> Iterator[tuple[str | None, ...]]:
    """Yield the strings of each row, from the first set of columns that a JSONL or Parquet file has.

    Null values of a Parquet file are None.
    """
    if not path.name.lower().endswith(PARQUET):
        expected = f"Expected an object in each line, such as {json.dumps(dict.fromkeys(columns[0], '...'))}"
        for number, line in enumerate(_lines(path), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = parse_json(line)
            except json.JSONDecodeError as error:
                reason = f"{error.msg} at column {error.colno}"
                raise StreamlineError(
                    f"{where} is not JSON ({reason}). {expected}. Correct or remove the line."
                ) from error
            if not isinstance(row, dict):
                raise StreamlineError(f"{where} is a {type(row).__name__}. {expected}. Write the line as an object.")
            yield _strings(where, row, columns)
        return
    names = _existing_columns(str(path), list(open_parquet(path).features), columns)
    for number, row in enumerate(parquet_rows(path, names)):
        yield _strings(f"{path}, row {number}", row, [names], nullable=True)


def open_parquet(path: Path, **options: Any) -> Any:
    """Open a Parquet file as a streaming data set, without network access, cache or glob patterns."""
    datasets = import_datasets(path)
    with tempfile.TemporaryDirectory() as cache, _name_file_in_errors(path):
        return datasets.IterableDataset.from_parquet(glob.escape(str(path.absolute())), cache_dir=cache, **options)


def parquet_rows(path: Path, names: Sequence[str], cast: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Yield some columns of a Parquet file row by row; `cast` maps columns to features of `datasets`."""
    with _name_file_in_errors(path):
        rows = open_parquet(path, columns=list(names), batch_size=_ROWS).reshard()  # keeps Arrow from reading ahead
    for name, feature in (cast or {}).items():
        rows = rows.cast_column(name, feature)
    with _name_file_in_errors(path):
        for batch in rows.iter(_ROWS):
            for values in zip(*(batch[name] for name in names), strict=True):
                yield dict(zip(names, values, strict=True))


def import_datasets(source: str | Path) -> Any:
    """Import the optional package `datasets`; the error names the extra to install."""
    try:
        import datasets
    except ImportError as error:
        raise StreamlineError(
            f"{str(source)!r} cannot be read: Parquet files and data sets need the package `datasets`, which is not "
            'installed. Install it (pip install "streamline_hooks[datasets]"), or give text or JSONL files.'
        ) from error
    return datasets


def _documents(sources: Sequence[str | Path], limit_characters: float = math.inf) -> Iterator[str]:
    readers = [_reader(source, limit_characters) for source in sources]  # raises now if a source does not exist
    return (document for read in readers for document in read())


def _reader(source: str | Path, limit_characters: float) -> Callable[[], Iterable[str]]:
    if source == "pydoc":
        from pydoc_data.topics import topics

        return lambda: [text for _, text in sorted(topics.items())]
    path = Path(source).expanduser()
    if path.is_dir():
        return lambda: (text for file in visible_files(path, _SUFFIXES) for text in _read_file(file))
    if path.name.lower().endswith(_MARKUP) and path.exists():
        raise StreamlineError(
            f"{str(source)!r} is JSON or a table, which would be read as text with its names and quotes. Expected "
            f"{_EXPECTED}. If each line is a JSON object, rename the file to .jsonl; otherwise convert it."
        )
    if path.exists():
        return partial(_read_file, path)
    missing = f"No text can be read from {str(source)!r}: there is no such file or folder"
    if isinstance(source, Path) or not _DATASET_NAME.fullmatch(source) or source.lower().endswith(_SUFFIXES):
        raise StreamlineError(f"{missing}. Expected {_EXPECTED}. Check the spelling of the path.")
    return partial(_read_dataset, source, missing, limit_characters)


def _read_file(path: Path) -> Iterator[str]:
    if path.name.lower().endswith((PARQUET, *JSONL_SUFFIXES)):
        return (text for (text,) in read_columns(path, [("text",)]) if text is not None)
    return _split_at_blank_lines(path)


def _split_at_blank_lines(path: Path) -> Iterator[str]:
    """Split a text file at two or more blank lines."""
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
            f"{missing}, and no data set of this name can be loaded ({type(error).__name__}: {error}). "
            f"Expected {_EXPECTED}. Check the spelling and the network, or give a file."
        ) from error


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file after decompression; only line feeds and carriage returns end a line."""
    with _name_file_in_errors(path), _open_bytes(path) as file, io.TextIOWrapper(file, "utf-8-sig") as lines:
        for line in lines:
            yield line.removesuffix("\n")


def _open_bytes(path: Path) -> IO[bytes]:
    """Open a file in binary mode, with the decompression that its suffix names."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import zstandard

        return zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(suffix, open)(path, "rb")  # type: ignore[no-any-return]


@contextmanager
def _name_file_in_errors(path: Path) -> Iterator[None]:
    """Convert errors of a file reader into a `StreamlineError` that names the file."""
    try:
        yield
    except StreamlineError:
        raise
    except Exception as error:
        raise StreamlineError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Expected a complete file of UTF-8 text, "
            "compressed as its suffix indicates. Write the file again, or leave it out. Files with the suffix .zst "
            'need the package `zstandard`: pip install "streamline_hooks[datasets]".'
        ) from error


def _strings(where: str, row: Mapping[str, Any], columns: Columns, nullable: bool = False) -> tuple[str | None, ...]:
    """Return the values of the first set of columns that a row has."""
    names = _existing_columns(where, list(row), columns)
    for name in names:
        if not (isinstance(row[name], str) or (nullable and row[name] is None)):
            raise StreamlineError(
                f"{where}: `{name}` is a {type(row[name]).__name__}. Expected a string. Write the text as a string, or "
                "rename the column."
            )
    # JSON can contain an unpaired surrogate, which tokenizers do not accept.
    return tuple(row[name] and row[name].encode("utf-8", "replace").decode() for name in names)


def _existing_columns(where: str, existing: Sequence[str], columns: Columns) -> tuple[str, ...]:
    for names in columns:
        if set(names) <= set(existing):
            return names
    expected = " or ".join(" and ".join(f"`{name}`" for name in names) for names in columns)
    raise StreamlineError(
        f"{where} has the columns {sorted(existing)}. Expected {expected}. Rename the columns that contain the text."
    )


def _no_text_error(sources: Sequence[str | Path]) -> StreamlineError:
    quoted = ", ".join(repr(str(source)) for source in sources) or "an empty list of sources"
    return StreamlineError(
        f"No text was found in {quoted}. Expected {_EXPECTED}. Check the name of the source, and that it is not empty."
    )


def _of_rank(
    documents: Iterator[str], sources: Sequence[str | Path], remember: int, processes: Processes
) -> Iterator[str]:
    """Yield the documents assigned to a rank, without empty and repeated documents."""
    last_seen: OrderedDict[bytes, int] = OrderedDict()  # only documents of this rank
    count = -1
    for document in filter(None, map(str.strip, documents)):
        count += 1
        digest = content_digest(document)
        if int.from_bytes(digest[:8]) % processes.count != processes.rank:
            continue
        last = last_seen.pop(digest, None)
        if remember:
            last_seen[digest] = count
            while last_seen[next(iter(last_seen))] <= count - remember:
                last_seen.popitem(last=False)
        if last is None or count - last > remember:
            yield document
    if count < 0:
        raise _no_text_error(sources)


def _shuffled(documents: Iterator[str], size: int, seed: int) -> Iterator[str]:
    """Shuffle with a buffer, like `IterableDataset.shuffle`."""
    draw = random.Random(seed)
    buffer = list(islice(documents, size))
    for document in documents:
        slot = draw.randrange(size)
        yield buffer[slot]
        buffer[slot] = document
    draw.shuffle(buffer)
    yield from buffer

"""Read documents from text, JSONL and Parquet files, folders, a data set, or Python's own help."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from streamline_hooks.calibration.files import SUFFIXES, documents_of_file
from streamline_hooks.errors import StreamlineError

_EXPECTED = (
    "a text file (documents separated by two blank lines), a JSONL file (a `text` field in each line), a Parquet file "
    "(a column `text`), a folder of .txt, .txt.gz, .jsonl, .jsonl.gz or .parquet files, the word 'pydoc', or the name "
    "of a data set"
)
_DATASET_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:\w[\w.+-]*)?")


def read_documents(source: str | Path | Sequence[str | Path], *, limit_characters: int = 50_000_000) -> list[str]:
    r"""Read every document of one or several sources; `stream_documents` is for what is too large for that.

    Parameters
    ----------
    source : str, Path or a sequence of them
        Each is one of:

        - a text file, plain or compressed (``.gz``, ``.bz2``, ``.xz``, ``.zst``); two blank lines (``"\n\n\n"``)
          separate its documents;
        - a JSONL file (``.jsonl``, plain or compressed); each line is an object whose ``text`` is one document;
        - a Parquet file (``.parquet``), whose column ``text`` is read; empty cells are passed over. It needs the
          optional package ``pyarrow``, as ``.zst`` does;
        - a folder of such files (``.txt``, ``.jsonl``, ``.parquet``), read recursively in the order of their names;
          what starts with a dot is passed over;
        - ``"pydoc"``: the language reference inside every CPython (``pydoc_data.topics``), one document a topic;
        - where none of that exists, ``"name"`` or ``"name:config"`` of a data set, whose split ``train`` is
          streamed and whose column ``text`` is read. It needs the optional package ``datasets``.
    limit_characters : int, default 50 million
        Where to stop reading a data set, in characters. Files are always read whole.

    Returns
    -------
    list of str
        The documents, in order, stripped, without empty ones and without exact repetitions.

    Raises
    ------
    StreamlineError
        If a source does not exist, cannot be decoded or parsed (with the file and the line), or if no text is
        found in any of them.

    Examples
    --------
    >>> documents = read_documents("pydoc")
    >>> len(documents) > 50
    True
    """
    sources = listed(source)
    kept: dict[str, None] = {}
    for document in documents_in(sources, limit_characters):
        if stripped := document.strip():
            kept.setdefault(stripped)
    if not kept:
        raise nothing_found(sources)
    return list(kept)


def listed(source: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """One or several sources as a list."""
    return [source] if isinstance(source, (str, Path)) else list(source)


def nothing_found(sources: Sequence[str | Path]) -> StreamlineError:
    """What is raised where there is no text."""
    quoted = ", ".join(repr(str(source)) for source in sources) or "an empty list of sources"
    return StreamlineError(
        f"No text was found in {quoted}. Expected {_EXPECTED}. Check that the source is the one you mean and is not "
        "empty."
    )


def documents_in(
    sources: Sequence[str | Path], limit_characters: float = math.inf, longest: float = math.inf
) -> Iterator[str]:
    """Yield the documents of sources as they stand there, in their order; no file is held whole.

    Parameters
    ----------
    sources : sequence of str or Path
        See `read_documents`.
    limit_characters : float
        Where to stop reading each data set.
    longest : float
        See `documents_of_file`.

    Raises
    ------
    StreamlineError
        At once, if a source does not exist; later, if one cannot be read.

    Examples
    --------
    >>> next(documents_in(["pydoc"])).startswith('The "assert" statement')
    True
    """
    readers = [_reader(source, limit_characters, longest) for source in sources]
    return (document for read in readers for document in read())


def _reader(source: str | Path, limit_characters: float, longest: float) -> Callable[[], Iterable[str]]:
    if source == "pydoc":
        return _read_pydoc
    path = Path(source).expanduser()
    if path.is_dir():
        return partial(_read_folder, path, longest)
    if path.exists():
        return partial(documents_of_file, path, longest)
    missing = f"No text can be read from {str(source)!r}: there is no such file or folder"
    if isinstance(source, Path) or not _DATASET_NAME.fullmatch(source) or source.lower().endswith(SUFFIXES):
        raise StreamlineError(f"{missing}. Expected {_EXPECTED}. Check the spelling of the path.")
    return partial(_read_dataset, source, missing, limit_characters)


def _read_pydoc() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _read_folder(folder: Path, longest: float) -> Iterator[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.name.lower().endswith(SUFFIXES))
    shown = (name for name in found if not any(part.startswith(".") for part in name.parts))
    for name in sorted(shown, key=lambda name: name.as_posix()):
        if (path := folder / name).is_file():
            yield from documents_of_file(path, longest)


def _read_dataset(source: str, missing: str, limit_characters: float) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise StreamlineError(
            f"{missing}, and the package `datasets`, which could read a data set of that name, is not installed. "
            f"Expected {_EXPECTED}. Check the spelling of the path, or install it: pip install datasets"
        ) from error
    name, _, config = source.partition(":")
    read = 0
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for row in rows:
            if read >= limit_characters:
                return
            if not isinstance(row.get("text"), str):
                raise StreamlineError(
                    f"The data set {source!r} has the columns {sorted(row)}. Expected a column `text` that holds "
                    "strings. Write the column you mean to a JSONL file and give that file."
                )
            read += len(row["text"])
            yield row["text"]
    except StreamlineError:
        raise
    except Exception as error:  # whatever the loader of a data set raises
        raise StreamlineError(
            f"{missing}, and as a data set it cannot be loaded ({type(error).__name__}: {error}). "
            f"Expected {_EXPECTED}. Check the spelling, the network, or give a file."
        ) from error

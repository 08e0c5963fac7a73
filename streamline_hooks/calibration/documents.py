"""Read documents from text files, JSONL files, folders, a data set, or Python's own help."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from streamline_hooks.errors import StreamlineError

_TEXT_SUFFIXES = (".txt", ".txt.gz")
_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
_SUFFIXES = _TEXT_SUFFIXES + _JSONL_SUFFIXES
_EXPECTED = (
    "a text file (documents separated by two blank lines), a JSONL file (a `text` field in each line), a folder "
    "of .txt, .txt.gz, .jsonl or .jsonl.gz files, the word 'pydoc', or the name of a data set"
)
_DATASET_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:\w[\w.+-]*)?")


def read_documents(source: str | Path | Sequence[str | Path], *, limit_characters: int = 50_000_000) -> list[str]:
    r"""Read every document of one or several sources.

    Parameters
    ----------
    source : str, Path or a sequence of them
        Each is one of:

        - a text file, plain or ``.gz``; two blank lines (``"\n\n\n"``) separate its documents;
        - a JSONL file (``.jsonl``, ``.jsonl.gz``); each line is an object whose ``text`` is one document;
        - a folder of ``.txt``, ``.txt.gz``, ``.jsonl`` and ``.jsonl.gz`` files, read recursively in the order of
          their names; what starts with a dot is passed over;
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
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    kept: dict[str, None] = {}
    for one in sources:
        for document in _read(one, limit_characters):
            if stripped := document.strip():
                kept.setdefault(stripped)
    if not kept:
        raise StreamlineError(
            f"No text was found in {_quoted(sources)}. Expected {_EXPECTED}. "
            "Check that the source is the one you mean and is not empty."
        )
    return list(kept)


def _read(source: str | Path, limit_characters: int) -> Iterable[str]:
    if source == "pydoc":
        return _read_pydoc()
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        return _read_file(path)
    return _read_dataset(source, limit_characters)


def _read_pydoc() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _read_folder(folder: Path) -> Iterator[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.name.lower().endswith(_SUFFIXES))
    shown = (name for name in found if not any(part.startswith(".") for part in name.parts))
    for name in sorted(shown, key=lambda name: name.as_posix()):
        if (path := folder / name).is_file():
            yield from _read_file(path)


def _read_file(path: Path) -> Iterable[str]:
    text = _decoded(path)
    if path.name.lower().endswith(_JSONL_SUFFIXES):
        return _parse_jsonl(text, path)
    return re.split(r"\n{3,}", text)


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise StreamlineError(
                f"{path} ends in .gz and cannot be decompressed ({error}). Expected a whole gzip file. "
                "Write it again, or drop the .gz from its name if it is plain text."
            ) from error
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise StreamlineError(
            f"{path} is not UTF-8: byte {error.start:,} is 0x{data[error.start]:02x}. Expected text in UTF-8. "
            "Convert it (for instance with iconv), or leave the file out."
        ) from error


def _parse_jsonl(text: str, path: Path) -> Iterator[str]:
    # Not splitlines(): JSON may hold U+2028 and other line ends of Unicode inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
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


def _read_dataset(source: str | Path, limit_characters: int) -> Iterator[str]:
    missing = f"No text can be read from {str(source)!r}: there is no such file or folder"
    if isinstance(source, Path) or not _DATASET_NAME.fullmatch(source) or source.lower().endswith(_SUFFIXES):
        raise StreamlineError(f"{missing}. Expected {_EXPECTED}. Check the spelling of the path.")
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


def _quoted(sources: Sequence[str | Path]) -> str:
    return ", ".join(repr(str(source)) for source in sources) or "an empty list of sources"

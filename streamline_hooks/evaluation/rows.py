"""Rows of questions as they are stored: JSONL, compressed or many files in a zip, and data sets on disk or a hub."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from streamline_hooks.errors import StreamlineError
from streamline_hooks.json_file import parse_json

_HUB = "hub:"
_EXPECTED = (
    "a JSONL file in UTF-8, plain, .gz or many in a .zip, a folder that `datasets` has saved, or "
    f'"{_HUB}NAME:SPLIT" or "{_HUB}NAME:CONFIG:SPLIT"'
)


class Row(dict[str, Any]):
    """One row, and where it stands.

    Attributes
    ----------
    file : str
        What it was read from; of an archive, the file inside.
    where : str
        For errors.
    """

    def __init__(self, values: Mapping[str, Any], file: str, where: str) -> None:
        super().__init__(values)
        self.file, self.where = file, where


def read_rows(source: str | Path) -> list[Row]:
    """Read every row of a source, whatever its layout.

    Parameters
    ----------
    source : str or Path
        - a JSONL file, plain or ``.gz``, one object a line;
        - a ``.zip`` of such files, read in the order of their names; hidden files are passed over;
        - a folder that ``datasets``' ``save_to_disk`` has written, of one split;
        - ``"hub:NAME:SPLIT"`` or ``"hub:NAME:CONFIG:SPLIT"``, such as ``"hub:allenai/ai2_arc:ARC-Easy:validation"``.

        The last two need the optional package ``datasets``.

    Returns
    -------
    list of Row

    Raises
    ------
    StreamlineError
        If the source cannot be read, or a line is no JSON object; the text names the line.
    """
    if isinstance(source, str) and source.startswith(_HUB):
        return _from_hub(source)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path)
    try:
        raw = path.read_bytes()
        if raw[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                return [row for name in _shown(archive) for row in _lines(archive.read(name), name, f"{path}: {name}")]
        return list(_lines(raw, str(path), str(path)))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, zipfile.BadZipFile) as error:
        raise StreamlineError(f"The questions in {path} cannot be read: {error}. Give {_EXPECTED}.") from error


def _shown(archive: zipfile.ZipFile) -> list[str]:
    names = [name for name in archive.namelist() if name.lower().endswith((".jsonl", ".jsonl.gz"))]
    return sorted(name for name in names if not any(part.startswith((".", "__")) for part in name.split("/")))


def _lines(raw: bytes, file: str, place: str) -> Iterator[Row]:
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold Unicode's other line ends
        if not line.strip():
            continue
        where = f"{place}, line {number}"
        try:
            values = parse_json(line)
        except ValueError as error:
            raise StreamlineError(f"{where} is not JSON: {error}. Expected one object a line.") from error
        if not isinstance(values, dict):
            raise StreamlineError(f"{where} holds a {type(values).__name__}; expected an object.")
        yield Row(values, file, where)


def _from_folder(path: Path) -> list[Row]:
    datasets = _datasets(str(path))
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the loader of a data set raises
        raise StreamlineError(
            f"The folder {path} cannot be read as a data set ({type(error).__name__}: {error}). Give {_EXPECTED}."
        ) from error
    return _rows(found, str(path), f"{path}/")


def _from_hub(source: str) -> list[Row]:
    name, *rest = source.removeprefix(_HUB).split(":")
    if not name or len(rest) not in (1, 2) or not all(rest):
        raise StreamlineError(f"{source!r} names no split of a data set; expected {_EXPECTED}.")
    datasets = _datasets(source)
    try:
        found = datasets.load_dataset(name, *rest[:-1], split=rest[-1])
    except Exception as error:  # whatever the loader of a data set raises
        raise StreamlineError(
            f"{source!r} cannot be loaded ({type(error).__name__}: {error}). Check name, configuration and split, and "
            "the network."
        ) from error
    return _rows(found, source, f"{_HUB}{name}:")


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise StreamlineError(
            f"{source!r} is read by the package `datasets`, which is not installed: pip install datasets. Or give a "
            "JSONL file."
        ) from error
    return datasets


def _rows(found: Any, source: str, stem: str) -> list[Row]:
    if isinstance(found, Mapping):
        raise StreamlineError(f"{source!r} holds the splits {', '.join(found)}; give one of them: '{stem}SPLIT'.")
    return [Row(row, source, f"{source}, row {number}") for number, row in enumerate(found)]

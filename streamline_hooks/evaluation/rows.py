"""Read JSONL files, plain, compressed or several in a zip archive."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import fsspec

from streamline_hooks.errors import StreamlineError

_SUFFIX = re.compile(r"(\.(jsonl?|txt))?(\.(gz|bz2|xz|zst|zip))?$")


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file.

    Parameters
    ----------
    path : str or Path
        One JSON object a line, in UTF-8: plain, compressed (``.gz``, ``.bz2``, ``.xz``; ``.zst`` with the package
        pyarrow), or a ``.zip`` of such files, which are read in the order of their names.

    Raises
    ------
    StreamlineError
        If the file cannot be read, is empty, or a line is no JSON object; the text names the line.
    """
    try:
        rows = [row for where, text in _texts(Path(path).expanduser()) for row in parse_rows(text, where)]
    except StreamlineError:
        raise
    except (OSError, EOFError, ValueError, ImportError, zipfile.BadZipFile) as error:
        raise StreamlineError(
            f"{path} cannot be read: {error}. Expected JSONL in UTF-8, plain, compressed or in a .zip. Check the file."
        ) from error
    if not rows:
        raise StreamlineError(f"{path} is empty. Expected a JSON object on each line. Check the file.")
    return rows


def source_name(source: str) -> str:
    """Return the name of a file without its suffixes, or of a data set (hub:...) with its configuration if any."""
    if source.startswith("hub:"):
        name, *config = source.removeprefix("hub:").split(":")
        return "-".join([name.split("/")[-1], *config[:-1]])
    return _SUFFIX.sub("", Path(source).name)


def parse_rows(text: str, where: str) -> list[dict[str, Any]]:
    """Parse the text of a JSONL file; `where` is its name in error messages."""
    lines = enumerate(text.split("\n"), start=1)  # not splitlines: JSON may hold U+2028
    return [_row(line, f"{where}, line {number}") for number, line in lines if line.strip()]


def subset(items: list[Any], count: int | None, seed: str) -> list[Any]:
    """Return a seeded random subset in the order of the whole, or everything if `count` is None or too large."""
    if count is None or count >= len(items):
        return items
    return [items[k] for k in sorted(Random(seed).sample(range(len(items)), count))]


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and text of a file, or of each visible JSONL file in a zip archive."""
    if path.suffix == ".zst":
        import pyarrow

        with pyarrow.input_stream(str(path)) as stream:
            yield str(path), stream.read().decode("utf-8-sig")
        return
    if path.suffix != ".zip":
        with fsspec.open(str(path), "rt", encoding="utf-8-sig", compression="infer") as file:
            yield str(path), file.read()
        return
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith((".jsonl", ".jsonl.gz")) and not any(p.startswith((".", "__")) for p in name.split("/")):
                raw = archive.read(name)
                yield f"{path}: {name}", (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("utf-8-sig")


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise StreamlineError(f"{where} is no JSON ({error}). Expected one object a line. Correct it.") from error
    if not isinstance(row, dict):
        raise StreamlineError(f"{where} is a {type(row).__name__}. Expected an object. Correct it.")
    return row

"""The files of an `ActivationStore`: its index, and the safetensors shards with their headers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamline_hooks.core import (
    StreamlineError,
    read_file,
    read_json,
    texts_digest,
)
from streamline_hooks.recording.token_columns import TOKEN_COLUMNS

INDEX = "index.json"


FORMAT = 1


_CONTENT = "a shard of an ActivationStore"


_UNFINISHED_INDEX = re.compile(rf"\.{re.escape(INDEX)}\..*\.writing")  # left by a process that was killed


def file_size(path: Path) -> int:
    """Return the size of a file in bytes, or -1 if it is missing."""
    return path.stat().st_size if path.is_file() else -1


def damaged_shard_error(path: Path) -> StreamlineError:
    """Return the error for a shard that is missing or has another size than in the index."""
    return StreamlineError(
        f"{path} is missing or incomplete. Expected the shard that the index lists. Copy it again, or record into a "
        "new folder."
    )


def read_index(folder: Path) -> dict[str, Any]:
    """Return the index of a folder, or an empty dict if the folder is missing or empty."""
    if not (folder / INDEX).is_file():
        others = [path.name for path in folder.iterdir()] if folder.is_dir() else [""] * folder.exists()
        if any(not _UNFINISHED_INDEX.fullmatch(name) for name in others):
            raise StreamlineError(
                f"{folder} is not empty and contains no {INDEX}, so it was not created by an ActivationStore. Choose "
                "an empty folder."
            )
        return {}
    index = read_json(folder / INDEX)
    if index.get("format") != FORMAT or "fingerprint" not in index:
        raise StreamlineError(
            f"{folder / INDEX} has format {index.get('format')!r}. Expected the index of an ActivationStore of format "
            f"{FORMAT}. Choose another folder, or read it with the version of this library that wrote it."
        )
    return index


def header_of(file: Any) -> Any:
    """Return the values in the header of an open shard, or None."""
    try:
        return json.loads((file.metadata() or {}).get("streamline_hooks", "null"))
    except ValueError:
        return None


def require_own_shard(path: Path, values: Mapping[str, Any]) -> None:
    """Raise unless a file is the shard of this run and number, which a killed process wrote before its index."""
    try:
        with safe_open(path, framework="pt") as file:
            is_own = header_of(file) == values
    except (OSError, SafetensorError):
        is_own = False
    if not is_own:
        raise StreamlineError(
            f"{path} exists, but it is not a shard of this run. Files that this run did not write are not replaced. "
            "Move it, or choose another folder."
        )


def require_header(values: Any, path: Path, number: int, fingerprint: str) -> None:
    """Raise if the values in the header of a shard are those of another run or number."""
    if values != {"fingerprint": fingerprint, "shard": number}:
        raise StreamlineError(
            f"{path} belongs to another run or has another number. Expected shard {number} of this run. Copy the "
            "folder again."
        )


def read_shard(path: Path, number: int, fingerprint: str) -> dict[str, Tensor]:
    """Read all columns of a shard; raise if it belongs to another run or position."""
    tensors, values = read_file(path, _CONTENT)
    require_header(values, path, number, fingerprint)
    return {name: tensors[name] for name in sorted(tensors, key=lambda name: (name not in TOKEN_COLUMNS, name))}


def rows_of_shards(
    shards: list[tuple[Path, int]], columns: tuple[str, ...], fingerprint: str, shuffle_seed: int | None
) -> Iterator[dict[str, Tensor]]:
    """Yield the rows of shards, shuffled within each shard if there is a seed."""
    for path, number in shards:
        tensors = read_shard(path, number, fingerprint)
        length = len(tensors["tokens"])
        order: Iterable[int] = range(length)
        if shuffle_seed is not None:
            seed = int(texts_digest([f"{shuffle_seed} {number}"])[:15], 16)
            order = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
        for row in order:
            yield {name: tensors[name][row] for name in columns}

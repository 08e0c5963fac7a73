"""Read the files of an `ActivationStore`: its index, and the safetensors shards with their headers."""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamline_hooks.core import StreamlineError, read_file, read_json, texts_digest
from streamline_hooks.recording.token_columns import TOKEN_COLUMNS

INDEX = "index.json"
FORMAT = 1
_CONTENT = "a shard of an ActivationStore"
_UNFINISHED_INDEX = re.compile(rf"\.{re.escape(INDEX)}\..*\.writing")  # left by a process that was killed


class ShardFolder:
    """Keep the index of a folder, and check and read the shards that it lists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = read_index(path)

    @property
    def shards(self) -> list[dict[str, Any]]:
        """File name, tokens, batches and bytes of each shard."""
        shards: list[dict[str, Any]] = self.index.get("shards", [])
        return shards

    def undamaged_shards(self) -> list[tuple[Path, int]]:
        """Return the path and number of each shard; raise if a shard is missing or has another size."""
        for shard in self.shards:
            if file_size(self.path / shard["file"]) != shard["bytes"]:
                raise damaged_shard_error(self.path / shard["file"])
        return [(self.path / shard["file"], number) for number, shard in enumerate(self.shards)]

    def read_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return the columns of a half-open range of tokens."""
        shards = self.undamaged_shards()
        ends = list(itertools.accumulate(shard["tokens"] for shard in self.shards))
        parts: dict[str, list[Tensor]] = {}
        for k in range(bisect.bisect_right(ends, start), len(shards)):
            first = ends[k] - self.shards[k]["tokens"]
            if first >= stop and parts:
                break
            path, number = shards[k]
            with safe_open(path, framework="pt") as file:
                require_header(header_of(file), path, number, self.index["fingerprint"])
                for name in (*TOKEN_COLUMNS, *self.index.get("columns", ())):
                    part = file.get_slice(name)[max(start - first, 0) : max(stop - first, 0)]
                    parts.setdefault(name, []).append(part)
        if not parts:  # an empty slice at the end
            return {name: value[:0] for name, value in read_shard(*shards[-1], self.index["fingerprint"]).items()}
        return {name: torch.cat(values) for name, values in parts.items()}


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


def dtype_name(dtype: torch.dtype | None) -> str:
    """Return the name of a dtype as in the index, or an empty string for None."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")

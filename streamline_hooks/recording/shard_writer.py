"""Write the shards and the index of an `ActivationStore`, and continue a run that was interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streamline_hooks.core import StreamlineError, current_processes, get_logger, texts_digest, write_file, write_json
from streamline_hooks.recording.shard_files import (
    FORMAT,
    INDEX,
    ShardFolder,
    damaged_shard_error,
    dtype_name,
    file_size,
    read_index,
    require_own_shard,
)
from streamline_hooks.recording.token_columns import TOKEN_COLUMNS

logger = get_logger(__name__)


class ShardWriter:
    """Buffer the rows of batches, and write them to the shards of a folder that no other process writes."""

    def __init__(self, folder: ShardFolder, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self.is_open = False
        self._replaceable = ""  # name of a half-written shard, which may be replaced
        self._rows: dict[str, list[Tensor]] = {}
        self._buffered_bytes = self._buffered_batches = 0

    def begin(self, run: dict[str, Any]) -> None:
        """Open the store for writing; raise unless the folder is empty or belongs to the same run."""
        if self.is_open:
            raise StreamlineError(
                "This ActivationStore is already open. Close it, or create another with a new folder."
            )
        if current_processes().count > 1:
            raise StreamlineError(
                f"{self._folder.path} would be written by {current_processes().count} ranks. Expected one process per "
                "folder. Give each rank its own folder and batches, inside streamline_hooks.core.single_process()."
            )
        self._folder.index, self._replaceable = read_index(self._folder.path), ""
        if not self._folder.index:
            self._folder.index = {
                "format": FORMAT,
                "fingerprint": texts_digest([json.dumps(run, sort_keys=True)]),
                "run": run,
                "columns": {},
                "complete": False,
                "shards": [],
            }
            write_json(self._folder.path / INDEX, self._folder.index)
        stored = self._folder.index["run"]
        if stored != run:
            differing = sorted(name for name in {*stored, *run} if stored.get(name) != run.get(name))
            listed = "; ".join(f"{name} is {stored.get(name)!r} there and {run.get(name)!r} here" for name in differing)
            raise StreamlineError(
                f"{self._folder.path} belongs to another run: {listed}. Expected an empty folder or the folder of the "
                "same run. Choose another folder."
            )
        self._drop_incomplete_shard()
        self.is_open = True

    def _drop_incomplete_shard(self) -> None:
        """Remove the last shard from the index if its file is missing or half-written; raise for any other shard."""
        for number, shard in enumerate(self._folder.shards):
            if file_size(self._folder.path / shard["file"]) == shard["bytes"]:
                continue
            if number + 1 < len(self._folder.shards):
                raise damaged_shard_error(self._folder.path / shard["file"])
            logger.warning("%s is missing or incomplete and will be written again.", self._folder.path / shard["file"])
            self._folder.index = {**self._folder.index, "complete": False, "shards": self._folder.shards[:-1]}
            self._replaceable = shard["file"]

    def end(self, *, complete: bool) -> None:
        """Close the store. Without `complete`, the buffered rows are dropped, to be computed again."""
        try:
            if complete and self._buffered_batches:
                self._write_shard()
            if complete and not self._folder.index.get("complete"):
                self._write_index({**self._folder.index, "complete": True})
        finally:
            self._rows, self._buffered_bytes, self._buffered_batches = {}, 0, 0
            self.is_open = False

    def require_columns(self, rows: Mapping[str, Tensor]) -> None:
        """Raise unless a batch has the columns of the first batch."""
        columns = {
            name: {"dtype": dtype_name(value.dtype), "features": value.shape[-1]}
            for name, value in sorted(rows.items())
            if name not in TOKEN_COLUMNS
        }
        if not columns:
            raise StreamlineError("states={} is empty. Expected at least one column of states. Pass a tensor.")
        expected = self._folder.index["columns"] or columns
        if columns != expected:
            raise StreamlineError(
                f"A batch has the columns {columns}. Expected those of the first batch, {expected}. Write other states "
                "to another folder."
            )
        self._folder.index = {**self._folder.index, "columns": columns}

    def require_space(self, tokens: int, rows: Mapping[str, Tensor]) -> None:
        """Raise if the disk has no space for this number of tokens."""
        needed = tokens * sum(value.shape[1:].numel() * value.element_size() for value in rows.values())
        free = shutil.disk_usage(self._folder.path).free
        if needed > free:
            raise StreamlineError(
                f"The states of {tokens:,} tokens need {needed:,} bytes, but the disk of {self._folder.path} has "
                f"{free:,} free. Expected enough space. Free disk space, record fewer blocks or tokens, or pass "
                "dtype=torch.bfloat16."
            )

    def buffer(self, rows: Mapping[str, Tensor]) -> None:
        """Add the rows of a batch to the buffer, after writing a shard if they would exceed its size."""
        size = sum(value.numel() * value.element_size() for value in rows.values())
        if self._buffered_batches and self._buffered_bytes + size > self._shard_bytes:
            self._write_shard()
        for name, value in rows.items():
            self._rows.setdefault(name, []).append(value)
        self._buffered_bytes += size
        self._buffered_batches += 1

    def _write_shard(self) -> None:
        number = len(self._folder.shards)
        path = self._folder.path / f"shard-{number:05d}.safetensors"
        self._require_sole_writer()
        values = {"fingerprint": self._folder.index["fingerprint"], "shard": number}
        if path.exists() and path.name != self._replaceable:
            require_own_shard(path, values)
        # One column at a time leaves the buffer, so that at most one is in memory twice.
        tensors = {name: torch.cat(self._rows.pop(name)) for name in sorted(self._rows)}
        write_file(path, tensors, values)
        shard = {
            "file": path.name,
            "tokens": len(tensors["tokens"]),
            "batches": self._buffered_batches,
            "bytes": path.stat().st_size,
        }
        self._write_index({**self._folder.index, "complete": False, "shards": [*self._folder.shards, shard]})
        self._rows, self._buffered_bytes, self._buffered_batches = {}, 0, 0

    def _write_index(self, index: dict[str, Any]) -> None:
        write_json(self._folder.path / INDEX, index)
        self._folder.index, self._replaceable = index, ""

    def _require_sole_writer(self) -> None:
        """Raise if the index lists shards that this store has not written."""
        files = [shard["file"] for shard in read_index(self._folder.path).get("shards", [])]
        if [name for name in files if name != self._replaceable] != [shard["file"] for shard in self._folder.shards]:
            raise StreamlineError(
                f"Another process has written to {self._folder.path}. Expected one writer. Stop the other process, and "
                "repeat the call to continue."
            )

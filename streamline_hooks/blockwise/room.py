"""How much the states take, and in which parts they fit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from streamline_hooks.batch import Batch
from streamline_hooks.blockwise.outside import OutsideBlocks
from streamline_hooks.errors import StreamlineError
from streamline_hooks.passes import inference
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.stack import BlockStack


def state_bytes(stack: BlockStack, batches: Sequence[Batch | Tensor]) -> list[int]:
    """Bytes that the states of each batch take at one place."""
    record = HiddenStateRecorder(stack.model, [0], outputs=False, stop=True, stack=stack.path)
    first, outside = batches[0], OutsideBlocks(stack)
    with inference(stack.model), record:
        record(**({"input_ids": first} if isinstance(first, Tensor) else first))
    outside.restore()
    state = record.inputs[0][0]
    each = state.numel() * state.element_size() // _places_of(first)
    return [each * _places_of(batch) for batch in batches]


def _places_of(batch: Batch | Tensor) -> int:
    """Tokens of a batch, padding included."""
    given = batch if isinstance(batch, Tensor) else next(v for v in batch.values() if isinstance(v, Tensor))
    return given.shape[0] * given.shape[1]


def parts_of(sizes: Sequence[int], disk: int | None) -> list[list[int]]:
    """The numbers of consecutive batches whose states fit together, at least one a part."""
    parts: list[list[int]] = [[]]
    for k, size in enumerate(sizes):
        if parts[-1] and disk is not None and sum(sizes[j] for j in parts[-1]) + size > disk:
            parts.append([])
        parts[-1].append(k)
    largest = max(sizes)
    if disk is not None and largest > disk:
        raise StreamlineError(
            f"disk={disk:,} bytes are too few: the states of the largest batch at all places take {largest:,}. Allow "
            "as much, or make smaller batches."
        )
    return parts


def rows_of(sequences: int, size: int, memory: int) -> Iterator[slice]:
    """As many sequences at once as may be in memory at all places, one at least."""
    at_once = max(1, memory * sequences // size)
    for start in range(0, sequences, at_once):
        yield slice(start, start + at_once)


def require_room(size: int, memory: int, folder: Path | None) -> None:
    """Raise if there is no room for states of this size on the disk."""
    if folder is None and size <= memory:
        return
    where = Path(tempfile.gettempdir()) if folder is None else folder.resolve()
    there = next(place for place in (where, *where.parents) if place.exists())
    wanted, free = size - (memory if folder is None else 0), shutil.disk_usage(there).free
    if wanted > free:
        raise StreamlineError(
            f"The states take {size:,} bytes, of which {wanted:,} are written to {where}, where {free:,} are free. "
            "Give fewer sequences, name a folder with room, or, for a profile, take parts with disk=."
        )

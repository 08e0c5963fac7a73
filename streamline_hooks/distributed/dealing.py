"""Deal the sequences of batches out to processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from streamline_hooks.distributed.processes import Processes


def dealt(batches: Sequence[Any], processes: Processes) -> list[slice]:
    """Say which sequences of each batch are a process's own.

    All sequences are dealt in their order, one to each process in turn and on from batch to batch, so that of every
    batch, and of all of them together, no process has more than one sequence more than another.

    Parameters
    ----------
    batches : sequence of mapping or torch.Tensor
    processes : Processes

    Returns
    -------
    list of slice
        One a batch; it may be empty.

    Examples
    --------
    >>> import torch
    >>> dealt([torch.ones(3, 8), torch.ones(1, 8)], Processes(rank=1, count=2))
    [slice(1, 3, 2), slice(0, 1, 2)]
    """
    shares, before = [], 0
    for batch in batches:
        rows = sequences_of(batch)
        shares.append(slice(min((processes.rank - before) % processes.count, rows), rows, processes.count))
        before += rows
    return shares


def sequences_of(batch: Tensor | Mapping[str, Any]) -> int:
    """The number of sequences of a batch, which is the length of what tells its tokens."""
    if isinstance(batch, Tensor):
        return len(batch)
    named = batch.get("input_ids")
    return len(named if isinstance(named, Tensor) else next(v for v in batch.values() if isinstance(v, Tensor)))


def some_of(batch: Any, rows: slice) -> Any:
    """Some of the sequences of a batch; what is not as long as it has sequences stays as it is.

    Positions that count several a token have their sequences on the second axis (Qwen2-VL and its kin).
    """
    if isinstance(batch, Tensor):
        return batch[rows]
    whole = sequences_of(batch)

    def cut(name: str, value: Any) -> Any:
        if name == "position_ids" and isinstance(value, Tensor) and value.ndim == 3:
            return value[:, rows] if value.shape[1] == whole else value
        return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == whole else value

    return {name: cut(name, value) for name, value in batch.items()}

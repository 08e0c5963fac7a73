"""Distribute data among the ranks of a distributed run, and raise errors of one rank on all ranks.

The collectives call `torch.distributed` directly. Accelerate's `gather_object` and `broadcast_object_list` depend on
`PartialState`, which reads environment variables: in a Gloo group that the caller created it reports one process, and
the two functions then return the object of this rank only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from streamline_hooks.core.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.core.hashing import batches_digest

_T = TypeVar("_T")
_SINGLE_PROCESS: ContextVar[bool] = ContextVar("alone", default=False)
_DEPTH: ContextVar[int] = ContextVar("depth", default=0)  # number of nested steps


@dataclass(frozen=True)
class Processes:
    """The rank of a process and the world size."""

    rank: int = 0
    count: int = 1

    def shard(self, items: Sequence[_T]) -> list[_T]:
        """Return every `count`-th item, starting at `rank`; the shares of the ranks are disjoint and complete."""
        return list(items)[self.rank :: self.count]


def current_processes() -> Processes:
    """Return the rank and world size of the default process group.

    Without an initialized group, and inside `single_process`, there is one process.
    """
    distributed = torch.distributed
    if _SINGLE_PROCESS.get() or not (distributed.is_available() and distributed.is_initialized()):
        return Processes()
    return Processes(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def single_process() -> Iterator[None]:
    """Ignore the process group inside the context, for work that only one rank does."""
    token = _SINGLE_PROCESS.set(True)
    try:
        yield
    finally:
        _SINGLE_PROCESS.reset(token)


def shard_rows(batches: Sequence[Any], processes: Processes) -> list[slice]:
    """Return the rows of each batch that a rank runs, one slice per batch.

    Rows are distributed round-robin across batches, so the ranks differ by at most one row per batch and in total.
    Accelerate's `split_between_processes` splits each batch separately and gives rank 0 the odd row of every batch.
    """
    shares, preceding = [], 0
    for batch in batches:
        rows = batch_rows(batch)
        shares.append(slice(min((processes.rank - preceding) % processes.count, rows), rows, processes.count))
        preceding += rows
    return shares


def batch_rows(batch: Tensor | Mapping[str, Any]) -> int:
    """Return the number of rows of a batch, read from ``input_ids`` or from its first tensor."""
    if isinstance(batch, Tensor):
        return len(batch)
    ids = batch.get("input_ids")
    return len(ids if isinstance(ids, Tensor) else next(v for v in batch.values() if isinstance(v, Tensor)))


def select_rows(batch: Any, rows: slice) -> Any:
    """Return a slice of a batch's rows; values without one entry per row are unchanged.

    ``position_ids`` with three dimensions (Qwen2-VL) have the rows on the second axis. If ``image_grid_thw`` has one
    image per row, ``pixel_values`` contains the concatenated patches of all images.
    """
    if isinstance(batch, Tensor):
        return batch[rows]
    row_count = batch_rows(batch)
    grid = batch.get("image_grid_thw")
    ends = grid.prod(dim=1).cumsum(dim=0).tolist() if isinstance(grid, Tensor) and len(grid) == row_count else []

    def select(name: str, value: Any) -> Any:
        if name == "position_ids" and isinstance(value, Tensor) and value.ndim == 3:
            return value[:, rows] if value.shape[1] == row_count else value
        if name == "pixel_values" and ends and isinstance(value, Tensor) and len(value) == ends[-1]:
            bounds = [0, *ends]
            patches = [value[bounds[row] : bounds[row + 1]] for row in range(*rows.indices(row_count))]
            return torch.cat(patches) if patches else value[:0]
        return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == row_count else value

    return {name: select(name, value) for name, value in batch.items()}


class DistributedStep:
    """A named step that all ranks execute, see `distributed_step`, and its collectives.

    Each collective raises `StreamlineError` on every rank if a rank has failed, has ended, or is at a different step.
    """

    def __init__(self, what: str, processes: Processes) -> None:
        self.what, self.processes = what, processes
        self._note = ""

    def shard(self, items: Sequence[_T], shard: bool = True, **same: Any) -> list[_T]:
        """Return this rank's share of the items; raise on every rank if the ranks received different items.

        Parameters
        ----------
        items : sequence
            Batches, or tuples that contain a batch.
        shard : bool
            Whether every rank received all items. If False, the items are already this rank's share.
        **same
            Other values whose text must be equal on all ranks.
        """
        rank, count = self.processes.rank, self.processes.count
        if count == 1:
            return list(items)
        local_values = {
            "batches": batches_digest(items) if shard else "not shared",
            **{name: str(v) for name, v in same.items()},
        }
        first, *other_ranks = self.all_gather_object(local_values)
        for other, other_values in enumerate(other_ranks, 1):
            if differ := [f"{k} ({v} and {other_values.get(k)})" for k, v in first.items() if v != other_values.get(k)]:
                error = StreamlineError(
                    f"Processes 0 and {other} of {count} call {self.what} with different {', '.join(differ)}. "
                    "Expected the same model, arguments and batches in every process; each process selects its share "
                    "of the batches. If the processes have different batches, pass shard=False in all of them."
                )
                raise _reported(error)
        if not shard:
            return list(items)
        self._note = f" (its batch n is batch {count}n{f' + {rank}' if rank else ''} of all)"
        return self.processes.shard(items)

    def all_gather_object(self, value: _T) -> list[_T]:
        """Gather an object from every rank and return the objects in the order of the ranks."""
        return self._exchange(value) if self.processes.count > 1 else [value]

    def broadcast_object(self, make: Callable[[], _T]) -> _T:
        """Call a function on rank 0 inside `single_process`, and broadcast its pickled result."""
        if self.processes.count == 1:
            return make()
        result: list[Any] = [None]
        if self.processes.rank == 0:
            with single_process():
                result = [make()]
        self.all_gather_object(None)  # raises on all ranks if `make` failed on rank 0
        self._guarded(lambda: torch.distributed.broadcast_object_list(result, src=0))
        value: _T = result[0]
        return value

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast tensors from rank 0 in place; shapes and dtypes must be equal on all ranks."""
        if self.processes.count == 1:
            return
        self.all_gather_object(None)
        for tensor in tensors:
            target = tensor.detach()
            buffer = target.to(collective_device(target.device)).contiguous()
            self._guarded(partial(torch.distributed.broadcast, buffer, src=0))
            if buffer is not target:
                target.copy_(buffer)

    def all_reduce(self, values: Tensor, operation: Literal["SUM", "MAX"] = "SUM") -> Tensor:
        """Reduce a tensor over all ranks and return the result; the input may be overwritten.

        The result is reduced on rank 0 and broadcast, so it is bitwise equal on all ranks.
        `torch.distributed.all_reduce` does not guarantee this, and ranks that choose differently between nearly equal
        values would diverge.
        """
        if self.processes.count == 1:
            return values
        self.all_gather_object(None)
        buffer = values.detach().to(collective_device(values.device)).contiguous()
        reduce_op = getattr(torch.distributed.ReduceOp, operation)
        self._guarded(partial(torch.distributed.reduce, buffer, dst=0, op=reduce_op))
        self._guarded(partial(torch.distributed.broadcast, buffer, src=0))
        return buffer.to(values.device)

    def fail(self, error: Exception, depth: int) -> None:
        """Report the failure of this rank, so that all ranks raise, unless it was already reported."""
        reported: int | None = getattr(error, _REPORTED, None)
        if self.processes.count > 1 and (reported is None or depth < reported):
            try:
                self._exchange(None, Failure.of(error, depth, self._note if reported is None else ""))
            except StreamlineError as combined:
                raise combined from error

    def _exchange(self, value: Any, failure: Failure | None = None) -> list[Any]:
        gathered: list[Any] = [None] * self.processes.count
        self._guarded(lambda: torch.distributed.all_gather_object(gathered, (self.what, failure, value)))
        failures = {rank: failed for rank, (_, failed, _) in enumerate(gathered) if failed is not None}
        steps = [step for step, _, _ in gathered]
        if failures:
            depth = min(failed.depth for failed in failures.values())
            raise _reported(combined_failure(failures, self.processes.count), depth)
        if len(set(steps)) > 1:
            error = StreamlineError(
                f"The processes are not at the same step: {', '.join(f'{r} at {s}' for r, s in enumerate(steps))}. "
                "Every process must make the same calls in the same order. Put work that only one process does into "
                "streamline_hooks.core.single_process()."
            )
            raise _reported(error)
        return [value for _, _, value in gathered]

    def _guarded(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:  # raised by every backend if a peer has ended, and on a time-out
            lost = StreamlineError(
                f"Process {self.processes.rank} of {self.processes.count} has lost the others in {self.what}: "
                f"{str(error).strip().splitlines()[0]}. Another process has ended, hangs, or did not call {self.what}. "
                "Read the output of the other processes and restart all of them. Put work that only one process does "
                "into streamline_hooks.core.single_process()."
            )
            raise _reported(lost) from error


@contextmanager
def distributed_step(what: str) -> Iterator[DistributedStep]:
    """Execute a step on all ranks, so that an exception on one rank raises on every rank; also a decorator.

    The other ranks raise a StreamlineError that names the failed rank at their next collective. A collective must
    therefore follow the code that may fail, in this step or in an enclosing step. A KeyboardInterrupt is not reported;
    the other ranks detect that the process has ended. With one process, exceptions are unchanged.
    """
    step, depth = DistributedStep(what, current_processes()), _DEPTH.get() + 1
    token = _DEPTH.set(depth)
    try:
        yield step
    except Exception as error:
        step.fail(error, depth)
        raise
    finally:
        _DEPTH.reset(token)


class Failure(NamedTuple):
    """The error of a rank as sent to the other ranks; `note` follows the rank in the message."""

    text: str
    unsupported: bool = False
    cause: str = ""
    note: str = ""
    depth: int = 1

    @classmethod
    def of(cls, error: Exception, depth: int = 1, note: str = "") -> Failure:
        """Describe an exception."""
        text = str(error) if isinstance(error, StreamlineError) else f"{type(error).__name__}: {error}"
        return cls(text, isinstance(error, UnsupportedSurgery), getattr(error, "cause", ""), note, depth)


def combined_failure(failures: Mapping[int, Failure], count: int) -> StreamlineError:
    """Combine the failures of ranks into the exception that every rank raises."""
    first = next(iter(failures.values()))
    text = " ".join(f"Process {rank} of {count}{failed.note}: {failed.text}" for rank, failed in failures.items())
    # Notes are compared too, because batch 1 differs between the ranks.
    if len(failures) == count and all((f.text, f.note) == (first.text, first.note) for f in failures.values()):
        text = first.text
    unsupported = all(failed.unsupported for failed in failures.values())
    return UnsupportedSurgery(text, first.cause) if unsupported else StreamlineError(text)


_REPORTED = "_streamline_reported"


def _reported(error: StreamlineError, depth: int = 0) -> StreamlineError:
    """Mark an error as reported for steps at this depth or deeper.

    If a rank fails in an outer step, the other ranks receive the failure in an inner step. They must not report it
    again while they leave the inner step, because no rank waits for that report.
    """
    setattr(error, _REPORTED, depth)
    return error


def collective_device(home: torch.device) -> torch.device:
    """Return a device that the process group supports: the device of the values, the CPU, or the group's device."""
    devices = [part.partition(":")[0] for part in str(torch.distributed.get_backend_config()).split(",")]
    if home.type in devices:
        return home
    return torch.device("cpu" if "cpu" in devices else devices[0])

"""The ranks of a distributed run: which one this is, what part of the data it runs, and steps that fail together.

The collectives are those of `torch.distributed`. Accelerate's `gather_object` and `broadcast_object_list` call the same
two functions, but only after asking `PartialState`, which goes by environment variables: in a gloo group that the
caller has made it reports one process, and they return this rank's object as if it were the only one.
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

from streamline_hooks.digests import batches_digest
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery

_T = TypeVar("_T")
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)
_DEPTH: ContextVar[int] = ContextVar("depth", default=0)  # of steps inside steps


@dataclass(frozen=True)
class Processes:
    """The rank of a process and the number of ranks.

    Attributes
    ----------
    rank : int
        From 0.
    count : int
        The world size.

    Examples
    --------
    >>> Processes(rank=1, count=2).share(["a", "b", "c", "d", "e"])
    ['b', 'd']
    """

    rank: int = 0
    count: int = 1

    def share(self, items: Sequence[_T]) -> list[_T]:
        """Return this rank's items: each item belongs to exactly one rank, and shares differ by one item at most."""
        return list(items)[self.rank :: self.count]


def here() -> Processes:
    """Return the rank and world size of the default process group.

    Without an initialised group, and inside `alone`, there is one process.

    Examples
    --------
    >>> here()
    Processes(rank=0, count=1)
    """
    distributed = torch.distributed
    if _ALONE.get() or not (distributed.is_available() and distributed.is_initialized()):
        return Processes()
    return Processes(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def alone() -> Iterator[None]:
    """Ignore the process group: for work that only one rank does.

    Examples
    --------
    >>> with alone():
    ...     here().count
    1
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def shard_rows(batches: Sequence[Any], processes: Processes) -> list[slice]:
    """Return the rows of each batch that a rank runs.

    Rows are dealt in turn, on from batch to batch, so that neither in one batch nor in all together a rank has more
    than one row more than another. (`split_between_processes` of Accelerate splits each batch by itself, which gives
    rank 0 the odd row of every batch.)

    Parameters
    ----------
    batches : sequence of mapping or torch.Tensor
    processes : Processes

    Returns
    -------
    list of slice
        One per batch; it may be empty.

    Examples
    --------
    >>> import torch
    >>> shard_rows([torch.ones(3, 8), torch.ones(1, 8)], Processes(rank=1, count=2))
    [slice(1, 3, 2), slice(0, 1, 2)]
    """
    shares, before = [], 0
    for batch in batches:
        rows = sequences_of(batch)
        shares.append(slice(min((processes.rank - before) % processes.count, rows), rows, processes.count))
        before += rows
    return shares


def sequences_of(batch: Tensor | Mapping[str, Any]) -> int:
    """Return the number of rows of a batch: the length of its ``input_ids``, or of its first tensor."""
    if isinstance(batch, Tensor):
        return len(batch)
    named = batch.get("input_ids")
    return len(named if isinstance(named, Tensor) else next(v for v in batch.values() if isinstance(v, Tensor)))


def some_of(batch: Any, rows: slice) -> Any:
    """Return some rows of a batch; values that are not one per row stay as they are.

    ``position_ids`` of three dimensions (Qwen2-VL) have their rows on the second axis.
    """
    if isinstance(batch, Tensor):
        return batch[rows]
    whole = sequences_of(batch)

    def cut(name: str, value: Any) -> Any:
        if name == "position_ids" and isinstance(value, Tensor) and value.ndim == 3:
            return value[:, rows] if value.shape[1] == whole else value
        return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == whole else value

    return {name: cut(name, value) for name, value in batch.items()}


class DistributedStep:
    """A step that all ranks do, see `distributed_step`, and the collectives in it.

    Each collective raises `StreamlineError` on every rank if one of them has failed, is at another step, or is gone.

    Parameters
    ----------
    what : str
        The name of the step, the same on every rank.
    processes : Processes
    """

    def __init__(self, what: str, processes: Processes) -> None:
        self.what, self.processes = what, processes
        self._note = ""

    def take(self, items: Sequence[_T], share: bool = True, **same: Any) -> list[_T]:
        """Return this rank's part of the items, after checking that the ranks agree.

        Parameters
        ----------
        items : sequence
            Batches, or tuples of a batch and what belongs to it.
        share : bool
            Whether every rank was given all items and takes its share; otherwise they are its own already.
        **same
            What else has to be equal on every rank, by name; compared as text.

        Raises
        ------
        StreamlineError
            On every rank, if something differs.
        """
        rank, count = self.processes.rank, self.processes.count
        if count == 1:
            return list(items)
        mine = {"batches": batches_digest(items) if share else "its own", **{name: str(v) for name, v in same.items()}}
        first, *others = self.all_gather_object(mine)
        for other, its in enumerate(others, 1):
            if differ := [
                f"{name} ({first[name]} and {its.get(name)})" for name in first if first[name] != its.get(name)
            ]:
                error = StreamlineError(
                    f"Processes 0 and {other} of {count} call {self.what} with different {', '.join(differ)}. Give "
                    "every process the same model and arguments, and all batches, of which it takes its share; or "
                    "share=False in all of them, where each has batches of its own."
                )
                raise _reported(error)
        if not share:
            return list(items)
        self._note = f" (its batch n is batch {count}n{f' + {rank}' if rank else ''} of all)"
        return self.processes.share(items)

    def all_gather_object(self, mine: _T) -> list[_T]:
        """Gather an object from every rank; return them by rank."""
        return self._exchange(mine) if self.processes.count > 1 else [mine]

    def broadcast_object(self, make: Callable[[], _T]) -> _T:
        """Call a function on rank 0, inside `alone`, and broadcast what it returns, by pickle."""
        if self.processes.count == 1:
            return make()
        made: list[Any] = [None]
        if self.processes.rank == 0:
            with alone():
                made = [make()]
        self.all_gather_object(None)  # raises where `make` failed
        self._guarded(lambda: torch.distributed.broadcast_object_list(made, src=0))
        return made[0]

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast tensors from rank 0, in place; shapes and dtypes are the same on every rank."""
        if self.processes.count == 1:
            return
        self.all_gather_object(None)
        for tensor in tensors:
            home = tensor.detach()
            sent = home.to(collective_device(home.device)).contiguous()
            self._guarded(partial(torch.distributed.broadcast, sent, src=0))
            if sent is not home:
                home.copy_(sent)

    def all_reduce(self, values: Tensor, operation: Literal["SUM", "MAX"] = "SUM") -> Tensor:
        """Reduce a tensor over the ranks and return the result, the same bits on every rank.

        The tensor that is given may be overwritten. Rank 0 makes the sum and broadcasts it:
        `torch.distributed.all_reduce` gives the same bits everywhere in practice but does not promise it, and a choice
        between near equals would separate the ranks for good.
        """
        if self.processes.count == 1:
            return values
        self.all_gather_object(None)
        sent = values.detach().to(collective_device(values.device)).contiguous()
        kind = getattr(torch.distributed.ReduceOp, operation)
        self._guarded(partial(torch.distributed.reduce, sent, dst=0, op=kind))
        self._guarded(partial(torch.distributed.broadcast, sent, src=0))
        return sent.to(values.device)

    def fail(self, error: Exception, depth: int) -> None:
        """Raise on every rank because this one fails, unless all know it already or there is one process."""
        reported: int | None = getattr(error, _REPORTED, None)
        if self.processes.count > 1 and (reported is None or depth < reported):
            try:
                self._exchange(None, Failure.of(error, depth, self._note if reported is None else ""))
            except StreamlineError as told:
                raise told from error

    def _exchange(self, mine: Any, failure: Failure | None = None) -> list[Any]:
        gathered: list[Any] = [None] * self.processes.count
        self._guarded(lambda: torch.distributed.all_gather_object(gathered, (self.what, failure, mine)))
        failures = {rank: failed for rank, (_, failed, _) in enumerate(gathered) if failed is not None}
        steps = [step for step, _, _ in gathered]
        if failures:
            depth = min(failed.depth for failed in failures.values())
            raise _reported(failure_of_all(failures, self.processes.count), depth)
        if len(set(steps)) > 1:
            error = StreamlineError(
                f"The processes are not at the same step: {', '.join(f'{r} at {s}' for r, s in enumerate(steps))}. "
                "Every process has to make the same calls in the same order; what only one is to do goes into "
                "streamline_hooks.distributed.alone()."
            )
            raise _reported(error)
        return [value for _, _, value in gathered]

    def _guarded(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:  # what every backend raises for a peer that is gone, and for a time-out
            lost = StreamlineError(
                f"Process {self.processes.rank} of {self.processes.count} has lost the others in {self.what}: "
                f"{str(error).strip().splitlines()[0]}. One of them has ended or hangs, or did not call {self.what} at "
                "all (what only one is to do goes into streamline_hooks.distributed.alone()). See what the others "
                "wrote, and start all of them again."
            )
            raise _reported(lost) from error


@contextmanager
def distributed_step(what: str) -> Iterator[DistributedStep]:
    """Do a step on all ranks, so that an exception on one rank raises on every rank; also a decorator.

    Parameters
    ----------
    what : str
        The name of the step.

    Yields
    ------
    DistributedStep
        An exception is reported at the next collective of the other ranks, so at least one has to follow the part that
        may fail, in this step or in one around it. Exceptions that are no `Exception`, such as KeyboardInterrupt, are
        not reported: such a process ends, which the others notice.

    Raises
    ------
    StreamlineError
        On every rank, naming the one that failed and why; with one process, whatever was raised.

    Examples
    --------
    >>> import torch
    >>> with distributed_step("count") as work:
    ...     mine = work.take([[1.0, 2.0], [3.0]])
    ...     total = torch.tensor(sum(map(sum, mine)))
    ...     work.all_reduce(total).item()
    6.0
    """
    work, depth = DistributedStep(what, here()), _DEPTH.get() + 1
    token = _DEPTH.set(depth)
    try:
        yield work
    except Exception as error:
        work.fail(error, depth)
        raise
    finally:
        _DEPTH.reset(token)


class Failure(NamedTuple):
    """Why a rank cannot go on, as it is sent to the others; `note` follows its number."""

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


def failure_of_all(failures: Mapping[int, Failure], count: int) -> StreamlineError:
    """Return the exception that every rank raises, given the failures by rank.

    It is an `UnsupportedSurgery` if all of them are; if all ranks failed alike, their text is said once.

    Examples
    --------
    >>> str(failure_of_all({1: Failure("No text.")}, 2))
    'Process 1 of 2: No text.'
    """
    alike = {
        (failed.text, failed.note) for failed in failures.values()
    }  # by their notes too: batch 1 is another batch in each share
    if len(alike) == 1 and len(failures) == count:
        text = next(iter(failures.values())).text
    else:
        text = " ".join(f"Process {rank} of {count}{failed.note}: {failed.text}" for rank, failed in failures.items())
    if all(failed.unsupported for failed in failures.values()):
        return UnsupportedSurgery(text, next(iter(failures.values())).cause)
    return StreamlineError(text)


_REPORTED = "_streamline_reported"


def _reported(error: StreamlineError, depth: int = 0) -> StreamlineError:
    """Note the depth from which on a step must not report this error again, since some rank has left it.

    If one step is inside another, a rank that fails in the outer one is heard by the others in the inner one. While
    these leave the inner one nobody is left to report to.
    """
    setattr(error, _REPORTED, depth)
    return error


def collective_device(home: torch.device) -> torch.device:
    """Return where the process group works: the device of the values if possible, else the CPU or its own device."""
    devices = [part.partition(":")[0] for part in str(torch.distributed.get_backend_config()).split(",")]
    if home.type in devices:
        return home
    return torch.device("cpu" if "cpu" in devices else devices[0])

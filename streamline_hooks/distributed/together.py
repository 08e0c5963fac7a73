"""One piece of work that several processes share: what they tell one another, and how they fail together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from streamline_hooks.digests import batches_digest
from streamline_hooks.distributed.processes import Processes, alone, here
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery

_T = TypeVar("_T")
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Failure(NamedTuple):
    """Why a process cannot go on, as the others are told."""

    text: str
    unsupported: bool = False
    cause: str = ""
    note: str = ""

    @classmethod
    def of(cls, error: Exception, note: str = "") -> Failure:
        """Tell of an exception; `note` is what is said of the process, after its number."""
        if isinstance(error, UnsupportedSurgery):
            return cls(str(error), True, error.cause, note)
        text = str(error) if isinstance(error, StreamlineError) else f"{type(error).__name__}: {error}"
        return cls(text, note=note)


class Together:
    """Work that every process of a group does a part of; made by `together`.

    Parameters
    ----------
    what : str
        What is done, which every process has to be at.
    processes : Processes
    """

    def __init__(self, what: str, processes: Processes) -> None:
        self.what, self.processes = what, processes
        self._ended = processes.count == 1  # whether the others know, or there are none
        self._note = ""

    def take(self, items: Sequence[_T], share: bool = True, **same: Any) -> list[_T]:
        """Give this process's part of the items, once it is sure that all processes speak of the same.

        Parameters
        ----------
        items : sequence
            Batches, or tuples of a batch and what belongs to it.
        share : bool
            Whether every process was given all items, and takes its share; else they are its own already.
        **same
            What else has to be the same in every process, by name; compared by its text.

        Raises
        ------
        StreamlineError
            In every process, if something differs.
        """
        rank, count = self.processes.rank, self.processes.count
        if count == 1:
            return list(items)
        mine = {"batches": batches_digest(items) if share else "its own", **{name: str(v) for name, v in same.items()}}
        first, *others = self.tell(mine)
        for other, its in enumerate(others, 1):
            self._require_same(first, other, its)
        if not share:
            return list(items)
        self._note = f" (its batch n is batch {count}n{f' + {rank}' if rank else ''} of all)"
        return self.processes.share(items)

    def tell(self, mine: _T) -> list[_T]:
        """Tell the others something, and give what each of them told, by rank.

        Raises
        ------
        StreamlineError
            In every process, if one of them has failed, is at something else, or is gone.
        """
        if self.processes.count == 1:
            return [mine]
        return self._exchange(None, mine)

    def of_first(self, make: Callable[[], _T]) -> _T:
        """Let the first process make something by itself, and give it to all; the others wait for it.

        Parameters
        ----------
        make : callable
            Called in the first process only, inside `alone`. What it gives is sent as it is pickled.

        Raises
        ------
        StreamlineError
            In every process, as `tell`; so if `make` raises.
        """
        if self.processes.count == 1:
            return make()
        if self.processes.rank == 0:
            with alone():
                made = [make()]
        else:
            made = [None]  # type: ignore[list-item]
        self.tell(None)  # from here on nothing fails
        self._guarded(lambda: torch.distributed.broadcast_object_list(made, src=0))
        return made[0]

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors, in place, the values that they have in the first process; shapes and dtypes are the same."""
        if self.processes.count > 1:
            for tensor in tensors:
                self._in_place(tensor, lambda sent: torch.distributed.broadcast(sent, src=0))

    def fail(self, error: Exception) -> None:
        """Tell the others that this process cannot go on, which raises in all of them; in the only one do nothing."""
        if not self._ended and self.what not in _known_at(error):
            self._exchange(Failure.of(error, self._note), None)

    def summed(self, values: Tensor) -> Tensor:
        """Add tensors of one shape and dtype up over the processes; every process gets the same bits.

        The sum is made by one process and sent to the others. An all-reduce gives the same bits everywhere in practice
        but does not promise to, and a choice between near equals would part the processes for good.
        """
        return self._reduced(values, "SUM")

    def largest(self, values: Tensor) -> Tensor:
        """Give the greatest values over the processes; see `summed`."""
        return self._reduced(values, "MAX")

    def add_up(self, values: Tensor) -> None:
        """Do as `summed` in place, and on the tensor's own device where the process group works there."""
        if self.processes.count > 1:
            self._in_place(values, lambda sent: _to_first_and_back(sent, "SUM"))

    def _require_same(self, first: Mapping[str, str], other: int, its: Mapping[str, str]) -> None:
        differ = [f"{name} ({first[name]} and {its.get(name)})" for name in first if first[name] != its.get(name)]
        if differ:
            self._ended = True
            raise StreamlineError(
                f"Processes 0 and {other} of {self.processes.count} call {self.what} with different "
                f"{', '.join(differ)}. Give every process the same model and arguments, and all batches, of which it "
                "takes its share; or share=False in all of them, where each has batches of its own."
            )

    def _exchange(self, failure: Failure | None, mine: Any) -> list[Any]:
        everybody: list[Any] = [None] * self.processes.count
        self._guarded(lambda: torch.distributed.all_gather_object(everybody, (self.what, failure, mine)))
        steps = [step for step, _, _ in everybody]
        failures = {rank: failed for rank, (_, failed, _) in enumerate(everybody) if failed is not None}
        if failures:
            self._ended = True
            raise _known(failure_of_all(failures, self.processes.count), {steps[rank] for rank in failures})
        if len(set(steps)) > 1:
            self._ended = True
            error = StreamlineError(
                f"The processes are not at the same step: {', '.join(f'{r} at {s}' for r, s in enumerate(steps))}. "
                "Every process has to make the same calls in the same order; what only one is to do goes into "
                "streamline_hooks.distributed.alone()."
            )
            raise _known(error, _EVERYWHERE)
        return [told for _, _, told in everybody]

    def _reduced(self, values: Tensor, operation: str) -> Tensor:
        if self.processes.count == 1:
            return values
        sent = values.detach().to(collective_device(values.device), copy=True).contiguous()
        self._guarded(lambda: _to_first_and_back(sent, operation))
        return sent.to(values.device)

    def _in_place(self, values: Tensor, collective: Callable[[Tensor], Any]) -> None:
        home = values.detach()
        sent = home.to(collective_device(home.device, stay=True)).contiguous()
        self._guarded(lambda: collective(sent))
        if sent is not home:
            home.copy_(sent)

    def _guarded(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:  # what every backend raises for a peer that is gone, and for a time-out
            self._ended = True
            lost = StreamlineError(
                f"Process {self.processes.rank} of {self.processes.count} has lost the others in {self.what}: "
                f"{str(error).strip().splitlines()[0]}. One of them has ended or hangs, or did not call {self.what} at "
                "all (what only one is to do goes into streamline_hooks.distributed.alone()). See what the others "
                "wrote, and start all of them again."
            )
            raise _known(lost, _EVERYWHERE) from error


@contextmanager
def together(what: str) -> Iterator[Together]:
    """Do a part of something that all processes do, so that all of them fail if one does.

    Parameters
    ----------
    what : str
        What is done.

    Yields
    ------
    Together
        Whatever is raised inside is told to the others when they next exchange something, which they have to do once
        after the part that may fail, be it in a step inside this one. Only an exception that is no `Exception`, such as
        Ctrl-C, is not told: such a process ends, which the others notice.

    Raises
    ------
    StreamlineError
        In every process, naming the one that failed and why; with one process, whatever was raised.

    Examples
    --------
    >>> import torch
    >>> with together("count") as work:
    ...     mine = work.take([[1.0, 2.0], [3.0]])
    ...     total = torch.tensor(sum(map(sum, mine)))
    ...     _ = work.tell("done")  # from here on nothing fails
    ...     work.summed(total).item()
    6.0
    """
    work = Together(what, here())
    try:
        yield work
    except Exception as error:
        try:
            work.fail(error)
        except StreamlineError as told:
            raise told from error
        raise


def failing_together(what: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make a function one step, see `together`: if it raises in one process, it does so in all.

    Inside it, ``Together(what, here())`` is what the processes exchange something by.

    Examples
    --------
    >>> @failing_together("halve")
    ... def halve(number):
    ...     return Together("halve", here()).of_first(lambda: number / 2)
    >>> halve(3)
    1.5
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with together(what):
                return function(*args, **kwargs)

        return run

    return decorate


def failure_of_all(failures: Mapping[int, Failure], count: int) -> StreamlineError:
    """Say what all processes raise where some have failed.

    Parameters
    ----------
    failures : mapping of int to Failure
        By rank.
    count : int
        How many processes there are.

    Returns
    -------
    StreamlineError
        An `UnsupportedSurgery` if that is what each of them raised. Where all failed alike, in their own words.

    Examples
    --------
    >>> str(failure_of_all({1: Failure("No text.")}, 2))
    'Process 1 of 2: No text.'
    """
    alike = set(failures.values())  # by their notes too: batch 1 is another batch in each share
    if len(alike) == 1 and len(failures) == count:
        text = next(iter(alike)).text
    else:
        text = " ".join(f"Process {rank} of {count}{failed.note}: {failed.text}" for rank, failed in failures.items())
    if all(failed.unsupported for failed in failures.values()):
        return UnsupportedSurgery(text, next(iter(failures.values())).cause)
    return StreamlineError(text)


_KNOWN = "_streamline_known_at"


class _Everywhere(frozenset[str]):
    """Contains any step."""

    def __contains__(self, step: object) -> bool:
        return True


_EVERYWHERE = _Everywhere()


def _known(error: StreamlineError, steps: Set[str]) -> StreamlineError:
    """Note at which steps an error needs no telling any more: those at which a process that raised it has left them.

    Where one step is inside another, a process that fails in the outer one is heard by the others in the inner one.
    They must not tell the outer one of it then: nobody is there any more.
    """
    setattr(error, _KNOWN, steps)
    return error


def _known_at(error: Exception) -> Set[str]:
    steps: Set[str] = getattr(error, _KNOWN, frozenset())
    return steps


def _to_first_and_back(values: Tensor, operation: str) -> None:
    distributed = torch.distributed
    distributed.reduce(values, dst=0, op=getattr(distributed.ReduceOp, operation))
    distributed.broadcast(values, src=0)


def collective_device(home: torch.device, stay: bool = False) -> torch.device:
    """Where the process group works: on the CPU where it can, else where the values are, or on its own device.

    With `stay` it is where the values are, if it works there.
    """
    devices = [part.partition(":")[0] for part in str(torch.distributed.get_backend_config()).split(",")]
    if stay and home.type in devices:
        return home
    if "cpu" in devices:
        return torch.device("cpu")
    return home if home.type in devices else torch.device(devices[0])

"""Which part of the text one of several processes trains on, and how their gradients become one.

Every rank holds all that is trained and runs its rows of every batch; the gradients are added up once a step.
`DistributedDataParallel`, and so Accelerate's loop, cannot do that here: it averages gradients only of a backward pass
that follows the wrapper's own forward, and otherwise leaves each rank its own without an error. A step runs parts of
the model, and on some ranks fewer forwards than on others. If one rank fails, the others wait for a timeout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.distributed import DistributedStep, Processes, sequences_of, shard_rows, some_of
from streamline_hooks.repair.teacher import Taught


@dataclass(frozen=True)
class Share:
    """What one process runs of a list of batches.

    Attributes
    ----------
    batches : dict of int to batch
        By the batch's number, its sequences that are run here.
    rows : dict of int to slice
        Which these are.
    idle : frozenset of int
        The batches of which a sequence is run that counts for nothing, since another process counts it.
    """

    batches: dict[int, Any]
    rows: dict[int, slice]
    idle: frozenset[int] = frozenset()

    @classmethod
    def whole(cls, batches: Sequence[Batch | Tensor]) -> Share:
        """All of them."""
        return cls(dict(enumerate(batches)), {n: slice(None) for n in range(len(batches))})

    @classmethod
    def of(cls, batches: Sequence[Batch | Tensor], processes: Processes, every: bool = False) -> Share:
        """A process's sequences, see `shard_rows`.

        Parameters
        ----------
        batches : sequence of mapping or torch.Tensor
        processes : Processes
        every : bool
            Whether each process has to run something of every batch, since its forwards wait for those of the others.
        """
        if processes.count == 1:
            return cls.whole(batches)
        rows = dict(enumerate(shard_rows(batches, processes)))
        idle = [n for n, its in rows.items() if its.start == its.stop]
        for n in idle:
            if every:
                rows[n] = slice(0, 1)
            else:
                del rows[n]
        return cls({n: some_of(batches[n], its) for n, its in rows.items()}, rows, frozenset(idle if every else ()))

    def of_taught(self, taught: Sequence[Taught]) -> list[Taught]:
        """The same part of what the original does on all batches."""
        return [taught[n].rows(its) for n, its in self.rows.items()]

    @property
    def longest(self) -> int:
        """The most sequences of one batch."""
        return max((sequences_of(batch) for batch in self.batches.values()), default=0)


def add_gradients_up(
    work: DistributedStep, parameters: Mapping[str, nn.Parameter], reached: Sequence[Sequence[bool]]
) -> None:
    """Give every process the sum of the gradients of all, to the same bits.

    Parameters
    ----------
    work : DistributedStep
    parameters : mapping of str to torch.nn.Parameter
    reached : sequence of sequence of bool
        Of each process, whether each parameter has a gradient. One that has none anywhere gets none.
    """
    if work.processes.count == 1:
        return
    wanted = [p for p, *has in zip(parameters.values(), *reached, strict=True) if any(has)]
    kinds = dict.fromkeys((p.dtype, p.device) for p in wanted)
    for kind in kinds:
        alike = [p for p in wanted if (p.dtype, p.device) == kind]
        together = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in alike])
        added = work.all_reduce(together)
        for parameter, part in zip(alike, added.split([p.numel() for p in alike]), strict=True):
            parameter.grad = part.view_as(parameter)

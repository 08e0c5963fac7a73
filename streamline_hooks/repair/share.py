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
    """Rows of batches that one rank runs, by the number of the batch.

    `idle` are batches of which one sequence is run without being counted, since another rank counts it.
    """

    batches: dict[int, Any]
    rows: dict[int, slice]
    idle: frozenset[int] = frozenset()

    @classmethod
    def of(cls, batches: Sequence[Batch | Tensor], processes: Processes, every: bool = False) -> Share:
        """Return the rows of one rank, see `shard_rows`; with `every`, at least one row of each batch."""
        if processes.count == 1:
            return cls(dict(enumerate(batches)), {n: slice(None) for n in range(len(batches))})
        rows = dict(enumerate(shard_rows(batches, processes)))
        idle = [n for n, its in rows.items() if its.start == its.stop]
        for n in idle:
            if every:
                rows[n] = slice(0, 1)
            else:
                del rows[n]
        return cls({n: some_of(batches[n], its) for n, its in rows.items()}, rows, frozenset(idle if every else ()))

    def of_taught(self, taught: Sequence[Taught]) -> list[Taught]:
        """Return the rows of the teacher states of all batches."""
        return [taught[n].rows(its) for n, its in self.rows.items()]

    @property
    def longest(self) -> int:
        """Largest number of sequences in one batch."""
        return max((sequences_of(batch) for batch in self.batches.values()), default=0)


def add_gradients_up(
    work: DistributedStep, parameters: Mapping[str, nn.Parameter], reached: Sequence[Sequence[bool]]
) -> None:
    """Sum gradients over ranks, bit-identically on all; `reached` says per rank which parameters have one."""
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

"""The forwards and backwards of a training: a process's sequences of one batch, in as many parts as memory wants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from streamline_hooks.batch import Batch, real_tokens
from streamline_hooks.distributed import some_of
from streamline_hooks.repair.master_weights import MasterWeights
from streamline_hooks.repair.objective import summed_kl
from streamline_hooks.repair.settings import Training
from streamline_hooks.repair.share import Share
from streamline_hooks.repair.student import Student
from streamline_hooks.repair.teacher import Taught


class Forwards:
    """What a training runs, given what it runs it on.

    Attributes
    ----------
    student : Student
    settings : Training
    weights : MasterWeights
        Where gradients are collected.
    device : torch.device
        Of the model's input.
    share, validation_share : Share
        This process's part of the batches and of the validation.
    taught, validation_taught : dict of int to Taught
        What the original does on them, by the batch's number.
    rows : int
        The most sequences that are run at a time.
    sharded : bool
        Whether every process has to make as many forwards as the others, whatever the memory.
    """

    student: Student
    settings: Training
    weights: MasterWeights
    device: torch.device
    share: Share
    validation_share: Share
    taught: dict[int, Taught]
    validation_taught: dict[int, Taught]
    rows: int
    sharded: bool

    def _backward(self, number: int, tokens: int) -> float:
        total = 0.0
        for taught, batch in self._parts(self.taught[number], self.share.batches[number]):
            loss = self._loss(taught, batch) / tokens
            if number in self.share.idle:
                loss = 0.0 * loss
            loss.backward()
            self.weights.collect()
            total += float(loss.detach())
        return total

    def _loss(self, taught: Taught, batch: Batch | Tensor) -> Tensor:
        """The loss, summed over the real tokens."""
        objective = self.settings.objective
        mask = self._mask(taught, batch)
        with self.settings.products(self.device):
            logits, states = self.student.run(
                taught.entrance, batch, logits=objective.needs_logits, states=objective.needs_states
            )
            original = self._original(taught, batch) if objective.needs_original_logits else None
        loss = objective.of_states(states, [state.to(self.device) for state in taught.after], mask)
        if logits is not None:
            given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
            ids, positions = given.get("input_ids"), given.get("position_ids")
            ids = None if ids is None else ids.to(self.device)
            loss = loss + objective.of_logits(logits, original, ids, mask, positions)
        return loss

    def _original(self, taught: Taught, batch: Batch | Tensor) -> Tensor:
        assert taught.exit is not None
        return self.student.original_logits(taught.exit, batch)

    def _summed_kl(self) -> tuple[float, int]:
        """KL of this process's share of the validation text, summed in float64, and its real tokens."""
        total, tokens = 0.0, 0
        with torch.no_grad(), _evaluating(self.student):
            for number, batch in self.validation_share.batches.items():
                for part, rows in self._parts(self.validation_taught[number], batch):
                    mask = self._mask(part, rows)
                    with self.settings.products(self.device):
                        logits, _ = self.student.run(part.entrance, rows, logits=True, states=False)
                        original = self._original(part, rows)
                    if number not in self.validation_share.idle:
                        total += float(summed_kl(cast(Tensor, logits)[mask], original[mask]))
                        tokens += int(mask.sum())
        return total, tokens

    def _parts(self, taught: Taught, batch: Batch | Tensor) -> Iterator[tuple[Taught, Batch | Tensor]]:
        """A batch in parts of as many sequences as there is memory for."""
        whole = len(taught.entrance)
        if whole <= self.rows or self.sharded:
            yield taught, batch
            return
        for start in range(0, whole, self.rows):
            rows = slice(start, start + self.rows)
            yield taught.rows(rows), some_of(batch, rows)

    def _mask(self, taught: Taught, batch: Batch | Tensor) -> Tensor:
        given = None if isinstance(batch, Tensor) else real_tokens(batch)
        if isinstance(given, Tensor):
            return given.to(self.device).bool()
        return torch.ones(taught.entrance.shape[:2], dtype=torch.bool, device=self.device)


@contextmanager
def _evaluating(student: Student) -> Iterator[None]:
    student.training = False
    try:
        yield
    finally:
        student.training = True

"""The forwards and backwards of a training: a process's sequences of one batch, in as many parts as memory wants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from streamline_hooks.batch import Batch, real_tokens
from streamline_hooks.core.hardware_config import HardwareConfig
from streamline_hooks.distance import reference_of, summed_distance
from streamline_hooks.distributed import some_of
from streamline_hooks.errors import StreamlineError
from streamline_hooks.predicted import UNCOUNTED, following_tokens
from streamline_hooks.repair.distillation_config import DistillationConfig
from streamline_hooks.repair.objective import summed_divergence
from streamline_hooks.repair.optimisation import MasterWeights
from streamline_hooks.repair.share import Share
from streamline_hooks.repair.student import Student
from streamline_hooks.repair.teacher import Taught
from streamline_hooks.task import Task, logits_of


class Forwards:
    """What a training runs, given what it runs it on.

    Attributes
    ----------
    student : Student
    task : Task
        Of its model.
    config : DistillationConfig
    hardware : HardwareConfig
    weights : MasterWeights
        Where gradients are collected.
    device : torch.device
        Of the model's input.
    share, validation_share : Share
        This process's part of the batches and of the validation.
    taught, validation_taught : dict of int to Taught
        What the original does on them, by the batch's number.
    rows, longest : int
        The most sequences of a batch that are run at a time, and that a batch has.
    sharded : bool
        Whether every process has to make as many forwards as the others, whatever the memory.
    """

    student: Student
    task: Task
    config: DistillationConfig
    hardware: HardwareConfig
    weights: MasterWeights
    device: torch.device
    share: Share
    validation_share: Share
    taught: dict[int, Taught]
    validation_taught: dict[int, Taught]
    rows: int
    longest: int
    sharded: bool

    def _backward(self, number: int, answers: int, tokens: int) -> float:
        total = 0.0
        for taught, batch in self._parts(self.taught[number], self.share.batches[number]):
            loss = self._loss(taught, batch, answers, tokens)
            if number in self.share.idle:
                loss = 0.0 * loss
            loss.backward()
            self.weights.collect()
            total += float(loss.detach())
        return total

    def _loss(self, taught: Taught, batch: Batch | Tensor, answers: int, tokens: int) -> Tensor:
        """The loss: its part of what is said a number of answers, its part of states a number of tokens."""
        objective = self.config.objective
        with self.hardware.autocast_on(self.device):
            output, states = self.student.run(
                taught.entrance, batch, logits=objective.needs_logits, states=objective.needs_states
            )
            original = self._original(taught, batch) if objective.needs_original_logits else None
        after = [state.to(self.device) for state in taught.after]
        loss = objective.of_states(states, after, taught.real.to(self.device)) / max(1, tokens)
        if output is not None:
            said, following = self.task.answers(output, batch), self._following(batch, output)
            loss = loss + objective.of_answers(said, original, following) / answers
        return loss

    def _following(self, batch: Batch | Tensor, output: Any) -> Tensor | None:
        """The token that is to follow on each answer in an output; None where no text is learned."""
        if not self.config.objective.needs_labels:
            return None
        given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        wanted = "labels" if self.task.name == "seq2seq" else "input_ids"
        if wanted not in given:
            raise StreamlineError(
                f"The loss {self.config.objective} predicts a text, and a batch has none ({', '.join(given)}). "
                f"Give {wanted}, or train on what the original says (kl)."
            )
        ids = given[wanted].to(logits_of(output).device)
        if wanted == "labels":
            following = ids
        else:
            mask = real_tokens(given)
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
            following = following_tokens(ids, real, given.get("position_ids"))
            if isinstance(labels := given.get("labels"), Tensor) and labels.shape == ids.shape:
                # What has no label is not learned: an image's places, or the question of a conversation.
                unlabelled = labels.to(ids.device).roll(-1, dims=1) == UNCOUNTED
                following = following.masked_fill(unlabelled, UNCOUNTED)
        answered = self.task.answers(following[..., None], batch)[:, 0]  # chosen as of logits
        if wanted == "labels" and (left := int((following != UNCOUNTED).sum() - (answered != UNCOUNTED).sum())):
            raise StreamlineError(
                f"{left} labels are at places that decoder_attention_mask leaves out. Let the mask have the places "
                f"whose labels are to be learned, or give the label {UNCOUNTED} there."
            )
        return answered

    def _original(self, taught: Taught, batch: Batch | Tensor) -> Tensor:
        assert taught.exit is not None
        return self.student.original_answers(taught.exit, batch)

    def validation_sums(self) -> tuple[float, float, int]:
        """The distances of this process's share of the validation, what else is minimised, and how many answers it has.

        Both are sums in float64; for the second see `Objective.besides_distance`.
        """
        total, others, answers, objective = 0.0, 0.0, 0, self.config.objective
        with torch.no_grad(), _evaluating(self.student):
            for number, batch in self.validation_share.batches.items():
                for part, rows in self._parts(self.validation_taught[number], batch):
                    with self.hardware.autocast_on(self.device):
                        output, _ = self.student.run(part.entrance, rows, logits=True, states=False)
                        original = self._original(part, rows)
                    if number not in self.validation_share.idle:
                        said = self.task.answers(output, rows)
                        if self.task.gives_distributions:
                            total += float(summed_divergence(said, original))
                        else:
                            total += summed_distance(self.task, reference_of(self.task, original), said)
                        others += objective.besides_distance(said, original, self._following(rows, output))
                        answers += len(said)
        return total, others, answers

    def _parts(self, taught: Taught, batch: Batch | Tensor) -> Iterator[tuple[Taught, Batch | Tensor]]:
        """A batch in parts of as many sequences as there is memory for."""
        whole = len(taught.entrance)
        if whole <= self.rows or self.sharded:
            yield taught, batch
            return
        for start in range(0, whole, self.rows):
            rows = slice(start, start + self.rows)
            yield taught.rows(rows), some_of(batch, rows)


@contextmanager
def _evaluating(student: Student) -> Iterator[None]:
    student.training = False
    try:
        yield
    finally:
        student.training = True

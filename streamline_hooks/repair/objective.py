"""The training objective: a weighted sum of registered losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamline_hooks.arguments import check_fields
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.divergence import summed_divergence, text_loss
from streamline_hooks.repair.losses import LOSSES, Loss
from streamline_hooks.task import Task

_FUSED = ("kl", "reverse_kl", "lm")  # computed together by `summed_divergence`


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses, each summed over positions.

    A position is a real token for losses on hidden states, and what the task has an answer for otherwise: a token, or
    an example of a classifier. Each loss is divided by their number. Losses are summed in the order of `LOSSES`.

    Attributes
    ----------
    weights : mapping of str to float
        The weight of each loss, see `LOSSES`.

    Raises
    ------
    StreamlineError
        If there is no loss, a loss is unknown, or a weight is not above 0.

    Examples
    --------
    >>> objective = Objective({"lm": 0.5, "kl": 1.0})
    >>> print(objective)
    kl + 0.5*lm
    >>> objective.needs_logits, objective.needs_states
    (True, False)
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        check_fields(self)
        for name, weight in self.weights.items():
            LOSSES[name]
            if not (0 < weight < math.inf):
                raise StreamlineError(
                    f"The loss {name!r} has the weight {weight}. Expected a number above 0. Change it, or leave the "
                    "loss out."
                )
        if not self.weights:
            raise StreamlineError("loss={} names no loss. Expected at least one, such as {'kl': 1.0}. Name one.")
        object.__setattr__(
            self, "weights", {name: float(self.weights[name]) for name in LOSSES if name in self.weights}
        )

    def __str__(self) -> str:
        return " + ".join(name if weight == 1 else f"{weight:g}*{name}" for name, weight in self.weights.items())

    def _comparing(self, *what: str) -> list[tuple[Loss, float]]:
        """Return the losses that compare one of these, with their weights."""
        return [(LOSSES[name], weight) for name, weight in self.weights.items() if LOSSES[name].compares in what]

    @property
    def needs_logits(self) -> bool:
        """Whether the blocks after the window, and the head, have to be run."""
        return bool(self._comparing("logits", "embeddings", "labels"))

    @property
    def needs_original_logits(self) -> bool:
        """Whether the teacher has to be run to its head."""
        return bool(self._comparing("logits", "embeddings"))

    @property
    def needs_states(self) -> bool:
        """Whether the hidden states after the windows are compared."""
        return bool(self._comparing("states"))

    @property
    def needs_labels(self) -> bool:
        """Whether the text itself is predicted."""
        return bool(self._comparing("labels"))

    def validated(self, distance: float, others: float) -> float:
        """Return the number that is the lowest for the weights that are kept.

        It is the distance to the teacher, plus the losses that measure something else. The weight of a loss on
        hidden states has another unit than the distance, and counts as 1.

        Parameters
        ----------
        distance : float
            To the teacher, see `Task.distance`.
        others : float
            See `besides_distance`.

        Examples
        --------
        >>> Objective({"kl": 1.0, "lm": 0.5}).validated(0.25, 1.5), Objective({"reverse_kl": 1.0}).validated(0.25, 3.0)
        (1.75, 3.0)
        >>> Objective({"kl": 2.0}).validated(0.25, 0.0)  # a weight alone changes nothing
        0.25
        """
        if not self._besides():
            return distance
        weight = self.weights.get("kl") or self.weights.get("embedding") or float(self.needs_states)
        return weight * distance + others

    def _besides(self) -> list[tuple[Loss, float]]:
        """Return the losses on outputs that are not the distance to the teacher itself."""
        found = self._comparing("logits", "embeddings", "labels")
        return [(loss, weight) for loss, weight in found if loss.name not in ("kl", "embedding")]

    def besides_distance(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> float:
        """Return the losses on outputs other than the distance to the teacher, summed over positions.

        Parameters
        ----------
        student, teacher : torch.Tensor
            Logits or embeddings of shape (answers, features), see `Task.answers`; without gradients.
        labels : torch.Tensor, optional
            See `of_answers`.
        """
        total = 0.0
        for loss, weight in self._besides():
            if loss.name == "reverse_kl":
                total += float(summed_divergence(student, teacher, 0.0, weight))
            elif labels is not None and loss.name == "lm":
                total += weight * float(text_loss(student, labels))
            elif loss.compares != "labels":
                total += weight * float(loss(student.float(), teacher.float()))
            elif labels is not None:
                total += weight * float(loss(student.float(), labels))
        return total

    def of_states(self, repaired: Sequence[Tensor], original: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Return the losses on hidden states, summed over tokens and averaged over windows.

        Parameters
        ----------
        repaired, original : sequence of torch.Tensor
            The student's and the teacher's states after each window, of shape (batch, tokens, features).
        mask : torch.Tensor
            The real tokens, of shape (batch, tokens).
        """
        losses = self._comparing("states")
        total = torch.zeros((), device=mask.device)
        for ours, theirs in zip(repaired, original, strict=True):
            a, b = ours[mask].float(), theirs[mask].float()
            for loss, weight in losses:
                total = total + weight * loss(a, b)
        return total / max(1, len(repaired))

    def of_answers(self, repaired: Tensor, original: Tensor | None = None, following: Tensor | None = None) -> Tensor:
        """Return the losses on outputs, summed over answers.

        Parameters
        ----------
        repaired : torch.Tensor
            The student's logits or embeddings, of shape (answers, features), see `Task.answers`.
        original : torch.Tensor, optional
            The teacher's, if a loss compares with them. Logits may be overwritten.
        following : torch.Tensor, optional
            The labels, if a loss predicts the text: for each answer the token that follows, of shape (answers,), see
            `following_tokens`.

        Raises
        ------
        StreamlineError
            If something that a loss needs is missing.
        """
        lacking = ["the teacher's output"] * (self.needs_original_logits and original is None)
        lacking += ["labels"] * (self.needs_labels and following is None)
        if lacking:
            raise StreamlineError(
                f"The loss {self} was computed without {' and '.join(lacking)}. Expected what each loss compares. "
                "Pass it, or leave the loss out."
            )
        total = torch.zeros((), device=repaired.device)
        forward, reverse, text = (self.weights.get(name, 0.0) for name in _FUSED)
        others = [(loss, w) for loss, w in self._comparing("logits", "embeddings", "labels") if loss.name not in _FUSED]
        if original is not None and (forward or reverse):
            # Its gradient is written over the teacher's logits, which the other losses still need.
            apart = original.clone() if any(loss.compares == "logits" for loss, _ in others) else original
            total = total + summed_divergence(repaired, apart, forward, reverse, text, following)
        elif following is not None and text:
            total = total + text * text_loss(repaired, following)
        for loss, weight in others:
            teacher = following if loss.compares == "labels" else original
            assert teacher is not None
            total = total + weight * loss(repaired.float(), teacher if loss.compares == "labels" else teacher.float())
        return total

    def require_task(self, task: Task) -> None:
        """Raise if a model of a task has not the output that a loss compares.

        Raises
        ------
        StreamlineError
        """
        distributions, text = task.gives_distributions, task.name in ("causal-lm", "seq2seq")
        has = {"states": True, "logits": distributions, "embeddings": not distributions, "labels": text}
        wrong = [name for name in self.weights if not has[LOSSES[name].compares]]
        if wrong:
            fitting = "kl" if distributions else "embedding"
            raise StreamlineError(
                f"The loss {self} has {wrong[0]}, which compares {LOSSES[wrong[0]].compares}, and a model for {task} "
                f"has none. Train on {fitting}, or on the states (mse, relative, cosine)."
            )

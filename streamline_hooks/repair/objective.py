"""What a repair is trained for: to say what the original says, to be in the state it is in, or to predict the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from streamline_hooks.arguments import check_fields, checked
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.divergence import summed_divergence, text_loss
from streamline_hooks.task import Task


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses, each summed over tokens and divided by the number of real ones.

    What is said is summed over answers, see `Task`: of a classifier one an image or text.

    Attributes
    ----------
    kl : float
        KL(original ‖ repaired) of what is said: of the next token, or of the class, in nats. It asks for all that the
        original might say.
    reverse_kl : float
        KL(repaired ‖ original), which asks for nothing that the original would not say (MiniLLM, arXiv 2306.08543).
        Beside ``kl`` it makes a mixed one.
    lm : float
        Negative log-likelihood of the text's own next token, in nats; a sequence's first is not predicted, and counts
        in the number all the same. Where a batch has ``labels``, tokens with the label -100 are left out. Of an encoder
        with a decoder that of the batch's ``labels``, which have to be at places that the decoder's mask has.
    embedding : float
        1 − cos(repaired, original) of the embeddings that a model makes (`Task`).
    mse : float
        Mean square of the difference of the states after each window, a feature (LLM-Streamline, arXiv 2403.19135).
    relative : float
        ‖ŷ − y‖²/‖y‖² of these states, which the closed form minimises.
    cosine : float
        1 − cos(ŷ, y) of these states.

    Raises
    ------
    StreamlineError
        If a weight is negative, or all are zero.

    Examples
    --------
    >>> Objective.parse("kl + 0.5*lm")
    Objective(kl=1.0, lm=0.5, mse=0.0, relative=0.0, cosine=0.0, embedding=0.0, reverse_kl=0.0)
    >>> print(Objective(kl=0.0, mse=1.0))
    mse
    """

    kl: float = 1.0
    lm: float = 0.0
    mse: float = 0.0
    relative: float = 0.0
    cosine: float = 0.0
    embedding: float = 0.0
    reverse_kl: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        weights = self._weights()
        if min(weights.values()) < 0 or not any(weights.values()) or not all(map(math.isfinite, weights.values())):
            raise StreamlineError(
                f"{self!r} has a negative, infinite or no weight; expected one above zero, and none below."
            )

    def __str__(self) -> str:
        said = {name: weight for name, weight in self._weights().items() if weight}
        return " + ".join(name if weight == 1 else f"{weight:g}*{name}" for name, weight in said.items())

    @classmethod
    @checked()
    def parse(cls, text: str) -> Objective:
        """Read ``"kl"``, ``"mse"`` or a sum such as ``"kl + 0.5*lm"``.

        Raises
        ------
        StreamlineError
            If the text names no such loss.
        """
        known = [field.name for field in fields(cls)]
        weights: dict[str, Any] = dict.fromkeys(known, 0.0)
        for part in text.split("+"):
            number, _, name = part.rpartition("*")
            name = name.strip()
            try:
                weights[name] += float(number) if number else 1.0
            except (KeyError, ValueError):
                raise StreamlineError(
                    f"The objective {text!r} cannot be read at {part.strip()!r}. Expected a sum of {', '.join(known)}, "
                    "each with a weight or without, such as 'kl + 0.5*lm'."
                ) from None
        return cls(**weights)

    @property
    def needs_logits(self) -> bool:
        """Whether the blocks after the window, and the LM head, have to be run."""
        return bool(self.lm) or self.needs_original_logits

    @property
    def needs_original_logits(self) -> bool:
        """Whether the original has to be run to its head."""
        return bool(self.kl or self.reverse_kl or self.embedding)

    @property
    def needs_states(self) -> bool:
        """Whether the states after the windows are compared."""
        return bool(self.mse or self.relative or self.cosine)

    def validated(self, distance: float, others: float) -> float:
        """The number by which weights are kept: the distance, and beside it what else is said to be minimised.

        Parameters
        ----------
        distance : float
            To the original, see `Task.distance`.
        others : float
            This objective's parts that predict a text (``lm``), and that look from the repaired model (``reverse_kl``).

        Examples
        --------
        >>> Objective(kl=1.0, lm=0.5).validated(0.25, 1.5), Objective(kl=0.0, reverse_kl=1.0).validated(0.25, 3.0)
        (1.75, 3.0)
        >>> Objective(kl=2.0).validated(0.25, 0.0)  # of what is compared alone the weight says nothing
        0.25
        """
        if not (self.lm or self.reverse_kl):
            return distance
        weights = self._weights()
        compared = [name for name in weights if weights[name] and name not in ("lm", "reverse_kl")]
        return (self.kl or bool(compared)) * distance + others

    def of_states(self, repaired: Sequence[Tensor], original: Sequence[Tensor], mask: Tensor) -> Tensor:
        """The part of the loss that compares states, summed over tokens and averaged over windows.

        Parameters
        ----------
        repaired, original : sequence of torch.Tensor
            One a window, of shape (batch, tokens, features).
        mask : torch.Tensor
            The real tokens, of shape (batch, tokens).
        """
        total = torch.zeros((), device=mask.device)
        for ours, theirs in zip(repaired, original, strict=True):
            a, b = ours[mask].float(), theirs[mask].float()
            squared = (a - b).square()
            if self.mse:
                total = total + self.mse * squared.mean(dim=-1).sum()
            if self.relative:
                total = total + self.relative * (squared.sum(dim=-1) / b.square().sum(dim=-1).clamp_min(1e-30)).sum()
            if self.cosine:
                total = total + self.cosine * (1.0 - cosine_similarity(a, b, dim=-1)).sum()
        return total / max(1, len(repaired))

    def of_answers(self, repaired: Tensor, original: Tensor | None = None, following: Tensor | None = None) -> Tensor:
        """The part of the loss that is about what is said, summed over answers.

        Parameters
        ----------
        repaired : torch.Tensor
            Logits, or embeddings, of shape (answers, features), see `Task.answers`.
        original : torch.Tensor, optional
            The original's, where something is compared with it. Logits may be overwritten.
        following : torch.Tensor, optional
            Where a text is predicted, the token that follows on each answer, of shape (answers,), see
            `following_tokens`.

        Raises
        ------
        StreamlineError
            If what the objective needs is not given.
        """
        lacking = ["what the original says"] * (self.needs_original_logits and original is None)
        lacking += ["the tokens that follow"] * (bool(self.lm) and following is None)
        if lacking:
            raise StreamlineError(f"The objective {self} cannot be computed without {' and '.join(lacking)}.")
        total = torch.zeros((), device=repaired.device)
        if original is not None and (self.kl or self.reverse_kl):
            total = total + summed_divergence(repaired, original, self.kl, self.reverse_kl, self.lm, following)
        elif following is not None and self.lm:
            total = total + self.lm * text_loss(repaired, following)
        if original is not None and self.embedding:
            apart = normalize(repaired.float(), dim=-1) - normalize(original.float(), dim=-1)
            total = total + self.embedding * apart.square().sum() / 2  # 1 - cos, of vectors of length one
        return total

    def require_task(self, task: Task) -> None:
        """Raise if what a model of a task says cannot be compared so.

        Raises
        ------
        StreamlineError
        """
        wrong = "embedding" if self.embedding and task.gives_distributions else ""
        wrong = "kl" if (self.kl or self.reverse_kl) and not task.gives_distributions else wrong
        wrong = "lm" if self.lm and task.name not in ("causal-lm", "seq2seq") else wrong
        if wrong:
            fitting = "kl" if task.gives_distributions else "embedding"
            raise StreamlineError(
                f"The objective {self} has {wrong}, which a model for {task} does not give. Train on {fitting}, or on "
                "the states (mse, relative, cosine)."
            )

    def _weights(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

"""Losses, and the training objective: their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from streamline_hooks.arguments import check_fields, checked
from streamline_hooks.core.config import Registry
from streamline_hooks.errors import StreamlineError
from streamline_hooks.predicted import UNCOUNTED
from streamline_hooks.task import Task

Compares = Literal["states", "logits", "embeddings", "labels"]

LOSSES: Registry[Loss] = Registry("loss", "register_loss")
"""The losses by name."""


@dataclass(frozen=True)
class Loss:
    """A loss that a student is trained on; `register_loss` makes it known by its name.

    Attributes
    ----------
    name : str
        The name in `DistillationConfig.loss`.
    function : callable
        ``function(student, teacher)`` returns a tensor of shape (positions,): one value per position, without a mean
        or sum over positions. Both arguments are float32, of shape (positions, features), without padding. The
        gradient is taken with respect to ``student``; neither argument may be changed.
    compares : {"states", "logits", "embeddings", "labels"}
        What the arguments are: the hidden states after a window; the logits, of the vocabulary for each token or of
        the classes for each example; the embeddings of each example; or the student's logits and, as ``teacher``,
        the labels, integers of shape (positions,) with -100 where there is none. A loss on logits or labels requires
        a task with logits, a loss on embeddings the task embedding.
    paper : str
        Where the loss was published; empty by default.

    Raises
    ------
    StreamlineError
        If a field is invalid.

    Examples
    --------
    >>> from torch.nn.functional import l1_loss
    >>> Loss("l1", lambda student, teacher: l1_loss(student, teacher, reduction="none").mean(-1), "states").compares
    'states'
    """

    name: str
    function: Callable[..., Tensor]
    compares: Compares
    paper: str = ""

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the sum over positions; raise if the function does not return one value per position."""
        values = self.function(student, teacher)
        if not isinstance(values, Tensor) or values.shape != student.shape[:1]:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise StreamlineError(
                f"The loss {self.name!r} returned {got} for {len(student)} positions. Expected one value per position, "
                f"shape ({len(student)},). Reduce over the features alone: reduction='none' and mean(dim=-1)."
            )
        return values.sum()


@checked()
def register_loss(loss: Loss) -> Loss:
    """Make a loss known by its name, for `DistillationConfig.loss` and the command line.

    Parameters
    ----------
    loss : Loss

    Returns
    -------
    Loss
        The same.

    Raises
    ------
    StreamlineError
        If the name cannot be used, or another function is registered by it.

    Examples
    --------
    >>> from torch.nn.functional import huber_loss
    >>> def doctest_huber(student, teacher):
    ...     return huber_loss(student, teacher, reduction="none").mean(dim=-1)
    >>> register_loss(Loss("doctest_huber", doctest_huber, compares="states")) is LOSSES["doctest_huber"]
    True
    >>> from streamline_hooks import DistillationConfig
    >>> DistillationConfig(loss={"kl": 1.0, "doctest_huber": 0.1}).loss
    {'kl': 1.0, 'doctest_huber': 0.1}
    >>> del LOSSES["doctest_huber"]
    """
    return LOSSES.add(loss.name, loss)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) in nats."""
    p, q = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(student ‖ teacher) in nats: it asks only for what the teacher would also generate."""
    return kl(teacher, student)


def lm(student: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of the next token of the text, in nats; 0 where it has no label."""
    return cross_entropy(student, labels, ignore_index=UNCOUNTED, reduction="none")


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over features of the squared difference."""
    return (student - teacher).square().mean(dim=-1)


def relative(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared error relative to the squared norm, which the closed form minimises."""
    return (student - teacher).square().sum(dim=-1) / teacher.square().sum(dim=-1).clamp_min(1e-30)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − cos."""
    return 1.0 - cosine_similarity(student, teacher, dim=-1)


def embedding(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − cos, as half the squared distance of the normalised vectors, which rounds less."""
    return (normalize(student, dim=-1) - normalize(teacher, dim=-1)).square().sum(dim=-1) / 2


# `Objective` computes the sum of kl, reverse_kl and lm at once, with less memory, instead of calling their functions.
for _loss in (
    Loss("kl", kl, "logits", "Hinton et al., arXiv 1503.02531"),
    Loss("lm", lm, "labels"),
    Loss("mse", mse, "states", "LLM-Streamline, arXiv 2403.19135"),
    Loss("relative", relative, "states"),
    Loss("cosine", cosine, "states"),
    Loss("embedding", embedding, "embeddings"),
    Loss("reverse_kl", reverse_kl, "logits", "MiniLLM, arXiv 2306.08543"),
):
    register_loss(_loss)


_TOKENS_AT_ONCE = 64  # few enough for the processor's cache, at any vocabulary


def text_loss(logits: Tensor, following: Tensor) -> Tensor:
    """Return the summed negative log-likelihood in nats of `following` (tokens,) under logits (tokens, vocabulary)."""
    return cross_entropy(logits.float(), following, ignore_index=UNCOUNTED, reduction="sum")


def summed_divergence(
    repaired: Tensor,
    original: Tensor,
    forward: float = 1.0,
    reverse: float = 0.0,
    text: float = 0.0,
    following: Tensor | None = None,
) -> Tensor:
    """Return Σ forward·KL(original ‖ repaired) + reverse·KL(repaired ‖ original) + text·`text_loss`, over tokens.

    Logits have shape (tokens, vocabulary). Gradients reach `repaired` alone; if they are needed, `original` is
    overwritten by them to save memory.
    """
    if repaired.shape != original.shape or (text and (following is None or len(following) != len(repaired))):
        follows = "no text" if following is None else f"{len(following)} tokens of a text"
        raise StreamlineError(
            f"Got logits of the shapes {tuple(repaired.shape)} and {tuple(original.shape)}, and {follows} at a weight "
            f"of {text:g}; expected one shape, and where a text is weighed a token of it for each row."
        )
    weights = (forward, reverse, text)
    if not (torch.is_grad_enabled() and repaired.requires_grad):
        return _SummedDivergence.run(repaired, original, weights, following, gradient=False)
    result: Tensor = _SummedDivergence.apply(repaired, original, weights, following)
    return result


class _SummedDivergence(torch.autograd.Function):
    """With d = log p − log q: forward Σ p d, gradient q − p; reverse r = −Σ q d, gradient −q(d + r).

    The text's −log q has the gradient q minus one at the label. The forward computes the gradients.
    """

    @staticmethod
    def run(
        repaired: Tensor,
        original: Tensor,
        weights: tuple[float, float, float],
        following: Tensor | None,
        gradient: bool,
    ) -> Tensor:
        forward, reverse, text = weights
        total = torch.zeros((), dtype=torch.float64, device=repaired.device)
        for start in range(0, len(repaired), _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            theirs = original[part]
            q, p = repaired[part].float().log_softmax(dim=-1), theirs.float().log_softmax(dim=-1)
            if text and following is not None:
                known = following[part] != UNCOUNTED
                tokens = following[part].masked_fill(~known, 0)[:, None]
                total -= text * q.gather(1, tokens)[:, 0].masked_fill(~known, 0.0).sum(dtype=torch.float64)
            likely = p.exp()
            apart = p.sub_(q)
            q = q.exp_()
            if reverse:
                weighted = q * apart
                backwards = -weighted.sum(dim=-1, keepdim=True)
                total += reverse * backwards.sum(dtype=torch.float64)
            if forward:
                total += forward * apart.mul_(likely).sum(dtype=torch.float64)
            if gradient:
                made = likely.mul_(-forward).add_(q, alpha=forward)
                if text and following is not None:
                    weight = text * known[:, None].to(q.dtype)
                    made.addcmul_(q, weight).scatter_add_(1, tokens, -weight)
                if reverse:
                    made.sub_(weighted.add_(q.mul_(backwards)), alpha=reverse)
                theirs.copy_(made)
        return total.to(torch.float32)

    @staticmethod
    def forward(
        ctx: Any, repaired: Tensor, original: Tensor, weights: tuple[float, float, float], following: Tensor | None
    ) -> Tensor:
        total = _SummedDivergence.run(repaired, original, weights, following, gradient=True)
        ctx.gradient = original
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise StreamlineError("The gradient of this KL has been used up; compute the KL anew for another backward.")
        return gradient.mul_(outer[0]), None, None, None


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
        """Return the number by which the best weights are chosen: the distance to the teacher plus the other losses.

        `others` is that of `besides_distance`. A loss on hidden states has another unit than the distance, and counts
        as 1.

        Examples
        --------
        >>> Objective({"kl": 1.0, "lm": 0.5}).validated(0.25, 1.5), Objective({"reverse_kl": 1.0}).validated(0.25, 3.0)
        (1.75, 3.0)
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

        `student` and `teacher` are the answers of `Task.answers`, (answers, features); `labels` as in `of_answers`.
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

        States have shape (batch, tokens, features), one for each window; `mask`, (batch, tokens), marks the real
        tokens.
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

        `repaired` and `original` are the answers of student and teacher, see `Task.answers`, (answers, features); the
        latter may be overwritten. `following` are the labels, the token after each answer, (answers,), see
        `following_tokens`.
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
        """Raise if a model of the task does not have the output that a loss compares."""
        distributions, text = task.gives_distributions, task.name in ("causal-lm", "seq2seq")
        has = {"states": True, "logits": distributions, "embeddings": not distributions, "labels": text}
        wrong = [name for name in self.weights if not has[LOSSES[name].compares]]
        if wrong:
            fitting = "kl" if distributions else "embedding"
            raise StreamlineError(
                f"The loss {self} has {wrong[0]}, which compares {LOSSES[wrong[0]].compares}, and a model for {task} "
                f"has none. Train on {fitting}, or on the states (mse, relative, cosine)."
            )

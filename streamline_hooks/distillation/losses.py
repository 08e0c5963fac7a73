"""Losses of a training run and their weighted sum, the training objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from streamline_hooks.core import (
    IGNORE_INDEX,
    Registry,
    StreamlineError,
    rows_at_once,
    validate_arguments,
    validate_fields,
    widest_float,
)
from streamline_hooks.modeling import Task

Compares = Literal["states", "logits", "embeddings", "labels"]


@dataclass(frozen=True)
class Loss:
    """A named loss between the outputs of student and teacher; register it with `register_loss`.

    Attributes
    ----------
    name : str
        The name in `DistillationConfig.loss`.
    function : callable
        ``function(student, teacher)`` returns one value per position, of shape (positions,). Both arguments are
        float32, of shape (positions, features), without padding. The gradient is taken with respect to ``student``;
        neither argument may be changed.
    compares : {"states", "logits", "embeddings", "labels"}
        The arguments of the function. ``"states"``: hidden states after a window. ``"logits"``: logits of the
        vocabulary per token, or of the classes per example. ``"embeddings"``: the embedding of each example.
        ``"labels"``: the student's logits and, as ``teacher``, labels of shape (positions,), -100 where a position has
        no label. Losses on logits or labels require a task with logits, losses on embeddings the task embedding.
    paper : str
        Reference of the loss; empty by default.

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
        validate_fields(self)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the sum over positions; raise if the function does not return one value per position."""
        values = self.function(student, teacher)
        if not isinstance(values, Tensor) or values.shape != student.shape[:1]:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise StreamlineError(
                f"The loss {self.name!r} returned {got} for {len(student)} positions. Expected one value per position, "
                f"shape ({len(student)},). Reduce only over features: reduction='none' and mean(dim=-1)."
            )
        return values.sum()


@validate_arguments()
def register_loss(loss: Loss) -> Loss:
    """Register a loss for `DistillationConfig.loss` and the command line.

    Parameters
    ----------
    loss : Loss

    Returns
    -------
    Loss
        The same object.

    Raises
    ------
    StreamlineError
        If the name is invalid, or another loss is already registered under it.

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


LOSSES: Registry[Loss] = Registry(
    "loss", "register_loss", group="streamline_hooks.losses", register=lambda name, loss: register_loss(loss)
)
"""The registered losses by name."""


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) per position, in nats."""
    p, q = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(student ‖ teacher) per position, in nats; it penalizes tokens that the teacher would not generate."""
    return kl(teacher, student)


def lm(student: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of the next token in nats; 0 at positions without a label."""
    return cross_entropy(student, labels, ignore_index=IGNORE_INDEX, reduction="none")


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared difference, averaged over features."""
    return (student - teacher).square().mean(dim=-1)


def relative(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared error relative to the squared norm of the teacher, which the closed form minimizes."""
    return (student - teacher).square().sum(dim=-1) / teacher.square().sum(dim=-1).clamp_min(1e-30)


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − cosine similarity."""
    return 1.0 - cosine_similarity(student, teacher, dim=-1)


def embedding(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − cosine similarity, computed as half the squared distance of normalized vectors to reduce rounding."""
    return (normalize(student, dim=-1) - normalize(teacher, dim=-1)).square().sum(dim=-1) / 2


# `Objective` computes the sum of kl, reverse_kl and lm at once with less memory and does not call these functions.
for _loss in (
    Loss("kl", kl, "logits", "Hinton et al., arXiv 1503.02531"),
    Loss("lm", lm, "labels"),
    Loss("mse", mse, "states", "LLM-Streamline, arXiv 2403.19135"),
    Loss("relative", relative, "states"),
    Loss("cosine", cosine_loss, "states"),
    Loss("embedding", embedding, "embeddings"),
    Loss("reverse_kl", reverse_kl, "logits", "MiniLLM, arXiv 2306.08543"),
):
    register_loss(_loss)


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed negative log-likelihood, in nats, of labels (tokens,) under logits (tokens, vocabulary)."""
    return cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")


def summed_logit_loss(
    repaired: Tensor,
    original: Tensor,
    forward: float = 1.0,
    reverse: float = 0.0,
    text: float = 0.0,
    labels: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of forward KL, reverse KL and cross-entropy over tokens.

    The forward KL is KL(original ‖ repaired), the reverse KL is KL(repaired ‖ original). Logits have shape
    (tokens, vocabulary). Only `repaired` receives gradients. To save memory, they overwrite `original`.
    """
    weights = (forward, reverse, text)
    if not (torch.is_grad_enabled() and repaired.requires_grad):
        return _SummedKL.run(repaired, original, weights, labels, gradient=False)
    if torch.finfo(original.dtype).bits < torch.finfo(repaired.dtype).bits:
        original = original.to(repaired.dtype)  # its memory receives the gradient
    result: Tensor = _SummedKL.apply(repaired, original, weights, labels)
    return result


class _SummedKL(torch.autograd.Function):
    """Compute the loss and its gradient in one pass.

    With d = log p − log q: forward KL Σ p d, gradient q − p; reverse KL r = −Σ q d, gradient −q(d + r). The gradient of
    the cross-entropy −log q is q, minus one at the label.
    """

    @staticmethod
    def run(
        repaired: Tensor,
        original: Tensor,
        weights: tuple[float, float, float],
        labels: Tensor | None,
        gradient: bool,
    ) -> Tensor:
        forward, reverse, text = weights
        wide = widest_float(repaired.device)
        total = torch.zeros((), dtype=wide, device=repaired.device)
        rows = rows_at_once(repaired.shape[-1], repaired.device)
        for start in range(0, len(repaired), rows):
            part = slice(start, start + rows)
            reference = original[part]
            q, p = repaired[part].float().log_softmax(dim=-1), reference.float().log_softmax(dim=-1)
            if text and labels is not None:
                has_label = labels[part] != IGNORE_INDEX
                tokens = labels[part].masked_fill(~has_label, 0)[:, None]
                total -= text * q.gather(1, tokens)[:, 0].masked_fill(~has_label, 0.0).sum(dtype=wide)
            difference = p - q
            p_values, q = p.exp_(), q.exp_()
            if reverse:
                weighted = q * difference
                reverse_sum = -weighted.sum(dim=-1, keepdim=True)
                total += reverse * reverse_sum.sum(dtype=wide)
            if forward:
                total += forward * difference.mul_(p_values).sum(dim=-1).sum(dtype=wide)
            if gradient:
                part_gradient = p_values.mul_(-forward).add_(q, alpha=forward)
                if text and labels is not None:
                    weight = text * has_label[:, None].to(q.dtype)
                    part_gradient.addcmul_(q, weight).scatter_add_(1, tokens, -weight)
                if reverse:
                    part_gradient.sub_(weighted.add_(q.mul_(reverse_sum)), alpha=reverse)
                reference.copy_(part_gradient)
        return total.to(torch.float32)

    @staticmethod
    def forward(
        ctx: Any, repaired: Tensor, original: Tensor, weights: tuple[float, float, float], labels: Tensor | None
    ) -> Tensor:
        total = _SummedKL.run(repaired, original, weights, labels, gradient=True)
        ctx.gradient = original
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise StreamlineError(
                "backward() was already called on this loss. Expected one call. Compute the loss again."
            )
        return gradient.mul_(grad_outputs[0]), None, None, None


_FUSED = ("kl", "reverse_kl", "lm")  # computed by `summed_logit_loss`


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses.

    Each loss is averaged over positions. A position is a real token for losses on hidden states; otherwise it is an
    answer of the task: a token, or an example of a classifier.

    Attributes
    ----------
    weights : mapping of str to float
        Weight of each loss, above 0, in the order of `LOSSES`.

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
        validate_fields(self)
        for name, weight in self.weights.items():
            LOSSES[name]
            if not (0 < weight < math.inf):
                raise StreamlineError(
                    f"The loss {name!r} has the weight {weight}. Expected a number above 0. Change the weight, or "
                    "remove the loss."
                )
        if not self.weights:
            raise StreamlineError("loss={} is empty. Expected at least one loss, such as {'kl': 1.0}. Add one.")
        in_order = {name: float(self.weights[name]) for name in LOSSES.in_order(self.weights)}
        object.__setattr__(self, "weights", in_order)

    def __str__(self) -> str:
        return " + ".join(name if weight == 1 else f"{weight:g}*{name}" for name, weight in self.weights.items())

    def _losses_comparing(self, *inputs: str) -> list[tuple[Loss, float]]:
        """Return the losses whose `compares` is one of `inputs`, with their weights."""
        return [(LOSSES[name], weight) for name, weight in self.weights.items() if LOSSES[name].compares in inputs]

    @property
    def needs_logits(self) -> bool:
        """Whether a loss needs the student's output, and so the blocks after the window and the head."""
        return bool(self._losses_comparing("logits", "embeddings", "labels"))

    @property
    def needs_original_logits(self) -> bool:
        """Whether a loss needs the teacher's output."""
        return bool(self._losses_comparing("logits", "embeddings"))

    @property
    def needs_states(self) -> bool:
        """Whether a loss compares hidden states after the windows."""
        return bool(self._losses_comparing("states"))

    @property
    def needs_labels(self) -> bool:
        """Whether a loss needs labels."""
        return bool(self._losses_comparing("labels"))

    def validated(self, distance: float, others: float) -> float:
        """Return the validation loss: the weighted distance to the teacher plus the other losses.

        `others` is the mean of `other_losses`. Losses on hidden states have another unit. With them the distance has
        the weight 1, unless the distance itself is one of the losses.

        Examples
        --------
        >>> Objective({"kl": 1.0, "lm": 0.5}).validated(0.25, 1.5), Objective({"reverse_kl": 1.0}).validated(0.25, 3.0)
        (1.75, 3.0)
        """
        if not self._other_output_losses():
            return distance
        weight = self.weights.get("kl") or self.weights.get("embedding") or float(self.needs_states)
        return weight * distance + others

    def _other_output_losses(self) -> list[tuple[Loss, float]]:
        """Return the losses on outputs other than the distance to the teacher."""
        losses = self._losses_comparing("logits", "embeddings", "labels")
        return [(loss, weight) for loss, weight in losses if loss.name not in ("kl", "embedding")]

    def other_losses(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> float:
        """Return the losses on outputs other than the distance to the teacher, summed over positions.

        `student` and `teacher` are answers (`Task.answers`) of shape (answers, features); `labels` is as in
        `output_loss`.
        """
        total = 0.0
        for loss, weight in self._other_output_losses():
            if loss.name == "reverse_kl":
                total += float(summed_logit_loss(student, teacher, 0.0, weight))
            elif loss.compares != "labels":
                total += weight * float(loss(student.float(), teacher.float()))
            elif labels is not None:
                summed = summed_cross_entropy if loss.name == "lm" else loss
                total += weight * float(summed(student.float(), labels))
        return total

    def state_loss(self, repaired: Sequence[Tensor], original: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Return the losses on hidden states, summed over tokens and averaged over windows.

        `repaired` and `original` contain one tensor of shape (batch, tokens, features) per window; `mask` of shape
        (batch, tokens) marks real tokens.
        """
        losses = self._losses_comparing("states")
        total = torch.zeros((), device=mask.device)
        for student_states, teacher_states in zip(repaired, original, strict=True):
            student, teacher = student_states[mask].float(), teacher_states[mask].float()
            for loss, weight in losses:
                total = total + weight * loss(student, teacher)
        return total / max(1, len(repaired))

    def output_loss(self, repaired: Tensor, original: Tensor | None = None, following: Tensor | None = None) -> Tensor:
        """Return the losses on outputs, summed over answers.

        `repaired` and `original` are the answers (`Task.answers`) of student and teacher, of shape (answers, features).
        `original` may be overwritten. `following` is the label of each answer, of shape (answers,), see `shift_labels`.
        """
        missing = ["the teacher's output"] * (self.needs_original_logits and original is None)
        missing += ["labels"] * (self.needs_labels and following is None)
        if missing:
            raise StreamlineError(
                f"The loss {self} was computed without {' and '.join(missing)}. Expected the inputs of each loss. Pass "
                "them, or remove the loss."
            )
        total = torch.zeros((), device=repaired.device)
        forward, reverse, text = (self.weights.get(name, 0.0) for name in _FUSED)
        others = [
            (loss, w) for loss, w in self._losses_comparing("logits", "embeddings", "labels") if loss.name not in _FUSED
        ]
        if original is not None and (forward or reverse):
            # The gradient overwrites the teacher's logits, which other losses may still need.
            overwritable = original.clone() if any(loss.compares == "logits" for loss, _ in others) else original
            total = total + summed_logit_loss(repaired, overwritable, forward, reverse, text, following)
        elif following is not None and text:
            total = total + text * summed_cross_entropy(repaired, following)
        for loss, weight in others:
            teacher = following if loss.compares == "labels" else original
            assert teacher is not None
            total = total + weight * loss(repaired.float(), teacher if loss.compares == "labels" else teacher.float())
        return total

    def require_task(self, task: Task) -> None:
        """Raise if a loss compares an output that models of the task do not have."""
        distributions, has_text = task.gives_distributions, task.name in ("causal-lm", "seq2seq")
        available = {"states": True, "logits": distributions, "embeddings": not distributions, "labels": has_text}
        unsupported = [name for name in self.weights if not available[LOSSES[name].compares]]
        if unsupported:
            suitable = "kl" if distributions else "embedding"
            raise StreamlineError(
                f"The loss {unsupported[0]!r} of {self} compares {LOSSES[unsupported[0]].compares}. A model "
                f"for {task} has none. Use {suitable}, or a loss on hidden states (mse, relative, cosine)."
            )

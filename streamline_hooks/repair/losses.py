"""The losses of a training run, and the registry in which users add their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from streamline_hooks.arguments import check_fields, checked
from streamline_hooks.core.config import Registry
from streamline_hooks.errors import StreamlineError
from streamline_hooks.predicted import UNCOUNTED

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
        """Return the sum over positions.

        Raises
        ------
        StreamlineError
            If the function does not return one value per position.
        """
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

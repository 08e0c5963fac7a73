"""How far one answer is from another: KL between distributions, one minus the cosine between vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from streamline_hooks.task import Task

_AT_ONCE = 32  # few enough for the processor's cache, at any vocabulary


def reference_of(task: Task, answers: Tensor) -> Tensor:
    """What the original's answers are compared as: log-probabilities, or vectors of length one.

    Parameters
    ----------
    task : Task
    answers : torch.Tensor
        Of shape (answers, features), see `Task.answers`.

    Returns
    -------
    torch.Tensor
        Of the same shape, in float32 at least.
    """
    wide = answers.float()
    return wide.log_softmax(dim=-1) if task.gives_distributions else normalize(wide, dim=-1)


def summed_distance(task: Task, reference: Tensor, answers: Tensor) -> float:
    """The sum of KL(original ‖ other), or of 1 − cos(original, other), over answers.

    Parameters
    ----------
    task : Task
    reference : torch.Tensor
        Of the original, from `reference_of`, of shape (answers, features).
    answers : torch.Tensor
        The other's, of the same shape.

    Returns
    -------
    float
        In nats, where it is KL.

    Examples
    --------
    >>> task, rows = Task("embedding"), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> summed_distance(task, reference_of(task, rows), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    1.0
    """
    if task.gives_distributions:
        return summed_kl(reference, answers)
    # Half the squared distance of unit vectors is 1 - cos, without the difference of two numbers close to one.
    return float((reference - normalize(answers.float(), dim=-1)).square().sum(dtype=torch.float64)) / 2


def summed_kl(reference: Tensor, other: Tensor) -> float:
    """The sum of KL over tokens, of distributions given by log-probabilities and by logits."""
    total = torch.zeros((), dtype=torch.float64, device=reference.device)
    for p, q in zip(reference.split(_AT_ONCE), other.split(_AT_ONCE), strict=True):
        total += kl_by_token(p, q).sum(dtype=torch.float64)
    return float(total)


def kl_by_token(reference: Tensor, other: Tensor) -> Tensor:
    """KL of each token, of distributions given by log-probabilities and by logits."""
    difference = reference - other.float().log_softmax(dim=-1)
    return difference.mul_(reference.exp()).sum(dim=-1)

"""Distances between outputs: KL divergence of distributions, 1 − cosine of vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from streamline_hooks.task import Task

_AT_ONCE = 32  # few enough for the processor's cache, at any vocabulary


def reference_of(task: Task, answers: Tensor) -> Tensor:
    """Turn the original's answers, (answers, features), into log-probabilities or unit vectors, in float32 at least."""
    wide = answers.float()
    return wide.log_softmax(dim=-1) if task.gives_distributions else normalize(wide, dim=-1)


def summed_distance(task: Task, reference: Tensor, answers: Tensor) -> float:
    """Sum KL(original ‖ other), in nats, or 1 − cos(original, other), over answers of shape (answers, features)."""
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

"""Further losses on logits for `benchmarks.retained_quality`; importing this module registers them."""

from __future__ import annotations

import torch
from torch import Tensor

from streamline_hooks.distillation import Loss, register_loss

TOP = 32


def kl_of_top_tokens(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) per position over the teacher's most likely tokens and one class for all others.

    A teacher whose answers are stored needs 2·TOP numbers per token for this loss.
    """
    p, top = teacher.log_softmax(dim=-1).topk(min(TOP, teacher.shape[-1] - 1), dim=-1)
    q = student.log_softmax(dim=-1).gather(1, top)
    p, q = (torch.cat([part, _log_of_rest(part)], dim=-1) for part in (p, q))
    return (p.exp() * (p - q)).sum(dim=-1)


def _log_of_rest(log_p: Tensor) -> Tensor:
    """Return log(1 − Σ p) per row, (rows, 1)."""
    return torch.log1p(-log_p.exp().sum(dim=-1, keepdim=True).clamp_max(1 - 1e-6))


def kl_of_damaged_tokens(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) per position, weighted by its own value relative to the mean of the batch.

    The weights are constants for the gradient, between 0 and 4.
    """
    p, q = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    kl = (p.exp() * (p - q)).sum(dim=-1)
    damage = kl.detach()
    return kl * (damage / damage.mean().clamp_min(1e-9)).clamp(0, 4)


for _loss in (
    Loss("top_tokens", kl_of_top_tokens, "logits"),
    Loss("damaged_tokens", kl_of_damaged_tokens, "logits", "after ReCal: weights by the damage"),
):
    register_loss(_loss)

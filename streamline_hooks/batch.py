"""What a model is run on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


def batches_of(sequences: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    """Cut token sequences into batches.

    Parameters
    ----------
    sequences : torch.Tensor
        Token numbers of shape (sequences, tokens), without padding.
    batch_size : int

    Returns
    -------
    list of dict
        With ``input_ids`` and ``attention_mask`` of shape (batch, tokens).
    """
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in sequences.split(batch_size)]


def prepare(model: nn.Module, batch: Batch | Tensor) -> dict[str, Any]:
    """Complete a batch with what the model's forward takes and a bare call would get wrong.

    Tokens are moved to the model's device. Padded batches are given ``position_ids`` from the mask (without them
    some models, GPT-2 among them, count the padding), and no cache is built.

    Parameters
    ----------
    model : torch.nn.Module
    batch : mapping or torch.Tensor
        What the model's forward takes; a tensor of integers stands for ``input_ids``.

    Returns
    -------
    dict
        Keyword arguments for the model.
    """
    given: dict[str, Any] = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    takes = inspect.signature(model.forward).parameters
    device = _device(model)
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    mask = given.get("attention_mask")
    takes_positions = "position_ids" in takes and "position_ids" not in given
    if takes_positions and isinstance(mask, Tensor) and mask.ndim == 2 and not mask.bool().all():
        given["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    if "use_cache" in takes:
        given.setdefault("use_cache", False)
    return given


def _device(model: nn.Module) -> torch.device:
    device = getattr(model, "device", None)
    if isinstance(device, torch.device):
        return device
    return next((p.device for p in model.parameters()), torch.device("cpu"))

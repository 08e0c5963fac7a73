"""What tells a sequence from another, whatever batch it comes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.hidden_state import tokens_first
from streamline_hooks.stack import BlockStack

_BESIDE = ("mask", "position_ids", "token_type_ids")  # how the names of inputs end that are not the content


def sequence_contents(stack: BlockStack, batch: Batch | Tensor, real: Tensor) -> list[bytes]:
    """The values of each sequence's real tokens in the model's main input.

    That is ``input_ids``, where it is given; else what the model names as its ``main_input_name``; else the first
    tensor of the batch that is no mask and no positions. An input that is not by token, such as pixels, counts whole.

    Parameters
    ----------
    stack : BlockStack
        Of the model.
    batch : mapping or torch.Tensor
        What the model's forward takes.
    real : torch.Tensor
        The real tokens, boolean, of shape (batch, tokens).

    Returns
    -------
    list of bytes
        One a sequence.

    Raises
    ------
    StreamlineError
        If there is no such input, or it has not one row a sequence.
    """
    given: Mapping[str, Any] = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    inputs = {k: v for k, v in given.items() if isinstance(v, Tensor) and not k.endswith(_BESIDE)}
    wanted = ("input_ids", getattr(stack.model, "main_input_name", ""), *inputs)
    name = next((name for name in wanted if name in inputs), "")
    values = inputs[name].detach().cpu() if name else torch.empty(0)
    if tokens_first(stack[0]):
        values = values.transpose(0, 1)
    if len(values) != len(real):
        raise StreamlineError(
            f"The input {name or '(none)'} has the shape {tuple(values.shape)}; expected one row for each of the "
            f"{len(real)} sequences, which are told apart by it in order to resample them. Profile with replicates=0, "
            "without confidence intervals."
        )
    values = values if values.is_floating_point() else values.to(torch.int64)
    by_token = values.shape[:2] == real.shape
    rows = [row[mask] if by_token else row for row, mask in zip(values, real.cpu(), strict=True)]
    return [row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows]

"""Read the token id, position and document of every token of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamline_hooks.core import Batch, StreamlineError, padding_mask
from streamline_hooks.modeling import BlockStack

TOKEN_COLUMNS = ("tokens", "positions", "document_ids")


def token_columns_of(
    stack: BlockStack, batches: Sequence[Batch | Tensor], document_ids: Sequence[Tensor] | None
) -> list[dict[str, Tensor]]:
    """Return token ids, positions, document ids and the mask of real tokens of each batch, (batch, tokens)."""
    if getattr(getattr(stack.model, "config", None), "is_encoder_decoder", False):
        raise StreamlineError(
            f"{type(stack.model).__name__} is an encoder-decoder model, whose stacks have different tokens. Expected a "
            "model with one sequence of tokens. Use HiddenStateRecorder and append()."
        )
    if document_ids is not None and len(document_ids) != len(batches):
        raise StreamlineError(
            f"document_ids has {len(document_ids)} tensors for {len(batches)} batches. Expected one per batch. Pass a "
            "list of the same length."
        )
    result: list[dict[str, Tensor]] = []
    first_document = 0
    for number, batch in enumerate(batches):
        ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise StreamlineError(
                f"Batch {number} has no input_ids of shape (batch, tokens). Expected token ids to store with the "
                "states. For other inputs use HiddenStateRecorder and append()."
            )
        ids = ids.cpu()
        inputs: Batch = {} if isinstance(batch, Tensor) else batch
        mask = padding_mask(inputs)
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
        if mask.shape != ids.shape:
            raise StreamlineError(
                f"Batch {number} has an attention mask of shape {tuple(mask.shape)}. Expected {tuple(ids.shape)}, one "
                "entry per token. For other masks use HiddenStateRecorder and append()."
            )
        positions = inputs.get("position_ids")
        is_packed = positions is not None
        if positions is None:
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        elif positions.ndim == 2:
            positions = positions.cpu().expand(ids.shape)
        else:
            raise StreamlineError(
                f"Batch {number} has position_ids of shape {tuple(positions.shape)}. Expected {tuple(ids.shape)}, one "
                "per token. For other positions use HiddenStateRecorder and append()."
            )
        if document_ids is None:
            documents = first_document + _document_numbers(mask, positions if is_packed else None)
            first_document = int(documents.amax()) + 1
        else:
            documents = document_ids[number].cpu()
            documents = documents[:, None].expand(ids.shape) if documents.shape == ids.shape[:1] else documents
            if documents.shape != ids.shape or documents.is_floating_point():
                raise StreamlineError(
                    f"document_ids[{number}] is a {documents.dtype} tensor of shape {tuple(documents.shape)}. Expected "
                    f"integers of shape {tuple(ids.shape[:1])} or {tuple(ids.shape)}. Pass one per sequence or token."
                )
        columns = {"tokens": ids, "positions": positions, "document_ids": documents}
        result.append({**{name: value.long() for name, value in columns.items()}, "mask": mask})
    return result


def _document_numbers(mask: Tensor, positions: Tensor | None) -> Tensor:
    """Return the number of each token's document, from 0; rows and restarts of the positions begin one."""
    starts = torch.zeros_like(mask)
    starts[torch.arange(len(mask)), mask.long().argmax(dim=1)] = True  # the first real token
    if positions is not None:
        starts[:, 1:] |= (positions.diff(dim=1) != 1) & mask[:, 1:] & mask[:, :-1]
    return (starts.flatten().long().cumsum(dim=0) - 1).clamp(min=0).view(mask.shape)

"""Check that a model processes the documents of a packed row independently."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import Batch, StreamlineError, prepare_inputs
from streamline_hooks.data.packing import document_starts
from streamline_hooks.modeling import by_token, forward_parameters, inference
from streamline_hooks.recording import HiddenStateRecorder

Piece = tuple[int, int, int]  # row, first token, end token (exclusive)

_ADVICE = (
    "Give the model one document per row instead of packed rows, or leave out an attention_mask, with which "
    "Transformers does not separate documents."
)
_ROWS = 2  # some attention implementations handle packed rows only in a batch of one row


def check_packing(model: nn.Module, batches: Sequence[Batch], *, stack: str | None = None) -> None:
    """Raise unless a document has the same hidden states in a packed row as alone.

    The two rows of a batch with the most pieces are run, then each piece alone. Models without position ids, models
    with relative biases by index (ALiBi) and recurrent models mix documents without an error.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping
        Packed rows, see `packed_batches`. Nothing is run if no row has two pieces.
    stack : str, optional
        Path of the stack, see `find_stack`.

    Raises
    ------
    StreamlineError
        If the hidden states differ, the model cannot run packed rows, or a batch has no ``position_ids``. The message
        names the model, the first block whose hidden state differs, and the difference.

    Examples
    --------
    >>> from streamline_hooks.data import packed_batches
    >>> from streamline_hooks.testing import tiny_model
    >>> batches = packed_batches([[[5, 6, 7], [8, 9]]], batch_size=1)
    >>> check_packing(tiny_model("llama"), batches)
    >>> try:
    ...     check_packing(tiny_model("bloom"), batches)
    ... except StreamlineError as error:
    ...     print(error)
    BloomForCausalLM mixes the documents of a packed row: the state that leaves block 0 ...
    """
    divided = rows_with_most_documents(model, batches)
    if divided is None:
        return
    rows, pieces = divided
    for number, (row, start, stop) in enumerate(pieces):
        alone = _block_outputs(model, piece_as_batch(rows, row, start, stop), stack)
        if number == 0:  # errors of ordinary rows are raised first, unchanged
            try:
                packed = _block_outputs(model, rows, stack)
            except Exception as error:  # models raise various errors for unexpected positions
                raise packed_run_error(model, error) from error
        if len(alone) != len(packed):
            raise StreamlineError(
                f"{type(model).__name__} calls its blocks a different number of times on packed rows. {_ADVICE}"
            )
        for (k, state), (_, packed_state) in zip(alone, packed, strict=True):
            check_document(model, k, packed_state[row, start:stop], state[0], start)


def rows_with_most_documents(
    model: nn.Module, batches: Sequence[Batch]
) -> tuple[dict[str, Tensor], list[Piece]] | None:
    """Return the two rows of a batch with the most pieces, and their pieces.

    Return None if no row has two pieces. Raise if the batches are not packed or the model does not accept position ids.
    """
    best: tuple[int, Any] = (0, None)
    for batch in batches:
        if missing := {"input_ids", "position_ids"} - set(batch):
            raise StreamlineError(
                f"A batch contains {sorted(batch)} and no {' and no '.join(sorted(missing))}. Expected packed rows. "
                "Create them with packed_batches."
            )
        counts = document_starts(batch["position_ids"]).sum(dim=1)
        chosen = counts.argsort(descending=True, stable=True)[:_ROWS]
        if int(counts.max()) > 1 and int(counts[chosen].sum()) > best[0]:
            best = int(counts[chosen].sum()), {name: value[chosen] for name, value in batch.items()}
    rows = best[1]
    if rows is None:
        return None
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    if "position_ids" not in forward_parameters(model) and not takes_any:
        raise StreamlineError(
            f"{type(model).__name__} cannot run packed rows: its forward has no argument position_ids, which separates "
            f"the documents. {_ADVICE}"
        )
    pieces = []
    for row, row_starts in enumerate(document_starts(rows["position_ids"])):
        edges = [*row_starts.nonzero().flatten().tolist(), len(row_starts)]
        pieces += [(row, start, stop) for start, stop in pairwise(edges)]
    return rows, pieces


def piece_as_batch(rows: Batch, row: int, start: int, stop: int) -> dict[str, Tensor]:
    """Return a piece as a batch with one row."""
    return {"input_ids": rows["input_ids"][row : row + 1, start:stop]}


def check_document(model: nn.Module, k: int, packed: Tensor, alone: Tensor, start: int) -> None:
    """Raise unless a piece has the same hidden states (tokens, features) after block ``k`` packed as alone."""
    epsilon = max(torch.finfo(alone.dtype).eps, torch.finfo(torch.float32).eps)  # norms run in float32 at most
    packed, alone = packed.cpu().double(), alone.cpu().double()
    size = alone.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    difference, allowed = float(((packed - alone).norm(dim=-1) / size).max()), min(0.1, 1e3 * epsilon)
    if not difference <= allowed:
        raise StreamlineError(
            f"{type(model).__name__} mixes the documents of a packed row: the state that leaves block {k} for tokens "
            f"{start} to {start + len(alone) - 1} differs from that of the same tokens alone by a relative error of "
            f"{difference:.1e}; rounding explains at most {allowed:.1e}. {_ADVICE}"
        )


def packed_run_error(model: nn.Module, error: Exception) -> StreamlineError:
    """Return the error to raise for a model that fails on packed rows."""
    return StreamlineError(
        f"{type(model).__name__} cannot be run on packed rows ({type(error).__name__}: {error}). {_ADVICE}"
    )


def _block_outputs(model: nn.Module, batch: Batch, stack: str | None) -> list[tuple[int, Tensor]]:
    """Return the output of each block at each call."""
    record = HiddenStateRecorder(model, sites=["block.output"], stop=True, stack=stack)
    with inference(model), record:
        record(**prepare_inputs(model, batch))
        return [(k, by_token(state, record.stack[k])) for k in record.blocks for state in record.outputs[k]]

"""Check that a model keeps the documents of a packed row apart."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, prepare
from streamline_hooks.calibration.packing import beginnings
from streamline_hooks.errors import StreamlineError
from streamline_hooks.layouts import by_token
from streamline_hooks.passes import forward_arguments, inference
from streamline_hooks.recorder import HiddenStateRecorder

Piece = tuple[int, int, int]  # row, and from which token to which

_ADVICE = "Give it documents in rows of their own (batches_of) instead of packed ones."
_ROWS = 2  # more than one: some attentions know packed rows only in a batch of one


def refuse_crossing(model: nn.Module, batches: Sequence[Batch], *, stack: str | None = None) -> None:
    """Raise unless a model computes the same hidden states for a document in a packed row as for the document alone.

    Runs the two rows of one batch with the most pieces, then each piece alone. Models without position ids, with
    relative biases by index (ALiBi), and recurrent models mix documents silently.

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
        Naming the model, the first block whose hidden state differs, and the difference.

    Examples
    --------
    >>> from streamline_hooks.calibration import packed_batches
    >>> from streamline_hooks.testing import tiny_model
    >>> batches = packed_batches([[[5, 6, 7], [8, 9]]], batch_size=1)
    >>> refuse_crossing(tiny_model("llama"), batches)
    >>> try:
    ...     refuse_crossing(tiny_model("bloom"), batches)
    ... except StreamlineError as error:
    ...     print(error)
    BloomForCausalLM does not keep the documents of a packed row apart: the state that leaves block 0 ...
    """
    divided = most_divided(model, batches)
    if divided is None:
        return
    rows, pieces = divided
    for number, (row, start, stop) in enumerate(pieces):
        alone = _states(model, piece_of(rows, row, start, stop), stack)
        if number == 0:  # after one that is sure to run
            packed = _packed_states(model, rows, stack)
        if len(alone) != len(packed):
            raise StreamlineError(
                f"{type(model).__name__} calls its blocks another number of times on packed rows. {_ADVICE}"
            )
        for (k, state), (_, whole) in zip(alone, packed, strict=True):
            require_apart(model, k, whole[row, start:stop], state[0], start)


def most_divided(model: nn.Module, batches: Sequence[Batch]) -> tuple[dict[str, Tensor], list[Piece]] | None:
    """Return the two rows of one batch with the most pieces, and the pieces; None if no row has two.

    Raises
    ------
    StreamlineError
        If a batch is not packed, or the model takes no position ids.
    """
    best: tuple[int, Any] = (0, None)
    for batch in batches:
        if missing := {"input_ids", "position_ids"} - set(batch):
            raise StreamlineError(
                f"A batch holds {sorted(batch)} and no {' and no '.join(sorted(missing))}; expected packed rows. Make "
                "them with packed_batches."
            )
        counts = beginnings(batch["position_ids"]).sum(dim=1)
        chosen = counts.argsort(descending=True, stable=True)[:_ROWS]
        if int(counts.max()) > 1 and int(counts[chosen].sum()) > best[0]:
            best = int(counts[chosen].sum()), {name: value[chosen] for name, value in batch.items()}
    rows = best[1]
    if rows is None:
        return None
    if "position_ids" not in forward_arguments(model) and not _takes_anything(model):
        raise StreamlineError(
            f"{type(model).__name__} cannot be given packed rows: its forward takes no position_ids, by which "
            f"documents are told apart. {_ADVICE}"
        )
    pieces = []
    for row, own in enumerate(beginnings(rows["position_ids"])):
        edges = [*own.nonzero().flatten().tolist(), len(own)]
        pieces += [(row, start, stop) for start, stop in pairwise(edges)]
    return rows, pieces


def piece_of(rows: Batch, row: int, start: int, stop: int) -> dict[str, Tensor]:
    """Return a piece as a batch of one row."""
    return {"input_ids": rows["input_ids"][row : row + 1, start:stop]}


def require_apart(model: nn.Module, k: int, packed: Tensor, alone: Tensor, start: int) -> None:
    """Raise unless the hidden states (tokens, features) of a piece after block ``k`` equal those of it alone."""
    difference, allowed = _compared(packed, alone)
    if not difference <= allowed:
        raise StreamlineError(
            f"{type(model).__name__} does not keep the documents of a packed row apart: the state that leaves block "
            f"{k} for tokens {start} to {start + len(alone) - 1} differs by {difference:.1e} of its size from that of "
            f"the same tokens alone, where rounding explains {allowed:.1e}. {_ADVICE}"
        )


def _packed_states(model: nn.Module, rows: Batch, stack: str | None) -> list[tuple[int, Tensor]]:
    try:
        return _states(model, rows, stack)
    except Exception as error:  # whatever a model makes of positions that it does not expect
        raise cannot_be_run(model, error) from error


def cannot_be_run(model: nn.Module, error: Exception) -> StreamlineError:
    """Return the error for a model that fails on packed rows."""
    return StreamlineError(
        f"{type(model).__name__} cannot be run on packed rows ({type(error).__name__}: {error}). {_ADVICE}"
    )


def _states(model: nn.Module, batch: Batch, stack: str | None) -> list[tuple[int, Tensor]]:
    """Return the output of each block at each call."""
    record = HiddenStateRecorder(model, inputs=False, stop=True, stack=stack)
    with inference(model), record:
        record(**prepare(model, batch))
        return [(k, by_token(state, record.stack[k])) for k in record.blocks for state in record.outputs[k]]


def _compared(packed: Tensor, alone: Tensor) -> tuple[float, float]:
    """Return the greatest relative difference of a token's hidden state, and the tolerance."""
    epsilon = max(torch.finfo(alone.dtype).eps, torch.finfo(torch.float32).eps)  # norms are float32 at best
    packed, alone = packed.cpu().double(), alone.cpu().double()
    size = alone.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((packed - alone).norm(dim=-1) / size).max()), min(0.1, 1e3 * epsilon)


def _takes_anything(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

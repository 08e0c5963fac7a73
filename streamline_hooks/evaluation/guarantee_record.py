"""Record bounds on the losses of a model with its surgeries, for the checkpoint and its model card."""

from __future__ import annotations

from typing import Any

from torch import nn

from streamline_hooks.core import StreamlineError, state_digest, warn_caller
from streamline_hooks.evaluation.guarantee import Guarantee
from streamline_hooks.surgery import surgery_records

_KEY = "guarantees"  # in the record of a surgery
_OLD_KEY = "guarantee"  # of earlier versions, without a digest of the weights


def record_guarantee(model: nn.Module, statement: Guarantee) -> None:
    """Record a guarantee on the measured model, so that `save` writes it to the checkpoint and the model card.

    The weights must be those that `guarantee` measured, with the same dtypes. `save` leaves the statement out again,
    with a warning, if they have changed. Another statement about the same measure is replaced.

    Parameters
    ----------
    model : torch.nn.Module
        The compressed model that was passed to `guarantee`, after the last surgery and training.
    statement : Guarantee

    Raises
    ------
    StreamlineError
        If the weights are not the measured ones or are offloaded, or no surgery was committed to the model.

    Examples
    --------
    >>> import copy
    >>> import torch
    >>> from streamline_hooks import LayerSurgeon
    >>> from streamline_hooks.evaluation import guarantee
    >>> from streamline_hooks.testing import tiny_model
    >>> original = tiny_model("llama")
    >>> compressed = copy.deepcopy(original)
    >>> with LayerSurgeon(compressed) as surgeon:
    ...     surgeon.remove([3])
    ...     _ = surgeon.commit()
    >>> documents = [torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(k)) for k in range(8)]
    >>> record_guarantee(compressed, guarantee(original, compressed, documents))
    """
    records = surgery_records(model)
    if not records:
        raise StreamlineError(
            f"record_guarantee: no surgery was committed to the {type(model).__name__}. Expected a model changed by "
            "compress or LayerSurgeon.commit. Pass the compressed model."
        )
    if not statement.weights or state_digest(model) != statement.weights:
        reason = "are not those of the statement" if statement.weights else "were offloaded when they were measured"
        raise StreamlineError(
            f"record_guarantee: the weights of the {type(model).__name__} {reason}. Expected the measured weights in "
            "memory, in the same precision. Call guarantee on this model, with data that were not measured yet."
        )
    text = f"relative to the original, {statement}"
    add_statement(model, text, statement.weights, statement.measure)


def add_statement(model: nn.Module, text: str, weights: str, measure: str = "") -> None:
    """Add a statement about weights with a digest to the record of the last surgery, instead of an earlier one."""
    last = surgery_records(model)[-1]
    others = [entry for entry in last.get(_KEY, ()) if entry["measure"] != measure]
    last[_KEY] = [*others, {"measure": measure, "statement": text, "weights": weights}]


def recorded_guarantees(records: list[dict[str, Any]]) -> list[str]:
    """Return the statements about the model that a list of surgeries led to."""
    return [entry["statement"] for entry in (records[-1].get(_KEY, ()) if records else ())]


def drop_outdated_guarantees(model: nn.Module) -> None:
    """Remove the recorded statements that are not about the present weights, with a warning."""
    records = surgery_records(model)
    if not any(key in record for record in records for key in (_KEY, _OLD_KEY)):
        return
    weights, dropped = state_digest(model), 0
    for number, record in enumerate(records):
        statements = record.pop(_KEY, [])
        is_last = number == len(records) - 1
        valid = [entry for entry in statements if is_last and weights and entry["weights"] == weights]
        dropped += len(statements) - len(valid) + (record.pop(_OLD_KEY, None) is not None)
        if valid:
            record[_KEY] = valid
    if dropped:
        warn_caller(
            f"The {type(model).__name__} has {dropped} recorded bounds on its losses that were measured with other "
            "weights or in another precision. They are left out of the checkpoint and of its model card. Call "
            "guarantee and record_guarantee again, with data that were not measured yet."
        )

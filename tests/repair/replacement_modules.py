"""Every kind of stand-in, fitted for a window of a tiny model, and what tests measure of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon
from streamline_hooks.core import Batch, padding_mask, prepare_inputs
from streamline_hooks.repair import WindowReplacement, insert_replacement
from tests.tiny_models import left_padded, tokens

FIT = [tokens(8, 24, seed=1), left_padded(4, 16)]
HELD_OUT = [left_padded(4, 14, seed=2), tokens(4, 20, seed=3)]
VALIDATION = [left_padded(3, 9, seed=4), tokens(2, 12, seed=5)]

HOLD_MAP = ("linear", "mlp:width=40", "mlp:activation=relu,bias", "swiglu", "swiglu:norm=false")
SHAPED = ("linear:rank=4", "linear:diagonal")
PROJECTED = ("mlp:linear=false", "swiglu:width=40,linear=false", "block", "block:count=2", "silenced")
SLOTS = {"block": 1, "block:count=2": 2, "silenced": 1, "merged": 1}
FITTED = (*HOLD_MAP, *SHAPED, *PROJECTED, "folded")
KINDS = ("none", *FITTED, "merged", "scale")


def leaving(
    model: nn.Module, window: range, batch: Batch | torch.Tensor, replacement_module: Any = "original"
) -> torch.Tensor:
    """The state after a window at each real token, of shape (tokens, features), as the next block receives it."""
    given = prepare_inputs(model, batch)
    length = len(HiddenStateRecorder(model).stack)
    with LayerSurgeon(model, probe=False) as surgeon, torch.no_grad():
        if replacement_module != "original":
            insert_replacement(surgeon, window, replacement_module)
        at_end = window.stop == length
        number = -1 if at_end else surgeon.plan.old_to_new[window.stop]
        with HiddenStateRecorder(model, [number]) as record:
            model(**given)
        state = (record.outputs if at_end else record.inputs)[max(record.inputs)][0]
    mask = padding_mask(given)
    return state.flatten(0, 1) if mask is None else state[mask.bool()]


def error(
    model: nn.Module, window: range, replacement_module: WindowReplacement, batches: list[Any] | None = None
) -> float:
    """Mean relative squared error of the state after a window, by putting the stand-in in and running the model."""
    errors = []
    for batch in [*FIT, *HELD_OUT] if batches is None else batches:
        y, made = leaving(model, window, batch).double(), leaving(model, window, batch, replacement_module).double()
        errors.append((y - made).square().sum(-1) / y.square().sum(-1))
    return float(torch.cat(errors).mean())

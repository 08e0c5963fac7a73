"""Identify a sequence by its content, whatever batch it is in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streamline_hooks.batch import Batch
from streamline_hooks.digests import tensor_bytes
from streamline_hooks.errors import StreamlineError
from streamline_hooks.hidden_state import tokens_first
from streamline_hooks.stack import BlockStack

# How the names of inputs end that are not the content, but say how it lies or what is to come of it.
_BESIDE = ("mask", "position_ids", "cache_position", "token_type_ids", "_thw", "_sizes", "_shapes", "labels", "label")
_TEXT = ("input_ids", "inputs_embeds")
_PLACES = {True: ("video_token_id",), False: ("image_token_id", "image_token_index")}  # of what is put into a text


def sequence_contents(stack: BlockStack, batch: Batch | Tensor, real: Tensor) -> list[bytes]:
    """Return the bytes of each sequence's inputs: its real tokens, and the pixels or features beside them.

    A text whose tokens are not the stack's is left out if the stack has other input, as in a vision tower; the source
    of a decoder stays. Images without one row per sequence are divided by the number of image tokens in each text.
    Raise if the rows cannot be assigned to sequences.
    """
    given: Mapping[str, Any] = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    if len(real) > 1 and tokens_first(stack[0]):
        given = {k: v.transpose(0, 1) if _turned(v, len(real)) else v for k, v in given.items()}
    inputs = _inputs(stack, given, real)
    found: dict[str, list[Tensor]] = {}
    for name in sorted(inputs):
        values = inputs[name].detach().cpu()
        rows = _rows(values, len(real), None if name.endswith(_TEXT) else _places(stack, inputs, name))
        if rows is None and not values.is_floating_point() and len(inputs) > 1:
            continue  # numbers that say how another input lies
        if rows is None:
            raise StreamlineError(
                f"The input {name} has the shape {tuple(values.shape)}; expected one row for each of the {len(real)} "
                "sequences, which are told apart by it in order to resample them. Give one sequence a batch, or "
                "profile with replicates=0, without confidence intervals."
            )
        mask = _mask(given, name, values, real)
        found[name] = rows if mask is None else [row[kept] for row, kept in zip(rows, mask.cpu(), strict=True)]
    if not found:
        raise StreamlineError(
            f"Nothing among {sorted(given)} tells the {len(real)} sequences apart, which is needed to resample them; "
            "expected tensors of tokens, pixels or features. Profile with replicates=0, without confidence intervals."
        )
    return [_bytes({name: rows[k] for name, rows in found.items()}) for k in range(len(real))]


def _turned(value: Any, sequences: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == sequences


def _inputs(stack: BlockStack, given: Mapping[str, Any], real: Tensor) -> dict[str, Tensor]:
    """What of a batch the states of a stack come from."""
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim}
    inputs = {name: value for name, value in tensors.items() if not name.endswith(_BESIDE)}
    decodes = "decoder" in stack.path
    if decodes and "labels" in tensors and getattr(getattr(stack.model, "config", None), "is_encoder_decoder", False):
        inputs |= {} if any(name.startswith("decoder_") for name in inputs) else {"labels": tensors["labels"]}
    own = {
        name: value
        for name, value in inputs.items()
        if (decodes or not name.startswith("decoder_"))
        and (decodes or not name.endswith(_TEXT) or value.shape[:2] == real.shape)
    }
    return own or inputs


def _places(stack: BlockStack, inputs: Mapping[str, Tensor], name: str) -> Tensor | None:
    """How many places for pictures (or films) each sequence's text has; None where nothing says so."""
    ids = inputs.get("input_ids")
    configs = [getattr(module, "config", None) for module in stack.ancestors]
    said = [getattr(config, key, None) for config in configs for key in _PLACES["video" in name]]
    token = next((value for value in said if isinstance(value, int)), None)
    if ids is None or token is None or not (ids == token).any():
        return None
    return (ids == token).sum(dim=1).cpu()


def _rows(values: Tensor, sequences: int, places: Tensor | None) -> list[Tensor] | None:
    """What of an input is of each sequence; None where that cannot be told."""
    if sequences == 1:
        return [values[0] if len(values) == 1 else values]
    if places is not None:
        shares = places * len(values)
        if not bool((shares % places.sum()).any()):
            return list(values.split((shares // places.sum()).tolist()))
        if not bool(places.all()):
            return None
    return list(values) if len(values) == sequences else None


def _mask(given: Mapping[str, Any], name: str, values: Tensor, real: Tensor) -> Tensor | None:
    """The real tokens of an input, where it is by token."""
    prefix = name.removesuffix("input_ids").removesuffix("inputs_embeds") if name.endswith(_TEXT) else ""
    own, padding = given.get(f"{prefix}attention_mask"), given.get(f"{name}_key_padding_mask")
    masks = [own if padding is None else padding == 0, real]
    masks = masks if name.endswith(_TEXT) or padding is not None else masks[::-1]
    return next((m.bool() for m in masks if isinstance(m, Tensor) and m.shape == values.shape[:2]), None)


def _bytes(parts: Mapping[str, Tensor]) -> bytes:
    said = {}
    for name, values in parts.items():
        values = values if values.is_floating_point() else values.to(torch.int64)
        if values.numel():  # a text without a picture is the same in a batch with none
            said[name] = bytes(tensor_bytes(values))
    if len(said) < 2:
        return b"".join(said.values())
    return b"".join(f"{name} {len(part)} ".encode() + part for name, part in said.items())

"""Implement a Poisson bootstrap over sequences, which needs one pass and merges by addition."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from streamline_hooks.core import Batch, StreamlineError, tensor_bytes
from streamline_hooks.modeling import BlockStack, tokens_first

# P(N ≤ k) for N ~ Poisson(1), k = 0, 1, ...; from 18 on it is 1 in float64.
_POISSON = np.cumsum([math.exp(-1.0) / math.factorial(k) for k in range(18)])


def poisson_weights(contents: Sequence[bytes], replicates: int) -> Tensor:
    """Return how often each sequence is drawn in each bootstrap resample.

    In a bootstrap of many sequences the counts are approximately independent Poisson(1) variables, so each sequence can
    be weighted in the pass that reads it (Chamandy et al., Estimating Uncertainty for Massive Data Streams, 2012). The
    counts depend only on the content of the sequence: 53 bits of SHAKE-128 per replicate, mapped through the inverse of
    the distribution. They are equal for any batch, order, shard and pass. Equal sequences get equal counts.

    Parameters
    ----------
    contents : sequence of bytes
        The content of each sequence, see `sequence_contents`.
    replicates : int
        Number R of resamples.

    Returns
    -------
    torch.Tensor
        Counts of shape (sequences, R), float64.

    Examples
    --------
    >>> poisson_weights([b"one", b"another"], 6).int().tolist()
    [[2, 0, 1, 4, 0, 2], [1, 0, 0, 1, 5, 2]]
    """
    digests = b"".join(hashlib.shake_128(content).digest(8 * replicates) for content in contents)
    uniform = (np.frombuffer(digests, dtype="<u8") >> 11) * 2.0**-53
    counts = np.searchsorted(_POISSON, uniform, side="right").astype(np.float64)
    return torch.from_numpy(counts.reshape(len(contents), replicates))


class ResampledSums:
    """Sums over sequences and over R bootstrap resamples of the sequences, in constant memory.

    `rows` is a float64 tensor of shape (1 + R, width) on the CPU: the sums, followed by the sums of each resample.
    """

    def __init__(self, width: int, replicates: int = 0) -> None:
        self.rows = torch.zeros(1 + replicates, width, dtype=torch.float64)

    def add(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Add values of shape (sequences, width), weighted by `poisson_weights` of shape (sequences, R) if R > 0."""
        values = values.cpu().to(torch.float64)
        self.rows[0] += values.sum(dim=0)
        replicates = len(self.rows) - 1
        if replicates:
            if weights is None or weights.shape != (len(values), replicates):
                got = "none" if weights is None else tuple(weights.shape)
                raise StreamlineError(
                    f"Got weights of shape {got}. Expected {(len(values), replicates)} (sequences, replicates). Pass "
                    "poisson_weights."
                )
            self.rows[1:] += weights.to(torch.float64).T @ values

    def merge(self, other: Self) -> None:
        """Add the sums over other sequences."""
        self.rows = self.rows + other.rows


# Suffixes of input names that describe positions, shapes or targets and not the content.
_NOT_CONTENT = (
    "mask",
    "position_ids",
    "cache_position",
    "token_type_ids",
    "_thw",
    "_sizes",
    "_shapes",
    "labels",
    "label",
)
_TEXT = ("input_ids", "inputs_embeds")
_PLACEHOLDER_TOKENS = {
    True: ("video_token_id",),
    False: ("image_token_id", "image_token_index"),
}  # tokens replaced by image or video features


def sequence_contents(stack: BlockStack, batch: Batch | Tensor, real: Tensor) -> list[bytes]:
    """Return the bytes of the inputs of each sequence: its real tokens, and its pixels or features.

    Text whose tokens are not those of the stack is excluded if the stack has other inputs, as in a vision tower. The
    source text of a decoder is included. Images without one row per sequence are split by the number of image tokens in
    each text. Raises `StreamlineError` if the rows cannot be assigned to sequences.
    """
    tensors: Mapping[str, Any] = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    if len(real) > 1 and tokens_first(stack[0]):
        transposed = {
            k: v for k, v in tensors.items() if isinstance(v, Tensor) and v.ndim > 1 and v.shape[1] == len(real)
        }
        tensors = {**tensors, **{name: value.transpose(0, 1) for name, value in transposed.items()}}
    inputs = _stack_inputs(stack, tensors, real)
    rows_by_input: dict[str, list[Tensor]] = {}
    for name in sorted(inputs):
        values = inputs[name].detach().cpu()
        rows = _rows_by_sequence(
            values, len(real), None if name.endswith(_TEXT) else _placeholder_counts(stack, inputs, name)
        )
        if rows is None and not values.is_floating_point() and len(inputs) > 1:
            continue  # integers that describe the layout of another input
        if rows is None:
            raise StreamlineError(
                f"The input {name} has the shape {tuple(values.shape)}. Expected one row for each of the {len(real)} "
                "sequences, because the bootstrap identifies sequences by their inputs. Use batches of one sequence, "
                "or replicates=0 for a profile without confidence intervals."
            )
        mask = _input_mask(tensors, name, values, real)
        rows_by_input[name] = (
            rows if mask is None else [row[selected] for row, selected in zip(rows, mask.cpu(), strict=True)]
        )
    if not rows_by_input:
        raise StreamlineError(
            f"The inputs {sorted(tensors)} do not identify the {len(real)} sequences for the bootstrap. Expected "
            "tensors of tokens, pixels or features. Use replicates=0 for a profile without confidence intervals."
        )
    return [_content_bytes({name: rows[k] for name, rows in rows_by_input.items()}) for k in range(len(real))]


def _stack_inputs(stack: BlockStack, batch: Mapping[str, Any], real: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a batch from which the states of a stack are computed."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    inputs = {name: value for name, value in tensors.items() if not name.endswith(_NOT_CONTENT)}
    is_decoder = "decoder" in stack.path
    if (
        is_decoder
        and "labels" in tensors
        and getattr(getattr(stack.model, "config", None), "is_encoder_decoder", False)
    ):
        inputs |= {} if any(name.startswith("decoder_") for name in inputs) else {"labels": tensors["labels"]}
    if is_decoder:
        return inputs
    stack_inputs = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    stack_inputs = {
        name: value for name, value in stack_inputs.items() if not name.endswith(_TEXT) or value.shape[:2] == real.shape
    }
    return stack_inputs or inputs


def _placeholder_counts(stack: BlockStack, inputs: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return the number of image (or video) tokens in the text of each sequence; None if there are none."""
    ids = inputs.get("input_ids")
    configs = [getattr(module, "config", None) for module in stack.ancestors]
    token_ids = [getattr(config, key, None) for config in configs for key in _PLACEHOLDER_TOKENS["video" in name]]
    token = next((value for value in token_ids if isinstance(value, int)), None)
    if ids is None or token is None or not (ids == token).any():
        return None
    return (ids == token).sum(dim=1).cpu()


def _rows_by_sequence(values: Tensor, sequences: int, placeholders: Tensor | None) -> list[Tensor] | None:
    """Split the rows of an input by sequence; None if they cannot be assigned.

    `placeholders` is the result of `_placeholder_counts`.
    """
    if sequences == 1:
        return [values[0] if len(values) == 1 else values]
    if placeholders is not None:
        shares = placeholders * len(values)
        if not bool((shares % placeholders.sum()).any()):
            return list(values.split((shares // placeholders.sum()).tolist()))
        if not bool(placeholders.all()):
            return None
    return list(values) if len(values) == sequences else None


def _input_mask(batch: Mapping[str, Any], name: str, values: Tensor, real: Tensor) -> Tensor | None:
    """Return the mask of real tokens of an input with one row per token, else None."""
    prefix = name.removesuffix("input_ids").removesuffix("inputs_embeds") if name.endswith(_TEXT) else ""
    attention_mask, padding_mask = batch.get(f"{prefix}attention_mask"), batch.get(f"{name}_key_padding_mask")
    masks = [attention_mask if padding_mask is None else padding_mask == 0, real]
    masks = masks if name.endswith(_TEXT) or padding_mask is not None else masks[::-1]
    return next((m.bool() for m in masks if isinstance(m, Tensor) and m.shape == values.shape[:2]), None)


def _content_bytes(parts: Mapping[str, Tensor]) -> bytes:
    contents = {}
    for name, values in parts.items():
        values = values if values.is_floating_point() else values.to(torch.int64)
        if values.numel():  # skip the images of a text without any
            contents[name] = bytes(tensor_bytes(values))
    if len(contents) < 2:
        return b"".join(contents.values())
    return b"".join(f"{name} {len(part)} ".encode() + part for name, part in contents.items())

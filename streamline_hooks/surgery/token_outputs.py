"""Logits of a language model for a few tokens at a time, from the states after its last block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    StreamlineError,
    UnsupportedSurgery,
    batch_rows,
    get_input_ids,
    is_text_batch,
    select_rows,
    shift_labels,
    target_ids,
)
from streamline_hooks.modeling import (
    BlockStack,
    Task,
    VariantOutputs,
    find_stack,
    get_logits,
    inference,
    sum_order_tolerance,
)
from streamline_hooks.recording import ForwardStopped, HiddenStateRecorder
from streamline_hooks.surgery.resume import resume

Head = Callable[[Tensor], Tensor]
"""A function from states after the last block, (tokens, features), to logits, (tokens, vocabulary)."""
LOGIT_BYTES = 2**26
"""Maximum bytes of float32 logits that are computed at a time, if they are of more than one token."""
WHOLE_LOGIT_BYTES = 2**29
"""Maximum bytes of float32 logits of a batch that a model in memory computes at once."""
_PROBED_TOKENS = 8  # tokens whose logits are computed in two ways, to compare them


def exceeds_memory(model: nn.Module, batches: Sequence[Batch | Tensor]) -> bool:
    """Whether the logits of a causal language model for the largest batch take more than `WHOLE_LOGIT_BYTES`."""
    largest = max((_logit_bytes(model, batch) for batch in batches), default=0)
    return largest > WHOLE_LOGIT_BYTES and Task.of(model).is_causal_lm


def rows_within_memory(model: nn.Module, batch: Batch | Tensor) -> int:
    """Return how many sequences of a batch have logits of at most `WHOLE_LOGIT_BYTES`, at least 1."""
    return max(1, batch_rows(batch) * WHOLE_LOGIT_BYTES // max(WHOLE_LOGIT_BYTES, _logit_bytes(model, batch)))


def split_large_batches(model: nn.Module, batches: Sequence[Batch | Tensor]) -> list[Batch | Tensor]:
    """Split batches of text into parts with logits of at most `WHOLE_LOGIT_BYTES`, but at least one sequence."""
    parts: list[Batch | Tensor] = []
    for batch in batches:
        count, rows = batch_rows(batch), rows_within_memory(model, batch)
        parts += [select_rows(batch, slice(k, k + rows)) for k in range(0, count, rows)] if rows < count else [batch]
    return parts


def _logit_bytes(model: nn.Module, batch: Batch | Tensor) -> int:
    """Return the size of the float32 logits of a model with an LM head, otherwise 0."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not is_text_batch(batch):
        return 0
    return 4 * get_input_ids(batch).numel() * len(weight)


def head_of(model: nn.Module, stack: str) -> Head:
    """Return the modules after the blocks of a model in memory as a function."""

    def head(states: Tensor) -> Tensor:
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)  # they determine the length only
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return get_logits(resume(model, len(find_stack(model, stack)), states[None], inputs, stack=stack))[0]

    return head


def last_state(model: nn.Module, stack: str, run: Callable[[], Any]) -> Tensor:
    """Return the state after the last block, (batch, tokens, features), of a forward that does not reach the head."""
    record = HiddenStateRecorder(model, [-1], sites=["block.output"], stop=True, stack=stack)
    with record, suppress(ForwardStopped):
        run()
    ((state,),) = record.outputs.values()
    return state


def agrees_with_forward(model: nn.Module, stack: str, batch: Batch | Tensor) -> bool:
    """Whether `head_of` computes the logits of a forward, for each token alone, on a few tokens of a batch."""
    ids = get_input_ids(batch)[:1, :_PROBED_TOKENS]
    record = HiddenStateRecorder(model, [-1], sites=["block.output"], stack=stack)
    with inference(model):
        with record:
            expected = get_logits(record(input_ids=ids, attention_mask=torch.ones_like(ids)))[0]
        ((state,),) = record.outputs.values()
        if state.ndim != 3 or state.shape[:2] != ids.shape:
            return False
        try:
            logits = torch.cat([head_of(model, stack)(part) for part in state[0].split(1)])
        except (StreamlineError, RuntimeError):
            return False
        return _is_close(logits, expected)


def require_token_by_token(stack: BlockStack, head: Head, state: Tensor) -> None:
    """Raise unless the logits of a token are independent of the other tokens; `state` has (tokens, features)."""
    state = state[:_PROBED_TOKENS]
    together = head(state)
    one_by_one = torch.cat([head(part) for part in state.split(1)])
    if not _is_close(one_by_one, together):
        difference, largest = float((together - one_by_one).abs().max()), float(together.abs().max())
        raise UnsupportedSurgery(
            f"{type(stack.model).__name__} cannot be verified block by block: after its blocks, the logits of a token "
            f"depend on the other tokens: they differ by {difference:.2g}, where the largest is {largest:.2g}. Load "
            "the model into memory.",
            "probe",
        )


def _is_close(logits: Tensor, expected: Tensor) -> bool:
    """Whether logits differ by rounding only; True where the expected logits are not finite, which is found later."""
    difference = float((logits - expected).abs().max())
    is_finite = bool(expected.isfinite().all())
    return difference <= sum_order_tolerance(expected.dtype) * float(expected.abs().max()) or not is_finite


def outputs_by_token(
    batch: Batch | Tensor,
    real: Tensor,
    state: Tensor,
    variants: Sequence[Callable[[], Tensor] | UnsupportedSurgery],
    heads: tuple[Head, Head],
    count: Callable[[int], Any],
) -> Iterator[VariantOutputs]:
    """Yield the logits of a few real tokens of a sequence at a time, and skip sequences of padding.

    Parameters
    ----------
    batch : mapping or torch.Tensor
    real : torch.Tensor
        Mask of the real tokens, (batch, tokens).
    state : torch.Tensor
        State of the original after its last block, (batch, tokens, features).
    variants : sequence
        For each variant, a function that returns its state after the last block, or the error that prevents it.
    heads : tuple of callable
        Of the original, and of all variants.
    count : callable
        Receives the number of tokens whenever logits of the original or of a variant are computed.
    """
    real, ids = real.cpu(), get_input_ids(batch).cpu()
    positions = None if isinstance(batch, Tensor) else batch.get("position_ids")
    following = shift_labels(target_ids(batch).cpu(), real, positions)
    at_once, (head, head_of_variants) = 0, heads

    def run(variant: Callable[[], Tensor] | UnsupportedSurgery, row: int, at: Tensor) -> Tensor:
        if isinstance(variant, UnsupportedSurgery):
            raise variant
        count(len(at))
        return logits_of(head_of_variants, variant(), row, at)

    def logits_of(head: Head, states: Tensor, row: int, at: Tensor) -> Tensor:
        return head(states[row, at.to(states.device)])[None]

    for row, mask in enumerate(real):
        where = mask.nonzero()[:, 0]
        if not len(where):
            continue
        at_once = at_once or max(1, LOGIT_BYTES // (4 * head(state[row, :1]).shape[-1]))
        for at in where.split(min(at_once, len(mask))):
            each = [partial(run, variant, row, at) for variant in variants]
            tokens, labels = ids[row, at][None], following[row, at][None]
            yield VariantOutputs(tokens, tokens, logits_of(head, state, row, at), each, labels)
            count(len(at))

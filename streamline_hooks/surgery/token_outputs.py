"""Logits of a language model for a few tokens at a time, from the states after its last block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import SimpleNamespace
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
    padding_mask,
    prepare_inputs,
    select_rows,
    shift_labels,
    target_ids,
    weights_in_memory,
)
from streamline_hooks.modeling import (
    BlockStack,
    Task,
    VariantOutputs,
    find_stack,
    get_logits,
    inference,
    read_output,
    sum_order_tolerance,
    write_output,
)
from streamline_hooks.recording import ForwardStopped, HiddenStateRecorder
from streamline_hooks.surgery.surgeon import LayerSurgeon

Head = Callable[[Tensor], Tensor]
"""A function from states after the last block, (tokens, features), to logits, (tokens, vocabulary)."""
LOGIT_BYTES = 2**26
"""Maximum bytes of float32 logits that a CPU computes at a time, if they are of more than one token."""
WHOLE_LOGIT_BYTES = 2**29
"""Maximum bytes of float32 logits of a batch that a model in memory computes at once."""
_ACCELERATOR_RATIO = 4  # an accelerator computes so many times more at a time, because each call takes longer to start
_PROBED_TOKENS = 8  # tokens whose logits are computed in two ways, to compare them


def has_large_logits(model: nn.Module, batches: Sequence[Batch | Tensor]) -> bool:
    """Whether the logits of a causal language model for the largest batch take more than `WHOLE_LOGIT_BYTES`."""
    largest = max((_logit_bytes(model, batch) for batch in batches), default=0)
    return largest > WHOLE_LOGIT_BYTES and Task.of(model).is_causal_lm


def rows_within_memory(model: nn.Module, batch: Batch | Tensor) -> int:
    """Return how many sequences of a batch have logits of at most `WHOLE_LOGIT_BYTES`, at least 1.

    A batch with tensors that do not have one entry per sequence, such as image patches, is not divided.
    """
    rows, size = batch_rows(batch), _logit_bytes(model, batch)
    if size <= WHOLE_LOGIT_BYTES or not _can_be_split(batch):
        return rows
    return max(1, rows * WHOLE_LOGIT_BYTES // size)


def tokens_within_memory(model: nn.Module, device: torch.device) -> int:
    """Return how many tokens have logits of at most `LOGIT_BYTES`, or more on an accelerator."""
    limit = LOGIT_BYTES * (1 if device.type == "cpu" else _ACCELERATOR_RATIO)
    return max(1, limit // (4 * len(model.get_output_embeddings().weight)))  # type: ignore[operator]


def split_large_batches(model: nn.Module, batches: Sequence[Batch | Tensor]) -> list[Batch | Tensor]:
    """Split batches of text into parts with logits of at most `WHOLE_LOGIT_BYTES`, but at least one sequence."""
    parts: list[Batch | Tensor] = []
    for batch in batches:
        count, rows = batch_rows(batch), rows_within_memory(model, batch)
        parts += [select_rows(batch, slice(k, k + rows)) for k in range(0, count, rows)] if rows < count else [batch]
    return parts


def _can_be_split(batch: Batch | Tensor) -> bool:
    if isinstance(batch, Tensor):
        return True
    rows = batch_rows(batch)
    return all(len(v) == rows for v in batch.values() if isinstance(v, Tensor) and v.ndim > 1)


def _logit_bytes(model: nn.Module, batch: Batch | Tensor) -> int:
    """Return the size of the float32 logits of a model with an LM head, otherwise 0."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not is_text_batch(batch):
        return 0
    ids = get_input_ids(batch)
    if not isinstance(batch, Tensor) and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        ids = next((batch[name] for name in ("decoder_input_ids", "labels") if name in batch), ids)
    return 4 * ids.numel() * len(weight)


@contextmanager
def lm_head_of(stack: BlockStack, graph: bool = False) -> Iterator[Head]:
    """Load the modules after the blocks, and yield a function from hidden states (tokens, features) to logits.

    The function is a forward of the model with its last block only, whose output is replaced by the states. With
    `graph` it keeps the mode of the model, and builds a graph where gradients are enabled.
    """
    model: Any = stack.model
    last, head = stack[len(stack) - 1], model.get_output_embeddings()
    states: list[Tensor] = []
    inputs_by_length: dict[int, dict[str, Any]] = {}

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        replaced = read_output(output)
        return write_output(output, states[0].to(device=replaced.device, dtype=replaced.dtype, copy=True))

    with ExitStack() as entered:
        entered.enter_context(weights_in_memory(last))
        if isinstance(head, nn.Module):
            entered.enter_context(weights_in_memory(head))
        surgeon = entered.enter_context(LayerSurgeon(model, stack.path, probe=False))
        if len(stack) > 1:
            surgeon.remove(range(len(stack) - 1))
        entered.callback(last.register_forward_hook(leave).remove)
        if not graph:
            entered.enter_context(inference(model))

        def logits(state: Tensor) -> Tensor:
            length = len(state)
            if length not in inputs_by_length:  # the logits do not depend on the ids
                ids = torch.zeros(1, length, dtype=torch.long, device=state.device)
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                inputs_by_length[length] = prepare_inputs(model, inputs)
            states[:] = [state[None]]
            try:
                return get_logits(model(**inputs_by_length[length]))[0]
            finally:
                states.clear()

        yield logits


def last_state(model: nn.Module, stack: str, run: Callable[[], Any]) -> Tensor:
    """Return the state after the last block, (batch, tokens, features), of a forward that does not reach the head."""
    record = HiddenStateRecorder(model, [-1], sites=["block.output"], stop=True, stack=stack)
    with record, suppress(ForwardStopped):
        run()
    ((state,),) = record.outputs.values()
    return state


def agrees_with_forward(model: nn.Module, stack: str, batches: Sequence[Batch | Tensor]) -> bool:
    """Whether the head alone computes the logits of a forward on a few tokens, one at a time."""
    try:
        ids = next(few for batch in batches if (few := _few_tokens(batch)) is not None)
        record = HiddenStateRecorder(model, [-1], sites=["block.output"], stack=stack)
        with inference(model):
            with record:
                expected = get_logits(record(input_ids=ids, attention_mask=torch.ones_like(ids)))[0]
            ((state,),) = record.outputs.values()
            if state.ndim != 3 or state.shape[:2] != ids.shape:
                return False
            with lm_head_of(find_stack(model, stack)) as head:
                return _is_close(torch.cat([head(part) for part in state[0].split(1)]), expected)
    except (StopIteration, StreamlineError, RuntimeError, TypeError, ValueError):
        return False


def _few_tokens(batch: Batch | Tensor) -> Tensor | None:
    """Return the first real tokens of the first sequence in which they are not all the same, (1, tokens)."""
    ids = get_input_ids(batch)
    mask = None if isinstance(batch, Tensor) else padding_mask(batch)
    for row, own in enumerate(ids):
        real = own if not isinstance(mask, Tensor) or mask.shape != ids.shape else own[mask[row].bool()]
        if len(real[:_PROBED_TOKENS].unique()) > 1:
            few: Tensor = real[None, :_PROBED_TOKENS]
            return few
    return None


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
    number: int,
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
    number : int
        Index of the batch.
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
    limit = LOGIT_BYTES * (1 if state.device.type == "cpu" else _ACCELERATOR_RATIO)
    at_once, (head, head_of_variants) = 0, heads

    def run(variant: Callable[[], Tensor] | UnsupportedSurgery, row: int, at: Tensor) -> Any:
        if isinstance(variant, UnsupportedSurgery):
            raise variant
        count(len(at))
        return output_of(head_of_variants, variant(), row, at)

    def output_of(head: Head, states: Tensor, row: int, at: Tensor) -> Any:
        return SimpleNamespace(logits=head(states[row, at.to(states.device)])[None])

    for row, mask in enumerate(real):
        where = mask.nonzero()[:, 0]
        if not len(where):
            continue
        at_once = at_once or max(1, limit // (4 * head(state[row, :1]).shape[-1]))
        for at in where.split(min(at_once, len(mask))):
            each = [partial(run, variant, row, at) for variant in variants]
            tokens, labels = ids[row, at][None], following[row, at][None]
            yield VariantOutputs(tokens, tokens, output_of(head, state, row, at), each, labels, number)
            count(len(at))

"""What a model says to states that have come through its blocks: KL and perplexity, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import prepare
from streamline_hooks.blockwise.outside import OutsideBlocks
from streamline_hooks.blockwise.passing import BlockwisePass
from streamline_hooks.blockwise.residence import resident
from streamline_hooks.branches import tolerance
from streamline_hooks.distance import summed_kl
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.evaluation.perplexity import Perplexity, input_ids, negative_log_likelihoods
from streamline_hooks.hidden_state import read_output, write_output
from streamline_hooks.passes import inference, progress
from streamline_hooks.predicted import UNCOUNTED, following_tokens
from streamline_hooks.scoped import scoped
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.task import logits_of

LOGITS = 2**26
"""Bytes that the logits of the tokens at a time take in float32; one token's may take more."""

Head = Callable[[Tensor], Tensor]


def judge(states: BlockwisePass, batches: Sequence[int], others: Sequence[Sequence[int]]) -> list[float]:
    """KL of what is said to other states from what is said to the batches' own, as `distances_of_candidates` has it.

    The last block is read once more, and so is an LM head that is on disk: both stay until the end.

    Parameters
    ----------
    states : BlockwisePass
        At its last place, behind all blocks.
    batches : sequence of int
        The numbers of the batches to judge on.
    others : sequence of sequence of int
        For each candidate the numbers of its states, one for each of these batches.

    Returns
    -------
    list of float
        Mean KL(original ‖ candidate) a token, in nats.

    Raises
    ------
    UnsupportedSurgery
        If what follows the blocks looks at several tokens at once.
    StreamlineError
        If no token is real.
    """
    sums, tokens = [0.0] * len(others), 0
    with _said(states, batches, others, f"judge: {len(others)} windows") as said:
        for _, original, each in said:
            reference = original.float().log_softmax(dim=-1)
            tokens += len(reference)
            for k, logits in enumerate(each):
                sums[k] += summed_kl(reference, logits)
    return [total / tokens for total in sums]


def perplexities(
    states: BlockwisePass, batches: Sequence[int], others: Sequence[Sequence[int]]
) -> tuple[Perplexity, list[Perplexity]]:
    """Perplexity of what is said to the batches' own states, and to others in their place.

    Parameters and errors are those of `judge`, but that without a real token nothing is counted.
    """
    total, sums = Perplexity(), [Perplexity()] * len(others)
    what = f"perplexity of the original and {len(others)} others"
    with _said(states, batches, others, what) as said:
        for targets, original, each in said:
            count = int((targets != UNCOUNTED).sum())

            def of(logits: Tensor, targets: Tensor = targets, count: int = count) -> Perplexity:
                return Perplexity(sum(negative_log_likelihoods(logits[None], targets[None])), count)

            total += of(original)
            sums = [sum_ + of(logits) for sum_, logits in zip(sums, each, strict=True)]
    return total, sums


@scoped
def _said(
    states: BlockwisePass, batches: Sequence[int], others: Sequence[Sequence[int]], what: str
) -> Generator[tuple[Tensor, Tensor, Iterator[Tensor]], None, None]:
    """Logits of a few real tokens of a sequence at a time, and of the same tokens in each of the others.

    A sequence of nothing but padding is passed over.

    Yields
    ------
    targets : torch.Tensor
        The token that follows each, of shape (tokens,); `UNCOUNTED` where none does.
    original : torch.Tensor
        Of shape (tokens, vocabulary).
    others : iterator of torch.Tensor
        One after the other; not kept.
    """
    place, total = states.stop, sum(int(states.masks[number].sum()) for number in batches)
    with head_of(states.stack) as head, progress((1 + len(others)) * total, what) as bar:
        at_once = 0
        for order, number in enumerate(batches):
            batch, masks = states.batches[number], states.masks[number]
            own, ids = states.read(place, number), input_ids(batch).cpu()
            positions = None if isinstance(batch, Tensor) else batch.get("position_ids")
            following = following_tokens(ids, masks, positions)
            for row, real in enumerate(masks):
                where = real.nonzero()[:, 0]
                if not len(where):
                    continue
                if not at_once:
                    _require_token_by_token(states.stack, head, own[row, where[:_LOOKED_AT]])
                    at_once = max(1, LOGITS // (4 * head(own[row, :1]).shape[-1]))
                for at in where.split(min(at_once, len(real))):

                    def each(row: int = row, at: Tensor = at, order: int = order) -> Iterator[Tensor]:
                        for numbers in others:
                            yield head(states.read(place, numbers[order])[row, at])
                            bar.update(len(at))

                    yield following[row, at], head(own[row, at]), each()
                    bar.update(len(at))


@contextmanager
def head_of(stack: BlockStack) -> Iterator[Head]:
    """What follows the blocks, in memory, as a function of states of shape (tokens, features) to logits.

    It is the model's own forward, in which the last block runs in vain.
    """
    model: Any = stack.model
    last, head = stack[len(stack) - 1], model.get_output_embeddings()
    given: list[Tensor] = []

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        made = read_output(output)
        return write_output(output, given[0].to(device=made.device, dtype=made.dtype, copy=True))

    with ExitStack() as entered:
        entered.callback(OutsideBlocks(stack).restore)
        entered.enter_context(resident(last))
        if isinstance(head, nn.Module):
            entered.enter_context(resident(head))
        surgeon = entered.enter_context(LayerSurgeon(model, stack.path, probe=False))
        if len(stack) > 1:
            surgeon.remove(range(len(stack) - 1))
        entered.callback(last.register_forward_hook(leave).remove)
        entered.enter_context(inference(model))

        def logits(state: Tensor) -> Tensor:
            given[:] = [state[None]]
            try:
                return logits_of(model(**prepare(model, _any_tokens(len(state)))))[0]
            finally:
                given.clear()

        yield logits


def _any_tokens(count: int) -> dict[str, Tensor]:
    """What the model is run on where what leaves its last block is thrown away."""
    ids = torch.zeros(1, count, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


_LOOKED_AT = 8


def _require_token_by_token(stack: BlockStack, head: Head, state: Tensor) -> None:
    """Raise unless a token's logits are the same whatever tokens are beside it."""
    whole = head(state)
    apart = torch.cat([head(part) for part in state.split(1)])
    off, largest = float((whole - apart).abs().max()), float(whole.abs().max())
    if not off <= tolerance(whole.dtype) * largest and whole.isfinite().all():
        raise UnsupportedSurgery(
            f"{type(stack.model).__name__} cannot be judged block by block: what follows its blocks gives a token "
            f"other logits where others are beside it, by {off:.2g} where the largest is {largest:.2g}. Load it into "
            "memory.",
            "probe",
        )

"""What the model would say with a window replaced, for many windows at the cost of their remainders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from streamline_hooks.batch import Batch, tokens_of
from streamline_hooks.batch import real_tokens as mask_of
from streamline_hooks.hidden_state import token_mask
from streamline_hooks.passes import inference, logits_of, progress, recorded, resume
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.surgery.splice import BEFORE, run_splices


@dataclass(frozen=True)
class Candidate:
    """A window and what would stand in its place.

    Attributes
    ----------
    window : range
    module : torch.nn.Module or None
        Without a slot of its own; None for plain removal.
    """

    window: range
    module: nn.Module | None = None


def candidate_logits(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    candidates: Sequence[Candidate],
    what: str,
    stack: str | None = None,
) -> Iterator[tuple[Batch | Tensor, Tensor, Tensor, Iterator[Tensor]]]:
    """Run the original once a batch, and of each candidate only the blocks after its window.

    Parameters
    ----------
    model : torch.nn.Module
        The original.
    batches : sequence of mapping or torch.Tensor
    candidates : sequence of Candidate
    what : str
        What the bar says, which counts a batch's tokens for the original and for each candidate.
    stack : str, optional
        Path of the stack, see `find_stack`.

    Yields
    ------
    batch : mapping or torch.Tensor
    mask : torch.Tensor
        The real tokens, of shape (batch, tokens).
    original : torch.Tensor
        Logits of shape (batch, tokens, vocabulary).
    logits : iterator of torch.Tensor
        The candidates', one after the other; not kept.
    """
    starts = sorted({c.window.start for c in candidates}) or [0]
    record = HiddenStateRecorder(model, starts, outputs=False, stack=stack)
    total = (1 + len(candidates)) * sum(tokens_of(batch) for batch in batches)
    with progress(total, what) as bar:
        for batch, (_, _, output) in zip(batches, recorded(model, batches, record, what, bar), strict=True):
            logits = logits_of(output)
            mask = token_mask(logits, None if isinstance(batch, Tensor) else mask_of(batch))  # of the head's tokens
            bar.update(tokens := int(mask.sum()))

            def each(batch: Batch | Tensor = batch, tokens: int = tokens) -> Iterator[Tensor]:
                for candidate in candidates:
                    yield _logits(model, record, candidate, batch)
                    bar.update(tokens)

            yield batch, mask, logits, each()


def real_tokens(logits: Tensor, mask: Tensor) -> Tensor:
    """The logits of the real tokens, of shape (tokens, vocabulary); a view where there is no padding."""
    real = mask.to(logits.device)
    return logits.flatten(0, 1) if bool(real.all()) else logits[real]


def _logits(model: nn.Module, record: HiddenStateRecorder, candidate: Candidate, batch: Batch | Tensor) -> Tensor:
    window, blocks = candidate.window, record.stack.blocks
    state = record.inputs[window.start][0]  # the original's visit; resuming adds others after it
    if candidate.module is not None:
        with inference(candidate.module):
            state = candidate.module(state)
    if window.stop < len(blocks):  # an earlier repair there stays, as it does in the surgery
        state = run_splices(blocks[window.stop], BEFORE, state)
    return logits_of(resume(model, window.stop, state, batch, stack=record.stack.path))

"""What the model would say with a window replaced, for many windows at the cost of their remainders."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from streamline_hooks.batch import Batch, prepare, tokens_of
from streamline_hooks.distance import reference_of, summed_distance
from streamline_hooks.errors import StreamlineError
from streamline_hooks.passes import inference, progress, recorded, resume
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.scoped import scoped
from streamline_hooks.surgery.splice import BEFORE, run_splices
from streamline_hooks.task import Task


@dataclass(frozen=True)
class Candidate:
    """A window of blocks and its replacement.

    Attributes
    ----------
    window : range
    module : torch.nn.Module or None
        Without a slot of its own; None for plain removal.
    """

    window: range
    module: nn.Module | None = None


@scoped
def candidate_outputs(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    candidates: Sequence[Candidate],
    what: str,
    stack: str | None = None,
) -> Generator[tuple[Batch | Tensor, Any, Iterator[Any]], None, None]:
    """Run the original once per batch, and for each candidate only the blocks after its window; a context manager.

    Yields
    ------
    batch : mapping or torch.Tensor
    original : Any
        The model's output.
    outputs : iterator of Any
        The output with each candidate in turn; not kept.
    """
    starts = sorted({c.window.start for c in candidates}) or [0]
    record = HiddenStateRecorder(model, starts, outputs=False, stack=stack)
    total = (1 + len(candidates)) * sum(tokens_of(batch) for batch in batches)
    with progress(total, what) as bar, recorded(model, batches, record, what, bar) as passed:
        for batch, (_, _, output) in zip(batches, passed, strict=True):
            bar.update(tokens := tokens_of(batch))

            def each(batch: Batch | Tensor = batch, tokens: int = tokens) -> Iterator[Any]:
                for candidate in candidates:
                    yield _output(model, record, candidate, batch)
                    bar.update(tokens)

            yield batch, output, each()


def distances_of_candidates(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    candidates: Sequence[Candidate],
    *,
    stack: str | None = None,
    task: Task | None = None,
    original: nn.Module | None = None,
) -> list[float]:
    """Measure how far each candidate's answers are from the original's.

    Parameters
    ----------
    model : torch.nn.Module
        The model of whose blocks the candidates take the place.
    batches : sequence of mapping or torch.Tensor
        Held-out batches, on which no candidate was fitted.
    candidates : sequence of Candidate
    stack : str, optional
        Path of the stack, see `find_stack`.
    task : Task, optional
        See `Task.of`.
    original : torch.nn.Module, optional
        The reference, run once per batch; by default `model` itself.

    Returns
    -------
    list of float
        Mean KL(original ‖ candidate) per token, text or image, in nats; for embeddings the mean of 1 - cosine.
    """
    task = task or Task.of(model)
    sums, count = [0.0] * len(candidates), 0
    what = f"judge: {len(candidates)} windows"
    with (
        inference(model if original is None else original),
        candidate_outputs(model, batches, candidates, what, stack) as outputs,
    ):
        for batch, own, each in outputs:
            said = own if original is None else original(**prepare(original, batch))
            reference = reference_of(task, task.answers(said, batch))  # once for all candidates
            count += len(reference)
            for k, output in enumerate(each):
                sums[k] += summed_distance(task, reference, task.answers(output, batch))
    if not count:
        raise StreamlineError("The batches hold no real token; give some to judge on.")
    return [total / count for total in sums]


def _output(model: nn.Module, record: HiddenStateRecorder, candidate: Candidate, batch: Batch | Tensor) -> Any:
    window, blocks = candidate.window, record.stack.blocks
    state = record.inputs[window.start][0]  # the original's visit; resuming adds others after it
    if candidate.module is not None:
        with inference(candidate.module):
            state = candidate.module(state)
    if window.stop < len(blocks):  # an earlier repair there stays, as it does in the surgery
        state = run_splices(blocks[window.stop], BEFORE, state)
    return resume(model, window.stop, state, batch, stack=record.stack.path)

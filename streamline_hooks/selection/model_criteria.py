"""Criteria that run the model: with each window removed, or up to the last window."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from streamline_hooks.core import Batch, StreamlineError, batch_rows, progress_bar
from streamline_hooks.evaluation import distances_of_candidates, perplexity_of_candidates
from streamline_hooks.modeling import Candidate, Task, require_default_layout
from streamline_hooks.recording import HiddenStateRecorder
from streamline_hooks.repair import solve_least_squares
from streamline_hooks.statistics import WindowMoments

_HELD_OUT = 5  # one sequence in five


def perplexity_when_removed(
    model: nn.Module, batches: Sequence[Batch | Tensor], windows: Sequence[range], *, stack: str | None = None
) -> list[float]:
    """Return minus the log-perplexity without the window (SLEB, arXiv 2402.09025; Shortened LLaMA, arXiv 2402.02834).

    The score is −inf where the perplexity is not finite. The cost is one forward pass, and for each window a pass
    through the blocks after it and the LM head.
    """
    candidates = [Candidate(window) for window in windows]
    desc = f"perplexity without each of {len(windows)} windows"
    original, perplexities = perplexity_of_candidates(model, batches, candidates, desc, stack=stack)
    if not math.isfinite(original.value):
        raise StreamlineError(
            f"The perplexity of the original {type(model).__name__} is {original.value}. Expected a finite value. "
            "Check the weights, or run in float32 or bfloat16."
        )
    return [-result.nll / result.tokens if math.isfinite(result.nll) else -math.inf for result in perplexities]


def kl_when_removed(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    windows: Sequence[range],
    *,
    stack: str | None = None,
    task: Task | None = None,
    original: nn.Module | None = None,
) -> list[float]:
    """Return minus the KL divergence of the model without the window from the original, in nats per token.

    For embedding models it is minus (1 − cosine). The score is −inf where the logits are not finite. `original` is the
    model before blocks were removed, by default the model itself. The cost is that of `perplexity_when_removed`.
    """
    if not batches:
        raise StreamlineError(
            "kl_when_removed: batches is empty. Expected at least one batch to compare the models on. Pass batches=..."
        )
    candidates = [Candidate(window) for window in windows]
    distances = distances_of_candidates(model, batches, candidates, stack=stack, task=task, original=original)
    return [-kl if math.isfinite(kl) else -math.inf for kl in distances]


def repaired_residual(
    model: nn.Module, batches: Sequence[Batch | Tensor], windows: Sequence[range], *, stack: str | None = None
) -> list[float]:
    """Return minus the relative error of the window's best linear repair on held-out sequences.

    The error is the mean of ‖y − x − Wᵀx‖²/‖y‖², with x the input and y the output of the window, and W the
    least-squares map. The last fifth of the sequences is held out to choose the ridge and to compute the error. One
    pass up to the last block needed accumulates 4·d² float64 numbers per window: 20 windows take 0.2 GB at d = 576 and
    2.7 GB at d = 2,048.
    """
    needed = sorted({w.start for w in windows} | {w.stop - 1 for w in windows})
    record = HiddenStateRecorder(model, needed, stop=True, stack=stack)
    advice = "Choose a criterion without a repair."
    require_default_layout((record.stack[k] for k in needed), f"repaired_residual: {type(model).__name__}", advice)
    sequences = sum(map(batch_rows, batches))
    if sequences < 2:
        raise StreamlineError(
            f"repaired_residual: the batches contain {sequences} sequences. Expected at least two, one to fit on and "
            "one to evaluate on. Pass more batches."
        )
    first_held_out, seen = sequences - max(1, sequences // _HELD_OUT), 0
    moments: list[tuple[WindowMoments, WindowMoments]] = []  # per window: fitting part, held-out part
    desc = f"repaired residual: {len(windows)} windows, {needed[-1] + 1} of {len(record.stack)} blocks"
    with record.over(batches, desc) as recorded_batches:
        for batch in recorded_batches:
            mask, features = batch.real, batch.record.inputs[windows[0].start][0].shape[-1]
            moments = moments or [(WindowMoments(features), WindowMoments(features)) for _ in windows]
            to_fit = max(0, min(len(mask), first_held_out - seen))  # number of rows of this batch to fit on
            seen += len(mask)
            for window, sums in zip(windows, moments, strict=True):
                entering, leaving = batch.entering(window.start), batch.leaving(window.stop - 1)
                for part, rows in zip(sums, (slice(0, to_fit), slice(to_fit, None)), strict=True):
                    part.update(entering[rows], leaving[rows], mask[rows])
    scores = []
    with progress_bar(len(windows), "solve least squares", "windows") as bar:
        for fit, held_out in moments:
            scores.append(-solve_least_squares(fit, held_out).held_out_error)
            bar.update()
    return scores

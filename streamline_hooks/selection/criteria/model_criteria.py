"""Criteria that run the model: with each window removed, or up to the last window. A higher score goes sooner."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation import Candidate, distances_of_candidates, perplexity_of_candidates
from streamline_hooks.layouts import by_token, require_usual
from streamline_hooks.passes import progress, recorded
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.repair import solve
from streamline_hooks.statistics import WindowMoments
from streamline_hooks.task import Task

_HELD_OUT = 5  # one sequence in five


def perplexity_when_removed(
    model: nn.Module, batches: Sequence[Batch | Tensor], windows: Sequence[range], *, stack: str | None = None
) -> list[float]:
    """Minus the logarithm of the perplexity without the window (SLEB, arXiv 2402.09025; Shortened LLaMA, 2402.02834).

    A pass costs a forward, and for each window the blocks after it and the LM head.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
    windows : sequence of range
    stack : str, optional
        Path of the stack, see `find_stack`.

    Returns
    -------
    list of float
        Minus the mean negative log-likelihood a token, in nats; −inf where it is not finite without the window.

    Raises
    ------
    StreamlineError
        If the original's perplexity is not finite, or the batches predict no token.
    """
    candidates = [Candidate(window) for window in windows]
    what = f"perplexity without each of {len(windows)} windows"
    original, each = perplexity_of_candidates(model, batches, candidates, what, stack=stack)
    if not math.isfinite(original.value):
        raise StreamlineError(
            f"The perplexity of the original {type(model).__name__} is {original.value}. Look at its weights, or run "
            "in a wider precision (float32 or bfloat16)."
        )
    return [-one.nll / one.tokens if math.isfinite(one.nll) else -math.inf for one in each]


def kl_when_removed(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    windows: Sequence[range],
    *,
    stack: str | None = None,
    task: Task | None = None,
    original: nn.Module | None = None,
) -> list[float]:
    """Minus the KL divergence of the model without the window from the original, in nats a token.

    For a model for embeddings, minus 1 - cosine. SLEB (arXiv 2402.09025) and Shortened LLaMA (arXiv 2402.02834) compare
    perplexity; KL compares the whole distribution with that of the original. The cost is that of
    `perplexity_when_removed`.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
    windows : sequence of range
    stack : str, optional
        Path of the stack, see `find_stack`.
    task : Task, optional
        See `Task.of`.
    original : torch.nn.Module, optional
        The model before blocks were removed, if any were; by default the model itself.

    Returns
    -------
    list of float
        −inf where the logits are not finite without the window.

    Raises
    ------
    StreamlineError
        If there is no text.
    """
    if not batches:
        raise StreamlineError("There is no text to compare the models on; give one batch at least.")
    candidates = [Candidate(window) for window in windows]
    each = distances_of_candidates(model, batches, candidates, stack=stack, task=task, original=original)
    return [-kl if math.isfinite(kl) else -math.inf for kl in each]


def repaired_residual(
    model: nn.Module, batches: Sequence[Batch | Tensor], windows: Sequence[range], *, stack: str | None = None
) -> list[float]:
    """Minus the relative squared error of the best linear repair on held-out sequences, weighted as `WindowMoments` is.

    The last fifth of the sequences is held out, to choose the ridge and to evaluate. One pass, up to the last block
    needed, sums 4·d² float64 numbers a window: 0.2 GB for 20 windows of width 576, and 2.7 GB of width 2,048.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
        Of two sequences at least.
    windows : sequence of range
    stack : str, optional
        Path of the stack, see `find_stack`.

    Returns
    -------
    list of float
        Minus the mean of ‖y − x − Wᵀx‖²/‖y‖², with x and y the states before and after the window.

    Raises
    ------
    UnsupportedSurgery
        If the states are not laid out as (batch, tokens, features).
    StreamlineError
        If there are fewer than two sequences, or a state is not finite.
    """
    needed = sorted({w.start for w in windows} | {w.stop - 1 for w in windows})
    record = HiddenStateRecorder(model, needed, stop=True, stack=stack)
    advice = "Choose a criterion without a repair."
    require_usual((record.stack[k] for k in needed), f"repaired_residual: {type(model).__name__}", advice)
    sequences = sum(_sequences(batch) for batch in batches)
    if sequences < 2:
        raise StreamlineError(
            f"The batches hold {sequences} sequences; expected two at least, one to fit on and one to evaluate on."
        )
    first_held_out, seen = sequences - max(1, sequences // _HELD_OUT), 0
    moments: list[tuple[WindowMoments, WindowMoments]] = []  # of each window: to fit on, and held out
    what = f"repaired residual: {len(windows)} windows, {needed[-1] + 1} of {len(record.stack)} blocks"
    with recorded(model, batches, record, what) as passed:
        for _, mask, _ in passed:
            features = record.inputs[windows[0].start][0].shape[-1]
            moments = moments or [(WindowMoments(features), WindowMoments(features)) for _ in windows]
            to_fit = max(0, min(len(mask), first_held_out - seen))  # rows of this batch
            seen += len(mask)
            for window, sums in zip(windows, moments, strict=True):
                states = record.inputs[window.start][0], record.outputs[window.stop - 1][0]
                entering, leaving = (by_token(state, record.stack[window.start]) for state in states)
                for part, rows in zip(sums, (slice(0, to_fit), slice(to_fit, None)), strict=True):
                    part.update(entering[rows], leaving[rows], mask[rows])
    scores = []
    with progress(len(windows), "solve least squares", "windows") as bar:
        for fit, held_out in moments:
            scores.append(-solve(fit, held_out).held_out_error)
            bar.update()
    return scores


def _sequences(batch: Batch | Tensor) -> int:
    return len(batch if isinstance(batch, Tensor) else batch.get("input_ids", next(iter(batch.values()))))

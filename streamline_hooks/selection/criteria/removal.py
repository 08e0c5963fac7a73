"""Criteria that remove each window and look at what the model then says. A higher score goes sooner."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation import Candidate, distances_of_candidates, perplexity_of_candidates
from streamline_hooks.task import Task


def perplexity_when_removed(
    model: nn.Module, batches: Sequence[Batch | Tensor], windows: Sequence[range], *, stack: str | None = None
) -> list[float]:
    """Minus the logarithm of the perplexity without the window (SLEB, arXiv 2402.09025; Shortened LLaMA, 2402.02834).

    The blocks before a window are run once for all. A pass costs a forward, and for each window the blocks after it
    and the LM head; memory is one batch's states at the windows' entrances.

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
    """Minus the KL divergence of the model without the window from the original, a token, in nats.

    Of a model for embeddings minus 1 - cosine.

    What SLEB (arXiv 2402.09025) and Shortened LLaMA (arXiv 2402.02834) do with perplexity, held against the original
    and not against the text: all that the model would say counts, and not only the one token that followed. It costs
    what `perplexity_when_removed` does.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
    windows : sequence of range
    stack : str, optional
        Path of the stack, see `find_stack`.
    task : Task, optional
        What the model is for, see `Task.of`.
    original : torch.nn.Module, optional
        Where the model has lost blocks already, the one that it is held against; by default the model itself.

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

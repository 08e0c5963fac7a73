"""Criterion: the accuracy on a task without a window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from streamline_hooks.digests import texts_digest, tokenizer_digest
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.perplexity import NotFiniteLikelihood
from streamline_hooks.evaluation.tasks import TaskSettings, load_tasks
from streamline_hooks.selection.criteria.registry import Criterion
from streamline_hooks.surgery import LayerSurgeon


def accuracy_drop(task: str | Mapping[str, Any], tokenizer: Any, settings: TaskSettings | None = None) -> Criterion:
    """Make a criterion of a task of lm-eval.

    The score is the accuracy without a window minus that of the whole model; each window costs one evaluation of the
    task. The criterion reads no batches; give `score_windows` an empty list.

    Parameters
    ----------
    task : str or mapping
        As for `run_tasks`; not the task that results are reported on.
    tokenizer : PreTrainedTokenizerBase
    settings : TaskSettings, optional

    Returns
    -------
    Criterion
        −inf if a log-likelihood is not finite. To register it:
        ``register_criterion(replace(accuracy_drop(...), name="mine"))``.

    Raises
    ------
    StreamlineError
        If the task cannot be loaded or has no metric from 0 to 1 for each item; when scoring, if a window cannot be
        removed.
    """
    loaded = list(load_tasks([task], settings or TaskSettings()).values())

    def accuracy(model: nn.Module) -> float:
        results = [one.run(model, tokenizer) for one in loaded]
        if missing := [one.name for one, result in zip(loaded, results, strict=True) if not result.metric]:
            raise StreamlineError(
                f"{missing[0]} scores no item from 0 to 1. Expected a metric such as acc. Choose another."
            )
        return math.fsum(result.accuracy for result in results) / len(results)

    def score(model: nn.Module, batches: Any, windows: Sequence[range], *, stack: str | None = None) -> list[float]:
        whole, scores = accuracy(model), []
        for window in windows:
            with LayerSurgeon(model, stack) as surgeon:
                surgeon.remove(window)
                try:
                    scores.append(accuracy(model) - whole)
                except NotFiniteLikelihood:
                    scores.append(-math.inf)
        return scores

    def made_of() -> str:
        return texts_digest([*(one.digest() for one in loaded), tokenizer_digest(tokenizer)])

    return Criterion("accuracy", score, "model", made_of=made_of)

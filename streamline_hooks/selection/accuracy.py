"""Criterion that scores windows by task accuracy after their removal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from streamline_hooks.core import StreamlineError, texts_digest, tokenizer_digest
from streamline_hooks.evaluation import NotFiniteLikelihood, TaskSettings, load_tasks
from streamline_hooks.selection.criteria import Criterion
from streamline_hooks.surgery import LayerSurgeon


def accuracy_drop(task: str | Mapping[str, Any], tokenizer: Any, settings: TaskSettings | None = None) -> Criterion:
    """Return a criterion that evaluates an lm-eval task with each window removed.

    The score is the accuracy without the window minus the accuracy of the whole model, or −inf if a log-likelihood is
    not finite. Each window costs one evaluation of the task. The criterion does not use batches: pass ``batches=[]`` to
    `score_windows`.

    Parameters
    ----------
    task : str or mapping
        The task, as for `run_tasks`. Do not use a task on which results are reported.
    tokenizer : PreTrainedTokenizerBase
        The tokenizer of the model.
    settings : TaskSettings, optional
        Number of items, few-shot examples and batch size.

    Returns
    -------
    Criterion

    Raises
    ------
    StreamlineError
        If the task cannot be loaded. Scoring raises if the task has no metric between 0 and 1, or if a window cannot
        be removed.

    Examples
    --------
    >>> criterion = accuracy_drop("arc_easy", tokenizer, TaskSettings(items=100))  # doctest: +SKIP
    >>> score_windows(criterion, [range(3, 6)], model=model, batches=[])  # doctest: +SKIP
    [-0.03]
    """
    loaded = list(load_tasks([task], settings or TaskSettings()).values())

    def accuracy(model: nn.Module) -> float:
        results = [lm_task.run(model, tokenizer) for lm_task in loaded]
        if missing := [lm_task.name for lm_task, result in zip(loaded, results, strict=True) if not result.metric]:
            raise StreamlineError(
                f"The task {missing[0]} has no metric between 0 and 1. Expected a metric such as acc. Choose another "
                "task."
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
        return texts_digest([*(lm_task.digest() for lm_task in loaded), tokenizer_digest(tokenizer)])

    return Criterion("accuracy", score, "model", made_of=made_of)

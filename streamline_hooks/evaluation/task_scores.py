"""Score changed models against the stored outputs of the original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from streamline_hooks.core import IGNORE_INDEX, Batch, StreamlineError, validate_arguments
from streamline_hooks.evaluation.batch_scores import require_classes
from streamline_hooks.evaluation.embeddings import compare_embeddings, compute_answers
from streamline_hooks.modeling import Task, reference_outputs, sum_distance

MEASURES = {
    "accuracy": "accuracy",
    "top1": "top-1 agreement",
    "kl": "KL",
    "cosine": "cosine",
    "spearman": "Spearman of similarities",
}


class TaskScores:
    """Score changed models on the same batches, against the outputs of the original.

    The original runs once, and its outputs are stored on the CPU. They take outputs × features × 4 bytes; a language
    model has one output per token, with the vocabulary as features.

    Parameters
    ----------
    original : torch.nn.Module
        The original model.
    batches : sequence of mapping or torch.Tensor
        Inputs, for classifiers with ``labels`` of shape (batch,) if accuracy is needed.
    task : Task
        The models' task (see `Task.of`).
    what : str
        Label of the progress bar.

    Attributes
    ----------
    original : dict of str to float
        Scores of the original (see `of`).

    Raises
    ------
    StreamlineError
        If there is no batch or no real token, or an output is not finite.

    Examples
    --------
    >>> from streamline_hooks import LayerSurgeon
    >>> from streamline_hooks.testing import tiny_model
    >>> model, texts = tiny_model("llama").model, [torch.arange(40).view(5, 8)]
    >>> scores = TaskScores(model, texts, Task("embedding"))
    >>> with LayerSurgeon(model) as surgeon:
    ...     surgeon.remove([3])
    ...     changed = scores.of(model)
    >>> sorted(changed), scores.original["cosine"] > changed["cosine"]
    (['cosine', 'spearman'], True)
    """

    @validate_arguments()
    def __init__(
        self, original: nn.Module, batches: Sequence[Batch | Tensor], task: Task, what: str = "original"
    ) -> None:
        if not batches:
            raise StreamlineError("TaskScores: batches is empty. Expected at least one batch. Pass batches.")
        self.task, self._batches = task, list(batches)
        self._references = [
            reference_outputs(task, rows) for rows in compute_answers(original, self._batches, task, what)
        ]
        if not sum(map(len, self._references)):
            raise StreamlineError("The batches contain no real token. Expected at least one. Pass other batches.")
        self.original = self._scores(self._references)

    def of(self, model: nn.Module, what: str = "changed model") -> dict[str, float]:
        """Score a changed model.

        Returns
        -------
        dict of str to float
            For models with logits: ``kl``, the mean KL(original ‖ changed) in nats; ``top1``, the fraction of outputs
            with the same top-1 token or class; and, for classifiers with labels, ``accuracy``, without outputs whose
            label is −100. For embedding models:
            ``cosine`` and ``spearman`` (see `EmbeddingSimilarity`).
        """
        return self._scores(compute_answers(model, self._batches, self.task, what))

    def _scores(self, answers: list[Tensor]) -> dict[str, float]:
        if not self.task.gives_distributions:
            similarity = compare_embeddings(torch.cat(self._references), torch.cat(answers))
            return {"cosine": similarity.cosine, "spearman": similarity.spearman}
        pairs = list(zip(self._references, answers, strict=True))
        count = sum(map(len, self._references))
        same = sum(int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum()) for p, q in pairs)
        kl = math.fsum(sum_distance(self.task, p, q) for p, q in pairs) / count
        scores = {"kl": max(0.0, kl), "top1": same / count}  # rounding can make the KL negative
        labels = [batch.get("labels") if not isinstance(batch, Tensor) else None for batch in self._batches]
        if self.task.unit != "token" and all(isinstance(batch_labels, Tensor) for batch_labels in labels):
            known = sum(int((cast(Tensor, target) != IGNORE_INDEX).sum()) for target in labels)
            right = [_count_right(q, cast(Tensor, target)) for q, target in zip(answers, labels, strict=True)]
            scores |= {"accuracy": sum(right) / known} if known else {}
        return scores


def _count_right(answers: Tensor, labels: Tensor) -> int:
    """Count the outputs whose top-1 class equals the label."""
    if labels.shape != (len(answers),) or labels.is_floating_point():
        raise StreamlineError(
            f"The labels of a batch have dtype {labels.dtype} and shape {tuple(labels.shape)}. Expected one class "
            f"index for each of {len(answers)} outputs, of shape ({len(answers)},). Correct the labels."
        )
    require_classes(labels, answers.shape[1])
    return int((answers.argmax(dim=-1) == labels.to(answers.device)).sum())

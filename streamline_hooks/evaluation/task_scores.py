"""Score changed models at their task, against the kept answers of the original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.distance import reference_of, summed_distance
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.likeness import answers_of, likeness_of
from streamline_hooks.task import Task

MEASURES = {
    "accuracy": "accuracy",
    "top1": "top-1 agreement",
    "kl": "KL",
    "cosine": "cosine",
    "spearman": "Spearman of similarities",
}


class TaskScores:
    """Score changed models on the same batches, against the answers of the original, which are kept on the CPU.

    Parameters
    ----------
    original : torch.nn.Module
        It is run once, here.
    batches : sequence of mapping or torch.Tensor
        With ``labels`` of shape (batch,) for the accuracy of a classifier.
    task : Task
    what : str
        Label of the progress bar.

    Attributes
    ----------
    original : dict of str to float
        Scores of the original, see `of`.

    Raises
    ------
    StreamlineError
        If there is no batch, or an answer is not finite.

    Notes
    -----
    Memory: answers × features × 4 bytes; each token of a decoder is an answer, with the vocabulary as its features.

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

    @checked()
    def __init__(
        self, original: nn.Module, batches: Sequence[Batch | Tensor], task: Task, what: str = "original"
    ) -> None:
        if not batches:
            raise StreamlineError("There is no batch to score on; give one at least.")
        self.task, self._batches = task, list(batches)
        self._references = [reference_of(task, rows) for rows in answers_of(original, self._batches, task, what)]
        if not sum(map(len, self._references)):
            raise StreamlineError("The batches hold no real token; give some to score on.")
        self.original = self._scores(self._references)

    def of(self, model: nn.Module, what: str = "changed model") -> dict[str, float]:
        """Score a changed model.

        Returns
        -------
        dict of str to float
            For distributions ``kl``, the mean KL(original ‖ changed) in nats; ``top1``, the share of answers with the
            same token or class first; and ``accuracy``, if a classifier's batches have labels. For embeddings
            ``cosine`` and ``spearman``, see `Likeness`.
        """
        return self._scores(answers_of(model, self._batches, self.task, what))

    def _scores(self, answers: list[Tensor]) -> dict[str, float]:
        if not self.task.gives_distributions:
            alike = likeness_of(torch.cat(self._references), torch.cat(answers))
            return {"cosine": alike.cosine, "spearman": alike.spearman}
        pairs = list(zip(self._references, answers, strict=True))
        count = sum(map(len, self._references))
        same = sum(int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum()) for p, q in pairs)
        found = {
            "kl": max(0.0, math.fsum(summed_distance(self.task, p, q) for p, q in pairs) / count),  # of rounding
            "top1": same / count,
        }
        labels = [batch.get("labels") if not isinstance(batch, Tensor) else None for batch in self._batches]
        if self.task.unit != "token" and all(isinstance(one, Tensor) for one in labels):
            right = [_right(q, cast(Tensor, one)) for q, one in zip(answers, labels, strict=True)]
            found["accuracy"] = sum(right) / count
        return found


def _right(answers: Tensor, labels: Tensor) -> int:
    """Count the answers whose first class is the label."""
    if labels.shape != (len(answers),) or labels.is_floating_point():
        raise StreamlineError(
            f"The labels of a batch are {labels.dtype} of shape {tuple(labels.shape)}; expected the number of one "
            f"class for each of {len(answers)}, of shape ({len(answers)},)."
        )
    return int((answers.argmax(dim=-1) == labels.to(answers.device)).sum())

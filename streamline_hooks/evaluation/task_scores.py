"""How a changed model does at its task, beside the original whose answers are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch, prepare, tokens_of
from streamline_hooks.distance import reference_of, summed_distance
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.agreement import require_finite
from streamline_hooks.evaluation.likeness import likeness_of
from streamline_hooks.passes import inference, progress
from streamline_hooks.task import Task

MEASURES = {
    "accuracy": "accuracy",
    "top1": "top-1 agreement",
    "kl": "KL",
    "cosine": "cosine",
    "spearman": "Spearman of similarities",
}


class TaskScores:
    """Scores of models on the same batches, against the answers of the original, which are kept on the CPU.

    Parameters
    ----------
    original : torch.nn.Module
        It is run once, here, and not needed any more afterwards.
    batches : sequence of mapping or torch.Tensor
        With ``labels`` of shape (batch,) where a classifier's accuracy is to be told.
    task : Task
    what : str
        What the bar says.

    Attributes
    ----------
    original : dict of str to float
        What the original reaches, by measure: that of `of`.

    Raises
    ------
    StreamlineError
        If there is no batch, or an answer is not finite.

    Notes
    -----
    Memory: answers × features × 4 bytes, where of a decoder's tokens each is an answer, with as many features as the
    vocabulary has tokens.

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
        self._references = [reference_of(task, rows) for rows in self._answers(original, what)]
        if not sum(map(len, self._references)):
            raise StreamlineError("The batches hold no real token; give some to score on.")
        self.original = self._scores(self._references)

    def of(self, model: nn.Module, what: str = "changed model") -> dict[str, float]:
        """What a changed model reaches.

        Parameters
        ----------
        model : torch.nn.Module
        what : str
            What the bar says.

        Returns
        -------
        dict of str to float
            By measure. Of distributions ``kl``, the mean KL(original ‖ changed) in nats; ``top1``, the share of answers
            with the same token or class first; and ``accuracy``, where a classifier's batches have labels. Of
            embeddings ``cosine`` and ``spearman``, see `Likeness`.
        """
        return self._scores(self._answers(model, what))

    def _answers(self, model: nn.Module, what: str) -> list[Tensor]:
        rows = []
        with inference(model), progress(sum(map(tokens_of, self._batches)), what) as bar:
            for number, batch in enumerate(self._batches):
                given = prepare(model, batch)
                if self.task.unit != "token":
                    given.pop("labels", None)  # the model's own loss is not needed, and sets its problem_type
                rows.append(self.task.answers(model(**given), batch).cpu())
                require_finite({"model": rows[-1]}, number)
                bar.update(tokens_of(batch))
        return rows

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
    """How many of a batch are put in their class."""
    if labels.shape != (len(answers),) or labels.is_floating_point():
        raise StreamlineError(
            f"The labels of a batch are {labels.dtype} of shape {tuple(labels.shape)}; expected the number of one "
            f"class for each of {len(answers)}, of shape ({len(answers)},)."
        )
    return int((answers.argmax(dim=-1) == labels.to(answers.device)).sum())

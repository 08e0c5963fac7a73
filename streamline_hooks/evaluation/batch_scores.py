"""Score a model on labeled batches of its task, or compare its outputs with the original's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from streamline_hooks.core import (
    IGNORE_INDEX,
    Batch,
    StreamlineError,
    batch_rows,
    count_tokens,
    padding_mask,
    prepare_inputs,
    progress_bar,
    shift_labels,
    target_ids,
    validate_arguments,
)
from streamline_hooks.evaluation.agreement import (
    Agreement,
    compare_logits,
    require_finite_outputs,
    run_paired,
    warn_that_prompts_are_run_in_full,
)
from streamline_hooks.evaluation.embeddings import EmbeddingSimilarity, compare_embeddings
from streamline_hooks.evaluation.perplexity import Perplexity
from streamline_hooks.modeling import Task, inference
from streamline_hooks.surgery import split_large_batches


def require_classes(labels: Tensor, classes: int) -> None:
    """Raise unless each label is a class index or `IGNORE_INDEX`."""
    wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise StreamlineError(
            f"A batch has the label {int(wrong[0])}. Expected class indices from 0 to {classes - 1}, or "
            f"{IGNORE_INDEX} where the class is unknown. Map the labels to the model's classes; test splits often hide "
            "them as -1."
        )


_ANSWERS_AT_ONCE = 32  # fits the processor's cache with any vocabulary


@dataclass(frozen=True)
class BatchScores:
    """Scores of one model on batches; returned by `score_batches`.

    Attributes
    ----------
    unit : str
        The unit of an output: "token", "image" or "text".
    answers : int
        Number of outputs, with or without a label.
    correct : tuple of bool
        For each labeled output, whether the top-1 class or token equals the label. Empty without labels and for causal
        language models.
    rows : tuple of int
        For token outputs, the index of the sequence of each labeled output.
    chance : float
        Accuracy of uniform guessing.
    nll : float
        For causal language models, the sum of −log p(next token), in nats.
    predicted : int
        For causal language models, the number of predicted tokens.

    Examples
    --------
    >>> BatchScores("image", answers=4, correct=(True, True, False, True), chance=0.1).accuracy
    0.75
    """

    unit: str
    answers: int = 0
    correct: tuple[bool, ...] = ()
    rows: tuple[int, ...] = ()
    chance: float = 0.0
    nll: float = 0.0
    predicted: int = 0

    @property
    def accuracy(self) -> float:
        """Fraction of the labeled outputs that are correct; NaN without labels."""
        return sum(self.correct) / len(self.correct) if self.correct else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy, clustered by sequence for token outputs; NaN for fewer than two clusters."""
        clusters: dict[int, list[float]] = {}
        for number, right in enumerate(self.correct):
            clusters.setdefault(self.rows[number] if self.rows else number, []).append(right - self.accuracy)
        if len(clusters) < 2:
            return math.nan
        squares = math.fsum(sum(deviations) ** 2 for deviations in clusters.values())
        return math.sqrt(len(clusters) / (len(clusters) - 1) * squares) / len(self.correct)

    @property
    def perplexity(self) -> float:
        """Perplexity of a causal language model; NaN for other models."""
        return Perplexity(self.nll, self.predicted).value if self.predicted else math.nan


@dataclass(frozen=True)
class BatchComparison:
    """Scores of a changed model and its original on the same batches, with their agreement.

    Attributes
    ----------
    changed, original : BatchScores
        Scores of both models.
    agreement : Agreement
        Agreement of the output distributions; empty for embedding models.
    similarities : tuple of float
        For embedding models, the mean cosine and, if defined, the rank correlation of similarities.

    Examples
    --------
    >>> comparison = BatchComparison(BatchScores("text", 3), BatchScores("text", 3), similarities=(0.98,))
    >>> comparison.similarity.cosine
    0.98
    """

    changed: BatchScores
    original: BatchScores
    agreement: Agreement = field(default_factory=Agreement)
    similarities: tuple[float, ...] = ()

    @property
    def similarity(self) -> EmbeddingSimilarity | None:
        """Similarity of the embeddings; None for models with output distributions."""
        if not self.similarities:
            return None
        cosine, spearman = (*self.similarities, math.nan)[:2]
        return EmbeddingSimilarity(cosine, spearman, self.changed.answers)


@validate_arguments()
def score_batches(
    model: nn.Module, batches: Sequence[Batch | Tensor], *, task: Task | None = None, desc: str = "score"
) -> BatchScores:
    """Score a model on labeled batches of its task.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    batches : sequence of mapping or torch.Tensor
        Inputs with ``labels``. For classifiers, the class indices, of shape (batch,). For masked and
        sequence-to-sequence models, token ids of shape (batch, tokens), with -100 at unlabeled positions. Causal
        language models need no labels.
    task : Task, optional
        The model's task (see `Task.of`).
    desc : str
        Label of the progress bar.

    Returns
    -------
    BatchScores

    Raises
    ------
    StreamlineError
        If labels are missing or do not match the outputs, or an output is not finite.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> score_batches(tiny_model("llama"), [torch.arange(12).view(2, 6)]).predicted
    10
    """
    task = task or Task.of(model)
    counter = _Counter(task)
    warn_that_prompts_are_run_in_full(model)
    with inference(model), progress_bar(sum(map(count_tokens, batches)), desc) as bar:
        for number, (batch, inputs) in enumerate(_without_labels(split_large_batches(model, batches), task)):
            prepared = prepare_inputs(model, inputs)
            answers = task.answers(model(**prepared), inputs)
            require_finite_outputs({"model": answers}, number)
            counter.add(batch, prepared, [answers])
            bar.update(count_tokens(batch))
    (scores,) = counter.scores(1)
    if not (scores.correct or scores.predicted):
        raise StreamlineError(
            f"The {len(batches)} batches for {task} have no labels. Expected labels in every batch, or an original to "
            "compare with. Add labels, or call compare_on_batches with the original."
        )
    return scores


@validate_arguments()
def compare_on_batches(
    model: nn.Module,
    original: nn.Module,
    batches: Sequence[Batch | Tensor],
    *,
    task: Task | None = None,
    desc: str = "compare",
) -> BatchComparison:
    """Compare a changed model with its original on batches of their task, and score both if there are labels.

    Both models are run on a batch before the next batch, so that memory holds the outputs of one batch per model.

    Parameters
    ----------
    model : torch.nn.Module
        The changed model.
    original : torch.nn.Module
        The original, a different module with the same vocabulary, classes or features.
    batches : sequence of mapping or torch.Tensor
        Inputs as for `score_batches`; labels are optional.
    task : Task, optional
        The models' task (see `Task.of`).
    desc : str
        Label of the progress bar.

    Returns
    -------
    BatchComparison

    Raises
    ------
    StreamlineError
        If both arguments are the same module, no token is real, labels do not match the outputs, or the outputs differ
        in shape or are not finite.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> model, original = tiny_model("llama", seed=1), tiny_model("llama")
    >>> comparison = compare_on_batches(model, original, [torch.arange(12).view(2, 6)])
    >>> comparison.agreement.tokens, comparison.original.predicted
    (12, 10)
    """
    task = task or Task.of(original)
    counter, total = _Counter(task), Agreement(unit=task.unit)
    embedded: list[tuple[Tensor, Tensor]] = []
    pairs = _without_labels(split_large_batches(original, batches), task)
    with run_paired(model, original, [inputs for _, inputs in pairs], desc, task) as outputs:
        for (batch, _), (prepared, _, reference, answers) in zip(pairs, outputs, strict=True):
            counter.add(batch, prepared, [answers, reference])
            if task.gives_distributions:
                total += compare_logits(reference, answers, task.unit)
            else:
                embedded.append((reference.float().cpu(), answers.float().cpu()))
    changed, before = counter.scores(2)
    if not changed.answers:
        raise StreamlineError(
            f"The {len(batches)} batches contain no real token. Expected at least one. Pass other batches."
        )
    if task.gives_distributions:
        return BatchComparison(changed, before, total)
    similarity = compare_embeddings(*(torch.cat(rows) for rows in zip(*embedded, strict=True)))
    values = similarity.cosine, similarity.spearman
    return BatchComparison(changed, before, similarities=tuple(value for value in values if not math.isnan(value)))


def _without_labels(batches: Sequence[Any], task: Task) -> list[tuple[Any, Any]]:
    """Return pairs of (batch, inputs); the inputs of classifiers have no labels.

    With labels, a classifier would compute its loss and set the ``problem_type`` of its config.
    """
    drop = task.unit != "token"
    return [
        (batch, {name: value for name, value in batch.items() if name != "labels"})
        if drop and isinstance(batch, Mapping)
        else (batch, batch)
        for batch in batches
    ]


class _Counter:
    """Sum the scores of one or two models over batches."""

    def __init__(self, task: Task) -> None:
        self.task, self._answers, self._sequences = task, 0, 0
        self._labeled, self._classes = True, 1
        self._correct: list[list[bool]] = [[], []]
        self._nll: list[float] = [0.0, 0.0]
        self._rows: list[int] = []
        self._predicted = 0

    def add(self, batch: Any, prepared: Mapping[str, Any], answers: Sequence[Tensor]) -> None:
        """Add a batch, with its prepared inputs and the outputs of each model."""
        first = answers[0]
        self._answers += len(first)
        if not self.task.gives_distributions:
            return
        self._classes = first.shape[1]
        if self.task.is_causal_lm:
            if "input_ids" in prepared:
                self._add_likelihoods(prepared, answers)
            return
        labels = None if isinstance(batch, Tensor) else batch.get("labels")
        if not isinstance(labels, Tensor):
            self._labeled = False
            return
        if self.task.unit == "token":
            labels = self._labels_by_answer(labels, batch)
        elif labels.shape != (len(first),) or labels.is_floating_point():
            raise StreamlineError(
                f"The labels of a batch have dtype {labels.dtype} and shape {tuple(labels.shape)}. Expected one class "
                f"index for each of {len(first)} {self.task.unit}s, of shape ({len(first)},). Correct the labels."
            )
        require_classes(labels, self._classes)
        real = labels != IGNORE_INDEX
        for k, logits in enumerate(answers):
            right = logits.argmax(dim=-1) == labels.to(logits.device)
            self._correct[k] += right[real.to(logits.device)].tolist()

    def _labels_by_answer(self, labels: Tensor, batch: Any) -> Tensor:
        """Return the label of each output, selected by `Task.answers` like the logits, and store its sequence."""
        rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
        chosen, sequences = (self.task.answers(values[..., None], batch)[:, 0] for values in (labels, rows))
        self._rows += (sequences[chosen != IGNORE_INDEX] + self._sequences).tolist()
        self._sequences += batch_rows(batch)
        return chosen

    def _add_likelihoods(self, prepared: Mapping[str, Any], answers: Sequence[Tensor]) -> None:
        ids, mask = target_ids(prepared), padding_mask(prepared)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        labels = shift_labels(ids, real, prepared.get("position_ids"))
        targets = self.task.answers(labels[..., None], prepared)[:, 0]
        self._predicted += int((targets != IGNORE_INDEX).sum())
        for k, logits in enumerate(answers):
            parts = zip(logits.split(_ANSWERS_AT_ONCE), targets.to(logits.device).split(_ANSWERS_AT_ONCE), strict=True)
            losses = (cross_entropy(p.float(), t, ignore_index=IGNORE_INDEX, reduction="none") for p, t in parts)
            sums = [part.sum(dtype=torch.float64) for part in losses]
            self._nll[k] += math.fsum(torch.stack(sums).tolist()) if sums else 0.0

    def scores(self, models: int) -> list[BatchScores]:
        """Return the scores of each model. Accuracy requires labels in every batch."""
        correct = [flags if self._labeled else [] for flags in self._correct[:models]]
        rows = tuple(self._rows) if self._labeled else ()
        return [
            BatchScores(self.task.unit, self._answers, tuple(flags), rows, 1 / self._classes, nll, self._predicted)
            for flags, nll in zip(correct, self._nll, strict=False)
        ]

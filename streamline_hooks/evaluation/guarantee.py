"""Bound the loss of a compressed model on text or questions that were not measured, with a stated probability."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from streamline_hooks.core import (
    Batch,
    StreamlineError,
    max_positions,
    padding_mask,
    state_digest,
    texts_digest,
    validate_arguments,
)
from streamline_hooks.evaluation.agreement import run_paired
from streamline_hooks.evaluation.lm_eval_tasks import LoadedTask, TaskSettings, TaskSource, load_tasks
from streamline_hooks.modeling import Task, kl_by_token
from streamline_hooks.surgery import find_prompt_skip, split_large_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossMeasure = Literal["accuracy_drop", "disagreement", "kl"]
_TOLERANCE = 1e-4  # of a bound, which is rounded up
_MOST_UNITS = 1 << 20
_DOCUMENT_TOKENS, _BATCH = 512, 8
_LONGEST_PATH = 1024  # characters


@dataclass(frozen=True)
class Guarantee:
    """Upper bound on the expected loss of a compressed model; returned by `guarantee`.

    If further units (documents or questions) come from the same source as the measured ones, their mean loss is at most
    `bound`. This statement is wrong with a probability of at most `delta`, over the choice of the measured units.

    Attributes
    ----------
    measure : {"accuracy_drop", "disagreement", "kl"}
        The loss.
    bound : float
        Upper bound on its expectation.
    losses : tuple of float
        Loss of each measured document or question.
    delta : float
        Probability of an error.
    fingerprint : str
        Digest of the measured units, to verify that they were not used for compression.
    limits : (float, float)
        Smallest and largest possible loss.
    weights : str
        Digest of the compressed model's weights and their dtypes, to verify that they are the measured ones; empty if
        weights are offloaded.

    Examples
    --------
    >>> print(Guarantee("disagreement", bound=0.12, losses=(0.1,) * 400, delta=0.05, fingerprint="8e1c"))
    expected top-1 disagreement at most 0.120 with probability 0.95 (400 documents, mean 0.100, data 8e1c)
    """

    measure: LossMeasure
    bound: float
    losses: tuple[float, ...] = field(repr=False)
    delta: float
    fingerprint: str
    limits: tuple[float, float] = (0.0, 1.0)
    weights: str = field(default="", repr=False, compare=False)

    @property
    def units(self) -> int:
        """Number of measured documents or questions."""
        return len(self.losses)

    @property
    def mean(self) -> float:
        """Mean loss of the measured units."""
        return float(np.mean(self.losses))

    def required_units(self, bound: float) -> int | None:
        """Estimate how many units are needed for another bound, see `required_units`."""
        low, high = self.limits
        scaled = [(loss - low) / (high - low) for loss in self.losses]
        units = required_units(scaled, (bound - low) / (high - low), self.delta)
        return units if units is None or self.bound <= bound else max(units, self.units + 1)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields except the losses as JSON values."""
        names = ("measure", "bound", "mean", "units", "delta", "fingerprint", "limits", "weights")
        return {name: getattr(self, name) for name in names} | {"limits": list(self.limits)}

    @property
    def loss(self) -> str:
        """Description of the loss."""
        unit = "nat" if self.limits[1] == 1 else "nats"
        clip = f", clipped at {self.limits[1]:g} {unit}," if self.measure == "kl" else ""
        return _NAMES[self.measure] + clip

    @property
    def sample(self) -> str:
        """Description of the measured units."""
        unit = "questions" if self.measure == "accuracy_drop" else "documents"
        return f"{self.units} {unit}, mean {self.mean:.3f}, data {self.fingerprint}"

    def __str__(self) -> str:
        bound = math.ceil(self.bound * 1000) / 1000
        return f"expected {self.loss} at most {bound:.3f} with probability {1 - self.delta:.10g} ({self.sample})"


_NAMES = {
    "accuracy_drop": "drop in accuracy",
    "disagreement": "top-1 disagreement",
    "kl": "KL divergence per token",
}


@validate_arguments(delta="(0, 1)", clip=0)
def guarantee(
    original: nn.Module,
    compressed: nn.Module,
    data: Sequence[str] | Sequence[Batch | Tensor] | Sequence[TaskSource],
    measure: LossMeasure = "disagreement",
    *,
    delta: float = 0.05,
    clip: float = 1.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: TaskSettings | None = None,
) -> Guarantee:
    """Bound the expected loss of a compressed model, with a stated probability of an error.

    The bound holds for any distribution of losses and any number of units (see `mean_upper_bound`), but only if the
    units are independent draws from one source, and none was used to choose blocks, to fit, to train, or to choose
    between models. Tokens of a document depend on each other, so a document counts once.

    Parameters
    ----------
    original, compressed : torch.nn.Module
        The models to compare.
    data : sequence
        For "disagreement" and "kl" documents, of which the first 512 tokens count, or batches, of which each row is a
        document: (batch, tokens) or a mapping with ``input_ids`` and ``attention_mask``. For "accuracy_drop" tasks, see
        `run_tasks`; their items count together.
    measure : {"accuracy_drop", "disagreement", "kl"}
        The loss: the score of the original minus that of the compressed model, per question; the fraction of tokens
        with another top-1 prediction, per document; or the mean over tokens of KL(original ‖ compressed), clipped at
        `clip`, per document. Default "disagreement".
    delta : float
        Probability with which the statement may be wrong; default 0.05.
    clip : float
        Largest KL divergence of a token, in nats; default 1.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Tokenizer for documents and tasks.
    settings : TaskSettings, optional
        Settings for tasks.

    Returns
    -------
    Guarantee

    Raises
    ------
    StreamlineError
        If the data do not match the measure, a document occurs twice, a task has no scores between 0 and 1, or the
        models cannot be compared (see `agreement`).

    Examples
    --------
    >>> import copy
    >>> import torch
    >>> from streamline_hooks import LayerSurgeon
    >>> from streamline_hooks.testing import tiny_model
    >>> original = tiny_model("llama")
    >>> compressed = copy.deepcopy(original)
    >>> documents = [torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(k)) for k in range(8)]
    >>> with LayerSurgeon(compressed) as surgeon:
    ...     surgeon.remove([3])
    ...     statement = guarantee(original, compressed, documents)
    >>> statement.units, statement.mean < statement.bound < 1
    (64, True)
    """
    units = load_guarantee_data(original, data, measure, tokenizer, settings)
    statement = bound_losses(original, compressed, units, measure, delta=delta, clip=clip)
    return replace(statement, weights=state_digest(compressed))


def bound_losses(
    original: nn.Module,
    compressed: nn.Module,
    units: GuaranteeData,
    measure: LossMeasure,
    *,
    delta: float,
    clip: float = 1.0,
) -> Guarantee:
    """Bound the expected loss on units that `load_guarantee_data` returned."""
    low, high = -1.0 if measure == "accuracy_drop" else 0.0, clip if measure == "kl" else 1.0
    if measure == "accuracy_drop":
        losses = units.score_drops(original, compressed)
    else:
        if any(find_prompt_skip(model) is not None for model in (original, compressed)):
            raise StreamlineError(
                f"guarantee: measure={measure!r} compares forward passes, in which a model whose prompts skip blocks "
                "runs all of them. Expected models without a PromptSkip. Use measure='accuracy_drop', which runs the "
                "contexts of tasks as prompts."
            )
        losses = [min(loss, high) for loss in _document_losses(original, compressed, units.batches, measure, clip)]
    bound = low + (high - low) * mean_upper_bound([(loss - low) / (high - low) for loss in losses], delta)
    return Guarantee(measure, bound, tuple(losses), delta, units.fingerprint, (low, high))


@validate_arguments(delta="(0, 1)", seed=0)
def mean_upper_bound(losses: Sequence[float], delta: float = 0.05, *, seed: int = 0) -> float:
    """Compute an upper confidence bound on the expectation of independent losses between 0 and 1.

    A gambler bets against each hypothesis "the expectation is at least m". If the hypothesis is true, the capital
    exceeds ``1 / delta`` times the stake with a probability of at most `delta` (Ville's inequality), so every m at
    which it does is rejected (Waudby-Smith and Ramdas, arXiv 2010.09686). The bets depend on earlier losses only, and
    not on m; they are small if the losses vary much, and the bound is then as wide as an empirical Bernstein bound.

    Parameters
    ----------
    losses : sequence of float
        Losses of independent units, 0 to 1.
    delta : float
        Probability with which the expectation may exceed the bound; default 0.05.
    seed : int
        Seed of the order of the losses; default 0.

    Returns
    -------
    float
        The bound; 1 if there are too few losses for a smaller one.

    Raises
    ------
    StreamlineError
        If there is no loss, or a loss is not between 0 and 1.

    Examples
    --------
    >>> round(mean_upper_bound([0.0] * 100), 3), round(mean_upper_bound([0.0, 0.1] * 500), 3)
    (0.031, 0.054)
    """
    values = np.asarray(losses, dtype=float)
    if not len(values) or not bool(((values >= 0) & (values <= 1)).all()):
        raise StreamlineError(
            f"mean_upper_bound: {len(values)} losses were given, or some are not between 0 and 1. Expected at least "
            "one, all between 0 and 1. Divide them by their largest possible value."
        )
    is_rejected = _test_of_means(values, delta, seed)
    low, high = 0.0, 1.0
    if not is_rejected(high):
        return high
    while high - low > _TOLERANCE:  # the capital grows with the mean, so all larger ones are rejected too
        middle = (low + high) / 2
        low, high = (low, middle) if is_rejected(middle) else (middle, high)
    return high


@validate_arguments(limit="(0, 1)", delta="(0, 1)", seed=0)
def required_units(losses: Sequence[float], limit: float, delta: float = 0.05, *, seed: int = 0) -> int | None:
    """Estimate how many units `mean_upper_bound` needs for a bound, if further losses are like the given ones.

    Parameters
    ----------
    losses : sequence of float
        Losses that were measured, 0 to 1.
    limit : float
        The bound to reach.
    delta : float
        See `mean_upper_bound`.
    seed : int
        Seed of the order of the losses; default 0.

    Returns
    -------
    int or None
        The number, exact to 5 %; None if it exceeds a million, as it does if the mean is not below the limit.

    Examples
    --------
    >>> required_units([0.0] * 9 + [0.1], 0.02) < 400
    True
    >>> required_units([0.0, 0.1], 0.04) is None
    True
    """
    values = np.asarray(losses, dtype=float)

    def is_enough(units: int) -> bool:
        """Whether quantiles of the given losses, as many as there are units, are below the limit."""
        ranks = (np.arange(units) + 0.5) * len(values) / units
        return _test_of_means(np.sort(values)[ranks.astype(int)], delta, seed)(limit)

    units = 1
    while not is_enough(units):
        if (units := 2 * units) > _MOST_UNITS or float(values.mean()) >= limit:
            return None
    too_few = units // 2
    while units - too_few > max(1, 0.05 * units):
        middle = (too_few + units) // 2
        too_few, units = (too_few, middle) if is_enough(middle) else (middle, units)
    return units


def _test_of_means(losses: np.ndarray, delta: float, seed: int) -> Callable[[float], bool]:
    """Return a test of "the expectation is at least m": whether betting against it makes the capital grow enough."""
    values = np.random.default_rng(seed).permutation(losses)
    count = np.arange(1, len(values) + 1)
    means = (0.5 + values.cumsum()) / (count + 1)
    variances = (0.25 + ((values - means) ** 2).cumsum()) / (count + 1)
    earlier = np.concatenate([[0.25], variances[:-1]])
    bets = np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (len(values) * earlier)))

    def is_rejected(mean: float) -> bool:
        with np.errstate(divide="ignore"):
            return bool(np.log1p(bets * (mean - values)).cumsum().max() >= math.log(1 / delta))

    return is_rejected


@dataclass
class GuaranteeData:
    """Documents or questions that are valid for a measure; returned by `load_guarantee_data`.

    Attributes
    ----------
    fingerprint : str
        Digest of the documents or questions.
    batches : sequence of mapping or torch.Tensor
        Documents, one per row.
    tasks : dict of str to LoadedTask
    tokenizer : transformers.PreTrainedTokenizerBase or None
    """

    fingerprint: str
    batches: Sequence[Any] = ()
    tasks: Mapping[str, LoadedTask] = field(default_factory=dict)
    tokenizer: Any = None
    _scores: tuple[nn.Module, list[float]] | None = None  # of the original, which several models are compared with

    def score_drops(self, original: nn.Module, compressed: nn.Module) -> list[float]:
        """Return the score of the original minus that of the compressed model, by question."""
        if self._scores is None or self._scores[0] is not original:
            self._scores = original, self._scored(original)
        return [a - b for a, b in zip(self._scores[1], self._scored(compressed), strict=True)]

    def _scored(self, model: nn.Module) -> list[float]:
        results = {name: task.run(model, self.tokenizer) for name, task in self.tasks.items()}
        if unscored := [name for name, result in results.items() if not result.scores]:
            raise StreamlineError(
                f"guarantee: {', '.join(unscored)} has no score between 0 and 1 per item. Expected tasks with a metric "
                "such as accuracy. Leave it out."
            )
        return [score for result in results.values() for score in result.scores]


def load_guarantee_data(
    model: nn.Module, data: Any, measure: LossMeasure, tokenizer: Any = None, settings: TaskSettings | None = None
) -> GuaranteeData:
    """Check the data of `guarantee`, and return them as batches or loaded tasks."""
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        raise StreamlineError(
            f"guarantee: the data for {measure} are {f'a {type(data).__name__}' if data else 'empty'}. Expected a list "
            "with at least one document, batch or task. Convert them to a list."
        )
    are_texts = all(isinstance(item, str) for item in data)
    if measure == "accuracy_drop":
        if tokenizer is None or any(isinstance(item, Tensor) for item in data):
            raise StreamlineError(
                "guarantee: measure='accuracy_drop' scores tasks, but a tokenizer or the tasks are missing. Expected "
                "both. Pass names or files of tasks, and tokenizer=..."
            )
        tasks = load_tasks(data, settings or TaskSettings())
        questions = [question for task in tasks.values() for question in task.questions()]
        if copies := len(questions) - len(set(questions)):
            raise StreamlineError(
                f"guarantee: {copies} of {len(questions)} questions occur twice, so they are not independent. Expected "
                "different questions. Pass each task once, alone or in its group, and remove copies from its data."
            )
        return GuaranteeData(
            texts_digest(task.digest() for task in tasks.values())[:16], tasks=tasks, tokenizer=tokenizer
        )
    if are_texts and (files := [text for text in data if len(text) < _LONGEST_PATH and os.path.isfile(text)]):
        raise StreamlineError(
            f"guarantee: {files[0]!r} is the name of a file, and names count as documents. Expected the texts of the "
            "documents. Read them with streamline_hooks.data.read_documents."
        )
    task = Task.of(model)
    if task.unit != "token":
        raise StreamlineError(
            f"guarantee: measure={measure!r} compares predictions of tokens, but {type(model).__name__} is for {task}. "
            "Expected a language model. Bound your own losses with mean_upper_bound."
        )
    batches = _document_batches(model, data, tokenizer) if are_texts else data
    if not all(isinstance(batch, Tensor) or (hasattr(batch, "keys") and "input_ids" in batch) for batch in batches):
        raise StreamlineError(
            f"guarantee: measure={measure!r} compares logits, but the data are neither documents nor batches. Expected "
            "strings, or tensors or mappings with input_ids, a document per row. For tasks pass "
            "measure='accuracy_drop'."
        )
    rows = [row for batch in batches for row in document_rows(batch)]
    if copies := len(rows) - len(set(rows)):
        raise StreamlineError(
            f"guarantee: {copies} of {len(rows)} documents occur twice, so they are not independent. Expected "
            "different documents. Remove the copies."
        )
    return GuaranteeData(texts_digest(map(repr, rows))[:16], batches)


def document_rows(batch: Any) -> list[tuple[int, ...]]:
    """Return the token ids of each row of a batch, without padding."""
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    mask = None if isinstance(batch, Tensor) else padding_mask(batch)
    real = torch.ones_like(ids) if mask is None else mask
    return [tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, real, strict=True)]


def _document_batches(model: nn.Module, documents: Sequence[Any], tokenizer: Any) -> list[dict[str, Tensor]]:
    """Return batches whose rows are the first tokens of the documents, padded on the right."""
    if tokenizer is None:
        raise StreamlineError(
            f"guarantee: {len(documents)} documents were given without a tokenizer. Expected one. Pass tokenizer=..., "
            "or batches. The names of tasks need measure='accuracy_drop'."
        )
    limit = min(_DOCUMENT_TOKENS, max_positions(getattr(model, "config", None)) or _DOCUMENT_TOKENS)
    rows = [tokenizer(text)["input_ids"][:limit] for text in documents]
    if not all(rows):
        raise StreamlineError(
            f"guarantee: document {list(map(bool, rows)).index(False)} has no token. Expected at least one in each. "
            "Leave empty documents out."
        )
    batches = []
    for start in range(0, len(rows), _BATCH):
        ids = [torch.tensor(row) for row in rows[start : start + _BATCH]]
        masks = [torch.ones_like(row) for row in ids]
        batches.append(
            {
                "input_ids": pad_sequence(ids, batch_first=True),
                "attention_mask": pad_sequence(masks, batch_first=True),
            }
        )
    return batches


def _document_losses(
    original: nn.Module, compressed: nn.Module, batches: Sequence[Any], measure: str, clip: float
) -> list[float]:
    """Return the loss of each row of the batches."""
    task = Task.of(original)
    losses: list[float] = []
    batches = split_large_batches(original, batches)
    with run_paired(compressed, original, batches, measure, task) as pairs:
        for batch, (_, _, reference, answers) in zip(batches, pairs, strict=True):
            if measure == "kl":
                values = kl_by_token(reference.float().log_softmax(dim=-1), answers).clamp(0, clip)
            else:
                values = (reference.argmax(dim=-1) != answers.argmax(dim=-1)).float()
            ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
            mask = task.answer_mask(batch)
            mask = padding_mask(batch) if mask is None and not isinstance(batch, Tensor) else mask
            counts = [ids.shape[1]] * len(ids) if mask is None else mask.sum(dim=1).tolist()
            means = [row.mean() for row in values.split(counts) if len(row)]
            losses += torch.stack(means).tolist() if means else []
    return losses

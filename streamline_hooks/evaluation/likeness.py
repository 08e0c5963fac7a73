"""How alike the embeddings of two models are, and what can be found by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch, prepare, tokens_of
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.agreement import require_finite, require_two
from streamline_hooks.passes import inference, progress
from streamline_hooks.task import Task


@dataclass(frozen=True)
class Likeness:
    """How alike two models' embeddings of the same texts or images are.

    Attributes
    ----------
    cosine : float
        Mean cosine of each embedding with the original's.
    spearman : float
        Rank correlation of the two models' similarities over all pairs, on which search and clustering depend; no
        rotation changes it. NaN for fewer than three embeddings, or if all pairs are equally similar.
    count : int
        Embeddings.
    """

    cosine: float
    spearman: float
    count: int

    def __str__(self) -> str:
        return f"cosine {self.cosine:.4f}, Spearman of similarities {self.spearman:.4f}, of {self.count:,} embeddings"


@checked()
def embeddings(
    model: nn.Module, batches: Sequence[Batch | Tensor], *, task: Task | None = None, what: str = "embed"
) -> Tensor:
    """Compute a model's embedding of each text or image.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
    task : Task, optional
        Says how states are pooled, see `Task`; by default ``Task("embedding")``.
    what : str
        Label of the progress bar.

    Returns
    -------
    torch.Tensor
        Shape (texts or images, features), in float32, on the CPU, not normalised.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> embeddings(tiny_model("llama").model, [torch.arange(12).view(2, 6)]).shape
    torch.Size([2, 32])
    """
    if not batches:
        raise StreamlineError("There is no batch to embed. Expected at least one. Pass one.")
    return torch.cat([answers.float() for answers in answers_of(model, batches, task or Task("embedding"), what)])


def answers_of(model: nn.Module, batches: Sequence[Batch | Tensor], task: Task, what: str) -> list[Tensor]:
    """Return a model's answers to each batch, on the CPU; raise if one is not finite."""
    rows = []
    with inference(model), progress(sum(map(tokens_of, batches)), what) as bar:
        for number, batch in enumerate(batches):
            given = prepare(model, batch)
            if task.unit != "token":
                given.pop("labels", None)  # the model's own loss is not needed, and sets its problem_type
            rows.append(task.answers(model(**given), batch).cpu())
            require_finite({"model": rows[-1]}, number)
            bar.update(tokens_of(batch))
    return rows


@checked()
def likeness(
    model: nn.Module,
    original: nn.Module,
    batches: Sequence[Batch | Tensor],
    *,
    task: Task | None = None,
    what: str = "likeness",
) -> Likeness:
    """Compare the embeddings of a changed model with those of its original.

    Parameters
    ----------
    model, original : torch.nn.Module
        Two modules in memory.
    batches : sequence of mapping or torch.Tensor
    task : Task, optional
        See `embeddings`.
    what : str
        What the bars say.

    Returns
    -------
    Likeness

    Raises
    ------
    StreamlineError
        If both are one module, or an embedding is not finite.

    Examples
    --------
    >>> import copy
    >>> from streamline_hooks import LayerSurgeon
    >>> from streamline_hooks.testing import tiny_model
    >>> model, texts = tiny_model("llama").model, [torch.arange(40).view(5, 8)]
    >>> original = copy.deepcopy(model)
    >>> print(likeness(model, original, texts))
    cosine 1.0000, Spearman of similarities 1.0000, of 5 embeddings
    >>> with LayerSurgeon(model) as surgeon:
    ...     surgeon.remove([3])
    ...     likeness(model, original, texts).cosine < 1.0
    True
    """
    require_two(model, original)
    reference = embeddings(original, batches, task=task, what=f"{what}: original")
    return likeness_of(reference, embeddings(model, batches, task=task, what=f"{what}: changed"))


def likeness_of(reference: Tensor, changed: Tensor) -> Likeness:
    """Compare embeddings of the original and of the changed model, of shape (texts or images, features)."""
    if reference.shape != changed.shape:
        raise StreamlineError(
            f"The embeddings have the shapes {tuple(reference.shape)} and {tuple(changed.shape)}; compare models that "
            "make embeddings of one size, on the same things."
        )
    a, b = (normalize(rows.double(), dim=-1) for rows in (reference, changed))
    return Likeness(float((a * b).sum(dim=-1).mean()), _spearman(_pairs(a), _pairs(b)), len(a))


@checked()
def recall_at(queries: Tensor, documents: Tensor, k: int = 1) -> float:
    """The share of queries that find their own document among the k most similar.

    Parameters
    ----------
    queries, documents : torch.Tensor
        Of shape (things, features); query n belongs to document n.
    k : int

    Returns
    -------
    float
        A document that is exactly as similar as the right one counts as found before it.

    Raises
    ------
    StreamlineError
        If there are not as many of both, fewer than `k`, or one is not finite.

    Examples
    --------
    >>> recall_at(torch.eye(3), torch.eye(3)[[0, 2, 1]])
    0.3333333333333333
    """
    if len(queries) != len(documents) or not 1 <= k <= max(1, len(documents)):
        raise StreamlineError(
            f"There are {len(queries)} queries and {len(documents)} documents, of which {k} are looked at; expected as "
            "many of both, and 1 or more to look at."
        )
    for name, rows in (("queries", queries), ("documents", documents)):
        if broken := (~rows.isfinite().all(dim=-1)).nonzero().flatten().tolist():
            raise StreamlineError(
                f"{len(broken)} of the {len(rows)} {name} hold NaN or infinite values (the first is {broken[0]}), "
                "which are similar to nothing; expected numbers. Look at the model's weights, or run in a wider "
                "precision (float32 or bfloat16)."
            )
    similar = normalize(queries.double(), dim=-1) @ normalize(documents.double(), dim=-1).T
    own = similar.diagonal()[:, None]
    better = (similar >= own).sum(dim=-1) - 1  # its own is as similar as itself
    return float((better < k).double().mean())


def _pairs(rows: Tensor) -> np.ndarray:
    """The similarity of each pair."""
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    return (rows @ rows.T)[first, second].numpy()


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of ranks, where equal values share the mean of theirs."""
    if len(a) < 3:
        return float("nan")
    x, y = (_ranks(values) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / spread if spread else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]

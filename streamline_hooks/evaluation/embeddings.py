"""Compute embeddings, compare those of two models, and measure retrieval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from streamline_hooks.core import Batch, StreamlineError, count_tokens, prepare_inputs, progress_bar, validate_arguments
from streamline_hooks.evaluation.agreement import require_distinct_models, require_finite_outputs
from streamline_hooks.modeling import Task, inference


@dataclass(frozen=True)
class EmbeddingSimilarity:
    """Similarity of the embeddings of two models on the same texts or images.

    Attributes
    ----------
    cosine : float
        Mean cosine of each embedding with the original's.
    spearman : float
        Spearman correlation of the pairwise similarities of both models. It does not depend on rotations. NaN for fewer
        than three embeddings, or if all pairs are equally similar.
    count : int
        Number of embeddings.

    Examples
    --------
    >>> print(EmbeddingSimilarity(cosine=0.98, spearman=0.95, count=200))
    cosine 0.9800, Spearman of similarities 0.9500, 200 embeddings
    """

    cosine: float
    spearman: float
    count: int

    def __str__(self) -> str:
        return f"cosine {self.cosine:.4f}, Spearman of similarities {self.spearman:.4f}, {self.count:,} embeddings"


@validate_arguments()
def embeddings(
    model: nn.Module, batches: Sequence[Batch | Tensor], *, task: Task | None = None, desc: str = "embed"
) -> Tensor:
    """Compute a model's embedding of each text or image.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    batches : sequence of mapping or torch.Tensor
        Inputs of the model.
    task : Task, optional
        The task, which defines the pooling. By default ``Task("embedding")``.
    desc : str
        Label of the progress bar.

    Returns
    -------
    torch.Tensor
        Embeddings of shape (texts or images, features), in float32, on the CPU, not normalized.

    Raises
    ------
    StreamlineError
        If there is no batch, or an embedding is not finite.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> embeddings(tiny_model("llama").model, [torch.arange(12).view(2, 6)]).shape
    torch.Size([2, 32])
    """
    if not batches:
        raise StreamlineError("embeddings: batches is empty. Expected at least one batch. Pass batches.")
    return torch.cat([answers.float() for answers in compute_answers(model, batches, task or Task("embedding"), desc)])


def compute_answers(model: nn.Module, batches: Sequence[Batch | Tensor], task: Task, desc: str) -> list[Tensor]:
    """Return `Task.answers` of each batch, on the CPU; raise StreamlineError if an output is not finite."""
    rows = []
    with inference(model), progress_bar(sum(map(count_tokens, batches)), desc) as bar:
        for number, batch in enumerate(batches):
            inputs = prepare_inputs(model, batch)
            if task.unit != "token":
                inputs.pop("labels", None)  # with labels the model computes a loss and sets its problem_type
            rows.append(task.answers(model(**inputs), batch).cpu())
            require_finite_outputs({"model": rows[-1]}, number)
            bar.update(count_tokens(batch))
    return rows


@validate_arguments()
def embedding_similarity(
    model: nn.Module,
    original: nn.Module,
    batches: Sequence[Batch | Tensor],
    *,
    task: Task | None = None,
    desc: str = "embedding similarity",
) -> EmbeddingSimilarity:
    """Compare the embeddings of a changed model with those of its original.

    Parameters
    ----------
    model, original : torch.nn.Module
        The changed model and the original; two different modules.
    batches : sequence of mapping or torch.Tensor
        Inputs of the models.
    task : Task, optional
        See `embeddings`.
    desc : str
        Label of the progress bars.

    Returns
    -------
    EmbeddingSimilarity

    Raises
    ------
    StreamlineError
        If both arguments are the same module, there is no batch, or an embedding is not finite.

    Examples
    --------
    >>> import copy
    >>> from streamline_hooks import LayerSurgeon
    >>> from streamline_hooks.testing import tiny_model
    >>> model, texts = tiny_model("llama").model, [torch.arange(40).view(5, 8)]
    >>> original = copy.deepcopy(model)
    >>> print(embedding_similarity(model, original, texts))
    cosine 1.0000, Spearman of similarities 1.0000, 5 embeddings
    >>> with LayerSurgeon(model) as surgeon:
    ...     surgeon.remove([3])
    ...     embedding_similarity(model, original, texts).cosine < 1.0
    True
    """
    require_distinct_models(model, original)
    reference = embeddings(original, batches, task=task, desc=f"{desc}: original")
    return compare_embeddings(reference, embeddings(model, batches, task=task, desc=f"{desc}: changed"))


def compare_embeddings(reference: Tensor, changed: Tensor) -> EmbeddingSimilarity:
    """Compare embeddings of two models.

    Parameters
    ----------
    reference, changed : torch.Tensor
        Embeddings of the original and of the changed model, of shape (texts or images, features).

    Returns
    -------
    EmbeddingSimilarity

    Raises
    ------
    StreamlineError
        If the shapes differ.

    Examples
    --------
    >>> round(compare_embeddings(torch.eye(4), torch.eye(4).roll(1, 0)).cosine, 4)
    0.0
    """
    if reference.shape != changed.shape:
        raise StreamlineError(
            f"The embeddings have shapes {tuple(reference.shape)} and {tuple(changed.shape)}. Expected the same shape. "
            "Compare models with the same embedding size, on the same inputs."
        )
    a, b = (normalize(rows.double(), dim=-1) for rows in (reference, changed))
    spearman = math.nan
    if len(a) > 2:
        x, y = _ranks_of_pairs(a), _ranks_of_pairs(b)
        spread = float(np.sqrt((x @ x) * (y @ y)))
        spearman = float(x @ y) / spread if spread else math.nan
    return EmbeddingSimilarity(float((a * b).sum(dim=-1).mean()), spearman, len(a))


@validate_arguments()
def recall_at(queries: Tensor, documents: Tensor, k: int = 1) -> float:
    """Compute the fraction of queries whose matching document is among the k most similar documents.

    A document with the same similarity as the matching document counts as ranked before it.

    Parameters
    ----------
    queries, documents : torch.Tensor
        Embeddings of shape (items, features). Query n matches document n.
    k : int
        Number of documents that are retrieved.

    Returns
    -------
    float
        Recall at k, 0 to 1.

    Raises
    ------
    StreamlineError
        If the numbers of queries and documents differ, `k` is not between 1 and their number, or an embedding is not
        finite.

    Examples
    --------
    >>> recall_at(torch.eye(3), torch.eye(3)[[0, 2, 1]])
    0.3333333333333333
    """
    if len(queries) != len(documents) or not 1 <= k <= max(1, len(documents)):
        raise StreamlineError(
            f"recall_at received {len(queries)} queries, {len(documents)} documents and k={k}. Expected as many "
            "documents as queries, and k from 1 to their number. Change k or the embeddings."
        )
    for name, rows in (("queries", queries), ("documents", documents)):
        if broken := (~rows.isfinite().all(dim=-1)).nonzero().flatten().tolist():
            raise StreamlineError(
                f"{len(broken)} of the {len(rows)} {name} contain NaN or infinite values (the first is {broken[0]}). "
                "Expected finite embeddings. Check the model's weights, or run in float32 or bfloat16."
            )
    similarity = normalize(queries.double(), dim=-1) @ normalize(documents.double(), dim=-1).T
    matching = similarity.diagonal()[:, None]
    return float(((similarity >= matching).sum(dim=-1) <= k).double().mean())


def _ranks_of_pairs(rows: Tensor) -> np.ndarray:
    """Return the centered rank of the similarity of each pair; ties share their mean rank."""
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    values = (rows @ rows.T)[first, second].numpy()
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return np.asarray(ranks - ranks.mean())

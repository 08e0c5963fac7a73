"""Run a model with many windows replaced in turn, and compare the outputs with the original's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from streamline_hooks.core import Batch, StreamlineError, UnsupportedSurgery
from streamline_hooks.modeling import (
    Candidate,
    StateSource,
    Task,
    Variant,
    inference,
    reference_outputs,
    sum_distance,
)
from streamline_hooks.surgery import as_state_source


def distances_of_candidates(
    model: nn.Module | StateSource,
    batches: Sequence[Batch | Tensor],
    candidates: Sequence[Candidate],
    *,
    stack: str | None = None,
    task: Task | None = None,
    original: nn.Module | None = None,
) -> list[float]:
    """Measure the distance of the outputs of each candidate from the original's.

    Parameters
    ----------
    model : torch.nn.Module or StateSource
        The model whose blocks the candidates replace.
    batches : sequence of mapping or torch.Tensor
        Batches on which no candidate was fitted.
    candidates : sequence of Candidate
        The windows, with their replacements.
    stack, task
        See `find_stack` and `Task.of`.
    original : torch.nn.Module, optional
        The reference, which is run once per batch. By default `model`.

    Returns
    -------
    list of float
        Mean KL(original ‖ candidate) in nats per token, text or image; for embedding models the mean of 1 − cosine.

    Raises
    ------
    UnsupportedSurgery
        If the model cannot be run without the blocks of a candidate.
    """
    source = as_state_source(model, stack)
    task = task or Task.of(source.model)
    distances = distances_of_variants(
        source, batches, candidates, f"verify: {len(candidates)} windows", task, original=original
    )
    for distance in distances:
        if isinstance(distance, UnsupportedSurgery):
            raise distance
    return cast("list[float]", distances)


def distances_of_variants(
    source: StateSource,
    batches: Sequence[Batch | Tensor],
    variants: Sequence[Variant],
    desc: str,
    task: Task,
    *,
    original: nn.Module | None = None,
) -> list[float | UnsupportedSurgery]:
    """Return the mean distance of each variant from the original (`Task.distance`), or the error that prevents it.

    The original is run once per batch. The parameters are those of `distances_of_candidates` and `StateSource.outputs`.
    """
    sums: list[float | UnsupportedSurgery] = [0.0] * len(variants)
    answers, is_surgery = 0, any(not isinstance(variant, Candidate) for variant in variants)
    with (
        nullcontext() if original is None else inference(original),
        source.outputs(batches, variants, desc, original) as outputs,
    ):
        for at in outputs:
            reference = reference_outputs(task, task.answers(at.output, at.batch))  # shared by all variants
            if is_surgery and not torch.isfinite(reference.sum(dtype=torch.float64)):
                raise StreamlineError(
                    f"The original's logits contain NaN or infinite values (batch {at.number}). Expected finite "
                    "logits. Run in float32 or bfloat16."
                )
            answers += len(reference)
            for k, run in enumerate(at.variants):
                before = sums[k]
                if not isinstance(before, UnsupportedSurgery):
                    try:
                        sums[k] = before + sum_distance(task, reference, task.answers(run(), at.batch))
                    except UnsupportedSurgery as error:
                        sums[k] = error
    if not answers:
        raise StreamlineError("The batches contain no real token. Expected one or more. Pass longer text.")
    return [total if isinstance(total, UnsupportedSurgery) else total / answers for total in sums]

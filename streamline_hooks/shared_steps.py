"""The steps of a compression that several processes share; with one process they are the step itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.distributed import Processes, Together, dealt, some_of
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.evaluation import Perplexity, TaskScores, perplexity
from streamline_hooks.preparation import Batches, Preparation
from streamline_hooks.repair.folded import Folded
from streamline_hooks.repair.scaled import Scaled
from streamline_hooks.selection import Attempt, Selection, VerifiedSelection, perplexity_of_attempts, verified
from streamline_hooks.selection.search.judge import given_up, writers_of
from streamline_hooks.selection.search.verified import in_order
from streamline_hooks.statistics.identity import identity


def prepared_alike(work: Together, ready: Preparation) -> Preparation:
    """Take the windows that may go from the first process, which may have found them by measured times.

    Raises
    ------
    StreamlineError
        If the processes have not the same model, text and config; only their hardware may differ.
    """
    if work.processes.count > 1:
        batches: list[Any] = [*ready.calibration, *ready.judging]  # tensors too, where the caller made them
        chosen_on = [one for batch in batches for one in ([batch] if isinstance(batch, Tensor) else batch.values())]
        asked = {f"config.{name}": value for name, value in ready.config.to_dict().items() if name != "hardware"}
        work.take([*ready.split.tensors, *chosen_on], **identity(ready.stack), **asked)
    return replace(ready, candidates=work.of_first(lambda: ready.candidates))


def verified_together(
    work: Together, model: nn.Module, found: Sequence[Selection], ready: Preparation
) -> list[VerifiedSelection]:
    """Repair and judge selections, see `verified`; each process judges all of them on its share of the text.

    Parameters
    ----------
    work : Together
    model : torch.nn.Module
    found : sequence of Selection
    ready : Preparation
        Its kind, its stack and its text.

    Returns
    -------
    list of VerifiedSelection
        The best first; in every process the same, with the weights that the first one solved for.

    Raises
    ------
    StreamlineError, UnsupportedSurgery
        As `verified`.
    """
    options = {"replacement": ready.kind, "stack": ready.stack.path, "task": ready.task}
    if work.processes.count == 1:
        return verified(model, found, ready.fit, ready.held_out, ready.judging, **options)  # type: ignore[arg-type]
    own = _share(ready.judging, work.processes)
    counted = sum(map(ready.task.count, own))
    few = own or [some_of(ready.judging[0], slice(0, 1))]  # it has to take part in the fitting, and judges in vain
    mine = verified(model, found, ready.fit, ready.held_out, few, **options)  # type: ignore[arg-type]
    judged = [next(one for one in mine if _key(one) == _key(selection)) for selection in found]
    refusals = work.tell([one.refused for one in judged])
    sums = torch.tensor([one.distance * counted if counted else 0.0 for one in judged], dtype=torch.float64)
    distances = work.summed(sums) / work.summed(torch.tensor(counted, dtype=torch.float64))
    for k, distance in enumerate(distances.tolist()):
        refused = next((its[k] for its in refusals if its[k]), "")
        judged[k] = replace(judged[k], distance=math.inf if refused else distance, refused=refused)
    _require_finite(judged)
    return in_order(_as_in_first(work, judged), ready.kind)


def perplexities_together(
    work: Together, ready: Preparation, attempts: Mapping[str, Attempt], teacher: nn.Module | None = None
) -> dict[str, float]:
    """Perplexity of the original and of attempts on test text, by name; see `perplexity_of_attempts`.

    The original is the teacher, where there is one.
    """
    own = _share(ready.test, work.processes)
    found = [Perplexity()] * (1 + len(attempts))
    if own:
        what = f"perplexity of the original and {len(attempts)} others"
        original, each = perplexity_of_attempts(ready.stack, own, list(attempts.values()), what)
        found = [original, *each]
    names = ["original", *attempts]
    by_name = {name: one.value for name, one in zip(names, _added_up(work, found), strict=True)}
    if teacher is not None:
        by_name["original"] = perplexity_together(work, teacher, ready.test, "perplexity: original").value
    return by_name


def perplexity_together(work: Together, model: nn.Module, batches: Batches, what: str = "perplexity") -> Perplexity:
    """Perplexity of a model, see `perplexity`."""
    return _added_up(work, [perplexity(model, _share(batches, work.processes), what)])[0]


def scores_together(
    work: Together, ready: Preparation, attempts: Mapping[str, Attempt], teacher: nn.Module | None = None
) -> tuple[TaskScores, dict[str, dict[str, float]]]:
    """How the original and attempts do at their task, see `TaskScores`; of several processes each measures all.

    The original is the teacher, where there is one.

    Returns
    -------
    scores : TaskScores
        Which knows the original's answers.
    attempts : dict of str to dict
        By attempt and measure.
    """
    model, stack = ready.stack.model, ready.stack
    scores = TaskScores(model if teacher is None else teacher, ready.test, ready.task)
    silent = {k for attempt in attempts.values() for k, _ in attempt.selection.silenced}
    known = writers_of(stack, sorted(silent), ready.test[0]) if silent else {}
    writers = {half: paths for half, paths in known.items() if not isinstance(paths, UnsupportedSurgery)}
    found = {}
    for name, attempt in attempts.items():
        with given_up(stack, attempt, writers):
            found[name] = scores.of(model, name.replace("_", " "))
    return scores, work.of_first(lambda: found)


def _share(batches: Batches, processes: Processes) -> Batches:
    if processes.count == 1:
        return batches
    shares = zip(batches, dealt(batches, processes), strict=True)
    return [some_of(batch, rows) for batch, rows in shares if rows.start < rows.stop]


def _added_up(work: Together, found: Sequence[Perplexity]) -> list[Perplexity]:
    if work.processes.count == 1:
        return list(found)
    work.tell(len(found))  # from here on nothing fails
    sums = work.summed(torch.tensor([[one.nll, one.tokens] for one in found], dtype=torch.float64))
    return [Perplexity(nll, int(tokens)) for nll, tokens in sums.tolist()]


def _key(selection: Selection) -> tuple[object, object]:
    return selection.windows, selection.silenced


def _require_finite(judged: Sequence[VerifiedSelection]) -> None:
    if not any(math.isfinite(one.distance) for one in judged):
        raise StreamlineError(
            f"Not one of the {len(judged)} shortlisted selections leaves a model with finite logits on all of the "
            "text to judge on. Remove less, protect other blocks, or run in a wider precision (float32 or bfloat16)."
        )


def _as_in_first(work: Together, judged: Sequence[VerifiedSelection]) -> list[VerifiedSelection]:
    """Give what was fitted the values that it has in the first process, to the bit."""
    tensors: list[Tensor] = []
    for one in judged:
        tensors += [branch.map for branch in one.maps]
        for repair in one.repairs:
            if isinstance(repair.stand_in, nn.Module):
                tensors += [*repair.stand_in.parameters(), *repair.stand_in.buffers()]
            elif isinstance(repair.stand_in, Folded):
                tensors.append(repair.stand_in.map)
    here = [(tuple(t.shape), str(t.dtype)) for t in tensors]
    if any(shapes != here for shapes in work.tell(here)):
        raise StreamlineError(
            "The processes have fitted different stand-ins for the same selections. Give every process the same model, "
            "arguments and text."
        )
    work.take_over(tensor for tensor in tensors if not tensor.is_meta)
    factors = work.of_first(lambda: [[_factor(r.stand_in) for r in one.repairs] for one in judged])
    return [
        replace(
            one,
            repairs=tuple(
                replace(repair, stand_in=replace(repair.stand_in, factor=factor))
                if isinstance(repair.stand_in, Scaled)
                else repair
                for repair, factor in zip(one.repairs, its, strict=True)
            ),
        )
        for one, its in zip(judged, factors, strict=True)
    ]


def _factor(stand_in: object) -> float:
    return stand_in.factor if isinstance(stand_in, Scaled) else 1.0

"""The steps of a compression that the ranks of a distributed run share; with one process they are the step itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from streamline_hooks.distributed import DistributedStep, Processes, shard_rows, some_of
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.evaluation import Perplexity, TaskScores, perplexity
from streamline_hooks.preparation import Batches, Preparation
from streamline_hooks.selection import Attempt, Selection, VerifiedSelection, perplexity_of_attempts, verified
from streamline_hooks.selection.search.judge import given_up, writers_of
from streamline_hooks.selection.search.verified import in_order
from streamline_hooks.statistics.identity import identity


def prepared_alike(work: DistributedStep, ready: Preparation) -> Preparation:
    """Check that all ranks have one model, text and config, and take the candidate windows of rank 0.

    Candidates may depend on measured times. Only the hardware config may differ.
    """
    if work.processes.count > 1:
        batches: list[Any] = [*ready.calibration, *ready.judging]  # tensors too, where the caller made them
        chosen_on = [one for batch in batches for one in ([batch] if isinstance(batch, Tensor) else batch.values())]
        config = {f"config.{name}": value for name, value in ready.config.to_dict().items() if name != "hardware"}
        work.take([*ready.split.tensors, *chosen_on], **identity(ready.stack), **config)
    return replace(ready, candidates=work.broadcast_object(lambda: ready.candidates))


def verified_together(
    work: DistributedStep, model: nn.Module, found: Sequence[Selection], ready: Preparation
) -> list[VerifiedSelection]:
    """Repair and judge selections as `verified` does, each rank on its rows of the text to judge on.

    Returns
    -------
    list of VerifiedSelection
        The best first; the same on every rank, with the weights that rank 0 solved for.
    """
    options: dict[str, Any] = {"replacement": ready.kind, "stack": ready.stack.path, "task": ready.task}
    if work.processes.count == 1:
        return verified(model, found, ready.fit, ready.held_out, ready.judging, **options)
    own = _share(ready.judging, work.processes)
    few = own or [some_of(ready.judging[0], slice(0, 1))]  # a rank without rows takes part in the fitting
    mine = verified(model, found, ready.fit, ready.held_out, few, **options)
    judged = [next(one for one in mine if _key(one) == _key(selection)) for selection in found]
    told = work.all_gather_object((sum(map(ready.task.count, own)), [(one.distance, one.refused) for one in judged]))
    total = sum(count for count, _ in told)
    for k, one in enumerate(judged):
        refused = next((its[k][1] for _, its in told if its[k][1]), "")
        distance = math.fsum(count * its[k][0] for count, its in told if count) / total
        judged[k] = replace(one, distance=math.inf if refused else distance, refused=refused)
    if not any(math.isfinite(one.distance) for one in judged):
        raise StreamlineError(
            f"Not one of the {len(judged)} shortlisted selections leaves a model with finite logits on all of the "
            "text to judge on. Remove less, protect other blocks, or run in a wider precision (float32 or bfloat16)."
        )
    return in_order(_as_on_rank_0(work, judged), ready.kind)


def perplexities_together(
    work: DistributedStep, ready: Preparation, attempts: Mapping[str, Attempt], teacher: nn.Module | None = None
) -> dict[str, float]:
    """Return the perplexity of the original and of attempts on test text, by name; see `perplexity_of_attempts`.

    The original is the teacher, where there is one.
    """
    own = _share(ready.test, work.processes)
    found = [Perplexity()] * (1 + len(attempts))
    if own:
        what = f"perplexity of the original and {len(attempts)} others"
        original, each = perplexity_of_attempts(ready.stack, own, list(attempts.values()), what)
        found = [original, *each]
    values = (one.value for one in _added_up(work, found))
    by_name = dict(zip(["original", *attempts], values, strict=True))
    if teacher is not None:
        by_name["original"] = perplexity_together(work, teacher, ready.test, "perplexity: original").value
    return by_name


def perplexity_together(
    work: DistributedStep, model: nn.Module, batches: Batches, what: str = "perplexity"
) -> Perplexity:
    """Return the perplexity of a model, see `perplexity`."""
    return _added_up(work, [perplexity(model, _share(batches, work.processes), what)])[0]


def scores_together(
    work: DistributedStep, ready: Preparation, attempts: Mapping[str, Attempt], teacher: nn.Module | None = None
) -> tuple[TaskScores, dict[str, dict[str, float]]]:
    """Return the scorer, which knows the original's answers, and the scores by attempt and measure.

    Every rank measures all of them. The original is the teacher, where there is one.
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
    return scores, work.broadcast_object(lambda: found)


def _share(batches: Batches, processes: Processes) -> Batches:
    if processes.count == 1:
        return batches
    shares = zip(batches, shard_rows(batches, processes), strict=True)
    return [some_of(batch, rows) for batch, rows in shares if rows.start < rows.stop]


def _added_up(work: DistributedStep, found: Sequence[Perplexity]) -> list[Perplexity]:
    return [sum(parts, Perplexity()) for parts in zip(*work.all_gather_object(list(found)), strict=True)]


def _key(selection: Selection) -> tuple[object, object]:
    return selection.windows, selection.silenced


def _as_on_rank_0(work: DistributedStep, judged: Sequence[VerifiedSelection]) -> list[VerifiedSelection]:
    """Give what was fitted the values that it has on rank 0, to the bit."""
    repairs = [repair for one in judged for repair in one.repairs]
    modules = [repair.stand_in for repair in repairs if isinstance(repair.stand_in, nn.Module)]
    tensors = [branch.map for one in judged for branch in one.maps]
    tensors += [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    kinds = [type(repair.stand_in).__name__ for repair in repairs]
    layout = kinds, [(tuple(t.shape), str(t.dtype)) for t in tensors]
    if any(other != layout for other in work.all_gather_object(layout)):
        raise StreamlineError(
            "The processes have fitted different stand-ins for the same selections. Give every process the same model, "
            "arguments and text."
        )
    work.broadcast_(tensor for tensor in tensors if not tensor.is_meta)
    plain = [None if isinstance(repair.stand_in, nn.Module) else repair.stand_in for repair in repairs]
    first = iter(work.broadcast_object(lambda: plain))
    return [
        replace(one, repairs=tuple(replace(repair, stand_in=next(first) or repair.stand_in) for repair in one.repairs))
        for one in judged
    ]

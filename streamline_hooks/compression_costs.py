"""What a compression costs, told before it is made."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.cost import Cost
from streamline_hooks.evaluation.pace import measure_pace
from streamline_hooks.evaluation.writing_cost import writing_cost
from streamline_hooks.preparation import Preparation, search_from_keywords
from streamline_hooks.repair.fitting import holds_map
from streamline_hooks.repair.rollouts import require_writes
from streamline_hooks.result import most_attempts

if TYPE_CHECKING:
    from streamline_hooks.repair import Healing, Training


def compression_costs(
    ready: Preparation,
    shortlist: int,
    profiled: bool = False,
    training: Training | None = None,
    healing: Healing | None = None,
    rounds: int = 1,
    *,
    search: str = "window",
    parts: int = 2,
) -> list[Cost]:
    """What a compression costs at most on this machine, measured on a few tokens; the sums beside the passes.

    Without what a search runs the model for by itself, and what is written, timed and saved at the end.

    Parameters
    ----------
    ready : Preparation
    shortlist : int
    profiled : bool
        Whether there is a profile already.
    training : Training, optional
        Of what is chosen.
    healing : Healing, optional
        Beside it.
    rounds : int
        That share the text to calibrate on, where this is the first of them; the others are taken to cost as much.
    search : str
        Each window of a selection but the first is fitted in a pass of its own, and a selection of several is judged
        and measured by whole forwards.
    parts : int
        The windows of a selection, where the search makes so many and not as many as it likes.

    Raises
    ------
    StreamlineError
        If the model is not one for text, whose costs are not known.
    """
    if not ready.task.is_of_text:
        raise StreamlineError(
            f"What a compression of a model for {ready.task} costs is not known beforehand; leave out --dry-run."
        )
    pace = measure_pace(ready.stack.model, ready.calibration[0], stack=ready.stack.path)
    with torch.device("meta"):
        made = ready.kind.make(ready.stack, ready.candidates[0])
    module, beside = made if isinstance(made, nn.Module) else None, not holds_map(made)
    most = min(shortlist, len(ready.candidates))
    judged: dict[str, Any] = {"shortlist": most, "replacement": module}
    searching = search_from_keywords(search, parts=parts)
    later = most * (searching.most_windows(max(map(len, ready.candidates))) - 1)
    one_by_one: dict[str, Any] = {**judged, "shortlist": 1, "beside": beside, "sums": 2}
    whole = searching.number_of_windows != 1 or bool(ready.kind.slots or ready.kind.fit)
    trained = []
    if training is not None:
        cost = pace.train(
            ready.training[: math.ceil(len(ready.training) / rounds)],
            ready.validation,
            ready.candidates,
            epochs=training.epochs,
            validations=training.validations,
            logits=training.objective.needs_logits,
            replacement=module,
            healed=healing is not None,
        )
        trained.append(cost * rounds)
        if training.on_policy is not None:
            require_writes(ready.stack.model, ready.task, training.on_policy, ready.training)
            trained.append(writing_cost(ready.stack.model, ready.training, training, pace))
    tried = most_attempts(training is not None)
    found = [
        *([] if profiled else [pace.rank(ready.calibration)]),
        *([pace.channels([*ready.fit, *ready.held_out], ready.candidates)] if ready.kind.fill else []),
        pace.fit(ready.fit, ready.candidates, **judged, beside=beside),
        pace.fit(ready.held_out, ready.candidates, **judged, beside=beside, sums=2),
        *([pace.fit(ready.fit, ready.candidates, **one_by_one) * later] if later else []),
        *([pace.fit(ready.held_out, ready.candidates, **one_by_one) * later] if later else []),
        pace.judge(ready.judging, ready.candidates, **judged, whole=whole) * rounds,
        *trained,
        pace.perplexity(ready.test) * (2 * rounds),  # of the original, and of the result
        pace.attempts(ready.test, ready.candidates, tried, replacement=module, whole=whole) * rounds,
    ]
    parameters = ready.stack.model.parameters() if rounds > 1 else ()
    original = sum(p.numel() * p.element_size() for p in parameters)  # a copy, which teaches in later rounds
    return [replace(cost, bytes=cost.bytes + original) for cost in found]

"""What a compression costs, told before it is made."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.cost import Cost
from streamline_hooks.evaluation.pace import measure_pace
from streamline_hooks.preparation import Preparation
from streamline_hooks.repair.fitting import holds_map
from streamline_hooks.result import most_attempts


def compression_costs(ready: Preparation, profiled: bool = False) -> list[Cost]:
    """Return what each pass of a compression costs at most on this machine, measured on a few tokens.

    Without the passes that a search makes of its own, and without generation, timing and saving at the end.

    Parameters
    ----------
    ready : Preparation
        Of several rounds the first; the others are assumed to cost the same.
    profiled : bool
        Whether there is a profile already.

    Raises
    ------
    StreamlineError
        If the model is not one for text, whose costs are not known.
    """
    config = ready.config
    distillation, rounds, search = config.distillation, config.rounds, config.search
    if not ready.task.is_of_text:
        raise StreamlineError(
            f"What a compression of a model for {ready.task} costs is not known beforehand; leave out --dry-run."
        )
    pace = measure_pace(ready.stack.model, ready.calibration[0], stack=ready.stack.path)
    with torch.device("meta"):
        made = ready.kind.make(ready.stack, ready.candidates[0])
    module, beside = made if isinstance(made, nn.Module) else None, not holds_map(made)
    most = min(search.shortlist, len(ready.candidates))
    judged: dict[str, Any] = {"shortlist": most, "replacement": module}
    later = most * (search.most_windows(max(map(len, ready.candidates))) - 1)
    one_by_one: dict[str, Any] = {**judged, "shortlist": 1, "beside": beside, "sums": 2}
    whole = search.kind != "window" or bool(ready.kind.slots or ready.kind.fit)
    trained = []
    if distillation is not None:
        cost = pace.train(
            ready.training[: math.ceil(len(ready.training) / rounds)],
            ready.validation,
            ready.candidates,
            epochs=distillation.epochs,
            validations=distillation.validations,
            logits=distillation.objective.needs_logits,
            replacement=module,
            healed=config.healing is not None,
        )
        trained.append(cost * rounds)
    tried = most_attempts(distillation is not None)
    found = [
        *([] if profiled else [pace.rank(ready.calibration)]),
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

"""What ``streamline-hooks compress --dry-run`` says."""

from __future__ import annotations

from collections.abc import Callable

from streamline_hooks.compression_costs import compression_costs
from streamline_hooks.preparation import Preparation


def say_costs(ready: Preparation, *, profiled: bool, say: Callable[[str], None]) -> None:
    """Say what each pass of a compression costs, and all of them; see `compression_costs`."""
    if not ready.task.is_of_text:
        say("What this costs is not known beforehand for such a model.")
        return
    costs, search = compression_costs(ready, profiled), ready.config.search
    for line in ("", *map(str, costs)):
        say(line)
    seconds, most = sum(cost.seconds for cost in costs), max(cost.bytes for cost in costs)
    above = f"at most {most / 1e9:.2f} GB above the model"
    say(f"in all up to about {seconds:.0f} s, and what is written, timed and saved at the end; {above}")
    criterion = search.resolved_criterion
    if search.runs_model or criterion.needs == "model":
        say(f"The {search.kind} search by {criterion.name} runs the model besides; its own bars say what that costs.")

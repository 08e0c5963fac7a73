"""What ``streamline-hooks compress --dry-run`` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from streamline_hooks.compression_costs import compression_costs
from streamline_hooks.preparation import Preparation
from streamline_hooks.selection import CRITERIA, SEARCHES

if TYPE_CHECKING:
    from streamline_hooks.repair import Healing, Training


def say_costs(
    ready: Preparation,
    shortlist: int,
    *,
    search: str,
    parts: int,
    criterion: str,
    profiled: bool,
    training: Training | None,
    healing: Healing | None,
    rounds: int,
    say: Callable[[str], None],
) -> None:
    """Say what each pass of a compression, or of as many rounds like this one, costs, and all of them.

    Parameters are those of `compression_costs`, and by what the blocks are searched for.
    """
    if not ready.task.is_of_text:
        say("What this costs is not known beforehand for such a model.")
        return
    costs = compression_costs(ready, shortlist, profiled, training, healing, rounds, search=search, parts=parts)
    for line in ("", *map(str, costs)):
        say(line)
    seconds, most = sum(cost.seconds for cost in costs), max(cost.bytes for cost in costs)
    above = f"at most {most / 1e9:.2f} GB above the model"
    say(f"in all up to about {seconds:.0f} s, and what is written, timed and saved at the end; {above}")
    if SEARCHES[search].runs_model or CRITERIA[criterion].needs == "model":
        say(f"The {search} search by {criterion} runs the model besides; its own bars say what that costs.")

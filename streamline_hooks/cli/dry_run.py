"""What ``streamline-hooks compress --dry-run`` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from streamline_hooks.preparation import Preparation
from streamline_hooks.selection import criterion_named

if TYPE_CHECKING:
    from streamline_hooks.repair import Healing, Training

_BY_PROFILE = ("window", "disjoint", "one-shot", "mixed")


def say_costs(
    ready: Preparation,
    shortlist: int,
    *,
    search: str,
    criterion: str,
    profiled: bool,
    training: Training | None,
    healing: Healing | None,
    rounds: int,
    say: Callable[[str], None],
) -> None:
    """Say what each pass of a compression, or of as many rounds like this one, costs, and all of them.

    Parameters are those of `Preparation.costs`, and by what the blocks are searched for.
    """
    if not ready.task.is_of_text:
        say("What this costs is not known beforehand for such a model.")
        return
    costs = ready.costs(shortlist, profiled, training, healing, rounds)
    for line in ("", *map(str, costs)):
        say(line)
    seconds, most = sum(cost.seconds for cost in costs), max(cost.bytes for cost in costs)
    say(f"in all about {seconds:.0f} s, at most {most / 1e9:.2f} GB above the model")
    if search not in _BY_PROFILE or criterion_named(criterion).needs == "model":
        say(f"The {search} search by {criterion} runs the model besides; its own bars say what that costs.")

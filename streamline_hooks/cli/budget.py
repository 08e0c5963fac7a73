"""What the command compress does with a budget of time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from streamline_hooks.cli.given_options import is_given
from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from streamline_hooks.planning import BudgetPlan

PRESET = "best"
_DECIDED = {
    "kind": "--kind",
    "objective": "--train",
    "heal": "--heal",
    "rounds": "--rounds",
    "epochs": "--epochs",
    "validations": "--validations",
    "learning_rate": "--learning-rate",
    "autocast": "--autocast",
    "calibration_tokens": "--calibration-tokens",
    "fitting_tokens": "--fitting-tokens",
    "search": "--search",
    "criterion": "--criterion",
    "repeated": "--repeated",
}
_ELSEWHERE = {
    "resume": "--resume",
    "pack": "--pack",
    "parts": "--parts",
    "profile_file": "--profile",
    "memory": "--memory",
}


def refuse_beside_budget(context: typer.Context, *, text: str, processes: int) -> None:
    """Raise if something was asked for that a budget decides itself, or does not plan for.

    Parameters
    ----------
    context : typer.Context
        Of the command, which knows what was given.
    text : str
        The option, where the text is not there, or of several sources in shares; otherwise empty.
    processes : int

    Raises
    ------
    StreamlineError
        Naming the options.
    """
    from streamline_hooks.pipeline.presets import PRESETS

    decided, elsewhere = (_given(context, options) for options in (_DECIDED, _ELSEWHERE))
    preset = PRESETS[context.params["preset"] or PRESET]
    if (rounds := preset.config.rounds) > 1:
        elsewhere.insert(0, f"--preset {preset.name}, which goes in {rounds} rounds")
    if decided:
        raise StreamlineError(
            f"--budget does the recipe {preset.name!r}, and plans what {' and '.join(decided)} would say; leave one of "
            "them out."
        )
    elsewhere += [text] if text else []
    elsewhere += [f"{processes} processes"] if processes > 1 else []
    if elsewhere:
        raise StreamlineError(
            f"--budget plans one training, from its beginning, in one process, on text that is there, and does not go "
            f"with {' and '.join(elsewhere)}. Leave it out, and say "
            "--calibration-tokens instead of --budget."
        )


def said_again(plan: BudgetPlan, preset: str) -> str:
    """What to say in the place of ``--budget`` to go on with a training that was interrupted, for a terminal."""
    sizes, given = plan.sizes, plan.given
    options = [
        f"--preset {preset}",
        *(["--autocast"] if plan.config.hardware.autocast is not None else []),
        f"--epochs {sizes.epochs}",
        f"--validations {sizes.validations}",
        f"--calibration-tokens {sizes.calibration}",
        f"--fitting-tokens {sizes.fitting}",
        f"--validation-tokens {sizes.validation}",
        f"--test-tokens {sizes.test}",
        f"--batch-size {given.batch_size}",
        *([f"--keep={','.join(map(str, given.keep))}"] if given.keep else []),
    ]
    replaced = "--budget and --keep" if given.keep else "--budget"
    return f"resume     after an interruption, in the place of {replaced}: {' '.join(options)} --resume"


def _given(context: typer.Context, options: dict[str, str]) -> list[str]:
    return [flag for name, flag in options.items() if is_given(context, name)]

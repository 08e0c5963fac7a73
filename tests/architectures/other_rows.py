"""Put the models that are no causal language models through their checks, and say in a row what came out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from streamline_hooks import UnsupportedSurgery
from tests.architectures.examine import quiet
from tests.architectures.other_checks import CHECKS, checks_of
from tests.other_models import OTHERS, made

COLUMNS = ("case", "class", "blocks at", "identity", "removal", "closed form", "save and load", "cache", "generate",
           "silence", "fold", "why refused")  # fmt: skip


@dataclass
class OtherRow:
    """What holds for one stack of one model.

    Attributes
    ----------
    case : str
        Its name in `OTHERS`.
    model, path : str
        The model's class, and where the stack is.
    checks : dict
        For each of `CHECKS` that says something of it "ok", "refused", or "WRONG" with what was wrong.
    reasons : dict
        Why something was refused, in the library's words.
    """

    case: str
    model: str
    path: str
    checks: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def examine_other(case: str) -> OtherRow:
    """Run the checks of a case."""
    model = made(case)
    row = OtherRow(case, type(model).__name__, OTHERS[case].path(model))
    for check in checks_of(case):
        try:
            with quiet():
                CHECKS[check](case)
        except UnsupportedSurgery as error:
            row.checks[check], row.reasons[check] = "refused", str(error)
        except Exception as error:
            row.checks[check] = f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            row.checks[check] = "ok"
    return row


def section(rows: Iterable[dict[str, Any]], version: str) -> list[str]:
    """The lines of the second table, with what stands above it."""
    rows = list(rows)
    faults = [row["case"] for row in rows if any(said.startswith("WRONG") for said in row["checks"].values())]
    return [
        "## Other models",
        "",
        f"Written by `make architectures ROWS=others`, which leaves the table above as it is: {len(rows)} stacks of "
        f"{len({row['model'] for row in rows})} classes of Transformers {version} that are no causal language models, "
        "vision transformers, encoders, encoders with decoders, towers and the text beside them, with tiny random "
        "weights. An identity put in changes nothing to the bit. A removal equals the same block bypassed, a splice "
        "the module in the block's place. The map that is fitted in closed form repairs what was removed. What is "
        "committed comes back from a checkpoint. Decoding with a cache equals decoding without one, also beside an "
        "encoder that became shorter, is committed, and comes back (generate). A branch that is "
        "silenced equals one whose output is thrown away, a branch with a map folded in one whose output is "
        "multiplied by it. Everything is restored to the bit. "
        f"{len(faults)} are wrong anywhere; what is refused is refused with the reason given.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *map(_line, rows),
    ]


def _line(row: dict[str, Any]) -> str:
    cells = [row["case"], row["model"], row["path"], *(row["checks"].get(check, "") for check in CHECKS)]
    reasons = dict.fromkeys(_shortened(reason) for reason in row["reasons"].values())
    return f"| {' | '.join([*cells, '; '.join(reasons)])} |"


def _shortened(reason: str) -> str:
    """A refusal without its block and its advice."""
    text = reason.split(" cannot be ", 1)[-1].partition(": ")[2].removesuffix(" Choose another block.").rstrip(".")
    return " ".join(text.replace("|", "/").split())

"""Run the checks of models that are not causal language models, and collect the results in table rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from streamline_hooks import UnsupportedSurgery
from tests.architectures.examine import quiet
from tests.architectures.other_checks import CHECKS, checks_of
from tests.other_models import OTHERS, made

COLUMNS = ("model", "class", "block stack", "identity", "removal", "closed form", "save and load", "cache", "generate",
           "zeroed branch", "folded branch", "reason for refusal")  # fmt: skip


@dataclass
class OtherRow:
    """Results of the checks of one block stack of one model.

    Attributes
    ----------
    case : str
        Name in `OTHERS`.
    model, path : str
        Class of the model, and path of the stack.
    checks : dict
        For each applicable check of `CHECKS` "ok", "refused", or "WRONG" with the error.
    reasons : dict
        The library's message for each refused check.
    """

    case: str
    model: str
    path: str
    checks: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def examine_other(case: str) -> OtherRow:
    """Run the checks of a case and return its row."""
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
    """Return the lines of the second table and of its introduction."""
    rows = list(rows)
    faults = [row["case"] for row in rows if any(result.startswith("WRONG") for result in row["checks"].values())]
    return [
        "## Other models",
        "",
        f"{len(rows)} block stacks of {len({row['model'] for row in rows})} other classes of Transformers {version}, "
        "with tiny random weights: vision transformers, encoders, encoder-decoders, and the towers and text models of "
        f"multimodal models. {len(faults)} fail a check. If a check is refused, the last column has the reason. An "
        "empty cell means that the check does not apply. `make architectures ROWS=others` generates only this table.",
        "",
        "- *identity*: inserting an identity leaves the outputs unchanged bit for bit.",
        "- *removal*: removing or replacing a block gives the outputs of the model with the block bypassed or "
        "replaced, and the model is restored bit for bit.",
        "- *closed form*: a linear map fitted by least squares reduces the error of a removal.",
        "- *save and load*: a committed surgery is restored from its checkpoint.",
        "- *cache*: decoding with a cache gives the logits of decoding without one, before and after a removal.",
        "- *generate*: the same with a shortened encoder, inside the context, after the commit, and after loading.",
        "- *zeroed branch*: zeroing a residual branch gives the outputs of the model without the branch.",
        "- *folded branch*: folding a map into a branch gives the outputs of the model with the map applied to the "
        "branch output.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *map(_line, rows),
    ]


def _line(row: dict[str, Any]) -> str:
    case = row["case"].replace("pictures", "vision")
    cells = [case, row["model"], row["path"], *(row["checks"].get(check, "") for check in CHECKS)]
    reasons = dict.fromkeys(_shortened(reason) for reason in row["reasons"].values())
    return f"| {' | '.join([*cells, '; '.join(reasons)])} |"


def _shortened(reason: str) -> str:
    """Return a refusal without its block and its advice."""
    text = reason.split(" cannot be ", 1)[-1].partition(": ")[2].removesuffix(" Choose another block.").rstrip(".")
    return " ".join(text.replace("|", "/").split())

"""Examine models and write docs/architectures.md: python -m tests.architectures.matrix [TYPE ... | others | page]

Without arguments all causal language model types (first table) and all other models (second table) are examined. With
types only these types are examined, with "others" only the second table, and with "page" the page is written from the
stored results without examining a model.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROWS = Path(__file__).with_name("table.json")
PAGE = ROOT / "docs" / "architectures.md"
SINGLE = ("first", "middle", "last")
LONGEST = 220  # characters of a reason


def main() -> None:
    import transformers

    from streamline_hooks.testing import causal_model_types
    from tests.other_models import OTHERS

    arguments = sys.argv[1:]
    stored = json.loads(ROWS.read_text()) if arguments and ROWS.exists() else {}
    if arguments == ["page"]:
        PAGE.write_text(page(stored))
        return
    rows, others = stored.get("rows", {}), stored.get("others", [])
    if stored.get("transformers", transformers.__version__) != transformers.__version__:
        sys.exit(
            f"The tables were generated with Transformers {stored['transformers']}; installed is "
            f"{transformers.__version__}. Expected one version for all rows. Generate both tables again (make "
            "architectures)."
        )
    types = [t for t in arguments if t != "others"] if arguments else causal_model_types()
    if unknown := sorted(set(types) - set(causal_model_types())):
        sys.exit(
            f"{', '.join(unknown)}: not a causal-LM type of the installed Transformers. Expected names of "
            "streamline_hooks.testing.causal_model_types(), or others. Nothing was written."
        )
    started = time.time()
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1), maxtasksperchild=40) as pool:
        for row in pool.imap_unordered(row_of, types):
            rows[row["model_type"]] = row
            print(line(row), flush=True)
        if not arguments or "others" in arguments:
            others = list(pool.imap(other_row_of, OTHERS))
            for row in others:
                print(f"{row['case']:<28} {verdict_of_other(row)}")
    content = {"transformers": transformers.__version__, "rows": dict(sorted(rows.items())), "others": others}
    ROWS.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(page(content))
    print(f"{len(types)} types examined in {time.time() - started:.0f} s. The page is {PAGE}.")


def row_of(model_type: str) -> dict[str, Any]:
    """Examine a model type and return its row as JSON values."""
    from tests.architectures.examine import examine

    calm()
    return asdict(examine(model_type))


def other_row_of(case: str) -> dict[str, Any]:
    """Examine another model and return its row of the second table as JSON values."""
    from tests.architectures.other_rows import examine_other

    calm()
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        return asdict(examine_other(case))


def calm() -> None:
    """Use one thread, and silence Transformers."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def line(row: dict[str, Any]) -> str:
    """Return a row as a line for the terminal."""
    return f"{row['model_type']:<28} {verdict(row)}"


def verdict(row: dict[str, Any]) -> str:
    if row["unbuilt"]:
        return f"not examined: {row['unbuilt']}"
    return ", ".join(f"{name} {result}" for name, result in row["windows"].items())


def verdict_of_other(row: dict[str, Any]) -> str:
    return ", ".join(f"{check} {result}" for check, result in row["checks"].items())


def supported(row: dict[str, Any]) -> bool:
    """Whether surgery at the first, a middle and the last block passes all checks that the unmodified model passes."""
    return bool(row["windows"]) and all(row["windows"][name] == "ok" for name in SINGLE)


def wrong(row: dict[str, Any]) -> list[str]:
    """Return the windows with a failed check."""
    return [f"{name}: {result}" for name, result in row["windows"].items() if result.startswith("WRONG")]


def worse(row: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Return the regressions of a row with respect to the committed row."""
    regressions = wrong(row)
    for name, result in committed["windows"].items():
        if result == "ok" and row["windows"].get(name) != "ok":
            regressions.append(f"{name} was ok and is {row['windows'].get(name)}: {row['reasons'].get(name, '')}")
    # Checks that the unmodified model fails are not applied, so a fault of a check could go unnoticed.
    regressions += [
        f"the unmodified model no longer passes {name}"
        for name, ok in committed["own"].items()
        if ok and not row["own"].get(name)
    ]
    if committed["states"] == "ok" and row["states"] != "ok":
        regressions.append(f"recorded states were ok and are {row['states'] or 'not comparable'}")
    return regressions


def page(content: dict[str, Any]) -> str:
    from tests.architectures.other_rows import section

    rows = content["rows"]
    full, faults = [r for r in rows.values() if supported(r)], [r for r in rows.values() if wrong(r)]
    lines = [
        "# Supported architectures",
        "",
        "Models on which surgery was tested. `make architectures` generates this page.",
        "",
        "## Causal language models",
        "",
        f"All {len(rows)} causal language model types of Transformers {content['transformers']}, with tiny random "
        f"weights. {len(full)} types are fully supported, {len(faults)} fail a check. For the other types some surgery "
        "is refused, and the last column has the reason.",
        "",
        "A type is fully supported if it passes the following checks at the first, a middle and the last block. Checks "
        "that the unmodified model fails are not applied.",
        "",
        "- Removing a block gives the logits of the model with the block bypassed.",
        "- Replacing a block gives the logits of the model with the replacement run instead of the block.",
        "- Decoding with a cache (dynamic and static, with and without left padding) gives the logits of the forward "
        "without a cache.",
        "- The saved model has the same logits when it is loaded.",
        "- The original model is restored bit for bit when the surgery ends.",
        "",
        "The column *unmodified* lists the checks that the type passes before any surgery: c cached decoding, p cached "
        "decoding with left padding, d `generate`, s `generate` with a static cache, r save and reload. The column "
        "*three* is a window of three blocks. The column *recorded states* is ok if the recorded inputs of the blocks "
        "equal `output_hidden_states`; some types return other states there.",
        "",
        "| type | block stack | unmodified | first | middle | last | three | recorded states | reason for refusal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        if row["unbuilt"]:
            lines.append(f"| {row['model_type']} | | | | | | | | not examined: {row['unbuilt']} |")
            continue
        own = "".join(
            letter if row["own"][name] else "·"
            for name, letter in zip(("cache", "padding", "dynamic", "static", "save"), "cpdsr", strict=True)
        )
        cells = [row["windows"].get(name, "") for name in (*SINGLE, "three")]
        reasons = sorted({shortened(reason) for reason in row["reasons"].values()})
        states = row["states"] or "not comparable"
        lines.append(
            f"| {row['model_type']} | {row['path']} | {own} | {' | '.join(cells)} | {states} | {'; '.join(reasons)} |"
        )
    return "\n".join([*lines, "", *section(content["others"], content["transformers"])]) + "\n"


def shortened(reason: str) -> str:
    """Return a refusal without its blocks and its advice, cut at the end of a sentence if it is long."""
    text = reason.split(" cannot be removed: ")[-1].split(". Choose")[0].split("; choose other")[0]
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= LONGEST else text[:LONGEST].rpartition(". ")[0] or shorten(text, LONGEST)


if __name__ == "__main__":
    main()

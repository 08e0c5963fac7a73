"""Examine models and write docs/architectures.md: python -m tests.architectures.matrix [TYPE ... | others]

Without a word every causal-LM type is examined, for the first table, and every other model, for the second one; with
types only these, and with "others" only the second table is made anew.
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
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROWS = Path(__file__).with_name("table.json")
PAGE = ROOT / "docs" / "architectures.md"
SINGLE = ("first", "middle", "last")


def main() -> None:
    import transformers

    from streamline_hooks.testing import causal_model_types
    from tests.other_models import OTHERS

    asked = sys.argv[1:]
    known = json.loads(ROWS.read_text()) if asked and ROWS.exists() else {}
    rows, others = known.get("rows", {}), known.get("others", [])
    if known.get("transformers", transformers.__version__) != transformers.__version__:
        sys.exit(
            f"The tables were made with Transformers {known['transformers']}, and this is {transformers.__version__}. "
            "Rows of two versions do not go together: make both tables anew (make architectures)."
        )
    types, started = [t for t in asked if t != "others"] if asked else causal_model_types(), time.time()
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1), maxtasksperchild=40) as pool:
        for row in pool.imap_unordered(row_of, types):
            rows[row["model_type"]] = row
            print(line(row), flush=True)
        if not asked or "others" in asked:
            others = list(pool.imap(other_row_of, OTHERS))
            for row in others:
                print(f"{row['case']:<28} {verdict_of_other(row)}")
    content = {"transformers": transformers.__version__, "rows": dict(sorted(rows.items())), "others": others}
    ROWS.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(page(content))
    print(f"{len(types)} types in {time.time() - started:.0f} s; written to {PAGE}")


def row_of(model_type: str) -> dict[str, Any]:
    """One row, as JSON values."""
    from tests.architectures.examine import examine

    calm()
    return asdict(examine(model_type))


def other_row_of(case: str) -> dict[str, Any]:
    """One row of the second table, as JSON values."""
    from tests.architectures.other_rows import examine_other

    calm()
    with contextlib.redirect_stderr(io.StringIO()):  # bars
        return asdict(examine_other(case))


def calm() -> None:
    """One thread, and no word from Transformers."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def line(row: dict[str, Any]) -> str:
    """One row for a terminal."""
    return f"{row['model_type']:<28} {verdict(row)}"


def verdict(row: dict[str, Any]) -> str:
    if row["unbuilt"]:
        return f"not examined: {row['unbuilt']}"
    return ", ".join(f"{name} {said}" for name, said in row["windows"].items())


def verdict_of_other(row: dict[str, Any]) -> str:
    return ", ".join(f"{check} {said}" for check, said in row["checks"].items())


def supported(row: dict[str, Any]) -> bool:
    """Fully: whatever the unmodified model passes is passed at the first, a middle and the last block."""
    return bool(row["windows"]) and all(row["windows"][name] == "ok" for name in SINGLE)


def wrong(row: dict[str, Any]) -> list[str]:
    """What was neither right nor refused."""
    return [f"{name}: {said}" for name, said in row["windows"].items() if said.startswith("WRONG")]


def worse(row: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """In what a row has become worse than the committed one."""
    found = wrong(row)
    for name, said in committed["windows"].items():
        if said == "ok" and row["windows"].get(name) != "ok":
            found.append(f"{name} was ok and is {row['windows'].get(name)}: {row['reasons'].get(name, '')}")
    # What the unmodified model no longer passes is no longer compared: a fault in a check would hide behind it.
    found += [
        f"{name} of its own was passed" for name, ok in committed["own"].items() if ok and not row["own"].get(name)
    ]
    if committed["states"] == "ok" and row["states"] != "ok":
        found.append(f"recorded states were ok and are {row['states'] or 'not comparable'}")
    return found


def page(content: dict[str, Any]) -> str:
    from tests.architectures.other_rows import section

    rows = content["rows"]
    full, faults = [r for r in rows.values() if supported(r)], [r for r in rows.values() if wrong(r)]
    lines = [
        "# Architectures",
        "",
        f"Written by `make architectures`: each of the {len(rows)} causal language model types of Transformers "
        f"{content['transformers']}, with tiny random weights. {len(full)} are fully supported: at the first, a middle "
        "and the last block, removal equals the same block bypassed, a splice equals the module in the block's place, "
        "decoding with a cache (dynamic and static, left-padded too) equals the forward without one, the saved model "
        "comes back the same, and everything is restored to the bit. Compared is what the unmodified model passes. "
        f"{len(faults)} are wrong anywhere; elsewhere the surgery is refused with the reason given.",
        "",
        "A column of the model's own says what the type passes before any surgery: c cached decoding, p the same "
        "left-padded, d `generate`, s `generate` with a static cache, r save and reload.",
        "",
        "| type | blocks at | own | first | middle | last | three | recorded states | why refused |",
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
        states = row["states"] or "own output differs"
        lines.append(
            f"| {row['model_type']} | {row['path']} | {own} | {' | '.join(cells)} | {states} | {'; '.join(reasons)} |"
        )
    return "\n".join([*lines, "", *section(content["others"], content["transformers"])]) + "\n"


def shortened(reason: str) -> str:
    """A refusal without its blocks, its advice and its line breaks."""
    text = reason.split(" cannot go: ")[-1].split(". Choose")[0].split("; choose other")[0]
    return " ".join(text.replace("|", "/").split())[:220]


if __name__ == "__main__":
    main()

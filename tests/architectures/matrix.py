"""Examine models and write docs/architectures.md.

python -m tests.architectures.matrix [TYPE ... | others | sites [TYPE ...] | prompt_skip [TYPE ...] | page]

Without arguments all causal language model types (first table) and all other models (second table) are examined. With
types only these types are examined, and with "others" only the second table. With "sites" or "prompt_skip" only the
activation sites or the skipping of prompts are examined, by default for types without stored results, or for all types
if none lack them; each result is stored at once, so the command continues after an interruption. With "page" the page
is written from the stored results without examining a model.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

from tests.architectures.examine_sites import CONTRIBUTIONS, READ_ONLY, WITH_NORMS

ROOT = Path(__file__).resolve().parents[2]
ROWS = Path(__file__).with_name("table.json")
PAGE = ROOT / "docs" / "architectures.md"
SINGLE = ("first", "middle", "last")
LONGEST = 220  # characters of a reason
COLUMNS = ("type", "block stack", "unmodified", *SINGLE, "three", "recorded states", "branches", "heads",
           "prompt skip", "reason for refusal")  # fmt: skip
PARTS = ("sites", "prompt_skip")
"""Fields of a row that can be examined without the others."""


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
    part = arguments[0] if arguments and arguments[0] in PARTS else ""
    types = [t for t in arguments[bool(part) :] if t != "others"] if arguments else causal_model_types()
    if unknown := sorted(set(types) - set(causal_model_types())):
        sys.exit(
            f"{', '.join(unknown)}: not a causal-LM type of the installed Transformers. Expected names of "
            "streamline_hooks.testing.causal_model_types(), or others. Nothing was written."
        )
    if part:
        update_part(stored, part, types)
        return
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
    store(content)
    PAGE.write_text(page(content))
    print(f"{len(types)} types examined in {time.time() - started:.0f} s. The page is {PAGE}.")


def store(content: dict[str, Any]) -> None:
    """Write the results of both tables, at once, so that an interruption does not damage the file."""
    new = ROWS.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(ROWS)


def update_part(content: dict[str, Any], part: str, types: list[str]) -> None:
    """Examine one part of stored rows again, and store each result at once."""
    from tests.architectures import examine

    calm()
    rows = {name: row for name, row in content["rows"].items() if not row["unbuilt"]}
    if unknown := sorted(set(types) - set(rows)):
        sys.exit(f"{', '.join(unknown)}: not examined yet. Expected types that have a row with windows. Omit {part}.")
    examine_part = {"sites": examine.sites_of, "prompt_skip": examine.prompt_skip_of}[part]
    for name in types or [name for name, row in rows.items() if not row.get(part)] or list(rows):
        rows[name][part] = examine_part(name)
        store(content)
        print(f"{name:<28} {sites_verdict(rows[name]) if part == 'sites' else rows[name][part]}", flush=True)
    PAGE.write_text(page(content))


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
    return ", ".join([*(f"{name} {result}" for name, result in row["windows"].items()), sites_verdict(row)])


def sites_verdict(row: dict[str, Any]) -> str:
    return f"branches {branches(row)}, heads {status(row['sites']['attention.heads'])}"


STATUSES = ("ok", WITH_NORMS, "read only", "refused", "WRONG")
"""Possible results of an activation site, from the best to the worst."""


def status(result: str) -> str:
    """Return the status of the result of an activation site."""
    if result in ("ok", WITH_NORMS):
        return result
    prefix = result.partition(":")[0]
    return prefix if prefix == "WRONG" else "read only" if prefix.endswith(READ_ONLY) else "refused"


def branches(row: dict[str, Any]) -> str:
    """Return the status of the two contributions, the worse if they differ; empty if they were not examined."""
    return max((status(row["sites"][site]) for site in CONTRIBUTIONS if row["sites"]), key=STATUSES.index, default="")


def verdict_of_other(row: dict[str, Any]) -> str:
    return ", ".join(f"{check} {result}" for check, result in row["checks"].items())


def supported(row: dict[str, Any]) -> bool:
    """Whether surgery at the first, a middle and the last block passes all checks that the unmodified model passes."""
    return bool(row["windows"]) and all(row["windows"][name] == "ok" for name in SINGLE)


def wrong(row: dict[str, Any]) -> list[str]:
    """Return the windows and the activation sites with a failed check."""
    results = {**row["windows"], **row["sites"], "prompt skip": row["prompt_skip"]}
    return [f"{name}: {result}" for name, result in results.items() if result.startswith("WRONG")]


def worse(row: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Return the regressions of a row with respect to the committed row."""
    regressions = wrong(row)
    for name, result in committed["windows"].items():
        if result == "ok" and row["windows"].get(name) != "ok":
            regressions.append(f"{name} was ok and is {row['windows'].get(name)}: {row['reasons'].get(name, '')}")
    for site, result in committed["sites"].items():
        reason = row["sites"].get(site, "not examined")
        if STATUSES.index(status(reason)) > STATUSES.index(status(result)):
            regressions.append(f"{site} was {status(result)} and is {status(reason)}: {reason}")
    if committed["prompt_skip"] == "ok" and row["prompt_skip"] != "ok":
        regressions.append(f"prompt skip was ok and is {row['prompt_skip']}")
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
    counts = site_counts(full)
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
        "The column *branches* is ok if [`attention.output` and `mlp.output`](how_to/activations.md) can be recorded "
        "and changed in every block, and sum with the input of the block to its output; *with norms* means that this "
        "holds for contributions that contain the norm after each sum. The column *heads* is ok if "
        "[`attention.heads`](how_to/activations.md) can be recorded and changed in every block. Of the fully "
        f"supported types, {counts['branches']} have both branches ({counts[WITH_NORMS]} of them with norms, "
        f"{counts['read only']} read only) and {counts['heads']} have heads. [The next "
        "table](#refused-activation-sites) has the reasons for refused sites.",
        "",
        "The column *prompt skip* is ok if [prompts can skip](how_to/prompt_skip.md) the upper half of the blocks, and "
        "the logits of generated tokens equal those of a full forward pass in which the outputs of skipped blocks are "
        f"replaced. It is ok for {sum(row['prompt_skip'] == 'ok' for row in rows.values())} types. The other types "
        "have blocks with a recurrent state, or without keys and values of their own, among the skipped ones.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for row in rows.values():
        if row["unbuilt"]:
            empty = "| " * (len(COLUMNS) - 2)
            lines.append(f"| {row['model_type']} {empty}| not examined: {row['unbuilt']} |")
            continue
        own = "".join(
            letter if row["own"][name] else "·"
            for name, letter in zip(("cache", "padding", "dynamic", "static", "save"), "cpdsr", strict=True)
        )
        cells = [row["windows"].get(name, "") for name in (*SINGLE, "three")]
        reasons = sorted({shortened(reason) for reason in row["reasons"].values()})
        states = row["states"] or "not comparable"
        skip = "ok" if row["prompt_skip"] == "ok" else "refused"
        cells += [states, branches(row), status(row["sites"]["attention.heads"]), skip, "; ".join(reasons)]
        lines.append(f"| {row['model_type']} | {row['path']} | {own} | {' | '.join(cells)} |")
    lines += ["", *refused_sites(rows.values()), ""]
    return "\n".join([*lines, *section(content["others"], content["transformers"])]) + "\n"


def site_counts(rows: list[dict[str, Any]]) -> Counter[str]:
    """Return how many types have both branches, how many of them with each status, and how many have heads."""
    counts = Counter(branches(row) for row in rows)
    counts["branches"] = counts["ok"] + counts[WITH_NORMS] + counts["read only"]
    counts["heads"] = sum(row["sites"]["attention.heads"] == "ok" for row in rows)
    return counts


def refused_sites(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of refused activation sites, with one line per reason and its sites."""
    types: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        sites: dict[str, list[str]] = {}
        for site, result in row["sites"].items():
            if status(result) not in ("ok", WITH_NORMS):
                sites.setdefault(site_reason(result), []).append(f"`{site}`")
        for reason, names in sites.items():
            types.setdefault((reason, ", ".join(names)), []).append(row["model_type"])
    return [
        "### Refused activation sites",
        "",
        "A site is refused if one of the blocks does not have it. The other sites of these types are ok.",
        "",
        "| reason | sites | types |",
        "|---|---|---|",
        *(f"| {reason} | {sites} | {', '.join(names)} |" for (reason, sites), names in sorted(types.items())),
    ]


def site_reason(result: str) -> str:
    """Return the reason for the refusal of an activation site, without its block, its class and its advice."""
    text = " ".join(result.partition(". Expected")[0].replace("|", "/").split())
    reason = re.split(f" cannot be read: | {READ_ONLY}: | does not have two residual branches: ", text)[-1]
    reason = re.sub(r"^Cannot find the branches of \w+: | \([\w.]+\)$", "", reason)  # the path of the stack
    return reason if status(result) == "refused" else f"{status(result)}: {reason}"


def shortened(reason: str) -> str:
    """Return a refusal without its blocks and its advice, cut at the end of a sentence if it is long."""
    text = reason.split(" cannot be removed: ")[-1].split(". Choose")[0].split("; choose other")[0]
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= LONGEST else text[:LONGEST].rpartition(". ")[0] or shorten(text, LONGEST)


if __name__ == "__main__":
    main()

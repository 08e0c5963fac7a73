"""How sure a choice is: the same search on other text and other seeds, beside other criteria on the same text.

    python -m benchmarks.certainty [--data FOLDER] [--remove 8]

The verified shortlist is run on SmolLM2-135M for each of four training domains and three seeds, and perplexity of the
repaired model is taken on held-out text. Rows go to ``benchmarks/results/certainty.json`` as they come, and the table
to ``benchmarks/results/certainty.md``; `benchmarks.choice` gives the spread across criteria.
"""

from __future__ import annotations

import json
import statistics
from itertools import combinations
from typing import Any

from benchmarks.choice import FILE as CHOICE
from benchmarks.choice_exhaustive import SEQUENCES_A_DOMAIN
from benchmarks.real_text import BATCH, RESULTS, SEQUENCE, arguments, scored_text
from streamline_hooks import SearchProblem, find_selections, profile, verified
from streamline_hooks.batch import batches_of
from streamline_hooks.calibration import read_documents, split_documents
from streamline_hooks.preparation import held_out_apart
from streamline_hooks.pretrained import load_pretrained
from streamline_hooks.selection import Attempt, perplexity_of_attempts, windows
from streamline_hooks.selection.criteria import SHORTLIST as CRITERION
from streamline_hooks.stack import find_stack

FILE = RESULTS / "certainty.json"
DOMAINS = ("blog_18f", "fiction_austen_doyle", "news_digitalgov", "peps")
SEEDS = (0, 1, 2)
CALIBRATION, VALIDATION, SHORTLIST = 4_096, 512, 4


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--remove", type=int, default=8)
    options = parser.parse_args()
    model, tokenizer = load_pretrained("smollm2")
    test = scored_text(options.data, tokenizer, SEQUENCES_A_DOMAIN)
    content: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}
    content["command"] = f"python -m benchmarks.certainty --remove {options.remove}"
    done = {(row["domain"], row["seed"]) for row in content["rows"]}
    for seed in SEEDS:
        for domain in DOMAINS:
            if (domain, seed) not in done:
                text = read_documents(options.data / "text" / "train" / f"{domain}.txt")
                content["rows"].append(
                    {"domain": domain, "seed": seed, **run(model, tokenizer, text, seed, options.remove, test)}
                )
                FILE.write_text(json.dumps(content, indent=1) + "\n")
                (RESULTS / "certainty.md").write_text(table(content, options.remove))
                print(content["rows"][-1], flush=True)
    print((RESULTS / "certainty.md").read_text())


def run(model: Any, tokenizer: Any, text: list[str], seed: int, size: int, test: Any) -> dict[str, Any]:
    """What is chosen on one text, and what becomes of it."""
    split = split_documents(
        text,
        tokenizer,
        seed=seed,
        sequence_length=SEQUENCE,
        calibration_tokens=CALIBRATION,
        validation_tokens=VALIDATION,
        test_tokens=SEQUENCE,
    )
    stack = find_stack(model)
    measured = profile(model, batches_of(split.calibration, BATCH))
    asked = SearchProblem(windows(len(stack), size), len(stack), CRITERION, best=SHORTLIST, profile=measured)
    shortlist = find_selections("window", asked)
    fit, held_out = held_out_apart(split.calibration)
    judged = verified(model, shortlist, *(batches_of(part, BATCH) for part in (fit, held_out, split.validation)))
    best = judged[0]
    attempt = Attempt(best, tuple(repair.module for repair in best.repairs))
    _, (repaired,) = perplexity_of_attempts(stack, test, [attempt])
    first = shortlist[0].windows[0]
    return {
        "start": best.windows[0].start,
        "first": first.start,
        "kl": best.kl,
        "repaired": repaired.value,
    }


def overlap(a: int, b: int, size: int) -> float:
    """The share of the blocks of one window that another one of the same size has too."""
    return max(0, size - abs(a - b)) / size


def spread(values: list[float]) -> str:
    """Median, least and greatest."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def agreement(starts: list[int], size: int) -> str:
    """Mean overlap of every two choices."""
    pairs = [overlap(a, b, size) for a, b in combinations(starts, 2)]
    return f"{statistics.fmean(pairs):.0%}" if pairs else ""


def table(content: dict[str, Any], size: int) -> str:
    """How the choices differ across text and seeds, and across criteria."""
    rows = content["rows"]
    lines = [
        f"SmolLM2-135M, {size} of 30 blocks, one window, repaired by a linear map in closed form. For each run "
        f"{CALIBRATION:,} tokens of one training domain to rank and fit on and {VALIDATION:,} to judge by KL, "
        f"{SHORTLIST} windows on the shortlist; perplexity of the repaired model on the same held-out text of five "
        "domains.",
        "",
        "| what varies | first blocks chosen | mean overlap of two choices | repaired perplexity: median (range) |",
        "|---|---|---:|---:|",
    ]

    def line(label: str, chosen: list[dict[str, Any]]) -> None:
        if not chosen:
            return
        starts = [row["start"] for row in chosen]
        lines.append(
            f"| {label} | {', '.join(map(str, starts))} | {agreement(starts, size)} | "
            f"{spread([row['repaired'] for row in chosen])} |"
        )

    for domain in DOMAINS:
        line(f"seed, on {domain}", [row for row in rows if row["domain"] == domain])
    for seed in SEEDS:
        line(f"domain, seed {seed}", [row for row in rows if row["seed"] == seed])
    line("domain and seed", rows)
    if CHOICE.exists():
        choice = json.loads(CHOICE.read_text())["rows"]
        single = {
            name: cells[str(size)]
            for name, cells in choice.items()
            if str(size) in cells and "," not in cells[str(size)]["blocks"] and not name.startswith("exhaustive")
        }
        line(
            f"criterion ({len(single)} of them, mixed text)",
            [{"start": int(c["blocks"].split("-")[0]), "repaired": c["repaired"]} for c in single.values()],
        )
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

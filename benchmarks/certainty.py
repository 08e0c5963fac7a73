"""How sure a choice is: the same search on other text and other seeds, beside other criteria on the same text.

    python -m benchmarks.certainty [--data FOLDER] [--remove 8]

The verified shortlist is run on SmolLM2-135M for each of four training domains and three seeds, and perplexity of the
repaired model is taken on held-out text. Rows go to ``benchmarks/results/certainty.json`` as they come, and the table
to ``benchmarks/results/certainty.md``; `benchmarks.choice` gives the spread across criteria.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from itertools import combinations
from typing import Any

from benchmarks.choice import FILE as CHOICE
from benchmarks.choice_exhaustive import SEQUENCES_A_DOMAIN
from benchmarks.real_text import BATCH, RESULTS, SEQUENCE, arguments, scored_text
from streamline_hooks import WindowSearch, profile, verified
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
                print(content["rows"][-1], flush=True)
    (RESULTS / "certainty.md").write_text(table(content, options.remove))
    print(table(content, options.remove))


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
    search = WindowSearch(CRITERION, shortlist=SHORTLIST)
    shortlist = search.find(search.problem(windows(len(stack), size), len(stack), profile=measured))
    fit, held_out = held_out_apart(split.calibration)
    judged = verified(model, shortlist, *(batches_of(part, BATCH) for part in (fit, held_out, split.validation)))
    best = judged[0]
    attempt = Attempt(best, tuple(repair.stand_in for repair in best.repairs))
    _, (repaired,) = perplexity_of_attempts(stack, test, [attempt])
    first = shortlist[0].windows[0]
    return {
        "start": best.windows[0].start,
        "first": first.start,
        "kl": best.distance,
        "repaired": repaired.value,
    }


def overlap(a: frozenset[int], b: frozenset[int]) -> float:
    """The share of the blocks of one choice that another one has too."""
    return 2 * len(a & b) / (len(a) + len(b))


def blocks_in(said: str) -> frozenset[int]:
    """The blocks of a choice as it is printed: whole ones in runs, and those that lose a half, which count as gone."""
    runs = re.findall(r"(\d+)(?:-(\d+))?", said)
    return frozenset(k for first, last in runs for k in range(int(first), int(last or first) + 1))


def spread(values: list[float]) -> str:
    """Median, least and greatest."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def agreement(chosen: list[frozenset[int]]) -> str:
    """Mean overlap of every two choices."""
    pairs = [overlap(a, b) for a, b in combinations(chosen, 2)]
    return f"{statistics.fmean(pairs):.0%}" if pairs else ""


def table(content: dict[str, Any], size: int) -> str:
    """How the choices differ across text and seeds, and across criteria."""
    rows = content["rows"]
    lines = [
        f"SmolLM2-135M, {size} of 30 blocks, repaired by linear maps in closed form. Across text and seeds each run "
        f"has {CALIBRATION:,} tokens of one training domain to rank and fit on, {VALIDATION:,} to judge by KL, and "
        f"{SHORTLIST} windows on the shortlist. Across criteria and searches the text is a mixture of all domains, "
        "20,480 tokens of it (see choice.md). Perplexity of the repaired model is on the same held-out text of five "
        "domains throughout.",
        "",
        "| what varies | what is chosen | mean overlap of two choices | repaired perplexity: median (range) |",
        "|---|---|---:|---:|",
    ]

    def line(label: str, chosen: list[tuple[str, float]]) -> None:
        if not chosen:
            return
        counted = Counter(said for said, _ in chosen).most_common()
        said = "; ".join(f"{blocks}" + (f" ({count} times)" if count > 1 else "") for blocks, count in counted)
        overlaps = agreement([blocks_in(blocks) for blocks, _ in chosen])
        lines.append(f"| {label} | {said} | {overlaps} | {spread([value for _, value in chosen])} |")

    runs = [(row, (f"{row['start']}-{row['start'] + size - 1}", row["repaired"])) for row in rows]
    for domain in DOMAINS:
        line(f"seed, on {domain}", [run for row, run in runs if row["domain"] == domain])
    for seed in SEEDS:
        line(f"domain, seed {seed}", [run for row, run in runs if row["seed"] == seed])
    line("domain and seed", [run for _, run in runs])
    if CHOICE.exists():
        choice = json.loads(CHOICE.read_text())["rows"]
        cells = {name: of[str(size)] for name, of in choice.items() if str(size) in of}
        told = {name: (cell["blocks"], cell["repaired"]) for name, cell in cells.items()}
        ours = {"verified shortlist", "verified, several windows too"}
        searches = (ours | {"disjoint", "one-shot", "greedy", "evolution"}) & told.keys()
        criteria = {name for name in told if not name.startswith("exhaustive")} - searches
        line(f"criterion ({len(criteria)} of them)", [told[name] for name in sorted(criteria)])
        line(f"search ({len(searches)} of them)", [told[name] for name in sorted(searches)])
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

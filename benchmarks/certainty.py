"""Measure how the choice of blocks varies with the text, the seed, the criterion and the search.

    python -m benchmarks.certainty [--data FOLDER] [--model MODEL] [--remove 8] [--seeds 0,1,2]

The verified shortlist is run on SmolLM2-135M or another model for each of four training domains and three seeds, and
the perplexity of the repaired model is measured on held-out text. Each row is saved to
``benchmarks/results/certainty.json`` (of another model: ``certainty_NAME``) when it is finished, and the table to the
same name with ``.md``. The rows of criteria and searches of SmolLM2 come from the results of `benchmarks.choice`.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from benchmarks.choice import EARLIER
from benchmarks.choice import FILE as CHOICE
from benchmarks.choice_exhaustive import SEQUENCES_A_DOMAIN
from benchmarks.real_text import BATCH, RESULTS, SEQUENCE, arguments, scored_text
from streamline_hooks import profile, verify_shortlist
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import split_into_batches
from streamline_hooks.data import read_documents, split_documents
from streamline_hooks.modeling import find_stack
from streamline_hooks.pipeline import split_held_out
from streamline_hooks.selection import DEFAULT_CRITERION as CRITERION
from streamline_hooks.selection import Trial, WindowSearch, trial_perplexities, windows_of_size

FILE = RESULTS / "certainty.json"
DOMAINS = ("blog_18f", "fiction_austen_doyle", "news_digitalgov", "peps")
CALIBRATION, VALIDATION, SHORTLIST = 4_096, 512, 4


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2", help="another model: a folder or a GGUF file")
    parser.add_argument("--remove", type=int, default=8)
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    is_default = options.model == "smollm2"
    name = Path(options.model).name.removesuffix(".gguf")
    file = FILE if is_default else FILE.with_name(f"{FILE.stem}_{name}.json")
    model, tokenizer = load_pretrained(options.model, torch.float32)
    test = scored_text(options.data, tokenizer, SEQUENCES_A_DOMAIN)
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    chosen_model = "" if is_default else " --model MODEL"
    content["command"] = f"python -m benchmarks.certainty{chosen_model} --remove {options.remove}"
    content |= {"model": "SmolLM2-135M" if is_default else name, "length": len(find_stack(model))}
    done = {(row["domain"], row["seed"]) for row in content["rows"]}
    for seed in map(int, options.seeds.split(",")):
        for domain in DOMAINS:
            if (domain, seed) not in done:
                text = read_documents(options.data / "text" / "train" / f"{domain}.txt")
                content["rows"].append(
                    {"domain": domain, "seed": seed, **run(model, tokenizer, text, seed, options.remove, test)}
                )
                file.write_text(json.dumps(content, indent=1) + "\n")
                print(content["rows"][-1], flush=True)
    file.with_suffix(".md").write_text(table(content, options.remove, with_choices=is_default))
    print(file.with_suffix(".md").read_text())


def run(model: Any, tokenizer: Any, text: list[str], seed: int, size: int, test: Any) -> dict[str, Any]:
    """Choose a window on one text; return its KL and the perplexities of the original, of removal and of the repair."""
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
    measured = profile(model, split_into_batches(split.calibration, BATCH))
    search = WindowSearch(CRITERION, shortlist=SHORTLIST)
    shortlist = search.find(search.problem(windows_of_size(len(stack), size), len(stack), profile=measured))
    fit, held_out = split_held_out(split.calibration)
    judged = verify_shortlist(
        model, shortlist, *(split_into_batches(part, BATCH) for part in (fit, held_out, split.validation))
    )
    best = judged[0]
    attempt = Trial(best, tuple(repair.replacement_module for repair in best.repairs))
    original, (removed, repaired) = trial_perplexities(stack, test, [Trial(best), attempt])
    first = shortlist[0].windows[0]
    return {
        "start": best.windows[0].start,
        "first": first.start,
        "kl": best.distance,
        "original": original.value,
        "removed": removed.value,
        "repaired": repaired.value,
    }


def overlap(a: frozenset[int], b: frozenset[int]) -> float:
    """Return the overlap (Dice coefficient) of two sets of blocks."""
    return 2 * len(a & b) / (len(a) + len(b))


def blocks_in(blocks_text: str) -> frozenset[int]:
    """Parse the printed blocks of a choice; a block of which only a branch is removed counts as removed."""
    runs = re.findall(r"(\d+)(?:-(\d+))?", blocks_text)
    return frozenset(k for first, last in runs for k in range(int(first), int(last or first) + 1))


def spread(values: list[float]) -> str:
    """Return the median and the range as text."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def agreement(chosen: list[frozenset[int]]) -> str:
    """Return the mean overlap of all pairs of choices as text."""
    pairs = [overlap(a, b) for a, b in combinations(chosen, 2)]
    return f"{statistics.fmean(pairs):.0%}" if pairs else ""


def table(content: dict[str, Any], size: int, with_choices: bool = True) -> str:
    """Return the variation of the choices over text, seeds, criteria and searches as Markdown.

    The rows of criteria and searches, which exist for SmolLM2 only, need `with_choices`.
    """
    rows = content["rows"]
    seeds = sorted({row["seed"] for row in rows})
    about_choices = (
        " Rows of criteria and searches: 20,480 tokens of all domains, from choice.md." if with_choices else ""
    )
    references = ""
    if known := [row for row in rows if "original" in row]:
        removed = spread([row["removed"] for row in known])
        references = f" That of the original is {known[0]['original']:.1f}, of the same removals unrepaired {removed}."
    lines = [
        f"{content['model']}, {size} of {content['length']} blocks removed and repaired by linear maps in closed form; "
        f"seeds {', '.join(map(str, seeds))}. Rows of seeds and domains: verified shortlist of {SHORTLIST} windows, "
        f"{CALIBRATION:,} tokens of one training domain to rank and fit, {VALIDATION:,} tokens to compare by KL."
        f"{about_choices} Perplexity is measured on the same held-out text of five domains.{references}",
        "",
        "| varied | chosen blocks | mean overlap of two choices | perplexity, repaired: median (range) |",
        "|---|---|---:|---:|",
    ]

    def line(label: str, chosen: list[tuple[str, float]]) -> None:
        if not chosen:
            return
        counted = Counter(text for text, _ in chosen).most_common()
        text = "; ".join(f"{blocks}" + (f" ({count} times)" if count > 1 else "") for blocks, count in counted)
        overlaps = agreement([blocks_in(blocks) for blocks, _ in chosen])
        lines.append(f"| {label} | {text} | {overlaps} | {spread([value for _, value in chosen])} |")

    runs = [(row, (f"{row['start']}-{row['start'] + size - 1}", row["repaired"])) for row in rows]
    for domain in DOMAINS:
        line(f"seed, on {domain}", [run for row, run in runs if row["domain"] == domain])
    for seed in seeds:
        line(f"domain, seed {seed}", [run for row, run in runs if row["seed"] == seed])
    line("domain and seed", [run for _, run in runs])
    note: list[str] = []
    if with_choices and CHOICE.exists():
        choice = json.loads(CHOICE.read_text())["rows"]
        cells = {name: row_cells[str(size)] for name, row_cells in choice.items() if str(size) in row_cells}
        choices = {name: (cell["blocks"], cell["repaired"]) for name, cell in cells.items()}
        verified = {"verified shortlist", "verified, several windows too"}
        searches = (verified | {"disjoint", "one-shot", "greedy", "evolution"}) & choices.keys()
        criteria = {name for name in choices if not name.startswith("exhaustive")} - searches
        line(f"{len(criteria)} criteria", [choices[name] for name in sorted(criteria)])
        line(f"{len(searches)} searches", [choices[name] for name in sorted(searches)])
        note = ["", f"The last two rows include {EARLIER}, which are not in the package."]
    return "\n".join([*lines, *note, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

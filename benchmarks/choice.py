"""What each criterion and each search chooses, and what becomes of it.

    python -m benchmarks.choice [--data FOLDER] [--sizes 4,6,8,10,12]

Reads ``benchmarks/results/choice_exhaustive.json`` (made by `benchmarks.choice_exhaustive`), in which every single
window has been removed, repaired and scored: for a criterion that chooses one of them nothing has to be run again but
the criterion. What makes several windows is fitted and scored here. Rows go to ``benchmarks/results/choice.json`` as
they come, and a row that is there is not run again; the table to ``benchmarks/results/choice.md``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from benchmarks.choice_exhaustive import FILE as EXHAUSTIVE
from benchmarks.choice_exhaustive import SEQUENCES_A_DOMAIN
from benchmarks.real_text import BATCH, RESULTS, SEQUENCE, arguments, scored_text, split_of
from streamline_hooks import (
    SEARCHES,
    MixedSearch,
    Selection,
    profile,
    score_windows,
    verified,
)
from streamline_hooks.batch import batches_of
from streamline_hooks.preparation import held_out_apart
from streamline_hooks.pretrained import load_pretrained
from streamline_hooks.selection import Attempt, VerifiedSelection, perplexity_of_attempts, windows
from streamline_hooks.selection.criteria import SHORTLIST as SHORTLIST_CRITERION
from streamline_hooks.stack import find_stack

FILE = RESULTS / "choice.json"
OF_A_PROFILE = (
    "cosine", "angular", "last_angular", "block_influence", "relative_magnitude", "entropy", "last_n",
    "last_n_but_final", "random", "cosine_and_magnitude",
)  # fmt: skip
OF_THE_MODEL = {"kl": 1, "perplexity": 1, "taylor": 2}  # with the sequences that they are measured on
SHORTLIST, FEW = 8, 4  # windows that are verified; sequences that a search runs the model on


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", default="4,6,8,10,12")
    parser.add_argument("--searches", default="disjoint,one-shot,greedy")
    options = parser.parse_args()
    known = json.loads(EXHAUSTIVE.read_text())
    sizes = [size for size in map(int, options.sizes.split(",")) if str(size) in known["sizes"]]
    bench = Bench(options.data, known, sizes)
    for criterion in (*OF_A_PROFILE, *OF_THE_MODEL):
        bench.row(criterion, lambda size, criterion=criterion: bench.by_criterion(criterion, size))
    bench.row("repaired_residual", lambda size: bench.by_known(size, lambda row: -row["repaired_error"]))
    bench.row("verified shortlist", bench.verified_shortlist)
    bench.row("exhaustive by KL", lambda size: bench.by_known(size, lambda row: -row["kl"]))
    bench.row("exhaustive, best removed", lambda size: bench.by_known(size, lambda row: -row["removed"]))
    bench.row("exhaustive, best repaired", lambda size: bench.by_known(size, lambda row: -row["repaired"]))
    if options.searches:
        bench.row("verified, several windows too", bench.mixed)
    for search in filter(None, options.searches.split(",")):
        bench.row(search, lambda size, search=search: bench.by_search(search, size))
    print((RESULTS / "choice.md").read_text())


class Bench:
    """The model, the text, and the rows so far."""

    def __init__(self, data: Any, known: dict[str, Any], sizes: list[int]) -> None:
        self.known, self.sizes = known, sizes
        self.model, self.tokenizer = load_pretrained("smollm2")
        self.stack = find_stack(self.model)
        self.split = split_of(data, self.tokenizer, seed=0, calibration_tokens=20_480, validation_tokens=2_048)
        if self.split.fingerprint != known["fingerprint"]:
            raise SystemExit("choice_exhaustive.json was made from other text; run benchmarks.choice_exhaustive again.")
        self.test = scored_text(data, self.tokenizer, SEQUENCES_A_DOMAIN)
        self.calibration = batches_of(self.split.calibration, BATCH)
        self.profile = profile(self.model, self.calibration)
        self.rows: dict[str, Any] = json.loads(FILE.read_text())["rows"] if FILE.exists() else {}
        self.scores: dict[str, dict[range, float]] = {}

    def row(self, name: str, choose: Callable[[int], dict[str, Any]]) -> None:
        """Fill a row, size by size."""
        cells = self.rows.setdefault(name, {})
        for size in self.sizes:
            if str(size) not in cells:
                started = time.time()
                cells[str(size)] = {**choose(size), "seconds": round(time.time() - started, 1)}
                content = {
                    "command": "python -m benchmarks.choice",
                    "original": self.known["original"],
                    "rows": self.rows,
                }
                FILE.write_text(json.dumps(content, indent=1) + "\n")
                (RESULTS / "choice.md").write_text(table(content))
                print(f"{name}, {size} blocks: {cells[str(size)]}", flush=True)

    def by_known(self, size: int, score: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
        """The window that a number in the exhaustive rows puts first."""
        best = max(self.known["sizes"][str(size)], key=score)
        return {"blocks": blocks_of(range(best["start"], best["start"] + size)), **numbers(best)}

    def by_criterion(self, criterion: str, size: int) -> dict[str, Any]:
        """The window that a criterion puts first. One that runs the model scores the windows of all sizes at once."""
        every = windows(len(self.stack), size)
        if criterion in OF_A_PROFILE:
            scores = dict(zip(every, score_windows(criterion, every, profile=self.profile), strict=True))
        else:
            if criterion not in self.scores:
                all_sizes = [w for s in self.sizes for w in windows(len(self.stack), s)]
                few = batches_of(self.split.calibration[: OF_THE_MODEL[criterion]], 1)
                found = score_windows(criterion, all_sizes, model=self.model, batches=few)
                self.scores[criterion] = dict(zip(all_sizes, found, strict=True))
            scores = self.scores[criterion]
        first = max(every, key=lambda w: (scores[w], -w.start))
        return self.by_known(size, lambda row: float(row["start"] == first.start))

    def verified_shortlist(self, size: int) -> dict[str, Any]:
        """Of the windows that the shortlist's criterion puts first, the one with the least KL once repaired."""
        best = self.shortlisted(size)
        return {"blocks": blocks_of(range(best["start"], best["start"] + size)), **numbers(best)}

    def shortlisted(self, size: int) -> dict[str, Any]:
        """The exhaustive row of that window."""
        every = windows(len(self.stack), size)
        scores = score_windows(SHORTLIST_CRITERION, every, profile=self.profile)
        short = sorted(every, key=lambda w: (-scores[every.index(w)], w.start))[:SHORTLIST]
        starts = {w.start for w in short}
        return min((row for row in self.known["sizes"][str(size)] if row["start"] in starts), key=lambda row: row["kl"])

    def mixed(self, size: int) -> dict[str, Any]:
        """The best window of the shortlist, and what takes as many blocks from several places, by KL once repaired."""
        chosen = self.shortlisted(size)
        search = MixedSearch(SHORTLIST_CRITERION, shortlist=1, windows=3)
        problem = search.problem(windows(len(self.stack), size), len(self.stack), profile=self.profile)
        several = [found for found in search.find(problem) if len(found.windows) > 1]
        start = range(chosen["start"], chosen["start"] + size)
        best = self.judged([Selection((start,)), *several])
        if best.windows == (start,):
            return {"blocks": blocks_of(start), **numbers(chosen)}
        return self.scored(best)

    def by_search(self, search: str, size: int) -> dict[str, Any]:
        """What a search makes of several windows, repaired in order, and scored."""
        few = batches_of(self.split.calibration[:FEW], BATCH)
        criterion = "block_influence" if search == "one-shot" else "cosine"
        config = SEARCHES[search](criterion, shortlist=1)
        problem = config.problem(
            windows(len(self.stack), size), len(self.stack), profile=self.profile, model=self.model, batches=few
        )
        return self.outcome(config.find(problem)[0])

    def outcome(self, found: Selection) -> dict[str, Any]:
        """Perplexity of a selection, removed and repaired."""
        return self.scored(self.judged([found]))

    def judged(self, selections: list[Selection]) -> VerifiedSelection:
        """The selection with the least KL once it is repaired, in order; fitted on as much text as a window."""
        fit, held_out = held_out_apart(self.split.calibration)
        parts = (batches_of(part, BATCH) for part in (fit, held_out, self.split.validation))
        return verified(self.model, selections, *parts)[0]

    def scored(self, judged: VerifiedSelection) -> dict[str, Any]:
        """Perplexity of a repaired selection, without and with its repairs."""
        attempts = [Attempt(judged), Attempt(judged, tuple(r.stand_in for r in judged.repairs), judged.maps)]
        _, (removed, repaired) = perplexity_of_attempts(self.stack, self.test, attempts)
        return {"blocks": str(judged), "removed": removed.value, "repaired": repaired.value}


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The two perplexities of an exhaustive row."""
    return {"removed": row["removed"], "repaired": row["repaired"]}


def blocks_of(window: range) -> str:
    """A window as it is printed."""
    return f"{window.start}-{window.stop - 1}"


def table(content: dict[str, Any]) -> str:
    """The rows as Markdown: for each size the blocks, and the two perplexities."""
    sizes = sorted({int(size) for cells in content["rows"].values() for size in cells})
    tokens = SEQUENCES_A_DOMAIN * 5 * SEQUENCE
    lines = [
        "SmolLM2-135M: what each criterion and each search gives up, and the perplexity on held-out text "
        f"({tokens:,} tokens of five domains) after plain removal / after closed-form repair. The original has "
        f"{content['original']:.2f}. All are fitted on 20,480 tokens of training text and judged by KL on 2,048 "
        f"others; searches that run the model run it on {FEW * SEQUENCE:,}. The exhaustive rows look at every window; "
        "'best removed' and 'best repaired' look at the held-out text itself, and so are bounds and not choices.",
        "",
        "| chosen by | " + " | ".join(f"{size} blocks" for size in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for name, cells in content["rows"].items():
        lines.append(f"| {name} | " + " | ".join(cell(cells.get(str(size))) for size in sizes) + " |")
    best = content["rows"].get("exhaustive, best repaired", {})
    ours = content["rows"].get("verified shortlist", {})
    both = [size for size in map(str, sizes) if size in best and size in ours]
    if both:
        ratios = ", ".join(f"{s}: {ours[s]['repaired'] / best[s]['repaired']:.3f}" for s in both)
        lines += ["", f"Verified shortlist against the best of all windows, repaired (blocks: ratio): {ratios}."]
    mixed = content["rows"].get("verified, several windows too", {})
    both = [size for size in map(str, sizes) if size in mixed]
    if both:
        least = {s: min(cells[s]["repaired"] for cells in content["rows"].values() if s in cells) for s in both}
        ratios = ", ".join(f"{s}: {mixed[s]['repaired'] / least[s]:.3f}" for s in both)
        lines += ["", f"With several windows on the shortlist too, against the best of every row: {ratios}."]
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


def cell(row: dict[str, Any] | None) -> str:
    """A choice and its two perplexities."""
    return "" if row is None else f"{row['blocks']}: {short(row['removed'])} / {short(row['repaired'])}"


def short(value: float) -> str:
    """A perplexity, in as many digits as it is worth."""
    return f"{value:.1f}" if value < 1000 else f"{value:.1e}"


if __name__ == "__main__":
    main()

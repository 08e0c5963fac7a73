"""Compare the blocks removed by each criterion and search, and the resulting perplexity.

    python -m benchmarks.choice [--data FOLDER] [--sizes 4,6,8,10,12]

This reads ``benchmarks/results/choice_exhaustive.json`` (written by `benchmarks.choice_exhaustive`), which has the
scores of every window, removed and repaired. For criteria that choose one window only the criterion is computed.
Selections of several windows are fitted and scored here. Each row is saved to ``benchmarks/results/choice.json`` when
it is finished; existing rows are not computed again. The table is ``benchmarks/results/choice.md``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import benchmarks.baselines  # noqa: F401 - registers the criteria of other methods
from benchmarks.choice_exhaustive import FILE as EXHAUSTIVE
from benchmarks.choice_exhaustive import SEQUENCES_A_DOMAIN
from benchmarks.real_text import BATCH, RESULTS, SEQUENCE, arguments, scored_text, split_of
from streamline_hooks import profile, verify_shortlist
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import split_into_batches
from streamline_hooks.modeling import find_stack
from streamline_hooks.pipeline import split_held_out
from streamline_hooks.selection import DEFAULT_CRITERION as SHORTLIST_CRITERION
from streamline_hooks.selection import (
    SEARCHES,
    MixedSearch,
    Selection,
    Trial,
    VerifiedSelection,
    score_windows,
    trial_perplexities,
    windows_of_size,
)

FILE = RESULTS / "choice.json"
OF_A_PROFILE = (
    "cosine", "angular", "last_angular", "block_influence", "relative_magnitude", "entropy", "last_n",
    "last_n_but_final", "random", "cosine_and_magnitude",
)  # fmt: skip
OF_THE_MODEL = {"kl": 1, "perplexity": 1, "taylor": 2}  # value: sequences that the criterion is measured on
LABELS = {
    "entropy": "entropy ¹",
    "cca": "cca ¹",
    "evolution": "evolution ¹",
    "verified, several windows too": "verified shortlist, several windows",
}
EARLIER = "the criteria entropy and cca and the search evolution"
SHORTLIST, FEW = 8, 4  # verified windows; sequences on which searches run the model


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
    """The model, the text and the finished rows."""

    def __init__(self, data: Any, known: dict[str, Any], sizes: list[int]) -> None:
        self.known, self.sizes = known, sizes
        self.model, self.tokenizer = load_pretrained("smollm2")
        self.stack = find_stack(self.model)
        self.split = split_of(data, self.tokenizer, seed=0, calibration_tokens=20_480, validation_tokens=2_048)
        if self.split.fingerprint != known["fingerprint"]:
            raise SystemExit(
                "choice_exhaustive.json was made from different text. Run benchmarks.choice_exhaustive again."
            )
        self.test = scored_text(data, self.tokenizer, SEQUENCES_A_DOMAIN)
        self.calibration = split_into_batches(self.split.calibration, BATCH)
        self.profile = profile(self.model, self.calibration)
        self.rows: dict[str, Any] = json.loads(FILE.read_text())["rows"] if FILE.exists() else {}
        self.scores: dict[str, dict[range, float]] = {}

    def row(self, name: str, choose: Callable[[int], dict[str, Any]]) -> None:
        """Compute the missing cells of a row, one per size."""
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
        """Return the window with the highest score of its exhaustive row."""
        best = max(self.known["sizes"][str(size)], key=score)
        return {"blocks": blocks_of(range(best["start"], best["start"] + size)), **numbers(best)}

    def by_criterion(self, criterion: str, size: int) -> dict[str, Any]:
        """Return the window that a criterion ranks first; criteria that run the model score all sizes at once."""
        windows = windows_of_size(len(self.stack), size)
        if criterion in OF_A_PROFILE:
            scores = dict(zip(windows, score_windows(criterion, windows, profile=self.profile), strict=True))
        else:
            if criterion not in self.scores:
                all_sizes = [w for s in self.sizes for w in windows_of_size(len(self.stack), s)]
                batches = split_into_batches(self.split.calibration[: OF_THE_MODEL[criterion]], 1)
                values = score_windows(criterion, all_sizes, model=self.model, batches=batches)
                self.scores[criterion] = dict(zip(all_sizes, values, strict=True))
            scores = self.scores[criterion]
        first = max(windows, key=lambda w: (scores[w], -w.start))
        return self.by_known(size, lambda row: float(row["start"] == first.start))

    def verified_shortlist(self, size: int) -> dict[str, Any]:
        """Return the shortlisted window with the lowest KL after repair."""
        best = self.shortlisted(size)
        return {"blocks": blocks_of(range(best["start"], best["start"] + size)), **numbers(best)}

    def shortlisted(self, size: int) -> dict[str, Any]:
        """Return the exhaustive row of the shortlisted window with the lowest KL after repair."""
        every = windows_of_size(len(self.stack), size)
        scores = score_windows(SHORTLIST_CRITERION, every, profile=self.profile)
        short = sorted(every, key=lambda w: (-scores[every.index(w)], w.start))[:SHORTLIST]
        starts = {w.start for w in short}
        return min((row for row in self.known["sizes"][str(size)] if row["start"] in starts), key=lambda row: row["kl"])

    def mixed(self, size: int) -> dict[str, Any]:
        """Return the best of the shortlisted window and selections of several windows, by KL after repair."""
        chosen = self.shortlisted(size)
        search = MixedSearch(SHORTLIST_CRITERION, shortlist=1, windows=3)
        problem = search.problem(windows_of_size(len(self.stack), size), len(self.stack), profile=self.profile)
        selections = [selection for selection in search.find(problem) if len(selection.windows) > 1]
        start = range(chosen["start"], chosen["start"] + size)
        best = self.judged([Selection((start,)), *selections])
        if best.windows == (start,):
            return {"blocks": blocks_of(start), **numbers(chosen)}
        return self.scored(best)

    def by_search(self, search: str, size: int) -> dict[str, Any]:
        """Score the selection of a search."""
        batches = split_into_batches(self.split.calibration[:FEW], BATCH)
        criterion = "block_influence" if search == "one-shot" else "cosine"
        config = SEARCHES[search](criterion, shortlist=1)
        problem = config.problem(
            windows_of_size(len(self.stack), size),
            len(self.stack),
            profile=self.profile,
            model=self.model,
            batches=batches,
        )
        return self.outcome(config.find(problem)[0])

    def outcome(self, selection: Selection) -> dict[str, Any]:
        """Return the perplexity of a selection, removed and repaired."""
        return self.scored(self.judged([selection]))

    def judged(self, selections: list[Selection]) -> VerifiedSelection:
        """Return the selection with the lowest KL after repair."""
        fit, held_out = split_held_out(self.split.calibration)
        parts = (split_into_batches(part, BATCH) for part in (fit, held_out, self.split.validation))
        return verify_shortlist(self.model, selections, *parts)[0]

    def scored(self, judged: VerifiedSelection) -> dict[str, Any]:
        """Return the perplexity of a repaired selection, without and with its repairs."""
        attempts = [Trial(judged), Trial(judged, tuple(r.replacement_module for r in judged.repairs), judged.maps)]
        _, (removed, repaired) = trial_perplexities(self.stack, self.test, attempts)
        return {"blocks": str(judged), "removed": removed.value, "repaired": repaired.value}


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return the two perplexities of an exhaustive row."""
    return {"removed": row["removed"], "repaired": row["repaired"]}


def blocks_of(window: range) -> str:
    """Return a window as text."""
    return f"{window.start}-{window.stop - 1}"


def table(content: dict[str, Any]) -> str:
    """Return the rows as Markdown: for each size the removed blocks and the two perplexities."""
    sizes = sorted({int(size) for cells in content["rows"].values() for size in cells})
    tokens = SEQUENCES_A_DOMAIN * 5 * SEQUENCE
    lines = [
        "SmolLM2-135M, seed 0: blocks removed by each criterion and search, and perplexity on held-out text "
        f"({tokens:,} tokens of five domains) after plain removal / after closed-form repair. Original: "
        f"{content['original']:.2f}. Repairs are fitted on 20,480 tokens of training text; KL is measured on 2,048 "
        f"other tokens. Searches that run the model use {FEW * SEQUENCE:,} tokens. The exhaustive rows compare all "
        "windows; 'best removed' and 'best repaired' use the held-out text itself and are therefore bounds.",
        "",
        "| criterion or search | " + " | ".join(f"{size} blocks" for size in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for name, cells in content["rows"].items():
        lines.append(f"| {label(name)} | " + " | ".join(cell(cells.get(str(size))) for size in sizes) + " |")
    best = content["rows"].get("exhaustive, best repaired", {})
    ours = content["rows"].get("verified shortlist", {})
    both = [size for size in map(str, sizes) if size in best and size in ours]
    if both:
        ratios = ", ".join(f"{s}: {ours[s]['repaired'] / best[s]['repaired']:.3f}" for s in both)
        lines += [
            "",
            "Ratio of the repaired perplexities of the verified shortlist and the best of all windows, by number of "
            f"blocks: {ratios}.",
        ]
    mixed = content["rows"].get("verified, several windows too", {})
    both = [size for size in map(str, sizes) if size in mixed]
    if both:
        least = {s: min(cells[s]["repaired"] for cells in content["rows"].values() if s in cells) for s in both}
        ratios = ", ".join(f"{s}: {mixed[s]['repaired'] / least[s]:.3f}" for s in both)
        lines += ["", f"Ratio of the verified shortlist with several windows to the best of all rows: {ratios}."]
    if any(name in content["rows"] for name in ("entropy", "cca", "evolution")):
        lines += [
            "",
            f"¹ {EARLIER[:1].upper()}{EARLIER[1:]} are not in the package (entropy is in benchmarks/baselines).",
        ]
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


def label(name: str) -> str:
    """Return the label of a row."""
    return LABELS.get(name, name)


def cell(row: dict[str, Any] | None) -> str:
    """Return the removed blocks and the two perplexities as text."""
    return "" if row is None else f"{row['blocks']}: {short(row['removed'])} / {short(row['repaired'])}"


def short(value: float) -> str:
    """Format a perplexity."""
    return f"{value:.1f}" if value < 1000 else f"{value:.1e}"


if __name__ == "__main__":
    main()

"""The rows of `benchmarks.quality_generation` as the README shows them."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.generation_recipes import EARLIER, SIZES, TRAINED
from benchmarks.generation_table import curve, differences, numbers, points, same_tokens, seed_of, seeds

WHAT = {
    "removed, chosen on prose": "just removed, chosen on prose",
    "removed": "just removed, those of `best`",
    "removed, two windows": "just removed, those of `two-windows`",
    "warm start alone": "the least-squares start alone, on all of the text",
    "without the warm start": "`best` without that start",
    "without healing": "`best` without healing",
    "chosen on prose": "`best`, chosen on prose",
    "KL alone": "`best`, by KL alone",
    "LM alone": "`best`, by the text alone (LM)",
    "on policy": "`best`, a quarter of the steps on its own continuations",
    "own text and documents": "`best`, half of the text the original's own",
    "in two rounds": "`best` in two rounds (`iterative`)",
    "two windows": "`two-windows`",
    "best": "`best`",
}
HEAD = ("seeds", "classification", "accuracy", "written", "one try", "last words", "perplexity x original")


def short_table(content: dict[str, Any]) -> str:
    """For the README: what there is of each recipe on the usual tokens, and the curve, the most cautious first."""
    lines = [f"| | {' | '.join(HEAD)} |", "|---|" + "---:|" * len(HEAD)]
    usual = content["tokens"]
    for removed in reversed(SIZES):
        here = [row for row in content["rows"].values() if row["removed"] == removed]
        named = same_tokens(here, usual)
        lines += [
            _short(content, f"{removed} of 30, {what}", named[name]) for name, what in WHAT.items() if name in named
        ]
        by_tokens = curve(content, removed)
        if by_tokens.get(usual) == named.get("best"):
            by_tokens.pop(usual, None)  # it is there already
        for tokens, its in by_tokens.items():
            lines.append(_short(content, f"{removed} of 30, `best`, {tokens:,} tokens", its))
    return "\n".join(lines)


def _short(content: dict[str, Any], what: str, rows: list[dict[str, Any]]) -> str:
    its = numbers(content, rows)
    written = its["generation"]
    kept = [its["classification"], its["accuracy"], written["greedy"]["above_chance"]]
    kept.append(written["pass_at"]["1"]["above_chance"])
    shares = ["-" if one is None else f"{one['value']:.0%}" for one in kept]
    right = [row["generation"]["last_words"]["right"] for row in rows]
    ends = statistics.fmean(bits.count("1") / len(bits) for bits in right)
    ratio = f"{its['ratio']:.0f}" if its["ratio"] > 10 else f"{its['ratio']:.2f}"
    return f"| {what} | {' | '.join([seeds(rows), *shares, f'{ends:.1%}', ratio])} |"


def short_differences(content: dict[str, Any]) -> str:
    """For the README: what `best` retains more than with one part changed, in points, and of which seeds."""
    kinds = ("accuracy", "generation", "pass@1")
    lines = ["| `best` beside | seeds | accuracy | written | one try |", "|---|---:|---:|---:|---:|"]
    for removed in reversed(SIZES):
        here = [row for row in content["rows"].values() if row["removed"] == removed]
        named = same_tokens(here, content["tokens"])
        for name, what in WHAT.items():
            if name == "best" or not {name, "best"} <= named.keys() or name not in [*TRAINED, *EARLIER]:
                continue
            more = differences(content, named["best"], named[name])
            if more:
                both = [row for row in named["best"] if seed_of(row) in set(map(seed_of, named[name]))]
                said = " | ".join(points(more.get(kind)) for kind in kinds)
                lines.append(f"| {removed} of 30, {what} | {seeds(both)} | {said} |")
    return "\n".join(lines)

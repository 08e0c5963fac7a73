"""The rows of `benchmarks.quality_generation` as Markdown."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from benchmarks.generation_numbers import mean_of, summary
from benchmarks.generation_recipes import RECIPES, SIZES, Run, same_minutes, trained_in
from streamline_hooks.evaluation.retained import TaskAnswers, retained


def numbers(content: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one recipe, with as many seeds as there are: what is retained above chance, with its interval."""
    originals = [content["originals"][row["products"]] for row in rows]
    own = [original["classification"] for original in originals]
    answers = []
    for task in own[0]["counted"]:
        scores = [[list(map(float, one["right"][task])) for one in several] for several in (own, rows)]
        answers.append(TaskAnswers(task, *map(mean_of, scores), own[0]["chance"][task]))
    kept = retained(answers, clearly=0.0)["classification"]
    return {
        "seeds": len(rows),
        "classification": None if kept.above_chance is None else asdict(kept.above_chance),
        "ratio": statistics.fmean(row["text"]["mean_perplexity_ratio"] for row in rows),
        "kl": statistics.fmean(row["text"]["kl"] for row in rows),
        "minutes": statistics.fmean(row["minutes"]["fit"] + trained_in(row) for row in rows),
        "generation": summary([one["generation"] for one in originals], [row["generation"] for row in rows]),
    }


HEAD = (
    "recipe", "seeds", "classification", "generation", "pass@1", "pass@5", "pass@20", "last words",
    "alike, documents", "alike, questions", "repeated", "perplexity", "minutes",
)  # fmt: skip


def table(content: dict[str, Any]) -> str:
    """The rows as Markdown: for each number of blocks the recipes, then the curve, then texts side by side."""
    rows, tokens = content["rows"], content["tokens"]
    lines = [
        "SmolLM2-135M-Instruct, 4 and 8 of its 30 blocks gone. Classification (as in quality.md) and generation "
        "(problems and last words, greedily) are the share of the accuracy above chance that is retained, with the "
        "95 % interval of drawing the questions; pass@k the share retained of the chance that one of k sampled answers "
        "is right; last words the accuracy; alike how many tokens a greedy continuation of 64 goes along with the "
        "original's; repeated the share of its runs of four tokens that were there before; perplexity the mean ratio "
        "over five held-out domains; minutes of one processor core, for text that the "
        "original wrote, the start and the training, fewer where products are in bfloat16.",
        *_original(content),
    ]
    for removed in SIZES:
        here = [row for row in rows.values() if row["removed"] == removed]
        for title, chosen in (
            (f"{removed} of 30 blocks, {tokens:,} training tokens for each", _same_tokens(here, tokens)),
            (f"{removed} of 30 blocks, the minutes of `best` for each", _same_time(content, removed)),
        ):
            if chosen:
                lines += ["", f"## {title}", "", *_rows(content, chosen)]
    counts = sorted({row["tokens"] for row in rows.values()})
    curve = {f"best, {n:,} tokens": [row for row in rows.values() if _of(row, Run("best", 8, n))] for n in counts}
    if any(its for name, its in curve.items() if name != f"best, {tokens:,} tokens"):
        lines += [
            "",
            "## 8 of 30 blocks, by training tokens",
            "",
            *_rows(content, {n: r for n, r in curve.items() if r}),
        ]
    lines += _texts(content)
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


def _same_tokens(rows: list[dict[str, Any]], tokens: int) -> dict[str, list[dict[str, Any]]]:
    found = {name: [row for row in rows if _of(row, Run(name, row["removed"], tokens))] for name in RECIPES}
    return {name: its for name, its in found.items() if its}


def _same_time(content: dict[str, Any], removed: int) -> dict[str, list[dict[str, Any]]]:
    """Of each recipe the rows on as many tokens as `best` has time for, where there are such of others than `best`."""
    runs = same_minutes(removed, content["tokens"], content)
    found = {run.recipe: [row for row in content["rows"].values() if _of(row, run)] for run in runs}
    there = {name: its for name, its in found.items() if its}
    return there if any(row.get("same_minutes") for its in there.values() for row in its) else {}


def _of(row: dict[str, Any], run: Run) -> bool:
    """Whether a row is of a run, of whatever seed."""
    same = (row["recipe"], row["removed"], row["tokens"]) == (run.recipe, run.removed, run.tokens)
    return same and bool(row.get("same_minutes")) == run.same_minutes


def _rows(content: dict[str, Any], named: dict[str, list[dict[str, Any]]]) -> list[str]:
    found = {name: numbers(content, its) for name, its in named.items()}
    ordered = sorted(found, key=lambda name: -_value(found[name]["generation"]["greedy"]["above_chance"]))
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for name in ordered:
        its, written = found[name], found[name]["generation"]
        ends = statistics.fmean(
            row["generation"]["last_words"]["right"].count("1") / len(row["generation"]["last_words"]["right"])
            for row in named[name]
        )
        match = written["match"]
        repeated = statistics.fmean(kind["repetition"] for kind in match.values())
        cells = [
            name, str(its["seeds"]), _shown(its["classification"]), _shown(written["greedy"]["above_chance"]),
            *(_shown(written["pass_at"][k]["above_chance"]) for k in ("1", "5", "20")), f"{ends:.1%}",
            *(f"{kind['length']:.1f}" for kind in match.values()), f"{repeated:.1%}", f"{its['ratio']:.3f}",
            f"{its['minutes']:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _value(estimate: dict[str, Any] | None) -> float:
    return -1.0 if estimate is None else float(estimate["value"])


def _shown(estimate: dict[str, Any] | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.1%} [{estimate['low']:.0%}, {estimate['high']:.0%}]"


def _original(content: dict[str, Any]) -> list[str]:
    """What the original itself reaches, in the precision of most rows."""
    used = [row["products"] for row in content["rows"].values()]
    row = content["originals"][max(sorted(content["originals"]), key=used.count)]["generation"]
    solved = ", ".join(f"{sort} {bits.count('1') / len(bits):.0%}" for sort, bits in row["probes"].items())
    ends = row["last_words"]["right"]
    repeated = statistics.fmean(kind["original_repetition"] for kind in row["match"].values())
    return [
        "",
        f"The original solves of the problems: {solved}; it says {ends.count('1') / len(ends):.1%} of the last words, "
        f"and repeats {repeated:.1%} of its runs of four tokens.",
    ]


def _texts(content: dict[str, Any]) -> list[str]:
    """Continuations side by side: the original's, after plain removal, and after two repairs, of the most tokens."""
    found: dict[str, list[Any]] = {name: [] for name in ("removed", "best", "two windows")}
    for row in sorted(content["rows"].values(), key=lambda row: (row["tokens"], -row["seed"])):
        if row["recipe"] in found and row["removed"] == 8 and not row.get("same_minutes"):
            found[row["recipe"]].append(row)
    if not (found["removed"] and found["best"]):
        return []
    last = {name: its[-1] for name, its in found.items() if its}
    lines = ["", "## Ten beginnings, chosen by seed, 8 of 30 blocks gone", ""]
    own = content["originals"][last["best"]["products"]]["generation"]
    for k, first in enumerate(own["samples"]):
        lines += [f"**{_inline(first['prompt'])}**", "", f"- original: {_inline(first['text'])}"]
        lines += [f"- {name}: {_inline(row['generation']['samples'][k]['text'])}" for name, row in last.items()] + [""]
    return lines


def _inline(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")

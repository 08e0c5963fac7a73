"""The rows of `benchmarks.quality_generation` as Markdown."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from benchmarks.generation_numbers import greedy_answers, mean_of, pass_answers, retained_greedy, summary
from benchmarks.generation_recipes import EARLIER, RECIPES, SIZES, TRAINED, Run, same_minutes, trained_in
from streamline_hooks.evaluation import Estimate, TaskAnswers, compared, retained


def numbers(content: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one recipe, with as many seeds as there are: what is retained above chance, with its interval."""
    kept = retained(classified(content, rows))["classification"]
    spent = [row["minutes"]["fit"] + took for row in rows if (took := trained_in(row)) is not None]
    return {
        "seeds": len(rows),
        "classification": None if kept.above_chance is None else asdict(kept.above_chance),
        "accuracy": asdict(kept.ratio),
        "ratio": statistics.fmean(row["text"]["mean_perplexity_ratio"] for row in rows),
        "kl": statistics.fmean(row["text"]["kl"] for row in rows),
        "minutes": statistics.fmean(spent) if spent else None,
        "generation": summary(_originals(content, rows), [row["generation"] for row in rows]),
    }


def differences(
    content: dict[str, Any], first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> dict[str, Estimate]:
    """How much more of each kind one recipe's rows retain than another's, of the seeds that both have.

    Nothing where they have none in common, or were held against an original in another precision.
    """
    seeds = {(row["seed"], row["products"]) for row in first} & {(row["seed"], row["products"]) for row in second}
    sides = [sorted((r for r in of if (r["seed"], r["products"]) in seeds), key=seed_of) for of in (first, second)]
    if not seeds:
        return {}
    own = _originals(content, sides[0])
    kinds = {
        "classification": [classified(content, side) for side in sides],
        "generation": [greedy_answers(own, [row["generation"] for row in side]) for side in sides],
        "pass@1": [pass_answers(own, [row["generation"] for row in side], 1) for side in sides],
        "pass@20": [pass_answers(own, [row["generation"] for row in side], 20) for side in sides],
    }
    found = {name: next(iter(compared(*several).values())) for name, several in kinds.items()}
    more = {name: one.above_chance for name, one in found.items() if one.above_chance is not None}
    return {"accuracy": found["classification"].ratio, **more}


def classified(content: dict[str, Any], rows: list[dict[str, Any]]) -> list[TaskAnswers]:
    """The questions, as the original and what was made of it answer them, each by the share of the seeds."""
    own = [content["originals"][row["products"]]["classification"] for row in rows]
    return [
        TaskAnswers(
            task,
            *(mean_of([list(map(float, one["right"][task])) for one in several]) for several in (own, rows)),
            own[0]["chance"][task],
        )
        for task in own[0]["counted"]
    ]


def _originals(content: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [content["originals"][row["products"]]["generation"] for row in rows]


def seed_of(row: dict[str, Any]) -> int:
    return int(row["seed"])


HEAD = (
    "recipe", "seeds", "classification", "accuracy", "generation", "of each seed", "pass@1", "pass@5", "pass@20",
    "last words", "alike, documents", "alike, questions", "repeated", "perplexity", "minutes",
)  # fmt: skip


def table(content: dict[str, Any]) -> str:
    """The rows as Markdown: for each number of blocks the recipes, then the curve, then texts side by side."""
    rows, tokens = content["rows"], content["tokens"]
    lines = [
        "SmolLM2-135M-Instruct, 4 and 8 of its 30 blocks gone. Classification (as in quality.md) and generation "
        "(problems and last words, greedily) are the share of the accuracy above chance that is retained, with the "
        "95 % interval of drawing the questions (problems behind one set of solved ones together); chance is what "
        "always giving the commonest answer would reach, and of sampled answers guessing each as often as it is right; "
        "each row is the mean over the seeds that it names; accuracy is the ratio of the mean accuracies in "
        "classification, as papers report it; of each seed, generation seed by seed; pass@k the share retained of the "
        "chance that one of k sampled answers is right; last words the accuracy; alike how many tokens a greedy "
        "continuation of 64 goes along with the original's; repeated the share of its runs of four tokens that were "
        "there before; perplexity the mean ratio over five held-out domains; minutes of one processor core, for text "
        "that the original wrote, the start (but in rounds, where it is made in choosing) and the training: fewer "
        "where products are in bfloat16, and up to half as many again where the machine was busy. Tokens are those of "
        "the sequences that are trained on; blocks are chosen on others, but in rounds; on policy a quarter of the "
        "sequences give the beginnings alone. Which recipes there are was decided on another draw of the problems, "
        "questions and texts, with which these share some (a fourth to a third of the sums, brackets and numbers, no "
        "row to copy; all of COPA, which has a hundred).",
        *_original(content),
    ]
    for removed in SIZES:
        here = [row for row in rows.values() if row["removed"] == removed]
        for title, chosen in (
            (f"{removed} of 30 blocks, {tokens:,} training tokens for each", same_tokens(here, tokens)),
            (f"{removed} of 30 blocks, the minutes of `best` for each", _same_time(content, removed)),
        ):
            if chosen:
                lines += ["", f"## {title}", "", *_rows(content, chosen), *_beside_best(content, chosen)]
    by_tokens = curve(content, 8)
    if len(by_tokens) > 1:
        named = {f"best, {count:,} tokens": its for count, its in by_tokens.items()}
        lines += ["", "## 8 of 30 blocks, by training tokens", "", *_rows(content, named)]
    for removed in SIZES:
        lines += _texts(content, removed)
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


def same_tokens(rows: list[dict[str, Any]], tokens: int) -> dict[str, list[dict[str, Any]]]:
    found = {
        name: [row for row in rows if of_run(row, Run(name, row["removed"], tokens))] for name in [*RECIPES, *EARLIER]
    }
    return {name: its for name, its in found.items() if its}


def curve(content: dict[str, Any], removed: int) -> dict[int, list[dict[str, Any]]]:
    """The rows of `best` by training tokens, of the seeds that each number of them has: one seed may be better."""
    rows = list(content["rows"].values())
    counts = sorted({row["tokens"] for row in rows})
    found = {count: [row for row in rows if of_run(row, Run("best", removed, count))] for count in counts}
    found = {count: its for count, its in found.items() if its}
    common = set.intersection(*(set(map(seed_of, its)) for its in found.values())) if found else set()
    return {count: [row for row in its if seed_of(row) in common] for count, its in found.items()} if common else {}


def _same_time(content: dict[str, Any], removed: int) -> dict[str, list[dict[str, Any]]]:
    """Of each recipe the rows on as many tokens as `best` has time for, where there are such of others than `best`."""
    runs = same_minutes(removed, content["tokens"], content)
    found = {run.recipe: [row for row in content["rows"].values() if of_run(row, run)] for run in runs}
    there = {name: its for name, its in found.items() if its}
    more = any(row.get("same_minutes") for its in there.values() for row in its)
    return there if more else {}


def of_run(row: dict[str, Any], run: Run) -> bool:
    """Whether a row is of a run, of whatever seed."""
    same = (row["recipe"], row["removed"], row["tokens"]) == (run.recipe, run.removed, run.tokens)
    return same and bool(row.get("same_minutes")) == run.same_minutes


def _rows(content: dict[str, Any], named: dict[str, list[dict[str, Any]]]) -> list[str]:
    found = {name: numbers(content, its) for name, its in named.items()}
    ordered = sorted(found, key=lambda name: -_value(found[name]["generation"]["greedy"]["above_chance"]))
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    alike = len({row["products"] for its in named.values() for row in its}) == 1
    for name in ordered:
        its, written = found[name], found[name]["generation"]
        ends = statistics.fmean(
            row["generation"]["last_words"]["right"].count("1") / len(row["generation"]["last_words"]["right"])
            for row in named[name]
        )
        match = written["match"]
        repeated = statistics.fmean(kind["repetition"] for kind in match.values())
        cells = [
            name if alike else f"{name} ({', '.join(sorted({row['products'] for row in named[name]}))})",
            seeds(named[name]), _shown(its["classification"]), _shown(its["accuracy"]),
            _shown(written["greedy"]["above_chance"]), _of_each_seed(content, named[name]),
            *(_shown(written["pass_at"][k]["above_chance"]) for k in ("1", "5", "20")), f"{ends:.1%}",
            *(f"{kind['length']:.1f}" for kind in match.values()), f"{repeated:.1%}", f"{its['ratio']:.3f}",
            "-" if its["minutes"] is None else f"{its['minutes']:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _of_each_seed(content: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What is retained of generation, seed by seed."""
    each = [
        retained_greedy(_originals(content, [row]), [row["generation"]], draws=100).above_chance
        for row in sorted(rows, key=seed_of)
    ]
    return ", ".join("-" if one is None else f"{one.value:.0%}" for one in each)


MORE = ("classification", "accuracy", "generation", "pass@1", "pass@20")


def _beside_best(content: dict[str, Any], named: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What `best` retains more than each other recipe that is trained, and so what each part of it adds."""
    best = named.get("best", [])
    found = {
        name: (its, differences(content, best, its))
        for name, its in named.items()
        if name in [*TRAINED, *EARLIER] and name != "best"
    }
    found = {name: (its, more) for name, (its, more) in found.items() if more}
    if not found:
        return []
    lines = [
        "",
        "Points that `best` retains more than each of the others, on the seeds that both have, with the interval of "
        "drawing the questions, the same for both:",
        "",
        "| best beside | seeds | " + " | ".join(MORE) + " |",
        "|---" * (len(MORE) + 2) + "|",
    ]
    for name, (its, more) in found.items():
        both = [row for row in best if seed_of(row) in set(map(seed_of, its))]
        lines.append(f"| {name} | {seeds(both)} | " + " | ".join(points(more.get(kind)) for kind in MORE) + " |")
    return lines


def seeds(rows: list[dict[str, Any]]) -> str:
    """Which seeds a row of the table is of."""
    return ", ".join(map(str, sorted(map(seed_of, rows))))


def points(more: Estimate | None) -> str:
    return "-" if more is None else f"{100 * more.value:+.1f} [{100 * more.low:+.0f}, {100 * more.high:+.0f}]"


def _value(estimate: dict[str, Any] | None) -> float:
    return -1.0 if estimate is None else float(estimate["value"])


def _shown(estimate: dict[str, Any] | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.1%} [{estimate['low']:.0%}, {estimate['high']:.0%}]"


def _original(content: dict[str, Any]) -> list[str]:
    """What the original itself reaches, in the precision of most rows."""
    used = [row["products"] for row in content["rows"].values()]
    row = content["originals"][max(sorted(content["originals"]), key=used.count)]["generation"]
    by_guessing = row["guessed"]["probes"]
    solved = ", ".join(
        f"{sort} {bits.count('1') / len(bits):.0%} (guessing {by_guessing[sort]:.0%})"
        for sort, bits in row["probes"].items()
    )
    tries = ", ".join(
        f"{statistics.fmean(row['pass_at']['pass'][sort][k] for sort in several):.0%} with {k} tries "
        f"({statistics.fmean(several.values()):.0%})"
        for k, several in row["guessed"]["pass"].items()
    )
    ends = row["last_words"]["right"]
    repeated = statistics.fmean(kind["original_repetition"] for kind in row["match"].values())
    return [
        "",
        f"The original solves of the problems: {solved}; of all sorts sampled {tries}; it says "
        f"{ends.count('1') / len(ends):.1%} of the last words, "
        f"and repeats {repeated:.1%} of its runs of four tokens.",
    ]


def _texts(content: dict[str, Any], removed: int) -> list[str]:
    """Continuations side by side: the original's, after plain removal, and after two repairs on the same tokens."""
    runs = [Run(name, removed, content["tokens"]) for name in ("removed", "best", "two windows")]
    found = {run.recipe: row for run in runs if (row := content["rows"].get(run.key))}
    if not found.keys() >= {"removed", "best"}:
        return []
    lines = ["", f"## Ten beginnings, chosen by seed, {removed} of 30 blocks gone", ""]
    own = content["originals"][found["best"]["products"]]["generation"]
    for k, first in enumerate(own["samples"]):
        lines += [f"**{_inline(first['prompt'])}**", "", f"- original: {_inline(first['text'])}"]
        lines += [f"- {name}: {_inline(row['generation']['samples'][k]['text'])}" for name, row in found.items()] + [""]
    return lines


def _inline(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")

"""Write the rows of `benchmarks.quality_generation` as Markdown."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from benchmarks.generation_numbers import greedy_answers, mean_of, pass_answers, retained_greedy, summary
from benchmarks.generation_recipes import EARLIER, RECIPES, SIZES, TRAINED, Run, same_minutes, trained_in
from streamline_hooks.evaluation import Estimate, PairedScores, paired_bootstrap, relative_accuracy


def numbers(content: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of a recipe over its seeds, with intervals."""
    kept = relative_accuracy(classified(content, rows))["classification"]
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
    """Return how much more one recipe retains than another, on the seeds that both have.

    The result is empty if they share no seed in the same precision.
    """
    seeds = {(row["seed"], row["products"]) for row in first} & {(row["seed"], row["products"]) for row in second}
    sides = [sorted((r for r in of if (r["seed"], r["products"]) in seeds), key=seed_of) for of in (first, second)]
    if not seeds:
        return {}
    originals = _originals(content, sides[0])
    kinds = {
        "classification": [classified(content, side) for side in sides],
        "generation": [greedy_answers(originals, [row["generation"] for row in side]) for side in sides],
        "pass@1": [pass_answers(originals, [row["generation"] for row in side], 1) for side in sides],
        "pass@20": [pass_answers(originals, [row["generation"] for row in side], 20) for side in sides],
    }
    results = {name: next(iter(paired_bootstrap(*pairs).values())) for name, pairs in kinds.items()}
    above_chance = {name: result.above_chance for name, result in results.items() if result.above_chance is not None}
    return {"accuracy": results["classification"].ratio, **above_chance}


def classified(content: dict[str, Any], rows: list[dict[str, Any]]) -> list[PairedScores]:
    """Pair the answers of the original and of a recipe to each question, averaged over seeds."""
    originals = [content["originals"][row["products"]]["classification"] for row in rows]
    return [
        PairedScores(
            task,
            *(mean_of([list(map(float, answers["right"][task])) for answers in side]) for side in (originals, rows)),
            originals[0]["chance"][task],
        )
        for task in originals[0]["counted"]
    ]


def _originals(content: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [content["originals"][row["products"]]["generation"] for row in rows]


def seed_of(row: dict[str, Any]) -> int:
    return int(row["seed"])


HEAD = (
    "recipe", "seeds", "classification", "accuracy", "generation", "generation by seed", "pass@1", "pass@5", "pass@20",
    "last words", "common prefix, documents", "common prefix, questions", "repeated 4-grams", "perplexity", "minutes",
)  # fmt: skip
COLUMNS = {
    "classification, generation": "the retained fraction of the accuracy above chance, with the 95 % bootstrap "
    "interval over questions (problems with the same few-shot examples are drawn together). Classification has the "
    "tasks of `benchmarks.multiple_choice`; generation has synthetic problems and last words, solved greedily. Chance "
    "is the accuracy of the most frequent answer",
    "accuracy": "the ratio of the mean accuracies in classification, as in papers",
    "pass@k": "the retained fraction of the probability that one of k sampled answers is correct, above guessing "
    "answers by their frequency",
    "last words": "the accuracy on the last words of held-out texts",
    "common prefix": "the length of the common prefix of a greedy continuation of 64 tokens and that of the original",
    "repeated 4-grams": "the fraction of 4-grams that occurred before in the same continuation",
    "perplexity": "the mean ratio to the original over five held-out domains",
    "minutes": "minutes of one CPU core for generated text, the initial fit (in rounds, it is part of the selection) "
    "and the training run. They are lower with bfloat16 products and up to 50 % higher when the machine was busy",
}
LABELS = {"own text and documents": "generated text and documents"}


def table(content: dict[str, Any]) -> str:
    """Return the rows as Markdown: the recipes by number of blocks, the curve, and sample texts."""
    rows, tokens = content["rows"], content["tokens"]
    lines = [
        "SmolLM2-135M-Instruct, 4 and 8 of 30 blocks removed, on a CPU. Each row is the mean over its seeds. The "
        "columns:",
        "",
        *(f"- *{name}*: {text}" for name, text in COLUMNS.items()),
        "",
        "The training tokens count the training sequences. Blocks are selected on other sequences, except in rounds. "
        "With the recipe `on policy`, which is not in the package, a quarter of the sequences only supply prompts. The "
        "recipes were developed on other samples of problems, questions and texts. These overlap with the samples "
        "here: a quarter to a third of the sums, brackets and numbers, none of the copying problems, and all 100 "
        "questions of COPA.",
        *_original(content),
    ]
    for removed in SIZES:
        here = [row for row in rows.values() if row["removed"] == removed]
        for title, chosen in (
            (f"{removed} of 30 blocks, {tokens:,} training tokens for each", same_tokens(here, tokens)),
            (f"{removed} of 30 blocks, the training time of `best` for each", _same_time(content, removed)),
        ):
            if chosen:
                lines += ["", f"## {title}", "", *_rows(content, chosen), *_beside_best(content, chosen)]
    by_tokens = curve(content, 8)
    if len(by_tokens) > 1:
        rows_by_label = {f"best, {count:,} tokens": seed_rows for count, seed_rows in by_tokens.items()}
        lines += ["", "## 8 of 30 blocks, by training tokens", "", *_rows(content, rows_by_label)]
    for removed in SIZES:
        lines += _texts(content, removed)
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


def same_tokens(rows: list[dict[str, Any]], tokens: int) -> dict[str, list[dict[str, Any]]]:
    rows_by_recipe = {
        name: [row for row in rows if of_run(row, Run(name, row["removed"], tokens))] for name in [*RECIPES, *EARLIER]
    }
    return {name: seed_rows for name, seed_rows in rows_by_recipe.items() if seed_rows}


def curve(content: dict[str, Any], removed: int) -> dict[int, list[dict[str, Any]]]:
    """Return the rows of `best` by training tokens, on the seeds that all of them have."""
    rows = list(content["rows"].values())
    counts = sorted({row["tokens"] for row in rows})
    rows_by_count = {count: [row for row in rows if of_run(row, Run("best", removed, count))] for count in counts}
    rows_by_count = {count: seed_rows for count, seed_rows in rows_by_count.items() if seed_rows}
    common = (
        set.intersection(*(set(map(seed_of, seed_rows)) for seed_rows in rows_by_count.values()))
        if rows_by_count
        else set()
    )
    return (
        {count: [row for row in seed_rows if seed_of(row) in common] for count, seed_rows in rows_by_count.items()}
        if common
        else {}
    )


def _same_time(content: dict[str, Any], removed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each recipe with the training time of `best`, if any recipe needed other tokens for it."""
    runs = same_minutes(removed, content["tokens"], content)
    rows_by_recipe = {run.recipe: [row for row in content["rows"].values() if of_run(row, run)] for run in runs}
    with_rows = {name: seed_rows for name, seed_rows in rows_by_recipe.items() if seed_rows}
    other_tokens = any(row.get("same_minutes") for seed_rows in with_rows.values() for row in seed_rows)
    return with_rows if other_tokens else {}


def of_run(row: dict[str, Any], run: Run) -> bool:
    """Whether a row belongs to a run, with any seed."""
    same = (row["recipe"], row["removed"], row["tokens"]) == (run.recipe, run.removed, run.tokens)
    return same and bool(row.get("same_minutes")) == run.same_minutes


def _rows(content: dict[str, Any], named: dict[str, list[dict[str, Any]]]) -> list[str]:
    numbers_by_name = {name: numbers(content, seed_rows) for name, seed_rows in named.items()}
    ordered = sorted(
        numbers_by_name, key=lambda name: -_value(numbers_by_name[name]["generation"]["greedy"]["above_chance"])
    )
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    same_precision = len({row["products"] for seed_rows in named.values() for row in seed_rows}) == 1
    for name in ordered:
        label = LABELS.get(name, name)
        recipe_numbers, generation = numbers_by_name[name], numbers_by_name[name]["generation"]
        last_words = statistics.fmean(
            row["generation"]["last_words"]["right"].count("1") / len(row["generation"]["last_words"]["right"])
            for row in named[name]
        )
        match = generation["match"]
        repeated = statistics.fmean(kind["repetition"] for kind in match.values())
        cells = [
            label if same_precision else f"{label} ({', '.join(sorted({row['products'] for row in named[name]}))})",
            seeds(named[name]), _shown(recipe_numbers["classification"]), _shown(recipe_numbers["accuracy"]),
            _shown(generation["greedy"]["above_chance"]), _of_each_seed(content, named[name]),
            *(_shown(generation["pass_at"][k]["above_chance"]) for k in ("1", "5", "20")), f"{last_words:.1%}",
            *(f"{kind['length']:.1f}" for kind in match.values()), f"{repeated:.1%}", f"{recipe_numbers['ratio']:.3f}",
            "-" if recipe_numbers["minutes"] is None else f"{recipe_numbers['minutes']:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _of_each_seed(content: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the retained generation of each seed as text."""
    estimates = [
        retained_greedy(_originals(content, [row]), [row["generation"]], draws=100).above_chance
        for row in sorted(rows, key=seed_of)
    ]
    return ", ".join("-" if estimate is None else f"{estimate.value:.0%}" for estimate in estimates)


MORE = ("classification", "accuracy", "generation", "pass@1", "pass@20")


def _beside_best(content: dict[str, Any], named: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return a table of the differences between `best` and the other trained recipes."""
    best = named.get("best", [])
    compared = {
        name: (seed_rows, differences(content, best, seed_rows))
        for name, seed_rows in named.items()
        if name in [*TRAINED, *EARLIER] and name != "best"
    }
    compared = {name: (seed_rows, difference) for name, (seed_rows, difference) in compared.items() if difference}
    if not compared:
        return []
    lines = [
        "",
        "Difference between `best` and each other recipe in percentage points, on the seeds that both have, with "
        "paired bootstrap intervals over questions:",
        "",
        "| `best` compared with | seeds | " + " | ".join(MORE) + " |",
        "|---" * (len(MORE) + 2) + "|",
    ]
    for name, (seed_rows, difference) in compared.items():
        shared_rows = [row for row in best if seed_of(row) in set(map(seed_of, seed_rows))]
        lines.append(
            f"| {LABELS.get(name, name)} | {seeds(shared_rows)} | "
            + " | ".join(points(difference.get(kind)) for kind in MORE)
            + " |"
        )
    return lines


def seeds(rows: list[dict[str, Any]]) -> str:
    """Return the seeds of rows as text."""
    return ", ".join(map(str, sorted(map(seed_of, rows))))


def points(more: Estimate | None) -> str:
    return "-" if more is None else f"{100 * more.value:+.1f} [{100 * more.low:+.0f}, {100 * more.high:+.0f}]"


def _value(estimate: dict[str, Any] | None) -> float:
    return -1.0 if estimate is None else float(estimate["value"])


def _shown(estimate: dict[str, Any] | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.1%} [{estimate['low']:.0%}, {estimate['high']:.0%}]"


def _original(content: dict[str, Any]) -> list[str]:
    """Return the scores of the original, in the precision of most rows."""
    used = [row["products"] for row in content["rows"].values()]
    row = content["originals"][max(sorted(content["originals"]), key=used.count)]["generation"]
    by_guessing = row["guessed"]["probes"]
    solved = ", ".join(
        f"{sort} {bits.count('1') / len(bits):.0%} (chance {by_guessing[sort]:.0%})"
        for sort, bits in row["probes"].items()
    )
    pass_at = ", ".join(
        f"{statistics.fmean(row['pass_at']['pass'][sort][k] for sort in by_kind):.0%} for k = {k} "
        f"(chance {statistics.fmean(by_kind.values()):.0%})"
        for k, by_kind in row["guessed"]["pass"].items()
    )
    last_words = row["last_words"]["right"]
    repeated = statistics.fmean(kind["original_repetition"] for kind in row["match"].values())
    return [
        "",
        f"Accuracy of the original on the problems: {solved}. pass@k over all kinds of problems: {pass_at}. Last "
        f"words: {last_words.count('1') / len(last_words):.1%}. Repeated 4-grams: {repeated:.1%}.",
    ]


def _texts(content: dict[str, Any], removed: int) -> list[str]:
    """Return sample continuations of the original, after plain removal, and after two repairs."""
    runs = [Run(name, removed, content["tokens"]) for name in ("removed", "best", "two windows")]
    row_by_recipe = {run.recipe: row for run in runs if (row := content["rows"].get(run.key))}
    if not row_by_recipe.keys() >= {"removed", "best"}:
        return []
    lines = ["", f"## Sample continuations of ten seeded prompts, {removed} of 30 blocks removed", ""]
    original = content["originals"][row_by_recipe["best"]["products"]]["generation"]
    for k, first in enumerate(original["samples"]):
        lines += [f"**{_inline(first['prompt'])}**", "", f"- original: {_inline(first['text'])}"]
        lines += [
            f"- {name}: {_inline(row['generation']['samples'][k]['text'])}" for name, row in row_by_recipe.items()
        ] + [""]
    return lines


def _inline(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")

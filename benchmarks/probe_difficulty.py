"""Choose the difficulty of the synthetic problems, on the original model only.

    python -m benchmarks.probe_difficulty [--count 100]

SmolLM2-135M-Instruct answers problems of each kind and level. For each kind the level is chosen whose accuracy is
between 0.4 and 0.9, nearest to the middle, and clearly above that of the most frequent answer. The scored problems
(`benchmarks.generation_scores`) have another seed. The table and the choice are saved to
``benchmarks/results/probe_difficulty.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.probe_levels import LEVELS
from benchmarks.quality_scores import fingerprint, write
from benchmarks.real_text import RESULTS
from benchmarks.short_answers import SHOTS, answer_tokens, fast_products, problems_of, sets_of
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.evaluation import ANSWER_STOP, TextGenerationConfig, solve_problems
from streamline_hooks.evaluation.synthetic_tasks import guessing_accuracy

FILE = RESULTS / "probe_difficulty.json"
SEED = 7_001  # seed of the problems for the choice
LOW, HIGH = 0.4, 0.9
CLEARLY = 2.0  # standard errors above the accuracy of the most frequent answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    count = parser.parse_args().count
    model, tokenizer = load_pretrained("smollm2")
    table: dict[str, dict[str, dict[str, float]]] = {sort: {} for sort in LEVELS}
    for sort, levels in LEVELS.items():
        for level in levels:
            problems = problems_of(count, SEED, {sort: level})[sort]
            started = time.perf_counter()
            with fast_products(model):
                solved = solve_problems(
                    model,
                    tokenizer,
                    problems,
                    TextGenerationConfig(
                        new_tokens=answer_tokens(tokenizer, problems), stop=ANSWER_STOP, batch_size=50
                    ),
                )
            table[sort][str(level)] = {
                "solved": round(solved.accuracy, 4),
                "standard_error": round(solved.standard_error, 4),
                "same_answer": guessing_accuracy(problems),
                "seconds": round(time.perf_counter() - started, 1),
            }
            print(sort, level, json.dumps(table[sort][str(level)]), flush=True)
    write(
        FILE,
        {
            "chosen": choose(table),
            "between": [LOW, HIGH],
            "count": count,
            "shots": SHOTS,
            "sets_of_shots": sets_of(count),
            "seed": SEED,
            "weights": fingerprint(model.state_dict()),
            "table": table,
        },
    )


def choose(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, int]:
    """Return for each kind the level with an accuracy nearest to the middle; the easier of two equal ones."""
    middle, levels_by_kind = (LOW + HIGH) / 2, {}
    for kind, levels in table.items():
        suitable = [level for level, row in levels.items() if _fits(row)]
        if not suitable:
            raise SystemExit(f"The accuracy of {kind} is not in {LOW} to {HIGH} on any level. Add a level to `LEVELS`.")
        levels_by_kind[kind] = int(min(suitable, key=lambda level: (abs(levels[level]["solved"] - middle), int(level))))
    return levels_by_kind


def _fits(row: Mapping[str, float]) -> bool:
    return LOW <= row["solved"] <= HIGH and row["solved"] - row["same_answer"] > CLEARLY * row["standard_error"]


def chosen() -> dict[str, int]:
    """Return the stored choice."""
    kept: dict[str, Any] = json.loads(FILE.read_text())
    return {sort: int(level) for sort, level in kept["chosen"].items()}


if __name__ == "__main__":
    main()

"""How hard the generated problems are to be, so that there is something to lose: chosen on the original alone.

    python -m benchmarks.probe_difficulty [--count 100]

SmolLM2-135M-Instruct writes an answer to problems of each sort and level. Of each sort that level is taken on which it
solves between 0.4 and 0.9 of them, nearest the middle; not one on which always writing the same answer gets as far.
The problems that score (`benchmarks.generation_scores`) have another seed. The table and the choice go to
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
from benchmarks.short_answers import SHOTS, fast_products, problems_of, room, same_answer, sets_of
from streamline_hooks.evaluation import solve
from streamline_hooks.evaluation.probes import STOP
from streamline_hooks.pretrained import load_pretrained

FILE = RESULTS / "probe_difficulty.json"
SEED = 7_001  # of the problems to choose by
LOW, HIGH = 0.4, 0.9
CLEARLY = 2.0  # standard errors above always writing the same answer


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
                solved = solve(
                    model, tokenizer, problems, new_tokens=room(tokenizer, problems), stop=STOP, batch_size=50
                )
            table[sort][str(level)] = {
                "solved": round(solved.accuracy, 4),
                "standard_error": round(solved.standard_error, 4),
                "same_answer": same_answer(problems),
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
    """Of each sort, the level that leaves most room on both sides; the easier one of two alike."""
    middle, found = (LOW + HIGH) / 2, {}
    for sort, levels in table.items():
        fit = [level for level, row in levels.items() if _fits(row)]
        if not fit:
            raise SystemExit(f"On no level of {sort} does the model solve {LOW} to {HIGH}; add one to `LEVELS`.")
        found[sort] = int(min(fit, key=lambda level: (abs(levels[level]["solved"] - middle), int(level))))
    return found


def _fits(row: Mapping[str, float]) -> bool:
    return LOW <= row["solved"] <= HIGH and row["solved"] - row["same_answer"] > CLEARLY * row["standard_error"]


def chosen() -> dict[str, int]:
    """The choice that was made."""
    kept: dict[str, Any] = json.loads(FILE.read_text())
    return {sort: int(level) for sort, level in kept["chosen"].items()}


if __name__ == "__main__":
    main()

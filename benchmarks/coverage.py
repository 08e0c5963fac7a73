"""Count how often bounds and intervals are wrong, on simulated losses and on resampled losses of a compressed model.

    python -m benchmarks.coverage [--data FOLDER] [--runs 1000] [--resampled 200] [--documents 600]

An upper bound with delta = 0.05 may be below the expectation in at most 5 % of the runs, and an interval of 95 % should
contain the true value in 95 %. The simulated losses are independent draws from known distributions. The real losses are
those of SmolLM2-135M without two blocks (a linear map in closed form) on paragraphs of the held-out text; their mean is
taken as the truth, and the runs draw from them with replacement. The width of a bound is its distance from the mean of
its losses, next to that of a one-sided bootstrap, which guarantees nothing for a finite sample.
The rows are saved to ``benchmarks/results/coverage.json`` and ``.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.depth_sweep import without_blocks
from benchmarks.heldout_pieces import paragraphs
from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, arguments, split_of
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.evaluation import PairedScores, guarantee, mean_upper_bound, relative_accuracy

FILE = RESULTS / "coverage.json"
TOKENS = {"calibration_tokens": 32_768, "validation_tokens": 4_096, "test_tokens": 4_096}
DELTA, UNITS, BOOTSTRAP_DRAWS = 0.05, (50, 200, 1000), 1000
Draw = Callable[[np.random.Generator, int], np.ndarray]
SOURCES: dict[str, tuple[float, Draw]] = {
    "errors of 2 %": (0.02, lambda random, count: (random.random(count) < 0.02).astype(float)),
    "errors of 50 %": (0.5, lambda random, count: (random.random(count) < 0.5).astype(float)),
    "fractions with mean 0.1": (0.1, lambda random, count: random.beta(1, 9, count)),
    "drops of paired scores": (
        0.49, lambda random, count: random.choice([0.0, 0.5, 1.0], p=[0.06, 0.90, 0.04], size=count)
    ),
}  # fmt: skip
TASKS = {"easy": (0.8, 0.9, 0.1), "hard": (0.45, 0.7, 0.2)}
"""By task: accuracy of the original, and of the changed model where the original is right and wrong."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="of each row of simulated losses")
    parser.add_argument("--resampled", type=int, default=200, help="runs of each row of real losses")
    parser.add_argument("--documents", type=int, default=600, help="held-out paragraphs")
    options = parser.parse_args()
    bounds = []
    for name, (expectation, draw) in SOURCES.items():
        for units in UNITS:
            bounds.append({"losses": name, **violations(expectation, draw, units, options.runs)})
    for measure, losses in real_losses(options.data, options.documents).items():
        sample: Draw = lambda random, count, losses=losses: random.choice(losses, count)  # noqa: E731
        for units in UNITS:
            name = f"{measure}, {len(losses)} paragraphs"
            bounds.append({"losses": name, **violations(float(losses.mean()), sample, units, options.resampled)})
    intervals = [{"items": items, **coverage(items, options.runs)} for items in (100, 300)]
    command = (
        f"python -m benchmarks.coverage --runs {options.runs} --resampled {options.resampled} --documents "
        f"{options.documents}"
    )
    write(FILE, {"bounds": bounds, "intervals": intervals, "command": command})
    FILE.with_suffix(".md").write_text(table(bounds, intervals, command))
    print(table(bounds, intervals, command))


def violations(expectation: float, draw: Draw, units: int, runs: int) -> dict[str, Any]:
    """Return how often the bound is below the expectation, and the mean widths of the bound and of the bootstrap."""
    random = np.random.default_rng(0)
    below, widths, bootstrap = 0, [], []
    for run in tqdm(range(runs), desc=f"{units} units"):
        losses = draw(random, units)
        bound = mean_upper_bound(losses.tolist(), DELTA, seed=run)
        below += bound < expectation
        widths.append(bound - losses.mean())
        means = random.choice(losses, (BOOTSTRAP_DRAWS, units)).mean(axis=1)
        bootstrap.append(float(np.quantile(means, 1 - DELTA) - losses.mean()))
    means = [float(np.mean(values)) for values in (widths, bootstrap)]
    return {"units": units, "runs": runs, "violations": below / runs, "width": means[0], "bootstrap": means[1]}


def coverage(items: int, runs: int) -> dict[str, Any]:
    """Return how often the intervals of `relative_accuracy` contain the relative accuracies of the source."""
    accuracies = {name: (p, p * kept + (1 - p) * gained) for name, (p, kept, gained) in TASKS.items()}
    chance = 0.25
    ratio = sum(changed for _, changed in accuracies.values()) / sum(original for original, _ in accuracies.values())
    above = float(np.mean([(changed - chance) / (original - chance) for original, changed in accuracies.values()]))
    random = np.random.default_rng(1)
    inside = {"ratio": 0, "above_chance": 0}
    for run in tqdm(range(runs), desc=f"{items} items"):
        scores = []
        for name, (p, kept, gained) in TASKS.items():
            original = random.random(items) < p
            changed = random.random(items) < np.where(original, kept, gained)
            scores.append(PairedScores(name, original.tolist(), changed.tolist(), chance=chance))
        result = relative_accuracy(scores, draws=BOOTSTRAP_DRAWS, clearly=0, seed=run)["classification"]
        assert result.above_chance is not None
        for name, value, estimate in (("ratio", ratio, result.ratio), ("above_chance", above, result.above_chance)):
            inside[name] += estimate.low <= value <= estimate.high
    return {"runs": runs, **{name: count / runs for name, count in inside.items()}}


def real_losses(data: Any, documents: int) -> dict[str, np.ndarray]:
    """Return the losses of a compressed model on held-out paragraphs, by measure."""
    model, tokenizer = load_pretrained("smollm2")
    compressed = without_blocks(model, 2, split_of(data, tokenizer, **TOKENS), tokenizer)
    texts = [text for domain in paragraphs(data).values() for text in dict.fromkeys(domain) if len(text.split()) >= 20]
    Random(0).shuffle(texts)
    losses = {}
    for measure in ("disagreement", "kl"):
        statement = guarantee(model, compressed, texts[:documents], measure, tokenizer=tokenizer)
        losses[measure] = np.array(statement.losses)
    return losses


def table(bounds: Sequence[dict[str, Any]], intervals: Sequence[dict[str, Any]], command: str) -> str:
    """Return the rows as Markdown."""
    lines = [
        "Upper bounds of `mean_upper_bound` with delta = 0.05: fraction of the runs in which the bound is below the "
        "expectation, and mean distance from the mean of the losses, next to that of a one-sided bootstrap.",
        "",
        "| losses | units | runs | below the expectation | width | bootstrap |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['losses']} | {row['units']} | {row['runs']} | {row['violations']:.1%} | {row['width']:.4f} | "
            f"{row['bootstrap']:.4f} |"
            for row in bounds
        ),
        "",
        "Intervals of `relative_accuracy` with level 0.95, two tasks: fraction of the runs in which they contain the "
        "true value.",
        "",
        "| items per task | runs | ratio of accuracies | above chance |",
        "|---|---|---|---|",
        *(f"| {row['items']} | {row['runs']} | {row['ratio']:.1%} | {row['above_chance']:.1%} |" for row in intervals),
        "",
        f"Made by `{command}`.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

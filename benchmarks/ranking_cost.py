"""Measure the cost of ranking all windows of all lengths relative to a plain forward pass.

    python -m benchmarks.ranking_cost [--data FOLDER] [--rounds 7]

SmolLM2-135M runs in float32 on batches of 4 x 512 tokens of training text. The methods are timed in turn for several
rounds; the table has medians and ratios of medians. The published procedure is that of LLM-Streamline's code: it keeps
all hidden states of all samples in memory and computes, for each window of one length and each sample, a full tokens x
tokens matrix of cosines, of which it averages the diagonal. It runs on the same sequences and on one sequence of 2,048
tokens, the length in its code. "Blocks alone" is the model without its head and without measurement, a lower bound for
all rankings by hidden states. The results are saved to ``benchmarks/results/ranking_cost.json`` and ``.md``.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.real_text import BATCH, RESULTS, SEQUENCE, arguments, split_of
from benchmarks.timing import interleaved, machine, ratio
from streamline_hooks import HiddenStateRecorder, profile
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import split_into_batches

BATCHES, SIZE, PROTECTED = 1, 8, 4
PUBLISHED_LENGTH = 2_048
RECORDED = (5, 13, 20)
LABELS = {
    "rank, last blocks kept": "rank with protected blocks",
    "published": "published procedure",
    "rank, long": "rank one sequence",
    "published, long": "published procedure on one sequence",
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    model, tokenizer = load_pretrained("smollm2")
    tokens = BATCHES * BATCH * SEQUENCE
    split = split_of(options.data, tokenizer, calibration_tokens=tokens, validation_tokens=SEQUENCE)
    batches = split_into_batches(split.calibration, BATCH)
    blocks = model.config.num_hidden_layers
    long = split.calibration.reshape(-1, PUBLISHED_LENGTH)
    ways = {
        "forward": lambda: forward(model, batches),
        "rank": lambda: profile(model, batches),
        "rank, last blocks kept": lambda: profile(model, batches, protect=range(blocks - PROTECTED, blocks)),
        "record": lambda: record(model, batches),
        "blocks alone": lambda: forward(model.model, batches),
        "published": lambda: published(model, split.calibration),
        "rank, long": lambda: profile(model, split_into_batches(long, 1)),
        "published, long": lambda: published(model, long),
    }
    seconds = interleaved(ways, options.rounds)
    row = {
        "command": f"python -m benchmarks.ranking_cost --rounds {options.rounds}",
        "machine": machine(),
        "tokens": split.calibration.numel(),
        "seconds": seconds,
        "ratios": {
            "rank / forward": ratio(seconds, "rank", "forward"),
            "rank, last blocks kept / forward": ratio(seconds, "rank, last blocks kept", "forward"),
            "record / forward": ratio(seconds, "record", "forward"),
            "published / rank": ratio(seconds, "published", "rank"),
            "published / rank, long": ratio(seconds, "published, long", "rank, long"),
            "published / blocks alone": ratio(seconds, "published", "blocks alone"),
        },
    }
    (RESULTS / "ranking_cost.json").write_text(json.dumps(row, indent=1) + "\n")
    (RESULTS / "ranking_cost.md").write_text(table(row))
    print(table(row))


@torch.no_grad()
def forward(model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    """Run a plain forward pass."""
    for batch in batches:
        model(**batch, use_cache=False)


@torch.no_grad()
def record(model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    """Run a forward pass with a few recorded blocks."""
    with HiddenStateRecorder(model, RECORDED, sites=["block.input"]) as recorder:
        for batch in batches:
            model(**batch, use_cache=False)
            recorder.clear()


@torch.no_grad()
def published(model: Any, sequences: torch.Tensor) -> list[float]:
    """Rank the windows of one length like the code of LLM-Streamline; return the mean similarities.

    Samples run one by one with the default settings of the model, and all hidden states are kept. The full matrix of
    cosines of each window and sample, scaled to 0 to 1, is computed, although only the diagonal is used.
    """
    kept = [list(model(row[None], output_hidden_states=True).hidden_states) for row in sequences]
    means: list[list[float]] = [[] for _ in range(len(kept[0]) - SIZE)]
    for states in kept:
        for start, of_window in enumerate(means):
            before, after = states[start][0], states[start + SIZE][0]
            cosines = before @ after.T / (before.norm(dim=1)[:, None] * after.norm(dim=1))
            cosines[cosines.isinf()] = 0
            of_window.append((0.5 + 0.5 * cosines).trace().item() / len(cosines))
    return [statistics.fmean(of_window) for of_window in means]


def table(row: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    rounds = len(row["seconds"]["forward"])
    labels: dict[str, Callable[[float], str]] = {
        "rank / forward": lambda r: f"rank all windows of all lengths | {r:.2f} of a forward pass | 0.95",
        "rank, last blocks kept / forward": lambda r: (
            f"the same, with the last {PROTECTED} blocks protected and not run | {r:.2f} of a forward pass | 0.85"
        ),
        "record / forward": lambda r: f"record {len(RECORDED)} blocks | {r:.3f} of a forward pass | 1.03",
        "published / rank": lambda r: (
            f"published procedure, for one length ({SIZE}) | {r:.2f} times the ranking of all lengths | at least 1.4"
        ),
        "published / rank, long": lambda r: (
            f"the same, on one sequence of {PUBLISHED_LENGTH:,} tokens | {r:.2f} times the ranking of all lengths | "
            "at least 1.4"
        ),
        "published / blocks alone": lambda r: (
            f"published procedure, relative to the lower bound | {r:.2f} times the blocks alone | none"
        ),
    }
    medians = ", ".join(
        f"{LABELS.get(name, name)} {statistics.median(values):.2f}" for name, values in row["seconds"].items()
    )
    return "\n".join(
        [
            f"SmolLM2-135M, float32, {row['tokens']:,} tokens in batches of {BATCH} x {SEQUENCE}, "
            f"CPU with {row['machine']['threads']} threads; ratios of the medians of {rounds} alternating rounds.",
            "",
            "| method | cost | target |",
            "|---|---|---|",
            *(f"| {labels[name](value)} |" for name, value in row["ratios"].items()),
            "",
            f"Median seconds: {medians}.",
            "",
            f"Made by `{row['command']}`.",
            "",
        ]
    )


if __name__ == "__main__":
    main()

"""What it costs to rank every window of every length, beside one bare forward of the same tokens.

    python -m benchmarks.ranking_cost [--data FOLDER] [--rounds 7]

SmolLM2-135M in float32 on batches of 4 x 512 tokens of training text. The ways are run in turn, several rounds; the
table holds medians and ratios of medians. The published procedure is the one of LLM-Streamline's code: every hidden
state of every sample is kept in memory, then each window of one length gets a full tokens x tokens matrix of cosines a
sample, whose diagonal is averaged. It is run on the same sequences, and on one of 2,048 tokens, which its code cuts
text into. "The blocks alone" is the model without its head and with nothing measured: what no way of ranking by states
can be faster than. Rows go to ``benchmarks/results/ranking_cost.json`` and ``.md``.
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
from streamline_hooks.batch import batches_of
from streamline_hooks.pretrained import load_pretrained

BATCHES, SIZE, PROTECTED = 1, 8, 4
PUBLISHED_LENGTH = 2_048
RECORDED = (5, 13, 20)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    model, tokenizer = load_pretrained("smollm2")
    tokens = BATCHES * BATCH * SEQUENCE
    split = split_of(options.data, tokenizer, calibration_tokens=tokens, validation_tokens=SEQUENCE)
    batches = batches_of(split.calibration, BATCH)
    blocks = model.config.num_hidden_layers
    long = split.calibration.reshape(-1, PUBLISHED_LENGTH)
    ways = {
        "forward": lambda: forward(model, batches),
        "rank": lambda: profile(model, batches),
        "rank, last blocks kept": lambda: profile(model, batches, keep=range(blocks - PROTECTED, blocks)),
        "record": lambda: record(model, batches),
        "blocks alone": lambda: forward(model.model, batches),
        "published": lambda: published(model, split.calibration),
        "rank, long": lambda: profile(model, batches_of(long, 1)),
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
    """The bare forward, of all that the model given has."""
    for batch in batches:
        model(**batch, use_cache=False)


@torch.no_grad()
def record(model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    """The same with a few blocks recorded."""
    with HiddenStateRecorder(model, RECORDED, outputs=False) as recorder:
        for batch in batches:
            model(**batch, use_cache=False)
            recorder.clear()


@torch.no_grad()
def published(model: Any, sequences: torch.Tensor) -> list[float]:
    """Rank the windows of one length as LLM-Streamline's own code does; returns the mean similarities.

    Samples go one by one, with whatever the model does by default, and all their hidden states are kept. A window of a
    sample gets the whole matrix of its tokens' cosines, brought to 0 to 1, of which only the diagonal is used.
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
    """The row as Markdown."""
    rounds = len(row["seconds"]["forward"])
    labels: dict[str, Callable[[float], str]] = {
        "rank / forward": lambda r: f"rank every window of every length | {r:.2f} of a bare forward | 0.95",
        "rank, last blocks kept / forward": lambda r: (
            f"the same, where the last {PROTECTED} blocks must stay and are not run | {r:.2f} of a bare forward | 0.85"
        ),
        "record / forward": lambda r: f"record {len(RECORDED)} chosen blocks | {r:.3f} of a bare forward | 1.03",
        "published / rank": lambda r: (
            f"the published procedure, for the one length {SIZE} | {r:.2f} times the cost of ranking every length | "
            "at least 1.4"
        ),
        "published / rank, long": lambda r: (
            f"the same, on one sequence of {PUBLISHED_LENGTH:,} tokens | {r:.2f} times the cost of ranking every "
            "length | at least 1.4"
        ),
        "published / blocks alone": lambda r: (
            f"the most that ranking by states could reach against it | {r:.2f} times the blocks alone | none"
        ),
    }
    medians = ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in row["seconds"].items())
    return "\n".join(
        [
            f"SmolLM2-135M, float32, {row['tokens']:,} tokens in batches of {BATCH} x {SEQUENCE}, "
            f"{row['machine']['threads']} threads; {rounds} rounds in turn, ratios of medians.",
            "",
            "| what | cost | aim |",
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

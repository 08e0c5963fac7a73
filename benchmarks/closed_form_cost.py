"""Measure the cost of a compression in closed form relative to a bare forward pass of its calibration text.

    python -m benchmarks.closed_form_cost [--data FOLDER] [--removed 2,4,8] [--validation 4096,2048] [--rounds 3]

The steps are those of `make demo` on SmolLM2-135M: the ranking on 20,480 tokens of repeated passages, then the fit of a
shortlist of 8 windows on four fifths of the text, the choice of the ridge on the rest, and the verification of the
repaired models on further text. They are timed in turn with the forward pass of the same 20,480 tokens. The forward
pass has the LM head; ranking and fit do not need it. Windows are compared between amounts of verification text, so that
the table shows what less of it changes. Results are in ``benchmarks/results/closed_form_cost.json`` and ``.md``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.quality_scores import write
from benchmarks.ranking_cost import forward
from benchmarks.real_text import BATCH, RESULTS, arguments, split_of
from benchmarks.timing import interleaved, machine, ratio
from streamline_hooks import LinearConfig, profile, verify_shortlist
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import split_into_batches
from streamline_hooks.data import with_repeated_passages
from streamline_hooks.pipeline import split_held_out
from streamline_hooks.selection import WindowSearch, windows_of_size

FILE = RESULTS / "closed_form_cost.json"
TOKENS = 20_480


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--removed", default="2,4,8", help="numbers of blocks")
    parser.add_argument("--validation", default="4096,2048", help="numbers of tokens of verification text")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    model, tokenizer = load_pretrained("smollm2")
    amounts, sizes = ([int(number) for number in text.split(",")] for text in (options.validation, options.removed))
    split = split_of(options.data, tokenizer, calibration_tokens=TOKENS, validation_tokens=max(amounts))
    repeated = with_repeated_passages(split, 1.0)
    calibration = split_into_batches(repeated.calibration, BATCH)
    fit = [split_into_batches(part, BATCH) for part in split_held_out(split.calibration)]
    validation = split_into_batches(repeated.validation, BATCH)
    length, search = model.config.num_hidden_layers, WindowSearch()
    measured = profile(model, calibration)
    chosen: dict[str, str] = {}

    def verify(size: int, tokens: int) -> None:
        shortlist = search.find(search.problem(windows_of_size(length, size), length, profile=measured))
        part = validation[: tokens // validation[0]["input_ids"].numel()]
        best = verify_shortlist(model, shortlist, *fit, part, replacement=LinearConfig())
        chosen[f"{size} blocks, {tokens} tokens"] = ", then ".join(str(selection) for selection in best[:2])

    ways: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(model, split_into_batches(split.calibration, BATCH)),
        "rank": lambda: profile(model, calibration),
    }
    for size in sizes:
        ways |= {f"{size} blocks, {n} tokens": lambda size=size, n=n: verify(size, n) for n in amounts}  # type: ignore[misc]
    with torch.no_grad():
        seconds = interleaved(ways, options.rounds)
    row = {"machine": machine(), "tokens": TOKENS, "seconds": seconds, "chosen": chosen}
    write(FILE, row)
    FILE.with_suffix(".md").write_text(table(row))
    print(table(row))


def table(row: Mapping[str, Any]) -> str:
    """Return the costs in forward passes as Markdown."""
    seconds = row["seconds"]
    rank = ratio(seconds, "rank", "forward")
    lines = [
        f"SmolLM2-135M, float32, CPU with {row['machine']['threads']} threads. Costs are in bare forward passes of the "
        f"{row['tokens']:,} tokens of calibration text: ratios of the medians of {len(seconds['rank'])} alternating "
        "rounds. *Windows* are the best two of the verified shortlist.",
        "",
        "| removed, verification text | rank | fit and verify | together | windows |",
        f"|{'---|' * 5}",
    ]
    for name, windows in row["chosen"].items():
        verify = ratio(seconds, name, "forward")
        lines.append(f"| {name} | {rank:.2f} | {verify:.2f} | {rank + verify:.2f} | {windows} |")
    return "\n".join([*lines, "", "Made by `python -m benchmarks.closed_form_cost`.", ""])


if __name__ == "__main__":
    main()

"""Measure a compressed SmolLM2-135M as draft model of its original, with Transformers' assisted generation.

    python -m benchmarks.draft_model [--data FOLDER] [--removed 2,4,8,15] [--drafts 2,4] [--prompts 6] [--tokens 48]

The removed window gets a linear map in closed form. The compressed model drafts tokens, and the original verifies them,
so the greedy text is that of the original. A row has the fraction of accepted drafts, the tokens per forward pass of
the original, and the time of a generation with its prompt relative to the original alone, as the median over prompts of
pairs that run one after the other.
The results are saved to ``benchmarks/results/draft_model.json`` and ``.md``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.depth_sweep import without_blocks
from benchmarks.heldout_pieces import beginnings
from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, arguments, split_of
from benchmarks.timing import machine
from streamline_hooks.checkpoint import load_pretrained

FILE = RESULTS / "draft_model.json"
TOKENS = {"calibration_tokens": 32_768, "validation_tokens": 4_096, "test_tokens": 4_096}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--removed", default="2,4,8,15", help="numbers of removed blocks")
    parser.add_argument("--drafts", default="2,4", help="drafted tokens before each verification")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per prompt")
    options = parser.parse_args()
    model, tokenizer = load_pretrained("smollm2")
    split = split_of(options.data, tokenizer, **TOKENS)
    texts = beginnings(options.data, tokenizer, options.prompts, seed=0)
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    assistants = {
        int(count): without_blocks(model, int(count), split, tokenizer) for count in options.removed.split(",")
    }
    rows = measure(model, assistants, prompts, [int(count) for count in options.drafts.split(",")], options.tokens)
    command = (
        f"python -m benchmarks.draft_model --removed {options.removed} --drafts {options.drafts} --prompts "
        f"{options.prompts} --tokens {options.tokens}"
    )
    write(FILE, {"rows": rows, "machine": machine(), "command": command})
    FILE.with_suffix(".md").write_text(table(rows, command))
    print(table(rows, command))


def measure(
    model: Any, assistants: dict[int, Any], prompts: Sequence[Tensor], drafts: Sequence[int], new_tokens: int
) -> list[dict[str, Any]]:
    """Return acceptance and time for each assistant and number of drafts."""
    rows = []
    for removed, assistant in assistants.items():
        for count in drafts:
            settings = assistant.generation_config
            settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = count, "constant"
            settings.assistant_confidence_threshold = 0.0
            ratios, verified, drafted = [], 0, 0
            for number, ids in enumerate([prompts[0], *prompts]):  # the first run is a warm-up
                expected, alone = _timed(model, ids, new_tokens)
                with _counted(model) as passes, _counted(assistant) as draft_passes:
                    found, together = _timed(model, ids, new_tokens, assistant_model=assistant)
                if not torch.equal(found, expected):
                    raise SystemExit(f"The drafts of {removed} removed blocks give another text than greedy decoding.")
                if number:
                    ratios.append(together / alone)
                    verified, drafted = verified + len(passes), drafted + len(draft_passes)
            tokens = new_tokens * len(prompts)
            rows.append(
                {
                    "removed": removed,
                    "drafts": count,
                    "accepted": (tokens - verified) / drafted,
                    "tokens_per_pass": tokens / verified,
                    "time": statistics.median(ratios),
                }
            )
            print(rows[-1], flush=True)
    return rows


def _timed(model: Any, ids: Tensor, new_tokens: int, **options: Any) -> tuple[Tensor, float]:
    started = time.perf_counter()
    tokens = model.generate(
        ids, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options
    )
    return tokens, time.perf_counter() - started


@contextmanager
def _counted(model: Any) -> Iterator[list[int]]:
    """Yield a list that gets an entry for each forward pass."""
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def table(rows: Sequence[dict[str, Any]], command: str) -> str:
    """Return the rows as Markdown."""
    lines = [
        "SmolLM2-135M-Instruct (30 blocks), float32, one prompt at a time. The compressed model drafts tokens, and the "
        "original verifies them; the text is the greedy text of the original. A time below 1 is faster than the "
        "original alone.",
        "",
        "| removed blocks | drafted tokens | accepted | tokens per pass of the original | time |",
        "|---|---|---|---|---|",
        *(
            f"| {row['removed']} | {row['drafts']} | {row['accepted']:.0%} | {row['tokens_per_pass']:.2f} | "
            f"{row['time']:.2f} |"
            for row in rows
        ),
        "",
        f"Made by `{command}`.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

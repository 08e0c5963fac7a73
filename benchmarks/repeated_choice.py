"""Measure the effect of removing each window of SmolLM2 on prose and on repeated passages.

    python -m benchmarks.repeated_choice [--data FOLDER] [--sequences 10]

Each window of 4 and of 8 blocks is removed without replacement. KL from the original, in nats per token, is measured on
validation text of the training domains, and on the second half of sequences whose second half repeats the first; for
the latter also the negative log-likelihood of the repeated tokens. Products are in bfloat16. The results are saved to
``benchmarks/results/repeated_choice.json`` and ``.md``. It takes ten minutes on one core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, arguments
from benchmarks.short_answers import fast_products
from benchmarks.training_text import training_text
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.data import TokenSplit, with_repeated_passages
from streamline_hooks.modeling import find_stack
from streamline_hooks.surgery import LayerSurgeon

FILE, SIZES = RESULTS / "repeated_choice.json", (4, 8)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sequences", type=int, default=10)
    options = parser.parse_args()
    model, tokenizer = load_pretrained("smollm2")
    prose = training_text(options.data, tokenizer, 20_480).validation[: options.sequences]
    twice = with_repeated_passages(TokenSplit(prose, prose, prose, fingerprint=""), 1.0).validation
    with fast_products(model), torch.no_grad():
        first, again = log_probabilities(model, prose), log_probabilities(model, twice)
        content: dict[str, Any] = {
            "command": "python -m benchmarks.repeated_choice",
            "tokens": prose.numel(),
            "original": {"prose": nats(first, prose, 0), "repeated": nats(again, twice, twice.shape[1] // 2)},
            "windows": {str(size): [] for size in SIZES},
        }
        for size in SIZES:
            for start in range(len(find_stack(model)) - size + 1):
                with LayerSurgeon(model, probe=False) as surgeon:
                    surgeon.remove(range(start, start + size))
                    row = {"start": start, **compared(first, log_probabilities(model, prose), prose, 0, "prose")}
                    row |= compared(again, log_probabilities(model, twice), twice, twice.shape[1] // 2, "repeated")
                content["windows"][str(size)].append(row)
                print(size, row, flush=True)
    write(FILE, content)
    FILE.with_suffix(".md").write_text(table(content))
    print(table(content))


def log_probabilities(model: Any, rows: Tensor) -> Tensor:
    """Return log-probabilities of shape (sequences, tokens, vocabulary)."""
    return torch.cat([model(input_ids=row[None], use_cache=False).logits.log_softmax(dim=-1) for row in rows])


def compared(original: Tensor, other: Tensor, rows: Tensor, start: int, name: str) -> dict[str, float]:
    """Return the KL from position `start` on and the negative log-likelihood of the later tokens."""
    pairs = zip(original[:, start:], other[:, start:], strict=True)
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs)
    return {f"kl_{name}": total / rows[:, start:].numel(), f"nats_{name}": nats(other, rows, start)}


def nats(logs: Tensor, rows: Tensor, start: int) -> float:
    """Return the mean negative log-likelihood of the tokens after position `start`."""
    return -float(logs[:, start:-1].gather(-1, rows[:, start + 1 :, None]).mean())


def table(content: dict[str, Any]) -> str:
    """Return the windows of each size as Markdown, by their first blocks."""
    own = content["original"]
    lines = [
        f"SmolLM2-135M-Instruct, one window removed without replacement; {content['tokens']:,} tokens of validation "
        "text (seed 0), CPU. KL and negative log-likelihood (NLL) in nats per token; the lowest KL is bold. NLL of the "
        f"original: {own['prose']:.2f} on prose and {own['repeated']:.2f} on repeated passages.",
    ]
    for size, rows in content["windows"].items():
        least = {name: min(row[name] for row in rows) for name in ("kl_prose", "kl_repeated")}
        lines += [
            "",
            f"## {size} blocks",
            "",
            "| first block | KL, prose | KL, repeated | NLL, repeated |",
            "|---:|---:|---:|---:|",
        ]
        for row in rows:
            marked = [f"**{row[n]:.2f}**" if row[n] == least[n] else f"{row[n]:.2f}" for n in least]
            lines.append(f"| {row['start']} | {marked[0]} | {marked[1]} | {row['nats_repeated']:.2f} |")
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

"""Measure how the time of ranking grows with tokens, blocks and width, on synthetic Llama models.

    python -m benchmarks.ranking_growth [--rounds 3]

One size is varied at a time. The results are saved to ``benchmarks/results/ranking_growth.json`` and ``.md``, the
figure to ``docs/images/ranking_growth.svg``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.real_text import RESULTS, ROOT
from benchmarks.timing import interleaved, machine
from streamline_hooks import profile

BASE = {"tokens": 512, "blocks": 8, "width": 256}
GRID = {"tokens": [128, 256, 512, 1024, 2048], "blocks": [4, 8, 16, 32], "width": [64, 128, 256, 512]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    rows: dict[str, list[dict[str, float]]] = {}
    for axis, values in GRID.items():
        models = {value: build({**BASE, axis: value}) for value in values}
        ways = {}
        for value, (model, batch) in models.items():
            ways[f"rank {value}"] = lambda model=model, batch=batch: profile(model, [batch])
            ways[f"forward {value}"] = lambda model=model, batch=batch: forward(model, batch)
        seconds = interleaved(ways, options.rounds)
        rows[axis] = [
            {axis: v, **{what: statistics.median(seconds[f"{what} {v}"]) for what in ("rank", "forward")}}
            for v in values
        ]
    row = {
        "command": f"python -m benchmarks.ranking_growth --rounds {options.rounds}",
        "machine": machine(),
        "base": BASE,
        "rows": rows,
    }
    (RESULTS / "ranking_growth.json").write_text(json.dumps(row, indent=1) + "\n")
    (RESULTS / "ranking_growth.md").write_text(table(row))
    draw(row)
    print(table(row))


def build(size: dict[str, int]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a model and a batch of a size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4 * size["width"],
        hidden_size=size["width"],
        intermediate_size=3 * size["width"],
        num_hidden_layers=size["blocks"],
        num_attention_heads=size["width"] // 32,
        max_position_embeddings=4096,
    )
    ids = torch.randint(3, config.vocab_size, (1, size["tokens"]))
    return LlamaForCausalLM(config).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def forward(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Run a plain forward pass."""
    model(**batch, use_cache=False)


def table(row: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    base = ", ".join(f"{name} {value}" for name, value in row["base"].items())
    lines = [f"Synthetic Llama models with random weights on a CPU. Unless stated: {base}. Median seconds.", ""]
    for axis, values in row["rows"].items():
        lines += [f"| {axis} | forward pass | rank all windows | ratio |", "|---:|---:|---:|---:|"]
        lines += [
            f"| {v[axis]:,} | {v['forward']:.4f} | {v['rank']:.4f} | {v['rank'] / v['forward']:.2f} |" for v in values
        ]
        lines.append("")
    return "\n".join([*lines, f"Made by `{row['command']}`.", ""])


def draw(row: dict[str, Any]) -> None:
    """Plot the time by each size, on logarithmic axes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "streamline_hooks"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(row["rows"]), figsize=(9.6, 3.2), layout="constrained", sharey=True)
    for place, (axis, values) in zip(axes, row["rows"].items(), strict=True):
        x = [v[axis] for v in values]
        for what, label in (("forward", "forward pass"), ("rank", "rank all windows")):
            place.plot(x, [v[what] for v in values], "o-", label=label)
        place.set_xscale("log", base=2)
        place.set_yscale("log")
        place.set_xticks(x, [str(v) for v in x])
        place.set_xlabel(axis)
        place.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    figure.savefig(ROOT / "docs" / "images" / "ranking_growth.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

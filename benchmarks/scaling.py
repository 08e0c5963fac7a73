"""Measure how time and memory grow with tokens, blocks, width and batch size, on synthetic Llama models.

    python -m benchmarks.scaling [--rounds 3] [--threads 1]

One size is varied at a time, and each stage runs on one batch: a bare forward, a ranking of all windows, the
least-squares fit of one window, and a training run of one step of a linear map by KL, with the pass of the teacher and
two validations. Sizes of an axis run in turn; the table
has medians. The exponent of a stage is the slope of a straight line through the logarithms of all sizes. Memory is the
peak of a ranking in addition to the process with the model, next to the bytes of the hidden states of one batch at all
boundaries. The speedup by a second process is that of ``benchmarks/results/processes.json``. The results are saved to
``benchmarks/results/scaling.json`` and ``.md``, the figure to ``docs/images/scaling.svg``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality_scores import write
from benchmarks.ranking_memory import give_back, reset_peak, resident
from benchmarks.real_text import RESULTS, ROOT
from benchmarks.timing import interleaved, machine
from streamline_hooks import DistillationConfig, LinearConfig, fit_windows, profile, train
from streamline_hooks.core import Batch
from streamline_hooks.distillation import Student
from streamline_hooks.replacements import LinearReplacement

FILE = RESULTS / "scaling.json"
BASE = {"tokens": 512, "blocks": 8, "width": 256, "batch": 1}
GRID = {
    "tokens": [128, 256, 512, 1024, 2048],
    "blocks": [4, 8, 16, 32],
    "width": [64, 128, 256, 512],
    "batch": [1, 2, 4, 8],
}
STAGES = {"forward": "forward", "rank": "rank", "fit": "fit", "train": "training step"}
LABELS = {"tokens": "tokens per sequence", "blocks": "blocks", "width": "width", "batch": "sequences"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["TQDM_DISABLE"] = "1"
    rows: dict[str, list[dict[str, float]]] = {}
    for axis, values in GRID.items():
        ways: dict[str, Callable[[], object]] = {}
        rows[axis] = []
        for value in values:
            model, batch = build({**BASE, axis: value})
            rows[axis].append({axis: value, **memory(model, batch)})
            for stage, run in stages_of(model, batch).items():
                ways[f"{stage} {value}"] = run
        seconds = interleaved(ways, options.rounds)
        for row in rows[axis]:
            row.update({stage: statistics.median(seconds[f"{stage} {row[axis]}"]) for stage in STAGES})
    content = {
        "command": f"python -m benchmarks.scaling --rounds {options.rounds} --threads {options.threads}",
        "machine": machine(),
        "base": BASE,
        "rows": rows,
    }
    write(FILE, content)
    FILE.with_suffix(".md").write_text(table(content))
    draw(content)
    print(table(content))


def build(size: dict[str, int]) -> tuple[Any, Batch]:
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
    ids = torch.randint(3, config.vocab_size, (size["batch"], size["tokens"]))
    return LlamaForCausalLM(config).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stages_of(model: Any, batch: Batch) -> dict[str, Callable[[], object]]:
    """Return a function per stage."""
    length, width = model.config.num_hidden_layers, model.config.hidden_size
    window = range(length // 2, length // 2 + length // 4)
    student = Student(model, [(window, LinearReplacement(width))])
    return {
        "forward": partial(forward, model, batch),
        "rank": partial(profile, model, [batch]),
        "fit": partial(fit_windows, model, [window], LinearConfig(), [batch], [batch]),
        "train": partial(train, student, [batch], [batch], DistillationConfig(validations=1)),
    }


@torch.no_grad()
def forward(model: Any, batch: Batch) -> None:
    """Run a plain forward pass."""
    model(**batch, use_cache=False)


def memory(model: Any, batch: Batch) -> dict[str, float]:
    """Return the bytes that a ranking takes at its peak, and those of the hidden states of the batch."""
    profile(model, [batch])
    gc.collect()
    give_back()
    reset_peak()
    before = resident()
    profile(model, [batch])
    config, ids = model.config, batch["input_ids"]
    states = (config.num_hidden_layers + 1) * ids.numel() * config.hidden_size * 4
    return {"peak": resident("VmHWM") - before, "states": states}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def exponents(content: dict[str, Any], axis: str) -> dict[str, float]:
    """Return the exponent of the time of each stage and of the peak memory along an axis."""
    rows = content["rows"][axis]
    sizes = [row[axis] for row in rows]
    return {name: exponent(sizes, [row[name] for row in rows]) for name in (*STAGES, "peak")}


def table(content: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    base = ", ".join(f"{LABELS[name]} {value}" for name, value in content["base"].items())
    lines = [
        f"Synthetic Llama models with random weights, float32, on a CPU with {content['machine']['threads']} "
        f"thread(s). Unless stated: {base}. Median milliseconds per batch; a training step includes the teacher and "
        "two validations. *Exponent* is the slope of the logarithms.",
        "",
    ]
    for axis, rows in content["rows"].items():
        titles = " | ".join(STAGES.values())
        lines += [
            f"| {LABELS[axis]} | {titles} | rank / forward | peak of a ranking, MB | its hidden states, MB |",
            f"|{'---:|' * (len(STAGES) + 4)}",
        ]
        for row in rows:
            cells = [f"{row[axis]:,}", *(f"{1e3 * row[stage]:,.0f}" for stage in STAGES)]
            cells += [f"{row['rank'] / row['forward']:.2f}", f"{row['peak'] / 1e6:.1f}", f"{row['states'] / 1e6:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
        slopes = exponents(content, axis)
        cells = ["**exponent**", *(f"{slopes[stage]:.2f}" for stage in STAGES), "", f"{slopes['peak']:.2f}", ""]
        lines += [f"| {' | '.join(cells)} |", ""]
    return "\n".join([*lines, f"Made by `{content['command']}`.", ""])


def draw(content: dict[str, Any]) -> None:
    """Plot time and memory by each size on logarithmic axes, and the speedup by a second process."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "streamline_hooks"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(9.6, 6), layout="constrained")
    panels = axes.flatten()
    for panel, (axis, rows) in zip(panels, content["rows"].items(), strict=False):
        sizes, slopes = [row[axis] for row in rows], exponents(content, axis)
        for stage, label in STAGES.items():
            panel.plot(sizes, [1e3 * row[stage] for row in rows], "o-", label=f"{label}: {slopes[stage]:.2f}")
        panel.set(xscale="log", yscale="log", xlabel=LABELS[axis], ylabel="milliseconds per batch")
    for axis, rows in content["rows"].items():
        label = f"{LABELS[axis]}: {exponents(content, axis)['peak']:.2f}"
        panels[4].plot([row["states"] / 1e6 for row in rows], [row["peak"] / 1e6 for row in rows], "o", label=label)
    panels[4].set(xscale="log", yscale="log", xlabel="hidden states of a batch, MB", ylabel="peak of a ranking, MB")
    times = json.loads((RESULTS / "processes.json").read_text())["rounds"]
    for name in times["1"][0]:
        medians = [statistics.median(row[name] for row in times[count]) for count in ("1", "2")]
        panels[5].plot([1, 2], [1, medians[0] / medians[1]], "o-", label=f"{name}: {medians[0] / medians[1]:.2f}")
    panels[5].set(xlabel="processes", ylabel="speedup", xticks=[1, 2])
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=7)
    figure.savefig(ROOT / "docs" / "images" / "scaling.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()

"""Reproduce the ablations of LLM-Streamline (arXiv 2403.19135) on SmolLM2-135M-Instruct.

    python -m benchmarks.curves [--data FOLDER] [--curves kind,networks,tokens,fraction]

One setting is varied at a time: the kind of replacement, the number of replacements, the training tokens, and the
fraction of removed blocks. The other settings are one SwiGLU for 8 of 30 blocks, trained by KL on 100,000 tokens for
one epoch in bfloat16 autocast. The blocks of each point are chosen by the verified
shortlist on training text. Scores are mean perplexity ratios over five held-out domains. Each point is saved to
``benchmarks/results/curves.json`` when it is finished, the table to ``benchmarks/results/curves.md`` and the plot to
``docs/images/curves.svg``. All points take about two hours on two cores.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality_scores import Quality, write
from benchmarks.real_text import BATCH, RESULTS, ROOT, arguments
from benchmarks.training_text import training_text
from streamline_hooks import (
    CompressionConfig,
    DistillationConfig,
    LinearConfig,
    SwiGLUConfig,
    perplexity,
    profile,
    train,
    verify_shortlist,
)
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import HardwareConfig, split_into_batches
from streamline_hooks.distillation import student_of
from streamline_hooks.modeling import find_stack
from streamline_hooks.pipeline import split_held_out
from streamline_hooks.repair import BlockConfig, MLPConfig, ReplacementConfig, SilencedConfig
from streamline_hooks.selection import DisjointSearch, SearchConfig, WindowSearch, windows_of_size

FILE = RESULTS / "curves.json"
SETTINGS = replace(CompressionConfig.preset("best").distillation or DistillationConfig(), loss={"kl": 1.0})
MOST, CHOOSING, SHORTLIST = (
    1_000_000,
    40_960,
    4,
)  # largest number of training tokens, tokens for the selection, verified selections


@dataclass(frozen=True)
class Point:
    """One point of a curve: the settings of a compression."""

    repair: ReplacementConfig = field(default_factory=SwiGLUConfig)
    networks: int = 1
    tokens: int = 100_000
    removed: int = 8

    @property
    def name(self) -> str:
        return f"{self.repair}/{self.networks}/{self.tokens}/{self.removed}"


CURVES: dict[str, list[Point]] = {
    "kind": [
        Point(repair)
        for repair in (
            LinearConfig(),
            LinearConfig(rank=64),
            MLPConfig(),
            SwiGLUConfig(),
            BlockConfig(),
            SilencedConfig(),
        )
    ],
    "networks": [Point(networks=n) for n in (1, 2, 3)],
    "tokens": [Point(tokens=n) for n in (10_000, 30_000, 100_000, 300_000, 1_000_000)],
    "fraction": [Point(removed=n) for n in (3, 6, 9, 12, 15)],
}
LABELS = {
    "kind": "replacement",
    "networks": "number of replacements",
    "tokens": "training tokens",
    "fraction": "fraction of blocks",
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--curves", default=",".join(CURVES))
    options = parser.parse_args()
    bench = Bench(options.data)
    for point in dict.fromkeys(p for curve in options.curves.split(",") for p in CURVES[curve]):
        bench.measure(point)
    print(table(bench.content))


class Bench:
    """The original, a model to change, the text and the finished points."""

    def __init__(self, data: Path) -> None:
        original, tokenizer = load_pretrained("smollm2")
        self.quality = Quality(original, tokenizer, data, tasks=())
        self.model = load_pretrained("smollm2")[0]
        self.stack = find_stack(self.model)
        self.text = training_text(data, tokenizer, MOST)
        self.validation = split_into_batches(self.text.validation, 2)
        self.content: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"points": {}}
        self.content["command"] = "python -m benchmarks.curves"
        rows = self.text.train[: CHOOSING // self.text.train.shape[1]]
        self.profile = profile(self.model, split_into_batches(rows, BATCH))

    def measure(self, point: Point) -> None:
        """Choose, fit, train and score a point, unless it is finished."""
        if point.name in self.content["points"]:
            return
        started = time.time()
        rows = self.text.train[: point.tokens // self.text.train.shape[1]]
        chosen = self.chosen(point, rows[: CHOOSING // rows.shape[1]])
        pairs = [(repair.window, repair.replacement_module) for repair in chosen.repairs]
        file = ROOT / "build" / "curves" / f"{point.name.replace('/', '-')}.training"
        student = student_of(self.stack, pairs)
        with student.applied():
            before = self.score()
        trained = train(
            student,
            split_into_batches(rows, 1),
            self.validation,
            SETTINGS,
            resume=file.exists(),
            checkpoint_file=file,
            hardware=HardwareConfig(autocast="bfloat16", state_memory=2**34),
        )
        if trained.stopped:
            raise SystemExit(
                f"{point.name}: training stopped early: {trained.stopped}. Run the command again to resume."
            )
        student.merge()
        student.training = False
        with student.applied():
            after = self.score()
        self.content["points"][point.name] = {
            "kind": str(point.repair),
            "networks": point.networks,
            "tokens": point.tokens,
            "removed": point.removed,
            "gone": chosen.blocks_text,
            "added": sum(point.repair.size(self.stack, w).parameters for w, _ in pairs),
            "parameters_gone": sum(self.stack.parameters_per_block[k] for w, _ in pairs for k in w),
            "started": before,
            "trained": after,
            "kl": [trained.distance_before, trained.distance],
            "minutes": (time.time() - started) / 60,
        }
        file.unlink()
        write(FILE, self.content)
        FILE.with_suffix(".md").write_text(table(self.content))
        plot(self.content)
        print(point.name, self.content["points"][point.name], flush=True)

    def chosen(self, point: Point, rows: torch.Tensor) -> Any:
        """Choose the blocks of a point and fit their replacements."""
        length, slots = len(self.stack), point.repair.slots
        size = point.removed + slots * point.networks
        search: SearchConfig = WindowSearch(shortlist=SHORTLIST)
        if point.networks > 1:
            search = DisjointSearch(shortlist=SHORTLIST, windows=point.networks)
        shortlist = search.find(search.problem(windows_of_size(length, size), length, profile=self.profile))
        parts = [*(split_into_batches(part, BATCH) for part in split_held_out(rows)), self.validation]
        with torch.autocast("cpu", torch.bfloat16):
            return verify_shortlist(self.model, shortlist, *parts, replacement=point.repair)[0]

    def score(self) -> float:
        """Return the mean perplexity ratio of the model in its present state."""
        value = {name: perplexity(self.model, batches, name).value for name, batches in self.quality.text.items()}
        return statistics.fmean(value[name] / original for name, original in self.quality.scores.perplexity.items())


def table(content: dict[str, Any]) -> str:
    """Return the points as Markdown, one table per curve."""
    lines = [
        "SmolLM2-135M-Instruct, seed 0: mean perplexity ratio to the original over five held-out domains, after the "
        "fit in closed form and after training by KL for one epoch. Unless stated: SwiGLU, 8 of 30 blocks, 100,000 "
        "tokens. Block replacements remove one more block. Minutes: selection, fit, training and scoring on a CPU, on "
        "a machine with other load.",
    ]
    for curve, points in CURVES.items():
        rows = [(point, content["points"][point.name]) for point in points if point.name in content["points"]]
        lines += ["", f"| {LABELS[curve]} | blocks removed | fitted | trained | parameters added / removed | minutes |"]
        lines.append("|---" * 6 + "|")
        for point, row in rows:
            lines.append(
                f"| {place_of(curve, point)} | {row['gone']} | {row['started']:.3f} | **{row['trained']:.3f}** | "
                f"{row['added'] / 1e6:.2f} M / {row['parameters_gone'] / 1e6:.1f} M | {row['minutes']:.0f} |"
            )
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


def place_of(curve: str, point: Point) -> str:
    """Return the label of a point on the axis of a curve."""
    named = {"kind": str(point.repair), "networks": point.networks, "tokens": f"{point.tokens:,}"}
    return str(named.get(curve, f"{point.removed / 30:.1f}"))


def plot(content: dict[str, Any]) -> None:
    """Plot the four curves."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "streamline_hooks"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(CURVES), figsize=(12.8, 3.4), layout="constrained")
    for ax, (curve, points) in zip(axes, CURVES.items(), strict=True):
        measured_points = [
            (place_of(curve, p), content["points"][p.name]) for p in points if p.name in content["points"]
        ]
        for key, label in (("started", "fitted"), ("trained", "trained")):
            style = "o" if curve == "kind" else "o-"  # kinds have no order
            ax.plot(
                [place for place, _ in measured_points], [row[key] for _, row in measured_points], style, label=label
            )
        ax.set_xlabel(LABELS[curve])
        plt.setp(ax.get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("mean perplexity ratio")
    axes[0].legend(frameon=False)
    figure.savefig(ROOT / "docs" / "images" / "curves.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()

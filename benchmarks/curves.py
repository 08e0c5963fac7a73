"""The curves that LLM-Streamline's paper studies, on SmolLM2-135M-Instruct.

    python -m benchmarks.curves [--data FOLDER] [--curves kind,networks,tokens,fraction]

One thing is changed at a time: the kind of network, the number of networks, the tokens that it is trained on, the
fraction of the blocks that is removed. The rest is a SwiGLU in the place of eight blocks, trained by KL on 100,000
tokens, seen once, with products in bfloat16, as in `benchmarks.quality`. What is removed is chosen for each point by
the verified shortlist on training text. Scores are mean perplexity ratios over the five held-out domains. A point goes
to ``benchmarks/results/curves.json`` when it is done; the table to ``benchmarks/results/curves.md``, the plot to
``docs/curves.svg``. All points take about two hours on two cores.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import OURS
from benchmarks.quality_scores import Quality, write
from benchmarks.real_text import BATCH, RESULTS, ROOT, arguments
from benchmarks.training_text import training_text
from streamline_hooks import (
    BlockConfig,
    DisjointSearch,
    HardwareConfig,
    LinearConfig,
    MLPConfig,
    ReplacementConfig,
    SearchConfig,
    SilencedConfig,
    SwiGLUConfig,
    WindowSearch,
    perplexity,
    profile,
    student_of,
    train,
    verified,
)
from streamline_hooks.batch import batches_of
from streamline_hooks.preparation import held_out_apart
from streamline_hooks.pretrained import load_pretrained
from streamline_hooks.selection import windows
from streamline_hooks.stack import find_stack

FILE = RESULTS / "curves.json"
MOST, CHOOSING, SHORTLIST = 1_000_000, 40_960, 4  # tokens at most, tokens to choose on, selections that are repaired


@dataclass(frozen=True)
class Point:
    """What is compressed how."""

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
    "kind": "kind of network",
    "networks": "number of networks",
    "tokens": "training tokens",
    "fraction": "fraction of blocks removed",
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
    """The model twice, once to be changed, the text, and the points so far."""

    def __init__(self, data: Path) -> None:
        original, tokenizer = load_pretrained("smollm2")
        self.quality = Quality(original, tokenizer, data, tasks=())
        self.model = load_pretrained("smollm2")[0]
        self.stack = find_stack(self.model)
        self.text = training_text(data, tokenizer, MOST)
        self.validation = batches_of(self.text.validation, 2)
        self.content: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"points": {}}
        self.content["command"] = "python -m benchmarks.curves"
        rows = self.text.train[: CHOOSING // self.text.train.shape[1]]
        self.profile = profile(self.model, batches_of(rows, BATCH))

    def measure(self, point: Point) -> None:
        """Choose, fit, train and score, unless that is done."""
        if point.name in self.content["points"]:
            return
        started = time.time()
        rows = self.text.train[: point.tokens // self.text.train.shape[1]]
        chosen = self.chosen(point, rows[: CHOOSING // rows.shape[1]])
        pairs = [(repair.window, repair.stand_in) for repair in chosen.repairs]
        file = ROOT / "build" / "curves" / f"{point.name.replace('/', '-')}.training"
        student = student_of(self.stack, pairs)
        with student.opened():
            before = self.score()
        trained = train(
            student,
            batches_of(rows, 1),
            self.validation,
            OURS,
            resume=file.exists(),
            say=print,
            checkpoint=file,
            hardware=HardwareConfig(autocast="bfloat16", state_memory=2**34),
        )
        if trained.stopped:
            raise SystemExit(f"{point.name} was not trained to its end: {trained.stopped}. Run it again to go on.")
        student.merge()
        student.training = False
        with student.opened():
            after = self.score()
        self.content["points"][point.name] = {
            "kind": str(point.repair),
            "networks": point.networks,
            "tokens": point.tokens,
            "removed": point.removed,
            "gone": chosen.gone,
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
        """What is removed, and what stands in its place to begin with."""
        length, slots = len(self.stack), point.repair.slots
        size = point.removed + slots * point.networks
        search: SearchConfig = WindowSearch(shortlist=SHORTLIST)
        if point.networks > 1:
            search = DisjointSearch(shortlist=SHORTLIST, windows=point.networks)
        shortlist = search.find(search.problem(windows(length, size), length, profile=self.profile))
        parts = [*(batches_of(part, BATCH) for part in held_out_apart(rows)), self.validation]
        with torch.autocast("cpu", torch.bfloat16):
            return verified(self.model, shortlist, *parts, replacement=point.repair)[0]

    def score(self) -> float:
        """The mean perplexity ratio of the model as it is now."""
        value = {name: perplexity(self.model, batches, name).value for name, batches in self.quality.text.items()}
        return statistics.fmean(value[name] / original for name, original in self.quality.scores.perplexity.items())


def table(content: dict[str, Any]) -> str:
    """The points as Markdown, a table a curve."""
    lines = [
        "SmolLM2-135M-Instruct: mean perplexity ratio to the original over five held-out domains, as the closed form "
        "starts and after training by KL. What is not named is a SwiGLU for 8 of 30 blocks, and 100,000 tokens seen "
        "once. A stand-in that is a block gives up one block more. Minutes: choosing, fitting, training and scoring, "
        "beside whatever else the machine did.",
    ]
    for curve, points in CURVES.items():
        rows = [(point, content["points"][point.name]) for point in points if point.name in content["points"]]
        lines += ["", f"| {LABELS[curve]} | blocks gone | started | trained | parameters added | minutes |"]
        lines.append("|---" * 6 + "|")
        for point, row in rows:
            lines.append(
                f"| {place_of(curve, point)} | {row['gone']} | {row['started']:.3f} | **{row['trained']:.3f}** | "
                f"{row['added'] / 1e6:.2f} M for {row['parameters_gone'] / 1e6:.1f} M | {row['minutes']:.0f} |"
            )
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


def place_of(curve: str, point: Point) -> str:
    """Where a point stands on a curve's axis, in words."""
    named = {"kind": str(point.repair), "networks": point.networks, "tokens": f"{point.tokens:,}"}
    return str(named.get(curve, f"{point.removed / 30:.1f}"))


def plot(content: dict[str, Any]) -> None:
    """The four curves beside each other."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "streamline_hooks"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(CURVES), figsize=(12.8, 3.4), layout="constrained")
    for ax, (curve, points) in zip(axes, CURVES.items(), strict=True):
        found = [(place_of(curve, p), content["points"][p.name]) for p in points if p.name in content["points"]]
        for label in ("started", "trained"):
            style = "o" if curve == "kind" else "o-"  # kinds have no order
            ax.plot([place for place, _ in found], [row[label] for _, row in found], style, label=label)
        ax.set_xlabel(LABELS[curve])
        plt.setp(ax.get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("mean perplexity ratio")
    axes[0].legend(frameon=False)
    figure.savefig(ROOT / "docs" / "curves.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()

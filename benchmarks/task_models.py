"""Remove blocks from a text encoder, a vision encoder and a classifier, with and without repair.

    python -m benchmarks.task_models [--data FOLDER] [--models minilm,dinov2,small_vit]

- MiniLM (6 blocks) embeds the halves of held-out documents. Scores: rank correlation of all pairwise similarities with
  those of the original, and recall@1 of the second half of a document by its first half.
- DINOv2-small (12 blocks) embeds Fashion-MNIST. Scores: accuracy of a refitted linear probe and of the probe of the
  original, and cosine similarity to the original.
- A small ViT (8 blocks, `benchmarks.small_vit`) classifies Fashion-MNIST. Scores: accuracy and agreement.

Windows are chosen by the verified shortlist, and replacements fitted and trained, on training text and images without
labels. Training uses bfloat16 autocast. Each row is saved to ``benchmarks/results/task_models.json`` when it is
finished, the table to ``task_models.md`` and the influence of each block to ``docs/images/influence.svg``. All rows
take about half an hour on two cores.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.images import dinov2_pixels, fashion_mnist, image_batches, small_pixels
from benchmarks.pretrained_encoders import load_dinov2, load_minilm
from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, ROOT, arguments
from streamline_hooks import (
    DistillationConfig,
    LinearConfig,
    SwiGLUConfig,
    find_stack,
    profile,
    train,
    verify_shortlist,
)
from streamline_hooks.core import HardwareConfig
from streamline_hooks.data import BatchSplit, read_documents, text_parts
from streamline_hooks.distillation import Objective, student_of
from streamline_hooks.evaluation import TaskScores, compare_embeddings, embeddings, recall_at
from streamline_hooks.modeling import Task
from streamline_hooks.repair import NoneConfig, ReplacementConfig
from streamline_hooks.selection import WindowSearch, windows_of_size

FILE, PICTURE = RESULTS / "task_models.json", ROOT / "docs" / "images" / "influence.svg"
SMALL_VIT = ROOT / "build" / "small_vit"
SHORTLIST, BATCH, LONGEST = 6, 16, 256
TOKENS = {"calibration": 120_000, "validation": 8_192, "test": 128}  # the test part is not scored
IMAGES = {"calibration": 1_500, "validation": 300}
PROBED = 2_000  # training images of the linear probes
RECIPES: dict[str, tuple[ReplacementConfig, bool]] = {
    "removed": (NoneConfig(), False),
    "linear": (LinearConfig(), False),
    "linear, trained": (LinearConfig(), True),
    "SwiGLU, trained": (SwiGLUConfig(), True),
}
"""The replacement, and whether it is trained. A SwiGLU has 4/3 of the width of the model; see `sized`."""


@dataclass(frozen=True)
class Subject:
    """A model with its calibration data and its scores.

    Attributes
    ----------
    name : str
    model : torch.nn.Module
    task : Task
    parts : BatchSplit
    scores : callable
        Returns the scores of the model in its present state, by measure.
    removed : tuple of int
        Numbers of blocks to remove.
    objective : Objective
    epochs : int
    """

    name: str
    model: Any
    task: Task
    parts: BatchSplit
    scores: Callable[[], dict[str, float]]
    removed: tuple[int, ...]
    objective: Objective
    epochs: int


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", default=",".join(SUBJECTS))
    options = parser.parse_args()
    content: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    content["command"] = "python -m benchmarks.task_models"
    for name in options.models.split(","):
        measure(SUBJECTS[name](options.data), content)
    print(table(content))


def measure(subject: Subject, content: dict[str, Any], file: Path = FILE, picture: Path | None = PICTURE) -> None:
    """Make the missing rows of a model."""
    results = content.setdefault(subject.name, {"rows": {}})
    stack, rows = find_stack(subject.model), results["rows"]
    measured = profile(subject.model, subject.parts.calibration)
    results["blocks"] = len(stack)
    results["parameters"] = sum(p.numel() for p in subject.model.parameters())
    results["data"] = subject.parts.report()
    results["influence"] = [1.0 - measured.value("cosine", range(k, k + 1)) for k in range(len(stack))]
    if "original" not in rows:
        rows["original"] = {"removed": "", **subject.scores()}
    for count in subject.removed:
        for name, (repair, trained) in RECIPES.items():
            label = f"{count} {name}"
            if label in rows:
                continue
            rows[label] = row(subject, measured, count, sized(repair, subject.model), trained)
            print(subject.name, label, rows[label], flush=True)
            write(file, content)
            file.with_suffix(".md").write_text(table(content))
    write(file, content)
    if picture is not None:
        plot(content, picture)


def sized(repair: ReplacementConfig, model: Any) -> ReplacementConfig:
    """Return the config; limit a SwiGLU to less than half of the parameters of a block."""
    return replace(repair, width=4 * model.config.hidden_size // 3) if isinstance(repair, SwiGLUConfig) else repair


def row(subject: Subject, measured: Any, count: int, repair: ReplacementConfig, trained: bool) -> dict[str, Any]:
    """Choose a window, fit and train its replacement, and score the model."""
    started, stack = time.perf_counter(), find_stack(subject.model)
    search = WindowSearch(shortlist=SHORTLIST)
    shortlist = search.find(search.problem(windows_of_size(len(stack), count), len(stack), profile=measured))
    fit, held_out = subject.parts.fitting_and_held_out
    parts = fit, held_out, subject.parts.validation
    best = verify_shortlist(subject.model, shortlist, *parts, replacement=repair, task=subject.task)[0]
    pairs = [(fitted.window, fitted.replacement_module) for fitted in best.repairs] or [(best.windows[0], None)]
    student = student_of(stack, pairs, task=subject.task)
    scores: dict[str, Any] = {"removed": best.blocks_text, "kind": str(repair), "distance": best.distance}
    if trained:
        settings = DistillationConfig(
            subject.objective.weights, epochs=subject.epochs, learning_rate=1e-3, validations=6
        )
        training = train(
            student,
            subject.parts.calibration,
            subject.parts.validation,
            settings,
            hardware=HardwareConfig(autocast="bfloat16"),
        )
        if training.stopped:
            raise SystemExit(f"{subject.name}: training stopped early: {training.stopped}. Run the command again.")
        scores["distance"] = training.distance
        student.merge()
    scores["minutes"] = (time.perf_counter() - started) / 60
    removed_parameters = sum(stack.parameters_per_block[k] for k in best.windows[0])
    scores["parameters"] = removed_parameters - repair.size(stack, best.windows[0]).parameters
    student.training = False
    with student.applied():
        return scores | subject.scores()


def minilm(data: Path) -> Subject:
    """Return the sentence encoder, calibrated on training text and scored on halves of held-out documents."""
    model, tokenizer = load_minilm()
    texts = text_parts(
        read_documents(data / "text" / "train"), tokenizer, TOKENS, sequence_length=128, batch_size=BATCH
    )
    halves = [half for text in read_documents(data / "text" / "heldout") for half in split_in_two(text)]
    batches = [
        dict(tokenizer(halves[k : k + BATCH], truncation=True, max_length=LONGEST, padding=True, return_tensors="pt"))
        for k in range(0, len(halves), BATCH)
    ]
    task = Task("embedding")
    original = embeddings(model, batches, task=task, desc="original")

    def scores() -> dict[str, float]:
        rows = embeddings(model, batches, task=task)
        similarity = compare_embeddings(original, rows)
        recall = recall_at(rows[0::2], rows[1::2])
        return {
            "spearman": similarity.spearman,
            "cosine": similarity.cosine,
            "recall@1": recall,
            "documents": len(rows) / 2,
        }

    parts = BatchSplit.of(texts, task)
    return Subject("minilm", model, task, parts, scores, (1, 2), Objective({"relative": 1.0, "embedding": 1.0}), 3)


def split_in_two(text: str) -> tuple[str, str]:
    """Split a text into halves between two words."""
    words = text.split()
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def dinov2(data: Path) -> Subject:
    """Return the vision encoder, calibrated on unlabeled training images and scored by linear probes."""
    images, labels, test_images, test_labels = fashion_mnist(data)
    model, task = load_dinov2(), Task("embedding")
    probed, tested = (batches_of_images(part, dinov2_pixels) for part in (images[-PROBED:], test_images))
    known, wanted = labels[-PROBED:], test_labels
    original = embeddings(model, tested, task=task, desc="original")
    original_probe = linear_probe(embeddings(model, probed, task=task, desc="original"), known)

    def scores() -> dict[str, float]:
        rows = embeddings(model, tested, task=task)
        refitted = linear_probe(embeddings(model, probed, task=task), known)
        similarity = compare_embeddings(original, rows)
        return {
            "probe": accuracy(refitted(rows), wanted),
            "original's probe": accuracy(original_probe(rows), wanted),
            "cosine": similarity.cosine,
            "spearman": similarity.spearman,
        }

    parts = parts_of(images, dinov2_pixels, task)
    return Subject("dinov2", model, task, parts, scores, (2, 3), Objective({"relative": 1.0, "embedding": 1.0}), 4)


def small_vit(data: Path) -> Subject:
    """Return the classifier, calibrated on unlabeled training images and scored on test images."""
    from transformers import AutoModelForImageClassification

    if not (SMALL_VIT / "config.json").is_file():
        raise SystemExit(f"There is no model in {SMALL_VIT}. Train it with `python -m benchmarks.small_vit`.")
    model = AutoModelForImageClassification.from_pretrained(SMALL_VIT, local_files_only=True).eval()
    images, _, test_images, test_labels = fashion_mnist(data)
    task = Task("image-classification")
    board = TaskScores(model, batches_of_images(test_images, small_pixels, test_labels), task)
    return Subject(
        "small_vit",
        model,
        task,
        parts_of(images, small_pixels, task),
        partial(board.of, model),
        (2, 3),
        Objective({"kl": 1.0}),
        8,
    )


SUBJECTS: dict[str, Callable[[Path], Subject]] = {"minilm": minilm, "dinov2": dinov2, "small_vit": small_vit}


def batches_of_images(
    images: Tensor, pixels: Callable[[Tensor], Tensor], labels: Tensor | None = None
) -> list[dict[str, Tensor]]:
    return image_batches(pixels(images), BATCH * 2, labels)


def parts_of(images: Tensor, pixels: Callable[[Tensor], Tensor], task: Task) -> BatchSplit:
    """Return the first training images as calibration and validation parts; the test part is a dummy."""
    ends = [0, IMAGES["calibration"], sum(IMAGES.values()), sum(IMAGES.values()) + 1]
    names = ("calibration", "validation", "test")
    parts = {
        name: batches_of_images(images[start:stop], pixels)
        for name, start, stop in zip(names, ends[:-1], ends[1:], strict=True)
    }
    return BatchSplit.of(parts, task)


def linear_probe(rows: Tensor, labels: Tensor, ridge: float = 1e-3) -> Callable[[Tensor], Tensor]:
    """Fit a linear probe on standardized embeddings by ridge regression on one-hot labels."""
    mean, deviation = rows.double().mean(0), rows.double().std(0).clamp_min(1e-6)
    x = torch.cat([(rows.double() - mean) / deviation, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    wanted = torch.nn.functional.one_hot(labels).double()
    weights = torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=torch.float64), x.T @ wanted)

    def probe(others: Tensor) -> Tensor:
        return torch.cat([(others.double() - mean) / deviation, torch.ones(len(others), 1)], dim=1) @ weights

    return probe


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=-1) == labels).double().mean())


TITLES = {
    "minilm": "all-MiniLM-L6-v2, 6 blocks: halves of {documents:.0f} held-out documents",
    "dinov2": "DINOv2-small, 12 blocks: 2,000 test images of Fashion-MNIST, probes fitted on 2,000 training images",
    "small_vit": "A ViT of 8 blocks trained on Fashion-MNIST: 2,000 test images",
}
NAMES = {"minilm": "all-MiniLM-L6-v2", "dinov2": "DINOv2-small", "small_vit": "small ViT, on Fashion-MNIST"}
WORDS = {
    "spearman": "Spearman of similarities",
    "cosine": "cosine to the original",
    "recall@1": "recall@1",
    "probe": "linear probe",
    "original's probe": "probe of the original",
    "accuracy": "accuracy",
    "top1": "top-1 agreement",
    "kl": "KL",
}


def table(content: dict[str, Any]) -> str:
    """Return the rows as Markdown, one table per model."""
    lines: list[str] = []
    for name, title in TITLES.items():
        rows = content.get(name, {}).get("rows", {})
        if "original" not in rows:
            continue
        measures = [measure for measure in WORDS if measure in rows["original"]]
        data = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in content[name]["data"].items()
                         if isinstance(value, int) and not key.startswith("test"))  # fmt: skip
        lines += [f"{title.format(**rows['original'])} (calibrated without labels: {data}; seed 0, CPU).", ""]
        lines.append(
            "| blocks, replacement | blocks removed | parameters removed | "
            + " | ".join(WORDS[m] for m in measures)
            + " | minutes |"
        )
        lines.append("|---" * (len(measures) + 4) + "|")
        for label, row in rows.items():
            fewer = f"{row['parameters'] / content[name]['parameters']:.1%}" if "parameters" in row else ""
            minutes = f"{row['minutes']:.1f}" if "minutes" in row else ""
            cells = [f"{row[measure]:.3f}" for measure in measures]
            lines.append(f"| {label} | {row['removed']} | {fewer} | {' | '.join(cells)} | {minutes} |")
        lines.append("")
    return "\n".join([*lines, f"Made by `{content['command']}`.", ""])


def plot(content: dict[str, Any], file: Path) -> None:
    """Plot the influence of each block: 1 - cosine of its input and output."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "streamline_hooks"
    from matplotlib import pyplot as plt

    shown = [name for name in TITLES if "influence" in content.get(name, {})]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 2.8), layout="constrained", squeeze=False)
    for ax, name in zip(axes[0], shown, strict=True):
        values: Sequence[float] = content[name]["influence"]
        ax.bar(range(len(values)), values)
        ax.set_title(NAMES[name])
        ax.set_xlabel("block")
        ax.set_xticks(range(len(values)))
        ax.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("block influence (1 - cosine)")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()

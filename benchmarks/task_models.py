"""Blocks removed from a text encoder, a vision encoder and a classifier, with and without repair.

    python -m benchmarks.task_models [--data FOLDER] [--models minilm,dinov2,small_vit]

MiniLM (6 blocks) embeds the halves of each held-out document: how much the similarities of all pairs are still ranked
as the original ranks them, and how often the second half of a document is found by its first. DINOv2-small (12 blocks)
embeds Fashion-MNIST: how well a linear probe tells the classes, one fitted anew and the original's own, and the cosine
to the original. The small ViT (8 blocks, `benchmarks.small_vit`) classifies it: accuracy and agreement. Windows are
chosen, stand-ins fitted and trained on training text and images alone, without labels, by the verified shortlist; what
is scored was seen by nothing before. Where something is trained, products are in bfloat16. A row goes to
``benchmarks/results/task_models.json`` when it is done, the table to ``task_models.md``, the influence of each block to
``docs/influence.svg``. All of it takes about half an hour on two cores.
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
    HardwareConfig,
    LinearConfig,
    NoneConfig,
    Objective,
    ReplacementConfig,
    SwiGLUConfig,
    Task,
    TaskScores,
    WindowSearch,
    embeddings,
    find_stack,
    profile,
    recall_at,
    student_of,
    train,
    verified,
)
from streamline_hooks.batch_split import BatchSplit
from streamline_hooks.calibration import read_documents, text_parts
from streamline_hooks.evaluation import likeness_of
from streamline_hooks.selection import windows

FILE, PICTURE = RESULTS / "task_models.json", ROOT / "docs" / "influence.svg"
SMALL_VIT = ROOT / "build" / "small_vit"
SHORTLIST, BATCH, LONGEST = 6, 16, 256
TOKENS = {"calibration": 120_000, "validation": 8_192, "test": 128}  # nothing is scored on the last part
IMAGES = {"calibration": 1_500, "validation": 300}
PROBED = 2_000  # training images that a linear probe is fitted on
RECIPES: dict[str, tuple[ReplacementConfig, bool]] = {
    "removed": (NoneConfig(), False),
    "linear": (LinearConfig(), False),
    "linear, trained": (LinearConfig(), True),
    "SwiGLU, trained": (SwiGLUConfig(), True),
}
"""The replacement, and whether it is trained. A SwiGLU is made four thirds as wide as the model, see `sized`."""


@dataclass(frozen=True)
class Subject:
    """A model, what it is calibrated on, and how it is scored.

    Attributes
    ----------
    name : str
    model : torch.nn.Module
    task : Task
    parts : BatchSplit
    scores : callable
        What the model reaches as it is now, by measure.
    removed : tuple of int
        How many blocks go.
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
    """Make the rows of a model that are not there yet."""
    said = content.setdefault(subject.name, {"rows": {}})
    stack, rows = find_stack(subject.model), said["rows"]
    measured = profile(subject.model, subject.parts.calibration)
    said["blocks"] = len(stack)
    said["parameters"] = sum(p.numel() for p in subject.model.parameters())
    said["data"] = subject.parts.figures()
    said["influence"] = [1.0 - measured.value("cosine", range(k, k + 1)) for k in range(len(stack))]
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
    """Return the config; a SwiGLU is given a width at which it has less than half of the parameters of a block."""
    return replace(repair, width=4 * model.config.hidden_size // 3) if isinstance(repair, SwiGLUConfig) else repair


def row(subject: Subject, measured: Any, count: int, repair: ReplacementConfig, trained: bool) -> dict[str, Any]:
    """Choose, fit and train, and score the result."""
    started, stack = time.perf_counter(), find_stack(subject.model)
    search = WindowSearch(shortlist=SHORTLIST)
    shortlist = search.find(search.problem(windows(len(stack), count), len(stack), profile=measured))
    fit, held_out = subject.parts.held_out_apart
    parts = fit, held_out, subject.parts.validation
    best = verified(subject.model, shortlist, *parts, replacement=repair, task=subject.task)[0]
    pairs = [(fitted.window, fitted.stand_in) for fitted in best.repairs] or [(best.windows[0], None)]
    student = student_of(stack, pairs, task=subject.task)
    found: dict[str, Any] = {"removed": best.gone, "kind": str(repair), "distance": best.distance}
    if trained:
        settings = DistillationConfig(
            subject.objective.weights, epochs=subject.epochs, learning_rate=1e-3, validations=6
        )
        course = train(
            student,
            subject.parts.calibration,
            subject.parts.validation,
            settings,
            say=print,
            hardware=HardwareConfig(autocast="bfloat16"),
        )
        if course.stopped:
            raise SystemExit(f"{subject.name} was not trained to its end: {course.stopped}. Run it again.")
        found["distance"] = course.distance
        student.merge()
    found["minutes"] = (time.perf_counter() - started) / 60
    gone = sum(stack.parameters_per_block[k] for k in best.windows[0])
    found["parameters"] = gone - repair.size(stack, best.windows[0]).parameters
    student.training = False
    with student.opened():
        return found | subject.scores()


def minilm(data: Path) -> Subject:
    """The sentence encoder, on the training texts; scored by the halves of the held-out documents."""
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
    original = embeddings(model, batches, task=task, what="original")

    def scores() -> dict[str, float]:
        rows = embeddings(model, batches, task=task)
        alike = likeness_of(original, rows)
        found = recall_at(rows[0::2], rows[1::2])
        return {"spearman": alike.spearman, "cosine": alike.cosine, "recall@1": found, "documents": len(rows) / 2}

    parts = BatchSplit.of(texts, task)
    return Subject("minilm", model, task, parts, scores, (1, 2), Objective({"relative": 1.0, "embedding": 1.0}), 3)


def split_in_two(text: str) -> tuple[str, str]:
    """The halves of a text, cut between two words."""
    words = text.split()
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def dinov2(data: Path) -> Subject:
    """The vision encoder, on training images without labels; scored by linear probes."""
    images, labels, test_images, test_labels = fashion_mnist(data)
    model, task = load_dinov2(), Task("embedding")
    probed, tested = (batches_of_images(some, dinov2_pixels) for some in (images[-PROBED:], test_images))
    known, wanted = labels[-PROBED:], test_labels
    original = embeddings(model, tested, task=task, what="original")
    own = linear_probe(embeddings(model, probed, task=task, what="original"), known)

    def scores() -> dict[str, float]:
        rows = embeddings(model, tested, task=task)
        anew = linear_probe(embeddings(model, probed, task=task), known)
        alike = likeness_of(original, rows)
        return {
            "probe": accuracy(anew(rows), wanted),
            "original's probe": accuracy(own(rows), wanted),
            "cosine": alike.cosine,
            "spearman": alike.spearman,
        }

    parts = parts_of(images, dinov2_pixels, task)
    return Subject("dinov2", model, task, parts, scores, (2, 3), Objective({"relative": 1.0, "embedding": 1.0}), 4)


def small_vit(data: Path) -> Subject:
    """The classifier, on its training images without labels; scored on the test images."""
    from transformers import AutoModelForImageClassification

    if not (SMALL_VIT / "config.json").is_file():
        raise SystemExit(f"There is no model in {SMALL_VIT}; train it first: python -m benchmarks.small_vit")
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
    """The first training images, in order; a few of the next stand for a test part, on which nothing is scored."""
    ends = [0, IMAGES["calibration"], sum(IMAGES.values()), sum(IMAGES.values()) + 1]
    names = ("calibration", "validation", "test")
    parts = {
        name: batches_of_images(images[start:stop], pixels)
        for name, start, stop in zip(names, ends[:-1], ends[1:], strict=True)
    }
    return BatchSplit.of(parts, task)


def linear_probe(rows: Tensor, labels: Tensor, ridge: float = 1e-3) -> Callable[[Tensor], Tensor]:
    """Scores of the classes that are linear in standardised embeddings, by ridge regression on one-hot labels."""
    mean, deviation = rows.double().mean(0), rows.double().std(0).clamp_min(1e-6)
    x = torch.cat([(rows.double() - mean) / deviation, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    wanted = torch.nn.functional.one_hot(labels).double()
    weights = torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=torch.float64), x.T @ wanted)

    def probe(others: Tensor) -> Tensor:
        return torch.cat([(others.double() - mean) / deviation, torch.ones(len(others), 1)], dim=1) @ weights

    return probe


def accuracy(said: Tensor, labels: Tensor) -> float:
    return float((said.argmax(dim=-1) == labels).double().mean())


TITLES = {
    "minilm": "all-MiniLM-L6-v2, 6 blocks: the halves of {documents:.0f} held-out documents",
    "dinov2": "DINOv2-small, 12 blocks: 2,000 test images of Fashion-MNIST, probes fitted on 2,000 training images",
    "small_vit": "A ViT of 8 blocks trained on Fashion-MNIST: 2,000 test images",
}
NAMES = {"minilm": "all-MiniLM-L6-v2", "dinov2": "DINOv2-small", "small_vit": "small ViT, on Fashion-MNIST"}
WORDS = {
    "spearman": "Spearman of similarities",
    "cosine": "cosine to the original",
    "recall@1": "recall@1",
    "probe": "linear probe",
    "original's probe": "the original's probe",
    "accuracy": "accuracy",
    "top1": "same class as the original",
    "kl": "KL",
}


def table(content: dict[str, Any]) -> str:
    """The rows as Markdown, a table a model."""
    lines: list[str] = []
    for name, title in TITLES.items():
        rows = content.get(name, {}).get("rows", {})
        if "original" not in rows:
            continue
        measures = [measure for measure in WORDS if measure in rows["original"]]
        data = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in content[name]["data"].items()
                         if isinstance(value, int) and not key.startswith("test"))  # fmt: skip
        lines += [f"{title.format(**rows['original'])} (without labels: {data}).", ""]
        lines.append(
            "| | blocks removed | parameters fewer | " + " | ".join(WORDS[m] for m in measures) + " | minutes |"
        )
        lines.append("|---" * (len(measures) + 4) + "|")
        for label, found in rows.items():
            fewer = f"{found['parameters'] / content[name]['parameters']:.1%}" if "parameters" in found else ""
            minutes = f"{found['minutes']:.1f}" if "minutes" in found else ""
            cells = [f"{found[measure]:.3f}" for measure in measures]
            lines.append(f"| {label} | {found['removed']} | {fewer} | {' | '.join(cells)} | {minutes} |")
        lines.append("")
    return "\n".join([*lines, f"Made by `{content['command']}`.", ""])


def plot(content: dict[str, Any], file: Path) -> None:
    """The influence of each block, 1 - the cosine of the states before and after it, by depth."""
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

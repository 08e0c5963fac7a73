"""Train a small ViT from scratch on Fashion-MNIST, as a classifier for `benchmarks.task_models`.

    python -m benchmarks.small_vit [--data FOLDER] [--threads N] [--anew] [--validate]

The 10,000 training images are augmented by flips, shifts and erased rectangles. Muon optimizes the matrices of the
blocks, AdamW the other parameters. Training needs PyTorch 2.9 or newer (for Muon) and takes about six minutes on an
idle core. A checkpoint is saved every minute, and an interrupted run is resumed. The model is saved to
``build/small_vit``, its accuracy on the 2,000 test images to ``benchmarks/results/small_vit.json``. Sizes and schedule
were chosen with ``--validate``, which trains on the first 9,000 images and scores the last 1,000.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.images import MEAN, fashion_mnist, image_batches, small_pixels
from benchmarks.real_text import RESULTS, ROOT, arguments
from benchmarks.timing import machine
from streamline_hooks.core import progress_bar

FOLDER = ROOT / "build" / "small_vit"
FILE = RESULTS / "small_vit.json"
WANTED = 0.88
VALIDATION = 1_000  # number of training images for --validate, the last ones
SECONDS_BETWEEN_CHECKPOINTS = 60.0
SIDE = 28
LAST_OF_BRANCH = ("o_proj.weight", "fc2.weight", "output.dense.weight")  # names in Transformers 5 and 4
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@dataclass(frozen=True)
class Recipe:
    """Sizes, augmentation and schedule: linear warm-up and cosine decay to zero of both learning rates."""

    width: int = 128
    blocks: int = 8
    heads: int = 4
    mlp: int = 256
    patch: int = 7
    batch: int = 128
    epochs: int = 30
    rate: float = 2e-3  # learning rate of AdamW
    muon_rate: float = 2e-2
    warmup: int = 100  # steps
    decay: float = 0.05
    smoothing: float = 0.1
    shift: int = 1  # largest shift in pixels
    erased: float = 0.25  # probability that a rectangle of an image is erased
    seed: int = 0

    def share_at(self, step: int, steps: int) -> float:
        """Return the factor of the learning rates at a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return 0.5 * (1.0 + math.cos(math.pi * done))


def new_model(recipe: Recipe) -> Any:
    """Return a ViT with random weights whose residual branches are initialized to zero."""
    config = transformers.ViTConfig(
        hidden_size=recipe.width,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.mlp,
        image_size=SIDE,
        patch_size=recipe.patch,
        num_channels=1,
        initializer_range=recipe.width**-0.5,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: k for k, name in enumerate(CLASSES)},
        attn_implementation="eager",  # at these sizes the fused kernel is slower on a CPU
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = transformers.ViTForImageClassification(config)
    for name, weight in model.named_parameters():
        if name.endswith(LAST_OF_BRANCH):
            torch.nn.init.zeros_(weight)
    return model


def augmented(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Augment images by random flips, shifts and erased rectangles.

    Parameters
    ----------
    images : torch.Tensor
        Images of shape (images, 28, 28), uint8.
    recipe : Recipe
    generator : torch.Generator

    Returns
    -------
    torch.Tensor
        Images of the same shape, uint8.
    """
    count, side, shift = len(images), images.shape[-1], recipe.shift

    def drawn(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (count, 1), generator=generator)

    places = torch.arange(side).expand(count, side)
    rows, columns = places + drawn(0, 2 * shift), places + drawn(0, 2 * shift)
    columns = torch.where(drawn(0, 1).bool(), columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (shift,) * 4)
    moved = padded[torch.arange(count).view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)]
    inside = []
    for _ in range(2):  # rows and columns of the rectangle, a seventh to a half of the image
        length = drawn(side // 7, side // 2)
        start = (torch.rand((count, 1), generator=generator) * (side - length + 1)).long()
        inside.append((places >= start) & (places < start + length))
    chosen = torch.rand((count, 1, 1), generator=generator) < recipe.erased
    gray = round(255 * MEAN)
    return moved.masked_fill(inside[0].unsqueeze(2) & inside[1].unsqueeze(1) & chosen, gray)


class Training:
    """A training run that resumes from its checkpoint.

    Parameters
    ----------
    recipe : Recipe
    images, labels : torch.Tensor
        Images of shape (images, 28, 28), uint8, and their class indices.
    checkpoint : Path
        File of the checkpoint. It must be of the same recipe, images and labels.
    """

    def __init__(self, recipe: Recipe, images: Tensor, labels: Tensor, checkpoint: Path) -> None:
        self.recipe, self.images, self.labels, self.checkpoint = recipe, images, labels, checkpoint
        self.steps = recipe.epochs * (len(images) // recipe.batch)
        if not self.steps:
            raise SystemExit(f"There are {len(images)} images. Expected at least one batch of {recipe.batch}.")
        self.model = new_model(recipe).train()
        self.optimizers = _optimizers(self.model, recipe)
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        content = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        self._identity = {**asdict(recipe), "images": content}
        if checkpoint.exists():
            self._go_on(torch.load(checkpoint, weights_only=True))

    def run(self, until: int | None = None) -> None:
        """Train up to a step, by default to the end."""
        until = self.steps if until is None else until
        saved = time.monotonic()
        with progress_bar(self.steps * self.recipe.batch, "small ViT", unit="img") as bar:
            bar.update(self.step * self.recipe.batch)
            while self.step < until:
                started = time.monotonic()
                self.losses.append(self._learn(*self.batch_of_step(self.step)))
                if not math.isfinite(self.losses[-1]):
                    raise SystemExit(f"The loss of step {self.step} is {self.losses[-1]}. Use a lower learning rate.")
                self.step += 1
                self.seconds += time.monotonic() - started
                bar.set_postfix(loss=f"{_mean(self.losses[-50:]):.3f}", refresh=False)
                bar.update(self.recipe.batch)
                if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def save(self) -> None:
        """Write the checkpoint atomically."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        half = self.checkpoint.with_suffix(".half")
        content = {
            "identity": self._identity,
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(content, half)
        os.replace(half, self.checkpoint)

    def _go_on(self, content: dict[str, Any]) -> None:
        if content["identity"] != self._identity:
            raise SystemExit(
                f"{self.checkpoint} was made with another recipe or images. Pass --anew to delete it and start again."
            )
        self.model.load_state_dict(content["model"])
        for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.seconds, self.losses = content["step"], content["seconds"], content["losses"]

    def batch_of_step(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the augmented images and labels of a step; an incomplete last batch is left out."""
        epoch, place = divmod(step, self.steps // self.recipe.epochs)
        order = torch.randperm(len(self.images), generator=self._generator(0, epoch))
        chosen = order[place * self.recipe.batch : (place + 1) * self.recipe.batch]
        changed = augmented(self.images[chosen], self.recipe, self._generator(1, step))
        return small_pixels(changed), self.labels[chosen]

    def _generator(self, purpose: int, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.recipe.seed * 2 + purpose) * 1_000_003 + number)

    def _learn(self, pixels: Tensor, labels: Tensor) -> float:
        share = self.recipe.share_at(self.step, self.steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(pixel_values=pixels).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * share
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())


@torch.no_grad()
def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy on images, in float32."""
    batches = image_batches(small_pixels(images), 250)
    guessed = torch.cat([model(**batch).logits.argmax(-1) for batch in batches])
    return float((guessed == labels).float().mean())


def load_small_vit(folder: Path = FOLDER) -> Any:
    """Load the trained model, in float32."""
    if not (folder / "config.json").exists():
        raise SystemExit(f"There is no model in {folder}. Train it with `python -m benchmarks.small_vit`.")
    return transformers.ViTForImageClassification.from_pretrained(folder).eval()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more than one hardly helps")
    parser.add_argument("--anew", action="store_true", help="delete the checkpoint and start again")
    parser.add_argument("--validate", action="store_true", help="score the last 1,000 training images instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, labels, test_images, test_labels = fashion_mnist(options.data)
    if options.validate:
        test_images, test_labels = images[-VALIDATION:], labels[-VALIDATION:]
        images, labels = images[:-VALIDATION], labels[:-VALIDATION]
    recipe, checkpoint = Recipe(), FOLDER / ("validation.pt" if options.validate else "training.pt")
    if options.anew:
        checkpoint.unlink(missing_ok=True)
    training = Training(recipe, images, labels, checkpoint)
    training.run()
    model = training.model.eval()
    reached = accuracy(model, test_images, test_labels)
    minutes = training.seconds / 60
    print(f"Accuracy {reached:.1%} on {len(test_labels)} images after {minutes:.1f} minutes.")
    if options.validate:
        return
    model.save_pretrained(FOLDER)
    row = {
        "command": "python -m benchmarks.small_vit",
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_images": len(images),
        "test_images": len(test_images),
        "training_seconds": round(training.seconds),
        "last_loss": _mean(training.losses[-50:]),
        "accuracy": reached,
        "machine": machine(),
    }
    FILE.write_text(json.dumps(row, indent=1) + "\n")
    if reached < WANTED:
        raise SystemExit(f"The accuracy is {reached:.1%}. Expected at least {WANTED:.0%}.")


def _optimizers(model: Any, recipe: Recipe) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for the other parameters."""
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit(f"PyTorch {torch.__version__} has no Muon optimizer. Install PyTorch 2.9 or newer.")
    matrices, others, vectors = [], [], []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and not name.startswith("classifier")
        (matrices if inside else vectors if parameter.ndim == 1 else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=recipe.decay)
    groups = [{"params": others, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.99), fused=True)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["full_rate"] = group["lr"]
    return muon, adamw


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()

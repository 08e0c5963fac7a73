"""A small ViT, trained from scratch on Fashion-MNIST: a classifier whose blocks can be removed in seconds.

    python -m benchmarks.small_vit [--data FOLDER] [--threads N] [--anew] [--validate]

Flips, shifts and erased rectangles make new images of the 10,000 in every epoch. Muon steps the matrices of the blocks,
AdamW the rest: about six minutes of a core that nobody else uses (and PyTorch 2.9 or newer, which has Muon). What was
reached is kept every minute, and a run that was interrupted goes on from there. The model goes to ``build/small_vit``;
its accuracy on the 2,000 test images, which chose nothing, to ``benchmarks/results/small_vit.json``. Sizes and schedule
were chosen with ``--validate``, which learns from the first 9,000 images and scores the last 1,000.
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
from streamline_hooks.passes import progress

FOLDER = ROOT / "build" / "small_vit"
FILE = RESULTS / "small_vit.json"
WANTED = 0.88
VALIDATION = 1_000  # of the training images, the last
SECONDS_BETWEEN_CHECKPOINTS = 60.0
SIDE = 28
LAST_OF_BRANCH = ("o_proj.weight", "fc2.weight", "output.dense.weight")  # by the names of Transformers 5, and of 4
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@dataclass(frozen=True)
class Recipe:
    """Sizes, augmentation and schedule: a linear warm-up, then a cosine down to nothing, of both optimizers' rates."""

    width: int = 128
    blocks: int = 8
    heads: int = 4
    mlp: int = 256
    patch: int = 7
    batch: int = 128
    epochs: int = 30
    rate: float = 2e-3  # of AdamW
    muon_rate: float = 2e-2
    warmup: int = 100  # steps
    decay: float = 0.05
    smoothing: float = 0.1
    shift: int = 1  # pixels, at most
    erased: float = 0.25  # the probability that an image loses a rectangle
    seed: int = 0

    def share_at(self, step: int, steps: int) -> float:
        """The share of the full rates that a step has, from 0, of so many."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return 0.5 * (1.0 + math.cos(math.pi * done))


def new_model(recipe: Recipe) -> Any:
    """A ViT with random weights, in which the branches add nothing yet."""
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
    """New images of given ones: mirrored, shifted, with a rectangle erased.

    Parameters
    ----------
    images : torch.Tensor
        Bytes of shape (images, 28, 28).
    recipe : Recipe
    generator : torch.Generator

    Returns
    -------
    torch.Tensor
        Bytes of the same shape.
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
    for _ in range(2):  # of a rectangle, from a seventh to a half as long as the image
        length = drawn(side // 7, side // 2)
        start = (torch.rand((count, 1), generator=generator) * (side - length + 1)).long()
        inside.append((places >= start) & (places < start + length))
    chosen = torch.rand((count, 1, 1), generator=generator) < recipe.erased
    grey = round(255 * MEAN)
    return moved.masked_fill(inside[0].unsqueeze(2) & inside[1].unsqueeze(1) & chosen, grey)


class Training:
    """A run that goes on where its checkpoint stands.

    Parameters
    ----------
    recipe : Recipe
    images, labels : torch.Tensor
        Bytes of shape (images, 28, 28) and the numbers of their classes.
    checkpoint : Path
        Of the same recipe, images and labels, or it is not gone on with.
    """

    def __init__(self, recipe: Recipe, images: Tensor, labels: Tensor, checkpoint: Path) -> None:
        self.recipe, self.images, self.labels, self.checkpoint = recipe, images, labels, checkpoint
        self.steps = recipe.epochs * (len(images) // recipe.batch)
        if not self.steps:
            raise SystemExit(f"There are {len(images)} images, fewer than one batch of {recipe.batch}.")
        self.model = new_model(recipe).train()
        self.optimizers = _optimizers(self.model, recipe)
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        content = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        self._identity = {**asdict(recipe), "images": content}
        if checkpoint.exists():
            self._go_on(torch.load(checkpoint, weights_only=True))

    def run(self, until: int | None = None) -> None:
        """Train up to a step, the last one by default."""
        until = self.steps if until is None else until
        saved = time.monotonic()
        with progress(self.steps * self.recipe.batch, "small ViT", unit="img") as bar:
            bar.update(self.step * self.recipe.batch)
            while self.step < until:
                started = time.monotonic()
                self.losses.append(self._learn(*self.batch_of_step(self.step)))
                if not math.isfinite(self.losses[-1]):
                    raise SystemExit(f"The loss of step {self.step} is {self.losses[-1]}; try a lower rate.")
                self.step += 1
                self.seconds += time.monotonic() - started
                bar.set_postfix(loss=f"{_mean(self.losses[-50:]):.3f}", refresh=False)
                bar.update(self.recipe.batch)
                if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
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
                f"{self.checkpoint} was made with another recipe or images; --anew deletes it and begins again."
            )
        self.model.load_state_dict(content["model"])
        for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.seconds, self.losses = content["step"], content["seconds"], content["losses"]

    def batch_of_step(self, step: int) -> tuple[Tensor, Tensor]:
        """The images of a step, changed, and their labels: each image once an epoch, but for what fills no batch."""
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
    """The share of images that are given the right class, in float32."""
    batches = image_batches(small_pixels(images), 250)
    guessed = torch.cat([model(**batch).logits.argmax(-1) for batch in batches])
    return float((guessed == labels).float().mean())


def load_small_vit(folder: Path = FOLDER) -> Any:
    """The trained model, in float32."""
    if not (folder / "config.json").exists():
        raise SystemExit(f"There is no model in {folder}; train it with `python -m benchmarks.small_vit`.")
    return transformers.ViTForImageClassification.from_pretrained(folder).eval()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1, help="the products are small: more hardly help")
    parser.add_argument("--anew", action="store_true", help="do not go on where a run stopped")
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
    print(f"{reached:.1%} of {len(test_labels)} images are given the right class, after {minutes:.1f} minutes.")
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
        raise SystemExit(f"Accuracy is {reached:.1%}; at least {WANTED:.0%} was to be reached.")


def _optimizers(model: Any, recipe: Recipe) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices of the blocks; AdamW for the embeddings and the head, and without decay for vectors."""
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit(f"This training needs PyTorch 2.9 or newer, for Muon; this is {torch.__version__}.")
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

"""Load Fashion-MNIST (10,000 training and 2,000 test images) as pixel values for vision models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE = Path("vision") / "fashion_mnist_subset.npz"
KEYS = ("x_train", "y_train", "x_test", "y_test")
MEAN, DEVIATION = 0.2860, 0.3530  # of the training images, scaled to 0 to 1
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # normalization of DINOv2
PATCH = 14  # of DINOv2


def fashion_mnist(data: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the training and test images with their class indices.

    Parameters
    ----------
    data : Path
        Folder with ``vision/fashion_mnist_subset.npz``.

    Returns
    -------
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
        Training images (images, 28, 28), uint8, their labels (images,), and the test images and labels.
    """
    path = Path(data) / FILE
    if not path.is_file():
        raise SystemExit(f"{path} does not exist. Expected Fashion-MNIST with the arrays {', '.join(KEYS)}.")
    with np.load(path) as arrays:
        missing = [key for key in KEYS if key not in arrays]
        if missing:
            raise SystemExit(f"{path} has no array {', '.join(missing)}. Its arrays are {', '.join(arrays)}.")
        images, labels, test_images, test_labels = (torch.from_numpy(arrays[key]) for key in KEYS)
    return images, labels.long(), test_images, test_labels.long()


def small_pixels(images: Tensor) -> Tensor:
    """Normalize images (images, 28, 28), uint8, to pixel values (images, 1, 28, 28)."""
    return ((images.float() / 255 - MEAN) / DEVIATION).unsqueeze(1)


def dinov2_pixels(images: Tensor, size: int = 56) -> Tensor:
    """Scale and normalize images (images, 28, 28), uint8, to pixel values (images, 3, size, size) of DINOv2.

    DINOv2 interpolates its position embeddings to this size.

    Parameters
    ----------
    images : torch.Tensor
    size : int
        Height and width in pixels, a multiple of 14, the patch size.
    """
    if size < PATCH or size % PATCH:
        raise ValueError(f"size={size} is invalid. Expected a multiple of {PATCH}, for example 56 or 70.")
    gray = images.float().unsqueeze(1) / 255
    scaled = torch.nn.functional.interpolate(gray, size=(size, size), mode="bicubic", align_corners=False)
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return (scaled.clamp(0.0, 1.0) - mean) / deviation


def image_batches(pixels: Tensor, size: int, labels: Tensor | None = None) -> list[dict[str, Tensor]]:
    """Split images into batches of keyword arguments for a model.

    Parameters
    ----------
    pixels : torch.Tensor
        From `small_pixels` or `dinov2_pixels`.
    size : int
        Images per batch; the last batch may be smaller.
    labels : torch.Tensor, optional
        Added to the batches as ``labels``.
    """
    batches = [{"pixel_values": part} for part in pixels.split(size)]
    if labels is not None:
        for batch, part in zip(batches, labels.split(size), strict=True):
            batch["labels"] = part
    return batches

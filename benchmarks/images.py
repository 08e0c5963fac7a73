"""Fashion-MNIST, of which 10,000 images train and 2,000 score, as the pixel values that a vision model takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE = Path("vision") / "fashion_mnist_subset.npz"
KEYS = ("x_train", "y_train", "x_test", "y_test")
MEAN, DEVIATION = 0.2860, 0.3530  # of the training images, as fractions of white
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what DINOv2 was trained with
PATCH = 14  # of DINOv2


def fashion_mnist(data: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The images and the numbers of their classes, of ten.

    Parameters
    ----------
    data : Path
        The folder that holds ``vision/fashion_mnist_subset.npz``.

    Returns
    -------
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
        Training images (images, 28, 28) of bytes, their labels (images,), and the same of the test.
    """
    path = Path(data) / FILE
    if not path.is_file():
        raise SystemExit(f"There are no images at {path}; expected Fashion-MNIST with the arrays {', '.join(KEYS)}.")
    with np.load(path) as arrays:
        missing = [key for key in KEYS if key not in arrays]
        if missing:
            raise SystemExit(f"{path} has no array {', '.join(missing)}; it holds {', '.join(arrays)}.")
        images, labels, test_images, test_labels = (torch.from_numpy(arrays[key]) for key in KEYS)
    return images, labels.long(), test_images, test_labels.long()


def small_pixels(images: Tensor) -> Tensor:
    """Of a model for these images: (images, 28, 28) of bytes become (images, 1, 28, 28), normalised."""
    return ((images.float() / 255 - MEAN) / DEVIATION).unsqueeze(1)


def dinov2_pixels(images: Tensor, size: int = 56) -> Tensor:
    """Of DINOv2: (images, 28, 28) of bytes become (images, 3, size, size), normalised as ImageNet is.

    DINOv2 itself interpolates its positions to the size.

    Parameters
    ----------
    images : torch.Tensor
    size : int
        A multiple of 14: a patch is as wide.
    """
    if size < PATCH or size % PATCH:
        raise ValueError(f"size is {size}; expected a multiple of {PATCH}, for example 56 or 70.")
    grey = images.float().unsqueeze(1) / 255
    scaled = torch.nn.functional.interpolate(grey, size=(size, size), mode="bicubic", align_corners=False)
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return (scaled.clamp(0.0, 1.0) - mean) / deviation


def image_batches(pixels: Tensor, size: int, labels: Tensor | None = None) -> list[dict[str, Tensor]]:
    """Cut images into batches, in order, as a model's forward takes them.

    Parameters
    ----------
    pixels : torch.Tensor
        From `small_pixels` or `dinov2_pixels`.
    size : int
        Images a batch; the last one may have fewer.
    labels : torch.Tensor, optional
        Go with them as ``labels``.
    """
    batches = [{"pixel_values": part} for part in pixels.split(size)]
    if labels is not None:
        for batch, part in zip(batches, labels.split(size), strict=True):
            batch["labels"] = part
    return batches

"""Images that a vision model is measured on: where each is, decoded when it is asked for."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from PIL.Image import Image

_DEEP = ("I", "F")  # what modes of more than 8 bits begin with


@dataclass(frozen=True)
class Picture:
    """One encoded image.

    Attributes
    ----------
    name : str
        What it is called in errors: a path, or a Parquet file and a row of it.
    content : Path or bytes
        The file it is in, or what would be in that file.
    """

    name: str
    content: Path | bytes


@dataclass(frozen=True, eq=False)
class Images:
    """Images in their order, each of which is decoded when it is asked for and not kept.

    Attributes
    ----------
    pictures : tuple of Picture
    labels : tuple of int, optional
        The class of each, where it is known.
    classes : tuple of str, optional
        The names of the classes, where they are known: ``classes[labels[0]]`` is that of the first image.

    Examples
    --------
    >>> from io import BytesIO
    >>> from PIL import Image
    >>> file = BytesIO()
    >>> Image.new("L", (4, 2), 255).save(file, format="PNG")
    >>> images = Images((Picture("white", file.getvalue()),), labels=(0,), classes=("blank",))
    >>> len(images), images[0].size, images[0].mode
    (1, (4, 2), 'RGB')
    """

    pictures: tuple[Picture, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> Image:
        return decoded(self.pictures[number])

    def __iter__(self) -> Iterator[Image]:
        return map(decoded, self.pictures)

    def some(self, numbers: Sequence[int]) -> Images:
        """Those of these numbers, in this order."""
        labels = None if self.labels is None else tuple(self.labels[number] for number in numbers)
        return Images(tuple(self.pictures[number] for number in numbers), labels, self.classes)


def decoded(picture: Picture) -> Image:
    """Decode an image, as upright as its camera says, of three channels of 8 bits.

    Raises
    ------
    StreamlineError
        If it cannot be decoded, or has more than 8 bits a channel; naming it.
    """
    pillow, operations = imported("PIL.Image"), imported("PIL.ImageOps")
    content = picture.content
    try:
        with pillow.open(BytesIO(content) if isinstance(content, bytes) else content) as opened:
            opened.load()
            upright = operations.exif_transpose(opened)
    except Exception as error:  # whatever the decoder of a broken file raises
        reason = f"{type(error).__name__}: {error}"
        raise StreamlineError(
            f"{picture.name} cannot be read as an image ({reason}). Expected a whole file of a kind that Pillow reads, "
            "such as JPEG or PNG. Write it again, or leave it out."
        ) from error
    if upright.mode.startswith(_DEEP):
        raise StreamlineError(
            f"{picture.name} has more than 8 bits a channel (mode {upright.mode}), and how bright its values are is "
            "not said. Expected 8 bits a channel. Scale it to 0..255 and write it again."
        )
    return upright.convert("RGB")


def content_of(image: Image) -> bytes:
    """32 bytes that tell a decoded image from any other: of its size and pixels, whatever file they are from."""
    return hashlib.blake2b(f"{image.mode} {image.size} ".encode() + image.tobytes(), digest_size=32).digest()


def imported(module: str) -> Any:
    """Import Pillow's modules, or say that it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise StreamlineError(
            "Images cannot be read: the package `pillow` is not installed. Install it: pip install pillow"
        ) from error

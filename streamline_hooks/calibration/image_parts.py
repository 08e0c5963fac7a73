"""Batches of images for a vision model, and parts of them that share no picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamline_hooks.calibration.dealing import check_batch_size, check_counts
from streamline_hooks.calibration.images import Images, Picture, content_of, decoded
from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers.image_processing_base import ImageProcessingMixin

    Processor = ImageProcessingMixin | Callable[[Image], Tensor]


def image_parts(
    images: Images,
    processor: Processor | None,
    counts: Mapping[str, int],
    *,
    batch_size: int = 8,
    seed: int = 0,
    name: str = "pixel_values",
) -> dict[str, list[dict[str, Tensor]]]:
    """Deal images to parts of which no two share a picture, and make batches of each.

    Images are compared by their pixels, so that a picture that is there twice, under another name, in another file or
    under another label, is used once. Where there are labels, the classes take turns for as long as they have images
    left, and each part has its share of what was drawn of a class; so another size of one part changes the others too.
    No more images are decoded than are used, and those that repeat one.

    Parameters
    ----------
    images : Images
        See `read_images`.
    processor, batch_size, name
        See `image_batches`.
    counts : mapping of str to int
        Images in each part, such as ``{"calibration": 128, "validation": 32, "test": 64}``.
    seed : int
        Another seed deals the images differently.

    Returns
    -------
    dict of str to list of dict
        The batches of each part, see `image_batches`.

    Raises
    ------
    StreamlineError
        If there are too few different images, one cannot be read, or the processor cannot take them.

    Examples
    --------
    >>> from io import BytesIO
    >>> from PIL import Image
    >>> def png(colour):
    ...     file = BytesIO()
    ...     Image.new("RGB", (4, 4), colour).save(file, format="PNG")
    ...     return file.getvalue()
    >>> def grey(image):
    ...     return torch.tensor(image.getpixel((0, 0)))[:, None, None] / 255
    >>> pictures = [Picture(str(number), png((number, 0, 0))) for number in range(12)]
    >>> images = Images(tuple(pictures), labels=(0, 1) * 6, classes=("even", "odd"))
    >>> parts = image_parts(images, grey, {"calibration": 8, "test": 4}, batch_size=4)
    >>> {name: [tuple(batch["pixel_values"].shape) for batch in batches] for name, batches in parts.items()}
    {'calibration': [(4, 3, 1, 1), (4, 3, 1, 1)], 'test': [(4, 3, 1, 1)]}
    >>> parts["test"][0]["labels"].sort().values
    tensor([0, 0, 1, 1])
    """
    checked(processor)
    dealt = deal_images(images, counts, seed, batch_size)
    return {part: image_batches(some, processor, batch_size, name=name) for part, some in dealt.items()}


def deal_images(images: Images, counts: Mapping[str, int], seed: int = 0, batch_size: int = 1) -> dict[str, Images]:
    """Deal images to parts, see `image_parts`.

    Returns
    -------
    dict of str to Images
        Those of each part, in the order in which they were drawn.
    """
    check_counts(counts, "images", batch_size)
    labels = images.labels or (0,) * len(images)
    wanted = sum(counts.values())
    drawn: list[int] = []
    for number in _in_turn(images, labels, seed):
        drawn.append(number)
        if len(drawn) == wanted:
            break
    else:
        asked = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise StreamlineError(
            f"{asked} images were asked for, and of the {len(images):,} that were read {len(drawn):,} are different "
            f"pictures. Expected {wanted:,}, so that no two parts share one. Give more images, or ask for fewer."
        )
    # The drawn ones by class, and the parts spread evenly over them: each has its share of every class.
    by_class = sorted(range(wanted), key=lambda turn: labels[drawn[turn]])
    turns: dict[str, list[int]] = {name: [] for name in counts}
    order = sorted(((place + 0.5) / count, name) for name, count in counts.items() for place in range(count))
    for turn, (_, name) in zip(by_class, order, strict=True):
        turns[name].append(turn)
    return {name: images.some([drawn[turn] for turn in sorted(turns[name])]) for name in counts}


def _in_turn(images: Images, labels: Sequence[int], seed: int) -> Iterator[int]:
    """Yield the numbers of different pictures, one of each class in turn."""
    draw = Random(seed)
    seen: set[bytes] = set()
    queues: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for number, label in enumerate(labels):
        queues[label].append(number)
    for queue in queues.values():
        draw.shuffle(queue)
    while queues:
        for label in draw.sample(list(queues), len(queues)):
            while queues[label]:
                number = queues[label].pop()
                content = content_of(images[number])
                if content not in seen:
                    seen.add(content)
                    yield number
                    break
            else:
                del queues[label]


def image_batches(
    images: Images, processor: Processor | None, batch_size: int = 8, *, name: str = "pixel_values"
) -> list[dict[str, Tensor]]:
    """Make batches for `profile`, `evaluate` and whatever else runs a model.

    Parameters
    ----------
    images : Images
        See `read_images`.
    processor : image processor or callable
        The model's own image processor of Transformers, or a callable that makes a tensor of shape
        (channels, height, width) of an image of Pillow, such as timm's and torchvision's transforms. It should draw
        nothing at random.
    batch_size : int
        Images in a batch.
    name : str
        The argument of the model's forward that takes the images: ``"x"`` for models of timm and torchvision.

    Returns
    -------
    list of dict
        With ``name`` of shape (batch, channels, height, width), whatever else an image processor gives, and, only where
        the images have labels, ``labels`` of shape (batch,), int64.

    Raises
    ------
    StreamlineError
        If there is no processor, it cannot take the images, or its tensors do not fit in one batch.

    Examples
    --------
    >>> from io import BytesIO
    >>> from PIL import Image
    >>> from transformers import ViTImageProcessor
    >>> file = BytesIO()
    >>> Image.new("RGB", (40, 30)).save(file, format="PNG")
    >>> images = Images((Picture("black", file.getvalue()),) * 3)
    >>> batches = image_batches(images, ViTImageProcessor(size={"height": 8, "width": 8}), batch_size=2)
    >>> [{key: tuple(value.shape) for key, value in batch.items()} for batch in batches]
    [{'pixel_values': (2, 3, 8, 8)}, {'pixel_values': (1, 3, 8, 8)}]
    """
    make = checked(processor)
    check_batch_size(batch_size, "images")
    batches: list[dict[str, Tensor]] = []
    for start in range(0, len(images), batch_size):
        pictures = images.pictures[start : start + batch_size]
        batch = _processed(make, pictures, name) if _of_transformers(make) else _transformed(make, pictures, name)
        if images.labels is not None:
            batch["labels"] = torch.tensor(images.labels[start : start + batch_size], dtype=torch.long)
        batches.append(batch)
    return batches


def checked(processor: Any) -> Any:
    """Return what makes tensors of images: the processor, or the one inside a processor of images and text.

    Raises
    ------
    StreamlineError
        If there is none.
    """
    inside = getattr(processor, "image_processor", None) or processor
    if not callable(inside):
        given = "none was given" if processor is None else f"a {type(processor).__name__} was given"
        raise StreamlineError(
            f"Images are made tensors by the model's image processor, and {given}. Expected one of Transformers "
            "(AutoImageProcessor.from_pretrained(folder)), or a callable that makes a tensor of an image "
            "(timm.data.create_transform(**timm.data.resolve_model_data_config(model))). Give that of the model."
        )
    return inside


def _of_transformers(processor: Any) -> bool:
    from transformers.image_processing_base import ImageProcessingMixin

    return isinstance(processor, ImageProcessingMixin)


def _processed(processor: Any, pictures: Sequence[Picture], name: str) -> dict[str, Tensor]:
    decodes = [decoded(picture) for picture in pictures]
    try:
        given = processor(images=decodes, return_tensors="pt")
    except (RuntimeError, TypeError, ValueError) as error:
        raise StreamlineError(
            f"{type(processor).__name__} cannot make a batch of {pictures[0].name} to {pictures[-1].name} "
            f"({_first_line(error)}). Expected an image processor that makes tensors of one size of them. Let it "
            "resize images to one height and width, or use batch_size=1."
        ) from error
    batch = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    if "pixel_values" not in batch:
        raise StreamlineError(
            f"{type(processor).__name__} gives {sorted(given)}. Expected `pixel_values`. Give the image processor of a "
            "model that takes these."
        )
    return {name: batch.pop("pixel_values"), **batch}


def _transformed(transform: Any, pictures: Sequence[Picture], name: str) -> dict[str, Tensor]:
    tensors: list[Tensor] = []
    for picture in pictures:
        image = decoded(picture)
        try:
            made = transform(image)
        except Exception as error:  # whatever a transform that is not for images raises
            raise StreamlineError(
                f"{_called(transform)} cannot take the image {picture.name} ({_first_line(error)}). Expected a "
                "callable that makes a tensor of an image of Pillow. Give the transform that the model was trained "
                "with."
            ) from error
        if not (isinstance(made, Tensor) and made.ndim == 3 and made.is_floating_point()):
            what = f"{made.dtype} of shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {_called(made)}"
            raise StreamlineError(
                f"{_called(transform)} made {what} of the image {picture.name}. Expected a tensor of floating-point "
                "numbers of shape (channels, height, width). End it with ToTensor, or what your library has for that."
            )
        tensors.append(made)
    if len(shapes := {tuple(tensor.shape) for tensor in tensors}) > 1:
        raise StreamlineError(
            f"{_called(transform)} made tensors of the shapes {sorted(shapes)}, which do not fit in one batch. "
            "Expected one shape. Let it resize or crop images to one height and width, or use batch_size=1."
        )
    return {name: torch.stack(tensors)}


def _called(thing: Any) -> str:
    return getattr(thing, "__name__", type(thing).__name__)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

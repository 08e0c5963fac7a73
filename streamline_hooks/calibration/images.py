"""Read images, split them into parts that share no picture, and batch them for a vision model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from streamline_hooks.calibration.dealing import check_batch_size, check_counts
from streamline_hooks.calibration.documents import (
    PARQUET,
    import_datasets,
    listed,
    open_parquet,
    parquet_rows,
    visible_files,
)
from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers.image_processing_base import ImageProcessingMixin

    Processor = ImageProcessingMixin | Callable[[Image], Tensor]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder
_EXPECTED = (
    "an image, a folder of images, a folder with a sub-folder of images for each class, a Parquet file, or a folder of "
    "Parquet files"
)
_DEEP = ("I", "F")  # the modes of more than 8 bits begin with these letters


@dataclass(frozen=True)
class Picture:
    """One encoded image.

    Attributes
    ----------
    name : str
        Path, or Parquet file and row, for error messages.
    content : Path or bytes
        The file, or its content.
    """

    name: str
    content: Path | bytes


@dataclass(frozen=True, eq=False)
class Images:
    """A sequence of images that are decoded on access.

    Attributes
    ----------
    pictures : tuple of Picture
    labels : tuple of int, optional
        The class of each image.
    classes : tuple of str, optional
        The names of the classes: ``classes[labels[0]]`` is that of the first image.

    Examples
    --------
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
        return _decoded(self.pictures[number])

    def __iter__(self) -> Iterator[Image]:
        return map(_decoded, self.pictures)

    def some(self, numbers: Sequence[int]) -> Images:
        """Return the images with these numbers, in this order."""
        labels = None if self.labels is None else tuple(self.labels[number] for number in numbers)
        return Images(tuple(self.pictures[number] for number in numbers), labels, self.classes)


class _Source(NamedTuple):
    path: Path
    pictures: list[Picture]
    labels: list[int | None]
    classes: tuple[str, ...] | None = None


def read_images(
    sources: str | Path | Sequence[str | Path],
    *,
    classes: Sequence[str] | None = None,
) -> Images:
    """Read images from files, folders and Parquet files.

    Image files are opened when their image is accessed; images from Parquet files are kept in memory, compressed. Needs
    the optional package ``pillow``, and ``datasets`` for Parquet: ``pip install "streamline_hooks[datasets]"``.

    Parameters
    ----------
    sources : str, Path or a sequence of them
        Each is one of:

        - an image file that Pillow reads; it has no label;
        - a folder of images, without labels;
        - a folder with one sub-folder per class. As in torchvision's ImageFolder, labels are positions in the sorted
          names of the sub-folders;
        - a Parquet file: column ``image`` or ``img`` contains encoded images, as bytes or as ``datasets`` writes them;
          column ``label`` or ``labels``, if present, contains integers. Class names that ``datasets`` wrote are read;
          negative and null labels are unknown;
        - a folder of Parquet files, read recursively in the order of their names.

        Hidden files are skipped.
    classes : sequence of str, optional
        The model's class names in order. Labels become positions in it.

    Returns
    -------
    Images

    Raises
    ------
    StreamlineError
        If a source does not exist or cannot be read, or labels or classes are inconsistent.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> with TemporaryDirectory() as folder:
    ...     for name in ("dog", "cat"):
    ...         Path(folder, name).mkdir()
    ...         for number in range(2):
    ...             Image.new("RGB", (4, 4), (number, 0, 0)).save(Path(folder, name, f"{number}.png"))
    ...     images = read_images(folder)
    >>> images.classes, images.labels
    (('cat', 'dog'), (0, 0, 1, 1))
    """
    _pillow()
    parts = [part for source in listed(sources) for part in _read(source)]
    pictures = tuple(picture for part in parts for picture in part.pictures)
    if not pictures:
        quoted = ", ".join(repr(str(source)) for source in listed(sources)) or "an empty list of sources"
        raise StreamlineError(f"No image was found in {quoted}. Expected {_EXPECTED}. Check that it is not empty.")
    labels = [label for part in parts for label in (part.labels if classes is None else _renumbered(part, classes))]
    if all(label is None for label in labels):
        return Images(pictures)
    if None in labels:
        raise StreamlineError(
            f"{labels.count(None):,} of {len(labels):,} images have no label, {pictures[labels.index(None)].name} for "
            "one. Expected a label for all images or for none. Read them separately, or leave those without out."
        )
    if classes is None and len(different := {part.classes: part.path for part in parts}) > 1:
        found = ", those of ".join(
            f"{path} are {', '.join(names or ('unnamed',))}" for names, path in different.items()
        )
        raise StreamlineError(
            f"The classes of {found}. Expected the same, since labels are numbers. Read them separately, or give the "
            "model's class names: classes=[...]."
        )
    return Images(pictures, tuple(n for n in labels if n is not None), tuple(classes or ()) or parts[0].classes)


def image_parts(
    images: Images,
    processor: Processor | None,
    counts: Mapping[str, int],
    *,
    batch_size: int = 8,
    seed: int = 0,
    name: str = "pixel_values",
) -> dict[str, list[dict[str, Tensor]]]:
    """Split images into parts that share no picture, and batch each part.

    Images are compared by their pixels, so a copy under another name, format or label is used once. With labels, each
    part has its share of every class; changing the size of one part changes the others.

    Parameters
    ----------
    images : Images
        See `read_images`.
    processor, batch_size, name
        See `image_batches`.
    counts : mapping of str to int
        Images per part, such as ``{"calibration": 128, "validation": 32, "test": 64}``.
    seed : int, default 0

    Returns
    -------
    dict of str to list of dict
        The batches of each part, see `image_batches`.

    Raises
    ------
    StreamlineError
        If there are too few different images, one cannot be read, or the processor does not accept them.

    Examples
    --------
    >>> from transformers import AutoImageProcessor
    >>> processor = AutoImageProcessor.from_pretrained("my-vit")  # doctest: +SKIP
    >>> parts = image_parts(read_images("images/"), processor, {"calibration": 128, "test": 64})  # doctest: +SKIP
    """
    _usable(processor)
    split = split_images(images, counts, seed, batch_size)
    return {part: image_batches(some, processor, batch_size, name=name) for part, some in split.items()}


def split_images(images: Images, counts: Mapping[str, int], seed: int = 0, batch_size: int = 1) -> dict[str, Images]:
    """Split images into parts as `image_parts` does, without batching them."""
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
    # Sorted by class, with the parts spread evenly: each part has its share of every class.
    by_class = sorted(range(wanted), key=lambda turn: labels[drawn[turn]])
    turns: dict[str, list[int]] = {name: [] for name in counts}
    order = sorted(((place + 0.5) / count, name) for name, count in counts.items() for place in range(count))
    for turn, (_, name) in zip(by_class, order, strict=True):
        turns[name].append(turn)
    return {name: images.some([drawn[turn] for turn in sorted(turns[name])]) for name in counts}


def image_batches(
    images: Images, processor: Processor | None, batch_size: int = 8, *, name: str = "pixel_values"
) -> list[dict[str, Tensor]]:
    """Batch images for `profile`, `evaluate` and every other function that runs a model.

    Parameters
    ----------
    images : Images
        See `read_images`.
    processor : image processor or callable
        The model's image processor of Transformers, or a deterministic callable that turns a Pillow image into a tensor
        of shape (channels, height, width), such as a transform of timm or torchvision.
    batch_size : int, default 8
    name : str, default "pixel_values"
        The argument of the model's forward: ``"x"`` for models of timm and torchvision.

    Returns
    -------
    list of dict
        With ``name`` of shape (batch, channels, height, width), the other outputs of the image processor and, if the
        images have labels, ``labels`` of shape (batch,), int64.

    Raises
    ------
    StreamlineError
        If there is no processor, it does not accept the images, or its tensors have different shapes.

    Examples
    --------
    >>> from PIL import Image
    >>> from transformers import ViTImageProcessor
    >>> file = BytesIO()
    >>> Image.new("RGB", (40, 30)).save(file, format="PNG")
    >>> images = Images((Picture("black", file.getvalue()),) * 3)
    >>> batches = image_batches(images, ViTImageProcessor(size={"height": 8, "width": 8}), batch_size=2)
    >>> [{key: tuple(value.shape) for key, value in batch.items()} for batch in batches]
    [{'pixel_values': (2, 3, 8, 8)}, {'pixel_values': (1, 3, 8, 8)}]
    """
    from transformers.image_processing_base import ImageProcessingMixin

    make = _usable(processor)
    check_batch_size(batch_size, "images")
    process = _processed if isinstance(make, ImageProcessingMixin) else _transformed
    batches: list[dict[str, Tensor]] = []
    for start in range(0, len(images), batch_size):
        pictures = images.pictures[start : start + batch_size]
        decoded = [_decoded(picture) for picture in pictures]
        try:
            batch = process(make, decoded, name)
        except Exception as error:  # whatever the code of a processor raises
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise StreamlineError(
                f"{getattr(make, '__name__', type(make).__name__)} cannot make a batch of {pictures[0].name} to "
                f"{pictures[-1].name} ({reason}). Expected an image processor or transform that makes floating-point "
                "tensors of one shape (channels, height, width). Let it resize images to one height and width, or use "
                "batch_size=1."
            ) from error
        if images.labels is not None:
            batch["labels"] = torch.tensor(images.labels[start : start + batch_size], dtype=torch.long)
        batches.append(batch)
    return batches


def _processed(processor: Any, decoded: list[Image], name: str) -> dict[str, Tensor]:
    outputs = processor(images=decoded, return_tensors="pt")
    batch = {key: value for key, value in outputs.items() if isinstance(value, Tensor)}
    return {name: batch.pop("pixel_values"), **batch}


def _transformed(transform: Any, decoded: list[Image], name: str) -> dict[str, Tensor]:
    tensors = [transform(image) for image in decoded]
    for tensor in tensors:
        if not (isinstance(tensor, Tensor) and tensor.ndim == 3 and tensor.is_floating_point()):
            given = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor)
            raise TypeError(f"it returns {given}")
    return {name: torch.stack(tensors)}


def _usable(processor: Any) -> Any:
    """Return the processor, or the image processor inside a processor of images and text."""
    inside = getattr(processor, "image_processor", None) or processor
    if not callable(inside):
        given = "none was given" if processor is None else f"a {type(processor).__name__} was given"
        raise StreamlineError(
            f"Images are made tensors by the model's image processor, and {given}. Expected one of Transformers "
            "(AutoImageProcessor.from_pretrained(folder)), or a callable that makes a tensor of an image "
            "(timm.data.create_transform(**timm.data.resolve_model_data_config(model))). Give that of the model."
        )
    return inside


def _in_turn(images: Images, labels: Sequence[int], seed: int) -> Iterator[int]:
    """Yield the numbers of different pictures, from each class in turn."""
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
                image = images[number]
                content = hashlib.blake2b(f"{image.mode} {image.size} ".encode() + image.tobytes(), digest_size=32)
                if content.digest() not in seen:
                    seen.add(content.digest())
                    yield number
                    break
            else:
                del queues[label]


def _decoded(picture: Picture) -> Image:
    """Decode an image as RGB, rotated as its EXIF orientation says."""
    from PIL import Image, ImageOps

    content = picture.content
    try:
        with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
    except Exception as error:  # whatever the decoder of a broken file raises
        raise StreamlineError(
            f"{picture.name} cannot be read as an image ({type(error).__name__}: {error}). Expected a whole file of a "
            "kind that Pillow reads, such as JPEG or PNG. Write it again, or leave it out."
        ) from error
    if upright.mode.startswith(_DEEP):
        raise StreamlineError(
            f"{picture.name} has more than 8 bits per channel (mode {upright.mode}), whose range is unknown. Expected "
            "8 bits per channel. Scale it to 0..255 and write it again."
        )
    return upright.convert("RGB")


def _pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise StreamlineError(
            "Images cannot be read: the package `pillow` is not installed. Expected it for image files and Parquet "
            'files of images. Install it: pip install "streamline_hooks[datasets]"'
        ) from error


def _read(source: str | Path) -> list[_Source]:
    path = Path(source).expanduser()
    if not path.exists():
        raise StreamlineError(
            f"No images can be read from {str(source)!r}: there is no such file or folder. Expected {_EXPECTED}. Check "
            "the spelling of the path."
        )
    images, parquet = visible_files(path, _SUFFIXES), visible_files(path, (PARQUET,))
    if path.is_file():
        images, parquet = ([], [path]) if path.name.lower().endswith(PARQUET) else ([path], [])
    if parquet and images:
        raise StreamlineError(
            f"The folder {str(source)!r} contains {len(parquet):,} Parquet files and {len(images):,} images. Expected "
            "one kind, since they may be the same images. Name the files or the sub-folder that you mean."
        )
    return [_parquet(file) for file in parquet] or [_folder(path, images)]


def _folder(folder: Path, images: list[Path]) -> _Source:
    """Read images without labels, or a sub-folder of images for each class, as torchvision's ImageFolder does."""
    pictures = [Picture(str(path), path) for path in images]
    names = [path.relative_to(folder).parts[0] for path in images if path.parent not in (folder, folder.parent)]
    if not names:
        return _Source(folder, pictures, [None] * len(images))
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    empty = sorted(set(classes) - set(names))
    if empty or len(names) < len(images):
        what = f"sub-folders without an image: {', '.join(empty)}" if empty else "images beside sub-folders of images"
        raise StreamlineError(
            f"The folder {str(folder)!r} contains {what}. Expected images only, or a sub-folder of images for each "
            "class, whose order numbers the classes. Move the images, or remove the sub-folder."
        )
    order = sorted(range(len(images)), key=lambda n: classes.index(names[n]))
    return _Source(folder, [pictures[n] for n in order], [classes.index(names[n]) for n in order], tuple(classes))


def _parquet(path: Path) -> _Source:
    features = open_parquet(path).features
    image = next((name for name in ("image", "img") if name in features), None)
    label = next((name for name in ("label", "labels") if name in features), None)
    if image is None:
        raise StreamlineError(
            f"{path} has the columns {sorted(features)}. Expected a column `image` or `img` of encoded images. Rename "
            "the column that contains them."
        )
    kind = str(getattr(features[label], "dtype", "a structure")) if label else "int64"
    if not kind.startswith(("int", "uint")):
        raise StreamlineError(
            f"The column `{label}` of {path} contains {kind}. Expected integers. Number the classes, or rename the "
            "column to read the images without labels."
        )
    classes = getattr(features[label], "names", None) if label else None
    source = _Source(path, [], [], tuple(classes) if classes else None)
    encoded = {image: import_datasets(path).Image(decode=False)}
    for number, row in enumerate(parquet_rows(path, [image, *([label] if label else [])], encoded)):
        if not (row[image] and row[image]["bytes"]):
            raise StreamlineError(
                f"{path}, row {number} contains no image. Expected the bytes of an image in `{image}`. Leave the row "
                "out, or write the image into it."
            )
        value = row[label] if label else None
        source.pictures.append(Picture(f"{path}, row {number}", bytes(row[image]["bytes"])))
        source.labels.append(None if value is None or value < 0 else value)
    return source


def _renumbered(source: _Source, classes: Sequence[str]) -> list[int | None]:
    """Return the labels of a source as positions in the classes of a model."""
    own = source.classes or tuple(classes)
    names = [None if n is None else own[n] if n < len(own) else str(n) for n in source.labels]
    for picture, name in zip(source.pictures, names, strict=True):
        if name is not None and name not in classes:
            raise StreamlineError(
                f"{picture.name} is of the class {name!r}, which is not among the {len(classes):,} classes that were "
                f"given ({', '.join(classes[:3])}, ...). Expected the name of each class of {source.path} among them. "
                "Rename the class, or leave its images out."
            )
    return [None if name is None else classes.index(name) for name in names]

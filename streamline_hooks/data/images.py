"""Read images, split them into parts that share no image, and batch them for a vision model."""

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

from streamline_hooks.core import StreamlineError
from streamline_hooks.data.document_parts import check_batch_size, check_counts
from streamline_hooks.data.documents import PARQUET, as_list, import_datasets, open_parquet, parquet_rows, visible_files

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers.image_processing_base import ImageProcessingMixin

    Processor = ImageProcessingMixin | Callable[[Image], Tensor]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder
_EXPECTED = (
    "an image, a folder of images, a folder with a sub-folder of images for each class, a Parquet file, or a folder of "
    "Parquet files"
)
_COLUMNS = (("image", "img"), ("label", "labels"))
_HIGH_BIT_DEPTH_MODES = ("I", "F")  # first letters of Pillow's modes with more than 8 bits per channel


@dataclass(frozen=True)
class Picture:
    """An encoded image: its path or its bytes, and a name for error messages."""

    name: str
    content: Path | bytes


@dataclass(frozen=True, eq=False)
class Images:
    """Sequence of images, decoded to RGB on access.

    Attributes
    ----------
    pictures : tuple of Picture
        The encoded images.
    labels : tuple of int, optional
        The class of each image.
    classes : tuple of str, optional
        The class names; ``classes[labels[0]]`` is the class of the first image.

    Examples
    --------
    >>> from PIL import Image
    >>> file = BytesIO()
    >>> Image.new("L", (40, 30)).save(file, format="PNG")
    >>> images = Images((Picture("black", file.getvalue()),), labels=(0,), classes=("black",))
    >>> len(images), images[0].mode, images[0].size
    (1, 'RGB', (40, 30))
    """

    pictures: tuple[Picture, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> Image:
        return decode_picture(self.pictures[number])

    def __iter__(self) -> Iterator[Image]:
        return map(decode_picture, self.pictures)

    def select(self, numbers: Sequence[int]) -> Images:
        """Return the images with these indices, in this order."""
        labels = None if self.labels is None else tuple(self.labels[number] for number in numbers)
        return Images(tuple(self.pictures[number] for number in numbers), labels, self.classes)


class _Source(NamedTuple):
    path: Path
    pictures: list[Picture]
    labels: list[int | None]
    classes: tuple[str, ...] | None = None


def read_images(sources: str | Path | Sequence[str | Path], *, classes: Sequence[str] | None = None) -> Images:
    """Read images from files, folders and Parquet files.

    Image files are opened when an image is accessed; images from Parquet files stay in memory, encoded. Needs the
    optional package ``pillow``, and ``datasets`` for Parquet: ``pip install "streamline_hooks[datasets]"``.

    Parameters
    ----------
    sources : str, Path or a sequence of them
        Each is one of:

        - an image file that Pillow reads, without a label;
        - a folder of images, without labels;
        - a folder with one sub-folder per class; as in torchvision's ImageFolder, labels are indices into the sorted
          names of the sub-folders;
        - a Parquet file: column ``image`` or ``img`` contains encoded images, as bytes or as ``datasets`` writes them;
          column ``label`` or ``labels``, if present, contains integers. Class names stored by ``datasets`` are read;
          negative and null labels mean that the label is unknown;
        - a folder of Parquet files, read recursively in the order of their names.

        Hidden files are skipped.
    classes : sequence of str, optional
        The model's class names in order. Labels become indices into this sequence.

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
    ...         Image.new("RGB", (4, 4)).save(Path(folder, name, "0.png"))
    ...     images = read_images(folder)
    >>> images.classes, images.labels
    (('cat', 'dog'), (0, 1))
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise StreamlineError(
            "Images cannot be read without the package `pillow`, which is not installed. Install it: pip install "
            '"streamline_hooks[datasets]"'
        ) from error
    parts = [part for source in as_list(sources) for part in _read(source)]
    pictures = tuple(picture for part in parts for picture in part.pictures)
    if not pictures:
        quoted = ", ".join(repr(str(source)) for source in as_list(sources)) or "an empty list of sources"
        raise StreamlineError(f"No image was found in {quoted}. Expected {_EXPECTED}. Check that it is not empty.")
    labels = [label for part in parts for label in (part.labels if classes is None else _map_labels(part, classes))]
    if all(label is None for label in labels):
        return Images(pictures)
    if None in labels:
        raise StreamlineError(
            f"{labels.count(None):,} of {len(labels):,} images have no label, for example "
            f"{pictures[labels.index(None)].name}. Expected a label for all images or for none. Read the images "
            "without labels separately, or leave them out."
        )
    if classes is None and len(different := {part.classes: part.path for part in parts}) > 1:
        listing = "; the classes of ".join(
            f"{path} are {', '.join(names or ('unnamed',))}" for names, path in different.items()
        )
        raise StreamlineError(
            f"The classes of {listing}. Expected the same classes in all sources, because labels are numbers. Read the "
            "sources separately, or give the model's class names: classes=[...]."
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
    """Split images into parts that share no image, and batch each part.

    Images are compared by their pixels, so copies with another name, format or label are used once. With labels, each
    part has the same proportions of classes. Changing the size of a part changes the other parts.

    Parameters
    ----------
    images : Images
        See `read_images`.
    processor, batch_size, name
        See `image_batches`.
    counts : mapping of str to int
        Images per part, such as ``{"calibration": 128, "validation": 32, "test": 64}``.
    seed : int, default 0
        Seed of the order of the images.

    Returns
    -------
    dict of str to list of dict
        The batches of each part, see `image_batches`.

    Raises
    ------
    StreamlineError
        If there are too few different images, an image cannot be read, or the processor does not accept an image.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> from transformers import ViTImageProcessor
    >>> processor = ViTImageProcessor(size={"height": 8, "width": 8})
    >>> with TemporaryDirectory() as folder:
    ...     for shade in range(6):
    ...         Image.new("RGB", (4, 4), (shade, 0, 0)).save(Path(folder, f"{shade}.png"))
    ...     parts = image_parts(read_images(folder), processor, {"calibration": 4, "test": 2}, batch_size=2)
    >>> {name: [tuple(batch["pixel_values"].shape) for batch in batches] for name, batches in parts.items()}
    {'calibration': [(2, 3, 8, 8), (2, 3, 8, 8)], 'test': [(2, 3, 8, 8)]}
    """
    _resolve_processor(processor)
    split = split_images(images, counts, seed, batch_size)
    return {
        part: image_batches(images_of_part, processor, batch_size, name=name) for part, images_of_part in split.items()
    }


def split_images(images: Images, counts: Mapping[str, int], seed: int = 0, batch_size: int = 1) -> dict[str, Images]:
    """Split images into parts as `image_parts` does, without batching them."""
    check_counts(counts, "images", batch_size)
    labels = images.labels or (0,) * len(images)
    wanted = sum(counts.values())
    indices: list[int] = []
    for number in _distinct_images_by_class(images, labels, seed):
        indices.append(number)
        if len(indices) == wanted:
            break
    else:
        requested = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise StreamlineError(
            f"{requested} images were requested, and of the {len(images):,} that were read {len(indices):,} are "
            f"different. Expected {wanted:,} different images, so that no two parts share an image. Give more images, "
            "or request fewer."
        )
    # The images are sorted by class and assigned to evenly spread parts, so all parts have the same class proportions.
    by_class = sorted(range(wanted), key=lambda turn: labels[indices[turn]])
    turns: dict[str, list[int]] = {name: [] for name in counts}
    order = sorted(((position + 0.5) / count, name) for name, count in counts.items() for position in range(count))
    for turn, (_, name) in zip(by_class, order, strict=True):
        turns[name].append(turn)
    return {name: images.select([indices[turn] for turn in sorted(turns[name])]) for name in counts}


def image_batches(
    images: Images, processor: Processor | None, batch_size: int = 8, *, name: str = "pixel_values"
) -> list[dict[str, Tensor]]:
    """Batch images for `profile`, `evaluate` and all other functions that run a model.

    Parameters
    ----------
    images : Images
        See `read_images`.
    processor : image processor or callable
        The model's image processor of Transformers, or a deterministic callable that maps a Pillow image to a tensor of
        shape (channels, height, width), such as a transform of timm or torchvision.
    batch_size : int, default 8
    name : str, default "pixel_values"
        Name of the argument of the model's forward; ``"x"`` for models of timm and torchvision.

    Returns
    -------
    list of dict
        With ``name`` of shape (batch, channels, height, width), the other outputs of the image processor and, if the
        images have labels, ``labels`` of shape (batch,), int64.

    Raises
    ------
    StreamlineError
        If there is no processor, the processor does not accept an image, or its tensors have different shapes.

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
    make = _resolve_processor(processor)
    check_batch_size(batch_size, "images")
    batches: list[dict[str, Tensor]] = []
    for start in range(0, len(images), batch_size):
        pictures = images.pictures[start : start + batch_size]
        decoded = [decode_picture(picture) for picture in pictures]
        try:
            batch = _tensors(make, decoded, name)
        except Exception as error:  # whatever the code of a processor raises
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise StreamlineError(
                f"{getattr(make, '__name__', type(make).__name__)} cannot make a batch of {pictures[0].name} to "
                f"{pictures[-1].name} ({reason}). Expected an image processor or transform that returns floating-point "
                "tensors of the same shape (channels, height, width). Resize all images to the same height and width, "
                "or use batch_size=1."
            ) from error
        if images.labels is not None:
            batch["labels"] = torch.tensor(images.labels[start : start + batch_size], dtype=torch.long)
        batches.append(batch)
    return batches


def _tensors(processor: Any, decoded: list[Image], name: str) -> dict[str, Tensor]:
    """Apply an image processor, or a transform of single images, to decoded images."""
    from transformers.image_processing_base import ImageProcessingMixin

    of_transformers = isinstance(processor, ImageProcessingMixin)
    if of_transformers:
        outputs = processor(images=decoded, return_tensors="pt")
        batch = {key: value for key, value in outputs.items() if isinstance(value, Tensor)}
        return {name: batch.pop("pixel_values"), **batch}
    tensors = [processor(image) for image in decoded]
    for tensor in tensors:
        if not (isinstance(tensor, Tensor) and tensor.ndim == 3 and tensor.is_floating_point()):
            result = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor)
            raise TypeError(f"it returns {result}")
    return {name: torch.stack(tensors)}


def _resolve_processor(processor: Any) -> Any:
    """Return the image processor: the argument, or the one inside a processor of images and text."""
    image_processor = getattr(processor, "image_processor", None) or processor
    if not callable(image_processor):
        problem = "none was given" if processor is None else f"a {type(processor).__name__} was given"
        raise StreamlineError(
            f"Images need the model's image processor, and {problem}. Expected an image processor of Transformers, or "
            "a callable that maps an image to a tensor. Give AutoImageProcessor.from_pretrained(folder) or "
            "timm.data.create_transform(**timm.data.resolve_model_data_config(model))."
        )
    return image_processor


def _distinct_images_by_class(images: Images, labels: Sequence[int], seed: int) -> Iterator[int]:
    """Yield the indices of different images, from each class in turn."""
    generator = Random(seed)
    seen: set[bytes] = set()
    queues: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for number, label in enumerate(labels):
        queues[label].append(number)
    for queue in queues.values():
        generator.shuffle(queue)
    while queues:
        for label in generator.sample(list(queues), len(queues)):
            while queues[label]:
                number = queues[label].pop()
                content = pixel_digest(images[number])
                if content not in seen:
                    seen.add(content)
                    yield number
                    break
            else:
                del queues[label]


def pixel_digest(image: Image) -> bytes:
    """Return a digest of the mode, size and pixels of an image."""
    content = f"{image.mode} {image.size} ".encode() + image.tobytes()
    return hashlib.blake2b(content, digest_size=32).digest()


def decode_picture(picture: Picture) -> Image:
    """Decode an image to RGB, with its EXIF orientation applied."""
    from PIL import Image, ImageOps

    content = picture.content
    try:
        with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
    except Exception as error:  # whatever the decoder of a broken file raises
        raise StreamlineError(
            f"{picture.name} cannot be read as an image ({type(error).__name__}: {error}). Expected a complete file in "
            "a format that Pillow reads, such as JPEG or PNG. Write the file again, or leave it out."
        ) from error
    if upright.mode.startswith(_HIGH_BIT_DEPTH_MODES):
        raise StreamlineError(
            f"{picture.name} has more than 8 bits per channel (mode {upright.mode}), and their range is unknown. "
            "Expected 8 bits per channel. Scale the image to 0..255 and write it again."
        )
    return upright.convert("RGB")


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
            "only one of the two, because they may be the same images. Name single files or a sub-folder."
        )
    return [_read_parquet(file) for file in parquet] or [_read_folder(path, images)]


def _read_folder(folder: Path, images: list[Path]) -> _Source:
    """Read a folder of images without labels, or with a sub-folder per class like torchvision's ImageFolder."""
    pictures = [Picture(str(path), path) for path in images]
    names = [path.relative_to(folder).parts[0] for path in images if path.parent not in (folder, folder.parent)]
    if not names:
        return _Source(folder, pictures, [None] * len(images))
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    empty = sorted(set(classes) - set(names))
    if empty or len(names) < len(images):
        what = f"sub-folders without an image: {', '.join(empty)}" if empty else "both images and sub-folders of images"
        raise StreamlineError(
            f"The folder {str(folder)!r} contains {what}. Expected only images, or one sub-folder of images for each "
            "class. Move the images, or remove the sub-folder."
        )
    order = sorted(range(len(images)), key=lambda n: classes.index(names[n]))
    return _Source(folder, [pictures[n] for n in order], [classes.index(names[n]) for n in order], tuple(classes))


def _read_parquet(path: Path) -> _Source:
    features = open_parquet(path).features
    image, label = (next((name for name in names if name in features), None) for names in _COLUMNS)
    if image is None:
        raise StreamlineError(
            f"{path} has the columns {sorted(features)}. Expected a column `image` or `img` of encoded images. Rename "
            "the column that contains them."
        )
    kind = str(getattr(features[label], "dtype", "a structure")) if label else "int64"
    if not kind.startswith(("int", "uint")):
        raise StreamlineError(
            f"The column `{label}` of {path} contains {kind}. Expected integers. Write class numbers, or rename the "
            "column to read the images without labels."
        )
    classes = getattr(features[label], "names", None) if label else None
    source = _Source(path, [], [], tuple(classes) if classes else None)
    encoded = {image: import_datasets(path).Image(decode=False)}
    for number, row in enumerate(parquet_rows(path, [image, *([label] if label else [])], encoded)):
        if not (row[image] and row[image]["bytes"]):
            raise StreamlineError(
                f"{path}, row {number} contains no image. Expected the bytes of an image in `{image}`. Add the image, "
                "or remove the row."
            )
        value = row[label] if label else None
        source.pictures.append(Picture(f"{path}, row {number}", bytes(row[image]["bytes"])))
        source.labels.append(None if value is None or value < 0 else value)
    return source


def _map_labels(source: _Source, classes: Sequence[str]) -> list[int | None]:
    """Return the labels of a source as indices into the classes of a model."""
    source_classes = source.classes or tuple(classes)
    names = [None if n is None else source_classes[n] if n < len(source_classes) else str(n) for n in source.labels]
    for picture, name in zip(source.pictures, names, strict=True):
        if name is not None and name not in classes:
            raise StreamlineError(
                f"{picture.name} has the class {name!r}, which is not among the {len(classes):,} given classes "
                f"({', '.join(classes[:3])}, ...). Expected all classes of {source.path} among them. Rename the class, "
                "or leave its images out."
            )
    return [None if name is None else classes.index(name) for name in names]

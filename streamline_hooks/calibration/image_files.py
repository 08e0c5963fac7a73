"""Find images in files, folders and Parquet files, and read no more of them than are asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from streamline_hooks.calibration.documents import listed
from streamline_hooks.calibration.files import PARQUET, imported, opened_parquet
from streamline_hooks.calibration.images import Images, Picture
from streamline_hooks.calibration.images import imported as imported_pillow
from streamline_hooks.errors import StreamlineError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""How the names of files end that are read in a folder: those of torchvision's ImageFolder."""

_IMAGE, _LABEL = ("image", "img"), ("label", "labels")
_ROWS_AT_ONCE = 32
_EXPECTED = (
    "an image, a folder of images, a folder with a sub-folder of images for each class, a Parquet file, or a folder of "
    "Parquet files"
)


@dataclass(frozen=True)
class _Shelf:
    """Images that are kept in one place, and how to take some of them."""

    where: str
    size: int
    classes: tuple[str, ...] | None
    take: Callable[[Sequence[int]], list[tuple[Picture, int | None]]]


def read_images(
    sources: str | Path | Sequence[str | Path],
    *,
    count: int | None = None,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Images:
    """Find images, and read those that are asked for.

    They stand in the order of the sources; in a folder in that of its classes' and its files' names; in a Parquet file
    in that of its rows. Files are opened when their image is asked for; what was drawn of a Parquet file is held in
    memory as it stands there, still compressed. Nothing is fetched from a network.

    Parameters
    ----------
    sources : str, Path or a sequence of them
        Each is one of:

        - an image file of a kind that Pillow reads; it has no label;
        - a folder of images (``.jpg``, ``.jpeg``, ``.png``, ``.ppm``, ``.bmp``, ``.pgm``, ``.tif``, ``.tiff``,
          ``.webp``); they have no labels;
        - a folder whose sub-folders hold the images of a class each. Labels are the places of the sub-folders in the
          sorted order of their names, as torchvision's ImageFolder has it;
        - a Parquet file (``.parquet``; it needs the optional package ``pyarrow``): a column ``image`` or ``img`` holds
          encoded images, as bytes or as ``datasets`` writes them (``{"bytes": ..., "path": ...}``), and a column
          ``label`` or ``labels``, where there is one, integers. If the file says how classes are called, as those of
          ``datasets`` do, their names are kept; a negative number and an empty cell say that a label is not known;
        - a folder of Parquet files, read recursively in the order of their names.

        What starts with a dot is passed over.
    count : int, optional
        So many are drawn, one from each of as many equal stretches of all images, so that every class and every file
        has its share. By default all.
    seed : int
        Another seed draws others.
    classes : sequence of str, optional
        The names of the classes in the order in which the model numbers them. Needed to score a model on images of
        some of its classes: labels are then the places of the names in it.
    image_column, label_column : str, optional
        The names of the columns of Parquet files.

    Returns
    -------
    Images
        With ``labels`` and ``classes`` where they are known.

    Raises
    ------
    StreamlineError
        If a source does not exist, holds no image or other columns, if some of the images have labels and others none,
        if the classes of two sources differ, if there are fewer than ``count``, or if a package is missing.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> with TemporaryDirectory() as folder:
    ...     for name in ("dog", "cat"):
    ...         Path(folder, name).mkdir()
    ...         for number in range(5):
    ...             Image.new("RGB", (4, 4), (number, 0, 0)).save(Path(folder, name, f"{number}.png"))
    ...     images = read_images(folder, count=4)
    >>> images.classes, images.labels
    (('cat', 'dog'), (0, 0, 1, 1))
    """
    imported_pillow("PIL.Image")
    given = listed(sources)
    shelves = [shelf for source in given for shelf in _shelves(source, image_column, label_column)]
    total = sum(shelf.size for shelf in shelves)
    if not total:
        quoted = ", ".join(repr(str(source)) for source in given) or "an empty list of sources"
        raise StreamlineError(f"No image was found in {quoted}. Expected {_EXPECTED}. Check that it is not empty.")
    if count is not None and not 1 <= count <= total:
        raise StreamlineError(
            f"{count:,} images were asked for, and there are {total:,}. Expected 1 to {total:,}. Give more images, or "
            "ask for fewer."
        )
    drawn = range(total) if count is None else spread_indices(total, count, seed)
    taken: list[tuple[Picture, int | None]] = []
    for shelf, (start, end) in zip(shelves, pairwise(accumulate((s.size for s in shelves), initial=0)), strict=True):
        numbers = [number - start for number in drawn if start <= number < end]
        found = shelf.take(numbers) if numbers else []
        taken += found if classes is None else _renumbered(found, shelf, classes)
    known = [label is not None for _, label in taken]
    if any(known) and not all(known):
        first = taken[known.index(False)][0].name
        raise StreamlineError(
            f"{sum(known):,} images have a label and {len(known) - sum(known):,} have none, {first} among them. "
            "Expected all or none to have one. Read them apart, or leave those without out."
        )
    pictures = tuple(picture for picture, _ in taken)
    if not any(known):
        return Images(pictures)
    names = _same_classes(shelves) if classes is None else tuple(classes)
    return Images(pictures, tuple(label for _, label in taken if label is not None), names)


def spread_indices(total: int, count: int, seed: int) -> list[int]:
    """One number of each of so many stretches."""
    draw = random.Random(seed)
    return [draw.randrange(part * total // count, (part + 1) * total // count) for part in range(count)]


def _shelves(source: str | Path, image_column: str | None, label_column: str | None) -> list[_Shelf]:
    path = Path(source).expanduser()
    if path.is_dir():
        shown = _inside(path)
        parquet = [file for file in shown if file.name.lower().endswith(PARQUET)]
        images = [file for file in shown if file.name.lower().endswith(SUFFIXES)]
        if parquet and images:
            raise StreamlineError(
                f"The folder {str(source)!r} holds {len(parquet):,} Parquet files and {len(images):,} images. Expected "
                "one kind, or it may be the same images twice. Name the files or the sub-folder that you mean."
            )
        if parquet:
            return [_parquet_shelf(file, image_column, label_column) for file in parquet]
        return [_folder_shelf(path, images)]
    if not path.exists():
        raise StreamlineError(
            f"No images can be read from {str(source)!r}: there is no such file or folder. Expected {_EXPECTED}. Check "
            "the spelling of the path."
        )
    if path.name.lower().endswith(PARQUET):
        return [_parquet_shelf(path, image_column, label_column)]
    if path.suffix.lower() not in imported_pillow("PIL.Image").registered_extensions():
        raise StreamlineError(
            f"No images can be read from {str(source)!r}: its name ends in {path.suffix!r}. Expected {_EXPECTED}. "
            "Write its images to PNG files, or to a Parquet file."
        )
    return [_Shelf(str(path), 1, None, partial(_taken, [path], None))]


def _inside(folder: Path) -> list[Path]:
    """The files of a folder and its sub-folders, those of a linked sub-folder too."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found += _inside(path)
        elif path.is_file():
            found.append(path)
    return found


def _folder_shelf(folder: Path, images: list[Path]) -> _Shelf:
    flat = sum(path.parent == folder for path in images)
    if flat == len(images):
        return _Shelf(str(folder), len(images), None, partial(_taken, images, None))
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."))
    if flat:
        raise StreamlineError(
            f"The folder {str(folder)!r} holds {flat:,} images beside sub-folders of images, so that it is not clear "
            "whether these are classes. Expected images, or a sub-folder for each class. Move the images, or name "
            "the sub-folders one by one."
        )
    by_class = {name: [path for path in images if path.relative_to(folder).parts[0] == name] for name in classes}
    if empty := [name for name, found in by_class.items() if not found]:
        raise StreamlineError(
            f"The folder {str(folder)!r} has sub-folders without an image: {', '.join(empty)}. Expected images of a "
            "class in each, since their order numbers the classes. Remove them, or put images in them."
        )
    paths = [path for name in classes for path in by_class[name]]
    labels = [number for number, name in enumerate(classes) for _ in by_class[name]]
    return _Shelf(str(folder), len(paths), classes, partial(_taken, paths, labels))


def _taken(paths: list[Path], labels: list[int] | None, numbers: Sequence[int]) -> list[tuple[Picture, int | None]]:
    return [(Picture(str(paths[n]), paths[n]), None if labels is None else labels[n]) for n in numbers]


def _parquet_shelf(path: Path, image_column: str | None, label_column: str | None) -> _Shelf:
    with opened_parquet(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    image = _column(path, schema, _IMAGE, image_column)
    if image is None:
        raise StreamlineError(
            f"{path} has the columns {sorted(schema.names)}. Expected a column `image` or `img` of encoded images. "
            'Name the column that holds them: image_column="picture".'
        )
    kinds = imported("pyarrow", path).types
    kind = schema.field(image).type
    inner = {kind.field(n).name: kind.field(n).type for n in range(kind.num_fields)} if kinds.is_struct(kind) else {}
    data = inner.get("bytes", kind)
    if not (kinds.is_binary(data) or kinds.is_large_binary(data)):
        raise StreamlineError(
            f"The column `{image}` of {path} holds {kind}. Expected encoded images: bytes, or "
            '{"bytes": ..., "path": ...} as `datasets` writes them. Write the images there as PNG or JPEG files are.'
        )
    label = _column(path, schema, _LABEL, label_column)
    if label is not None and not kinds.is_integer(schema.field(label).type):
        raise StreamlineError(
            f"The column `{label}` of {path} holds {schema.field(label).type}. Expected the numbers of classes. Number "
            "the classes, or rename the column to read the images without labels."
        )
    names = None if label is None else _names(schema, label)
    return _Shelf(str(path), rows, names, partial(_rows, path, image, label))


def _column(path: Path, schema: Any, usual: tuple[str, ...], asked: str | None) -> str | None:
    if asked is not None and asked not in schema.names:
        raise StreamlineError(
            f"{path} has the columns {sorted(schema.names)}, and none that is called `{asked}`. Name one of these."
        )
    return asked or next((name for name in usual if name in schema.names), None)


def _names(schema: Any, label: str) -> tuple[str, ...] | None:
    """The names of the classes, where `datasets` wrote them into the file."""
    try:
        said = json.loads((schema.metadata or {})[b"huggingface"])
        names = said["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _rows(path: Path, image: str, label: str | None, numbers: Sequence[int]) -> list[tuple[Picture, int | None]]:
    """Read only the groups of rows that hold some of these numbers, which ascend."""
    columns = [image] if label is None else [image, label]
    wanted, taken, start = set(numbers), [], 0
    with opened_parquet(path) as file:
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            if wanted.isdisjoint(range(start, end)):
                start = end
                continue
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                for place in range(batch.num_rows):
                    if start + place in wanted:
                        cells = {name: batch.column(name)[place].as_py() for name in columns}
                        picture = Picture(f"{path}, row {start + place}", _content(path, start + place, cells[image]))
                        number = cells[label] if label else None
                        taken.append((picture, None if number is None or number < 0 else number))
                start += batch.num_rows
    return taken


def _content(path: Path, row: int, cell: Any) -> Path | bytes:
    """The bytes of a cell, or the file beside the Parquet file that it names instead."""
    data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if data is None and name and (beside := path.parent / name).is_file():
        return beside
    if not data:
        given = f"names the file {name!r}, which does not exist" if name else "is empty"
        raise StreamlineError(
            f"{path}, row {row}: the image {given}. Expected the bytes of an image in each row. Leave the row out, or "
            "write the image into it."
        )
    return bytes(data)


def _renumbered(
    found: list[tuple[Picture, int | None]], shelf: _Shelf, classes: Sequence[str]
) -> list[tuple[Picture, int | None]]:
    """Labels as places in the classes of a model."""
    places = {name: place for place, name in enumerate(classes)}
    own = shelf.classes or tuple(classes)
    numbered: list[tuple[Picture, int | None]] = []
    for picture, label in found:
        if label is not None:
            name = own[label] if 0 <= label < len(own) else None
            if name not in places:
                raise StreamlineError(
                    f"{picture.name} is of the class {name or label!r}, which is not among the {len(classes):,} "
                    f"classes that were given ({', '.join(list(places)[:3])}, ...). Expected the name of each class of "
                    f"{shelf.where} among them. Rename it, or leave its images out."
                )
            label = places[name]
        numbered.append((picture, label))
    return numbered


def _same_classes(shelves: Sequence[_Shelf]) -> tuple[str, ...] | None:
    """The classes of all places, which have to be the same."""
    first = shelves[0]
    for shelf in shelves:
        if shelf.classes != first.classes:
            one, other = (", ".join((each.classes or ("not named",))[:5]) for each in (first, shelf))
            raise StreamlineError(
                f"The classes of {first.where} are {one}, and those of {shelf.where} are {other}. Expected the same, "
                "since a number would mean one class here and another there. Read them apart, or give the classes of "
                "the model: classes=[...]."
            )
    return first.classes

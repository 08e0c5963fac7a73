"""Read images with texts, split them into parts without shared images, and batch them with the model's processor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamline_hooks.core import IGNORE_INDEX, StreamlineError
from streamline_hooks.data.document_parts import check_counts, long_paragraphs
from streamline_hooks.data.documents import (
    JSONL_SUFFIXES,
    PARQUET,
    as_list,
    column_names,
    import_datasets,
    open_parquet,
    parquet_rows,
    read_columns,
    visible_files,
)
from streamline_hooks.data.images import Picture, decode_picture, pixel_digest
from streamline_hooks.data.text_batches import chunked

if TYPE_CHECKING:
    from transformers import ProcessorMixin

IMAGE_TEXT_COLUMNS = (
    ("image", "prompt", "text"),
    ("image", "question", "answer"),
    ("image", "text"),
    ("image", "caption"),
)
"""Alternative sets of column names; the first set that a file has is read."""

_SUFFIXES = (PARQUET, *JSONL_SUFFIXES)
_AROUND_IMAGES = re.compile(r"image|img|vision|row_\d+_col_\d+|boi|eoi", re.IGNORECASE)
"""Names of added tokens that processors insert around the tokens of an image."""
_EXPECTED = (
    "a JSONL or Parquet file, or a folder of such files, with the columns image and text, or image, prompt and text"
)


@dataclass(frozen=True)
class ImageText:
    """An image with a prompt and the text that answers it.

    Attributes
    ----------
    picture : Picture
        The encoded image.
    text : str
        The answer or caption.
    prompt : str
        The question; empty for a caption.

    Examples
    --------
    >>> ImageText(Picture("cat.png", Path("cat.png")), text="a cat", prompt="What is this?").text
    'a cat'
    """

    picture: Picture
    text: str
    prompt: str = ""


def read_image_texts(sources: str | Path | Sequence[str | Path]) -> list[ImageText]:
    r"""Read images with texts from JSONL and Parquet files.

    Image files are opened when they are used; images from Parquet files stay in memory, encoded. Needs the optional
    packages ``pillow`` and ``datasets``: ``pip install "streamline_hooks[datasets]"``.

    Parameters
    ----------
    sources : str, Path or a sequence of them
        Each is a JSONL file (``.jsonl``, plain or compressed), a Parquet file (``.parquet``), or a folder of such
        files, read recursively in the order of their names; hidden files are skipped. A file has the columns
        ``image``, ``prompt``, ``text``; or ``image``, ``question``, ``answer``; or ``image`` and ``text``; or ``image``
        and ``caption``. In JSONL, ``image`` is the path of an image file, relative to the folder of the JSONL file; in
        Parquet, it contains encoded images, as bytes or as ``datasets`` writes them.

    Returns
    -------
    list of ImageText
        The rows in order, with stripped texts; rows without text are dropped.

    Raises
    ------
    StreamlineError
        If a source or an image file does not exist, a file has other columns, or no source contains a row with text.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> with TemporaryDirectory() as folder:
    ...     Image.new("RGB", (4, 4), "red").save(Path(folder, "red.png"))
    ...     path = Path(folder, "rows.jsonl")
    ...     _ = path.write_text('{"image": "red.png", "prompt": "Which color?", "text": "red"}\n')
    ...     [(row.prompt, row.text) for row in read_image_texts(path)]
    [('Which color?', 'red')]
    """
    files = [file for source in as_list(sources) for file in _files(source)]
    rows = [row for file in files for row in _rows_of_file(file) if row.text]
    if not rows:
        quoted = ", ".join(repr(str(source)) for source in as_list(sources)) or "an empty list of sources"
        raise StreamlineError(
            f"No image with a text was found in {quoted}. Expected {_EXPECTED}. Check the name of the source."
        )
    return rows


def contains_image_texts(sources: str | Path | Sequence[str | Path] | None) -> bool:
    """Whether a source contains a JSONL or Parquet file with the columns of images with texts.

    Images are not opened. Files that cannot be read are ignored.

    Examples
    --------
    >>> contains_image_texts("pydoc")
    False
    """
    return any(_has_image_texts(file) for source in as_list(sources or []) for file in _files_or_none(source))


def image_text_parts(
    rows: Sequence[ImageText],
    processor: ProcessorMixin,
    counts: Mapping[str, int],
    *,
    batch_size: int = 4,
    text_tokens: int = 512,
    seed: int = 0,
    labels: bool = True,
) -> dict[str, list[dict[str, Any]]]:
    """Split images with texts into parts, and batch them with the model's processor.

    Each row is formatted with the processor's chat template: the user sends the image and the prompt, the assistant
    answers with the text. Without a chat template, the image token, the prompt and the text are concatenated. No two
    parts share an image (compared by pixels) or a paragraph of at least 80 characters. The last part is filled first,
    so a larger first part does not change the other parts.

    Parameters
    ----------
    rows : sequence of ImageText
        See `read_image_texts`.
    processor : transformers.ProcessorMixin
        The model's processor, with an image processor and a tokenizer.
    counts : mapping of str to int
        Rows per part, such as ``{"calibration": 128, "validation": 32, "test": 64}``.
    batch_size : int, default 4
    text_tokens : int, default 512
        Maximum text tokens of a row, not counting image tokens; longer rows are left out.
    seed : int, default 0
        Seed of the order of the rows.
    labels : bool, default True
        Add ``labels`` of shape (batch, tokens) for the next-token loss and the perplexity: the token ids, with -100 for
        padding and for all tokens that the processor inserts for an image (image tokens, tokens between them such as
        line breaks and tile positions, and special tokens around them). Use False for embedding models.

    Returns
    -------
    dict of str to list of dict
        The batches of each part: the tensors of the processor, including ``input_ids`` and ``attention_mask`` of shape
        (batch, tokens), padded on the tokenizer's padding side, and ``labels``.

    Raises
    ------
    StreamlineError
        If there is no processor, the processor cannot process a row or does not define its image tokens, or there are
        too few rows.

    Examples
    --------
    A processor is usually loaded with ``AutoProcessor.from_pretrained``; this one is built without files.

    >>> from io import BytesIO
    >>> from PIL import Image
    >>> from transformers import ByT5Tokenizer, CLIPImageProcessor, LlavaProcessor
    >>> tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<image>"])
    >>> size = {"height": 16, "width": 16}
    >>> images = CLIPImageProcessor(size=size, crop_size=size)
    >>> processor = LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="full")
    >>> rows = []
    >>> for shade in range(4):
    ...     file = BytesIO()
    ...     Image.new("RGB", (16, 16), (shade, 0, 0)).save(file, format="PNG")
    ...     rows.append(ImageText(Picture(f"shade {shade}", file.getvalue()), prompt="Which?", text=str(shade)))
    >>> parts = image_text_parts(rows, processor, {"calibration": 3, "test": 1})
    >>> {name: tuple(batches[0]["input_ids"].shape) for name, batches in parts.items()}
    {'calibration': (3, 14), 'test': (1, 14)}
    """
    check_counts(counts, "images with texts", batch_size)
    encoder = _Encoder.of(processor, labels)
    indices = _split_rows(rows, encoder, counts, text_tokens, seed)
    return {
        name: [encoder.batch([rows[k] for k in numbers]) for numbers in chunked(indices[name], batch_size)]
        for name in counts
    }


@dataclass(frozen=True)
class _Encoder:
    """Encode rows as batches.

    `image_ids` are the image tokens of the processor, `around_ids` the tokens that may enclose them.
    """

    processor: Any
    labels: bool
    image_ids: tuple[int, ...]
    around_ids: tuple[int, ...]

    @classmethod
    def of(cls, processor: Any, labels: bool) -> _Encoder:
        has_both = all(getattr(processor, name, None) is not None for name in ("image_processor", "tokenizer"))
        if not (has_both and callable(processor)):
            problem = "none was given" if processor is None else f"a {type(processor).__name__} was given"
            raise StreamlineError(
                f"Images with texts need the model's processor, and {problem}. Expected a processor with an image "
                "processor and a tokenizer. Pass AutoProcessor.from_pretrained(name) with the folder or hub name of "
                "the model."
            )
        token_ids = [*getattr(processor, "image_token_ids", []), getattr(processor, "image_token_id", None)]
        ids = tuple(sorted({token_id for token_id in token_ids if isinstance(token_id, int)}))
        if labels and not ids:
            raise StreamlineError(
                f"The processor {type(processor).__name__} has no image_token_id, so image tokens would be scored as "
                "text. Expected a processor of an image-text model. Set processor.image_token_id, or create the "
                "batches in Python with labels of -100 for image tokens."
            )
        return cls(processor, labels, ids, tuple(sorted(_ids_around_images(processor.tokenizer))))

    def text(self, row: ImageText) -> str:
        """Return a row as text, with the image token."""
        if getattr(self.processor, "chat_template", None):
            question = [{"type": "text", "text": row.prompt}] if row.prompt else []
            conversation = [
                {"role": "user", "content": [{"type": "image"}, *question]},
                {"role": "assistant", "content": [{"type": "text", "text": row.text}]},
            ]
            return str(self.processor.apply_chat_template(conversation, tokenize=False))
        token = getattr(self.processor, "image_token", None) if self.labels else None
        return "\n".join(part for part in (token, row.prompt, row.text) if part)

    def batch(self, rows: Sequence[ImageText]) -> dict[str, Any]:
        """Encode rows as one batch."""
        texts = [self.text(row) for row in rows]
        begin = getattr(self.processor.tokenizer, "bos_token", None)
        options: dict[str, Any] = {"add_special_tokens": False} if begin and texts[0].startswith(begin) else {}
        try:
            images = [[decode_picture(row.picture)] for row in rows]
            outputs = dict(self.processor(images=images, text=texts, padding=True, return_tensors="pt", **options))
            batch = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
            ids, mask = batch["input_ids"], batch["attention_mask"]
        except StreamlineError:
            raise
        except Exception as error:  # whatever the code of a processor raises
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise StreamlineError(
                f"{type(self.processor).__name__} cannot process {rows[0].picture.name} with its text ({reason}). "
                "Expected the processor of the model, with a chat template that accepts an image and a text, and a "
                "tokenizer with a padding token. Check processor.chat_template and processor.tokenizer.pad_token."
            ) from error
        if self.labels:
            is_image = self.image_mask(batch)
            if not bool(is_image.any(dim=1).all()):
                row = rows[int((~is_image.any(dim=1)).nonzero()[0])]
                raise StreamlineError(
                    f"{type(self.processor).__name__} inserts no image token into the text of {row.picture.name}. "
                    f"Expected one of the tokens {list(self.image_ids)} in each row. Set a chat template that contains "
                    "the image (processor.chat_template), or correct processor.image_token_id."
                )
            batch["labels"] = ids.masked_fill(is_image | (mask == 0), IGNORE_INDEX)
        return batch

    def image_mask(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mask of the tokens that represent the image of each row, boolean of shape (batch, tokens).

        It covers all tokens from the first to the last image token, and the special tokens next to them.
        """
        ids = batch["input_ids"]
        mask = torch.isin(ids, torch.tensor(self.image_ids, dtype=torch.long))
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in batch:
                mask = mask | (batch[name] != 0)
        mask = (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)
        is_around = torch.isin(ids, torch.tensor(self.around_ids, dtype=torch.long))
        while True:
            is_adjacent = torch.zeros_like(mask)
            is_adjacent[:, 1:] |= mask[:, :-1]
            is_adjacent[:, :-1] |= mask[:, 1:]
            grown = mask | (is_adjacent & is_around)
            if torch.equal(grown, mask):
                return mask
            mask = grown

    def text_length(self, row: ImageText) -> int:
        """Return the number of text tokens of a row, without the image tokens."""
        batch = self.batch([row])
        real = batch["attention_mask"].bool()
        return int((real & ~self.image_mask(batch)).sum() if self.labels else real.sum())


def _ids_around_images(tokenizer: Any) -> set[int]:
    """Return added tokens named after images, and all special tokens except bos, eos, pad and unk."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {number for number, token in added.items() if _AROUND_IMAGES.search(str(token))}
    named = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk"))
    return (ids | set(tokenizer.all_special_ids)) - set(named)


def _split_rows(
    rows: Sequence[ImageText], encoder: _Encoder, counts: Mapping[str, int], text_tokens: int, seed: int
) -> dict[str, list[int]]:
    """Return the row indices of each part; no two parts share a picture or a long paragraph."""
    if text_tokens < 1:
        raise StreamlineError(
            f"text_tokens={text_tokens} is invalid. Expected the maximum number of text tokens of a row, 1 or more."
        )
    order = list(range(len(rows)))
    Random(seed).shuffle(order)
    shared: set[Any] = set()  # pictures and paragraphs of the parts that are already filled
    known: set[tuple[Any, ...]] = set()
    repeated, lengths = 0, list[int]()
    indices: dict[str, list[int]] = {}
    for name in reversed(list(counts)):
        indices[name], contents_of_part = [], set()
        while len(indices[name]) < counts[name]:
            if not order:
                requested = ", ".join(f"{part} {count:,}" for part, count in counts.items())
                longest = f" of up to {max(lengths):,} tokens" if lengths else ""
                raise StreamlineError(
                    f"{requested} images with texts were requested, and there are {len(rows):,} rows: {repeated:,} "
                    f"repeat an image or a text of another part, {len(lengths):,} have more than "
                    f"text_tokens={text_tokens:,} text tokens{longest}. Expected {sum(counts.values()):,} usable rows. "
                    "Give more rows, request fewer, or increase text_tokens."
                )
            row = rows[number := order.pop()]
            picture = pixel_digest(decode_picture(row.picture))
            contents = {picture, *long_paragraphs(row.prompt), *long_paragraphs(row.text)}
            key = (picture, row.prompt, row.text)
            if not shared.isdisjoint(contents) or key in known:
                repeated += 1
            elif (length := encoder.text_length(row)) > text_tokens:
                lengths.append(length)
            else:
                indices[name].append(number)
                contents_of_part |= contents
                known.add(key)
        shared |= contents_of_part
    return indices


def _files(source: str | Path) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        if files := visible_files(path, _SUFFIXES):
            return files
        raise StreamlineError(
            f"The folder {str(source)!r} contains no JSONL or Parquet file. Expected {_EXPECTED}. Check the path."
        )
    if not (path.exists() and path.name.lower().endswith(_SUFFIXES)):
        reason = f"its name ends in {path.suffix!r}" if path.exists() else "there is no such file or folder"
        raise StreamlineError(
            f"No images with texts can be read from {str(source)!r}: {reason}. Expected {_EXPECTED}. Check the "
            'spelling of the path, or write a JSONL file with lines such as {"image": "a.png", "text": "..."}.'
        )
    return [path]


def _files_or_none(source: str | Path) -> list[Path]:
    """Return the JSONL and Parquet files of a source; empty for other sources and missing paths."""
    try:
        return _files(source)
    except StreamlineError:
        return []


def _has_image_texts(path: Path) -> bool:
    try:
        existing = set(column_names(path))
    except StreamlineError:  # raised again when the text is read
        return False
    return any(set(names) <= existing for names in IMAGE_TEXT_COLUMNS)


def _rows_of_file(path: Path) -> Iterator[ImageText]:
    if not path.name.lower().endswith(PARQUET):
        for number, (image, *texts) in enumerate(read_columns(path, IMAGE_TEXT_COLUMNS), start=1):
            file = path.parent / Path(image or "").expanduser()
            if not file.is_file():
                raise StreamlineError(
                    f"{path}, row {number}: there is no image file {image!r} in {path.parent}. Expected the path of an "
                    "image, relative to the folder of the JSONL file. Correct the path, or move the image there."
                )
            yield _image_text(Picture(str(file), file), texts)
        return
    features = open_parquet(path).features
    names = next((names for names in IMAGE_TEXT_COLUMNS if set(names) <= set(features)), None)
    if names is None:
        raise StreamlineError(
            f"{path} has the columns {sorted(features)}. Expected {_EXPECTED}. Rename the columns that contain them."
        )
    encoded = {"image": import_datasets(path).Image(decode=False)}
    for number, row in enumerate(parquet_rows(path, list(names), encoded)):
        where = f"{path}, row {number}"
        if not (row["image"] and row["image"]["bytes"]):
            raise StreamlineError(
                f"{where} contains no image. Expected the bytes of an image in `image`. Add the image, or remove the "
                "row."
            )
        texts = [row[name] for name in names[1:]]
        if wrong := [type(text).__name__ for text in texts if text is not None and not isinstance(text, str)]:
            raise StreamlineError(
                f"{where} contains a {wrong[0]}. Expected strings in {' and '.join(names[1:])}. Write the text as a "
                "string."
            )
        yield _image_text(Picture(where, bytes(row["image"]["bytes"])), texts)


def _image_text(picture: Picture, texts: Sequence[str | None]) -> ImageText:
    *prompt, text = ((value or "").strip() for value in texts)
    return ImageText(picture, text, *prompt)

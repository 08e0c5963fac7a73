"""Split documents into calibration, validation and test, such that no text is in two parts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamline_hooks.core import Batch, StreamlineError, batch_rows, batches_digest, padding_mask, select_rows
from streamline_hooks.data.document_parts import Encoder, fill_parts, hash_shuffle, long_paragraphs
from streamline_hooks.data.packing import PackedText
from streamline_hooks.modeling import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PARTS = ("calibration", "validation", "test")


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """Token ids for calibration, validation and test that share no document.

    Attributes
    ----------
    calibration, validation, test : torch.LongTensor
        Of shape (sequences, sequence_length), without padding.
    fingerprint : str
        SHA-256 of the calibration ids, their shape, and the positions of packed rows.
    notes : tuple of str
        Deviations from the request: documents that were cut, parts that were shrunk.
    positions : dict of str to torch.LongTensor
        For packed rows, the position of each token in its piece, by part; otherwise empty.
    source : dict
        Origin of the text as JSON values: ``sources``, the names of files and data sets, or ``mixture``, a list of
        ``name``, ``share`` and ``sources`` of each source; and ``test``, the names of a separate test text. Empty if
        the text was not read by `read_documents`.

    Examples
    --------
    >>> rows = torch.arange(16).view(2, 8)
    >>> TokenSplit(rows, rows + 16, rows + 32, fingerprint="0123456789abcdef").describe()
    'calibration 16, validation 16, test 16 tokens in sequences of 8; fingerprint 0123456789ab'
    """

    calibration: Tensor
    validation: Tensor
    test: Tensor
    fingerprint: str
    notes: tuple[str, ...] = ()
    positions: Mapping[str, Tensor] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_packed(cls, parts: Mapping[str, PackedText]) -> TokenSplit:
        """Create a split from the parts of `packed_text`; raise if a part is missing or empty, or lengths differ."""
        if set(parts) != set(PARTS):
            raise StreamlineError(
                f"Packed text has the parts {sorted(parts)}. Expected {', '.join(PARTS)}. Create them with "
                "packed_text(source, tokenizer, {'calibration': 41_000, 'validation': 4_096, 'test': 12_288})."
            )
        lengths = {name: tuple(part.input_ids.shape) for name, part in parts.items()}
        if not all(rows for rows, _ in lengths.values()) or len({length for _, length in lengths.values()}) > 1:
            raise StreamlineError(
                f"Packed text has parts of shape {lengths}. Expected at least one row in each part, and the same "
                "length in all parts. In a distributed run every rank needs the same rows: use "
                "packed_text(..., processes=Processes(0, 1))."
            )
        calibration, validation, test = (parts[name].input_ids.long() for name in PARTS)
        positions = {name: parts[name].position_ids.long() for name in PARTS}
        fingerprint = rows_fingerprint(calibration, positions["calibration"])
        notes = tuple(parts[name].note for name in PARTS if parts[name].note)
        return cls(calibration, validation, test, fingerprint, notes, positions)

    @property
    def sequence_length(self) -> int:
        """Return the number of tokens in each sequence."""
        return int(self.calibration.shape[1])

    @property
    def tensors(self) -> list[Tensor]:
        """Return all ids and positions, in order."""
        return [self.calibration, self.validation, self.test, *self.positions.values()]

    def part_of_calibration(self, number: int, parts: int) -> TokenSplit:
        """Return the split with part `number` of `parts` equal parts of the calibration sequences; raise if too few."""
        if len(self.calibration) < 2 * parts:
            raise StreamlineError(
                f"The calibration text fills {len(self.calibration)} sequences of {self.sequence_length} tokens. "
                f"Expected at least two sequences for each of {parts} rounds. Give more text, fewer rounds, or a "
                "smaller --sequence-length."
            )
        edges = [k * len(self.calibration) // parts for k in range(parts + 1)]
        selected = slice(edges[number], edges[number + 1])
        rows, positions = self.calibration[selected], dict(self.positions)
        if not positions:
            return replace(self, calibration=rows, fingerprint=rows_fingerprint(rows))
        positions["calibration"] = positions["calibration"][selected]
        fingerprint = rows_fingerprint(rows, positions["calibration"])
        return replace(self, calibration=rows, positions=positions, fingerprint=fingerprint)

    def report(self) -> dict[str, Any]:
        """Return the sizes, fingerprint, notes and source as JSON values."""
        sizes = {f"{name}_tokens": getattr(self, name).numel() for name in PARTS}
        record = {"fingerprint": self.fingerprint, "notes": list(self.notes)}
        source = {"source": dict(self.source)} if self.source else {}
        return {**sizes, "sequence_length": self.sequence_length, **record, **source}

    def describe(self) -> str:
        """Return one line with the size of each part, the fingerprint, and the notes."""
        sizes = ", ".join(f"{name} {getattr(self, name).numel():,}" for name in PARTS)
        rows = "packed rows" if self.positions else "sequences"
        line = f"{sizes} tokens in {rows} of {self.sequence_length}; fingerprint {self.fingerprint[:12]}"
        return "; ".join((line, *self.notes))


def split_documents(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    sequence_length: int = 512,
    calibration_tokens: int = 41_000,
    validation_tokens: int = 8_192,
    test_tokens: int = 16_384,
    test_documents: Sequence[str] | None = None,
) -> TokenSplit:
    """Split documents into calibration, validation and test parts, and tokenize them.

    Documents are used in the order of a hash of seed and content, so the order of the files does not matter. The test
    part is filled first, then validation, then calibration. Paragraphs of at least 80 characters of an earlier part are
    removed from later parts. A document contributes at most a quarter of its part, or one sequence if that is more.

    If there are too few documents, long documents are cut at paragraphs into pieces of about one to four sequences. If
    there is too little text, all parts shrink by the same ratio. The documents of a part are tokenized separately
    without special tokens, joined by blank lines, and cut into full sequences.

    Parameters
    ----------
    documents : sequence of str
        The text, see `read_documents`.
    tokenizer : PreTrainedTokenizerBase
        Called as ``tokenizer(text, add_special_tokens=False, verbose=False)``; its ``input_ids`` are used.
    seed : int, default 0
        Seed of the order of the documents.
    sequence_length : int, default 512
        Tokens per sequence.
    calibration_tokens, validation_tokens, test_tokens : int
        Size of each part in tokens, rounded down to full sequences.
    test_documents : sequence of str, optional
        Separate text for the test part. These documents and their long paragraphs, used or not, are excluded from the
        other parts.

    Returns
    -------
    TokenSplit

    Raises
    ------
    StreamlineError
        If a size is less than one sequence, or the text does not fill one sequence of each part.

    Examples
    --------
    Any callable that returns ``input_ids`` works; this tokenizer maps each word to its length:

    >>> def tokenizer(text, **options):
    ...     return {"input_ids": [len(word) for word in text.split()]}
    >>> documents = [f"This is the document number {n}." for n in range(60)]
    >>> sizes = {"calibration_tokens": 120, "validation_tokens": 24, "test_tokens": 48}
    >>> split = split_documents(documents, tokenizer, sequence_length=12, **sizes)
    >>> split.calibration.shape, split.validation.shape, split.test.shape
    (torch.Size([10, 12]), torch.Size([2, 12]), torch.Size([4, 12]))
    """
    sizes = {"test": test_tokens, "validation": validation_tokens, "calibration": calibration_tokens}
    check_sizes(sizes, sequence_length)
    encode = Encoder(tokenizer)
    ordered = hash_shuffle(documents, seed)
    if test_documents is None:
        parts, notes = fill_parts(ordered, sizes, encode, sequence_length, seed)
    else:
        test_texts = hash_shuffle(test_documents, seed)
        forbidden = frozenset(paragraph for document in test_texts for paragraph in long_paragraphs(document))
        excluded = set(test_texts)
        ordered = [document for document in ordered if document not in excluded]
        parts, notes = fill_parts(test_texts, {"test": sizes.pop("test")}, encode, sequence_length, seed)
        other_parts, other_notes = fill_parts(ordered, sizes, encode, sequence_length, seed, forbidden)
        parts, notes = parts | other_parts, notes + other_notes
    tensors = {name: torch.tensor(ids, dtype=torch.long).view(-1, sequence_length) for name, ids in parts.items()}
    calibration, validation, test = (tensors[name] for name in PARTS)
    names = sources_of(documents)
    source = recorded_source({"sources": names}, test_documents) if names else {}
    return TokenSplit(calibration, validation, test, rows_fingerprint(calibration), tuple(notes), source=source)


def sources_of(documents: Sequence[str]) -> list[str]:
    """Return the names of the sources of documents that `read_documents` returned; empty for other documents."""
    return list(getattr(documents, "sources", ()))


def recorded_source(source: dict[str, Any], test_documents: Sequence[str] | None) -> dict[str, Any]:
    """Return the record of a source and the test text; empty if the test text cannot be read again."""
    if test_documents is None:
        return source
    test = sources_of(test_documents)
    return {**source, "test": test} if test else {}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int, split: TokenSplit | None = None) -> None:
    """Raise if a tokenizer produces ids for which the model has no embedding.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    vocabulary_size : int
        Rows of the model's embedding, ``model.get_input_embeddings().num_embeddings``.
    split : TokenSplit, optional
        Ids to check. Default: the whole vocabulary of the tokenizer.

    Raises
    ------
    StreamlineError
        If an id is out of range.

    Examples
    --------
    >>> from transformers import ByT5Tokenizer
    >>> check_tokenizer(ByT5Tokenizer(), vocabulary_size=384)
    """
    if split is None:
        largest, where = max(tokenizer.get_vocab().values()), "its vocabulary contains"
    else:
        largest = max(int(ids.max()) for ids in (split.calibration, split.validation, split.test))
        where = "this text contains"
    if largest >= vocabulary_size:
        name = getattr(tokenizer, "name_or_path", "")
        raise StreamlineError(
            f"The tokenizer{f' {name!r}' if name else ''} does not belong to this model: {where} the id {largest:,}, "
            f"and the model's embedding has {vocabulary_size:,} rows. Expected ids from 0 to {vocabulary_size - 1:,}. "
            "Load the tokenizer from the folder or hub name of the model, or resize the model's embedding."
        )


def check_sizes(sizes: Mapping[str, int], length: int) -> None:
    """Raise if a part is smaller than one sequence."""
    for name, size in sizes.items():
        if length < 1 or size < length:
            raise StreamlineError(
                f"{name}_tokens={size} with sequence_length={length} is invalid. Expected a positive sequence length "
                f"and at least one sequence in each part. Request {name}_tokens={max(length, 1)} or more, or a smaller "
                "--sequence-length."
            )


def rows_fingerprint(*rows: Tensor) -> str:
    """Return the hexadecimal SHA-256 of ids, their shape, and their positions."""
    digest = hashlib.sha256(f"{tuple(rows[0].shape)}".encode())
    for numbers in rows:
        digest.update(numbers.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def with_repeated_passages(split: TokenSplit, share: float) -> TokenSplit:
    """Replace the second half of some sequences by their first half.

    Models predict such text with induction heads (arXiv 2209.11895). Induction contributes little to the loss on prose,
    so removing blocks that hardly change the loss on prose may destroy it. Repeated passages make this visible.

    Parameters
    ----------
    split : TokenSplit
        The calibration and validation parts are changed; the test part is not.
    share : float
        Fraction of the sequences of each part, evenly spaced from the first; in (0, 1].

    Returns
    -------
    TokenSplit

    Raises
    ------
    StreamlineError
        If the share is out of range, a sequence is shorter than four tokens, or the rows are packed.

    Examples
    --------
    >>> import torch
    >>> rows = torch.arange(16).view(2, 8)
    >>> with_repeated_passages(TokenSplit(rows, rows, rows, fingerprint=""), 0.5).calibration[0].tolist()
    [0, 1, 2, 3, 0, 1, 2, 3]
    """
    if not 0 < share <= 1:
        raise StreamlineError(
            f"share={share:g} is invalid. Expected a fraction of the sequences, 0 < share <= 1. Change it."
        )
    if split.positions:
        raise StreamlineError(
            "Packed rows contain several documents, so half a row is no single passage. Expected sequences of one "
            "document. Disable repeated passages (repeated_context=0), or use split_documents."
        )
    if split.sequence_length < 4:
        raise StreamlineError(
            f"Sequences of {split.sequence_length} tokens are too short to repeat a passage. Expected four tokens or "
            "more. Increase the sequence length."
        )
    parts = {name: _repeat_first_halves(getattr(split, name), share) for name in ("calibration", "validation")}
    changed = ", ".join(f"{count} of {len(rows)} {name} sequences" for name, (rows, count) in parts.items())
    return replace(
        split,
        calibration=parts["calibration"][0],
        validation=parts["validation"][0],
        fingerprint=rows_fingerprint(parts["calibration"][0]),
        notes=(*split.notes, f"the second half of {changed} repeats the first"),
    )


def _repeat_first_halves(rows: Tensor, share: float) -> tuple[Tensor, int]:
    """Return the rows with repeated first halves, and the number of changed rows."""
    due = [ceil(k * share - 1e-9) for k in range(len(rows) + 1)]  # number of changed rows among the first k
    chosen = [k for k in range(len(rows)) if due[k + 1] > due[k]]
    half, repeated = rows.shape[1] // 2, rows.clone()
    repeated[chosen, half : 2 * half] = rows[chosen, :half]
    return repeated, len(chosen)


PartBatches = list[Any]


@dataclass(frozen=True, eq=False)
class BatchSplit:
    """Batches for calibration, validation and test that share no sequence or image.

    Attributes
    ----------
    calibration, validation, test : list
        Batches of each part.
    unit : str
        What the model's outputs are counted in: "token", "image", "text" or "embedding".
    counts : dict of str to int
        Number of outputs by part.
    fingerprint : str
        Digest of the calibration batches, see `batches_digest`.

    Examples
    --------
    >>> images = torch.randn(6, 3, 8, 8)
    >>> parts = {"calibration": [images[:2], images[2:4]], "validation": [images[4:5]], "test": [images[5:]]}
    >>> BatchSplit.of(parts, Task("image-classification")).describe()
    'calibration 4, validation 1, test 1 images in 4 batches; fingerprint ...'
    """

    calibration: PartBatches
    validation: PartBatches
    test: PartBatches
    unit: str
    counts: dict[str, int]
    fingerprint: str

    @classmethod
    def of(cls, parts: Mapping[str, Sequence[Batch | Tensor]], task: Task) -> BatchSplit:
        """Create a split from its parts; raise if a part is empty or shares data with the test part."""
        if set(parts) != set(PARTS) or not all(len(parts[name]) for name in PARTS):
            raise StreamlineError(
                f"The batches have the parts {', '.join(f'{n} ({len(p)})' for n, p in parts.items()) or 'none'}. "
                f"Expected {', '.join(PARTS)} with at least one batch in each. Create them with image_parts, "
                "text_parts or pair_parts."
            )
        lists = {name: list(parts[name]) for name in PARTS}
        test_digests = _row_digests(lists["test"])
        for name in ("calibration", "validation"):
            duplicates = len(test_digests & _row_digests(lists[name]))
            if duplicates:
                raise StreamlineError(
                    f"{duplicates} sequences or images of the test part are also in the {name} part, so the score "
                    "would not measure generalization. Expected disjoint parts. Remove the duplicates."
                )
        counts = {name: sum(map(task.count, lists[name])) for name in PARTS}
        return cls(**lists, unit=task.unit, counts=counts, fingerprint=batches_digest(lists["calibration"]))

    @property
    def tensors(self) -> list[Tensor]:
        """Return all tensors, in order."""
        batches = (*self.calibration, *self.validation, *self.test)
        values = (value for batch in batches for value in ([batch] if isinstance(batch, Tensor) else batch.values()))
        return [value for value in values if isinstance(value, Tensor)]

    @property
    def fitting_and_held_out(self) -> tuple[PartBatches, PartBatches]:
        """Split the calibration part into four fifths for fitting and one fifth to choose the ridge."""
        count = sum(map(batch_rows, self.calibration))
        left = count - max(1, count // 5)
        if left < 1:
            raise StreamlineError(
                "The calibration part has one sequence or image. Expected at least two: one for fitting and one to "
                "choose the ridge. Give more calibration data."
            )
        fit, held_out = [], []
        for batch in self.calibration:
            size = batch_rows(batch)
            if left > 0:
                fit.append(select_rows(batch, slice(0, left)) if left < size else batch)
            if left < size:
                held_out.append(select_rows(batch, slice(left, None)) if left > 0 else batch)
            left -= size
        return fit, held_out

    def describe(self) -> str:
        """Return one line with the size of each part and the fingerprint."""
        sizes = ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        batches = len(self.calibration) + len(self.validation) + len(self.test)
        return f"{sizes} {self.unit}s in {batches} batches; fingerprint {self.fingerprint[:12]}"

    def report(self) -> dict[str, Any]:
        """Return the sizes and fingerprint as JSON values."""
        sizes = {f"{name}_{self.unit}s": count for name, count in self.counts.items()}
        return {**sizes, "fingerprint": self.fingerprint}


def _row_digests(batches: PartBatches) -> set[bytes]:
    """Return a digest of each sequence or image, without padding."""
    digests = set()
    for batch in batches:
        tensors = (
            {"": batch} if isinstance(batch, Tensor) else {n: v for n, v in batch.items() if isinstance(v, Tensor)}
        )
        contents = {name: tensors[name] for name in ("input_ids", "pixel_values") if name in tensors} or dict(
            [next((n, v) for n, v in tensors.items() if "mask" not in n and n != "labels")]
        )
        mask = None if isinstance(batch, Tensor) else padding_mask(batch)
        for k in range(batch_rows(batch)):
            digest = hashlib.blake2b(digest_size=16)
            for name, rows in contents.items():
                row = select_rows({**tensors, name: rows}, slice(k, k + 1))[name]
                if len(row) == len(rows) and batch_rows(batch) > 1:  # images cannot be assigned to rows
                    continue
                row = row.detach().cpu()
                row = row.float() if row.is_floating_point() else row.long()
                if mask is not None and mask.shape == rows.shape[:2]:
                    row = row[0][mask[k].bool().cpu()]
                digest.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            digests.add(digest.digest())
    return digests

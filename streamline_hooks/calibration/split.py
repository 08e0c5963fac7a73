"""Split documents into calibration, validation and test, so that no text is in two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamline_hooks.calibration.dealing import Encoder, deal_parts, long_paragraphs, shuffled
from streamline_hooks.calibration.packing import PackedText
from streamline_hooks.errors import StreamlineError

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
        SHA-256 of the calibration ids and their shape, and of the positions of packed rows.
    notes : tuple of str
        What differs from what was asked for: documents cut, parts shrunk.
    positions : dict of str to torch.LongTensor
        Of packed rows, for each part, the position of each token in its piece; otherwise empty.
    """

    calibration: Tensor
    validation: Tensor
    test: Tensor
    fingerprint: str
    notes: tuple[str, ...] = ()
    positions: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_packed(cls, parts: Mapping[str, PackedText]) -> TokenSplit:
        """Create a split from the parts of `packed_text`.

        Raises
        ------
        StreamlineError
            If they are not calibration, validation and test, one has no rows, or their lengths differ.

        Examples
        --------
        >>> ids, positions = torch.arange(12).view(3, 4), torch.tensor([[0, 1, 0, 1]] * 3)
        >>> part = PackedText(ids, positions, documents=6, cuts=0)
        >>> TokenSplit.of_packed({"calibration": part, "validation": part, "test": part}).describe()
        'calibration 12, validation 12, test 12 tokens in packed rows of 4; fingerprint ...'
        """
        if set(parts) != set(PARTS):
            raise StreamlineError(
                f"Packed text has the parts {sorted(parts)}; expected {', '.join(PARTS)}, as in "
                "packed_text(source, tokenizer, {'calibration': 41_000, 'validation': 4_096, 'test': 12_288})."
            )
        lengths = {name: tuple(part.input_ids.shape) for name, part in parts.items()}
        if not all(rows for rows, _ in lengths.values()) or len({length for _, length in lengths.values()}) > 1:
            raise StreamlineError(
                f"Packed text has rows and tokens of {lengths}; expected a row at least in each part, all of one "
                "length. Of several processes each needs the same rows: "
                "packed_text(..., processes=Processes(0, 1))."
            )
        calibration, validation, test = (parts[name].input_ids.long() for name in PARTS)
        positions = {name: parts[name].position_ids.long() for name in PARTS}
        fingerprint = fingerprint_of(calibration, positions["calibration"])
        notes = tuple(parts[name].note for name in PARTS if parts[name].note)
        return cls(calibration, validation, test, fingerprint, notes, positions)

    @property
    def sequence_length(self) -> int:
        """Return the tokens in each sequence."""
        return int(self.calibration.shape[1])

    @property
    def tensors(self) -> list[Tensor]:
        """Return all ids and positions, in order."""
        return [self.calibration, self.validation, self.test, *self.positions.values()]

    def part_of_calibration(self, number: int, parts: int) -> TokenSplit:
        """Return the split with one of several equal runs of the calibration sequences.

        Raises
        ------
        StreamlineError
            If there are not two sequences for each part.

        Examples
        --------
        >>> split = TokenSplit(torch.arange(16).view(8, 2), torch.zeros(1, 2), torch.zeros(1, 2), fingerprint="")
        >>> split.part_of_calibration(1, 3).calibration[:, 0].tolist()
        [4, 6, 8]
        """
        if len(self.calibration) < 2 * parts:
            raise StreamlineError(
                f"The calibration text fills {len(self.calibration)} sequences of {self.sequence_length} tokens, and "
                f"{parts} rounds need two each at least. Give more text, ask for fewer rounds, or for a smaller "
                "--sequence-length."
            )
        edges = [k * len(self.calibration) // parts for k in range(parts + 1)]
        own = slice(edges[number], edges[number + 1])
        rows = self.calibration[own]
        positions = dict(self.positions)
        if positions:
            positions["calibration"] = positions["calibration"][own]
        digested = (rows, positions["calibration"]) if positions else (rows,)
        return replace(self, calibration=rows, positions=positions, fingerprint=fingerprint_of(*digested))

    def figures(self) -> dict[str, Any]:
        """Return sizes, fingerprint and notes as JSON values."""
        return {
            "calibration_tokens": self.calibration.numel(),
            "validation_tokens": self.validation.numel(),
            "test_tokens": self.test.numel(),
            "sequence_length": self.sequence_length,
            "fingerprint": self.fingerprint,
            "notes": list(self.notes),
        }

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
    """Split documents into test, validation and calibration, and tokenize what is needed.

    Documents are used in the order of a hash of seed and content, so the order of the files does not matter. Test is
    filled first, then validation, then calibration. A paragraph of 80 characters or more of an earlier part is removed
    from later ones. A document contributes at most a quarter of its part, or one sequence if that is more.

    If there are too few documents, long ones are cut at paragraphs into pieces of about one to four sequences; if there
    is too little text, all parts shrink by one ratio. Documents of a part are joined by a blank line, tokenized one by
    one without special tokens, and cut into full sequences.

    Parameters
    ----------
    documents : sequence of str
        The text, see `read_documents`.
    tokenizer : PreTrainedTokenizerBase
        Called as ``tokenizer(text, add_special_tokens=False, verbose=False)``; its ``input_ids`` are read.
    seed : int, default 0
    sequence_length : int, default 512
    calibration_tokens, validation_tokens, test_tokens : int
        Size of each part in tokens, rounded down to full sequences.
    test_documents : sequence of str, optional
        Text of the test part. Then none of these documents and their long paragraphs, used or not, is in the other
        parts.

    Returns
    -------
    TokenSplit

    Raises
    ------
    StreamlineError
        If a size is less than one sequence, or the text does not fill one sequence of each part.

    Examples
    --------
    Any callable that returns ``input_ids`` will do; this one replaces each word by its length:

    >>> def tokenizer(text, **options):
    ...     return {"input_ids": [len(word) for word in text.split()]}
    >>> documents = [f"This is the document number {n}." for n in range(60)]
    >>> split = split_documents(
    ...     documents,
    ...     tokenizer,
    ...     sequence_length=12,
    ...     calibration_tokens=120,
    ...     validation_tokens=24,
    ...     test_tokens=48,
    ... )
    >>> split.calibration.shape, split.validation.shape, split.test.shape
    (torch.Size([10, 12]), torch.Size([2, 12]), torch.Size([4, 12]))
    """
    sizes = {"test": test_tokens, "validation": validation_tokens, "calibration": calibration_tokens}
    check_sizes(sizes, sequence_length)
    encode = Encoder(tokenizer)
    shared = shuffled(documents, seed)
    if test_documents is None:
        parts, notes = deal_parts(shared, sizes, encode, sequence_length, seed)
    else:
        scored = shuffled(test_documents, seed)
        forbidden = frozenset(paragraph for document in scored for paragraph in long_paragraphs(document))
        excluded = set(scored)
        shared = [document for document in shared if document not in excluded]
        parts, notes = deal_parts(scored, {"test": sizes.pop("test")}, encode, sequence_length, seed)
        more, more_notes = deal_parts(shared, sizes, encode, sequence_length, seed, forbidden)
        parts, notes = parts | more, notes + more_notes
    tensors = {name: torch.tensor(ids, dtype=torch.long).view(-1, sequence_length) for name, ids in parts.items()}
    calibration, validation, test = (tensors[name] for name in PARTS)
    return TokenSplit(calibration, validation, test, fingerprint_of(calibration), tuple(notes))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int, split: TokenSplit | None = None) -> None:
    """Raise if a tokenizer produces ids that the model has no embedding for.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    vocabulary_size : int
        Rows of the model's embedding, ``model.get_input_embeddings().num_embeddings``.
    split : TokenSplit, optional
        The ids that are used. Default: the whole vocabulary of the tokenizer.

    Raises
    ------
    StreamlineError
        If an id is out of range.

    Examples
    --------
    >>> from streamline_hooks.errors import StreamlineError
    >>> split = TokenSplit(*torch.arange(12).view(3, 1, 4), fingerprint="")
    >>> check_tokenizer(None, 12, split)
    >>> try:
    ...     check_tokenizer(None, 10, split)
    ... except StreamlineError as error:
    ...     print(error)
    The tokenizer does not belong to this model: ...
    """
    if split is None:
        largest, where = max(tokenizer.get_vocab().values()), "its vocabulary holds"
    else:
        largest = max(int(ids.max()) for ids in (split.calibration, split.validation, split.test))
        where = "this text was given"
    if largest >= vocabulary_size:
        name = getattr(tokenizer, "name_or_path", "")
        raise StreamlineError(
            f"The tokenizer{f' {name!r}' if name else ''} does not belong to this model: {where} the id {largest:,}, "
            f"and the model's embedding has {vocabulary_size:,} rows. Expected ids from 0 to "
            f"{vocabulary_size - 1:,}. Load the tokenizer from the folder or hub name that the model comes from, or "
            "resize the model's embedding."
        )


def check_sizes(sizes: Mapping[str, int], length: int) -> None:
    """Raise if a part is smaller than a sequence."""
    for name, size in sizes.items():
        if length < 1 or size < length:
            raise StreamlineError(
                f"{name}_tokens={size} with sequence_length={length}: expected a positive sequence length and at "
                f"least one sequence in each part. Ask for {name}_tokens={max(length, 1)} or more, or for a smaller "
                "--sequence-length."
            )


def fingerprint_of(*rows: Tensor) -> str:
    """Return the SHA-256, in hexadecimal, of ids, their shape and their positions."""
    digest = hashlib.sha256(f"{tuple(rows[0].shape)}".encode())
    for numbers in rows:
        digest.update(numbers.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()

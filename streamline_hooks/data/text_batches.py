"""Create batches for encoders: windows of documents with special tokens, padded on the right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from streamline_hooks.core import IGNORE_INDEX, StreamlineError
from streamline_hooks.data.document_parts import Encoder, check_counts, fill_parts_with_whole_documents, hash_shuffle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Item = TypeVar("_Item")
_SAMPLE = 200  # characters


def text_parts(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, int],
    *,
    sequence_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    masked: float = 0.0,
) -> dict[str, list[dict[str, Tensor]]]:
    """Split documents into parts, and cut each document into windows for an encoder.

    Whole documents are assigned to parts in the order of a hash of seed and content. A paragraph of at least 80
    characters is in one part only. A document contributes at most a quarter of its part, or one window if that is more,
    and begins a new window. The last part is filled first, so a larger first part does not change the other parts.

    Parameters
    ----------
    documents : sequence of str
        The text, see `read_documents`.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    tokens : mapping of str to int
        Text tokens per part, such as ``{"calibration": 41_000, "test": 16_384}``, without special tokens and padding;
        rounded down to full windows.
    sequence_length : int, default 512
        Maximum tokens of a window, including special tokens.
    batch_size : int, default 8
        Windows per batch.
    seed : int, default 0
        Seed of the order of the documents and of the masking.
    masked : float, default 0.0
        Fraction of tokens that are replaced by the mask token, at least one per window. Special tokens are only masked
        in windows without other tokens.

    Returns
    -------
    dict of str to list of dict
        The batches of each part: ``input_ids`` and ``attention_mask`` of shape (batch, tokens), int64;
        ``token_type_ids`` if the tokenizer returns them; with masking ``labels``, which are -100 at unmasked tokens.

    Raises
    ------
    StreamlineError
        If there are too few documents, a size is out of range, or the tokenizer has no padding or mask token.

    Examples
    --------
    >>> from transformers import ByT5Tokenizer
    >>> documents = [f"Document number {n}." for n in range(40)]
    >>> parts = text_parts(documents, ByT5Tokenizer(), {"calibration": 90, "test": 30}, sequence_length=11)
    >>> [(name, tuple(batches[0]["input_ids"].shape)) for name, batches in parts.items()]
    [('calibration', (8, 11)), ('test', (3, 11))]
    """
    check_counts(tokens, "tokens", batch_size)
    longest = getattr(tokenizer, "model_max_length", None)
    if isinstance(longest, int) and sequence_length > longest:
        raise StreamlineError(
            f"sequence_length={sequence_length:,} is too large: tokenizer.model_max_length allows {longest:,} tokens. "
            "Reduce sequence_length, or correct tokenizer.model_max_length if the model accepts more tokens."
        )
    padding = pad_token_id(tokenizer)
    ordered = hash_shuffle(documents, seed)
    if not ordered:
        raise StreamlineError("No text was given. Expected at least one document. Read documents with read_documents.")
    frame = _SpecialTokens.of(tokenizer, ordered[0][:_SAMPLE])
    text_length = sequence_length - frame.size
    for name, size in tokens.items():
        if text_length < 1 or size < text_length:
            raise StreamlineError(
                f"{size:,} tokens for the part {name!r} with sequence_length={sequence_length}, of which {frame.size} "
                "are the tokenizer's special tokens, are too few. Expected at least one text token per window, and one "
                f"full window in each part. Request {max(text_length, 1):,} tokens or more, or another sequence_length."
            )
    sizes = {name: tokens[name] for name in reversed(list(tokens))}
    ids_by_part = fill_parts_with_whole_documents(ordered, sizes, Encoder(tokenizer, separator=""), text_length)
    parts: dict[str, list[dict[str, Tensor]]] = {}
    for name in tokens:
        windows = [window for ids in ids_by_part[name] for window in chunked(ids, text_length)]
        parts[name] = [_batch(frame, rows, padding, tokenizer) for rows in chunked(windows, batch_size)]
        if masked:
            parts[name] = _mask_tokens(parts[name], frame, tokenizer, masked, f"{seed} {name}")
    return parts


def _mask_tokens(
    batches: list[dict[str, Tensor]], frame: _SpecialTokens, tokenizer: PreTrainedTokenizerBase, share: float, seed: str
) -> list[dict[str, Tensor]]:
    """Mask random tokens of each batch, and add labels."""
    mask = tokenizer.mask_token_id
    if mask is None or not 0.0 < share < 1.0:
        what = "no mask token" if mask is None else f"the mask token {mask}"
        raise StreamlineError(
            f"masked={share} with a tokenizer that has {what} is invalid. Expected a fraction between 0 and 1, and the "
            "tokenizer of a masked language model. Use masked=0 for other encoders."
        )
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7]))
    special = torch.tensor(tokenizer.all_special_ids)
    masked_batches = []
    for batch in batches:
        ids = batch["input_ids"]
        lengths = batch["attention_mask"].sum(dim=1, keepdim=True)
        position = torch.arange(ids.shape[1])
        inside = (position >= len(frame.before)) & (position < lengths - len(frame.after))
        text = inside & ~torch.isin(ids, special)
        text |= inside & ~text.any(dim=1, keepdim=True)  # windows with only special tokens, such as unknown words
        random_values = torch.rand(ids.shape, generator=generator).masked_fill(~text, 2.0)
        chosen = text & ((random_values < share) | (random_values == random_values.amin(dim=1, keepdim=True)))
        masked_batches.append(
            {**batch, "input_ids": ids.where(~chosen, mask), "labels": ids.where(chosen, IGNORE_INDEX)}
        )
    return masked_batches


def chunked(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    """Yield consecutive chunks of `size` items; the last chunk may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def right_padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Stack rows of different lengths as a LongTensor of shape (rows, longest), padded on the right with `value`."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a tokenizer's padding token; raise if it has none."""
    number = tokenizer.pad_token_id
    if not isinstance(number, int):
        raise StreamlineError(
            f"The tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__!r} has no padding "
            "token. Expected a padding token, because texts of different lengths are batched. Set a token of the "
            'model\'s vocabulary: tokenizer.pad_token = "<pad>".'
        )
    return number


@dataclass(frozen=True)
class _SpecialTokens:
    """Special tokens before and after a text, and the token types if the tokenizer returns them."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    types: tuple[tuple[int, ...], int, tuple[int, ...]] | None

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, sample: str) -> _SpecialTokens:
        """Compare the ids of a sample text with and without special tokens."""
        plain_ids = tuple(tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"])
        encoding = tokenizer(sample, add_special_tokens=True, verbose=False)
        ids = tuple(encoding["input_ids"])
        for start in range(len(ids) - len(plain_ids) + 1):
            end = start + len(plain_ids)
            if plain_ids and ids[start:end] == plain_ids:
                types = encoding.get("token_type_ids")
                kinds = None if types is None else (tuple(types[:start]), types[start], tuple(types[end:]))
                return cls(ids[:start], ids[end:], kinds)
        raise StreamlineError(
            f"The tokenizer returns {list(plain_ids)} for a text without special tokens and {list(ids)} with special "
            "tokens. Expected the same tokens between special tokens. Check that this is the tokenizer of an encoder, "
            "and that the text is not blank."
        )


def _batch(
    frame: _SpecialTokens, windows: Sequence[Sequence[int]], padding: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    rows = [[*frame.before, *ids, *frame.after] for ids in windows]
    batch = {
        "input_ids": right_padded(rows, padding),
        "attention_mask": right_padded([[1] * len(row) for row in rows], 0),
    }
    if frame.types is not None:
        before, inside, after = frame.types
        types = [[*before, *(inside for _ in ids), *after] for ids in windows]
        batch["token_type_ids"] = right_padded(types, tokenizer.pad_token_type_id)
    return batch

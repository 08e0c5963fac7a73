"""Batches for encoders: documents in windows between special tokens, padded on the right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from streamline_hooks.calibration.dealing import Encoder, check_counts, deal_whole, shuffled
from streamline_hooks.errors import StreamlineError

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
    """Split documents into parts, and cut each into windows as encoders are trained.

    Whole documents are split in the order of a hash of seed and content; a paragraph of 80 characters or more is in one
    part only; a document contributes at most a quarter of its part, or one window if that is more. Each document begins
    a new window. The last part is filled first, so that more for the first does not change the others.

    Parameters
    ----------
    documents : sequence of str
        The text, see `read_documents`.
    tokenizer : PreTrainedTokenizerBase
    tokens : mapping of str to int
        Tokens of text per part, such as ``{"calibration": 41_000, "test": 16_384}``, without special tokens and
        padding; rounded down to full windows.
    sequence_length : int, default 512
        Maximal tokens in a window, with special tokens.
    batch_size : int, default 8
    seed : int, default 0
    masked : float, default 0.0
        The share of tokens that are replaced by the mask token, at least one per window. Special tokens are only masked
        in a window without others.

    Returns
    -------
    dict of str to list of dict
        The batches of each part: ``input_ids`` and ``attention_mask`` of shape (batch, tokens), int64,
        ``token_type_ids`` if the tokenizer makes them, and with masking ``labels``, which are -100 elsewhere.

    Raises
    ------
    StreamlineError
        If there are too few documents, a size is out of range, or the tokenizer has no padding or mask token.

    Examples
    --------
    >>> from transformers import AutoTokenizer
    >>> tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased")  # doctest: +SKIP
    >>> parts = text_parts(documents, tokenizer, {"calibration": 41_000, "test": 16_384})  # doctest: +SKIP
    >>> parts["test"][0]["input_ids"].shape  # doctest: +SKIP
    torch.Size([8, 512])
    """
    check_counts(tokens, "tokens", batch_size)
    _check_length(tokenizer, sequence_length)
    padding = padding_token(tokenizer)
    ordered = shuffled(documents, seed)
    if not ordered:
        raise StreamlineError("No text was given. Expected documents, as read_documents returns them.")
    frame = _Frame.of(tokenizer, ordered[0][:_SAMPLE])
    room = sequence_length - frame.size
    for name, size in tokens.items():
        if room < 1 or size < room:
            raise StreamlineError(
                f"{size:,} tokens for the part {name!r} with sequence_length={sequence_length}, of which {frame.size} "
                "are the tokenizer's special tokens. Expected at least one token of text in a window, and one full "
                f"window in each part. Ask for {max(room, 1):,} tokens or more, or for another sequence_length."
            )
    sizes = {name: tokens[name] for name in reversed(list(tokens))}
    dealt = deal_whole(ordered, sizes, Encoder(tokenizer, separator=""), room)
    parts: dict[str, list[dict[str, Tensor]]] = {}
    for name in tokens:
        windows = [window for ids in dealt[name] for window in in_runs(ids, room)]
        parts[name] = [_batch(frame, rows, padding, tokenizer) for rows in in_runs(windows, batch_size)]
        if masked:
            parts[name] = _masked(parts[name], frame, tokenizer, masked, f"{seed} {name}")
    return parts


def _masked(
    batches: list[dict[str, Tensor]], frame: _Frame, tokenizer: PreTrainedTokenizerBase, share: float, seed: str
) -> list[dict[str, Tensor]]:
    """Mask some tokens of each batch, drawn by the seed, and add labels."""
    mask = tokenizer.mask_token_id
    if mask is None or not 0.0 < share < 1.0:
        what = "no mask" if mask is None else f"the mask {mask}"
        raise StreamlineError(
            f"masked={share} with {what} in the tokenizer: expected a share between 0 and 1, and the tokenizer of a "
            "model that fills places in."
        )
    drawn = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7]))
    special = torch.tensor(tokenizer.all_special_ids)
    found = []
    for batch in batches:
        ids = batch["input_ids"]
        lengths = batch["attention_mask"].sum(dim=1, keepdim=True)
        place = torch.arange(ids.shape[1])
        inside = (place >= len(frame.before)) & (place < lengths - len(frame.behind))
        text = inside & ~torch.isin(ids, special)
        text |= inside & ~text.any(dim=1, keepdim=True)  # a window of unknown words alone
        luck = torch.rand(ids.shape, generator=drawn).masked_fill(~text, 2.0)
        chosen = text & ((luck < share) | (luck == luck.amin(dim=1, keepdim=True)))
        found.append({**batch, "input_ids": ids.where(~chosen, mask), "labels": ids.where(chosen, -100)})
    return found


def in_runs(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    """Return runs of so many items; the last one may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def right_padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Stack rows of different lengths into a LongTensor of shape (rows, longest), padded on the right."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a tokenizer's padding token, or raise."""
    number = tokenizer.pad_token_id
    if not isinstance(number, int):
        raise StreamlineError(
            f"The tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__!r} has no padding "
            "token, and texts of different lengths are to stand in one batch. Expected the tokenizer of the model. "
            'Give it one that the model knows: tokenizer.pad_token = "<pad>".'
        )
    return number


@dataclass(frozen=True)
class _Frame:
    """Special tokens before and after a text, and the token types, if any."""

    before: tuple[int, ...]
    behind: tuple[int, ...]
    types: tuple[tuple[int, ...], int, tuple[int, ...]] | None

    @property
    def size(self) -> int:
        return len(self.before) + len(self.behind)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, sample: str) -> _Frame:
        """Determine it from a text with and without special tokens."""
        bare = tuple(tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"])
        whole = tokenizer(sample, add_special_tokens=True, verbose=False)
        ids = tuple(whole["input_ids"])
        for start in range(len(ids) - len(bare) + 1):
            end = start + len(bare)
            if bare and ids[start:end] == bare:
                types = whole.get("token_type_ids")
                kinds = None if types is None else (tuple(types[:start]), types[start], tuple(types[end:]))
                return cls(ids[:start], ids[end:], kinds)
        raise StreamlineError(
            f"The tokenizer gives {list(bare)} to a text without special tokens and {list(ids)} with them. Expected "
            "the same tokens between others. Check that it is the tokenizer of an encoder, and that the text is not "
            "made of blanks."
        )

    def around(self, ids: Sequence[int]) -> list[int]:
        return [*self.before, *ids, *self.behind]

    def types_around(self, ids: Sequence[int]) -> list[int]:
        before, inside, behind = self.types or ((), 0, ())
        return [*before, *(inside for _ in ids), *behind]


def _batch(
    frame: _Frame, windows: Sequence[Sequence[int]], padding: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    rows = [frame.around(ids) for ids in windows]
    batch = {
        "input_ids": right_padded(rows, padding),
        "attention_mask": right_padded([[1] * len(row) for row in rows], 0),
    }
    if frame.types is not None:
        types = [frame.types_around(ids) for ids in windows]
        batch["token_type_ids"] = right_padded(types, tokenizer.pad_token_type_id)
    return batch


def _check_length(tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    longest = getattr(tokenizer, "model_max_length", None)
    if isinstance(longest, int) and length > longest:
        raise StreamlineError(
            f"sequence_length={length:,} and a tokenizer whose model takes {longest:,} tokens at most. Expected no "
            "more than that. Ask for less, or correct tokenizer.model_max_length if the model takes more."
        )

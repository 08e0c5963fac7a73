"""Read pairs of source and target texts, split them into parts, and batch them for encoder-decoder models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from streamline_hooks.core import IGNORE_INDEX, StreamlineError
from streamline_hooks.data.document_parts import check_counts, hash_shuffle, long_paragraphs
from streamline_hooks.data.documents import JSONL_SUFFIXES, PARQUET, as_list, read_columns, visible_files
from streamline_hooks.data.text_batches import chunked, pad_token_id, right_padded

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

COLUMN_NAMES = (("source", "target"), ("text", "summary"), ("question", "answer"))
"""Alternative names of the two columns; the first pair that a file has is read."""

_SUFFIXES = (PARQUET, *JSONL_SUFFIXES)
_EXPECTED = "a JSONL file, a Parquet file, or a folder of such files"


class TextPair(NamedTuple):
    """The input text of an encoder and the target text of its decoder.

    Attributes
    ----------
    source, target : str

    Examples
    --------
    >>> TextPair("ein Baum", "a tree").target
    'a tree'
    """

    source: str
    target: str


def read_pairs(sources: str | Path | Sequence[str | Path], *, columns: tuple[str, str] | None = None) -> list[TextPair]:
    r"""Read pairs of texts from JSONL and Parquet files.

    Parquet files need the extra ``datasets``: ``pip install "streamline_hooks[datasets]"``.

    Parameters
    ----------
    sources : str, Path or a sequence of them
        Each is a JSONL file (``.jsonl``, plain or compressed), a Parquet file (``.parquet``), or a folder of such
        files, read recursively in the order of their names; hidden files are skipped.
    columns : tuple of two str, optional
        The names of the columns. Default: the first of ``source`` and ``target``, ``text`` and ``summary``,
        ``question`` and ``answer`` that the file has.

    Returns
    -------
    list of TextPair
        The stripped pairs in order, without exact repetitions and without pairs in which a text is empty.

    Raises
    ------
    StreamlineError
        If a source does not exist, cannot be read or has other columns, or if no source contains a pair.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "two.jsonl")
    ...     _ = path.write_text('{"source": "ein Baum", "target": "a tree"}\n{"source": "so", "target": ""}\n')
    ...     read_pairs(path)
    [TextPair(source='ein Baum', target='a tree')]
    """
    names = COLUMN_NAMES if columns is None else [columns]
    files = [file for source in as_list(sources) for file in _files(source)]
    rows = (tuple((text or "").strip() for text in row) for file in files for row in read_columns(file, names))
    pairs = dict.fromkeys(TextPair(*row) for row in rows if all(row))
    if not pairs:
        quoted = ", ".join(repr(str(path)) for path in as_list(sources)) or "an empty list of sources"
        raise StreamlineError(
            f"No pair was found in {quoted}. Expected {_EXPECTED}, with both texts of a pair not empty. Check the name "
            "of the source, and that it is not empty."
        )
    return list(pairs)


def _files(source: str | Path) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        return visible_files(path, _SUFFIXES)
    if not (path.exists() and path.name.lower().endswith(_SUFFIXES)):
        reason = f"its name ends in {path.suffix!r}" if path.exists() else "there is no such file or folder"
        raise StreamlineError(
            f"No pairs can be read from {str(source)!r}: {reason}. Expected {_EXPECTED}. Check the spelling of the "
            'path, or write a JSONL file with lines such as {"source": "...", "target": "..."}.'
        )
    return [path]


def pair_parts(
    pairs: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    counts: Mapping[str, int],
    model: nn.Module,
    *,
    batch_size: int = 8,
    lengths: tuple[int, int] = (512, 128),
    prefix: str = "",
    seed: int = 0,
) -> dict[str, list[dict[str, Tensor]]]:
    """Split pairs into parts, and batch them with labels for an encoder-decoder model.

    Pairs are used in the order of a hash of seed and source. No two parts share a source (compared by token ids after
    truncation) or a paragraph of at least 80 characters. The last part is filled first, so a larger first part does not
    change the other parts.

    Parameters
    ----------
    pairs : sequence of (str, str)
        Sources and targets, see `read_pairs`.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer. It receives targets as ``text_target``.
    counts : mapping of str to int
        Pairs per part, such as ``{"calibration": 128, "validation": 32, "test": 64}``.
    model : torch.nn.Module
        The encoder-decoder model. Only its ``prepare_decoder_input_ids_from_labels`` is called, which shifts the
        targets to the right.
    batch_size : int, default 8
        Pairs per batch.
    lengths : (int, int), default (512, 128)
        Maximum number of tokens of a source and of a target, including special tokens; longer texts are truncated.
    prefix : str
        Text to prepend to each source, such as T5's ``"summarize: "``.
    seed : int, default 0
        Seed of the order of the pairs.

    Returns
    -------
    dict of str to list of dict
        The batches of each part, int64, padded on the right: ``input_ids`` and ``attention_mask`` of shape (batch,
        source tokens); ``decoder_input_ids``, ``decoder_attention_mask`` and ``labels`` of shape (batch, target
        tokens). ``labels`` are -100 at padding.

    Raises
    ------
    StreamlineError
        If there are too few pairs, a number is out of range, the tokenizer has no padding token, or the model cannot
        shift targets.

    Examples
    --------
    >>> from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration
    >>> config = T5Config(num_layers=1, d_model=8, d_kv=4, d_ff=8, num_heads=2, decoder_start_token_id=0)
    >>> model = T5ForConditionalGeneration(config)
    >>> pairs = [(f"number {n}", str(n)) for n in range(6)]
    >>> parts = pair_parts(pairs, ByT5Tokenizer(), {"calibration": 4, "test": 2}, model)
    >>> {name: tuple(batches[0]["input_ids"].shape) for name, batches in parts.items()}
    {'calibration': (4, 9), 'test': (2, 9)}
    """
    check_counts(counts, "pairs", batch_size)
    source_length, target_length = lengths
    if min(lengths) < 1:
        raise StreamlineError(
            f"lengths={lengths} is out of range. Expected the maximum tokens of a source and of a target, 1 or more. "
            "Give, for example, lengths=(512, 128)."
        )
    padding = pad_token_id(tokenizer)

    def encode(source: str) -> tuple[int, ...]:
        return tuple(tokenizer(prefix + source, truncation=True, max_length=source_length)["input_ids"])

    def batch(rows: Sequence[tuple[Sequence[int], str]]) -> dict[str, Tensor]:
        texts = [target for _, target in rows]
        targets = tokenizer(text_target=texts, truncation=True, max_length=target_length)["input_ids"]
        labels = right_padded(targets, IGNORE_INDEX)
        return {
            "input_ids": right_padded([ids for ids, _ in rows], padding),
            "attention_mask": right_padded([[1] * len(ids) for ids, _ in rows], 0),
            "decoder_input_ids": _decoder_input_ids(model, labels),
            "decoder_attention_mask": right_padded([[1] * len(ids) for ids in targets], 0),
            "labels": labels,
        }

    rows_by_part = _split_pairs(pairs, encode, counts, seed)
    return {name: [batch(rows) for rows in chunked(rows_by_part[name], batch_size)] for name in counts}


def _split_pairs(
    pairs: Sequence[tuple[str, str]], encode: Callable[[str], tuple[int, ...]], counts: Mapping[str, int], seed: int
) -> dict[str, list[tuple[tuple[int, ...], str]]]:
    """Fill the parts with the token ids of sources and their targets, and tokenize only as much as needed."""
    targets: dict[str, set[str]] = {}
    for source, target in pairs:
        targets.setdefault(source.strip(), set()).add(target.strip())
    remaining = hash_shuffle(targets, seed)[::-1]
    seen: set[Any] = set()  # paragraphs, and token ids of whole sources
    filled: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    left_out = 0
    for name in reversed(list(counts)):
        part: list[tuple[tuple[int, ...], str]] = []
        seen_in_part: set[Any] = set()
        while len(part) < counts[name]:
            if not remaining:
                requested = ", ".join(f"{name} {count:,}" for name, count in counts.items())
                raise StreamlineError(
                    f"{requested} pairs were requested, and there are {len(targets):,} different sources, {left_out:,} "
                    f"of which repeat text of another part. Expected {sum(counts.values()):,} pairs such that no two "
                    "parts share a source or a paragraph. Give more pairs, or request fewer."
                )
            source = remaining.pop()
            texts, ids = sorted(targets[source]), encode(source)
            contents = {ids, *(paragraph for text in (source, *texts) for paragraph in long_paragraphs(text))}
            if not seen.isdisjoint(contents):
                left_out += 1
                continue
            seen_in_part |= contents
            part += [(ids, target) for target in texts]
        seen |= seen_in_part
        filled[name] = part[: counts[name]]
    return filled


def _decoder_input_ids(model: Any, labels: Tensor) -> Tensor:
    """Return the labels shifted to the right, by the model's method or like Transformers' `shift_tokens_right`."""
    try:
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels.clone())
            return shifted
        start, padding = model.config.decoder_start_token_id, model.config.pad_token_id
        shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == IGNORE_INDEX, padding)
    except (AttributeError, TypeError, ValueError) as error:
        raise StreamlineError(
            f"{type(model).__name__} cannot shift targets to the right ({error}). Expected an encoder-decoder model of "
            "Transformers whose configuration has decoder_start_token_id and pad_token_id. Set them to the values that "
            "the model was trained with."
        ) from error

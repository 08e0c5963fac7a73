"""Read pairs of a source and a target, split them into parts, and batch them for encoder-decoder models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from streamline_hooks.calibration.dealing import check_counts, long_paragraphs, shuffled
from streamline_hooks.calibration.documents import JSONL_SUFFIXES, PARQUET, listed, read_columns, visible_files
from streamline_hooks.calibration.text_batches import in_runs, padding_token, right_padded
from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

NAMES = (("source", "target"), ("text", "summary"), ("question", "answer"))
"""Names of the two columns, in the order in which they are looked for."""

_IGNORED = -100  # the label that PyTorch's cross entropy ignores
_SUFFIXES = (PARQUET, *JSONL_SUFFIXES)
_EXPECTED = "a JSONL file, a Parquet file, or a folder of such files"


class TextPair(NamedTuple):
    """The input of an encoder, and the text that its decoder is to generate."""

    source: str
    target: str


def read_pairs(sources: str | Path | Sequence[str | Path], *, columns: tuple[str, str] | None = None) -> list[TextPair]:
    r"""Read the pairs of JSONL and Parquet files.

    Needs the optional package ``datasets``: ``pip install "streamline_hooks[datasets]"``.

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
        In order, stripped, without pairs of which a side is empty and without exact repetitions.

    Raises
    ------
    StreamlineError
        If a source does not exist or cannot be read, has other columns, or no source contains a pair.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "two.jsonl")
    ...     _ = path.write_text('{"source": "ein Haus", "target": "a house"}\n{"source": "so", "target": ""}\n')
    ...     read_pairs(path)
    [TextPair(source='ein Haus', target='a house')]
    """
    names = NAMES if columns is None else [columns]
    files = [file for source in listed(sources) for file in _files(source)]
    rows = (tuple((text or "").strip() for text in row) for file in files for row in read_columns(file, names))
    pairs = dict.fromkeys(TextPair(*row) for row in rows if all(row))
    if not pairs:
        quoted = ", ".join(repr(str(path)) for path in listed(sources)) or "an empty list of sources"
        raise StreamlineError(
            f"No pair was found in {quoted}. Expected {_EXPECTED}, with text on both sides of a pair. Check that the "
            "source is the one you mean and is not empty."
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
    source_length: int = 512,
    target_length: int = 128,
    prefix: str = "",
    seed: int = 0,
) -> dict[str, list[dict[str, Tensor]]]:
    """Split pairs into parts, and batch them as encoder-decoder models are trained.

    Pairs are taken in the order of a hash of seed and source. No two parts share a source (as token ids, after
    truncation) or a paragraph of 80 characters or more. The last part is filled first, so that more for the first does
    not change the others.

    Parameters
    ----------
    pairs : sequence of (str, str)
        Sources and targets, see `read_pairs`.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer. It receives targets as ``text_target``.
    counts : mapping of str to int
        Pairs per part, such as ``{"calibration": 128, "validation": 32, "test": 64}``.
    model : torch.nn.Module
        The encoder-decoder model; its ``prepare_decoder_input_ids_from_labels`` shifts the targets. It is not run.
    batch_size : int, default 8
    source_length, target_length : int
        Maximal number of tokens, with special tokens; longer texts are truncated.
    prefix : str
        Prepended to each source, such as T5's ``"summarize: "``.
    seed : int, default 0

    Returns
    -------
    dict of str to list of dict
        The batches of each part, int64: ``input_ids`` and ``attention_mask`` of shape (batch, source tokens);
        ``decoder_input_ids``, ``decoder_attention_mask`` and ``labels`` of shape (batch, target tokens), padded on the
        right; ``labels`` are -100 there.

    Raises
    ------
    StreamlineError
        If there are too few pairs, a number is out of range, the tokenizer cannot pad, or the model does not shift
        targets.

    Examples
    --------
    >>> from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    >>> model = AutoModelForSeq2SeqLM.from_pretrained("t5-small")  # doctest: +SKIP
    >>> tokenizer = AutoTokenizer.from_pretrained("t5-small")  # doctest: +SKIP
    >>> parts = pair_parts(pairs, tokenizer, {"calibration": 128, "test": 64}, model)  # doctest: +SKIP
    """
    check_counts(counts, "pairs", batch_size)
    for name, length in (("source_length", source_length), ("target_length", target_length)):
        if length < 1:
            raise StreamlineError(f"{name}={length}: expected the most tokens of a text, 1 or more.")
    padding = padding_token(tokenizer)

    def encode(source: str) -> tuple[int, ...]:
        return tuple(tokenizer(prefix + source, truncation=True, max_length=source_length)["input_ids"])

    dealt = _deal(pairs, encode, counts, seed)
    parts: dict[str, list[dict[str, Tensor]]] = {}
    for name in counts:
        parts[name] = []
        for rows in in_runs(dealt[name], batch_size):
            texts = [target for _, target in rows]
            targets = tokenizer(text_target=texts, truncation=True, max_length=target_length)["input_ids"]
            parts[name].append(_batch([ids for ids, _ in rows], targets, padding, model))
    return parts


def _batch(
    sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], padding: int, model: Any
) -> dict[str, Tensor]:
    labels = right_padded(targets, _IGNORED)
    return {
        "input_ids": right_padded(sources, padding),
        "attention_mask": right_padded([[1] * len(ids) for ids in sources], 0),
        "decoder_input_ids": _shifted(model, labels),
        "decoder_attention_mask": right_padded([[1] * len(ids) for ids in targets], 0),
        "labels": labels,
    }


def _deal(
    pairs: Sequence[tuple[str, str]], encode: Callable[[str], tuple[int, ...]], counts: Mapping[str, int], seed: int
) -> dict[str, list[tuple[tuple[int, ...], str]]]:
    """Fill one part after the other with the tokens of sources and their targets; no more is tokenised than is used."""
    targets: dict[str, set[str]] = {}
    for source, target in pairs:
        targets.setdefault(source.strip(), set()).add(target.strip())
    remaining = shuffled(targets, seed)[::-1]
    seen: set[Any] = set()  # paragraphs, and the tokens of whole sources
    dealt: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    left_out = 0
    for name in reversed(list(counts)):
        part: list[tuple[tuple[int, ...], str]] = []
        own: set[Any] = set()
        while len(part) < counts[name]:
            if not remaining:
                asked = ", ".join(f"{name} {count:,}" for name, count in counts.items())
                raise StreamlineError(
                    f"{asked} pairs were asked for, and there are {len(targets):,} different sources, {left_out:,} of "
                    f"which repeat text of another part. Expected {sum(counts.values()):,} pairs of which no two parts "
                    "share a source or a paragraph. Give more pairs, or ask for fewer."
                )
            source = remaining.pop()
            texts, ids = sorted(targets[source]), encode(source)
            holds = {ids, *(paragraph for text in (source, *texts) for paragraph in long_paragraphs(text))}
            if not seen.isdisjoint(holds):
                left_out += 1
                continue
            own |= holds
            part += [(ids, target) for target in texts]
        seen |= own
        dealt[name] = part[: counts[name]]
    return dealt


def _shifted(model: Any, labels: Tensor) -> Tensor:
    """Return decoder inputs as the model makes them of labels, or as Transformers' `shift_tokens_right` does."""
    try:
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            return model.prepare_decoder_input_ids_from_labels(labels.clone())
        start, padding = model.config.decoder_start_token_id, model.config.pad_token_id
        shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == _IGNORED, padding)
    except (AttributeError, TypeError, ValueError) as error:
        raise StreamlineError(
            f"{type(model).__name__} cannot shift targets to the right ({error}). Expected an encoder-decoder model of "
            "Transformers whose configuration has decoder_start_token_id and pad_token_id. Set these as the model was "
            "trained."
        ) from error

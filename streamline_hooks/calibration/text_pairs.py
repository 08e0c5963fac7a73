"""Batches for encoder–decoders: pairs of a source and a target, the targets shifted as the model shifts them."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from streamline_hooks.calibration.dealing import check_counts, long_paragraphs, shuffled
from streamline_hooks.calibration.documents import listed
from streamline_hooks.calibration.files import (
    JSONL_SUFFIXES,
    PARQUET,
    json_rows,
    mended,
    parquet_columns,
    parquet_texts,
)
from streamline_hooks.calibration.text_batches import in_runs, padding_token, right_padded
from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

NAMES = (("source", "target"), ("text", "summary"), ("question", "answer"))
"""How the two columns of pairs may be named, in the order in which they are looked for."""

_IGNORED = -100  # the label that PyTorch's cross entropy passes over
_EXPECTED = "a JSONL file, a Parquet file, or a folder of such files"
_Shift = Callable[[Tensor], Tensor]


class TextPair(NamedTuple):
    """What an encoder reads, and what its decoder is to write."""

    source: str
    target: str


def read_pairs(sources: str | Path | Sequence[str | Path], *, columns: tuple[str, str] | None = None) -> list[TextPair]:
    r"""Read the pairs of JSONL and Parquet files.

    Parameters
    ----------
    sources : str, Path or a sequence of them
        Each is a JSONL file (``.jsonl``, plain or compressed), a Parquet file (``.parquet``; it needs the optional
        package ``pyarrow``), or a folder of such files, read recursively in the order of their names; what starts with
        a dot is passed over.
    columns : tuple of two str, optional
        The names of the fields or columns. By default the first of ``source`` and ``target``, ``text`` and
        ``summary``, ``question`` and ``answer`` that the file has.

    Returns
    -------
    list of TextPair
        In order, both sides stripped, without those of which a side is empty and without exact repetitions.

    Raises
    ------
    StreamlineError
        If a source does not exist or cannot be read, has other columns, or if no pair is found in any of them.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "two.jsonl")
    ...     _ = path.write_text('{"source": "ein Haus", "target": "a house"}\n{"source": "so", "target": ""}\n')
    ...     read_pairs(path)
    [TextPair(source='ein Haus', target='a house')]
    """
    kept: dict[TextPair, None] = {}
    paths = listed(sources)
    for path in [file for source in paths for file in _files(source)]:
        read = _parquet if path.name.lower().endswith(PARQUET) else _jsonl
        for one, other in read(path, columns):
            pair = TextPair((one or "").strip(), (other or "").strip())
            if all(pair):
                kept.setdefault(pair)
    if not kept:
        quoted = ", ".join(repr(str(path)) for path in paths) or "an empty list of sources"
        raise StreamlineError(
            f"No pair was found in {quoted}. Expected {_EXPECTED}, with text on both sides of a pair. Check that the "
            "source is the one you mean and is not empty."
        )
    return list(kept)


def pair_parts(
    pairs: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    counts: Mapping[str, int],
    model: nn.Module | PretrainedConfig,
    *,
    batch_size: int = 8,
    source_length: int = 512,
    target_length: int = 128,
    prefix: str = "",
    seed: int = 0,
) -> dict[str, list[dict[str, Tensor]]]:
    """Deal pairs to parts, and make what an encoder–decoder is trained on of them.

    Pairs are dealt in the order of a hash of seed and source, so that the order of the files does not matter. No two
    parts share a source, as the model is given it: those of one source are in one part, and so are those whose tokens
    become the same by being cut. A pair that holds a paragraph of 80 characters or more that is in another part, on
    either side, is left out. The part that is named last is filled first, so that more for the first does not change
    the others.

    Parameters
    ----------
    pairs : sequence of (str, str)
        Sources and targets, see `read_pairs`.
    tokenizer : PreTrainedTokenizerBase
        The model's own. Targets are given to it as ``text_target``, for tokenizers that have another way with them.
    counts : mapping of str to int
        Pairs in each part, such as ``{"calibration": 128, "validation": 32, "test": 64}``.
    model : torch.nn.Module or PretrainedConfig
        The encoder–decoder or its configuration: it says how targets are shifted, with which token they start
        (``decoder_start_token_id``), and what padding is. Nothing is run.
    batch_size : int
        Pairs in a batch.
    source_length, target_length : int
        The most tokens of either side, special tokens among them; what is longer is cut.
    prefix : str
        Put before each source, such as T5's ``"summarize: "``.
    seed : int
        Another seed deals the pairs differently.

    Returns
    -------
    dict of str to list of dict
        The batches of each part, int64: ``input_ids`` and ``attention_mask`` of shape (batch, source tokens);
        ``decoder_input_ids``, ``decoder_attention_mask`` and ``labels`` of shape (batch, target tokens). All are padded
        on the right to the longest of the batch; ``labels`` are −100 there, and ``decoder_attention_mask`` 0.

    Raises
    ------
    StreamlineError
        If there are too few pairs, a number is out of range, the tokenizer cannot pad, or the model does not say how
        its targets are shifted.

    Examples
    --------
    A tokenizer that gives each word a number and ends each text:

    >>> from tokenizers import Tokenizer, models, pre_tokenizers, processors
    >>> from transformers import PreTrainedTokenizerFast, T5Config
    >>> words = ["<pad>", "</s>", "<unk>", *map(str, range(40))]
    >>> core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    >>> core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    >>> core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    >>> config = T5Config(vocab_size=43, d_model=8, num_layers=1, num_heads=1, d_kv=8, decoder_start_token_id=0)
    >>> pairs = [(f"{number} {number}", f"{number}") for number in range(20)]
    >>> parts = pair_parts(pairs, tokenizer, {"calibration": 8, "test": 4}, config)
    >>> row = {name: values[0].tolist() for name, values in parts["test"][0].items()}
    >>> row["input_ids"], row["decoder_input_ids"], row["labels"]
    ([16, 16, 1], [0, 16], [16, 1])
    """
    check_counts(counts, "pairs", batch_size)
    for name, length in (("source_length", source_length), ("target_length", target_length)):
        if length < 1:
            raise StreamlineError(f"{name}={length}: expected the most tokens of a text, 1 or more.")
    padding, shift = padding_token(tokenizer), _shift_of(model)

    def encode(source: str) -> tuple[int, ...]:
        return tuple(tokenizer(prefix + source, truncation=True, max_length=source_length)["input_ids"])

    dealt = _deal(pairs, encode, counts, seed)
    parts: dict[str, list[dict[str, Tensor]]] = {}
    for name in counts:
        parts[name] = []
        for rows in in_runs(dealt[name], batch_size):
            texts = [target for _, target in rows]
            targets = tokenizer(text_target=texts, truncation=True, max_length=target_length)["input_ids"]
            parts[name].append(_batch([ids for ids, _ in rows], targets, padding, shift))
    return parts


def _batch(
    sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], padding: int, shift: _Shift
) -> dict[str, Tensor]:
    labels = right_padded(targets, _IGNORED)
    return {
        "input_ids": right_padded(sources, padding),
        "attention_mask": right_padded([[1] * len(ids) for ids in sources], 0),
        "decoder_input_ids": shift(labels),
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
                raise _too_few(counts, len(targets), left_out)
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


def _too_few(counts: Mapping[str, int], found: int, left_out: int) -> StreamlineError:
    asked = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return StreamlineError(
        f"{asked} pairs were asked for, and there are {found:,} different sources, {left_out:,} of which repeat what "
        f"another part holds. Expected {sum(counts.values()):,} pairs of which no two parts share a source or a "
        "paragraph. Give more pairs, or ask for fewer."
    )


def _shift_of(model: nn.Module | PretrainedConfig) -> _Shift:
    """How a model makes what its decoder is given of labels: its own function, where it has one."""
    whole: Any = model if isinstance(model, nn.Module) else _weightless(model)
    own = getattr(whole, "prepare_decoder_input_ids_from_labels", None)
    if not callable(own):
        beside = getattr(sys.modules[type(whole).__module__], "shift_tokens_right", _shifted)
        names = ("pad_token_id", "decoder_start_token_id")[: len(inspect.signature(beside).parameters) - 1]
        own = _of_configuration(whole, beside, names)

    def shift(labels: Tensor) -> Tensor:
        try:
            return own(labels.clone())  # FSMT's writes into what it is given
        except (AttributeError, TypeError, ValueError) as error:
            raise StreamlineError(
                f"{type(whole).__name__} cannot shift targets to the right ({error}). Expected a configuration that "
                "says with which token the decoder starts and which one is padding. Set config.decoder_start_token_id "
                "and config.pad_token_id as the model was trained with."
            ) from error

    return shift


def _of_configuration(model: Any, function: Callable[..., Tensor], names: Sequence[str]) -> _Shift:
    def shift(labels: Tensor) -> Tensor:
        numbers = [getattr(model.config, name) for name in names]
        if None in numbers:
            raise ValueError(f"its {' or '.join(names)} is not set")
        return function(labels, *numbers)

    return shift


def _shifted(labels: Tensor, padding: int, start: int) -> Tensor:
    """As Transformers' models shift that have no function of their own."""
    begun = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
    return begun.masked_fill(begun == _IGNORED, padding)


def _weightless(config: Any) -> nn.Module:
    """The model of a configuration, without memory for its weights."""
    from transformers import AutoModelForSeq2SeqLM

    try:
        with torch.device("meta"):
            return AutoModelForSeq2SeqLM.from_config(config)
    except (AttributeError, ValueError) as error:
        raise StreamlineError(
            f"A {type(config).__name__} says nothing of a decoder that writes text. Expected an encoder–decoder, such "
            "as T5 or BART, or its configuration. Give the model itself if it is one."
        ) from error


def _files(source: str | Path) -> list[Path]:
    path = Path(source).expanduser()
    kinds = (PARQUET, *JSONL_SUFFIXES)
    if path.is_dir():
        inside = (file.relative_to(path) for file in path.rglob("*") if file.name.lower().endswith(kinds))
        shown = [name for name in inside if not any(part.startswith(".") for part in name.parts)]
        return [path / name for name in sorted(shown, key=Path.as_posix) if (path / name).is_file()]
    if not path.exists():
        raise StreamlineError(
            f"No pairs can be read from {str(source)!r}: there is no such file or folder. Expected {_EXPECTED}. Check "
            "the spelling of the path."
        )
    if not path.name.lower().endswith(kinds):
        raise StreamlineError(
            f"No pairs can be read from {str(source)!r}: its name ends in {path.suffix!r}. Expected {_EXPECTED}. "
            'Write a JSONL file with lines like {"source": "...", "target": "..."}.'
        )
    return [path]


def _jsonl(path: Path, columns: tuple[str, str] | None) -> Iterator[tuple[str, str]]:
    like = '{{"{}": "...", "{}": "..."}}'.format(*(columns or NAMES[0]))
    for number, row in json_rows(path, like, math.inf):
        one, other = columns = _named(f"{path}, line {number}", "fields", list(row), columns)
        if not (isinstance(row[one], str) and isinstance(row[other], str)):
            raise StreamlineError(
                f"{path}, line {number} holds a {type(row[one]).__name__} as `{one}` and a {type(row[other]).__name__} "
                f"as `{other}`. Expected a string in both. Write each line like {like}."
            )
        yield mended(row[one]), mended(row[other])


def _parquet(path: Path, columns: tuple[str, str] | None) -> Iterator[tuple[str | None, str | None]]:
    names = _named(str(path), "columns", parquet_columns(path), columns)
    return ((row[0], row[1]) for row in parquet_texts(path, names))


def _named(where: str, what: str, there: Sequence[str], columns: tuple[str, str] | None) -> tuple[str, str]:
    """Find the two columns: those that were asked for, or the first two of `NAMES` that are there."""
    for names in NAMES if columns is None else [columns]:
        if all(name in there for name in names):
            return names
    expected = " or ".join(" and ".join(f"`{name}`" for name in names) for names in ([columns] if columns else NAMES))
    raise StreamlineError(
        f"{where} has the {what} {sorted(there)}. Expected {expected}. Rename them, or name them: "
        'columns=("article", "highlights").'
    )

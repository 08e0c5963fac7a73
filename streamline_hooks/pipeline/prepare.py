"""Prepare a compression: find the windows that reach the target, and split the data into parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from streamline_hooks.core import Batch, DistributedStep, StreamlineError, max_positions, split_into_batches
from streamline_hooks.data import (
    PARTS,
    BatchSplit,
    PackedText,
    TextDataset,
    TextSources,
    TokenSplit,
    check_packing,
    check_tokenizer,
    read_documents,
    split_documents,
    text_column,
    with_repeated_passages,
)
from streamline_hooks.modeling import BlockStack, Task, find_stack
from streamline_hooks.repair import ReplacementConfig, ReplacementSize, is_spliced
from streamline_hooks.replacements import replacement_config
from streamline_hooks.selection import SearchProblem, Target, TargetWindows, protected_blocks, target_windows
from streamline_hooks.surgery import refuse_open_surgery

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from streamline_hooks.pipeline.config import CompressionConfig

PreparedBatches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Preparation:
    """The candidate windows that reach the target, and the batches of each step of a compression.

    `calibration` ranks windows and `verification` verifies the shortlist. Replacements are fitted on `fit`, with the
    ridge chosen on `held_out`; both are disjoint parts of the first sequences of `training`. `target_windows` has the
    predicted value of the target for each candidate.
    """

    stack: BlockStack
    config: CompressionConfig
    candidates: list[range]
    protected: frozenset[int]
    split: TokenSplit | BatchSplit
    task: Task
    target_windows: TargetWindows
    calibration: PreparedBatches
    verification: PreparedBatches
    fit: PreparedBatches
    held_out: PreparedBatches
    validation: PreparedBatches
    test: PreparedBatches
    training: PreparedBatches

    def problem(self, **more: Any) -> SearchProblem:
        """Return the search problem on the calibration data."""
        return self.config.search.problem(
            self.candidates,
            len(self.stack),
            protect=self.protected,
            model=self.stack.model,
            batches=self.calibration,
            stack=self.stack.path,
            task=self.task,
            shortest=self.kind.slots + 1,
            **more,
        )

    @property
    def kind(self) -> ReplacementConfig:
        """The config of the replacements."""
        return self.config.repair

    @property
    def size(self) -> ReplacementSize:
        """The size of the replacement of the first candidate."""
        return self.kind.size(self.stack, self.candidates[0])

    def require_writable(self) -> None:
        """Raise if a checkpoint cannot store the replacement."""
        require_saveable(self.stack, self.kind, self.candidates[0])

    def announcement(self) -> list[str]:
        """Return log lines that describe the compression."""
        search, target = self.config.search, self.config.target
        criterion = search.resolved_criterion.name
        lengths = sorted({len(window) for window in self.candidates})
        blocks = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        share = "" if len(lengths) > 1 else f" ({lengths[0] / len(self.stack):.1%})"
        return [
            f"stack      {self.stack}",
            f"remove     {target}: {blocks} of {len(self.stack)} blocks{share}, replaced by {self.kind.name} "
            f"({self.size})"
            if not search.zeroes_branches
            else f"zero       {target}: {search.kind} of {blocks} of {len(self.stack)} blocks{share}, replaced by "
            f"{self.kind.name if self.kind.replaces_branches else 'nothing'}",
            f"search     {search.kind} by {criterion}; {len(self.candidates)} windows reach the target; up to "
            f"{search.shortlist} selections are fitted and verified",
            *([] if self.task.is_causal_lm else [f"task       {self.task}"]),
            f"{'text' if isinstance(self.split, TokenSplit) else 'data'}       {self.split.describe()}",
        ]


def prepare_compression(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | TokenSplit | Mapping[str, PackedText] | Mapping[str, Sequence[Batch | Tensor]],
    config: CompressionConfig,
    *,
    task: Task,
    test_texts: Sequence[str] | None = None,
    refuse_crossing: Callable[..., None] = check_packing,
) -> Preparation:
    """Find the windows that reach the target, and split the data.

    Parameters are those of `compress`. `refuse_crossing` is called for packed text and raises if the attention of the
    model crosses documents.
    """
    stack = find_stack(model, config.stack)
    refuse_open_surgery(stack, "compress")
    _refuse_test_texts(texts, test_texts)
    search, target, sizes = config.search, config.target, split_sizes(config)
    protected = protected_blocks(search.protect, len(stack))
    batch_split = BatchSplit.of(cast(Any, texts), task) if are_batches(texts) else None
    token_split = texts if isinstance(texts, TokenSplit) else None
    if isinstance(texts, Mapping) and not batch_split:
        token_split = TokenSplit.of_packed(cast(Any, texts))
    if batch_split:
        _check_batches(model, batch_split, target, task)
        if packed := list(_packed_rows((*batch_split.calibration, *batch_split.validation, *batch_split.test))):
            refuse_crossing(model, packed, stack=stack.path)
    else:
        require_text_model(model, tokenizer, task)
        require_positions(model, token_split.sequence_length if token_split else config.data.sequence_length)
    reachable = target_windows(
        model,
        target,
        stack=stack.path,
        protected=protected,
        replacement_module=lambda window: config.repair.make(stack, window),
        slots=search.slots(config.repair),
    )
    candidates = list(reachable.windows)
    search.check(target, min(map(len, candidates)), config.repair)
    if batch_split:
        if config.data.repeated_context or config.data.fitting_tokens is not None:
            raise StreamlineError(
                f"DataConfig: repeated_context={config.data.repeated_context:g} and "
                f"fitting_tokens={config.data.fitting_tokens} apply to text, but batches were given. Expected 0 and "
                "None with batches. Set data=DataConfig(), also with a preset (command line: --repeated-context 0)."
            )
        parts = (
            batch_split.calibration,
            batch_split.validation,
            *batch_split.fitting_and_held_out,
            batch_split.validation,
            batch_split.test,
        )
        return Preparation(
            stack, config, candidates, protected, batch_split, task, reachable, *parts, batch_split.calibration
        )
    tokenizer = cast("PreTrainedTokenizerBase", tokenizer)
    split = token_split or split_documents(cast(Sequence[str], texts), tokenizer, test_documents=test_texts, **sizes)
    check_tokenizer(tokenizer, cast(nn.Embedding, model.get_input_embeddings()).num_embeddings, split)
    split, batches = batches_by_step(model, split, config, stack=stack.path, refuse_crossing=refuse_crossing)
    return Preparation(stack, config, candidates, protected, split, task, reachable, *batches)


def batches_by_step(
    model: Any,
    split: TokenSplit,
    config: CompressionConfig,
    *,
    stack: str,
    refuse_crossing: Callable[..., None] = check_packing,
) -> tuple[TokenSplit, list[PreparedBatches]]:
    """Return the split with the notes of its repeated passages, and the last seven fields of `Preparation`."""
    rows = _fitting_rows(config.data.fitting_tokens, split.calibration)
    ids = _rows_by_step({name: getattr(split, name) for name in PARTS}, rows)
    if config.data.repeated_context:
        repeated = with_repeated_passages(
            replace(split, calibration=split.calibration[:rows]), config.data.repeated_context
        )
        ids = (repeated.calibration, repeated.validation, *ids[2:])
        split = replace(split, notes=(*split.notes, f"for the choice of blocks, {repeated.notes[-1]}"))
    size = config.hardware.batch_size
    if not split.positions:
        return split, [split_into_batches(part, size) for part in ids]
    positions = _rows_by_step(split.positions, rows)
    batches = [PackedText(*pair, 0, 0).batches(size) for pair in zip(ids, positions, strict=True)]
    refuse_crossing(model, [batch for part in batches for batch in part], stack=stack)
    return split, batches


def divide_for_rounds(
    model: Any, tokenizer: Any, texts: Any, config: CompressionConfig, test_texts: Sequence[str] | None
) -> tuple[TokenSplit | BatchSplit, list[Any]]:
    """Return the whole data, and for each round a part of the calibration data with validation and test."""
    rounds, task = config.rounds, config.task or Task.of(model)
    _refuse_test_texts(texts, test_texts)
    if are_batches(texts):
        batches = BatchSplit.of(texts, task)
        count = len(batches.calibration)
        if count < 2 * rounds:
            raise StreamlineError(
                f"{count} calibration batches were given for {rounds} rounds. Expected at least two per round. Pass "
                "more batches, or use fewer rounds."
            )
        edges = [k * count // rounds for k in range(rounds + 1)]
        return batches, [{**texts, "calibration": batches.calibration[a:b]} for a, b in pairwise(edges)]
    split = TokenSplit.of_packed(texts) if isinstance(texts, Mapping) else texts
    if not isinstance(split, TokenSplit):
        require_text_model(model, tokenizer, task)
        split = split_documents(split, tokenizer, test_documents=test_texts, **split_sizes(config))
    return split, [split.part_of_calibration(number, rounds) for number in range(rounds)]


CompressionData = (
    Sequence[str]
    | TextDataset
    | TokenSplit
    | Sequence[Batch | Tensor]
    | Mapping[str, PackedText]
    | Mapping[str, Sequence[Batch | Tensor]]
)
"""The data that `compress`, `sweep` and `estimate_cost` accept; see `compress`."""


def parts_of(data: Any) -> Any:
    """Convert a data set to a list of documents, and a list of batches to a mapping of parts.

    Raises
    ------
    StreamlineError
        If a data set has no column ``text``, or there are fewer than three batches.
    """
    if isinstance(data, TextDataset):
        return text_column(data)
    if isinstance(data, (Mapping, TokenSplit)) or not any(isinstance(item, (Tensor, Mapping)) for item in data):
        return data
    items = list(data)
    test = max(1, len(items) // 8)
    if len(items) < 3:
        raise StreamlineError(
            f"Got {len(items)} batches. Expected at least 3, for calibration, validation and test. Pass more "
            "or smaller batches."
        )
    return {"calibration": items[: -2 * test], "validation": items[-2 * test : -test], "test": items[-test:]}


@dataclass
class SourceText:
    """The documents of a compression, read from their sources.

    `sizes` are those of `split_sizes`; `test` names the sources of the test part.
    """

    sources: TextSources
    sizes: dict[str, Any]
    pack: bool = False
    test: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.documents = {} if self.pack else self.sources.read()
        self.test_documents = read_documents(self.test) if self.test else None

    def generate(self, model: Any, tokenizer: Any, cache: Path | None, work: DistributedStep) -> None:
        """Generate the documents of the sources that the model writes itself."""
        parts = [part for part in PARTS if part != "test" or not self.test]
        tokens = {part: self.sizes[f"{part}_tokens"] for part in parts}
        options: dict[str, Any] = {name: self.sizes[name] for name in ("sequence_length", "seed")}
        for name, write in self.sources.generators(model, tokenizer, tokens, cache=cache, **options).items():
            self.documents[name] = work.broadcast_object(write)

    def divided(self, tokenizer: Any) -> tuple[Any, list[str] | None]:
        """Return the data and the test texts to pass to `compress`."""
        if self.pack:
            return self.sources.packed(tokenizer, self.sizes), None
        split = self.sources.mixed(self.documents, tokenizer, self.sizes, self.test_documents)
        return (next(iter(self.documents.values())), self.test_documents) if split is None else (split, None)


def split_sizes(config: CompressionConfig) -> dict[str, int]:
    """Return the seed and sizes to pass to `split_documents`."""
    names = ("sequence_length", "calibration_tokens", "validation_tokens", "test_tokens")
    return {"seed": config.seed, **{name: getattr(config.data, name) for name in names}}


def require_saveable(stack: BlockStack, kind: ReplacementConfig, window: range) -> None:
    """Raise if a checkpoint cannot store the replacement of a window."""
    with torch.device("meta"):
        replacement = kind.make(stack, window)
    if isinstance(replacement, nn.Module) and is_spliced(stack, replacement):
        replacement_config(replacement)


def are_batches(texts: Any) -> bool:
    """Whether the data are parts of batches instead of text."""
    return isinstance(texts, Mapping) and not any(isinstance(part, PackedText) for part in texts.values())


def require_text_model(model: PreTrainedModel, tokenizer: Any, task: Task) -> None:
    """Raise unless the model is a causal language model with a tokenizer."""
    if not task.is_causal_lm or tokenizer is None:
        problem = "has no tokenizer" if task.is_causal_lm else f"is for {task}"
        raise StreamlineError(
            f"Documents were given, but {type(model).__name__} {problem}. Expected a causal language model with a "
            "tokenizer. Pass batches: {'calibration': [...], 'validation': [...], 'test': [...]}, as image_parts, "
            "text_parts and pair_parts return."
        )


def _refuse_test_texts(texts: Any, test_texts: Sequence[str] | None) -> None:
    if test_texts and isinstance(texts, (Mapping, TokenSplit)):
        raise StreamlineError(
            "test_texts was given with batches, packed text or a TokenSplit, which already have a test part. Expected "
            "documents. Leave test_texts out."
        )


def _check_batches(model: Any, split: BatchSplit, target: Target, task: Task) -> None:
    if target.is_timed and not task.is_causal_lm:
        raise StreamlineError(
            f"The target {target} is a generation time, but {type(model).__name__} is for {task}. Expected a number or "
            "a fraction of the blocks or parameters. Change remove."
        )
    batches = (*split.calibration, *split.validation, *split.test)
    ids = [item if isinstance(item, Tensor) else item.get("input_ids") for item in batches]
    ids = [item for item in ids if item is not None and not item.is_floating_point()]
    if ids and getattr(model, "config", None) is not None:
        require_positions(model, max(item.shape[1] for item in ids))


def _packed_rows(batches: Iterable[Batch | Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the token ids, positions and masks of rows whose positions restart, each without its padding."""
    for batch in batches:
        if isinstance(batch, Tensor):
            continue
        ids, positions, mask = (batch.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
        if not isinstance(ids, Tensor) or not isinstance(positions, Tensor) or positions.ndim != 2:
            continue
        if mask is not None and mask.shape != ids.shape:  # refused when the model runs
            continue
        positions = positions.expand(ids.shape)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
        inside = real[:, 1:] & real[:, :-1] & (positions.diff(dim=1) != 1)
        for row in inside.any(dim=1).nonzero().flatten().tolist():
            columns = real[row]
            packed_row = {"input_ids": ids[row : row + 1, columns], "position_ids": positions[row : row + 1, columns]}
            yield packed_row | ({} if mask is None else {"attention_mask": mask[row : row + 1, columns]})


def _rows_by_step(rows: Mapping[str, Tensor], count: int) -> tuple[Tensor, ...]:
    """Return the token rows of the last seven fields of `Preparation`."""
    calibration, validation = rows["calibration"][:count], rows["validation"]
    return (calibration, validation, *split_held_out(calibration), validation, rows["test"], rows["calibration"])


def _fitting_rows(tokens: int | None, calibration: Tensor) -> int:
    length = calibration.shape[1]
    if tokens is None:
        return len(calibration)
    if not 2 * length <= tokens <= calibration.numel():
        raise StreamlineError(
            f"fitting_tokens={tokens} is invalid for {calibration.numel():,} calibration tokens in sequences of "
            f"{length}. Expected {2 * length} to {calibration.numel()}. Change data.fitting_tokens."
        )
    return tokens // length


def split_held_out(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Split sequences into four fifths to fit on and a last fifth to choose the ridge on.

    Raises
    ------
    StreamlineError
        If there are fewer than two sequences.
    """
    if len(sequences) < 2:
        raise StreamlineError(
            f"The calibration text fills {len(sequences)} sequence of {sequences.shape[1]} tokens. Expected at least "
            "two, to fit on and to choose the ridge. Use more text or a smaller sequence_length."
        )
    held_out = max(1, len(sequences) // 5)
    return sequences[:-held_out], sequences[-held_out:]


def require_positions(model: PreTrainedModel, sequence_length: int) -> None:
    """Raise if sequences are longer than the positions of a model."""
    limit = max_positions(model.config)
    if limit is not None and limit < sequence_length:
        raise StreamlineError(
            f"sequence_length={sequence_length} exceeds the {limit} positions of the model. Expected {limit} or less. "
            "Reduce sequence_length (--sequence-length)."
        )

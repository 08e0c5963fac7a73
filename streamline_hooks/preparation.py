"""What a compression works on: the windows that reach the target, and text or batches dealt out to what needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, batches_of, positions_of
from streamline_hooks.batch_split import BatchSplit
from streamline_hooks.calibration import (
    PackedText,
    TokenSplit,
    check_tokenizer,
    refuse_crossing,
    split_documents,
    with_repeated_passages,
)
from streamline_hooks.calibration.split import PARTS
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair import ReplacementConfig, StandInSize
from streamline_hooks.repair.stand_in import is_spliced
from streamline_hooks.replacements import replacement_config
from streamline_hooks.selection import SearchProblem, Target, protected_blocks, windows_for
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery.opened import refuse_open_surgery
from streamline_hooks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from streamline_hooks.pipeline.config import CompressionConfig

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Preparation:
    """What is known before anything long is run.

    Attributes
    ----------
    stack : BlockStack
    config : CompressionConfig
    candidates : list of range
        The windows that reach the target alone.
    protected : frozenset of int
    split : TokenSplit or BatchSplit
    task : Task
        What the model is for.
    calibration, judging : list of dict
        Batches that blocks are chosen by: that all are ranked on, and that those of a shortlist are judged on.
    fit, held_out : list of dict
        Two parts of the same text as `calibration`, to fit what stands in the place of blocks.
    validation, test : list of dict
    training : list of dict
        Batches to train on, of which `fit` and `held_out` are the beginning, or all.
    """

    stack: BlockStack
    config: CompressionConfig
    candidates: list[range]
    protected: frozenset[int]
    split: TokenSplit | BatchSplit
    task: Task
    calibration: Batches
    judging: Batches
    fit: Batches
    held_out: Batches
    validation: Batches
    test: Batches
    training: Batches

    def problem(self, **more: Any) -> SearchProblem:
        """Return the problem of the config's search on the calibration text."""
        return self.config.search.problem(
            self.candidates,
            len(self.stack),
            keep=self.protected,
            model=self.stack.model,
            batches=self.calibration,
            stack=self.stack.path,
            task=self.task,
            shortest=self.kind.slots + 1,
            **more,
        )

    @property
    def kind(self) -> ReplacementConfig:
        """What replaces each window."""
        return self.config.repair

    @property
    def size(self) -> StandInSize:
        """What stands in a window's place costs, told of the first candidate."""
        return self.kind.size(self.stack, self.candidates[0])

    def require_writable(self) -> None:
        """Raise if a checkpoint could not hold what stands in a window's place."""
        require_writable(self.stack, self.kind, self.candidates[0])

    def announcement(self) -> list[str]:
        """What is going to be done, in lines for a terminal."""
        search, target = self.config.search, self.config.target
        criterion = search.resolved_criterion.name
        lengths = sorted({len(window) for window in self.candidates})
        blocks = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        share = "" if len(lengths) > 1 else f" ({lengths[0] / len(self.stack):.1%})"
        return [
            f"stack      {self.stack}",
            f"remove     {target} comes to {blocks} of {len(self.stack)} blocks{share}, {self.kind.name} in their "
            f"place ({self.size})"
            if not search.silences_branches
            else f"silence    {target} comes to the {search.kind} of {blocks} of {len(self.stack)} blocks{share}, "
            f"{self.kind.name if self.kind.replaces_branches else 'nothing'} in their place",
            f"search     {search.kind} by {criterion}; {len(self.candidates)} windows reach the target, and up to "
            f"{search.shortlist} selections are fitted and judged",
            *([] if self.task.is_of_text else [f"task       {self.task}"]),
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
    say: Callable[[str], None] = lambda line: None,
    refuse_crossing: Callable[..., None] = refuse_crossing,
) -> Preparation:
    """Find the windows that reach the target, and divide the data.

    Parameters are those of `compress`; `refuse_crossing` raises if the model does not keep the documents of packed rows
    apart.

    Raises
    ------
    StreamlineError
        If the target cannot be reached, the text does not suffice, the model cannot be given such data, or a surgeon is
        open on the model.
    """
    found = find_stack(model, config.stack)
    refuse_open_surgery(found, "compress")
    search, target, split = config.search, config.target, document_sizes(config)
    protected = protected_blocks(search.keep, len(found))
    given = BatchSplit.of(cast(Any, texts), task) if are_batches(texts) else None
    there = texts if isinstance(texts, TokenSplit) else None
    if isinstance(texts, Mapping) and not given:
        there = TokenSplit.of_packed(cast(Any, texts))
    if given:
        _require_fitting(model, given, target, task, test_texts)
    else:
        require_text(model, tokenizer, task)
        require_positions(model, there.sequence_length if there else config.data.sequence_length)
    candidates = windows_for(
        model,
        target,
        stack=found.path,
        protected=protected,
        stand_in=lambda window: config.repair.make(found, window),
        slots=search.slots(config.repair),
        say=say,
    )
    search.check(target, min(map(len, candidates)), config.repair)
    if given:
        if config.data.repeated:
            raise StreamlineError(
                f"DataConfig: repeated={config.data.repeated:g} is a fraction of the sequences of a text, and batches "
                "were given. Expected repeated=0 with batches. Set data=DataConfig(), also of a preset."
            )
        if config.data.fitting_tokens is not None:
            raise StreamlineError(
                f"DataConfig: fitting_tokens={config.data.fitting_tokens} divides a text, and batches were given. "
                "Leave it out, or give text."
            )
        six = (given.calibration, given.validation, *given.held_out_apart, given.validation, given.test)
        return Preparation(found, config, candidates, protected, given, task, *six, given.calibration)
    if there and test_texts:
        what = "A TokenSplit" if isinstance(texts, TokenSplit) else "Packed text"
        raise StreamlineError(f"{what} has a test part of its own; leave test_texts out.")
    tokenizer = cast("PreTrainedTokenizerBase", tokenizer)
    dealt = there or split_documents(cast(Sequence[str], texts), tokenizer, test_documents=test_texts, **split)
    check_tokenizer(tokenizer, cast(nn.Embedding, model.get_input_embeddings()).num_embeddings, dealt)
    rows = _rows_to_fit_on(config.data.fitting_tokens, dealt.calibration)
    ids = _seven_parts({name: getattr(dealt, name) for name in PARTS}, rows)
    if config.data.repeated:
        asked = with_repeated_passages(replace(dealt, calibration=dealt.calibration[:rows]), config.data.repeated)
        ids = (asked.calibration, asked.validation, *ids[2:])
        dealt = replace(dealt, notes=(*dealt.notes, f"for the choice of blocks, {asked.notes[-1]}"))
    if dealt.positions:
        positions = _seven_parts(dealt.positions, rows)
        size = config.hardware.batch_size
        batches = [PackedText(*pair, 0, 0).batches(size) for pair in zip(ids, positions, strict=True)]
        refuse_crossing(model, [batch for part in batches for batch in part], stack=found.path)
    else:
        batches = [batches_of(part, config.hardware.batch_size) for part in ids]
    return Preparation(found, config, candidates, protected, dealt, task, *batches)


def divide_for_rounds(
    model: Any, tokenizer: Any, texts: Any, config: CompressionConfig, test_texts: Sequence[str] | None
) -> tuple[TokenSplit | BatchSplit, list[Any]]:
    """Return all of the data, and for each round its part of the calibration data with validation and test.

    Raises
    ------
    StreamlineError
        If there are not two sequences or batches for each round, or the test part is given twice.
    """
    rounds, task = config.rounds, config.task or Task.of(model)
    if test_texts and isinstance(texts, (Mapping, TokenSplit)):
        raise StreamlineError("Batches and divided text have a test part of their own; leave test_texts out.")
    if are_batches(texts):
        batches = BatchSplit.of(texts, task)
        count = len(batches.calibration)
        if count < 2 * rounds:
            raise StreamlineError(
                f"{count} calibration batches were given for {rounds} rounds. Expected two each at least. Give more, "
                "or use fewer rounds."
            )
        edges = [k * count // rounds for k in range(rounds + 1)]
        return batches, [{**texts, "calibration": batches.calibration[a:b]} for a, b in pairwise(edges)]
    split = TokenSplit.of_packed(texts) if isinstance(texts, Mapping) else texts
    if not isinstance(split, TokenSplit):
        require_text(model, tokenizer, task)
        split = split_documents(split, tokenizer, test_documents=test_texts, **document_sizes(config))
    return split, [split.part_of_calibration(number, rounds) for number in range(rounds)]


def document_sizes(config: CompressionConfig) -> dict[str, int]:
    """Return how `split_documents` is to divide documents."""
    names = ("sequence_length", "calibration_tokens", "validation_tokens", "test_tokens")
    return {"seed": config.seed, **{name: getattr(config.data, name) for name in names}}


def require_writable(stack: BlockStack, kind: ReplacementConfig, window: range) -> None:
    """Raise if a checkpoint could not hold what a kind puts in a window's place."""
    with torch.device("meta"):
        made = kind.make(stack, window)
    if isinstance(made, nn.Module) and is_spliced(stack, made):
        replacement_config(made)


def are_batches(texts: Any) -> bool:
    """Whether what a compression is given are three parts of batches, and no text."""
    return isinstance(texts, Mapping) and not any(isinstance(part, PackedText) for part in texts.values())


def require_text(model: PreTrainedModel, tokenizer: Any, task: Task) -> None:
    """Raise unless a model can be given documents."""
    if not task.is_of_text or tokenizer is None:
        what = (
            "needs a tokenizer to be given text" if task.is_of_text else f"is for {task}, and is not given text alone"
        )
        raise StreamlineError(
            f"{type(model).__name__} {what}. Give batches: {{'calibration': [...], 'validation': [...], 'test': "
            "[...]}, as image_parts, text_parts and pair_parts make them."
        )


def _require_fitting(model: Any, given: BatchSplit, target: Target, task: Task, test_texts: Any) -> None:
    if test_texts:
        raise StreamlineError("Batches have a test part of their own; leave test_texts out.")
    if "latency" in target.unit and not task.is_of_text:
        raise StreamlineError(
            f"The target {target} is a time to write, and {type(model).__name__} is for {task}. Give a number or a "
            "fraction of the blocks, or of the parameters."
        )
    every = (*given.calibration, *given.validation, *given.test)
    ids = [one if isinstance(one, Tensor) else one.get("input_ids") for one in every]
    ids = [one for one in ids if one is not None and not one.is_floating_point()]
    if ids and getattr(model, "config", None) is not None:
        require_positions(model, max(one.shape[1] for one in ids))


def _seven_parts(rows: Mapping[str, Tensor], fitted: int) -> tuple[Tensor, ...]:
    """What is ranked and judged on, the two parts that are fitted on, validation, test, and all that is trained on."""
    calibration, validation = rows["calibration"][:fitted], rows["validation"]
    return (calibration, validation, *held_out_apart(calibration), validation, rows["test"], rows["calibration"])


def _rows_to_fit_on(tokens: int | None, calibration: Tensor) -> int:
    length = calibration.shape[1]
    if tokens is None:
        return len(calibration)
    if not 2 * length <= tokens <= calibration.numel():
        raise StreamlineError(
            f"fitting_tokens={tokens} of {calibration.numel():,} tokens of calibration text in sequences of {length}: "
            "expected two sequences at least, and no more than there are."
        )
    return tokens // length


def held_out_apart(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Four fifths to fit on, and the last fifth, which comes from other documents, to choose the ridge by."""
    if len(sequences) < 2:
        raise StreamlineError(
            f"The calibration text fills {len(sequences)} sequence of {sequences.shape[1]} tokens; expected two at "
            "least, one to fit on and one to choose the ridge by. Give more text or a smaller --sequence-length."
        )
    held_out = max(1, len(sequences) // 5)
    return sequences[:-held_out], sequences[-held_out:]


def require_positions(model: PreTrainedModel, sequence_length: int) -> None:
    """Raise if a model has fewer positions than a sequence has tokens."""
    limit = positions_of(model.config)
    if limit is not None and limit < sequence_length:
        raise StreamlineError(
            f"sequence_length={sequence_length} is more than the {limit} positions that the model has; use "
            f"--sequence-length {limit} or less."
        )

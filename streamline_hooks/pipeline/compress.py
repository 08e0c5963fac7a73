"""Compress a model: select the blocks that contribute least, replace them, train, measure and save."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from streamline_hooks.checkpoint import check_output_folder, save
from streamline_hooks.core import (
    DistributedStep,
    StepTimer,
    StreamlineError,
    TrainingInterrupted,
    check_field_names,
    current_processes,
    distributed_step,
    get_logger,
    validate_arguments,
)
from streamline_hooks.data import TokenSplit
from streamline_hooks.evaluation import document_rows
from streamline_hooks.modeling import StateSource, find_stack, sentence_folder_of
from streamline_hooks.pipeline.apply import refuse_earlier_run, round_files
from streamline_hooks.pipeline.compress_checkpoint import require_blockwise
from streamline_hooks.pipeline.config import CompressionConfig, EvaluationConfig, RunOptions
from streamline_hooks.pipeline.one_round import compress_once
from streamline_hooks.pipeline.prepare import CompressionData, divide_for_rounds, parts_of, require_saveable
from streamline_hooks.pipeline.result import CompressionResult
from streamline_hooks.selection import Target, blocks_to_remove, protected_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)


def compress_in_rounds(
    model: Any,
    data: Any,
    config: CompressionConfig,
    *,
    tokenizer: Any,
    output: str | Path | None,
    options: RunOptions,
    original: Any = None,
) -> CompressionResult:
    """Compress in ``config.rounds`` rounds, each on another part of the data.

    Parameters and errors are those of `compress`. The original, or a copy of it, is the teacher in every round. If a
    later round fails, the model stays as the rounds before left it.
    """
    overwrite, resume, checkpoint = options.overwrite, options.resume, options.checkpoint_file
    work, clock, rounds = DistributedStep("compress", current_processes()), StepTimer(), config.rounds
    stack = find_stack(model, config.stack)
    counts, protected = blocks_by_round(len(stack), config), protected_blocks(config.search.protect, len(stack))
    if output is not None:
        work.broadcast_object(lambda: check_output_folder(output, overwrite))
        sentence_folder_of(model)  # raises if the folder cannot be saved
        require_saveable(stack, config.repair, range(counts[0]))
    whole, parts = divide_for_rounds(model, tokenizer, data, config, options.test_texts)
    files = work.broadcast_object(lambda: round_files(rounds, output, checkpoint))
    resumable = work.broadcast_object(lambda: [resume and file.is_file() for file in files] or [False] * rounds)
    if resume and not any(resumable):
        raise StreamlineError(
            f"compress: resume was given, but there is no training checkpoint at {files[0] if files else 'any path'}. "
            "Expected an existing file. Leave resume out to start a training run."
        )
    if not resume:
        work.broadcast_object(lambda: [*map(refuse_earlier_run, files)])
    present: list[int | None] = list(range(len(stack)))  # block numbers in the original
    del stack  # it holds the blocks that will be removed
    original = copy.deepcopy(model) if original is None else original
    results: list[CompressionResult] = []
    for number, (count, part, is_resumed) in enumerate(zip(counts, parts, resumable, strict=True), 1):
        logger.info(f"round      {number} of {rounds}: {count} of {sum(counts)} blocks")
        sizes, file = config.data, files[number - 1] if files else None
        if isinstance(part, TokenSplit) and sizes.fitting_tokens:  # the share of the round, in whole sequences
            share = len(part.calibration) / len(whole.calibration) * sizes.fitting_tokens / part.sequence_length
            sizes = replace(sizes, fitting_tokens=max(2, round(share)) * part.sequence_length)
        search = replace(config.search, protect=tuple(k for k, old in enumerate(present) if old in protected))
        evaluation = config.evaluation if number == rounds else EvaluationConfig(speed=False, generation=False)
        round_config = replace(
            config, rounds=1, remove=Target(blocks=count), search=search, data=sizes, evaluation=evaluation
        )
        run = RunOptions(
            resume=is_resumed,
            checkpoint_file=file,
            teacher=original if results else None,
            callbacks=options.callbacks,
        )
        try:
            results.append(compress_once(model, part, round_config, recorded=config, tokenizer=tokenizer, options=run))
        except StreamlineError as error:
            if not results:
                raise
            raise StreamlineError(
                f"Round {number} of {rounds} failed: {error} The rounds before removed {sum(counts[: number - 1])} "
                "blocks from the model, which was not saved. Save it, or start from the original with fewer rounds."
            ) from error
        present = [None if slot.source is None else present[slot.source] for slot in results[-1].plan.slots]
        if results[-1].training and results[-1].training.interrupted:
            remedy = f"Load the original and resume from {file}." if file else "Load the original and start again."
            raise TrainingInterrupted(f"Interrupted in round {number} of {rounds}. The model was not saved. {remedy}")
    result = CompressionResult.of_rounds(results, whole.report())
    if output is not None:
        with clock("save"):
            arguments = {"tokenizer": tokenizer, "report": result.report(), "overwrite": overwrite}
            result.folder = work.broadcast_object(lambda: save(model, output, **arguments))
        result.seconds |= work.broadcast_object(lambda: clock.seconds)
        work.broadcast_object(lambda: None if checkpoint else [*map(Path.unlink, filter(Path.is_file, files))])
    return result


def blocks_by_round(length: int, config: CompressionConfig) -> list[int]:
    """Return the number of blocks to remove in each round, larger numbers first."""
    total, rounds = blocks_to_remove(config.target, length), config.rounds
    if not 1 <= rounds <= total:
        raise StreamlineError(
            f"rounds={rounds} is too many for {total} blocks. Expected 1 to {total}. Use fewer rounds."
        )
    config.search.check(config.target, total // rounds)
    return [total // rounds + (number < total % rounds) for number in range(rounds)]


@distributed_step("compress")
@validate_arguments()
def compress(
    model: PreTrainedModel | StateSource,
    data: CompressionData,
    /,
    config: CompressionConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | Path | None = None,
    inplace: bool = True,
    options: RunOptions | None = None,
    **fields: Any,
) -> CompressionResult:
    """Remove the blocks that contribute least, and repair the model, in place by default.

    The method extends LLM-Streamline (arXiv 2403.19135). One pass compares the hidden states at all block boundaries,
    and the search returns a shortlist of windows. For each window, a replacement is fitted by least squares and
    verified: the outputs of the repaired model are compared with those of the original on validation text. The best
    replacement is trained if ``config.distillation`` is set, made permanent, and measured on text that was not used for
    choosing or fitting.

    Parameters
    ----------
    model : transformers.PreTrainedModel or StateSource
        A model, or a `streamline_hooks.checkpoint.BlockwiseSource`, which loads one block at a time. The model is
        changed in place unless ``inplace=False``. An error leaves it unchanged, except an error while the result is
        measured or saved: then the model is already compressed, and `save` can write it.
    data : sequence of str, datasets.Dataset, TokenSplit, batches, or mapping of parts
        One of:

        - documents, as strings or as a data set with a column ``text``. They are split into disjoint parts for
          calibration, validation and test with the sizes of ``config.data``.
        - batches, for any model: tensors of token ids of shape (batch, tokens), or mappings of the model's inputs.
          Their order is kept: the last eighth, rounded down to at least one batch, is the test part, as many before
          it are the validation part, and the rest is the calibration part.
        - data that are already split: a `TokenSplit`, such as `mixed_split` returns; the three parts that `packed_text`
          returns; or a mapping of ``"calibration"``, ``"validation"`` and ``"test"`` to batches, as `image_parts`,
          `text_parts` and `pair_parts` return. The accuracy of a classifier is measured if the test batches have
          ``labels``.
    config : CompressionConfig, optional
        By default ``CompressionConfig()``: replace a quarter of the blocks by a linear map.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Tokenizer for documents, which is saved with the model. Batches need none; for images it may be an image
        processor.
    output : str or Path, optional
        Folder to save the model to, with a ``report.json`` for `streamline_hooks.pipeline.write_report`. By default the
        model is not saved.
    inplace : bool
        If False, compress a copy, which is returned in the result and needs memory for a second model. True by default.
    options : RunOptions, optional
        Options that are not saved with the model: overwrite, resume, callbacks, an existing profile or teacher.
    **fields
        Fields of `CompressionConfig` (except `data`) and `RunOptions` that override those of `config` and `options`,
        such as ``remove=0.25`` and ``overwrite=True``.

    Returns
    -------
    CompressionResult

    Raises
    ------
    StreamlineError
        If the arguments are invalid. Arguments are validated before any expensive step. In a distributed run every rank
        raises.
    TrainingInterrupted
        If Ctrl-C is pressed during training and ``config.rounds`` is larger than 1.

    Notes
    -----
    Ctrl-C during training stops it: the best weights so far are kept and saved, and
    ``CompressionResult.training.interrupted`` is True; the command line exits with code 130. Ctrl-C at any other time
    raises KeyboardInterrupt.

    In a distributed run (an initialized `torch.distributed` group) every rank has the whole model and passes the same
    arguments; all ranks end with the same model, bit for bit. The ranks divide the data of the profile, the moments,
    the verification, the training and the perplexities. Rank 0 alone runs the search, solves the least-squares
    problems, generates text, measures times, shows progress bars and saves.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks import compress
    >>> from streamline_hooks.testing import tiny_model
    >>> batches = [torch.randint(3, 60, (2, 8)) for _ in range(12)]
    >>> result = compress(tiny_model("llama"), batches, remove=2)
    >>> len(result.plan.slots)
    6
    """
    config, options = config or CompressionConfig(), options or RunOptions()
    run_fields = {
        field.name: fields.pop(field.name) for field in dataclasses.fields(RunOptions) if field.name in fields
    }
    if run_fields:
        options = replace(options, **run_fields)
    if fields:
        check_field_names(CompressionConfig, fields)
        config = replace(config, **fields)
    parts, recorded = parts_of(data), config
    _check_guarantee_data(parts, config, options)
    if isinstance(model, StateSource):
        if not inplace:
            raise StreamlineError(
                "compress: inplace=False was given with a StateSource, which cannot be copied. Expected a model. Pass "
                "the model, or leave inplace out."
            )
        if config.stack not in (None, model.stack.path):
            raise StreamlineError(
                f"compress: config.stack={config.stack!r} differs from the stack {model.stack.path!r} of the given "
                "StateSource. Expected the same stack. Leave config.stack out."
            )
        config = replace(config, stack=model.stack.path)
        if not model.in_memory:
            if options.profile is not None:
                raise StreamlineError(
                    "compress: a profile was given with blocks on disk, whose profile is measured block by block. "
                    "Expected no profile. Leave it out."
                )
            require_blockwise(str(getattr(model.model, "name_or_path", "")), config, output)
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "output": output, "options": options}
    if config.rounds == 1:
        model = model if inplace else copy.deepcopy(model)
        return compress_once(model, parts, config, recorded=recorded, **arguments)
    if options.profile is not None or options.teacher is not None:
        raise StreamlineError(
            f"compress: a profile or a teacher was given with rounds={config.rounds}. Expected neither, because each "
            "round measures a new profile and the original is the teacher. Leave it out, or use one round."
        )
    if not inplace:
        return compress_in_rounds(copy.deepcopy(model), parts, config, original=model, **arguments)
    return compress_in_rounds(model.model if isinstance(model, StateSource) else model, parts, config, **arguments)


def _check_guarantee_data(parts: Any, config: CompressionConfig, options: RunOptions) -> None:
    """Raise if the data of `at_most` are missing, have no effect, or are also used for the compression."""
    data = options.guarantee_data
    if config.at_most is None:
        if data:
            raise StreamlineError(
                f"compress: guarantee_data was given for {', '.join(data)}, but the config has no at_most. Expected "
                "both. Set at_most, or leave guarantee_data out."
            )
        return
    if current_processes().count > 1:
        raise StreamlineError(
            f"compress: at_most was given with {current_processes().count} processes. Expected one. Run it outside of "
            "torchrun."
        )
    units = [row for name, items in data.items() if name != "accuracy_drop" for row in _rows_of(items)]
    used = {row for part in (parts.values() if isinstance(parts, Mapping) else [parts]) for row in _rows_of(part)}
    used.update(options.test_texts or ())
    if shared := sum(unit in used for unit in units):
        raise StreamlineError(
            f"compress: {shared} of {len(units)} documents in guarantee_data are also among the data of the "
            "compression, so their losses are too small. Expected other documents. Remove them from one of the two."
        )
    if not {type(unit) for unit in units} <= {type(row) for row in used}:
        logger.warning(
            "guarantee_data was not compared with the data of the compression, which have another form. Make sure that "
            "no document is in both."
        )


def _rows_of(items: Any) -> list[Any]:
    """Return the documents among texts and batches: strings, or the token ids of each row without padding."""
    rows: list[Any] = []
    for item in items if isinstance(items, Sequence) and not isinstance(items, str) else ():
        if isinstance(item, str):
            rows.append(item.strip())  # as documents are read
        elif isinstance(item, Tensor) or (isinstance(item, Mapping) and "input_ids" in item):
            rows += document_rows(item)
    return rows

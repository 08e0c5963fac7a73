"""Compress in rounds, after IteRABRe (arXiv 2503.06291): remove some blocks, train, rank the repaired model again."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamline_hooks.calibration import TokenSplit
from streamline_hooks.checkpoint import require_free, save
from streamline_hooks.distributed import DistributedStep, here
from streamline_hooks.errors import StreamlineError, TrainingInterrupted
from streamline_hooks.pipeline.config import CompressionConfig, EvaluationConfig
from streamline_hooks.pipeline.one_round import compress_once
from streamline_hooks.preparation import divide_for_rounds, require_writable
from streamline_hooks.result import CompressionResult
from streamline_hooks.run_figures import Clock
from streamline_hooks.selection import Target, blocks_to_remove, protected_blocks
from streamline_hooks.sentence_folder import sentence_folder_of
from streamline_hooks.stack import find_stack
from streamline_hooks.trained_selection import round_files


def compress_in_rounds(
    model: Any,
    tokenizer: Any,
    texts: Any,
    config: CompressionConfig,
    *,
    test_texts: Any,
    output: str | Path | None,
    overwrite: bool,
    resume: bool,
    checkpoint: str | Path | None,
    **shared: Any,
) -> CompressionResult:
    """Compress in ``config.rounds`` rounds, each on its part of the data; a copy of the original teaches all of them.

    Parameters and errors are those of `compress`. If a later round fails, the model is as the rounds before left it.
    """
    work, clock, rounds = DistributedStep("compress", here()), Clock(), config.rounds
    stack = find_stack(model, config.stack)
    counts, protected = blocks_by_round(len(stack), config), protected_blocks(config.search.keep, len(stack))
    if output is not None:
        work.broadcast_object(lambda: require_free(output, overwrite))
        sentence_folder_of(model)  # raises if it cannot be saved
        require_writable(stack, config.repair, range(counts[0]))
    whole, parts = divide_for_rounds(model, tokenizer, texts, config, test_texts)
    files = work.broadcast_object(lambda: round_files(rounds, output, checkpoint))
    found = work.broadcast_object(lambda: [resume and file.is_file() for file in files] or [False] * rounds)
    if resume and not any(found):
        raise StreamlineError(f"There is no training to resume at {files[0] if files else 'any place'}. Begin one.")
    if not resume:  # files of an earlier call
        work.broadcast_object(lambda: [*map(Path.unlink, filter(Path.is_file, files))])
    present: list[int | None] = list(range(len(stack)))  # numbers in the original
    del stack  # it holds blocks that are removed
    original = copy.deepcopy(model)
    done: list[CompressionResult] = []
    for number, (count, part, is_resumed) in enumerate(zip(counts, parts, found, strict=True), 1):
        if work.processes.rank == 0:
            shared["say"](f"round      {number} of {rounds}: {count} of {sum(counts)} blocks")
        data, file = config.data, files[number - 1] if files else None
        if isinstance(part, TokenSplit) and data.fitting_tokens:  # the round's share, in whole sequences
            share = len(part.calibration) / len(whole.calibration) * data.fitting_tokens / part.sequence_length
            data = replace(data, fitting_tokens=max(2, round(share)) * part.sequence_length)
        search = replace(config.search, keep=tuple(k for k, old in enumerate(present) if old in protected))
        measured = config.evaluation if number == rounds else EvaluationConfig(speed=False, generation=False)
        own = replace(config, rounds=1, remove=Target(blocks=count), search=search, data=data, evaluation=measured)
        given = {"teacher": original if done else None, "resume": is_resumed, "checkpoint": file, **shared}
        try:
            done.append(compress_once(model, tokenizer, part, own, recorded=config, **given))
        except StreamlineError as error:
            if not done:
                raise
            raise StreamlineError(
                f"Round {number} of {rounds} failed: {error} The rounds before removed {sum(counts[: number - 1])} "
                "blocks, and nothing was saved. Save the model, or use fewer rounds with the original."
            ) from error
        present = [None if slot.source is None else present[slot.source] for slot in done[-1].plan.slots]
        if done[-1].training and done[-1].training.interrupted:
            how = f"Load the original and resume; the training is in {file}." if file else "Load the original."
            raise TrainingInterrupted(f"Interrupted in round {number} of {rounds}; nothing was saved. {how}")
    result = CompressionResult.of_rounds(done, whole.figures())
    if output is not None:
        with clock("save"):
            given = {"tokenizer": tokenizer, "report": result.report(), "overwrite": overwrite}
            result.folder = work.broadcast_object(lambda: save(model, output, **given))
        result.seconds |= work.broadcast_object(lambda: clock.seconds)
        work.broadcast_object(lambda: None if checkpoint else [*map(Path.unlink, filter(Path.is_file, files))])
    return result


def blocks_by_round(length: int, config: CompressionConfig) -> list[int]:
    """Return how many of a stack's blocks are removed in each round, the larger shares first."""
    total, rounds = blocks_to_remove(config.target, length), config.rounds
    if not 1 <= rounds <= total:
        raise StreamlineError(f"{total} blocks cannot be removed in {rounds} rounds. Expected 1 to {total} rounds.")
    config.search.check(config.target, total // rounds)
    return [total // rounds + (number < total % rounds) for number in range(rounds)]

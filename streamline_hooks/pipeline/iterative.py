"""Reach a target in several rounds: remove a little, repair, rank again on what was repaired, and so on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from streamline_hooks.batch_split import BatchSplit
from streamline_hooks.calibration import TokenSplit, split_documents
from streamline_hooks.checkpoint import require_free, save
from streamline_hooks.core import check_writable
from streamline_hooks.distributed import Together, here
from streamline_hooks.errors import StreamlineError, TrainingInterrupted
from streamline_hooks.pipeline.config import CompressionConfig, EvaluationConfig
from streamline_hooks.pipeline.one_round import compress_once
from streamline_hooks.preparation import are_batches, document_sizes, require_writable
from streamline_hooks.repair import TrainingCallback
from streamline_hooks.result import CompressionResult
from streamline_hooks.run_figures import Clock
from streamline_hooks.selection import Target, blocks_to_remove, protected_blocks
from streamline_hooks.sentence_folder import sentence_folder_of
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery import SurgeryPlan
from streamline_hooks.task import Task
from streamline_hooks.trained_selection import training_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compress_in_rounds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Any,
    config: CompressionConfig,
    *,
    test_texts: Sequence[str] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint: str | Path | None = None,
    callbacks: Sequence[TrainingCallback] = (),
    say: Callable[[str], None] = lambda line: None,
) -> CompressionResult:
    """Compress in ``config.rounds`` rounds, after IteRABRe (arXiv 2503.06291).

    Each round removes some of the blocks, trains on its own part of the calibration data, and ranks the repaired model
    again, so that all rounds together use as many tokens as one would. The original is the teacher of every round, and
    the result is measured against it; a copy of it is in memory meanwhile. Other parameters are those of `compress`.

    Returns
    -------
    CompressionResult
        Of all rounds together, see `CompressionResult.rounds`.

    Raises
    ------
    TrainingInterrupted
        If Ctrl-C ended the training of a round. The model is then without the blocks of this round and those before.
        The training is in a file: load the original, and call again with `resume`.
    StreamlineError
        As `compress`, or if the rounds do not fit the blocks or the data, or a later one might find no window between
        the blocks that must stay. If a later round fails, the model is without the blocks of the rounds before.
    """
    work = Together("compress", here())
    search, rounds = config.search, config.rounds
    found = find_stack(model, config.stack)
    counts = blocks_by_round(len(found), config.target, rounds)
    search.check(config.target, min(counts))
    if output is not None:
        work.of_first(lambda: require_free(output, overwrite))
        sentence_folder_of(model)  # raises if it cannot be kept
        require_writable(found, config.repair, range(counts[0]))
    task = config.task or Task.of(model)
    whole, parts = _parts(texts, tokenizer, task, config, test_texts)
    files = [_checkpoint(checkpoint, output, number) for number in range(rounds)]
    if resume and not work.of_first(lambda: any(file and file.is_file() for file in files)):
        raise StreamlineError(
            f"There is no training to resume at {files[0] or 'any place'}. Leave resume out to begin one, or name its "
            "checkpoint."
        )
    for file in files:
        if file is not None:
            work.of_first(partial(check_writable, file))
    protected = protected_blocks(search.keep, len(found))
    _require_room(_runs_between(protected | _stays(found, counts[0], config), len(found)), len(found), counts, config)
    if not resume:
        work.of_first(lambda: _delete(files))  # of an earlier call, which a later round would take for its own
    present: list[int | None] = list(range(len(found)))  # by their numbers in the original
    original = copy.deepcopy(model)
    del found  # it holds blocks that go
    done: list[CompressionResult] = []
    for number, (count, part) in enumerate(zip(counts, parts, strict=True)):
        if work.processes.rank == 0:
            say(f"round      {number + 1} of {rounds}: {count} of {sum(counts)} blocks")
        last, file = number == rounds - 1, files[number]
        goes_on = work.of_first(lambda: resume and file is not None and file.is_file())  # noqa: B023
        keep = [k for k, old in enumerate(present) if old in protected]
        try:
            result = compress_once(
                model,
                tokenizer,
                part,
                _round_config(config, count, keep, part, whole, last),
                recorded=config,
                teacher=original if number else None,
                resume=goes_on,
                checkpoint=file,
                callbacks=callbacks,
                say=say,
            )
        except StreamlineError as error:
            if not done:
                raise
            raise StreamlineError(
                f"Round {number + 1} of {rounds} cannot be done: {error} The model has had the {sum(counts[:number])} "
                "blocks of the rounds before taken out and is trained without them; nothing was saved. Keep it as it "
                "is (save), or begin again with the original in fewer rounds."
            ) from error
        done.append(result)
        present = [None if slot.source is None else present[slot.source] for slot in result.plan.slots]
        if result.training is not None and result.training.interrupted:
            raise TrainingInterrupted(
                f"Interrupted in round {number + 1} of {rounds}, and nothing was saved. "
                + (
                    f"Its training is in {file}: load the original again, and go on with resume."
                    if file and file.is_file()
                    else "It was kept nowhere. Begin again with the original."
                    if file
                    else "Name a file (checkpoint) to go on from."
                )
            )
    result = _together(done, whole)
    if output is not None:
        clock = Clock()
        with clock("save"):
            result.folder = work.of_first(
                lambda: save(model, output, tokenizer=tokenizer, report=result.report(), overwrite=overwrite)
            )
        result.seconds |= work.of_first(lambda: clock.seconds)
        if checkpoint is None:
            work.of_first(lambda: _delete(files))  # the weights are in the folder now
    return result


def _round_config(
    config: CompressionConfig, count: int, keep: Sequence[int], part: Any, whole: TokenSplit | BatchSplit, last: bool
) -> CompressionConfig:
    """Return the config of one round; only the last is compared with the original."""
    fitted = config.data.fitting_tokens
    return replace(
        config,
        remove=Target(blocks=count),
        rounds=1,
        search=replace(config.search, keep=tuple(keep)),
        data=replace(config.data, fitting_tokens=fitted and _fitted_on(fitted, part, whole)),
        evaluation=config.evaluation if last else EvaluationConfig(speed=False, generation=False),
    )


def _delete(files: Sequence[Path | None]) -> None:
    for file in files:
        if file is not None:
            file.unlink(missing_ok=True)


def blocks_by_round(length: int, remove: Target | int | float, rounds: int) -> list[int]:
    """How many blocks go in each round.

    Parameters
    ----------
    length : int
        Of the stack.
    remove, rounds
        See `CompressionConfig`.

    Raises
    ------
    StreamlineError
        If the rounds cannot share the target.

    Examples
    --------
    >>> blocks_by_round(30, 0.25, 3)
    [3, 3, 2]
    """
    total = blocks_to_remove(Target.of(remove), length)
    if not 1 <= rounds <= total:
        raise StreamlineError(f"{total} blocks cannot go in {rounds} rounds; expected 1 to {total} rounds.")
    return [total // rounds + (number < total % rounds) for number in range(rounds)]


def _runs_between(protected: frozenset[int], length: int) -> list[int]:
    """How many blocks are next to one another that may go, between those that must stay."""
    edges = [-1, *sorted(protected), length]
    return [b - a - 1 for a, b in pairwise(edges) if b - a > 1]


def _stays(stack: BlockStack, count: int, config: CompressionConfig) -> frozenset[int]:
    """Return the last block, if only blocks behind the window are trained, so that there always is one."""
    healing, repair = config.healing, config.repair
    behind = healing is not None and healing.where == "after" and not healing.head
    if not behind or config.search.number_of_windows != 1:
        return frozenset()
    return frozenset() if repair.size(stack, range(count + repair.slots)).parameters else frozenset({len(stack) - 1})


def _require_room(runs: Sequence[int], length: int, counts: Sequence[int], config: CompressionConfig) -> None:
    """Raise where a round may find no window, by what earlier rounds choose, when these have been trained."""
    in_one = config.search.number_of_windows == 1
    slots = config.search.slots(config.repair)
    reached = {tuple(sorted(runs))}
    for number, count in enumerate(counts):
        size, present = count + slots, length - sum(counts[:number])  # a window is never the whole stack
        room = min(min(max(left, default=0), present - 1) for left in reached)
        if room < size and number:
            raise StreamlineError(
                f"Round {number + 1} of {len(counts)} needs {size} blocks next to one another, and those that must "
                f"stay may leave no more than {room} once {sum(counts[:number])} are gone. Keep fewer blocks, or ask "
                "for other rounds."
            )
        if in_one:
            reached = {
                tuple(sorted((*left[:k], run - count, *left[k + 1 :])))
                for left in reached
                for k, run in enumerate(left)
                if run >= size
            } or reached  # the first round has none, which `compress` says
        else:
            reached = {_levelled(left, count) for left in reached}


def _levelled(runs: Sequence[int], count: int) -> tuple[int, ...]:
    """What single blocks that go may leave at the least: they are taken from the longest run, one after the other."""
    left = sorted(runs)
    for _ in range(count if sum(left) >= count else 0):
        left[-1] -= 1
        left.sort()
    return tuple(left)


def _parts(
    texts: Any, tokenizer: Any, task: Task, config: CompressionConfig, test_texts: Any
) -> tuple[TokenSplit | BatchSplit, list[Any]]:
    """Return all of the text or the batches, and for each round its part, which shares validation and test."""
    rounds = config.rounds
    if are_batches(texts):
        if test_texts is not None:
            raise StreamlineError("Batches have a test part of their own; leave test_texts out.")
        given = cast(Mapping[str, Sequence[Any]], texts)
        if len(given.get("calibration", ())) < 2 * rounds:
            raise StreamlineError(
                f"{len(given.get('calibration', ()))} calibration batches were given for {rounds} rounds, which need "
                "two each at least. Give more, or ask for fewer rounds."
            )
        batches = list(given["calibration"])
        edges = [k * len(batches) // rounds for k in range(rounds + 1)]
        return BatchSplit.of(given, task), [{**given, "calibration": batches[a:b]} for a, b in pairwise(edges)]
    if isinstance(texts, Mapping):
        split = TokenSplit.of_packed(texts)
    elif isinstance(texts, TokenSplit):
        split = texts
    else:
        if tokenizer is None:
            raise StreamlineError("Documents need a tokenizer; give one, or text that is dealt out already.")
        split = split_documents(texts, tokenizer, test_documents=test_texts, **document_sizes(config))
        test_texts = None
    if test_texts:
        raise StreamlineError("Text that is dealt out already has a test part of its own; leave test_texts out.")
    return split, [split.part_of_calibration(number, rounds) for number in range(rounds)]


def _fitted_on(tokens: int, part: Any, whole: TokenSplit | BatchSplit) -> int:
    """A round's share of what all are fitted on, in whole sequences, of which it needs two."""
    if isinstance(whole, BatchSplit):
        return tokens  # of batches, which `compress` refuses to divide
    share = len(part.calibration) / len(whole.calibration)
    return max(2, round(share * tokens / whole.sequence_length)) * whole.sequence_length


def _checkpoint(given: str | Path | None, output: str | Path | None, number: int) -> Path | None:
    """Return the file that a round's training is resumed from."""
    file = training_file(output) if given is None and output is not None else given and Path(given)
    return file.with_name(f"{file.name}.round-{number + 1}") if file else None


def _together(done: Sequence[CompressionResult], whole: TokenSplit | BatchSplit) -> CompressionResult:
    """One result of all rounds."""
    first, last = done[0], done[-1]
    profile = first.profile  # the plan's numbers are its numbers
    plans = list(_in_first_numbering([one.plan for one in done]))
    gone = [set(plan.removed) for plan in plans]
    rounds = [
        {
            "removed": sorted(after - before),
            "perplexity": one.perplexities,
            "scores": one.scores,
            "training": None if one.training is None else one.training.report(),
        }
        for one, before, after in zip(done, [set(), *gone], gone, strict=False)
    ]
    seconds: dict[str, float] = {}
    for one in done:
        for step, spent in one.seconds.items():
            seconds[step] = seconds.get(step, 0.0) + spent
    data = {**last.data, **whole.figures()}
    if isinstance(whole, TokenSplit):
        of_rounds = [note for note in last.data["notes"] if note not in whole.notes]
        fitted = [one.data["fitting_tokens"] for one in done if "fitting_tokens" in one.data]
        data |= {"fitting_tokens": sum(fitted)} if fitted else {}
        data |= {"notes": [*whole.notes, *of_rounds]}
    vain = [
        f"Round {k}: {one.training.in_vain}" for k, one in enumerate(done, 1) if one.training and one.training.in_vain
    ]
    return replace(
        last,
        plan=plans[-1],
        profile=profile,
        perplexities={name: value for name, value in last.perplexities.items() if name in ("original", "trained")},
        scores={name: value for name, value in last.scores.items() if name in ("original", "trained")},
        parameters=(first.parameters[0], last.parameters[1]),
        size_in_bytes=(first.size_in_bytes[0], last.size_in_bytes[1]),
        seconds=seconds,
        data=data,
        rounds=rounds,
        warnings=[*vain, *(text for text in last.warnings if last.training is None or text != last.training.in_vain)],
    )


def _in_first_numbering(plans: Sequence[SurgeryPlan]) -> Iterator[SurgeryPlan]:
    """What each of several surgeries, one after the other, came to with those before it."""
    so_far = plans[0]
    yield so_far
    for plan in plans[1:]:
        so_far = plan.after(so_far)
        yield so_far

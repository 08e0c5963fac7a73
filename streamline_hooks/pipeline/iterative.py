"""Reach a target in several rounds: remove a little, repair, rank again on what was repaired, and so on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.batch_split import BatchSplit
from streamline_hooks.calibration import PackedText, TokenSplit, split_documents
from streamline_hooks.checkpoint import require_free, save
from streamline_hooks.cli.short_forms import parse_replacement
from streamline_hooks.core import check_writable
from streamline_hooks.distributed import Together, failing_together, here
from streamline_hooks.errors import StreamlineError, TrainingInterrupted
from streamline_hooks.pipeline.compress import compress
from streamline_hooks.preparation import are_batches, require_writable, search_from_keywords
from streamline_hooks.repair import Healing, ReplacementConfig, Training
from streamline_hooks.result import CompressionResult
from streamline_hooks.run_figures import Clock
from streamline_hooks.selection import Target, blocks_to_remove, protected_blocks
from streamline_hooks.sentence_folder import sentence_folder_of
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery import SurgeryPlan
from streamline_hooks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OF_DOCUMENTS = (
    "seed", "sequence_length", "calibration_tokens", "validation_tokens", "test_tokens",
)  # fmt: skip


@failing_together("compress_iteratively")
@checked(rounds=1, fitting_tokens=1)
def compress_iteratively(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | TokenSplit | Mapping[str, PackedText] | Mapping[str, Sequence[Batch | Tensor]],
    *,
    rounds: int,
    training: Training,
    remove: Target | int | float = 0.25,
    keep: Iterable[int] = (),
    fitting_tokens: int | None = None,
    test_texts: Sequence[str] | None = None,
    resume: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    side_by_side: bool = True,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> CompressionResult:
    """Give up a part of the blocks, train the repair, and look again which blocks do least in the repaired model.

    After IteRABRe (arXiv 2503.06291). Each round is a `compress` of its own on its own part of the calibration text, so
    that all rounds together see no more tokens than one would; the original teaches in every round, and the result is
    measured against it. A copy of the original is held in memory meanwhile, where there is more than one round.

    Parameters
    ----------
    model, tokenizer, texts
        See `compress`.
    rounds : int
        At most as many as blocks are to go; the first ones take one more where they do not come out even.
    training : Training
        Of each round, each of which has a file of its own to go on from.
    remove : Target, int or float
        A number or a fraction of the blocks, of all rounds together.
    keep : iterable of int
        Blocks that must stay, numbered as in the original; negative numbers count from its end.
    fitting_tokens : int, optional
        See `compress`; of all rounds together.
    test_texts, resume, output, overwrite, side_by_side, say
        See `compress`.
    **options
        All else of `compress`, the same in every round; no profile, since each round makes its own.

    Returns
    -------
    CompressionResult
        Of all rounds together: see `CompressionResult.rounds`.

    Raises
    ------
    TrainingInterrupted
        If Ctrl-C ended the training run of a round.
    StreamlineError
        As `compress`; if the rounds do not fit the blocks or the text, or a later one might find no window between the
        blocks that must stay. If one failed, the model is without the blocks of the rounds before; if its training was
        interrupted, without its own too. Then this training is in a file: load the original, and go on with `resume`.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> batches = [torch.randint(3, 60, (2, 8)) for _ in range(12)]
    >>> parts = {"calibration": batches[:8], "validation": batches[8:10], "test": batches[10:]}
    >>> result = compress_iteratively(
    ...     tiny_model("llama"), None, parts, rounds=2, remove=4, training=Training(), side_by_side=False
    ... )
    >>> [len(one["removed"]) for one in result.rounds], len(result.plan.slots)
    ([2, 2], 4)
    """
    if options.get("profile") is not None or options.get("teacher") is not None:
        raise StreamlineError("Each round makes a profile of its own, and the original teaches; leave them out.")
    if training.objective.needs_states:
        raise StreamlineError(
            f"The objective {training.objective} compares states behind windows, which the original has elsewhere "
            "after the first round. Compare what is said: kl, reverse_kl or lm."
        )
    if options.get("train_until") is not None:
        raise StreamlineError(
            "train_until ends one training, and each round makes one. Leave it out, or say how many minutes each may "
            "take (Training.minutes)."
        )
    work = Together("compress_iteratively", here())
    found = find_stack(model, options.get("stack"))
    counts = blocks_by_round(len(found), remove, rounds)
    search_from_keywords(options.get("search", "window"), parts=options.get("parts", 2)).check(remove, min(counts))
    if output is not None:
        work.of_first(lambda: require_free(output, overwrite))
        sentence_folder_of(model)  # raises if it cannot be kept
        require_writable(found, _replacement(options.get("kind", "linear")), range(counts[0]))
    asked_for = options.get("task")
    task = Task.parse(asked_for) if isinstance(asked_for, str) else asked_for or Task.of(model)
    whole, parts = _parts(texts, tokenizer, task, rounds, test_texts, options)
    trainings = [_training(training, output, number) for number in range(rounds)]
    files = [one.keep_in for one in trainings]
    if resume and not work.of_first(lambda: any(file and file.is_file() for file in files)):
        raise StreamlineError(f"There is no training to resume at {files[0] or 'any place (keep_in)'}; leave it out.")
    for one in trainings:
        if one.keep_in is not None:
            work.of_first(partial(check_writable, one.keep_in))
    protected = protected_blocks(keep, len(found))
    _require_room(_runs_between(protected | _stays(found, counts[0], options), len(found)), len(found), counts, options)
    if not resume:
        work.of_first(lambda: _delete(files))  # of an earlier call, which a later round would take for its own
    present: list[int | None] = list(range(len(found)))  # by their numbers in the original
    original = copy.deepcopy(model) if rounds > 1 else None
    del found  # it holds blocks that go
    done: list[CompressionResult] = []
    for number, (count, part) in enumerate(zip(counts, parts, strict=True)):
        if work.processes.rank == 0:
            say(f"round      {number + 1} of {rounds}: {count} of {sum(counts)} blocks")
        last, file = number == rounds - 1, files[number]
        goes_on = work.of_first(lambda: resume and file is not None and file.is_file())  # noqa: B023
        try:
            result = compress(
                model,
                tokenizer,
                part,
                remove=count,
                keep=[k for k, old in enumerate(present) if old in protected],
                fitting_tokens=fitting_tokens and _fitted_on(fitting_tokens, part, whole),
                training=trainings[number],
                teacher=original if number else None,
                resume=goes_on,
                side_by_side=side_by_side and last,
                say=say,
                **options,
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
                    else "Name a file (keep_in) to go on from."
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
        if training.keep_in is None:
            work.of_first(lambda: _delete(files))  # the weights are in the folder now
    return result


def _replacement(kind: ReplacementConfig | str) -> ReplacementConfig:
    return parse_replacement(kind) if isinstance(kind, str) else kind


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
        See `compress_iteratively`.

    Raises
    ------
    StreamlineError
        If the rounds cannot share the target.

    Examples
    --------
    >>> blocks_by_round(30, 0.25, 3)
    [3, 3, 2]
    """
    target = Target.of(remove)
    if not target.counts_blocks:
        raise StreamlineError(
            f"The target {target} is not one of blocks, which rounds can share. Give a number or a fraction of the "
            "blocks, or remove in one round (compress)."
        )
    total = blocks_to_remove(target, length)
    if not 1 <= rounds <= total:
        raise StreamlineError(f"{total} blocks cannot go in {rounds} rounds; expected 1 to {total} rounds.")
    return [total // rounds + (number < total % rounds) for number in range(rounds)]


def _runs_between(protected: frozenset[int], length: int) -> list[int]:
    """How many blocks are next to one another that may go, between those that must stay."""
    edges = [-1, *sorted(protected), length]
    return [b - a - 1 for a, b in pairwise(edges) if b - a > 1]


def _stays(stack: BlockStack, count: int, options: Mapping[str, Any]) -> frozenset[int]:
    """The last block, where those behind a window are all that is trained, so that there always has to be one."""
    healing = options.get("healing")
    healed = Healing.parse(healing) if isinstance(healing, str) else healing
    behind = healed is not None and healed.where == "after" and not healed.head
    if not behind or options.get("search", "window") != "window":
        return frozenset()
    kind = _replacement(options.get("kind", "linear"))
    return frozenset() if kind.size(stack, range(count + kind.slots)).parameters else frozenset({len(stack) - 1})


def _require_room(runs: Sequence[int], length: int, counts: Sequence[int], options: Mapping[str, Any]) -> None:
    """Raise where a round may find no window, by what earlier rounds choose, when these have been trained."""
    search = search_from_keywords(options.get("search", "window"), parts=options.get("parts", 2))
    slots, in_one = search.slots(_replacement(options.get("kind", "linear"))), search.number_of_windows == 1
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
    texts: Any, tokenizer: Any, task: Task, rounds: int, test_texts: Any, options: dict[str, Any]
) -> tuple[TokenSplit | BatchSplit, list[Any]]:
    """All of the text or the batches, and for each round its part, which shares validation and test."""
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
    own = {name: options.pop(name) for name in _OF_DOCUMENTS if name in options and name != "seed"}
    if isinstance(texts, Mapping):
        split = TokenSplit.of_packed(texts)
    elif isinstance(texts, TokenSplit):
        split = texts
    else:
        if tokenizer is None:
            raise StreamlineError("Documents need a tokenizer; give one, or text that is dealt out already.")
        own = {"calibration_tokens": 41_000, "validation_tokens": 4_096, "test_tokens": 12_288, **own}
        split = split_documents(texts, tokenizer, test_documents=test_texts, seed=options.get("seed", 0), **own)
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


def _training(training: Training, output: str | Path | None, number: int) -> Training:
    """A round's own training: its file is named after the round."""
    beside = None if output is None else Path(output).with_name(f"{Path(output).name}.training")
    file = training.keep_in or beside
    if file is None:
        return training
    return replace(training, keep_in=file.with_name(f"{file.name}.round-{number + 1}"))


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

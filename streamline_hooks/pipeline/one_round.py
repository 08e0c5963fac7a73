"""One round of a compression: rank, shortlist, fit, verify, train, commit, measure, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.batch import tokens_of
from streamline_hooks.carrying_out import carry_out, first_that_can_go, how_repaired, puts_in
from streamline_hooks.checkpoint import require_free, save
from streamline_hooks.collapse_watch import CollapseWatch
from streamline_hooks.distributed import DistributedStep, here
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation import TaskScores
from streamline_hooks.evaluation.reasoning import unmeasured_reasoning
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.preparation import prepare_compression
from streamline_hooks.repair import TrainingCallback
from streamline_hooks.result import LABELS, CompressionResult, attempts_to_measure, findings
from streamline_hooks.run_figures import Clock, peak_memory_of_process, sizes_of
from streamline_hooks.selection import VerifiedSelection
from streamline_hooks.sentence_folder import sentence_folder_of
from streamline_hooks.shared_steps import (
    perplexities_together,
    perplexity_together,
    prepared_alike,
    scores_together,
    verified_together,
)
from streamline_hooks.side_by_side import SideBySide
from streamline_hooks.stack import find_stack
from streamline_hooks.statistics import Profile, check_profile
from streamline_hooks.statistics import profile as measure_profile
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.task import Task
from streamline_hooks.trained_selection import (
    ending_in,
    require_parameters,
    train_selection,
    trainable,
    trainable_windows,
    training_checkpoint,
    training_file,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compress_once(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Any,
    config: CompressionConfig,
    *,
    recorded: CompressionConfig,
    teacher: PreTrainedModel | None = None,
    profile: Profile | None = None,
    test_texts: Sequence[str] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint: str | Path | None = None,
    callbacks: Sequence[TrainingCallback] = (),
    say: Callable[[str], None] = lambda line: None,
) -> CompressionResult:
    """Compress in one round; the parameters are those of `compress`, and `recorded` is the config that is saved."""
    work, began = DistributedStep("compress", here()), time.perf_counter()
    search, distillation = config.search, config.distillation
    task = config.task or Task.of(model)
    if work.processes.rank:
        say = _nothing
    if output is not None:
        work.broadcast_object(lambda: require_free(output, overwrite))
        sentence_folder_of(model)  # raises if it cannot be kept
    config = replace(config, repair=config.repair.seeded(config.seed))
    if distillation is not None:
        config = replace(config, distillation=(distillation := distillation.seeded(config.seed)))
    file = work.broadcast_object(lambda: training_checkpoint(config, resume, output, checkpoint))
    criterion = search.resolved_criterion
    task.require_fits(model)
    original = model if teacher is None else teacher
    if distillation is not None:
        distillation.objective.require_task(task)
    if not task.is_of_text and criterion.name in ("perplexity", "taylor"):
        raise StreamlineError(
            f"The criterion {criterion.name} is of the next token of a text, and {type(model).__name__} is for "
            f"{task}. Choose another one, such as cosine or kl."
        )
    if profile is not None:
        check_profile(profile, model, find_stack(model, config.stack).path)
    clock = Clock()
    with clock("prepare"):
        ready = prepare_compression(model, tokenizer, texts, config, task=task, test_texts=test_texts, say=say)
        ready = prepared_alike(work, ready)
        if distillation is not None:
            require_parameters(ready, config.healing)
            ready = trainable_windows(ready, config.healing, say) if search.number_of_windows == 1 else ready
    if output is not None:
        ready.require_writable()
    for line in ready.announcement():
        say(line)
    if config.data.repeated and profile is not None:
        say("repeated   where the shortlist is judged; it is made by the profile that was given, on the text of that")
    path = ready.stack.path
    with clock("rank"):
        measured = profile or measure_profile(model, ready.calibration, keep=ready.protected, stack=path)
        searched = search.find(ready.problem(profile=measured))
        found = work.broadcast_object(lambda: searched)
        found = found if distillation is None else trainable(found, ready, config.healing)
    with clock("verify"):
        judged = verified_together(work, model, found, ready)
    best = judged[work.broadcast_object(lambda: _place_of(first_that_can_go(model, judged, path, say), judged))]
    for line in findings(judged, best, task.distance):
        say(line)
    first = next(one for one in judged if (one.windows, one.silenced) == (found[0].windows, found[0].silenced))
    wanted = attempts_to_measure(best, first, trained=distillation is not None)
    board: TaskScores | None = None
    perplexities: dict[str, float] = {}
    scores: dict[str, dict[str, float]] = {}
    with clock("measure"):
        if task.is_of_text:
            perplexities = perplexities_together(work, ready, wanted, teacher)
        else:
            board, scores = scores_together(work, ready, wanted, teacher)
            scores = {"original": board.original, **scores}
    student, trained, late = None, None, ""
    if distillation is not None:
        with clock("train"):
            limit = config.train_until
            left = work.broadcast_object(lambda: limit and limit - (time.perf_counter() - began))
            if left is None or left > 0:
                config = replace(config, distillation=ending_in(distillation, left))
                student, trained = train_selection(
                    ready, best, config, teacher, file, resume=resume, callbacks=callbacks, say=say
                )
            else:
                late = f"Nothing was trained: what comes before it took all of the {limit:.4g} seconds for both."
                say(f"trained    {late}")
    with clock("compare"):
        evaluation = config.evaluation
        compared = work.processes.rank == 0 and task.is_of_text and tokenizer is not None
        compared = compared and (evaluation.speed or evaluation.generation)
        beside = SideBySide(original, tokenizer, ready.test, say, write=evaluation.generation) if compared else None
        change = partial(carry_out, selection=best)
        timed = beside if evaluation.speed else None
        speed = work.broadcast_object(lambda: None if timed is None else timed.speed(model, change, path))
        watch = CollapseWatch(original, tokenizer, ready.test, say) if beside is not None and beside.writes else None
    with clock("measure"):
        before = sizes_of(original)
        test, data, size = ready.test, {**ready.split.figures(), "seed": config.seed}, ready.size
        fitted = sum(map(tokens_of, (*ready.fit, *ready.held_out)))
        data |= {} if config.data.fitting_tokens is None else {"fitting_tokens": fitted}
        data |= {"repeated": config.data.repeated} if config.data.repeated else {}
        notes: dict[str, Any] = {} if trained is None else {"training": trained.report()}
        notes["repaired"] = how_repaired(best, config.repair, trained)
        del ready  # it holds the blocks that go
        with LayerSurgeon(model, path) as surgeon:
            carry_out(surgeon, best)
            plan = surgeon.commit(kind=config.repair.name, calibration=data, config=recorded.to_dict(), **notes)
        if student is not None:
            student.settle()
        label = "trained" if trained is not None else "repaired" if puts_in(best) else "removed"
        if board is None:
            perplexities[label] = perplexity_together(work, model, test).value
        else:
            scores[label] = work.broadcast_object(lambda: board.of(model, label))
    with clock("compare"):
        samples = work.broadcast_object(lambda: [] if beside is None else beside.samples(model))
        told = work.broadcast_object(
            lambda: unmeasured_reasoning(tokenizer) if watch is None else watch.warnings(model)
        )
    after = sizes_of(model)
    result = CompressionResult(
        model=model,
        tokenizer=tokenizer,
        plan=plan,
        config=recorded,
        kind=config.repair.name,
        size=size,
        criterion=criterion.name,
        search=search.kind,
        candidates=[best, *(one for one in judged if one is not best)],
        perplexities={name: perplexities[name] for name in LABELS if name in perplexities},
        task=task,
        scores={name: scores[name] for name in LABELS if name in scores},
        parameters=(before[0], after[0]),
        size_in_bytes=(before[1], after[1]),
        seconds=work.broadcast_object(lambda: clock.seconds),
        peak_memory=peak_memory_of_process(),
        data=data,
        profile=measured,
        training=trained,
        samples=samples,
        speed=speed,
        warnings=[*filter(None, [late, "" if trained is None else trained.in_vain]), *told],
    )
    if output is not None:
        with clock("save"):
            result.folder = work.broadcast_object(lambda: _save(result, output, overwrite, file, say))
    return result


def _save(
    result: CompressionResult,
    output: str | Path,
    overwrite: bool,
    file: Path | None,
    say: Callable[[str], None],
) -> Path:
    """Write the model, and remove the file from which an unfinished training would be resumed."""
    folder = save(result.model, output, tokenizer=result.tokenizer, report=result.report(), overwrite=overwrite)
    if result.training is not None and file is not None and file == training_file(output):
        if result.training.interrupted and file.is_file():
            say(f"{file} is left to go on from, with resume and overwrite.")
        elif not result.training.interrupted:
            file.unlink(missing_ok=True)  # the weights are in the folder now
    return folder


def _nothing(line: str) -> None:
    """Say nothing: the first process does."""


def _place_of(one: VerifiedSelection, judged: list[VerifiedSelection]) -> int:
    return next(k for k, other in enumerate(judged) if other is one)

"""Estimate the cost of a compression on this machine, and find how much text fits a time budget.

A piece of each stage is timed and extrapolated linearly; the aim is an accuracy of 25 % on a quiet machine.
"""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, device_of, tokens_of
from streamline_hooks.calibration import split_documents
from streamline_hooks.collapse_watch import CollapseWatch
from streamline_hooks.core.hardware_config import HardwareConfig, Precision
from streamline_hooks.core.tables import table
from streamline_hooks.distributed import DistributedStep, distributed_step, here
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.evaluation import distances_of_candidates, perplexity, perplexity_of_candidates
from streamline_hooks.evaluation.speed import wait_for
from streamline_hooks.passes import without_progress
from streamline_hooks.pipeline.blockwise_cost import duration, size, write_rate
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.pipeline.flops import compression_bytes
from streamline_hooks.preparation import Preparation, document_sizes, prepare_compression
from streamline_hooks.repair import DistillationConfig, Student, fit_windows, student_of, train
from streamline_hooks.result import expected_attempts
from streamline_hooks.selection import CRITERIA, Attempt, Selection, Target, blocks_to_remove
from streamline_hooks.selection.search.problem import RANKED
from streamline_hooks.side_by_side import SideBySide
from streamline_hooks.stack import find_stack
from streamline_hooks.statistics import profile
from streamline_hooks.task import Task
from streamline_hooks.trained_selection import require_parameters, trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROFILED = 2_048  # tokens of the profile that likely windows are found by
_TIMED = 512  # tokens of a timed batch on a CPU; an accelerator runs whole batches
_MORE = 3  # batches or optimizer steps by which a timed run is longer than another
_LEAST, _EPOCHS = 20_480, 4  # tokens of the smallest planned training run, and the most epochs
_LATE = 0.1  # fraction of the budget by which a compression may be late before the training is ended


class Sizes(NamedTuple):
    """Tokens that the stages run on, and epochs and validations of the training."""

    training: int
    fitting: int
    validation: int
    test: int
    epochs: float = 1
    validations: int = 1


class StageCost(NamedTuple):
    """Estimated cost of a stage: seconds, tokens, and peak bytes above the model."""

    name: str
    seconds: float
    tokens: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class CostEstimate:
    """Estimated cost of the stages of a compression."""

    stages: tuple[StageCost, ...]

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def table(self) -> str:
        """Return a table for a terminal."""
        total = StageCost("total", self.seconds, bytes=max(stage.bytes for stage in self.stages))
        rows = [
            (name, f"{tokens:,}" if tokens else "", duration(seconds), size(bytes_))
            for name, seconds, tokens, bytes_ in (*self.stages, total)
        ]
        return table(rows, ("stage", "tokens", "time", "memory above the model"))


@dataclass(frozen=True)
class StageRates:
    """Measured costs by stage: seconds that do not depend on the text, seconds per token, and peak bytes.

    `forward` is the seconds per token of a forward pass of the original.
    """

    fixed: dict[str, float]
    per_token: dict[str, float]
    forward: float
    peaks: dict[str, int]

    def estimate(self, sizes: Sizes) -> CostEstimate:
        """Extrapolate to numbers of tokens."""
        training, fitting, validation, test, epochs, validations = sizes
        tokens = {"rank": fitting, "fit": fitting, "verify": validation, "evaluate": test}
        tokens["train"] = round(training * epochs)
        seconds = {
            name: fixed + self.per_token.get(name, 0) * tokens.get(name, 0) for name, fixed in self.fixed.items()
        }
        if "train" in seconds:  # the teacher runs once on each text
            seconds["train"] += self.forward * ((2 + validations) * validation - training * (epochs - 1))
        costs = (StageCost(name, seconds[name], tokens.get(name, 0), self.peaks.get(name, 0)) for name in seconds)
        return CostEstimate(tuple(costs))


@dataclass(frozen=True)
class TrainingPlan:
    """A compression that fits a time budget, in seconds, and its estimated cost with the planning.

    The `train_until` of the config ends the training if everything is a tenth of the budget late.
    """

    config: CompressionConfig
    estimate: CostEstimate
    budget: float

    def table(self) -> str:
        """Return the plan for a terminal."""
        data, training = self.config.data, self.config.distillation
        assert training is not None
        line = (
            f"budget     {duration(self.budget)}: {self.config.repair}, trained on {data.calibration_tokens:,} tokens, "
            f"{training.epochs:g} epochs, autocast {self.config.hardware.autocast}; fitted on {data.fitting_tokens:,}, "
            f"verified on {data.validation_tokens:,}, tested on {data.test_tokens:,}"
        )
        if self.estimate.seconds < (1 - _LATE) * self.budget:
            end = duration(self.estimate.seconds)
            line += f"\ntext       ends after {end}; give more text to use all of the budget"
        return f"{line}\n{self.estimate.table()}"


@distributed_step("estimate_cost")
def estimate_cost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Any,
    config: CompressionConfig | None = None,
    *,
    test_texts: Sequence[str] | None = None,
    profiled: bool = False,
    output: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.perf_counter,
) -> CostEstimate:
    """Estimate the time and peak memory of each stage of `compress` on this machine.

    The model, random number generators and files are left as they were. In a distributed run rank 0 estimates the time
    of one process.

    Parameters
    ----------
    model, tokenizer, texts, config, test_texts, output
        As in `compress`.
    profiled : bool
        Whether `compress` will be given a profile.
    say : callable
        Receives lines that describe the compression.
    clock : callable
        Returns seconds.

    Raises
    ------
    StreamlineError
        If the model is not a causal language model, or as `compress` for invalid arguments.
    """
    config = config or CompressionConfig()
    options: dict[str, Any] = {"task": config.task or Task.of(model), "test_texts": test_texts}
    if not options["task"].is_of_text:
        raise StreamlineError(
            f"estimate_cost: {type(model).__name__} is for {options['task']}. Expected a causal language model. Run "
            "compress without an estimate."
        )

    def estimate() -> CostEstimate:
        began, training, rounds = clock(), config.distillation, config.rounds
        ready = prepare_compression(model, tokenizer, texts, config, say=say, **options)
        ready.require_writable()
        for line in ready.announcement():
            say(line)
        prepared = clock() - began
        if rounds > 1:
            count = math.ceil(blocks_to_remove(config.target, len(ready.stack)) / rounds)
            first = replace(config, remove=Target(blocks=count))
            ready = prepare_compression(model, tokenizer, texts, first, **options)
        rates = measure_stages(ready, tokenizer, output, clock, prepared)
        if profiled:
            rates.per_token["rank"] = 0.0
        passes = (training.epochs, training.validations) if training else (1, 1)
        fitting, validation, test = map(_total, ([*ready.fit, *ready.held_out], ready.validation, ready.test))
        # Each round trains on its part of the text, and verifies and evaluates on the same.
        return rates.estimate(Sizes(_total(ready.training), fitting, rounds * validation, rounds * test, *passes))

    return DistributedStep("estimate_cost", here()).broadcast_object(estimate)


def estimate_ranking(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    *,
    stack: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> CostEstimate:
    """Estimate the time and peak memory of `streamline_hooks.statistics.profile`."""
    batch = _timed_batch(batches[0], device_of(model))
    with without_progress():
        seconds = _seconds(lambda: profile(model, [batch], stack=stack), model, clock) / tokens_of(batch)
    largest, total = max(map(tokens_of, batches)), _total(batches)
    peaks = compression_bytes(find_stack(model, stack), batch=largest, text=total)
    return CostEstimate((StageCost("rank", seconds * total, total, peaks["rank"]),))


@distributed_step("plan_training")
def plan_training(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    seconds: float,
    config: CompressionConfig | None = None,
    *,
    validation_tokens: int | None = None,
    test_tokens: int | None = None,
    test_texts: Sequence[str] | None = None,
    output: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.perf_counter,
) -> TrainingPlan:
    """Find how much text `compress` can train on in a given time, from the planning to the saved folder.

    ``compress(model, tokenizer, texts, plan.config)`` carries the plan out. The model, random number generators and
    files are left as they were. In a distributed run rank 0 plans, and all ranks return its plan.

    Parameters
    ----------
    model, tokenizer, texts, test_texts, output
        As in `compress`.
    seconds : float
        The budget.
    config : CompressionConfig, optional
        With a distillation, in one round; by default ``CompressionConfig.preset("best")`` with a batch size of 1. The
        plan sets its numbers of tokens, epochs, validations and autocast. If blocks after the window are healed, the
        last block is kept.
    validation_tokens, test_tokens : int, optional
        By default they follow from the budget.
    say : callable
        Receives lines about the target.
    clock : callable
        Returns seconds.

    Raises
    ------
    StreamlineError
        If the budget or the text does not suffice, or the config cannot be planned for.
    """
    chosen = config or CompressionConfig.preset("best", hardware=HardwareConfig(batch_size=1))
    check_plannable(chosen)
    if chosen.healing is not None and chosen.healing.where == "after":
        chosen = replace(chosen, search=replace(chosen.search, keep=tuple(dict.fromkeys((*chosen.search.keep, -1)))))

    def planned(sizes: Sizes, autocast: Precision | None) -> CompressionConfig:
        assert chosen.distillation is not None
        tokens = {f"{name}_tokens": getattr(sizes, name) for name in ("fitting", "validation", "test")}
        return replace(
            chosen,
            data=replace(chosen.data, calibration_tokens=sizes.training, **tokens),
            distillation=replace(chosen.distillation, epochs=sizes.epochs, validations=sizes.validations),
            hardware=replace(chosen.hardware, autocast=autocast),
        )

    def plan() -> TrainingPlan:
        began, parts = clock(), Parts(chosen.data.sequence_length, validation_tokens, test_tokens)
        sequences = max(4, -(-_PROFILED // parts.length), (_MORE + 1) * chosen.hardware.batch_size)
        autocast = _faster_precision(model, clock)
        few = planned(parts.sizes(sequences), autocast)
        few = replace(few, data=replace(few.data, fitting_tokens=None))
        options: dict[str, Any] = {"task": Task("causal-lm"), "test_texts": test_texts, "say": say}
        ready = prepare_compression(model, tokenizer, texts, few, **options)
        rates = measure_stages(ready, tokenizer, output, clock, clock() - began)
        rates = replace(rates, fixed={"plan": 0.0, **rates.fixed})
        while True:
            rates.fixed["plan"] = clock() - began
            sizes = fit_to_budget(seconds, rates, parts)
            config = planned(sizes, autocast)
            split = split_documents(texts, tokenizer, test_documents=test_texts, **document_sizes(config))
            found = (split.calibration.numel(), split.validation.numel(), split.test.numel())
            if found == (sizes.training, sizes.validation, sizes.test):
                break
            parts = parts.shrunk(sizes, found, apart=test_texts is not None)
        estimate = rates.estimate(sizes)
        cost = {stage.name: stage.seconds for stage in estimate.stages}
        result = cost["evaluate"] / (2 + expected_attempts(trained=True))  # evaluated after the training
        until = (1 + _LATE) * seconds - cost["plan"] - cost["generate"] - cost["save"] - result
        return TrainingPlan(replace(config, train_until=until), estimate, seconds)

    return DistributedStep("plan_training", here()).broadcast_object(plan)


def check_plannable(config: CompressionConfig) -> None:
    """Raise if `plan_training` cannot plan for a config."""
    training = config.distillation
    reasons = {
        "trains nothing": training is None,
        f"has {config.rounds} rounds": config.rounds > 1,
        "sets train_until or max_minutes": config.train_until is not None or bool(training and training.max_minutes),
        f"is for {config.task}": config.task not in (None, Task("causal-lm")),
    }
    for reason in [reason for reason, holds in reasons.items() if holds]:
        raise StreamlineError(
            f"plan_training: the config {reason}. Expected one round of training a causal language model without a "
            "time limit, such as CompressionConfig.preset('best'). Change it, or leave the budget out."
        )


class Parts(NamedTuple):
    """Rules by which text is divided: tokens per sequence, fixed validation and test tokens, tokens to train on."""

    length: int
    validation: int | None = None
    test: int | None = None
    available: int | None = None

    def sizes(self, sequences: int, epochs: float = 1) -> Sizes:
        """Return the parts for a number of sequences to train on."""
        tokens = sequences * self.length

        def whole(wanted: int) -> int:
            return max(1, wanted // self.length) * self.length

        validation = whole(min(max(tokens // 10, 2_048), 4_096) if self.validation is None else self.validation)
        test = whole(min(max(tokens // 5, 4_096), 12_288) if self.test is None else self.test)
        fitting = min(tokens, max(2 * self.length, whole(min(max(tokens // 5, 8_192), 40_960))))
        validations = min(max(int(tokens * epochs / (4 * validation)), 2), 8)
        return Sizes(tokens, fitting, validation, test, epochs, validations)

    def shrunk(self, sizes: Sizes, found: tuple[int, int, int], *, apart: bool) -> Parts:
        """Return the rules for less text than asked for.

        Validation and test get at most a tenth and a fifth. If the test has text of its own (`apart`), it gets that.
        """
        total = sum(found[:2]) if apart else sum(found)
        test = found[2] if apart else min(sizes.test, total // 5)
        few = Parts(self.length, min(sizes.validation, total // 10), test)
        _, _, validation, test, *_ = few.sizes(1)
        return few._replace(available=total - validation - (0 if apart else test))


def fit_to_budget(seconds: float, rates: StageRates, parts: Parts) -> Sizes:
    """Find the most text that can be trained on in a given time; if all of it is used, up to four epochs.

    Raises
    ------
    StreamlineError
        If the smallest training that is planned takes longer.
    """

    def cost(sequences: int, epochs: float = 1) -> float:
        return rates.estimate(parts.sizes(sequences, epochs)).seconds

    most = 2**40 if parts.available is None else max(1, parts.available // parts.length)
    least = min(math.ceil(_LEAST / parts.length), most)
    if (needed := cost(least)) > seconds:
        raise StreamlineError(
            f"A budget of {duration(seconds)} does not suffice on this machine: training on {least * parts.length:,} "
            f"tokens takes {duration(needed)} with all other stages. Give {math.ceil(needed / 60)}m or more, a smaller "
            "shortlist, or a faster machine."
        )
    if cost(most) > seconds:
        return parts.sizes(least - 1 + bisect_right(range(least, most), seconds, key=cost))
    epochs = [1 + k / 20 for k in range(20 * (_EPOCHS - 1) + 1)]
    return parts.sizes(most, epochs[bisect_right(epochs, seconds, key=partial(cost, most)) - 1])


def measure_stages(
    ready: Preparation, tokenizer: Any, output: str | Path | None, clock: Callable[[], float], prepared: float
) -> StageRates:
    """Time a piece of each stage after the preparation, which took `prepared` seconds."""
    model: Any = ready.stack.model
    config, search, path, device = ready.config, ready.config.search, ready.stack.path, device_of(model)
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    save = 0.0 if output is None else model_bytes / write_rate(output, clock)
    batch, trained = _timed_batch(ready.calibration[0], device), 0

    def per_token(action: Callable[..., Any], *arguments: Any, **options: Any) -> float:
        return _seconds(lambda: action(model, [batch], *arguments, **options), model, clock) / tokens_of(batch)

    with torch.random.fork_rng([device] if device.type == "cuda" else []), without_progress():
        rank = per_token(profile, keep=ready.protected, stack=path)
        selections = _likely_selections(ready)
        selection, fit, solving = _fit(ready, selections, batch, clock)
        windows = selection.windows
        forward = per_token(perplexity, "estimate")
        left = 1 - sum(map(len, windows)) / len(ready.stack)
        stand_ins = tuple(ready.kind.build(ready.stack, window) for window in windows)
        spliced = Attempt(selection, stand_ins).candidate(ready.stack)  # runs from its window on
        candidate = attempt = left * forward
        if spliced is not None:
            both = per_token(distances_of_candidates, [spliced], stack=path, task=ready.task)
            candidate = max(0.0, both - forward)
            attempt = max(0.0, per_token(perplexity_of_candidates, [spliced], stack=path) - forward)
        first, further = len(selections), sum(len(one.windows) - 1 for one in selections)
        runs = len(ready.candidates) if search.number_of_windows == 1 else len(ready.stack)
        runs *= search.resolved_criterion.runs_per_window
        per_token_of = {
            "rank": rank,
            # One pass fits the first window of all selections, and another one each further window.
            "fit": rank + first * max(0.0, fit - rank * windows[0].stop / len(ready.stack)) + further * fit,
            "verify": forward + first * candidate,
            "evaluate": (1 + left) * forward + expected_attempts(config.distillation is not None) * attempt,
        }
        fixed = {
            "prepare": prepared,
            "rank": runs * candidate * min(RANKED, _total(ready.calibration)),
            "fit": (first + further) * solving,
            "verify": 0.0,
        }
        if config.distillation is not None:
            student = _student(ready, windows)
            options: dict[str, Any] = {"hardware": config.hardware, "clock": clock}
            pace = measure_training(student, ready.training, ready.validation[0], config.distillation, **options)
            trained = sum(p.numel() for p in student.parameters().values())
            fixed["train"], per_token_of["train"] = 0.0, pace
        fixed |= {"evaluate": 0.0, "generate": _generate(ready, tokenizer, clock), "save": save}
    peaks = compression_bytes(
        ready.stack,
        batch=max(map(tokens_of, (*ready.calibration, *ready.test))),
        text=_total(ready.training) + _total(ready.validation),
        windows=first,
        trained=trained,
        state_memory=config.hardware.state_memory,
    )
    copy = model_bytes if config.rounds > 1 else 0  # the original, which stays the teacher
    return StageRates(fixed, per_token_of, forward, {name: peaks.get(name, 0) + copy for name in fixed})


def measure_training(
    student: Student,
    batches: Sequence[Batch | Tensor],
    validation: Batch | Tensor,
    config: DistillationConfig,
    *,
    hardware: HardwareConfig | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the seconds per token of a training run with its teacher, by two short runs of different length.

    A run before them does not count. The student is used up; its model is left as it was.
    """
    each, taken = config.gradient_accumulation_steps, []
    short = replace(config, epochs=1, validations=1, max_minutes=None, patience=0)
    for steps in (1, 1, 1 + _MORE):
        used = [batches[k % len(batches)] for k in range(steps * each)]
        wait_for(student.model)
        began = clock()
        if train(student, used, [validation], short, hardware=hardware or HardwareConfig()).interrupted:
            raise KeyboardInterrupt
        wait_for(student.model)
        taken.append(clock() - began)
    return max(0.0, taken[2] - taken[1]) / _total(used[each:])


def _seconds(action: Callable[[], Any], model: nn.Module, clock: Callable[[], float]) -> float:
    """Return the median of up to three runs, after one that does not count; none starts after five seconds."""
    taken: list[float] = []
    while len(taken) <= 3 and sum(taken[1:]) < 5:
        wait_for(model)
        began = clock()
        action()
        wait_for(model)
        taken.append(clock() - began)
    return statistics.median(taken[1:])


def _total(batches: Sequence[Batch | Tensor]) -> int:
    return sum(map(tokens_of, batches))


def _timed_batch(batch: Any, device: torch.device) -> Any:
    """Return a batch, on a CPU as many of its sequences as have 512 tokens, and at least one."""
    if device.type != "cpu":
        return batch
    if isinstance(batch, Tensor):
        return batch[: max(1, _TIMED // batch.shape[1])]
    return {name: _timed_batch(value, device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _likely_selections(ready: Preparation) -> list[Selection]:
    """Return a shortlist by a profile of a few tokens; if the search runs the model, the first windows."""
    search, stack, criterion = ready.config.search, ready.stack, ready.config.search.resolved_criterion
    if search.runs_model or search.silences_branches:
        return [Selection((window,)) for window in ready.candidates[: search.shortlist]]
    few = ready.problem().beginning(_PROFILED) or []
    measured = profile(stack.model, few, keep=ready.protected, stack=stack.path)
    criterion = criterion if criterion.needs == "profile" else CRITERIA["cosine"]
    found = search.find(ready.problem(profile=measured, criterion=criterion))
    return found if ready.config.distillation is None else trainable(found, ready, ready.config.healing)


def _fit(
    ready: Preparation, selections: Sequence[Selection], batch: Any, clock: Callable[[], float]
) -> tuple[Selection, float, float]:
    """Fit the first window of the middle selection by position, or of the next one that can be fitted.

    Return the selection, the seconds per token, and the seconds of a solution.
    """
    model, tokens, middle = ready.stack.model, tokens_of(batch), len(selections) // 2
    ordered = sorted(selections, key=lambda one: one.windows[0].start)
    refusals: list[UnsupportedSurgery] = []
    for selection in (*ordered[middle:], *ordered[:middle]):
        fit = partial(fit_windows, model, selection.windows[:1], ready.kind, held_out=[batch], stack=ready.stack.path)
        try:
            one, more = (_seconds(partial(fit, fit=[batch] * n), model, clock) for n in (1, 1 + _MORE))
        except UnsupportedSurgery as error:
            refusals.append(error)
        else:
            fitting = max(0.0, more - one) / (_MORE * tokens)
            return selection, fitting, max(0.0, one - 2 * tokens * fitting)
    raise refusals[0]


def _student(ready: Preparation, windows: Sequence[range]) -> Student:
    """Return a student with unfitted replacements."""
    healing = ready.config.healing
    require_parameters(ready, healing)
    if healing is not None and not (healing.head or healing.blocks(len(ready.stack), windows)):
        healing = None
    pairs = [(window, ready.kind.build(ready.stack, window)) for window in windows]
    return student_of(ready.stack, pairs, healing, seed=ready.config.seed, task=ready.task)


def _generate(ready: Preparation, tokenizer: Any, clock: Callable[[], float]) -> float:
    """Return the seconds in which both models generate and are timed, from those in which the original generates."""
    evaluation, began = ready.config.evaluation, clock()
    if tokenizer is None or not (evaluation.speed or evaluation.generation):
        return 0.0
    SideBySide(ready.stack.model, tokenizer, ready.test, lambda line: None)
    generated = clock()
    if evaluation.generation:
        CollapseWatch(ready.stack.model, tokenizer, ready.test, lambda line: None)
    return 4 * (generated - began) + 2 * (clock() - generated)


def _faster_precision(model: nn.Module, clock: Callable[[], float]) -> Precision | None:
    """Return bfloat16 for autocast, unless the weights have it or its products are not clearly faster than theirs."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    taken = []
    for dtype in (weight.dtype, torch.bfloat16):
        a, b = (torch.ones(rows, 1024, dtype=dtype, device=weight.device) for rows in (512, 1024))
        taken.append(_seconds(partial(torch.matmul, a, b.T), model, clock))
    return "bfloat16" if weight.dtype != torch.bfloat16 and 1.5 * taken[1] < taken[0] else None

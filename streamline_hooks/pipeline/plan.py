"""Estimate the cost of a compression on this machine, and find how much text fits a time budget.

A part of each stage is timed and extrapolated linearly. The aim is an accuracy of 25 % on an idle machine.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    DistributedStep,
    HardwareConfig,
    Precision,
    StreamlineError,
    count_tokens,
    current_processes,
    device_of,
    distributed_step,
    get_logger,
    hide_progress,
    is_text_batch,
)
from streamline_hooks.data import TextDataset, TokenSplit, split_documents
from streamline_hooks.modeling import Task, find_stack
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.pipeline.cost import compression_bytes, format_duration
from streamline_hooks.pipeline.prepare import CompressionData, parts_of, prepare_compression, split_sizes
from streamline_hooks.pipeline.result import expected_trials
from streamline_hooks.selection import Target, blocks_to_remove
from streamline_hooks.statistics import profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
from streamline_hooks.pipeline.stage_times import (
    _EXTRA_STEPS,
    _PROFILED,
    CostEstimate,
    StageCost,
    StageRates,
    StageTokens,
    _faster_precision,
    _seconds,
    _timed_batch,
    _total,
    measure_stages,
    positions_per_token,
)

logger = get_logger(__name__)

_LEAST, _EPOCHS = 20_480, 4  # fewest training tokens and most epochs of a plan
_TOLERANCE = 0.1  # training stops when the compression is late by this fraction of the budget


@dataclass(frozen=True)
class TrainingPlan:
    """A compression that fits a time budget.

    Attributes
    ----------
    config : CompressionConfig
        The config to run. Its `train_until` stops training if the compression is late by a tenth of the budget.
    estimate : CostEstimate
        Estimated cost of each stage, including the planning.
    budget : float
        The time budget in seconds.

    Examples
    --------
    >>> from streamline_hooks.pipeline import CompressionConfig, CostEstimate, TrainingPlan
    >>> plan = TrainingPlan(CompressionConfig.preset("best"), CostEstimate(()), budget=600.0)
    >>> plan.estimate.seconds <= plan.budget
    True
    """

    config: CompressionConfig
    estimate: CostEstimate
    budget: float

    def table(self) -> str:
        """Return the plan as text for a terminal."""
        data, training = self.config.data, self.config.distillation
        assert training is not None
        line = (
            f"budget     {format_duration(self.budget)}: {self.config.repair}, trained on {data.calibration_tokens:,} "
            f"tokens, {training.epochs:g} epochs, autocast {self.config.hardware.autocast}; fitted on "
            f"{data.fitting_tokens:,}, verified on {data.validation_tokens:,}, tested on {data.test_tokens:,}"
        )
        if self.estimate.seconds < (1 - _TOLERANCE) * self.budget:
            end = format_duration(self.estimate.seconds)
            line += f"\ntext       takes only {end}; add more text to use the whole budget"
        return f"{line}\n{self.estimate.table()}"

    def report(self) -> dict[str, Any]:
        """Return the plan as JSON values, with times in seconds and memory in bytes."""
        return {"budget": self.budget, "config": self.config.to_dict(), **self.estimate.report()}


@distributed_step("estimate_cost")
def estimate_cost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: CompressionData,
    config: CompressionConfig | None = None,
    *,
    test_texts: Sequence[str] | None = None,
    profiled: bool = False,
    output: str | Path | None = None,
    clock: Callable[[], float] = perf_counter,
) -> CostEstimate:
    """Estimate the time and peak memory of each stage of `compress` on this machine.

    The model, random number generators and files are not changed. In a distributed run rank 0 estimates the time of a
    single process.

    Parameters
    ----------
    model, tokenizer, texts, config, test_texts, output
        As in `compress`.
    profiled : bool
        If True, `compress` will get a profile and not measure one. False by default.
    clock : callable
        Returns seconds.

    Returns
    -------
    CostEstimate

    Raises
    ------
    StreamlineError
        If the arguments are invalid, as in `compress`.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.pipeline import CompressionConfig, estimate_cost
    >>> from streamline_hooks.testing import tiny_model
    >>> batches = [torch.randint(3, 60, (2, 8)) for _ in range(12)]
    >>> cost = estimate_cost(tiny_model("llama"), None, batches, CompressionConfig(remove=2))
    >>> [stage.name for stage in cost.stages]
    ['prepare', 'rank', 'fit', 'verify', 'evaluate', 'generate', 'save']
    """
    config, parts = config or CompressionConfig(), parts_of(texts)
    options: dict[str, Any] = {"task": config.task or Task.of(model), "test_texts": test_texts}

    def estimate() -> CostEstimate:
        began, training, rounds = clock(), config.distillation, config.rounds
        ready = prepare_compression(model, tokenizer, parts, config, **options)
        ready.require_writable()
        for line in ready.announcement():
            logger.info(line)
        prepared = clock() - began
        if rounds > 1:
            count = math.ceil(blocks_to_remove(config.target, len(ready.stack)) / rounds)
            first = replace(config, remove=Target(blocks=count))
            ready = prepare_compression(model, tokenizer, parts, first, **options)
        rates = measure_stages(ready, tokenizer, output, clock, prepared)
        if profiled:
            rates.per_token["rank"] = 0.0
        passes = (training.epochs, training.validations) if training else (1, 1)
        fitting, validation, test = map(_total, ([*ready.fit, *ready.held_out], ready.validation, ready.test))
        # Rounds divide the training text, and share the validation and test text.
        sizes = StageTokens(_total(ready.training), fitting, rounds * validation, rounds * test, *passes)
        estimated = _limit_training(rates.estimate(sizes), config)
        return replace(estimated, unit=_unit(ready.calibration[0]))

    return DistributedStep("estimate_cost", current_processes()).broadcast_object(estimate)


def _limit_training(estimate: CostEstimate, config: CompressionConfig) -> CostEstimate:
    """Limit the time of training to `train_until` and ``distillation.max_minutes``."""
    limit, before, stages = math.inf, 0.0, []
    if config.distillation is not None and config.distillation.max_minutes is not None:
        limit = 60 * config.distillation.max_minutes
    for stage in estimate.stages:
        if stage.name == "train":
            until = math.inf if config.train_until is None else max(0.0, config.train_until - before)
            stage = stage._replace(seconds=min(stage.seconds, limit, until))
        before += stage.seconds
        stages.append(stage)
    return replace(estimate, stages=tuple(stages))


def estimate_ranking(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    *,
    stack: str | None = None,
    clock: Callable[[], float] = perf_counter,
) -> CostEstimate:
    """Estimate the time and peak memory of `streamline_hooks.statistics.profile`.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or Tensor
        The batches to profile.
    stack : str, optional
        Path of the block stack.
    clock : callable
        Returns seconds.

    Returns
    -------
    CostEstimate

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.pipeline import estimate_ranking
    >>> from streamline_hooks.testing import tiny_model
    >>> cost = estimate_ranking(tiny_model("llama"), [torch.ones(2, 8, dtype=torch.long)] * 3)
    >>> [(stage.name, stage.tokens) for stage in cost.stages]
    [('rank', 48)]
    """
    batch, block_stack = _timed_batch(batches[0], device_of(model)), find_stack(model, stack)
    with hide_progress():
        seconds = _seconds(lambda: profile(model, [batch], stack=stack), model, clock) / count_tokens(batch)
        positions = positions_per_token(block_stack, batch)
    largest, total = max(map(count_tokens, batches)), _total(batches)
    peaks = compression_bytes(block_stack, batch=round(positions * largest), text=round(positions * total))
    return CostEstimate((StageCost("rank", seconds * total, total, peaks["rank"]),), _unit(batch))


def _unit(batch: Batch | Tensor) -> str:
    """Return the unit of `count_tokens` for a batch."""
    return "token" if is_text_batch(batch) else "image"


@distributed_step("plan_training")
def plan_training(
    model: PreTrainedModel,
    data: Sequence[str] | TextDataset,
    seconds: float,
    config: CompressionConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    sizes: Mapping[str, int] | None = None,
    test_texts: Sequence[str] | None = None,
    output: str | Path | None = None,
) -> TrainingPlan:
    """Find how much text `compress` can train on within a time budget.

    The budget includes the planning and saving. ``compress(model, data, plan.config, tokenizer=tokenizer)`` runs the
    plan. The model, random number generators and files are not changed. In a distributed run rank 0 plans, and all
    ranks return its plan.

    Parameters
    ----------
    model, data, tokenizer, output
        As in `compress`. The data are documents: strings, or a data set with a column ``text``.
    seconds : float
        The time budget in seconds.
    config : CompressionConfig, optional
        A config with a distillation and one round. By default ``CompressionConfig.preset("best")`` with a batch size of
        1. The plan sets the tokens of each part, epochs, validations and autocast. If it heals the blocks after the
        window, the last block is protected.
    sizes : mapping of str to int, optional
        Tokens of the parts ``validation`` and ``test``, or of one of them. By default they follow from the budget.
    test_texts : sequence of str, optional
        Documents for the test part. By default a part of the data.

    Returns
    -------
    TrainingPlan

    Raises
    ------
    StreamlineError
        If the budget or the text is too small, the config cannot be planned, or `sizes` has an unknown part.

    Examples
    --------
    >>> from streamline_hooks.pipeline import plan_training
    >>> plan = plan_training(model, texts, 600.0, tokenizer=tokenizer)  # doctest: +SKIP
    >>> result = compress(model, texts, plan.config, tokenizer=tokenizer)  # doctest: +SKIP
    """
    fixed = dict(sizes or {})
    if unknown := set(fixed) - {"validation", "test"}:
        raise StreamlineError(
            f"sizes has the unknown parts {sorted(unknown)}. Expected validation and test; the budget determines the "
            "other parts. Leave them out."
        )
    documents = parts_of(data)
    if isinstance(documents, (Mapping, TokenSplit)):
        raise StreamlineError(
            f"plan_training: data is a {type(data).__name__} with parts of given sizes. Expected documents, whose "
            "parts follow from the budget. Pass a list of strings or a datasets.Dataset."
        )
    chosen = config or CompressionConfig.preset("best", hardware=HardwareConfig(batch_size=1))
    check_plannable(chosen)
    if chosen.healing is not None and chosen.healing.where == "after":
        chosen = replace(
            chosen, search=replace(chosen.search, protect=tuple(dict.fromkeys((*chosen.search.protect, -1))))
        )

    def planned(stages: StageTokens, autocast: Precision | None) -> CompressionConfig:
        assert chosen.distillation is not None
        tokens = {f"{name}_tokens": getattr(stages, name) for name in ("fitting", "validation", "test")}
        return replace(
            chosen,
            data=replace(chosen.data, calibration_tokens=stages.training, **tokens),
            distillation=replace(chosen.distillation, epochs=stages.epochs, validations=stages.validations),
            hardware=replace(chosen.hardware, autocast=autocast),
        )

    def plan() -> TrainingPlan:
        began, parts = (
            perf_counter(),
            TextParts(chosen.data.sequence_length, fixed.get("validation"), fixed.get("test")),
        )
        sequences = max(4, -(-_PROFILED // parts.length), (_EXTRA_STEPS + 1) * chosen.hardware.batch_size)
        autocast = _faster_precision(model, perf_counter)
        short_config = planned(parts.sizes(sequences), autocast)
        short_config = replace(short_config, data=replace(short_config.data, fitting_tokens=None))
        options: dict[str, Any] = {"task": Task("causal-lm"), "test_texts": test_texts}
        ready = prepare_compression(model, tokenizer, documents, short_config, **options)
        rates = measure_stages(ready, tokenizer, output, perf_counter, perf_counter() - began)
        rates = replace(rates, fixed={"plan": 0.0, **rates.fixed})
        while True:
            rates.fixed["plan"] = perf_counter() - began
            stages = fit_to_budget(seconds, rates, parts)
            config = planned(stages, autocast)
            split = split_documents(documents, tokenizer, test_documents=test_texts, **split_sizes(config))
            tokens = (split.calibration.numel(), split.validation.numel(), split.test.numel())
            if tokens == (stages.training, stages.validation, stages.test):
                break
            parts = parts.shrunk(stages, tokens, apart=test_texts is not None)
        estimate = rates.estimate(stages)
        cost = {stage.name: stage.seconds for stage in estimate.stages}
        result = cost["evaluate"] / (2 + expected_trials(trained=True))  # the evaluation after training
        until = (1 + _TOLERANCE) * seconds - cost["plan"] - cost["generate"] - cost["save"] - result
        return TrainingPlan(replace(config, train_until=until), estimate, seconds)

    return DistributedStep("plan_training", current_processes()).broadcast_object(plan)


def check_plannable(config: CompressionConfig) -> None:
    """Raise if `plan_training` does not support a config."""
    training = config.distillation
    reasons = {
        "trains nothing": training is None,
        f"has {config.rounds} rounds": config.rounds > 1,
        "sets train_until or max_minutes": config.train_until is not None or bool(training and training.max_minutes),
        f"is for {config.task}": config.task not in (None, Task("causal-lm")),
    }
    for reason in [reason for reason, applies in reasons.items() if applies]:
        raise StreamlineError(
            f"plan_training: the config {reason}. Expected a causal language model, one round and a distillation "
            "without a time limit, such as CompressionConfig.preset('best'). Change the config, or leave the budget "
            "out."
        )


class TextParts(NamedTuple):
    """Constraints on the parts: sequence length, fixed validation and test tokens, available training tokens."""

    length: int
    validation: int | None = None
    test: int | None = None
    available: int | None = None

    def sizes(self, sequences: int, epochs: float = 1) -> StageTokens:
        """Return the tokens of all parts for a number of training sequences."""
        tokens = sequences * self.length

        def whole(wanted: int) -> int:
            return max(1, wanted // self.length) * self.length

        validation = whole(min(max(tokens // 10, 2_048), 4_096) if self.validation is None else self.validation)
        test = whole(min(max(tokens // 5, 4_096), 12_288) if self.test is None else self.test)
        fitting = min(tokens, max(2 * self.length, whole(min(max(tokens // 5, 8_192), 40_960))))
        validations = min(max(int(tokens * epochs / (4 * validation)), 2), 8)
        return StageTokens(tokens, fitting, validation, test, epochs, validations)

    def shrunk(self, sizes: StageTokens, tokens: tuple[int, int, int], *, apart: bool) -> TextParts:
        """Return the constraints if the text has only the given tokens in its calibration, validation and test parts.

        Validation gets at most a tenth and test at most a fifth of the text. A separate test text (`apart`) is used
        whole.
        """
        total = sum(tokens[:2]) if apart else sum(tokens)
        test = tokens[2] if apart else min(sizes.test, total // 5)
        parts = TextParts(self.length, min(sizes.validation, total // 10), test)
        _, _, validation, test, *_ = parts.sizes(1)
        return parts._replace(available=total - validation - (0 if apart else test))


def fit_to_budget(seconds: float, rates: StageRates, parts: TextParts) -> StageTokens:
    """Find the most training text that fits a time budget, with more epochs if all text fits."""

    def cost(sequences: int, epochs: float = 1) -> float:
        return rates.estimate(parts.sizes(sequences, epochs)).seconds

    most = 2**40 if parts.available is None else max(1, parts.available // parts.length)
    least = min(math.ceil(_LEAST / parts.length), most)
    if (needed := cost(least)) > seconds:
        raise StreamlineError(
            f"A budget of {format_duration(seconds)} is too small for this machine: a compression with "
            f"{least * parts.length:,} training tokens takes {format_duration(needed)}. Expected "
            f"{math.ceil(needed / 60)}m or more. Increase the budget, or reduce search.shortlist."
        )
    if cost(most) > seconds:
        return parts.sizes(least - 1 + bisect_right(range(least, most), seconds, key=cost))
    epochs = [1 + k / 20 for k in range(20 * (_EPOCHS - 1) + 1)]
    return parts.sizes(most, epochs[bisect_right(epochs, seconds, key=partial(cost, most)) - 1])

"""Time a few tokens and steps of each stage of a compression, and extrapolate to the whole."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    HardwareConfig,
    Precision,
    UnsupportedSurgery,
    count_tokens,
    device_of,
    hide_progress,
    is_text_batch,
    select_rows,
    table,
)
from streamline_hooks.distillation import DistillationConfig, Student, student_of, train
from streamline_hooks.evaluation import (
    CollapseCheck,
    GenerationComparison,
    TaskScores,
    distances_of_candidates,
    perplexity,
    perplexity_of_candidates,
    synchronize,
)
from streamline_hooks.modeling import BlockStack
from streamline_hooks.pipeline.apply import has_healing, require_trainable, trainable_selections
from streamline_hooks.pipeline.cost import compression_bytes, format_bytes, format_duration, write_rate
from streamline_hooks.pipeline.prepare import Preparation
from streamline_hooks.pipeline.result import expected_trials
from streamline_hooks.recording import HiddenStateRecorder
from streamline_hooks.repair import fit_windows
from streamline_hooks.selection import CRITERIA, RANKING_TOKENS, Selection, Trial, selection_applied
from streamline_hooks.statistics import profile

_PROFILED = 2_048  # tokens of the profile that selects likely windows
_TIMED = 512  # tokens of a timed batch on a CPU; an accelerator runs whole batches
_EXTRA_STEPS = 3  # additional batches or optimizer steps of the longer of two timed runs


class StageTokens(NamedTuple):
    """Tokens of each part, and epochs and validations of the training run."""

    training: int
    fitting: int
    validation: int
    test: int
    epochs: float = 1
    validations: int = 1


class StageCost(NamedTuple):
    """Estimated cost of a stage: seconds, tokens, and peak memory in bytes in addition to the model."""

    name: str
    seconds: float
    tokens: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class CostEstimate:
    """Estimated cost of the stages of a compression.

    Attributes
    ----------
    stages : tuple of StageCost
        Cost of each stage.
    unit : str
        What `StageCost.tokens` counts: ``"token"`` or ``"image"``.

    Examples
    --------
    >>> from streamline_hooks.pipeline.stage_times import CostEstimate, StageCost
    >>> CostEstimate((StageCost("rank", 2.0, tokens=4_096), StageCost("fit", 3.0))).seconds
    5.0
    """

    stages: tuple[StageCost, ...]
    unit: str = "token"

    @property
    def seconds(self) -> float:
        """Total time in seconds."""
        return sum(stage.seconds for stage in self.stages)

    def table(self) -> str:
        """Return the estimate as a table for a terminal."""
        total = StageCost("total", self.seconds, bytes=max(stage.bytes for stage in self.stages))
        rows = [
            (name, f"{tokens:,}" if tokens else "", format_duration(seconds), format_bytes(bytes_))
            for name, seconds, tokens, bytes_ in (*self.stages, total)
        ]
        return table(rows, ("stage", f"{self.unit}s", "time", "memory above the model"))

    def report(self) -> dict[str, Any]:
        """Return the estimate as JSON values, with times in seconds and memory in bytes."""
        return {"seconds": self.seconds, "stages": [stage._asdict() for stage in self.stages]}


@dataclass(frozen=True)
class StageRates:
    """Measured costs by stage: fixed seconds, seconds per token, and peak memory in bytes.

    `forward` is the time of a forward pass of the original in seconds per token.
    """

    fixed: dict[str, float]
    per_token: dict[str, float]
    forward: float
    peaks: dict[str, int]

    def estimate(self, sizes: StageTokens) -> CostEstimate:
        """Extrapolate to the given numbers of tokens."""
        training, fitting, validation, test, epochs, validations = sizes
        tokens = {"rank": fitting, "fit": fitting, "verify": validation, "evaluate": test}
        tokens["train"] = round(training * epochs)
        seconds = {
            name: fixed + self.per_token.get(name, 0) * tokens.get(name, 0) for name, fixed in self.fixed.items()
        }
        if "train" in seconds:  # the teacher runs once on each part
            seconds["train"] += self.forward * ((2 + validations) * validation - training * (epochs - 1))
        costs = (StageCost(name, seconds[name], tokens.get(name, 0), self.peaks.get(name, 0)) for name in seconds)
        return CostEstimate(tuple(costs))


def measure_stages(
    ready: Preparation, tokenizer: Any, output: str | Path | None, clock: Callable[[], float], prepared: float
) -> StageRates:
    """Time a part of each stage; the preparation took `prepared` seconds."""
    model: Any = ready.stack.model
    config, search, path, device = ready.config, ready.config.search, ready.stack.path, device_of(model)
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    save = 0.0 if output is None else model_bytes / write_rate(output, clock)
    batch, trained = _timed_batch(ready.calibration[0], device), 0

    def per_token(action: Callable[..., Any], *arguments: Any, **options: Any) -> float:
        return _seconds(lambda: action(model, [batch], *arguments, **options), model, clock) / count_tokens(batch)

    with torch.random.fork_rng([device] if device.type == "cuda" else []), hide_progress():
        rank = per_token(profile, protect=ready.protected, stack=path)
        selections = _likely_selections(ready)
        selection, fit, solving = _fit(ready, selections, batch, clock)
        windows = selection.windows
        is_causal = ready.task.is_causal_lm
        forward = (
            per_token(perplexity, "estimate")
            if is_causal
            else per_token(distances_of_candidates, [], stack=path, task=ready.task)
        )
        left = 1 - sum(map(len, windows)) / len(ready.stack)
        weight = next(p for p in model.parameters() if p.is_floating_point())
        replacement_modules = tuple(ready.kind.build(ready.stack, window) for window in windows)
        for module in replacement_modules:
            if isinstance(module, nn.Module):
                module.to(weight.device, weight.dtype)
        spliced = Trial(selection, replacement_modules).candidate(ready.stack)  # runs from its window on
        candidate = trial = left * forward
        if spliced is not None:
            both = per_token(distances_of_candidates, [spliced], stack=path, task=ready.task)
            candidate = max(0.0, both - forward)
            if is_causal:
                trial = max(0.0, per_token(perplexity_of_candidates, [spliced], stack=path) - forward)
        trials = expected_trials(config.distillation is not None)
        evaluate = (1 + left) * forward + trials * trial
        if not is_causal:  # each trial runs the whole model
            original = per_token(TaskScores, ready.task)
            scores = TaskScores(model, [batch], ready.task)
            with selection_applied(ready.stack, Trial(selection, replacement_modules), {}):
                trial = _seconds(lambda: scores.of(model), model, clock) / count_tokens(batch)
            evaluate = original + (1 + trials) * trial
        first, further = len(selections), sum(len(item.windows) - 1 for item in selections)
        runs = len(ready.candidates) if search.number_of_windows == 1 else len(ready.stack)
        runs *= search.resolved_criterion.runs_per_window
        per_token_of = {
            "rank": rank,
            # The first windows of all selections share one pass; each further window needs another pass.
            "fit": rank + first * max(0.0, fit - rank * windows[0].stop / len(ready.stack)) + further * fit,
            "verify": forward + first * candidate,
            "evaluate": evaluate,
        }
        fixed = {
            "prepare": prepared,
            "rank": runs * candidate * min(RANKING_TOKENS, _total(ready.calibration)),
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
    positions = 1.0 if is_causal else positions_per_token(ready.stack, batch)
    peaks = compression_bytes(
        ready.stack,
        batch=round(positions * max(map(count_tokens, (*ready.calibration, *ready.test)))),
        text=round(positions * (_total(ready.training) + _total(ready.validation))),
        windows=first,
        trained=trained,
        hardware=config.hardware,
    )
    copy = model_bytes if config.rounds > 1 else 0  # the original, which is the teacher
    return StageRates(fixed, per_token_of, forward, {name: peaks.get(name, 0) + copy for name in fixed})


def positions_per_token(stack: BlockStack, batch: Any) -> float:
    """Return the number of hidden states of a stack per token or image, as `count_tokens` counts them.

    An image has a hidden state per patch. A decoder can have other tokens than its encoder.
    """
    record = HiddenStateRecorder(stack.model, [0], sites=["block.input"], stop=True, stack=stack.path)
    with record.over([batch]) as passes:
        for _ in passes:
            states = record.inputs[0][0]
    return states.shape[:-1].numel() / max(1, count_tokens(batch))


def measure_training(
    student: Student,
    batches: Sequence[Batch | Tensor],
    validation: Batch | Tensor,
    config: DistillationConfig,
    *,
    hardware: HardwareConfig | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Measure the time of a training run in seconds per token, including the teacher.

    Two short runs of different length are timed after a warm-up run. The runs change the student, but not its model.

    Parameters
    ----------
    student : Student
        A student that is not used afterwards.
    batches : sequence of mapping or Tensor
        Training batches.
    validation : mapping or Tensor
        A validation batch.
    config : DistillationConfig
        The config of the training run.
    hardware : HardwareConfig, optional
    clock : callable
        Returns seconds.

    Returns
    -------
    float
    """
    accumulation, durations = config.gradient_accumulation_steps, []
    short = replace(config, epochs=1, validations=1, max_minutes=None, patience=0)
    for steps in (1, 1, 1 + _EXTRA_STEPS):
        used = [batches[k % len(batches)] for k in range(steps * accumulation)]
        synchronize(student.model)
        began = clock()
        if train(student, used, [validation], short, hardware=hardware or HardwareConfig()).interrupted:
            raise KeyboardInterrupt
        synchronize(student.model)
        durations.append(clock() - began)
    return max(0.0, durations[2] - durations[1]) / _total(used[accumulation:])


def _seconds(action: Callable[[], Any], model: nn.Module, clock: Callable[[], float]) -> float:
    """Return the median time of up to three runs after a warm-up; no run starts after five seconds."""
    durations: list[float] = []
    while len(durations) <= 3 and sum(durations[1:]) < 5:
        synchronize(model)
        began = clock()
        action()
        synchronize(model)
        durations.append(clock() - began)
    return statistics.median(durations[1:])


def _total(batches: Sequence[Batch | Tensor]) -> int:
    return sum(map(count_tokens, batches))


def _timed_batch(batch: Any, device: torch.device) -> Any:
    """Return a batch, on a CPU reduced to about 512 tokens of text."""
    if device.type != "cpu" or not is_text_batch(batch):
        return batch
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    return select_rows(batch, slice(0, max(1, _TIMED // ids.shape[1])))


def _likely_selections(ready: Preparation) -> list[Selection]:
    """Return a shortlist from a profile of a few tokens, or the first windows if the search runs the model."""
    search, stack, criterion = ready.config.search, ready.stack, ready.config.search.resolved_criterion
    if search.runs_model or search.zeroes_branches:
        return [Selection((window,)) for window in ready.candidates[: search.shortlist]]
    few = ready.problem().first_batches(_PROFILED) or []
    measured = profile(stack.model, few, protect=ready.protected, stack=stack.path)
    criterion = criterion if criterion.needs == "profile" else CRITERIA["cosine"]
    selections = search.find(ready.problem(profile=measured, criterion=criterion))
    return (
        selections
        if ready.config.distillation is None
        else trainable_selections(selections, ready, ready.config.healing)
    )


def _fit(
    ready: Preparation, selections: Sequence[Selection], batch: Any, clock: Callable[[], float]
) -> tuple[Selection, float, float]:
    """Fit the first window of the middle selection (by position), or of the next selection that can be fitted.

    Return the selection, the seconds per token, and the seconds per solution.
    """
    model, tokens, middle = ready.stack.model, count_tokens(batch), len(selections) // 2
    ordered = sorted(selections, key=lambda selection: selection.windows[0].start)
    errors: list[UnsupportedSurgery] = []
    for selection in (*ordered[middle:], *ordered[:middle]):
        fit = partial(fit_windows, model, selection.windows[:1], ready.kind, held_out=[batch], stack=ready.stack.path)
        try:
            short, long = (_seconds(partial(fit, fit=[batch] * n), model, clock) for n in (1, 1 + _EXTRA_STEPS))
        except UnsupportedSurgery as error:
            errors.append(error)
        else:
            fitting = max(0.0, long - short) / (_EXTRA_STEPS * tokens)
            return selection, fitting, max(0.0, short - 2 * tokens * fitting)
    raise errors[0]


def _student(ready: Preparation, windows: Sequence[range]) -> Student:
    """Return a student with unfitted replacements."""
    healing = ready.config.healing
    require_trainable(ready, healing)
    healing = healing if has_healing(ready, healing, windows) else None
    pairs = [(window, ready.kind.build(ready.stack, window)) for window in windows]
    return student_of(ready.stack, pairs, healing, seed=ready.config.seed, task=ready.task)


def _generate(ready: Preparation, tokenizer: Any, clock: Callable[[], float]) -> float:
    """Estimate the seconds for generating with both models and timing them, from the original's generation."""
    evaluation, began = ready.config.evaluation, clock()
    if tokenizer is None or not ready.task.is_causal_lm or not (evaluation.speed or evaluation.generation):
        return 0.0
    GenerationComparison(ready.stack.model, tokenizer, ready.test)
    generated = clock()
    if evaluation.generation:
        CollapseCheck(ready.stack.model, tokenizer, ready.test)
    return 4 * (generated - began) + 2 * (clock() - generated)


def _faster_precision(model: nn.Module, clock: Callable[[], float]) -> Precision | None:
    """Return bfloat16 if its matrix products are clearly faster than those of the weights' precision."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    durations = []
    for dtype in (weight.dtype, torch.bfloat16):
        a, b = (torch.ones(rows, 1024, dtype=dtype, device=weight.device) for rows in (512, 1024))
        durations.append(_seconds(partial(torch.matmul, a, b.T), model, clock))
    return "bfloat16" if weight.dtype != torch.bfloat16 and 1.5 * durations[1] < durations[0] else None

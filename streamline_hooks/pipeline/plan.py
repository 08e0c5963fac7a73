"""Estimate what a compression takes on this machine, and find how much text fits a time budget.

A few batches of each stage are run and timed, and the times extrapolated linearly in tokens and windows.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, device_of, tokens_of
from streamline_hooks.blockwise.passing import BlockwisePass
from streamline_hooks.blockwise.residence import stored_bytes
from streamline_hooks.calibration import split_documents
from streamline_hooks.collapse_watch import CollapseWatch
from streamline_hooks.core.hardware_config import HardwareConfig, Precision
from streamline_hooks.distributed import DistributedStep, distributed_step, here
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.evaluation import distances_of_candidates, perplexity
from streamline_hooks.evaluation.speed import wait_for
from streamline_hooks.passes import without_progress
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.pipeline.flops import Rates, StageWork, block_work, compression_bytes
from streamline_hooks.preparation import Preparation, document_sizes, prepare_compression
from streamline_hooks.repair import DistillationConfig, Student, TrainingCallback, fit_windows, solve, student_of, train
from streamline_hooks.repair.fitting import holds_map
from streamline_hooks.repair.stand_in import features_of
from streamline_hooks.result import most_attempts
from streamline_hooks.selection import CRITERIA, Attempt, Selection, Target, blocks_to_remove
from streamline_hooks.selection.search.judge import Judge
from streamline_hooks.selection.search.problem import RANKED
from streamline_hooks.side_by_side import SideBySide
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.statistics import measure_moments, profile
from streamline_hooks.task import Task
from streamline_hooks.trained_selection import require_parameters, trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROFILED = 2_048  # tokens that likely windows are found on
_TIMED = 512  # tokens of a timed batch on a CPU; an accelerator runs whole batches
_RUNS, _ENOUGH = 3, 5.0  # timed runs of a stage, of which no further one starts after so many seconds
_STEPS = 3  # optimizer steps, the first of which does not count
_WRITTEN = 2**26  # bytes
_LEAST, _EPOCHS = 20_480, 4  # tokens of the smallest training that is planned, and epochs at most
_FITTING, _VALIDATION, _TEST = (5, 8_192, 40_960), (10, 2_048, 4_096), (5, 4_096, 12_288)  # 1 / share, least, most
_LATE = 0.1  # fraction of the budget by which a compression may be late before the training is ended


class Sizes(NamedTuple):
    """Numbers of tokens that the stages run on, and of epochs and validations of the training."""

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
        lines = [f"{'stage':<10} {'tokens':>12} {'time':>10} {'memory':>10}  above the model"]
        for name, seconds, tokens, size in (*self.stages, total):
            count = f"{tokens:,}" if tokens else ""
            lines.append(f"{name:<10} {count:>12} {duration(seconds):>10} {_size(size):>10}")
        return "\n".join(lines)


class TrainingCost(NamedTuple):
    """Seconds per token of the teacher and the setup, of a step, and of a validation; and the autocast data type."""

    once: float
    step: float
    validation: float
    autocast: Precision | None = None

    def seconds(self, sizes: Sizes) -> float:
        """Return the seconds of a training run."""
        once = self.once * (sizes.training + sizes.validation)
        return (
            once
            + self.step * sizes.training * sizes.epochs
            + self.validation * sizes.validation * (1 + sizes.validations)
        )


@dataclass(frozen=True)
class StageRates:
    """Measured costs: `prepare`, `search`, `solve` and `generate` in seconds, `write` in bytes/s, others per token.

    `peaks` are bytes above the model by stage.
    """

    prepare: float
    rank: float
    search: float
    fit: float
    solve: float
    verify: float
    training: TrainingCost | None
    evaluate: float
    generate: float
    write: float
    model_bytes: int
    peaks: dict[str, int]

    def estimate(self, sizes: Sizes, rounds: int = 1) -> CostEstimate:
        """Extrapolate to numbers of tokens; every round verifies and evaluates on the same text."""
        verified, tested = rounds * sizes.validation, rounds * sizes.test
        costs = {
            "prepare": (self.prepare, 0),
            "rank": (self.rank * sizes.fitting + self.search, sizes.fitting),
            "fit": (self.fit * sizes.fitting + self.solve, sizes.fitting),
            "verify": (self.verify * verified, verified),
        }
        if self.training is not None:
            seconds = self.training.seconds(sizes._replace(validation=verified))
            costs["train"] = (seconds, round(sizes.training * sizes.epochs))
        costs["evaluate"] = (self.evaluate * tested, tested)
        costs |= {"generate": (self.generate, 0), "save": (self.model_bytes / self.write, 0)}
        copy = self.model_bytes if rounds > 1 else 0  # the original, which stays the teacher
        return CostEstimate(tuple(StageCost(name, *one, self.peaks.get(name, 0) + copy) for name, one in costs.items()))


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
            line += (
                f"\ntext       ends after {duration(self.estimate.seconds)}; give more text to use all of the budget"
            )
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

    A few batches of each stage are run. The model, random number generators and files are left as they were.

    Parameters
    ----------
    model, tokenizer, texts, config, test_texts, output
        As in `compress`.
    profiled : bool
        Whether `compress` will be given a profile, so that no pass ranks the windows.
    say : callable
        Receives lines that describe the compression.
    clock : callable
        Returns seconds.

    Returns
    -------
    CostEstimate
        Times of one process; a distributed run shares the passes.

    Raises
    ------
    StreamlineError
        If the model is not a causal language model, or as `compress` for invalid arguments.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> parts = {name: [torch.randint(3, 60, (2, 8))] * 4 for name in ("calibration", "validation", "test")}
    >>> estimate = estimate_cost(tiny_model("llama"), None, parts, CompressionConfig(remove=2))
    >>> [stage.name for stage in estimate.stages]
    ['prepare', 'rank', 'fit', 'verify', 'evaluate', 'generate', 'save']
    """
    config = config or CompressionConfig()
    options: dict[str, Any] = {"task": config.task or Task.of(model), "test_texts": test_texts}
    if not options["task"].is_of_text:
        raise StreamlineError(
            f"estimate_cost: {type(model).__name__} is for {options['task']}. Expected a causal language model. Run "
            "compress without an estimate."
        )

    def estimate() -> CostEstimate:
        began, training = clock(), config.distillation
        ready = prepare_compression(model, tokenizer, texts, config, say=say, **options)
        ready.require_writable()
        for line in ready.announcement():
            say(line)
        prepared = clock() - began
        if config.rounds > 1:
            count = math.ceil(blocks_to_remove(config.target, len(ready.stack)) / config.rounds)
            first = replace(config, remove=Target(blocks=count))
            ready = prepare_compression(model, tokenizer, texts, first, **options)
        rates = measure_stages(ready, tokenizer, [config.hardware.autocast], output, clock)
        rates = replace(rates, prepare=prepared, rank=0.0 if profiled else rates.rank)
        parts = ([*ready.fit, *ready.held_out], ready.validation, ready.test)
        passes = (training.epochs, training.validations) if training else (1, 1)
        return rates.estimate(Sizes(_total(ready.training), *map(_total, parts), *passes), config.rounds)

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

    A few batches of each stage are run. The model, random number generators and files are left as they were. In a
    distributed run rank 0 plans, and all ranks return its plan.

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

    Returns
    -------
    TrainingPlan
        ``compress(model, tokenizer, texts, plan.config)`` carries it out.

    Raises
    ------
    StreamlineError
        If the budget or the text does not suffice, or the config cannot be planned for.
    """
    chosen = config or CompressionConfig.preset("best", hardware=HardwareConfig(batch_size=1))
    check_plannable(chosen)
    if chosen.healing is not None and chosen.healing.where == "after":
        chosen = replace(chosen, search=replace(chosen.search, keep=tuple(dict.fromkeys((*chosen.search.keep, -1)))))

    def plan() -> TrainingPlan:
        began, parts = clock(), Parts(chosen.data.sequence_length, validation_tokens, test_tokens)
        sequences = max(4, -(-_PROFILED // parts.length), (_STEPS + 1) * chosen.hardware.batch_size)
        few = _planned(chosen, parts.sizes(sequences))
        few = replace(few, data=replace(few.data, fitting_tokens=None))
        options: dict[str, Any] = {"task": Task("causal-lm"), "test_texts": test_texts, "say": say}
        ready = prepare_compression(model, tokenizer, texts, few, **options)
        prepared = clock() - began
        rates = measure_stages(ready, tokenizer, _precisions(model, clock), output, clock)
        rates, available = replace(rates, prepare=prepared), None
        while True:
            sizes, estimate = fit_to_budget(seconds, rates, parts, clock() - began, available)
            wanted = _planned(chosen, sizes)
            split = split_documents(texts, tokenizer, test_documents=test_texts, **document_sizes(wanted))
            found = (split.calibration.numel(), split.validation.numel(), split.test.numel())
            if found == (sizes.training, sizes.validation, sizes.test):
                break
            parts, available = parts.shrunk(sizes, found, apart=test_texts is not None)
        assert rates.training is not None
        late = {stage.name: stage.seconds for stage in estimate.stages}
        behind = rates.training.validation * sizes.validation + late["generate"] + late["save"]
        behind += late["evaluate"] / (2 + most_attempts(trained=True))  # of the result
        hardware = replace(chosen.hardware, autocast=rates.training.autocast)
        until = (1 + _LATE) * seconds - late["plan"] - behind
        return TrainingPlan(replace(wanted, hardware=hardware, train_until=until), estimate, seconds)

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
    """Rules by which text is divided: tokens per sequence, and fixed numbers of validation and test tokens."""

    length: int
    validation: int | None = None
    test: int | None = None

    def sizes(self, sequences: int, epochs: float = 1) -> Sizes:
        """Return the parts for a number of sequences to train on."""
        tokens = sequences * self.length

        def part(rule: tuple[int, int, int], fixed: int | None = None) -> int:
            wanted = min(max(tokens // rule[0], rule[1]), rule[2]) if fixed is None else fixed
            return max(1, wanted // self.length) * self.length

        validation = part(_VALIDATION, self.validation)
        validations = min(max(int(tokens * epochs / (4 * validation)), 2), 8)
        fitting = min(tokens, max(2 * self.length, part(_FITTING)))
        return Sizes(tokens, fitting, validation, part(_TEST, self.test), epochs, validations)

    def shrunk(self, sizes: Sizes, found: tuple[int, int, int], *, apart: bool) -> tuple[Parts, int]:
        """Return the rules for less text than asked for, and the tokens left to train on.

        Validation and test get at most a tenth and a fifth. If the test has text of its own (`apart`), it gets that.
        """
        total = sum(found[:2]) if apart else sum(found)
        test = found[2] if apart else max(self.length, min(sizes.test, total // 5))
        parts = Parts(self.length, max(self.length, min(sizes.validation, total // 10)), test)
        dealt = parts.sizes(1)
        return parts, total - dealt.validation - (0 if apart else dealt.test)


def fit_to_budget(
    seconds: float, rates: StageRates, parts: Parts, planning: float = 0.0, available: int | None = None
) -> tuple[Sizes, CostEstimate]:
    """Find the most text that can be trained on in a given time; if all of it is used, up to four epochs.

    Raises
    ------
    StreamlineError
        If the smallest training that is planned takes longer.
    """

    def estimate(sizes: Sizes) -> CostEstimate:
        return CostEstimate((StageCost("plan", planning), *rates.estimate(sizes).stages))

    def most(low: int, high: int, sizes: Callable[[int], Sizes]) -> Sizes:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if estimate(sizes(middle)).seconds <= seconds else (low, middle)
        return sizes(low)

    there = 2**40 if available is None else max(1, available // parts.length)
    least = min(math.ceil(_LEAST / parts.length), there)
    if (needed := estimate(parts.sizes(least)).seconds) > seconds:
        raise StreamlineError(
            f"A budget of {duration(seconds)} does not suffice on this machine: training on {least * parts.length:,} "
            f"tokens takes {duration(needed)} with all other stages. Give {math.ceil(needed / 60)}m or more, a smaller "
            "shortlist, or a faster machine."
        )
    if estimate(parts.sizes(there)).seconds > seconds:
        sizes = most(least, there, parts.sizes)
    else:
        sizes = most(20, 20 * _EPOCHS + 1, lambda twentieths: parts.sizes(there, twentieths / 20))
    return sizes, estimate(sizes)


def measure_stages(
    ready: Preparation,
    tokenizer: Any,
    precisions: Sequence[Precision | None],
    output: str | Path | None,
    clock: Callable[[], float],
) -> StageRates:
    """Run and time a few tokens of each stage, the training in each of some autocast data types; the fastest counts."""
    write = math.inf if output is None else write_rate(output, clock)
    model: Any = ready.stack.model
    path, kind, config, device = ready.stack.path, ready.kind, ready.config, device_of(model)
    batch = _timed_batch(ready.calibration[0], device)
    tokens = tokens_of(batch)

    def timed(action: Callable[..., Any], *given: Any, **options: Any) -> float:
        return _seconds(lambda: action(model, *given, stack=path, **options), model, clock)

    with torch.random.fork_rng([device] if device.type == "cuda" else []), without_progress():
        rank = timed(profile, [batch], keep=ready.protected) / tokens
        selections = _likely_selections(ready)
        attempts = _attempts(ready, selections)
        # One pass fits the first windows of all selections, and another one each further window.
        windows, first = [one.windows[0] for one in selections], attempts[0].selection.windows[:1]
        further = sum(len(one.windows) - 1 for one in selections)
        fit, alone = (timed(measure_moments, [batch], which) / tokens for which in (windows, first))
        if kind.fit is None and kind.is_solved and holds_map(attempts[0].stand_ins[0]):
            (sums,) = measure_moments(model, [batch], first, stack=path)
            solving = _seconds(lambda: solve(sums, sums), model, clock)
        else:  # the replacement is run, and its last projection solved for
            small, large = (timed(fit_windows, first, kind, [batch] * n, [batch]) for n in (1, 3))
            per_token = max(alone, (large - small) / (2 * tokens))
            solving = max(0.0, small - 2 * tokens * per_token)
            fit, alone = fit + len(windows) * (per_token - alone), per_token
        # The original is run once, and each candidate from its window on.
        original = _seconds(lambda: perplexity(model, [batch], "estimate"), model, clock) / tokens
        verified = _seconds(lambda: _verify(ready, batch, attempts), model, clock) / tokens
        candidate = max(0.0, verified - original) / len(attempts)
        scored = most_attempts(config.distillation is not None) * candidate
        rest = 1 - sum(map(len, selections[0].windows)) / len(ready.stack)
        searched = len(ready.candidates) if config.search.number_of_windows == 1 else len(ready.stack)
        searched *= config.search.resolved_criterion.runs_per_window
        trials = [_train_first(ready, selections, precision, clock) for precision in precisions]
        training, trained = min(trials, key=lambda trial: trial[0].step if trial[0] else 0.0)
        generate = _generate(ready, tokenizer, clock)
    return StageRates(
        prepare=0.0,
        rank=rank,
        search=searched * candidate * min(RANKED, _total(ready.calibration)),
        fit=fit + further * alone,
        solve=(len(windows) + further) * solving,
        verify=original + len(selections) * candidate,
        training=training,
        evaluate=original + scored + rest * original,
        generate=generate,
        write=write,
        model_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        peaks=compression_bytes(
            ready.stack,
            batch=max(map(tokens_of, (*ready.calibration, *ready.test))),
            text=_total(ready.training) + _total(ready.validation),
            windows=len(windows),
            trained=trained,
            state_memory=config.hardware.state_memory,
        ),
    )


def measure_training(
    student: Student,
    batches: Sequence[Batch | Tensor],
    validation: Batch | Tensor,
    config: DistillationConfig,
    *,
    hardware: HardwareConfig | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> TrainingCost:
    """Time a few steps of a training run on the first batches, after a run of one step that does not count.

    The student is used up; its model is left as it was.
    """
    hardware, each = hardware or HardwareConfig(), config.gradient_accumulation_steps
    for count in (1, _STEPS):
        used = list(batches[: count * each])
        epochs = max(1, count / math.ceil(len(used) / each))
        short = replace(config, epochs=epochs, validations=1, max_minutes=None, patience=0)
        events = _Events(student.model, clock)
        began = events.now()
        if train(student, used, [validation], short, hardware=hardware, callbacks=[events]).interrupted:
            raise KeyboardInterrupt
    steps = [(end - start) / sum(tokens_of(used[k]) for k in numbers) for start, end, numbers in events.steps]
    (first, _), (start, end) = events.validations[0], events.validations[-1]
    tokens = tokens_of(validation)
    return TrainingCost(
        (first - began) / (_total(used) + tokens),
        statistics.median(steps[1:] or steps),
        (end - start) / tokens,
        hardware.autocast,
    )


class _Events(TrainingCallback):
    """Record when the steps and validations of a training run begin and end."""

    def __init__(self, model: nn.Module, clock: Callable[[], float]) -> None:
        self.model, self.clock = model, clock
        self.steps: list[tuple[float, float, tuple[int, ...]]] = []
        self.validations: list[tuple[float, float]] = []

    def now(self) -> float:
        wait_for(self.model)
        return self.clock()

    def on_step_begin(self, progress: Any) -> None:
        self.began = self.now()

    def on_step_end(self, progress: Any) -> None:
        self.steps.append((self.began, self.now(), progress.batches))

    def on_validation_begin(self, progress: Any) -> None:
        self.began = self.now()

    def on_validation_end(self, progress: Any) -> None:
        self.validations.append((self.began, self.now()))


def measure_rates(stack: BlockStack, config: CompressionConfig, folder: Path) -> Rates:
    """Measure this machine with the first block of a model from `open_checkpoint`; `folder` is where states go."""
    length, width = config.data.sequence_length, features_of(stack)
    batch = {"input_ids": torch.zeros(config.hardware.batch_size, length, dtype=torch.long)}

    def run(batches: int) -> float:
        with BlockwisePass(
            stack.model, [batch] * batches, stop=1, check=False, stack=stack.path, what="rates"
        ) as states:
            boundaries = iter(states)
            next(boundaries)
            began = time.perf_counter()
            next(boundaries)
            return time.perf_counter() - began

    def seconds(action: Callable[[], Any]) -> float:
        return _seconds(action, stack.model, time.perf_counter)

    first, one, four = run(1), run(1), run(4)  # what computing does not explain of the first time is reading
    computing = max(1e-9, (four - one) / 3)
    states = torch.randn(tokens_of(batch), width, dtype=torch.float64)
    square = torch.randn(min(width, 1024), min(width, 1024), dtype=torch.float64)
    return Rates(
        block_work(stack)[0].flops(length) * tokens_of(batch) / computing,
        2 * tokens_of(batch) * width**2 / seconds(lambda: states.T @ states),
        10 * len(square) ** 3 / seconds(lambda: torch.linalg.eigh(square @ square.T)),
        stored_bytes(stack.blocks[0]) / max(1e-9, first - computing),
        write_rate(folder),
    )


def blockwise_table(stages: Sequence[StageWork], rates: Rates) -> str:
    """Return a table of a compression block by block for a terminal."""
    lines = [f"{'stage':<8} {'reads':>10} {'writes':>10} {'states':>10} {'FLOPs':>8} {'time':>9}"]
    for one in stages:
        sizes = " ".join(f"{_size(size):>10}" for size in (one.read, one.written, one.states))
        flops = one.products + one.float64 + one.eigen
        lines.append(f"{one.name:<8} {sizes} {flops:8.1e} {duration(one.seconds(rates)):>9}")
    return "\n".join([*lines, f"{'total':<50} {duration(sum(one.seconds(rates) for one in stages)):>9}"])


def checkpoint_bytes(folder: str | Path) -> int:
    """Return the bytes of a folder's safetensors files; 0 if there are none."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def fits_in_memory(folder: str | Path, memory: int) -> bool:
    """Whether the model of a folder can be run in so many bytes, with a quarter of its size for everything else."""
    return 1.25 * checkpoint_bytes(folder) <= memory


def state_budget(resident: int, memory: int) -> int:
    """Return the bytes left for hidden states in a process that may take `memory` and needs `resident` more.

    Raises
    ------
    StreamlineError
        If less than 32 MB are left.
    """
    import psutil

    taken = psutil.Process().memory_info().rss + resident
    if taken + 2**25 > memory:
        raise StreamlineError(
            f"--memory {memory / 1e9:.2f}GB does not suffice: the largest block, everything outside the blocks, a "
            f"least-squares solution and Python take {taken / 1e9:.2f} GB. Allow {(taken + 2**25) / 1e9:.2f}GB or more."
        )
    return memory - taken


def write_rate(folder: str | Path, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the bytes/s that are written and synced to a folder, or to the nearest one above it that exists.

    Raises
    ------
    StreamlineError
        If nothing can be written there.
    """
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.is_dir())
    content, began = os.urandom(2**20), clock()
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            file.writelines([content] * (_WRITTEN // len(content)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StreamlineError(
            f"{there} cannot be written to: {error.strerror}. Expected {_WRITTEN:,} bytes free. Choose another folder."
        ) from error
    return _WRITTEN / max(1e-9, clock() - began)


def duration(seconds: float) -> str:
    """Return a time for a terminal.

    Examples
    --------
    >>> duration(4.2), duration(42.0), duration(630.0), duration(9000.0)
    ('4.2 s', '42 s', '10.5 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _seconds(action: Callable[[], Any], model: nn.Module, clock: Callable[[], float]) -> float:
    """Return the median of a few runs, after one that does not count; of long ones a single run."""
    taken: list[float] = []
    while len(taken) <= _RUNS and sum(taken[1:]) < _ENOUGH:
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
    found = search.find(ready.problem(profile=measured, criterion=criterion, branches=False))
    return found if ready.config.distillation is None else trainable(found, ready, ready.config.healing)


def _attempts(ready: Preparation, selections: Sequence[Selection]) -> list[Attempt]:
    """Return up to two selections that are average in the blocks after them, with unfitted replacements."""
    found: list[Attempt] = []
    refusals: list[UnsupportedSurgery] = []
    for selection in sorted(selections, key=lambda one: one.windows[0].start):
        try:
            built = [ready.kind.build(ready.stack, window) for window in selection.windows]
        except UnsupportedSurgery as error:
            refusals.append(error)
        else:
            found.append(Attempt(selection, tuple(one if isinstance(one, nn.Module) else None for one in built)))
    if not found:
        raise refusals[0]
    return found[len(found) // 4 :: max(1, len(found) // 2)][:2]


def _verify(ready: Preparation, batch: Any, attempts: Sequence[Attempt]) -> None:
    """Compare selections with the original, each as `verified` runs it."""
    alone = [one for attempt in attempts if (one := attempt.candidate(ready.stack)) is not None]
    if alone:
        distances_of_candidates(ready.stack.model, [batch], alone, stack=ready.stack.path, task=ready.task)
    if whole := [attempt for attempt in attempts if attempt.candidate(ready.stack) is None]:
        Judge(ready.stack, [batch], task=ready.task).distances(whole, "estimate")


def _train_first(
    ready: Preparation, selections: Sequence[Selection], autocast: Precision | None, clock: Callable[[], float]
) -> tuple[TrainingCost | None, int]:
    """Return the cost of training the first selection, and the number of trainable parameters."""
    config, healing, windows = ready.config, ready.config.healing, selections[0].windows
    if config.distillation is None:
        return None, 0
    require_parameters(ready, healing)
    if healing is not None and not (healing.head or healing.blocks(len(ready.stack), windows)):
        healing = None
    pairs = [(window, ready.kind.build(ready.stack, window)) for window in windows]
    student = student_of(ready.stack, pairs, healing, seed=config.seed, task=ready.task)
    options: dict[str, Any] = {"hardware": replace(config.hardware, autocast=autocast), "clock": clock}
    cost = measure_training(student, ready.training, ready.validation[0], config.distillation, **options)
    return cost, sum(p.numel() for p in student.parameters().values())


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


def _precisions(model: nn.Module, clock: Callable[[], float]) -> list[Precision | None]:
    """Return the autocast data types to time: bfloat16 too, unless its products are slower, as where it is emulated."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    taken = []
    for dtype in (weight.dtype, torch.bfloat16):
        a, b = (torch.ones(rows, 1024, dtype=dtype, device=weight.device) for rows in (512, 1024))
        taken.append(_seconds(lambda a=a, b=b: a @ b.T, model, clock))  # type: ignore[misc]
    return [None] if weight.dtype == torch.bfloat16 or taken[1] > taken[0] else ["bfloat16", None]


def _planned(config: CompressionConfig, sizes: Sizes) -> CompressionConfig:
    """Return a config with planned numbers of tokens, epochs and validations."""
    assert config.distillation is not None
    tokens = {f"{name}_tokens": getattr(sizes, name) for name in ("fitting", "validation", "test")}
    training = replace(config.distillation, epochs=sizes.epochs, validations=sizes.validations)
    return replace(
        config, data=replace(config.data, calibration_tokens=sizes.training, **tokens), distillation=training
    )

"""The steps of a training run, and the rows of each batch that a rank runs.

Every rank has all trained weights and runs its rows of every batch; gradients are summed once per step.
`DistributedDataParallel` and Accelerate's loop cannot be used: a step runs only parts of the model, and the number of
forward passes differs between ranks. Without a call of the wrapper's `forward`, gradients are not synchronized.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import InitVar, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    AllInterrupted,
    Batch,
    DistributedStep,
    HardwareConfig,
    InterruptFlag,
    Processes,
    StreamlineError,
    batch_rows,
    batches_digest,
    count_tokens,
    defer_interrupts,
    describe_blocks,
    device_of,
    gather_unless_interrupted,
    get_logger,
    is_text_batch,
    progress_bar,
    retry_with_fewer_rows,
    select_rows,
    shard_rows,
)
from streamline_hooks.distillation.batch_losses import BatchLosses
from streamline_hooks.distillation.config import DistillationConfig
from streamline_hooks.distillation.optimizer import TrainingOptimizer, TrainingSchedule
from streamline_hooks.distillation.progress import TrainingCallback, TrainingProgress, TrainingResult
from streamline_hooks.distillation.student import Student
from streamline_hooks.distillation.teacher_cache import TeacherStates
from streamline_hooks.distillation.training_file import (
    describe_run,
    random_state,
    read_training_file,
    set_random_state,
    training_fingerprint,
    write_training_file,
)
from streamline_hooks.modeling import seed_device
from streamline_hooks.surgery import rows_within_memory

logger = get_logger(__name__)

_T = TypeVar("_T")
_Losses = list[tuple[float, int]]  # loss summed over tokens, number of tokens


@dataclass(frozen=True)
class RankShare:
    """Rows of the batches that one rank runs, by batch index.

    `idle` are batches of which the rank runs one sequence without counting it, because another rank counts it.
    """

    batches: dict[int, Any]
    rows: dict[int, slice]
    idle: frozenset[int] = frozenset()

    @classmethod
    def of(cls, batches: Sequence[Batch | Tensor], processes: Processes, every: bool = False) -> RankShare:
        """Return the rows of this rank (`shard_rows`); with `every`, at least one row of each batch."""
        if processes.count == 1:
            return cls(dict(enumerate(batches)), {number: slice(None) for number in range(len(batches))})
        rows = dict(enumerate(shard_rows(batches, processes)))
        idle = [number for number, row_slice in rows.items() if row_slice.start == row_slice.stop]
        for number in idle:
            if every:
                rows[number] = slice(0, 1)
            else:
                del rows[number]
        return cls(
            {number: select_rows(batches[number], row_slice) for number, row_slice in rows.items()},
            rows,
            frozenset(idle if every else ()),
        )

    @property
    def longest(self) -> int:
        """Largest number of sequences in a batch."""
        return max((batch_rows(batch) for batch in self.batches.values()), default=0)


def sum_gradients(
    work: DistributedStep, parameters: Mapping[str, nn.Parameter], has_gradients: Sequence[Sequence[bool]]
) -> None:
    """Sum gradients over ranks, bit-identically on all; `has_gradients` contains a flag per rank and parameter."""
    if work.processes.count == 1:
        return
    with_gradient = [p for p, *rank_flags in zip(parameters.values(), *has_gradients, strict=True) if any(rank_flags)]
    groups = dict.fromkeys((p.dtype, p.device) for p in with_gradient)
    for group in groups:
        group_parameters = [p for p in with_gradient if (p.dtype, p.device) == group]
        flat_gradients = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in group_parameters]
        )
        flat_sum = work.all_reduce(flat_gradients)
        for parameter, gradient in zip(
            group_parameters, flat_sum.split([p.numel() for p in group_parameters]), strict=True
        ):
            parameter.grad = gradient.view_as(parameter)


@dataclass(eq=False)
class TrainingLoop:
    """A training run: its steps, validations and checkpoint file.

    `batches` and `validation` are complete on every rank; the cached states and the shares are those of this rank.
    With `sharded`, all ranks run the same number of forward passes. `spent` is the preparation time in seconds, which
    counts towards `max_minutes`.
    """

    student: Student
    batches: Sequence[Batch | Tensor]
    validation: Sequence[Batch | Tensor]
    teacher_rows: InitVar[list[TeacherStates]]
    validation_rows: InitVar[list[TeacherStates]]
    config: DistillationConfig
    hardware: HardwareConfig
    checkpoint: Path | None
    callbacks: Sequence[TrainingCallback]
    share: RankShare
    validation_share: RankShare
    work: DistributedStep
    sharded: bool
    spent: float

    def __post_init__(self, teacher_rows: list[TeacherStates], validation_rows: list[TeacherStates]) -> None:
        self.config, self.task = self.config.seeded(0), self.student.task
        self.teacher_states = dict(zip(self.share.batches, teacher_rows, strict=True))
        self.validation_states = dict(zip(self.validation_share.batches, validation_rows, strict=True))
        self.interrupts = InterruptFlag()
        self.parameters = self.student.parameters()
        data = self.batches, self.validation
        self.description = describe_run(self.config, self.hardware, self.student, *data)
        self.fingerprint = training_fingerprint(self.config, self.hardware, self.student, self.parameters, *data)
        if any(other != self.fingerprint for other in self.work.all_gather_object(self.fingerprint)):
            raise StreamlineError(
                f"The {self.work.processes.count} ranks were started with different data, windows, settings or models. "
                "Expected the same on every rank. Pass all batches to every rank; each takes its share."
            )
        self.work.broadcast_(self.parameters.values())
        self.device = device_of(self.student.model)
        self.schedule = TrainingSchedule(self.config, len(self.batches))
        self.steps = self.schedule.steps
        factor = partial(self.student.learning_rate_factor, scale_parameter=self.config.scale_parameter)
        self.optimizer = TrainingOptimizer(self.parameters, self.config, self.steps, factor)
        self.weights = self.optimizer.weights
        self.step, self.tokens, self.seconds, self.start_time = 0, 0, 0.0, time.perf_counter()
        self.is_consistent = True  # False while the weights are partly updated and must not be saved
        self.history: list[dict[str, Any]] = []
        self.losses: _Losses = []
        self.best = self._copy_values()
        # Count the real tokens of each batch on the ranks that run it.
        rank_counts = {
            number: states.tokens for number, states in self.teacher_states.items() if number not in self.share.idle
        }
        counts = self.work.all_gather_object(rank_counts)
        self.tokens_of_states = {n: sum(tokens.get(n, 0) for tokens in counts) for n in range(len(self.batches))}
        self.longest = max(self.work.all_gather_object(max(self.share.longest, self.validation_share.longest)))
        all_batches = (*self.batches, *self.validation)
        self.batch_losses = BatchLosses.of(
            self.student, self.config.objective, self.hardware, all_batches, self.sharded
        )
        split_batches = () if self.batch_losses.by_token else all_batches
        rows = [(batch_rows(batch), rows_within_memory(self.student.model, batch)) for batch in split_batches]
        # Sequences per forward, fewer if the logits of a batch are large; reduced further if memory is insufficient.
        self.rows = min([self.longest, *(few for count, few in rows if few < count)])

    def run(self, resume: bool) -> TrainingResult:
        """Run the remaining steps, from the start or from the checkpoint file, and keep the global random state."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            seed_device(self.device, cast(int, self.config.seed))
            if resume:
                self._load()
            return self._run()

    def _run(self) -> TrainingResult:
        stopped, is_saved = "", False
        self.start_time, last_save = time.perf_counter() - self.seconds, time.perf_counter()
        total = round(sum(count_tokens(batch) for batch in self.batches) * self.config.epochs)
        with defer_interrupts() as self.interrupts, progress_bar(total, self._bar_text(), done=self.tokens) as bar:
            try:
                while True:
                    if self.schedule.is_due(self.step, self.history):
                        self._validate(bar)
                    if self.step == self.steps or (stopped := self.schedule.out_of_patience(self.history)):
                        break
                    if self._out_of_time():
                        stopped = (
                            f"the limit of {self.config.max_minutes:.4g} minutes was reached after step {self.step}"
                        )
                        stopped = stopped if self.step else "no time was left"
                        if self.history[-1]["step"] < self.step:
                            self._save_or_warn()  # a resumed run does not have this additional validation
                            is_saved = True
                            self._validate(bar)
                        break
                    loss, tokens = self.make_step()
                    if not math.isfinite(loss):
                        stopped = f"the loss of step {self.step + 1} is {loss}"
                        break
                    self.seconds = time.perf_counter() - self.start_time
                    bar.update(tokens)
                    bar.set_postfix_str(self._bar_state())
                    if time.perf_counter() - last_save >= 60 * self.config.checkpoint_minutes:
                        self._save_or_warn()
                        last_save = time.perf_counter()
            except AllInterrupted:
                stopped = f"interrupted after step {self.step}"
            except KeyboardInterrupt:
                if self.work.processes.count > 1:
                    raise  # the other ranks were not interrupted
                stopped = f"interrupted after step {self.step}"
        if self.is_consistent and not is_saved and not stopped.startswith("the loss"):
            self._save_or_warn()
        ends = self.work.all_gather_object((self.interrupts.requested, self.seconds))
        self.seconds = ends[0][1]
        if not stopped and any(interrupted for interrupted, _ in ends):
            stopped = f"interrupted after step {self.step}"
        unmeasured: dict[str, Any] = {"distance": math.nan, "step": 0}  # interrupted before the first validation
        best = min(self.history, key=lambda row: row["validated"], default=unmeasured)
        self._restore_values(self.best)
        if stopped:
            logger.info(f"Training ended early: {stopped}. The best weights are kept, of step {best['step']}.")
        return TrainingResult(
            steps=self.step,
            tokens=self.tokens,
            distance_before=next(iter(self.history), unmeasured)["distance"],
            distance=best["distance"],
            best_step=best["step"],
            history=self.history,
            seconds=self.seconds,
            stopped=stopped,
            measure=self.task.distance,
            unit="token" if any(map(is_text_batch, self.batches)) else self.task.unit,
        )

    def _progress(self) -> TrainingProgress:
        batches = tuple(self.schedule.batches_of(self.step)) if self.step < self.steps else ()
        return TrainingProgress(self.step, self.steps, self.tokens, batches, None, self.history)

    def make_step(self) -> tuple[float, int]:
        """Run one optimizer step and its callbacks; return the mean loss per token and the number of tokens."""
        before = self._progress()
        for callback in self.callbacks:
            callback.on_step_begin(before)
        loss, tokens = self._step()
        for callback in self.callbacks:
            callback.on_step_end(replace(before, step=self.step, tokens=self.tokens, loss=loss))
        return loss, tokens

    def _step(self) -> tuple[float, int]:
        numbers = self.schedule.batches_of(self.step)
        token_count = sum(count_tokens(self.batches[number]) for number in numbers)
        random = random_state(self.device)
        buffers = {name: buffer.clone() for name, buffer in self.student.buffers().items()}
        try:
            answers = sum(self.task.count(self.batches[number]) for number in numbers)
            tokens = sum(self.tokens_of_states[number] for number in numbers)

            def compute_gradients() -> tuple[float, list[bool]]:
                self.weights.clear()  # also after an interrupted step of an earlier run
                set_random_state(random, self.device)
                self._restore_values(buffers)
                if self.work.processes.count > 1:  # by step and rank, so a resumed run is the same
                    seed_device(self.device, self.schedule.seed_of(self.step, self.work.processes.rank))
                loss = sum(
                    self._backward(number, answers, tokens) for number in numbers if number in self.teacher_states
                )
                return loss, [master.grad is not None for master in self.weights.masters.values()]

            rank_results = self._with_enough_memory(compute_gradients)
        except (KeyboardInterrupt, AllInterrupted):
            set_random_state(random, self.device)  # a resumed run repeats this step
            self._restore_values(buffers)
            raise
        loss = math.fsum(value for value, _ in rank_results)
        if math.isfinite(loss):
            has_gradient = [flags for _, flags in rank_results]
            self._require_gradients(has_gradient)
            self.is_consistent = False
            sum_gradients(self.work, self.weights.masters, has_gradient)
            self.optimizer.step()
            self.step += 1
            self.tokens += token_count
            self.losses.append((loss * token_count, token_count))
            self.is_consistent = True
        self.weights.clear()
        return loss, token_count

    def _with_enough_memory(self, compute: Callable[[], _T]) -> list[_T]:
        """Call `compute` on every rank, with fewer sequences at a time until memory suffices; return all results."""

        def run(rows: int) -> _T:
            if rows < min(self.rows, self.longest):
                self.rows = rows
                self.weights.clear()
            return compute()

        gather = partial(gather_unless_interrupted, self.work, self.interrupts)
        return retry_with_fewer_rows(run, min(self.rows, self.longest), splits=not self.sharded, gather=gather)

    def _out_of_time(self) -> bool:
        """Whether the time limit is reached, by the clock of rank 0."""
        limit = self.config.max_minutes
        return limit is not None and self.work.broadcast_object(lambda: self.spent + self.seconds >= 60 * limit)

    def _validate(self, bar: Any) -> None:
        """Measure the validation loss (`Objective.validated`), and copy the weights if it is the lowest so far."""
        progress = self._progress()
        for callback in self.callbacks:
            callback.on_validation_begin(progress)
        bar.set_postfix_str("validation")
        sums = self._with_enough_memory(lambda: (*self.validation_sums(), self._digest()))
        for rank, (*_, digest) in enumerate(sums):
            if digest != sums[0][-1]:
                raise StreamlineError(
                    f"The weights of ranks 0 and {rank} differ at step {self.step}: they were changed outside "
                    "the training run on some ranks. Expected the same weights on all ranks. Start again without such "
                    "changes."
                )
        distances, others, counts, _ = zip(*sums, strict=True)
        answers = sum(counts)
        distance = math.fsum(distances) / answers
        distance = distance if math.isfinite(distance) else math.inf
        validated = self.config.objective.validated(distance, math.fsum(others) / answers)
        validated = validated if math.isfinite(validated) else math.inf
        tokens = sum(count for _, count in self.losses)
        loss = math.fsum(value for value, _ in self.losses) / tokens if tokens else None
        self.losses.clear()
        if not self.history or validated < min(row["validated"] for row in self.history):
            self.best = self._copy_values()
        self.history.append(
            {"step": self.step, "tokens": self.tokens, "distance": distance, "validated": validated, "loss": loss}
        )
        for callback in self.callbacks:
            callback.on_validation_end(progress)
        self.seconds = time.perf_counter() - self.start_time
        bar.set_postfix_str(self._bar_state())

    def _tensors(self) -> dict[str, Tensor]:
        """Return the trained parameters and the buffers by name."""
        return {**self.parameters, **self.student.buffers()}

    def _copy_values(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()}

    def _restore_values(self, values: Mapping[str, Tensor]) -> None:
        tensors = self._tensors()
        with torch.no_grad():
            for name, value in values.items():
                tensors[name].copy_(value)

    def _digest(self) -> str:
        """Return a digest of trained parameters and buffers; empty if there is one rank."""
        if self.work.processes.count == 1:
            return ""
        trained_modules = [module for modules in self.student.modules.values() for module in modules]
        buffers = [buffer for module in trained_modules for buffer in module.buffers()]
        return batches_digest([*(p.detach() for p in self.parameters.values()), *buffers])

    def _bar_text(self) -> str:
        length, start, count = len(self.student.stack), self.student.start, self.work.processes.count
        end = length if self.config.objective.needs_logits else max(w.stop for w in self.student.windows)
        shared = f", {count} ranks" if count > 1 else ""
        return f"train on {self.config.objective}: {describe_blocks(range(start, end))} of {length}{shared}"

    def _bar_state(self) -> str:
        loss = f"loss {self.losses[-1][0] / self.losses[-1][1]:.4f}, " if self.losses else ""
        measure = self.task.distance.partition(" (")[0]
        best = min(self.history, key=lambda row: row["validated"])
        return f"{loss}{measure} {self.history[-1]['distance']:.4f}, best {best['distance']:.4f}"

    def _require_gradients(self, has_gradient: Sequence[Sequence[bool]]) -> None:
        """Raise if no rank has a gradient of a trained module outside the blocks, such as the embedding."""
        if not self.student.outside:
            return
        reached = {
            name for flags in has_gradient for name, flag in zip(self.weights.masters, flags, strict=True) if flag
        }
        for path in self.student.outside:
            if not any(name.startswith(f"{path}.") for name in reached):
                raise StreamlineError(
                    f"{path} gets no gradient: the student starts at block {self.student.start}, with the states of "
                    "the original. Expected modules after it, such as the LM head. Remove it from outside, or train "
                    "it in your own loop."
                )

    def _backward(self, number: int, answers: int, tokens: int) -> float:
        total = 0.0
        for teacher_states, batch in self._split_rows(self.teacher_states[number], self.share.batches[number]):
            weight = 0.0 if number in self.share.idle else 1.0
            collect = self.weights.collect
            total += self.batch_losses.backward(teacher_states, batch, answers, tokens, weight, collect)
        return total

    def validation_sums(self) -> tuple[float, float, int]:
        """Return the sums of the distance and of `Objective.other_losses` on this rank, and its number of answers."""
        total, other_losses, answers = 0.0, 0.0, 0
        with torch.no_grad(), ExitStack() as exits:
            exits.callback(setattr, self.student, "training", True)
            self.student.training = False
            for number, batch in self.validation_share.batches.items():
                for teacher_states, rows in self._split_rows(self.validation_states[number], batch):
                    distance, others, count = self.batch_losses.validation_sums(teacher_states, rows)
                    if number not in self.validation_share.idle:
                        total, other_losses, answers = total + distance, other_losses + others, answers + count
        return total, other_losses, answers

    def _split_rows(
        self, teacher_states: TeacherStates, batch: Batch | Tensor
    ) -> Iterator[tuple[TeacherStates, Batch | Tensor]]:
        """Yield a batch in parts of at most `self.rows` sequences."""
        count = len(teacher_states.entrance)
        if count <= self.rows or self.sharded:
            yield teacher_states, batch
            return
        for start in range(0, count, self.rows):
            rows = slice(start, start + self.rows)
            yield teacher_states.rows(rows), select_rows(batch, rows)

    def _save_or_warn(self) -> None:
        """Write the checkpoint file; if that fails, log a warning and continue."""
        try:
            self._save()
        except StreamlineError as error:
            logger.warning("The checkpoint file was not written; training continues: %s", error)

    def _save(self) -> None:
        if self.checkpoint is None or self.work.processes.rank:
            return
        tensors = self.optimizer.tensors() | {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"buffer.{name}": buffer.clone() for name, buffer in self.student.buffers().items()}
        tensors |= random_state(self.device)
        values = {
            "fingerprint": self.fingerprint, "description": self.description,
            "step": self.step, "tokens": self.tokens, "seconds": self.seconds,
            "spent": self.spent, "history": self.history, "losses": self.losses, "rows": self.rows,
            "dtypes": self._dtypes(),
            **self.optimizer.json_state(),
        }  # fmt: skip
        write_training_file(self.checkpoint, tensors, values)

    def _dtypes(self) -> list[str]:
        return sorted({str(parameter.dtype).removeprefix("torch.") for parameter in self.parameters.values()})

    def _load(self) -> None:
        path = cast(Path, self.checkpoint)
        tensors, values = self.work.broadcast_object(lambda: read_training_file(path))
        if values.get("own_text"):
            raise StreamlineError(
                f"{path} belongs to a training run on generated text, which this version does not support. Expected a "
                "run on calibration data. Start again without --resume. To train on generated text with TRL, see "
                "examples/on_policy_distillation.py."
            )
        if values["fingerprint"] != self.fingerprint:
            before = values.get("description", {})  # older files have none
            changes = [
                f"{name} was {before[name]}, not {value}"
                for name, value in self.description.items()
                if before.get(name, value) != value
            ]
            reason = "; ".join(changes) or "other windows, data, settings or another model"
            raise StreamlineError(
                f"{path} belongs to another training run: {reason}. Expected the same as at its start. Pass the same "
                "arguments, or start again without --resume."
            )
        if values.get("dtypes", self._dtypes()) != self._dtypes():
            raise StreamlineError(
                f"{path} belongs to a run that trained parameters of other dtypes ({', '.join(values['dtypes'])}). "
                "Expected the same as at its start. Convert the modules, or start again without --resume."
            )
        self.optimizer.load(tensors, values)
        self.best = {name: tensors[f"best.{name}"].to(p.device) for name, p in self._tensors().items()}
        self._restore_values({name: tensors[f"buffer.{name}"] for name in self.student.buffers()})
        set_random_state(tensors, self.device)
        self.step, self.tokens, self.seconds = values["step"], values["tokens"], values["seconds"]
        self.spent = max(self.spent, values["spent"])  # a run that reached its time limit has no time left
        self.history, self.losses = values["history"], [(value, count) for value, count in values["losses"]]
        self.rows = values["rows"]

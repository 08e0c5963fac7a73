"""The steps of a training, one after the other, each of which can be gone on from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from streamline_hooks.batch import Batch, device_of, has_tokens, real_tokens, tokens_of
from streamline_hooks.core.hardware_config import HardwareConfig
from streamline_hooks.core.out_of_memory import halve_rows
from streamline_hooks.digests import batches_digest
from streamline_hooks.distance import reference_of, summed_distance
from streamline_hooks.distributed import (
    AllInterrupted,
    DistributedStep,
    Interrupts,
    agreed,
    noted_interrupts,
    some_of,
)
from streamline_hooks.errors import StreamlineError
from streamline_hooks.generation import seed_generators
from streamline_hooks.passes import progress
from streamline_hooks.predicted import UNCOUNTED, following_tokens
from streamline_hooks.repair.callbacks import TrainingCallback, TrainingProgress
from streamline_hooks.repair.distillation_config import DistillationConfig
from streamline_hooks.repair.objective import summed_divergence
from streamline_hooks.repair.optimisation import Course, Optimisation
from streamline_hooks.repair.share import Share, add_gradients_up
from streamline_hooks.repair.student import Student
from streamline_hooks.repair.teacher import Taught
from streamline_hooks.repair.trained import Trained
from streamline_hooks.repair.training_state import (
    fingerprint,
    random_state,
    read_state,
    set_random_state,
    write_state,
)
from streamline_hooks.task import logits_of

_T = TypeVar("_T")
_Losses = list[tuple[float, int]]  # each summed over so many tokens
logger = logging.getLogger(__name__)


class Loop:
    """A training run: its steps, validations and training file.

    `batches` and `validation` are complete on every rank; `taught`, `validation_taught` and `shares` are of this rank.
    With `sharded`, every rank makes as many forwards as the others. `spent` are seconds of preparation, which count
    towards `max_minutes`.
    """

    def __init__(
        self,
        student: Student,
        batches: Sequence[Batch | Tensor],
        validation: Sequence[Batch | Tensor],
        taught: list[Taught],
        validation_taught: list[Taught],
        config: DistillationConfig,
        say: Callable[[str], None],
        *,
        hardware: HardwareConfig,
        checkpoint: Path | None,
        callbacks: Sequence[TrainingCallback],
        shares: tuple[Share, Share],
        work: DistributedStep,
        sharded: bool,
        spent: float,
    ) -> None:
        self.student, self.batches, self.validation, self.say = student, batches, validation, say
        self.config, self.hardware = config.seeded(0), hardware
        self.checkpoint, self.callbacks = checkpoint, callbacks
        self.task, self.work = student.task, work
        self.share, self.validation_share = shares
        self.taught = dict(zip(self.share.batches, taught, strict=True))
        self.validation_taught = dict(zip(self.validation_share.batches, validation_taught, strict=True))
        self.sharded, self.spent = sharded, spent
        self.interrupts = Interrupts()
        self.parameters = student.parameters()
        self.fingerprint = fingerprint(self.config, self.hardware, student, self.parameters, batches, validation)
        self._require_one_training()
        self.device = device_of(student.model)
        self.course = Course(self.config, len(batches))
        self.steps = self.course.steps
        self.optimisation = Optimisation(self.parameters, self.config, self.steps, student.rate_of)
        self.weights = self.optimisation.weights
        self.step, self.tokens, self.seconds, self.began = 0, 0, 0.0, time.perf_counter()
        self.whole = True  # not while weights are half updated, which is not to be kept
        self.history: list[dict[str, Any]] = []
        self.losses: _Losses = []
        self.best = self._copied()
        self.tokens_of_states = self._count_tokens()
        self.longest = max(self.work.all_gather_object(max(self.share.longest, self.validation_share.longest)))
        self.rows = self.longest  # sequences at a time, until there is no memory for as many

    def _require_one_training(self) -> None:
        """Start all ranks from rank 0's weights, after checking that they train the same."""
        if any(other != self.fingerprint for other in self.work.all_gather_object(self.fingerprint)):
            raise StreamlineError(
                f"The {self.work.processes.count} processes are not at the same training: their text, windows, "
                "settings or models differ. Give every process the same, and all batches, of which it takes its share."
            )
        self.work.broadcast_(self.parameters.values())

    def _count_tokens(self) -> dict[int, int]:
        """Return the real tokens of each batch, which only the rank that ran it knows."""
        own = {number: taught.tokens for number, taught in self.taught.items() if number not in self.share.idle}
        told = self.work.all_gather_object(own)
        return {number: sum(its.get(number, 0) for its in told) for number in range(len(self.batches))}

    def run(self, resume: bool) -> Trained:
        """Make all remaining steps, from the start or from the training file; the global random state is kept."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            return self._run(resume)

    def _run(self, resume: bool) -> Trained:
        seed_generators(self.device, cast(int, self.config.seed))
        if resume:
            self._restore()
        stopped = ""
        self.began, kept = time.perf_counter() - self.seconds, time.perf_counter()
        total = round(sum(tokens_of(batch) for batch in self.batches) * self.config.epochs)
        with noted_interrupts() as self.interrupts, progress(total, self._cost(), done=self.tokens) as bar:
            try:
                while True:
                    if self.course.is_due(self.step, self.history):
                        self._validate(bar)
                    if self.step == self.steps or (stopped := self.course.out_of_patience(self.history)):
                        break
                    if self._out_of_time():
                        stopped = f"the {self.config.max_minutes:.4g} minutes for it were over after step {self.step}"
                        stopped = stopped if self.step else "no time was left for it"
                        if self.history[-1]["step"] < self.step:
                            self._validate(bar)
                        break
                    loss, tokens = self.make_step()
                    if not math.isfinite(loss):
                        stopped = f"the loss of step {self.step + 1} is {loss}"
                        break
                    self.seconds = time.perf_counter() - self.began
                    bar.update(tokens)
                    bar.set_postfix_str(self._state())
                    if time.perf_counter() - kept >= 60 * self.config.checkpoint_minutes:
                        self._keep_or_warn()
                        kept = time.perf_counter()
            except AllInterrupted:
                stopped = f"interrupted after step {self.step}"
            except KeyboardInterrupt:
                if self.work.processes.count > 1:
                    raise  # the others do not know of it
                stopped = f"interrupted after step {self.step}"
        if self.whole and not stopped.startswith("the loss"):
            self._keep_or_warn()
        ends = self.work.all_gather_object((self.interrupts.asked, self.seconds))
        self.seconds = ends[0][1]
        if not stopped and any(asked for asked, _ in ends):
            stopped = f"interrupted after step {self.step}"
        none: dict[str, Any] = {"distance": math.nan, "step": 0}  # interrupted before anything was measured
        best = min(self.history, key=lambda row: row["validated"], default=none)
        self._put_back(self.best)
        if stopped:
            self.say(
                f"Training ended early: {stopped}. The best weights so far are kept, those of step {best['step']}."
            )
        first = self.history[0]["distance"] if self.history else none["distance"]
        return Trained(
            steps=self.step,
            tokens=self.tokens,
            distance_before=first,
            distance=best["distance"],
            best_step=best["step"],
            history=self.history,
            seconds=self.seconds,
            stopped=stopped,
            measure=self.task.distance,
            unit="token" if any(map(has_tokens, self.batches)) else self.task.unit,
        )

    def _progress(self) -> TrainingProgress:
        batches = tuple(self.course.batches_of(self.step)) if self.step < self.steps else ()
        return TrainingProgress(self.step, self.steps, self.tokens, batches, None, self.history)

    def make_step(self) -> tuple[float, int]:
        """Make one step of the optimizer; return the mean loss per token, and the number of tokens."""
        before = self._progress()
        for callback in self.callbacks:
            callback.on_step_begin(before)
        loss, tokens = self._step()
        ended = replace(before, step=self.step, tokens=self.tokens, loss=loss)
        for callback in self.callbacks:
            callback.on_step_end(ended)
        return loss, tokens

    def _step(self) -> tuple[float, int]:
        numbers = self.course.batches_of(self.step)
        run = sum(tokens_of(self.batches[number]) for number in numbers)
        random = random_state(self.device)
        buffers = {name: buffer.clone() for name, buffer in self.student.buffers().items()}
        try:
            answers = sum(self.task.count(self.batches[number]) for number in numbers)
            tokens = sum(self.tokens_of_states[number] for number in numbers)

            def gradients() -> tuple[float, list[bool]]:
                self.weights.clear()  # of a step that was broken off, in an earlier training too
                set_random_state(random, self.device)
                self._put_back(buffers)
                self._seed()
                loss = sum(self._backward(number, answers, tokens) for number in numbers if number in self.taught)
                return loss, [master.grad is not None for master in self.weights.masters.values()]

            made = self._with_room(gradients)
        except (KeyboardInterrupt, AllInterrupted):
            set_random_state(random, self.device)  # whoever goes on makes this step anew
            self._put_back(buffers)
            raise
        loss = math.fsum(value for value, _ in made)
        if math.isfinite(loss):
            self.whole = False
            add_gradients_up(self.work, self.weights.masters, [reached for _, reached in made])
            self.optimisation.step()
            self.step += 1
            self.tokens += run
            self.losses.append((loss * run, run))
            self.whole = True
        self.weights.clear()
        return loss, run

    def _with_room(self, make: Callable[[], _T]) -> list[_T]:
        """Call `make` on every rank, with fewer sequences at a time until memory suffices; return all results."""

        def run(rows: int) -> _T:
            if rows < min(self.rows, self.longest):
                self.rows = rows
                self.weights.clear()
            return make()

        gather = partial(agreed, self.work, self.interrupts)
        rows = min(self.rows, self.longest)
        return halve_rows(run, rows, self.say, splits=not self.sharded, gather=gather)

    def _out_of_time(self) -> bool:
        """Whether the time limit is over by rank 0's clock."""
        if self.config.max_minutes is None:
            return False
        return self.work.broadcast_object(
            lambda: self.spent + self.seconds >= 60 * cast(float, self.config.max_minutes)
        )

    def _validate(self, bar: Any) -> None:
        """Measure the validation loss (`Objective.validated`), and keep the weights if it is the lowest so far."""
        progress = self._progress()
        for callback in self.callbacks:
            callback.on_validation_begin(progress)
        bar.set_postfix_str("validation")
        told = self._with_room(lambda: (*self.validation_sums(), self._digest()))
        for rank, (*_, digest) in enumerate(told):
            if digest != told[0][-1]:
                raise StreamlineError(
                    f"The weights of processes 0 and {rank} have come apart by step {self.step}: something trained or "
                    "changed those of one of them alone. Begin again, and let nothing but the training change them."
                )
        answers = sum(count for _, _, count, _ in told)
        distance, others = (math.fsum(sums) / answers for sums in zip(*((one[0], one[1]) for one in told), strict=True))
        distance = distance if math.isfinite(distance) else math.inf
        validated = self.config.objective.validated(distance, others)
        validated = validated if math.isfinite(validated) else math.inf
        loss = _mean(self.losses)
        self.losses.clear()
        if not self.history or validated < min(row["validated"] for row in self.history):
            self.best = self._copied()
        self.history.append(
            {"step": self.step, "tokens": self.tokens, "distance": distance, "validated": validated, "loss": loss}
        )
        for callback in self.callbacks:
            callback.on_validation_end(progress)
        self.seconds = time.perf_counter() - self.began
        bar.set_postfix_str(self._state())

    def _all(self) -> dict[str, Tensor]:
        """Return the trained parameters and the buffers beside them."""
        return {**self.parameters, **self.student.buffers()}

    def _copied(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._all().items()}

    def _put_back(self, values: Mapping[str, Tensor]) -> None:
        held = self._all()
        with torch.no_grad():
            for name, value in values.items():
                held[name].copy_(value)

    def _digest(self) -> str:
        """Return a digest of trained parameters and buffers; empty with one rank."""
        if self.work.processes.count == 1:
            return ""
        placed = [module for modules in self.student.modules.values() for module in modules]
        buffers = [buffer for module in placed for buffer in module.buffers()]
        return batches_digest([*(p.detach() for p in self.parameters.values()), *buffers])

    def _cost(self) -> str:
        length, start, count = len(self.student.stack), self.student.start, self.work.processes.count
        end = length if self.config.objective.needs_logits else max(w.stop for w in self.student.windows)
        shared = f", in {count} processes" if count > 1 else ""
        return f"train on {self.config.objective}: blocks {start} to {end - 1} of {length}{shared}"

    def _state(self) -> str:
        loss = f"loss {self.losses[-1][0] / self.losses[-1][1]:.4f}, " if self.losses else ""
        measure = self.task.distance.partition(" (")[0]
        best = min(self.history, key=lambda row: row["validated"])
        return f"{loss}{measure} {self.history[-1]['distance']:.4f}, best {best['distance']:.4f}"

    def _backward(self, number: int, answers: int, tokens: int) -> float:
        total = 0.0
        for taught, batch in self._parts(self.taught[number], self.share.batches[number]):
            loss = self._loss(taught, batch, answers, tokens)
            if number in self.share.idle:
                loss = 0.0 * loss
            loss.backward()
            self.weights.collect()
            total += float(loss.detach())
        return total

    def _loss(self, taught: Taught, batch: Batch | Tensor, answers: int, tokens: int) -> Tensor:
        """Return the loss: the logit term averaged over `answers` plus the hidden-state term averaged over `tokens`."""
        objective = self.config.objective
        with self.hardware.autocast_on(self.device):
            output, states = self.student.run(
                taught.entrance, batch, logits=objective.needs_logits, states=objective.needs_states
            )
            original = self._original(taught, batch) if objective.needs_original_logits else None
        after = [state.to(self.device) for state in taught.after]
        loss = objective.of_states(states, after, taught.real.to(self.device)) / max(1, tokens)
        if output is not None:
            said, following = self.task.answers(output, batch), self._following(batch, output)
            loss = loss + objective.of_answers(said, original, following) / answers
        return loss

    def _following(self, batch: Batch | Tensor, output: Any) -> Tensor | None:
        """Return the label of each answer of an output, or None if no loss predicts the text."""
        if not self.config.objective.needs_labels:
            return None
        given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        wanted = "labels" if self.task.name == "seq2seq" else "input_ids"
        if wanted not in given:
            raise StreamlineError(
                f"The loss {self.config.objective} predicts a text, and a batch has none ({', '.join(given)}). "
                f"Give {wanted}, or train on what the original says (kl)."
            )
        ids = given[wanted].to(logits_of(output).device)
        if wanted == "labels":
            following = ids
        else:
            mask = real_tokens(given)
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
            following = following_tokens(ids, real, given.get("position_ids"))
            if isinstance(labels := given.get("labels"), Tensor) and labels.shape == ids.shape:
                # What has no label is not learned: an image's places, or the question of a conversation.
                unlabelled = labels.to(ids.device).roll(-1, dims=1) == UNCOUNTED
                following = following.masked_fill(unlabelled, UNCOUNTED)
        answered = self.task.answers(following[..., None], batch)[:, 0]  # chosen as of logits
        if wanted == "labels" and (left := int((following != UNCOUNTED).sum() - (answered != UNCOUNTED).sum())):
            raise StreamlineError(
                f"{left} labels are at places that decoder_attention_mask leaves out. Let the mask have the places "
                f"whose labels are to be learned, or give the label {UNCOUNTED} there."
            )
        return answered

    def _original(self, taught: Taught, batch: Batch | Tensor) -> Tensor:
        assert taught.exit is not None
        return self.student.original_answers(taught.exit, batch)

    def validation_sums(self) -> tuple[float, float, int]:
        """Return this rank's sums of the distance and of `Objective.besides_distance`, and its number of answers."""
        total, others, answers, objective = 0.0, 0.0, 0, self.config.objective
        with torch.no_grad(), _evaluating(self.student):
            for number, batch in self.validation_share.batches.items():
                for part, rows in self._parts(self.validation_taught[number], batch):
                    with self.hardware.autocast_on(self.device):
                        output, _ = self.student.run(part.entrance, rows, logits=True, states=False)
                        original = self._original(part, rows)
                    if number not in self.validation_share.idle:
                        said = self.task.answers(output, rows)
                        if self.task.gives_distributions:
                            total += float(summed_divergence(said, original))
                        else:
                            total += summed_distance(self.task, reference_of(self.task, original), said)
                        others += objective.besides_distance(said, original, self._following(rows, output))
                        answers += len(said)
        return total, others, answers

    def _parts(self, taught: Taught, batch: Batch | Tensor) -> Iterator[tuple[Taught, Batch | Tensor]]:
        """Yield a batch in parts of as many sequences as memory allows."""
        whole = len(taught.entrance)
        if whole <= self.rows or self.sharded:
            yield taught, batch
            return
        for start in range(0, whole, self.rows):
            rows = slice(start, start + self.rows)
            yield taught.rows(rows), some_of(batch, rows)

    def _keep_or_warn(self) -> None:
        """Write the training file, or warn and continue if that fails."""
        try:
            self._keep()
        except StreamlineError as error:
            self.say(str(error))
            logger.warning("The training goes on, but its state was not kept: %s", error)

    def _keep(self) -> None:
        if self.checkpoint is None or self.work.processes.rank:
            return
        tensors = self.optimisation.tensors() | {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"buffer.{name}": buffer.clone() for name, buffer in self.student.buffers().items()}
        tensors |= random_state(self.device)
        said = {
            "fingerprint": self.fingerprint, "step": self.step, "tokens": self.tokens, "seconds": self.seconds,
            "spent": self.spent, "history": self.history, "losses": self.losses, "rows": self.rows,
            **self.optimisation.said(),
        }  # fmt: skip
        write_state(self.checkpoint, tensors, said)

    def _restore(self) -> None:
        path = cast(Path, self.checkpoint)
        tensors, said = self.work.broadcast_object(lambda: read_state(path))
        if said.get("own_text"):
            raise StreamlineError(
                f"{path} is of a training on the model's own text, which this version has no steps for. Expected one "
                "on calibration text alone. Begin again without --resume, and see examples/on_policy_distillation.py "
                "for training on generated text with TRL."
            )
        if said["fingerprint"] != self.fingerprint:
            raise StreamlineError(
                f"{path} holds another training: of other windows, text, settings or an other model. Give what it was "
                "begun with, or begin again without --resume."
            )
        self.optimisation.load(tensors, said)
        self.best = {name: tensors[f"best.{name}"].to(p.device) for name, p in self._all().items()}
        self._put_back({name: tensors[f"buffer.{name}"] for name in self.student.buffers()})
        set_random_state(tensors, self.device)
        self.step, self.tokens, self.seconds = said["step"], said["tokens"], said["seconds"]
        self.spent = max(self.spent, said["spent"])  # so that one that ended by its time has none left
        self.history, self.losses = said["history"], [(value, count) for value, count in said["losses"]]
        self.rows = said["rows"]

    def _seed(self) -> None:
        """With several ranks, seed random numbers by step and rank, so that a resumed run draws the same ones."""
        if self.work.processes.count > 1:
            seed_generators(self.device, self.course.seed_of(self.step, self.work.processes.rank))


def _mean(losses: _Losses) -> float | None:
    """Return the mean loss per token."""
    tokens = sum(count for _, count in losses)
    return math.fsum(value for value, _ in losses) / tokens if tokens else None


@contextmanager
def _evaluating(student: Student) -> Iterator[None]:
    student.training = False
    try:
        yield
    finally:
        student.training = True

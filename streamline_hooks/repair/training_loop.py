"""The steps of a training, one after the other, each of which can be gone on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, device_of, real_tokens, tokens_of
from streamline_hooks.errors import StreamlineError
from streamline_hooks.passes import progress
from streamline_hooks.repair.master_weights import MasterWeights
from streamline_hooks.repair.objective import summed_kl
from streamline_hooks.repair.settings import Trained, Training
from streamline_hooks.repair.student import Student
from streamline_hooks.repair.teacher import Taught
from streamline_hooks.repair.training_state import (
    fingerprint,
    load_optimiser,
    optimiser_tensors,
    read_state,
    write_state,
)


class Loop:
    """One training on its way."""

    def __init__(
        self,
        student: Student,
        batches: Sequence[Batch | Tensor],
        validation: Sequence[Batch | Tensor],
        taught: list[Taught],
        validation_taught: list[Taught],
        settings: Training,
        say: Callable[[str], None],
    ) -> None:
        from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup  # late: it brings in much

        self.student, self.batches, self.validation, self.settings, self.say = (
            student, batches, validation, settings, say,
        )  # fmt: skip
        self.taught, self.validation_taught = taught, validation_taught
        self.parameters = student.parameters()
        self.device = device_of(student.model)
        self.steps = settings.epochs * math.ceil(len(batches) / settings.accumulation)
        self.weights = MasterWeights(self.parameters)
        self.optimiser = torch.optim.AdamW(self._groups(), lr=settings.learning_rate, betas=settings.betas)
        self.schedule: Any = get_cosine_with_min_lr_schedule_with_warmup(
            self.optimiser,
            num_warmup_steps=min(math.ceil(settings.warmup * self.steps), self.steps - 1),  # the first has rate 0
            num_training_steps=self.steps,
            min_lr_rate=settings.floor,
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.whole = True  # not while weights are half updated, which is not to be kept
        self.history: list[dict[str, Any]] = []
        self.losses: list[tuple[float, int]] = []
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.rows = max(len(taught.entrance) for taught in self.taught)
        self.fingerprint = fingerprint(settings, student, self.parameters, [*batches, *validation])

    def _groups(self) -> list[dict[str, Any]]:
        """What is trained at the same rate, and with the same decay: matrices have some, vectors none."""
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, master in self.weights.masters.items():
            decay = self.settings.weight_decay if master.ndim > 1 else 0.0
            groups.setdefault((self.settings.learning_rate * self.student.rate_of(name), decay), []).append(master)
        return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]

    def run(self, resume: bool) -> Trained:
        """Make all steps that are left, from the beginning or from where an earlier run was kept."""
        torch.manual_seed(self.settings.seed)
        if resume:
            self._restore()
        stopped = ""
        began, kept = time.perf_counter() - self.seconds, time.perf_counter()
        total = sum(tokens_of(batch) for batch in self.batches) * self.settings.epochs
        with progress(total, self._cost(), done=self.tokens) as bar:
            try:
                while True:
                    if self._is_due():
                        self._validate(bar)
                    if self.step == self.steps or (stopped := self._out_of_patience()):
                        break
                    loss, tokens = self._step()
                    if not math.isfinite(loss):
                        stopped = f"the loss of step {self.step + 1} is {loss}"
                        break
                    self.seconds = time.perf_counter() - began
                    bar.update(tokens)
                    bar.set_postfix_str(self._state())
                    if time.perf_counter() - kept >= 60 * self.settings.keep_every:
                        self._keep()
                        kept = time.perf_counter()
            except KeyboardInterrupt:
                stopped = f"interrupted after step {self.step}"
        if self.whole and not stopped.startswith("the loss"):
            self._keep()
        none: dict[str, Any] = {"kl": math.nan, "step": 0}  # interrupted before anything was measured
        best = min(self.history, key=lambda row: row["kl"], default=none)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])
        if stopped:
            self.say(
                f"Training ended early: {stopped}. The best weights so far are kept, those of step {best['step']}."
            )
        first = self.history[0]["kl"] if self.history else none["kl"]
        return Trained(self.step, self.tokens, first, best["kl"], best["step"], self.history, self.seconds, stopped)

    def _step(self) -> tuple[float, int]:
        """One step of the optimiser; the mean loss a token, and the tokens."""
        numbers = self._numbers(self.step)
        tokens = sum(tokens_of(self.batches[number]) for number in numbers)
        random = self._random()
        while True:
            self.weights.clear()  # of a step that was broken off, in an earlier training too
            try:
                loss = sum(self._backward(number, tokens) for number in numbers)
                break
            except KeyboardInterrupt:
                self._set_random(random)  # whoever goes on makes this step anew
                raise
            except torch.cuda.OutOfMemoryError:
                if self.rows == 1:
                    raise
                self.rows = (self.rows + 1) // 2
                self._set_random(random)
                torch.cuda.empty_cache()
                self.say(f"Out of memory: {self.rows} sequences are run at a time from here on, and the steps stay.")
        if math.isfinite(loss):
            self.whole = False
            if self.settings.clip:
                nn.utils.clip_grad_norm_(self.weights.masters.values(), self.settings.clip)
            self.optimiser.step()
            self.weights.hand_on()
            self.schedule.step()
            self.step += 1
            self.tokens += tokens
            self.losses.append((loss * tokens, tokens))
            self.whole = True
        self.weights.clear()
        return loss, tokens

    def _backward(self, number: int, tokens: int) -> float:
        total = 0.0
        for taught, batch in self._parts(self.taught[number], self.batches[number]):
            loss = self._loss(taught, batch) / tokens
            loss.backward()
            self.weights.collect()
            total += float(loss.detach())
        return total

    def _loss(self, taught: Taught, batch: Batch | Tensor) -> Tensor:
        """The loss, summed over the real tokens."""
        objective = self.settings.objective
        mask = self._mask(taught, batch)
        with self.settings.products(self.device):
            logits, states = self.student.run(
                taught.entrance, batch, logits=objective.needs_logits, states=objective.needs_states
            )
            original = self._original(taught, batch) if objective.needs_original_logits else None
        loss = objective.of_states(states, [state.to(self.device) for state in taught.after], mask)
        if logits is not None:
            ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
            loss = loss + objective.of_logits(logits, original, None if ids is None else ids.to(self.device), mask)
        return loss

    def _original(self, taught: Taught, batch: Batch | Tensor) -> Tensor:
        assert taught.exit is not None
        return self.student.original_logits(taught.exit, batch)

    def _validate(self, bar: Any) -> None:
        """KL on validation text; the weights are kept if it is the lowest so far."""
        total, tokens = 0.0, 0
        bar.set_postfix_str("validation")
        with torch.no_grad(), _evaluating(self.student):
            for taught, batch in zip(self.validation_taught, self.validation, strict=True):
                for part, rows in self._parts(taught, batch):
                    mask = self._mask(part, rows)
                    with self.settings.products(self.device):
                        logits, _ = self.student.run(part.entrance, rows, logits=True, states=False)
                        original = self._original(part, rows)
                    total += float(summed_kl(cast(Tensor, logits)[mask], original[mask]))
                    tokens += int(mask.sum())
        kl = total / tokens if math.isfinite(total) else math.inf
        counted = sum(n for _, n in self.losses)
        loss = math.fsum(value for value, _ in self.losses) / counted if counted else None
        if not self.history or kl < min(row["kl"] for row in self.history):
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.history.append({"step": self.step, "tokens": self.tokens, "kl": kl, "loss": loss})
        self.losses.clear()
        bar.set_postfix_str(self._state())

    def _parts(self, taught: Taught, batch: Batch | Tensor) -> Iterator[tuple[Taught, Batch | Tensor]]:
        """A batch in parts of as many sequences as there is memory for."""
        whole = len(taught.entrance)
        if whole <= self.rows:
            yield taught, batch
            return
        for start in range(0, whole, self.rows):
            rows = slice(start, start + self.rows)
            yield (
                taught.rows(rows),
                batch[rows]
                if isinstance(batch, Tensor)
                else {n: v[rows] if isinstance(v, Tensor) and len(v) == whole else v for n, v in batch.items()},
            )

    def _mask(self, taught: Taught, batch: Batch | Tensor) -> Tensor:
        given = None if isinstance(batch, Tensor) else real_tokens(batch)
        if isinstance(given, Tensor):
            return given.to(self.device).bool()
        return torch.ones(taught.entrance.shape[:2], dtype=torch.bool, device=self.device)

    def _numbers(self, step: int) -> list[int]:
        """The batches of a step: each epoch has an order of its own, which the seed tells."""
        size = self.settings.accumulation
        epoch, place = divmod(step, math.ceil(len(self.batches) / size))
        generator = torch.Generator().manual_seed(self.settings.seed + epoch)
        order = torch.randperm(len(self.batches), generator=generator).tolist()
        return order[place * size : (place + 1) * size]

    def _is_due(self) -> bool:
        """Whether KL is to be measured now; it may have been interrupted before."""
        return not self.history or (self.step in self._validations() and self.history[-1]["step"] < self.step)

    def _validations(self) -> set[int]:
        count = min(self.settings.validations, self.steps)
        return {round(self.steps * k / count) for k in range(1, count + 1)}

    def _out_of_patience(self) -> str:
        since = len(self.history) - 1 - min(range(len(self.history)), key=lambda k: self.history[k]["kl"])
        if self.settings.patience and since >= self.settings.patience:
            return f"KL on validation text was no lower {since} times"
        return ""

    def _cost(self) -> str:
        length, start = len(self.student.stack), self.student.start
        end = length if self.settings.objective.needs_logits else max(w.stop for w in self.student.windows)
        return f"train on {self.settings.objective}: blocks {start} to {end - 1} of {length}"

    def _state(self) -> str:
        loss = f"loss {self.losses[-1][0] / self.losses[-1][1]:.4f}, " if self.losses else ""
        return f"{loss}KL {self.history[-1]['kl']:.4f}, best {min(row['kl'] for row in self.history):.4f}"

    # What is kept for going on later.

    def _keep(self) -> None:
        if self.settings.keep_in is None:
            return
        tensors = {f"parameter.{name}": p.detach() for name, p in self.weights.masters.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"optimiser.{name}": value for name, value in optimiser_tensors(self.optimiser).items()}
        tensors |= self._random()
        said = {
            "fingerprint": self.fingerprint, "step": self.step, "tokens": self.tokens, "seconds": self.seconds,
            "history": self.history, "losses": self.losses, "rows": self.rows,
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "rates": [group["lr"] for group in self.optimiser.param_groups],
        }  # fmt: skip
        write_state(self.settings.keep_in, tensors, said)

    def _restore(self) -> None:
        path = cast(Path, self.settings.keep_in)
        tensors, said = read_state(path)
        if said["fingerprint"] != self.fingerprint:
            raise StreamlineError(
                f"{path} holds another training: of other windows, text, settings or an other model. Give what it was "
                "begun with, or begin again without --resume."
            )
        self.weights.load({name: tensors[f"parameter.{name}"] for name in self.parameters})
        self.best = {name: tensors[f"best.{name}"].to(p.device) for name, p in self.parameters.items()}
        prefix = "optimiser."
        load_optimiser(self.optimiser, {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
        self.schedule.load_state_dict({**self.schedule.state_dict(), **said["schedule"]})
        for group, rate in zip(self.optimiser.param_groups, said["rates"], strict=True):
            group["lr"] = rate
        self._set_random(tensors)
        self.step, self.tokens, self.seconds = said["step"], said["tokens"], said["seconds"]
        self.history, self.losses = said["history"], [(value, count) for value, count in said["losses"]]
        self.rows = said["rows"]

    def _random(self) -> dict[str, Tensor]:
        state = {"random": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set_random(self, state: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(state["random"])
        if "random.cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random.cuda"], self.device)


@contextmanager
def _evaluating(student: Student) -> Iterator[None]:
    student.training = False
    try:
        yield
    finally:
        student.training = True

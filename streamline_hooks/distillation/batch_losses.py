"""The losses of a student on a batch, from logits of all or of a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from streamline_hooks.core import (
    IGNORE_INDEX,
    Batch,
    HardwareConfig,
    StreamlineError,
    device_of,
    padding_mask,
    shift_labels,
)
from streamline_hooks.distillation.losses import Objective, summed_logit_loss
from streamline_hooks.distillation.student import Student
from streamline_hooks.distillation.teacher_cache import TeacherStates
from streamline_hooks.modeling import Task, get_logits, reference_outputs, sum_distance
from streamline_hooks.surgery import agrees_with_forward, has_large_logits, tokens_within_memory


@dataclass(frozen=True)
class BatchLosses:
    """The losses of a student on batches.

    Attributes
    ----------
    student : Student
    objective : Objective
    hardware : HardwareConfig
        Its autocast dtype is that of the forward passes.
    by_token : bool
        Whether logits are computed for a few tokens at a time, so that their memory does not grow with the batch.
    """

    student: Student
    objective: Objective
    hardware: HardwareConfig
    by_token: bool
    task: Task = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", self.student.task)
        object.__setattr__(self, "device", device_of(self.student.model))

    @classmethod
    def of(
        cls,
        student: Student,
        objective: Objective,
        hardware: HardwareConfig,
        batches: Sequence[Batch | Tensor],
        sharded: bool,
    ) -> BatchLosses:
        """Create the losses, with logits by token if those of a batch are large.

        Sharded models, models whose logits depend on other tokens, and students that override `run` or
        `original_answers` need whole logits.
        """
        kind, stacks = type(student), {id(s): s for s in (student.stack, student.teacher_stack)}.values()
        by_token = (
            (kind.run, kind.original_answers) == (Student.run, Student.original_answers)
            and student.task.is_causal_lm
            and not sharded
            and has_large_logits(student.model, batches)
            and all(agrees_with_forward(stack.model, stack.path, batches) for stack in stacks)
        )
        return cls(student, objective, hardware, by_token)

    def backward(
        self,
        teacher_states: TeacherStates,
        batch: Batch | Tensor,
        answers: int,
        tokens: int,
        weight: float = 1.0,
        collect: Callable[[], None] = lambda: None,
    ) -> float:
        """Add the gradients of `weight` times the loss to the parameters, and return `weight` times the loss.

        The loss on outputs is divided by `answers`, the number of answers of a step, and that on states by `tokens`,
        its number of real tokens. `collect` is called after each part of the gradients, to sum them in float32.
        """
        loss = self._loss(teacher_states, batch, answers, tokens, weight, collect)
        # If only modules after the blocks are trained, logits by token have computed all gradients.
        if loss.requires_grad or not self.by_token or self._trains_blocks():
            loss.backward()
        collect()
        return float(loss.detach())

    def _trains_blocks(self) -> bool:
        """Whether a replacement or a block is trained, and not only modules outside the stack."""
        inside = [modules for path, modules in self.student.modules.items() if path not in self.student.outside]
        return any(p.requires_grad for modules in inside for module in modules for p in module.parameters())

    def _loss(
        self,
        teacher_states: TeacherStates,
        batch: Batch | Tensor,
        answers: int,
        tokens: int,
        weight: float,
        collect: Callable[[], None],
    ) -> Tensor:
        """Return `weight` times the loss.

        With `by_token` the backward passes through the modules after the blocks run here, one for each part of the
        tokens. They add to the gradients of trained modules there; the gradient of the student's states is kept for
        the backward pass of the result.
        """
        objective, student = self.objective, self.student
        by_token = self.by_token and objective.needs_logits
        output = original = state = None
        with self.hardware.autocast_on(self.device):
            if by_token:
                state, states = student.run_to_exit(teacher_states.entrance, batch, states=objective.needs_states)
            else:
                parts = {"logits": objective.needs_logits, "states": objective.needs_states}
                output, states = student.run(teacher_states.entrance, batch, **parts)
                if objective.needs_original_logits:
                    original = student.original_answers(teacher_states.exit, batch)
        after = [state.to(self.device) for state in teacher_states.after]
        loss = weight * objective.state_loss(states, after, teacher_states.real.to(self.device)) / max(1, tokens)
        if state is not None:
            loss = loss + self._loss_by_token(state, teacher_states.exit, batch, weight / answers, collect)
        elif output is not None:
            answer_logits, labels = self.task.answers(output, batch), self._labels(batch, output)
            loss = loss + weight * objective.output_loss(answer_logits, original, labels) / answers
        return loss

    def validation_sums(self, teacher_states: TeacherStates, batch: Batch | Tensor) -> tuple[float, float, int]:
        """Return the sums of the distance to the teacher and of `Objective.other_losses`, and the number of answers."""
        if self.by_token:
            return self._validation_sums_by_token(teacher_states, batch)
        with self.hardware.autocast_on(self.device):
            output, _ = self.student.run(teacher_states.entrance, batch, logits=True, states=False)
            reference = self.student.original_answers(teacher_states.exit, batch)
        answers = self.task.answers(output, batch)
        if self.task.gives_distributions:
            distance = float(summed_logit_loss(answers, reference))
        else:
            distance = sum_distance(self.task, reference_outputs(self.task, reference), answers)
        others = self.objective.other_losses(answers, reference, self._labels(batch, output))
        return distance, others, len(answers)

    def _loss_by_token(
        self,
        state: Tensor,
        exit_: Tensor | None,
        batch: Batch | Tensor,
        scale: float,
        collect: Callable[[], None],
    ) -> Tensor:
        total, gradients = torch.zeros((), device=state.device), []
        states = self.task.answers(state, batch)
        for part, logits, reference, labels in self._parts(states, exit_, batch, state.shape[1], graph=True):
            loss = self.objective.output_loss(logits, reference, labels) * scale
            loss.backward()
            collect()
            assert part.grad is not None
            gradients.append(part.grad)
            total += loss.detach().to(total.device)
        loss_of_state: Tensor = _KnownGradient.apply(states, torch.cat(gradients), total)
        return loss_of_state

    def _validation_sums_by_token(
        self, teacher_states: TeacherStates, batch: Batch | Tensor
    ) -> tuple[float, float, int]:
        with self.hardware.autocast_on(self.device):
            state, _ = self.student.run_to_exit(teacher_states.entrance, batch, states=False)
        states, distance, others = self.task.answers(state, batch), 0.0, 0.0
        for _, logits, reference, labels in self._parts(
            states, teacher_states.exit, batch, state.shape[1], graph=False
        ):
            distance += float(summed_logit_loss(logits, reference))
            others += self.objective.other_losses(logits, reference, labels)
        return distance, others, len(states)

    def _parts(
        self, states: Tensor, exit_: Tensor | None, batch: Batch | Tensor, most: int, graph: bool
    ) -> Iterator[tuple[Tensor, Tensor, Any, Tensor | None]]:
        """Yield states, logits, the teacher's logits and labels of a few tokens at a time, at most `most`.

        `states` are the student's states of the tokens of `Task.answers`, (tokens, features); `exit_` are the
        teacher's states after its last block, (batch, tokens, features).
        """
        labels = self._labels(batch, states)
        reference = None if exit_ is None else self.task.answers(exit_, batch)
        count = min(tokens_within_memory(self.student.model, self.device), most)  # a model has no more positions
        with self.student.heads() as (head, teacher_head):
            for start in range(0, len(states), count):
                rows = slice(start, start + count)
                part = states[rows].detach().requires_grad_(graph)
                with self.hardware.autocast_on(self.device):
                    original = None if reference is None else teacher_head(reference[rows].to(self.device))
                    logits = head(part)
                yield part, logits, original, None if labels is None else labels[rows].to(logits.device)

    def _labels(self, batch: Batch | Tensor, output: Any) -> Tensor | None:
        """Return the label of each answer, or None if no loss needs labels; `output` determines their device."""
        if not self.objective.needs_labels:
            return None
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        key = "labels" if self.task.name == "seq2seq" else "input_ids"
        if key not in inputs:
            raise StreamlineError(
                f"The loss {self.objective} needs labels, but a batch has only {', '.join(inputs)}. Expected {key}. "
                "Add it to the batches, or use a loss without labels (kl)."
            )
        ids = inputs[key].to(get_logits(output).device)
        if key == "labels":
            following = ids
        else:
            mask = padding_mask(inputs)
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
            following = shift_labels(ids, real, inputs.get("position_ids"))
            if isinstance(labels := inputs.get("labels"), Tensor) and labels.shape == ids.shape:
                # Positions without a label are not trained on, such as image tokens or the prompt of a conversation.
                unlabeled = labels.to(ids.device).roll(-1, dims=1) == IGNORE_INDEX
                following = following.masked_fill(unlabeled, IGNORE_INDEX)
        answer_labels = self.task.answers(following[..., None], batch)[:, 0]  # select positions as for logits
        if key == "labels" and (
            ignored_labels := int((following != IGNORE_INDEX).sum() - (answer_labels != IGNORE_INDEX).sum())
        ):
            raise StreamlineError(
                f"{ignored_labels} labels are at positions that decoder_attention_mask excludes. Expected labels only "
                f"at positions in the mask. Extend the mask, or set these labels to {IGNORE_INDEX}."
            )
        return answer_labels


class _KnownGradient(torch.autograd.Function):
    """A value whose gradient with respect to a tensor is known; one backward pass consumes the gradient."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.gradient = gradient
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_outputs[0]), None, None

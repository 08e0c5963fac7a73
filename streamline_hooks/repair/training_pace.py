"""How fast a training is on this machine, from a few of its own steps that are thrown away afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from streamline_hooks.batch import Batch, device_of, tokens_of
from streamline_hooks.core.hardware_config import HardwareConfig, Precision
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.distillation_config import DistillationConfig
from streamline_hooks.repair.frozen_products import narrowed_once
from streamline_hooks.repair.student import Student
from streamline_hooks.repair.teacher import taught_states
from streamline_hooks.repair.training_loop import Loop


@dataclass(frozen=True)
class TrainingPace:
    """What the parts of a training take.

    Attributes
    ----------
    original, apart : float
        Seconds a token of what the original does before the first step, on the text that is trained on and on that
        which validates (which it runs in the precision of the weights).
    step, validation : float
        Seconds a token of a step (forward, backward and optimiser), and of a look at the distance to the original.
    around : float
        Seconds that it takes to begin, however much is trained on.
    autocast : {"bfloat16", "float16"}, optional
        See `HardwareConfig`.
    """

    original: float
    apart: float
    step: float
    validation: float
    around: float = 0.0
    autocast: Precision | None = None

    def seconds(self, tokens: int, validation_tokens: int, *, epochs: float = 1, validations: int = 1) -> float:
        """Of a whole training.

        Parameters
        ----------
        tokens, validation_tokens : int
            That are trained on in an epoch, and looked at each time.
        epochs : float
        validations : int
            As in `DistillationConfig`: looks beyond the one before the first step.

        Examples
        --------
        >>> TrainingPace(1.0, 1.5, step=3.0, validation=2.0, around=5.0).seconds(100, 10, epochs=2, validations=4)
        820.0
        """
        steps = self.steps_and_validations(tokens, validation_tokens, epochs=epochs, validations=validations)
        return self.once(tokens, validation_tokens) + steps

    def once(self, tokens: int, validation_tokens: int) -> float:
        """What is done before the first step: the original's states, and what stands around the training."""
        return self.original * tokens + self.apart * validation_tokens + self.around

    def steps_and_validations(self, tokens: int, validation_tokens: int, *, epochs: float, validations: int) -> float:
        """The same without what is done before the first step, as `Trained.seconds` counts."""
        return self.step * tokens * epochs + self.validation * validation_tokens * (1 + validations)


def measure_training_pace(
    student: Student,
    batches: Sequence[Batch | Tensor],
    validation: Batch | Tensor,
    config: DistillationConfig | None = None,
    *,
    hardware: HardwareConfig | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> TrainingPace:
    """Make a few real steps of a training, and time them.

    The student is spent by it: make one for this alone. The original's weights, gradients and modes, and the state of
    torch's random numbers, are afterwards what they were.

    Parameters
    ----------
    student : Student
        Of the kind that will be trained, with its healing.
    batches : sequence of mapping or torch.Tensor
        Two at least, of the size that will be trained on. The first step sets up what the others use, and does not
        count.
    validation : mapping or torch.Tensor
    config : DistillationConfig, optional
    hardware : HardwareConfig, optional
    clock : callable
        Returns seconds.

    Raises
    ------
    StreamlineError
        If there are fewer batches.

    Examples
    --------
    >>> from streamline_hooks import LinearReplacement
    >>> from streamline_hooks.testing import tiny_model
    >>> student = Student(tiny_model("llama"), [(range(2, 4), LinearReplacement(32))])
    >>> text = [torch.arange(k, k + 24).view(2, 12) for k in (3, 13, 23)]
    >>> measure_training_pace(student, text[:2], text[2]).step > 0
    True
    """
    if len(batches) < 2:
        raise StreamlineError(f"Got {len(batches)} batches to time a training on; expected 2, of which 1 sets it up.")
    config, hardware = config or DistillationConfig(), hardware or HardwareConfig()
    device = device_of(student.model)

    def seconds(action: Callable[[], object]) -> float:
        started = clock()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - started

    with ExitStack() as exits:
        exits.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        began = clock()
        exits.enter_context(student.without_dropout())
        exits.enter_context(student.trained_alone())
        placed = [module for modules in student.modules.values() for module in modules]
        exits.enter_context(narrowed_once([student.model, *placed], hardware.autocast_dtype))
        around = clock() - began
        objective, room = config.objective, {"stack": student.stack.path, "memory": hardware.state_memory}
        compared = tuple(student.windows) if objective.needs_states else ()
        began = clock()
        with hardware.autocast_on(device):
            mine = exits.enter_context(
                taught_states(student.model, batches, student.start, after=compared, what="time", **room)  # type: ignore[arg-type]
            )
        original, began = clock() - began, clock()
        looked_at = taught_states(student.model, [validation], student.start, what="time", **room)  # type: ignore[arg-type]
        its = exits.enter_context(looked_at)
        apart = clock() - began
        began = clock()
        loop = Loop(student, batches, [validation], mine.batches, its.batches, config, _nothing, hardware=hardware)
        around += clock() - began
        seconds(loop.make_step)
        numbers = [
            k for step in range(1, len(batches)) for k in loop.course.batches_of(step)
        ]  # several a step, perhaps
        steps = [seconds(loop.make_step) for _ in batches[1:]]
        looked = seconds(loop.validation_sums)
        loop.weights.clear()
    return TrainingPace(
        original / sum(map(tokens_of, batches)),
        apart / tokens_of(validation),
        sum(steps) / sum(tokens_of(batches[number]) for number in numbers),
        looked / tokens_of(validation),
        around,
        hardware.autocast,
    )


def _nothing(line: str) -> None:
    """Say nothing."""

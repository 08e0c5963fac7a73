"""What a student has to know of a text: its own state at its first change, and what its teacher makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from streamline_hooks.batch import Batch
from streamline_hooks.core.hardware_config import HardwareConfig
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.student import Student
from streamline_hooks.repair.teacher import TaughtStates, taught_states


@contextmanager
def taught_to(
    student: Student,
    batches: Sequence[Batch | Tensor],
    hardware: HardwareConfig,
    *,
    after: tuple[range, ...] = (),
    exits: bool = True,
    what: str = "original",
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[TaughtStates]:
    """Run every batch through the original once, and through the teacher where that is another model.

    Parameters
    ----------
    student : Student
    batches : sequence of mapping or torch.Tensor
    hardware : HardwareConfig
        Memory and data type of the states.
    after, exits, what, say
        See `taught_states`.

    Yields
    ------
    TaughtStates

    Raises
    ------
    StreamlineError
        If states are to be compared with those of another model.
    """
    shared: dict[str, Any] = {"dtype": hardware.kept_dtype, "memory": hardware.state_memory, "say": say}
    own: dict[str, Any] = {**shared, "stack": student.stack.path}
    if student.teacher is student.model:
        with taught_states(student.model, batches, student.start, after=after, exits=exits, what=what, **own) as states:
            yield states
        return
    if after:
        raise StreamlineError(
            f"The loss compares states after windows, and the teacher is another model "
            f"({len(student.teacher_stack)} blocks against {len(student.stack)}), which has no such windows. Compare "
            "what is said: kl, reverse_kl or lm."
        )
    if not exits:
        with taught_states(student.model, batches, student.start, exits=False, what=what, **own) as states:
            yield states
        return
    half = {"memory": hardware.state_memory // 2}  # of one model the entrances, of the other what leaves it
    path = student.teacher_stack.path
    own, other = {**own, **half, "what": f"{what}, entrance"}, {**shared, **half, "stack": path, "what": what}
    with (
        taught_states(student.model, batches, student.start, exits=False, **own) as entrances,
        taught_states(student.teacher, batches, None, **other) as answers,
    ):
        pairs = zip(entrances.batches, answers.batches, strict=True)
        yield replace(answers, start=student.start, batches=[replace(a, exit=b.exit) for a, b in pairs])

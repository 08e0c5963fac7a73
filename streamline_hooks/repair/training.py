"""Train what stands in the windows' places, running only what is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

from torch import Tensor

from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.frozen_products import narrowed_once
from streamline_hooks.repair.objective import Objective
from streamline_hooks.repair.settings import Trained, Training
from streamline_hooks.repair.student import Student
from streamline_hooks.repair.teacher import TaughtStates, taught_states
from streamline_hooks.repair.training_loop import Loop


def train(
    student: Student,
    batches: Sequence[Batch | Tensor],
    validation: Sequence[Batch | Tensor],
    settings: Training | None = None,
    *,
    taught: TaughtStates | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train a student on its own original.

    The original is run once, and no further than it is needed: what comes to the first block that is changed, and
    what the student is compared with, are kept. The student runs on from there, to the end of the last window where
    only states are compared, and else to the head.

    Parameters
    ----------
    student : Student
        Its modules are trained in place; the original is not changed.
    batches : sequence of mapping or torch.Tensor
        Calibration text, in the batches that are run at a time.
    validation : sequence of mapping or torch.Tensor
        Other text, to choose the best weights by.
    settings : Training, optional
    taught : TaughtStates, optional
        What the original does on these batches, where it is known already, see `taught_states`.
    resume : bool
        Go on from `settings.keep_in`. On a CPU the weights come out as they would have without the interruption, to
        the bit.
    say : callable
        Receives lines about what happens.

    Returns
    -------
    Trained

    Raises
    ------
    StreamlineError
        If there is nothing to train or to train on, or what is resumed is another training.

    Notes
    -----
    Ctrl-C ends the training and keeps the best weights so far, and so does a loss that is not finite; `Trained.stopped`
    says so. Where a GPU runs out of memory, batches are run in halves from then on, with the same steps.
    """
    settings = settings or Training()
    if not batches or not validation:
        raise StreamlineError(
            f"A training takes batches to train and others to validate on; got {len(batches)} and {len(validation)}."
        )
    if resume and settings.keep_in is None:
        raise StreamlineError("Nothing says where the training to resume was kept; name the file (keep_in).")
    with ExitStack() as exits:
        exits.enter_context(student.without_dropout())
        exits.enter_context(student.trained_alone())
        if not student.parameters():
            raise StreamlineError(
                "There is no parameter to train: nothing that stands in a window's place has any, and no block that "
                "stays is trained either. Choose a kind with parameters, or healing."
            )
        _require_reached(student, settings.objective)
        placed = [module for modules in student.modules.values() for module in modules]
        exits.enter_context(narrowed_once([student.model, *placed], settings.autocast))
        compared = tuple(student.windows) if settings.objective.needs_states else ()
        logits = settings.objective.needs_original_logits
        if taught is None:
            with settings.products(next(student.model.parameters()).device):
                taught = exits.enter_context(_taught(student, batches, compared, logits, settings, "original"))
        _require_fitting(taught, student, batches, compared, logits)
        apart = exits.enter_context(_taught(student, validation, (), True, settings, "original, validation"))
        return Loop(student, batches, validation, taught.batches, apart.batches, settings, say).run(resume)


def _taught(
    student: Student,
    batches: Sequence[Batch | Tensor],
    after: tuple[range, ...],
    exits: bool,
    settings: Training,
    what: str,
) -> AbstractContextManager[TaughtStates]:
    return taught_states(
        student.model,
        batches,
        student.start,
        after=after,
        exits=exits,
        stack=student.stack.path,
        dtype=settings.state_dtype,
        memory=settings.memory,
        what=what,
    )


def _require_reached(student: Student, objective: Objective) -> None:
    """Raise where some of what is trained comes after all that the objective looks at."""
    end = max((window.stop for window in student.windows), default=0)
    behind = [f"block {k}" for k in student.copies if k >= end] + list(student.outside)
    if behind and not objective.needs_logits:
        raise StreamlineError(
            f"The objective {objective} looks at the states after the windows; {', '.join(behind)}, trained too, would "
            "get no gradient from there. Add kl or lm to it, or heal no blocks behind the last window."
        )


def _require_fitting(
    taught: TaughtStates,
    student: Student,
    batches: Sequence[Batch | Tensor],
    after: tuple[range, ...],
    exits: bool,
) -> None:
    given = (taught.start, taught.after if after else (), taught.exits or not exits, len(taught.batches))
    expected = (student.start, after, True, len(batches))
    if given != expected:
        raise StreamlineError(
            f"The original's states are of block {given[0]} on, after the windows {list(given[1])}, of {given[3]} "
            f"batches{'' if given[2] else ', without its exit'}; expected block {expected[0]}, {list(after)}, "
            f"{expected[3]} batches. Compute them for this student, or leave them out."
        )

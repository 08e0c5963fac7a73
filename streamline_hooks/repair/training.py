"""Train what stands in the windows' places, running only what is needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.core import check_writable
from streamline_hooks.distributed import Together, is_sharded, surgery_on_shards, together
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.repair.frozen_products import narrowed_once
from streamline_hooks.repair.objective import Objective
from streamline_hooks.repair.rollouts import require_writes
from streamline_hooks.repair.settings import Trained, Training
from streamline_hooks.repair.share import Share
from streamline_hooks.repair.stand_in import blocks_of
from streamline_hooks.repair.student import Student
from streamline_hooks.repair.teacher import TaughtStates
from streamline_hooks.repair.teaching import taught_to
from streamline_hooks.repair.training_loop import Loop
from streamline_hooks.surgery.splice import AFTER, BEFORE, spliced


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
    """Train a student on its own original, or on another teacher.

    The original is run once, and no further than it is needed: what comes to the first block that is changed, and
    what the student is compared with, are kept. The student runs on from there, to the end of the last window where
    only states are compared, and else to the head. Where `Training.on_policy` asks for it, some steps are made on what
    the student writes itself, which the original is run on anew.

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
        What the original does on these batches, where it is known already, see `taught_states`; on all of them, also
        where several processes train.
    resume : bool
        Go on from `settings.keep_in`. On a CPU the weights come out as they would have without the interruption, to
        the bit, if there are as many processes as before.
    say : callable
        Receives lines about what happens.

    Returns
    -------
    Trained

    Raises
    ------
    StreamlineError
        If there is nothing to train or to train on, or what is resumed is another training; or, of several processes,
        in all of them if one fails, is gone, or was given something else.

    Notes
    -----
    Ctrl-C ends the training and keeps the best weights so far, and so does a loss that is not finite; `Trained.stopped`
    says so, and `Trained.interrupted` that it was Ctrl-C. KeyboardInterrupt is not raised. Where a GPU runs out of
    memory, batches are run in halves from then on, with the same steps.

    Several processes (an initialised `torch.distributed` group) are each given everything and make the same steps as
    one, each on its sequences of every batch: the loss is the mean over the real tokens of all, gradients are added up
    before they are clipped, and all begin with the first process's weights and end with the same ones, to the bit.
    Against one process that is another order of summing. The first process alone writes the file, draws the bar and
    says anything; the file can be gone on from with any number of processes. The random numbers of dropout follow from
    the seed, the step and the process's number, so that a training that uses any is another one with another number
    of processes; so do those of the texts that a student writes itself (`OnPolicy`). Ctrl-C in one process stops all
    after the same step.

    The model may be sharded by ``fully_shard`` (FSDP2), its blocks and the whole: what is trained is then a module of
    its own, which every process holds whole. Where a process has no sequence of a batch, it runs one along that
    counts for nothing, since the forwards wait for one another. Batches are not run in halves then.
    """
    settings = Training() if settings is None else settings
    with together("train") as work:
        return _train(student, batches, validation, settings, taught, resume, say, work)


@checked()
def _train(
    student: Student,
    batches: Sequence[Batch | Tensor],
    validation: Sequence[Batch | Tensor],
    settings: Training,
    taught: TaughtStates | None,
    resume: bool,
    say: Callable[[str], None],
    work: Together,
) -> Trained:
    began = time.perf_counter()
    if not batches or not validation:
        raise StreamlineError(
            f"A training takes batches to train and others to validate on; got {len(batches)} and {len(validation)}."
        )
    settings.objective.require_task(student.task)
    if settings.on_policy is not None:
        require_writes(student.model, student.task, settings.on_policy, batches)
    student.task.require_fits(student.model)
    if resume and settings.keep_in is None:
        raise StreamlineError("Nothing says where the training to resume was kept; name the file (keep_in).")
    if settings.keep_in is not None:
        file = settings.keep_in
        work.of_first(lambda: check_writable(file))
    sharded = is_sharded(student.model)
    with ExitStack() as exits:
        if sharded:
            _require_whole(student)
            exits.enter_context(surgery_on_shards())
        exits.enter_context(student.without_dropout())
        exits.enter_context(student.trained_alone())
        if not student.parameters():
            raise StreamlineError(
                "There is no parameter to train: nothing that stands in a window's place has any, and no block that "
                "stays is trained either. Choose a kind with parameters, or healing."
            )
        _require_reached(student, settings.objective)
        _require_comparable(student, settings.objective)
        placed = [module for modules in student.modules.values() for module in modules]
        exits.enter_context(narrowed_once([student.model, student.teacher, *placed], settings.autocast))
        compared = tuple(student.windows) if settings.objective.needs_states else ()
        logits = settings.objective.needs_original_logits
        told = say if work.processes.rank == 0 else _nothing
        shares = Share.of(batches, work.processes, sharded), Share.of(validation, work.processes, sharded)
        if taught is None:
            with settings.products(next(student.model.parameters()).device):
                own = list(shares[0].batches.values())
                known: dict[str, Any] = {"after": compared, "exits": logits, "say": told}
                mine = exits.enter_context(taught_to(student, own, settings, **known)).batches
        else:
            _require_fitting(taught, student, batches, compared, logits)
            mine = shares[0].of_taught(taught.batches)
        own = list(shares[1].batches.values())
        apart = exits.enter_context(taught_to(student, own, settings, what="original, validation", say=told)).batches
        more: dict[str, Any] = {"shares": shares, "work": work, "sharded": sharded}
        more["spent"] = time.perf_counter() - began
        return Loop(student, batches, validation, mine, apart, settings, told, **more).run(resume)


def _nothing(line: str) -> None:
    """Say nothing: the first process does."""


def _require_whole(student: Student) -> None:
    """Raise where what is trained is, or would change, a part of a sharded model."""
    kinds = [
        type(one).__name__
        for _, one in student.stand_ins
        if one is not None
        and (not isinstance(one, nn.Module) or is_sharded(one) or bool(blocks_of(student.stack, one)))
    ]
    kinds += ["healing"] if student.copies or student.outside else []
    if kinds:
        raise UnsupportedSurgery(
            f"{type(student.model).__name__} is sharded by fully_shard, and what is to be trained ({kinds[0]}) is made "
            "of its blocks or changes them, of which no process has the whole. Train a module of its own (linear, mlp, "
            "swiglu, or yours), or shard nothing.",
            "sharded",
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


def _require_comparable(student: Student, objective: Objective) -> None:
    """Raise where the state behind a window has passed what earlier surgery put there, in the student alone."""
    stack = student.stack
    ends = [(stack[w.stop], BEFORE) if w.stop < len(stack) else (stack[-1], AFTER) for w in student.windows]
    if objective.needs_states and any(spliced(block, where) for block, where in ends):
        raise UnsupportedSurgery(
            f"The objective {objective} compares the states right behind a window, where earlier surgery has put a "
            "module of its own. Compare what is said (kl, reverse_kl or lm), or choose another window.",
            "spliced",
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

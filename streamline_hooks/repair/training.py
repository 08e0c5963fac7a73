"""Train what stands in the windows' places, running only what is needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch, device_of
from streamline_hooks.core import check_writable
from streamline_hooks.core.hardware_config import HardwareConfig
from streamline_hooks.distributed import DistributedStep, distributed_step
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.repair.callbacks import TrainingCallback
from streamline_hooks.repair.distillation_config import DistillationConfig
from streamline_hooks.repair.objective import Objective
from streamline_hooks.repair.optimisation import narrowed_once
from streamline_hooks.repair.share import Share
from streamline_hooks.repair.stand_in import blocks_of
from streamline_hooks.repair.student import Student
from streamline_hooks.repair.teacher import TaughtStates, taught_to
from streamline_hooks.repair.trained import Trained
from streamline_hooks.repair.training_loop import Loop
from streamline_hooks.surgery.forward_state import evaluation_mode
from streamline_hooks.surgery.splice import AFTER, BEFORE, spliced
from streamline_hooks.wrapping import is_sharded, surgery_on_shards


def train(
    student: Student,
    batches: Sequence[Batch | Tensor],
    validation: Sequence[Batch | Tensor],
    config: DistillationConfig | None = None,
    *,
    hardware: HardwareConfig | None = None,
    taught: TaughtStates | None = None,
    checkpoint: str | Path | None = None,
    callbacks: Sequence[TrainingCallback] = (),
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train the replacements and copies of a student against its teacher.

    The teacher's forward runs once, no further than needed, and its states are cached. The student runs from its first
    change to the end of the last window if only states are compared, else to the head.

    Parameters
    ----------
    student : Student
        Its modules are trained in place; the original is not changed.
    batches : sequence of mapping or torch.Tensor
        Calibration text, in batches as they are run.
    validation : sequence of mapping or torch.Tensor
        Other text, by which the best weights are chosen.
    config : DistillationConfig, optional
    hardware : HardwareConfig, optional
    taught : TaughtStates, optional
        States of the teacher on all of `batches`, if they are cached already, see `taught_states`.
    checkpoint : str or Path, optional
        File to resume from, written every `DistillationConfig.checkpoint_minutes` minutes and at the end.
    callbacks : sequence of TrainingCallback
    resume : bool
        Continue from `checkpoint`; default False. On a CPU the weights are bit-identical to those of an uninterrupted
        run with as many ranks.
    say : callable
        Receives messages.

    Returns
    -------
    Trained

    Raises
    ------
    StreamlineError
        If there is nothing to train or no data, or the checkpoint is of another run. In a distributed run every rank
        raises if one fails or was given something else.

    Notes
    -----
    Ctrl-C or a loss that is not finite ends the run and keeps the best weights, see `Trained.stopped`;
    KeyboardInterrupt is not raised. If a GPU runs out of memory, batches are split, with the same steps.

    In a distributed run every rank is given everything and runs its rows of every batch: the loss is the mean over all
    real tokens, gradients are summed before clipping, and weights start as rank 0's and stay bit-identical on all
    ranks. Rank 0 alone writes the file, shows the bar and reports. The file can be resumed with any number of ranks;
    dropout depends on that number. Ctrl-C on one rank stops all after the same step.

    The model may be sharded by ``fully_shard`` (FSDP2) if the replacement is a module of its own, which every rank
    holds whole. Batches are not split then.
    """
    given: dict[str, Any] = {"hardware": hardware, "checkpoint": checkpoint, "callbacks": callbacks, "taught": taught}
    with distributed_step("train") as work:
        return _train(student, batches, validation, config, resume, say, work, **given)


@checked()
def _train(
    student: Student,
    batches: Sequence[Batch | Tensor],
    validation: Sequence[Batch | Tensor],
    config: DistillationConfig | None,
    resume: bool,
    say: Callable[[str], None],
    work: DistributedStep,
    *,
    hardware: HardwareConfig | None,
    checkpoint: str | Path | None,
    callbacks: Sequence[TrainingCallback],
    taught: TaughtStates | None,
) -> Trained:
    began = time.perf_counter()
    config, hardware = config or DistillationConfig(), hardware or HardwareConfig()
    if not batches or not validation:
        raise StreamlineError(
            f"A training takes batches to train and others to validate on; got {len(batches)} and {len(validation)}."
        )
    config.objective.require_task(student.task)
    student.task.require_fits(student.model)
    if resume and checkpoint is None:
        raise StreamlineError("resume=True without a checkpoint. Expected the file of the run. Pass checkpoint=.")
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None:
        work.broadcast_object(partial(check_writable, file))
    sharded = is_sharded(student.model)
    with ExitStack() as exits:
        if sharded:
            _require_whole(student)
            exits.enter_context(surgery_on_shards())
        exits.enter_context(evaluation_mode(*{student.model, student.teacher}))
        exits.enter_context(student.trained_alone())
        if not student.parameters():
            raise StreamlineError(
                "There is no parameter to train: nothing that stands in a window's place has any, and no block that "
                "stays is trained either. Choose a kind with parameters, or healing."
            )
        _require_reached(student, config.objective)
        _require_comparable(student, config.objective)
        placed = [module for modules in student.modules.values() for module in modules]
        exits.enter_context(narrowed_once([student.model, student.teacher, *placed], hardware.autocast_dtype))
        compared = tuple(student.windows) if config.objective.needs_states else ()
        logits = config.objective.needs_original_logits
        told = say if work.processes.rank == 0 else lambda line: None
        shares = Share.of(batches, work.processes, sharded), Share.of(validation, work.processes, sharded)
        if taught is None:
            with hardware.autocast_on(device_of(student.model)):
                own = list(shares[0].batches.values())
                known: dict[str, Any] = {"after": compared, "exits": logits, "say": told}
                mine = exits.enter_context(taught_to(student, own, hardware, **known)).batches
        else:
            _require_fitting(taught, student, batches, compared, logits)
            mine = shares[0].of_taught(taught.batches)
        own = list(shares[1].batches.values())
        apart = exits.enter_context(taught_to(student, own, hardware, what="original, validation", say=told)).batches
        loop = Loop(
            student,
            batches,
            validation,
            mine,
            apart,
            config,
            told,
            hardware=hardware,
            checkpoint=file,
            callbacks=callbacks,
            shares=shares,
            work=work,
            sharded=sharded,
            spent=time.perf_counter() - began,
        )
        return loop.run(resume)


def _require_whole(student: Student) -> None:
    """Raise if a part of a sharded model would be trained or changed."""
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
    """Raise if a trained module comes after all that the loss sees."""
    end = max((window.stop for window in student.windows), default=0)
    behind = [f"block {k}" for k in student.copies if k >= end] + list(student.outside)
    if behind and not objective.needs_logits:
        raise StreamlineError(
            f"The loss {objective} looks at the states after the windows; {', '.join(behind)}, trained too, would "
            "get no gradient from there. Add kl or lm to it, or heal no blocks behind the last window."
        )


def _require_comparable(student: Student, objective: Objective) -> None:
    """Raise if earlier surgery put a module after a window whose state is compared."""
    stack = student.stack
    ends = [(stack[w.stop], BEFORE) if w.stop < len(stack) else (stack[-1], AFTER) for w in student.windows]
    if objective.needs_states and any(spliced(block, where) for block, where in ends):
        raise UnsupportedSurgery(
            f"The loss {objective} compares the states right behind a window, where earlier surgery has put a "
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

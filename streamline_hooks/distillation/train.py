"""Train replacements and remaining blocks by distillation, running only the blocks that are needed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    DistributedStep,
    HardwareConfig,
    StreamlineError,
    UnsupportedSurgery,
    batches_digest,
    check_writable,
    device_of,
    distributed_step,
    is_sharded,
    surgery_on_shards,
    validate_arguments,
)
from streamline_hooks.distillation.config import DistillationConfig
from streamline_hooks.distillation.loop import RankShare, TrainingLoop
from streamline_hooks.distillation.losses import Objective
from streamline_hooks.distillation.optimizer import cached_autocast_weights, refuse_float16
from streamline_hooks.distillation.progress import TrainingCallback, TrainingResult
from streamline_hooks.distillation.student import Student
from streamline_hooks.distillation.teacher_cache import TeacherCache, cache_for_student
from streamline_hooks.modeling import evaluation_mode, refuse_later_tokens
from streamline_hooks.repair import is_spliced
from streamline_hooks.surgery import AFTER, BEFORE, spliced


def train(
    student: Student,
    batches: Sequence[Batch | Tensor],
    validation: Sequence[Batch | Tensor],
    config: DistillationConfig | None = None,
    *,
    hardware: HardwareConfig | None = None,
    checkpoint_file: str | Path | None = None,
    callbacks: Sequence[TrainingCallback] = (),
    resume: bool = False,
) -> TrainingResult:
    """Train the replacements and copies of a student to match its teacher.

    The teacher runs once, up to the last block needed, and its states are cached. The student runs from its first
    changed block: to the end of the last window if the loss only compares hidden states, and otherwise to the head.

    Parameters
    ----------
    student : Student
        The student. Its modules are trained in place; the model is not changed.
    batches : sequence of mapping or torch.Tensor
        Batches of calibration data.
    validation : sequence of mapping or torch.Tensor
        Batches of other data, on which the best weights are chosen.
    config : DistillationConfig, optional
    hardware : HardwareConfig, optional
    checkpoint_file : str or Path, optional
        File to resume from, written every `DistillationConfig.checkpoint_minutes` minutes and at the end.
    callbacks : sequence of TrainingCallback
    resume : bool
        Whether to continue from `checkpoint_file`; default False. On a CPU the weights are bit-identical to those of an
        uninterrupted run with the same number of ranks.

    Returns
    -------
    TrainingResult

    Raises
    ------
    StreamlineError
        If there is nothing to train, no data, weights or autocast are float16, or the checkpoint file belongs to
        another run. In a distributed run every rank raises if one rank fails or has other arguments.

    Notes
    -----
    Ctrl-C or a non-finite loss ends the run and keeps the best weights, see `TrainingResult.stopped`. KeyboardInterrupt
    is not raised. If a GPU runs out of memory, batches are split; the optimizer steps stay the same.

    In a distributed run pass all arguments to every rank. Each rank runs its rows of every batch, the loss is the mean
    over all real tokens, and gradients are summed before clipping. The weights start as those of rank 0 and stay
    bit-identical on all ranks. Only rank 0 writes the file, shows the progress bar and logs. The file can be resumed
    with any number of ranks, but dropout depends on that number. Ctrl-C on one rank stops all ranks after the
    same step.

    The model may be sharded by ``fully_shard`` (FSDP2) if every replacement is a module without a slot; every rank then
    holds the whole replacement, and batches are not split.

    Examples
    --------
    >>> from streamline_hooks.replacements import LinearReplacement
    >>> from streamline_hooks.testing import tiny_model
    >>> import torch
    >>> student = Student(tiny_model("llama"), [(range(2, 4), LinearReplacement(32))])
    >>> batches = [torch.arange(3, 23).view(2, 10)]
    >>> result = train(student, batches, batches, DistillationConfig(epochs=2, validations=1))
    >>> result.steps, result.tokens, result.stopped
    (2, 40, '')
    """
    options: dict[str, Any] = {"hardware": hardware, "checkpoint_file": checkpoint_file, "callbacks": callbacks}
    with distributed_step("train") as work:
        return _train(student, batches, validation, config, resume, work, **options)


@validate_arguments()
def _train(
    student: Student,
    batches: Sequence[Batch | Tensor],
    validation: Sequence[Batch | Tensor],
    config: DistillationConfig | None,
    resume: bool,
    work: DistributedStep,
    *,
    hardware: HardwareConfig | None,
    checkpoint_file: str | Path | None,
    callbacks: Sequence[TrainingCallback],
) -> TrainingResult:
    start_time = time.perf_counter()
    config, hardware = config or DistillationConfig(), hardware or HardwareConfig()
    if not batches or not validation:
        raise StreamlineError(
            f"train() got {len(batches)} training and {len(validation)} validation batches. Expected at least one of "
            "each. Pass both."
        )
    config.objective.require_task(student.task)
    if config.objective.needs_labels and student.task.is_causal_lm:
        refuse_later_tokens(student.model, f"The loss {config.objective}")
    student.task.check_model(student.model)
    if resume and checkpoint_file is None:
        raise StreamlineError(
            "resume=True without checkpoint_file. Expected the file of an earlier run. Pass checkpoint_file."
        )
    file = None if checkpoint_file is None else Path(checkpoint_file)
    if file is not None:
        work.broadcast_object(partial(check_writable, file))
    sharded = is_sharded(student.model)
    with ExitStack() as exits:
        if sharded:
            _require_whole(student)
            exits.enter_context(surgery_on_shards())
        exits.enter_context(evaluation_mode(*{student.model, student.teacher}))
        exits.enter_context(student.frozen_originals())
        if not student.parameters():
            raise StreamlineError(
                "There is no parameter to train: the replacements have none, and no remaining block is healed. Choose "
                "a kind of replacement with parameters, or pass a HealingConfig."
            )
        _require_reached(student, config.objective)
        _require_comparable(student, config.objective)
        trained_modules = [module for modules in student.modules.values() for module in modules]
        refuse_float16([student.model, *trained_modules], hardware)
        exits.enter_context(
            cached_autocast_weights([student.model, student.teacher, *trained_modules], hardware.autocast_dtype)
        )
        compared_windows = tuple(student.windows) if config.objective.needs_states else ()
        needs_exits = config.objective.needs_original_logits
        rank_share, validation_share = (RankShare.of(part, work.processes, sharded) for part in (batches, validation))
        if (teacher_cache := student.teacher_cache) is None:
            with hardware.autocast_on(device_of(student.model)):
                cached_parts: dict[str, Any] = {"after": compared_windows, "exits": needs_exits}
                cache = cache_for_student(student, list(rank_share.batches.values()), hardware, **cached_parts)
                rows = exits.enter_context(cache).batches
        else:
            _require_fitting(teacher_cache, student, batches, compared_windows, needs_exits)
            rows = [teacher_cache.batches[number].rows(row_slice) for number, row_slice in rank_share.rows.items()]
        validation_cache = cache_for_student(
            student, list(validation_share.batches.values()), hardware, desc="original, validation"
        )
        loop = TrainingLoop(
            student=student,
            batches=batches,
            validation=validation,
            teacher_rows=rows,
            validation_rows=exits.enter_context(validation_cache).batches,
            config=config,
            hardware=hardware,
            checkpoint=file,
            callbacks=callbacks,
            share=rank_share,
            validation_share=validation_share,
            work=work,
            sharded=sharded,
            spent=time.perf_counter() - start_time,
        )
        return loop.run(resume)


def _require_whole(student: Student) -> None:
    """Raise if a training run would train or change blocks of a sharded model."""
    kinds = [
        type(replacement_module).__name__
        for _, replacement_module in student.replacement_modules
        if not is_spliced(student.stack, replacement_module)
        or (isinstance(replacement_module, nn.Module) and is_sharded(replacement_module))
    ]
    kinds += ["healing"] if student.copies or student.outside else []
    if kinds:
        raise UnsupportedSurgery(
            f"{type(student.model).__name__} is sharded by fully_shard, but {kinds[0]} copies or changes its blocks, "
            "and no rank holds a whole block. Expected a replacement without a slot (linear, mlp, swiglu or a custom "
            "module). Choose one, or do not shard the model.",
            "sharded",
        )


def _require_reached(student: Student, objective: Objective) -> None:
    """Raise if the loss does not depend on a trained module."""
    end = max((window.stop for window in student.windows), default=0)
    unreached = [f"block {k}" for k in student.copies if k >= end] + list(student.outside)
    if unreached and not objective.needs_logits:
        raise StreamlineError(
            f"The loss {objective} compares hidden states after the windows, so {', '.join(unreached)} would get no "
            "gradient. Expected a loss on outputs for modules after the last window. Add kl or lm, or do not heal them."
        )


def _require_comparable(student: Student, objective: Objective) -> None:
    """Raise if the student has no states to compare, or an earlier surgery inserted a module after a window."""
    if objective.needs_states and not student.compares_states:
        raise StreamlineError(
            f"The loss {objective} compares hidden states, which a {type(student).__name__} has only for some tokens. "
            "Expected a loss on outputs. Use kl, reverse_kl or lm."
        )
    stack = student.stack
    ends = [(stack[w.stop], BEFORE) if w.stop < len(stack) else (stack[-1], AFTER) for w in student.windows]
    if objective.needs_states and any(spliced(block, position) for block, position in ends):
        raise UnsupportedSurgery(
            f"The loss {objective} compares the hidden states directly after a window, but an earlier surgery inserted "
            "a module there. Use a loss on outputs (kl, reverse_kl or lm), or choose another window.",
            "spliced",
        )


def _require_fitting(
    teacher_cache: TeacherCache,
    student: Student,
    batches: Sequence[Batch | Tensor],
    after: tuple[range, ...],
    exits: bool,
) -> None:
    windows, has_exits = teacher_cache.after if after else (), teacher_cache.exits or not exits
    if (teacher_cache.start, windows, has_exits, len(teacher_cache.batches)) != (
        student.start,
        after,
        True,
        len(batches),
    ):
        raise StreamlineError(
            f"Student.teacher_cache starts at block {teacher_cache.start} and has the windows {list(windows)} and "
            f"{len(teacher_cache.batches)} batches{'' if has_exits else ', without exits'}. Expected block "
            f"{student.start}, the windows {list(after)} and {len(batches)} batches. Cache the states for this "
            "student, or set teacher_cache to None."
        )
    if teacher_cache.data not in ("", batches_digest(batches)):
        raise StreamlineError(
            "Student.teacher_cache has the states of other batches, or of these in another order. Expected those of "
            "the training data. Cache the states of these batches, or set teacher_cache to None."
        )
    blocks = (student.teacher_stack if exits else student.stack).blocks
    if teacher_cache.blocks not in ((), blocks):
        raise StreamlineError(
            "Student.teacher_cache has the states of another model, or of other blocks. Expected those of the "
            f"{type(student.teacher if exits else student.model).__name__} of this student. Cache its states, or set "
            "teacher_cache to None."
        )

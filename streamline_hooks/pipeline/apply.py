"""Apply a selection to a model, train its replacements, and locate training checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from streamline_hooks.core import StreamlineError, UnsupportedSurgery, check_writable, get_logger
from streamline_hooks.distillation import HealingConfig, Student, TrainingCallback, TrainingResult, student_of, train
from streamline_hooks.pipeline.prepare import Preparation
from streamline_hooks.repair import ReplacementConfig, insert_replacement, replace_branches
from streamline_hooks.selection import Selection, VerifiedSelection
from streamline_hooks.surgery import LayerSurgeon

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from streamline_hooks.pipeline.config import CompressionConfig

logger = get_logger(__name__)


def first_applicable(model: nn.Module, verified: list[VerifiedSelection], stack: str) -> VerifiedSelection:
    """Return the best selection that can be applied.

    Applying a selection compares the model without the blocks with the model that bypasses them, which verification
    does not.
    """
    refusal: UnsupportedSurgery | None = None
    for selection in verified:
        if not (selection.refused or math.isfinite(selection.distance)):
            continue
        try:
            with LayerSurgeon(model, stack) as surgeon:
                apply_selection(surgeon, selection)
                return selection
        except UnsupportedSurgery as error:
            refusal = refusal or error
            logger.info(f"skipped    {selection}: {error}")
    assert refusal is not None
    raise refusal


def apply_selection(surgeon: LayerSurgeon, selection: VerifiedSelection) -> None:
    """Remove the windows, zero the branches, and insert the replacements of a selection."""
    if selection.refused:
        raise UnsupportedSurgery(selection.refused)
    replace_branches(surgeon, selection.maps)  # before modules are spliced in at these blocks
    for repair in selection.repairs:
        insert_replacement(surgeon, repair.window, repair.replacement_module)
    for k, branch in selection.zeroed:
        surgeon.zero_branch(k, branch)  # no effect on a branch that a map replaces


def has_replacement(selection: VerifiedSelection) -> bool:
    """Whether a selection has at least one replacement."""
    return bool(selection.maps) or any(repair.replacement_module is not None for repair in selection.repairs)


def describe_repair(
    selection: VerifiedSelection, kind: ReplacementConfig, trained: TrainingResult | None = None
) -> str:
    """Describe how a selection was repaired; empty if it has no replacement and nothing was trained."""
    if trained is not None and trained.best_step:
        return "trained"
    if not has_replacement(selection):
        return ""
    return "in closed form" if kind.is_solved or kind.fit is not None else "as it is"


def training_file(output: str | Path) -> Path:
    """Return the default path of the training checkpoint for an output folder.

    Examples
    --------
    >>> training_file("models/small").name
    'small.training'
    """
    folder = Path(output)
    return folder.with_name(f"{folder.name}.training")


def round_files(rounds: int, output: str | Path | None, file: str | Path | None) -> list[Path]:
    """Return the path of each round's training checkpoint, or no paths without `output` and `file`."""
    if file is None and output is None:
        return []
    base = Path(file) if file is not None else training_file(str(output))
    paths = [base.with_name(f"{base.name}.round-{number}") for number in range(1, rounds + 1)]
    for path in paths:
        check_writable(path)
    return paths


def training_checkpoint(
    config: CompressionConfig, resume: bool, output: str | Path | None, file: str | Path | None
) -> Path | None:
    """Return the path of the training checkpoint, by default next to the output folder, or None."""
    if config.distillation is None:
        if resume or file is not None:
            argument = "resume" if resume else f"checkpoint_file={str(file)!r}"
            raise StreamlineError(
                f"compress: {argument} was given, but the config has no distillation. Expected a DistillationConfig. "
                "Set distillation, or leave the argument out."
            )
        return None
    if resume and config.train_until is not None:
        raise StreamlineError(
            f"compress: resume was given with train_until={config.train_until}, which counts from the start of the "
            "interrupted run. Expected only one of the two. Leave train_until out, or limit the whole training run "
            "with DistillationConfig(max_minutes=...)."
        )
    path = training_file(output) if file is None and output is not None else file and Path(file)
    if resume and not (path and path.is_file()):
        raise StreamlineError(
            f"compress: resume was given, but there is no training checkpoint at {path or 'any path'}. Expected an "
            "existing file. Leave resume out to start a training run, or set checkpoint_file."
        )
    if path:
        check_writable(path)
    if path and not resume:
        refuse_earlier_run(path)
    return path or None


def refuse_earlier_run(path: Path) -> None:
    """Raise if a training checkpoint exists, which a new training run would overwrite."""
    if path.is_file():
        raise StreamlineError(
            f"compress: {path} is the training checkpoint of an earlier run, which a new run would overwrite. "
            "Expected no such file without resume. Set resume (--resume) to continue that run, or delete the file."
        )


def require_committable(ready: Preparation) -> None:
    """Raise if the replacement would be quantized when the checkpoint of a model of bitsandbytes is loaded."""
    method = getattr(ready.stack.model, "quantization_method", None)
    is_splice = ready.size.parameters > 0 and ready.size.slots == 0
    if is_splice and getattr(method, "value", method) == "bitsandbytes":
        raise UnsupportedSurgery(
            f"{type(ready.stack.model).__name__} is quantized with bitsandbytes, which would quantize the replacement "
            f"{ready.kind.name!r} when the checkpoint is loaded. Expected none, scale or block. Choose one, or "
            "compress the model in full precision and load its checkpoint with quantization_config.",
            "quantized",
        )


def require_trainable(ready: Preparation, healing: HealingConfig | None) -> None:
    """Raise if the config trains nothing, whichever blocks are removed, or heals quantized weights."""
    if healing is not None and any(not p.is_floating_point() for b in ready.stack.blocks for p in b.parameters()):
        raise StreamlineError(
            f"{type(ready.stack.model).__name__} has quantized weights, which cannot be healed in place. Expected "
            "floating-point weights with healing. Load the model without load_in, or train adapters with student_of "
            "and train, and add them to the model in full precision (Student.add_adapters_to)."
        )
    if healing is None and not ready.size.parameters:
        raise StreamlineError(
            f"There is nothing to train: the replacement {ready.kind.name!r} has no parameters, and healing is not "
            "set. Choose a replacement with parameters, or set healing."
        )


def trainable_windows(ready: Preparation, healing: HealingConfig | None) -> Preparation:
    """Keep only the candidate windows whose removal leaves something to train, if there are any."""
    trainable = [window for window in ready.candidates if _is_trainable(ready, healing, [window])]
    if not trainable or len(trainable) == len(ready.candidates):
        return ready
    dropped = len(ready.candidates) - len(trainable)
    logger.info(
        f"left out   {dropped} of {len(ready.candidates)} windows: nothing could be trained after their removal"
    )
    return replace(ready, candidates=trainable)


def trainable_selections(
    selections: Sequence[Selection], ready: Preparation, healing: HealingConfig | None
) -> list[Selection]:
    """Return the selections whose application leaves something to train; raise if there are none."""
    trainable = [selection for selection in selections if _is_trainable(ready, healing, selection.windows)]
    if not trainable:
        assert healing is not None
        raise StreamlineError(
            f"There is nothing to train after the removal of {selections[0]} or of another of {len(selections)} "
            f"selections: the replacement {ready.kind.name!r} has {ready.size.parameters:,} parameters, and "
            f"healing.where={healing.where!r} matches no block. Choose a replacement with parameters, or heal other "
            "blocks (healing.where)."
        )
    return trainable


def _is_trainable(ready: Preparation, healing: HealingConfig | None, windows: Sequence[range]) -> bool:
    return is_trainable(len(ready.stack), ready.size.parameters, healing, windows)


def is_trainable(length: int, parameters: int, healing: HealingConfig | None, windows: Sequence[range]) -> bool:
    """Whether something is left to train after a removal; healing other than ``where="after"`` must match a block.

    `length` is the number of blocks, and `parameters` the number of parameters of the replacement.
    """
    heals = _heals(length, healing, windows)
    if healing is not None and not heals and healing.where != "after":
        return False
    return heals or bool(parameters)


def has_healing(ready: Preparation, healing: HealingConfig | None, windows: Sequence[range]) -> bool:
    """Whether healing matches a block or trains the head."""
    return _heals(len(ready.stack), healing, windows)


def _heals(length: int, healing: HealingConfig | None, windows: Sequence[range]) -> bool:
    return healing is not None and (healing.head or bool(healing.blocks(length, windows)))


def train_selection(
    ready: Preparation,
    best: VerifiedSelection,
    config: CompressionConfig,
    teacher: PreTrainedModel | None,
    checkpoint: Path | None,
    *,
    resume: bool,
    callbacks: Sequence[TrainingCallback],
) -> tuple[Student, TrainingResult]:
    """Train the replacements of a selection in place, without changing the model."""
    assert config.distillation is not None
    pairs = [(repair.window, repair.replacement_module) for repair in best.repairs]
    healing = config.healing
    if healing is not None and not has_healing(ready, healing, best.windows):
        logger.info(f"healing    skipped: there is no block after {best}; only the replacement is trained")
        healing = None
    seed = config.distillation.seed or 0
    student = student_of(ready.stack, pairs, healing, seed=seed, task=ready.task, teacher=teacher)
    # They determine the initial weights, which the training file replaces.
    student.settings += (f"repair={config.repair.to_dict()}", f"fitting_tokens={config.data.fitting_tokens}")
    trained = train(
        student,
        ready.training,
        ready.validation,
        config.distillation,
        hardware=config.hardware,
        checkpoint_file=checkpoint,
        callbacks=callbacks,
        resume=resume,
    )
    logger.info(f"trained    {trained}")
    student.merge()
    return student, trained

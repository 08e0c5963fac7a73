"""Train the replacements of a selection, and resume from a training checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from streamline_hooks.core import check_writable
from streamline_hooks.errors import StreamlineError
from streamline_hooks.preparation import Preparation
from streamline_hooks.repair import (
    DistillationConfig,
    HealingConfig,
    Student,
    Trained,
    TrainingCallback,
    student_of,
    train,
)
from streamline_hooks.selection import Selection, VerifiedSelection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from streamline_hooks.pipeline.config import CompressionConfig


def training_file(output: str | Path) -> Path:
    """Where a training is kept that writes to a folder in the end."""
    folder = Path(output)
    return folder.with_name(f"{folder.name}.training")


def round_files(rounds: int, output: str | Path | None, given: str | Path | None) -> list[Path]:
    """Return the file of each round's training, none without an output or a given file; raise if one is unwritable."""
    if given is None and output is None:
        return []
    base = Path(given) if given is not None else training_file(str(output))
    files = [base.with_name(f"{base.name}.round-{number}") for number in range(1, rounds + 1)]
    for file in files:
        check_writable(file)
    return files


def training_checkpoint(
    config: CompressionConfig, resume: bool, output: str | Path | None, given: str | Path | None
) -> Path | None:
    """Return the file to resume training from: the given one, or the one beside the output; raise if it is unusable."""
    if config.distillation is None:
        if resume or given is not None:
            what = "resume" if resume else f"checkpoint={str(given)!r}"
            raise StreamlineError(
                f"compress: {what} is for a training, and the config has none. Expected a DistillationConfig. Set "
                "distillation, or leave it out."
            )
        return None
    if resume and config.train_until is not None:
        raise StreamlineError(
            f"compress: resume was given with train_until={config.train_until}, which limits a training from its "
            "start. Expected one of them. Leave it out, or limit the training as a whole with "
            "DistillationConfig(max_minutes=...)."
        )
    file = training_file(output) if given is None and output is not None else given and Path(given)
    if resume and not (file and file.is_file()):
        raise StreamlineError(
            f"There is no training to resume at {file or 'any place'}. Leave resume out to begin one, or name its "
            "checkpoint."
        )
    if file:
        check_writable(file)
    return file or None


def require_parameters(ready: Preparation, healing: HealingConfig | None) -> None:
    """Raise where there is nothing to train, whichever blocks go."""
    if healing is None and not ready.size.parameters:
        raise StreamlineError(
            f"The kind {ready.kind.name!r} has nothing to train, and no block that stays is trained either. Choose a "
            "kind with parameters, or healing."
        )


def trainable_windows(ready: Preparation, healing: HealingConfig | None, say: Callable[[str], None]) -> Preparation:
    """Only windows without which something can be trained, of a search for single ones; all where there are none."""
    left = [window for window in ready.candidates if _trains(ready, healing, [window])]
    if not left or len(left) == len(ready.candidates):
        return ready
    out = len(ready.candidates) - len(left)
    say(f"left out   {out} of {len(ready.candidates)} windows, without which nothing is there to be trained or healed")
    return replace(ready, candidates=left)


def trainable(found: Sequence[Selection], ready: Preparation, healing: HealingConfig | None) -> list[Selection]:
    """Return the selections that can be trained; raise before any is fitted if there are none."""
    left = [one for one in found if _trains(ready, healing, one.windows)]
    if not left:
        assert healing is not None
        raise StreamlineError(
            f"There is nothing to train where {found[0]} or another of {len(found)} selections goes: the kind "
            f"{ready.kind.name!r} has {ready.size.parameters:,} parameters, and healing of the blocks "
            f"{healing.where!r} finds none. Choose a kind with parameters, or heal other blocks (beside, all)."
        )
    return left


def _trains(ready: Preparation, healing: HealingConfig | None, windows: Sequence[range]) -> bool:
    """Whether there is something to train, and all that was asked for can be; behind a window may be nothing."""
    healed = _heals(ready, healing, windows)
    if healing is not None and not healed and healing.where != "after":
        return False
    return healed or bool(ready.size.parameters)


def _heals(ready: Preparation, healing: HealingConfig | None, windows: Sequence[range]) -> bool:
    """Whether anything that stays is trained."""
    return healing is not None and (healing.head or bool(healing.blocks(len(ready.stack), windows)))


def ending_in(distillation: DistillationConfig, seconds: float | None) -> DistillationConfig:
    """Return the config of a training that ends by then, if it does not end before."""
    if seconds is None:
        return distillation
    minutes, most = seconds / 60, distillation.max_minutes
    return replace(distillation, max_minutes=minutes if most is None else min(minutes, most))


def train_selection(
    ready: Preparation,
    best: VerifiedSelection,
    config: CompressionConfig,
    teacher: PreTrainedModel | None,
    checkpoint: Path | None,
    *,
    resume: bool,
    callbacks: Sequence[TrainingCallback],
    say: Callable[[str], None],
) -> tuple[Student, Trained]:
    """Train the replacements of a selection, which are changed in place; the model is not."""
    assert config.distillation is not None
    pairs = [(repair.window, repair.stand_in) for repair in best.repairs]
    healing = config.healing
    if healing is not None and not _heals(ready, healing, best.windows):
        say(f"No block is behind {best}, so that the repair is trained alone.")
        healing = None
    seed = config.distillation.seed or 0
    student = student_of(ready.stack, pairs, healing, seed=seed, task=ready.task, teacher=teacher)
    trained = train(
        student,
        ready.training,
        ready.validation,
        config.distillation,
        hardware=config.hardware,
        checkpoint=checkpoint,
        callbacks=callbacks,
        resume=resume,
        say=say,
    )
    say(f"trained    {trained}")
    student.merge()
    return student, trained

"""The training of what is put in the place of blocks: where it is kept to go on from, and how it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.preparation import Preparation
from streamline_hooks.repair import Healing, Student, Trained, Training, student_of, train
from streamline_hooks.selection import VerifiedSelection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def training_file(output: str | Path) -> Path:
    """Where a training is kept that writes to a folder in the end."""
    folder = Path(output)
    return folder.with_name(f"{folder.name}.training")


def kept_training(
    training: Training | None, healing: Healing | None, resume: bool, output: str | Path | None
) -> Training | None:
    """The training with a file to go on from, where there is a folder to keep it beside."""
    if training is None:
        if healing is not None or resume:
            what = "healing" if healing is not None else "resume"
            raise StreamlineError(f"{what} is a part of a training, and none was asked for; give training=Training().")
        return None
    if training.keep_in is None and output is not None:
        training = replace(training, keep_in=training_file(output))
    if resume and not (training.keep_in and training.keep_in.is_file()):
        raise StreamlineError(
            f"There is no training to resume at {training.keep_in or 'any place (keep_in)'}; leave resume out to begin "
            "one."
        )
    return training


def train_selection(
    ready: Preparation,
    best: VerifiedSelection,
    training: Training,
    healing: Healing | None,
    teacher: PreTrainedModel | None,
    resume: bool,
    say: Callable[[str], None],
) -> tuple[Student, Trained]:
    """Train the repairs of a selection, which are changed in place; the model is not."""
    if best.silenced:
        raise UnsupportedSurgery(
            "What stands in the place of an attention or an MLP alone is not trained: it is fitted in closed form. "
            "Leave the training out, or search for windows."
        )
    pairs = [(repair.window, repair.stand_in) for repair in best.repairs]
    if healing is not None and healing.where == "after" and not healing.blocks(len(ready.stack), best.windows):
        say(f"No block is behind {best}, so that the repair is trained alone.")
        healing = None
    student = student_of(ready.stack, pairs, healing, seed=training.seed, task=ready.task, teacher=teacher)
    trained = train(student, ready.training, ready.validation, training, resume=resume, say=say)
    say(f"trained    {trained}")
    student.merge()
    return student, trained

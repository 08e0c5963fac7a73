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

_LEAST = 1e-3  # seconds: no time is no setting


def training_file(output: str | Path) -> Path:
    """Where a training is kept that writes to a folder in the end."""
    folder = Path(output)
    return folder.with_name(f"{folder.name}.training")


def kept_training(
    training: Training | None,
    healing: Healing | None,
    resume: bool,
    output: str | Path | None,
    until: float | None = None,
) -> Training | None:
    """The training with a file to go on from, where there is a folder to keep it beside."""
    if training is None:
        asked = {"healing": healing is not None, "resume": resume, "train_until": until is not None}
        if what := next((name for name, there in asked.items() if there), ""):
            raise StreamlineError(f"{what} is a part of a training, and none was asked for; give training=Training().")
        return None
    if resume and until is not None:
        raise StreamlineError(
            "train_until is for a training from its beginning: of one that is resumed the seconds before count too. "
            "Leave it out, or say how many minutes both together may take (Training.minutes)."
        )
    if training.keep_in is None and output is not None:
        training = replace(training, keep_in=training_file(output))
    if resume and not (training.keep_in and training.keep_in.is_file()):
        raise StreamlineError(
            f"There is no training to resume at {training.keep_in or 'any place (keep_in)'}; leave resume out to begin "
            "one."
        )
    return training


def with_something_to_train(ready: Preparation, healing: Healing | None, say: Callable[[str], None]) -> Preparation:
    """Only windows with a block behind them, where such blocks are all that is trained."""
    last = len(ready.stack) - 1
    behind = healing is not None and healing.where == "after" and not healing.head
    if not behind or ready.size.parameters or last in ready.protected:
        return ready
    left = [window for window in ready.candidates if last not in window]
    if not left:
        raise StreamlineError(
            f"The kind {ready.kind.name!r} has nothing to train, and no block is behind {ready.candidates[0]}, the one "
            "window there is, to be healed. Choose a kind with parameters, or heal other blocks (beside, all)."
        )
    say(f"keep       the last block too: {ready.kind.name} has nothing to train, and healed is what is behind it")
    return replace(ready, candidates=left, protected=ready.protected | {last})


def ending_in(training: Training, seconds: float | None) -> Training:
    """The training that ends by then, if it does not before; where none are left, before its first step."""
    if seconds is None:
        return training
    minutes = max(seconds, _LEAST) / 60
    return replace(training, minutes=minutes if training.minutes is None else min(minutes, training.minutes))


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

"""The training of what is put in the place of blocks: where it is kept to go on from, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from streamline_hooks.core import check_writable
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.preparation import Preparation
from streamline_hooks.repair import Healing, Student, Trained, Training, student_of, train
from streamline_hooks.selection import SearchConfig, Selection, VerifiedSelection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    if until is not None and not until > 0:
        raise StreamlineError(f"train_until={until} leaves no time to train in; expected seconds above 0, or None.")
    if training.keep_in is None and output is not None:
        training = replace(training, keep_in=training_file(output))
    if resume and not (training.keep_in and training.keep_in.is_file()):
        raise StreamlineError(
            f"There is no training to resume at {training.keep_in or 'any place (keep_in)'}; leave resume out to begin "
            "one."
        )
    if training.keep_in is not None:
        check_writable(training.keep_in)
    return training


def require_parameters(ready: Preparation, healing: Healing | None) -> None:
    """Raise where there is nothing to train, whichever blocks go."""
    if healing is None and not ready.size.parameters:
        raise StreamlineError(
            f"The kind {ready.kind.name!r} has nothing to train, and no block that stays is trained either. Choose a "
            "kind with parameters, or healing."
        )


def require_whole_blocks(search: SearchConfig) -> None:
    """Raise if a search gives up attentions or MLPs alone."""
    if search.silences_branches:
        raise UnsupportedSurgery(
            "What stands in the place of an attention or an MLP alone is not trained: it is fitted in closed form. "
            "Leave the training out, or search for windows."
        )


def trainable_windows(ready: Preparation, healing: Healing | None, say: Callable[[str], None]) -> Preparation:
    """Only windows without which something can be trained, of a search for single ones; all where there are none."""
    left = [window for window in ready.candidates if _trains(ready, healing, [window])]
    if not left or len(left) == len(ready.candidates):
        return ready
    out = len(ready.candidates) - len(left)
    say(f"left out   {out} of {len(ready.candidates)} windows, without which nothing is there to be trained or healed")
    return replace(ready, candidates=left)


def trainable(found: Sequence[Selection], ready: Preparation, healing: Healing | None) -> list[Selection]:
    """The selections that can be trained.

    Raises
    ------
    StreamlineError
        If there are none, before any is fitted.
    """
    left = [one for one in found if _trains(ready, healing, one.windows)]
    if not left:
        assert healing is not None
        raise StreamlineError(
            f"There is nothing to train where {found[0]} or another of {len(found)} selections goes: the kind "
            f"{ready.kind.name!r} has {ready.size.parameters:,} parameters, and healing of the blocks "
            f"{healing.where!r} finds none. Choose a kind with parameters, or heal other blocks (beside, all)."
        )
    return left


def _trains(ready: Preparation, healing: Healing | None, windows: Sequence[range]) -> bool:
    """Whether there is something to train, and all that was asked for can be; behind a window may be nothing."""
    healed = _heals(ready, healing, windows)
    if healing is not None and not healed and healing.where != "after":
        return False
    return healed or bool(ready.size.parameters)


def _heals(ready: Preparation, healing: Healing | None, windows: Sequence[range]) -> bool:
    """Whether anything that stays is trained."""
    return healing is not None and (healing.head or bool(healing.blocks(len(ready.stack), windows)))


def ending_in(training: Training, seconds: float | None) -> Training:
    """The training that ends by then, if it does not before."""
    if seconds is None:
        return training
    minutes = seconds / 60
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
    pairs = [(repair.window, repair.stand_in) for repair in best.repairs]
    if healing is not None and not _heals(ready, healing, best.windows):
        say(f"No block is behind {best}, so that the repair is trained alone.")
        healing = None
    student = student_of(ready.stack, pairs, healing, seed=training.seed, task=ready.task, teacher=teacher)
    trained = train(student, ready.training, ready.validation, training, resume=resume, say=say)
    say(f"trained    {trained}")
    student.merge()
    return student, trained

"""Make a model that was built anew what a model that is no Transformers model was when it was saved.

All that can be wrong is looked for while a surgeon is open, so that a model that does not fit is left as it was. Only
then is the surgery kept, and the weights are put in.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from streamline_hooks.checkpoint.held_tensors import require_in_memory
from streamline_hooks.checkpoint.plain_writing import class_name
from streamline_hooks.checkpoint.safety import PLAIN, check_folder
from streamline_hooks.checkpoint.saved_tensors import SavedTensors
from streamline_hooks.checkpoint.settings import Settings, below, difference, from_json, settings_of
from streamline_hooks.errors import StreamlineError
from streamline_hooks.stack import find_stack
from streamline_hooks.surgery import LayerSurgeon, SurgeryPlan
from streamline_hooks.surgery.edits import RECORD
from streamline_hooks.surgery.plain_module import PLAIN_FORMAT, Composed, composed
from streamline_hooks.surgery.renumber import find_index_attributes
from streamline_hooks.surgery.replay import replay
from streamline_hooks.surgery.splice import AFTER, BEFORE

_Model = TypeVar("_Model", bound=nn.Module)


def load_into(folder: Path, model: _Model) -> _Model:
    """Make a model that was built anew the one that was saved, to the bit.

    Parameters
    ----------
    folder : Path
    model : torch.nn.Module
        Of the original architecture, with as many blocks as it had before the surgery.

    Returns
    -------
    torch.nn.Module
        The model itself, in evaluation mode, on the devices where it was, in the precision that was saved.

    Raises
    ------
    StreamlineError
        If the folder is damaged, or the model is not the original architecture. The model is left as it was.
    """
    content = check_folder(folder, described_by=PLAIN)
    said, states, settings = _described(folder / PLAIN, content)
    _require_original(folder, content, model)
    saved = SavedTensors.read(folder, content)
    with ExitStack() as opened:
        surgeons = []
        for state, stack in zip(states, said["stacks"], strict=True):
            surgeon = opened.enter_context(_surgeon(folder, content, model, state))
            blocks = _Blocks(folder / PLAIN, surgeon, state, [below(settings, p) for p in _paths(stack)])
            replay(surgeon, state, stack["splices"], blocks.copied)
            surgeons.append(surgeon)
        saved.require_fitting(model)
        differs = difference(settings, settings_of(model))
        if differs is not None:
            raise StreamlineError(
                f"{folder / PLAIN}: this {type(model).__name__} is not built as the one that was saved: {differs}. "
                "Build it with the same settings; where this one changes nothing of what is computed, set it first."
            )
        for surgeon in surgeons:
            surgeon.commit()
    vars(model)[RECORD] = {"format": said["format"], "history": said["history"]}
    saved.put_into(model)
    return model.eval()


def _described(file: Path, content: dict[str, Any]) -> tuple[dict[str, Any], list[Composed], Settings]:
    """What the file says of the surgeries, what these came to, and the settings of the modules."""
    said = content.get("streamline_hooks")
    if isinstance(said, dict) and said.get("format", 0) > PLAIN_FORMAT:
        raise StreamlineError(
            f"{file} has the format {said['format']}; this version of streamline_hooks reads up to {PLAIN_FORMAT}. "
            "Upgrade streamline_hooks."
        )
    try:
        states = composed([SurgeryPlan.from_dict(entry) for entry in content["streamline_hooks"]["history"]])
        settings = from_json(content["settings"])
        stacks = [(stack["stack"], len(stack["blocks"]), stack["splices"]) for stack in said["stacks"]]  # type: ignore[index]
        lists = isinstance(content["buffers"], list) and isinstance(content["class"], str)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise StreamlineError(
            f"{file} is not what streamline_hooks.save writes: {type(error).__name__}: {error}. Copy the folder again."
        ) from error
    if not lists or [(path, length) for path, length, _ in stacks] != [(s.stack, len(s.slots)) for s in states]:
        raise StreamlineError(
            f"{file}, streamline_hooks.stacks: it speaks of other blocks than the history in it. The file was changed "
            "since it was written; copy the folder again."
        )
    return said, states, settings  # type: ignore[return-value]


def _require_original(folder: Path, content: dict[str, Any], model: nn.Module) -> None:
    """Raise unless a model may be the original architecture, built anew."""
    expected, given = content["class"], class_name(model)
    # A class of a script is in __main__, and libraries move theirs about: the name alone must be the same.
    if _last(expected) != _last(given):
        raise StreamlineError(
            f"{folder} holds a {expected}; into= is a {given}. Build the original architecture anew, with as many "
            "blocks as it had before the surgery, and give that."
        )
    changed = RECORD in vars(model) or any({BEFORE, AFTER} & set(module._modules) for module in model.modules())
    if changed:
        raise StreamlineError(
            f"into= is a {type(model).__name__} that was operated on already. Build the original architecture anew, "
            "and give that."
        )
    require_in_memory(model)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _surgeon(folder: Path, content: dict[str, Any], model: nn.Module, state: Composed) -> LayerSurgeon:
    try:
        find_stack(model, state.stack)
    except StreamlineError as error:
        raise StreamlineError(
            f"{folder} holds a {content['class']} with blocks in {state.stack}; into= is a {class_name(model)} that "
            f"has none there. Build the original architecture anew. ({error})"
        ) from error
    return LayerSurgeon(model, state.stack, probe=False)


def _paths(stack: Mapping[str, Any]) -> list[str]:
    """The paths of a stack's blocks as they were when the model was saved."""
    return [f"{stack['stack']}.{name}" for name in stack["blocks"]]


class _Blocks:
    """Copies of a model's own blocks, for slots that are none of the original's.

    Parameters
    ----------
    file : Path
        What describes the model.
    surgeon : LayerSurgeon
        Open on the model that was built anew.
    state : Composed
    settings : sequence of Settings
        Of each block that was saved.
    """

    def __init__(self, file: Path, surgeon: LayerSurgeon, state: Composed, settings: Sequence[Settings]) -> None:
        self.file, self.blocks, self.state, self.settings = file, surgeon.stack.blocks, state, settings
        self.numbers = {(index.path, index.name) for index in find_index_attributes(self.blocks)}

    def copied(self, number: int, origins: Sequence[int]) -> nn.Module:
        """A copy of the likeliest of some blocks that is built as the one that was saved."""
        wanted, reason = self.state.slots[number][1], ""
        for origin in origins:
            differs = difference(self.settings[number], settings_of(self.blocks[origin]), self.numbers)
            if differs is None:
                return copy.deepcopy(self.blocks[origin])
            reason = reason or f"in block {origin}, {differs}"
        raise StreamlineError(
            f"{self.file}: block {number} of {self.state.stack}, a {wanted}, was put in and is built as no block of "
            f"this model is: {reason}. Only copies of the model's own blocks can be put in again. Build the model with "
            "the same settings; or keep the surgery in memory, or register the module as a kind of replacement "
            "(register_module) and splice it in."
        )

"""Save a model outside Transformers, and load it into its newly built original architecture.

Such a model has no config, and no code is saved that could build it. The settings of its modules (heads, activations,
...) are therefore saved and compared at loading, because an architecture with the same shapes but other settings would
accept the weights and compute other outputs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from inspect import isbuiltin, isfunction
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from streamline_hooks.checkpoint.module_tensors import (
    SavedTensors,
    full_state_dict,
    named_tensors,
    non_persistent_buffers,
    without_overlap,
)
from streamline_hooks.checkpoint.safety import DESCRIPTION, WEIGHTS, check_folder
from streamline_hooks.core import StreamlineError
from streamline_hooks.modeling import find_stack
from streamline_hooks.surgery import (
    AFTER,
    BEFORE,
    PLAIN_FORMAT,
    RECORD,
    CombinedPlan,
    LayerSurgeon,
    SurgeryPlan,
    combine_plans,
    committed_surgeries,
    describe_stacks,
    find_index_attributes,
    replay_surgeries,
)

_Model = TypeVar("_Model", bound=nn.Module)
Settings = dict[str, dict[str, Any]]
"""By module path: the class name (``"class"``) and attributes that are numbers, short strings or lists of these."""

# Parts of names of attributes that have no effect in evaluation mode after loading, or depend on the machine.
_INCIDENTAL = ("drop", "checkpoint", "fused", "training", "init")
_LONGEST = 64


def write_module(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Write the weights and the description of a model with committed surgery; return the description."""
    stacks = describe_stacks(model)
    buffers = {name: tensor for name, tensor in non_persistent_buffers(model).items() if tensor is not None}
    for name, tensor in buffers.items():
        if tensor.is_meta:
            raise StreamlineError(
                f"The non-persistent buffer {name} of this {type(model).__name__} is on the meta device, so its values "
                "are lost. Expected buffers in memory. Offload without buffers, or save before offloading."
            )
    paths: dict[str, list[str]] = {}  # settings shared by several modules are written once
    for path, values in module_settings(model).items():
        paths.setdefault(json.dumps(values), []).append(path)
    content = {
        "class": _class_name(model),
        "streamline_hooks": {"format": PLAIN_FORMAT, "stacks": stacks, "history": committed_surgeries(model)},
        "buffers": list(buffers),
        "settings": [{"of": module_paths, "set": json.loads(values)} for values, module_paths in paths.items()],
    }
    save_model(_Holder(without_overlap({**full_state_dict(model), **buffers})), str(folder / WEIGHTS))
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


class _Holder(nn.Module):
    """Module whose state dict includes non-persistent buffers, for `save_model`."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return dict(self._tensors)


def load_module(folder: Path, model: _Model) -> _Model:
    """Load a saved model, bit for bit, into its newly built original architecture, on the devices of the model.

    Everything is checked while the surgeons are open, so a model that does not fit is not changed.
    """
    content = check_folder(folder, described_by=DESCRIPTION)
    states, stacks, settings = _description(folder / DESCRIPTION, content)
    _check_original(folder, content, model)
    saved = SavedTensors.read(folder, content)
    with ExitStack() as exits:
        surgeons = []
        for state, stack in zip(states, stacks, strict=True):
            surgeon = exits.enter_context(_surgeon(folder, content, model, state))
            paths = [f"{stack['stack']}.{name}" for name in stack["blocks"]]
            blocks = [
                {k.removeprefix(path).lstrip("."): v for k, v in settings.items() if f"{k}.".startswith(f"{path}.")}
                for path in paths
            ]
            replay_surgeries(
                surgeon, state, stack["splices"], _block_copier(folder / DESCRIPTION, surgeon, state, blocks)
            )
            surgeons.append(surgeon)
        saved.check_fit(model)
        mismatch = _mismatch(settings, module_settings(model))
        if mismatch is not None:
            raise StreamlineError(
                f"{folder / DESCRIPTION}: this {type(model).__name__} has other settings than the saved model: "
                f"{mismatch}. Build it with the same settings. If the setting does not affect the outputs, set the "
                "attribute to the saved value before loading."
            )
        for surgeon in surgeons:
            surgeon.commit()
    vars(model)[RECORD] = {key: content["streamline_hooks"][key] for key in ("format", "history")}
    saved.load_into(model)
    return model.eval()


def _description(file: Path, content: dict[str, Any]) -> tuple[list[CombinedPlan], list[dict[str, Any]], Settings]:
    """Return the combined plans, saved stacks and module settings of a description; raise if it is damaged."""
    record = content.get("streamline_hooks")
    if isinstance(record, dict) and record.get("format", 0) > PLAIN_FORMAT:
        raise StreamlineError(
            f"{file} has the format {record['format']}. This version of streamline_hooks reads formats up to "
            f"{PLAIN_FORMAT}. Upgrade streamline_hooks."
        )
    try:
        stacks = content["streamline_hooks"]["stacks"]
        states = combine_plans([SurgeryPlan.from_dict(entry) for entry in content["streamline_hooks"]["history"]])
        settings = {path: entry["set"] for entry in content["settings"] for path in entry["of"]}
        lengths = [(stack["stack"], len(stack["blocks"])) for stack in stacks if stack["splices"] is not None]
        has_types = isinstance(content["buffers"], list) and isinstance(content["class"], str)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise StreamlineError(
            f"{file} is damaged: {type(error).__name__}: {error}. Expected a file that streamline_hooks.save wrote. "
            "Copy the folder again."
        ) from error
    if not has_types or lengths != [(state.stack, len(state.slots)) for state in states]:
        raise StreamlineError(
            f"{file}, streamline_hooks.stacks: its blocks differ from those of streamline_hooks.history. The file was "
            "changed since it was written. Copy the folder again."
        )
    return states, stacks, settings


def _check_original(folder: Path, content: dict[str, Any], model: nn.Module) -> None:
    """Raise unless a model may be the newly built original architecture, in memory."""
    expected, actual = content["class"], _class_name(model)
    # Compare only class names: the module of a class changes between scripts and versions of libraries.
    if expected.rpartition(".")[2] != actual.rpartition(".")[2]:
        raise StreamlineError(
            f"{folder} contains a {expected}, but into is a {actual}. Build the original architecture with as many "
            "blocks as before the surgery, and pass it as into."
        )
    if RECORD in vars(model) or any({BEFORE, AFTER} & set(module._modules) for module in model.modules()):
        raise StreamlineError(
            f"into is a {type(model).__name__} that surgery has already changed. Build the original architecture "
            "again, and pass it as into."
        )
    for name, tensor in named_tensors(model).items():
        if is_lazy(tensor) or tensor.is_meta:
            reason = "has no shape yet (lazy module)" if is_lazy(tensor) else "is on the meta device"
            raise StreamlineError(
                f"{name} of this {type(model).__name__} {reason}, so weights cannot be loaded into it. Build the model "
                "in memory, run a lazy model once, and offload the model after loading."
            )


def _class_name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _surgeon(folder: Path, content: dict[str, Any], model: nn.Module, state: CombinedPlan) -> LayerSurgeon:
    try:
        find_stack(model, state.stack)
    except StreamlineError as error:
        raise StreamlineError(
            f"{folder} contains a {content['class']} with blocks in {state.stack}, but into is a {_class_name(model)} "
            f"without blocks there. Build the original architecture. ({error})"
        ) from error
    return LayerSurgeon(model, state.stack, probe=False)


def _block_copier(
    file: Path, surgeon: LayerSurgeon, state: CombinedPlan, settings: Sequence[Settings]
) -> Callable[[int, Sequence[int]], nn.Module]:
    """Return a function that copies, for an inserted block, the first candidate block with the same settings."""
    blocks = surgeon.stack.blocks
    indices = {(index.path, index.name) for index in find_index_attributes(blocks)}

    def copy_block(number: int, origins: Sequence[int]) -> nn.Module:
        reason = ""
        for origin in origins:
            mismatch = _mismatch(settings[number], module_settings(blocks[origin]), indices)
            if mismatch is None:
                return copy.deepcopy(blocks[origin])
            reason = reason or f"in block {origin}, {mismatch}"
        raise StreamlineError(
            f"{file}: block {number} of {state.stack}, a {state.slots[number][1]}, was inserted and differs from all "
            f"blocks of this model: {reason}. Expected a copy of a block of the model. Build the model with the same "
            "settings. To save other modules, register their class with register_module and splice them in."
        )

    return copy_block


def module_settings(model: nn.Module) -> Settings:
    """Return the settings of all modules, except spliced ones and those without effect in evaluation mode."""
    settings: Settings = {}
    for path, module in model.named_modules():
        has_no_effect = isinstance(module, nn.Identity) or "drop" in type(module).__name__.lower()
        if {BEFORE, AFTER} & set(path.split(".")) or (has_no_effect and not module.state_dict()):
            continue
        values = {name: _plain(value) for name, value in vars(module).items() if not name.startswith("_")}
        relevant = {k: v for k, v in values.items() if v is not None and not any(word in k for word in _INCIDENTAL)}
        settings[path] = {"class": type(module).__name__, **{name: value[0] for name, value in relevant.items()}}
    return settings


def _mismatch(saved: Settings, built: Settings, ignored: Collection[tuple[str, str]] = ()) -> str | None:
    """Describe the first difference between saved and built settings, or return None.

    Ignored are the pairs (path, attribute) in `ignored`, and attributes that only one of the two has, because another
    version of a class may add some.
    """
    for path in [*saved, *(path for path in built if path not in saved)]:
        saved_values, built_values, module_name = saved.get(path), built.get(path), path or "the model"
        if saved_values is None or built_values is None:
            class_name, side = (
                (built[path]["class"], "saved") if saved_values is None else (saved_values["class"], "built")
            )
            return f"{module_name} is a {class_name}, which the {side} model does not have"
        for name in saved_values:
            differs = name in built_values and json.dumps(saved_values[name]) != json.dumps(built_values[name])
            if differs and (path, name) not in ignored:
                description = module_name if name == "class" else f"{path}.{name}".lstrip(".")
                return f"{description} is {built_values[name]!r}, and {saved_values[name]!r} in the saved model"
    return None


def _plain(value: Any) -> tuple[Any] | None:
    """Return a setting as a JSON value in a tuple; None for other objects, paths and long strings."""
    if isfunction(value) or isbuiltin(value):  # an activation
        return (f"{value.__name__}()",)
    if isinstance(value, str):
        return (value,) if len(value) <= _LONGEST and not {"/", "\\"} & set(value) else None
    if value is None or isinstance(value, (bool, int, float)):
        return (value,)
    if isinstance(value, (list, tuple)) and len(value) <= _LONGEST:
        items = [_plain(item) for item in value]
        return ([item[0] for item in items if item is not None],) if None not in items else None
    return None

"""Make the surgery permanent: the plan goes into the configuration, and the model gets the class that saves it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.pooling_layer import is_of_pooler
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery.plan import SurgeryPlan
from streamline_hooks.surgery.rebuild import verify_rebuild
from streamline_hooks.surgery.renumber import IndexAttribute
from streamline_hooks.surgery.splice import AFTER, BEFORE
from streamline_hooks.surgery.spliced_model import (
    CODE,
    FORMAT,
    accept_guarded,
    base_class,
    own_path,
    splice_entries,
    streamlined_config_class,
    streamlined_model_class,
)
from streamline_hooks.wrapping import refuse_adapters


def prepare_to_settle(
    stack: BlockStack, depth: int, plan: SurgeryPlan, indices: Sequence[IndexAttribute], notes: dict[str, Any]
) -> tuple[dict[str, Any], Any, Any]:
    """Do everything of `settle` that can fail, on copies.

    Parameters
    ----------
    stack : BlockStack
        As it was before the surgery.
    depth : int
        Which of its ancestors is the model that is saved.
    plan : SurgeryPlan
        What was carried out.
    indices : sequence of IndexAttribute
        By which its blocks know their number.
    notes : dict
        Further JSON values for the checkpoint, such as the calibration data's fingerprint.

    Returns
    -------
    dict, type, type
        What the configuration will say, and the classes of the model and of its configuration.

    Raises
    ------
    UnsupportedSurgery
        If no configuration counts the blocks, or the class would build another model from it.
    StreamlineError
        If the notes are no JSON values.
    """
    model: Any = stack.ancestors[depth]
    refuse_adapters(model)
    path = ".".join(stack.path.split(".")[depth:])
    if stack.config is None:
        raise UnsupportedSurgery(
            f"{type(model).__name__} cannot be committed: nothing in its configuration counts the {plan.old_length} "
            f"blocks of {stack.path}, so that a checkpoint would not say how many are left."
        )
    entry = history_entry(model, plan, notes)
    now = find_stack(model, path)
    earlier = getattr(model.config, "streamline_hooks", None) or {}
    elsewhere = _in_other_stacks(model, earlier, path)
    entries = [*splice_entries(now.blocks), *elsewhere]
    said = {
        "format": FORMAT if entries else 1,
        "stack": path,
        "splices": entries,
        "guard": _guard(model, now),
        "history": [*copy.deepcopy(earlier.get("history", [])), entry],
    }
    model_class, config_class = base_class(type(model)), base_class(type(model.config))
    plain = copy.copy(model.config)
    plain.__class__ = config_class
    plain.streamline_hooks = said
    verify_rebuild(model, model_class, plain, path, now.blocks, indices)
    if entries:
        model_class = streamlined_model_class(model_class, config_class)
        config_class = streamlined_config_class(config_class)
    return said, model_class, config_class


def settle(
    stack: BlockStack, depth: int, plan: SurgeryPlan, indices: Sequence[IndexAttribute], notes: dict[str, Any]
) -> None:
    """Write the plan into a model's configuration and give both the class that saves what is there.

    Parameters and errors are those of `prepare_to_settle`; the model is changed when nothing can fail any more.
    """
    model: Any = stack.ancestors[depth]
    said, model_class, config_class = prepare_to_settle(stack, depth, plan, indices, notes)
    hooked = any(getattr(h, "hook", h) is accept_guarded for h in model._load_state_dict_pre_hooks.values())
    if said["splices"] and not hooked:
        model.register_load_state_dict_pre_hook(accept_guarded)
    model.config.streamline_hooks = said
    if CODE in str(vars(model.config).get("auto_map")):  # of an earlier surgery; saving says it anew where it holds
        del model.config.auto_map
    model.config.architectures = [model_class.__name__]
    model.config.__class__ = config_class
    model.__class__ = model_class


def history_entry(model: Any, plan: SurgeryPlan, notes: dict[str, Any], name: str = "") -> dict[str, Any]:
    """What a checkpoint says of one surgery.

    Parameters
    ----------
    model : torch.nn.Module
    plan : SurgeryPlan
        What was carried out.
    notes : dict
        Further JSON values.
    name : str
        What the model is called where it does not know a name of its own.

    Raises
    ------
    StreamlineError
        If the notes are no JSON values.
    """
    try:
        notes = json.loads(json.dumps(notes))
    except (TypeError, ValueError) as error:
        raise StreamlineError(f"commit() takes JSON values to keep with the plan: {error}.") from error
    return {"base_model": _name_of(model) or name, **notes, **plan.to_dict(), "versions": _versions(model)}


def _in_other_stacks(model: Any, said: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """What earlier surgeries spliced into other stacks than this one, where it still is.

    They may have been of this model without its head, or with one, by which paths are told.
    """
    entries = [{"stack": said.get("stack"), **entry} for entry in said.get("splices", [])]
    entries = [{**entry, "stack": own_path(model, entry["stack"])} for entry in entries]
    return [entry for entry in entries if entry["stack"] != path]


def _name_of(model: Any) -> str:
    """The name on the hub that a model was loaded by; of a path only the last part, which tells of no machine."""
    name = str(getattr(model, "name_or_path", ""))
    on_hub = name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()
    return name if on_hub else Path(name).name


def _versions(model: Any) -> dict[str, str]:
    """The versions of what the model is run with, and of the package that its class comes from."""
    found = {name: version(name) for name in ("streamline_hooks", "torch", "transformers")}
    own = type(model).__module__.partition(".")[0]
    try:
        return found if own in found else {**found, own: version(own)}
    except PackageNotFoundError:  # the class is the user's
        return found


def _guard(model: nn.Module, stack: BlockStack) -> str:
    """The weight whose stored shape keeps other classes away: the final norm's, or another one that is not tied.

    Vectors come before matrices, those behind the blocks before those in front of them, and these before the blocks; a
    pooler, which the class may be built without, is the last choice.
    """
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    owner, _, container = stack.path.rpartition(".")
    children = list(stack.ancestors[-1]._modules)
    behind = tuple(f"{owner}.{name}.".lstrip(".") for name in children[children.index(container) + 1 :])

    def rank(entry: tuple[str, nn.Parameter]) -> tuple[bool, bool, bool, bool]:
        name, parameter = entry
        inside, after = name.startswith(f"{stack.path}."), name.startswith(behind)
        return (is_of_pooler(name), parameter.ndim != 1, inside, not after)

    # Loading pads and ties what belongs to the embeddings by its shape, biases of the head included.
    shaped = {id(parameter) for module in _embeddings(model) for parameter in module.parameters()}
    free = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if owners[id(parameter)] == 1 and id(parameter) not in shaped and not {BEFORE, AFTER} & set(name.split("."))
    ]
    return min(free, key=rank)[0]


def _embeddings(model: Any) -> Iterator[nn.Module]:
    """The input embedding and the head, where the model says which they are."""
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, ask)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            yield module

"""Remove and add parameters of an optimizer, and keep its groups in the order in which their state is saved.

An optimizer saves its state by position: `load_state_dict` gives the n-th state to the n-th parameter, whatever that
parameter is. The names of the parameters are therefore stored in each group, and compared when a state is loaded.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import nn
from torch.optim import Optimizer

from streamline_hooks.core import StreamlineError, UnsupportedSurgery
from streamline_hooks.surgery import AFTER, BEFORE

NAMES = "streamline_hooks_names"
"""Key of a parameter group with the names of its parameters in the model."""


def drop_parameters(optimizer: Optimizer, removed: Collection[nn.Parameter]) -> None:
    """Remove parameters and their state from an optimizer and from the optimizers that it wraps.

    Empty parameter groups are kept, because learning-rate schedules count the groups. Parameter names stay aligned.
    """
    removed_set = set(removed)
    for inner in _wrapped_optimizers(optimizer):
        for group in inner.param_groups:
            left = [k for k, parameter in enumerate(group["params"]) if parameter not in removed_set]
            for key in {"params", "param_names"} & set(group):
                group[key][:] = [group[key][k] for k in left]
        for parameter in removed_set:
            inner.state.pop(parameter, None)


def rename_parameters(
    optimizer: Optimizer, before: Mapping[nn.Parameter, str], now: Mapping[nn.Parameter, str]
) -> None:
    """Update the parameter names stored in an optimizer, if any; prefixes of wrappers are kept."""
    for inner in _wrapped_optimizers(optimizer):
        for group in inner.param_groups:
            names: list[str] = group.get("param_names", [])
            for k, (parameter, name) in enumerate(zip(group["params"], names, strict=False)):
                old = before.get(parameter)
                if old is not None and parameter in now and name.endswith(old):
                    names[k] = name.removesuffix(old) + now[parameter]


def norms_and_biases(model: nn.Module) -> set[nn.Parameter]:
    """Return the biases and the weights of norms, which weight decay usually excludes."""
    return {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if "bias" in name or "norm" in type(module).__name__.lower()
    }


def choose_peers(
    optimizer: Optimizer,
    removed: Collection[nn.Parameter],
    new: Mapping[nn.Parameter, nn.Parameter | None],
    excluded_from_decay: Collection[nn.Parameter],
) -> dict[nn.Parameter, nn.Parameter]:
    """Return, for each new parameter, a removed parameter whose group it joins.

    `new` maps a parameter to the removed parameter that it is a copy of, or to None. A copy joins the group of its
    original. Of the other parameters, norms and biases (`excluded_from_decay`) join the group with most elements of the
    removed norms and biases, and all others the group with most elements of the other removed parameters; of equal
    groups, the first.
    """
    removed_set, excluded = set(removed), set(excluded_from_decay)
    groups = _groups(optimizer)
    group_of = {p: k for k, group in enumerate(groups) for p in group["params"] if p in removed_set}
    peers: dict[nn.Parameter, nn.Parameter] = {}
    for parameter, original in new.items():
        if original is not None:
            peers[parameter] = original
            continue
        alike = [p for p in group_of if (p in excluded) == (parameter in excluded)] or list(group_of)
        sizes = Counter[int]()
        for peer in alike:
            sizes[group_of[peer]] += peer.numel()
        chosen = max(sorted(sizes), key=sizes.__getitem__)
        peers[parameter] = next(p for p in alike if group_of[p] == chosen)
    return peers


def add_parameters(
    optimizer: Optimizer, peers: Mapping[nn.Parameter, nn.Parameter], names: Mapping[nn.Parameter, str]
) -> None:
    """Add each new parameter to the group of its peer, in the order of the model.

    `peers` is the result of `choose_peers`, and `names` has the names of the model's parameters in their order. In a
    group with another order, the parameter is appended.
    """
    order = {parameter: number for number, parameter in enumerate(names)}
    for group in _groups(optimizer):
        for parameter, peer in peers.items():
            if not any(peer is present for present in group["params"]):
                continue
            numbers = [order.get(present, -1) for present in group["params"] if present in order]
            is_ordered = all(first < second for first, second in pairwise(numbers))
            later = [k for k, p in enumerate(group["params"]) if order.get(p, -1) > order[parameter]]
            position = later[0] if later and is_ordered else len(group["params"])
            group["params"].insert(position, parameter)
            if "param_names" in group:
                group["param_names"].insert(position, names[parameter])


def block_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a block by name, without those of modules spliced in before or after it."""
    return {
        name: parameter for name, parameter in block.named_parameters() if name.partition(".")[0] not in (BEFORE, AFTER)
    }


def require_in_optimizer(optimizer: Optimizer, blocks: Mapping[int, nn.Module]) -> None:
    """Raise if the optimizer does not have all floating-point parameters of blocks."""
    present = {parameter for group in _groups(optimizer) for parameter in group["params"]}
    missing = [
        f"{name} of block {k}"
        for k, block in blocks.items()
        for name, parameter in block_parameters(block).items()
        if parameter.is_floating_point() and parameter not in present
    ]
    if missing:
        raise UnsupportedSurgery(
            f"A replacement cannot be inserted for {len(missing)} parameters that the {type(optimizer).__name__} does "
            f"not have (the first is {missing[0]}), because frozen parameters have no group whose options the "
            "replacement could take. Expected blocks whose parameters are all in the optimizer. Train them, choose "
            "other blocks, or remove these without a replacement.",
            "frozen",
        )


def record_names(optimizer: Optimizer, model: nn.Module) -> None:
    """Store the current names of the parameters in each group; they are saved with the optimizer's state."""
    names = _names_in(optimizer, model)
    for group in _groups(optimizer):
        group[NAMES] = [names[parameter] for parameter in group["params"]]


def follow_names(optimizer: Optimizer, model: nn.Module) -> None:
    """Record the parameters' names, and restore the recorded order whenever the optimizer loads a state.

    Raise `StreamlineError` if the optimizer has loaded a state in another order already.
    """
    recorded = [group.get(NAMES) for group in _groups(optimizer)]
    names = _names_in(optimizer, model)
    current = [[names[parameter] for parameter in group["params"]] for group in _groups(optimizer)]
    if any(record is not None and record != present for record, present in zip(recorded, current, strict=True)):
        raise StreamlineError(
            f"The {type(optimizer).__name__} has loaded a state whose parameters were in another order or in other "
            "groups, so its moments belong to other parameters. Expected the order in which the state was saved. "
            "Create ProgressiveRemoval before optimizer.load_state_dict: it restores the order while the state is "
            "loaded."
        )
    record_names(optimizer, model)
    *_, innermost = _wrapped_optimizers(optimizer)
    innermost.register_load_state_dict_pre_hook(partial(_restore_order, weakref.ref(model)))


def _restore_order(model_ref: weakref.ref[nn.Module], optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Give each group the parameters whose names are in the state that is about to be loaded."""
    model, saved = model_ref(), [group.get(NAMES) for group in state["param_groups"]]
    groups = optimizer.param_groups
    if model is None or any(names is None for names in saved) or len(saved) != len(groups):
        return  # a state of another run, which load_state_dict checks itself
    parameters = {name: parameter for parameter, name in _names_in(optimizer, model).items()}
    wanted = [name for names in saved for name in names]
    if sorted(wanted) != sorted(parameters):
        different = sorted(set(wanted) ^ set(parameters))
        raise StreamlineError(
            f"The state of the {type(optimizer).__name__} has {len(wanted)} parameters and the optimizer has "
            f"{len(parameters)} (only one has {', '.join(different[:3])}). Expected the state and the model of the "
            "same step. Load both from the same checkpoint."
        )
    for group, names in zip(groups, saved, strict=True):
        group["params"][:] = [parameters[name] for name in names]


def _names_in(optimizer: Optimizer, model: nn.Module) -> dict[nn.Parameter, str]:
    """Return the name of each parameter of an optimizer; those of other modules are numbered."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    present = [parameter for group in _groups(optimizer) for parameter in group["params"]]
    others = [parameter for parameter in present if parameter not in names]
    numbered = {parameter: f"other.{number}" for number, parameter in enumerate(others)}
    return {parameter: names.get(parameter) or numbered[parameter] for parameter in present}


def _groups(optimizer: Optimizer) -> Sequence[dict[str, Any]]:
    """Return the groups of an optimizer and of those that it wraps, without groups that they share."""
    groups = [group for inner in _wrapped_optimizers(optimizer) for group in inner.param_groups]
    return list({id(group["params"]): group for group in groups}.values())


def _wrapped_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield an optimizer, and the optimizers that it wraps."""
    inner: object = optimizer
    while isinstance(inner, Optimizer):
        yield inner
        inner = getattr(inner, "optimizer", None)

"""Where accelerate runs a module whose parameters it keeps elsewhere (``device_map``, CPU and disk offload)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from streamline_hooks.errors import StreamlineError

DeviceMap = Mapping[str, int | str | torch.device]


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device on which accelerate runs a module, or None if it has no hook.

    Between forwards the parameters of an offloaded module are on the meta device.
    """
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def held_elsewhere(model: nn.Module) -> bool:
    """Whether accelerate holds weights that Transformers does not find when it saves.

    Transformers reads ``hf_device_map``, which `accelerate.cpu_offload` and `accelerate.disk_offload` do not write.
    """
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return any(tensor.is_meta for tensor in model.state_dict().values()) and not places & {"cpu", "disk"}


def brought(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights of a model by name, loading those that accelerate has offloaded."""
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    try:
        found = get_state_dict_offloaded_model(model)
    except ValueError:  # a module on the device meta that accelerate does not look after
        found = {}
    found |= _own(model)  # which that leaves out
    weights = {name: found.get(name, tensor) for name, tensor in model.state_dict().items()}
    if missing := [name for name, tensor in weights.items() if tensor.is_meta]:
        raise StreamlineError(
            f"{missing[0]} is on the device meta, as {len(missing)} weights are, and accelerate does not keep the "
            "values of all of them. Load the model's weights before it is saved."
        )
    return weights


def _own(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model that are in none of its modules, as far as accelerate keeps them."""
    hook: Any = getattr(model, "_hf_hook", None)
    kept = [one.weights_map for one in getattr(hook, "hooks", (hook,)) if getattr(one, "weights_map", None) is not None]
    found = {}
    for name, parameter in model.named_parameters(recurse=False):
        if parameter.is_meta:
            for weights in kept:
                with suppress(KeyError):
                    found[name] = weights[name]
    return found


def followed_device_map(
    device_map: DeviceMap, path: str, old: Sequence[str], new: Sequence[tuple[str, str | None, nn.Module]]
) -> dict[str, int | str | torch.device]:
    """Return a model's ``hf_device_map`` after its blocks have been renumbered.

    `path` is the container of the blocks and `old` their earlier names; `new` lists, per block, its name, the old name
    of its source, and the module. The blocks' entries replace the first of them in the map, in order; the others stay.
    """
    by_block: dict[str, dict[str, int | str | torch.device]] = {name: {} for name in old}
    for key, device in device_map.items():
        name, _, rest = key.removeprefix(f"{path}.").partition(".") if key.startswith(f"{path}.") else ("", "", "")
        if name in by_block:
            by_block[name][rest] = device
    if not any(by_block.values()):  # the stack lies on one device as a whole
        return dict(device_map)
    blocks: dict[str, int | str | torch.device] = {}
    for name, source, block in new:
        entries = by_block.get(source or "", {})
        resident = next((p.device for p in block.parameters()), None)
        if not entries and resident is not None:
            entries = {"": str(resident) if resident.index is None else resident.index}
        blocks |= {f"{path}.{name}.{rest}".removesuffix("."): device for rest, device in entries.items()}
    followed: dict[str, int | str | torch.device] = {}
    for key, device in device_map.items():
        if key.startswith(f"{path}.") and key.removeprefix(f"{path}.").partition(".")[0] in by_block:
            followed |= blocks
        else:
            followed[key] = device
    return followed

"""Find devices, and load the weights of models that Accelerate offloads (``device_map``, CPU and disk offload)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core.errors import StreamlineError

DeviceMap = Mapping[str, int | str | torch.device]


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device on which Accelerate runs a module, or None if the module has no Accelerate hook.

    Between forward passes the parameters of an offloaded module are on the meta device.
    """
    hooks = (hook for part in module.modules() for hook in _hooks(part))
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(device) for device in devices if device is not None), None)


def _hooks(module: nn.Module) -> Sequence[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


def offload_hooks(module: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Yield each submodule whose weights Accelerate loads for every forward pass, with its hook."""
    for part in module.modules():
        for hook in _hooks(part):
            if getattr(hook, "offload", False) and hasattr(hook, "weights_map"):
                yield part, hook


class ComputedWeights(Mapping[str, Tensor]):
    """Weights of an offloaded module, of which one is computed from the stored value each time it is read.

    Parameters
    ----------
    weights : mapping of str to torch.Tensor
        The ``weights_map`` of accelerate's hook.
    name : str
    compute : callable
        Takes the stored value, and returns one of the same shape and dtype.

    Examples
    --------
    >>> weights = ComputedWeights({"weight": torch.ones(2), "bias": torch.ones(2)}, "weight", torch.neg)
    >>> weights["weight"], weights["bias"]
    (tensor([-1., -1.]), tensor([1., 1.]))
    """

    def __init__(self, weights: Mapping[str, Tensor], name: str, compute: Callable[[Tensor], Tensor]) -> None:
        self.weights, self._name, self._compute = weights, name, compute

    def __getitem__(self, name: str) -> Tensor:
        value = self.weights[name]
        return self._compute(value) if name == self._name else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __getattr__(self, name: str) -> Any:  # accelerate's maps have a data set and a prefix
        if name == "weights":
            raise AttributeError(name)
        return getattr(self.weights, name)


@contextmanager
def weights_in_memory(module: nn.Module) -> Iterator[None]:
    """Keep the weights of an offloaded module in memory during several forward passes.

    A module that Accelerate does not offload is unchanged.
    """
    loaded: list[tuple[nn.Module, Any]] = []
    try:
        for part, hook in offload_hooks(module):
            loaded.append((part, hook))
            hook.pre_forward(part)
            hook.offload = False
        yield
    finally:
        for part, hook in loaded:
            hook.offload = True
            hook.post_forward(part, None)


def remove_offload_hooks(module: nn.Module) -> None:
    """Remove Accelerate's hooks from a module whose weights are in memory, and restore its forward."""
    for part in module.modules():
        state = vars(part)
        if state.pop("_hf_hook", None) is not None:
            hooked, original = state.pop("forward", None), state.pop("_old_forward", None)
            if hooked is not None and getattr(original, "__func__", None) is not type(part).forward:
                state["forward"] = original


def has_unmapped_offload(model: nn.Module) -> bool:
    """Whether ``save_pretrained`` cannot find the offloaded weights.

    It reads ``hf_device_map``, which `accelerate.cpu_offload` and `accelerate.disk_offload` do not write.
    """
    mapped_devices = set((getattr(model, "hf_device_map", None) or {}).values())
    return any(tensor.is_meta for tensor in model.state_dict().values()) and not mapped_devices & {"cpu", "disk"}


def load_offloaded_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights of a model by name, including those that Accelerate has offloaded."""
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    try:
        loaded = get_state_dict_offloaded_model(model)
    except ValueError:  # a module on the meta device that Accelerate does not manage
        loaded = {}
    # Accelerate omits parameters of the model itself, outside its submodules.
    maps = [hook.weights_map for hook in _hooks(model) if getattr(hook, "weights_map", None) is not None]
    for name, parameter in model.named_parameters(recurse=False):
        for weights in maps if parameter.is_meta else ():
            with suppress(KeyError):
                loaded[name] = weights[name]
    weights = {name: loaded.get(name, tensor) for name, tensor in model.state_dict().items()}
    if missing := [name for name, tensor in weights.items() if tensor.is_meta]:
        raise StreamlineError(
            f"{len(missing)} weights are on the meta device without values, for example {missing[0]}. Expected "
            "weights in memory or offloaded by Accelerate. Load the model's weights before saving it."
        )
    return weights


def renumber_device_map(
    device_map: DeviceMap, path: str, old: Sequence[str], new: Sequence[tuple[str, str | None, nn.Module]]
) -> dict[str, int | str | torch.device]:
    """Return a model's ``hf_device_map`` after its blocks have been renumbered.

    `path` is the path of the block list and `old` lists the previous block names. `new` lists, for each block, its
    name, the previous name of the block that it came from, and the module. The new entries of the blocks replace the
    first previous entry of a block, in order; entries of other modules are unchanged.
    """
    by_block: dict[str, dict[str, int | str | torch.device]] = {name: {} for name in old}
    for key, device in device_map.items():
        name, _, rest = key.removeprefix(f"{path}.").partition(".") if key.startswith(f"{path}.") else ("", "", "")
        if name in by_block:
            by_block[name][rest] = device
    if not any(by_block.values()):  # the whole stack is on one device
        return dict(device_map)
    blocks: dict[str, int | str | torch.device] = {}
    for name, source, block in new:
        entries = by_block.get(source or "", {})
        block_device = next((p.device for p in block.parameters()), None)
        if not entries and block_device is not None:
            entries = {"": str(block_device) if block_device.index is None else block_device.index}
        blocks |= {f"{path}.{name}.{rest}".removesuffix("."): device for rest, device in entries.items()}
    renumbered: dict[str, int | str | torch.device] = {}
    for key, device in device_map.items():
        if key.startswith(f"{path}.") and key.removeprefix(f"{path}.").partition(".")[0] in by_block:
            renumbered |= blocks
        else:
            renumbered[key] = device
    return renumbered


def float64_device(device: torch.device) -> torch.device:
    """Return the device for float64 sums: `device`, or the CPU for MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(states: Tensor) -> Tensor:
    """Return the states in float64, on `float64_device`."""
    return states.to(float64_device(states.device)).to(torch.float64)


def rows_at_once(features: int, device: torch.device) -> int:
    """Return how many rows of `features` float32 values to compute at a time.

    On a CPU the results of a few rows stay in its cache, and no memory is requested for each operation. An accelerator
    needs more rows, because each operation takes longer to start.
    """
    values = 2**17 if device.type == "cpu" else 2**25
    return max(1, values // max(1, features))


def widest_float(device: torch.device) -> torch.dtype:
    """Return the dtype of sums on a device: float64 where supported, else float32."""
    return torch.float64 if float64_device(device) == device else torch.float32

"""All tensors that a model holds under a name, and which of them are one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from streamline_hooks.errors import StreamlineError
from streamline_hooks.offload import brought


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What a model's ``state_dict`` holds, in memory.

    Parameters
    ----------
    model : torch.nn.Module
        What accelerate keeps elsewhere is brought.

    Raises
    ------
    StreamlineError
        If something of it is no plain tensor, or nobody has its values.
    """
    state: dict[str, Any] = dict(model.state_dict())
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise StreamlineError(
                f"{name} of this {type(model).__name__} is a {type(value).__name__}, for which safetensors have no "
                "place (a module's extra state). Keep it in a buffer, or save it apart and take it out."
            )
        if type(value) not in (Tensor, nn.Parameter) or value.is_quantized or value.layout != torch.strided:
            raise StreamlineError(
                f"{name} of this {type(model).__name__} is a {type(value).__name__} of {value.dtype}, which is no "
                "plain tensor (quantised, sparse, or divided among processes). Save the model as it was before that."
            )
    return brought(model) if any(value.is_meta for value in state.values()) else state


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """The buffers that a model's ``state_dict`` leaves out (``persistent=False``), by name; None for an empty one."""
    return {
        f"{path}.{name}".lstrip("."): module._buffers[name]
        for path, module in model.named_modules(remove_duplicate=False)
        for name in sorted(module._non_persistent_buffers_set)
        if name in module._buffers
    }


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers themselves, under every name that they have."""
    parameters: Iterable[tuple[str, Tensor]] = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def require_in_memory(model: nn.Module) -> None:
    """Raise if a model has tensors that have no values yet, or whose values are elsewhere."""
    for name, tensor in own_tensors(model).items():
        if is_lazy(tensor) or tensor.is_meta:
            what = "has no shape yet (a lazy module)" if is_lazy(tensor) else "is on the device meta"
            raise StreamlineError(
                f"{name} of this {type(model).__name__} {what}, so that nothing can be put into it. Build the model "
                "in memory, run it once where it is lazy, and offload it afterwards."
            )


def shared_names(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names that stand for one tensor, for each that has several."""
    names: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            names.setdefault(_place(tensor), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each with the whole of its memory to itself; those that are one stay one.

    Raises
    ------
    StreamlineError
        If two of them overlap and are not the same: neither would come back as a part of the other.
    """
    areas: dict[Any, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            area = (start, start + (last + 1) * tensor.element_size(), name)
            areas.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(area)
    for inside in areas.values():
        inside.sort()
        for k, (_, end, name) in enumerate(inside):
            for start, _, other in inside[k + 1 :]:
                if start < end and _place(tensors[name]) != _place(tensors[other]):
                    raise StreamlineError(
                        f"{' and '.join(sorted((name, other)))} overlap in memory and are not one tensor (one is a "
                        "view, a slice or a transpose of the other), which safetensors cannot hold. Make one of them a "
                        "copy (clone()), then save."
                    )
    copies: dict[Any, Tensor] = {}
    made = {}
    for name, tensor in tensors.items():
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        made[name] = tensor if whole else copies.setdefault(_place(tensor), tensor.contiguous().clone())
    return made


def _place(tensor: Tensor) -> Any:
    """What two names have in common that stand for one tensor."""
    where = (tensor.device, tensor.data_ptr(), tensor.dtype)
    return (*where, tuple(tensor.shape), tensor.stride())

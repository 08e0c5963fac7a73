"""Read, check and restore the tensors of a model outside Transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from streamline_hooks.checkpoint.safety import INDEX, WEIGHTS
from streamline_hooks.core import StreamlineError, bitwise_equal, load_offloaded_weights
from streamline_hooks.surgery import AFTER, BEFORE

_ADVICE = (
    "The file belongs to another model. Build the original architecture with its settings, or save the model again."
)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the ``state_dict`` with offloaded weights loaded; raise if safetensors cannot store a value."""
    state: dict[str, Any] = dict(model.state_dict())
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise StreamlineError(
                f"{name} of this {type(model).__name__} is a {type(value).__name__} (extra state of a module). "
                "Expected a tensor, because safetensors store nothing else. Use a buffer, or save and remove the extra "
                "state."
            )
        if type(value) not in (Tensor, nn.Parameter) or value.is_quantized or value.layout != torch.strided:
            raise StreamlineError(
                f"{name} of this {type(model).__name__} is a {type(value).__name__} of {value.dtype}. Expected a "
                "dense, unquantized tensor that is not sharded. Save the model before quantizing or sharding it."
            )
    return load_offloaded_weights(model) if any(value.is_meta for value in state.values()) else state


def non_persistent_buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """Return the non-persistent buffers by name; the value is None for a buffer that is not set."""
    return {
        f"{path}.{name}".lstrip("."): module._buffers[name]
        for path, module in model.named_modules(remove_duplicate=False)
        for name in sorted(module._non_persistent_buffers_set)
        if name in module._buffers
    }


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def without_overlap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy each tensor that is part of a larger storage; tied tensors stay tied.

    Raise if two different tensors overlap in memory, because loading could not restore the overlap.
    """
    areas: dict[Any, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            area = (start, start + (last + 1) * tensor.element_size(), name)
            areas.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(area)
    for storage_areas in areas.values():
        storage_areas.sort()
        for k, (_, end, name) in enumerate(storage_areas):
            for start, _, other_name in storage_areas[k + 1 :]:
                if start < end and _location(tensors[name]) != _location(tensors[other_name]):
                    raise StreamlineError(
                        f"{' and '.join(sorted((name, other_name)))} overlap in memory but are different tensors (one "
                        "is a view of the other), which safetensors cannot store. Make one of them a copy with "
                        "clone(), then save."
                    )
    copies: dict[Any, Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        is_whole = (
            tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        )
        result[name] = tensor if is_whole else copies.setdefault(_location(tensor), tensor.contiguous().clone())
    return result


def _location(tensor: Tensor) -> Any:
    """Return a key that is equal for tied tensors."""
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


@dataclass(frozen=True)
class SavedTensors:
    """Weights file of a model outside Transformers: values by name, non-persistent buffers, groups of tied names."""

    file: Path
    values: dict[str, Tensor]
    buffers: set[str]
    tied: list[list[str]]

    @classmethod
    def read(cls, folder: Path, content: dict[str, Any]) -> SavedTensors:
        """Read the weights of a validated folder with the description `content`."""
        if (folder / INDEX).exists():
            raise StreamlineError(
                f"{folder / INDEX} is unexpected: `save` writes the weights of a {content['class']} to one file. Copy "
                "the folder again."
            )
        file = folder / WEIGHTS
        with safe_open(file, framework="pt") as file_handle:
            aliases = dict(file_handle.metadata() or {})
        values = load_file(file)
        tied_names: dict[str, list[str]] = {}
        for alias, target in aliases.items():
            if target not in values:
                raise StreamlineError(
                    f"{file}, {alias}: it is tied to {target}, which is missing. Copy the file again."
                )
            tied_names.setdefault(target, [target]).append(alias)
        values |= {alias: values[target] for alias, target in aliases.items()}
        return cls(file, values, set(content["buffers"]), list(tied_names.values()))

    def check_fit(self, model: nn.Module) -> None:
        """Raise unless a model has exactly these weights and buffers, with the same ties."""
        state, buffers = full_state_dict(model), non_persistent_buffers(model)
        self._check_weights(model, state)
        for name in sorted(self.buffers):
            if name not in self.values:
                raise StreamlineError(f"{self.file}, {name}: the buffer is missing. Copy the folder again.")
            if name not in buffers:
                raise self._error(name, f"this {type(model).__name__} has no such buffer")
        for name in sorted(name for name, value in buffers.items() if value is not None and name not in self.buffers):
            raise self._error(name, "the buffer is missing")
        self._check_ties(model, {**state, **{name: value for name, value in buffers.items() if value is not None}})

    def load_into(self, model: nn.Module) -> None:
        """Load the values into a model that passed `check_fit`, in their saved dtypes on the devices of the model."""
        for name in [
            name for name, value in non_persistent_buffers(model).items() if value is None and name in self.buffers
        ]:
            path, _, buffer_name = name.rpartition(".")
            owner = model.get_submodule(path)
            device = next((p.device for p in [*owner.parameters(), *model.parameters()]), torch.device("cpu"))
            owner._buffers[buffer_name] = self.values[name].to(device, copy=True)
        # Copy the values, because they may be memory-mapped from the file.
        tensors, copies = named_tensors(model), dict[Any, Tensor]()
        with torch.no_grad():
            for name, tensor in tensors.items():
                value = self.values.get(name)
                if value is None or (value.dtype == tensor.dtype and value.shape == tensor.shape):
                    continue
                location = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), value.dtype)
                if location not in copies:  # tied tensors stay tied
                    copies[location] = value.to(tensor.device, copy=True)
                tensor.data = copies[location]
            for name in self.buffers:
                if not bitwise_equal(tensors[name], self.values[name]):
                    tensors[name].data = self.values[name].to(tensors[name].device, copy=True)
            model.load_state_dict({k: v for k, v in self.values.items() if k not in self.buffers})
        for name, tensor in {**full_state_dict(model), **{k: tensors[k] for k in self.buffers}}.items():
            if not bitwise_equal(tensor, self.values[name]):
                raise StreamlineError(
                    f"{self.file}, {name}: this {type(model).__name__} changed the value while it was loaded "
                    f"({tensor.dtype}, saved as {self.values[name].dtype}). The model is unusable now. Build it again "
                    "without the hook that changes weights during loading."
                )

    def _error(self, name: str, text: str) -> StreamlineError:
        return StreamlineError(f"{self.file}, {name}: {text}. {_ADVICE}")

    def _check_weights(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        suffix = f"in this {type(model).__name__}"
        for name, tensor in state.items():
            value = self.values.get(name) if name not in self.buffers else None
            if value is None:
                owner = " of a spliced module" if {BEFORE, AFTER} & set(name.split(".")) else ""
                raise self._error(name, f"the weight{owner} is missing")
            if value.shape != tensor.shape:
                raise self._error(name, f"its shape is {tuple(value.shape)}, but {tuple(tensor.shape)} {suffix}")
            if (value.is_floating_point(), value.is_complex()) != (tensor.is_floating_point(), tensor.is_complex()):
                raise self._error(name, f"its dtype is {value.dtype}, but {tensor.dtype} {suffix}")
        for name in sorted(self.values.keys() - state.keys() - self.buffers):
            raise self._error(name, f"there is no such weight {suffix}")

    def _check_ties(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        groups: dict[Any, list[str]] = {}
        for name, tensor in tensors.items():
            if tensor.numel():
                groups.setdefault(_location(tensor), []).append(name)
        model_groups = list(groups.values())
        for first, second in _pairs(self.tied):
            if {first, second} <= parameters and not any({first, second} <= set(group) for group in model_groups):
                raise StreamlineError(
                    f"{self.file}: {first} and {second} are tied in the file, but not in this {type(model).__name__}. "
                    "Build the model with tied weights."
                )
        for first, second in _pairs(model_groups):
            tied = any({first, second} <= set(group) for group in self.tied)
            if not tied and (
                {first, second} & parameters or not bitwise_equal(self.values[first], self.values[second])
            ):
                raise StreamlineError(
                    f"{self.file}: {first} and {second} are separate in the file, but tied in this "
                    f"{type(model).__name__}. Build the model without tying them."
                )


def _pairs(groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    for group in groups:
        yield from ((group[0], name) for name in group[1:])

"""The weights and buffers of a plain module in a file: whether they fit a model, and how they are put into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from streamline_hooks.checkpoint.held_tensors import own_tensors, shared_names, unsaved_buffers, weights_of
from streamline_hooks.checkpoint.safety import INDEX, WEIGHTS
from streamline_hooks.digests import same_bits
from streamline_hooks.errors import StreamlineError
from streamline_hooks.surgery.splice import AFTER, BEFORE


class SavedTensors:
    """What the file of weights of a plain module holds.

    Parameters
    ----------
    file : Path
    values : dict of str to torch.Tensor
        By name, under every name that one has.
    buffers : set of str
        The names of those that are in no ``state_dict``.
    shared : list of list of str
        The names that are one tensor.
    """

    def __init__(self, file: Path, values: dict[str, Tensor], buffers: set[str], shared: list[list[str]]) -> None:
        self.file, self.values, self.buffers, self.shared = file, values, buffers, shared

    @classmethod
    def read(cls, folder: Path, content: dict[str, Any]) -> SavedTensors:
        """Read the weights of a folder, which was checked, into memory."""
        if (folder / INDEX).exists():
            raise StreamlineError(
                f"{folder / INDEX} is not a part of what `save` writes for a {content['class']}, whose weights are in "
                "one file. Copy the folder again."
            )
        file = folder / WEIGHTS
        with safe_open(file, framework="pt") as opened:
            aliases = dict(opened.metadata() or {})
        values = load_file(file)
        for alias, kept in aliases.items():
            if kept not in values:
                raise StreamlineError(f"{file}, {alias}: it is said to be {kept}, which is missing. Copy it again.")
        names: dict[str, list[str]] = {}
        for alias, kept in aliases.items():
            names.setdefault(kept, [kept]).append(alias)
        values |= {alias: values[kept] for alias, kept in aliases.items()}
        return cls(file, values, set(content["buffers"]), list(names.values()))

    def require_fitting(self, model: nn.Module) -> None:
        """Raise unless a model asks for these tensors and no others, and has those tied that are.

        Raises
        ------
        StreamlineError
            The text names the file and the key.
        """
        _require_weights(self, model)
        _require_buffers(self, model)
        _require_sharing(self, model)

    def put_into(self, model: nn.Module) -> None:
        """Give a model, which was checked, these values, each in its own precision and on the model's device."""
        empty = [name for name, tensor in unsaved_buffers(model).items() if tensor is None and name in self.buffers]
        for name in empty:
            path, _, last = name.rpartition(".")
            owner = model.get_submodule(path)
            device = next((p.device for p in [*owner.parameters(), *model.parameters()]), torch.device("cpu"))
            owner._buffers[last] = self.values[name].to(device, copy=True)
        own, made = own_tensors(model), dict[Any, Tensor]()  # copies: what was read may be the file itself, mapped
        with torch.no_grad():
            for name, tensor in own.items():
                value = self.values.get(name)
                if value is None or (value.dtype == tensor.dtype and value.shape == tensor.shape):
                    continue
                place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), value.dtype)
                if place not in made:  # those that are one stay one
                    made[place] = value.to(tensor.device, copy=True)
                tensor.data = made[place]
            for name in self.buffers:
                if not same_bits(own[name], self.values[name]):
                    own[name].data = self.values[name].to(own[name].device, copy=True)
            model.load_state_dict({k: v for k, v in self.values.items() if k not in self.buffers})
        for name, tensor in {**weights_of(model), **{k: own[k] for k in self.buffers}}.items():
            if not same_bits(tensor, self.values[name]):
                raise StreamlineError(
                    f"{self.file}, {name}: this {type(model).__name__} does not hold what was put into it, "
                    f"{tensor.dtype} in the place of {self.values[name].dtype} or other values. Something of it "
                    "changes its weights while they are loaded; take that out. The model is of no use now; build it "
                    "anew."
                )


def _require_weights(saved: SavedTensors, model: nn.Module) -> None:
    """Raise unless the weights are those that a model asks for."""
    state = weights_of(model)
    for name, tensor in state.items():
        held = saved.values.get(name) if name not in saved.buffers else None
        if held is None:
            of = " of a spliced module" if {BEFORE, AFTER} & set(name.split(".")) else ""
            raise StreamlineError(f"{saved.file}, {name}: the weight{of} is missing. {_ADVICE}")
        if held.shape != tensor.shape:
            raise StreamlineError(
                f"{saved.file}, {name}: its shape is {tuple(held.shape)}, and {tuple(tensor.shape)} in this "
                f"{type(model).__name__}. {_ADVICE}"
            )
        kinds = [(t.is_floating_point(), t.is_complex()) for t in (held, tensor)]
        if kinds[0] != kinds[1]:
            raise StreamlineError(
                f"{saved.file}, {name}: it holds {held.dtype}, and {tensor.dtype} in this {type(model).__name__}. "
                f"{_ADVICE}"
            )
    for name in sorted(saved.values.keys() - state.keys() - saved.buffers):
        raise StreamlineError(
            f"{saved.file}, {name}: the weight has no place in this {type(model).__name__}. {_ADVICE}"
        )


def _require_buffers(saved: SavedTensors, model: nn.Module) -> None:
    """Raise unless a model has the buffers that are in no ``state_dict``, and no others."""
    present = unsaved_buffers(model)
    for name in sorted(saved.buffers):
        if name not in saved.values:
            raise StreamlineError(f"{saved.file}, {name}: the buffer is missing. Copy the folder again.")
        if name not in present:
            raise StreamlineError(
                f"{saved.file}, {name}: the buffer has no place in this {type(model).__name__}. {_ADVICE}"
            )
    for name in sorted(name for name, tensor in present.items() if tensor is not None and name not in saved.buffers):
        raise StreamlineError(f"{saved.file}, {name}: the buffer is missing. {_ADVICE}")


def _require_sharing(saved: SavedTensors, model: nn.Module) -> None:
    """Raise unless what is one tensor in the file is one in a model too."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    here = shared_names({**weights_of(model), **{k: v for k, v in unsaved_buffers(model).items() if v is not None}})
    for one, other in _pairs(saved.shared):
        if {one, other} <= parameters and not any({one, other} <= set(group) for group in here):
            raise StreamlineError(
                f"{saved.file}: {one} and {other} are one tensor in the file and two in this {type(model).__name__}, "
                "so that training would part them. Build it with the two tied."
            )
    for one, other in _pairs(here):
        tied = any({one, other} <= set(group) for group in saved.shared)
        if not tied and ({one, other} & parameters or not same_bits(saved.values[one], saved.values[other])):
            raise StreamlineError(
                f"{saved.file}: {one} and {other} are two tensors in the file and one in this {type(model).__name__}. "
                "Build it with the two apart."
            )


def _pairs(groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    for group in groups:
        yield from ((group[0], other) for other in group[1:])


_ADVICE = (
    "The two are of different models: build the original architecture with the settings that it had, or save the model "
    "again."
)

"""Snapshot a model and describe the differences that a temporary change leaves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import bitwise_equal
from streamline_hooks.testing.compare import describe_difference

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))


class _Missing:
    def __repr__(self) -> str:
        return "missing"


_MISSING = _Missing()


@dataclass(frozen=True, eq=False, repr=False)
class _Object:
    """An object that is compared by identity, with a copy of the values if it is a tensor."""

    target: Any
    values: Tensor | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and other.target is self.target

    def __hash__(self) -> int:
        return id(self.target)

    def __repr__(self) -> str:
        return f"a {type(self.target).__name__}"


@dataclass(frozen=True, repr=False)
class _Container:
    """Snapshots of the items of a container or configuration; `owner` is set if its identity is compared."""

    owner: _Object | None
    kind: type
    items: dict[Any, Any]

    def __repr__(self) -> str:
        return f"a {self.kind.__name__} of {len(self.items)}"


def take_snapshot(value: Any, enclosing: tuple[int, ...] = ()) -> Any:
    """Return a snapshot of a value for a comparison after in-place changes.

    Numbers and strings are unchanged, containers and configurations are traversed, and plain tensors are copied. Other
    objects are compared by identity. `enclosing` contains the ids of the enclosing containers.
    """
    if isinstance(value, _SIMPLE):
        return value
    if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_nested:
        return _Object(value, value.detach().clone())
    if id(value) in enclosing:  # a container that contains itself
        return _Object(value)
    enclosing = (*enclosing, id(value))
    if isinstance(value, Mapping):
        return _Container(None, type(value), {key: take_snapshot(item, enclosing) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return _Container(None, type(value), {k: take_snapshot(item, enclosing) for k, item in enumerate(value)})
    if isinstance(value, (set, frozenset)):
        return _Container(None, type(value), dict.fromkeys(value, True))
    if _is_config(value):
        return _Container(
            _Object(value), type(value), {k: take_snapshot(item, enclosing) for k, item in vars(value).items()}
        )
    return _Object(value)


def _is_config(value: Any) -> bool:
    return callable(getattr(type(value), "to_dict", None)) and hasattr(value, "__dict__")


def snapshot_changes(before: Any, now: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Yield the path, old value and new value of each difference of two snapshots, ignoring the order of keys."""
    if isinstance(before, _Object) and before == now:
        if before.values is not None and not bitwise_equal(before.values, now.values):
            yield path, *_first_change(before.values, now.values)
        return
    if not isinstance(before, _Container) or not isinstance(now, _Container):
        if type(before) is not type(now) or (before != now and before == before):
            yield path, repr(before), repr(now)
        return
    if before.kind is not now.kind:
        yield path, f"a {before.kind.__name__}", f"a {now.kind.__name__}"
        return
    if before.owner != now.owner:
        yield path, repr(before), f"a different {now.kind.__name__} object"
    if before.owner is None and issubclass(before.kind, (list, tuple)) and len(before.items) != len(now.items):
        yield path, repr(list(before.items.values())), repr(list(now.items.values()))
        return
    for key in before.items | now.items:
        inner = f"{path}.{key}" if before.owner is not None else f"{path}[{key!r}]"
        yield from snapshot_changes(before.items.get(key, _MISSING), now.items.get(key, _MISSING), inner)


def _first_change(before: Tensor, now: Tensor) -> tuple[str, str]:
    """Describe both tensors at their first difference."""
    if before.shape != now.shape or before.dtype != now.dtype:
        old, new = (f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}" for tensor in (before, now))
        return old, new
    a, b = (t.double() if t.is_floating_point() else t for t in (before, now.to(before.device)))
    differing = (a != b).nonzero()
    if not len(differing):
        return "a tensor of equal values", "a tensor with a different sign of a zero"
    index = tuple(differing[0].tolist())
    return f"a tensor with {a[index].item():.9g} at {index}", f"a tensor with {b[index].item():.9g} at {index}"


# Compared separately. PyTorch sets _is_full_backward_hook with the first such hook and never resets it.
_COMPARED_SEPARATELY = frozenset({"_parameters", "_buffers", "_modules", "_is_full_backward_hook"})
_Hooks = dict[str, list[tuple[Any, Any]]]


@dataclass(frozen=True)
class _TensorState:
    tensor: Tensor
    values: Tensor
    requires_grad: bool
    grad: Tensor | None
    grad_values: Tensor | None
    hooks: _Hooks


class ModelState:
    """Snapshot of a model: modules, parameters, hooks, attributes, configurations and state-dict keys."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._classes = {name: type(module) for name, module in self._modules.items()}
        self._children = {name: list(module._modules) for name, module in self._modules.items()}
        self._hooks = {name: _hooks_in(vars(module)) for name, module in self._modules.items()}
        self._attributes = {name: _attributes_of(module) for name, module in self._modules.items()}
        self._configs = {at: (config, take_snapshot(config)) for at, config in _configs_of(self._modules)}
        self._tensors = {name: _state_of(tensor) for name, tensor in _tensors_of(self._modules)}
        self._ignored: set[tuple[str, str]] = set()
        self._keys = list(model.state_dict())
        self._global_hooks = _global_hooks()

    def run_ignoring_changes(self, run: Callable[[], object]) -> None:
        """Call a function and ignore the attributes that it changes, such as RecurrentGemma's recurrent state."""
        run()
        for name, module in self._modules.items():
            before, now = self._attributes[name], _attributes_of(module)
            for attribute in before | now:
                changes = snapshot_changes(before.get(attribute, _MISSING), now.get(attribute, _MISSING), attribute)
                if next(changes, None) is not None:
                    self._ignored.add((name, attribute))

    def changes(self) -> list[str]:
        """Return each difference from the snapshot as a sentence without a full stop."""
        return [
            *self._changed_modules(),
            *self._changed_tensors(),
            *self._changed_hooks(),
            *self._changed_attributes(),
            *self._changed_keys(),
        ]

    def _changed_modules(self) -> Iterator[str]:
        now = dict(self.model.named_modules(remove_duplicate=False))
        for name, module in self._modules.items():
            if name not in now:
                yield f"{_module_name(name)} ({type(module).__name__}) is missing"
            elif now[name] is not module:
                yield f"{_module_name(name)} is a different module ({type(now[name]).__name__}) than before"
            elif type(module) is not self._classes[name]:
                yield f"{_module_name(name)} is a {type(module).__name__}; it was a {self._classes[name].__name__}"
            else:
                before, after = self._children[name], list(module._modules)
                if before != after and set(before) == set(after):
                    yield f"the submodules of {_module_name(name)} have a different order: {after}; it was {before}"
        for name in now.keys() - self._modules.keys():
            yield f"{_module_name(name)} ({type(now[name]).__name__}) was left in the model"

    def _changed_tensors(self) -> Iterator[str]:
        tensors = dict(_tensors_of(dict(self.model.named_modules(remove_duplicate=False))))
        for name, before in self._tensors.items():
            if name not in tensors:
                yield f"{name} is missing"
                continue
            now = tensors[name]
            if now is not before.tensor:
                same = " with equal values" if bitwise_equal(now, before.values) else ""
                yield f"{name} is a different {type(now).__name__} object than before{same}: an optimizer loses it"
            if not bitwise_equal(now, before.values):
                yield f"{name} has different values: {_describe_values(now, before.values)}"
            if now.requires_grad != before.requires_grad:
                yield f"requires_grad of {name} is {now.requires_grad}; it was {before.requires_grad}"
            if _grad_of(now) is not before.grad:
                yield f"the gradient of {name} is a different tensor than before"
            elif before.grad is not None and before.grad_values is not None:
                grad = _dense(before.grad)
                if not bitwise_equal(grad, before.grad_values):
                    yield f"the gradient of {name} has different values: {_describe_values(grad, before.grad_values)}"
            yield from _changed_hooks(before.hooks, _hooks_of_tensor(now), f"on {name}")
        for name in tensors.keys() - self._tensors.keys():
            yield f"{name} was left in the model"

    def _changed_hooks(self) -> Iterator[str]:
        for name, module in self._modules.items():
            yield from _changed_hooks(self._hooks[name], _hooks_in(vars(module)), f"on {_module_name(name)}")
        yield from _changed_hooks(self._global_hooks, _global_hooks(), "on all modules of this process")

    def _changed_attributes(self) -> Iterator[str]:
        for name, module in self._modules.items():
            before, now = self._attributes[name], _attributes_of(module)
            for attribute in before | now:
                if (name, attribute) in self._ignored:
                    continue
                pair = before.get(attribute, _MISSING), now.get(attribute, _MISSING)
                for path, old, new in snapshot_changes(*pair, attribute):
                    yield f"{path} of {_module_name(name)} is {new}; it was {old}"
        for (name, attribute), (config, snapshot) in self._configs.items():
            for path, old, new in snapshot_changes(snapshot, take_snapshot(config), attribute):
                yield f"{path} of {_module_name(name)} is {new}; it was {old}"

    def _changed_keys(self) -> Iterator[str]:
        now = list(self.model.state_dict())
        if now == self._keys:
            return
        if sorted(now) == sorted(self._keys):
            k = next(k for k, (a, b) in enumerate(zip(now, self._keys, strict=True)) if a != b)
            yield f"the keys of the state dict are in a different order: key {k} is {now[k]}; it was {self._keys[k]}"
        else:
            missing = [key for key in self._keys if key not in now]
            new = [key for key in now if key not in self._keys]
            yield f"the state dict has different keys: missing {missing[:3]}, new {new[:3]}"


def _module_name(name: str) -> str:
    return f"model.{name}" if name and name[0].isdigit() else name or "the model"


def _hooks_in(attributes: Mapping[str, Any], prefix: str = "") -> _Hooks:
    return {
        name.removeprefix(prefix): list(value.items())
        for name, value in attributes.items()
        if name.startswith(prefix) and "hook" in name and isinstance(value, Mapping)
    }


def _global_hooks() -> _Hooks:
    return _hooks_in(vars(torch.nn.modules.module), "_global")


def _hooks_of_tensor(tensor: Tensor) -> _Hooks:
    """Return the hooks of `register_hook` and `register_post_accumulate_grad_hook`."""
    kinds = {"gradient hooks": "_backward_hooks", "_post_accumulate_grad_hooks": "_post_accumulate_grad_hooks"}
    return {kind: list((getattr(tensor, name, None) or {}).items()) for kind, name in kinds.items()}


def _changed_hooks(before: _Hooks, now: _Hooks, where: str) -> Iterator[str]:
    for kind in before | now:
        old, new = dict(before.get(kind, [])), dict(now.get(kind, []))
        match = re.fullmatch(r"_?(\w+?)[_ ](pre_|post_)?hooks", kind)
        description = f"an entry of {kind}"
        if match is not None:  # "_load_state_dict_pre_hooks" becomes "a load-state-dict pre-hook"
            description = f"a {match[1]} {match[2] or ''}hook".replace("_", "-")
        for key, hook in new.items():
            if key not in old or old[key] is not hook:
                yield f"{description} was left {where}: {_hook_name(hook)}"
        for key, hook in old.items():
            if key not in new:
                yield f"{description} that existed before is missing {where}: {_hook_name(hook)}"
        if old.keys() == new.keys() and list(old) != list(new):
            yield f"the hooks of {kind} run in a different order {where}"


def _hook_name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", None) or type(hook).__qualname__)


def _attributes_of(module: nn.Module) -> dict[str, Any]:
    return {
        name: _Object(value) if _is_config(value) else take_snapshot(value)
        for name, value in vars(module).items()
        if name not in _COMPARED_SEPARATELY and not ("hook" in name and isinstance(value, Mapping))
    }


def _configs_of(modules: Mapping[str, nn.Module]) -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield each configuration once, under the first module that refers to it."""
    seen: set[int] = set()
    for path, module in modules.items():
        for name, value in vars(module).items():
            if _is_config(value) and id(value) not in seen:
                seen.add(id(value))
                yield (path, name), value


def _tensors_of(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for path, module in modules.items():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield f"{path}.{name}".lstrip("."), tensor


def _state_of(tensor: Tensor) -> _TensorState:
    grad = _grad_of(tensor)
    grad_values = None if grad is None else _dense(grad).clone()
    values, hooks = tensor.detach().clone(), _hooks_of_tensor(tensor)
    return _TensorState(tensor, values, tensor.requires_grad, grad, grad_values, hooks)


def _dense(grad: Tensor) -> Tensor:
    """Return a gradient as a dense tensor; the gradient of an embedding may be sparse."""
    return grad.detach() if grad.layout is torch.strided else grad.detach().to_dense()


def _grad_of(tensor: Tensor) -> Tensor | None:
    return tensor.grad if tensor.is_leaf else None


def _describe_values(now: Tensor, before: Tensor) -> str:
    return describe_difference(now, before, tolerance=0.0, axes=()) or "only in the sign of a zero or in a NaN"

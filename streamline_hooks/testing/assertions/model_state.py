"""Snapshot a model, to name what a temporary change has left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.digests import same_bits
from streamline_hooks.testing.assertions.difference import Difference, difference

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))


class _Missing:
    def __repr__(self) -> str:
        return "missing"


MISSING = _Missing()
"""Stands for an attribute that is not there."""


@dataclass(frozen=True, eq=False)
class Identity:
    """A value of which only counts that it is the same object."""

    held: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.held is self.held

    def __hash__(self) -> int:
        return id(self.held)

    def __repr__(self) -> str:
        return f"a {type(self.held).__name__}"


@dataclass(frozen=True, eq=False)
class Values:
    """A tensor object, and a copy of its values."""

    held: Tensor
    values: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and other.held is self.held and same_bits(self.values, other.values)

    def __hash__(self) -> int:
        return id(self.held)

    def __repr__(self) -> str:
        return f"a {type(self.held).__name__}"


@dataclass(frozen=True)
class Inside:
    """A container or configuration and its frozen items; `owner` is set where its identity counts."""

    owner: Identity | None
    kind: type
    items: dict[Any, Any]

    def __repr__(self) -> str:
        return f"a {self.kind.__name__} of {len(self.items)}"


def frozen(value: Any, around: tuple[int, ...] = ()) -> Any:
    """Return a snapshot of a value that can be compared after the value was changed in place.

    Numbers and texts are themselves; containers and configurations are entered; plain tensors are copied; anything else
    is compared by identity. `around` holds the ids of the enclosing containers.
    """
    if isinstance(value, _SIMPLE):
        return value
    if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_nested:
        return Values(value, value.detach().clone())
    if id(value) in around:  # a container that holds itself
        return Identity(value)
    around = (*around, id(value))
    if isinstance(value, Mapping):
        return Inside(None, type(value), {key: frozen(item, around) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return Inside(None, type(value), {k: frozen(item, around) for k, item in enumerate(value)})
    if isinstance(value, (set, frozenset)):
        return Inside(None, type(value), {item: True for item in value})
    if is_config(value):
        return Inside(Identity(value), type(value), {k: frozen(item, around) for k, item in vars(value).items()})
    return Identity(value)


def is_config(value: Any) -> bool:
    """Whether a value is a configuration, as Transformers has them."""
    return callable(getattr(type(value), "to_dict", None)) and hasattr(value, "__dict__")


def changed_places(before: Any, now: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Yield the path, old value and new value where two snapshots differ; the order of keys does not count."""
    if isinstance(before, Values) and isinstance(now, Values) and before.held is now.held:
        if before != now:
            yield path, *_first_change(before.values, now.values)
        return
    if not isinstance(before, Inside) or not isinstance(now, Inside):
        if type(before) is not type(now) or (before != now and before == before):
            yield path, repr(before), repr(now)
        return
    if before.kind is not now.kind:
        yield path, f"a {before.kind.__name__}", f"a {now.kind.__name__}"
        return
    if before.owner != now.owner:
        yield path, repr(before), f"another {now.kind.__name__} object"
    if before.owner is None and issubclass(before.kind, (list, tuple)) and len(before.items) != len(now.items):
        yield path, _listed(before), _listed(now)
        return
    for key in [*before.items, *(k for k in now.items if k not in before.items)]:
        inner = f"{path}.{key}" if before.owner is not None else f"{path}[{key!r}]"
        yield from changed_places(before.items.get(key, MISSING), now.items.get(key, MISSING), inner)


def _first_change(before: Tensor, now: Tensor) -> tuple[str, str]:
    """The first place at which two tensors differ, said of each."""
    if before.shape != now.shape or before.dtype != now.dtype:
        old, new = (f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}" for tensor in (before, now))
        return old, new
    a, b = (t.double() if t.is_floating_point() else t for t in (before, now.to(before.device)))
    apart = (a != b).nonzero()
    if not len(apart):
        return "a tensor of equal values", "a tensor with another sign of a zero"
    place = tuple(apart[0].tolist())
    return f"a tensor with {a[place].item():.9g} at {place}", f"a tensor with {b[place].item():.9g} at {place}"


def _listed(value: Inside) -> str:
    return repr(value.kind(value.items.values()) if value.kind in (list, tuple) else list(value.items.values()))


# Looked at in ways of their own. torch sets _is_full_backward_hook with the first such hook and never takes it back.
_LOOKED_AT = frozenset({"_parameters", "_buffers", "_modules", "_is_full_backward_hook"})
_HOOK_KINDS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_state_dict_hooks": "a state-dict hook",
    "_state_dict_pre_hooks": "a state-dict pre-hook",
    "_load_state_dict_pre_hooks": "a load-state-dict pre-hook",
    "_load_state_dict_post_hooks": "a load-state-dict post-hook",
    "gradient hooks": "a gradient hook",
    "_post_accumulate_grad_hooks": "a post-accumulate-grad hook",
}


@dataclass(frozen=True)
class _TensorState:
    held: Tensor
    values: Tensor
    requires_grad: bool
    grad: Tensor | None
    grad_values: Tensor | None
    hooks: dict[str, list[tuple[Any, Any]]]


class ModelState:
    """A snapshot of a model: modules, parameters, hooks, indices, configuration and state-dict keys."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._classes = {name: type(module) for name, module in self._modules.items()}
        self._children = {name: list(module._modules) for name, module in self._modules.items()}
        self._hooks = {name: _hooks_of(module) for name, module in self._modules.items()}
        self._attributes = {name: _attributes_of(module) for name, module in self._modules.items()}
        self._configs = {at: (config, frozen(config)) for at, config in _configs_of(self._modules)}
        self._tensors = {name: _tensor_state(tensor) for name, tensor in _tensors_of(self._modules)}
        self._not_looked_at: set[tuple[str, str]] = set()
        self._keys = list(model.state_dict())
        self._everywhere = _hooks_of_all_modules()

    def let_run(self, run: Callable[[], object]) -> None:
        """Run something, and ignore the attributes that change by it, such as RecurrentGemma's recurrent state."""
        run()
        for name, module in self._modules.items():
            before, now = self._attributes[name], _attributes_of(module)
            for attribute in before.keys() | now.keys():
                places = changed_places(before.get(attribute, MISSING), now.get(attribute, MISSING), attribute)
                if next(places, None) is not None:
                    self._not_looked_at.add((name, attribute))

    def changes(self) -> list[str]:
        """What is no longer as it was, each in a sentence without its full stop."""
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
                yield f"{_called(name)} ({type(module).__name__}) is gone"
            elif now[name] is not module:
                yield f"{_called(name)} is another module ({type(now[name]).__name__}) than before"
            elif type(module) is not self._classes[name]:
                yield f"{_called(name)} is a {type(module).__name__}; it was a {self._classes[name].__name__}"
            else:
                before, after = self._children[name], list(module._modules)
                if before != after and set(before) == set(after):
                    yield f"the submodules of {_called(name)} are in another order: {after}; they were {before}"
        for name in now.keys() - self._modules.keys():
            yield f"{_called(name)} ({type(now[name]).__name__}) was left in the model"

    def _changed_tensors(self) -> Iterator[str]:
        now = dict(_tensors_of(dict(self.model.named_modules(remove_duplicate=False))))
        for name, before in self._tensors.items():
            if name not in now:
                yield f"{name} is gone"
                continue
            tensor = now[name]
            if tensor is not before.held:
                same = " of equal values" if same_bits(tensor, before.values) else ""
                yield f"{name} is another {type(tensor).__name__} object than before{same}: an optimizer loses it"
            if not same_bits(tensor, before.values):
                yield f"{name} has other values: {_how_different(tensor, before.values)}"
            if tensor.requires_grad != before.requires_grad:
                yield f"requires_grad of {name} is {tensor.requires_grad}; it was {before.requires_grad}"
            if _grad_of(tensor) is not before.grad:
                yield f"the gradient of {name} is another one than before"
            elif before.grad is not None and before.grad_values is not None:
                now_held = _dense(before.grad)
                if not same_bits(now_held, before.grad_values):
                    how = _how_different(now_held, before.grad_values)
                    yield f"the gradient of {name} has other values: {how}"
            yield from _compared_hooks(before.hooks, _hooks_of_tensor(tensor), f"on {name}")
        for name in now.keys() - self._tensors.keys():
            yield f"{name} was left in the model"

    def _changed_hooks(self) -> Iterator[str]:
        for name, module in self._modules.items():
            yield from _compared_hooks(self._hooks[name], _hooks_of(module), f"on {_called(name)}")
        yield from _compared_hooks(self._everywhere, _hooks_of_all_modules(), "on all modules of this process")

    def _changed_attributes(self) -> Iterator[str]:
        for name, module in self._modules.items():
            before, now = self._attributes[name], _attributes_of(module)
            for attribute in [*before, *(key for key in now if key not in before)]:
                if (name, attribute) in self._not_looked_at:
                    continue
                for path, old, new in changed_places(
                    before.get(attribute, MISSING), now.get(attribute, MISSING), attribute
                ):
                    yield f"{path} of {_called(name)} says {new}; it was {old}"
        for (name, attribute), (config, described) in self._configs.items():
            for path, old, new in changed_places(described, frozen(config), attribute):
                yield f"{path} of {_called(name)} says {new}; it was {old}"

    def _changed_keys(self) -> Iterator[str]:
        now = list(self.model.state_dict())
        if now == self._keys:
            return
        if sorted(now) == sorted(self._keys):
            k = next(k for k, (a, b) in enumerate(zip(now, self._keys, strict=True)) if a != b)
            yield f"the state dict has its keys in another order: key {k} is {now[k]}; it was {self._keys[k]}"
        else:
            gone = [key for key in self._keys if key not in now]
            new = [key for key in now if key not in self._keys]
            yield f"the state dict has other keys: gone {gone[:3]}, new {new[:3]}"


def _called(name: str) -> str:
    return f"model.{name}" if name and name[0].isdigit() else name or "the model"


def _hooks_of(module: nn.Module) -> dict[str, list[tuple[Any, Any]]]:
    return {
        name: list(value.items())
        for name, value in vars(module).items()
        if "hook" in name and isinstance(value, Mapping)
    }


def _hooks_of_all_modules() -> dict[str, list[tuple[Any, Any]]]:
    everywhere = torch.nn.modules.module
    return {
        name.removeprefix("_global"): list(value.items())
        for name, value in vars(everywhere).items()
        if name.startswith("_global") and "hook" in name and isinstance(value, Mapping)
    }


def _compared_hooks(
    before: dict[str, list[tuple[Any, Any]]], now: dict[str, list[tuple[Any, Any]]], where: str
) -> Iterator[str]:
    for kind in [*before, *(k for k in now if k not in before)]:
        old, new = before.get(kind, []), now.get(kind, [])
        if old == new:
            continue
        known = {key: hook for key, hook in old}
        left = {key: hook for key, hook in new}
        what = _HOOK_KINDS.get(kind, f"an entry of {kind}")
        for key, hook in new:
            if key not in known or known[key] is not hook:
                yield f"{what} was left {where}: {_named_hook(hook)}"
        for key, hook in old:
            if key not in left:
                yield f"{what} that was there before is gone {where}: {_named_hook(hook)}"
        if sorted(map(str, known)) == sorted(map(str, left)) and list(known) != list(left):
            yield f"the hooks of {kind} run in another order {where}"


def _named_hook(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", None) or type(hook).__qualname__)


def _attributes_of(module: nn.Module) -> dict[str, Any]:
    return {
        name: Identity(value) if is_config(value) else frozen(value)
        for name, value in vars(module).items()
        if name not in _LOOKED_AT and not ("hook" in name and isinstance(value, Mapping))
    }


def _configs_of(modules: Mapping[str, nn.Module]) -> Iterator[tuple[tuple[str, str], Any]]:
    """Each configuration once, under the first module that holds it: most modules hold the same one."""
    seen: set[int] = set()
    for path, module in modules.items():
        for name, value in vars(module).items():
            if is_config(value) and id(value) not in seen:
                seen.add(id(value))
                yield (path, name), value


def _tensors_of(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for path, module in modules.items():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield f"{path}.{name}".lstrip("."), tensor


def _tensor_state(tensor: Tensor) -> _TensorState:
    grad = _grad_of(tensor)
    copied = None if grad is None else _dense(grad).clone()
    return _TensorState(
        tensor, tensor.detach().clone(), tensor.requires_grad, grad, copied, _hooks_of_tensor(tensor)
    )  # fmt: skip


def _dense(tensor: Tensor) -> Tensor:
    """A gradient may be sparse, as an embedding's."""
    return tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()


def _hooks_of_tensor(tensor: Tensor) -> dict[str, list[tuple[Any, Any]]]:
    """What `register_hook` and `register_post_accumulate_grad_hook` have set."""
    kinds = {"gradient hooks": "_backward_hooks", "_post_accumulate_grad_hooks": "_post_accumulate_grad_hooks"}
    return {kind: list((getattr(tensor, name, None) or {}).items()) for kind, name in kinds.items()}


def _grad_of(tensor: Tensor) -> Tensor | None:
    return tensor.grad if tensor.is_leaf else None


def _how_different(now: Tensor, before: Tensor) -> str:
    found = difference(now, before, tolerance=0.0, axes=())
    if isinstance(found, Difference):
        return str(found).replace("axis", "index").removesuffix("; expected: equal to the bit)") + ")"
    return found or "only in the sign of a zero, or in a NaN"

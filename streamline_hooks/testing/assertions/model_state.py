"""Everything that a model is, so that what a temporary change has left behind can be named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.digests import same_bits
from streamline_hooks.testing.assertions.difference import Difference, difference
from streamline_hooks.testing.assertions.frozen import MISSING, Identity, changed_places, frozen, is_config

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
    """A model at one moment: modules, parameters, hooks, numbers, configuration, keys.

    Parameters
    ----------
    model : torch.nn.Module
        It is not changed. The values of its tensors are copied.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> before = ModelState(model)
    >>> handle = model[1].register_forward_hook(print)
    >>> model[0].weight.requires_grad = False
    >>> print(*before.changes(), sep="; ")
    requires_grad of 0.weight is False; it was True; a forward hook was left on model.1: print
    >>> handle.remove()
    >>> model[0].weight.requires_grad = True
    >>> before.changes()
    []
    """

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
        """Run something, and no longer look at the attributes that change by it.

        Some models keep what the last forward made (RecurrentGemma its recurrent state): that another one came after
        it is no trace of a change.

        Parameters
        ----------
        run : callable
            Does to the model what is done to it anyway, such as a forward.
        """
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

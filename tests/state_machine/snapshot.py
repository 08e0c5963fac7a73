"""Everything that must be the same object, and have the same name and order, after a surgeon has closed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from streamline_hooks.surgery.edits import ORIGIN

_PLAIN = (int, float, str, bool, type(None), tuple, list, dict, set)
# Compared in ways of their own: tensors and modes with the reference, children as modules, and by
# the machine the mark that each block carries while a surgeon is open.
_ELSEWHERE = {"_parameters", "_buffers", "_modules", "training", ORIGIN}


class Snapshot:
    """A model at one moment. It holds the objects, so that no other one can get their ``id``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.facts = _facts(model)

    def changes(self, *, buffers: bool = True) -> list[str]:
        """Return what is no longer the same.

        Parameters
        ----------
        buffers : bool
            Whether buffers must be the same objects: ``model.to(dtype)`` replaces them.
        """
        now = _facts(self.model)
        found = []
        for key in [*self.facts, *(key for key in now if key not in self.facts)]:
            if not buffers and key.startswith("buffer "):
                continue
            old, new = self.facts.get(key, "absent"), now.get(key, "absent")
            if not _same(old, new):
                found.append(f"{key}: {_shown(old)} -> {_shown(new)}")
        return found

    def require_unchanged(self, *, buffers: bool = True) -> None:
        """Raise an AssertionError that names every change."""
        changes = self.changes(buffers=buffers)
        if changes:
            raise AssertionError("\n".join(["The model is not as it was:", *changes]))


def _shown(value: Any) -> str:
    """Return a short text; printing the values of a tensor takes longer than a step."""
    if isinstance(value, (nn.Module, Tensor)):
        return f"{type(value).__name__} at {id(value):#x}"
    return f"{value!r:.200}"


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if type(old) is not type(new) or isinstance(old, (nn.Module, Tensor)):
        return False
    if isinstance(old, Mapping):
        return list(old) == list(new) and all(_same(a, b) for a, b in zip(old.values(), new.values(), strict=True))
    if isinstance(old, (list, tuple)):
        return len(old) == len(new) and all(_same(a, b) for a, b in zip(old, new, strict=True))
    return isinstance(old, _PLAIN) and bool(old == new)


def _copied(value: Any) -> Any:
    """Return containers anew, with the same objects in them."""
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_copied(inner) for inner in value)
    return value


def _facts(model: nn.Module) -> dict[str, Any]:
    facts: dict[str, Any] = {"state dict": list(model.state_dict())}
    configs: dict[int, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        facts[f"module {name}"] = module
        facts[f"class {name}"] = type(module).__name__
        facts[f"children {name}"] = list(module._modules)
        facts[f"attributes {name}"] = sorted({*vars(module)} - {ORIGIN})
        for key, value in module._parameters.items():
            facts[f"parameter {name}.{key}"] = value
        for key, value in module._buffers.items():
            facts[f"buffer {name}.{key}"] = value
        for key, value in vars(module).items():
            if key in _ELSEWHERE:
                continue
            facts[f"attribute {name}.{key}"] = _copied(value)
            if hasattr(value, "to_dict"):
                configs[id(value)] = (f"{name}.{key}", value)
    for name, config in configs.values():
        for key, value in vars(config).items():
            facts[f"config {name}.{key}"] = _copied(value)
    return facts

"""Give a model its own copies of the configurations that a surgery changes, because other models may share them."""

from __future__ import annotations

import copy
import gc
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass, replace
from types import SimpleNamespace
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

from torch import nn

from streamline_hooks.modeling import BlockStack, find_stacks
from streamline_hooks.surgery.layer_indices import configs_of_stack
from streamline_hooks.surgery.save_guard import saved_model_depth

_MISSING = object()


class _ConfigCopy:
    """A configuration, its copy, and the surgeries that need the copy."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.copy = copy.copy(original)
        self.loaded: dict[str, Any] = {}
        self.users: WeakSet[ConfigCopies] = WeakSet()
        self.holders: dict[tuple[int, str], ReferenceType[nn.Module]] = {}
        self.is_kept = False

    def load(self, copies: dict[int, Any]) -> None:
        """Copy the original's values, and replace copied configurations among them by their copies."""
        self.loaded = {name: copies.get(id(value), value) for name, value in vars(self.original).items()}
        vars(self.copy).clear()
        vars(self.copy).update(self.loaded)

    def unload(self, originals: dict[int, Any]) -> None:
        """Transfer changes by other code from the copy to the original, and discard those of the surgery."""
        now, values = vars(self.copy), vars(self.original)
        for name in [*self.loaded, *now]:
            value = now.get(name, _MISSING)
            if value is _MISSING:
                values.pop(name, None)
            elif value is not self.loaded.get(name, _MISSING):
                values[name] = originals.get(id(value), value)


_open_copies: dict[int, _ConfigCopy] = {}  # by the copy's id; several surgeons on a model share its copies


class ConfigCopies:
    """Copies of a model's configurations, which replace the originals while a surgery is open.

    `inside` is the original stack with the copied configuration.
    """

    def __init__(self, stack: BlockStack) -> None:
        self._stack = stack
        self._roots = [root_of_config(stack)]
        prefix = getattr(stack.model, "base_model_prefix", "")
        if prefix and not hasattr(stack.model, str(prefix)):  # possibly part of a model with a head and this config
            self._roots += self._around()
        self._copies: list[_ConfigCopy] = []
        self._foreign: dict[int, Any] = {}
        self._find(_configs_to_copy(stack, self._roots))
        self.inside = replace(stack, config=self._of(stack.config))

    def _around(self) -> list[nn.Module]:
        return _enclosing_modules(self._stack) if self._roots[0] is self._stack.model else []

    def _find(self, changing: dict[int, Any]) -> None:
        """Find the modules that refer to these configurations, and the configurations that contain them."""
        unrelated: set[int] = set()
        for module in dict.fromkeys(module for root in self._roots for module in root.modules()):
            for name, value in vars(module).items():
                if type(value) not in _PLAIN_TYPES and _refers_to_copied(value, changing, unrelated):
                    self._entry(value).holders[id(module), name] = ref(module)
        for entry in self._copies:  # the loop appends to the list
            for value in vars(entry.original).values():
                if id(value) in changing:
                    self._entry(value)

    def _entry(self, config: Any) -> _ConfigCopy:
        for entry in self._copies:
            if config is entry.original or config is entry.copy:
                return entry
        self._copies.append(_open_copies.get(id(config)) or _ConfigCopy(config))
        return self._copies[-1]

    def _of(self, config: Any) -> Any:
        return next((entry.copy for entry in self._copies if config is entry.original), config)

    def is_original(self, config: Any) -> bool:
        """Whether a configuration is an original that was copied, and now belongs to other models only."""
        return any(config is entry.original for entry in self._copies)

    def apply(self) -> BlockStack:
        """Replace the originals by the copies in the model, and return `inside`. Can be repeated."""
        copies = {id(entry.original): entry.copy for entry in self._copies}
        for entry in self._copies:
            if id(entry.copy) not in _open_copies and not entry.is_kept:
                entry.load(copies)
            entry.users.add(self)
            _open_copies[id(entry.copy)] = entry
            for (_, name), holder in entry.holders.items():
                _swap_attribute(holder(), name, entry.original, entry.copy)
        return self.inside

    def restore(self, *, search: bool = True) -> BlockStack:
        """Restore the originals in the model, unless another surgery needs the copies, and return the original stack.

        `search` additionally finds modules that have started to refer to a copy. Can be repeated.
        """
        originals = {id(entry.copy): entry.original for entry in self._copies}
        for entry in self._copies:
            entry.users.discard(self)
            if entry.users:
                continue
            if not entry.is_kept:
                entry.unload(originals)
                for (_, name), holder in entry.holders.items():
                    _swap_attribute(holder(), name, entry.copy, entry.original)
                for module in [m for root in self._roots for m in root.modules()] if search else ():
                    for name in [name for name, value in vars(module).items() if value is entry.copy]:
                        _swap_attribute(module, name, entry.copy, entry.original)
            _open_copies.pop(id(entry.copy), None)
        return self._stack

    def make_permanent(self) -> None:
        """Keep the copies permanently in the model and the modules around it."""
        if self._copies:
            self._roots += self._around()
            self._find({id(entry.original): entry.original for entry in self._copies})
            self.apply()
        for entry in self._copies:
            entry.is_kept = True
        self.restore()
        self._roots, self._copies, self._foreign = [], [], {}
        self._stack = self.inside = replace(self.inside, blocks=())

    def foreign_configs(self, module: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
        """Yield each attribute of a new module that refers to a config of other models, with its replacement."""
        config = self.inside.config
        if config is None:
            return
        for part in module.modules():
            for name, value in list(vars(part).items()):
                config_copy = self._of(value)
                if config_copy is not value:
                    yield part, name, config_copy
                elif name == "config" and (isinstance(value, type(config)) or isinstance(config, type(value))):
                    own_configs = [entry.copy for entry in self._copies] + list(self._foreign.values())
                    if not any(value is each for each in own_configs):
                        yield part, name, self._foreign.setdefault(id(value), copy.copy(value))


def root_of_config(stack: BlockStack) -> nn.Module:
    """Return the outermost module around a stack that belongs to the same model.

    A wrapper may contain several models (a teacher and a student) that share a configuration. The Transformers model
    around the stack is the root. A wrapper around the model is the root only if it contains no other stack that the
    configuration describes by the same attribute.
    """
    saver = saved_model_depth(stack)
    for depth, module in enumerate(stack.ancestors[:-1]):
        if depth == saver or not _describes_another(module, stack):
            return module
    return stack.ancestors[-1]


def _describes_another(module: nn.Module, stack: BlockStack) -> bool:
    """Whether the stack's configuration describes another stack inside a module by the same attribute."""
    return stack.config is not None and any(
        other.config is stack.config
        and other.container is not stack.container
        and (other.count_attribute, other.stage) == (stack.count_attribute, stack.stage)
        for other in find_stacks(module)
    )


def _configs_to_copy(stack: BlockStack, roots: Iterable[nn.Module]) -> dict[int, Any]:
    """Return the configurations that a surgery on a stack may change, by their id."""
    depth = stack.ancestors.index(root_of_config(stack))
    owners = [*stack.ancestors[depth:], *roots]
    configs = [*configs_of_stack(stack), *(vars(owner).get("config") for owner in owners)]
    configs += [
        generation_config
        for o in owners
        if getattr(generation_config := vars(o).get("generation_config"), "alignment_heads", None)
    ]
    return {id(config): config for config in configs if hasattr(config, "__dict__")}


def _refers_to_copied(value: Any, changing: dict[int, Any], unrelated: set[int]) -> bool:
    """Whether a value is a configuration that changes or contains one. The containing ones are added to `changing`."""
    if id(value) in changing:
        return True
    if id(value) in unrelated or not _is_config(value):
        return False
    unrelated.add(id(value))
    if any([_refers_to_copied(inner, changing, unrelated) for inner in vars(value).values()]):
        changing[id(value)] = value
        unrelated.discard(id(value))
        return True
    return False


_PLAIN_TYPES = frozenset({bool, int, float, str, type(None), dict, OrderedDict, set, list, tuple})  # most attributes
_CONFIG_TYPES: WeakKeyDictionary[type, bool] = WeakKeyDictionary()  # every attribute of every module is asked


def _is_config(value: Any) -> bool:
    if isinstance(value, type):
        return False
    kind = type(value)
    is_config = _CONFIG_TYPES.get(kind)
    if is_config is None:
        is_plain = is_dataclass(kind) or issubclass(kind, (SimpleNamespace, Namespace))
        is_config = _CONFIG_TYPES[kind] = is_plain or callable(getattr(kind, "get_text_config", None))
    return is_config and hasattr(value, "__dict__")


def _swap_attribute(module: nn.Module | None, name: str, old: Any, new: Any) -> None:
    if module is not None and vars(module).get(name) is old:
        vars(module)[name] = new


def _enclosing_modules(stack: BlockStack) -> list[nn.Module]:
    """Return the modules around the model of a stack, from inside out, that belong to the same model.

    They are found through the garbage collector, because a module has no reference to its parents.
    """
    enclosing: list[nn.Module] = []
    pending = [stack.model]
    while pending:
        inside = pending.pop()
        tables = [d for d in gc.get_referrers(inside) if isinstance(d, dict) and _contains_module(d, inside)]
        holders = gc.get_referrers(*tables) if tables else []
        states = [h for h in holders if isinstance(h, dict) and any(h.get("_modules") is d for d in tables)]
        owners = [h for h in holders if isinstance(h, nn.Module)]
        owners += [o for o in gc.get_referrers(*states) if isinstance(o, nn.Module)] if states else []
        for owner in owners:
            if (
                _contains_module(owner._modules, inside)
                and owner not in enclosing
                and not _describes_another(owner, stack)
            ):
                enclosing.append(owner)
                pending.append(owner)
    return enclosing


def _contains_module(table: dict[Any, Any], module: nn.Module) -> bool:
    return any(value is module for value in table.values())

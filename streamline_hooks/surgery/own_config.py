"""Give a model its own copies of the configurations that a surgery changes, because other models may share them."""

from __future__ import annotations

import copy
import gc
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass, replace
from types import SimpleNamespace
from typing import Any
from weakref import ReferenceType, WeakSet, ref

from torch import nn

from streamline_hooks.stack import BlockStack, find_stacks
from streamline_hooks.surgery.renumber import same_descriptions
from streamline_hooks.surgery.saving import saver_depth

_MISSING = object()


class _Copy:
    """A configuration, the copy that stands in for it, and who needs the copy."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.copy = copy.copy(original)
        self.loaded: dict[str, Any] = {}
        self.users: WeakSet[OwnConfigs] = WeakSet()
        self.holders: dict[tuple[int, str], ReferenceType[nn.Module]] = {}
        self.is_kept = False

    def load(self, copies: dict[int, Any]) -> None:
        """Take the original's values; where these are copied configurations, their copies."""
        self.loaded = {name: copies.get(id(value), value) for name, value in vars(self.original).items()}
        vars(self.copy).clear()
        vars(self.copy).update(self.loaded)

    def unload(self, originals: dict[int, Any]) -> None:
        """Give the original what was set on the copy by others than the surgery, whose own changes are undone."""
        now, values = vars(self.copy), vars(self.original)
        for name in [*self.loaded, *now]:
            value = now.get(name, _MISSING)
            if value is _MISSING:
                values.pop(name, None)
            elif value is not self.loaded.get(name, _MISSING):
                values[name] = originals.get(id(value), value)


_live: dict[int, _Copy] = {}  # by the copy; several surgeons on one model share its copies


class OwnConfigs:
    """Copies of the configurations of a model, put in the place of the originals while a surgery is open.

    Parameters
    ----------
    stack : BlockStack
        As `find_stack` gives it.

    Attributes
    ----------
    inside : BlockStack
        The same stack, described by the copy.
    """

    def __init__(self, stack: BlockStack) -> None:
        self._stack = stack
        self._roots = [described_root(stack)]
        if _is_headless(stack.model):  # perhaps a part of a model with a head, which has the same configuration
            self._roots += self._around()
        self._copies: list[_Copy] = []
        self._foreign: dict[int, Any] = {}
        self._find(_changing(stack, self._roots))
        self.inside = replace(stack, config=self._of(stack.config))

    def _around(self) -> list[nn.Module]:
        return _containing(self._stack) if self._roots[0] is self._stack.model else []

    def _find(self, changing: dict[int, Any]) -> None:
        """Find who refers to these configurations, and to what holds them."""
        unrelated: set[int] = set()
        for module in dict.fromkeys(module for root in self._roots for module in root.modules()):
            for name, value in vars(module).items():
                if _reaches(value, changing, unrelated):
                    self._entry(value).holders[id(module), name] = ref(module)
        for entry in self._copies:  # grows
            for value in vars(entry.original).values():
                if id(value) in changing:
                    self._entry(value)

    def _entry(self, config: Any) -> _Copy:
        for entry in self._copies:
            if config is entry.original or config is entry.copy:
                return entry
        self._copies.append(_live.get(id(config)) or _Copy(config))
        return self._copies[-1]

    def _of(self, config: Any) -> Any:
        return next((entry.copy for entry in self._copies if config is entry.original), config)

    def is_original(self, config: Any) -> bool:
        """Whether a configuration is one that was copied, to which only other models refer now."""
        return any(config is entry.original for entry in self._copies)

    def put_in(self) -> BlockStack:
        """Let the model refer to the copies; does no harm the second time.

        Returns
        -------
        BlockStack
            `inside`.
        """
        copies = {id(entry.original): entry.copy for entry in self._copies}
        for entry in self._copies:
            if id(entry.copy) not in _live and not entry.is_kept:
                entry.load(copies)
            entry.users.add(self)
            _live[id(entry.copy)] = entry
            for (_, name), holder in entry.holders.items():
                _exchange(holder(), name, entry.original, entry.copy)
        return self.inside

    def put_back(self, *, search: bool = True) -> BlockStack:
        """Let the model refer to the originals again, unless another surgery needs the copies; harmless twice.

        Parameters
        ----------
        search : bool
            Whether to look for modules that have come to refer to a copy meanwhile.

        Returns
        -------
        BlockStack
            The stack as it was given.
        """
        originals = {id(entry.copy): entry.original for entry in self._copies}
        for entry in self._copies:
            entry.users.discard(self)
            if entry.users:
                continue
            if not entry.is_kept:
                entry.unload(originals)
                for (_, name), holder in entry.holders.items():
                    _exchange(holder(), name, entry.copy, entry.original)
                for module in [m for root in self._roots for m in root.modules()] if search else ():
                    for name in [name for name, value in vars(module).items() if value is entry.copy]:
                        _exchange(module, name, entry.copy, entry.original)
            _live.pop(id(entry.copy), None)
        return self._stack

    def keep(self) -> None:
        """Let the model, and what it is a part of, have the copies for good."""
        if self._copies:
            self._roots += self._around()
            self._find({id(entry.original): entry.original for entry in self._copies})
            self.put_in()
        for entry in self._copies:
            entry.is_kept = True
        self.put_back()
        self._roots, self._copies, self._foreign = [], [], {}
        self._stack = self.inside = replace(self.inside, blocks=())

    def of_new_module(self, module: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
        """Find where a module that is put in refers to a configuration that would be changed and is not its own.

        Yields
        ------
        module : torch.nn.Module
            One inside of it.
        name : str
        value : object
            What the attribute must be.
        """
        count, config = self.inside.count_attribute, self.inside.config
        if count is None:
            return
        for part in module.modules():
            for name, value in list(vars(part).items()):
                own = self._of(value)
                if own is not value:
                    yield part, name, own
                elif name == "config" and (isinstance(value, type(config)) or isinstance(config, type(value))):
                    entries = [entry.copy for entry in self._copies] + list(self._foreign.values())
                    if not any(value is entry for entry in entries):
                        yield part, name, self._foreign.setdefault(id(value), copy.copy(value))


def described_root(stack: BlockStack) -> nn.Module:
    """Return the outermost module around a stack that belongs to the same model.

    A wrapper may hold several models (a teacher and a student) that share a configuration. The Transformers model
    around the stack is the root; a wrapper around it is only where the configuration describes no other stack in it
    by the same attribute.

    Parameters
    ----------
    stack : BlockStack

    Returns
    -------
    torch.nn.Module
    """
    saver = saver_depth(stack)
    for depth, module in enumerate(stack.ancestors[:-1]):
        if depth == saver or not _describes_another(module, stack):
            return module
    return stack.ancestors[-1]


def _describes_another(module: nn.Module, stack: BlockStack) -> bool:
    """Whether the stack's configuration describes another stack inside of a module by the same attribute."""
    return stack.config is not None and any(
        other.config is stack.config
        and other.container is not stack.container
        and (other.count_attribute, other.stage) == (stack.count_attribute, stack.stage)
        for other in find_stacks(module)
    )


def _changing(stack: BlockStack, roots: Iterable[nn.Module]) -> dict[int, Any]:
    """The configurations that a surgery on a stack may change, by their id."""
    depth = stack.ancestors.index(described_root(stack))
    owners = [*stack.ancestors[depth:], *roots]
    configs = [*same_descriptions(stack), *(vars(owner).get("config") for owner in owners)]
    configs += [own for o in owners if getattr(own := vars(o).get("generation_config"), "alignment_heads", None)]
    return {id(config): config for config in configs if hasattr(config, "__dict__")}


def _reaches(value: Any, changing: dict[int, Any], unrelated: set[int]) -> bool:
    """Whether a value is a configuration that changes, or holds one; what holds one changes too."""
    if id(value) in changing:
        return True
    if id(value) in unrelated or not _is_config(value):
        return False
    unrelated.add(id(value))
    if any([_reaches(inner, changing, unrelated) for inner in vars(value).values()]):
        changing[id(value)] = value
        unrelated.discard(id(value))
        return True
    return False


def _is_config(value: Any) -> bool:
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    plain = is_dataclass(value) or isinstance(value, (SimpleNamespace, Namespace))
    return plain or callable(getattr(type(value), "get_text_config", None))


def _exchange(module: nn.Module | None, name: str, old: Any, new: Any) -> None:
    if module is not None and vars(module).get(name) is old:
        vars(module)[name] = new


def _is_headless(model: Any) -> bool:
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and not hasattr(model, prefix)


def _containing(stack: BlockStack) -> list[nn.Module]:
    """The modules around the model of a stack, from inside out, as far as they belong to the same model.

    A module knows its children and not its parents, so that the garbage collector is asked.
    """
    found: list[nn.Module] = []
    waiting = [stack.model]
    while waiting:
        inside = waiting.pop()
        tables = [d for d in gc.get_referrers(inside) if isinstance(d, dict) and _values_include(d, inside)]
        holders = gc.get_referrers(*tables) if tables else []
        states = [h for h in holders if isinstance(h, dict) and any(h.get("_modules") is d for d in tables)]
        owners = [h for h in holders if isinstance(h, nn.Module)]
        owners += [o for o in gc.get_referrers(*states) if isinstance(o, nn.Module)] if states else []
        for owner in owners:
            if _values_include(owner._modules, inside) and owner not in found and not _describes_another(owner, stack):
                found.append(owner)
                waiting.append(owner)
    return found


def _values_include(table: dict[Any, Any], module: nn.Module) -> bool:
    return any(value is module for value in table.values())

"""Plain values as they are at one moment, to be compared with what they are later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.digests import same_bits

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
    """A tensor, of which the object counts and what it holds.

    Attributes
    ----------
    held : torch.Tensor
        The object itself.
    values : torch.Tensor
        A copy of what it held.
    """

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
    """A container or a configuration, and what it holds.

    Attributes
    ----------
    owner : Identity or None
        The object itself, where its identity counts: a configuration's does, a list's does not.
    kind : type
    items : dict
        Frozen values, by key or position.
    """

    owner: Identity | None
    kind: type
    items: dict[Any, Any]

    def __repr__(self) -> str:
        return f"a {self.kind.__name__} of {len(self.items)}"


def frozen(value: Any, around: tuple[int, ...] = ()) -> Any:
    """What can be compared later of a value that may be changed in place meanwhile.

    Numbers and texts are themselves; containers and configurations (what has ``to_dict``) are looked into; of a tensor
    its values are copied; of anything else its identity is kept, as of a tensor of another class or layout.

    Parameters
    ----------
    value : Any
    around : tuple of int
        The ids of the containers that it lies in.

    Examples
    --------
    >>> kinds = ["full", "sliding"]
    >>> before = frozen(kinds)
    >>> kinds[1] = "full"
    >>> list(changed_places(before, frozen(kinds), "layer_types"))
    [('layer_types[1]', "'sliding'", "'full'")]
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
    """Where two frozen values differ: the path, the value before, the value now.

    The order of keys does not count.
    """
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

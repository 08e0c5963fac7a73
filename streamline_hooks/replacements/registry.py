"""The kinds of replacement, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

from torch import nn

from streamline_hooks.errors import StreamlineError


@runtime_checkable
class Replacement(Protocol):
    """What a module needs so that a checkpoint can hold it and build it again.

    A replacement is any ``torch.nn.Module`` that maps (batch, tokens, features) to the same shape; this protocol is
    what `register_module` asks of it beyond that.
    """

    kind: ClassVar[str]

    def to_config(self) -> dict[str, Any]:
        """The keyword arguments that build this module again, as JSON values."""
        ...


_Class = TypeVar("_Class", bound=type)
REGISTERED: dict[str, type[nn.Module]] = {}


def register_module(kind: str) -> Callable[[_Class], _Class]:
    """Name a class of replacements, so that checkpoints can hold it.

    Parameters
    ----------
    kind : str
        The name that is written into checkpoints.

    Returns
    -------
    callable
        A class decorator. The class needs a method ``to_config()`` that returns the keyword arguments of its
        constructor as JSON values.

    Raises
    ------
    StreamlineError
        If the name is taken by another class, or the class lacks ``to_config``.

    Examples
    --------
    >>> import torch
    >>> @register_module("doctest-shift")
    ... class Shift(torch.nn.Module):
    ...     def __init__(self, features: int) -> None:
    ...         super().__init__()
    ...         self.bias = torch.nn.Parameter(torch.zeros(features))
    ...
    ...     def to_config(self):
    ...         return {"features": self.bias.numel()}
    ...
    ...     def forward(self, state):
    ...         return state + self.bias
    >>> build_replacement("doctest-shift", {"features": 4}).bias.shape
    torch.Size([4])
    """
    if not isinstance(kind, str) or not kind:
        raise StreamlineError(f"kind={kind!r} is no name. Expected a string. Pass the name for checkpoints.")

    def register(cls: _Class) -> _Class:
        known = REGISTERED.get(kind)
        if known is not None and f"{known.__module__}.{known.__qualname__}" != f"{cls.__module__}.{cls.__qualname__}":
            raise StreamlineError(f"The kind {kind!r} is {known.__qualname__} already; choose another name.")
        if not (issubclass(cls, nn.Module) and callable(getattr(cls, "to_config", None))):
            raise StreamlineError(
                f"{cls.__name__} cannot be registered as {kind!r}: expected an nn.Module with a method to_config() "
                "that returns its constructor's keyword arguments."
            )
        cls.kind = kind  # type: ignore[attr-defined]
        REGISTERED[kind] = cls
        return cls

    return register


def is_own(kind: str) -> bool:
    """Whether a registered class of replacements comes from where this function does, and not from a user."""
    return kind in REGISTERED and REGISTERED[kind].__module__.partition(".")[0] == __name__.partition(".")[0]


def build_replacement(kind: str, config: dict[str, Any]) -> nn.Module:
    """Build a replacement from what a checkpoint says of it.

    Raises
    ------
    StreamlineError
        If the kind is unknown; the text lists the known ones.
    """
    if kind not in REGISTERED:
        raise StreamlineError(
            f"The kind of replacement {kind!r} is unknown. Known here: {', '.join(sorted(REGISTERED))}. If it is your "
            "own, import the module that registers it (register_module) before loading."
        )
    return REGISTERED[kind](**config)


def replacement_config(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """The kind and the configuration of a replacement, for a checkpoint.

    Raises
    ------
    StreamlineError
        If the module's class is not registered.
    """
    kind = getattr(type(module), "kind", None)
    if kind is None or REGISTERED.get(kind) is not type(module):
        raise StreamlineError(
            f"A {type(module).__name__} cannot be written to a checkpoint: nothing says how to build it again. "
            "Decorate its class with @register_module('a-name') and give it to_config()."
        )
    return kind, cast(Replacement, module).to_config()

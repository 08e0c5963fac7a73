"""Registry of replacement modules by kind."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

from torch import nn

from streamline_hooks.core import StreamlineError


@runtime_checkable
class Replacement(Protocol):
    """Protocol of a module that maps (batch, tokens, features) to the same shape and is rebuilt from a checkpoint.

    Attributes
    ----------
    kind : str
        Name in checkpoints, set by `register_module`.

    Examples
    --------
    >>> from streamline_hooks.replacements import LinearReplacement
    >>> isinstance(LinearReplacement(8), Replacement), LinearReplacement(8).kind
    (True, 'linear')
    """

    kind: ClassVar[str]

    def to_config(self) -> dict[str, Any]:
        """Return the keyword arguments of the constructor, as JSON values."""
        ...


_Class = TypeVar("_Class", bound=type)
REGISTERED: dict[str, type[nn.Module]] = {}


def register_module(kind: str) -> Callable[[_Class], _Class]:
    """Register a replacement class under the name that is written to checkpoints.

    Parameters
    ----------
    kind : str
        Name of the class in checkpoints.

    Returns
    -------
    callable
        A class decorator. The class must be an `nn.Module` with a method ``to_config()`` that returns the keyword
        arguments of its constructor as JSON values.

    Raises
    ------
    StreamlineError
        If the name is registered for a different class, or the class has no ``to_config``.

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
    >>> from streamline_hooks.replacements import build_replacement
    >>> build_replacement("doctest-shift", {"features": 4}).bias.shape
    torch.Size([4])
    """
    if not isinstance(kind, str) or not kind:
        raise StreamlineError(f"kind={kind!r} is not a name. Expected a string. Pass the name for checkpoints.")

    def register(cls: _Class) -> _Class:
        known = REGISTERED.get(kind)
        if known is not None and f"{known.__module__}.{known.__qualname__}" != f"{cls.__module__}.{cls.__qualname__}":
            raise StreamlineError(
                f"The kind {kind!r} is already registered for {known.__qualname__}. Choose another name."
            )
        if not (issubclass(cls, nn.Module) and callable(getattr(cls, "to_config", None))):
            raise StreamlineError(
                f"{cls.__name__} cannot be registered as {kind!r}. Expected an nn.Module with a method to_config() "
                "that returns the keyword arguments of the constructor. Add the method."
            )
        cls.kind = kind  # type: ignore[attr-defined]
        REGISTERED[kind] = cls
        return cls

    return register


def is_own(kind: str) -> bool:
    """Whether a kind is registered by this package or by its copy in a checkpoint, not by a user."""
    return kind in REGISTERED and REGISTERED[kind].__module__.partition(".")[0] == __name__.partition(".")[0]


def build_replacement(kind: str, config: dict[str, Any]) -> nn.Module:
    """Build a replacement module from its kind and config.

    Parameters
    ----------
    kind : str
        A registered name, see `register_module`.
    config : dict
        Keyword arguments of the constructor, as returned by ``to_config()``.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    StreamlineError
        If the kind is unknown. Installed packages are searched first.

    Examples
    --------
    >>> build_replacement("linear", {"features": 8, "rank": 2}).rank
    2
    """
    problems = "" if kind in REGISTERED else _import_entry_points()
    if kind not in REGISTERED:
        raise StreamlineError(
            f"The kind of replacement {kind!r} is unknown. Expected one of {', '.join(sorted(REGISTERED))}. Import the "
            f"module that registers a custom kind (register_module) before loading.{problems}"
        )
    return REGISTERED[kind](**config)


def _import_entry_points() -> str:
    """Import the replacements of installed packages, which registers their modules; return the import errors."""
    problems = []
    for entry_point in entry_points(group="streamline_hooks.replacements"):
        try:
            entry_point.load()
        except (Exception, SystemExit) as error:  # importing a package may raise anything
            package = entry_point.dist.name if entry_point.dist is not None else entry_point.module
            problems.append(f" The installed package {package} raised {type(error).__name__}: {error}.")
    return "".join(problems)


def replacement_config(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return the kind and config of a replacement; raise StreamlineError if its class is not registered."""
    kind = getattr(type(module), "kind", None)
    if kind is None or REGISTERED.get(kind) is not type(module):
        raise StreamlineError(
            f"{type(module).__name__} cannot be written to a checkpoint: the class is not registered, so it cannot be "
            "rebuilt. Decorate it with @register_module('a-name') and add a method to_config()."
        )
    return kind, cast(Replacement, module).to_config()

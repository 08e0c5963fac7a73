"""The base of all configs: frozen dataclasses that validate themselves and are written to plain values and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin

from streamline_hooks.arguments import Bound as Bound
from streamline_hooks.arguments import check_fields, field_hints, nearest
from streamline_hooks.errors import StreamlineError

T = TypeVar("T")
C = TypeVar("C", bound="Config")


class Registry(dict[str, T]):
    """What has been registered, by name. Looking up an unknown name raises, and suggests the nearest known one.

    Parameters
    ----------
    what : str
        What is registered, for error messages: ``"criterion"``.
    how : str
        The function that registers one.
    source : callable, optional
        Returns where an entry was defined; by default the module and the name of a class or function. An entry takes
        the place of another of its name and source.

    Examples
    --------
    >>> numbers = Registry[int]("number", "register_number")
    >>> numbers.add("seven", 7)
    7
    >>> try:
    ...     numbers["sevn"]
    ... except StreamlineError as error:
    ...     print(error)
    The number 'sevn' is unknown. Expected one of seven. Did you mean 'seven'?
    """

    def __init__(self, what: str, how: str, source: Callable[[T], Any] | None = None) -> None:
        super().__init__()
        self.what, self.how, self.source = what, how, source or source_of

    def __getitem__(self, name: Any) -> T:
        if isinstance(name, str) and name in self:
            return super().__getitem__(name)
        raise StreamlineError(
            f"The {self.what} {name!r} is unknown. Expected one of {', '.join(self)}. "
            + nearest(name, self, f"Register your own with {self.how}.")
        )

    def add(self, name: str, entry: T) -> T:
        """Register an entry under its name, and return it.

        A definition that is run again, as in a notebook, takes the place of the earlier one.

        Raises
        ------
        StreamlineError
            If the name is empty, has a character that short forms use, or is another entry's.
        """
        if not isinstance(name, str) or not name or set(name) & set(":,=+* "):
            raise StreamlineError(
                f"{name!r} is no name of a {self.what}. Expected text without spaces and any of :,=+*. Change it."
            )
        if name in self and self.source(self[name]) != self.source(entry):
            raise StreamlineError(f"There is another {self.what} {name!r}. Expected a new name. Choose another.")
        self[name] = entry
        return entry


class FrozenDict(dict[str, Any]):
    """A dict that cannot be changed, so that a config which holds it can be hashed and shared."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __copy__(self) -> FrozenDict:
        return self

    def __deepcopy__(self, memo: Any) -> FrozenDict:
        return self

    def __reduce__(self) -> Any:
        return FrozenDict, (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("A config cannot be changed. Make another one with dataclasses.replace.")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]


@dataclass(frozen=True)
class Config:
    """A frozen dataclass whose fields are validated by their annotations and can be written to JSON and YAML.

    A family of configs, such as those of replacements, has a registry; the classes in it differ by `kind`, which
    `to_dict` writes and `from_dict` reads.

    Examples
    --------
    >>> @dataclass(frozen=True)
    ... class WindowConfig(Config):
    ...     bounds = {"size": 1}
    ...     size: int = 2
    >>> WindowConfig.from_dict({"size": 3})
    WindowConfig(size=3)
    """

    kind: ClassVar[str] = ""
    """The name of a class within its family; empty for a class that belongs to none."""
    family: ClassVar[Registry[Any] | None] = None
    """The classes of the family, by kind."""
    bounds: ClassVar[Mapping[str, Bound]] = {}
    """The range of each number that has one, beside those of the bases; see `checked`."""

    def __post_init__(self) -> None:
        bounds: dict[str, Bound] = {}
        for base in reversed(type(self).__mro__):
            bounds |= vars(base).get("bounds", {})
        check_fields(self, **bounds)
        for field in fields(self):
            value = _builtin(getattr(self, field.name))
            if isinstance(value, float) and not math.isfinite(value):
                raise StreamlineError(
                    f"{type(self).__name__}: {field.name}={value} is no finite number. Expected a number. Give one."
                )
            object.__setattr__(self, field.name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and all fields as values of JSON and YAML, which `from_dict` reads."""
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {"kind": self.kind, **values} if self.kind else values

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Build a config from what `to_dict` returned; fields that are left out have their defaults.

        Raises
        ------
        StreamlineError
            If a key or the kind is unknown, with the nearest known one, or a value is invalid.
        """
        if not isinstance(values, Mapping):
            raise StreamlineError(f"{cls.__name__}: got {values!r}. Expected a mapping of its fields. Write one.")
        given = dict(values)
        config = cls
        if cls.family is not None:
            if "kind" not in given and not cls.kind:
                raise StreamlineError(
                    f"{cls.__name__}: got no kind. Expected one of {', '.join(cls.family)}. Add kind to its fields."
                )
            config = cls.family[given.pop("kind", cls.kind)]
        if not issubclass(config, cls):
            raise StreamlineError(f"{cls.__name__}: kind={config.kind!r} is another config. Expected {cls.kind!r}.")
        require_fields(config, given)
        hints = field_hints(config)
        return config(**{key: _read(value, hints[key]) for key, value in given.items()})  # type: ignore[return-value]


def require_fields(config: type[Config], given: Iterable[Any]) -> None:
    """Raise if a key is no field of a config, and suggest the nearest one."""
    known = [field.name for field in fields(config) if field.init]
    for key in given:
        if key not in known:
            raise StreamlineError(
                f"{config.__name__}: the key {key!r} is unknown. Expected one of {', '.join(known)}. "
                + nearest(key, known, "Leave it out.")
            )


def register_config(base: type[Config], config: Any) -> Any:
    """Add a config class to the registry of its family, under its kind.

    Parameters
    ----------
    base : type
        The base class of the family.
    config : type
        A frozen dataclass that derives from it.

    Returns
    -------
    type
        The same class.

    Raises
    ------
    StreamlineError
        If the class is no such dataclass, its fields have no defaults, or its kind is no name or another class's.
    """
    assert base.family is not None
    is_config = isinstance(config, type) and issubclass(config, base) and is_dataclass(config)
    if not is_config or "__dataclass_fields__" not in vars(config):
        raise StreamlineError(
            f"{config!r} is no config of a {base.family.what}. Expected a subclass of {base.__name__}, decorated with "
            "@dataclass(frozen=True). Define one."
        )
    without = [f.name for f in fields(config) if f.default is f.default_factory]
    if without:
        raise StreamlineError(f"{config.__name__} has fields without defaults: {', '.join(without)}. Give each one.")
    require_plain(config())
    return base.family.add(config.kind, config)


def require_plain(config: Config) -> None:
    """Raise if a field of a config holds what JSON and YAML cannot."""
    for name, value in config.to_dict().items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise StreamlineError(
                f"{type(config).__name__}: {name}={value!r} cannot be written to JSON. Expected numbers, text, None, "
                "and sequences and mappings of these. Keep a name instead, and make the object from it."
            ) from None


def _builtin(value: Any) -> Any:
    """Return a value as Python's own type that JSON has: NumPy's numbers, and sequences and mappings of them."""
    if isinstance(value, (bool, str)) or value is None or isinstance(value, Config):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if type(value).__module__ == "numpy" and type(value).__name__.startswith("bool"):
        return bool(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_builtin, value))
    if isinstance(value, Mapping):
        return FrozenDict({key: _builtin(one) for key, one in value.items()})
    return value


def _plain(value: Any) -> Any:
    """Return a field's value as a value of JSON and YAML."""
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    return value


def _read(value: Any, hint: Any) -> Any:
    """Return a value of JSON or YAML as a field with this annotation has it."""
    accepted = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for one in accepted:
        if isinstance(value, Mapping) and isinstance(one, type) and issubclass(one, Config):
            return one.from_dict(value)
    return value


def source_of(entry: Any) -> Any:
    """Return where an entry, or the function in it, was defined; one without a name is equal to itself alone."""
    defined = getattr(entry, "function", entry)
    if "<lambda>" not in getattr(defined, "__qualname__", "<lambda>"):
        return defined.__module__, defined.__qualname__
    return entry

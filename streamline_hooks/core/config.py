"""The base class of all configs: frozen dataclasses that validate themselves and convert to JSON and YAML."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Integral, Real
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin

from streamline_hooks.core.errors import StreamlineError
from streamline_hooks.core.registry import Registry
from streamline_hooks.core.validation import Bound as Bound
from streamline_hooks.core.validation import field_hints, suggest, validate_fields

C = TypeVar("C", bound="Config")


class FrozenDict(dict[str, Any]):
    """An immutable, hashable dict for the fields of configs."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __deepcopy__(self, memo: Any = None) -> FrozenDict:
        return self

    __copy__ = __deepcopy__

    def __reduce__(self) -> Any:
        return FrozenDict, (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("A config is immutable. Create a changed copy with dataclasses.replace.")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


@dataclass(frozen=True)
class Config:
    """Base class of frozen dataclasses that are validated by their annotations and serialize to JSON and YAML.

    The configs of a family, such as the replacement configs, are registered by their `kind`. `to_dict` writes the kind,
    and `from_dict` uses it to select the class.

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
    """Name of the class within its family; empty if the class has no family."""
    family: ClassVar[Registry[Any] | None] = None
    """Registry of the classes of the family, by kind."""
    bounds: ClassVar[Mapping[str, Bound]] = {}
    """Range of each numeric field, in addition to the ranges of the base classes; see `validate_arguments`."""

    def __post_init__(self) -> None:
        bounds: dict[str, Bound] = {}
        for base in reversed(type(self).__mro__):
            bounds |= vars(base).get("bounds", {})
        validate_fields(self, **bounds)
        for field in fields(self):
            value = _to_builtin(getattr(self, field.name))
            if isinstance(value, float) and not math.isfinite(value):
                raise StreamlineError(
                    f"{type(self).__name__}: {field.name}={value} is not finite. Expected a finite number. Give one."
                )
            object.__setattr__(self, field.name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and all fields as values that JSON and YAML can store; `from_dict` reads them."""
        values = {field.name: _to_plain(getattr(self, field.name)) for field in fields(self)}
        return {"kind": self.kind, **values} if self.kind else values

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Build a config from the result of `to_dict`; omitted fields get their defaults."""
        if not isinstance(values, Mapping):
            raise StreamlineError(f"{cls.__name__}: got {values!r}. Expected a mapping from field names to values.")
        field_values = dict(values)
        config = cls
        if cls.family is not None:
            if "kind" not in field_values and not cls.kind:
                raise StreamlineError(
                    f"{cls.__name__}: kind is missing. Expected one of {', '.join(cls.family)}. Add the entry kind."
                )
            config = cls.family[field_values.pop("kind", cls.kind)]
        if not issubclass(config, cls):
            raise StreamlineError(f"{cls.__name__}: kind={config.kind!r} is a different config. Expected {cls.kind!r}.")
        check_field_names(config, field_values)
        hints = field_hints(config)
        return config(**{key: _from_plain(value, hints[key]) for key, value in field_values.items()})

    def updated(self: C, changes: Mapping[str, Any]) -> C:
        """Return a copy with changed fields, named by their paths.

        Parameters
        ----------
        changes : mapping of str to object
            Values by path, such as ``{"seed": 3, "data.sequence_length": 256}``. A nested config that is None starts
            from its defaults.

        Raises
        ------
        StreamlineError
            If a field is unknown or a value is invalid.
        """
        direct = {path: value for path, value in changes.items() if "." not in path}
        nested: dict[str, dict[str, Any]] = {}
        for path, value in changes.items():
            name, dot, rest = path.partition(".")
            if dot:
                nested.setdefault(name, {})[rest] = value
        check_field_names(type(self), [*direct, *nested])
        for name, values in nested.items():
            part = direct.get(name, getattr(self, name))
            if part is None:
                part = _config_in(field_hints(type(self))[name])()
            direct[name] = part.updated(values)
        return replace(self, **direct)


def check_field_names(config: type[Config], keys: Iterable[Any]) -> None:
    """Raise if a key is not a field of a config, and suggest the nearest field."""
    known = [field.name for field in fields(config) if field.init]
    for key in keys:
        if key not in known:
            raise StreamlineError(
                f"{config.__name__}: the key {key!r} is unknown. Expected one of {', '.join(known)}. "
                + suggest(key, known, "Remove it.")
            )


def register_config(base: type[Config], config: Any) -> Any:
    """Register a frozen dataclass under its kind in the family of `base`, and return it."""
    assert base.family is not None
    is_config = isinstance(config, type) and issubclass(config, base) and is_dataclass(config)
    if not is_config or "__dataclass_fields__" not in vars(config):
        raise StreamlineError(
            f"{config!r} is not a config of a {base.family.what}. Expected a subclass of {base.__name__} that is "
            "decorated with @dataclass(frozen=True)."
        )
    required = [f.name for f in fields(config) if f.default is f.default_factory]
    if required:
        raise StreamlineError(
            f"{config.__name__} has fields without defaults: {', '.join(required)}. Add a default to each."
        )
    check_json_values(config())
    return base.family.add(config.kind, config)


def check_json_values(config: Config) -> None:
    """Raise if a field of a config cannot be written to JSON."""
    for name, value in config.to_dict().items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise StreamlineError(
                f"{type(config).__name__}: {name}={value!r} cannot be written to JSON. Expected numbers, text, None, "
                "and sequences and mappings of these. Store a name instead, and create the object from it."
            ) from None


def _to_builtin(value: Any) -> Any:
    """Convert NumPy numbers, and sequences and mappings of them, to Python types."""
    if isinstance(value, (bool, str, Config)) or value is None:
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if type(value).__module__ == "numpy" and type(value).__name__.startswith("bool"):
        return bool(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_to_builtin, value))
    if isinstance(value, Mapping):
        return FrozenDict({key: _to_builtin(item) for key, item in value.items()})
    return value


def _to_plain(value: Any) -> Any:
    """Convert a field's value to a value that JSON and YAML can store."""
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_to_plain(item) for item in value]
    return value


def _from_plain(value: Any, hint: Any) -> Any:
    """Convert a mapping to a config where the annotation accepts one."""
    config = _config_in(hint)
    return config.from_dict(value) if config is not None and isinstance(value, Mapping) else value


def _config_in(hint: Any) -> Any:
    """Return the first config class that an annotation accepts, or None."""
    accepted = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((cls for cls in accepted if isinstance(cls, type) and issubclass(cls, Config)), None)

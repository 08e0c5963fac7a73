"""Registry of objects by name, which installed packages extend through entry points."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from streamline_hooks.core.errors import StreamlineError, warn_caller
from streamline_hooks.core.validation import suggest

_T = TypeVar("_T")


class Registry(MutableMapping[str, _T]):
    """Mapping of registered objects by name, whose errors suggest the nearest known name.

    An installed package adds objects through entry points in `group`. The entry points are imported when the registry
    is first listed or an unknown name is looked up, not when this library is imported. An invalid entry point is left
    out with a warning that names its package.

    Parameters
    ----------
    what : str
        What the registry contains, for error messages, such as ``"criterion"``.
    how : str
        Name of the function that registers an entry, for error messages.
    source : callable, optional
        Takes an entry and returns where it was defined. Default: `source_of`. An entry may replace an entry of the same
        name only if both have the same source, for example after running a notebook cell again.
    group : str, optional
        Group of the entry points. By default packages cannot add objects.
    register : callable, optional
        Takes the name and the object of an entry point, validates and adds it. Required with `group`.

    Raises
    ------
    StreamlineError
        If an unknown name is looked up.

    Examples
    --------
    >>> metrics = Registry("metric", "register_metric")
    >>> _ = metrics.add("mean", max)
    >>> metrics["maen"]
    Traceback (most recent call last):
    ...
    streamline_hooks.core.errors.StreamlineError: The metric 'maen' is unknown. Expected one of mean. Did you mean
    'mean'?
    """

    def __init__(
        self,
        what: str,
        how: str,
        source: Callable[[_T], Any] | None = None,
        *,
        group: str = "",
        register: Callable[[str, Any], Any] | None = None,
    ) -> None:
        self.what, self.how, self.source, self.group = what, how, source or source_of, group
        self._register = register
        self._entries: dict[str, _T] = {}
        self._packages: dict[str, str] = {}
        self._lock, self._is_loaded, self._is_loading = threading.RLock(), not group, False

    def __getitem__(self, name: Any) -> _T:
        if name in self:
            return self._entries[name]
        raise StreamlineError(
            f"The {self.what} {name!r} is unknown. Expected one of {', '.join(self)}. "
            + suggest(name, self, f"Register your own with {self.how}.")
        )

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        if name not in self._entries:
            self._load_entry_points()
        return name in self._entries

    def get(self, name: Any, default: Any = None) -> Any:
        """Return the entry with this name, or `default`."""
        return self._entries[name] if name in self else default

    def __iter__(self) -> Iterator[str]:
        self._load_entry_points()
        return iter(list(self._entries))

    def __len__(self) -> int:
        self._load_entry_points()
        return len(self._entries)

    def __setitem__(self, name: str, entry: _T) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]
        self._packages.pop(name, None)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.what!r}: {', '.join(self)})"

    def add(self, name: str, entry: _T) -> _T:
        """Register an entry and return it; raise if the name is invalid or taken."""
        if not isinstance(name, str) or not name or set(name) & set(":,=+* "):
            raise StreamlineError(
                f"{name!r} is not a valid name of a {self.what}. Expected text without spaces and the characters "
                ":,=+*. Choose another name."
            )
        if name in self._entries and self.source(self._entries[name]) != self.source(entry):
            whose = f" of the installed package {self._packages[name]}" if name in self._packages else ""
            raise StreamlineError(
                f"The {self.what} {name!r}{whose} is already registered. Expected a new name. Choose another."
            )
        self[name] = entry
        return entry

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Return names in the order of their registration, without importing entry points."""
        positions = {name: k for k, name in enumerate(self._entries)}
        return sorted(names, key=lambda name: positions.get(name, len(positions)))

    def describe(self, name: str) -> str:
        """Describe an entry for messages, as in ``criterion 'mine' of the installed package my-package 1.0``."""
        package = self._packages.get(name)
        return f"{self.what} {name!r}" + (f" of the installed package {package}" if package else "")

    def _load_entry_points(self) -> None:
        """Register the objects of the installed packages on the first call."""
        if self._is_loaded:
            return
        problems: list[str] = []
        with self._lock:  # reentrant: an imported module may look up a name
            if not (self._is_loaded or self._is_loading):
                self._is_loading = True
                points = sorted(entry_points(group=self.group), key=lambda point: (point.name, _package_of(point)))
                problems = [text for text in map(self._load, points) if text]
                self._is_loaded = True
        for text in problems:
            warn_caller(text)

    def _load(self, entry_point: EntryPoint) -> str:
        """Register the object of an entry point; return the reason if that fails, otherwise an empty string."""
        name, package = entry_point.name, _package_of(entry_point)
        subject = f"The {self.what} {name!r} of the installed package {package} ({entry_point.value}) is left out"
        remedy = f"Update or uninstall {package.partition(' ')[0]}, or report this to its authors."
        try:
            entry = entry_point.load()
        except (Exception, SystemExit) as error:  # importing a package may raise anything
            return f"{subject}: importing it raised {type(error).__name__}: {error}. {remedy}"
        entry_name = getattr(entry, "kind", None) or getattr(entry, "name", None)
        if isinstance(entry_name, str) and entry_name != name:
            return f"{subject}: its name is {entry_name!r}. Expected the name of its entry point, {name!r}. {remedy}"
        try:
            assert self._register is not None
            self._register(name, entry)
        except Exception as error:  # the object may have any type
            return f"{subject}: {error} {remedy}"
        self._packages.setdefault(name, package)
        return ""


def _package_of(entry_point: EntryPoint) -> str:
    """Return the name and version of the package that declares an entry point."""
    package = entry_point.dist
    return f"{package.name} {package.version}" if package is not None else entry_point.module


def source_of(entry: Any) -> Any:
    """Return the module and name of an entry or of its function; for a lambda, the entry itself."""
    defined = getattr(entry, "function", entry)
    if "<lambda>" not in getattr(defined, "__qualname__", "<lambda>"):
        return defined.__module__, defined.__qualname__
    return entry

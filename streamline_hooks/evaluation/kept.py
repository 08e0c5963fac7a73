"""A file of results, so that what was measured once is not measured again after an interruption."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from streamline_hooks.core import check_writable
from streamline_hooks.errors import StreamlineError
from streamline_hooks.json_file import parse_json, write_json

T = TypeVar("T")
_WHAT = "streamline_hooks_measured"
_VERSION = version("streamline_hooks")


class Kept:
    """Results by what they depend on, in a JSON file that is always whole.

    Parameters
    ----------
    file : Path or None
        It may not be there yet. Without one nothing is kept.

    Raises
    ------
    StreamlineError
        If the file holds something else, or cannot be written.

    Examples
    --------
    >>> value, seconds = Kept(None).get(float, ["a model", "a text"], lambda: 2.5)
    >>> value
    2.5
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        if file is not None:
            check_writable(file)
        self._known = self._read_file()

    def get(self, kind: type[T], parts: Sequence[Any], make: Callable[[], T]) -> tuple[T, float]:
        """What is known under these parts, or what `make` returns, which is kept; and the seconds that it took then.

        Parameters
        ----------
        kind : type
            A dataclass of numbers, texts, tuples and other such dataclasses, or one of these itself.
        parts : sequence
            Everything that the result depends on, as JSON values.
        make : callable
            Measures it.
        """
        if self.file is None:
            return _timed(make)
        key = hashlib.sha256(json.dumps([_VERSION, *parts], sort_keys=True).encode()).hexdigest()[:32]
        if key not in self._known:
            made, seconds = _timed(make)
            value = asdict(made) if is_dataclass(made) and not isinstance(made, type) else made
            self._known = self._read_file() | {key: json.loads(json.dumps({"value": value, "seconds": seconds}))}
            write_json(self.file, {_WHAT: self._known})
        found = self._known[key]
        return _read(kind, found["value"]), found["seconds"]

    def _read_file(self) -> dict[str, Any]:
        if self.file is None or not self.file.exists():
            return {}
        try:
            found: dict[str, Any] = parse_json(self.file.read_text(encoding="utf-8"))[_WHAT]
            return dict(found)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StreamlineError(
                f"{self.file} is not a file of results that were kept ({type(error).__name__}: {error}). Name another, "
                "or delete it to measure anew."
            ) from error


def _timed(make: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return make(), round(time.perf_counter() - started, 2)


def _read(kind: Any, value: Any) -> Any:
    """A value as it was before it was JSON."""
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        kinds = [inner[0]] * len(value) if inner[-1:] == (Ellipsis,) else inner
        return tuple(_read(one, given) for one, given in zip(kinds, value, strict=True))
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _read(hints[name], given) for name, given in value.items()})  # type: ignore[operator]
    return value

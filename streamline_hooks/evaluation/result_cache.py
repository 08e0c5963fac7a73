"""Cache of results in a JSON file, by a hash of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from torch import nn

from streamline_hooks.core import check_writable
from streamline_hooks.digests import autocast_dtype, model_digest
from streamline_hooks.errors import StreamlineError
from streamline_hooks.json_file import parse_json, write_json

T = TypeVar("T")
_KEY = "streamline_hooks_measured"
_VERSION = version("streamline_hooks")


class ResultCache:
    """Results by what they depend on; the file is written atomically after each new result.

    Parameters
    ----------
    file : Path or None
        It may not exist yet. Without a file nothing is cached.

    Raises
    ------
    StreamlineError
        If the file is no such cache, or cannot be written.

    Examples
    --------
    >>> value, seconds = ResultCache(None).get(float, ["a model", "a text"], lambda: 2.5)
    >>> value
    2.5
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._models: dict[int, str] = {}
        if file is not None:
            check_writable(file)
        self._results = self._read_file()

    def get(self, kind: type[T], parts: Sequence[Any], make: Callable[[], T]) -> tuple[T, float]:
        """Return the result for these parts, made if it is not cached, and the seconds that making it took.

        Parameters
        ----------
        kind : type
            A dataclass of numbers, texts, tuples, dicts and other such dataclasses, or one of these itself.
        parts : sequence
            Everything that the result depends on: JSON values, functions that return one (called only if there is a
            file), and modules (see `model_digest`).
        make : callable
        """
        started = time.perf_counter()
        if self.file is None:
            return make(), round(time.perf_counter() - started, 2)
        values = [
            self._model(part) if isinstance(part, nn.Module) else part() if callable(part) else part for part in parts
        ]
        key = hashlib.sha256(json.dumps([_VERSION, *values], sort_keys=True).encode()).hexdigest()[:32]
        if key not in self._results:
            started, value = time.perf_counter(), make()
            result = {"value": value, "seconds": round(time.perf_counter() - started, 2)}
            self._results = self._read_file() | {key: json.loads(json.dumps(result, default=asdict))}
            write_json(self.file, {_KEY: self._results})
        found = self._results[key]
        return _read(kind, found["value"]), found["seconds"]

    def _model(self, model: nn.Module) -> str:
        """Return a digest of a model, of the precision of its products, and of how it generates."""
        if id(model) not in self._models:
            generation: Any = getattr(model, "generation_config", None)
            settings = generation.to_dict() if generation is not None else {}
            settings.pop("transformers_version", None)
            self._models[id(model)] = (
                f"{model_digest(model)} {autocast_dtype(model)} {sorted(settings.items(), key=str)}"
            )
        return self._models[id(model)]

    def _read_file(self) -> dict[str, Any]:
        if self.file is None or not self.file.exists():
            return {}
        try:
            return dict(parse_json(self.file.read_text(encoding="utf-8"))[_KEY])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StreamlineError(
                f"{self.file} is not a file of results ({type(error).__name__}: {error}). Expected one that an earlier "
                "evaluation or sweep wrote. Name another, or delete it to measure again."
            ) from error


def _read(kind: Any, value: Any) -> Any:
    """Rebuild a value from JSON."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is tuple:
        kinds = [inside[0]] * len(value) if inside[-1:] == (Ellipsis,) else inside
        return tuple(_read(one, given) for one, given in zip(kinds, value, strict=True))
    if origin is dict:
        return {name: _read(inside[1], given) for name, given in value.items()}
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _read(hints[name], given) for name, given in value.items()})  # type: ignore[operator]
    return value

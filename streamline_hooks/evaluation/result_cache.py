"""Cache results in a JSON file, keyed by a hash of all their inputs."""

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

from streamline_hooks.core import (
    StreamlineError,
    autocast_dtype,
    check_writable,
    model_digest,
    parse_json,
    weights_digest,
    write_json,
)
from streamline_hooks.surgery import find_prompt_skip

_T = TypeVar("_T")
_KEY = "streamline_hooks_measured"
_VERSION = version("streamline_hooks")


class ResultCache:
    """Cache of results, keyed by their inputs.

    The file is written after each new result. With ``file=None`` nothing is cached.

    Parameters
    ----------
    file : Path or None
        JSON file.

    Examples
    --------
    >>> value, seconds = ResultCache(None).get(float, ["a model", "a text"], lambda: 2.5)
    >>> value
    2.5
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._results: dict[str, Any] = {}
        if file is not None:
            check_writable(file)
            self._results = _read_file(file)

    def get(self, kind: type[_T], parts: Sequence[Any], make: Callable[[], _T]) -> tuple[_T, float]:
        """Return the result for these parts, from the cache or from `make`, and the seconds that `make` took.

        The type `kind` of the result consists of numbers, strings, tuples, dicts and dataclasses. The parts are modules
        (see `model_digest`), JSON values, or functions that return a JSON value and are called only with a file.
        """
        started = time.perf_counter()
        if self.file is None:
            return make(), round(time.perf_counter() - started, 2)
        values = [
            digest_with_settings(part) if isinstance(part, nn.Module) else part() if callable(part) else part
            for part in parts
        ]
        key = hashlib.sha256(json.dumps([_VERSION, *values], sort_keys=True).encode()).hexdigest()[:32]
        if key not in self._results:
            started, value = time.perf_counter(), make()
            result = {"value": value, "seconds": round(time.perf_counter() - started, 2)}
            self._results = _read_file(self.file) | {key: json.loads(json.dumps(result, default=asdict))}
            write_json(self.file, {_KEY: self._results})
        cached = self._results[key]
        return _read(kind, cached["value"]), cached["seconds"]


def digest_with_settings(model: nn.Module) -> str:
    """Return a digest of a model, its autocast dtype, its generation config, and how its prompts skip blocks."""
    generation: Any = getattr(model, "generation_config", None)
    settings = generation.to_dict() if generation is not None else {}
    settings.pop("transformers_version", None)
    digest = " ".join(map(str, (model_digest(model), autocast_dtype(model), sorted(settings.items(), key=str))))
    if (skip := find_prompt_skip(model)) is not None:
        maps = [None if m is None else weights_digest(m) for m in skip.maps]
        digest += f" {skip.stack.path} {skip.window} {skip.last_tokens} {maps}"
    return digest


_EARLIER_NAMES = {"written": "texts"}  # fields of `ProblemResults` in earlier cache files


def _read_file(file: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(file.read_text(encoding="utf-8"))[_KEY]) if file.exists() else {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StreamlineError(
            f"{file} is not a result cache ({type(error).__name__}: {error}). Expected a file of an earlier evaluation "
            "or sweep. Choose another file, or delete it to measure again."
        ) from error


def _read(kind: Any, value: Any) -> Any:
    """Rebuild a value of a type from JSON."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        kinds = [args[0]] * len(value) if args[-1:] == (Ellipsis,) else args
        return tuple(_read(item_kind, item) for item_kind, item in zip(kinds, value, strict=True))
    if origin is dict:
        return {name: _read(args[1], item) for name, item in value.items()}
    if is_dataclass(kind):
        hints = get_type_hints(kind)  # fields that the class no longer has are dropped
        fields = {_EARLIER_NAMES.get(name, name): item for name, item in value.items()}
        return kind(**{name: _read(hints[name], item) for name, item in fields.items() if name in hints})  # type: ignore[operator]
    return value

"""What the modules of a model are set to beside their weights, such as the number of heads, or an activation.

A plain module has no configuration that is saved with it. Built again with other settings of the same shapes it would
take the weights and compute something else; so the settings are written down, and compared.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from inspect import isbuiltin, isfunction
from typing import Any

from torch import nn

from streamline_hooks.surgery.splice import AFTER, BEFORE

Settings = dict[str, dict[str, Any]]
"""By the path of each module its class, under ``"class"``, and its attributes that are numbers, words, or lists of
such."""

# What makes no difference in evaluation mode or once the weights are there, or is the machine's choice (fused_attn).
_INCIDENTAL = ("drop", "checkpoint", "fused", "training", "init")
_LONGEST = 64


def settings_of(model: nn.Module) -> Settings:
    """Read the settings of a model's own modules, without those that are spliced in and those that do nothing.

    Examples
    --------
    >>> settings_of(nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.1)))["0"]["eps"]
    1e-05
    """
    found: Settings = {}
    for path, module in model.named_modules():
        if not {BEFORE, AFTER} & set(path.split(".")) and not _does_nothing(module):
            values = {name: _plain(value) for name, value in vars(module).items() if not name.startswith("_")}
            kept = {k: v for k, v in values.items() if v is not None and not any(word in k for word in _INCIDENTAL)}
            found[path] = {"class": type(module).__name__, **{name: value[0] for name, value in kept.items()}}
    return found


def below(settings: Settings, path: str) -> Settings:
    """The settings of one module and what is inside it, by the path below it."""
    inside = {k.removeprefix(path).lstrip("."): v for k, v in settings.items() if f"{k}.".startswith(f"{path}.")}
    return inside if path else dict(settings)


def difference(saved: Settings, built: Settings, ignored: Collection[tuple[str, str]] = ()) -> str | None:
    """The first thing in which two models are set otherwise; None where they are alike.

    Parameters
    ----------
    saved, built : Settings
        An attribute that only one of the two has, as a later version of its class may, is not compared.
    ignored : collection of (str, str)
        Paths and names of attributes that are not compared.

    Returns
    -------
    str or None
        For instance ``"blocks.0.attn.num_heads is 4, and 2 in the one that was saved"``.
    """
    for path in [*saved, *(path for path in built if path not in saved)]:
        one, other, where = saved.get(path), built.get(path), path or "the model"
        if one is None or other is None:
            there, missing = (built[path]["class"], "saved") if one is None else (one["class"], "built")
            return f"{where} is a {there}, and there is none in the one that was {missing}"
        for name in one:
            differs = name in other and json.dumps(one[name]) != json.dumps(other[name])
            if differs and (path, name) not in ignored:
                what = where if name == "class" else f"{path}.{name}".lstrip(".")
                return f"{what} is {other[name]!r}, and {one[name]!r} in the one that was saved"
    return None


def to_json(settings: Settings) -> list[dict[str, Any]]:
    """The settings as JSON values, those that several modules share once."""
    shared: dict[str, list[str]] = {}
    for path, values in settings.items():
        shared.setdefault(json.dumps(values), []).append(path)
    return [{"of": paths, "set": json.loads(values)} for values, paths in shared.items()]


def from_json(entries: Iterable[dict[str, Any]]) -> Settings:
    """What `to_json` wrote."""
    return {path: entry["set"] for entry in entries for path in entry["of"]}


def _does_nothing(module: nn.Module) -> bool:
    """Whether a module hands on what it gets in evaluation mode, whatever stands there in training."""
    idle = isinstance(module, nn.Identity) or "drop" in type(module).__name__.lower()
    return idle and not module.state_dict()


def _plain(value: Any) -> tuple[Any] | None:
    """A value as JSON has it, in a tuple; None where it is no number and no word, or a path or a long text."""
    if isfunction(value) or isbuiltin(value):  # an activation
        return (f"{value.__name__}()",)
    if isinstance(value, str):
        return (value,) if len(value) <= _LONGEST and not {"/", "\\"} & set(value) else None
    if value is None or isinstance(value, (bool, int, float)):
        return (value,)
    if isinstance(value, (list, tuple)) and len(value) <= _LONGEST:
        items = [_plain(item) for item in value]
        return ([item[0] for item in items if item is not None],) if None not in items else None
    return None

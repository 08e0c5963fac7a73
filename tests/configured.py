"""Configs of compressions from one flat list of settings, for tests that vary a few of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from inspect import signature
from typing import Any

from streamline_hooks import CompressionConfig, DataConfig, RunOptions, compress
from streamline_hooks.cli import parse_replacement
from streamline_hooks.core import HardwareConfig
from streamline_hooks.pipeline import BlockwiseOptions, EvaluationConfig
from streamline_hooks.selection import SEARCHES

_SECTIONS = {"data": DataConfig, "evaluation": EvaluationConfig, "hardware": HardwareConfig}


def configured(base: CompressionConfig | None = None, **settings: Any) -> CompressionConfig:
    """Return a config with fields of all its sections set.

    Parameters
    ----------
    base : CompressionConfig, optional
    **settings
        Fields of `CompressionConfig`, of its data, evaluation and hardware, and of the search, each by its own name.
        `repair` may be a short form of the command line, and `search` a kind.

    Examples
    --------
    >>> configured(remove=2, repair="mlp:width=8", search="disjoint", windows=3, batch_size=2).search.windows
    3
    """
    config = base or CompressionConfig()
    if isinstance(settings.get("repair"), str):
        settings["repair"] = parse_replacement(settings["repair"])
    search = settings.pop("search", config.search)
    search = SEARCHES[search]() if isinstance(search, str) else search
    given = {name: settings.pop(name) for name in [f.name for f in fields(search)] if name in settings}
    if "protect" in given:
        given["protect"] = tuple(given["protect"])
    if search.most_selections is not None and "shortlist" in given:
        given["shortlist"] = min(given["shortlist"], search.most_selections)
    values: dict[str, Any] = {"search": replace(search, **given)}
    for section, kind in _SECTIONS.items():
        inside = {f.name: settings.pop(f.name) for f in fields(kind) if f.name in settings}
        values[section] = replace(settings.pop(section, getattr(config, section)), **inside)
    return replace(config, **values, **settings)


def arguments(function: Callable[..., Any] = compress, **settings: Any) -> dict[str, Any]:
    """Return the keywords of `compress`: its own, such as `output`, its run options, and the config of all others.

    Parameters
    ----------
    function : callable
        Another function with a config and keywords of its own.
    **settings
        See `configured`.
    """
    parameters = signature(function).parameters
    own = [name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY and name in settings]
    given = {name: settings.pop(name) for name in own}
    if "options" in parameters:
        run = {f.name: settings.pop(f.name) for f in fields(RunOptions) if f.name in settings}
        given |= {"options": RunOptions(**run)} if run else {}
    if "blockwise" in parameters:
        how = {f.name: settings.pop(f.name) for f in fields(BlockwiseOptions) if f.name in settings}
        given |= {"blockwise": BlockwiseOptions(**how)} if how else {}
    return {"config": configured(**settings), **given}

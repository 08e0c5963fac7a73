"""Read the short forms in which options are given on the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from streamline_hooks.core.config import Config
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.replacement_config import REPLACEMENTS, ReplacementConfig
from streamline_hooks.selection.criteria import criterion_of
from streamline_hooks.selection.search.configs import SEARCHES, SearchConfig
from streamline_hooks.selection.target import Target

_TARGETS = {name.replace("_", "-"): name for name in ("blocks", "parameters", "latency", "decode_latency")}


def parse_target(text: str) -> Target:
    """Read a target.

    Parameters
    ----------
    text : str
        ``8``, ``0.25``, ``25%``, ``parameters:0.25``, ``latency:0.8`` or ``decode-latency:0.8``.

    Raises
    ------
    StreamlineError
        If it is none of these, or out of range.
    """
    before, colon, after = text.strip().rpartition(":")
    unit, number = (before.strip() if colon else "blocks"), after.strip()
    try:
        name = _TARGETS[unit]
        amount: int | float
        if number.endswith("%"):
            amount = float(number[:-1]) / 100
        else:
            amount = int(number) if number.lstrip("+-").isdigit() else float(number)
    except (KeyError, ValueError):
        raise StreamlineError(
            f"The target {text!r} is unknown. Expected a number of blocks (8), a fraction of them (0.25 or 25%), "
            "parameters:0.25 to remove that fraction of the model's parameters, or latency:0.8 or decode-latency:0.8 "
            "for at most that fraction of its time to the first, or to each further, token. Give one of these."
        ) from None
    given: dict[str, Any] = {name: amount}
    return Target.of(amount) if name == "blocks" else Target(**given)


def parse_replacement(text: str) -> ReplacementConfig:
    """Read a replacement: its kind, and options of its config after a colon.

    Raises
    ------
    StreamlineError
        If there is no such kind or option, or an option's value is invalid.

    Examples
    --------
    >>> parse_replacement("block:count=2").slots, parse_replacement("linear:diagonal").name
    (2, 'linear:diagonal')
    """
    config = REPLACEMENTS[text.partition(":")[0].strip()]
    return config(**read_options(text, config, without=("seed",)))


def parse_search(text: str) -> SearchConfig:
    """Read a search: its kind, and options of its config after a colon; its criterion and `keep` have none.

    Raises
    ------
    StreamlineError
        If there is no such search or option, or an option's value is invalid.

    Examples
    --------
    >>> parse_search("disjoint:windows=3,shortlist=4")
    DisjointSearch(criterion=None, keep=(), shortlist=4, windows=3)
    """
    config = SEARCHES[text.partition(":")[0].strip()]
    return config(**read_options(text, config, without=("criterion", "keep")))


def parse_criterion(text: str) -> str | Mapping[str, float]:
    """Read a criterion, or several with weights, as a config's `criterion` has them.

    Parameters
    ----------
    text : str
        The name of a criterion, or several with ``+`` between them, each with its weight and ``*`` before it unless
        that is 1.

    Raises
    ------
    StreamlineError
        If a criterion is unknown or occurs twice, or a weight is not a number above 0.

    Examples
    --------
    >>> parse_criterion("kl"), parse_criterion("cosine + 0.5*relative_magnitude")
    ('kl', {'cosine': 1.0, 'relative_magnitude': 0.5})
    """
    weights: dict[str, float] = {}
    for part in text.split("+"):
        before, star, name = (piece.strip() for piece in part.rpartition("*"))
        criterion_of(name)  # raises if it is unknown
        try:
            weight = float(before) if star else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise StreamlineError(
                f"{text!r}: the weight {before!r} of {name!r} is invalid. Expected a number above 0. Write 0.5*{name}."
            )
        if name in weights:
            raise StreamlineError(
                f"{text!r}: the criterion {name!r} occurs twice. Expected each once. Add up its weights."
            )
        weights[name] = weight
    name, weight = next(iter(weights.items()))
    return name if len(weights) == 1 and weight == 1.0 else weights


def read_options(text: str, config: type[Config], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields of a config that are written behind the colon of a short form: ``lora:rank=8,head``.

    Parameters
    ----------
    text : str
        All of the short form. A comma is between two options; an option without a value is true; values of a tuple
        have ``+`` between them.
    config : type
        A config class, whose annotations say how each option's value is read.
    without : tuple of str
        Fields that are no options.

    Raises
    ------
    StreamlineError
        If an option is unknown or given twice, or its value cannot be read.
    """
    name, _, rest = text.partition(":")
    known = {option: types for option, types in _option_types(config).items() if types and option not in without}
    found: dict[str, Any] = {}
    for part in filter(None, map(str.strip, rest.split(","))):
        option, given, value = (piece.strip() for piece in part.partition("="))
        if option not in known or option in found:
            listed = ", ".join(f"{o} ({_expected(types)})" for o, types in known.items()) or "none"
            what = "is given an option twice" if option in found else "has no such option"
            raise StreamlineError(f"{text!r}: {name.strip()!r} {what}, {option!r}. Its options: {listed}.")
        found[option] = _read(text, option, known[option], value if given else "true")
    return found


def _option_types(config: type[Config]) -> dict[str, tuple[Any, ...]]:
    """Return, for each option, the types that can be written in a short form."""
    try:
        hints = get_type_hints(config)
    except NameError:  # an annotation that is imported for type checkers only
        hints = {}
    return {f.name: _plain_types(hints.get(f.name, type(f.default))) for f in fields(config)}


def _plain_types(annotation: Any) -> tuple[Any, ...]:
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    plain = [t for t in (bool, int, float, str) if t in members]
    plain += [str for t in members if get_origin(t) is Literal]
    return (*plain, *(tuple for t in members if get_origin(t) is tuple))


def _expected(types: tuple[Any, ...]) -> str:
    return " or ".join(t.__name__ for t in types)


def _read(text: str, option: str, types: tuple[Any, ...], value: str) -> Any:
    """Return an option's value, of the first of its types that the text can be."""
    for kind in types:
        try:
            if kind is bool:
                return {"true": True, "false": False}[value.lower()]
            return tuple(value.split("+")) if kind is tuple else kind(value)
        except (KeyError, ValueError):
            continue
    raise StreamlineError(f"{text!r}: {option}={value!r} is invalid. Expected {_expected(types)}. Change it.")

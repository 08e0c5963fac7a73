"""Read the short forms in which options are given on the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from streamline_hooks.arguments import field_hints, nearest
from streamline_hooks.calibration.mixture import ROUNDING
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.healing import HealingConfig
from streamline_hooks.repair.objective import LOSSES, Objective
from streamline_hooks.repair.replacement_config import REPLACEMENTS, ReplacementConfig
from streamline_hooks.selection.criteria import criterion_of
from streamline_hooks.selection.search.configs import SEARCHES, SearchConfig
from streamline_hooks.selection.target import Target
from streamline_hooks.task import Task

_TARGETS = {name.replace("_", "-"): name for name in ("blocks", "parameters", "latency", "decode_latency")}
_SHARE = re.compile(r"(?P<name>.*):(?P<share>[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)", re.IGNORECASE | re.DOTALL)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)
_NUMBER = r"(\d+(?:\.\d+)?)"
_DURATION = re.compile(rf"(?:{_NUMBER}\s*h)?\s*(?:{_NUMBER}\s*m)?\s*(?:{_NUMBER}\s*s)?", re.IGNORECASE)


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


def parse_loss(text: str) -> dict[str, float]:
    """Read the weights of losses.

    Raises
    ------
    StreamlineError
        If a loss is unknown or given twice, or a weight is no number above 0.

    Examples
    --------
    >>> parse_loss("kl + 0.5*lm")
    {'kl': 1.0, 'lm': 0.5}
    """
    weights: dict[str, float] = {}
    for part in text.split("+"):
        number, _, name = (piece.strip() for piece in part.rpartition("*"))
        if not name:
            raise StreamlineError(
                f"{text!r} is no loss: a part of the sum is empty. Expected a loss or a sum such as 'kl + 0.5*lm', of "
                f"{', '.join(LOSSES)}. Change it."
            )
        LOSSES[name]
        if name in weights:
            raise StreamlineError(f"{text!r} has {name!r} twice. Expected each loss once. Add the weights up.")
        try:
            weights[name] = float(number) if number else 1.0
        except ValueError:
            raise StreamlineError(
                f"{text!r}: {number!r} is no weight of {name!r}. Expected a number above 0. Change it."
            ) from None
    return dict(Objective(weights).weights)


def parse_healing(text: str) -> HealingConfig:
    """Read healing: its method, and options after a colon.

    Raises
    ------
    StreamlineError
        If the method or an option is unknown, or a value is invalid.

    Examples
    --------
    >>> parse_healing("partial:where=after,learning_rate_ratio=0.2").where
    'after'
    """
    method: Any = text.partition(":")[0].strip()
    return HealingConfig(method=method, **read_options(text, HealingConfig, without=("method",)))


def parse_task(text: str) -> Task:
    """Read a task: its name, and for embeddings the pooling.

    Raises
    ------
    StreamlineError
        If the task, the pooling or an option is unknown.

    Examples
    --------
    >>> parse_task("embedding:pooling=first")
    Task(name='embedding', pooling='first')
    """
    return Task(text.partition(":")[0].strip(), **read_options(text, Task, without=("name",)))


def parse_mixture(source: str) -> dict[str, float] | None:
    """Read a mixture, such as ``"self:0.5,texts:0.3,pydoc:0.2"``.

    Parameters
    ----------
    source : str
        Sources between commas, each with a colon and its share.

    Returns
    -------
    dict of str to float, or None
        The share of each source, which together are 1. None where this is an ordinary source: a path that is there,
        what has no shares, or one name with a number above 1, which is a data set and its configuration.

    Raises
    ------
    StreamlineError
        If only some of several sources have a share, a share is not above 0, they do not sum to 1 within 0.002, or a
        source has no name or is given twice.

    Examples
    --------
    >>> parse_mixture("self:0.5, pydoc:0.5")
    {'self': 0.5, 'pydoc': 0.5}
    >>> parse_mixture("pydoc") is None
    True
    """
    if _is_there(source):
        return None
    parts = [part.strip() for part in source.split(",")]
    read = {part: match for part in parts if (match := _SHARE.fullmatch(part))}
    if not read or (len(parts) == 1 and float(read[parts[0]]["share"]) > 1):
        return None
    example = "Expected a share for each, such as self:0.5,texts:0.5."
    if bare := [part for part in parts if part not in read]:
        with_share = ", ".join(map(repr, read))
        raise StreamlineError(
            f"The mixture {source!r} has shares for {with_share} and none for {', '.join(map(repr, bare))}. {example}"
        )
    shares: dict[str, float] = {}
    places: set[str] = set()
    for part in parts:
        name, share = read[part]["name"].strip(), float(read[part]["share"])
        if not name:
            raise StreamlineError(f"The mixture {source!r} has a share without a source, {part!r}. {example}")
        if not 0 < share < math.inf:
            raise StreamlineError(
                f"The mixture {source!r} has the share {read[part]['share']} of {name!r}. Expected shares above 0; "
                "leave a source out that is not wanted."
            )
        place = str(Path(name).expanduser().resolve()) if _is_there(name) else name
        if place in places:
            raise StreamlineError(f"The mixture {source!r} has {name!r} twice. Give each source once, with one share.")
        places.add(place)
        shares[name] = share
    total = sum(shares.values())
    if abs(total - 1) > ROUNDING:
        raise StreamlineError(
            f"The shares of the mixture {source!r} sum to {total:.6g}. Expected a sum of 1. Change them so that they "
            "are parts of a whole."
        )
    return {name: share / total for name, share in shares.items()}


def parse_problems(texts: Sequence[str]) -> tuple[list[str], int]:
    """Read files of problems, and ``probes`` or ``probes:N``: the files, and how many generated problems of each sort.

    Examples
    --------
    >>> parse_problems(["gsm8k.jsonl", "probes:20"])
    (['gsm8k.jsonl'], 20)
    """
    files, count = [], 0
    for text in texts:
        name, colon, number = text.partition(":")
        if name != "probes":
            files.append(text)
        elif count or (colon and not (number.isdecimal() and int(number))):
            raise StreamlineError(
                f"The problems {text!r} are invalid, or given twice. Expected a file, probes, or probes:N with N >= 1, "
                "once. Change it."
            )
        else:
            count = int(number or 50)
    return files, count


def parse_bytes(text: str) -> int:
    """Read a size such as ``2GB``, ``512 MiB`` or ``2e9`` without its exponent.

    Raises
    ------
    StreamlineError
        If it is none.

    Examples
    --------
    >>> parse_bytes("2GB"), parse_bytes("1.5 GiB"), parse_bytes("4096")
    (2000000000, 1610612736, 4096)
    """
    found = _SIZE.fullmatch(text)
    if found is None or not float(found[1]):
        raise StreamlineError(f"{text!r} is no size; expected one above zero such as 2GB, 512MiB or 4096.")
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()])


def parse_duration(text: str) -> float:
    """Read a span of time such as ``10m``, ``8h``, ``90s`` or ``1h30m``.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    StreamlineError
        If it is none.

    Examples
    --------
    >>> parse_duration("10m"), parse_duration("1h30m"), parse_duration("90s")
    (600.0, 5400.0, 90.0)
    """
    found = _DURATION.fullmatch(text.strip())
    hours, minutes, seconds = (float(part or 0) for part in (found.groups() if found else (0, 0, 0)))
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise StreamlineError(
            f"{text!r} is no duration. Expected one above zero with its units. Write 10m, 1h, 90s or 1h30m."
        )
    return total


def read_options(text: str, config: type[Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields of a config that are written behind the colon of a short form: ``lora:rank=8,head``.

    Parameters
    ----------
    text : str
        All of the short form. A comma is between two options; an option without a value is true; values of a tuple
        have ``+`` between them.
    config : type
        A config class or another dataclass, whose annotations say how each option's value is read.
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
            hint = nearest(option, set(known) - set(found), "Leave it out.")
            raise StreamlineError(f"{text!r}: {name.strip()!r} {what}, {option!r}. Its options: {listed}. {hint}")
        found[option] = _read(text, option, known[option], value if given else "true")
    return found


def _option_types(config: type[Any]) -> dict[str, tuple[Any, ...]]:
    """Return, for each option, the types that can be written in a short form."""
    hints = field_hints(config)
    return {
        field.name: _plain_types(type(field.default) if hints[field.name] is Any else hints[field.name])
        for field in fields(config)
    }


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


def _is_there(source: str) -> bool:
    try:
        return Path(source).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a name, or no such user
        return False

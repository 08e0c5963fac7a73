"""Parse the short forms of configs on the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from streamline_hooks.core import StreamlineError, field_hints, suggest
from streamline_hooks.data import GENERATED_SOURCES, SHARE_TOLERANCE, TextSources
from streamline_hooks.distillation import LOSSES, HealingConfig, Objective
from streamline_hooks.modeling import Task
from streamline_hooks.pipeline import PLAIN_KINDS
from streamline_hooks.repair import REPLACEMENTS, ReplacementConfig
from streamline_hooks.selection import SEARCHES, SearchConfig, Target, resolve_criterion

_TARGETS = {
    "memory": "memory_bytes",
    **{
        spelling: field.name
        for field in fields(Target)
        if field.name != "fraction"
        for spelling in (field.name.replace("_", "-"), field.name)
    },
}
_SHARE = re.compile(r"(?P<name>.*):(?P<share>[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)", re.IGNORECASE | re.DOTALL)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)
_NUMBER = r"(\d+(?:\.\d+)?)"
_DURATION = re.compile(rf"(?:{_NUMBER}\s*h)?\s*(?:{_NUMBER}\s*m)?\s*(?:{_NUMBER}\s*s)?", re.IGNORECASE)


def parse_target(text: str) -> Target:
    """Parse a target; see `Target`.

    Examples
    --------
    >>> [parse_target(text) for text in ("8", "25%", "parameters:0.25", "latency:0.8")]
    [Target(blocks=8), Target(fraction=0.25), Target(parameters=0.25), Target(latency=0.8)]
    >>> parse_target("memory:90MB"), parse_target("seconds-per-token:0.02")
    (Target(memory_bytes=90000000), Target(seconds_per_token=0.02))
    >>> parse_target("memory_bytes:90e6") == parse_target("memory:90MB")
    True
    """
    before, colon, after = text.strip().rpartition(":")
    unit, number = (before.strip() if colon else "blocks"), after.strip()
    try:
        name = _TARGETS[unit]
        amount: int | float
        if name == "memory_bytes" and _SIZE.fullmatch(number):
            amount = parse_bytes(number)
        elif number.endswith("%") and name not in ("memory_bytes", "seconds_per_token"):
            amount = float(number[:-1]) / 100
        else:
            amount = int(number) if number.lstrip("+-").isdigit() else float(number)
    except (KeyError, ValueError):
        raise StreamlineError(
            f"The target {text!r} is unknown. Expected a number of blocks (8), a fraction of the blocks (0.25 or 25%), "
            "parameters:0.25 to remove that fraction of the parameters, memory:90MB for at most that size of the "
            "weights, latency:0.8 or decode-latency:0.8 for at most that fraction of the time to the first or to each "
            "further token, or seconds-per-token:0.02. Choose one of these forms."
        ) from None
    target_fields: dict[str, Any] = {name: amount}
    return Target.of(amount) if name == "blocks" else Target(**target_fields)


def parse_replacement(text: str) -> ReplacementConfig:
    """Parse a replacement: its kind, and options of its config after a colon.

    Examples
    --------
    >>> parse_replacement("block:count=2").slots, parse_replacement("linear:diagonal").name
    (2, 'linear:diagonal')
    """
    config = REPLACEMENTS[text.partition(":")[0].strip()]
    return config(**read_options(text, config, without=("seed",)))


def parse_plain_replacement(text: str) -> ReplacementConfig:
    """Parse a replacement of a kind that gives a plain model.

    Examples
    --------
    >>> parse_plain_replacement("silenced").kind
    'silenced'
    """
    if (kind := text.partition(":")[0].strip()) not in PLAIN_KINDS:
        raise StreamlineError(
            f"The kind {kind!r} does not give a plain model. Expected {' or '.join(PLAIN_KINDS)}. Choose one of these, "
            "or leave the kind out to use the first that is possible."
        )
    return parse_replacement(text)


def parse_search(text: str) -> SearchConfig:
    """Parse a search: its kind, and options of its config (except `criterion` and `protect`) after a colon.

    Examples
    --------
    >>> parse_search("disjoint:windows=3,shortlist=4")
    DisjointSearch(criterion=None, protect=(), shortlist=4, windows=3)
    """
    config = SEARCHES[text.partition(":")[0].strip()]
    return config(**read_options(text, config, without=("criterion", "protect")))


def read_search(text: str) -> tuple[str, dict[str, Any]]:
    """Return the kind and the options of a search; see `SearchConfig.with_kind`."""
    kind = text.partition(":")[0].strip()
    return kind, read_options(text, SEARCHES[kind], without=("criterion", "protect"))


def parse_criterion(text: str) -> str | Mapping[str, float]:
    """Parse a criterion, or a weighted sum of criteria, to a value of `SearchConfig.criterion`.

    Examples
    --------
    >>> parse_criterion("kl"), parse_criterion("cosine + 0.5*relative_magnitude")
    ('kl', {'cosine': 1.0, 'relative_magnitude': 0.5})
    """
    weights = _weighted_sum(text, "criterion", resolve_criterion)
    name, weight = next(iter(weights.items()))
    return name if len(weights) == 1 and weight == 1.0 else weights


def parse_loss(text: str) -> dict[str, float]:
    """Parse a weighted sum of losses.

    Examples
    --------
    >>> parse_loss("kl + 0.5*lm")
    {'kl': 1.0, 'lm': 0.5}
    """
    return dict(Objective(_weighted_sum(text, "loss", LOSSES.__getitem__)).weights)


def parse_limits(text: str) -> dict[str, float]:
    """Parse limits by name.

    Examples
    --------
    >>> parse_limits("disagreement:0.1,kl:0.3")
    {'disagreement': 0.1, 'kl': 0.3}
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition(":"))
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if math.isnan(limit) or name in limits:
            raise StreamlineError(
                f"{text!r}: {part!r} is invalid. Expected each name once with a number, such as disagreement:0.1. "
                "Correct it."
            )
        limits[name] = limit
    return limits


def _weighted_sum(text: str, label: str, check: Callable[[str], Any]) -> dict[str, float]:
    """Parse a sum such as ``a + 0.5*b``; `check` raises for an unknown name."""
    weights: dict[str, float] = {}
    for part in text.split("+"):
        before, star, name = (piece.strip() for piece in part.rpartition("*"))
        check(name)
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
                f"{text!r}: the {label} {name!r} occurs twice. Expected each name once. Add up its weights."
            )
        weights[name] = weight
    return weights


def parse_healing(text: str) -> HealingConfig:
    """Parse healing: its method, and options after a colon.

    Examples
    --------
    >>> parse_healing("partial:where=after,learning_rate_ratio=0.2").where
    'after'
    """
    method: Any = text.partition(":")[0].strip()
    return HealingConfig(method=method, **read_options(text, HealingConfig, without=("method",)))


def parse_task(text: str) -> Task:
    """Parse a task: its name, and options after a colon.

    Examples
    --------
    >>> parse_task("embedding:pooling=first")
    Task(name='embedding', pooling='first')
    """
    return Task(text.partition(":")[0].strip(), **read_options(text, Task, without=("name",)))


def parse_blocks(text: str) -> tuple[int, ...]:
    """Parse block numbers.

    Examples
    --------
    >>> parse_blocks("0,1,-1")
    (0, 1, -1)
    """
    return _numbers(text, int, "block number", "0,1,-1")


def parse_window(text: str) -> range:
    """Parse a window of blocks.

    Examples
    --------
    >>> parse_window("12:20")
    range(12, 20)
    """
    start, colon, stop = text.partition(":")
    if not (colon and start.strip().isdigit() and stop.strip().isdigit()):
        raise StreamlineError(
            f"--window {text!r} is not a range of blocks. Expected START:STOP. Write 12:20 for blocks 12 to 19."
        )
    return range(int(start), int(stop))


def parse_numbers(text: str) -> tuple[float, ...]:
    """Parse numbers, such as ``0.9,0.95``."""
    return _numbers(text, float, "number", "0.9,0.95")


def _numbers(text: str, kind: type[Any], label: str, example: str) -> tuple[Any, ...]:
    numbers = []
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            numbers.append(kind(part))
        except ValueError:
            raise StreamlineError(
                f"{part!r} is not a {label}. Expected {label}s such as {example}. Change it."
            ) from None
    return tuple(numbers)


def parse_sources(texts: Sequence[str], temperature: float | None = None) -> TextSources:
    """Parse the sources of ``--calibration``: several sources, or a mixture with shares.

    Examples
    --------
    >>> parse_sources(["self:0.5,pydoc:0.5"]).shares
    {'self': 0.5, 'pydoc': 0.5}
    """
    mixtures = [mixture for text in texts if (mixture := parse_mixture(text)) is not None]
    if mixtures and len(texts) > 1:
        raise StreamlineError(
            f"--calibration was given {len(texts)} times, once with a mixture. Expected several sources or a single "
            "mixture. Write one mixture with a share for each source, such as self:0.5,texts:0.5."
        )
    shares = mixtures[0] if mixtures else {}
    names = tuple(shares or texts)
    if "chat" in names and _exists("chat"):
        raise StreamlineError(
            "--calibration chat means conversations that the model generates, but a file or folder 'chat' exists. "
            "Expected no such file. Write ./chat for the file, or rename it."
        )
    if temperature is not None and not set(names) & set(GENERATED_SOURCES):
        raise StreamlineError(
            f"--temperature {temperature:g} has no effect without generated text. Expected --calibration self or chat. "
            "Add it, or leave --temperature out."
        )
    return TextSources(names, shares, **({} if temperature is None else {"temperature": temperature}))


def parse_mixture(source: str) -> dict[str, float] | None:
    """Parse a mixture, and return the share of each source, normalized to a sum of 1.

    Return None for an ordinary source: an existing path, sources without shares, or a data set and its configuration
    (a name and a number > 1).

    Examples
    --------
    >>> parse_mixture("self:0.5, pydoc:0.5")
    {'self': 0.5, 'pydoc': 0.5}
    >>> parse_mixture("pydoc") is None
    True
    """
    if _exists(source):
        return None
    parts = [part.strip() for part in source.split(",")]
    matches = {part: match for part in parts if (match := _SHARE.fullmatch(part))}
    if not matches or (len(parts) == 1 and float(matches[parts[0]]["share"]) > 1):
        return None
    example = "Expected a share for each source. Write self:0.5,texts:0.5, for example."
    if without_share := [part for part in parts if part not in matches]:
        with_share = ", ".join(map(repr, matches))
        raise StreamlineError(
            f"The mixture {source!r} has shares for {with_share} and none for {', '.join(map(repr, without_share))}. "
            f"{example}"
        )
    shares: dict[str, float] = {}
    source_ids: set[str] = set()
    for part in parts:
        name, share = matches[part]["name"].strip(), float(matches[part]["share"])
        if not name:
            raise StreamlineError(f"The mixture {source!r} has a share without a source, {part!r}. {example}")
        source_id = str(Path(name).expanduser().resolve()) if _exists(name) else name
        if source_id in source_ids:
            raise StreamlineError(
                f"The mixture {source!r} has {name!r} twice. Expected each source once. Add its shares."
            )
        source_ids.add(source_id)
        shares[name] = share
    total = sum(shares.values())
    if min(shares.values()) <= 0 or abs(total - 1) > SHARE_TOLERANCE:
        raise StreamlineError(
            f"The shares of the mixture {source!r} are {shares} with a sum of {total:.6g}. Expected shares above 0 "
            "with a sum of 1. Change them."
        )
    return {name: share / total for name, share in shares.items()}


def parse_problems(texts: Sequence[str]) -> tuple[list[str], int]:
    """Parse problem files and ``probes:N``, and return the files and the number of probes of each type.

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
                f"--problems {text!r} is invalid or repeated. Expected a file, or probes or probes:N with N >= 1 once. "
                "Change it."
            )
        else:
            count = int(number or 50)
    return files, count


def parse_bytes(text: str) -> int:
    """Parse a size such as ``2GB``, ``512 MiB`` or ``4096``.

    Examples
    --------
    >>> parse_bytes("2GB"), parse_bytes("1.5 GiB"), parse_bytes("4096")
    (2000000000, 1610612736, 4096)
    """
    match = _SIZE.fullmatch(text)
    if match is None or not float(match[1]):
        raise StreamlineError(f"{text!r} is not a size. Expected a size > 0. Write 2GB, 512MiB or 4096, for example.")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def parse_duration(text: str) -> float:
    """Parse a duration such as ``10m``, ``8h``, ``90s`` or ``1h30m``, to seconds.

    Examples
    --------
    >>> parse_duration("10m"), parse_duration("1h30m"), parse_duration("90s")
    (600.0, 5400.0, 90.0)
    """
    match = _DURATION.fullmatch(text.strip())
    hours, minutes, seconds = (float(part or 0) for part in (match.groups() if match else (0, 0, 0)))
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise StreamlineError(
            f"{text!r} is not a duration. Expected a time > 0 with units. Write 10m, 1h, 90s or 1h30m."
        )
    return total


def read_options(text: str, config: type[Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Parse the options after the colon of a short form, such as ``lora:rank=8,head``.

    A comma separates options, an option without a value is true, and ``+`` separates the values of a tuple.

    Parameters
    ----------
    text : str
        The short form.
    config : type
        A dataclass; the annotations of its fields determine the types of the options.
    without : tuple of str
        Fields that are not options.

    Returns
    -------
    dict of str to value

    Raises
    ------
    StreamlineError
        If an option is unknown or repeated, or its value is invalid.
    """
    name, _, rest = text.partition(":")
    known = {option: types for option, types in _option_types(config).items() if types and option not in without}
    options: dict[str, Any] = {}
    for part in filter(None, map(str.strip, rest.split(","))):
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if option not in known or option in options:
            listed = ", ".join(f"{o} ({_expected(types)})" for o, types in known.items())
            expected = f"one of {listed}" if listed else "no options"
            problem = "repeats the option" if option in options else "has no option"
            hint = suggest(option, set(known) - set(options), "Leave it out.")
            raise StreamlineError(f"{text!r}: {name.strip()!r} {problem} {option!r}. Expected {expected}. {hint}")
        options[option] = _read(text, option, known[option], value if equals else "true")
    return options


def _option_types(config: type[Any]) -> dict[str, tuple[Any, ...]]:
    """Return, for each field, its types that a short form supports."""
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
    """Convert the value of an option to the first of its types that accepts it."""
    for kind in types:
        try:
            if kind is bool:
                return {"true": True, "false": False}[value.lower()]
            return tuple(value.split("+")) if kind is tuple else kind(value)
        except (KeyError, ValueError):
            continue
    raise StreamlineError(f"{text!r}: {option}={value!r} is invalid. Expected {_expected(types)}. Change it.")


def _exists(source: str) -> bool:
    try:
        return Path(source).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # the name is too long, or the user is unknown
        return False

"""Generate options of the command line from the fields of configs."""

from __future__ import annotations

import functools
import inspect
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from cyclopts import Group, Parameter
from docstring_parser import numpydoc

from streamline_hooks.checkpoint import LoadingConfig
from streamline_hooks.cli.parsing import (
    parse_blocks,
    parse_bytes,
    parse_criterion,
    parse_healing,
    parse_limits,
    parse_loss,
    parse_numbers,
    parse_replacement,
    parse_target,
    parse_task,
    read_search,
)
from streamline_hooks.core import Config, StreamlineError, field_hints
from streamline_hooks.distillation import LOSSES, DistillationConfig, HealingConfig
from streamline_hooks.modeling import Task
from streamline_hooks.pipeline import PRESETS, CompressionConfig
from streamline_hooks.repair import ReplacementConfig
from streamline_hooks.selection import CRITERIA, SearchConfig, Target

SHORT_FORMS: dict[type, Callable[[str], Any]] = {
    Target: parse_target,
    ReplacementConfig: parse_replacement,
    SearchConfig: read_search,
    HealingConfig: parse_healing,
    Task: parse_task,
}
"""Parsers of the configs with a short form, such as ``linear:rank=64``."""
FIELD_FORMS: dict[str, Callable[[str], Any]] = {
    "at_most": parse_limits,
    "search.criterion": parse_criterion,
    "search.protect": parse_blocks,
    "distillation.loss": parse_loss,
    "hardware.state_memory": parse_bytes,
}
"""Parsers of fields whose values are not plain numbers or text, by path."""
EXAMPLES: dict[Callable[[str], Any], str] = {
    parse_target: "8, 0.25, parameters:0.25, memory:90MB, latency:0.8, seconds-per-token:0.02",
    parse_replacement: "linear:rank=64, swiglu:width=1536",
    read_search: "disjoint:windows=3",
    parse_healing: "lora:rank=16, partial:where=after",
    parse_task: "seq2seq, embedding:pooling=first",
    parse_limits: "disagreement:0.1,kl:0.3",
    parse_criterion: "kl, cosine + 0.5*relative_magnitude",
    parse_blocks: "0,1,-1",
    parse_loss: "'kl + 0.5*lm'",
    parse_bytes: "2GB",
    parse_numbers: "0.9,0.95",
}
"""Example values for each parser, for the help."""
NAMES: dict[Callable[[str], Any], Mapping[str, Any]] = {parse_loss: LOSSES, parse_criterion: CRITERIA}
"""The registry of the names in the values of each parser."""


@dataclass(frozen=True)
class ConfigOption:
    """An option of the command line, which sets a field of a config.

    Attributes
    ----------
    path : str
        Path of the field, such as ``"data.sequence_length"``.
    flag : str
        Name of the option, such as ``"--sequence-length"``.
    section : str
        Name of the nested config with the field, such as ``"data"``; empty for fields of `CompressionConfig`.
    help : str
        Description of the field, from the docstring of its config.
    annotation : type
        Type of a plain value; str if there is a parser.
    parse : callable, optional
        Parser of the value.
    default : str
        The default value in the form of the command line, or empty.
    names : mapping, optional
        The registry of the names in the value. Only ``--help-all`` lists them, because listing imports installed
        packages.
    """

    path: str
    flag: str
    section: str
    help: str
    annotation: Any
    parse: Callable[[str], Any] | None
    default: str
    names: Mapping[str, Any] | None = None


def config_options(config: type[Config] = CompressionConfig) -> tuple[ConfigOption, ...]:
    """Return an option for each field of a config and of the configs in it.

    An option has the name of its field. If several fields have the same name, the name of the nested config precedes
    it, as in ``--distillation-seed``.
    """
    ordered = sorted(_walk(config, ""), key=lambda option: option.path.count("."))
    names: set[str] = set()
    options = []
    for option in ordered:
        section, _, name = option.path.rpartition(".")
        flag = _flag(name) if name not in names else _flag(f"{section}_{name}")
        names.add(name)
        options.append(replace(option, flag=flag))
    return tuple(options)


def _walk(config: type[Config], section: str) -> Iterator[ConfigOption]:
    hints, texts = field_hints(config), field_texts(config)
    for field in fields(config):
        path = f"{section}.{field.name}" if section else field.name
        members = [member for member in _members(hints[field.name]) if member is not type(None)]
        configs = [member for member in members if isinstance(member, type) and issubclass(member, Config)]
        short = next((member for member in configs if member in SHORT_FORMS), None)
        default = field.default if field.default is not MISSING else None
        shown = _format_value(default)
        if short is not None:
            yield ConfigOption(path, "", section, texts[field.name], str, SHORT_FORMS[short], shown, short.family)
            if short.family is not None:
                yield from _walk(short, path)
        elif configs:
            yield from _walk(configs[0], path)
        else:
            parse = FIELD_FORMS.get(path) or next(
                (parse_numbers for member in members if get_origin(member) is tuple), None
            )
            plain = tuple(
                member for member in members if member in (bool, int, float, str) or get_origin(member) is Literal
            )
            annotation: Any = str if parse or not plain else Union[plain]  # noqa: UP007
            names = NAMES.get(parse) if parse else None
            yield ConfigOption(path, "", section, texts[field.name], annotation, parse, shown, names)


def field_texts(config: type) -> dict[str, str]:
    """Return the description of each field, from the Attributes sections of a class and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(config.__mro__):
        for entry in numpydoc.parse(inspect.cleandoc(base.__dict__.get("__doc__") or "")).params:
            text = " ".join((entry.description or "").replace("`", "").split())
            texts |= {name.strip(): text for name in entry.arg_name.split(",") if entry.args[0] == "attribute"}
    return {field.name: texts.get(field.name, "") for field in fields(config)}


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _format_value(value: Any) -> str:
    """Return a value in the form of the command line; empty for None and an empty tuple."""
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return " + ".join(name if weight == 1 else f"{weight:g}*{name}" for name, weight in value.items())
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, SearchConfig):
        return value.kind
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


OptionValues = dict[str, Any]
"""Values of the fields that were set on the command line, by path."""
Command = Callable[..., None]


def with_options(
    *configs: type[Config],
    only: Sequence[str] = (),
    without: Sequence[str] = (),
    shown: Sequence[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    optional: Sequence[str] = (),
) -> Callable[[Command], Command]:
    """Add an option for each field of some configs to a command.

    The parameter `option_values` of the command receives the values of the options that were set, by path.

    Parameters
    ----------
    *configs : type of Config
        The configs.
    only, without : sequence of str
        Paths of the first config to include (by default all) and to exclude.
    shown : sequence of str
        Flags in ``--help``, in this order. By default all. ``--help-all`` lists every option, grouped by config.
    defaults : mapping
        Defaults that replace those of the first config, by path.
    optional : sequence of str
        Paths of the options whose omission the command handles itself, so that the help shows no default.
    """

    def decorate(command: Command) -> Command:
        first_options = [option for config in configs[:1] for option in config_options(config)]
        chosen = [
            option for option in first_options if (not only or option.path in only) and option.path not in without
        ]
        chosen = [
            replace(option, default=_format_value(defaults.get(option.path, option.default))) for option in chosen
        ]
        chosen = [replace(option, default="") if option.path in optional else option for option in chosen]
        for config in configs[1:]:
            section = config.__name__.removesuffix("Config")
            chosen += [replace(option, section=option.section or section) for option in config_options(config)]
        options = {option.flag.lstrip("-").replace("-", "_"): option for option in chosen}
        positional = [p.name for p in inspect.signature(command).parameters.values() if p.kind is p.POSITIONAL_ONLY]

        def run(*args: Any, **values: Any) -> None:
            values |= dict(zip(positional, args, strict=False))
            positional_values = [values.pop(name) for name in positional if name in values]
            option_values = {options[name].path: values.pop(name) for name in list(values) if name in options}
            option_values = {**defaults, **{path: value for path, value in option_values.items() if value is not None}}
            command(*positional_values, **values, **({"option_values": option_values} if options else {}))

        def show(everything: bool) -> None:
            run.__signature__ = _signature(command, options, () if everything else shown, everything)  # type: ignore[attr-defined]

        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        vars(run).update(options=tuple(chosen), show=show)
        show(everything=False)
        return run

    return decorate


def _signature(
    command: Command, options: Mapping[str, ConfigOption], shown: Sequence[str], grouped: bool
) -> inspect.Signature:
    """Return the parameters of a command with its config options; an empty `shown` lists all in the help."""
    hints, arguments, parameters = get_type_hints(command, include_extras=True), [], []
    for name, parameter in inspect.signature(command).parameters.items():
        if name == "option_values":
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            arguments.append(parameter.replace(annotation=hints[name]))
            continue
        extra: dict[str, Any] = {"show": not shown or flag_of(name, hints[name]) in shown}
        if parameter.default in (False, "", None):
            extra["show_default"] = False
        if parameter.default is False or get_origin(_members(_bare(hints[name]))[0]) is list:
            extra["negative"] = ()
        parameters.append(parameter.replace(annotation=Annotated[hints[name], Parameter(**extra)]))
    for name, option in options.items():
        plain: Any = option.annotation
        hint = Annotated[plain | None, _parameter(option, not shown or option.flag in shown, grouped)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))
    if shown:
        order = {flag: number for number, flag in enumerate(shown)}
        parameters.sort(key=lambda parameter: order.get(flag_of(parameter.name, parameter.annotation), len(order)))
    return inspect.Signature([*arguments, *parameters])


def flag_of(name: str, hint: Any) -> str:
    """Return the flag of a parameter: the long name in its annotation, or else the parameter's name."""
    names = [name for metadata in getattr(hint, "__metadata__", ()) for name in metadata.name or ()]
    return next((flag for flag in names if flag.startswith("--")), _flag(name))


def _parameter(option: ConfigOption, show: bool, grouped: bool) -> Parameter:
    """Return the cyclopts parameter of an option."""
    extra: dict[str, Any] = {}
    if option.parse is not None:
        extra = {"converter": _converter(option.parse), "n_tokens": 1, "allow_leading_hyphen": True}
    if grouped:
        extra["group"] = Group(option.section[:1].upper() + option.section[1:] or "Config")
    text = option.help if grouped else re.split(r"[.;] |: a ", option.help)[0].removesuffix(".") + "."
    if grouped and option.names is not None:
        text += f" One of {', '.join(option.names)}."
    if option.parse is not None:
        text += f" Examples: {EXAMPLES[option.parse]}."
    if option.default:
        extra["show_default"] = lambda value: option.default
    return Parameter(name=option.flag, help=text, show=show, **extra)


def _converter(parse: Callable[[str], Any]) -> Callable[[Any, Sequence[Any]], Any]:
    return lambda hint, tokens: parse(tokens[0].value)


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def read_config(option_values: OptionValues, file: Path | None = None, preset: str = "") -> CompressionConfig:
    """Return the config of a file or preset (by default `CompressionConfig`) with the given option values."""
    if file is not None and preset:
        raise StreamlineError(
            f"--config {file} and --preset {preset} were given. Expected only one, because each is a complete config. "
            "Leave one of them out."
        )
    base = CompressionConfig.load(file) if file is not None else CompressionConfig()
    if preset:
        base = PRESETS[preset].config
    changes = {path: value for path, value in option_values.items() if path.split(".")[0] in _TOP_LEVEL}
    unused = [option.flag for option in config_options() if option.path in option_values and _trains(option.path)]
    if base.distillation is None and "distillation.loss" not in option_values and unused:
        raise StreamlineError(
            f"{' and '.join(unused)} has no effect without training. Expected --loss, or a preset with training. Add "
            "--loss kl, for example."
        )
    if "search" in changes:
        changes["search"] = base.search.with_kind(*changes["search"])
    return base.updated(changes)


def read_loading(option_values: OptionValues) -> LoadingConfig:
    """Return the loading config of the given option values."""
    paths = {option.path for option in config_options(LoadingConfig)}
    return LoadingConfig().updated({path: value for path, value in option_values.items() if path in paths})


def set_examples(calibration: int | None, validation: int | None, test: int | None) -> dict[str, int]:
    """Return the given numbers of images or pairs, by part."""
    counts = {"calibration": calibration, "validation": validation, "test": test}
    return {part: count for part, count in counts.items() if count is not None}


def set_flags(
    option_values: OptionValues, examples: Mapping[str, int], config: CompressionConfig, file: Path | None
) -> dict[str, str]:
    """Return by path the flags of the options that were set, and the fields that a config file sets."""
    names = {option.path: option.flag for option in [*config_options(), *config_options(LoadingConfig)]}
    flags = {path: names[path] for path in option_values if path in names}
    flags |= {f"examples.{part}": f"--{part}-examples" for part in examples}
    if file is None:
        return flags
    default = CompressionConfig()
    if config.distillation is not None:
        default = replace(default, distillation=DistillationConfig())
    paths = [option.path for option in config_options()]
    return {path: f"{path} in {file}" for path in paths if _value(config, path) != _value(default, path)} | flags


def stated_fields(file: Path | None) -> frozenset[str]:
    """Return the paths of the fields that a config file or a checkpoint contains."""
    if file is None:
        return frozenset()
    paths = {option.path for option in config_options()}
    if file.is_dir():  # has all fields
        return frozenset(paths)
    content = yaml.safe_load(file.read_text(encoding="utf-8"))

    def contains(path: str) -> bool:
        value = content
        for name in path.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return False
            value = value[name]
        return True

    return frozenset(filter(contains, paths))


_TOP_LEVEL = {field.name for field in fields(CompressionConfig)}
_TRAINING = ("healing", "rounds", "train_until", "data.fitting_tokens", "hardware.autocast", "hardware.state_dtype")


def _trains(path: str) -> bool:
    return path in _TRAINING or path.startswith("distillation.")


def written_options(config: Config, base: Config) -> list[str]:
    """Return the options that change the config `base` to `config`."""
    options = []
    for option in config_options(type(config)):
        value, before = _value(config, option.path), _value(base, option.path)
        if value == before:
            continue
        if isinstance(value, bool):
            options.append(option.flag if value else option.flag.replace("--", "--no-", 1))
        else:
            options.append(f"{option.flag}={shlex.quote(_format_value(value))}")
    return options


def _value(config: Any, path: str) -> Any:
    return functools.reduce(lambda part, name: getattr(part, name, None), path.split("."), config)

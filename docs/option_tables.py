"""Generate the tables of options and the reference of the command line from the code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from docstring_parser import numpydoc

from streamline_hooks.checkpoint import LoadingConfig
from streamline_hooks.cli.config_options import config_options
from streamline_hooks.cli.main import COMMANDS, every_option, make_app
from streamline_hooks.core import Config, HardwareConfig
from streamline_hooks.distillation import DistillationConfig, HealingConfig
from streamline_hooks.evaluation import Suite
from streamline_hooks.pipeline import (
    CompressionConfig,
    DataConfig,
    EvaluationConfig,
    RunOptions,
)
from streamline_hooks.repair import REPLACEMENTS, ReplacementConfig
from streamline_hooks.selection import SEARCHES, SearchConfig

SECTIONS: Mapping[type, str] = {
    CompressionConfig: "",
    DataConfig: "data.",
    DistillationConfig: "distillation.",
    EvaluationConfig: "evaluation.",
    HardwareConfig: "hardware.",
    SearchConfig: "search.",
}
"""Path of each config within `CompressionConfig`, for the names of its options."""
TABLES: tuple[type, ...] = (*SECTIONS, HealingConfig, LoadingConfig, RunOptions, Suite)
"""The classes with a table of their fields."""


def pages() -> dict[str, str]:
    """Return the content of each generated file, by its name without the suffix."""
    tables = {config.__name__: field_table(config) for config in TABLES}
    return {
        **tables,
        "searches": family_table(SearchConfig, SEARCHES),
        "replacements": family_table(ReplacementConfig, REPLACEMENTS),
        "commands": commands(),
    }


def field_table(config: type, without: Iterable[str] = ()) -> str:
    """Return the table of the fields of a config, with the options that set them.

    Parameters
    ----------
    config : type
        A dataclass that documents its fields in a section Attributes.
    without : iterable of str
        Fields to leave out.

    Raises
    ------
    ValueError
        If a field has no text.
    """
    texts, flags = entries(config), option_flags(config)
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in fields(config):
        if field.name in without:
            continue
        name = f"`{field.name}`"
        if field.name in flags:
            name += f"<br>`{flags[field.name]}`"
        type_name, text = texts[field.name]
        cells = (name, type_name, f"`{default_of(field)}`", text)
        rows.append(
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        )
    return "\n".join(rows) + "\n"


def option_flags(config: type) -> dict[str, str]:
    """Return the option of the command line for each field that has one."""
    if config in SECTIONS:
        options = config_options(CompressionConfig)
        section = SECTIONS[config]
    elif config is LoadingConfig:
        options, section = config_options(LoadingConfig), ""
    else:
        return {}
    return {
        option.path.removeprefix(section): option.flag
        for option in options
        if option.path.startswith(section)
    }


def entries(config: type) -> dict[str, tuple[str, str]]:
    """Return the type and the text of each field, from the sections Attributes of a class and its bases."""
    documented: dict[str, tuple[str, str]] = {}
    for base in reversed(config.__mro__):
        docstring = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        for entry in numpydoc.parse(docstring).params:
            if entry.args[0] == "attribute":
                kind = " ".join((entry.type_name or "").split())
                kind = (
                    f"`{kind}`" if kind.startswith("{") else kind
                )  # no typographic quotes
                kind += ", optional" if entry.is_optional else ""
                text = " ".join((entry.description or "").split())
                for name in entry.arg_name.split(","):
                    documented[name.strip()] = kind, protected(text)
    missing = [f.name for f in fields(config) if not all(documented.get(f.name, ("",)))]
    if missing:
        raise ValueError(
            f"{config.__name__} has no type or text for {', '.join(missing)}. Expected an entry of its section "
            "Attributes for each field. Add it to the docstring."
        )
    return documented


def default_of(field: Any) -> str:
    """Return the default of a field as Python writes it."""
    if field.default_factory is not MISSING:
        return repr(field.default_factory())
    value = field.default
    if isinstance(value, Config) and all(
        getattr(value, inner.name) == inner.default for inner in fields(value)
    ):
        return f"{type(value).__name__}()"
    if value is MISSING:
        return "required"
    return value.__name__ if isinstance(value, type) else repr(value)


def family_table(base: type[Config], family: Mapping[str, type[Config]]) -> str:
    """Return a table of the options that the kinds of a family add to those of their base."""
    common = {field.name for field in fields(base)}
    rows = ["| kind | option | type | default | meaning |", "|---|---|---|---|---|"]
    for kind in family:
        config, texts = family[kind], entries(family[kind])
        own = [field for field in fields(config) if field.name not in common]
        label = f"`{kind}`, `{config.__name__}`"
        if not own:
            rows.append(f"| {label} | | | | no options of its own |")
        for field in own:
            type_name, text = texts[field.name]
            rows.append(
                f"| {label} | `{field.name}` | {type_name} | `{default_of(field)}` | {text} |"
            )
    return "\n".join(rows) + "\n"


def commands() -> str:
    """Return the reference of all commands, from their own help."""
    return "\n".join(command_help(command) for command in COMMANDS)


def command_help(command: str) -> str:
    """Return the arguments and options of a command in groups.

    Raises ValueError if an option has no text.
    """
    with every_option([command]):
        app = make_app(command)[command]
        arguments = app.assemble_argument_collection()
        missing = [
            argument.name for argument in arguments if not argument.parameter.help
        ]
        if missing:
            raise ValueError(
                f"The command {command!r} has no text for {', '.join(missing)}. Expected a text for each option. Add "
                "help= to its cyclopts.Parameter."
            )
        text = app.generate_docs(
            heading_level=2, usage_name=f"streamline-hooks {command}"
        )
    lines = []
    for line in text.replace("```console", "```text").splitlines():
        if line.startswith("Example: "):
            line = f"Example: `{line.removeprefix('Example: ')}`"
        elif not line.startswith("```"):
            line = protected(line)
        lines.append(line)
    return "\n".join(lines).strip() + "\n"


def protected(text: str) -> str:
    """Write options as code, so that no typographic dash replaces two hyphens.

    Examples
    --------
    >>> protected("Use --remove 8, or `rank --save`.")
    'Use `--remove` 8, or `rank --save`.'
    """
    parts = re.split(r"(`+[^`]+`+)", text)
    for k in range(0, len(parts), 2):
        parts[k] = re.sub(r"(?<![\w-])--[a-z][a-z-]*", r"`\g<0>`", parts[k])
    return "".join(parts)

"""Command line: the commands of ``streamline-hooks`` and the parsers of their options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamline_hooks.cli.main import COMMANDS, completion, main, make_app, run

if TYPE_CHECKING:
    from streamline_hooks.cli.parsing import (
        parse_bytes,
        parse_criterion,
        parse_duration,
        parse_healing,
        parse_loss,
        parse_mixture,
        parse_replacement,
        parse_search,
        parse_target,
        parse_task,
    )

__all__ = [
    "COMMANDS",
    "completion",
    "main",
    "make_app",
    "parse_bytes",
    "parse_criterion",
    "parse_duration",
    "parse_healing",
    "parse_loss",
    "parse_mixture",
    "parse_replacement",
    "parse_search",
    "parse_target",
    "parse_task",
    "run",
]


def __getattr__(name: str) -> Any:  # `--help` does not need the parsers, which import torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from streamline_hooks.cli import parsing

    return getattr(parsing, name)

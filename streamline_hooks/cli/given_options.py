"""Which options a command was given, and whether they have anything to say in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from streamline_hooks.task import Task

_EXAMPLES = ("calibration_examples", "validation_examples", "test_examples")
_TOKENS = ("calibration_tokens", "validation_tokens", "test_tokens")


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was said, be it with the value that it has anyway."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def given_or_none(context: typer.Context, name: str) -> Any:
    """The value of an option, or None where it was left out."""
    return context.params[name] if is_given(context, name) else None


def refuse_unused(context: typer.Context, search: str, task: Task | None = None) -> None:
    """Raise if an option was given that nothing takes where these are what is searched for and what the model is for.

    Parameters
    ----------
    context : typer.Context
        Of the command, which knows what was given.
    search : str
    task : Task, optional
        Where the command is for models that are not for text, too.

    Raises
    ------
    StreamlineError
        Naming the option, and what takes it.
    """
    if search not in ("disjoint", "mixed") and is_given(context, "parts"):
        raise StreamlineError(
            f"--parts is for --search disjoint and mixed, and the search here is {search}; leave it out."
        )
    if task is None:
        return
    if task.name in ("image-classification", "seq2seq"):
        unused = dict(zip(_TOKENS, _EXAMPLES, strict=True))
    elif task.is_of_text or task.name in ("masked-lm", "text-classification"):
        unused = dict(zip(_EXAMPLES, _TOKENS, strict=True))
    else:  # of embeddings the model says it
        return
    for name, instead in unused.items():
        if is_given(context, name):
            raise StreamlineError(f"{_flag(name)} has no effect on a model for {task}; say {_flag(instead)}.")
    if task.name == "image-classification" and is_given(context, "sequence_length"):
        raise StreamlineError("--sequence-length has no effect on a model for images; leave it out.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

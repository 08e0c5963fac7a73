"""Which options a command was given, and whether they have anything to say in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from streamline_hooks.selection import SearchConfig
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


def refuse_unused(context: typer.Context, search: SearchConfig, task: Task | None = None, model: Any = None) -> None:
    """Raise if an option was given that nothing takes where these are what is searched for and what the model is for.

    Parameters
    ----------
    context : typer.Context
        Of the command, which knows what was given.
    search : SearchConfig
    task : Task, optional
        Where the command is for models that are not for text, too.
    model : transformers.PreTrainedModel, optional
        Once it is loaded: whether embeddings are of text or of images, it alone says.

    Raises
    ------
    StreamlineError
        Naming the option, and what takes it.
    """
    if not hasattr(search, "windows") and is_given(context, "parts"):
        raise StreamlineError(
            f"--parts is for --search disjoint and mixed, and the search here is {search.kind}; leave it out."
        )
    if task is None:
        return
    images = task.name == "image-classification"
    text = task.is_of_text or task.name in ("masked-lm", "text-classification")
    if model is not None and task.name == "embedding":
        from streamline_hooks.calibration.task_batches import takes

        text, images = takes(model)
    if text == images and task.name != "seq2seq":  # of embeddings not known yet, or refused with both
        return
    unused, used = (_EXAMPLES, _TOKENS) if text else (_TOKENS, _EXAMPLES)
    of = f"a model for {task}" + f" of {'images' if images else 'text'}" * (task.name == "embedding")
    for name, instead in zip(unused, used, strict=True):
        if is_given(context, name):
            raise StreamlineError(f"{_flag(name)} has no effect on {of}; say {_flag(instead)}.")
    if images and is_given(context, "sequence_length"):
        raise StreamlineError("--sequence-length has no effect on a model for images; leave it out.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

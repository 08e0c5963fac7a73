"""What the commands load: a model, and text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from streamline_hooks.task import Task


def task_named(name: str, model: str | None) -> Task:
    """The task that was asked for, or the one that a model's configuration says."""
    from streamline_hooks.cli.short_forms import parse_task
    from streamline_hooks.pretrained import task_of_pretrained
    from streamline_hooks.task import Task

    if name:
        return parse_task(name)
    return Task("causal-lm") if model is None else task_of_pretrained(model)


def load_model(name: str, task: Task | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model by folder or name, and its tokenizer or image processor; a causal language model where no task is said.

    Raises
    ------
    StreamlineError
        If it is for something else.
    """
    if task is None:
        task = task_named("", name)
        if not task.is_of_text:
            raise StreamlineError(f"{name!r} is for {task}; this command is for causal language models.")
    from transformers.utils import logging

    from streamline_hooks.pretrained import load_pretrained

    logging.set_verbosity_error()
    model, tokenizer = load_pretrained(name, task=task)
    return model.eval(), tokenizer


def load_without_tokenizer(name: str) -> PreTrainedModel:
    """A model for anything, by folder or name; a folder needs no tokenizer."""
    from transformers.utils import logging

    from streamline_hooks.checkpoint import load

    logging.set_verbosity_error()
    return load(name).eval() if Path(name).is_dir() else load_model(name, task_named("", name))[0]


def block_numbers(text: str) -> list[int]:
    """The numbers in a --keep."""
    numbers = []
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            numbers.append(int(part))
        except ValueError:
            raise StreamlineError(f"--keep {part!r} is not a block number; expected numbers like 0,1,-1.") from None
    return numbers

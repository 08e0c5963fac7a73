"""What is likely wrong where a model with a cache fails, or gives something else than without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.stack import find_stack
from streamline_hooks.testing.assertions.layer_numbers import wrong_numbers


@contextmanager
def failing_with_a_cache(model: nn.Module, stack: str | None, what: str) -> Iterator[None]:
    """Say what fails, and why, where a model raises that was run with a cache.

    Parameters
    ----------
    model : torch.nn.Module
    stack : str or None
        Path of the stack, see `find_stack`.
    what : str
        What is done with the cache.

    Raises
    ------
    AssertionError
    """
    try:
        yield
    except Exception as error:
        raise AssertionError(
            f"{type(model).__name__} fails with a cache, {what}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}. Expected: the logits of the forward without one. Likely cause: "
            f"{likely_cause(model, stack)}."
        ) from error


def likely_cause(model: nn.Module, stack: str | None) -> str:
    """Why a cache gives something else: numbers of blocks that are wrong, or what cannot be seen from here."""
    try:
        wrong = wrong_numbers(find_stack(model, stack))
    except StreamlineError:  # no single stack: then nothing is said of its numbers
        wrong = []
    if wrong:
        return f"{'; '.join(wrong)}: it writes into another block's slot of the cache. Number the blocks from 0"
    return (
        "a block keeps its keys in the wrong slot or for the wrong positions, or a module between the blocks looks at "
        "other tokens, which decoding does not hand it"
    )

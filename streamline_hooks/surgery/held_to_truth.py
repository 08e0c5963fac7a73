"""A removal held against the model with the same blocks bypassed, and why it falls short where it does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor, nn

from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.diagnosis import diagnose
from streamline_hooks.surgery.edits import Edits
from streamline_hooks.surgery.hazards import Hazard
from streamline_hooks.surgery.probe import CACHE, gives, logits_of_probe, observe, shortfall, undisturbed
from streamline_hooks.surgery.renumber import INDEX_NAMES, find_index_attributes
from streamline_hooks.surgery.saving import saver_depth


def against_truth(
    stack: BlockStack,
    window: range,
    going: Sequence[nn.Module],
    removed: Callable[[], AbstractContextManager[Edits]],
) -> tuple[str, Hazard] | None:
    """Compare plain removal with the bypassed window; what will stand in its place changes nothing about that.

    Parameters
    ----------
    stack : BlockStack
    window : range
        Blocks that are in the model now.
    going : sequence of torch.nn.Module
        Of the modules spliced after the window's last block, those that go with it.
    removed : callable
        Gives a context in which the window is out of the model, and the edits by which it is.

    Returns
    -------
    tuple of str and Hazard, or None
        What the model does otherwise than it must, and the reason. None where it is right, or nothing can tell.
    """
    if saver_depth(stack) != 0:
        _tell_of_numbers(stack, window)
        return None
    truth = observe(stack, window, going)
    if truth is None:
        return None
    model = stack.model
    with removed() as edits:
        wrong = shortfall(truth, model)
        in_question = wrong is not None and wrong != CACHE
        computing = edits.numbers_that_compute(lambda: gives(truth, model)) if in_question else ()
    return None if wrong is None else (wrong, _reason(stack, window, wrong, computing, truth.given))


def _tell_of_numbers(stack: BlockStack, window: range) -> None:
    """Warn where blocks are renumbered by an attribute that may be something else, as nothing is run that shows it."""
    if window.stop == len(stack):
        return
    for index in find_index_attributes(stack.blocks):
        if index.name not in INDEX_NAMES:
            values = ", ".join(str(index.of(k)) for k in range(3))
            warnings.warn(
                f"The blocks of {stack.path} hold {index.name!r} ({values}, ...), which is taken for their number: it "
                "is counted anew when one goes. Nothing shows whether they compute with it; if they do, set it back to "
                "what it was on the blocks that stay.",
                stacklevel=7,
            )


def _reason(stack: BlockStack, window: range, wrong: str, computing: Sequence[str], given: dict[str, Tensor]) -> Hazard:
    if wrong == CACHE:
        return Hazard("cache", "the cache counts on a block's number or kind")
    if computing:
        return Hazard("number-computes", f"blocks compute with their own number ({', '.join(computing)})")
    with undisturbed(stack.model):
        found = diagnose(stack, window, partial(logits_of_probe, stack.model, given))
    return found or Hazard("probe", "it counts on a block's number or on what those blocks leave behind")

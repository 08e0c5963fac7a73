"""Assert the identity laws of surgery."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.stack import find_stack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.testing.assertions.difference import require_same
from streamline_hooks.testing.assertions.running import answer, axes_of, batches_for, padding_said, quietly, real_places


def assert_identity_preserves_output(
    model: nn.Module,
    batch: Batch | Tensor | None = None,
    *,
    identity: Callable[[], nn.Module] = nn.Identity,
    places: Iterable[int] | None = None,
    stack: str | None = None,
    tolerance: float = 0.0,
) -> None:
    """Assert that an identity at any place, and each block in its own place, leave the logits as they are.

    Parameters
    ----------
    model : torch.nn.Module
        Any model with a stack of blocks; it is run in evaluation mode and given back as it was.
    batch : mapping or torch.Tensor, optional
        What its forward takes. Made up for a Transformers model, left-padded as well.
    identity : callable
        Makes the module that is inserted and shall change nothing, for instance your replacement as it starts.
    places : iterable of int, optional
        Where it is inserted: 0 to L, with L the number of blocks; all by default.
    stack : str, optional
        Path of the stack, see `find_stack`.
    tolerance : float
        Relative; 0 means to the bit.

    Raises
    ------
    AssertionError
        With the place, the largest difference and where it is.
    StreamlineError
        If no batch can be made up, or a place is out of range.

    Examples
    --------
    >>> from streamline_hooks.testing import assert_identity_preserves_output, tiny_model
    >>> assert_identity_preserves_output(tiny_model("llama", blocks=3))
    """
    batches = batches_for(model, batch, left_padded=True)
    length = len(find_stack(model, stack))
    chosen = range(length + 1) if places is None else list(places)
    axes = axes_of(model)
    with quietly(model):
        for given in batches:
            expected = answer(model, given)
            real, of_batch = real_places(given, expected), padding_said(given)
            for place in chosen:
                with LayerSurgeon(model, stack, probe=False) as surgeon:
                    module = surgeon.insert(place, identity())
                    got = answer(model, given)
                require_same(
                    got,
                    expected,
                    f"A {type(module).__name__} inserted {_before(place, length)} changes the logits{of_batch}",
                    f"the {type(module).__name__} is no identity, or what runs it there changes the state",
                    real=real,
                    tolerance=tolerance,
                    axes=axes,
                )
            for k in range(length):
                with LayerSurgeon(model, stack, probe=False) as surgeon:
                    surgeon.replace([k], surgeon.stack[k])
                    got = answer(model, given)
                require_same(
                    got,
                    expected,
                    f"Block {k} replaced by itself changes the logits{of_batch}",
                    "the surgery moves, renumbers or copies a block that it should leave alone",
                    real=real,
                    tolerance=tolerance,
                    axes=axes,
                )


def _before(place: int, length: int) -> str:
    return f"before block {place}" if place < length else f"after the last block (place {length})"

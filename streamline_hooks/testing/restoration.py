"""Assert that a temporary change is completely undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from streamline_hooks.core import Batch, UnsupportedSurgery
from streamline_hooks.modeling import find_stack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.testing.compare import (
    assert_tensors_match,
    make_batches,
    model_output,
    output_axes,
    reproducible_eval,
)
from streamline_hooks.testing.model_state import ModelState

Change = Callable[[nn.Module], AbstractContextManager[Any, bool | None]]
_MAX_LISTED = 8


class _ExitByException(Exception):
    """Raised inside a change to test that it propagates."""


def assert_restores(
    model: nn.Module,
    change: Change | None = None,
    batch: Batch | Tensor | None = None,
    *,
    run_inside: bool = True,
    stack: str | None = None,
) -> None:
    """Assert that a temporary change restores a model bit for bit.

    The comparison covers modules, parameters and buffers (objects and values), gradients, all hooks, layer indices and
    other attributes, configurations, the keys of the state dict and their order, training mode, ``requires_grad``, and
    the logits. The change is left once normally and once by an exception raised inside.

    Parameters
    ----------
    model : torch.nn.Module
        Any model with a block stack. Its tensors are copied for the comparison.
    change : callable, optional
        Takes the model and returns a context manager. Default: surgeries by a `LayerSurgeon` that removes, replaces and
        inserts.
    batch : mapping or torch.Tensor, optional
        Inputs of the model's forward. Default for a Transformers model: random tokens.
    run_inside : bool
        Whether to run the model inside the change, which detects traces of a forward pass there.
    stack : str, optional
        Path of the block stack for the default surgeries, see `find_stack`.

    Raises
    ------
    AssertionError
        If something was not restored. The message lists the differences.
    StreamlineError
        If no batch can be generated.

    Examples
    --------
    >>> from contextlib import contextmanager
    >>> from streamline_hooks.testing import assert_restores, tiny_model
    >>> @contextmanager
    ... def forgetful(model):
    ...     model.model.layers[1].register_forward_hook(lambda *args: None)
    ...     yield
    >>> assert_restores(tiny_model("llama", blocks=3))
    >>> assert_restores(tiny_model("llama", blocks=3), forgetful)
    Traceback (most recent call last):
    ...
    AssertionError: After forgetful, left normally, the model is not as before: a forward hook was left on ...
    """
    (inputs,) = make_batches(model, batch, left_padded=False)
    with reproducible_eval(model):
        model_output(model, inputs)  # the first forward pass may initialize attributes
        expected = model_output(model, inputs)
    state = ModelState(model)
    with reproducible_eval(model):
        state.run_ignoring_changes(lambda: model_output(model, inputs))
    changes = (
        _default_surgeries(model, stack) if change is None else {getattr(change, "__qualname__", "the change"): change}
    )
    for name, open_change in changes.items():
        for raising in (False, True):
            subject = f"After {name}, left {'by an exception raised inside' if raising else 'normally'}, the model"
            has_propagated = False
            try:
                with open_change(model):
                    if run_inside:
                        with reproducible_eval(model, restore=False):  # traces of a forward pass must be detected
                            model_output(model, inputs)
                    if raising:
                        raise _ExitByException
            except _ExitByException:
                has_propagated = True
            if raising and not has_propagated:
                raise AssertionError(
                    f"{name} does not propagate an exception raised inside. Expected: the exception leaves the "
                    "context. Likely cause: __exit__ returns a true value, or a contextmanager catches exceptions at "
                    "its yield."
                )
            changed = state.changes()
            if changed:
                more = f"; and {len(changed) - _MAX_LISTED} more" if len(changed) > _MAX_LISTED else ""
                cause = "the exit undoes less than the entry changed"
                cause = (
                    "the code that undoes the change follows a yield or call outside a finally" if raising else cause
                )
                raise AssertionError(
                    f"{subject} is not as before: {'; '.join(changed[:_MAX_LISTED])}{more}. Expected: bitwise as "
                    f"before. Likely cause: {cause}."
                )
            with reproducible_eval(model):
                got = model_output(model, inputs)
            assert_tensors_match(
                got,
                expected,
                f"{subject} returns different logits than before",
                "something outside the model was changed, such as a function of its Python module or a global setting",
                tolerance=0.0,
                axes=output_axes(model),
            )


def _default_surgeries(model: nn.Module, path: str | None) -> dict[str, Change]:
    """Return the default surgeries that the length of the stack allows."""
    length = len(find_stack(model, path))
    middle = length // 2

    def surgery(operate: Callable[..., Any], *args: Any) -> Change:
        @contextmanager
        def temporary(model: nn.Module) -> Iterator[None]:
            with LayerSurgeon(model, path, probe=False) as surgeon:
                operate(surgeon, *args)
                yield

        return temporary

    insert, remove, replace = LayerSurgeon.insert, LayerSurgeon.remove, LayerSurgeon.replace
    changes = {
        f"a LayerSurgeon that inserts before block {middle}": surgery(insert, middle, nn.Identity()),
        "a LayerSurgeon that inserts at the end": surgery(insert, length, nn.Identity()),
    }
    for k in dict.fromkeys((0, middle, length - 1)) if length > 1 else ():
        # Called after the snapshot, so that traces of the probe are detected too.
        if not removal_error(model, range(k, k + 1), path)[1]:
            changes[f"a LayerSurgeon that removes block {k}"] = surgery(remove, [k])
            changes[f"a LayerSurgeon that replaces block {k}"] = surgery(replace, [k], nn.Identity())
    return changes


_UNKNOWN_CAUSES = frozenset({"probe", "cache"})


def removal_error(model: nn.Module, window: range, stack: str | None) -> tuple[UnsupportedSurgery | None, bool]:
    """Return the error of a surgeon on removing a window, or None, and whether its cause is known.

    The causes "probe" and "cache" only mean that the outputs of the shorter model are wrong, which faulty surgery would
    cause too. Such an error is not accepted as a refusal.
    """
    try:
        with LayerSurgeon(model, stack) as surgeon:
            surgeon.remove(window)
    except UnsupportedSurgery as error:
        return error, error.cause not in _UNKNOWN_CAUSES
    return None, False

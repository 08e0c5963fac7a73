"""Assert that a temporary change is undone completely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.stack import find_stack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.testing.assertions.difference import require_same
from streamline_hooks.testing.assertions.model_state import ModelState
from streamline_hooks.testing.assertions.running import answer, axes_of, batches_for, quietly, run

Change = Callable[[nn.Module], AbstractContextManager[Any, bool | None]]
_MOST_NAMED = 8


class _ExitByException(Exception):
    """Raised inside a change to see it leave."""


def assert_restores(
    model: nn.Module,
    change: Change | None = None,
    batch: Batch | Tensor | None = None,
    *,
    run_inside: bool = True,
    stack: str | None = None,
) -> None:
    """Assert that a change that claims to be temporary leaves a model as it was, to the bit.

    Looked at are the modules, parameters and buffers (the objects and their values), gradients, hooks of every kind,
    layer indices and other attributes, configurations, the state dict's keys and their order, training mode,
    ``requires_grad``, and the logits. The change is left normally, and by an exception that is raised inside.

    Parameters
    ----------
    model : torch.nn.Module
        Its tensors are copied for the comparison.
    change : callable, optional
        Is given the model and returns a context manager. By default surgeries: a `LayerSurgeon` that removes,
        replaces and inserts.
    batch : mapping or torch.Tensor, optional
        What the model's forward takes. Made up for a Transformers model.
    run_inside : bool
        Run the model inside the change too. What is set up by the first forward in there is then seen to be left.
    stack : str, optional
        Path of the stack, for the surgeries by default; see `find_stack`.

    Raises
    ------
    AssertionError
        Naming what is not as it was.
    StreamlineError
        If no batch can be made up.

    Examples
    --------
    >>> from contextlib import contextmanager
    >>> from streamline_hooks.testing import assert_restores, tiny_model
    >>> @contextmanager
    ... def forgetful(model):
    ...     model.model.layers[1].register_forward_hook(lambda *given: None)
    ...     yield
    >>> assert_restores(tiny_model("llama", blocks=3))
    >>> assert_restores(tiny_model("llama", blocks=3), forgetful)
    Traceback (most recent call last):
    ...
    AssertionError: After forgetful, left normally, the model is not as before: a forward hook was left on ...
    """
    (given,) = batches_for(model, batch, left_padded=False)
    with quietly(model):
        answer(model, given)  # what a model sets up in its first forward is no trace of the change
        expected = answer(model, given)
    state = ModelState(model)
    with quietly(model):
        state.let_run(lambda: answer(model, given))
    changes = _surgeries(model, stack) if change is None else {getattr(change, "__qualname__", "the change"): change}
    for name, temporary in changes.items():
        for raising in (False, True):
            how = f"After {name}, left {'by an exception raised inside' if raising else 'normally'}, the model"
            if raising and not _left_by_exception(model, temporary, given if run_inside else None):
                raise AssertionError(
                    f"{how} has not seen the exception leave. Expected: it is not swallowed. Likely cause: __exit__ "
                    "returns something true, or a contextmanager catches what is raised at its yield."
                )
            if not raising:
                with temporary(model):
                    _run_inside(model, given if run_inside else None)
            changed = state.changes()
            if changed:
                raise AssertionError(_said(how, changed, raising))
            with quietly(model):
                got = answer(model, given)
            require_same(
                got,
                expected,
                f"{how} gives other logits than before",
                "something outside the model was changed, such as a function of its module or a global setting",
                tolerance=0.0,
                axes=axes_of(model),
            )


def _left_by_exception(model: nn.Module, change: Change, given: dict[str, Any] | None) -> bool:
    seen = False
    try:
        with change(model):
            _run_inside(model, given)
            raise _ExitByException
    except _ExitByException:
        seen = True
    return seen


def _run_inside(model: nn.Module, given: dict[str, Any] | None) -> None:
    if given is not None:
        with quietly(model, restore=False):  # a trace that a forward leaves must be seen
            run(model, given)


def _said(how: str, changed: list[str], raising: bool) -> str:
    more = f"; and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
    cause = "the way out undoes less than the way in did"
    if raising:
        cause = "what undoes it stands after a yield or a call, and not in a finally"
    return (
        f"{how} is not as before: {'; '.join(changed[:_MOST_NAMED])}{more}. Expected: as before to the bit. "
        f"Likely cause: {cause}."
    )


def _surgeries(model: nn.Module, path: str | None) -> dict[str, Change]:
    """What a surgeon can do, where the stack has the blocks for it."""
    length = len(find_stack(model, path))
    middle = length // 2

    def surgery(operate: Callable[..., Any], *given: Any) -> Change:
        @contextmanager
        def temporary(model: nn.Module) -> Iterator[None]:
            with LayerSurgeon(model, path, probe=False) as surgeon:
                operate(surgeon, *given)
                yield

        return temporary

    insert, remove, replace = LayerSurgeon.insert, LayerSurgeon.remove, LayerSurgeon.replace
    changes = {
        f"a LayerSurgeon that inserts before block {middle}": surgery(insert, middle, nn.Identity()),
        "a LayerSurgeon that inserts at the end": surgery(insert, length, nn.Identity()),
    }
    for k in dict.fromkeys((0, middle, length - 1)) if length > 1 else ():
        if _can_go(model, path, k):
            changes[f"a LayerSurgeon that removes block {k}"] = surgery(remove, [k])
            changes[f"a LayerSurgeon that replaces block {k}"] = surgery(replace, [k], nn.Identity())
    return changes


def _can_go(model: nn.Module, path: str | None, k: int) -> bool:
    """Whether no known cause speaks against it. Asked after the model's state was taken, so that a trace shows."""
    return not refusal(model, range(k, k + 1), path)[1]


_CATCH_ALLS = frozenset({"probe", "cache"})


def refusal(model: nn.Module, window: range, stack: str | None) -> tuple[UnsupportedSurgery | None, bool]:
    """Return a probing surgeon's error on removing a window, or None, and whether its cause is known.

    A probe only sees that the shorter model is wrong, which faulty surgery would look like too, so a refusal counts
    only with a cause found in advance or by a diagnosis ("probe" and "cache" are none).
    """
    try:
        with LayerSurgeon(model, stack) as surgeon:
            surgeon.remove(window)
    except UnsupportedSurgery as error:
        return error, error.cause not in _CATCH_ALLS
    return None, False

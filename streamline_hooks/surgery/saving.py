"""Refuse to save a model while a surgeon is open on it."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.stack import BlockStack


class SavingRefused:
    """Stands in the place of ``save_pretrained`` inside an open surgeon.

    A copy of the model that is made meanwhile, or pickled, carries it along: it has the shortened blocks but not yet
    the class that saves them, so that it would come back without its repair.

    Parameters
    ----------
    owner : torch.nn.Module, optional
        The model that the surgeon is open on; None for a copy.
    """

    def __init__(self, owner: Any = None) -> None:
        self._copied = owner is None

    def __reduce__(self) -> tuple[type[SavingRefused], tuple[()]]:
        return SavingRefused, ()

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise, with what to do."""
        if self._copied:
            raise StreamlineError(
                "This model was copied inside an open LayerSurgeon, and would be saved without what the surgeon put "
                "in. Open one on the copy and commit: `with LayerSurgeon(copy) as surgeon: surgeon.commit()`."
            )
        raise StreamlineError(
            "save_pretrained inside an open LayerSurgeon would write a model that its exit takes back. Call "
            "surgeon.commit() first, or leave the context to save the original."
        )


def savers(stack: BlockStack) -> list[nn.Module]:
    """The Transformers models around a stack. Importing their class to ask costs a quarter of a second."""
    return [module for module in stack.ancestors if callable(getattr(type(module), "save_pretrained", None))]


def saver_depth(stack: BlockStack) -> int | None:
    """Which of a stack's ancestors is the model that is saved: the outermost."""
    found = savers(stack)
    return next((depth for depth, module in enumerate(stack.ancestors) if found and module is found[0]), None)

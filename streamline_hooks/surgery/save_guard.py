"""Refuse to save a model while a surgeon is open on it."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from streamline_hooks.core import StreamlineError
from streamline_hooks.modeling import BlockStack, saves_itself


class SaveGuard:
    """Replacement of ``save_pretrained`` inside an open surgeon, which raises.

    Copies and pickles of the model keep the guard. Such a copy has fewer blocks but not yet the class that saves
    splices, so a checkpoint of it would be loaded without them.
    """

    def __init__(self, owner: Any = None) -> None:
        self._copied = owner is None

    def __reduce__(self) -> tuple[type[SaveGuard], tuple[()]]:
        return SaveGuard, ()

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise with the reason and the remedy."""
        if self._copied:
            raise StreamlineError(
                "This model was copied inside an open LayerSurgeon and would be saved without its inserted modules. "
                "Open a surgeon on the copy and commit: `with LayerSurgeon(copy) as surgeon: surgeon.commit()`."
            )
        raise StreamlineError(
            "save_pretrained was called inside an open LayerSurgeon, whose exit restores the original model. Call "
            "surgeon.commit() first, or leave the with statement to save the original."
        )


def transformers_ancestors(stack: BlockStack) -> list[nn.Module]:
    """Return the models around a stack that save themselves."""
    return [module for module in stack.ancestors if saves_itself(module)]


def saved_model_depth(stack: BlockStack) -> int | None:
    """Return the index, among a stack's ancestors, of the outermost Transformers model, which is the one saved."""
    models = transformers_ancestors(stack)
    return stack.ancestors.index(models[0]) if models else None

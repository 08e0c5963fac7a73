"""The pooling layer of an encoder, of which its configuration says nothing: a class has it, or not, by an argument.

A checkpoint without one comes back with random weights in its place, and with another class's default the other way
round; a shortened model built from its configuration alone would be another model than the one that was shortened.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_ARGUMENT = "add_pooling_layer"
_LAYER = "pooler"


def pooling_argument(model: nn.Module) -> dict[str, bool]:
    """Return the ``add_pooling_layer`` argument that rebuilds a model as it is; {} if its class takes none."""
    return {_ARGUMENT: getattr(model, _LAYER, None) is not None} if _takes_it(type(model)) else {}


def load_as_pooled(automatic: Any, name: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model with a pooler only if its checkpoint has one, where the class gives the choice.

    Return the model and the loading info. An ``add_pooling_layer`` among the options is respected.
    """
    model, info = automatic.from_pretrained(name, output_loading_info=True, **options)
    for pooled, which in ((False, "missing_keys"), (True, "unexpected_keys")):
        found = info.get(which) or ()
        if found and all(map(is_of_pooler, found)) and _takes_it(type(model)):
            asked = {_ARGUMENT: pooled, **options}
            model, info = automatic.from_pretrained(name, output_loading_info=True, **asked)
    return model, info


def is_of_pooler(name: str) -> bool:
    """Whether a parameter of this name is a pooler's."""
    return _LAYER in name.split(".")


def _takes_it(model_class: type) -> bool:
    """Whether the class, or the one that it hands its arguments on to, takes the argument."""
    for kind in model_class.__mro__:
        own = vars(kind).get("__init__")
        taken = {} if own is None else inspect.signature(own).parameters
        if _ARGUMENT in taken:
            return True
        if taken and not any(each.kind is each.VAR_KEYWORD for each in taken.values()):
            return False
    return False

"""Preserve the pooling layer of an encoder, which is an argument of its class and not in the configuration.

With the default argument, a checkpoint without a pooler would be loaded with a randomly initialized pooler, and a class
without a pooler by default would drop the pooler of a checkpoint.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_ARGUMENT = "add_pooling_layer"
_LAYER = "pooler"


def pooling_argument(model: nn.Module) -> dict[str, bool]:
    """Return the ``add_pooling_layer`` argument to rebuild a model; {} if its class does not have this argument."""
    return {_ARGUMENT: getattr(model, _LAYER, None) is not None} if _takes_it(type(model)) else {}


def load_with_pooler(automatic: Any, name: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model, with a pooler only if its checkpoint has one, and return it with the loading info.

    An ``add_pooling_layer`` among the options takes precedence.
    """
    model, info = automatic.from_pretrained(name, output_loading_info=True, **options)
    for pooled, kind in ((False, "missing_keys"), (True, "unexpected_keys")):
        keys = info.get(kind) or ()
        if keys and all(map(is_pooler_parameter, keys)) and _takes_it(type(model)):
            arguments = {_ARGUMENT: pooled, **options}
            model, info = automatic.from_pretrained(name, output_loading_info=True, **arguments)
    return model, info


def is_pooler_parameter(name: str) -> bool:
    """Whether the name of a parameter is that of a pooler's parameter."""
    return _LAYER in name.split(".")


def _takes_it(model_class: type) -> bool:
    """Whether a class accepts the argument, itself or in a base class that receives its keyword arguments."""
    for kind in model_class.__mro__:
        init = vars(kind).get("__init__")
        parameters = {} if init is None else inspect.signature(init).parameters
        if _ARGUMENT in parameters:
            return True
        if parameters and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return False
    return False

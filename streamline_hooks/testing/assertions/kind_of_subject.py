"""Whether what was given is a model, with blocks and an input of its own, or a module that stands between blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.generation import seeded
from streamline_hooks.testing.assertions.running import is_transformers_model


def is_model(subject: nn.Module, batch: Any) -> bool:
    """A Transformers model, or anything that comes with the batch that it is run on."""
    return batch is not None or is_transformers_model(subject)


def features_of(module: nn.Module, features: int | None) -> int:
    """The width of the states that a module maps.

    Raises
    ------
    StreamlineError
        If it was not given and the module does not say it.
    """
    said = getattr(module, "features", None) if features is None else features
    if not isinstance(said, int) or said < 1:
        raise StreamlineError(
            f"How wide the states of this {type(module).__name__} are is not known. If it maps (batch, tokens, "
            "features) to the same shape, give features=...; if it is a model that is no Transformers model, give "
            "batch={...} with what its forward takes."
        )
    return said


def states_for(module: nn.Module, rows: int, tokens: int, features: int, dtype: torch.dtype) -> Tensor:
    """Random states of shape (rows, tokens, features) where a module is."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, tokens, features, generator=generator)
    return states.to(device=_first_tensor(module).device, dtype=dtype)


def precision_of(module: nn.Module) -> torch.dtype:
    """The floating-point type that a module computes in; float32 where nothing in it says so."""
    tensor = _first_tensor(module)
    return tensor.dtype if tensor.is_floating_point() else torch.float32


def called_on(module: nn.Module, states: Tensor) -> Any:
    """What a module returns for states, with the same random numbers each time.

    Raises
    ------
    AssertionError
        If it raises; the text says for which shape.
    """
    call: Callable[[Tensor], Any] = module
    try:
        with seeded(states.device, "assertion"):
            return call(states)
    except Exception as error:
        raise AssertionError(
            f"{type(module).__name__} fails on states of shape {tuple(states.shape)} (batch, tokens, features) in "
            f"{states.dtype}: {type(error).__name__}: {error}. Expected: the same shape. Likely cause: it takes more "
            "than the states (then test the model that it is in), or has another width than features says."
        ) from error


def _first_tensor(module: nn.Module) -> Tensor:
    floating = (t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point())
    return next(floating, torch.empty(0))

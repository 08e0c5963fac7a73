"""Under autocast, narrow the weights that are not trained once instead of at every step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


@contextmanager
def narrowed_once(modules: Iterable[nn.Module], dtype: torch.dtype | None) -> Iterator[int]:
    """Let linear layers without gradients take their products in the dtype that autocast would.

    Autocast narrows a weight that has no gradient anew at each use, which for a few sequences takes as long as the
    products themselves. What comes out is the same to the bit; outside autocast of this dtype a layer is as it was.

    Parameters
    ----------
    modules : iterable of torch.nn.Module
        What they contain is looked through. Layers that are trained, or kept elsewhere than in memory, stay.
    dtype : torch.dtype or None
        That of the autocast; None where there is none, and nothing is done.

    Yields
    ------
    int
        Bytes that the narrow copies take.

    Examples
    --------
    >>> layer, state = nn.Linear(4, 4).requires_grad_(False), torch.ones(1, 4)
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     expected = layer(state)
    ...     with narrowed_once([layer], torch.bfloat16) as taken:
    ...         print(taken, torch.equal(layer(state), expected))
    40 True
    """
    apart = (dtype, torch.float64)  # autocast leaves these as they are
    narrowed = [] if dtype is None else [layer for layer in _frozen(modules) if layer.weight.dtype not in apart]
    taken = 0
    try:
        for layer in narrowed:
            try:
                weight, bias = (None if t is None else t.detach().to(dtype) for t in (layer.weight, layer.bias))
            except torch.cuda.OutOfMemoryError:
                break  # the others are narrowed at each use
            taken += sum(t.nbytes for t in (weight, bias) if t is not None)
            layer.forward = _product(layer, weight, bias)  # type: ignore[method-assign]
        yield taken
    finally:
        for layer in narrowed:
            layer.__dict__.pop("forward", None)


def _frozen(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    found = {part: None for module in modules for part in module.modules() if type(part) is nn.Linear}
    return [
        layer
        for layer in found
        if "forward" not in layer.__dict__  # accelerate has put one in, which brings the weights
        and not any(p.requires_grad or p.is_meta or type(p.data) is not Tensor for p in layer.parameters())
    ]


def _product(layer: nn.Linear, weight: Any, bias: Any) -> Any:
    def forward(given: Tensor) -> Tensor:
        kind = given.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == weight.dtype:
            return linear(given, weight, bias)
        return nn.Linear.forward(layer, given)

    return forward

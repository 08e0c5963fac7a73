"""Call Python functions from compiled graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class GraphCallback:
    """Call a Python function with tensors while a graph compiled by ``torch.compile`` runs.

    A compiled graph computes tensors; what its Python code did otherwise, such as appending to a list, is not part of
    it or is compiled again in each call. An instance that is called in compiled code adds an operator to the graph that
    calls the function with the present values. The graph is neither broken nor compiled again, and the calls of an
    instance keep their order. No gradients flow through the tensors.

    Parameters
    ----------
    function : callable
        Receives the key and the tensors. It must copy what it keeps, because the graph may use the memory again. An
        exception that it raises leaves the compiled code.

    Examples
    --------
    >>> received = []
    >>> callback = GraphCallback(lambda key, *tensors: received.append((key, *(t.tolist() for t in tensors))))
    >>> def double(x):
    ...     callback(7, x)
    ...     return 2 * x
    >>> compiled = torch.compile(double, backend="eager", fullgraph=True)
    >>> compiled(torch.tensor([1.0])), compiled(torch.tensor([3.0]))
    (tensor([2.]), tensor([6.]))
    >>> received
    [(7, [1.0]), (7, [3.0])]
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self._number = next(_NUMBERS)
        self._calls = torch.zeros((), dtype=torch.int64)  # changed by each call: the compiler keeps their order
        _CALLBACKS[self._number] = self

    def __call__(self, key: int, *tensors: Tensor) -> None:
        """Call the function with a key and tensors, also from compiled code."""
        if torch.compiler.is_compiling():
            torch.ops.streamline_hooks.call_back([t.detach() for t in tensors], self._calls, self._number, key)
        else:
            self.function(key, *tensors)


_NUMBERS = itertools.count()
_CALLBACKS: WeakValueDictionary[int, GraphCallback] = WeakValueDictionary()

torch.library.define(
    "streamline_hooks::call_back",
    "(Tensor[] tensors, Tensor(a!) calls, int number, int key) -> ()",
    tags=tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)),
)


@torch.library.impl("streamline_hooks::call_back", "CompositeExplicitAutograd")
def _call_back(tensors: Sequence[Tensor], calls: Tensor, number: int, key: int) -> None:
    calls.add_(1)
    callback = _CALLBACKS.get(number)  # None if its owner was deleted and the compiled code was not
    if callback is not None:
        callback.function(key, *tensors)


def _call_back_without_data(tensors: Sequence[Tensor], calls: Tensor, number: int, key: int) -> None:
    """Do nothing while a graph is traced."""


torch.library.register_fake("streamline_hooks::call_back", _call_back_without_data)

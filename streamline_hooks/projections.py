"""The last linear maps before a block's output, read from the graph that autograd records of it.

Going back from the output, additions, norms, scales and routing weights are passed by; each path ends at the first
linear map that holds a matrix of parameters. Those are the projections that write into the residual stream, whatever
the block calls them and wherever it keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_SUMS = ("Add", "Sub")
_ELEMENTWISE = (*_SUMS, "Mul", "Div")
_NO_ELEMENTWISE = ("Addmm", "Addbmm", "Addmv", "Addr")


@dataclass(frozen=True)
class Projection:
    """A linear map before the output, or a bias that is added behind one.

    Attributes
    ----------
    names : frozenset of str
        Its parameters.
    is_map : bool
        False for a bias alone.
    behind : frozenset of str
        Parameters that its input depends on.
    """

    names: frozenset[str]
    is_map: bool
    behind: frozenset[str]


def last_projections(
    output: Tensor, state: Tensor, parameters: Mapping[str, Tensor]
) -> tuple[list[Projection], frozenset[str]]:
    """Find the projections that write a block's output.

    Parameters
    ----------
    output : torch.Tensor
        What the block made of `state`, with its graph.
    state : torch.Tensor
        The leaf that entered the block.
    parameters : mapping of str to torch.Tensor
        The leaves that the block was run with, by name.

    Returns
    -------
    projections : list of Projection
    used : frozenset of str
        Every parameter that the output depends on.

    Examples
    --------
    >>> import torch
    >>> x, up, down = (torch.ones(2, 2, requires_grad=True) for _ in range(3))
    >>> projections, used = last_projections(x + torch.tanh(x @ up) @ down, x, {"up": up, "down": down})
    >>> [sorted(p.names) for p in projections], sorted(used)
    ([['down']], ['down', 'up'])
    """
    graph = _Graph(output.grad_fn, state, parameters)
    found: list[Projection] = []
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        inputs = [n for n, _ in node.next_functions if n is not None]
        dependent = [n for n in inputs if graph.by_state[n]]
        own = frozenset[str]().union(*(graph.behind[n] for n in inputs if not graph.by_state[n]))
        name = node.name()
        elementwise = name.startswith(_ELEMENTWISE) and not name.startswith(_NO_ELEMENTWISE)
        if not elementwise and dependent and any(parameters[n].ndim > 1 for n in own):
            behind = frozenset[str]().union(*(graph.behind[n] for n in dependent))
            found.append(Projection(own, True, behind))
            continue
        if name.startswith(_SUMS) and elementwise and dependent and own:
            found.append(Projection(own, False, frozenset()))
        waiting += dependent
    return found, graph.behind.get(output.grad_fn, frozenset())


class _Graph:
    """For each node of a graph, whether it depends on the state, and on which parameters."""

    def __init__(self, root: Any, state: Tensor, parameters: Mapping[str, Tensor]) -> None:
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.by_state: dict[Any, bool] = {}
        self.behind: dict[Any, frozenset[str]] = {}
        for node in _inputs_first(root):  # which also keeps the nodes alive, so that each is one object
            leaf = getattr(node, "variable", None)
            inputs = [n for n, _ in node.next_functions if n is not None]
            self.by_state[node] = leaf is state or any(self.by_state[n] for n in inputs)
            own = frozenset({names[id(leaf)]}) if id(leaf) in names else frozenset[str]()
            self.behind[node] = own.union(*(self.behind[n] for n in inputs))


def _inputs_first(root: Any) -> Iterator[Any]:
    """The nodes of a graph, each after all that it depends on."""
    done, waiting = set(), [] if root is None else [(root, False)]
    while waiting:
        node, expanded = waiting.pop()
        if node in done:
            continue
        if expanded:
            done.add(node)
            yield node
            continue
        waiting.append((node, True))
        waiting += [(n, False) for n, _ in node.next_functions if n is not None and n not in done]

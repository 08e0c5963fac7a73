"""Other parameters in the place of a block's own, and the very ones that were there back again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.stack import BlockStack


@dataclass(frozen=True)
class StandIns:
    """What stands in the place of one branch's output projections.

    Attributes
    ----------
    parameters : mapping of str to torch.nn.Parameter
        By the path of the parameter below the block.
    silent : bool
        Whether they are zeros, so that the branch adds nothing; else a map is multiplied onto them.
    """

    parameters: Mapping[str, nn.Parameter]
    silent: bool


class Exchange:
    """One parameter of a block and what stands in its place, put in and taken back."""

    def __init__(self, block: nn.Module, path: str, stand_in: nn.Parameter) -> None:
        owner, _, self._name = path.rpartition(".")
        self._parameters: Any = block.get_submodule(owner)._parameters
        self._held: Any = self._parameters[self._name]
        self._stand_in = stand_in

    def put_in(self) -> None:
        """Let the block compute with the other one."""
        move_parameter(self._stand_in, self._held)
        self._parameters[self._name] = self._stand_in

    def put_back(self) -> None:
        """Give the block its parameter back, where the model is now; does no harm the second time."""
        move_parameter(self._held, self._parameters[self._name])
        self._parameters[self._name] = self._held


def move_parameter(parameter: nn.Parameter, beside: nn.Parameter) -> None:
    """Bring one of the two to where a ``model.to(...)`` has brought the other meanwhile, with its ``requires_grad``."""
    if (parameter.device, parameter.dtype) != (beside.device, beside.dtype):
        parameter.data = parameter.data.to(device=beside.device, dtype=beside.dtype)
    if parameter.requires_grad != beside.requires_grad:
        parameter.requires_grad = beside.requires_grad


def stand_in_for(held: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter of other values, and otherwise like the one that it stands in for."""
    stand_in = nn.Parameter(values, requires_grad=held.requires_grad)
    vars(stand_in).update(vars(held))
    return stand_in


def require_own(stack: BlockStack, k: int, paths: Iterable[str], done: str) -> None:
    """Raise where a projection is a part of something else too, which would change with it, or not be saved.

    Parameters
    ----------
    stack : BlockStack
    k : int
        The block.
    paths : iterable of str
        The projections' parameters, below the block.
    done : str
        What cannot be done then: "silenced".

    Raises
    ------
    UnsupportedSurgery
    """
    own = {id(stack[k].get_parameter(path)) for path in paths}
    names: dict[int, list[str]] = {}
    for name, parameter in stack.model.named_parameters(remove_duplicate=False):
        if id(parameter) in own:
            names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        if len(shared) > 1:
            raise UnsupportedSurgery(
                f"No branch of block {k} can be {done} alone: {' and '.join(shared)} are one parameter. Untie them "
                "first, or choose another block."
            )


def require_plain(held: nn.Parameter, k: int, path: str, what: str, advice: str) -> None:
    """Raise unless a parameter holds plain numbers, so that others of its shape can stand in for it.

    Parameters
    ----------
    held : torch.nn.Parameter
    k : int
        Its block.
    path : str
        Its path below the block.
    what : str
        What is to stand in for it: "Zeros".
    advice : str
        What to do instead.

    Raises
    ------
    UnsupportedSurgery
    """
    if type(held) is not nn.Parameter or type(held.data) is not Tensor or not held.is_floating_point():
        raise UnsupportedSurgery(
            f"{what} cannot stand in for {path} of block {k}, which is a {type(held).__name__} of {held.dtype} "
            f"({type(held.data).__name__}). {advice}"
        )

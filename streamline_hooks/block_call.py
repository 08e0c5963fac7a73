"""One call of a block, kept so that the block can be run on it again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.hidden_state import read_input, read_output, write_input


@dataclass(frozen=True)
class BlockCall:
    """A block, what it was called with, and the state that it made of it."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def state(self) -> Tensor:
        """The state that entered."""
        return read_input(self.args, self.kwargs, self.block)

    def run(self, state: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Run the block's own forward, without its hooks, on another state and with other values of parameters."""
        # Some blocks work on the state in place, and some fill a cache that they were not to use.
        args, kwargs = write_input(*copy.deepcopy((self.args, self.kwargs)), state.clone(), self.block)
        named = {f"block.{name}": value for name, value in values.items()}
        return read_output(functional_call(_Bare(self.block), named, args, kwargs))


class _Bare(nn.Module):
    """A block without the hooks that are on the block itself."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.training = block.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block.forward(*args, **kwargs)


def observe_calls(
    blocks: Mapping[int, nn.Module], forward: Callable[[], Any]
) -> dict[int, BlockCall | UnsupportedSurgery]:
    """Run a model and keep what some of its blocks were called with, splices before them included.

    Parameters
    ----------
    blocks : mapping of int to torch.nn.Module
    forward : callable
        Runs the model, in evaluation mode and without a cache.

    Returns
    -------
    dict of int to BlockCall or UnsupportedSurgery
        An error for a block that is not called exactly once.
    """
    entered: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {k: [] for k in blocks}
    left: dict[int, Tensor] = {}

    def enter(k: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, kwargs: Any) -> None:
            entered[k].append(copy.deepcopy((args, kwargs)))

        return hook

    def leave(k: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, output: Any) -> None:
            left[k] = read_output(output).detach().clone()

        return hook

    handles = [block.register_forward_pre_hook(enter(k), with_kwargs=True) for k, block in blocks.items()]
    handles += [block.register_forward_hook(leave(k), prepend=True) for k, block in blocks.items()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return {
        k: BlockCall(block, *entered[k][0], left[k])
        if len(entered[k]) == 1
        else UnsupportedSurgery(
            f"A forward called block {k} {len(entered[k])} times; expected once. The branches of such a block are not "
            "told apart."
        )
        for k, block in blocks.items()
    }

"""Record the calls of blocks, and find the submodule that receives or returns a given tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from streamline_hooks.core import StreamlineError, UnsupportedSurgery
from streamline_hooks.modeling.hidden_state import read_input, read_output, write_input


@dataclass(frozen=True)
class BlockCall:
    """A block, the arguments of one call, and its output hidden state.

    Attributes
    ----------
    block : torch.nn.Module
    args, kwargs : tuple and dict
        The arguments of the call.
    output : torch.Tensor
        The output hidden state, usually (batch, tokens, features).
    """

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def state(self) -> Tensor:
        """Hidden state that entered the block."""
        return read_input(self.args, self.kwargs, self.block)

    def run(self, state: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Run the forward of the block without the block's own hooks, with a new input state and parameter values.

        `values` maps names of the block's parameters to tensors; the other parameters keep their values.
        """
        # Copy the arguments: some blocks change the state in place or fill a cache.
        args, kwargs = write_input(*copy.deepcopy((self.args, self.kwargs)), state.clone(), self.block)
        named = {f"block.{name}": value for name, value in values.items()}
        return read_output(functional_call(_Bare(self.block), named, args, kwargs))


class _Bare(nn.Module):
    """Call the forward of a block without the hooks registered on the block itself."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.training = block.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block.forward(*args, **kwargs)


def observe_calls(
    blocks: Mapping[int, nn.Module], forward: Callable[[], Any]
) -> dict[int, BlockCall | UnsupportedSurgery]:
    """Run a model once and record the arguments and output of each given block.

    `forward` runs the model in evaluation mode without a cache. Modules spliced in before a block have already run when
    its arguments are recorded. The result for a block that is not called exactly once is an `UnsupportedSurgery`.
    """
    entered: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {k: [] for k in blocks}
    left: dict[int, Tensor] = {}

    def enter(k: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        entered[k].append(copy.deepcopy((args, kwargs)))

    def leave(k: int, block: nn.Module, args: Any, output: Any) -> None:
        left[k] = read_output(output).detach().clone()

    with ExitStack() as hooks, torch.no_grad():
        for k, block in blocks.items():
            hooks.enter_context(block.register_forward_pre_hook(partial(enter, k), with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(partial(leave, k), prepend=True))
        forward()
    return {
        k: BlockCall(block, *entered[k][0], left[k])
        if len(entered[k]) == 1
        else UnsupportedSurgery(
            f"Block {k} was called {len(entered[k])} times in one forward; expected once. The branches of a block are "
            "found only in models that call each block once."
        )
        for k, block in blocks.items()
    }


Side = Literal["input", "output"]


@dataclass(frozen=True)
class TensorSite:
    """Position at which a tensor can be read inside a block: the input or output of a submodule.

    Attributes
    ----------
    path : str
        Dotted path of the submodule below the block.
    side : {"input", "output"}
    call : int
        Index of the submodule's call within one forward of the block.
    """

    path: str
    side: Side
    call: int = 0


def register_branch_hooks(
    block: nn.Module, receive: Callable[[TensorSite, Tensor], None], paths: set[str] | None = None
) -> Iterator[RemovableHandle]:
    """Register hooks that pass the input and output states of a block's submodules to `receive`, without copying.

    `paths` limits the hooks to these submodules.
    """
    calls: dict[tuple[str, Side], int] = {}

    def pass_on(path: str, side: Side, read: Callable[[], Tensor]) -> None:
        call = calls.get((path, side), 0)
        calls[path, side] = call + 1
        try:
            state = read()
        except StreamlineError:  # the submodule has no hidden state, such as one that makes a mask
            return
        receive(TensorSite(path, side, call), state)

    def entering(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        pass_on(path, "input", partial(read_input, args, kwargs))

    def leaving(path: str, module: nn.Module, args: Any, output: Any) -> None:
        pass_on(path, "output", partial(read_output, output))

    yield block.register_forward_pre_hook(lambda *_: calls.clear())
    for path, module in block.named_modules():
        if path and (paths is None or path in paths):
            yield module.register_forward_pre_hook(partial(entering, path), with_kwargs=True)
            yield module.register_forward_hook(partial(leaving, path))


def find_tensor_site(block: nn.Module, forward: Callable[[], Any], target: Tensor, bound: float) -> TensorSite | None:
    """Return the submodule input or output nearest to a target tensor, or None if none is within `bound`.

    `forward` runs the block once. The distance is the largest absolute difference of an element; of several sites at
    the same distance the first is returned.
    """
    distances: dict[TensorSite, float] = {}

    def compare(site: TensorSite, state: Tensor) -> None:
        if state.shape[-1] == target.shape[-1] and state.numel() == target.numel() and state.dtype == target.dtype:
            # Some submodules flatten the tokens.
            distances[site] = float((state.reshape(target.shape) - target).abs().max())

    with ExitStack() as hooks:
        for handle in register_branch_hooks(block, compare):
            hooks.enter_context(handle)
        forward()
    near = {site: distance for site, distance in distances.items() if distance <= bound}
    return min(near, key=lambda site: near[site]) if near else None

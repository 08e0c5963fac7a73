"""Record what a block is called with, and find where a tensor passes inside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
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
    """Run a model and record the arguments and output of some blocks, splices before them included.

    `forward` runs the model in evaluation mode without a cache. A block that is not called exactly once gets an error
    instead.
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


Side = Literal["input", "output"]


@dataclass(frozen=True)
class Tap:
    """A submodule's `path`, its "input" or "output", and the index of its call in one forward of the block."""

    path: str
    side: Side
    call: int = 0


def tapped(block: nn.Module, receive: Callable[[Tap, Tensor], None], paths: set[str] | None = None) -> list[Any]:
    """Register hooks that pass every tensor entering or leaving the submodules of a block to `receive`.

    The block may change the tensors afterwards. Return the handles, among them the block's own pre-hook, which resets
    the count of calls.
    """
    calls: dict[tuple[str, Side], int] = {}

    def pass_on(path: str, side: Side, read: Callable[[], Tensor]) -> None:
        number = calls.get((path, side), 0)
        calls[path, side] = number + 1
        try:
            state = read()
        except StreamlineError:  # a norm's scale, a mask: not every submodule works on states
            return
        receive(Tap(path, side, number), state)

    def entering(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: pass_on(path, "input", lambda: read_input(args, kwargs))

    def leaving(path: str) -> Callable[..., None]:
        return lambda module, args, output: pass_on(path, "output", lambda: read_output(output))

    handles: list[RemovableHandle] = [block.register_forward_pre_hook(lambda *given: calls.clear())]
    for path, module in block.named_modules():
        if path and (paths is None or path in paths):
            handles.append(module.register_forward_pre_hook(entering(path), with_kwargs=True))
            handles.append(module.register_forward_hook(leaving(path)))
    return handles


def find_tap(block: nn.Module, forward: Callable[[], Any], target: Tensor, bound: float) -> Tap | None:
    """Find the submodule input or output nearest to a target tensor, or None.

    No element is further away than `bound`. Of equally near places the first is returned. `forward` runs the block
    once.
    """
    distances: dict[Tap, float] = {}

    def compare(tap: Tap, state: Tensor) -> None:
        if state.shape[-1] == target.shape[-1] and state.numel() == target.numel() and state.dtype == target.dtype:
            distances[tap] = float((state.reshape(target.shape) - target).abs().max())  # some flatten the tokens

    handles = tapped(block, compare)
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    near = {tap: distance for tap, distance in distances.items() if distance <= bound}
    return min(near, key=lambda tap: near[tap]) if near else None

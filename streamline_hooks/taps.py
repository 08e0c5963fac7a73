"""Where a tensor passes inside a block: what a submodule is given, or what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.errors import StreamlineError
from streamline_hooks.hidden_state import read_input, read_output

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Tap:
    """A place where a tensor passes in a forward of a block.

    Attributes
    ----------
    path : str
        The submodule.
    side : {"input", "output"}
        What it is given, or what it returns.
    call : int
        At which of its calls in one forward of the block, counted from 0.
    """

    path: str
    side: Side
    call: int = 0


def tapped(block: nn.Module, receive: Callable[[Tap, Tensor], None], paths: set[str] | None = None) -> list[Any]:
    """Hand on every state that the submodules of a block are given and return, as it passes.

    Parameters
    ----------
    block : torch.nn.Module
    receive : callable
        Given the place and the tensor itself, which the block may go on to change.
    paths : set of str, optional
        Listen at these submodules only.

    Returns
    -------
    list of torch.utils.hooks.RemovableHandle
        Also the block's own pre-hook, with which the calls are counted anew.
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
    """Find where a tensor passes.

    Parameters
    ----------
    block : torch.nn.Module
    forward : callable
        Runs the block once.
    target : torch.Tensor
    bound : float
        How far from it, at most, in any number.

    Returns
    -------
    Tap or None
        The nearest, and of several equally near the first.

    Examples
    --------
    >>> import torch
    >>> block = nn.Sequential(nn.Flatten(0), nn.Identity(), nn.ReLU())
    >>> find_tap(block, lambda: block(torch.ones(2, 2)), torch.ones(2, 2), 0.0)
    Tap(path='0', side='input', call=0)
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

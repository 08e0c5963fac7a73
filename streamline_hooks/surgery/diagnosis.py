"""Why a shorter model gives something else than the bypassed one: the cause, found by watching the original run.

Nothing here decides whether a surgery is right; the probe did. It only names what the model counts on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from streamline_hooks.hidden_state import read_input, read_output
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.hazards import Hazard

_SIMPLE = (bool, int, float)  # a word is a kind, by which the model picks what it hands to that very block
_MODULE_STATE = frozenset({"training", "gradient_checkpointing"})
_PERIODS = ("every", "period", "interval")
_POSITIONS = ("index", "start", "end", "idx", "offset", "n_", "first", "last")


@dataclass
class Traffic:
    """What passed between the model and its blocks in one forward.

    Attributes
    ----------
    visits : dict
        How often each block was called.
    handed_on : dict
        For a block whose output beside the state reached the next one: what that was.
    read : dict
        For each block, the plain attributes that the model itself read off it, and their values.
    """

    visits: dict[int, int] = field(default_factory=dict)
    handed_on: dict[int, str] = field(default_factory=dict)
    read: dict[int, dict[str, Any]] = field(default_factory=dict)


def diagnose(stack: BlockStack, window: range, run: Callable[[], object]) -> Hazard | None:
    """Name what a model counts on that goes with a window, once it is known that something does.

    Parameters
    ----------
    stack : BlockStack
        Of the model as it is before the surgery.
    window : range
    run : callable
        Runs one forward.

    Returns
    -------
    Hazard or None
        None where nothing was found that explains it.
    """
    seen = watch(stack, run)
    for cause in (_loops, _split_blocks, _handed_on, _attributes, _numbers):
        hazard = cause(stack, window, seen)
        if hazard is not None:
            return hazard
    return None


def watch(stack: BlockStack, run: Callable[[], object]) -> Traffic:
    """Run a forward and see what passes between the model and its blocks."""
    seen = Traffic()
    left: dict[int, int] = {}  # tensors that a block returned beside its state, by identity
    kept: list[Tensor] = []  # so that no identity is used again

    def enter(k: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.visits[k] = seen.visits.get(k, 0) + 1
            state = read_input(args, kwargs, block)
            for tensor in _tensors([args, kwargs]):
                if tensor is not state and left.get(id(tensor), k) != k:
                    seen.handed_on[left[id(tensor)]] = f"a tensor of shape {tuple(tensor.shape)}"

        return hook

    def leave(k: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            state = read_output(output)
            for tensor in _tensors(output):
                if tensor is not state:
                    left[id(tensor)] = k
                    kept.append(tensor)

        return hook

    handles = []
    try:
        for k, block in enumerate(stack.blocks):
            handles.append(block.register_forward_pre_hook(enter(k), with_kwargs=True))
            handles.append(block.register_forward_hook(leave(k)))
        with _reads(stack, seen.read):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _loops(stack: BlockStack, window: range, seen: Traffic) -> Hazard | None:
    often = sorted(k for k, visits in seen.visits.items() if visits > 1)
    if not often:
        return None
    most = max(seen.visits.values())
    return Hazard(
        "looped-blocks",
        f"a forward calls blocks {_listed(often)} up to {most} times, and its loop begins and ends at numbers",
    )


def _split_blocks(stack: BlockStack, window: range, seen: Traffic) -> Hazard | None:
    """The parts of a block lie in several lists side by side (XLM), so that no module is a whole block."""
    owner = stack.ancestors[-1]
    siblings = [
        name
        for name, module in owner.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == len(stack) and module is not stack.container
    ]
    if not siblings:
        return None
    return Hazard(
        "split-blocks",
        f"the model keeps a block's parts in lists side by side ({', '.join(siblings)} and "
        f"{stack.path.rpartition('.')[2]}), so that no module is a whole block",
    )


def _handed_on(stack: BlockStack, window: range, seen: Traffic) -> Hazard | None:
    last = window.stop - 1
    if last == len(stack) - 1:  # what it makes goes to the model, and nobody saw that
        last = max(seen.handed_on, default=last)
    if last not in seen.handed_on:
        return None
    return Hazard(
        "side-state",
        f"block {last} hands the next one more than the hidden state ({seen.handed_on[last]}), which it alone makes",
    )


def _attributes(stack: BlockStack, window: range, seen: Traffic) -> Hazard | None:
    """The model asks its blocks something and acts on the answer outside them (Inkling 2's block boundaries)."""
    asked = {name for k in window for name in seen.read.get(k, {})}
    telling = [name for name in sorted(asked) if len({r.get(name) for r in seen.read.values()}) > 1]
    if not telling:
        return None
    values = ", ".join(f"{name} ({seen.read[window.start].get(name)!r} on block {window.start})" for name in telling)
    return Hazard("attributes-read", f"the model itself reads {values} off its blocks and acts on it outside them")


def _numbers(stack: BlockStack, window: range, seen: Traffic) -> Hazard | None:
    """The configuration has numbers that sound like a block's and that nobody taught this library to change."""
    if stack.config is None:
        return None
    names = [name for name, value in vars(stack.config).items() if _speaks_of_blocks(name, value, len(stack))]
    if not names:
        return None
    return Hazard(
        "absolute-numbers",
        f"the configuration speaks of blocks by number or period ({', '.join(names)}), which stays as it is",
    )


def _speaks_of_blocks(name: str, value: Any, length: int) -> bool:
    numbers = value if isinstance(value, (list, tuple)) and value else [value]
    place = ("layer" in name or "block" in name) and any(part in name for part in _POSITIONS)
    return (
        not name.startswith("num_")
        and (place or any(part in name for part in _PERIODS))
        and all(type(v) is int and 0 <= v <= length for v in numbers)
    )


def _listed(numbers: Sequence[int]) -> str:
    whole = len(numbers) > 1 and list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if whole else ", ".join(map(str, numbers))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in what a block is given or returns. Caches are objects of their own and are not looked into."""
    if isinstance(value, Tensor):
        yield value
        return
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, f.name) for f in fields(value)]
    for part in parts:
        yield from _tensors(part)


@contextmanager
def _reads(stack: BlockStack, read: dict[int, dict[str, Any]]) -> Iterator[None]:
    """Note which plain attributes of its blocks the stack's owner reads while it runs."""
    owner, number = stack.ancestors[-1], {id(block): k for k, block in enumerate(stack.blocks)}
    classes: dict[type, type] = {}

    def watched(kind: type) -> type:
        def __getattribute__(self: Any, name: str) -> Any:
            value = inherited(self, name)
            plain = isinstance(value, _SIMPLE) and not name.startswith("_") and name not in _MODULE_STATE
            if plain and sys._getframe(1).f_locals.get("self") is owner:
                read.setdefault(number[id(self)], {})[name] = value
            return value

        inherited: Any = kind.__getattribute__
        named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        made = type(kind.__name__, (kind,), {"__getattribute__": __getattribute__, **named})
        return made

    original = [(block, type(block)) for block in stack.blocks]
    try:
        for block, kind in original:
            block.__class__ = classes.setdefault(kind, watched(kind))
        yield
    finally:
        for block, kind in original:
            block.__class__ = kind

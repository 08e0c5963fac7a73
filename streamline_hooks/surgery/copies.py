"""What modules keep of a configuration that is about to change: its lists, its count, maps by a block's number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from streamline_hooks.stack import BlockStack

# An owner's number of the first block that is counted from the end in the configuration.
_FIRSTS = {"first_kv_shared_layer_idx": "num_kv_shared_layers"}
# A block's number of another one, whose keys it reads (Gemma 3n in Transformers 4).
_OTHERS = ("kv_shared_layer_index",)


def find_copies(
    stack: BlockStack,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    sources: Sequence[int],
    among: Iterable[nn.Module] | None = None,
) -> Iterator[tuple[nn.Module, str, Any]]:
    """Find attributes that repeat a configuration's value, and what they must become.

    Parameters
    ----------
    stack : BlockStack
    old, new : mapping
        The configuration's values that change, before and after.
    sources : sequence of int
        For each slot the block whose per-layer values it has.
    among : iterable of torch.nn.Module, optional
        The modules to look at, where it is known which hold copies; else all.

    Yields
    ------
    module : torch.nn.Module
        One that holds the stack, or lies beside or in its blocks.
    name : str
    value : Any
        What the attribute must be.
    """
    numbers = [value for value in old.values() if isinstance(value, (list, tuple)) and _are_numbers(value)]
    ours: set[int] = set()
    for module in modules_that_may_copy(stack) if among is None else among:
        for name, held in vars(module).items():
            if name.startswith("_") and name not in new:  # what torch keeps: hooks by number, parameters by name
                continue
            if isinstance(held, (list, tuple)) and any(held is value for value in old.values()):
                yield module, name, next(new[key] for key, value in old.items() if held is value)
            elif name in new and type(held) is int and id(module) not in (ours := ours or _ours(stack)):
                continue  # another stack of as many blocks, inside this one
            elif name in new and type(held) is type(old[name]) and held == old[name]:
                yield module, name, new[name]
            elif name in _FIRSTS:
                count = new.get(_FIRSTS[name], getattr(stack.config, _FIRSTS[name], 0))
                yield module, name, len(sources) - count
            elif name in _OTHERS and held in sources:
                yield module, name, sources.index(held)
            elif type(held) is dict and held and any(list(held) == list(keys) for keys in numbers):
                yield module, name, {slot: held[source] for slot, source in enumerate(sources) if source in held}


def modules_that_may_copy(stack: BlockStack) -> list[nn.Module]:
    """Those that hold a stack, and what lies beside and in its blocks."""
    return list(dict.fromkeys([*stack.ancestors, *stack.ancestors[-1].modules()]))


def _ours(stack: BlockStack) -> set[int]:
    return {id(module) for module in [*stack.ancestors, *_inside(stack)]}


def _inside(stack: BlockStack) -> Iterator[nn.Module]:
    """The modules of the blocks, without what has a list of blocks of its own, such as a tower inside the decoder."""
    waiting: list[nn.Module] = list(stack.blocks)
    while waiting:
        module = waiting.pop()
        yield module
        waiting += [child for child in module.children() if not _has_blocks(child)]


def _has_blocks(module: nn.Module) -> bool:
    lists = [child for child in module.children() if isinstance(child, (nn.ModuleList, nn.Sequential))]
    return any(len(items) > 1 and any(True for item in items for _ in item.children()) for items in lists)


def renumbered_paths(stack: BlockStack, sources: Sequence[int]) -> Iterator[tuple[nn.Module, str, Any]]:
    """Find the tables of tied weights, which name blocks by their path, and what they must become.

    Yields
    ------
    module, name, value
        As `find_copies`.
    """
    parts = stack.path.split(".")
    for depth, module in enumerate(stack.ancestors):
        inside = ".".join(parts[depth:])
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            held = getattr(module, name, None)
            if not isinstance(held, dict) or not any(
                key.startswith(f"{inside}.") for pair in held.items() for key in pair
            ):
                continue
            pairs = [(_renumbered(a, inside, sources), _renumbered(b, inside, sources)) for a, b in held.items()]
            yield module, name, {a: b for a, b in pairs if a is not None and b is not None}


def _renumbered(path: str, inside: str, sources: Sequence[int]) -> str | None:
    """The path of a weight after the surgery; None where its block is gone."""
    if not path.startswith(f"{inside}."):
        return path
    number, dot, rest = path.removeprefix(f"{inside}.").partition(".")
    if not number.isdigit():
        return path
    return f"{inside}.{sources.index(int(number))}{dot}{rest}" if int(number) in sources else None


def _are_numbers(value: Sequence[Any]) -> bool:
    return bool(value) and all(type(v) is int for v in value)

"""Which blocks of one model are which blocks of another, by their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from streamline_hooks.arguments import checked
from streamline_hooks.passes import progress
from streamline_hooks.stack import find_stack
from streamline_hooks.surgery.splice import AFTER, BEFORE

_NEAR = 0.5  # relative distance up to which two blocks are taken for one that was trained


@dataclass(frozen=True)
class BlockMatch:
    """A block of the second model, and what it is of the first.

    Attributes
    ----------
    block : int
        Its number in the second model.
    source : int or None
        The number of the block in the first model that it is, or came from; None where there is none.
    changed : tuple of str
        The weights that differ, in the second model's precision, by their path in the block, and those that only one
        of the two has.
    distance : float
        ‖difference‖ / ‖weights of the first‖ over all weights that both have; 0 for the same block.
    """

    block: int
    source: int | None
    changed: tuple[str, ...] = ()
    distance: float = 0.0

    def __str__(self) -> str:
        if self.source is None:
            return f"{self.block:4d} <- none, it is new"
        if not self.changed:
            return f"{self.block:4d} <- {self.source}"
        listed = ", ".join(self.changed[:3]) + (f" and {len(self.changed) - 3} more" if len(self.changed) > 3 else "")
        return f"{self.block:4d} <- {self.source}, changed by {self.distance:.2%}: {listed}"


@checked()
def compare_blocks(first: nn.Module, second: nn.Module, *, stack: str | None = None) -> list[BlockMatch]:
    """Say of each block of a model which one of another model it is.

    Nothing is asked of the plan that a model may carry: only the weights count, so that it can be held to them.

    Parameters
    ----------
    first, second : torch.nn.Module
        For instance an original and what was made of it.
    stack : str, optional
        Path of the stack in both, see `find_stack`.

    Returns
    -------
    list of BlockMatch
        One a block of the second model, in order. Of equally near blocks of the first the earliest is named that no
        block before was taken for, where there is one.

    Raises
    ------
    StreamlineError
        If one of them has no stack of blocks.

    Examples
    --------
    >>> import copy
    >>> from streamline_hooks import LayerSurgeon
    >>> from streamline_hooks.testing import tiny_model
    >>> original = tiny_model("llama")
    >>> shorter = copy.deepcopy(original)
    >>> with LayerSurgeon(shorter) as surgeon:
    ...     surgeon.remove(range(2, 7))
    ...     _ = surgeon.commit()
    >>> [match.source for match in compare_blocks(original, shorter)]
    [0, 1, 7]
    """
    sources = [_weights(block) for block in find_stack(first, stack).blocks]
    found: list[BlockMatch] = []
    blocks = find_stack(second, stack).blocks
    with progress(len(blocks), "compare", "blocks") as bar:
        for number, block in enumerate(blocks):
            found.append(_match(number, _weights(block), sources, {m.source for m in found}))
            bar.update()
    return found


def _weights(block: nn.Module) -> dict[str, torch.Tensor]:
    """What a block holds itself; modules that are spliced in are another matter."""
    state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    return {name: tensor.detach() for name, tensor in state.items() if not name.startswith((BEFORE, AFTER))}


def _match(
    number: int, weights: dict[str, torch.Tensor], sources: list[dict[str, torch.Tensor]], taken: set[int | None]
) -> BlockMatch:
    """The nearest source: the same one, else the one with most weights equal, else the one at the least distance."""
    same = [k for k, source in enumerate(sources) if _is_same(source, weights)]
    if same:
        return BlockMatch(number, min(same, key=lambda k: (k in taken, k)))
    candidates = []
    for k, source in enumerate(sources):
        both = [n for n in weights if n in source and source[n].shape == weights[n].shape]
        equal = {n for n in both if _equal(source[n], weights[n])}
        changed = tuple(sorted((set(weights) | set(source)) - equal))
        telling = (weights[n] for n in equal if weights[n].ndim > 1)  # vectors are often alike, and so is nothing
        sized = sum(weight.numel() for weight in telling if weight.any())
        candidates.append((-sized, _distance([(source[n], weights[n]) for n in both]), k in taken, k, changed))
    sized, distance, _, k, changed = min(candidates)
    return BlockMatch(number, k, changed, distance) if sized or distance <= _NEAR else BlockMatch(number, None)


def _is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(_equal(one[n], other[n]) for n in one)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two weights are the same, in the precision of the second."""
    return one.shape == other.shape and torch.equal(one.cpu().to(other.dtype), other.cpu())


def _distance(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Over all weights together, in float64; infinite where nothing can be compared."""
    apart = sum(float((a.cpu().double() - b.cpu().double()).square().sum()) for a, b in pairs)
    size = sum(float(a.cpu().double().square().sum()) for a, _ in pairs)
    return (apart / size) ** 0.5 if size else float("inf")

"""Match the blocks of two models by their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from streamline_hooks.core import progress_bar, validate_arguments
from streamline_hooks.modeling import find_stack
from streamline_hooks.surgery import AFTER, BEFORE

_NEAR = 0.5  # maximum relative distance between a block and its trained version


@dataclass(frozen=True)
class BlockMatch:
    """A block of the second model with the block of the first model that it comes from.

    Attributes
    ----------
    block : int
        Index in the second model.
    source : int or None
        Index in the first model; None for a new block.
    changed : tuple of str
        Paths of weights in the block that only one model has, or that differ in the dtype of the second model.
    distance : float
        ‖difference‖ / ‖weights of the first model‖ over all common weights; 0 for equal blocks.

    Examples
    --------
    >>> print(BlockMatch(2, source=7, changed=("mlp.down_proj.weight",), distance=0.034))
       2 <- 7, changed by 3.40%: mlp.down_proj.weight
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


@validate_arguments()
def compare_blocks(first: nn.Module, second: nn.Module, *, stack: str | None = None) -> list[BlockMatch]:
    """Match each block of a model with a block of another model by weights, to verify a surgery plan.

    Parameters
    ----------
    first, second : torch.nn.Module
        For example the original model and a compressed one.
    stack : str, optional
        Path of the block stack in both models, see `find_stack`.

    Returns
    -------
    list of BlockMatch
        One match per block of the second model, in order. Of equally close blocks of the first model, the earliest
        unmatched block is preferred.

    Raises
    ------
    StreamlineError
        If a model has no stack of blocks.

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
    matches: list[BlockMatch] = []
    blocks = find_stack(second, stack).blocks
    with progress_bar(len(blocks), "compare", "blocks") as bar:
        for number, block in enumerate(blocks):
            matches.append(_match(number, _weights(block), sources, {m.source for m in matches}))
            bar.update()
    return matches


def _weights(block: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a block without spliced modules."""
    state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    return {name: tensor.detach() for name, tensor in state.items() if not name.startswith((BEFORE, AFTER))}


def _match(
    number: int, weights: dict[str, torch.Tensor], sources: list[dict[str, torch.Tensor]], matched: set[int | None]
) -> BlockMatch:
    """Match a block with an equal source, or else the one with most equal weights or the least distance."""
    equal_sources = [
        (k in matched, k)
        for k, source in enumerate(sources)
        if source.keys() == weights.keys() and all(_equal(source[n], weights[n]) for n in weights)
    ]
    if equal_sources:
        return BlockMatch(number, min(equal_sources)[1])
    candidates = []
    for k, source in enumerate(sources):
        common = [n for n in weights if n in source and source[n].shape == weights[n].shape]
        equal = {n for n in common if _equal(source[n], weights[n])}
        changed = tuple(sorted((set(weights) | set(source)) - equal))
        equal_matrices = (
            weights[n] for n in equal if weights[n].ndim > 1
        )  # vectors and zeros are often equal by chance
        equal_size = sum(weight.numel() for weight in equal_matrices if weight.any())
        candidates.append((-equal_size, _distance([(source[n], weights[n]) for n in common]), k in matched, k, changed))
    equal_size, distance, _, k, changed = min(candidates)
    return BlockMatch(number, k, changed, distance) if equal_size or distance <= _NEAR else BlockMatch(number, None)


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two weights are equal in the dtype of the second."""
    return first.shape == second.shape and torch.equal(first.cpu().to(second.dtype), second.cpu())


def _distance(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the relative distance over all weights, in float64; infinity without comparable weights."""
    squared_difference = sum(float((a.cpu().double() - b.cpu().double()).square().sum()) for a, b in pairs)
    squared_norm = sum(float(a.cpu().double().square().sum()) for a, _ in pairs)
    return (squared_difference / squared_norm) ** 0.5 if squared_norm else float("inf")

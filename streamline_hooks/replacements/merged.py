"""One block in a window's place whose weights are those of all of its blocks, added up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.replacements.block import inherit
from streamline_hooks.stack import BlockStack


def merge(stack: BlockStack, window: range, weight: float = 1.0) -> nn.Module:
    """Merge the blocks of a window into a copy of its first one.

    θ = θ₁ + w Σₖ (θₖ − θ₁) for every weight of a layer that multiplies, and its bias; norms stay those of the first.
    With w = 1 it is the merge of LaCo (arXiv 2402.11187, "reserving differences while seeking common"); with
    w = 1/n, of n blocks, their mean. LaCo's published script subtracts what it has merged so far, and not θ₁, so that
    only the last block is left of several; here it is the formula of the paper.

    Parameters
    ----------
    stack : BlockStack
        Of a model that no surgeon has changed.
    window : range
        Of two blocks at least, which are built alike.
    weight : float
        w.

    Returns
    -------
    torch.nn.Module
        One block, which takes a slot; a checkpoint with it is a plain one.

    Raises
    ------
    UnsupportedSurgery
        If the window has one block, or they have not the same weights.

    Examples
    --------
    >>> from streamline_hooks import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> blocks = (stack := find_stack(tiny_model("llama"))).blocks
    >>> one = merge(stack, range(2, 5))
    >>> wanted = blocks[3].mlp.up_proj.weight + blocks[4].mlp.up_proj.weight - blocks[2].mlp.up_proj.weight
    >>> torch.allclose(one.mlp.up_proj.weight, wanted, atol=1e-6)
    True
    """
    made = inherit(stack, window)
    if torch.empty(0).is_meta:  # its size alone is wanted
        return made
    others = [dict(stack[k].named_parameters()) for k in window[1:]]
    with torch.no_grad():
        for name, parameter in _multiplied(made):
            parts = [_part(other, name, parameter, stack, k) for other, k in zip(others, window[1:], strict=True)]
            first = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
            for part in parts:
                first = first + weight * (part.to(first) - parameter.to(first))
            parameter.copy_(first)
    return made


def _multiplied(block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of modules that have a matrix, by name."""
    for path, module in block.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if any(parameter.ndim > 1 for parameter in own.values()):
            yield from ((f"{path}.{name}".lstrip("."), parameter) for name, parameter in own.items())


def _part(other: dict[str, nn.Parameter], name: str, like: Tensor, stack: BlockStack, k: int) -> Tensor:
    found = other.get(name)
    if found is None or found.shape != like.shape or found.is_meta or not found.is_floating_point():
        what = "none" if found is None else f"one of {found.dtype} on {found.device} and of shape {tuple(found.shape)}"
        raise UnsupportedSurgery(
            f"Block {k} of {stack.path} has {what} where the window's first block has {name} of shape "
            f"{tuple(like.shape)}; expected blocks that are built alike, in memory and not quantised. Choose another "
            "window or kind.",
            "merged",
        )
    return found

"""Replacements of the blocks' own class: copies of the first blocks of a window, or one merged from all."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.silence import find_zeros, silent_inside
from streamline_hooks.surgery.splice import AFTER, BEFORE, set_splices


class InheritedBlocks(nn.ModuleList):
    """Several blocks that stand in the place of one window, a slot each.

    They are given to `streamline_hooks.repair.place`, which puts them in one by one; the list itself is never run.
    """


def inherit(stack: BlockStack, window: range, count: int = 1) -> nn.Module:
    """Copy the first `count` blocks of a window, of a model that no surgeon has changed.

    Returns
    -------
    torch.nn.Module
        One block or `InheritedBlocks`, trainable except what was silenced, without splices. Without memory under
        ``torch.device("meta")``.

    Raises
    ------
    UnsupportedSurgery
        If the window does not have more than `count` blocks.
    """
    if not 1 <= count < len(window):
        raise UnsupportedSurgery(
            f"{count} inherited block{'s' * (count != 1)} cannot stand in the place of the {len(window)} from "
            f"{window.start} on: the stack would not become shorter. Choose a longer window, or another kind.",
            "inherited",
        )
    blocks = [trainable_copy(stack[k]) for k in window[:count]]
    return blocks[0] if count == 1 else InheritedBlocks(blocks)


def inherit_silenced(stack: BlockStack, window: range, batch: Batch | Tensor | None = None) -> nn.Module:
    """Copy the first block of a window with an attention that adds nothing: its output projection is zero and frozen.

    `batch`, without padding, is for models that cannot be probed otherwise. Raises UnsupportedSurgery if the block
    does not have the usual two residual branches, or as `inherit`.
    """
    block = inherit(stack, window)
    zeros = find_zeros(stack, window.start, "attention", batch)
    with torch.no_grad():
        for path in zeros:
            block.get_parameter(path).zero_().requires_grad_(False)
    return block


def trainable_copy(block: nn.Module) -> nn.Module:
    """Return a trainable copy of a block without splices."""
    memo: dict[int, object] = {}
    if torch.empty(0).is_meta:
        memo = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.is_floating_point()) for p in block.parameters()
        }
    duplicate = copy.deepcopy(block, memo)
    for place in (BEFORE, AFTER):
        set_splices(duplicate, place, [])
    silent = silent_inside(block)
    held = dict(block.named_parameters())
    for name, parameter in duplicate.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(id(held[name]) not in silent)
    return duplicate


def merge(stack: BlockStack, window: range, weight: float = 1.0) -> nn.Module:
    """Merge the blocks of a window into a copy of its first one: θ = θ₁ + w Σₖ (θₖ − θ₁), with w = `weight`.

    Only layers with a matrix are merged; norms stay those of the first. w = 1 is the merge of LaCo (arXiv 2402.11187,
    formula of the paper; the published script keeps only the last of several blocks), w = 1/n the mean of n blocks.
    Raises UnsupportedSurgery if the blocks do not have the same weights.

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
    """Yield the named parameters of modules that have a matrix."""
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

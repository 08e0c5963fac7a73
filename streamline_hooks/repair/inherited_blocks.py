"""Replacements of the model's block class: copies of the first blocks of a window, or one merged block."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from streamline_hooks.core import Batch, UnsupportedSurgery, offload_hooks, remove_offload_hooks, weights_in_memory
from streamline_hooks.modeling import BlockStack
from streamline_hooks.surgery import (
    AFTER,
    BEFORE,
    COPIED_FROM,
    OriginalBlock,
    find_zeros,
    set_splices,
    zero_parameter_ids,
)


class InheritedBlocks(nn.ModuleList):
    """Several blocks that replace one window, each in a slot; `insert_replacement` inserts them one by one."""


def inherit_blocks(stack: BlockStack, window: range, count: int = 1) -> nn.Module:
    """Copy the first `count` blocks of a window: one block, or `InheritedBlocks`.

    The copies have no splices and are trainable, except zeroed projections. Under ``torch.device("meta")`` they take
    no memory. Raises UnsupportedSurgery if the window does not have more than `count` blocks.
    """
    if not 1 <= count < len(window):
        raise UnsupportedSurgery(
            f"{count} inherited block{'s' * (count != 1)} cannot replace a window of {len(window)} blocks (first block "
            f"{window.start}): the model would not become shorter. Choose a longer window or another kind.",
            "inherited",
        )
    blocks = [trainable_copy(stack[k]) for k in window[:count]]
    for k, block in zip(window, blocks, strict=False):
        vars(block)[COPIED_FROM] = OriginalBlock(stack[k], stack.container)
    return blocks[0] if count == 1 else InheritedBlocks(blocks)


def inherit_without_attention(stack: BlockStack, window: range, batch: Batch | Tensor | None = None) -> nn.Module:
    """Copy the first block of a window, with the attention output projection zeroed and frozen.

    `batch`, without padding, is only needed for models that cannot be probed with random tokens. Raises
    UnsupportedSurgery if the block does not have two residual branches, or for the reasons of `inherit_blocks`.
    """
    block = inherit_blocks(stack, window)
    zeros = find_zeros(stack, window.start, "attention", batch)
    with torch.no_grad():
        for path in zeros:
            block.get_parameter(path).zero_().requires_grad_(False)
    return block


def trainable_copy(block: nn.Module) -> nn.Module:
    """Return a trainable copy of a block without splices, in memory even if Accelerate offloads the block."""
    if torch.empty(0).is_meta:
        return _copied(block, {id(p): _empty_like(p) for p in block.parameters()})
    is_offloaded = any(parameter.is_meta for parameter in block.parameters())
    with weights_in_memory(block):
        duplicate = _copied(block, {})
    if is_offloaded:
        remove_offload_hooks(duplicate)
    return duplicate


def _empty_like(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(p, device="meta"), p.is_floating_point())


def _copied(block: nn.Module, memo: dict[int, object]) -> nn.Module:
    hooks = (hook for _, hook in offload_hooks(block))
    duplicate = copy.deepcopy(block, memo | {id(hook): hook for hook in hooks})
    for position in (BEFORE, AFTER):
        set_splices(duplicate, position, [])
    zero_ids = zero_parameter_ids(block)
    originals = dict(block.named_parameters())
    for name, parameter in duplicate.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(id(originals[name]) not in zero_ids)
    return duplicate


def merge_blocks(stack: BlockStack, window: range, weight: float = 1.0) -> nn.Module:
    """Merge the blocks of a window into a copy of its first block.

    θ = θ₁ + w Σₖ (θₖ − θ₁), where w is `weight`. Only layers with a matrix are merged; norms keep the weights of the
    first block. w = 1 is the formula of LaCo (arXiv 2402.11187); the published script keeps only the last of several
    blocks. w = 1/n is the mean of n blocks. A projection that is zeroed in the first block alone receives the weights
    of the others, and is trainable. Raises UnsupportedSurgery if the blocks do not have parameters of the same names
    and shapes.

    Examples
    --------
    >>> from streamline_hooks import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> blocks = (stack := find_stack(tiny_model("llama"))).blocks
    >>> merged = merge_blocks(stack, range(2, 5))
    >>> expected = blocks[3].mlp.up_proj.weight + blocks[4].mlp.up_proj.weight - blocks[2].mlp.up_proj.weight
    >>> torch.allclose(merged.mlp.up_proj.weight, expected, atol=1e-6)
    True
    """
    block = inherit_blocks(stack, window)
    if torch.empty(0).is_meta:
        return block
    parameters = {
        f"{path}.{name}".lstrip("."): parameter
        for path, module in block.named_modules()
        if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        for name, parameter in module.named_parameters(recurse=False)
    }
    sum_dtypes = {name: torch.promote_types(parameter.dtype, torch.float32) for name, parameter in parameters.items()}
    merged = {name: parameter.detach().to(sum_dtypes[name]) for name, parameter in parameters.items()}
    with torch.no_grad():
        for k in window[1:]:
            with weights_in_memory(stack[k]):
                other_parameters = dict(stack[k].named_parameters())
                for name, parameter in parameters.items():
                    part = _matching_parameter(other_parameters, name, parameter, stack, k)
                    merged[name] = merged[name] + weight * (part.to(sum_dtypes[name]) - parameter.to(sum_dtypes[name]))
        for name, parameter in parameters.items():
            parameter.copy_(merged[name])
            if parameter.any():  # a zeroed projection of the first block is frozen, and may have become non-zero
                parameter.requires_grad_(True)
    return block


def _matching_parameter(
    parameters: dict[str, nn.Parameter], name: str, reference: Tensor, stack: BlockStack, k: int
) -> Tensor:
    parameter = parameters.get(name)
    if (
        parameter is None
        or parameter.shape != reference.shape
        or parameter.is_meta
        or not parameter.is_floating_point()
    ):
        description = (
            "no parameter"
            if parameter is None
            else f"{parameter.dtype} of shape {tuple(parameter.shape)} on {parameter.device}"
        )
        raise UnsupportedSurgery(
            f"Cannot merge block {k} of {stack.path}: the first block of the window has {name} of shape "
            f"{tuple(reference.shape)}, and block {k} has {description}. Expected blocks of the same structure, in "
            "memory and not quantized. Choose another window or kind.",
            "merged",
        )
    return parameter

"""What a stand-in costs, and the widths of a stack that decide it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.stand_in import StandIn, blocks_of
from streamline_hooks.stack import BlockStack


@dataclass(frozen=True)
class StandInSize:
    """What a stand-in costs.

    Attributes
    ----------
    parameters : int
    flops_per_token : int or None
        Twice the weights that a token is multiplied with; of a block, its attention to other tokens comes on top. None
        where nothing says it: of a mixture of experts, and of a module without an attribute of this name.
    slots : int
        Blocks of its own, each with an entry in the cache.
    """

    parameters: int
    flops_per_token: int | None
    slots: int

    def __str__(self) -> str:
        flops = "FLOPs not stated" if self.flops_per_token is None else f"{self.flops_per_token:,} FLOPs a token"
        return f"{self.parameters:,} parameters, {flops}, {self.slots or 'no'} slot{'s' * (self.slots > 1)}"


def size_of(stack: BlockStack, stand_in: StandIn) -> StandInSize:
    """What a stand-in costs.

    Parameters
    ----------
    stack : BlockStack
        That it is for.
    stand_in : StandIn
        On any device, that without memory included.

    Examples
    --------
    >>> from streamline_hooks import find_stack
    >>> from streamline_hooks.replacements import LinearReplacement
    >>> from streamline_hooks.testing import tiny_model
    >>> size = size_of(find_stack(tiny_model("llama")), LinearReplacement(64, rank=4))
    >>> size.parameters, size.flops_per_token, size.slots
    (512, 1024, 0)
    """
    if not isinstance(stand_in, nn.Module):  # folded into weights that are there
        return StandInSize(0, 0, 0)
    blocks = blocks_of(stack, stand_in)
    parameters = sum(p.numel() for p in stand_in.parameters())
    if not blocks:
        return StandInSize(parameters, getattr(stand_in, "flops_per_token", None), 0)
    each = [_flops_of_block(block) for block in blocks]
    return StandInSize(parameters, None if None in each else sum(f for f in each if f is not None), len(blocks))


def _flops_of_block(block: nn.Module) -> int | None:
    """Of the linear layers; where a matrix is anything else, a token may not be multiplied with all of it."""
    layers = [module for module in block.modules() if isinstance(module, (nn.Linear, Conv1D))]
    known = {id(p) for layer in layers for p in layer.parameters()}
    if any(p.ndim > 1 and id(p) not in known for p in block.parameters()) or _has_experts(block):
        return None
    return 2 * sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1)


def _has_experts(block: nn.Module) -> bool:
    return any(isinstance(module, nn.ModuleList) and len(module) > 1 for module in block.modules())


def features_of(stack: BlockStack) -> int:
    """The width of the residual stream, as the configuration says it, as the blocks' norms or the embeddings have it.

    A stage of a hierarchical model has a width of its own, which its norms tell.

    Raises
    ------
    StreamlineError
        If nothing says it.
    """
    model: Any = stack.model
    stated = getattr(stack.config, "hidden_size", None)
    if isinstance(stated, int) and stack.stage is None:
        return stated
    children = (child for block in stack.blocks for child in block.children())
    norms = {tuple(child.normalized_shape) for child in children if isinstance(child, (nn.LayerNorm, nn.RMSNorm))}
    if len(norms) == 1 and len(shape := norms.pop()) == 1:
        return int(shape[0])
    inside = {id(module) for block in stack.blocks for module in block.modules()}
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and id(m) not in inside]
    if not tables:
        raise StreamlineError(
            f"Nothing says how wide the states of {type(model).__name__} are: no hidden_size in a configuration, no "
            "norms of one width in the blocks, and no embedding outside them. Put a module of your own in with "
            "LayerSurgeon.replace."
        )
    return max(tables, key=lambda table: table.num_embeddings).embedding_dim


def inner_width_of(stack: BlockStack, k: int) -> int | None:
    """The width of a block's MLP, as the configuration says it; None where it does not."""
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        stated = getattr(stack.config, name, None)
        if isinstance(stated, (list, tuple)) and len(stated) == len(stack):
            stated = stated[k]
        if isinstance(stated, int) and not isinstance(stated, bool):
            return stated
    return None

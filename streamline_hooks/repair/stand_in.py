"""Replacements of windows: what they are, how they are placed, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.repair.folded import Folded, Scaled
from streamline_hooks.replacements import InheritedBlocks
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.layout import Layout

StandIn = nn.Module | Folded | Scaled | None
"""Nothing, a module without a slot, one of the blocks' own class or several (`InheritedBlocks`), a map that is folded
into the block before the window, or a factor that is folded into the weights before it."""


Batches = Sequence[Batch | Tensor]
_Item = TypeVar("_Item")
_Fitted = TypeVar("_Fitted")


@dataclass(frozen=True)
class Repair:
    """What was fitted for one window.

    Attributes
    ----------
    window : range
    stand_in : StandIn
        What stands in its place; None for plain removal.
    removal_error, repaired_error : float
        Mean relative squared error of the state after the window on held-out sequences, of plain removal and of the
        stand-in as it was fitted without them, in the model that the windows before it were taken out of. (A factor is
        measured on all sequences, and so are the errors with it.)
    ridge : float or None
        Chosen for it, in units of the mean eigenvalue of the moments; None where nothing was solved for.
    """

    window: range
    stand_in: StandIn
    removal_error: float
    repaired_error: float
    ridge: float | None


def fit_possible(
    items: Sequence[_Item], fit: Callable[[Sequence[_Item]], Sequence[_Fitted]]
) -> list[_Fitted | UnsupportedSurgery]:
    """Fit in as few calls as possible, halving the items where `fit` raises UnsupportedSurgery for one of them."""
    try:
        return list(fit(items))
    except UnsupportedSurgery as error:
        if len(items) == 1:
            return [error]
        half = len(items) // 2
        return fit_possible(items[:half], fit) + fit_possible(items[half:], fit)


@checked()
def place(
    surgeon: LayerSurgeon, window: range, stand_in: StandIn, *, batch: Batch | Tensor | None = None
) -> list[nn.Module]:
    """Put the replacement of a window into the model of an open surgeon.

    Parameters
    ----------
    surgeon : LayerSurgeon
    window : range
        Consecutive blocks, numbered as when the surgeon opened.
    stand_in : StandIn
        Of several inherited blocks, each replaces one block of the window and the last all that remain.
    batch : mapping or torch.Tensor, optional
        Batch without padding to probe a model that cannot be probed otherwise, if weights are folded.

    Returns
    -------
    list of torch.nn.Module
        The trained modules that are now in the model: the replacement, or its parts without frozen parameters.

    Raises
    ------
    UnsupportedSurgery, StreamlineError
        As `LayerSurgeon.replace`, `LayerSurgeon.fold` and `LayerSurgeon.scale`; close the surgeon then.

    Examples
    --------
    >>> from streamline_hooks import LayerSurgeon, LinearReplacement
    >>> from streamline_hooks.testing import tiny_model
    >>> with LayerSurgeon(tiny_model("llama")) as surgeon:
    ...     (module,) = place(surgeon, range(2, 5), LinearReplacement(64))
    ...     len(surgeon.plan.slots), module.projection.weight.requires_grad
    (5, True)
    """
    if isinstance(stand_in, InheritedBlocks):
        starts = range(window.start, window.start + len(stand_in))
        parts = [range(k, k + 1) for k in starts[:-1]] + [range(starts[-1], window.stop)]
        placed = [surgeon.replace(part, block) for part, block in zip(parts, stand_in, strict=True)]
    elif isinstance(stand_in, Folded):
        surgeon.fold(window.start - 1, stand_in.map, batch=batch)
        placed = [surgeon.replace(window, None)]
    elif isinstance(stand_in, Scaled):
        placed = [surgeon.replace(window, None)]
        surgeon.scale(window.stop, stand_in.factor, batch=batch)
    else:
        placed = [surgeon.replace(window, stand_in)]
    return [part for module in placed if module is not None for part in _trained(module)]


def blocks_of(stack: BlockStack, stand_in: StandIn) -> tuple[nn.Module, ...]:
    """Return the blocks of the model's class in a replacement, each of which takes a slot."""
    if isinstance(stand_in, InheritedBlocks):
        return tuple(stand_in)
    if isinstance(stand_in, nn.Module) and Layout(list(stack.blocks)).takes_slot(stand_in):
        return (stand_in,)
    return ()


def is_spliced(stack: BlockStack, stand_in: StandIn) -> bool:
    """Whether a replacement is None or a module without a slot, and depends on the states before the window alone."""
    return stand_in is None or (isinstance(stand_in, nn.Module) and not blocks_of(stack, stand_in))


def _trained(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module, or its parts without frozen parameters."""
    parameters = list(module.parameters())
    own = list(module.parameters(recurse=False))
    if parameters and (all(p.requires_grad for p in parameters) or any(p.requires_grad for p in own)):
        yield module
        return
    for child in module.children():
        yield from _trained(child)


@dataclass(frozen=True)
class StandInSize:
    """Cost of a replacement.

    Attributes
    ----------
    parameters : int
    flops_per_token : int or None
        Twice the weights of linear layers, without attention to other tokens; None if unknown (mixtures of experts).
    slots : int
        Number of its blocks, each with a cache entry.
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
    """Return the FLOPs of the linear layers, or None if a block has other matrices."""
    layers = [module for module in block.modules() if isinstance(module, (nn.Linear, Conv1D))]
    known = {id(p) for layer in layers for p in layer.parameters()}
    if any(p.ndim > 1 and id(p) not in known for p in block.parameters()) or any(
        isinstance(module, nn.ModuleList) and len(module) > 1
        for module in block.modules()  # experts
    ):
        return None
    return 2 * sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1)


def features_of(stack: BlockStack) -> int:
    """Return the width of the residual stream, from the config, the norms of the blocks or the embeddings.

    Raises
    ------
    StreamlineError
        If none of them tells it.
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
    """Return the width of a block's MLP from the config, or None."""
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        stated = getattr(stack.config, name, None)
        if isinstance(stated, (list, tuple)) and len(stated) == len(stack):
            stated = stated[k]
        if isinstance(stated, int) and not isinstance(stated, bool):
            return stated
    return None

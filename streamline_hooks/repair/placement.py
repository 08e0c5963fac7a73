"""Fitted replacements of windows, their placement in a model, and their size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamline_hooks.core import Batch, StreamlineError, UnsupportedSurgery, validate_arguments
from streamline_hooks.modeling import BlockStack
from streamline_hooks.repair.fold import FoldedMap, ScaleFactor
from streamline_hooks.repair.inherited_blocks import InheritedBlocks
from streamline_hooks.surgery import LayerSurgeon, StackLayout

WindowReplacement = nn.Module | FoldedMap | ScaleFactor | None
"""The replacement of a window. None is plain removal. A module of the model's block class, or several
(`InheritedBlocks`), take slots; any other module takes none. A `FoldedMap` or `ScaleFactor` is folded into existing
weights."""


_Item = TypeVar("_Item")
_Fitted = TypeVar("_Fitted")


@dataclass(frozen=True)
class Repair:
    """A fitted replacement of one window.

    Attributes
    ----------
    window : range
    replacement_module : WindowReplacement
        The replacement; None for plain removal.
    removal_error, repaired_error : float
        Mean relative squared error of the state after the window on the held-out sequences: of plain removal, and of
        the replacement fitted without these sequences. Both are measured in the model in which earlier windows are
        already replaced. A `ScaleFactor` is measured on all sequences.
    ridge : float or None
        The chosen ridge in units of the mean eigenvalue of the moments; None without least squares.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.repair import ScaleConfig, fit_windows
    >>> from streamline_hooks.testing import tiny_model
    >>> model, batches = tiny_model("llama"), [torch.arange(3, 63).view(6, 10)]
    >>> (repair,) = fit_windows(model, [range(2, 4)], ScaleConfig(), batches, batches)
    >>> repair.window, type(repair.replacement_module).__name__, repair.ridge
    (range(2, 4), 'ScaleFactor', None)
    """

    window: range
    replacement_module: WindowReplacement
    removal_error: float
    repaired_error: float
    ridge: float | None


def fit_possible(
    items: Sequence[_Item], fit: Callable[[Sequence[_Item]], Sequence[_Fitted | UnsupportedSurgery]]
) -> list[_Fitted | UnsupportedSurgery]:
    """Fit all items in one call; if it raises UnsupportedSurgery, halve the items recursively and fit each part."""
    try:
        return list(fit(items))
    except UnsupportedSurgery as error:
        if len(items) == 1:
            return [error]
        half = len(items) // 2
        return fit_possible(items[:half], fit) + fit_possible(items[half:], fit)


@validate_arguments()
def insert_replacement(
    surgeon: LayerSurgeon, window: range, replacement_module: WindowReplacement, *, batch: Batch | Tensor | None = None
) -> list[nn.Module]:
    """Replace a window in the model of an open surgeon.

    Parameters
    ----------
    surgeon : LayerSurgeon
    window : range
        Consecutive blocks, numbered as when the surgeon opened.
    replacement_module : WindowReplacement
        Each of several inherited blocks replaces one block of the window, and the last one all remaining blocks.
    batch : mapping or torch.Tensor, optional
        A batch without padding. Required only to fold weights in a model that cannot be probed with random tokens.

    Returns
    -------
    list of torch.nn.Module
        The modules to train: the replacement, or its submodules without frozen parameters.

    Raises
    ------
    UnsupportedSurgery, StreamlineError
        For the reasons of `LayerSurgeon.replace`, `LayerSurgeon.fold` and `LayerSurgeon.scale`. The model is then only
        partly changed; close the surgeon to restore it.

    Examples
    --------
    >>> from streamline_hooks import LayerSurgeon
    >>> from streamline_hooks.replacements import LinearReplacement
    >>> from streamline_hooks.testing import tiny_model
    >>> with LayerSurgeon(tiny_model("llama")) as surgeon:
    ...     (module,) = insert_replacement(surgeon, range(2, 5), LinearReplacement(64))
    ...     len(surgeon.plan.slots), module.projection.weight.requires_grad
    (5, True)
    """
    if isinstance(replacement_module, InheritedBlocks):
        starts = range(window.start, window.start + len(replacement_module))
        parts = [range(k, k + 1) for k in starts[:-1]] + [range(starts[-1], window.stop)]
        placed_modules = [surgeon.replace(part, block) for part, block in zip(parts, replacement_module, strict=True)]
    elif isinstance(replacement_module, FoldedMap):
        surgeon.fold(window.start - 1, replacement_module.map, batch=batch)
        placed_modules = [surgeon.replace(window, None)]
    elif isinstance(replacement_module, ScaleFactor):
        placed_modules = [surgeon.replace(window, None)]
        surgeon.scale(window.stop, replacement_module.factor, batch=batch)
    else:
        placed_modules = [surgeon.replace(window, replacement_module)]
    return [part for module in placed_modules if module is not None for part in _trainable_parts(module)]


def blocks_of(stack: BlockStack, replacement_module: WindowReplacement) -> tuple[nn.Module, ...]:
    """Return the blocks in a replacement that are of the model's block class; each takes a slot."""
    if isinstance(replacement_module, InheritedBlocks):
        return tuple(replacement_module)
    if isinstance(replacement_module, nn.Module) and StackLayout(list(stack.blocks)).takes_slot(replacement_module):
        return (replacement_module,)
    return ()


def is_spliced(stack: BlockStack, replacement_module: WindowReplacement) -> bool:
    """Whether a replacement depends only on the state before the window: None, or a module without a slot."""
    return replacement_module is None or (
        isinstance(replacement_module, nn.Module) and not blocks_of(stack, replacement_module)
    )


def _trainable_parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module, or its largest submodules without frozen parameters."""
    parameters = list(module.parameters())
    direct_parameters = list(module.parameters(recurse=False))
    if parameters and (all(p.requires_grad for p in parameters) or any(p.requires_grad for p in direct_parameters)):
        yield module
        return
    for child in module.children():
        yield from _trainable_parts(child)


@dataclass(frozen=True)
class ReplacementSize:
    """Size of a replacement.

    Attributes
    ----------
    parameters : int
        Number of parameters.
    flops_per_token : int or None
        FLOPs per token: twice the weights of the linear layers, without attention scores. None if unknown, as for
        mixtures of experts.
    slots : int
        Number of slots in the stack and in the KV cache.

    Examples
    --------
    >>> print(ReplacementSize(parameters=512, flops_per_token=1024, slots=0))
    512 parameters, 1,024 FLOPs per token, no slot
    """

    parameters: int
    flops_per_token: int | None
    slots: int

    def __str__(self) -> str:
        flops = "FLOPs not stated" if self.flops_per_token is None else f"{self.flops_per_token:,} FLOPs per token"
        return f"{self.parameters:,} parameters, {flops}, {self.slots or 'no'} slot{'s' * (self.slots > 1)}"


def replacement_size(stack: BlockStack, replacement_module: WindowReplacement) -> ReplacementSize:
    """Return the size of a replacement, which may be on the meta device.

    Parameters
    ----------
    stack : BlockStack
        The stack that the replacement is for.
    replacement_module : WindowReplacement

    Returns
    -------
    ReplacementSize

    Examples
    --------
    >>> from streamline_hooks import find_stack
    >>> from streamline_hooks.replacements import LinearReplacement
    >>> from streamline_hooks.testing import tiny_model
    >>> size = replacement_size(find_stack(tiny_model("llama")), LinearReplacement(64, rank=4))
    >>> size.parameters, size.flops_per_token, size.slots
    (512, 1024, 0)
    """
    if not isinstance(replacement_module, nn.Module):  # folded into existing weights
        return ReplacementSize(0, 0, 0)
    blocks = blocks_of(stack, replacement_module)
    parameters = sum(p.numel() for p in replacement_module.parameters())
    if not blocks:
        return ReplacementSize(parameters, getattr(replacement_module, "flops_per_token", None), 0)
    block_flops = [_flops_of_block(block) for block in blocks]
    known_flops = [flops for flops in block_flops if flops is not None]
    return ReplacementSize(parameters, sum(known_flops) if len(known_flops) == len(block_flops) else None, len(blocks))


def _flops_of_block(block: nn.Module) -> int | None:
    """Return the FLOPs per token of the linear layers of a block, or None if it has other matrices."""
    layers = [module for module in block.modules() if isinstance(module, (nn.Linear, Conv1D))]
    layer_parameters = {id(p) for layer in layers for p in layer.parameters()}
    experts = any(isinstance(module, nn.ModuleList) and len(module) > 1 for module in block.modules())
    if experts or any(p.ndim > 1 and id(p) not in layer_parameters for p in block.parameters()):
        return None
    return 2 * sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1)


def hidden_size_of(stack: BlockStack) -> int:
    """Return the width of the residual stream.

    It is read from the config, the norms of the blocks or the embeddings. Raises StreamlineError if all three are
    missing or ambiguous.
    """
    hidden_size = getattr(stack.config, "hidden_size", None)
    if isinstance(hidden_size, int) and stack.stage is None:
        return hidden_size
    children = (child for block in stack.blocks for child in block.children())
    norms = {tuple(child.normalized_shape) for child in children if isinstance(child, (nn.LayerNorm, nn.RMSNorm))}
    if len(norms) == 1 and len(shape := norms.pop()) == 1:
        return int(shape[0])
    block_modules = {id(module) for block in stack.blocks for module in block.modules()}
    tables = [m for m in stack.model.modules() if isinstance(m, nn.Embedding) and id(m) not in block_modules]
    if not tables:
        raise StreamlineError(
            f"The hidden size of {type(stack.model).__name__} is unknown: its config has no hidden_size, its blocks "
            "have no norms of equal width, and it has no embedding outside the blocks. Build a module of the right "
            "width and insert it with LayerSurgeon.replace."
        )
    return max(tables, key=lambda table: table.num_embeddings).embedding_dim


def inner_width_of(stack: BlockStack, k: int) -> int | None:
    """Return the MLP width of block `k` from the config, or None."""
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        width = getattr(stack.config, name, None)
        if isinstance(width, (list, tuple)) and len(width) == len(stack):
            width = width[k]
        if isinstance(width, int) and not isinstance(width, bool):
            return width
    return None

"""What stands in a window's place, and how it is put there."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.repair.folded import Folded
from streamline_hooks.repair.scaled import Scaled
from streamline_hooks.replacements import InheritedBlocks
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.layout import Layout

StandIn = nn.Module | Folded | Scaled | None
"""Nothing, a module without a slot, one of the blocks' own class or several (`InheritedBlocks`), a map that is folded
into the block before the window, or a factor that is folded into the weights before it."""


@checked()
def place(
    surgeon: LayerSurgeon, window: range, stand_in: StandIn, *, batch: Batch | Tensor | None = None
) -> list[nn.Module]:
    """Put what stands in a window's place there, in an open surgeon.

    Parameters
    ----------
    surgeon : LayerSurgeon
    window : range
        Consecutive blocks, in the numbering when the surgeon opened.
    stand_in : StandIn
        Of several inherited blocks each takes the place of one block of the window, and the last of all the rest.
    batch : mapping or torch.Tensor, optional
        For what is folded: what to run a model on that cannot be probed otherwise, without padding.

    Returns
    -------
    list of torch.nn.Module
        Those that are now in the model and are trained: the stand-in itself, or of one with parameters that require
        no gradient (the projection of a silenced attention) the parts without such.

    Raises
    ------
    UnsupportedSurgery, StreamlineError
        As `LayerSurgeon.replace`, `LayerSurgeon.fold` and `LayerSurgeon.scale` do; the surgery may be half done then,
        and is to be left.

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
    """The blocks of the model's own class that a stand-in is, each of which takes a slot; none of any other."""
    if isinstance(stand_in, InheritedBlocks):
        return tuple(stand_in)
    if isinstance(stand_in, nn.Module) and Layout(list(stack.blocks)).takes_slot(stand_in):
        return (stand_in,)
    return ()


def is_spliced(stack: BlockStack, stand_in: StandIn) -> bool:
    """Whether nothing but a module without a slot, or nothing at all, stands in a window's place.

    What the model says with it is then known from the states before the window alone.
    """
    return stand_in is None or (isinstance(stand_in, nn.Module) and not blocks_of(stack, stand_in))


def _trained(module: nn.Module) -> Iterator[nn.Module]:
    """The module, or where some of its parameters are frozen, the parts that hold those that are not."""
    parameters = list(module.parameters())
    own = list(module.parameters(recurse=False))
    if parameters and (all(p.requires_grad for p in parameters) or any(p.requires_grad for p in own)):
        yield module
        return
    for child in module.children():
        yield from _trained(child)

"""Run a model at several depths: leave out windows, and run other modules in their place.

The cuts of a model are stored on the model, but they are not part of it: its parameters, state dict and checkpoint are
those of the full depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from streamline_hooks.core import StreamlineError, describe_blocks, validate_arguments
from streamline_hooks.modeling import find_stack
from streamline_hooks.surgery.layout import StackLayout
from streamline_hooks.surgery.session import refuse_open_surgery
from streamline_hooks.surgery.surgeon import LayerSurgeon

_CUTS = "_streamline_depth_cuts"
_BLOCKS_OF_CACHE = "_streamline_blocks"
_CACHES = ("past_key_values", "cache", "cache_params")


@dataclass(frozen=True, eq=False)
class DepthCut:
    """Windows that a model leaves out at one depth.

    Attributes
    ----------
    windows : tuple of range
        Windows of the full model, in order, with at least one block between two windows.
    modules : tuple of torch.nn.Module or None
        For each window, the module that runs in its place, or None. It maps (batch, tokens, features) to the same
        shape.

    Examples
    --------
    >>> sorted(DepthCut((range(2, 4), range(6, 7)), (nn.Identity(), None)).removed)
    [2, 3, 6]
    """

    windows: tuple[range, ...]
    modules: tuple[nn.Module | None, ...]

    def __post_init__(self) -> None:
        if len(self.windows) != len(self.modules) or not self.windows:
            raise StreamlineError(
                f"DepthCut has {len(self.windows)} windows and {len(self.modules)} modules. Expected one module or "
                "None for each window, and at least one window. Pass None for a window without a replacement."
            )

    @property
    def removed(self) -> frozenset[int]:
        """The blocks that do not run."""
        return frozenset(k for window in self.windows for k in window)

    def apply(self, surgeon: LayerSurgeon, *, despite_hazards: bool = False) -> None:
        """Replace the windows in the model of an open surgeon."""
        for window, module in zip(self.windows, self.modules, strict=True):
            surgeon.replace(window, module, despite_hazards=despite_hazards)


@dataclass(frozen=True, eq=False)
class DepthCuts:
    """The cuts of a model by depth, the deepest first; stored on the model by `set_depths`."""

    stack: str
    blocks: int
    by_depth: Mapping[int, DepthCut]


@validate_arguments()
def set_depths(model: nn.Module, cuts: Sequence[DepthCut], *, stack: str | None = None) -> None:
    """Let a model run at several depths, see `at_depth`.

    Each cut is applied once and verified as by `LayerSurgeon.replace`. The model itself does not change: the modules of
    the cuts are not among its parameters, and `save_pretrained` writes the full model.

    Parameters
    ----------
    model : torch.nn.Module
    cuts : sequence of DepthCut
        Nested cuts of different depths: each leaves out the blocks of the cuts with more blocks. An empty sequence
        removes the cuts of the model.
    stack : str, optional
        Path of the stack, if the model has several; see `find_stack`.

    Raises
    ------
    UnsupportedSurgery
        If a window cannot be removed.
    StreamlineError
        If the cuts are not nested, two have the same depth, or a module is a block of the model, which would take a
        cache slot of its own.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> set_depths(model, [DepthCut((range(2, 4),), (None,)), DepthCut((range(2, 6),), (None,))])
    >>> depths_of(model)
    (8, 6, 4)
    """
    block_stack = find_stack(model, stack)
    refuse_open_surgery(block_stack, "set_depths")
    ordered = sorted(cuts, key=lambda cut: len(cut.removed))
    for cut in ordered:
        _check_modules(cut, StackLayout(list(block_stack.blocks)))
    for smaller, larger in pairwise(ordered):
        if not smaller.removed < larger.removed:
            raise StreamlineError(
                f"set_depths: the cuts of {sorted(smaller.removed)} and {sorted(larger.removed)} are not nested. "
                "Expected cuts that leave out all blocks of smaller cuts, each of another depth. Choose other windows."
            )
    for cut in ordered:
        with LayerSurgeon(model, block_stack.path) as surgeon:
            cut.apply(surgeon)
    by_depth = {len(block_stack) - len(cut.removed): cut for cut in ordered}
    attach_depths(model, DepthCuts(block_stack.path, len(block_stack), by_depth))


def attach_depths(model: nn.Module, cuts: DepthCuts) -> None:
    """Store verified cuts on a model."""
    if not cuts.by_depth:
        vars(model).pop(_CUTS, None)
        return
    vars(model)[_CUTS] = cuts
    if _check_cache not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_check_cache, prepend=True, with_kwargs=True)
        model.register_forward_hook(_mark_cache)


def is_elastic(model: nn.Module) -> bool:
    """Whether a model has several depths, see `fit_depths`."""
    return _CUTS in vars(model)


def depth_cuts_of(model: nn.Module) -> DepthCuts:
    """Return the cuts of a model; raise StreamlineError if it has none."""
    cuts: DepthCuts | None = vars(model).get(_CUTS)
    if cuts is None:
        raise StreamlineError(
            f"This {type(model).__name__} has one depth. Expected a model with several. Call fit_depths, or load a "
            "folder that save_elastic wrote."
        )
    return cuts


@validate_arguments()
def depths_of(model: nn.Module) -> tuple[int, ...]:
    """Return the numbers of blocks with which a model can run, largest first; see `at_depth`.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    tuple of int

    Raises
    ------
    StreamlineError
        If the model has one depth.
    """
    cuts = depth_cuts_of(model)
    return (cuts.blocks, *sorted(cuts.by_depth, reverse=True))


@contextmanager
def at_depth(model: nn.Module, depth: int) -> Iterator[nn.Module]:
    """Run a model with fewer blocks inside a ``with`` statement.

    The blocks that are left out stay in memory, and the weights of the others are those of the full model. When the
    context is left, the model runs at full depth again, bit for bit as before.

    Parameters
    ----------
    model : torch.nn.Module
        A model with several depths, from `fit_depths`, `set_depths` or ``load`` of a folder that `save_elastic` wrote.
    depth : int
        Number of blocks, one of `depths_of`.

    Yields
    ------
    torch.nn.Module
        The same model.

    Raises
    ------
    StreamlineError
        If the model has no such depth, its blocks changed since the cuts were made, or it is inside another `at_depth`
        or an open `LayerSurgeon`.

    Notes
    -----
    All threads see the depth: another thread that runs the model inside the context runs this depth. A cache of keys
    and values belongs to the depth at which it was filled; running the model with it at another depth raises.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> set_depths(model, [DepthCut((range(2, 4),), (None,))])
    >>> with at_depth(model, 6):
    ...     len(model.model.layers)
    6
    >>> len(model.model.layers)
    8
    """
    cuts = depth_cuts_of(model)
    stack = find_stack(model, cuts.stack)
    refuse_open_surgery(stack, "at_depth")
    if depth not in (cuts.blocks, *cuts.by_depth):
        raise StreamlineError(
            f"at_depth: depth={depth!r} is unknown. Expected one of {', '.join(map(str, depths_of(model)))}. Choose "
            "one of them, or fit others with fit_depths."
        )
    if len(stack) != cuts.blocks:
        raise StreamlineError(
            f"at_depth: {cuts.stack} has {len(stack)} blocks, but its cuts were made for {cuts.blocks}. Expected the "
            "blocks of the full depth. Load the folder again, or fit the depths of this model."
        )
    if depth == cuts.blocks:
        yield model
        return
    with LayerSurgeon(model, cuts.stack, probe=False) as surgeon:
        cuts.by_depth[depth].apply(surgeon, despite_hazards=True)  # verified by set_depths
        yield model


def _check_modules(cut: DepthCut, layout: StackLayout) -> None:
    for window, module in zip(cut.windows, cut.modules, strict=True):
        if module is not None and layout.takes_slot(module):
            raise StreamlineError(
                f"The module for {describe_blocks(window)} is a {type(module).__name__}, a block of the model. "
                "Expected a module that takes no cache slot, because a depth counts blocks. Use a replacement such as "
                "LinearReplacement."
            )


def _cache_of(values: Any) -> Any:
    """Return the cache of keys and values in a mapping of arguments or an output, or None."""
    get = values.get if isinstance(values, Mapping) else lambda name: getattr(values, name, None)
    return next((cache for name in _CACHES if (cache := get(name)) is not None), None)


def _check_cache(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if the cache of a call was filled at another depth, as a forward pre-hook."""
    if torch.compiler.is_compiling() or not is_elastic(model):
        return
    cache = _cache_of(kwargs)
    if cache is None:
        return
    now = _current_depth(model)
    before = getattr(cache, _BLOCKS_OF_CACHE, now)
    if before != now and cache.get_seq_length() > 0:
        raise StreamlineError(
            f"The cache was filled with {before} blocks, but {type(model).__name__} runs with {now} now. Expected a "
            "cache of the same depth. Run the prompt again at this depth."
        )
    _mark(cache, now)


def _mark_cache(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Mark a cache that the model created with the depth, as a forward hook."""
    if torch.compiler.is_compiling() or not is_elastic(model):
        return
    cache = _cache_of(output)
    if cache is not None:
        _mark(cache, _current_depth(model))


def _current_depth(model: nn.Module) -> int:
    return len(model.get_submodule(depth_cuts_of(model).stack)._modules)


def _mark(cache: Any, blocks: int) -> None:
    if not isinstance(cache, tuple):
        setattr(cache, _BLOCKS_OF_CACHE, blocks)
